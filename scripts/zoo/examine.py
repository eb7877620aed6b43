"""One architecture from its tables to its verdicts."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .adapters import MAKERS
from .build import NotBuilt, build
from .catalogue import Species
from .checks import Specimen, Verdict, check_analyze, check_extract, check_merge
from .folders import read, write_pair
from .inputs import repeats


def examine(species: Species) -> dict[str, Any]:
    """Return one row: name, class, seconds, and for each column a kind and a reason."""
    started = time.monotonic()
    row: dict[str, Any] = {"name": species.name, "class": species.cls}
    try:
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
            verdicts = _examine(species, Path(folder), row)
    except NotBuilt as reason:
        verdicts = {"build": Verdict("not built", str(reason)[:600])}
    row["verdicts"] = {name: [verdict.kind, verdict.reason] for name, verdict in verdicts.items()}
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _examine(species: Species, folder: Path, row: dict[str, Any]) -> dict[str, Verdict]:
    cls, (model, inputs) = species.model_class(), build(species)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        with torch.no_grad():
            base, tuned = write_pair(cls, model, folder)
        reloaded = cls.from_pretrained(base).eval()
    except Exception as error:
        raise NotBuilt(f"does not survive saving: {type(error).__name__}: {str(error)[:200]}") from error
    if inputs is not None and not repeats(reloaded, cls.from_pretrained(base).eval(), inputs):
        inputs = None
    specimen = Specimen(cls, base, tuned, inputs, folder, read(base), read(tuned))
    found = {
        "build": Verdict("right", "" if inputs is not None else "forward not fed"),
        "analyze": check_analyze(specimen),
    }
    for extras in ("none", "all"):
        found[extras], found[f"verify {extras}"] = check_extract(specimen, extras)
    for label, make in MAKERS.items():
        found[f"merge {label}"] = check_merge(specimen, make, label)
    return found
