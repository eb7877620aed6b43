"""Attachments ⇄ what an adapter folder holds: the content of its config, and tensors by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

from torch import Tensor, nn

from deltaspec.architecture.peft_names import PREFIX, named_alike
from deltaspec.errors import CheckpointError, OptionError
from deltaspec.io.peft_writer import VERSION
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.adapted import check_free
from deltaspec.training.sites.attachment import Attachment, Method
from deltaspec.training.sites.model_sites import list_modules, list_sites
from deltaspec.training.sites.site import Site
from deltaspec.training.stored.fused_parts import join_parts, state_ranks
from deltaspec.training.stored.whole_tensors import ROOT, put_whole, refuse_biases
from deltaspec.types.methods import MethodOptions, PeftConfig

OWN = "DELTASPEC_"  # begins the peft_type of what PEFT cannot hold


def adapter_config(attachment: Attachment, *, base: str, task_type: str | None, heads: Sequence[str]) -> PeftConfig:
    """Return the content of ``adapter_config.json``; PEFT's where it can hold the adapter.

    Parameters
    ----------
    attachment : Attachment
        Its model gives the paths.
    base : str
        Of the base model: a path or a hub id.
    task_type : str, optional
        PEFT's: CAUSAL_LM, SEQ_CLS, …
    heads : sequence of str
        Modules, or parameters, of the model that are stored whole beside the adapter.

    Returns
    -------
    dict
        Plain data. What PEFT cannot hold has a ``peft_type`` that begins with DELTASPEC_, the method's name and all of
        its options.
    """
    method, whole = METHODS[attachment.method], _outermost(attachment.model, heads)
    config: PeftConfig = {
        "peft_type": _type_of(attachment),
        "peft_version": VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": whole or None,
    }
    if config["peft_type"].startswith(OWN) or method.to_peft is None:
        return {
            **config,
            "method": attachment.method,
            **{key: _plain(value) for key, value in asdict(attachment.options).items()},
        }
    if method.sites:
        config |= _name_targets(attachment, method)
    config |= method.to_peft(attachment.options)
    if method.peft == "PROMPT_TUNING" and task_type == "SEQ_2_SEQ_LM":
        config["num_transformer_submodules"] = 1  # PEFT would expect prompts for the decoder too, and use none of them
    return config if _all_whole(attachment) else state_ranks(config, attachment, adapter_tensors(attachment))


def _name_targets(attachment: Attachment, method: Method) -> PeftConfig:
    """Say in PEFT's fields where an adapter acts: at its modules, and not at those whose names end in theirs."""
    paths = list(dict.fromkeys(site.path for site in attachment.sites))
    alike = named_alike(paths, [path for path, _ in list_modules(attachment.model)])
    exact = alike and method.peft == "VERA"  # whose config excludes nothing: one expression, of whole paths
    named: PeftConfig = {"target_modules": "|".join(map(re.escape, paths)) if exact else paths}
    if alike and not exact:
        named["exclude_modules"] = alike
    return named | {"fan_in_fan_out": any(site.kind == "conv1d" for site in attachment.sites)}


def adapter_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file by name: parts of one fused matrix joined where PEFT can hold that."""
    released = attachment.released()
    if _all_whole(attachment) or _type_of(attachment).startswith(OWN):
        return released
    return join_parts(attachment, released)


def head_tensors(attachment: Attachment, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is stored whole (by its names in the model) under PEFT's names for it beside such an adapter."""
    layers = METHODS[attachment.method].sites or _type_of(attachment).startswith(OWN)
    return {f"{PREFIX if layers else ROOT}{name}": tensor for name, tensor in heads.items()}


