"""What must be the same for stored work to go on, and where it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

RUN = ("base", "tuned", "options", "deltaspec")
TRAJECTORY = ("base", "options", "deltaspec")
ALIKE = ("0.1.0", "0.2.0")  # versions of one arithmetic: each goes on with what another of them has begun


def arithmetic(version: str) -> str:
    """Return the first version that computes the same numbers, to rounding, as this one.

    Unfinished work may only go on under a version of the same arithmetic: its results would be of two kinds.

    Examples
    --------
    >>> arithmetic("0.2.0"), arithmetic("99.0")
    ('0.1.0', '99.0')
    """
    return ALIKE[0] if version in ALIKE else version


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
        if name == "deltaspec" and arithmetic(str(before)) == arithmetic(str(after)):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = sorted({*before, *after} - {"ref", "revision"})
            yield from differences(before, after, inner, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} was {before}, now {after}"
