"""LoRA: ΔW = scaling · B·A beside a frozen matrix; rsLoRA, DoRA, PiSSA and LoRA+ are options of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.errors import OptionError
from deltaspec.options.methods.lora import LoraOptions
from deltaspec.training.methods.lora.peft_config import from_peft, to_peft
from deltaspec.training.methods.lora.update import BiasUpdate, EmbeddingLora, LinearLora, LoraUpdate
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Group, Method, fill
from deltaspec.training.sites.model_sites import HEADS, check_ranks, kind_of, list_modules, list_sites, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import MatrixKey, View

START = (".pissa_A", ".pissa_B")


class LoraAttachment(Attachment):
    """LoRA at every site, and the biases that are trained beside it."""

    options: LoraOptions

    @property
    def sites(self) -> list[Site]:
        """Where matrices change."""
        return [update.site for update in self.updates.values() if isinstance(update, LoraUpdate)]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; PiSSA's start may be missing, as in PEFT's files, and is then the base's own.

        Raises
        ------
        CheckpointError
            If another one is missing, one is unknown, or one has another shape.
        """
        state = self.state()
        fill(state, {name: tensor for name, tensor in state.items() if name.endswith(START)} | dict(tensors))

    def groups(self) -> list[Group]:
        """Return B at λ times the learning rate; lengths and biases without decay, which would pull them to zero."""
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trained().items():
            of_B = name.removesuffix(".bias").removesuffix(".weight").endswith(("lora_B", "lora_embedding_B"))
            key = (self.options.lr_ratio if of_B else 1.0, parameter.ndim > 1)
            found.setdefault(key, []).append(parameter)
        return [Group(tuple(own), factor, decay) for (factor, decay), own in found.items()]

    def released(self) -> dict[str, Tensor]:
        """Return PEFT's tensors of an adapter of the base as it is; those of PiSSA have twice its rank."""
        found: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            own = update.released() if isinstance(update, LoraUpdate) else update.tensors()
            found |= {f"{PREFIX}{name}.{suffix}": tensor for suffix, tensor in own.items()}
        return found

    def stored(self) -> int:
        """Count what a released adapter holds: under PiSSA more than is trained."""
        return sum(tensor.numel() for tensor in self.released().values())


def attach(model: nn.Module, sites: Sequence[Site], options: LoraOptions, *, name: str, seed: int) -> Attachment:
    """Put LoRA at every site.

    Parameters
    ----------
    model : nn.Module
        Of transformers, on any device (meta too).
    sites : sequence of Site
    options : LoraOptions
    name : str
        Of the adapter.
    seed : int
        Of the factors' start.

    Raises
    ------
    OptionError
        If a rank exceeds its site, or a site or a bias cannot be trained as asked.
    """
    for site in sites:
        check_ranks([site], options.rank_at(site.name))
        if options.lora_bias and site.kind == "embedding":
            message = f"--lora-bias is set, but '{site.name}' is an embedding: leave it out of --targets."
            raise OptionError(message)
    generator = torch.Generator().manual_seed(seed)
    updates: list[Update] = []
    for site in sites:
        kind = EmbeddingLora if site.kind == "embedding" else LinearLora
        updates.append(kind(site, module_at(model, site.path), options, generator))
    if options.bias != "none":
        whole = {site.path for site in sites if site.whole}
        paths = {site.path for site in sites} if options.bias == "lora_only" else None
        updates += [BiasUpdate(site, module_at(model, site.path)) for site in _bias_sites(model, paths, whole)]
    return LoraAttachment(model, updates, name=name, method="lora", options=options)


def _bias_sites(model: nn.Module, paths: set[str] | None, done: set[str]) -> list[Site]:
    """Find the biases of these modules, or of all outside of heads; not of those whose LoRA has one itself."""
    own = {path: bias for path, module in list_modules(model) if (bias := module._parameters.get("bias")) is not None}
    heads = {site.path for site in list_sites(model, split=False) if site.key.role in HEADS}
    tied = {id(own[path]) for path in heads & own.keys()}
    found = []
    for path, bias in own.items():
        if path in done or (path not in paths if paths is not None else id(bias) in tied):
            continue
        module = module_at(model, path)
        if not kind_of(module) and "Norm" not in type(module).__name__:
            message = f"--bias is all, but that of '{path}', a {type(module).__name__}, cannot be: pass lora_only."
            raise OptionError(message)
        found.append(Site(path, "bias", MatrixKey(f"{path}.bias", role="bias"), (len(bias), 1), View((len(bias), 1))))
    return found


METHOD = Method(
    title="LoRA",
    reference="Hu et al., ICLR 2022, arXiv:2106.09685",
    options=LoraOptions,
    attach=attach,
    peft="LORA",
    to_peft=to_peft,
    from_peft=from_peft,
)
