"""What can be chosen of low-rank methods whose factors are shared, frozen, or taken from the base."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option

DROPOUT = "Share of the update's inputs left out in training."
D_INITIAL = "Start of every λ_d, the scales of a shared direction; the λ_b of outputs start at 0."
INDEX_LIMITS = {1: 2**8, 2: 2**15, 4: 2**31}
"""Bytes of a released index → how many vectors it can tell apart; 1 is unsigned, the others are signed."""


@documented
@dataclass(frozen=True, slots=True)
class VbLoraOptions:
    """What VB-LoRA trains."""

    rank: int = option(4, "Rank of each update.")
    vectors: int = option(256, "h: how many vectors the shared bank holds.")
    vector_length: int = option(256, "b: length of a vector, which must divide both sides of every layer.")
    topk: int = option(2, "How many vectors each piece is mixed from.")
    logits_factor: float = option(
        10.0,
        "Learning rate of the logits, as a multiple of the bank's: 10 gives the paper's 1e-2 beside 1e-3.",
    )
    save_topk: bool = option(
        False, "Release only each piece's best weights and their indices: far smaller, and no longer trainable."
    )
    index_bytes: int = option(
        0, "Bytes of a released index: 1, 2 or 4; 0: as PEFT does, 1 below 2⁸ vectors, 2 below 2¹⁵, else 4."
    )
    dropout: float = option(0.0, DROPOUT)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_vectors(self.rank, self.dropout)
        if self.vector_length < 1 or not 1 <= self.topk <= self.vectors:
            message = (
                f"--vector-length is {self.vector_length} and --topk {self.topk} of --vectors {self.vectors}: expected "
                "1 or more each, and no more of the vectors than there are."
            )
            raise OptionError(message)
        if self.index_bytes not in (0, *INDEX_LIMITS) or self.vectors > INDEX_LIMITS[self.index_size]:
            message = (
                f"--index-bytes is {self.index_bytes}: expected 0, 1, 2 or 4, and room for {self.vectors} vectors."
            )
            raise OptionError(message)

    @property
    def index_size(self) -> int:
        """Bytes of a released index."""
        return self.index_bytes or (1 if self.vectors < 2**8 else 2 if self.vectors < 2**15 else 4)


@documented
@dataclass(frozen=True, slots=True)
class VeraOptions:
    """What VeRA trains."""

    rank: int = option(256, "Rank of the shared projections; it may exceed a layer's sides.")
    d_initial: float = option(0.1, D_INITIAL)
    projection_prng_key: int = option(0, "Seed of the frozen projections, which are the same as PEFT's.")
    save_projection: bool = option(
        True,
        "Store the projections too; without, they are drawn again from their seed, which other versions of torch may "
        "do otherwise.",
    )
    dropout: float = option(0.0, DROPOUT)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_vectors(self.rank, self.dropout)
        if self.projection_prng_key < 0:
            message = f"--projection-prng-key is {self.projection_prng_key}: expected 0 or more."
            raise OptionError(message)


@documented
@dataclass(frozen=True, slots=True)
class TiedOptions:
    """What Tied-LoRA trains."""

    rank: int = option(8, "Rank of the pair of factors that all layers share.")
    d_initial: float = option(0.1, D_INITIAL)
    dropout: float = option(0.0, DROPOUT)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_vectors(self.rank, self.dropout)


@documented
@dataclass(frozen=True, slots=True)
class LoraXsOptions:
    """What LoRA-XS trains."""

    rank: int = option(16, "Side of the square matrix R at every layer.")
    save_projection: bool = option(
        True,
        "Store the frozen factors A and B too; without, they are computed again from the base, which must be the same "
        "to the last bit, and on another machine may come out slightly turned.",
    )
    dropout: float = option(0.0, DROPOUT)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_vectors(self.rank, self.dropout)


def check_vectors(rank: int, dropout: float) -> None:
    """Refuse a rank below 1 and a dropout outside [0, 1)."""
    if rank < 1:
        message = f"--rank is {rank}: expected 1 or more."
        raise OptionError(message)
    if not 0 <= dropout < 1:
        message = f"--dropout is {dropout:g}: expected a share from 0 to below 1."
        raise OptionError(message)
