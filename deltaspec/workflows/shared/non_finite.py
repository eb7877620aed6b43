"""Where a stored tensor holds NaN or infinity, in the one sentence that every workflow says it with."""

from __future__ import annotations

from deltaspec.errors import NumericalError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.scales import decode_scale
from deltaspec.linalg.numerics import first_non_finite
from deltaspec.types import LowRankSource, MatrixSource, TensorSpec, WeightPair


def describe_non_finite(side: str, spec: TensorSpec, *, exclude: bool = True) -> str:
    """Name the tensor and the index of its first NaN or infinity; "" if every value is finite.

    Parameters
    ----------
    side : str
        ``base`` or ``tuned``.
    spec : TensorSpec
    exclude : bool
        Whether the command has --exclude.
    """
    values = read_tensor(spec)
    index = first_non_finite(decode_scale(values) if spec.dtype == "U8" else values)
    if index is None:
        return ""
    return (
        f"The {side} tensor '{spec.name}' in {spec.file} holds NaN or infinity at index {index}: "
        f"repair or retrain the checkpoint{', or leave the tensor out with --exclude' if exclude else ''}."
    )


def locate(pair: WeightPair, name: str, cause: NumericalError, *, exclude: bool = True) -> NumericalError:
    """Say which stored tensor of a pair holds the first NaN or infinity, and where; else that ``name`` failed.

    Parameters
    ----------
    pair : WeightPair
    name : str
        What could not be decomposed.
    cause : NumericalError
    exclude : bool
        Whether the command has --exclude; a sum of adapters never has.
    """
    exclude = exclude and isinstance(pair.base, MatrixSource)
    for side, source in (("base", pair.base), ("tuned", pair.tuned)):
        for spec in _specs(source):
            if message := describe_non_finite(side, spec, exclude=exclude):
                return NumericalError(message)
    return NumericalError(f"'{name}' cannot be decomposed: {cause}")


def _specs(source: MatrixSource | LowRankSource) -> list[TensorSpec]:
    if isinstance(source, MatrixSource):
        return [spec for spec in (source.spec, source.spec.scale) if spec is not None]
    return [spec for term in source.terms for spec in (term.lora_A, term.lora_B)]
