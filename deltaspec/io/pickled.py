"""Pickled checkpoints (.bin, .pt, .ckpt and the like): tensors only, mapped into memory, never any code."""

from __future__ import annotations

import re
import threading
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.files.dtypes import name_of
from deltaspec.files.tensor_reader import Contents
from deltaspec.io.pickled_states import States, choose_state, find_states, list_left
from deltaspec.types import TensorSpec

CODE = re.compile(r"GLOBAL (\S+)")
KEPT = 8_000_000  # bytes given out before a file is unmapped: what was touched stays in memory until then
LOADING = threading.Lock()  # warning filters belong to the whole process


@dataclass(slots=True)
class _Loaded:
    """A file's dictionaries of tensors, and how many bytes of them were given out."""

    states: States
    handed: int = 0


def list_tensors(file: Path, state: str = "") -> Contents:
    """List the tensors of one pickled file, whatever wraps them; names that share a tensor's memory are aliases.

    Parameters
    ----------
    file : Path
    state : str
        Which of several dictionaries; "" where one alone holds weights.

    Raises
    ------
    CheckpointError
        If the file holds code, is damaged, or holds a tensor that is not plain numbers, or several dictionaries.
    """
    tensors: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    loaded = _load(file)
    size = file.stat().st_size
    chosen = choose_state(loaded.states, state, file=file)
    for name, tensor in loaded.states.named.get(chosen, {}).items():
        _check(tensor, name=name, file=file, size=size)
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = TensorSpec(name, file, tuple(tensor.shape), name_of(tensor.dtype), state=chosen)
    return tensors, aliases


def note_left(file: Path) -> list[str]:
    """Say what a file holds beside the dictionary that ``list_tensors`` chooses; CheckpointError as there."""
    states = _load(file).states
    return list_left(states, choose_state(states, "", file=file), file=file)


def load_tensor(spec: TensorSpec) -> Tensor:
    """Map one tensor into memory in its stored dtype; dropping the result unmaps the file.

    Raises
    ------
    CheckpointError
        If the file has changed since it was listed.
    """
    loaded = _load(spec.file)
    tensor = loaded.states.named.get(spec.state, {}).get(spec.stored_name)
    if tensor is None:
        message = f"Cannot find '{spec.name}' in '{spec.file}': the file has changed since it was opened; start again."
        raise CheckpointError(message)
    loaded.handed += tensor.numel() * tensor.element_size()
    if loaded.handed > KEPT:
        _map.cache_clear()
    return tensor


def _check(tensor: Tensor, *, name: str, file: Path, size: int) -> None:
    """Refuse what is not an ordinary tensor lying in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        message = (
            f"Cannot use '{name}' in '{file}': expected a dense tensor of plain numbers, found a sparse, quantised, "
            "nested or empty one; convert it and save it in safetensors."
        )
        raise CheckpointError(message)
    if tensor.numel() * tensor.element_size() > size:
        message = (
            f"Cannot use '{name}' in '{file}': its shape {tuple(tensor.shape)} needs more bytes than the file has; "
            "make the tensor contiguous and save it again."
        )
        raise CheckpointError(message)


def _load(file: Path) -> _Loaded:
    """Load the tensors of a file: mapped where its format allows, else into memory."""
    try:
        facts = file.stat()
        load = _map if zipfile.is_zipfile(file) and file.suffix != ".safetensors" else _load_legacy
        return load(file, facts.st_size, facts.st_mtime_ns)
    except CheckpointError:
        raise
    except UnpicklingError as cause:
        code = CODE.search(str(cause))
        what = f"holds code ({code[1]})" if code else "was not saved by torch.save, or holds code"
        message = (
            f"Cannot read '{file}': it {what}, which deltaspec never runs; download it again, or convert it to "
            "safetensors where you trust it."
        )
        raise CheckpointError(message) from cause
    except Exception as cause:  # damaged bytes make torch raise almost anything, AssertionError and KeyError included
        reason = " ".join(str(cause).split(". ")[0].split()) or type(cause).__name__
        message = (
            f"Cannot read '{file}' as a pickled checkpoint ({reason}): download it again or save it in safetensors."
        )
        raise CheckpointError(message) from cause


@lru_cache(maxsize=4)
def _map(file: Path, size: int, changed: int) -> _Loaded:
    """Map a file, once for many small tensors: unpickling takes torch 0.1 ms for each tensor that the file holds."""
    del size, changed  # parts of the cache's key
    return _unpickle(file, mmap=True)


@lru_cache(maxsize=2)
def _load_legacy(file: Path, size: int, changed: int) -> _Loaded:
    """Load a file that cannot be mapped, once for all its tensors: from before torch 1.6, or called .safetensors."""
    del size, changed  # parts of the cache's key
    with file.open("rb") as stream:  # by its name alone torch would take .safetensors for what it is not
        return _unpickle(stream, mmap=False)


def _unpickle(source: Path | BinaryIO, *, mmap: bool) -> _Loaded:
    with LOADING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    return _Loaded(find_states(loaded))
