"""Stored adapters that are not plain LoRA: attached to the running base, and analysed there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from deltaspec.architecture.canonical_names import WRAPPER
from deltaspec.architecture.peft_names import PREFIX
from deltaspec.errors import CheckpointError, PairingError
from deltaspec.io import shards
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.intact import refuse_empty
from deltaspec.io.lay_out import lay_out
from deltaspec.io.matrix import read_tensor
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.homes import find_homes
from deltaspec.pairing.names import align_names
from deltaspec.pairing.plan import HEAD, Plan, chosen, is_head
from deltaspec.pairing.renamed import map_keys
from deltaspec.store.run import Run
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import identify_parameters, list_modules
from deltaspec.training.stored.adapter_format import attach_stored, name_method
from deltaspec.types import AdapterIndex, Checkpoint, ForeignAdapter, Note, NoteKind, SourceIdentity
from deltaspec.workflows.analysis.attached_matrix import list_pieces
from deltaspec.workflows.analysis.live import Sides, refuse_activations, run_live
from deltaspec.workflows.shared.fill_run import Execution
from deltaspec.workflows.shared.opened_base import Base
from deltaspec.workflows.shared.run_names import default_path

WHOLE = "stored whole in the adapter, beside its updates"


@dataclass(frozen=True, slots=True)
class Attached:
    """A stored adapter on its running base, which may carry several at once; detach ``attachment`` after use.

    ``names`` maps the running model's matrices to the base's own names. ``tuned`` says which files it is from, as a
    manifest does. ``whole`` are tensors that stayed out, and why.
    """

    attachment: Attachment
    names: dict[str, str]
    tuned: SourceIdentity
    notes: list[Note]
    whole: list[Note]


def analyze_attached(base: Base, adapter: ForeignAdapter, out: str | Path | None, execution: Execution) -> Run:
    """Attach a stored adapter of any method to its running base, and analyse what it changes there.

    Parameters
    ----------
    base : Base
    adapter : ForeignAdapter
    out : str or Path, optional
    execution : Execution

    Raises
    ------
    PairingError, CheckpointError
        As of ``attach_adapter``.
    """
    found = attach_adapter(base, adapter, name="analysed", maps=execution.options.pairing.map)
    try:
        identity = identify_source(base.source)
        sides = Sides(identity, found.tuned, found.names, found.notes, found.whole, dict(base.running_norms))
        path = out or default_path(sides.base, sides.tuned, execution.options.identity())
        return run_live(found.attachment, path, sides, execution)
    finally:
        found.attachment.detach()


def plan_attached(base: Base, adapter: ForeignAdapter, options: AnalyzeOptions) -> Plan:
    """Say what ``analyze_attached`` would analyse; reads the adapter, and of its base no weights.

    Raises
    ------
    PairingError, CheckpointError
        As of ``attach_adapter``.
    """
    found = attach_adapter(base, adapter, name="analysed", weights=False, maps=options.pairing.map)
    family = identify_parameters(found.attachment.model).family
    plan = Plan(notes=found.notes, skipped=list(found.whole), family=family)
    for _, piece, key in list_pieces(found.attachment, found.names):
        if chosen(key.tensor, options):
            plan.attached.append((key, piece.shape))
        else:
            plan.leave_out(str(key))
    return plan


def attach_adapter(
    base: Base, adapter: ForeignAdapter, *, name: str, weights: bool = True, maps: Sequence[str] = ()
) -> Attached:
    """Attach a stored adapter of any method that changes weights to its running base.

    Parameters
    ----------
    base : Base
    adapter : ForeignAdapter
    name : str
        Of the adapter on the model, unlike any other there.
    weights : bool
        Without, the base is on the meta device.
    maps : sequence of str
        As of ``map_names``.

    Raises
    ------
    PairingError
        If the method changes no weights, or the base is an adapter itself.
    CheckpointError
        If no method of ours reads it, or it does not fit the base.
    """
    source = _refuse_unfit(base, adapter)
    stored, model = _read(adapter, maps), base.run() if weights else base.outline()
    tensors, whole, notes = _fit(stored, model)
    try:
        attachment = attach_stored(model, adapter.config, tensors, name=name)
    except CheckpointError as cause:
        cause.add_note(f"The adapter is '{adapter.root}'.")
        raise
    return Attached(
        attachment,
        _own_names(source, [site.key.tensor for site in attachment.sites]),
        {**identify_source(adapter), "live": True, "method": attachment.method},
        [*notes, Note(NoteKind.REMARK, f"the adapter is one of {attachment.method}: attached to the running base")],
        whole,
    )


def _refuse_unfit(base: Base, adapter: ForeignAdapter) -> Checkpoint:
    """Return the base as a checkpoint, where the adapter is of a method of ours that changes weights, and is there."""
    method = name_method(adapter.config)
    if method is None:
        raise CheckpointError(adapter.refusal)
    refuse_activations(method)
    if isinstance(base.source, AdapterIndex):
        message = (
            f"The base {base.source.ref} is an adapter and {adapter.ref} one of {method}: pass the base model itself."
        )
        raise PairingError(message)
    if not adapter.files:
        raise CheckpointError(adapter.refusal)
    return base.source


def _read(adapter: ForeignAdapter, maps: Sequence[str]) -> dict[str, Tensor]:
    """Read an adapter's tensors, under the names that the model would give them."""
    tensors, _ = shards.gather(adapter.files)
    refuse_empty(tensors.values())
    stored = {WRAPPER.sub("", name): read_tensor(spec) for name, spec in tensors.items()}
    return map_keys(stored, maps, adapter.ref)


