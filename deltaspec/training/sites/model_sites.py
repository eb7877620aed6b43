"""The matrices of a running model: where each lies, and how its part of a module's output is found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.roles import fused_role
from deltaspec.architecture.views import view_matrix
from deltaspec.errors import OptionError
from deltaspec.training.sites.adapted import Adapted
from deltaspec.training.sites.site import Site
from deltaspec.types import MatrixKey, Shape, View
from deltaspec.types.running import ModelConfig

WRAPPED = re.compile(r"\.base(?=\.)")
HEADS = ("classifier", "lm_head")  # roles


def list_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module by its path in the base model, as it is without adapters.

    Parameters
    ----------
    model : nn.Module
        Those that wrap a module are passed over, and so is what hangs below it.

    Examples
    --------
    >>> [path for path, _ in list_modules(nn.Sequential(nn.Linear(1, 1)))]
    ['', '0']
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, Adapted):
            inside.append(f"{name}.")
            module = module.base
        yield name, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base model's own parameters by their names without adapters; tied ones once.

    Examples
    --------
    >>> list(base_parameters(nn.Linear(1, 1)))
    ['weight', 'bias']
    """
    parameters = dict(model.named_parameters())
    return {WRAPPED.sub("", name): parameters[name] for name in _own_names(model, parameters)}


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's own buffers that its checkpoints hold, by their names without adapters."""
    known, buffers = model.state_dict().keys(), dict(model.named_buffers())
    return {WRAPPED.sub("", name): buffers[name] for name in _own_names(model, buffers) if name in known}


def _own_names(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yield the names, among those of parameters or buffers, that are the base model's own."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, Adapted)}
    for name in names:
        owner = name
        while "." in owner:  # inside an Adapted, only what hangs below .base is the model's own
            owner = owner.rpartition(".")[0]
            if owner in adapted and not name.startswith(f"{owner}.base."):
                break
        else:
            yield name


def identify_parameters(model: nn.Module) -> Identification:
    """Say what every parameter of a running model is; tied ones once, adapters left out."""
    config: ModelConfig | None = getattr(model, "config", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in base_parameters(model).items()}
    return identify(shapes, config.to_dict() if config else {})


def kind_of(module: nn.Module) -> str:
    """Say what kind of site a module is: linear, conv1d (GPT-2's), embedding, or none ("").

    Examples
    --------
    >>> kind_of(nn.Linear(2, 3)), kind_of(nn.LayerNorm(2))
    ('linear', '')
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ""


def list_sites(model: nn.Module, *, split: bool) -> list[Site]:
    """List every matrix of a running model that a method could change, in the model's order.

    Parameters
    ----------
    model : nn.Module
        Of transformers, on any device; adapters that are attached already do not count.
    split : bool
        Parts of fused matrices one by one, instead of whole.
    """
    config: ModelConfig | None = getattr(model, "config", None)
    modules = {path: module for path, module in list_modules(model) if kind_of(module)}
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in base_parameters(model).items()}
    shapes |= {f"{path}.weight": tuple(_weight(module).shape) for path, module in modules.items()}  # tied ones too
    found = identify(shapes, config.to_dict() if config else {}).matrices
    sites: list[Site] = []
    for path, module in modules.items():
        kind, parts = kind_of(module), found.get(f"{path}.weight", ())
        rows, columns = _weight(module).shape
        shape = (columns, rows) if kind == "conv1d" else (rows, columns)
        fused = len(parts) > 1
        if split and fused:
            sites += [Site(path, kind, p.key, p.view.shape, p.view, whole=False) for p in parts]
        else:
            key = parts[0].key if parts else MatrixKey(f"{path}.weight")
            role = fused_role((part.key.role for part in parts), otherwise=key.role) if fused else key.role
            key = MatrixKey(key.tensor, "", role, key.depth, None, key.stack)
            sites.append(Site(path, kind, key, shape, View(shape, transposed=kind == "conv1d")))
    return sites


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the base model's own module at a path, from under its adapters."""
    module = model.get_submodule(path)
    return module.base if isinstance(module, Adapted) else module


def base_matrix(module: nn.Module, site: Site) -> Tensor:
    """Return the base weight of a site.

    Parameters
    ----------
    module : nn.Module
        The base's own, at the site's path.
    site : Site

    Returns
    -------
    Tensor, (d_out, d_in)
        In its stored dtype, of shared memory where strides allow; of a fused matrix's part its rows alone.
    """
    return _weight(module) if site.whole and site.kind != "conv1d" else view_matrix(_weight(module), site.view)


def base_bias(module: nn.Module, site: Site) -> Tensor | None:
    """Return the bias (d_out,) of a site's rows, those of its part alone; None where the module has none."""
    bias = getattr(module, "bias", None)
    if bias is None or site.whole:
        return bias
    return site.view.take(bias)


def refuse_embeddings(sites: Sequence[Site], method: str) -> None:
    """Refuse embeddings among the sites of a method that has no form for them.

    Raises
    ------
    OptionError
        Naming the first.
    """
    for site in sites:
        if site.kind == "embedding":
            message = (
                f"--method {method} changes linear layers only, and '{site.name}' is an embedding: leave it out of "
                "--targets, or take --method lora."
            )
            raise OptionError(message)


def check_ranks(sites: Iterable[Site], rank: int) -> None:
    """Refuse a rank that exceeds a site's smaller side.

    Raises
    ------
    OptionError
        Naming the first such site.
    """
    for site in sites:
        if rank > min(site.shape):
            message = (
                f"--rank is {rank}, but '{site.name}' is {site.shape[0]} × {site.shape[1]}: "
                f"pass {min(site.shape)} or less, or leave it out of --targets."
            )
            raise OptionError(message)
