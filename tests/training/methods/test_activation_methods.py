"""Methods that act on activations, against direct dense computations, and PEFT where PEFT has them."""

import json
import math
from itertools import pairwise

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.methods.virtual_tokens.kept_keys import cache_argument
from deltaspec.training.sites.attachment import freeze
from deltaspec.training.sites.targets import choose_sites
from deltaspec.training.stored.adapter_format import adapter_config, adapter_tensors, attach_stored
from tests.tiny_models import build

IDS = torch.tensor([[2, 7, 9, 11, 13, 3], [2, 8, 5, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
CHECKPOINTED = "ignore:.*is_gradient_checkpointing:FutureWarning"  # PEFT asks transformers for an old name
RENAMED = "ignore:.past_key_values. is deprecated:FutureWarning"  # and hands the cache in by its old name
ACTIVATIONS = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


def attach(model, method, *, targets="", **options):
    line = METHODS[method]
    sites = choose_sites(model, TargetOptions(targets or line.sites)) if line.sites else []
    freeze(model)
    return line.attach(model, sites, line.options(**options), name="default", seed=0)


def perturb(attachment, size=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attachment.trained().values():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


# Two architectures written out, with a place to change what a linear layer gives.


def bert(w, change):
    """Pooled state of a BERT of 2 layers and 2 heads of 8 (post-norm, exact GELU)."""

    def linear(path, x):
        return change(path, x, F.linear(x, w[f"{path}.weight"], w[f"{path}.bias"]))

    def norm(path, x):
        return F.layer_norm(x, (16,), w[f"{path}.weight"], w[f"{path}.bias"], 1e-12)

    places = (
        w["embeddings.position_embeddings.weight"][: IDS.shape[1]] + w["embeddings.token_type_embeddings.weight"][0]
    )
    h = norm("embeddings.LayerNorm", w["embeddings.word_embeddings.weight"][IDS] + places)
    hidden = torch.where(MASK.bool(), 0.0, -math.inf)[:, None, None]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        q, k, v = (
            linear(f"{layer}.attention.self.{n}", h).view(2, 6, 2, 8).transpose(1, 2) for n in ("query", "key", "value")
        )
        mixed = (torch.softmax(q @ k.mT / math.sqrt(8) + hidden, -1) @ v).transpose(1, 2).flatten(2)
        h = norm(f"{layer}.attention.output.LayerNorm", h + linear(f"{layer}.attention.output.dense", mixed))
        inner = F.gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", h + linear(f"{layer}.output.dense", inner))
    return h


def llama(w, change):
    """Logits of a Llama of 2 layers, 2 query heads and 1 key-value head of 8 (rotary, pre-norm, SwiGLU)."""

    def linear(path, x):
        return change(path, x, F.linear(x, w[f"{path}.weight"]))

    def norm(path, x):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{path}.weight"]

    angles = torch.outer(torch.arange(6.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).double().repeat(1, 2)

    def rotate(x):
        return x * angles.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * angles.sin()

    hidden = torch.where(MASK.bool()[:, None, None] & torch.ones(6, 6).tril().bool(), 0.0, -math.inf)
    h = w["model.embed_tokens.weight"][IDS]
    for layer in ("model.layers.0", "model.layers.1"):
        x = norm(f"{layer}.input_layernorm", h)
        q, k, v = (linear(f"{layer}.self_attn.{n}_proj", x).view(2, 6, -1, 8).transpose(1, 2) for n in "qkv")
        scores = rotate(q) @ rotate(k).mT / math.sqrt(8)
        mixed = (torch.softmax(scores + hidden, -1) @ v).transpose(1, 2).flatten(2)
        h = h + linear(f"{layer}.self_attn.o_proj", mixed)
        x = norm(f"{layer}.post_attention_layernorm", h)
        inner = F.silu(linear(f"{layer}.mlp.gate_proj", x)) * linear(f"{layer}.mlp.up_proj", x)
        h = h + linear(f"{layer}.mlp.down_proj", inner)
    return linear("lm_head", norm("model.norm", h))


def dense_update(method, options, state):
    """What a method adds, with dense matrices, from its stored tensors alone."""

    def series(path, x, y, *, source="y"):
        own = {
            n.removeprefix(f"base_model.model.{path}."): t
            for n, t in state.items()
            if n.startswith(f"base_model.model.{path}.")
        }
        if "adapter_down.weight" not in own:
            return y
        h = y if source == "y" else x
        if "adapter_norm.weight" in own:
            h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, correction=0, keepdim=True) + 1e-5)
            h = h * own["adapter_norm.weight"] + own["adapter_norm.bias"]
        h = ACTIVATIONS[options["activation"]](h @ own["adapter_down.weight"].T + own.get("adapter_down.bias", 0))
        return y + options["scale"] * (h @ own["adapter_up.weight"].T + own.get("adapter_up.bias", 0))

    def parallel(path, x, y):
        return series(path, x, y, source="x")

    def compacter(path, x, y):
        own = {
            n.removeprefix(f"base_model.model.{path}.compacter_"): t
            for n, t in state.items()
            if f"{path}.compacter_" in n
        }
        if not own:
            return y

        def kronecker(side):
            terms = zip(state["compacter_A"], own[f"{side}_s"], own[f"{side}_t"], strict=True)
            return sum(torch.kron(a, torch.outer(s, t)) for a, s, t in terms)

        h = F.gelu(y @ kronecker("down").T + own["down_bias"])
        return y + h @ kronecker("up").T + own["up_bias"]

    return {"series": series, "parallel": parallel, "compacter": compacter}[method]


CASES = [
    ("series", {"bottleneck": 3, "activation": "gelu", "scale": 1.0}),
    ("series", {"bottleneck": 3, "activation": "tanh", "scale": 0.7, "norm": True, "placement": "mlp"}),
    ("parallel", {"bottleneck": 4, "activation": "silu", "scale": 2.0}),
    ("parallel", {"bottleneck": 4, "activation": "relu", "scale": 2.0, "bias": True}),
    ("compacter", {"factors": 2, "reduction": 4}),
    ("compacter", {"factors": 4, "reduction": 4, "norms": False, "placement": "attention"}),
]


@pytest.mark.parametrize(("reference", "name"), [(bert, "bert"), (llama, "llama")])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_bottlenecks_equal_the_dense_computation(method, options, reference, name):
    model = build(name, pad_token_id=0) if name == "bert" else build(name)
    base = model(input_ids=IDS, attention_mask=MASK)[0]
    attachment = attach(model, method, **options)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK)[0], base)  # identity at the start
    model.double()
    perturb(attachment)
    kept = MASK.bool()
    model(input_ids=IDS, attention_mask=MASK)[0][kept].square().mean().backward()
    ours = model(input_ids=IDS, attention_mask=MASK)[0][kept]
    assert (ours - base[kept]).abs().max() > 1e-2

    state = {n: t.detach().clone().requires_grad_() for n, t in attachment.state().items()}
    own = {n.removeprefix("base_model.model."): t for n, t in state.items()}
    fresh = build(name, pad_token_id=0) if name == "bert" else build(name)
    weights = {n: own.get(n, t.double()) for n, t in fresh.state_dict().items()}
    dense = reference(weights, dense_update(method, options, state))[kept]
    close = 1e-9 if name == "bert" else 1e-5  # transformers' Llama takes norms and angles in float32
    torch.testing.assert_close(ours, dense, rtol=close, atol=close)
    dense.square().mean().backward()
    for key, parameter in attachment.trained().items():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        expected = state[key].grad if state[key].grad is not None else torch.zeros_like(gradient)
        assert (gradient - expected).norm() <= close * expected.norm() + 1e-12, key


@pytest.mark.parametrize(("method", "options"), CASES)
def test_bottlenecks_learn_switch_off_and_come_off(method, options):
    model = build("classifier")
    names, before = [n for n, _ in model.named_modules()], {n: t.clone() for n, t in model.state_dict().items()}
    base = model(input_ids=IDS).logits
    attachment = attach(model, method, **options)
    optimizer = torch.optim.SGD(attachment.trained().values(), lr=0.5)
    for _ in range(2):  # what starts at zero moves first, then all the rest
        optimizer.zero_grad()
        F.cross_entropy(model(input_ids=IDS).logits, torch.tensor([0, 2])).backward()
        optimizer.step()
    still = [n for n, p in attachment.trained().items() if p.grad is None or not p.grad.any()]
    assert still == []
    tuned = model(input_ids=IDS).logits
    assert not torch.equal(tuned, base)
    assert all(attachment.delta(site) is None for site in attachment.sites)
    other = build("classifier")
    attach(other, method, **options).load({n: t.detach() for n, t in attachment.state().items()})
    assert torch.equal(other(input_ids=IDS).logits, tuned)
    attachment.enable(0)
    assert torch.equal(model(input_ids=IDS).logits, base)
    attachment.enable(1)
    assert torch.equal(model(input_ids=IDS).logits, tuned)
    attachment.detach()
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_placement_follows_sublayers_and_given_targets():
    def paths(**options):
        return {site.path.split(".", 1)[1] for site in attach(build("t5"), "series", **options).sites}

    attention = {"block.0.layer.0.SelfAttention.o"}
    feed_forward = {"block.0.layer.1.DenseReluDense.wo", "block.0.layer.2.DenseReluDense.wo"}
    assert paths(placement="attention") == attention
    assert paths(placement="mlp") == feed_forward
    assert paths() == attention | feed_forward
    assert paths(cross=True) == attention | feed_forward | {"block.0.layer.1.EncDecAttention.o"}
    assert paths(targets="v_proj") == {"block.0.layer.0.SelfAttention.v"}
    with pytest.raises(OptionError, match="leaves no layer"):
        paths(targets="v_proj", placement="mlp")
    with pytest.raises(OptionError, match="token ids"):
        attach(build("llama"), "parallel", targets="embed")
    with pytest.raises(OptionError, match="divide"):
        attach(build("llama"), "compacter", factors=3, reduction=4)


# Virtual tokens, against PEFT's files and PEFT's forward.


def make_peft(method, name, folder):
    """PEFT's model at a perturbed state, with padding as in MASK, and its files."""
    kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    task = "SEQ_CLS" if name == "classifier" else "CAUSAL_LM"
    model = peft.get_peft_model(build(name), kind(task_type=task, num_virtual_tokens=3)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "prompt_encoder" in key:
                parameter.normal_(0, 0.7)
    model.save_pretrained(folder)
    return model


def peft_logits(model, mask, ids=IDS):
    """What PEFT gives; its own steps where it looks for the cache's name of before transformers 5.24 and refuses."""
    if model.peft_type != "PREFIX_TUNING" or not hasattr(model.base_model, "classifier"):
        return model(input_ids=ids, attention_mask=mask).logits
    mask = None if mask is None else torch.cat([mask.new_ones(2, 3), mask], dim=1)
    taken = cache_argument(model.base_model.bert)
    pooled = model.base_model.bert(input_ids=ids, attention_mask=mask, **{taken: model.get_prompt(2)})[1]
    return model.base_model.classifier(pooled)


def run(model, mask, skip=0, forward=lambda model, mask: model(input_ids=IDS, attention_mask=mask).logits):
    logits = forward(model, mask)
    logits = logits[:, skip:] if logits.ndim == 3 else logits
    (logits if mask is None or logits.ndim == 2 else logits[mask.bool()]).square().mean().backward()
    return logits.detach() if mask is None or logits.ndim == 2 else logits[mask.bool()].detach()


@pytest.mark.filterwarnings(CHECKPOINTED, RENAMED)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier", "opt"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_equal_peft(method, name, mask, tmp_path):
    theirs = make_peft(method, name, tmp_path / "theirs")
    expected = run(theirs, mask, skip=3 if method == "prompt" else 0, forward=peft_logits)
    gradient = theirs.prompt_encoder.default.embedding.weight.grad

    model = build(name)
    freeze(model)
    base = model(input_ids=IDS, attention_mask=mask).logits.detach()
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    heads = {key for key in stored if key != "prompt_embeddings"}  # PEFT stores a classifier's head beside it
    attachment = attach_stored(model, config, {key: t for key, t in stored.items() if key not in heads})
    logits = run(model, mask)
    assert (logits - expected).abs().max() <= 1e-5
    assert (base[mask.bool()] if mask is not None and base.ndim == 3 else base).sub(logits).abs().max() > 1e-2
    (ours,) = attachment.trained().values()
    assert (ours.grad - gradient).norm() <= 1e-5 * gradient.norm()

    mine = {key: tensor.detach().clone() for key, tensor in adapter_tensors(attachment).items()}
    mine |= {key: stored[key] for key in heads}
    folder = tmp_path / "ours"
    folder.mkdir()
    task = "SEQ_CLS" if name == "classifier" else "CAUSAL_LM"
    config = adapter_config(attachment, base="tiny", task_type=task, heads=[])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(mine, folder / "adapter_model.safetensors")
    again = peft_logits(peft.PeftModel.from_pretrained(build(name), folder).eval(), mask)
    again = again[:, 3:] if method == "prompt" and again.ndim == 3 else again
    assert (again[mask.bool()] if mask is not None and again.ndim == 3 else again).sub(expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_act_in_generation_and_training(method, name):
    still = {f"{kind}_pdrop": 0.0 for kind in ("attn", "embd", "resid")} if name == "gpt2" else {}
    model = build(name, bos_token_id=2, eos_token_id=3, **still)
    base = model(input_ids=IDS).logits
    attachment = attach(model, method, tokens=3)
    perturb(attachment, size=0.7)
    ids, mask = torch.tensor([[0, 0, 7, 9], [2, 8, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, **settings)
    plain = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    row = ids[1:]
    for _ in range(5):  # each token from a whole run of its own
        logits = model(input_ids=row).logits[:, -1]
        logits[:, 3] = -math.inf
        row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached[1:], row)

    model.train()
    optimizer = torch.optim.SGD(attachment.trained().values(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("embeddings"))
    model.eval()
    other = attach(build(name), method, tokens=3)
    other.load(attachment.state())
    assert torch.equal(other.model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    attachment.enable(0)
    assert torch.equal(model(input_ids=IDS).logits, base)
    attachment.enable(1)
    assert not torch.equal(model(input_ids=IDS).logits, base)
    with pytest.raises(OptionError, match="there .1. or not"):
        attachment.enable(0.5)
    attachment.detach()
    assert torch.equal(model(input_ids=IDS).logits, base)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in build(name).named_modules()]


def test_virtual_tokens_refuse_what_cannot_work():
    small = {"vocab_size": 25, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    distilbert = transformers.DistilBertModel(transformers.DistilBertConfig(**small))
    with pytest.raises(OptionError, match="takes a cache of keys and values, which DistilBertModel does not"):
        attach(distilbert, "prefix")
    attach(distilbert, "prompt")
    long = build("gpt2")
    attach(long, "prefix", tokens=60)
    with pytest.raises(OptionError, match="pass --length 4 or less"):
        long(input_ids=IDS)
    checkpointed = build("llama").train()
    attach(checkpointed, "prefix")
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    with pytest.raises(OptionError, match="gradient checkpointing"):
        checkpointed(input_ids=IDS)
