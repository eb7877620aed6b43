"""Adapters that every past version wrote, with what they claim of themselves, can still be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaspec.options import AnalyzeOptions
from deltaspec.workflows.extraction.certificate import VERSION
from deltaspec.workflows.verification.verify import verify

ARCHIVES = sorted((Path(__file__).parent / "adapter").glob("v*"))


def test_every_version_has_an_archive():
    assert [path.name for path in ARCHIVES] == [f"v{i}" for i in range(1, VERSION + 1)]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_an_old_adapter_is_as_good_as_it_claims(archive):
    found = verify(archive / "base", archive / "tuned", archive / "adapter", options=AnalyzeOptions(device="cpu"))
    expected = json.loads((archive / "expected.json").read_text())
    assert found.claims
    assert not found.worse
    assert not found.missing
    assert {row.matrix: row.error for row in found.rows} == pytest.approx(expected, rel=1e-9)
    assert {row.matrix: row.claimed for row in found.rows} == pytest.approx(expected, rel=1e-6)
    assert {(row.kind, row.right) for row in found.rest} == {("bias", True), ("whole", True)}
