"""Prefix tuning: learned keys and values that every layer's attention finds before those of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltaspec.errors import OptionError, require
from deltaspec.options.methods.virtual_tokens import VirtualOptions
from deltaspec.training.methods.virtual_tokens.virtual import (
    STORED,
    VirtualAttachment,
    find_body,
    find_embedding,
)
from deltaspec.training.sites.attachment import Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.site import Site


class PrefixAttachment(VirtualAttachment):
    """Keys and values (tokens, 2 · layers · heads · d_head), handed to the body as a cache of tokens it has read."""

    unasked = False

    def insert(self, kwargs: dict[str, Any], length: int) -> None:
        """Put the keys and values into the cache that the body is given, or into a new one.

        Raises
        ------
        OptionError
            If gradients are checkpointed: transformers then drops the cache without a word.
        """
        if self.body.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.body.modules()
        ):
            message = "--method prefix does not go with gradient checkpointing, under which transformers has no cache."
            raise OptionError(message)
        cache = kwargs.get("past_key_values")
        self.unasked = cache is None and kwargs.get("use_cache") is False
        if cache is None:
            cache = kwargs["past_key_values"] = require("transformers", extra="train").DynamicCache()
        layers, heads, width = measure_attention(self.model)
        dtype = base_matrix(module_at(self.model, self.embed_path), self.updates[self.embed_path].site).dtype
        states = self.embeddings.to(dtype).view(self.tokens, layers, 2, 1, heads, width).permute(1, 2, 3, 4, 0, 5)
        for layer, (keys, values) in enumerate(states.expand(-1, -1, length, -1, -1, -1)):
            cache.update(keys, values, layer)

    def tidy(self, output: Any) -> Any:
        """Keep a cache back that nobody asked for: a generation without one would take it."""
        if self.unasked and not isinstance(output, tuple):
            output["past_key_values"] = None
        return output


def measure_attention(model: nn.Module) -> tuple[int, int, int]:
    """Return a model's number of layers, of heads of keys and values, and their width."""
    config: Any = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


def attach(
    model: nn.Module, sites: Sequence[Site], options: VirtualOptions, *, name: str, seed: int
) -> PrefixAttachment:
    """Put learned keys and values before every layer's.

    At the start they are small and random, which is not the identity: a softmax gives every key a share, so that even
    zero keys with zero values take some away from the text; all-zero ones would also remain alike in training.

    Raises
    ------
    OptionError
        If the model does not take keys and values, as DistilBERT does not, or has two stacks.
    """
    del sites
    site = find_embedding(model)
    body = find_body(model, site, "past_key_values", method="prefix")
    layers, heads, width = measure_attention(model)
    like, generator = base_matrix(module_at(model, site.path), site), torch.Generator().manual_seed(seed)
    shape = (options.tokens, 2 * layers * heads * width)
    embeddings = make_parameter(shape, like, lambda t: t.normal_(0, 0.02, generator=generator))
    return PrefixAttachment(model, site, body, embeddings=embeddings, name=name, method="prefix", options=options)


def to_peft(options: VirtualOptions) -> dict[str, Any]:
    """Return the fields of PEFT's config; those of the model PEFT reads from the model."""
    return {"num_virtual_tokens": options.tokens}


def from_peft(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VirtualOptions:
    """Read PEFT's config; a projection that was trained is already multiplied out in the file."""
    del config
    return VirtualOptions(shapes[STORED][0])


METHOD = Method(
    title="Prefix tuning",
    reference="Li and Liang, ACL 2021, arXiv:2101.00190",
    options=VirtualOptions,
    attach=attach,
    space="activation",
    sites="",
    identity=False,
    peft="PREFIX_TUNING",
    to_peft=to_peft,
    from_peft=from_peft,
)
