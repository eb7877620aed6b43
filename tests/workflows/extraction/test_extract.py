"""Extraction end to end: what is stored against NumPy's float64 SVD, on every family."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import NumericalError, PairingError, RunError
from deltaspec.io.matrix import open_matrix, read_low_rank
from deltaspec.io.open import open_plain
from deltaspec.options import AnalyzeOptions, ExtractOptions, FormOptions, RankOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.pairing.dense import pair_checkpoints
from deltaspec.workflows.analysis.analyze import analyze
from deltaspec.workflows.extraction.extract import extract
from deltaspec.workflows.verification.verify import verify
from tests.families import FAMILIES, random_state, write

CPU = AnalyzeOptions(device="cpu", workers=1)


def low_rank_update(shape, rank, generator):
    """A random update whose every matrix (last axes flattened, leading one of stacks apart) has this rank."""
    if len(shape) == 3:
        return torch.stack([low_rank_update(shape[1:], rank, generator) for _ in range(shape[0])])
    rows, columns = shape[0], int(np.prod(shape[1:]))
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return (left @ right.T / rank).reshape(shape)


def planted_pair(tmp_path, family, *, rank=3, seed=1):
    """A float32 base, and a tuned model whose every matrix changed by ``rank`` directions."""
    base = random_state(family)
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, weight in base.items():
        change = low_rank_update(weight.shape, rank, generator) if weight.ndim > 1 else torch.randn(weight.shape) / 8
        tuned[name] = (weight.double() + change).float()
    return write(tmp_path / "base", base, family.config), write(tmp_path / "tuned", tuned, family.config)


def products(base, adapter):
    """Each matrix's key → B·A as our reader has it."""
    plan = pair_adapter(open_plain(base), open_plain(adapter), CPU)
    found = {}
    for pair in plan.pairs:
        factors = read_low_rank(pair.tuned)
        found[str(pair.key)] = (factors.lora_B @ factors.lora_A).numpy()
    return found


def matrix_of(source):
    stored = open_matrix(source)
    return stored.rows(0, source.view.shape[0]).double().numpy()


def deltas(base, tuned):
    """Each matrix's key → ΔW in float64."""
    plan = pair_checkpoints(open_plain(base), open_plain(tuned), CPU)
    return {str(p.key): matrix_of(p.tuned) - matrix_of(p.base) for p in plan.pairs}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_round_trips_at_its_true_rank(name, tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES[name])
    reports = extract(base, tuned, tmp_path / "out", options=ExtractOptions(RankOptions(amounts=(6,)), analysis=CPU))
    report = reports["rank-6"]
    exact, found = deltas(base, tuned), products(base, tmp_path / "out")
    left = {row["tensor"] for row in report["not_carried"]}
    for key, delta in exact.items():
        if key in found:
            assert np.linalg.norm(found[key] - delta) <= 2e-5 * np.linalg.norm(delta), key
        else:
            assert any(key == name or key.startswith(f"{name}/") for name in left), key
    assert found
    lost = sum(row["share"] for row in report["not_carried"])
    assert report["totals"]["kept"] + lost == pytest.approx(1, abs=1e-6)
    assert json.loads((tmp_path / "out" / "deltaspec.json").read_text()) == json.loads(json.dumps(report))


def accounted(report):
    """Kept, cut off by the rank, and not carried: shares of the whole change."""
    total = sum(row["energy"] for row in report["matrices"]) / report["totals"]["share_in_matrices"]
    cut = sum(row["error"] ** 2 * row["energy"] for row in report["matrices"] if row["rank"])
    return report["totals"]["kept"] + cut / total + sum(row["share"] or 0.0 for row in report["not_carried"])


