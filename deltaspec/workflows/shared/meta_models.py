"""A config → a transformers model on the meta device: its modules and shapes, no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deltaspec.architecture.outline.build import build_on_meta, quiet_transformers
from deltaspec.errors import CheckpointError, OptionError
from deltaspec.files.json_file import read_json
from deltaspec.io import hub
from deltaspec.io.file_formats import SUFFIXES
from deltaspec.options.training import TASKS
from deltaspec.training.sites.model_sites import base_parameters
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.running_models import ModelKind, describe_model

MAPPINGS = {
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def open_config(ref: str | Path) -> Checkpoint:
    """Open a model's config alone: a checkpoint of which no tensor is known.

    Parameters
    ----------
    ref : str or Path
        A folder with a config.json, or weights beside one; such a file by any name; or a hub id
        ``owner/name[@revision]``, of which only config.json is fetched. What exists on disk is never taken for one.

    Raises
    ------
    CheckpointError
        If there is none, or it does not say of which type the model is.
    """
    path, revision = Path(ref).expanduser(), None
    weights = path.is_file() and path.name.endswith((*SUFFIXES, ".index.json"))
    file = path / "config.json" if path.is_dir() else path.with_name("config.json") if weights else path
    if file != path and not file.is_file():
        message = f"Cannot read the config of '{ref}': its folder has no config.json; pass a model's whole folder."
        raise CheckpointError(message)
    if not file.is_file():
        found = None if isinstance(ref, Path) else hub.parse_id(ref, suffixes=(*SUFFIXES, ".json"))
        if found is None:
            message = (
                f"Cannot read the config of '{ref}': there is no such file or folder, and a model of the hub is named "
                "owner/name or owner/name@revision; check the path."
            )
            raise CheckpointError(message)
        file = hub.fetch_config(*found)
        revision = file.parent.name
    elif file.suffix != ".json":
        message = f"Cannot read the config of '{ref}': expected a folder, a JSON file or a hub id; pass its folder."
        raise CheckpointError(message)
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        message = f"Cannot read the config of '{ref}': '{file.name}' has no model_type; pass a transformers model's."
        raise CheckpointError(message)
    return Checkpoint(str(ref), file, (), {}, config=config, revision=revision)


def describe_skeleton(ref: str | Path, *, task: str = "", labels: int = 0) -> ModelKind:
    """Say which class of transformers a config means, or which one does a task with it.

    Parameters
    ----------
    ref : str or Path
        As of `open_config`.
    task : str
        ``classification`` or ``causal-lm``; empty takes the class that the config names, or the body without one.
    labels : int
        Classes of a classification; 0 leaves what the config says (2 if it does not).

    Raises
    ------
    CheckpointError
        If there is no such config, transformers does not know it, or has no class of it for this task.
    MissingPackageError
        If transformers is not installed.
    OptionError
        If there is no such task, or labels have nothing to classify.
    """
    _check_task(task, labels)
    opened = open_config(ref)
    with quiet_transformers() as transformers:
        known, model_type = transformers.models.auto.configuration_auto.CONFIG_MAPPING, opened.config["model_type"]
        if model_type not in known:
            message = (
                f"Cannot read the config of '{ref}': transformers {transformers.__version__} has no model_type "
                f"'{model_type}', and code that comes with a model is never run; try a newer transformers."
            )
            raise CheckpointError(message)
    kind = describe_model(opened)
    if not task:
        return kind
    with quiet_transformers() as transformers:
        name = getattr(transformers.models.auto.modeling_auto, MAPPINGS[task]).get(kind.config.model_type)
        if name is None:
            message = f"Cannot use '{ref}' for --task {task}: transformers has no class of '{model_type}' for it."
            raise CheckpointError(message)
        if labels:
            kind.config.num_labels = labels
        cls = getattr(transformers, name if isinstance(name, str) else name[0])
    return replace(kind, cls=cls, packed=kind.packed and task != "classification")


def _check_task(task: str, labels: int) -> None:
    if task and task not in TASKS:
        message = f"--task is '{task}': expected {' or '.join(TASKS)}."
        raise OptionError(message)
    if labels and task != "classification":
        message = "--labels has nothing to classify: pass --task classification with it."
        raise OptionError(message)
    if labels < 0:
        message = f"--labels is {labels}: expected a number of classes."
        raise OptionError(message)


def build_skeleton(kind: ModelKind) -> nn.Module:
    """Make a model without values: every parameter on the meta device, in float32.

    Raises
    ------
    CheckpointError
        If transformers refuses the config.
    """
    with quiet_transformers():
        try:
            model = build_on_meta(kind.cls, kind.config)
        except Exception as cause:  # every model raises its own
            said = " ".join(str(cause).split())[:300] or type(cause).__name__
            message = f"Cannot build {kind.cls.__name__} from its config ({said}): check that config.json is whole."
            raise CheckpointError(message) from cause
    return model.requires_grad_(True).eval()  # noqa: FBT003


def list_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a classifier's own parameters by name, which are trained beside an adapter; none of other models.

    They are those outside the model's body (the pooler of BERT is inside).
    """
    if "Classification" not in type(model).__name__:
        return {}
    body: Any = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in body.parameters()}
    return {name: parameter for name, parameter in base_parameters(model).items() if id(parameter) not in inside}
