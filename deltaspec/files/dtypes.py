"""The one table of dtypes: torch names, those of the safetensors format, those of --dtype."""

from __future__ import annotations

import torch

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign or 'i'}{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # what --dtype calls them

TORCH = {name: getattr(torch, kind) for kind, name in DTYPES.items() if hasattr(torch, kind) and "FNUZ" not in name}
