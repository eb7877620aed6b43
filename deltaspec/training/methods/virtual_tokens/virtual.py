"""Virtual tokens: what is learned stands before the input of a model's body, and nothing of the base changes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.errors import OptionError
from deltaspec.options.methods.virtual_tokens import VirtualOptions
from deltaspec.training.methods.virtual_tokens.kept_keys import (
    cache_argument,
    caches_of,
    holders,
    mark_caches,
    take_cache,
)
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import list_sites, module_at
from deltaspec.training.sites.site import Site

STORED = "prompt_embeddings"


class VirtualUpdate(Update):
    """The learned numbers (tokens, …); they live beside the embedding, so as to move and be saved with the model."""

    def __init__(self, site: Site, embeddings: nn.Parameter) -> None:
        super().__init__(site)
        self.embeddings = embeddings

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Leave the embedding's outputs as they are."""
        del x, base, weight
        return y

    def tensors(self) -> dict[str, Tensor]:
        """Return the learned numbers."""
        return {STORED: self.embeddings}


@dataclass(frozen=True, slots=True)
class Host:
    """The part of a model that is given virtual tokens, and the model's input embedding."""

    site: Site
    body: nn.Module


class VirtualAttachment(Attachment):
    """Virtual tokens before the input of a model's body, put there whenever it runs; subclasses say how.

    Parameters
    ----------
    host : Host
        Where the tokens are given.
    embeddings : nn.Parameter, (tokens, …)
    """

    kind: str  # the method's name in METHODS

    def __init__(
        self, model: nn.Module, host: Host, *, embeddings: nn.Parameter, name: str, options: VirtualOptions
    ) -> None:
        site, body = host.site, host.body
        super().__init__(model, [VirtualUpdate(site, embeddings)], name=name, method=self.kind, options=options)
        self.embeddings, self.tokens, self.weight = embeddings, options.tokens, 1.0
        self.embed_path, self.room = site.path, count_positions(model)
        self.body, self.cache_argument = body, cache_argument(body)
        self.arguments = list(inspect.signature(self.body.forward).parameters)
        self.inserted = False
        before = self.body.register_forward_pre_hook(self._run, with_kwargs=True)
        self.hooks = [before, self.body.register_forward_hook(self._finish)]

    @property
    def sites(self) -> list[Site]:
        """No matrix."""
        return []

    def enable(self, weight: float) -> None:
        """Let it act or not.

        Raises
        ------
        OptionError
            If the weight is neither 0 nor 1: tokens cannot be there in part.
        """
        if weight not in (0, 1):
            message = f"The adapter '{self.name}' has weight {weight}: virtual tokens are there (1) or not (0)."
            raise OptionError(message)
        super().enable(weight)
        self.weight = weight

    def detach(self) -> None:
        """Take it off."""
        super().detach()
        for hook in self.hooks:
            hook.remove()

    def state(self) -> dict[str, Tensor]:
        """Return the learned numbers under PEFT's name."""
        return {STORED: self.embeddings}

    def count_by_role(self) -> dict[str, int]:
        """Count them under the method's name: they belong to no role."""
        return {self.method: self.embeddings.numel()}

    def insert(self, kwargs: dict[str, Any], length: int) -> None:
        """Put the tokens before a batch of a length, by changing the body's arguments."""
        raise NotImplementedError

    def tidy(self, output: Any) -> Any:
        """Make what the body gives look as without the tokens, after they were put before its input."""
        raise NotImplementedError

    def _finish(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.inserted:
            return output
        mark_caches(caches_of(output), self.name)  # of one that the body made itself too
        return self.tidy(output)

    def _run(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Change the arguments of one run of the body; mask and positions alone, where a cache has the tokens."""
        self.inserted = False
        if not self.weight:
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        inputs = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        extend_mask(kwargs, "attention_mask", self.tokens, name=self.name)
        for places in ("position_ids", "cache_position"):
            if kwargs.get(places) is not None:
                kwargs[places] = kwargs[places] + self.tokens
        cache = take_cache(kwargs, self.cache_argument)
        if self.name not in holders(cache):
            if self.room is not None and inputs.shape[1] + self.tokens > self.room:
                message = (
                    f"The model has {self.room} positions, but {self.tokens} virtual tokens stand before a text of "
                    f"{inputs.shape[1]}: pass --length {max(self.room - self.tokens, 1)} or less, or fewer --tokens."
                )
                raise OptionError(message)
            self.insert(kwargs, inputs.shape[0])
            self.inserted = True
            if cache is not None:  # a body that returns none keeps it all the same
                mark_caches([cache], self.name)
        return (), kwargs


def extend_mask(kwargs: dict[str, Any], argument: str, tokens: int, *, name: str) -> None:
    """Let a mask among a body's arguments show the virtual tokens before the text's.

    Raises
    ------
    OptionError
        If it is there and has not two axes.
    """
    mask = kwargs.get(argument)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        message = f"The adapter '{name}' of virtual tokens needs an attention mask of two axes."
        raise OptionError(message)
    kwargs[argument] = torch.cat([mask.new_ones(len(mask), tokens), mask], dim=1)


def find_embedding(model: nn.Module) -> Site:
    """Find a model's input embedding, where virtual tokens are kept."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    inner = getattr(embedding, "base", embedding)
    return next(site for site in list_sites(model, split=False) if module_at(model, site.path) is inner)


def find_body(model: nn.Module, site: Site, *, takes: str, method: str) -> nn.Module:
    """Find the part that is given the tokens: the innermost module around the embedding that takes them and a mask.

    Heads call none further in. Of two stacks it is the decoder that takes keys and values, and the encoder that takes
    embeddings.

    Parameters
    ----------
    model : nn.Module
        Of transformers.
    site : Site
        Its input embedding.
    takes : str
        What the method hands in: "cache" or "inputs_embeds".
    method : str
        Its name in METHODS.

    Raises
    ------
    OptionError
        If the model has no such module.
    """
    paths, path = [site.path], site.path
    while path not in ("", str(getattr(model, "base_model_prefix", ""))):
        path = path.rpartition(".")[0]
        paths.append(path)
    stacks = find_stacks(model)
    modules = [stacks[takes == "cache"]] if stacks else [model.get_submodule(path) for path in paths[1:]]
    for module in modules:
        arguments = inspect.signature(module.forward).parameters.keys()
        taken = cache_argument(module) if takes == "cache" else takes
        if {taken, "attention_mask"} <= arguments:
            return module
    wanted = "a cache of keys and values" if takes == "cache" else takes
    message = f"--method {method} needs a model that takes {wanted}, which {type(model).__name__} does not: "
    raise OptionError(message + "choose another.")


def find_stacks(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the encoder and the decoder of a model that has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    parts: list[nn.Module] = []
    for name in ("get_encoder", "get_decoder"):
        part = getattr(model, name, lambda: None)()
        if part is None or part is model or part in parts:
            return None
        parts.append(part)
    return parts[0], parts[1]


def count_positions(model: nn.Module) -> int | None:
    """Count the learned positions of a model; None where they are not learned."""
    for site in list_sites(model, split=False):
        if site.key.role == "position_embed" and site.kind == "embedding" and site.key.depth is None:
            module = module_at(model, site.path)
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0) if padding is None else padding + 1
            return site.shape[0] - int(unused)
    return None
