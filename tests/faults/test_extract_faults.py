"""An extraction is written whole or not at all, and survives being killed."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaspec.errors import RunError
from deltaspec.files import tensor_writer as writer
from deltaspec.options import AnalyzeOptions, ExtractOptions, RankOptions
from deltaspec.workflows.extraction.extract import extract

COMMAND = [sys.executable, "-c", "from deltaspec.cli.main import main; main()", "extract"]
OPTIONS = ExtractOptions(RankOptions(amounts=(16,)), analysis=AnalyzeOptions(device="cpu"))


def pieces(folder):
    return list(folder.glob("*.partial-*/factors/*.safetensors"))


def test_kills_at_random_moments_lose_nothing_and_leave_nothing(models, tmp_path):
    extract(*models, tmp_path / "whole", options=OPTIONS)
    out, rng, partial = tmp_path / "killed", random.Random(0), 0
    for _ in range(5):
        command = [*COMMAND, *models, "-o", str(out), "--rank", "16", "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        before, wait_until = len(pieces(tmp_path)), time.monotonic() + 60
        while time.monotonic() < wait_until and process.poll() is None and len(pieces(tmp_path)) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        partial += not out.exists() and 0 < len(pieces(tmp_path)) < 48
    assert partial >= 2
    steps = []
    if not out.exists():
        extract(*models, out, options=OPTIONS, progress=steps.append)
        assert steps[-1].total < 48
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_an_adapter_that_is_there_is_replaced_only_when_told(models, tmp_path):
    out = tmp_path / "out"
    extract(*models, out, options=OPTIONS)
    stamp = (out / "deltaspec.json").stat().st_mtime_ns
    with pytest.raises(RunError, match="--overwrite"):
        extract(*models, out, options=OPTIONS)
    assert (out / "deltaspec.json").stat().st_mtime_ns == stamp
    extract(*models, out, options=OPTIONS, overwrite=True)
    assert (out / "deltaspec.json").stat().st_mtime_ns > stamp
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    with pytest.raises(RunError, match="not deltaspec's to replace"):
        extract(*models, other, options=OPTIONS, overwrite=True)
    with pytest.raises(RunError, match="holds an input"):
        extract(*models, Path(models[0]), options=OPTIONS, overwrite=True)
    assert (other / "cat.png").exists()


def test_a_full_disk_is_one_sentence_and_leaves_no_adapter(models, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_tensor", full)
    with pytest.raises(RunError, match="No space left"):
        extract(*models, tmp_path / "out", options=OPTIONS)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    extract(*models, tmp_path / "out", options=OPTIONS)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("stage", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_is_one_sentence(stage, models, tmp_path, monkeypatch):
    usual = getattr(Path, stage)

    def refuse(self, *arguments, **options):
        if stage == "open" and "w" not in "".join(map(str, arguments)):
            return usual(self, *arguments, **options)
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, stage, refuse)
    with pytest.raises(RunError, match="Permission denied"):
        extract(*models, tmp_path / "out", options=OPTIONS)
