"""Which ranks, in which form: what ``extract``, ``combine``, ``resize`` and ``merge`` write."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.analyze import AnalyzeOptions

POLICIES = ("rank", "energy", "error", "above_rounding", "params", "size")
BUDGETS = ("params", "size")
DTYPES = ("auto", "bf16", "fp16", "fp32")
TARGETS = ("peft", "vllm", "llamacpp")
EXTRAS = ("none", "bias", "all")


@dataclass(frozen=True, slots=True)
class RankOptions:
    """How many directions of each matrix are kept.

    Parameters
    ----------
    policy : str
        ``rank``, ``energy`` (least rank that keeps this share of ‖ΔW‖²), ``error`` (least rank with this relative
        error), ``above_rounding`` (singular values above what storage rounding explains), or a budget over all
        matrices: ``params`` (numbers) or ``size`` (bytes).
    amounts : tuple of float
        The policy's number; several write several adapters from one factorization. Not used by above_rounding.
    minimum, maximum : int
        Bounds of every matrix's rank; a maximum of 0 is none.
    weighted : bool
        Budgets spend on ‖ΔW‖²/‖W‖² instead of ‖ΔW‖².
    """

    policy: str = "rank"
    amounts: tuple[float, ...] = (16,)
    minimum: int = 0
    maximum: int = 0
    weighted: bool = False

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if self.policy not in POLICIES:
            message = f"policy is '{self.policy}': expected one of {', '.join(POLICIES)}."
            raise OptionError(message)
        flag = f"--{self.policy.replace('_', '-')}"
        if not isinstance(self.amounts, tuple):
            message = f"amounts is {self.amounts!r}: expected a tuple, such as (16,)."
            raise OptionError(message)
        if not self.amounts or len(set(self.amounts)) < len(self.amounts):
            given = ",".join(f"{amount:g}" for amount in self.amounts) or "empty"
            message = f"{flag} is {given}: expected numbers, each once."
            raise OptionError(message)
        for amount in self.amounts:
            share = self.policy in ("energy", "error")
            if not amount > 0 or (share and amount > 1) or (not share and amount != int(amount)):
                expected = "a share in (0, 1]" if share else "a whole number above 0"
                message = f"{flag} is {amount:g}: expected {expected}."
                raise OptionError(message)
        if self.minimum < 0 or self.maximum < 0 or (self.maximum and self.minimum > self.maximum):
            message = f"--min-rank {self.minimum} and --max-rank {self.maximum} do not fit: expected 0 ≤ min ≤ max."
            raise OptionError(message)
        if self.weighted and self.policy not in BUDGETS:
            message = "--weighted spends a budget by ‖ΔW‖²/‖W‖²: pass it with --params or --size."
            raise OptionError(message)

    def labels(self) -> dict[str, float]:
        """Name each adapter to be written after the policy and its amount."""
        name = self.policy.replace("_", "-")
        return {name: 0.0} if name == "above-rounding" else {f"{name}-{amount:.12g}": amount for amount in self.amounts}


@dataclass(frozen=True, slots=True)
class FormOptions:
    """How an adapter is written.

    Parameters
    ----------
    dtype : str
        Of the factors: bf16, fp16, fp32, or auto: the tuned checkpoint's own, at most fp32.
    target : str
        Who loads it: ``peft`` takes all that changed, ``vllm`` and ``llamacpp`` the linear layers of the blocks at one
        rank.
    extras : str
        What else goes in: ``none``, ``bias`` (changes of biases, as lora_bias), or ``all`` (biases, and norms and
        other tensors without factors whole, as modules_to_save); the two need ``target`` peft.
    rslora : bool
        Write α = √r for α/√r scaling; the scale is 1 either way.
    split_fused : bool
        Factorise the parts of a fused matrix one by one; the module's rank is their sum.
    """

    dtype: str = "auto"
    target: str = "peft"
    extras: str = "none"
    rslora: bool = False
    split_fused: bool = False

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        for name, known in (("dtype", DTYPES), ("target", TARGETS), ("extras", EXTRAS)):
            if getattr(self, name) not in known:
                message = f"--{name} is '{getattr(self, name)}': expected {', '.join(known)}."
                raise OptionError(message)
        if self.target != "peft" and self.split_fused:
            message = f"--split-fused makes ranks differ, and {self.target} loads one rank: pass --target peft."
            raise OptionError(message)
        if self.target != "peft" and self.extras != "none":
            message = f"--extras {self.extras} needs --target peft: {self.target} loads factors of linear layers only."
            raise OptionError(message)


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What ``extract`` writes.

    Parameters
    ----------
    ranks : RankOptions
    form : FormOptions
    analysis : AnalyzeOptions
        device, include, exclude, vocab, workers and memory are used.
    calibration : str
        File of second moments written by ``calibrate``; "" minimises ‖ΔW - BA‖ itself.
    run : str
        Run directory of ``analyze`` that a budget takes its spectra from; "" computes them first.
    """

    ranks: RankOptions = field(default_factory=RankOptions)
    form: FormOptions = field(default_factory=FormOptions)
    analysis: AnalyzeOptions = field(default_factory=AnalyzeOptions)
    calibration: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        """Refuse options that exclude each other."""
        budget, flag = self.ranks.policy in BUDGETS, self.ranks.policy.replace("_", "-")
        if self.calibration and (budget or self.ranks.policy == "above_rounding"):
            message = f"--calibration weighs directions, --{flag} counts plain ones: pass one of them."
            raise OptionError(message)
        if self.run and not budget:
            message = "--run gives spectra to --params or --size: pass one of them, or leave it out."
            raise OptionError(message)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide each matrix's factors; a killed extraction goes on with the same."""
        ranks = {**asdict(self.ranks), "amounts": [float(amount) for amount in self.ranks.amounts]}
        return {"ranks": ranks, "form": asdict(self.form), "vocab": self.analysis.vocab}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How a merged checkpoint is written.

    Parameters
    ----------
    dtype : str
        Of every float tensor: bf16, fp16, fp32, or auto: each as the base stores it.
    """

    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a dtype that there is not."""
        if self.dtype not in DTYPES:
            message = f"--dtype is '{self.dtype}': expected {', '.join(DTYPES)}."
            raise OptionError(message)
