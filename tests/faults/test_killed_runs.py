"""Killed at any moment, a run goes on where it stopped and ends with the same numbers."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import deltaspec
from deltaspec.errors import RunError
from deltaspec.types import MatrixKey
from tests.families import write

COMMAND = [sys.executable, "-c", "from deltaspec.cli.main import main; main()", "analyze"]


def results(run):
    return [(replace(r, seconds=0.0), run.spectrum(r.store_key).singular_values.tolist()) for r in run.records]


def test_ten_kills_at_random_moments_change_nothing(models, tmp_path):
    """SIGKILL between the first record and the last, ten times on one run; then it finishes."""
    options = deltaspec.AnalyzeOptions()
    expected = results(deltaspec.analyze(*models, tmp_path / "whole", options=options))
    out, rng = tmp_path / "killed", random.Random(0)
    partial = 0
    for _ in range(10):
        process = subprocess.Popen([*COMMAND, *models, "-o", str(out), "--quiet"], stdout=subprocess.DEVNULL)
        before = len(list(out.glob("matrices/*/*.safetensors")))
        wait_until = time.monotonic() + 60
        while time.monotonic() < wait_until and process.poll() is None:
            if len(list(out.glob("matrices/*/*.safetensors"))) > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(list(out.glob("matrices/*/*.safetensors")))
        partial += 0 < done < len(expected)
        assert done == len(deltaspec.Run.load(out).records)
    assert partial >= 3
    assert results(deltaspec.analyze(*models, out, options=options)) == expected
    assert not list(out.rglob("*.tmp"))


def test_a_finished_run_is_returned_and_nothing_computed_again(models, tmp_path):
    first = deltaspec.analyze(*models, tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in first.path.rglob("*.safetensors")}
    steps = []
    again = deltaspec.analyze(*models, tmp_path / "run", progress=steps.append)
    assert {path: path.stat().st_mtime_ns for path in again.path.rglob("*.safetensors")} == stamps
    assert steps[-1].total == 0


def test_interrupting_says_how_to_go_on(models, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, *models, "-o", str(tmp_path / "run"), "--quiet", "--workers", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not list(tmp_path.glob("run/matrices/*/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in errors
    assert b"same command" in errors


def test_a_checkpoint_edited_in_place_is_refused(tmp_path):
    """One row, far from every sample of the fingerprint: the old run must not pass for the new model."""
    state = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4000, 64)}
    base, tuned = (write(tmp_path / side, state, {}) for side in ("base", "tuned"))
    deltaspec.analyze(base, tuned, tmp_path / "run")
    state["model.layers.0.self_attn.q_proj.weight"][1000] = 1.0
    write(tuned, state, {})
    with pytest.raises(RunError, match=r"tuned\.modified"):
        deltaspec.analyze(base, tuned, tmp_path / "run")


def test_a_vector_that_failed_is_tried_again(tmp_path):
    """Repaired without a trace, as after a read error, it succeeds and its failure goes."""
    state = {"model.norm.weight": torch.ones(4), "model.layers.0.self_attn.q_proj.weight": torch.eye(4)}
    base, tuned = (write(tmp_path / side, state, {}) for side in ("base", "tuned"))
    run = deltaspec.analyze(base, tuned, tmp_path / "run")
    run.put_failure(MatrixKey("model.norm.weight", role="norm"), "model.norm.weight", "the disk was away")
    assert deltaspec.Run.load(run.path).failures
    assert not deltaspec.analyze(base, tuned, tmp_path / "run").failures
