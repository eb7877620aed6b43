"""The tensors of an adapter's file: factors laid out and folded as PEFT has them, and modules stored whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deltaspec.architecture.peft_names import NESTED, PREFIX, lies_inside, saved_alike
from deltaspec.files.dtypes import DTYPES
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_layout import Layout
from deltaspec.io.peft_targets import Target
from deltaspec.types import AdapterModule, Entry, Shape

PLAIN = re.compile(r"[\w.-]+")


def list_factors(targets: Sequence[Target], dtype: str, *, bias: bool) -> list[Entry]:
    """List the tensors that hold factors, under PEFT's names.

    Parameters
    ----------
    targets : sequence of Target
    dtype : str
        F32, BF16 or F16.
    bias : bool
        Give every target a lora_B.bias, zeros where its bias did not change.
    """
    parameters = {target.parameter for target in targets}
    entries = []
    for target in targets:
        module, path = target.module, f"{PREFIX}{target.path}"
        if target.parameter.endswith(f".{NESTED[0]}") and f"{target.path}.{NESTED[1]}" in parameters:
            path += ".base_layer"
        names = ("lora_A.weight", "lora_B.weight")
        names = ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else names
        for side, shape in enumerate(_shapes(target)):
            entries.append(Entry(f"{path}.{names[side]}", shape, dtype, partial(_read, target, side, shape, dtype)))
        if bias:
            rows = module.shape[1 if target.swapped else 0]
            entries.append(Entry(f"{path}.lora_B.bias", (rows,), dtype, partial(_read_bias, module, rows, dtype)))
    return entries


def _shapes(target: Target) -> tuple[Shape, Shape]:
    """Return the stored shapes of lora_A and lora_B."""
    module, rank = target.module, target.module.rank
    d_out, d_in = module.shape
    if module.kind == "embedding":
        return (rank, d_out), (d_in, rank)
    if module.kind == "conv":
        return (rank, *module.kernel), (d_out, rank, *(1 for _ in module.kernel[1:]))
    if module.kind == "stack":
        first, last = (d_out, d_in) if target.swapped else (d_in, d_out)
        return (rank * module.experts, first), (last, rank * module.experts)
    return ((rank, d_out), (d_in, rank)) if target.swapped else ((rank, d_in), (d_out, rank))


def _read(target: Target, side: int, shape: Shape, dtype: str) -> Tensor:
    """Read one factor, zero-padded to the stored rank and laid out as PEFT has it."""
    module = target.module
    lora_A, lora_B = module.read()
    factors = [lora_A.mT, lora_B]  # both (…, rows, k)
    if module.kind == "embedding" or target.swapped:
        factors.reverse()
    short = module.rank - lora_A.shape[-2]
    factor = factors[side]
    factor = torch.cat([factor, factor.new_zeros(*factor.shape[:-1], short)], dim=-1)
    if module.kind == "stack":  # A folds (expert, rank), B (rank, expert)
        folded = factor.movedim(-1, 1).flatten(0, 1) if side == 0 else factor.permute(1, 2, 0).flatten(1)
    else:
        folded = factor.mT if side == 0 else factor
    return folded.reshape(shape).to(DTYPES[dtype].torch).contiguous()


def _read_bias(module: AdapterModule, rows: int, dtype: str) -> Tensor:
    change = module.read_bias() if module.read_bias else torch.zeros(rows)
    return change.to(DTYPES[dtype].torch).contiguous()


def plan_whole(
    full: Sequence[Entry], layout: Layout, targets: Sequence[Target], refused: dict[str, str]
) -> tuple[list[str], list[Entry]]:
    """Choose the modules to be saved whole, and list all that they hold: what is not given is the base's.

    Parameters
    ----------
    full : sequence of Entry
        Under the base's names. An embedding serves every module that is tied to it.
    layout : Layout
    targets : sequence of Target
        Whose modules PEFT could not save whole too.
    refused : dict
        Gets a reason for each tensor that cannot be stored.

    Returns
    -------
    paths : list of str
        Of the modules, for modules_to_save.
    entries : list of Entry
    """
    moved = {entry.name: place.moved for entry in full for place in layout.place(entry.name) if place.moved}
    refused.update({name: f"{layout.checked} rearranges it on loading ({how})" for name, how in moved.items()})
    given = _spread([entry for entry in full if entry.name not in moved], layout)
    saved: list[str] = []
    entries: list[Entry] = []
    for path in sorted({name.rpartition(".")[0] for name in given}):
        own = {name for name in given if name.rpartition(".")[0] == path}
        names = sorted(own | {name for name in (*layout.running, *given) if path and name.startswith(f"{path}.")})
        if any(path.startswith(f"{outer}.") for outer in saved):
            continue
        reason = _collision(path, layout, targets) or _incomplete(names, given, layout)
        if reason:
            refused.update({given[name].name: reason for name in own})
        else:
            saved.append(path)
            entries += [_whole_entry(name, given, layout) for name in names]
    return saved, entries


def _spread(full: Sequence[Entry], layout: Layout) -> dict[str, Entry]:
    """Map parameters of the running model to what is given for them, tied ones too."""
    given = {place.name: entry for entry in full for place in layout.place(entry.name)}
    for name, entry in list(given.items()):
        path = name.removesuffix(".weight")
        for use, _ in layout.uses(path):
            given.setdefault(f"{use}.weight", entry)
            parent = f"{use.rpartition('.')[0]}.bias"  # BERT's decoder shares the bias of the module around it
            if use.endswith(".decoder") and parent in layout.running and f"{use}.bias" not in given:
                stored = layout.running[parent]
                given[f"{use}.bias"] = given.get(parent) or _of_base(stored, layout)
        if layout.is_unread(path):
            del given[name]
    return given


def _of_base(stored: str, layout: Layout) -> Entry:
    spec = layout.base.tensors[stored]
    return Entry(stored, spec.shape, spec.dtype, partial(read_tensor, spec))


def _collision(path: str, layout: Layout, targets: Sequence[Target]) -> str:
    """Say why PEFT cannot save just this module, by how it matches names: endswith, and a regular expression."""
    if not PLAIN.fullmatch(path):
        return "it lies in no module that PEFT could save by its name"
    if layout.is_typed(path):
        return "the model asks for the class of its module, which PEFT would wrap"
    if other := saved_alike(path, layout.modules):
        return f"PEFT would save '{other}' too, whose name ends alike"
    for target in targets:
        if lies_inside(target.path, path):
            return f"its module would be saved whole with '{target.sources[0]}', which has factors"
        if path.startswith(f"{target.path}."):
            return f"its module lies inside that of '{target.sources[0]}', which has factors"
    return ""


def _incomplete(names: Sequence[str], given: dict[str, Entry], layout: Layout) -> str:
    """Say which tensor of a module can be taken neither from what is given nor from the base as it is."""
    for name in names:
        if layout.lacks(name):
            return f"{layout.checked} has no parameter of this name"
        stored = given[name].name if name in given else layout.running[name]
        place = layout.place(stored)[0]
        scaled = name not in given and layout.base.tensors[stored].scale
        if scaled or place.moved or place.parts > 1 or place.expert is not None:
            return f"its module also holds '{stored}', which the base stores in another form"
    return ""


def _whole_entry(name: str, given: dict[str, Entry], layout: Layout) -> Entry:
    entry = given.get(name) or _of_base(layout.running[name], layout)
    return Entry(f"{PREFIX}{name}", entry.shape, entry.dtype, entry.read)
