"""Files that the safetensors library reads back bit for bit, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaspec.errors import CheckpointError, RunError
from deltaspec.files import atomic
from deltaspec.files.dtypes import DTYPES
from deltaspec.files.tensor_writer import STORABLE, write_safetensors
from deltaspec.io.staging import Staging
from deltaspec.types import Entry

TORCH = {name: DTYPES[name].torch for name in STORABLE}
NAMES = {dtype: name for name, dtype in TORCH.items()}


def entry(name, tensor, **changed):
    fields = {"shape": tuple(tensor.shape), "dtype": NAMES[tensor.dtype], "read": lambda: tensor, **changed}
    return Entry(name, **fields)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture
def tensors():
    """Every dtype, odd sizes so that order matters for alignment, a scalar, an empty one and a transposed one."""
    raw = np.random.default_rng(0).integers(0, 255, 8 * 15, dtype=np.uint8)
    found = {
        f"of.{name}": torch.from_numpy(raw.copy()).view(dtype)[:5]
        for name, dtype in TORCH.items()
        if name not in ("BOOL", "C64", "F8_E8M0")
    }
    extra = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}
    return {**found, **extra, "flags": torch.tensor([True, False, True]), "ünï.cödé": torch.ones(1)}


def test_the_library_reads_every_dtype_bit_for_bit(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    size = write_safetensors(path, [entry(n, t) for n, t in tensors.items()], metadata={"format": "pt", "a": "ü"})
    assert size == path.stat().st_size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    with safe_open(path, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt", "a": "ü"}


def test_the_file_is_the_librarys_own_up_to_padding(tensors, tmp_path):
    """Same data in another tool's order of equal dtypes is fine; header length and offsets must be as specified."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [entry(n, t) for n, t in tensors.items()])
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    end = 0
    for name, said in header.items():
        start, stop = said["data_offsets"]
        assert start == end
        assert stop - start == len(bits(tensors[name]))
        assert start % tensors[name].element_size() == 0
        end = stop
    assert 8 + length + end == len(raw)


def test_one_tensor_at_a_time(tmp_path):
    """Each is read after the one before was written and let go."""
    alive, most = set(), []

    def reader(number):
        def read():
            most.append(len(alive))
            tensor = torch.full((4,), float(number))
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            return tensor

        return read

    write_safetensors(tmp_path / "x.safetensors", [Entry(str(n), (4,), "F32", reader(n)) for n in range(5)])
    assert most == [0] * 5


@pytest.mark.parametrize("changed", [{"shape": (3, 2)}, {"shape": (6,)}, {"dtype": "BF16"}, {"dtype": "F64"}])
def test_what_is_not_what_its_entry_says_is_refused(changed, tmp_path):
    with pytest.raises(CheckpointError, match=r"'w' into .*expected shape"):
        write_safetensors(tmp_path / "x.safetensors", [entry("w", torch.ones(2, 3), **changed)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["w", "w"], ["__metadata__"]])
def test_names_that_a_header_cannot_hold(names, tmp_path):
    with pytest.raises(CheckpointError, match="rename one"):
        write_safetensors(tmp_path / "x.safetensors", [entry(n, torch.ones(2)) for n in names], metadata={"a": "b"})


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="'w' as C128"):
        write_safetensors(tmp_path / "x.safetensors", [entry("w", torch.ones(2), dtype="C128")])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_system_that_refuses_is_one_sentence_and_nothing_is_left(number, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with pytest.raises(RunError, match=f"{os.strerror(number)}") as caught:
        write_safetensors(path, [entry("w", torch.ones(2))])
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_written():
    """/proc refuses new files to everyone, root included."""
    with pytest.raises(RunError, match="Cannot write '/proc/"):
        write_safetensors(Path("/proc/x.safetensors"), [])


def test_a_reader_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", [entry("w", torch.ones(2)), Entry("v", (1,), "F16", fail)])
    assert not list(tmp_path.iterdir())


def build(staging, text="{}"):
    built = staging.path / "built"
    built.mkdir(exist_ok=True)
    (built / "deltaspec.json").write_text(text)
    return built


def test_an_output_appears_by_a_rename_and_nothing_else_stays(tmp_path):
    with Staging(tmp_path / "out", identity={"a": 1}, overwrite=False) as staging:
        assert staging.path.parent == tmp_path
        assert staging.path.name.startswith("out.partial-")
        assert not (tmp_path / "out").exists()
        (staging.path / "scratch").mkdir()
        staging.commit(build(staging))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["deltaspec.json"]


def test_the_same_work_finds_its_folder_again_and_other_work_does_not(tmp_path):
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "out", identity={"a": 1}, overwrite=False) as staging:
        (staging.path / "piece").write_text("done")
        (staging.path / "piece.77.tmp").write_text("half")
        raise ZeroDivisionError
    with Staging(tmp_path / "out", identity={"a": 1}, overwrite=False) as again:
        assert [path.name for path in again.path.iterdir() if "pid" not in path.name] == ["piece"]
    with Staging(tmp_path / "out", identity={"a": 2}, overwrite=False) as other:
        assert other.path != again.path
    assert not other.path.exists()


