"""A sample of the zoo: architectures of different kinds, each right or honestly refused, by PEFT and float64.

``scripts/zoo.py`` holds deltaspec against every architecture that transformers can build; these are some of them.
"""

from __future__ import annotations

import pytest
import torch

from scripts.zoo import checks
from scripts.zoo.catalogue import list_species
from scripts.zoo.checks import REFUSED, RIGHT, SKIPPED, WRONG
from scripts.zoo.examine import examine

pytestmark = pytest.mark.filterwarnings("ignore")  # of models and PEFT; what PEFT says of missing keys is checked
SAMPLE = (
    *("llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "falcon", "electra", "clip", "deit", "convnext", "hubert"),
    *("encodec", "glm4v", "mamba", "swin", "mpnet", "big_bird", "audio-spectrogram-transformer", "layoutlmv3"),
)


@pytest.fixture(scope="module")
def species():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield list_species()
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.mark.parametrize("name", SAMPLE)
def test_right_or_refused(name, species):
    verdicts = examine(species[name])["verdicts"]
    assert verdicts["build"][0] == RIGHT
    assert verdicts["analyze"][0] == RIGHT
    wrong = {check: verdict for check, verdict in verdicts.items() if verdict[0] not in (RIGHT, REFUSED, SKIPPED)}
    assert not wrong


@pytest.mark.parametrize("damage", ["factors", "dropped keys"])
def test_it_notices(damage, species, monkeypatch):
    """An adapter of which PEFT makes something else than the fine-tune is wrong, and verify's word on it too."""
    original = checks.attach

    def attach(*arguments):
        attached = original(*arguments)
        if damage == "dropped keys":
            attached.complaints.append("unexpected keys: model.layers.0.x")
        else:
            factor = next(p for name, p in attached.model.named_parameters() if "down_proj.lora_B" in name)
            with torch.no_grad():
                factor.mul_(1.001)
        return attached

    monkeypatch.setattr(checks, "attach", attach)
    verdicts = examine(species["llama"])["verdicts"]
    assert {verdicts[check][0] for check in ("none", "all", "verify none", "verify all")} == {WRONG}
    assert ("down_proj" if damage == "factors" else "unexpected keys") in verdicts["none"][1]
