"""Which ranks, in which form: what ``extract``, ``combine``, ``resize`` and ``merge`` write."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.analyze import AnalyzeOptions
from deltaspec.options.option import documented, option
from deltaspec.options.pairing import PairOptions

POLICY_HELP = {
    "rank": "The same number of directions for every matrix.",
    "energy": "For each matrix, the fewest directions that keep this share of ‖ΔW‖².",
    "error": "For each matrix, the fewest directions with at most this relative error ‖ΔW - BA‖/‖ΔW‖.",
    "above_rounding": "For each matrix, the directions above what storage rounding alone explains.",
    "params": "A budget of numbers for all factors together, spent where it keeps most; for example 2M.",
    "size": "A budget of bytes for all factors together, spent where it keeps most; for example 50MB.",
}
POLICIES = tuple(POLICY_HELP)
BUDGETS = ("params", "size")
DTYPES = ("auto", "bf16", "fp16", "fp32")
TARGETS = ("peft", "vllm", "llamacpp")
EXTRAS = ("none", "bias", "all")


@documented
@dataclass(frozen=True, slots=True)
class RankOptions:
    """How many directions of each matrix are kept."""

    policy: str = option("rank", f"How ranks are chosen: {', '.join(POLICIES)}.")
    amounts: tuple[float, ...] = option(
        (16,), "The policy's number; several write several adapters from one factorisation. above_rounding has none."
    )
    minimum: int = option(0, "Least rank of every matrix.", metavar="R", flag="--min-rank")
    maximum: int = option(0, "Largest rank of every matrix; 0: no bound.", metavar="R", flag="--max-rank")
    weighted: bool = option(False, "Spend a budget by ‖ΔW‖²/‖W‖² instead of ‖ΔW‖².")

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


@documented
@dataclass(frozen=True, slots=True)
class FormOptions:
    """How an adapter is written."""

    dtype: str = option(
        "auto", f"Number format of the factors: {', '.join(DTYPES)}. auto: the tuned checkpoint's own, at most fp32."
    )
    target: str = option(
        "peft",
        f"Who loads the adapter: {', '.join(TARGETS)}. peft takes all that changed, the others the linear layers of "
        "the blocks at one rank.",
    )
    extras: str = option(
        "none",
        f"What else goes in: {', '.join(EXTRAS)}. bias: changes of biases; all: also norms and whatever else PEFT can "
        "store whole. Both need the target peft.",
    )
    rslora: bool = option(
        False, "Write α = √r, for loaders that scale by α/√r, as llama.cpp does not; the scale is 1 either way."
    )
    split_fused: bool = option(
        False, "Factorise the parts of a fused matrix one by one; the rank of the module is their sum."
    )

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        for name, known in (("dtype", DTYPES), ("target", TARGETS), ("extras", EXTRAS)):
            if getattr(self, name) not in known:
                message = f"--{name} is '{getattr(self, name)}': expected {', '.join(known)}."
                raise OptionError(message)
        if self.target == "llamacpp" and self.rslora:
            message = "--rslora scales by α/√r, and llama.cpp by α/r: leave it out, the scale is 1 either way."
            raise OptionError(message)
        if self.target != "peft" and self.split_fused:
            message = f"--split-fused makes ranks differ, and {self.target} loads one rank: pass --target peft."
            raise OptionError(message)
        if self.target != "peft" and self.extras != "none":
            message = f"--extras {self.extras} needs --target peft: {self.target} loads factors of linear layers only."
            raise OptionError(message)


@documented
@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What ``extract`` writes."""

    ranks: RankOptions = field(default_factory=RankOptions)
    form: FormOptions = field(default_factory=FormOptions)
    analysis: AnalyzeOptions = field(default_factory=AnalyzeOptions)
    calibration: str = option("", "Minimise the error on these inputs: a file that calibrate wrote.", metavar="MOMENTS")
    run: str = option(
        "", "Budgets take their spectra from this run of analyze, instead of computing them first.", metavar="RUN"
    )

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
        pairing = self.analysis.pairing.identity()
        return {"ranks": ranks, "form": asdict(self.form), "vocab": self.analysis.vocab, **pairing}


@documented
@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How a merged checkpoint is written."""

    dtype: str = option(
        "auto", f"Number format of every float tensor: {', '.join(DTYPES)}. auto: as the base stores each."
    )
    pairing: PairOptions = field(default_factory=PairOptions)

    def __post_init__(self) -> None:
        """Refuse a dtype that there is not."""
        if self.dtype not in DTYPES:
            message = f"--dtype is '{self.dtype}': expected {', '.join(DTYPES)}."
            raise OptionError(message)
