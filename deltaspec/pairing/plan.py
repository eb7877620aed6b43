"""The plan of an analysis: what is compared, what is not, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from deltaspec.architecture.match import Identification
from deltaspec.errors import MismatchError, PairingError
from deltaspec.files.dtypes import GRIDS
from deltaspec.options import AnalyzeOptions
from deltaspec.types import AdapterIndex, Checkpoint, MatrixKey, Note, NoteKind, OneSidedBlocks, TensorSpec, WeightPair

VOCABULARY_ROLES = {"embed", "lm_head"}
HEAD = "a task head of another shape than the base's"
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor's name, and its shapes in base and tuned model."""


@dataclass(frozen=True, slots=True)
class VectorPair:
    """A norm or bias in both models; ``scaling`` is set where ``tuned`` is an adapter's bias, itself the change."""

    key: MatrixKey
    base: TensorSpec | None
    tuned: TensorSpec
    scaling: float | None = None
    rows: int | None = None  # compare this many leading elements


@dataclass(slots=True)
class Plan:
    """Pairs to decompose, vectors to compare, tensors left out with their reason, and what was assumed.

    ``attached`` are matrices that an adapter changes once it is attached to the running base: keys with their shapes.
    ``excluded`` has both sides of those that only --include or --exclude keep out. ``heads`` are task heads of another
    shape (another number of classes), left out: an adapter or a merge cannot do without them. ``twins`` are modules
    that an adapter changes exactly as the weight that they share: nothing more to compare, but a merge must know.
    ``one_sided`` are whole blocks without a counterpart, side by side.
    """

    pairs: list[WeightPair] = field(default_factory=list)
    vectors: list[VectorPair] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    excluded: dict[str, tuple[TensorSpec, TensorSpec]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    family: str = "generic"
    attached: list[tuple[MatrixKey, tuple[int, int]]] = field(default_factory=list)
    heads: list[Mismatch] = field(default_factory=list)
    one_sided: list[OneSidedBlocks] = field(default_factory=list)
    twins: list[WeightPair] = field(default_factory=list)

    def skip(self, name: str, kind: NoteKind, reason: str) -> None:
        """List a tensor that is not compared."""
        self.skipped.append(Note(kind, reason, name))

    def leave_out(self, name: str) -> None:
        """List a tensor that --include or --exclude keep out."""
        self.skip(name, NoteKind.OPTIONS, "left out by --include or --exclude")

    def note(self, text: str, kind: NoteKind = NoteKind.REMARK) -> None:
        """Say what was assumed."""
        self.notes.append(Note(kind, text))


@dataclass(frozen=True, slots=True)
class Pairing:
    """One pairing at work: the plan that it fills, what the base's tensors are, and shapes that disagree so far."""

    plan: Plan
    known: Identification
    options: AnalyzeOptions
    wrong: list[Mismatch] = field(default_factory=list)

    def keys(self, name: str) -> list[MatrixKey]:
        """Return the keys of all that a tensor of the base holds."""
        found = [part.key for part in self.known.matrices.get(name, ())]
        return found + ([self.known.vectors[name]] if name in self.known.vectors else [])

    def leaves_out(self, name: str) -> bool:
        """Tell whether --include or --exclude keep a tensor out, and list it then."""
        if chosen(name, self.options):
            return False
        self.plan.leave_out(name)
        return True

    def refuse_shapes(self) -> None:
        """Stop with the first disagreement, if there is any; PairingError says what to do."""
        roles = {key.role for name, *_ in self.wrong for key in self.keys(name)}
        refuse_shapes(self.wrong, vocabulary=bool(roles & VOCABULARY_ROLES) and self.options.vocab == "strict")


def chosen(name: str, options: AnalyzeOptions) -> bool:
    """Tell whether --include and --exclude let a tensor name through."""
    if options.include and not re.search(options.include, name):
        return False
    return not (options.exclude and re.search(options.exclude, name))


def is_head(known: Identification, name: str) -> bool:
    """Tell whether a tensor is a task head's weight or bias."""
    weight = f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name
    return any(found.key.role == "classifier" for found in known.matrices.get(weight, ()))


def unreadable(spec: TensorSpec) -> str:
    """Say why a tensor has no delta: its dtype is no float, or it is empty; "" if it has one."""
    if spec.dtype not in GRIDS:
        return f"dtype {spec.dtype} is not a floating-point weight"
    return "it has no elements" if 0 in spec.shape else ""


def refuse_shapes(wrong: Sequence[Mismatch], *, vocabulary: bool) -> None:
    """Stop with the sentence that says what to do where shapes disagree.

    Raises
    ------
    MismatchError
        If ``wrong`` names any tensor.
    """
    if not wrong:
        return
    name, base, tuned = wrong[0]
    more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
    what = f"Cannot pair '{name}': base has shape {base}, tuned has {tuned}{more}."
    raise MismatchError(what, name, vocabulary=vocabulary)


def refuse_empty(plan: Plan, base: Checkpoint | AdapterIndex, tuned: Checkpoint | AdapterIndex) -> None:
    """Stop where nothing can be compared.

    Raises
    ------
    PairingError
        If the plan holds neither pairs nor vectors.
    """
    if plan.pairs or plan.vectors:
        return
    if {note.kind for note in plan.skipped} == {NoteKind.OPTIONS}:
        message = f"--include and --exclude leave nothing of {base.ref} to compare: loosen them."
        raise PairingError(message)
    first = plan.skipped[0] if plan.skipped else Note(NoteKind.REMARK, "empty", "nothing")
    message = (
        f"Nothing in {base.ref} pairs with {tuned.ref} (for example '{first.tensor}': {first}): "
        "check that both are the same kind of model."
    )
    raise PairingError(message)
