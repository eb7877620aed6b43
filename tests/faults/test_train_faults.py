"""Trainings that are killed, interrupted, or cannot write: at most the steps since the last checkpoint are lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from deltaspec.errors import CheckpointError, NumericalError, RunError
from deltaspec.store import training_folder
from deltaspec.workflows.training import session
from tests.workflows.training.train_case import read_bytes, read_lines, run, write_case

COMMAND = [sys.executable, "-c", "from deltaspec.cli.main import main; main()", "train"]
STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert")


def start(root, out):
    """The command line, with a checkpoint after every step."""
    given = [root / "bert", "--data", root / "data.csv", "-o", out, "--holdout", 0.25, "--steps", STEPS, "--batch", 4]
    given += ["--accumulate", 2, "--lr", 0.01, "--device", "cpu", "--checkpoint-every", 1, "--rank", 4]
    given += ["--dropout", 0.3, "--quiet"]
    return subprocess.Popen([*COMMAND, *map(str, given)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(out, step):
    """Wait until a checkpoint is there."""
    until = time.monotonic() + 120
    while not (out / f"checkpoints/step-{step:08}").exists():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_killed_and_interrupted_training_ends_with_the_same_bytes(root, tmp_path):
    """SIGKILL, then SIGINT, then to the end: three processes, one result."""
    out = tmp_path / "out"
    for number, step in ((signal.SIGKILL, 3), (signal.SIGINT, 12)):
        process = start(root, out)
        wait_for(out, step)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
        done = json.loads(sorted(out.glob("checkpoints/*/resume/position.json"))[-1].read_text())["step"]
        assert step <= done < STEPS
    assert said == "Stopped; run the same command again to go on from here.\n"
    process = start(root, out)
    assert process.communicate()[1] == "" and process.returncode == 0
    options = {"method_options": {"rank": 4, "dropout": 0.3}, "run": {"checkpoint_every": 1}, "loop": {"steps": STEPS}}
    run(root, tmp_path / "whole", **options)
    assert read_bytes(out / "final") == read_bytes(tmp_path / "whole/final")
    assert read_lines(out) == read_lines(tmp_path / "whole")
    assert not [*out.rglob("*.tmp"), *out.rglob("resume")]


def test_a_checkpoint_that_cannot_be_written_is_not_there(root, tmp_path, monkeypatch):
    """The disk fills up at the second one; with space again, the training goes on from the first."""
    whole = training_folder.write_tensors
    calls = []

    def fill_up(file, tensors, **given):
        calls.append(file)
        whole(file, tensors, **given)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_folder, "write_tensors", fill_up)
    with pytest.raises(RunError, match=r"step-00000004.*No space left on device"):
        run(root, tmp_path / "out", run={"checkpoint_every": 2})
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000002"]
    seen = []
    run(root, tmp_path / "out", run={"checkpoint_every": 2}, progress=seen.append)
    assert [tick.step for tick in seen] == [3, 4, 5, 6]


def test_what_is_damaged_is_named(root, tmp_path):
    out = tmp_path / "out"

    def stop(tick):
        if tick.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, out, run={"checkpoint_every": 2}, progress=stop)
    state = out / "checkpoints/step-00000002/resume/state.safetensors"
    kept = state.read_bytes()
    state.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        run(root, out, run={"checkpoint_every": 2})
    state.write_bytes(kept)
    (out / "train.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="train.json.*expected"):
        run(root, out, run={"checkpoint_every": 2})


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_sentence(root, tmp_path, monkeypatch, failure):
    def fail(*_args, **_given):
        raise failure

    monkeypatch.setattr(session, "run_loop", fail)
    with pytest.raises(NumericalError, match="Out of memory on cpu: pass a smaller --batch with more --accumulate"):
        run(root, tmp_path / "out")


def test_another_error_stays_what_it_is(root, tmp_path, monkeypatch):
    def fail(*_args, **_given):
        message = "mat1 and mat2 shapes cannot be multiplied"
        raise RuntimeError(message)

    monkeypatch.setattr(session, "run_loop", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        run(root, tmp_path / "out")


SCRIPT = """
import sys
from pathlib import Path

import accelerate
import torch
from torch.distributed.fsdp import fully_shard

from tests.workflows.training.train_case import run

torch.set_num_threads(1)
root = Path(sys.argv[1])
run(root, root / "two", loop={"batch": 2}, method="vera", run={"checkpoint_every": 4})


def shard(accelerator, model, optimizer):
    # What accelerate does under its FSDP plugin, which it refuses to use on CPUs.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for part in (*model.bert.encoder.layer, model):
        fully_shard(part)
    live = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [live[names[id(parameter)]] for parameter in group["params"]]
    return model, optimizer


def stop(tick):
    if tick.step == 5:
        raise KeyboardInterrupt


accelerate.Accelerator.prepare = shard
for progress in (stop, None):
    try:
        run(root, root / "sharded", loop={"batch": 2}, run={"checkpoint_every": 4}, progress=progress)
    except KeyboardInterrupt:
        pass
"""


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Gradients, losses and evaluations are those of all processes; so too with weights that are shared out (FSDP)."""
    root = write_case(tmp_path, "bert")
    config = json.loads((root / "bert/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn by each process
    (root / "bert/config.json").write_text(json.dumps(config))
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [".", os.environ.get("PYTHONPATH", "")]))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, method in (("two", "vera"), ("sharded", "lora")):
        one = run(root, tmp_path / f"one-{name}", method=method, run={"checkpoint_every": 4})
        two = json.loads((tmp_path / name / "train.json").read_text())
        assert two["processes"] == 2 and one["processes"] == 1
        for mine, theirs in zip(read_lines(tmp_path / f"one-{name}"), read_lines(tmp_path / name), strict=True):
            found, expected = (line.get("eval", line) for line in (mine, theirs))
            assert {key: pytest.approx(value, rel=1e-3) for key, value in expected.items()} == found
        assert two["results"]["learned"]["loss"] == pytest.approx(one["results"]["learned"]["loss"], rel=1e-5)
        files = [tmp_path / folder / "final/adapter_model.safetensors" for folder in (name, f"one-{name}")]
        for (key, tensor), other in zip(load_file(files[0]).items(), load_file(files[1]).values(), strict=True):
            assert torch.allclose(tensor, other, atol=1e-4), key
