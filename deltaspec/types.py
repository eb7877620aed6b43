"""The nouns of deltaspec: frozen dataclasses that every floor may use.

Shape letters: d_out and d_in are a matrix's outputs and inputs, r a rank, k a number of singular values.
Dtype names are those of the safetensors format: F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, U8, …
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor, known from headers alone.

    ``scale`` is the companion tensor that dequantises it (fp8), one number for each block of ``block`` =
    (rows, columns) elements; the real weight is stored value times scale.
    """

    name: str
    file: Path
    shape: Shape
    dtype: str
    scale: TensorSpec | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class View:
    """How one matrix (d_out, d_in) lies inside a stored tensor.

    Read in this order: take ``expert`` along the leading axis (stacks of experts); flatten trailing axes so that
    two remain (convolutions: out, in·k·k); transpose if stored as (d_in, d_out); then the rows are ``groups`` equal
    groups, and this matrix takes rows ``start:stop`` of each (fused projections; one group when they are contiguous).
    """

    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    groups: int = 1
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class MatrixKey:
    """What a matrix is: its tensor's name in the base, and its place in the model.

    ``part`` names the piece of a fused tensor ("" when it is whole), ``depth`` is the block index (None outside the
    blocks), ``stack`` is "" for models with one stack, else encoder, decoder, cross (a decoder's attention to the
    encoder), text, vision, down, mid or up.
    """

    tensor: str
    part: str = ""
    role: str = "other"
    depth: int | None = None
    expert: int | None = None
    stack: str = ""

    def __str__(self) -> str:
        """Print as the key under which the run directory stores it."""
        pieces = [self.tensor]
        if self.part:
            pieces.append(self.part)
        if self.expert is not None and f"experts.{self.expert}." not in self.tensor:
            pieces.append(str(self.expert))
        return "/".join(pieces)


@dataclass(frozen=True, slots=True)
class Identified:
    """One matrix that a tensor holds: its key and view. ``guessed`` where no family knew the name."""

    key: MatrixKey
    view: View
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """Where a dense matrix is stored."""

    spec: TensorSpec
    view: View


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """One stored pair of LoRA factors: scaling · B·A, with A (r, d_in) and B (d_out, r).

    ``embedding`` marks PEFT's lora_embedding_A (r, d_out) and lora_embedding_B (d_in, r), which are stored
    transposed. Convolution factors have trailing axes, flattened on reading.
    """

    lora_A: TensorSpec
    lora_B: TensorSpec
    scaling: float
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class LowRankSource:
    """A sum of stored low-rank terms; ``view`` takes rows of the product where the base is fused."""

    terms: tuple[LowRankTerm, ...]
    view: View


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: an index of its tensors, nothing read yet."""

    ref: str
    root: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorSpec]
    config: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)  # not in tensors → the name it shares memory with


@dataclass(frozen=True, slots=True)
class AdapterIndex:
    """An opened PEFT LoRA folder: its modules by the base's module path, nothing read yet.

    ``modules`` maps a module path ("model.layers.0.self_attn.q_proj") to its factors; ``full`` maps a tensor name to a
    tensor stored whole (modules_to_save); ``biases`` maps a module path to lora_B.bias, to be multiplied by scaling.
    """

    ref: str
    root: Path
    files: tuple[Path, ...]
    modules: dict[str, LowRankTerm]
    full: dict[str, TensorSpec]
    biases: dict[str, TensorSpec]
    base_model: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class WeightPair:
    """One matrix of the base and the same matrix of the tuned model; cheap, printable, without tensors.

    A low-rank ``base`` is the first of two adapters that are compared.
    """

    key: MatrixKey
    shape: tuple[int, int]
    base: MatrixSource | LowRankSource
    tuned: MatrixSource | LowRankSource
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """ΔW = lora_B @ lora_A, scaling included; (d_out, r) and (r, d_in), float64."""

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True, slots=True)
class Rounding:
    """Storage rounding of one delta, predicted from the stored values, over rows or columns that changed at all.

    ``unchanged`` is the share of elements whose delta is exactly zero. With ulp the spacing of stored numbers at each
    tuned weight (and at each base weight too where that one is quantised), in units of the weights: ``ulp_energy`` =
    Σ ulp², ``row_max`` and ``column_max`` the largest sum of ulp² over a row and over a column. ``eps`` is the
    relative spacing of the arithmetic that the stored dtypes allow (2⁻²³ up to 32 bits, else 2⁻⁵²), and ``grid`` the
    dtype on whose grid the tuned values lie: the stored one, or a coarser one that was upcast on saving.
    """

    unchanged: float
    ulp_energy: float
    row_max: float
    column_max: float
    eps: float
    grid: str


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one matrix, and how far they can be trusted.

    ``singular_values`` (min(d_out, d_in),) float64, descending, in units of the weights; of a low-rank source only
    its r, for the others are exactly zero. ``energy`` = ‖·‖²_F in float64, summed from the elements where there are
    any. No value is wrong by more than ``error_bound``; on the
    Gram route a value σ is wrong by at most error_bound²/σ. ``left`` (d_out, k) and ``right`` (d_in, k) hold the top
    singular vectors where they were asked for.
    """

    singular_values: Tensor
    shape: tuple[int, int]
    energy: float
    method: str
    error_bound: float
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """The result for one matrix, as the run directory stores it.

    ``metrics`` maps every name of METRICS to a number, a truth value, or None where the metric does not apply.
    """

    key: MatrixKey
    shape: tuple[int, int]
    base_dtype: str
    tuned_dtype: str
    spectrum_of: str
    metrics: dict[str, float | int | bool | None]
    method: str
    error_bound: float
    seconds: float
    device: str
    notes: tuple[str, ...] = ()

    @property
    def store_key(self) -> str:
        """The record's name in the run: its matrix's key, with #base or #tuned where it is not the delta's."""
        return str(self.key) if self.spectrum_of == "delta" else f"{self.key}#{self.spectrum_of}"

    def to_dict(self) -> dict[str, Any]:
        """One flat row: the key's fields, shape, dtypes and spectrum_of, then the metrics."""
        return {
            "tensor": self.key.tensor,
            "part": self.key.part,
            "role": self.key.role,
            "depth": self.key.depth,
            "expert": self.key.expert,
            "stack": self.key.stack,
            "d_out": self.shape[0],
            "d_in": self.shape[1],
            "base_dtype": self.base_dtype,
            "tuned_dtype": self.tuned_dtype,
            "spectrum_of": self.spectrum_of,
            **self.metrics,
            "method": self.method,
            "error_bound": self.error_bound,
        }
