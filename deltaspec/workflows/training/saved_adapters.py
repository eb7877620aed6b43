"""Adapters of any training method on disk: a folder with a config and a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from deltaspec.errors import CheckpointError
from deltaspec.files import json_file, tensor_reader
from deltaspec.files.atomic import whole_file
from deltaspec.files.tensor_writer import SAVED, write_tensors
from deltaspec.io import hub
from deltaspec.io.file_formats import SUFFIXES
from deltaspec.io.peft_files import CONFIG, WEIGHTS
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.stored.adapter_format import adapter_config, adapter_tensors, attach_stored, head_tensors


def save_adapter(
    folder: Path, attachment: Attachment, *, base: str, task_type: str | None, heads: Mapping[str, Tensor]
) -> None:
    """Write an adapter's two files; an older adapter there is replaced once both are written whole.

    Parameters
    ----------
    folder : Path
        Made if it is not there; other files in it stay. At any moment it holds the old adapter, the new one, or, for an
        instant, none: the old config goes before the weights change, and a folder without it is no adapter.
    attachment : Attachment
    base : str
        Of the base model: a path or a hub id.
    task_type : str, optional
        PEFT's: CAUSAL_LM, SEQ_CLS, …
    heads : mapping of str to Tensor
        Parameters of the model that are stored whole, by their names in it.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    tensors = adapter_tensors(attachment) | head_tensors(attachment, heads)
    config = adapter_config(attachment, base=base, task_type=task_type, heads=list(heads))
    fresh = folder / f"{WEIGHTS[0]}.{os.getpid()}.new"
    try:
        with whole_file(folder / CONFIG) as stream:  # which gives it its name last
            stream.write(json.dumps(config, indent=2).encode())
            stream.flush()
            os.fsync(stream.fileno())
            write_tensors(fresh, tensors, metadata=SAVED)
            (folder / CONFIG).unlink(missing_ok=True)
            fresh.replace(folder / WEIGHTS[0])
    finally:
        fresh.unlink(missing_ok=True)


def load_adapter(model: nn.Module, ref: str | Path, *, name: str = "default") -> Attachment:
    """Attach an adapter that deltaspec or PEFT saved; nothing pickled is ever read.

    Parameters
    ----------
    model : nn.Module
        Its base; left as it was where the adapter does not fit.
    ref : str or Path
        A folder, or a hub id ``owner/name[@revision]``. What exists on disk is never taken for a hub id.
    name : str
        Of the adapter on this model.

    Raises
    ------
    CheckpointError
        If it is not there, no adapter, damaged, of an unknown type, or belongs to another model.
    OptionError
        If the name is taken, or the model's adapters are merged or mixed.
    """
    folder = _find(ref)
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        message = f"'{folder}' is a whole checkpoint: open it with transformers' from_pretrained."
        raise CheckpointError(message)
    config = json_file.read_json(folder / CONFIG)
    file = folder / WEIGHTS[0]
    if not file.is_file():
        message = f"Cannot open '{folder}': expected '{WEIGHTS[0]}' beside '{CONFIG}'; convert it to safetensors."
        raise CheckpointError(message)
    specs, _ = tensor_reader.list_tensors(file)
    try:
        return attach_stored(
            model, config, {key: tensor_reader.load_tensor(spec) for key, spec in specs.items()}, name=name
        )
    except CheckpointError as cause:
        cause.add_note(f"The adapter is '{folder}'.")
        raise


def _find(ref: str | Path) -> Path:
    """Return the folder of an adapter, from the hub where there is none here."""
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    found = None if isinstance(ref, Path) else hub.parse_id(ref, suffixes=(".json", *SUFFIXES))
    if found is None or path.exists():
        message = f"Cannot open '{ref}': expected a folder with '{CONFIG}' and '{WEIGHTS[0]}', or a hub id owner/name."
        raise CheckpointError(message)
    return hub.fetch(*found)[0]
