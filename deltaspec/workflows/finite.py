"""Where a stored tensor holds NaN or infinity, in the one sentence that every workflow says it with."""

from __future__ import annotations

from deltaspec.io.matrix import read_tensor
from deltaspec.linalg.numerics import first_non_finite
from deltaspec.types import TensorSpec


def describe_non_finite(side: str, spec: TensorSpec) -> str:
    """Name the tensor and the index of its first NaN or infinity; "" if every value is finite.

    Parameters
    ----------
    side : str
        ``base`` or ``tuned``.
    spec : TensorSpec
    """
    index = first_non_finite(read_tensor(spec))
    if index is None:
        return ""
    return (
        f"The {side} tensor '{spec.name}' in {spec.file} holds NaN or infinity at index {index}: "
        "repair or retrain the checkpoint, or leave the tensor out with --exclude."
    )
