"""Virtual tokens in a running model: the same tokens with a cache and without, whoever made it."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from deltaspec.errors import OptionError
from deltaspec.training.methods.virtual_tokens.kept_keys import cache_argument, holders, mark_caches, take_cache
from deltaspec.training.stored.adapter_format import adapter_config, adapter_tensors, attach_stored
from tests.tiny_models import build
from tests.training.methods.test_activation_methods import CHECKPOINTED, RENAMED, attach, perturb

IDS = torch.tensor([[0, 0, 7, 9, 5], [2, 8, 5, 6, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TARGETS = torch.tensor([[7, 9, 3], [5, 6, 3]])
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SETTINGS = {"do_sample": False, "max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0}
BOTH = [(method, name) for method in ("prefix", "prompt") for name in ("llama", "gpt2", "tied", "opt", "t5")]


def make(method, name, *, tokens=3):
    model = build(name, **ENDS, **({"num_layers": 2} if name == "t5" else {}))
    attachment = attach(model, method, tokens=tokens)
    perturb(attachment, size=0.7)
    return model, attachment


@torch.no_grad()
def step(model, row, **given):
    """Logits after a row of tokens, from a whole run."""
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS[1:], decoder_input_ids=row, **given)
    return model(input_ids=row, **given)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("method", "name"), BOTH)
def test_a_cache_changes_no_token(method, name, beams):
    model, _ = make(method, name)
    settings = {**SETTINGS, "num_beams": beams, "num_return_sequences": beams}
    cached = model.generate(input_ids=IDS, attention_mask=MASK, **settings)
    plain = model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    alone = model.generate(input_ids=IDS[1:], attention_mask=MASK[1:], **settings)
    assert torch.equal(cached[beams:], alone)  # what pads the other text is not seen
    short = model.generate(input_ids=IDS[:1, 2:], **settings)
    if name != "t5" or method == "prefix":  # whose prompts would stand two places farther from the text
        kept = cached[:beams] if name == "t5" else cached[:beams, 2:]
        assert torch.equal(kept, short)


@pytest.mark.parametrize(("method", "name"), BOTH)
def test_generated_tokens_are_those_of_whole_runs(method, name):
    model, attachment = make(method, name)
    found = model.generate(input_ids=IDS[1:], attention_mask=MASK[1:], **SETTINGS)
    row = torch.zeros(1, 1, dtype=torch.long) if name == "t5" else IDS[1:]
    for _ in range(7):
        logits = step(model, row).logits[:, -1].clone()
        logits[:, 3] = -torch.inf
        row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, row)
    on = step(model, row).logits
    attachment.enable(0)
    assert (step(model, row).logits - on).abs().max() > 1e-2


@pytest.mark.parametrize(("method", "name"), BOTH)
def test_a_cache_that_the_model_made_is_read_on(method, name):
    model, _ = make(method, name)
    row = torch.tensor([[2, 8, 5, 6]])
    whole = step(model, row).logits
    first = step(model, row[:, :2], use_cache=True)
    argument = next(key for key in ("cache", "past_key_values") if first.get(key) is not None)
    fork = copy.deepcopy(first[argument])
    for cache in (first[argument], fork):
        later = step(model, row[:, 2:], use_cache=True, **{argument: cache}).logits
        assert torch.allclose(torch.cat([first.logits, later], dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "masked", "classifier", "t5"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_each_kind_learns_and_is_evaluated(method, name):
    model, attachment = make(method, name)
    given = {"input_ids": IDS[:, 2:], "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    given["labels"] = torch.tensor([0, 2]) if name == "classifier" else TARGETS
    optimizer = torch.optim.SGD(attachment.trained().values(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(parameter.grad.any(-1).all() for parameter in attachment.trained().values())  # every token's
    model.train()
    assert torch.isfinite(model(**given).loss)
    with torch.no_grad():
        model.eval()
        logits = model(**given).logits
        attachment.enable(0)
        assert logits.shape == model(**given).logits.shape
        attachment.detach()
    other = attach(build(name, **ENDS, **({"num_layers": 2} if name == "t5" else {})), method, tokens=3)
    other.load(attachment.state())
    assert torch.equal(other.model(**given).logits, logits)


@pytest.mark.filterwarnings(CHECKPOINTED, RENAMED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_two_stacks_equal_peft(method, masked, tmp_path):
    """Keys and values stand before the decoder's own, prompts before the encoder's text, where the decoder reads them.

    PEFT keeps twice as many prompts as it uses; what is written here says that one stack has them.
    """
    kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    theirs = peft.get_peft_model(build("t5"), kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "prompt_encoder" in key:
                parameter.normal_(0, 0.7, generator=torch.Generator().manual_seed(3))
    theirs.save_pretrained(tmp_path / "theirs")
    given = {"input_ids": IDS, "decoder_input_ids": TARGETS, "attention_mask": MASK if masked else None}
    wanted = theirs(**given).logits
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    model = build("t5")
    base = model(**given).logits
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    attachment = attach_stored(model, config, stored)
    logits = model(**given).logits
    assert (logits - wanted).abs().max() <= 1e-5
    assert (logits - base).abs().max() > 1e-2
    (tmp_path / "ours").mkdir()
    save_file(
        {k: t.detach().clone() for k, t in adapter_tensors(attachment).items()},
        tmp_path / "ours" / "adapter_model.safetensors",
    )
    config = adapter_config(attachment, base="tiny", task_type="SEQ_2_SEQ_LM", heads=[])
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(config))
    again = peft.PeftModel.from_pretrained(build("t5"), tmp_path / "ours").eval()(**given).logits
    assert (again - wanted).abs().max() <= 1e-5


def test_the_argument_for_a_cache_is_found_in_the_signature():
    class Body(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.forward = forward

    assert cache_argument(Body(lambda input_ids, cache=None: None)) == "cache"
    assert cache_argument(Body(lambda input_ids, past_key_values=None: None)) == "past_key_values"
    assert cache_argument(Body(lambda input_ids: None)) is None
    cache = transformers.DynamicCache()
    for given in ("cache", "past_key_values"):
        kwargs = {given: cache, "use_cache": True}
        assert take_cache(kwargs, "cache") is cache
        assert kwargs == {"cache": cache, "use_cache": True}
    assert take_cache({"use_cache": True}, "cache") is None


def test_an_empty_cache_holds_nobodys_tokens():
    cache = transformers.DynamicCache()
    mark_caches([cache, cache], "one")
    assert holders(cache) == ()  # as after reset()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    mark_caches([cache], "two")
    assert holders(cache) == ("one", "two")
    assert holders(None) == ()


def test_a_model_without_attention_is_refused():
    small = {"vocab_size": 25, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**small))
    with pytest.raises(OptionError, match="--method prefix needs"):
        attach(mamba, "prefix")
