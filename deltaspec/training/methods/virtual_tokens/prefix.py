"""Prefix tuning: learned keys and values that every layer's attention finds before those of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltaspec.errors import OptionError, require
from deltaspec.options.methods.virtual_tokens import VirtualOptions
from deltaspec.training.methods.virtual_tokens.kept_keys import NAMES
from deltaspec.training.methods.virtual_tokens.virtual import (
    STORED,
    Host,
    VirtualAttachment,
    find_body,
    find_embedding,
    find_stacks,
)
from deltaspec.training.sites.attachment import Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.site import Site


class PrefixAttachment(VirtualAttachment):
    """Keys and values (tokens, 2 · layers · heads · d_head), handed to the body as a cache of tokens it has read."""

    kind = "prefix"
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
        argument = str(self.cache_argument)
        self.unasked = kwargs.get(argument) is None and kwargs.get("use_cache") is False
        if kwargs.get(argument) is None:
            kwargs[argument] = new_cache(self.model, self.body)
        cache = getattr(kwargs[argument], "self_attention_cache", kwargs[argument])
        layers, heads, width = measure_attention(self.model)
        dtype = base_matrix(module_at(self.model, self.embed_path), self.updates[self.embed_path].site).dtype
        states = self.embeddings.to(dtype).view(self.tokens, layers, 2, 1, heads, width).permute(1, 2, 3, 4, 0, 5)
        for layer, (keys, values) in enumerate(states.expand(-1, -1, length, -1, -1, -1)):
            cache.update(keys, values, layer)

    def tidy(self, output: Any) -> Any:
        """Keep a cache back that nobody asked for: a generation without one would take it."""
        if self.unasked and not isinstance(output, tuple):
            for argument in NAMES:
                if argument in output:
                    output[argument] = None
        return output


def new_cache(model: nn.Module, body: nn.Module) -> Any:
    """Make an empty cache as the model makes its own: for a decoder beside an encoder, of what it reads there too."""
    transformers = require("transformers", extra="train")
    cache = transformers.DynamicCache(config=body.config)
    if find_stacks(model) is None:
        return cache
    return transformers.EncoderDecoderCache(cache, transformers.DynamicCache(config=body.config))


def measure_attention(model: nn.Module) -> tuple[int, int, int]:
    """Return a model's number of layers, of heads of keys and values, and their width; the decoder's of two stacks.

    Raises
    ------
    OptionError
        If the config has no attention heads, as that of a state-space model.
    """
    config: Any = model.config
    heads = getattr(config, "decoder_attention_heads", None) or getattr(config, "num_attention_heads", None)
    if heads is None:
        message = f"--method prefix needs attention heads, which {type(model).__name__} has not: choose another."
        raise OptionError(message)
    layers = [getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")]
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return next(filter(None, layers)), getattr(config, "num_key_value_heads", None) or heads, width


def attach(
    model: nn.Module, sites: Sequence[Site], options: VirtualOptions, *, name: str, seed: int
) -> PrefixAttachment:
    """Put learned keys and values before every layer's.

    At the start they are small and random, which is not the identity: a softmax gives every key a share, so that even
    zero keys with zero values take some away from the text; all-zero ones would also remain alike in training.

    Raises
    ------
    OptionError
        If the model does not take keys and values, as DistilBERT does not.
    """
    del sites
    site = find_embedding(model)
    body = find_body(model, site, takes="cache", method="prefix")
    layers, heads, width = measure_attention(model)
    like, generator = base_matrix(module_at(model, site.path), site), torch.Generator().manual_seed(seed)
    shape = (options.tokens, 2 * layers * heads * width)
    embeddings = make_parameter(shape, like, lambda t: t.normal_(0, 0.02, generator=generator))
    return PrefixAttachment(model, Host(site, body), embeddings=embeddings, name=name, options=options)


def to_peft(options: VirtualOptions) -> dict[str, Any]:
    """Return the fields of PEFT's config; those of the model PEFT reads from the model."""
    return {"num_virtual_tokens": options.tokens}


def from_peft(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VirtualOptions:
    """Read PEFT's config; a projection that was trained is already multiplied out in the file.

    PEFT keeps prompts for two stacks twice, one for the decoder, which is given none: the first is used.
    """
    rows = shapes[STORED][0]
    return VirtualOptions(rows // 2 if rows == 2 * config.get("num_virtual_tokens", rows) else rows)


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
