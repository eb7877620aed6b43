"""A path or a hub id becomes an index of its tensors: only headers are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaspec.architecture.canonical_names import canonical_names
from deltaspec.errors import CheckpointError
from deltaspec.files import json_file
from deltaspec.files.tensor_reader import Contents
from deltaspec.io import hub, kohya, meta_layout, peft, shards, weight_files
from deltaspec.io.intact import refuse_integers
from deltaspec.io.quantised import attach_scales, check_config
from deltaspec.io.sentence_modules import with_modules
from deltaspec.types import Checkpoint, ForeignAdapter, Opened

SUFFIXES = (".safetensors", *weight_files.PICKLED)
CONVERT = "convert it to a Hugging Face folder with safetensors"
DISTRIBUTED = f"a distributed checkpoint (FSDP or DCP); consolidate it with torch.distributed.checkpoint and {CONVERT}"
UNREADABLE = {
    ".gguf": f"a GGUF file, whose weights are quantised and renamed; {CONVERT}",
    ".distcp": DISTRIBUTED,
    ".metadata": DISTRIBUTED,
    ".onnx": f"an ONNX graph; {CONVERT}",
    ".h5": f"a TensorFlow checkpoint; {CONVERT}",
    ".ckpt.index": f"a TensorFlow checkpoint; {CONVERT}",
    ".msgpack": f"a Flax checkpoint; {CONVERT}",
    ".nemo": f"a NeMo archive; {CONVERT}",
    ".ckpt": "a pickled training checkpoint; rename it to end in .pt if it holds only tensors",
}
FOREIGN_LORA = re.compile(r".*(lora_(embedding_)?[AB]\b|lora_(up|down)\.weight$|\.lora\.(up|down)\.weight$)")
PIPELINE = "model_index.json"  # of diffusers, whose components are folders


def open_plain(ref: str | Path) -> Opened:
    """Open a checkpoint or a LoRA adapter as ``open_source`` does, and refuse any other adapter.

    Raises
    ------
    CheckpointError
        As of ``open_source``, or if it is an adapter whose change cannot be read off its files.
    """
    found = open_source(ref)
    if isinstance(found, ForeignAdapter):
        raise CheckpointError(found.refusal)
    return found


def open_source(ref: str | Path) -> Opened | ForeignAdapter:
    """Open a checkpoint or an adapter, and say which it is; only headers are read.

    Parameters
    ----------
    ref : str or Path
        A folder, a file (.safetensors, .bin, .pt, .pth, index.json), or a hub id ``owner/name[@revision]``.
        What exists on disk is never taken for a hub id.

    Returns
    -------
    Checkpoint, AdapterIndex or ForeignAdapter
        The last is an adapter that is not plain LoRA.

    Raises
    ------
    CheckpointError
        If it is not there, damaged, or in a format that cannot be read, which is named.
    """
    try:
        path = Path(ref).expanduser()
        if path.is_dir() and str(ref):
            return _open_folder(path, ref=str(ref))
        if path.is_file():
            return _open_file(path, ref=str(ref))
    except (OSError, RuntimeError) as cause:  # no permission, a name too long, nobody's home
        message = f"Cannot open '{ref}' ({cause}): check the path and your rights to read it."
        raise CheckpointError(message) from cause
    found = None if isinstance(ref, Path) else hub.parse_id(ref, suffixes=(*SUFFIXES, *UNREADABLE, ".json"))
    if found is None:
        message = (
            f"Cannot open '{ref}': there is no such file or folder, and a model of the hub is named owner/name or "
            "owner/name@revision; check the path."
        )
        raise CheckpointError(message)
    folder, revision = hub.fetch(*found)
    return replace(_open_folder(folder, ref=str(ref)), revision=revision)


def _open_folder(folder: Path, *, ref: str) -> Opened | ForeignAdapter:
    names = sorted(entry.name for entry in folder.iterdir())
    if peft.CONFIG in names and any(name in names for name in peft.WEIGHTS):
        return peft.open_adapter(folder, ref=ref)
    config = _read_config(folder)
    files = weight_files.find_weights(folder, names)
    if not files or (PIPELINE in names and _inner_folders(folder, names)):
        raise CheckpointError(_nothing_readable(folder, names))
    opened = _open_weights(files, ref=ref, config=config)
    if not isinstance(opened, Checkpoint):
        return opened
    if others := weight_files.passed_over(names, [file.name for file in files]):
        opened = _remark(opened, f"of '{ref}' {files[0].name} is read, and not {', '.join(others)} beside it")
    return with_modules(opened)


def _remark(opened: Checkpoint, text: str) -> Checkpoint:
    return replace(opened, notes=(*opened.notes, text))


def _open_file(file: Path, *, ref: str) -> Opened | ForeignAdapter:
    folder = file.parent
    if file.name in (peft.CONFIG, *peft.WEIGHTS) and (folder / peft.CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref)
    if not file.name.endswith(SUFFIXES) and not weight_files.is_index(file.name):
        suffix = next((suffix for suffix in UNREADABLE if file.name.endswith(suffix)), "")
        what = UNREADABLE.get(suffix, f"none of {', '.join(SUFFIXES)} and index.json; {CONVERT}")
        message = f"Cannot open '{file}': it is {what}."
        raise CheckpointError(message)
    opened = _open_weights([file], ref=ref, config=_read_config(folder))
    if not isinstance(opened, Checkpoint):
        return opened
    if missing := weight_files.missing_shards([file.name]):
        opened = _remark(opened, f"'{ref}' alone is read, one of {len(missing) + 1} files that hold the model")
    return with_modules(opened)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json_file.read_json(path) if path.is_file() else {}


def _open_weights(files: list[Path], *, ref: str, config: dict[str, Any]) -> Opened:
    """List the tensors of one index, or of files that belong together."""
    check_config(config, source=files[0])
    opened, (tensors, aliases), layout = _list_tensors(files, config)
    if not tensors:
        message = f"Cannot use '{files[0]}': it holds no tensors; check that it is a model's weights."
        raise CheckpointError(message)
    if kohya.is_kohya(tensors):
        refuse_integers(tensors.values())
        return kohya.index_adapter(files[0], tensors, ref=ref)
    if lora := next((name for name in tensors if FOREIGN_LORA.match(name)), None):
        message = (
            f"Cannot use '{files[0]}': '{lora}' is a LoRA factor without '{peft.CONFIG}' beside it, which gives its "
            "scale; convert it to PEFT's format, or merge it into its base."
        )
        raise CheckpointError(message)
    tensors = attach_scales(tensors, config, source=files[0])
    found = _without_wrappers(
        Checkpoint(ref, files[0].parent, opened, tensors, config=config, aliases=aliases, layout=layout)
    )
    text = (
        f"'{ref}' is in {layout} layout: read under Hugging Face's names, q and k in its order of rows, so that "
        "adapters fit the converted model"
    )
    return _remark(found, text) if layout else found


def _list_tensors(files: list[Path], config: dict[str, Any]) -> tuple[tuple[Path, ...], Contents, str]:
    """List the tensors of one index or of files that belong together, and say in whose layout they are stored."""
    opened, ranks = tuple(files), all(meta_layout.RANK.fullmatch(file.name) for file in files)
    if ranks:
        held, aliases = meta_layout.hold_ranks(files)
    else:
        indexed = files[0].name.endswith(".json")
        opened, (tensors, aliases) = shards.gather_indexed(files[0]) if indexed else (opened, shards.gather(files))
        held = {name: [spec] for name, spec in tensors.items()}
    if meta_layout.is_meta(held, config):
        tensors = meta_layout.convert(held, opened, config)
        return opened, (tensors, meta_layout.rename_shared(aliases, tensors.values())), "Meta's"
    if ranks:
        raise meta_layout.refuse_rank(files[0])
    return opened, (tensors, aliases), ""


def _without_wrappers(opened: Checkpoint) -> Checkpoint:
    """Give tensors the names that the model gives them; files and what is written keep their own."""
    try:
        names = canonical_names([*opened.tensors, *opened.aliases])
    except CheckpointError as cause:
        cause.add_note(f"The checkpoint is '{opened.ref}'.")
        raise
    wrapped = {bare: name for name, bare in names.items() if bare != name}
    if not wrapped:
        return opened
    tensors = {
        names[name]: replace(spec, name=names[name], wrapped=wrapped.get(names[name], ""))
        for name, spec in opened.tensors.items()
    }
    aliases = {names[alias]: names[name] for alias, name in opened.aliases.items()}
    return replace(opened, tensors=tensors, aliases=aliases, wrapped=wrapped)


def _nothing_readable(folder: Path, names: list[str]) -> str:
    """Say what a folder holds instead of weights, and what to do."""
    inner = _inner_folders(folder, names)
    for suffix, what in UNREADABLE.items() if PIPELINE not in names else ():
        if found := next((name for name in names if name.endswith(suffix)), None):
            return f"Cannot open '{folder}': '{found}' is {what}."
    if peft.CONFIG in names:
        return f"Cannot open '{folder}': it has '{peft.CONFIG}' and none of {', '.join(peft.WEIGHTS)}; download them."
    if inner:
        return f"Cannot open '{folder}': its weights lie in folders; open one of {', '.join(inner)}."
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"Cannot open '{folder}': expected {', '.join(SUFFIXES)} or an index.json, found {listed}; check the path."


def _inner_folders(folder: Path, names: list[str]) -> list[str]:
    places = [name for name in names if (folder / name).is_dir()]
    return [name for name in places if weight_files.choose_weights([entry.name for entry in (folder / name).iterdir()])]