def _fit(stored: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[Note], list[Note]]:
    """Give an adapter's tensors the paths of this model, which may lack the head that the adapter was trained with.

    Returns
    -------
    tensors : dict of str to Tensor
        What is to be attached: updates, and biases that are stored whole.
    whole : list of Note
        Tensors that stay out, and why: of modules that the model lacks, its own matrices, and heads of another shape.
    notes : list of Note
    """
    modules, known = dict(list_modules(model)), identify_parameters(model)
    owners = {name: _outer(name.removeprefix(PREFIX)) for name in stored if name.startswith(PREFIX)}
    leaves = {path.rpartition(".")[2] for path in modules}
    asked = {path: None for paths in owners.values() for path in paths if path.rpartition(".")[2] in leaves}
    mapping, note = align_names([path for path in modules if path], asked)
    places = {path: own for own, path in mapping.items()}
    tensors = {name: tensor for name, tensor in stored.items() if name not in owners}  # what all updates share
    whole = []
    for name, paths in owners.items():
        path = next((path for path in paths if path in places), None)
        if path is None:
            whole.append(Note(NoteKind.WHOLE, WHOLE, name.removeprefix(PREFIX)))
            continue
        home, rest = places[path], name.removeprefix(f"{PREFIX}{path}.")
        own = modules[home]._parameters.get(rest)
        if own is not None and own.shape != stored[name].shape and is_head(known, f"{home}.{rest}"):
            whole.append(Note(NoteKind.HEAD, HEAD, name.removeprefix(PREFIX)))
        elif own is not None and stored[name].ndim > 1:
            whole.append(Note(NoteKind.WHOLE, WHOLE, name.removeprefix(PREFIX)))
        else:
            tensors[f"{PREFIX}{home}.{rest}"] = stored[name]
    return tensors, whole, [Note(NoteKind.REMARK, note)] if note else []


def _outer(name: str) -> list[str]:
    """List the dotted paths that a tensor may lie under, the longest first."""
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces) - 1, 0, -1)]


def _own_names(base: Checkpoint, tensors: list[str]) -> dict[str, str]:
    """Map the running model's names of matrices to those that the base stores them under, where one is one."""
    homes = find_homes(lay_out(base), tensors, Plan())
    return {
        name: found[0][0]
        for name, found in homes.items()
        if len(found) == 1 and found[0][1].parts == 1 and found[0][1].expert is None
    }
