"""What is measured on one architecture: analyze, extract, verify and merge, each right, refused or wrong."""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from torch import Tensor

from .folders import State, read_json, write_wanted
from .inputs import run
from .running import attach, compare, distance, effective_state, load

RIGHT, REFUSED, WRONG, SKIPPED = "right", "refused", "WRONG", "skipped"
FORWARD = 1e-3  # forward errors, relative to the effect: routing and float32 sums stand between weights and outputs


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one check, and why."""

    kind: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Specimen:
    """One architecture's folders: its class, base, fine-tune, the inputs it runs on, and a folder to write in."""

    cls: Any
    base: Path
    tuned: Path
    inputs: dict[str, Tensor] | None
    folder: Path
    stored: State
    changed: State


def command(*arguments: object) -> tuple[int, str]:
    """Run a command of deltaspec in this process; its exit code, and the last line of what it said on stderr."""
    from deltaspec.cli.main import cli

    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        return 70, f"{type(result.exception).__name__}: {result.exception}"
    said = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return result.exit_code, said[-1] if said else ""


def check_analyze(specimen: Specimen) -> Verdict:
    """Compare each stored matrix's energy with float64, and look for stored matrices that are nowhere."""
    import deltaspec

    code, said = command("analyze", specimen.base, specimen.tuned, "-o", specimen.folder / "run", "--quiet")
    if code:
        return Verdict(REFUSED if code == 2 else WRONG, f"exit {code}: {said}")
    done = deltaspec.Run.load(specimen.folder / "run")
    found: defaultdict[str, float] = defaultdict(float)
    for record in done.records:
        found[record.key.tensor] += done.spectrum(record.store_key).energy
    found |= {row["tensor"]: ((row["relative_norm"] or 0) * (row["base_norm"] or 0)) ** 2 for row in done.vectors}
    listed = {row["tensor"] for row in done.skipped}
    wrong = []
    for name, tensor in specimen.stored.items():
        if name not in specimen.changed or not tensor.is_floating_point():
            continue
        exact = float((specimen.changed[name].double() - tensor.double()).square().sum())
        if name in found:
            if not math.isclose(found[name], exact, rel_tol=1e-6):
                wrong.append(f"{name}: energy {found[name]:.6g} instead of {exact:.6g}")
        elif tensor.ndim > 1 and name not in listed:
            wrong.append(f"{name}: neither a row nor skipped")
    wrong += [f"{key}: {why}" for key, why in done.failures.items()]
    return Verdict(WRONG, _few(wrong)) if wrong else Verdict(RIGHT)


def check_extract(specimen: Specimen, extras: str) -> tuple[Verdict, Verdict]:
    """Extract at full rank, load with PEFT, compare with the fine-tune; then hold verify's word against PEFT's."""
    adapter = specimen.folder / f"adapter-{extras}"
    settings = ("--rank", 100_000, "--extras", extras, "--dtype", "fp32", "--quiet")
    code, said = command("extract", specimen.base, specimen.tuned, *settings, "-o", adapter)
    if code or not adapter.exists():
        return Verdict(REFUSED if code == 2 else WRONG, f"exit {code}: {said}"), Verdict(SKIPPED)
    report = read_json(adapter / "deltaspec.json")
    wrong, limits = _hold_against_peft(specimen, adapter, report)
    whole, matrices = carried(specimen, wanted_tensors(specimen, report))
    kept = report["totals"]["kept"]
    if not math.isclose(kept, whole, abs_tol=1e-4):
        wrong.append(f"says that it keeps {kept:.2%} of the change, and keeps {whole:.2%}")
    code, said = command("verify", specimen.base, specimen.tuned, adapter, "--quiet")
    if (code == 0) == (not wrong):
        checked = Verdict(RIGHT)
    else:
        checked = Verdict(WRONG, f"exit {code} where PEFT is {'wrong' if wrong else 'right'}: {said}"[:300])
    if wrong:
        return Verdict(WRONG, _few(wrong)), checked
    little = [f"carries {matrices:.0%} of its matrices' change"] if matrices < 0.5 else []
    return Verdict(RIGHT, "; ".join([*little, *limits])), checked