def attach_stored(
    model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], *, name: str = "default"
) -> Attachment:
    """Attach a stored adapter of any method, and put whole tensors stored beside it into the model's own modules.

    Parameters
    ----------
    model : nn.Module
        The base; left as it was where the adapter does not fit.
    config : mapping
        Content of ``adapter_config.json``.
    tensors : mapping of str to Tensor
        By their stored names, which say where the adapter acts.
    name : str
        Of the adapter on this model.

    Raises
    ------
    CheckpointError
        If the type is unknown, a field is missing or makes no sense, or tensors fit neither the config nor the model.
    OptionError
        If the name is taken, or the model's adapters are merged or mixed.
    """
    check_free(model, name)
    label, method = _find_method(config)
    if not tensors:
        message = "The adapter holds no tensors: check that it was trained and saved, or download it again."
        raise CheckpointError(message)
    whole, sites = _sort(model, tensors, sites=bool(method.sites))
    options = _read_options(method, config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    try:
        attachment = method.attach(model, sites, options, name=name, seed=0)
    except OptionError as cause:
        message = f"The adapter of type {label} does not fit this model ({cause}): give it the base it was trained on."
        raise CheckpointError(message) from cause
    try:
        state = attachment.state()
        refuse_biases(model, config, {key: tensor for key, tensor in tensors.items() if key not in state}, whole)
        attachment.load({key: tensor for key, tensor in tensors.items() if key in state or key not in whole})
        put_whole(model, {key: place for key, place in whole.items() if key not in state}, tensors)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _type_of(attachment: Attachment) -> str:
    """Return PEFT's type if it can hold this adapter: of parts of fused matrices, LoRA's alone can be joined."""
    kind = METHODS[attachment.method].peft
    return kind if kind and (kind == "LORA" or _all_whole(attachment)) else f"{OWN}{attachment.method.upper()}"


def _all_whole(attachment: Attachment) -> bool:
    return all(site.whole for site in attachment.sites)


def _plain(value: object) -> object:
    """Return options as JSON gives them back: lists instead of tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _outermost(model: nn.Module, heads: Iterable[str]) -> list[str]:
    """Return the paths of the largest modules all of whose parameters are among the heads."""
    modules = dict(list_modules(model))
    held = {f"{path}.{leaf}" for path, module in modules.items() for leaf in module._parameters}
    given = {name for name in held if any(name == head or name.startswith(f"{head}.") for head in heads)}
    found: dict[str, None] = {}
    for name in sorted(given):
        path = name.rpartition(".")[0]
        while (outer := path.rpartition(".")[0]) and {n for n in held if n.startswith(f"{outer}.")} <= given:
            path = outer
        found[path] = None
    return list(found)


def name_method(config: PeftConfig) -> str | None:
    """Name the method of a stored adapter by its config; None where none of ours reads it.

    Examples
    --------
    >>> name_method({"peft_type": "VERA"}), name_method({"peft_type": "LOHA"})
    ('vera', None)
    """
    kind, own = config.get("peft_type"), config.get("method")
    if isinstance(kind, str) and kind.startswith(OWN) and isinstance(own, str) and own in METHODS:
        return own
    return next((name for name, method in METHODS.items() if method.peft and method.peft == kind), None)


def _find_method(config: PeftConfig) -> tuple[str, Method]:
    kind, name = config.get("peft_type"), name_method(config)
    if name is None:
        known = ", ".join(sorted({method.peft for method in METHODS.values() if method.peft}))
        message = f"The adapter's peft_type is {kind!r}, which cannot be attached: expected {known} or one of our own."
        raise CheckpointError(message)
    return str(kind), METHODS[name]


def _read_options(method: Method, config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> MethodOptions:
    """Make a method's options from a stored config; whatever is wrong with it is one CheckpointError."""
    try:
        if not str(config["peft_type"]).startswith(OWN) and method.from_peft:
            options = method.from_peft(config, shapes)
        else:
            values = {field.name: config[field.name] for field in fields(method.options)}
            options = method.options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except KeyError as cause:
        message = f"The adapter's config lacks {cause}, which {method.title} needs: download it again."
        raise CheckpointError(message) from cause
    except (TypeError, ValueError, ArithmeticError, AttributeError, OptionError) as cause:
        message = f"The adapter's config makes no sense for {method.title} ({cause}): download it again."
        raise CheckpointError(message) from cause
    rank, largest = getattr(options, "rank", 0), max((side for shape in shapes.values() for side in shape), default=0)
    if rank > largest:  # before anything of that size is made
        message = f"The adapter's config says rank {rank}, and no side of its tensors exceeds {largest}: download both."
        raise CheckpointError(message)
    return options


def _sort(
    model: nn.Module, tensors: Mapping[str, Tensor], *, sites: bool
) -> tuple[dict[str, tuple[nn.Module, str]], list[Site]]:
    """Find by their names which tensors are the model's own parameters, and at which sites the others act."""
    modules = dict(list_modules(model))
    known = {s.name: s for split in (True, False) for s in list_sites(model, split=split)} if sites else {}
    whole: dict[str, tuple[nn.Module, str]] = {}
    found: dict[str, Site] = {}
    for key in tensors:
        places = [key.removeprefix(start).rpartition(".") for start in (PREFIX, ROOT) if key.startswith(start)]
        own = [(modules[p], leaf) for p, _, leaf in places if p in modules and leaf in modules[p]._parameters]
        if own or not key.startswith(PREFIX):  # else it is what all sites share
            whole.update(zip([key], own, strict=False))
            continue
        path = places[0][0]
        while path and path not in known:
            path = path.rpartition(".")[0]
        if not path and sites:
            message = (
                f"The adapter has '{key}', but this model has no linear, Conv1D or embedding layer of that path: give "
                "it the base it was trained on."
            )
            raise CheckpointError(message)
        if path:
            found[path] = known[path]
    if sites and not found:
        message = f"The adapter holds only '{min(tensors)}' and the like, nothing that acts at a layer: save it again."
        raise CheckpointError(message)
    return whole, [site for name, site in known.items() if name in found]
