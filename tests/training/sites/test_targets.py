"""Which layers targets and depths mean."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.sites.targets import choose_sites
from tests.tiny_models import SIZES

BLOCKS = 7
DEPTHS = {
    "": range(BLOCKS),
    "0-5": range(6),
    "2-2": [2],
    "3": [3],
    "-1": [6],
    "-7": [0],
    "0-1,4, 6": [0, 1, 4, 6],
    "-4:": [3, 4, 5, 6],
    ":2": [0, 1],
    "1:3": [1, 2],
    ":-5": [0, 1],
    "5-9": [5, 6],
    "3,9": [3],
}


def chosen(depths):
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": BLOCKS}, vocab_size=25, num_key_value_heads=1)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return choose_sites(model, TargetOptions("q_proj", depths=depths))


@pytest.mark.parametrize("depths", DEPTHS)
def test_depths_name_blocks(depths):
    """A dash includes its end, a colon does not, as in Python; negative ones count from the end."""
    sites = chosen(depths)
    assert [site.key.depth for site in sites] == list(DEPTHS[depths])
    assert [site.path for site in sites] == [f"model.layers.{i}.self_attn.q_proj" for i in DEPTHS[depths]]


@pytest.mark.parametrize("depths", ["7", "-8", "7-9", "9:"])
def test_depths_beyond_the_model_say_how_many_blocks_it_has(depths):
    with pytest.raises(OptionError, match=f"--depths is '{depths}', which leaves no layer .* 7 blocks"):
        chosen(depths)
