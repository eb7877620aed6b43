"""What lies in files, known from headers alone: tensors, matrices inside them, checkpoints, adapters, pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaspec.types.view import View

Shape = tuple[int, ...]
Config = dict[str, Any]
"""Content of a config.json, of a model or an adapter: untrusted, its values of any kind."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor, known from headers alone.

    ``scale`` is the companion tensor that dequantises it (fp8), one number for each block of ``block`` =
    (rows, columns) elements; the real weight is stored value times scale. ``name`` is canonical, without wrappers;
    ``wrapped`` is the name in the file where that is another. ``pieces`` say how it is put together where it does not
    lie in ``file`` under its own name. ``state`` is the path of keys to the dictionary of a pickled file that holds it,
    "" at the top.
    """

    name: str
    file: Path
    shape: Shape
    dtype: str
    scale: TensorSpec | None = None
    block: tuple[int, int] | None = None
    wrapped: str = ""
    pieces: Pieces | None = None
    state: str = ""

    @property
    def stored_name(self) -> str:
        """The name in the file."""
        return self.wrapped or self.name


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a tensor is put together from stored ones: ``parts``, by the names in their files, joined along ``axis``.

    ``heads`` > 0 marks rows in the order of Meta's rotary embedding: within each head they take turns between its two
    halves; they are read with the first half before the second.
    """

    parts: tuple[TensorSpec, ...]
    axis: int = 0
    heads: int = 0


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
class KnownMatrix:
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
    transposed. Convolution factors have trailing axes, flattened on reading. ``experts`` > 0 marks the factors of a
    stack of that many experts, folded as PEFT's target_parameters are; a source's view says which expert is meant.
    """

    lora_A: TensorSpec
    lora_B: TensorSpec
    scaling: float
    embedding: bool = False
    experts: int = 0


@dataclass(frozen=True, slots=True)
class LowRankSource:
    """A sum of stored low-rank terms; ``view`` takes rows of the product where the base is fused."""

    terms: tuple[LowRankTerm, ...]
    view: View


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: an index of its tensors, nothing read yet.

    ``wrapped`` maps canonical names, of tensors and aliases, to those in the files, where they are others.
    ``layout`` is "Meta's" where names and rows are Hugging Face's on reading alone; ``folders`` are those of a
    sentence-transformers model's further modules, whose tensors have the folder in their name; ``notes`` say what of
    the files is read, and what they hold beside that.
    """

    ref: str
    root: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorSpec]
    config: Config = field(default_factory=dict)
    revision: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)  # not in tensors → the name it shares memory with
    wrapped: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterIndex:
    """An opened PEFT LoRA folder: its modules by the base's module path, nothing read yet.

    ``modules`` maps a module path ("model.layers.0.self_attn.q_proj") to its factors; ``full`` maps a tensor name to a
    tensor stored whole (modules_to_save); ``biases`` maps a module path to lora_B.bias, to be multiplied by scaling.
    ``wrapped`` are keys of its file in which wrappers stand, so that PEFT finds no module for them.
    ``conditional`` names what restricts the change to some tokens, "" where there is no such thing.
    """

    ref: str
    root: Path
    files: tuple[Path, ...]
    modules: dict[str, LowRankTerm]
    full: dict[str, TensorSpec]
    biases: dict[str, TensorSpec]
    base_model: str = ""
    config: Config = field(default_factory=dict)
    revision: str | None = None
    wrapped: tuple[str, ...] = ()
    conditional: str = ""


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """An opened adapter folder that is not plain LoRA: its change is not read off its files, nothing is read yet.

    ``files`` is its weight file, empty where that is missing; ``config`` the content of adapter_config.json.
    ``refusal`` is the sentence with which whatever needs factors refuses it.
    """

    ref: str
    root: Path
    files: tuple[Path, ...]
    config: Config
    refusal: str
    revision: str | None = None


Opened = Checkpoint | AdapterIndex
"""What has weights, or factors, that can be read off its files."""


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
