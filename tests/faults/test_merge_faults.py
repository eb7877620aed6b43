"""A merge that is killed, runs out of disk or meets bad numbers: the next one goes on, and nothing half is left."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError, NumericalError, RunError
from deltaspec.io.matrix import read_tensor
from deltaspec.options import MergeOptions
from deltaspec.workflows.merging.merge import merge
from tests.families import write
from tests.pairing.test_adapters import adapter, factors

COMMAND = [sys.executable, "-c", "from deltaspec.cli.main import main; main()", "merge"]
NAMES = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(8) for p in "qkvo"]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """16 shards, each long enough that a kill meets some done, one in flight and some waiting."""
    folder = tmp_path_factory.mktemp("sides")
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(640, 640, generator=generator).bfloat16() for name in NAMES}
    base = write(folder / "base", state, {"model_type": "llama"}, shards=16)
    parts = {name.removesuffix(".weight"): factors(640, 640, seed=i) for i, name in enumerate(NAMES)}
    return base, adapter(folder / "lora", parts)


def contents(folder):
    """Every file but the report, which says when its inputs were opened under which names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(out):
    return sorted(out.parent.glob(f"{out.name}.partial-*/rows/*.json"))


def test_kills_at_random_moments_change_nothing(sides, tmp_path):
    """SIGKILL while shards are written, several times on one merge; finished shards are kept, the end is the same."""
    base, lora = sides
    merge(base, [lora], tmp_path / "whole")
    out, rng, partial, kept = tmp_path / "killed", random.Random(0), 0, {}
    for _ in range(6):
        before = len(finished(out))
        process = subprocess.Popen(
            [*COMMAND, str(base), str(lora), "-o", str(out), "--quiet"], stdout=subprocess.DEVNULL
        )
        wait_until = time.monotonic() + 60
        while time.monotonic() < wait_until and process.poll() is None and len(finished(out)) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        partial += 0 < len(finished(out)) < 16
        stamps = {path: path.stat().st_mtime_ns for path in finished(out)}
        assert kept.items() <= stamps.items()
        kept = stamps
    assert partial >= 2
    if not out.exists():
        steps = []
        merge(base, [lora], out, progress=steps.append)
        assert steps[0].total == 2 * (16 - len(kept))
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def test_another_merge_shares_nothing_with_a_killed_one(sides, tmp_path, monkeypatch):
    """Other weights, other options: other pieces."""
    base, lora = sides
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [lora], tmp_path / "out")
    monkeypatch.undo()
    for adapters, options in (([f"{lora}:2"], MergeOptions()), ([lora], MergeOptions("fp32"))):
        steps = []
        merge(base, adapters, tmp_path / "out", options=options, overwrite=True, progress=steps.append)
        assert steps[0].total == len(NAMES)


def stop_after(monkeypatch, count, error=KeyboardInterrupt()):  # noqa: B008 (never changed)
    """Let so many files reach the disk, then fail as the next one does."""
    sync, calls = os.fsync, []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) > count:
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


def test_interrupting_says_how_to_go_on(sides, tmp_path):
    base, lora = sides
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, str(base), str(lora), "-o", str(out), "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not finished(out):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert b"Traceback" not in errors
    assert b"same command" in errors
    assert not out.exists()