def test_what_is_there_is_kept_without_overwrite(tmp_path):
    for name, make in (("folder", Path.mkdir), ("file", Path.touch)):
        make(tmp_path / name)
        with pytest.raises(RunError, match="--overwrite"), Staging(tmp_path / name, identity={}, overwrite=False):
            pass
        assert [path.name for path in tmp_path.glob("*.partial-*")] == []


def test_overwriting_replaces_a_models_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deltaspec.json").write_text("old")
    (out / "notes.txt").write_text("old")
    with Staging(out, identity={}, overwrite=True) as staging:
        built = build(staging, "new")
        assert (out / "notes.txt").exists()
        staging.commit(built)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("deltaspec.json", "new")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("files", [
    ["config.json", "src/thesis.tex"],
    ["model.safetensors"],
    ["adapter_config.json", "adapter_model.safetensors"],
    ["deltaspec.json", "src/thesis.tex"],
    ["deltaspec.json", "a/deltaspec.json", "a/b/thesis.tex"],
    ["a/deltaspec.json", "b/thesis.tex"],
    ["a/deltaspec.json", "thesis.tex"],
])  # fmt: skip
def test_overwriting_spares_folders_that_deltaspec_did_not_write(files, tmp_path):
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    refused = pytest.raises(RunError, match="not deltaspec's to replace")
    with refused, Staging(tmp_path / "out", identity={}, overwrite=True):
        pass
    assert all((tmp_path / "out" / name).exists() for name in files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("files", [[], ["deltaspec.json"], ["rank-2/deltaspec.json", "rank-4/deltaspec.json"]])
def test_overwriting_replaces_what_deltaspec_wrote(files, tmp_path):
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    with Staging(tmp_path / "out", identity={}, overwrite=True) as staging:
        staging.commit(build(staging, "new"))
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("deltaspec.json", "new")]


def test_overwriting_spares_what_is_not_a_model_holds_an_input_or_is_home(tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    weights = base / "model.safetensors"
    save_file({"w": torch.ones(1)}, weights)
    (tmp_path / "models" / "deltaspec.json").write_text("{}")
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.tex").write_text("")
    (tmp_path / "notes.txt").write_text("")
    cases = [(papers, []), (tmp_path / "notes.txt", []), (base, [base]), (base, [weights]), (base.parent, [weights])]
    for out, inputs in cases:
        with pytest.raises(RunError), Staging(out, identity={}, overwrite=True, inputs=inputs):
            pass
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(RunError, match="input"), Staging(link, identity={}, overwrite=True, inputs=[base]):
        pass
    monkeypatch.setenv("HOME", str(base))
    with pytest.raises(RunError, match="home"), Staging(base.parent, identity={}, overwrite=True):
        pass
    assert weights.exists()
    assert (papers / "thesis.tex").exists()
    assert not list(tmp_path.rglob("*.partial-*"))


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys; from deltaspec.io.staging import Staging\n"
        "with Staging(sys.argv[1], identity={'n': 1}, overwrite=False): print('in', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"in\n"
    for number in (1, 2):  # the same work, and other work for the same place
        with (
            pytest.raises(RunError, match="another process"),
            Staging(tmp_path / "out", identity={"n": number}, overwrite=False),
        ):
            pass
    first.kill()
    first.communicate()
    with Staging(tmp_path / "out", identity={"n": 1}, overwrite=False) as staging:
        staging.commit(build(staging))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_between_the_two_renames_loses_neither(tmp_path):
    out = tmp_path / "out"
    with Staging(out, identity={"n": 1}, overwrite=False) as staging:
        staging.commit(build(staging, "old"))
    code = (
        "import os, sys; from pathlib import Path; from deltaspec.io.staging import Staging\n"
        "rename = Path.rename\n"
        "Path.rename = lambda self, to: os._exit(9) if self.name == 'built' else rename(self, to)\n"
        "with Staging(sys.argv[1], identity={'n': 2}, overwrite=True) as staging:\n"
        "    (staging.path / 'built').mkdir()\n"
        "    (staging.path / 'built' / 'deltaspec.json').write_text('new')\n"
        "    staging.commit(staging.path / 'built')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == 9
    assert not out.exists()
    with Staging(out, identity={"n": 3}, overwrite=True):
        assert (out / "deltaspec.json").read_text() == "old"
    with Staging(out, identity={"n": 2}, overwrite=True) as staging:
        assert (staging.path / "built" / "deltaspec.json").read_text() == "new"
        staging.commit(staging.path / "built")
    assert (out / "deltaspec.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_is_refused_puts_the_old_output_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with Staging(out, identity={}, overwrite=False) as staging:
        staging.commit(build(staging, "old"))
    rename = Path.rename

    def refuse(self, target):
        if self.name == "built":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with Staging(out, identity={}, overwrite=True) as staging:
        built = build(staging, "new")
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(RunError, match="Input/output error"):
            staging.commit(built)
    assert (out / "deltaspec.json").read_text() == "old"


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    with Staging(tmp_path / "out", identity={}, overwrite=False) as staging:
        built = build(staging)
        (tmp_path / "out").mkdir()
        with pytest.raises(RunError, match="there already"):
            staging.commit(built)
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written():
    with pytest.raises(RunError, match="Cannot write"), Staging("/proc/deltaspec/out", identity={}, overwrite=False):
        pass
