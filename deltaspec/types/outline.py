"""The model that a library makes of a checkpoint: its parameters, its modules, and what of them adapters can change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from deltaspec.types.stored import Shape


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stored tensor lies in the running model: a parameter's full name.

    With ``expert`` it is block ``part`` of the ``parts`` equal blocks of rows of that expert of a stack. Without, and
    ``parts`` > 1, the parameter holds block ``part`` of the stored rows. ``moved`` names what the library does to the
    tensor on loading where it is anything else: then the two do not hold the same rows.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    moved: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """A module that holds parameters.

    Attributes
    ----------
    name : str
        Its class.
    kind : str
        linear, conv1d (GPT-2's, stored (d_in, d_out)), conv, embedding, or other.
    wrapped : bool
        Whether PEFT has a wrapper that computes as this class does; where not, it reaches the parameter alone
        (target_parameters), and of a kernel nothing.
    refusal : str
        Why factors would not act as a change of its weight does, whichever way PEFT holds them; "" where they do.
    read : bool
        Whether the model's code takes the weight past the module, so that they do nothing there.
    typed : bool
        Whether nothing may stand around it: the model's code asks for its class, or PEFT refuses it.
    turned : bool
        Whether PEFT takes its stacks (experts, d_in, d_out) for what they are.
    """

    name: str
    kind: str
    wrapped: bool = True
    refusal: str = ""
    read: bool = False
    typed: bool = False
    turned: bool = False


Placer = Callable[[Iterable[str]], Mapping[str, tuple[Place, ...]]]


@dataclass(frozen=True, slots=True)
class Outline:
    """A running model without its weights.

    Attributes
    ----------
    source : str
        Which library's class, for reports.
    shapes : mapping
        Every parameter and buffer by its full name.
    holders : mapping
        Module path → what it is.
    buffers : frozenset of str
        Those of ``shapes`` that are not trained.
    ties : tuple of frozenset
        Parameters that are one tensor.
    unread : frozenset of str
        Modules that no other module calls, though they hold a tied weight.
    place : callable
        Stored names → where the library puts them on loading.
    unloadable : str
        Why PEFT can load no adapter of this class at all; "" if it can.
    tie_matters : bool
        Whether its code computes otherwise where its config says that head and embedding are two.
    in_peft : callable
        A module's path in an adapter → the path under which PEFT, which renames keys as the library renames tensors,
        looks for it.
    takes_experts : bool
        Whether PEFT turns factors of single experts and of routers into those of parameters.
    """

    source: str
    shapes: Mapping[str, Shape]
    holders: Mapping[str, Holder]
    buffers: frozenset[str]
    ties: tuple[frozenset[str], ...]
    unread: frozenset[str]
    place: Placer
    in_peft: Callable[[str], str]
    unloadable: str = ""
    tie_matters: bool = False
    takes_experts: bool = False

    def tied_with(self, name: str) -> frozenset[str]:
        """Return the parameters that are one tensor with this one, itself among them."""
        return next((group for group in self.ties if name in group), frozenset({name}))
