"""Which format a file has: told by its content, and by its name only where the content tells nothing."""

from __future__ import annotations

import zipfile
from pathlib import Path

from deltaspec.files.tensor_reader import LFS_POINTER

SAVED = (".safetensors", ".bin", ".pt", ".pth")
TRAINING = (".ckpt", ".pth.tar", ".pt.tar")
PICKLED = (*SAVED[1:], *TRAINING)
ORDER = (SAVED[:1], SAVED[1:], TRAINING)
"""What a folder's weights are taken from: the first of these that it has."""
SUFFIXES = (*SAVED, *TRAINING)
CONVERT = "convert it to a Hugging Face folder with safetensors"
DISTRIBUTED = f"a distributed checkpoint (FSDP or DCP); consolidate it with torch.distributed.checkpoint and {CONVERT}"
UNPACK = "a packed archive; unpack it and open what is inside"
TENSORFLOW = f"a TensorFlow checkpoint; {CONVERT}"
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd")
UNREADABLE = {
    ".gguf": f"a GGUF file, whose weights are quantised and renamed; {CONVERT}",
    ".distcp": DISTRIBUTED,
    ".metadata": DISTRIBUTED,
    ".onnx": f"an ONNX graph; {CONVERT}",
    ".h5": TENSORFLOW,
    ".ckpt.index": TENSORFLOW,
    ".ckpt.meta": TENSORFLOW,
    ".msgpack": f"a Flax checkpoint; {CONVERT}",
    ".nemo": f"a NeMo archive; {CONVERT}",
}
"""By the end of a name."""
MAGIC = (
    (0, b"GGUF", UNREADABLE[".gguf"]),
    *((0, magic, f"a GGML file; {CONVERT}") for magic in (b"lmgg", b"tjgg", b"fmgg", b"algg")),
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Keras or TensorFlow); {CONVERT}"),
    (0, b"\x93NUMPY", "a NumPy array; save its tensors by name in safetensors"),
    (4, b"TFL3", f"a TensorFlow Lite model; {CONVERT}"),
    *(
        (0, magic, UNPACK)
        for magic in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd")
    ),
    (257, b"ustar", f"a tar archive (NeMo has such); unpack it, or {CONVERT}"),
    (0, LFS_POINTER, "a git-lfs pointer, not the weights; run git lfs pull"),
    (0, b"<?xml", "an XML text, such as a server's error, not the weights; download it again"),
)
"""Offset, bytes there, and what such a file is."""
PAGE = (b"<!doctype html", b"<html")
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MEMBERS = (  # ends of names in a zip
    ("/constants.pkl", "a TorchScript archive, whose code deltaspec never runs; save its state_dict() with torch.save"),
    ("exported_program.json", "a program of torch.export; save its state_dict with torch.save"),
    ("/archive_format", "a program of torch.export; save its state_dict with torch.save"),
    ("model.weights.h5", f"a Keras archive; {CONVERT}"),
    (".npy", "a NumPy archive; save its arrays in safetensors"),
)
HEAD = 300


def _read_head(file: Path) -> tuple[bytes, int]:
    """Return a file's first bytes and its size; none where it cannot be read, which whoever opens it will say."""
    try:
        with file.open("rb") as stream:
            return stream.read(HEAD), file.stat().st_size
    except OSError:
        return b"", 0


def is_safetensors(file: Path) -> bool:
    """Tell whether a file begins as safetensors do: with the length of a JSON object, and that object."""
    return _begins_with_json(*_read_head(file))


def _begins_with_json(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def is_pickled(file: Path) -> bool:
    """Tell whether a file of weights is a pickle of torch, else it is safetensors; a damaged one goes by its name."""
    head, size = _read_head(file)
    if _begins_with_json(head, size):
        return False
    return head.startswith((ZIP, PICKLE)) or not file.name.endswith(".safetensors")


def may_hold_weights(file: Path) -> bool:
    """Tell whether a file can be read as weights, by its content or, where that tells nothing, by its name."""
    head, size = _read_head(file)
    known = _begins_with_json(head, size) or head.startswith((ZIP, PICKLE))
    return not describe_foreign(file) and (known or file.name.endswith(SUFFIXES))


def describe_foreign(file: Path) -> str:
    """Say what a file that is no weights for deltaspec is, and what to do; "" where nothing speaks against it."""
    head, size = _read_head(file)
    if _begins_with_json(head, size):
        return ""
    for offset, magic, what in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return what
    if head.lstrip().lower().startswith(PAGE):
        return "a web page, not the weights; download it again"
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a"):
        return UNREADABLE[".onnx"]  # the fields ir_version and producer_name or graph of its protobuf
    if head.startswith(ZIP) and (what := _describe_zip(file)):
        return what
    suffix = next((suffix for suffix in UNREADABLE if file.name.endswith(suffix)), "")
    return UNREADABLE.get(suffix, "")


def _describe_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):  # truncated: torch says so
        return ""
    found = next((what for end, what in MEMBERS if any(name.endswith(end) for name in names)), "")
    return found or ("" if any(name.endswith("data.pkl") for name in names) else UNPACK)
