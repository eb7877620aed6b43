"""A checkpoint's weights as a running model is loaded with them: whole tensors, mapped where they can be."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.io.matrix import open_matrix, read_tensor, read_values
from deltaspec.types import Checkpoint, MatrixSource, TensorSpec, View


def read_weight(spec: TensorSpec) -> Tensor:
    """Read a whole tensor as stored, mapped from its file, or in float32 where a scale dequantises it.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    if spec.scale is None:
        return read_tensor(spec)
    if len(spec.shape) not in (2, 3):
        return read_values(spec).to(torch.float32)
    experts = range(spec.shape[0]) if len(spec.shape) == 3 else (None,)
    rows, columns = spec.shape[-2:]
    stored = (open_matrix(MatrixSource(spec, View((rows, columns), expert=expert))) for expert in experts)
    return torch.stack([matrix.rows(0, rows).to(torch.float32) for matrix in stored]).reshape(spec.shape)


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint under the names of its files, aliases included; nearly all stay mapped.

    Raises
    ------
    CheckpointError
        If one cannot be read.
    """
    state = {name: read_weight(spec) for name, spec in checkpoint.tensors.items()}
    return state | {alias: state[name] for alias, name in checkpoint.aliases.items() if name in state}
