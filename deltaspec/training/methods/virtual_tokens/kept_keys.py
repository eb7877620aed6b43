"""The cache of keys and values that a body of transformers takes, whatever its release calls it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

from torch import nn

NAMES = ("cache", "past_key_values")  # newest first: transformers 5.24 renamed it


class Cache(Protocol):
    """What is read of a cache of transformers; who stands in it is kept at it, since it outlives the run."""

    virtual: tuple[str, ...]

    def get_seq_length(self) -> int:
        """Return how many tokens it holds."""
        ...


def cache_argument(body: nn.Module) -> str | None:
    """Return what a body calls the cache it is given, from its signature; None where it takes none."""
    found = inspect.signature(body.forward).parameters
    return next((name for name in NAMES if name in found), None)


def take_cache(kwargs: MutableMapping[str, Any], argument: str | None) -> Cache | None:
    """Return the cache among a body's arguments, given under any of its names, and leave it under the body's own."""
    given = [kwargs.pop(name) for name in NAMES if name in kwargs]
    cache: Cache | None = next((one for one in given if one is not None), None)
    if argument is not None and given:
        kwargs[argument] = cache
    return cache


def holders(cache: Cache | None) -> tuple[str, ...]:
    """Name the adapters whose tokens stand in a cache; none in one that is empty, as a cache used again is."""
    if cache is None or not int(cache.get_seq_length()):
        return ()
    return getattr(cache, "virtual", ())


def mark_caches(caches: Iterable[Cache], name: str) -> None:
    """Note that an adapter's tokens stand in caches: they come in again at the next step of a generation."""
    for cache in caches:
        held: tuple[str, ...] = getattr(cache, "virtual", ())
        cache.virtual = held if name in held else (*held, name)


def caches_of(output: Any) -> Iterator[Cache]:
    """Give the caches in what a body returns."""
    for value in output.values() if isinstance(output, Mapping) else output:
        if hasattr(value, "get_seq_length"):
            yield value
