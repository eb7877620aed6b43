"""The engine: every item once, failures kept apart, memory respected."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from threadpoolctl import threadpool_info

from deltaspec.engine.local import resolve_devices, run
from deltaspec.errors import OptionError

TWO = [torch.device("cpu")] * 2


def test_every_item_ends_once_and_a_failure_stops_nothing():
    def work(item, device):
        if item == 3:
            message = "three"
            raise ValueError(message)
        return item * 10

    outcomes = {o.item: o for o in run(range(6), work, devices=TWO, cost=lambda _: 1, budget=10)}
    assert {i: o.value for i, o in outcomes.items()} == {0: 0, 1: 10, 2: 20, 3: None, 4: 40, 5: 50}
    assert [i for i, o in outcomes.items() if o.failure] == [3]


@pytest.mark.parametrize(("budget", "most"), [(1, 1), (2, 2), (100, 2)])
def test_what_is_in_flight_fits_the_budget(budget, most):
    lock, now, peak = threading.Lock(), [0], [0]

    def work(item, device):
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    assert len(list(run(range(8), work, devices=TWO, cost=lambda _: 1, budget=budget))) == 8
    assert peak[0] == most


def test_an_item_over_the_budget_runs_alone_and_small_ones_pass_it():
    order = []

    def work(item, device):
        order.append(item)
        time.sleep(0.05)

    list(run([9, 8, 1], work, devices=TWO, cost=lambda item: item, budget=10))
    assert order[:2] == [9, 1]


def test_each_item_has_one_blas_thread():
    def work(item, device):
        return {i["num_threads"] for i in threadpool_info() if i["internal_api"] == "openblas"}, torch.get_num_threads()

    for outcome in run(range(3), work, devices=TWO, cost=lambda _: 1, budget=10):
        assert outcome.value == ({1}, 1)


def test_the_callers_threads_are_given_back():
    before = torch.get_num_threads(), {i["filepath"]: i["num_threads"] for i in threadpool_info()}
    list(run(range(3), lambda item, device: item, devices=TWO, cost=lambda _: 1, budget=10))
    assert (torch.get_num_threads(), {i["filepath"]: i["num_threads"] for i in threadpool_info()}) == before


def test_out_of_memory_is_tried_again_alone():
    tries, running = [], []

    def work(item, device):
        running.append(item)
        alone = len(running) == 1
        time.sleep(0.05)
        running.remove(item)
        if item == 0 and not tries:
            tries.append(item)
            message = "CUDA out of memory"
            raise torch.OutOfMemoryError(message)
        return alone

    outcomes = {o.item: o for o in run(range(4), work, devices=TWO, cost=lambda _: 1, budget=10)}
    assert outcomes[0].failure is None
    assert outcomes[0].value is True


def test_devices():
    assert resolve_devices("cpu", 3) == [torch.device("cpu")] * 3
    assert len(resolve_devices("cpu")) >= 1
    if not torch.cuda.is_available():
        assert resolve_devices("auto", 1) == [torch.device("cpu")]
        for name in ("cuda", "cuda:0,cuda:1"):
            with pytest.raises(OptionError, match="0 CUDA devices"):
                resolve_devices(name)
