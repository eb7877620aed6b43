"""Prompt tuning: learned embeddings before those of the text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.options.methods.virtual_tokens import VirtualOptions
from deltaspec.training.methods.virtual_tokens.prefix import from_peft, to_peft
from deltaspec.training.methods.virtual_tokens.virtual import (
    Host,
    VirtualAttachment,
    extend_mask,
    find_body,
    find_embedding,
    find_stacks,
)
from deltaspec.training.sites.attachment import Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.site import Site


class PromptAttachment(VirtualAttachment):
    """Embeddings (tokens, d) before the text's; what comes out at their places is cut off again.

    A pooler inside the body, such as BERT's, takes its first place, a virtual token, as it does with PEFT. An encoder's
    places stay, and the decoder beside it reads them.
    """

    kind = "prompt"

    def __init__(self, model: nn.Module, host: Host, **settings: Any) -> None:
        super().__init__(model, host, **settings)
        stacks = find_stacks(model)
        self.read_on = stacks is not None
        if stacks is not None:
            self.hooks.append(stacks[1].register_forward_pre_hook(self._read, with_kwargs=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; of PEFT's for two stacks the first half, the one that it uses."""
        super().load({name: t[: self.tokens] if len(t) == 2 * self.tokens else t for name, t in tensors.items()})

    def _read(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Let the decoder read the tokens' places of the encoder."""
        if not self.weight:
            return None
        kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        extend_mask(kwargs, "encoder_attention_mask", self.tokens, name=self.name)
        return (), kwargs

    def insert(self, kwargs: dict[str, Any], length: int) -> None:
        """Put the embeddings before those of the text."""
        texts = kwargs.get("inputs_embeds")
        if texts is None:
            texts = self.model.get_submodule(self.embed_path)(kwargs["input_ids"])
        kwargs["input_ids"] = None
        learned = self.embeddings.to(texts.dtype).expand(length, -1, -1)
        kwargs["inputs_embeds"] = torch.cat([learned, texts], dim=1)
        if kwargs.get("cache_position") is not None:
            places = kwargs["cache_position"]
            kwargs["cache_position"] = torch.cat([torch.arange(self.tokens, device=places.device), places])
        if kwargs.get("position_ids") is not None:
            own = torch.arange(self.tokens, device=texts.device).expand(len(kwargs["position_ids"]), -1)
            kwargs["position_ids"] = torch.cat([own, kwargs["position_ids"]], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kinds = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), self.tokens), kinds], dim=1)

    def tidy(self, output: Any) -> Any:
        """Cut the tokens' places off the hidden states, so that they are as long as the text again."""
        if self.read_on:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.tokens :], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, self.tokens :]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(states[:, self.tokens :] for states in output["hidden_states"])
        return output


def attach(
    model: nn.Module, sites: Sequence[Site], options: VirtualOptions, *, name: str, seed: int
) -> PromptAttachment:
    """Put learned embeddings before the text's; at the start those of tokens of the vocabulary drawn at random.

    Raises
    ------
    OptionError
        If the model does not take embeddings.
    """
    del sites
    site = find_embedding(model)
    body = find_body(model, site, takes="inputs_embeds", method="prompt")
    table, generator = base_matrix(module_at(model, site.path), site), torch.Generator().manual_seed(seed)

    def draw(values: Tensor) -> None:
        chosen = torch.randint(len(table), (options.tokens,), generator=generator)
        values.copy_(table.detach()[chosen.to(table.device)])

    embeddings = make_parameter((options.tokens, site.shape[1]), table, draw)
    return PromptAttachment(model, Host(site, body), embeddings=embeddings, name=name, options=options)


METHOD = Method(
    title="Prompt tuning",
    reference="Lester et al., EMNLP 2021, arXiv:2104.08691",
    options=VirtualOptions,
    attach=attach,
    space="activation",
    sites="",
    identity=False,
    peft="PROMPT_TUNING",
    to_peft=to_peft,
    from_peft=from_peft,
)
