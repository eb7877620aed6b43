"""A config → the model that a library makes of it, on the meta device; code that comes with a model never runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deltaspec.errors import MissingPackageError, require
from deltaspec.types import Config

# What a config may ask for, which is untrusted: of layers or experts, each of which is a module; of anything else.
LARGEST, LARGEST_SIZE, LARGEST_LIST = 4096, 10**8, 20_000
# What would fetch or open something, or choose how to run what is never run.
DROPPED = {
    *("quantization_config", "_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
    *("model_args", "model_kwargs", "checkpoint_path", "pretrained_cfg_overlay"),
}


class UnknownModelError(Exception):
    """No library that is installed makes a model of this config; the message says why, as half a sentence."""


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Give the transformers package, its log and progress bars silent meanwhile."""
    transformers = require("transformers", extra="train")
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _NoInitialValues(TorchFunctionMode):
    """Leaves out initialisations: on the meta device they draw nothing, and cost two thirds of making a model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor as it is from torch.nn.init, and call all else."""
        given = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def build_on_meta(cls: Any, config: Any) -> nn.Module:
    """Make a model without values: every parameter on the meta device, in float32; raises what the class raises."""
    config._attn_implementation = "eager"  # nothing runs, so no kernel need be installed
    with torch.device("meta"), _NoInitialValues():
        model: nn.Module = cls(config)
    return model


def build_model(config: Config) -> tuple[nn.Module, str]:
    """Make the model that config.json describes.

    Parameters
    ----------
    config : mapping
        Content of config.json.

    Returns
    -------
    model : Module
        On the meta device.
    source : str
        The library, its version and the class.

    Raises
    ------
    UnknownModelError
        If no library is installed that knows it.
    """
    _refuse_giants(config)
    if ":" in str(config.get("architecture", "")) or "/" in str(config.get("architecture", "")):
        message = "its config names a file or another model for an architecture"
        raise UnknownModelError(message)
    try:
        with _without_network():
            if isinstance(config.get("model_type"), str):
                return _build_transformers(_plain(config))
            if isinstance(config.get("_class_name"), str):
                return _build_diffusers(_plain(config))
            if isinstance(config.get("architecture"), str) and "pretrained_cfg" in config:
                return _build_timm(_plain(config))
    except UnknownModelError:
        raise
    except Exception as cause:  # every model raises its own
        said = " ".join(str(cause).split())[:200] or type(cause).__name__
        message = f"its config makes no model: {said}"
        raise UnknownModelError(message) from cause
    message = "config.json says no model_type" if config else "there is no config.json beside the base"
    raise UnknownModelError(message)


def _refuse_giants(config: Config) -> None:
    if len(config) > LARGEST_LIST:
        message = "its config has more entries than a model needs"
        raise UnknownModelError(message)
    for name, value in config.items():
        if isinstance(value, dict):
            _refuse_giants(value)
        _refuse_lists(name, value)
        counts = any(word in name for word in ("layer", "expert", "depth", "block", "stage"))
        limit = LARGEST if counts and not name.endswith(("_size", "_id")) else LARGEST_SIZE
        limit = LARGEST_LIST if name == "num_labels" else limit  # each label gets a name
        if type(value) is int and value > limit:
            message = f"its config asks for {value} as {name}"
            raise UnknownModelError(message)


def _refuse_lists(name: str, value: object) -> None:
    """Refuse long lists, and lists of stages with more blocks than one model has."""
    if not isinstance(value, list):
        return
    blocks = sum(item for item in value if type(item) is int) if "depth" in name or "layers" in name else 0
    if len(value) > LARGEST_LIST or blocks > LARGEST:
        message = f"its config asks for {blocks or len(value)} by {name}"
        raise UnknownModelError(message)
    for item in value:
        if isinstance(item, dict):
            _refuse_giants(item)


def _plain(config: Config) -> Config:
    """Return a config without what fetches weights, kernels or quantisers."""
    kept = {name: _value(value) for name, value in config.items()}
    kept |= {name: False for name in kept if name == "use_pretrained_backbone"}
    return {name: value for name, value in kept.items() if name not in DROPPED}


def _value(value: object) -> object:
    """Return a value as transformers reads it: it writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else _plain(value)
    return value


@contextmanager
def _without_network() -> Iterator[None]:
    """Keep the hub's library from fetching anything meanwhile."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _build_transformers(config: Config) -> tuple[nn.Module, str]:
    try:
        with quiet_transformers() as transformers:
            version = f"transformers {transformers.__version__}"
            known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
            if config["model_type"] not in known:
                message = f"{version} does not know model_type '{config['model_type']}'"
                raise UnknownModelError(message)
            made = known[config["model_type"]].from_dict(config)
            cls = _choose_class(transformers, made)
            model: Any = build_on_meta(cls, made)
            model.tie_weights()
    except MissingPackageError as cause:
        message = "transformers is not installed"
        raise UnknownModelError(message) from cause
    return model, f"{version} {cls.__name__}"


def _choose_class(transformers: Any, config: Any) -> Any:
    """Return the class that config.json names, or else the body of its type."""
    bodies = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    body = bodies.get(config.model_type, "")
    name = (getattr(config, "architectures", None) or [""])[0] or (body if isinstance(body, str) else body[0])
    cls = getattr(transformers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        message = f"transformers {transformers.__version__} has no class '{name or config.model_type}'"
        raise UnknownModelError(message)
    return cls


def _build_diffusers(config: Config) -> tuple[nn.Module, str]:
    try:
        diffusers = require("diffusers", extra="train")
    except MissingPackageError as cause:
        message = "diffusers is not installed"
        raise UnknownModelError(message) from cause
    cls: Any = getattr(diffusers, config["_class_name"], None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        message = f"diffusers {diffusers.__version__} has no model class '{config['_class_name']}'"
        raise UnknownModelError(message)
    with torch.device("meta"), _NoInitialValues():
        model = cls.from_config(config)  # type: ignore[attr-defined]  # of every ModelMixin
    return model, f"diffusers {diffusers.__version__} {cls.__name__}"


def _build_timm(config: Config) -> tuple[nn.Module, str]:
    try:
        timm = require("timm", extra="train")
    except MissingPackageError as cause:
        message = "timm is not installed"
        raise UnknownModelError(message) from cause
    with torch.device("meta"), _NoInitialValues():
        model: nn.Module = timm.create_model(
            config["architecture"], pretrained=False, num_classes=config.get("num_classes", 1000)
        )
    return model, f"timm {timm.__version__} {config['architecture']}"
