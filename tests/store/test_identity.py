"""What must be the same for stored work to go on, and how a difference is said."""

from __future__ import annotations

from deltaspec.store.identity import RUN, TRAJECTORY, differences


def test_differences_are_said_in_words_and_references_may_differ():
    old = {"base": {"ref": "a", "revision": "x", "files": {"m": 1, "n": 2}}, "options": {"k": 1}, "deltaspec": "1"}
    new = {"base": {"ref": "b", "revision": "y", "files": {"m": 1, "o": 3}}, "options": None, "deltaspec": "1"}
    assert list(differences(old, old, RUN)) == []
    assert list(differences(old, new, RUN)) == [
        "base.files.n was 2, now None",
        "base.files.o was None, now 3",
        "options was {'k': 1}, now None",
    ]
    assert list(differences(old, new, ["options"], "a.")) == ["a.options was {'k': 1}, now None"]
    assert list(differences({"tuned": 1}, {"tuned": 2}, TRAJECTORY)) == []  # whose steps are many tuned models
    assert list(differences({"n": 1}, {"n": 2}, RUN)) == []  # what does not make the identity
