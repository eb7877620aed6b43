"""METHOD_OPTIONS: the options of every training method; readable without torch."""

from __future__ import annotations

from deltaspec.options.methods.base_weights import BitfitOptions, FullOptions, LastLayersOptions
from deltaspec.options.methods.bottleneck import CompacterOptions, ParallelOptions, SeriesOptions
from deltaspec.options.methods.lora import LoraOptions
from deltaspec.options.methods.shared_factors import LoraXsOptions, TiedOptions, VbLoraOptions, VeraOptions
from deltaspec.options.methods.virtual_tokens import VirtualOptions

METHOD_OPTIONS: dict[str, type] = {
    "full": FullOptions,
    "last_layers": LastLayersOptions,
    "bitfit": BitfitOptions,
    "lora": LoraOptions,
    "vblora": VbLoraOptions,
    "vera": VeraOptions,
    "tied": TiedOptions,
    "lora_xs": LoraXsOptions,
    "series": SeriesOptions,
    "parallel": ParallelOptions,
    "compacter": CompacterOptions,
    "prefix": VirtualOptions,
    "prompt": VirtualOptions,
}
"""Method → its options; a test keeps the names and classes equal to those of METHODS."""
