"""Runs that every past version wrote can still be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import deltaspec
from deltaspec.spectra.metrics import METRICS
from deltaspec.store.run import VERSION

ARCHIVES = sorted(Path(__file__).parent.glob("v*"))


def test_every_version_has_an_archive():
    assert [path.name for path in ARCHIVES] == [f"v{i}" for i in range(1, VERSION + 1)]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_an_old_run_is_read(archive):
    run = deltaspec.Run.load(archive / "run")
    expected = json.loads((archive / "expected.json").read_text())
    assert {record.store_key for record in run.records} == set(expected)
    for key, values in expected.items():
        spectrum = run.spectrum(key)
        assert np.allclose(spectrum.singular_values.numpy(), values, rtol=1e-12)
        assert spectrum.left.shape == (8, 2)
    assert set(METRICS) <= set(run.to_dicts()[0])
    assert run.vectors[0]["relative_norm"] == pytest.approx(0.5)
    assert not run.failures
    assert not run.missing