def carried(specimen: Specimen, wanted: State) -> tuple[float, float]:
    """Return which share of ‖Δ‖² a state has of the fine-tune's: of all float tensors, and of matrices."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, tensor in specimen.stored.items():
        if tensor.is_floating_point():
            energy = float((specimen.changed[name].double() - tensor.double()).square().sum())
            sums[tensor.ndim > 1][0] += energy
            sums[tensor.ndim > 1][1] += 0.0 if wanted[name] is tensor else energy
    total = sums[True][0] + sums[False][0]
    return (sums[True][1] + sums[False][1]) / total, sums[True][1] / (sums[True][0] or 1.0)


def _hold_against_peft(specimen: Specimen, adapter: Path, report: Any) -> tuple[list[str], list[str]]:
    """Return what is wrong with an adapter under PEFT, and what could not be compared."""
    wanted = wanted_tensors(specimen, report)
    try:
        attached = attach(specimen.cls, specimen.base, adapter)
    except Exception as error:
        return [f"PEFT cannot load it: {type(error).__name__}: {str(error)[:200]}"], []
    wrong, limits = [f"PEFT: {text}" for text in attached.complaints], []
    base = load(specimen.cls, specimen.base)
    goal = load(specimen.cls, write_wanted(specimen.base, wanted, specimen.folder / "wanted"))
    ran = False
    if specimen.inputs is not None:
        try:
            outputs = [run(model, specimen.inputs) for model in (attached.model, goal, base)]
            error, place = distance(*outputs)
            ran = error <= FORWARD
            if not ran:
                wrong.append(f"outputs{place}: off by {error:.2g} of the effect")
        except Exception as error:
            wrong.append(f"PEFT cannot run it: {type(error).__name__}: {str(error)[:200]}")
    else:
        limits.append("not run")
    try:
        state = effective_state(attached.model)
    except Exception as error:
        return wrong, [*limits, f"PEFT cannot merge it: {type(error).__name__}: {str(error)[:120]}"]
    return wrong + compare(state, goal.state_dict(), base.state_dict(), ran=ran), limits


def wanted_tensors(specimen: Specimen, report: Any) -> State:
    """Return the base's stored tensors, the fine-tune's where the report does not list them as not carried."""
    gone = [row["tensor"] for row in report["not_carried"]]
    names = {name for name in gone if name in specimen.stored}
    stacks = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in gone if name not in names]
    return {
        name: tensor if name in names or any(stack.fullmatch(name) for stack in stacks) else specimen.changed[name]
        for name, tensor in specimen.stored.items()
    }


def check_merge(specimen: Specimen, make: Callable[[Specimen, Path], Any], label: str) -> Verdict:
    """Merge an adapter that PEFT made and compare with PEFT's running model."""
    adapter, merged = specimen.folder / f"peft-{label}", specimen.folder / f"merged-{label}"
    try:
        model = make(specimen, adapter)
    except Exception as error:
        return Verdict(SKIPPED, f"PEFT made none: {type(error).__name__}: {str(error)[:120]}")
    if model is None:
        return Verdict(SKIPPED, "nothing to target")
    outputs = None
    if specimen.inputs is not None:
        try:
            outputs = run(model, specimen.inputs)
        except Exception as error:
            return Verdict(SKIPPED, f"PEFT cannot run its own: {type(error).__name__}: {str(error)[:120]}")
    try:
        wanted = effective_state(model)
    except Exception as error:
        return Verdict(SKIPPED, f"PEFT cannot merge its own: {type(error).__name__}: {str(error)[:120]}")
    code, said = command("merge", specimen.base, adapter, "-o", merged, "--quiet")
    if code:
        return Verdict(REFUSED if code == 2 else WRONG, f"exit {code}: {said}")
    base, got = load(specimen.cls, specimen.base), load(specimen.cls, merged)
    wrong, ran = [], False
    if outputs is not None:
        error, place = distance(run(got, specimen.inputs), outputs, run(base, specimen.inputs))
        ran = error <= FORWARD
        if not ran:
            wrong.append(f"outputs{place}: off by {error:.2g} of the effect")
    state = got.state_dict()
    wrong += compare(state, _as_loaded(wanted, state, base.state_dict()), base.state_dict(), ran=ran)
    shutil.rmtree(merged, ignore_errors=True)
    return Verdict(WRONG, _few(wrong)) if wrong else Verdict(RIGHT)


def _as_loaded(wanted: State, got: State, base: State) -> State:
    """Return a state with those rows zero that are zero in both loaded models: some classes clear a padding row."""
    loaded = dict(wanted)
    for name, tensor in wanted.items():
        if tensor.ndim == 2 and name in base and name in got and got[name].shape == base[name].shape == tensor.shape:
            zero = ~(base[name].any(dim=1) | got[name].any(dim=1))
            if bool(zero.any()):
                loaded[name] = tensor.masked_fill(zero[:, None], 0)
    return loaded


def _few(lines: list[str], most: int = 3) -> str:
    rest = f" (and {len(lines) - most} more)" if len(lines) > most else ""
    return "; ".join(lines[:most]) + rest
