"""Virtual tokens: what is learned stands before the input of a model's body, and nothing of the base changes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.errors import OptionError
from deltaspec.options.methods.virtual_tokens import VirtualOptions
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


class VirtualAttachment(Attachment):
    """Virtual tokens before the input of a model's body, put there whenever it runs; subclasses say how.

    Parameters
    ----------
    site : Site
        The model's input embedding.
    body : nn.Module
        The part of the model that is given the tokens.
    embeddings : nn.Parameter, (tokens, …)
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        body: nn.Module,
        *,
        embeddings: nn.Parameter,
        name: str,
        method: str,
        options: VirtualOptions,
    ) -> None:
        super().__init__(model, [VirtualUpdate(site, embeddings)], name=name, method=method, options=options)
        self.embeddings, self.tokens, self.weight = embeddings, options.tokens, 1.0
        self.embed_path, self.room = site.path, count_positions(model)
        self.body = body
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
        return self.tidy(output) if self.inserted else output

    def _run(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Change the arguments of one run of the body; mask and positions alone, where a cache has the tokens."""
        self.inserted = False
        if not self.weight:
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        inputs = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        mask, positions, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                message = f"The adapter '{self.name}' of virtual tokens needs an attention mask of two axes."
                raise OptionError(message)
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.tokens), mask], dim=1)
        if positions is not None:
            kwargs["position_ids"] = positions + self.tokens
        held = getattr(cache, "virtual", ())
        if self.name not in held:
            if self.room is not None and inputs.shape[1] + self.tokens > self.room:
                message = (
                    f"The model has {self.room} positions, but {self.tokens} virtual tokens stand before a text of "
                    f"{inputs.shape[1]}: pass --length {max(self.room - self.tokens, 1)} or less, or fewer --tokens."
                )
                raise OptionError(message)
            self.insert(kwargs, inputs.shape[0])
            self.inserted = True
            if kwargs.get("past_key_values") is not None:  # it comes in again at the next step of a generation
                kwargs["past_key_values"].virtual = (*held, self.name)
        return (), kwargs


def find_embedding(model: nn.Module) -> Site:
    """Find a model's input embedding, where virtual tokens are kept."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    inner = getattr(embedding, "base", embedding)
    return next(site for site in list_sites(model, split=False) if module_at(model, site.path) is inner)


def find_body(model: nn.Module, site: Site, argument: str, *, method: str) -> nn.Module:
    """Find the innermost module around the embedding that takes an argument and a mask: heads call none further in.

    Parameters
    ----------
    model : nn.Module
        Of transformers.
    site : Site
        Its input embedding.
    argument : str
        What the method hands in: past_key_values or inputs_embeds.
    method : str
        Its name in METHODS.

    Raises
    ------
    OptionError
        If the model has an encoder and a decoder, or no such module.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        message = f"--method {method} is for models of one stack, but {kind} has an encoder and a decoder."
        raise OptionError(message)
    outer = str(getattr(model, "base_model_prefix", ""))
    path = site.path
    while path not in ("", outer):
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if {argument, "attention_mask"} <= inspect.signature(module.forward).parameters.keys():
            return module
    message = f"--method {method} needs a model that takes {argument}, which {kind} does not: choose another."
    raise OptionError(message)


def count_positions(model: nn.Module) -> int | None:
    """Count the learned positions of a model; None where they are not learned."""
    for site in list_sites(model, split=False):
        if site.key.role == "position_embed" and site.kind == "embedding" and site.key.depth is None:
            module = module_at(model, site.path)
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0) if padding is None else padding + 1
            return site.shape[0] - int(unused)
    return None
