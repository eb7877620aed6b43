"""What must be the same for stored work to go on, and where it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deltaspec.types.versions import numbers_of

RUN = ("base", "tuned", "options", "deltaspec")
TRAJECTORY = ("base", "options", "deltaspec")


def differences(
    old: Mapping[str, object], new: Mapping[str, object], names: Sequence[str], prefix: str = ""
) -> Iterator[str]:
    """Say in words where two manifests' identities differ; references may differ, contents not.

    Parameters
    ----------
    old, new : mapping
    names : sequence of str
        The fields that make the identity.
    prefix : str
        Of fields inside these.

    Examples
    --------
    >>> list(differences({"options": {"k": 1}}, {"options": {"k": 2}}, ["options"]))
    ['options.k was 1, now 2']
    """
    for name in names:
        before, after = old.get(name), new.get(name)
        if name == "deltaspec" and numbers_of(str(before)) == numbers_of(str(after)):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = sorted({*before, *after} - {"ref", "revision"})
            yield from differences(before, after, inner, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} was {before}, now {after}"
