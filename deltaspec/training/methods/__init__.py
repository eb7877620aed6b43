"""METHODS, the one table of training methods; each line is one file."""

from __future__ import annotations

from deltaspec.training.attachment import Method
from deltaspec.training.methods import (
    bitfit,
    bottleneck,
    compacter,
    full,
    last_layers,
    lora,
    lora_xs,
    prefix,
    prompt,
    tied,
    vblora,
    vera,
)

METHODS: dict[str, Method] = {
    "full": full.METHOD,
    "last_layers": last_layers.METHOD,
    "bitfit": bitfit.METHOD,
    "lora": lora.METHOD,
    "series": bottleneck.SERIES,
    "parallel": bottleneck.PARALLEL,
    "compacter": compacter.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "vblora": vblora.METHOD,
    "vera": vera.METHOD,
    "tied": tied.METHOD,
    "lora_xs": lora_xs.METHOD,
}
