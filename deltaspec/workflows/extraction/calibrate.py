"""A model and a text → second moments of what its layers take in, for data-aware extraction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltaspec.engine.local import resolve_devices
from deltaspec.io.moments import Moments, is_empty, open_moments, write_moments, write_part
from deltaspec.io.open import identify_source
from deltaspec.io.staging import Staging
from deltaspec.options import CalibrateOptions
from deltaspec.pairing.names import natural_order
from deltaspec.types import Step
from deltaspec.workflows.extraction.layer_inputs import Layer, Sums, find_aliases, find_layers, listening
from deltaspec.workflows.shared.running_models import (
    choose_dtype,
    describe_model,
    load_model,
    load_tokenizer,
    open_model,
    run_model,
)
from deltaspec.workflows.shared.text_batches import Batch, digest, make_batches


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

    Parameters
    ----------
    model : str or Path
        A folder or a hub id with @revision, with config and tokenizer.
    text : str or Path
        A .txt, .jsonl, .csv or .tsv file; see ``texts.read_texts``.
    out : str or Path
        The file, written whole or not at all; a calibration that was killed goes on where it stopped.
    options : CalibrateOptions, optional
    overwrite : bool
        Replace a file that is there.
    progress : callable, optional
        Called with a Step after each batch: layers done, and tokens as work.

    Returns
    -------
    Moments

    Raises
    ------
    DeltaspecError
        If the model cannot be run, the text not be read, an activation is NaN, or ``out`` cannot be written.

    Notes
    -----
    Sequences are batched by equal length, so nothing is padded. Summed in float64; layers that are given the very same
    tensor (q_proj, k_proj, v_proj) share one matrix. Memory: the model, the activations of one batch, and
    ``options.memory`` of moments.
    """
    options, text = options or CalibrateOptions(), Path(text)
    device = resolve_devices(options.text.device)[0]
    checkpoint = open_model(str(model))
    kind = describe_model(checkpoint)
    source, sha256 = identify_source(checkpoint), digest(text)
    batches = make_batches(text, load_tokenizer(checkpoint), options.text, packed=kind.packed, limits=kind.limits)
    about = {
        "model": {name: source[name] for name in ("ref", "revision", "files")},
        "text": {"name": text.name, "sha256": sha256},
        "tokens": sum(batch.ids.numel() for batch in batches),
        "options": options.identity(),
    }
    inputs = [checkpoint.root, text]
    with Staging(out, identity={**about, "model": source}, overwrite=overwrite, inputs=inputs) as staging:
        dtype = choose_dtype(checkpoint, options.dtype, device=device)
        running = load_model(checkpoint, kind, device=device, dtype=dtype)
        layers, left = find_layers(running, checkpoint, options)
        aliases = find_aliases(running, layers, batches[0], device=device)
        parts = {
            layer.name: staging.path / f"{number:05d}.safetensors"
            for number, layer in enumerate(layer for layer in layers if layer.name not in aliases)
        }
        _fill(running, layers, aliases, parts, batches, memory=options.memory, device=device, progress=progress)
        dead = {name for name, part in parts.items() if is_empty(part)}
        left |= dict.fromkeys([*dead, *(n for n, a in aliases.items() if a in dead)], "it never ran on this text")
        about["aliases"] = {name: leader for name, leader in aliases.items() if leader not in dead}
        about["left_out"] = [{"tensor": name, "reason": left[name]} for name in sorted(left, key=natural_order)]
        kept = {name: part for name, part in parts.items() if name not in dead}
        write_moments(staging.path / "built", kept, about)
        staging.commit(staging.path / "built")
    return open_moments(out)


def _fill(
    model: Any,
    layers: list[Layer],
    aliases: dict[str, str],
    parts: dict[str, Path],
    batches: list[Batch],
    *,
    memory: int,
    device: torch.device,
    progress: Callable[[Step], None] | None,
) -> None:
    """Store each matrix that is not stored yet: one pass over the text for each group that fits in memory."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        if layer.name in parts and not parts[layer.name].exists():
            if not groups or room < 8 * layer.d_in**2:
                groups.append([])
                room = memory
            groups[-1].append(layer)
            room -= 8 * layer.d_in**2
    tokens = sum(batch.ids.numel() for batch in batches)
    done, read = len(parts) - sum(map(len, groups)), 0
    for group in groups:
        leaders = {layer.name for layer in group}
        followers = [layer for layer in layers if aliases.get(layer.name) in leaders]
        sums = Sums(group, aliases, device=device)
        with torch.inference_mode(), listening([*group, *followers], sums.add):
            for batch in batches:
                sums.batch = batch
                run_model(model, batch, device=device)
                read += batch.ids.numel()
                if progress:
                    progress(Step(done, len(parts), 0, read, tokens * len(groups), read))
        matrices = sums.finished()
        for name in list(matrices):
            write_part(parts[name], matrices.pop(name).cpu())
        done += len(group)
