"""What the linear layers of a running model take in: which there are, which share an input, and sums of squares."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.errors import CheckpointError, NumericalError, RunError
from deltaspec.io.lay_out import lay_out
from deltaspec.linalg.gram_sum import GramSum
from deltaspec.options import AnalyzeOptions, CalibrateOptions
from deltaspec.pairing.homes import find_homes
from deltaspec.pairing.names import natural_order
from deltaspec.pairing.plan import Plan, chosen
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.running_models import run_model
from deltaspec.workflows.shared.text_batches import Batch


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of the running model; ``name`` is its weight in the checkpoint."""

    name: str
    module: nn.Module
    d_in: int


def find_layers(model: Any, checkpoint: Checkpoint, options: CalibrateOptions) -> tuple[list[Layer], dict[str, str]]:
    """Find the linear layers whose weights a checkpoint stores, and say why other matrices are left out.

    Returns
    -------
    list of Layer, dict
        In natural order of their names; tensor → reason.

    Raises
    ------
    CheckpointError
        If none is left.
    """
    from transformers.pytorch_utils import Conv1D

    homes = find_homes(
        lay_out(checkpoint), [name for name, _ in model.named_parameters(remove_duplicate=False)], Plan()
    )
    stored = {
        running: home[0][0] for running, home in homes.items() if home[0][1].expert is None and home[0][1].parts == 1
    }
    wanted = AnalyzeOptions(include=options.include, exclude=options.exclude)
    layers: list[Layer] = []
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        for part, weight in module.named_parameters(recurse=False):
            running = f"{path}.{part}"
            name = stored.get(running, running)
            linear = part == "weight" and isinstance(module, nn.Linear | Conv1D)
            if weight.ndim < 2:
                continue
            if not chosen(name, wanted):
                left[name] = "left out by --include or --exclude"
            elif not linear:
                left[name] = _why_not(module, weight)
            elif running not in stored:
                left[name] = "the checkpoint stores no tensor of this name: tied, or renamed on loading"
            else:
                d_in = module.in_features if isinstance(module, nn.Linear) else weight.shape[0]
                layers.append(Layer(name, module, d_in))
    if not layers:
        name, reason = next(iter(left.items()), ("nothing", "it has no matrices"))
        message = f"Nothing to calibrate in '{checkpoint.ref}' ('{name}': {reason}): loosen --include and --exclude."
        raise CheckpointError(message)
    return sorted(layers, key=lambda layer: natural_order(layer.name)), left


def _why_not(module: nn.Module, weight: Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding: its inputs are token ids"
    if "Conv" in type(module).__name__:
        return "a convolution"
    return "a stack of experts in one tensor" if weight.ndim == 3 else f"part of {type(module).__name__}, not a layer"


def find_aliases(model: Any, layers: list[Layer], batch: Batch, *, device: torch.device) -> dict[str, str]:
    """Find layers that are given the very same tensor as another one; returns layer → the one that runs first.

    The tensor must be the same object with the same sum, so that one that was changed in between is not taken for it.
    """
    seen: dict[int, tuple[weakref.ref[Tensor], float, list[str]]] = {}
    calls: Counter[str] = Counter()
    groups: list[list[str]] = []  # in the order of their calls

    def note(layer: Layer, x: Tensor) -> None:
        calls[layer.name] += 1
        total = float(x.sum(dtype=torch.float64))
        known = seen.get(id(x))
        if known is None or known[0]() is not x or known[1] != total:
            known = seen[id(x)] = (weakref.ref(x), total, [])
            groups.append(known[2])
        known[2].append(layer.name)

    with torch.inference_mode(), listening(layers, note):
        run_model(model, batch, device=device)
    aliases: dict[str, str] = {}
    for group in groups:
        first, *others = [name for name in group if calls[name] == 1] or [""]
        aliases |= dict.fromkeys(others, first)
    return aliases


@contextmanager
def listening(layers: Sequence[Layer], function: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call ``function`` with each layer's input before it runs."""

    def hook(layer: Layer) -> Callable[..., None]:
        return lambda _, args, given: function(layer, args[0] if args else given["input"])

    handles = [layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerSums:
    """S = Σ x·xᵀ over the inputs x of some layers, while batches pass; ``aliases`` are only checked to be such."""

    def __init__(self, layers: list[Layer], aliases: dict[str, str], *, device: torch.device) -> None:
        self._sums = {layer.name: GramSum(layer.d_in, device=device) for layer in layers}
        self._aliases, self._last = aliases, dict[str, weakref.ref[Tensor]]()
        self._batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """Say which batch the next inputs come from."""
        self._batch = batch

    def add(self, layer: Layer, x: Tensor) -> None:
        """Add one input (…, d_in); of an alias only check that it is one.

        Raises
        ------
        NumericalError
            If it is NaN or infinite.
        RunError
            If the input of an alias is another one than its leader's.
        """
        if leader := self._aliases.get(layer.name):
            if leader not in self._last or self._last[leader]() is not x:
                message = (
                    f"'{layer.name}' takes the same input as '{leader}' at first, and then does not: calibrate one of "
                    "them with --exclude."
                )
                raise RunError(message)
            return
        self._last[layer.name] = weakref.ref(x)
        try:
            self._sums[layer.name].add(x.reshape(-1, layer.d_in))
        except NumericalError as cause:
            raise NumericalError(self._name_line(layer, x)) from cause

    def take(self, name: str) -> Tensor:
        """Return S of a layer that is no alias, (d_in, d_in), the upper triangle, and let go of it."""
        return self._sums.pop(name).result()

    def _name_line(self, layer: Layer, x: Tensor) -> str:
        """Name the layer, and the line of the first sequence whose input is not finite."""
        lines = self._batch.lines if self._batch else (0,)
        line = lines[0]
        if len(x) == len(lines):
            line = lines[int((~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero()[0])]
        return (
            f"The input of '{layer.name}' is NaN or infinite on text line {line}: the model's weights are broken, or "
            "--dtype is too narrow; try --dtype fp32."
        )
