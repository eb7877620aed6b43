"""Where a method acts; how a model is trained, and on what."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.analyze import DEVICE
from deltaspec.options.option import documented, option

TASKS = ("classification", "causal-lm")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
SAVED = ("adapter", "full")
SEED = "Seed of new parameters, of the order of examples, of dropout, and of the part that is held out."
DEPTHS = re.compile(r"-?[0-9]+(?::-?[0-9]*|-[0-9]+)?|:-?[0-9]+")


@documented
@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Which matrices a method changes."""

    targets: str = option(
        "",
        "Which matrices are changed: all (every linear layer of the blocks), attention, mlp, or a list by commas of "
        "these, of roles (q_proj, embed) and of module names (query, c_attn); or a regular expression that matches "
        "whole module paths. Empty takes the method's own.",
        metavar="WHICH",
    )
    depths: str = option(
        "",
        "Only these blocks, by index from 0, both ends included: 0-5,11; negative counts from the end: -4: are the "
        "last four.",
        metavar="WHICH",
    )
    split: bool = option(
        False,
        "Adapt the parts of fused matrices (c_attn, qkv_proj, gate_up_proj) one by one, even where all are meant.",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        for piece in filter(None, self.depths.split(",")):
            if not DEPTHS.fullmatch(piece.strip()):
                message = f"--depths has '{piece}': expected block indices such as 0-5,11 or -4: ."
                raise OptionError(message)


@documented
@dataclass(frozen=True, slots=True)
class DataOptions:
    """How examples are read from a file."""

    task: str = option("classification", f"What is learned: {', '.join(TASKS)} (to predict each next token).")
    text: str = option(
        "text",
        "The column of the text (a key of .jsonl), by name, or by number from 1 in a file without a line of names; or "
        "a template of several: '{question} {answer}'.",
    )
    label: str = option(
        "label",
        "The column of the class, likewise; or a comparison with a number, such as 2>0 or score>=3, whose classes are "
        "false and true. For classification only.",
    )
    length: int = option(0, "Tokens of an example at most; 0: as many as the model takes.")
    holdout: float = option(
        0.1, "Share of the examples that is held out for evaluation, where no file is given for it."
    )
    limit: int = option(0, "At most so many examples of each file, drawn by the seed; 0: all.")
    cut: bool = option(False, "Cut texts that are longer than the length, rather than refuse them.")
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        _check_choice("task", self.task, TASKS)
        for name in ("length", "limit"):
            _check_range(name, getattr(self, name), least=0)
        if not 0 <= self.holdout < 1:
            message = f"--holdout is {self.holdout}: expected a share from 0 up to, not including, 1."
            raise OptionError(message)


@documented
@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How a model is trained."""

    lr: float = option(1e-4, "The highest learning rate; a method may multiply it for some of its parameters.")
    epochs: int = option(3, "Passes over the examples.")
    steps: int = option(0, "Updates of the weights, instead of epochs; 0 leaves it to them.")
    batch: int = option(8, "Examples that go through the model at once, in each process.")
    accumulate: int = option(1, "Batches whose gradients make one step; the loss is a mean over all of them.")
    warmup: float = option(0.06, "Steps over which the learning rate rises from 0; below 1, their share of all steps.")
    schedule: str = option("linear", f"What the rate does afterwards: {', '.join(SCHEDULES)}; the last two end at 0.")
    weight_decay: float = option(0.0, "Weight decay of AdamW; biases and norms have none.")
    clip: float = option(1.0, "Largest norm of all gradients together; 0 leaves them as they are.")
    seed: int = option(0, SEED)

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


@documented
@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a training runs, and what it leaves behind."""

    device: str = option(
        "auto",
        "Where to train: auto (the first CUDA device, or the one that accelerate launch gives; else the CPU), cpu, "
        "cuda or cuda:1.",
    )
    precision: str = option(
        "no",
        f"Mixed precision: {', '.join(PRECISIONS)}. no computes in the dtype that weights are held in, the others "
        "where that is safe; what is trained stays in float32.",
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more time."
    )
    checkpoint_every: int = option(
        500, "Steps between checkpoints, from which a stopped training goes on; 0 leaves only the end."
    )
    evaluate_every: int = option(0, "Steps between evaluations; 0: at the beginning and at the end.")
    save: str = option(
        "adapter",
        f"What is kept: {', '.join(SAVED)} (whole checkpoints with the adapter merged in). Methods that train the base "
        "always save it whole. Whole checkpoints are float32: in the bfloat16 of a base, small changes would be "
        "rounded away.",
    )

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
