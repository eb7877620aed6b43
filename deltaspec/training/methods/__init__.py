"""METHODS, the one table of training methods; each line is one file."""

from __future__ import annotations

from deltaspec.training.methods.base_weights import bitfit, full, last_layers
from deltaspec.training.methods.bottleneck import compacter, series_parallel
from deltaspec.training.methods.lora import lora
from deltaspec.training.methods.shared_factors import lora_xs, tied, vblora, vera
from deltaspec.training.methods.virtual_tokens import prefix, prompt
from deltaspec.training.sites.attachment import Method

METHODS: dict[str, Method] = {
    "full": full.METHOD,
    "last_layers": last_layers.METHOD,
    "bitfit": bitfit.METHOD,
    "lora": lora.METHOD,
    "series": series_parallel.SERIES,
    "parallel": series_parallel.PARALLEL,
    "compacter": compacter.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "vblora": vblora.METHOD,
    "vera": vera.METHOD,
    "tied": tied.METHOD,
    "lora_xs": lora_xs.METHOD,
}
