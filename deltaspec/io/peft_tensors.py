"""The tensors of an adapter's file: factors laid out and folded as PEFT has them, and modules stored whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deltaspec.architecture.peft_names import NESTED, PREFIX
from deltaspec.files.dtypes import DTYPES
from deltaspec.io.peft_targets import Target
from deltaspec.types import AdapterModule, Entry, Shape

PLAIN = re.compile(r"[\w.-]+")


def list_factors(targets: Sequence[Target], dtype: str, *, bias: bool) -> list[Entry]:
    """List the tensors that hold factors, under PEFT's names.

    Parameters
    ----------
    targets : sequence of Target
    dtype : str
        F32, BF16 or F16.
    bias : bool
        Give every target a lora_B.bias, zeros where its bias did not change.
    """
    parameters = {target.parameter for target in targets}
    entries = []
    for target in targets:
        module, path = target.module, f"{PREFIX}{target.path}"
        if target.parameter.endswith(f".{NESTED[0]}") and f"{target.path}.{NESTED[1]}" in parameters:
            path += ".base_layer"
        names = ("lora_A.weight", "lora_B.weight")
        names = ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else names
        for side, shape in enumerate(_shapes(target)):
            entries.append(Entry(f"{path}.{names[side]}", shape, dtype, partial(_read, target, side, shape, dtype)))
        if bias:
            rows = module.shape[1 if target.swapped else 0]
            entries.append(Entry(f"{path}.lora_B.bias", (rows,), dtype, partial(_read_bias, module, rows, dtype)))
    return entries


def _shapes(target: Target) -> tuple[Shape, Shape]:
    """Return the stored shapes of lora_A and lora_B."""
    module, rank = target.module, target.module.rank
    d_out, d_in = module.shape
    if module.kind == "embedding":
        return (rank, d_out), (d_in, rank)
    if module.kind == "conv":
        return (rank, *module.kernel), (d_out, rank, *(1 for _ in module.kernel[1:]))
    if module.kind == "stack":
        first, last = (d_out, d_in) if target.swapped else (d_in, d_out)
        return (rank * module.experts, first), (last, rank * module.experts)
    return ((rank, d_out), (d_in, rank)) if target.swapped else ((rank, d_in), (d_out, rank))


def _read(target: Target, side: int, shape: Shape, dtype: str) -> Tensor:
    """Read one factor, zero-padded to the stored rank and laid out as PEFT has it."""
    module = target.module
    lora_A, lora_B = module.read()
    factors = [lora_A.mT, lora_B]  # both (…, rows, k)
    if module.kind == "embedding" or target.swapped:
        factors.reverse()
    short = module.rank - lora_A.shape[-2]
    factor = factors[side]
    factor = torch.cat([factor, factor.new_zeros(*factor.shape[:-1], short)], dim=-1)
    if module.kind == "stack":  # A folds (expert, rank), B (rank, expert)
        folded = factor.movedim(-1, 1).flatten(0, 1) if side == 0 else factor.permute(1, 2, 0).flatten(1)
    else:
        folded = factor.mT if side == 0 else factor
    return folded.reshape(shape).to(DTYPES[dtype].torch).contiguous()


def _read_bias(module: AdapterModule, rows: int, dtype: str) -> Tensor:
    change = module.read_bias() if module.read_bias else torch.zeros(rows)
    return change.to(DTYPES[dtype].torch).contiguous()
