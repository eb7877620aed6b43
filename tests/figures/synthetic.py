"""Hand-made runs for the figures: singular values from formulas, metrics from NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaspec.types import MatrixKey, MatrixRecord

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def semicircle_values(shape: tuple[int, int]) -> np.ndarray:
    """Stand-in for noise: singular values between the Marchenko–Pastur edges of this shape."""
    small, large = sorted(shape)
    angles = (np.arange(small) + 0.5) / small * math.pi
    return (math.sqrt(large) - math.sqrt(small) * -np.cos(angles)).clip(1e-3)


def planted_values(shape: tuple[int, int], *, strength: float, decay: float, noise: float) -> np.ndarray:
    """A power law on top of noise, combined as independent energies."""
    index = np.arange(1, min(shape) + 1)
    return np.sqrt((strength * index**-decay) ** 2 + (noise * semicircle_values(shape)) ** 2)


def numpy_metrics(values: np.ndarray, shape: tuple[int, int], *, noise: float, edge: float) -> dict[str, object]:
    total = float(values.sum())
    if total == 0:
        zero = dict.fromkeys(
            (
                "effective_rank",
                "rank_90",
                "effective_rank_ratio",
                "rank_90_ratio",
                "frobenius_norm",
                "rank_above_rounding",
            ),
            0,
        )
        return {**zero, "resolved": True, "noise_sigma": 0.0, "rounding_edge": edge}
    share = values[values > 0] / total
    effective = float(np.exp(-(share * np.log(share)).sum()))
    energy = np.cumsum(values**2)
    rank_90 = int((energy < 0.9 * energy[-1]).sum()) + 1
    null = 0.8 * min(shape)
    return {
        "frobenius_norm": math.sqrt(float(energy[-1])),
        "effective_rank": effective,
        "effective_rank_null": null,
        "effective_rank_ratio": effective / null,
        "rank_90": rank_90,
        "rank_90_null": 0.55 * min(shape),
        "rounding_edge": edge,
        "noise_sigma": noise or None,
        "resolved": bool(values[0] > edge),
        "rank_above_rounding": int((values > edge).sum()),
    }


@dataclass
class FakeRun:
    """What figures read of a run: records, and values by store key."""

    records: list[MatrixRecord]
    arrays: dict[tuple[MatrixKey, str], np.ndarray]

    def values(self, record: MatrixRecord) -> np.ndarray:
        return self.arrays[record.key, record.spectrum_of]

    def save(self, path: Path) -> Path:
        """Write a real run directory."""
        import torch

        from deltaspec.store.run import Run
        from deltaspec.types import Spectrum

        run = Run.create_or_resume(path, {"planned": [record.store_key for record in self.records]})
        for record in self.records:
            values = self.values(record)
            energy = float(np.square(values).sum())
            run.put(record, Spectrum(torch.from_numpy(values), record.shape, energy, "gram", record.error_bound))
        return path


def make_record(key: MatrixKey, shape: tuple[int, int], values: np.ndarray, **known: float) -> MatrixRecord:
    metrics = numpy_metrics(values, shape, noise=known.get("noise", 0.0), edge=known.get("edge", 0.0))
    return MatrixRecord(key, shape, "BF16", "BF16", "delta", metrics, "gram", values.max() * 1e-9, 0.0, "cpu")


def make_run(items: Iterable[tuple[MatrixKey, tuple[int, int]]], *, seed: int = 0) -> FakeRun:
    """One planted spectrum per key, varied by a fixed seed; layers deeper in a model get flatter spectra."""
    random = np.random.default_rng(seed)
    run = FakeRun([], {})
    for key, shape in items:
        depth = key.depth or 0
        noise = 2e-4 * (1 + 0.3 * random.random())
        strength = noise * 40 * math.sqrt(max(shape)) * (0.6 + random.random())
        decay = 0.8 - 0.25 * math.sin(depth / 5) + 0.04 * (len(key.role) % 5) + 0.05 * random.random()
        weak = random.random() < 0.06
        values = planted_values(shape, strength=strength * (0.012 if weak else 1), decay=decay, noise=noise)
        run.arrays[key, "delta"] = values
        edge = 1.2 * noise * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        run.records.append(make_record(key, shape, values, noise=noise, edge=edge))
    return run


def block(stack: str, depth: int, role: str, expert: int | None = None) -> MatrixKey:
    prefix = f"{stack}." if stack else ""
    middle = "" if expert is None else f".experts.{expert}"
    return MatrixKey(f"{prefix}layers.{depth}{middle}.{role}.weight", "", role, depth, expert, stack)


def shape_of(role: str, hidden: int) -> tuple[int, int]:
    if role in ("gate_proj", "up_proj"):
        return 4 * hidden, hidden
    if role == "down_proj":
        return hidden, 4 * hidden
    return (hidden // 4, hidden) if role in ("k_proj", "v_proj") and hidden > 400 else (hidden, hidden)


def bert() -> FakeRun:
    items = [(block("", depth, role), shape_of(role, 384)) for depth in range(6) for role in BERT]
    return make_run([*items, (MatrixKey("embed.weight", role="embed"), (3000, 384))])


def llama(layers: int = 16, hidden: int = 512) -> FakeRun:
    items = [(block("", depth, role), shape_of(role, hidden)) for depth in range(layers) for role in LLAMA]
    ends = [(MatrixKey(f"{role}.weight", role=role), (4000, hidden)) for role in ("embed", "lm_head")]
    return make_run([*items, *ends])


def mixture() -> FakeRun:
    items = [(block("", depth, role), (128, 128)) for depth in range(4) for role in LLAMA[:4]]
    items += [(block("", depth, "router"), (16, 128)) for depth in range(4)]
    items += [
        (block("", depth, role, expert), shape_of(role, 96))
        for depth in range(4)
        for expert in range(16)
        for role in LLAMA[4:]
    ]
    return make_run(items)


def t5() -> FakeRun:
    items = [
        (block(stack, depth, role), shape_of(role, 256))
        for stack, count, roles in (("encoder", 8, LLAMA), ("decoder", 6, LLAMA), ("cross", 6, LLAMA[:4]))
        for depth in range(count)
        for role in roles
    ]
    return make_run([(MatrixKey("shared.weight", role="embed"), (2000, 256)), *items])


def single() -> FakeRun:
    return make_run([(MatrixKey("weight"), (64, 48))])


def one_layer() -> FakeRun:
    """One block whose k_proj did not change at all, and whose v_proj failed."""
    run = make_run([(block("", 0, role), shape_of(role, 128)) for role in BERT if role != "v_proj"])
    key = run.records[1].key
    run.arrays[key, "delta"] = np.zeros(128)
    run.records[1] = make_record(key, (128, 128), np.zeros(128))
    return run


RUNS = {"bert": bert, "llama": llama, "mixture": mixture, "t5": t5, "single": single, "one_layer": one_layer}
