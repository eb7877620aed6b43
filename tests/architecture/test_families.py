"""The fixtures against the models that transformers makes of their configs."""

from __future__ import annotations

import pytest

from deltaspec.architecture.running_names import misfit, outline_checkpoint
from tests.families import FAMILIES

pytest.importorskip("transformers", minversion="5.23", reason="whose names and shapes the fixtures have")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "unet"])
def test_every_tensor_fits_the_model_of_its_config(name):
    family = FAMILIES[name]
    outline = outline_checkpoint(family.tensors, family.config)
    assert not isinstance(outline, str), outline
    places = outline.place(family.tensors)
    misfits = {key: misfit(places[key], shape, outline) for key, shape in family.tensors.items()}
    assert {key: reason for key, reason in misfits.items() if reason} == {}
    held = {tied for place in places.values() for part in place for tied in outline.tied_with(part.name)}
    weights = {key for key in outline.shapes if key.endswith((".weight", ".bias"))}
    assert weights <= held | {part.name for place in places.values() for part in place}
