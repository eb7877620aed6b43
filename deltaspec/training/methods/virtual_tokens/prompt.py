"""Prompt tuning: learned embeddings before those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.options.methods.virtual_tokens import VirtualOptions
from deltaspec.training.methods.virtual_tokens.prefix import from_peft, to_peft
from deltaspec.training.methods.virtual_tokens.virtual import (
    VirtualAttachment,
    find_body,
    find_embedding,
)
from deltaspec.training.sites.attachment import Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.site import Site


class PromptAttachment(VirtualAttachment):
    """Embeddings (tokens, d) before the text's; what comes out at their places is cut off again.

    A pooler inside the body, such as BERT's, takes its first place, a virtual token, as it does with PEFT.
    """

    def insert(self, kwargs: dict[str, Any], length: int) -> None:
        """Put the embeddings before those of the text."""
        texts = kwargs.get("inputs_embeds")
        if texts is None:
            texts = self.model.get_submodule(self.embed_path)(kwargs["input_ids"])
        kwargs["input_ids"] = None
        learned = self.embeddings.to(texts.dtype).expand(length, -1, -1)
        kwargs["inputs_embeds"] = torch.cat([learned, texts], dim=1)
        if kwargs.get("position_ids") is not None:
            own = torch.arange(self.tokens, device=texts.device).expand(len(kwargs["position_ids"]), -1)
            kwargs["position_ids"] = torch.cat([own, kwargs["position_ids"]], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kinds = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), self.tokens), kinds], dim=1)

    def tidy(self, output: Any) -> Any:
        """Cut the tokens' places off the hidden states, so that they are as long as the text again."""
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
        If the model does not take embeddings, or has two stacks.
    """
    del sites
    site = find_embedding(model)
    body = find_body(model, site, "inputs_embeds", method="prompt")
    table, generator = base_matrix(module_at(model, site.path), site), torch.Generator().manual_seed(seed)

    def draw(values: Tensor) -> None:
        chosen = torch.randint(len(table), (options.tokens,), generator=generator)
        values.copy_(table.detach()[chosen.to(table.device)])

    embeddings = make_parameter((options.tokens, site.shape[1]), table, draw)
    return PromptAttachment(model, site, body, embeddings=embeddings, name=name, method="prompt", options=options)


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
