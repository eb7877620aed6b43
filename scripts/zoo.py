"""Hold deltaspec against PEFT and float64 on a tiny random model of every architecture that transformers knows.

    python scripts/zoo.py                     # all, half an hour of one core; goes on where it stopped
    python scripts/zoo.py --only mpnet gpt2 --out few.jsonl
    python scripts/zoo.py --wrong runs/zoo.jsonl --out again.jsonl
    python scripts/zoo.py --table             # only print what was found, by cause and by architecture

For each architecture a base and a fine-tune, random, every float tensor changed, saved as transformers saves them:
analyze's energies against float64; an adapter of full rank, without and with extras, which PEFT must load without
complaint and which must make the base the fine-tune but for what is listed as not carried; verify's word on it; and
merge of adapters that PEFT made, against PEFT's running model. Each is right, refused (in one sentence), or WRONG.
"""

import argparse
import json
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT.parent))  # after PYTHONPATH, so that the deltaspec of another checkout can be measured

from zoo.catalogue import list_species  # noqa: E402
from zoo.causes import print_causes  # noqa: E402
from zoo.table import print_row, print_table, sum_up  # noqa: E402
from zoo.worker import Worker  # noqa: E402


def main() -> None:
    """Examine what is not in the file yet, and print the table."""
    arguments = _parse()
    rows = _read(arguments.out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        wanted = _choose(arguments)
        left = [name for name in wanted if name not in rows or arguments.only][: arguments.limit]
        worker = Worker(arguments.seconds)
        for name in left:
            rows[name] = row = {**worker.examine(name), "name": name}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print_row(row)
        worker.stop()
        rows = {name: rows[name] for name in wanted if name in rows}
    found = [rows[name] for name in sorted(rows)]
    print_causes(found)
    print_table(found)


def _choose(arguments: argparse.Namespace) -> list[str]:
    """Name what is to be examined, in an order by which whatever is done at a time is a sample of all."""
    if arguments.only:
        return list(arguments.only)
    if arguments.wrong:
        return [name for name, row in _read(arguments.wrong).items() if sum_up(row) == "WRONG"]
    names = [name for name in list_species() if arguments.bodies or "/" not in name]
    return sorted(names, key=lambda name: zlib.crc32(name.encode()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, also if they are in the file")
    parser.add_argument("--wrong", type=Path, metavar="FILE", help="those that are wrong in another file of results")
    parser.add_argument("--limit", type=int, help="at most so many")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo.jsonl"), help="results, one JSON line each")
    parser.add_argument("--seconds", type=float, default=180, help="time limit of one architecture")
    parser.add_argument("--bodies", action="store_true", help="also the bare bodies of those that have a head")
    parser.add_argument("--table", action="store_true", help="print what the file holds, examine nothing")
    return parser.parse_args()


def _read(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["name"]: row for row in rows}


if __name__ == "__main__":
    main()
