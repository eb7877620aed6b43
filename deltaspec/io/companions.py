"""What lies beside a checkpoint's weights: its config, tokenizer and other files that a merged copy keeps."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.files.atomic import unwritten, write_whole
from deltaspec.files.dtypes import OPTIONS
from deltaspec.io import hub
from deltaspec.io.file_formats import PICKLED
from deltaspec.io.quantisation_config import drop_quantisation
from deltaspec.io.sentence_modules import homes_of, inner_files
from deltaspec.io.weight_files import is_index, without_label
from deltaspec.types import Checkpoint

WEIGHTS = (".safetensors", *PICKLED, ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".nemo", ".distcp")
OTHERS = (".metadata", ".index.json", ".ckpt.index", ".tmp", ".zip", ".tar", ".npz", ".tflite", ".mlmodel")
CONFIG = "config.json"


def is_companion(name: str) -> bool:
    """Tell whether a file of this name, at a checkpoint's top, is anything but weights in some format."""
    weights = name.lower().endswith((*WEIGHTS, *OTHERS)) or is_index(name)
    return "/" not in name and not name.startswith(".") and not weights


def find_companions(base: Checkpoint) -> tuple[list[Path], str]:
    """List the files beside a checkpoint's weights, fetched first where it comes from the hub.

    Returns
    -------
    list of Path
        Plain files at the top, and all files of sentence-transformers' further modules; of links only those that stay
        in the folder, or in the hub's cache around it. None of a lone file without config.json, whose neighbours may
        belong to other models.
    str
        Why some may be missing, else "".
    """
    note = _fetch(base) if base.revision else ""
    if not (base.root / CONFIG).exists() and not base.revision and not Path(base.ref).expanduser().is_dir():
        return [], note
    homes = homes_of(base.root)
    beside = [path for path in sorted(base.root.iterdir()) if is_companion(path.name) and path.is_file()]
    beside = [path for path in beside if path not in base.files]
    kept = [path for path in beside if any(path.resolve().is_relative_to(home) for home in homes)]
    return kept + [path for folder in base.folders for path in inner_files(base.root, folder)], note


def _fetch(base: Checkpoint) -> str:
    parsed = hub.parse_id(base.ref, suffixes=())
    try:
        if parsed:
            hub.fetch_others(parsed[0], base.revision or parsed[1], chosen=is_companion)
    except CheckpointError as cause:
        return f"only what the cache has of {base.ref} is copied beside the weights ({cause})"
    return ""


def copy_companions(files: list[Path], folder: Path, *, root: Path, config: dict[str, Any] | None) -> None:
    """Copy files of ``root`` into a folder; ``config``, where it is given, is written instead of its config.json.

    Raises
    ------
    RunError
        If a file cannot be written.
    """
    for path in files:
        place = folder / path.relative_to(root)
        if config is not None and path == root / CONFIG:
            write_whole(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        except OSError as cause:
            raise unwritten(place, cause) from cause


def adjust_config(
    config: dict[str, Any], *, dtype: str, vocabulary: tuple[int, int] | None, untied: bool
) -> dict[str, Any] | None:
    """Return the config that fits merged weights; None where it fits as it is.

    Parameters
    ----------
    config : dict
    dtype : str
        bf16, fp16 or fp32, which all float tensors now have (so that nothing is quantised any more), or auto.
    vocabulary : tuple of int, optional
        Rows of the embedding before and after.
    untied : bool
        Whether head and embedding are two tensors now.
    """
    changed: dict[str, Any] = untie(config) if untied else json.loads(json.dumps(config))
    for scope in (changed, *(inner for inner in changed.values() if isinstance(inner, dict))):
        if dtype != "auto":
            scope.update({key: OPTIONS[dtype].kind for key in ("dtype", "torch_dtype") if key in scope})
        if vocabulary and scope.get("vocab_size") == vocabulary[0]:
            scope["vocab_size"] = vocabulary[1]
    if dtype != "auto":
        drop_quantisation(changed)
    return changed if changed != config else None


def untie(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that says that head and embedding are two tensors."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for scope in (changed, *(inner for inner in changed.values() if isinstance(inner, dict))):
        if "tie_word_embeddings" in scope or scope is changed:
            scope["tie_word_embeddings"] = False
    return changed


def output_name(name: str) -> str:
    """Name the safetensors file that a weight file becomes: one that is loaded by default, without a variant's label.

    >>> output_name("pytorch_model.bin"), output_name("model-00001-of-00002.fp16.safetensors")
    ('model.safetensors', 'model-00001-of-00002.safetensors')
    >>> output_name("last.pth.tar"), output_name("weights")
    ('last.safetensors', 'weights.safetensors')
    """
    place, slash, file = name.rpartition("/")
    file = without_label(file)
    if not file.endswith(".safetensors"):
        suffix = max((suffix for suffix in PICKLED if file.endswith(suffix)), key=len, default="")
        file = re.sub(r"^pytorch_model", "model", file.removesuffix(suffix)) + ".safetensors"
    return f"{place}{slash}{file}"
