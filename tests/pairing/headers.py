"""Checkpoints and adapters from shapes alone: pairing reads no file where nothing may be tied."""

from __future__ import annotations

from pathlib import Path

from deltaspec.types import AdapterIndex, Checkpoint, LowRankTerm, TensorSpec
from tests.families import FAMILIES

HEADS = ("lm_head.weight", "embed_out.weight", "shared.weight")  # of an embedding's shape, whose content would be read


def spec(name, shape, dtype="F32"):
    return TensorSpec(name, Path("file"), tuple(shape), dtype)


def checkpoint(shapes, ref="base", *, dtype="F32", **config):
    tensors = {name: spec(name, shape, dtype) for name, shape in shapes.items()}
    return Checkpoint(ref, Path(ref), (), tensors, config)


def family(name, ref="base", *, dtype="F32"):
    """One of families.toml, without heads."""
    shapes = {n: s for n, s in FAMILIES[name].tensors.items() if not n.endswith(HEADS)}
    return checkpoint(shapes, ref, dtype=dtype, **FAMILIES[name].config)


def term(path, d_out, d_in, *, r=4, scaling=1.0, experts=0, embedding=False, kernel=()):
    """Factors of a product (d_out, d_in), or of a stack's folded ones."""
    fold = r * max(experts, 1)
    shapes = ((r, d_out), (d_in, r)) if embedding else ((fold, d_in, *kernel), (d_out, fold, *(1 for _ in kernel)))
    parts = (spec(f"{path}.lora_{side}", shape) for side, shape in zip("AB", shapes, strict=True))
    return LowRankTerm(*parts, scaling, embedding, experts)


def adapter(terms, ref="lora", *, full=(), biases=(), base_model="base", **config):
    """``full`` maps names to shapes, ``biases`` module paths to lengths."""
    whole = {name: spec(name, shape) for name, shape in dict(full).items()}
    added = {path: spec(f"{path}.lora_B.bias", (length,)) for path, length in dict(biases).items()}
    return AdapterIndex(ref, Path(ref), (), dict(terms), whole, added, base_model, config)