@pytest.mark.parametrize("extras", ["none", "bias", "all"])
@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "qwen2_vl", "whisper", "dinov2", "gpt_oss", "gemma3_multimodal", "bart"]
)
def test_all_that_changed_is_kept_cut_or_listed(name, extras, tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES[name], rank=4)
    options = ExtractOptions(RankOptions(amounts=(2,)), FormOptions(extras=extras), CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    assert accounted(report) == pytest.approx(1, abs=1e-6)
    whole = {name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if ".lora_" not in name}
    assert len(whole) >= len(report["whole"])
    assert not {name for name in whole if "/" in name}
    assert bool(report["whole"]) == (extras == "all")


def test_an_excluded_tensor_is_listed_also_where_names_differ_or_it_holds_nan(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    # Copies: what is loaded may lie in the file that is written over.
    state = {f"wrapped.{name}": value.clone() for name, value in load_file(tuned / "model.safetensors").items()}
    write(tuned, state, FAMILIES["llama"].config)
    options = ExtractOptions(analysis=replace(CPU, exclude="mlp"))
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    assert sum("mlp" in row["tensor"] for row in report["not_carried"]) == 6
    assert accounted(report) == pytest.approx(1, abs=1e-6)
    state["wrapped.model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    write(tuned, state, FAMILIES["llama"].config)
    (report,) = extract(base, tuned, tmp_path / "two", options=options).values()
    assert {row["share"] for row in report["not_carried"] if "0.mlp.up_proj" in row["tensor"]} == {None}
    assert 0 < report["totals"]["kept"] < 1


def noisy_pair(tmp_path, dtype=torch.float32):
    """Llama with an update of falling singular values in every matrix, none of them zero."""
    family = FAMILIES["llama"]
    base = random_state(family, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    tuned = {n: (w.double() + 0.1 * torch.randn(w.shape, generator=generator)).to(dtype) for n, w in base.items()}
    return write(tmp_path / "base", base, family.config), write(tmp_path / "tuned", tuned, family.config)


def rows_by_matrix(report):
    return {row["matrix"]: row for row in report["matrices"]}


POLICIES = {
    "rank": (5, lambda s, r: 5),
    "energy": (0.8, lambda s, r: int(np.searchsorted(np.cumsum(s**2), 0.8 * (s**2).sum())) + 1),
    "error": (0.4, lambda s, r: next(k for k in range(len(s) + 1) if (s[k:] ** 2).sum() <= 0.16 * (s**2).sum())),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_chooses_what_numpy_chooses_and_claims_what_is_stored(policy, tmp_path):
    base, tuned = noisy_pair(tmp_path)
    amount, expected = POLICIES[policy]
    options = ExtractOptions(RankOptions(policy, (amount,)), analysis=CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    found, rows = products(base, tmp_path / "out"), rows_by_matrix(report)
    for key, delta in deltas(base, tuned).items():
        values = np.linalg.svd(delta, compute_uv=False)
        rank = expected(values, None)
        best = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert rows[key]["rank"] == rank, key
        assert rows[key]["optimum"] == pytest.approx(best, rel=1e-4)
        assert np.linalg.norm(found[key] - delta) / np.linalg.norm(delta) == pytest.approx(rows[key]["error"], rel=1e-6)
        assert rows[key]["error"] <= best * (1 + 1e-4)


def test_a_budget_is_kept_and_spent_where_it_keeps_most(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    options = ExtractOptions(RankOptions("params", (3000,)), analysis=CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (
        sum(t.numel() for t in tensors.values()) == report["totals"]["parameters"] == report["budget"]["spent"] <= 3000
    )
    density = {}
    for key, delta in deltas(base, tuned).items():
        values = np.linalg.svd(delta, compute_uv=False) ** 2 / sum(delta.shape)
        density |= {(key, i): value for i, value in enumerate(values)}
    rows = rows_by_matrix(report)
    bought = min(v for (key, i), v in density.items() if i < rows[key]["rank"])
    refused = max(v for (key, i), v in density.items() if i >= rows[key]["rank"])
    shapes = [sum(delta.shape) for delta in deltas(base, tuned).values()]
    assert bought >= refused or 3000 - report["budget"]["spent"] < max(shapes)


@pytest.mark.parametrize("name", ["mixtral", "mixtral_stacked", "gpt2", "bart", "dinov2", "starcoder2", "gpt_oss"])
def test_a_budget_counts_what_the_file_holds(name, tmp_path):
    """Experts padded to one rank, tied embeddings written twice, parts that share lora_A: all are paid for."""
    base, tuned = planted_pair(tmp_path, FAMILIES[name], rank=5)
    options = ExtractOptions(RankOptions("params", (6000,)), analysis=CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (
        sum(t.numel() for t in tensors.values()) == report["budget"]["spent"] == report["totals"]["parameters"] <= 6000
    )


def test_a_run_gives_a_budget_the_same_ranks(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    analyze(base, tuned, tmp_path / "run", options=CPU)
    plain = ExtractOptions(RankOptions("size", (20000,)), analysis=CPU)
    with_run = replace(plain, run=str(tmp_path / "run"))
    (one,) = extract(base, tuned, tmp_path / "one", options=plain).values()
    (two,) = extract(base, tuned, tmp_path / "two", options=with_run).values()
    assert {m: r["rank"] for m, r in rows_by_matrix(one).items()} == {
        m: r["rank"] for m, r in rows_by_matrix(two).items()
    }
    assert (tmp_path / "one" / "adapter_model.safetensors").stat().st_size <= 20000 + 8192
    with pytest.raises(RunError, match="another base"):
        extract(tuned, base, tmp_path / "three", options=with_run)


def test_several_ranks_are_each_as_good_as_alone(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    reports = extract(base, tuned, tmp_path / "all", options=ExtractOptions(RankOptions(amounts=(2, 7)), analysis=CPU))
    assert set(reports) == {"rank-2", "rank-7"}
    for rank in (2, 7):
        options = ExtractOptions(RankOptions(amounts=(rank,)), analysis=CPU)
        (alone,) = extract(base, tuned, tmp_path / f"alone{rank}", options=options).values()
        together = reports[f"rank-{rank}"]
        assert together["totals"]["error"] == pytest.approx(alone["totals"]["error"], rel=1e-5)
        config = json.loads((tmp_path / "all" / f"rank-{rank}" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == rank
        assert not config["rank_pattern"]


@pytest.mark.parametrize("target", ["vllm", "llamacpp"])
def test_an_adapter_that_travels_has_one_rank_and_linear_layers_of_the_blocks_only(target, tmp_path):
    base, tuned = noisy_pair(tmp_path)
    options = ExtractOptions(RankOptions("energy", (0.5,)), FormOptions(target=target), analysis=CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\..*\.lora_[AB]\.weight", name) for name in tensors)
    ranks = {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert not config["rank_pattern"]
    assert not config["modules_to_save"]
    left = {row["tensor"]: row["share"] for row in report["not_carried"]}
    assert left["lm_head.weight"] > 0
    assert left["model.embed_tokens.weight"] > 0
    exact, found = deltas(base, tuned), products(base, tmp_path / "out")
    for row in report["matrices"]:
        delta = exact[row["matrix"]]
        assert np.linalg.norm(found[row["matrix"]] - delta) / np.linalg.norm(delta) == pytest.approx(
            row["error"], rel=1e-6
        )


def test_fused_matrices_are_one_factorization_or_one_for_each_part(tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES["gpt2"])
    for split, rank in ((False, 3), (True, 9)):
        form = FormOptions(split_fused=split)
        options = ExtractOptions(RankOptions("error", (1e-4,)), form, analysis=CPU)
        (report,) = extract(base, tuned, tmp_path / f"out{split}", options=options).values()
        ranks = {path: module["rank"] for path, module in report["modules"].items()}
        assert {r for path, r in ranks.items() if path.endswith("c_attn")} == {rank}
        assert {r for path, r in ranks.items() if path.endswith("c_fc")} == {3}
        found = products(base, tmp_path / f"out{split}")
        for key, delta in deltas(base, tuned).items():
            if key in found:
                assert np.linalg.norm(found[key] - delta) <= 1e-4 * np.linalg.norm(delta), key


def test_above_rounding_recovers_the_true_rank_of_a_merged_lora_in_bfloat16(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name in ("q_proj", "k_proj", "o_proj"):
        weight = (torch.randn(256, 256, generator=generator) * 0.02).bfloat16()
        change = low_rank_update((256, 256), 6, generator)
        change *= 0.02 * weight.double().norm() / change.norm()
        key = f"model.layers.0.self_attn.{name}.weight"
        base[key], tuned[key] = weight, (weight.double() + change).bfloat16()
    config = FAMILIES["llama"].config
    pair = write(tmp_path / "base", base, config), write(tmp_path / "tuned", tuned, config)
    options = ExtractOptions(RankOptions("above_rounding", (1,)), analysis=CPU)
    (report,) = extract(*pair, tmp_path / "out", options=options).values()
    assert {row["rank"] for row in report["matrices"]} == {6}
    assert all(row["rounding_share"] > 0 for row in report["matrices"])


def test_an_unchanged_matrix_is_left_out_and_said_so(tmp_path):
    family = FAMILIES["llama"]
    state = random_state(family)
    other = dict(state)
    name = "model.layers.0.mlp.up_proj.weight"
    other[name] = state[name] + 1e-2
    pair = write(tmp_path / "base", state, family.config), write(tmp_path / "tuned", other, family.config)
    (report,) = extract(*pair, tmp_path / "out", options=ExtractOptions(analysis=CPU)).values()
    assert list(report["modules"]) == ["model.layers.0.mlp.up_proj"]
    assert set(report["unchanged"]) == set(state) - {name}
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2


def test_two_equal_models_have_nothing_to_extract(tmp_path):
    family = FAMILIES["llama"]
    state = random_state(family)
    pair = write(tmp_path / "base", state, family.config), write(tmp_path / "tuned", state, family.config)
    with pytest.raises(PairingError, match="No matrix .* differs"):
        extract(*pair, tmp_path / "out", options=ExtractOptions(analysis=CPU))
    assert not (tmp_path / "out").exists()


def test_a_matrix_with_nan_stops_the_adapter_by_name_and_keeps_the_rest(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    state = load_file(tuned / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, tuned / "model.safetensors")
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight.*index \(3, 5\)"):
        extract(base, tuned, tmp_path / "out", options=ExtractOptions(analysis=CPU))
    assert not (tmp_path / "out").exists()
    left_out = replace(CPU, exclude=r"layers\.1\.mlp\.up_proj")
    with pytest.raises(NumericalError, match="holds NaN"):
        extract(base, tuned, tmp_path / "out", options=ExtractOptions(analysis=CPU))
    (report,) = extract(base, tuned, tmp_path / "out", options=ExtractOptions(analysis=left_out)).values()
    assert "model.layers.1.mlp.up_proj.weight" in {row["tensor"] for row in report["not_carried"]}


@pytest.mark.parametrize(
    ("name", "extras"), [("encoder.layer.0.attention.self.query.bias", "bias"), ("LayerNorm", "all")]
)
def test_a_fine_tune_of_biases_or_norms_alone_is_an_adapter_too(name, extras, tmp_path):
    family = FAMILIES["bert"]
    state = random_state(family)
    changed = next(key for key in state if name in key)
    pair = [write(tmp_path / side, state, family.config) for side in ("base", "tuned")]
    write(pair[1], {**state, changed: state[changed] + 0.5}, family.config)
    with pytest.raises(PairingError, match=f"{re.escape(changed)}.*--extras"):
        extract(*pair, tmp_path / "none", options=ExtractOptions(analysis=CPU))
    options = ExtractOptions(form=FormOptions(extras=extras), analysis=CPU)
    (report,) = extract(*pair, tmp_path / "out", options=options).values()
    assert report["totals"]["kept"] == pytest.approx(1)
    assert not report["not_carried"]
    assert all(row.right for row in verify(*pair, tmp_path / "out", options=CPU).rest)


def test_matrices_that_a_budget_leaves_out_are_listed_with_their_share(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    options = ExtractOptions(RankOptions("params", (600,)), analysis=CPU)
    (report,) = extract(base, tuned, tmp_path / "out", options=options).values()
    empty = {row["matrix"] for row in report["matrices"] if not row["rank"]}
    left = {row["tensor"]: row for row in report["not_carried"]}
    assert empty
    assert empty <= left.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in left)
    assert accounted(report) == pytest.approx(1)