@pytest.mark.parametrize("written", [0, 3, 33])
def test_a_full_disk_is_one_sentence_and_the_merge_goes_on_when_there_is_room(written, sides, tmp_path, monkeypatch):
    base, lora = sides
    stop_after(monkeypatch, written, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(RunError, match=r"Cannot write .*No space left on device") as caught:
        merge(base, [lora], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    steps = []
    merge(base, [lora], tmp_path / "out", progress=steps.append)
    assert steps[0].total == len(NAMES) - 2 * min(written // 2, 16)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_full_disk_while_copying_what_lies_beside(sides, tmp_path, monkeypatch):
    base, lora = sides

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(RunError, match=r"Cannot write .*config\.json.*No space left"):
        merge(base, [lora], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_read_only_place_is_named(sides):
    """/proc refuses new folders to everyone, root included."""
    with pytest.raises(RunError, match="Cannot write '/proc/"):
        merge(sides[0], [sides[1]], "/proc/deltaspec/out")


@pytest.mark.parametrize(("value", "side", "said"), [
    (float("nan"), "base", "the base holds NaN"),
    (float("inf"), "lora", "the adapter holds NaN"),
])  # fmt: skip
def test_bad_numbers_are_named_and_nothing_is_written(value, side, said, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    state = {f"{name}.weight": torch.ones(6, 5), "model.norm.weight": torch.full((3,), float("nan"))}
    lora_A, lora_B = factors(6, 5)
    (state[f"{name}.weight"] if side == "base" else lora_A)[2, 1] = value
    base, lora = write(tmp_path / "base", state, {}), adapter(tmp_path / "lora", {name: (lora_A, lora_B)})
    with pytest.raises(NumericalError, match=rf"'{name}\.weight' of .*{said}"):
        merge(base, [lora], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_numbers_elsewhere_in_the_base_are_copied(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    state = {f"{name}.weight": torch.ones(6, 5), "mask": torch.tensor([float("-inf"), float("nan"), 1.0])}
    base, lora = write(tmp_path / "base", state, {}), adapter(tmp_path / "lora", {name: factors(6, 5)})
    for dtype in ("auto", "fp16"):
        merge(base, [lora], tmp_path / dtype, options=MergeOptions(dtype))
        found = load_file(tmp_path / dtype / "model.safetensors")["mask"]
        assert torch.equal(found.isfinite(), state["mask"].isfinite())


def test_a_dtype_too_narrow_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    state = {f"{name}.weight": torch.ones(6, 5), "model.norm.weight": torch.full((3,), 1e5)}
    base, lora = write(tmp_path / "base", state, {}), adapter(tmp_path / "lora", {name: factors(6, 5)})
    with pytest.raises(NumericalError, match=r"'model\.norm\.weight'.*float16.*bf16"):
        merge(base, [lora], tmp_path / "out", options=MergeOptions("fp16"))


def test_a_base_edited_since_it_was_merged_in_part_is_merged_anew(tmp_path, monkeypatch):
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    state = {name: torch.ones(300, 300) for name in names}
    base = write(tmp_path / "base", state, {}, shards=2)
    lora = adapter(tmp_path / "lora", {names[0].removesuffix(".weight"): factors(300, 300)})
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [lora], tmp_path / "out")
    monkeypatch.undo()
    file = next(Path(base).glob("model-00001*"))
    edited = load_file(file)
    edited[names[0]][150, 150] = 7.0
    save_file(edited, file)
    merge(base, [lora], tmp_path / "out")
    found = load_file(tmp_path / "out" / file.name)[names[0]]
    lora_A, lora_B = factors(300, 300)
    assert float(found[150, 150]) == pytest.approx(7 + 2 * float(lora_B[150] @ lora_A[:, 150]), rel=1e-5)


def test_an_interrupt_that_a_library_swallows_is_one_all_the_same(sides, tmp_path, monkeypatch):
    """safetensors answers it with an error of its own; the command must not blame the file."""
    count, before = [], signal.getsignal(signal.SIGINT)

    def swallow(spec):
        count.append(spec)
        if len(count) == 9:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            message = "could not determine the shape"
            raise CheckpointError(message)
        return read_tensor(spec)

    monkeypatch.setattr("deltaspec.io.matrix.read_tensor", swallow)
    words = [str(word) for word in ("merge", *sides, "-o", tmp_path / "out", "--quiet")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "same command" in result.output
    assert signal.getsignal(signal.SIGINT) is before
    count.extend([None] * 9)
    assert CliRunner().invoke(cli, words).exit_code == 0
