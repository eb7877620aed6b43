"""Where a method acts; how a model is trained, and on what."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.analyze import DEVICE

TASKS = ("classification", "causal-lm")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
SAVED = ("adapter", "full")
DEPTHS = re.compile(r"-?[0-9]+(?::-?[0-9]*|-[0-9]+)?|:-?[0-9]+")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Which matrices a method changes.

    Parameters
    ----------
    targets : str
        ``all`` (every linear layer of the blocks), ``attention``, ``mlp``, or a comma-separated list of these, of
        roles (q_proj, v_proj, embed, lm_head, …) and of module names (query, c_attn); else a regular expression that
        matches module paths whole. Empty takes the method's own.
    depths : str
        Blocks by index: ``0-5,11``, negative from the end (``-4:`` are the last four); empty takes all.
    split : bool
        Parts of fused matrices (c_attn, qkv_proj, gate_up_proj) one by one, even where all are meant.
    """

    targets: str = ""
    depths: str = ""
    split: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        for piece in filter(None, self.depths.split(",")):
            if not DEPTHS.fullmatch(piece.strip()):
                message = f"--depths has '{piece}': expected block indices such as 0-5,11 or -4: ."
                raise OptionError(message)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How examples are read from a file.

    Parameters
    ----------
    task : str
        ``classification`` of texts, or ``causal-lm``: to predict each next token.
    text : str
        The field of the text: a key of .jsonl, a column of .csv or .tsv by name, or by number from 1 where the file
        has no line of names; or a template of several, such as ``{question} {answer}``.
    label : str
        The field of the class, likewise; or a comparison of a number, such as ``2>0`` or ``score>=3``, whose classes
        are false and true. Classification only.
    length : int
        Tokens of an example at most; 0 takes as many as the model does.
    holdout : float
        Share of the examples that is held out for evaluation, drawn by ``seed``, where no file is given for it.
    limit : int
        At most so many examples of each file, drawn by ``seed``; 0 takes all.
    cut : bool
        Cut texts that are longer than ``length``, rather than refuse them.
    seed : int
        Of the held-out part.
    """

    task: str = "classification"
    text: str = "text"
    label: str = "label"
    length: int = 0
    holdout: float = 0.1
    limit: int = 0
    cut: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        _check_choice("task", self.task, TASKS)
        for name in ("length", "limit"):
            _check_range(name, getattr(self, name), least=0)
        if not 0 <= self.holdout < 1:
            message = f"--holdout is {self.holdout}: expected a share from 0 up to, not including, 1."
            raise OptionError(message)


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How a model is trained.

    Parameters
    ----------
    lr : float
        The highest learning rate; a method may multiply it for some of its parameters.
    epochs : int
        Passes over the examples.
    steps : int
        Updates of the weights, instead of epochs; 0 leaves it to them.
    batch : int
        Examples that go through the model at once, in each process.
    accumulate : int
        Batches whose gradients make one step; the loss is a mean over all of them.
    warmup : float
        The rate rises from 0 over so many steps; below 1, over this share of all steps.
    schedule : str
        After it: ``constant``, ``linear`` to 0, or ``cosine`` to 0.
    weight_decay : float
        AdamW's; none on biases and norms.
    clip : float
        Largest norm of all gradients together; 0 leaves them.
    seed : int
        Of new parameters, the order of examples and dropout.
    """

    lr: float = 1e-4
    epochs: int = 3
    steps: int = 0
    batch: int = 8
    accumulate: int = 1
    warmup: float = 0.06
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not 0 < self.lr <= 1e30:  # beyond it the optimiser overflows
            message = f"--lr is {self.lr}: expected a number above 0 and at most 1e30, such as 1e-4."
            raise OptionError(message)
        for name, least in (("epochs", 1), ("batch", 1), ("accumulate", 1), ("steps", 0), ("seed", 0)):
            _check_range(name, getattr(self, name), least=least)
        for name in ("warmup", "weight_decay", "clip"):
            _check_range(name, getattr(self, name), least=0)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a training runs, and what it leaves behind.

    Parameters
    ----------
    device : str
        ``auto`` (the first CUDA device, or the one that ``accelerate launch`` gives; else the CPU), ``cpu``, ``cuda``
        or ``cuda:1``.
    precision : str
        ``no`` computes in the dtype that weights are held in; ``bf16`` and ``fp16`` compute in these where it is
        safe. What is trained stays in float32.
    gradient_checkpointing : bool
        Compute activations again in the backward pass: less memory, a third more time.
    checkpoint_every : int
        Steps between checkpoints, from which a stopped training goes on; 0 leaves only the end.
    evaluate_every : int
        Steps between evaluations; 0 leaves the beginning and the end.
    save : str
        ``adapter``, or ``full``: checkpoints with the adapter merged in. Methods that train the base always save it,
        whole and in float32 as merged ones are: in the bfloat16 of a base, small changes would be rounded away.
    """

    device: str = "auto"
    precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    evaluate_every: int = 0
    save: str = "adapter"

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if not DEVICE.fullmatch(self.device) or "," in self.device:
            message = f"--device is '{self.device}': expected auto, cpu, cuda, or one such as cuda:1."
            raise OptionError(message)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("save", self.save, SAVED)
        for name in ("checkpoint_every", "evaluate_every"):
            _check_range(name, getattr(self, name), least=0)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        message = f"--{name} is '{value}': expected {', '.join(known)}."
        raise OptionError(message)


def _check_range(name: str, value: float, *, least: int) -> None:
    if not (math.isfinite(value) and value >= least):
        message = f"--{name.replace('_', '-')} is {value}: expected {least} or more."
        raise OptionError(message)
