"""What can be chosen of methods that put small two-layer networks behind or beside a layer."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
PLACEMENTS = ("both", "attention", "mlp")
WIDTH = "Inner width of the bottleneck."
ACTIVATION = f"Activation inside: {', '.join(ACTIVATIONS)}."
BIAS = "Biases inside the bottleneck: yes or no."
SCALE = "Factor on what is added."
PLACEMENT = f"Of the targets, keep those of attention, of mlp, or both: {', '.join(PLACEMENTS)}."
CROSS = "Also after a decoder's attention to the encoder."


@documented
@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """A bottleneck beside each matrix, from its inputs to its outputs."""

    bottleneck: int = option(256, WIDTH)
    activation: str = option("tanh", ACTIVATION)
    bias: bool = option(False, BIAS)
    scale: float = option(1.0, SCALE)

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_bottleneck(self.bottleneck, self.activation)


@documented
@dataclass(frozen=True, slots=True)
class SeriesOptions:
    """A bottleneck after a sublayer: on the outputs of its last matrix, before they join the residual stream."""

    bottleneck: int = option(64, WIDTH)
    activation: str = option("gelu", ACTIVATION)
    bias: bool = option(True, BIAS)
    scale: float = option(1.0, SCALE)
    norm: bool = option(False, "A layer norm of its own before the bottleneck (Lin et al., 2020).")
    placement: str = option("both", PLACEMENT)
    cross: bool = option(False, CROSS)

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_bottleneck(self.bottleneck, self.activation)
        check_placement(self.placement)


@documented
@dataclass(frozen=True, slots=True)
class CompacterOptions:
    """How small its bottlenecks are, and what is trained beside them."""

    factors: int = option(
        4, "n: terms of each sum of Kronecker products, and the side of the shared factors; it divides every width."
    )
    reduction: int = option(32, "The bottleneck is the sublayer's width divided by this.")
    activation: str = option("gelu", ACTIVATION)
    norms: bool = option(True, "Train the base's own normalisations too, as the paper does.")
    placement: str = option("both", PLACEMENT)
    cross: bool = option(False, CROSS)

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_bottleneck(1, self.activation)
        check_placement(self.placement)
        for name in ("factors", "reduction"):
            if getattr(self, name) < 1:
                message = f"--{name} is {getattr(self, name)}: expected 1 or more."
                raise OptionError(message)


def check_bottleneck(width: int, activation: str) -> None:
    """Refuse a width below 1 and an unknown activation.

    Raises
    ------
    OptionError
        Naming the option.
    """
    if width < 1:
        message = f"--bottleneck is {width}: expected 1 or more."
        raise OptionError(message)
    if activation not in ACTIVATIONS:
        message = f"--activation is '{activation}': expected one of {', '.join(ACTIVATIONS)}."
        raise OptionError(message)


def check_placement(placement: str) -> None:
    """Refuse an unknown placement.

    Raises
    ------
    OptionError
        Naming the option.
    """
    if placement not in PLACEMENTS:
        message = f"--placement is '{placement}': expected one of {', '.join(PLACEMENTS)}."
        raise OptionError(message)
