"""The nouns of deltaspec: frozen dataclasses that every floor may use.

Shape letters: d_out and d_in are a matrix's outputs and inputs, r a rank, k a number of singular values.
Dtype names are those of the safetensors format: F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, U8, …
"""

from deltaspec.types.adapters import AdapterModule, Entry, ModulePair
from deltaspec.types.identity import OneSidedBlocks, PlainFields, SkippedTensor, SourceIdentity, WeightedSource
from deltaspec.types.notes import Note, NoteKind
from deltaspec.types.outline import Holder, Outline, Place
from deltaspec.types.progress import Step
from deltaspec.types.results import LowRankDelta, MatrixRecord, Rounding, Spectrum, Truncation
from deltaspec.types.stored import (
    AdapterIndex,
    Checkpoint,
    Config,
    ForeignAdapter,
    KnownMatrix,
    LowRankSource,
    LowRankTerm,
    MatrixKey,
    MatrixSource,
    Opened,
    Pieces,
    Shape,
    TensorSpec,
    WeightPair,
)
from deltaspec.types.view import View

__all__ = [
    "AdapterIndex",
    "AdapterModule",
    "Checkpoint",
    "Config",
    "Entry",
    "ForeignAdapter",
    "Holder",
    "KnownMatrix",
    "LowRankDelta",
    "LowRankSource",
    "LowRankTerm",
    "MatrixKey",
    "MatrixRecord",
    "MatrixSource",
    "ModulePair",
    "Note",
    "NoteKind",
    "OneSidedBlocks",
    "Opened",
    "Outline",
    "Pieces",
    "Place",
    "PlainFields",
    "Rounding",
    "Shape",
    "SkippedTensor",
    "SourceIdentity",
    "Spectrum",
    "Step",
    "TensorSpec",
    "Truncation",
    "View",
    "WeightPair",
    "WeightedSource",
]
