"""A training method at work on a running model → a run directory, without writing model or adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from deltaspec.errors import PairingError
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.plan import Plan, chosen
from deltaspec.store.formats.run import RunContent, VectorRow
from deltaspec.store.run import Run
from deltaspec.training.methods import METHODS
from deltaspec.training.methods.base_weights.own import BaseAttachment
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import base_bias, identify_parameters, module_at
from deltaspec.types import Note, SourceIdentity, Step
from deltaspec.workflows.analysis.attached_matrix import LiveTask, analyze_site, base_weight, list_pieces, norm_of
from deltaspec.workflows.shared.fill_run import Execution, fill_run
from deltaspec.workflows.shared.run_names import describe_environment, writing
from deltaspec.workflows.shared.vector_changes import describe_change


@dataclass(frozen=True, slots=True)
class Sides:
    """What a manifest says of a live analysis; ``names`` maps a running model's tensors to the base's own names.

    ``norms`` are those of the running model's matrices, by key, that are known already; never those that were summed
    from files, whose last digit may be another.
    """

    base: SourceIdentity
    tuned: SourceIdentity
    names: Mapping[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    norms: Mapping[str, float] = field(default_factory=dict)


def analyze_live(
    attachment: Attachment,
    out: str | Path | None = None,
    *,
    options: AnalyzeOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Run:
    """Decompose what a method changes in a running model: ``delta()`` of every site, and store what it says.

    Parameters
    ----------
    attachment : Attachment
        On its model; neither is changed. Training must stand still meanwhile.
    out : str or Path, optional
        The run directory; without one it lies in a temporary folder, which goes when the Run does.
    options : AnalyzeOptions, optional
        ``include`` and ``exclude`` search the running model's names.
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    Run
        As ``analyze`` of the written checkpoint or adapter gives it, but for metrics of storage rounding: nothing was
        stored. Of a method that trains the base's own parameters it holds the trained ones.

    Raises
    ------
    PairingError
        If the method changes no weights, or --include and --exclude leave none.
    RunError
        If the run directory belongs to something else or cannot be written.
    """
    execution, sides = Execution(options or AnalyzeOptions(), progress), _identify(attachment)
    if out is not None:
        return run_live(attachment, out, sides, execution)
    folder = tempfile.mkdtemp(prefix="deltaspec-")
    try:
        run = run_live(attachment, folder, sides, execution)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    return run


def run_live(attachment: Attachment, out: str | Path, sides: Sides, execution: Execution) -> Run:
    """Do what ``analyze_live`` does, under the names and identities of ``sides``.

    Raises
    ------
    PairingError, RunError
        As of ``analyze_live``.
    """
    refuse_activations(attachment.method)
    options = execution.options
    plan, tasks = Plan(skipped=list(sides.skipped)), []
    for site, piece, key in list_pieces(attachment, sides.names):
        if chosen(key.tensor, options):
            tasks += [LiveTask(site, piece, key, of) for of in options.spectra]
        else:
            plan.leave_out(str(key))
    rows = list(_compare_vectors(attachment))
    if not tasks and not rows:
        message = f"--include and --exclude leave nothing of what {attachment.method} changes: loosen them."
        raise PairingError(message)
    manifest: RunContent = {
        "base": sides.base,
        "tuned": sides.tuned,
        "options": options.identity(),
        **describe_environment(),
        "family": identify_parameters(attachment.model).family,
        "notes": [str(note) for note in sides.notes],
        "skipped": [note.to_dict() for note in plan.skipped],
        "planned": [task.store_key for task in tasks],
        "one_sided": [],
    }
    run = Run.create_or_resume(out, manifest)
    with writing(run):
        run.put_vectors(rows)
        compute = partial(analyze_site, attachment=attachment, options=options, norms=sides.norms)
        fill_run(run, tasks, compute, cost=_memory_of, execution=execution)
    return Run.load(run.path)


def _memory_of(task: LiveTask) -> int:
    """Bytes that a task needs: ΔW, and what a method forms it from, in float64."""
    return 32 * task.shape[0] * task.shape[1]


def refuse_activations(method: str) -> None:
    """Stop where a method changes no weights.

    Raises
    ------
    PairingError
        If it acts on activations.
    """
    if METHODS[method].space == "activation":
        message = (
            f"{METHODS[method].title} has no spectrum: it changes what layers take in or put out, and there is no ΔW "
            "to decompose; compare what it learns and forgets instead."
        )
        raise PairingError(message)


def _compare_vectors(attachment: Attachment) -> Iterator[VectorRow]:
    """Yield the rows of the norms and biases that a method trains: the base's own, or those beside its matrices."""
    if isinstance(attachment, BaseAttachment):
        for name, trained in attachment.state().items():
            if key := attachment.found.vectors.get(name):
                yield describe_change(key, attachment.base.original(name), trained.detach())
        return
    for update in attachment.updates.values():
        held, site = update.tensors(), update.site
        bias, shift = held.get("base_layer.bias", held.get("bias")), held.get("lora_B.bias")
        if bias is None and shift is None:
            continue
        before = base_bias(module_at(attachment.model, site.path), site)
        before = torch.zeros(site.shape[0]) if before is None else before.detach()
        after = before.double() if bias is None else bias.detach().double()
        if shift is not None:
            after = after + getattr(update, "scaling", 1.0) * shift.detach().double()
        part = "" if site.whole else f"/{site.key.part}"
        key = replace(site.key, tensor=f"{site.path}.bias{part}", part="", role="bias")
        yield describe_change(key, before, after)


def _identify(attachment: Attachment) -> Sides:
    """Say which model and which state of training a run is of: norms of the base's matrices, a hash of the state."""
    pieces = list_pieces(attachment, {})
    norms = {str(key): norm_of(base_weight(attachment, piece)) for _, piece, key in pieces}
    state = hashlib.sha256()
    for name, tensor in sorted(attachment.state().items()):
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    model, base = attachment.model, hashlib.sha256(json.dumps(norms, sort_keys=True).encode())
    ref = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__
    tuned: SourceIdentity = {
        "ref": f"{attachment.method} on {ref}",
        "revision": None,
        "files": {"state": state.hexdigest()[:32]},
        "live": True,
        "method": attachment.method,
        "method_options": asdict(attachment.options),
    }
    return Sides({"ref": ref, "revision": None, "files": {"matrices": base.hexdigest()[:32]}}, tuned, norms=norms)
