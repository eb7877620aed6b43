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
from deltaspec.io import hub, kohya, meta_layout, peft, pickled, shards, weight_files
from deltaspec.io.file_formats import CONVERT, SUFFIXES, UNREADABLE, describe_foreign, is_pickled, may_hold_weights
from deltaspec.io.foreign_marks import find_factor
from deltaspec.io.intact import refuse_integers
from deltaspec.io.peft_files import CONFIG, WEIGHTS, choose_adapter
from deltaspec.io.pickled_states import split_state
from deltaspec.io.quantisation_config import read_quantisation
from deltaspec.io.quantised import attach_scales
from deltaspec.io.sentence_modules import with_modules
from deltaspec.types import AdapterIndex, Checkpoint, ForeignAdapter, Opened

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
    if isinstance(found, AdapterIndex) and found.conditional:
        message = (
            f"Cannot use '{ref}': it is {found.conditional}, a change that no weights can hold, so that it can be "
            "neither merged, verified nor written as a LoRA; deltaspec analyze reads its factors."
        )
        raise CheckpointError(message)
    return found


def open_source(ref: str | Path) -> Opened | ForeignAdapter:
    """Open a checkpoint or an adapter, and say which it is; only headers are read.

    Parameters
    ----------
    ref : str or Path
        A folder, a file (safetensors or pickled, by its content; index.json), one dictionary of a pickled file,
        ``FILE::NAME``, or a hub id ``owner/name[@revision]``. What exists on disk is never taken for a hub id.

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
        file, state = split_state(ref)
        if state and (path := Path(file).expanduser()).is_file():
            return _open_file(path, ref=str(ref), state=state)
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
    if CONFIG in names and choose_adapter(names):
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


def _open_file(file: Path, *, ref: str, state: str = "") -> Opened | ForeignAdapter:
    folder = file.parent
    if (file.name == CONFIG or choose_adapter([file.name])) and (folder / CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref)
    indexed = weight_files.is_index(file.name) or file.name.endswith(".index.json")
    if not indexed and not may_hold_weights(file):
        what = describe_foreign(file) or f"none of {', '.join(SUFFIXES)} and index.json; {CONVERT}"
        message = f"Cannot open '{file}': it is {what}."
        raise CheckpointError(message)
    opened = _open_weights([file], ref=ref, config=_read_config(folder), state=state)
    if not isinstance(opened, Checkpoint):
        return opened
    if missing := weight_files.missing_shards([file.name]):
        opened = _remark(opened, f"'{ref}' alone is read, one of {len(missing) + 1} files that hold the model")
    return with_modules(opened)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json_file.read_json(path) if path.is_file() else {}


def _open_weights(files: list[Path], *, ref: str, config: dict[str, Any], state: str = "") -> Opened | ForeignAdapter:
    """List the tensors of one index, or of files that belong together."""
    told = read_quantisation(config, files[0].parent, source=files[0])
    opened, (tensors, aliases), layout = _list_tensors(files, config, state)
    if not tensors:
        message = f"Cannot use '{files[0]}': it holds no tensors; check that it is a model's weights."
        raise CheckpointError(message)
    name, kind = find_factor(tensors)
    if kind:
        message = (
            f"Cannot use '{name}' in '{files[0]}': it is of {kind}; merge it into its base with the tool it is from."
        )
        raise CheckpointError(message)
    if kohya.is_kohya(tensors):
        refuse_integers(tensors.values())
        return kohya.index_adapter(files[0], tensors, ref=ref)
    if lora := next((name for name in tensors if FOREIGN_LORA.match(name)), None):
        return _open_lora(files[0], lora, ref=ref)
    tensors = attach_scales(tensors, told)
    notes = () if state else tuple(note for file in opened if is_pickled(file) for note in pickled.note_left(file))
    found = Checkpoint(
        ref, files[0].parent, opened, tensors, config=config, aliases=aliases, layout=layout, notes=notes
    )
    text = (
        f"'{ref}' is in {layout} layout: read under Hugging Face's names, q and k in its order of rows, so that "
        "adapters fit the converted model"
    )
    return _without_wrappers(_remark(found, text) if layout else found)


def _open_lora(file: Path, name: str, *, ref: str) -> Opened | ForeignAdapter:
    """Open a file of LoRA factors by the config beside it, or say that there is none."""
    folder = file.parent
    if (folder / CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref, file=file)
    other = next((path.name for path in sorted(folder.glob(f"*{Path(CONFIG).stem}*.json"))), "")
    way = f"rename '{other}' to that if it is this adapter's" if other else "convert it to PEFT's format"
    message = (
        f"Cannot use '{file}': '{name}' is a LoRA factor without '{CONFIG}' beside it, which gives its scale; {way}, "
        "or merge it into its base."
    )
    raise CheckpointError(message)


def _list_tensors(files: list[Path], config: dict[str, Any], state: str) -> tuple[tuple[Path, ...], Contents, str]:
    """List the tensors of one index or of files that belong together, and say in whose layout they are stored."""
    opened, ranks = tuple(files), all(meta_layout.RANK.fullmatch(file.name) for file in files)
    if ranks:
        held, aliases = meta_layout.hold_ranks(files, state)
    else:
        indexed = files[0].name.endswith(".json")
        opened, (tensors, aliases) = (
            shards.gather_indexed(files[0]) if indexed else (opened, shards.gather(files, state))
        )
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
    if CONFIG in names:
        return f"Cannot open '{folder}': it has '{CONFIG}' and none of {', '.join(WEIGHTS)}; download them."
    if inner:
        return f"Cannot open '{folder}': its weights lie in folders; open one of {', '.join(inner)}."
    if held := next((name for name in names if (folder / name).is_file() and may_hold_weights(folder / name)), None):
        return (
            f"Cannot open '{folder}': which of its files are the weights is not told by '{held}'; open it by its path."
        )
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"Cannot open '{folder}': expected {', '.join(SUFFIXES)} or an index.json, found {listed}; check the path."


def _inner_folders(folder: Path, names: list[str]) -> list[str]:
    places = [name for name in names if (folder / name).is_dir()]
    return [name for name in places if weight_files.choose_weights([entry.name for entry in (folder / name).iterdir()])]
