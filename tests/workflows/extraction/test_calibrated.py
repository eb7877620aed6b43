"""Extraction for given inputs: the least error where the inputs are, against the closed form, and both errors said."""

from __future__ import annotations

import numpy as np
import pytest

from deltaspec.errors import CheckpointError, DeltaspecError, OptionError
from deltaspec.io.moments import open_moments
from deltaspec.options import CalibrateOptions, ExtractOptions, FormOptions, RankOptions, TextOptions
from deltaspec.workflows.extraction.calibrate import calibrate
from deltaspec.workflows.extraction.extract import extract
from tests.tiny_models import build, perturb, save, write_text
from tests.workflows.extraction.test_extract import CPU, deltas, noisy_pair, products

RANK = 3


@pytest.fixture(params=["llama", "gpt2"])
def models(request, tmp_path):
    model = build(request.param)
    base = save(model, tmp_path / "base")
    tuned = save(perturb(model), tmp_path / "tuned")
    moments = tmp_path / "moments.safetensors"
    text = write_text(tmp_path / "text.txt", lines=60)
    calibrate(str(base), text, moments, options=CalibrateOptions(TextOptions(length=16)))
    return base, tuned, moments


def options(moments, **ranks):
    return ExtractOptions(RankOptions(amounts=(RANK,), **ranks), FormOptions(dtype="fp32"), CPU, str(moments))


def test_factors_are_the_best_for_these_inputs(models, tmp_path):
    base, tuned, moments = models
    (report,) = extract(base, tuned, tmp_path / "out", options=options(moments)).values()
    found, stored = products(base, tmp_path / "out"), open_moments(moments)
    exact, rows = deltas(base, tuned), {row["matrix"]: row for row in report["matrices"]}
    weighted = 0
    for key, row in rows.items():
        parts = sorted(k for k in exact if k == key or k.startswith(f"{key}/"))
        delta = np.concatenate([exact[k] for k in parts])
        product = np.concatenate([found[k] for k in parts])
        error = np.linalg.norm(product - delta) / np.linalg.norm(delta)
        assert error == pytest.approx(row["error"], rel=1e-5)
        second = stored.get(row["tensor"])
        if second is None:
            assert "weighted_error" not in row
            continue
        values, vectors = np.linalg.eigh(second.numpy())
        root = vectors * np.sqrt(values.clip(0))
        seen = np.linalg.svd(delta @ root, compute_uv=False)
        least = np.sqrt((seen[RANK:] ** 2).sum() / (seen**2).sum())
        measured = np.linalg.norm((product - delta) @ root) / np.linalg.norm(seen)
        assert measured == pytest.approx(row["weighted_error"], rel=1e-4)
        assert measured <= least * (1 + 1e-4)
        assert row["error"] >= row["optimum"] * (1 - 1e-6)
        weighted += 1
    assert weighted >= 4


def test_moments_of_other_layers_are_refused_and_of_another_model_noted(models, tmp_path):
    base, tuned, moments = models
    (report,) = extract(base, tuned, tmp_path / "one", options=options(moments)).values()
    assert not any("neither the base" in note for note in report["notes"])
    other = save(
        perturb(build("gpt2" if "wte" in str(deltas(base, tuned).keys()) else "llama"), seed=9), tmp_path / "o"
    )
    text = write_text(tmp_path / "text.txt", lines=60)
    calibrate(str(other), text, tmp_path / "o.safetensors", options=CalibrateOptions(TextOptions(length=16)))
    (report,) = extract(base, tuned, tmp_path / "two", options=options(tmp_path / "o.safetensors")).values()
    assert any("neither the base" in note for note in report["notes"])
    (tmp_path / "other").mkdir()
    pair = noisy_pair(tmp_path / "other")
    with pytest.raises(DeltaspecError, match="moments"):
        extract(*pair, tmp_path / "three", options=options(moments))
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        extract(base, tuned, tmp_path / "three", options=options(tmp_path / "missing.safetensors"))


@pytest.mark.parametrize("policy", ["params", "size", "above_rounding"])
def test_policies_that_count_plain_directions_refuse_moments(policy):
    with pytest.raises(OptionError, match="--calibration"):
        options("moments.safetensors", policy=policy)
