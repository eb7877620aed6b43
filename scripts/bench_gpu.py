"""Time every way to singular values and vectors on a CUDA card: deltaspec's routes and what could replace them.

    python scripts/bench_gpu.py [--budget 450] [--out figures/bench_gpu]    # 4 minutes on an H200
    python scripts/bench_gpu.py --smoke                                      # tiny, on the CPU: does it run?

Sections run one after another, each in a process of its own with a time limit; each prints its rows as it goes, medians
over a few repetitions after a warm-up. Accuracy of values: the largest error over σ₁, and the largest relative error of
those above 1e-3 σ₁, against the first way listed: of square matrices gesvd in float64. "excess": the error of a rank-r
approximation over the optimum, less 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu import cusolver, many, products, top, values  # noqa: E402
from gpu.timing import Bench  # noqa: E402

SECTIONS: dict[str, tuple[float, Callable[[Bench], None]]] = {  # seconds that each may take
    "peak": (40, products.peak),
    "gram": (40, products.gram),
    "emulation": (30, products.emulation),
    "values": (85, values.values),
    "top": (55, top.top),
    "deltaspec": (55, top.deltaspec),
    "batch": (55, many.batch),
    "two-stage": (55, many.two_stage),
    "pipeline": (60, many.pipeline),
    "cusolver": (55, cusolver.cusolver),
    "transfer": (30, products.transfer),
    "whole svd": (70, values.whole_svd),
}
COLUMNS = ("section", "case", "milliseconds", "rate", "accuracy")
EMULATION = {"CUBLAS_EMULATE_DOUBLE_PRECISION": "1", "CUBLAS_EMULATION_STRATEGY": "performant"}


def run_sections(arguments: argparse.Namespace) -> None:
    """Run every section in its process, one after another, within the budget; then say what machine it was."""
    started, table = time.monotonic(), arguments.out.with_suffix(".csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(",".join(COLUMNS) + "\n")
    for name, (limit, _) in SECTIONS.items():
        seconds = min(limit, arguments.budget - (time.monotonic() - started))
        if seconds < 10:
            print(f"\n{name}: skipped, the budget is spent")
            continue
        print(f"\n{name}, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-u", __file__, "--section", name, "--limit", str(seconds - 4)]
        command += ["--out", str(arguments.out), *(["--smoke"] if arguments.smoke else [])]
        environment = {**os.environ, **(EMULATION if name == "emulation" else {})}
        try:
            status = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
            print(f"{name}: exit {status}" if status else "", end="")
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped at its limit")
    facts = describe_machine(smoke=arguments.smoke)
    facts["seconds in all"] = round(time.monotonic() - started)
    arguments.out.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(facts, indent=1, ensure_ascii=False))


def describe_machine(*, smoke: bool) -> dict[str, object]:
    """Date, card and versions."""
    facts: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "card": "none: smoke test" if smoke else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "printed by": "scripts/bench_gpu.py",
    }
    if not smoke:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return facts


def main() -> None:
    """Run all sections, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=list(SECTIONS), help="only this one, in this process; rows are appended")
    parser.add_argument("--smoke", action="store_true", help="tiny matrices on the CPU; writes under .cache")
    parser.add_argument("--budget", type=float, default=450, help="seconds for all sections")
    parser.add_argument("--limit", type=float, default=100, help="seconds for one section")
    parser.add_argument("--out", type=Path, help="default: figures/bench_gpu")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = ROOT / ".cache" / "bench_gpu" if arguments.smoke else ROOT / "figures" / "bench_gpu"
    if not arguments.section:
        run_sections(arguments)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    table = arguments.out.with_suffix(".csv")
    bench = Bench(arguments.section, arguments.smoke, arguments.limit, table)
    SECTIONS[arguments.section][1](bench)


if __name__ == "__main__":
    main()
