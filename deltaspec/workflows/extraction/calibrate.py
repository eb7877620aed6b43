"""A model and a text → second moments of what its layers take in, for data-aware extraction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaspec.engine.local import resolve_devices
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.moments import Moments, is_empty, open_moments, write_moments, write_part
from deltaspec.io.staging import Staging
from deltaspec.options import CalibrateOptions
from deltaspec.pairing.names import natural_order
from deltaspec.types import Checkpoint, SourceIdentity, Step
from deltaspec.workflows.extraction.layer_inputs import Layer, LayerSums, find_aliases, find_layers, listening
from deltaspec.workflows.shared.running_models import (
    ModelKind,
    choose_dtype,
    describe_model,
    load_model,
    open_model,
    run_model,
)
from deltaspec.workflows.shared.text_batches import Batch, Intake, Text, digest, make_batches
from deltaspec.workflows.shared.tokenizer import load_tokenizer
from deltaspec.workflows.shared.workers import Headway, OnStep


@dataclass(frozen=True, slots=True)
class Reading:
    """A model and the text that it will read; ``about`` says of both what the file of moments says."""

    checkpoint: Checkpoint
    kind: ModelKind
    batches: list[Batch]
    device: torch.device
    about: dict[str, Any]

    @property
    def tokens(self) -> int:
        """How many tokens are read in one pass."""
        return sum(batch.ids.numel() for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Which layers are listened to.

    ``aliases`` maps a layer to another one that is given the very same input, ``parts`` every other one to the file
    for its S.
    """

    layers: list[Layer]
    aliases: dict[str, str]
    parts: dict[str, Path]


def calibrate(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    options: CalibrateOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> Moments:
    """Store S = Σ x·xᵀ over the inputs x that each linear layer of a model gets on a text.

    Sequences are batched by equal length, so nothing is padded. Summed in float64; layers that are given the very same
    tensor (q_proj, k_proj, v_proj) share one matrix.

    Parameters
    ----------
    model : str or Path
        A folder or a hub id with @revision, with config and tokenizer.
    text : str or Path
        A .txt, .jsonl, .csv or .tsv file, in UTF-8.
    out : str or Path
        The file, written whole or not at all; a calibration that was killed goes on where it stopped.
    options : CalibrateOptions, optional
        Beside ``options.memory`` of moments, the model and the activations of one batch are in memory.
    overwrite : bool
        Replace a file that is there.
    progress : callable, optional
        Called with a Step after each batch: layers done, and tokens as work.

    Raises
    ------
    DeltaspecError
        If the model cannot be run, the text not be read, an activation is NaN, or ``out`` cannot be written.
    """
    options, path = options or CalibrateOptions(), Path(text)
    reading, source = _open(str(model), path, options)
    inputs, identity = [reading.checkpoint.root, path], {**reading.about, "model": source}
    with Staging(out, identity=identity, overwrite=overwrite, inputs=inputs) as staging:
        _measure(reading, options, staging, progress)
    return open_moments(out)


def _open(model: str, text: Path, options: CalibrateOptions) -> tuple[Reading, SourceIdentity]:
    """Open the model and tokenise the text; return also all that is known of the model's files."""
    device = resolve_devices(options.text.device)[0]
    checkpoint = open_model(model)
    kind = describe_model(checkpoint)
    source, sha256 = identify_source(checkpoint), digest(text)
    batches = make_batches(Text(text, options.text), load_tokenizer(checkpoint), Intake(kind.packed, *kind.limits))
    about = {
        "model": {name: source[name] for name in ("ref", "revision", "files")},
        "text": {"name": text.name, "sha256": sha256},
        "tokens": sum(batch.ids.numel() for batch in batches),
        "options": options.identity(),
    }
    return Reading(checkpoint, kind, batches, device, about), source


def _measure(reading: Reading, options: CalibrateOptions, staging: Staging, progress: OnStep | None) -> None:
    """Run the model over the text, and write the moments of its layers."""
    checkpoint, device, about = reading.checkpoint, reading.device, dict(reading.about)
    dtype = choose_dtype(checkpoint, options.dtype, device=device)
    model = load_model(checkpoint, reading.kind, device=device, dtype=dtype)
    layers, left = find_layers(model, checkpoint, options)
    aliases = find_aliases(model, layers, reading.batches[0], device=device)
    names = [layer.name for layer in layers if layer.name not in aliases]
    parts = {name: staging.path / f"{number:05d}.safetensors" for number, name in enumerate(names)}
    _fill(model, reading, Inputs(layers, aliases, parts), memory=options.memory, progress=progress)
    dead = {name for name, part in parts.items() if is_empty(part)}
    left |= dict.fromkeys([*dead, *(n for n, a in aliases.items() if a in dead)], "it never ran on this text")
    about["aliases"] = {name: leader for name, leader in aliases.items() if leader not in dead}
    about["left_out"] = [{"tensor": name, "reason": left[name]} for name in sorted(left, key=natural_order)]
    write_moments(staging.path / "built", {name: part for name, part in parts.items() if name not in dead}, about)
    staging.commit(staging.path / "built")


def _fill(model: Any, reading: Reading, inputs: Inputs, *, memory: int, progress: OnStep | None) -> None:
    """Store each matrix that is not stored yet: one pass over the text for each group that fits in memory."""
    groups = _group(inputs, memory)
    headway = Headway(len(inputs.parts), reading.tokens * len(groups), progress)
    headway.skip(len(inputs.parts) - sum(map(len, groups)))
    for group in groups:
        leaders = [layer.name for layer in group]
        followers = [layer for layer in inputs.layers if inputs.aliases.get(layer.name) in leaders]
        sums = LayerSums(group, inputs.aliases, device=reading.device)
        with torch.inference_mode(), listening([*group, *followers], sums.add):
            for batch in reading.batches:
                sums.begin(batch)
                run_model(model, batch, device=reading.device)
                headway.add(0, work=batch.ids.numel())
        for name in leaders:
            write_part(inputs.parts[name], sums.take(name).cpu())  # in no variable, which would outlive the loop
        headway.skip(len(group))


def _group(inputs: Inputs, memory: int) -> list[list[Layer]]:
    """Gather the layers whose S is not stored yet, as many together as fit in memory; one alone always does."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in inputs.layers:
        if layer.name in inputs.parts and not inputs.parts[layer.name].exists():
            if not groups or room < 8 * layer.d_in**2:
                groups.append([])
                room = memory
            groups[-1].append(layer)
            room -= 8 * layer.d_in**2
    return groups
