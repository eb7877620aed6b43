"""The plot workflow and command: files, their bytes, and what goes wrong."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltaspec.cli.plot import plot as command
from deltaspec.errors import OptionError, RunError
from deltaspec.plots.figures import FIGURES
from deltaspec.plots.tables import tabulate_cells
from deltaspec.store.run import Run
from deltaspec.workflows.analysis.write_figures import plot
from tests.figures import synthetic

ROOT = Path(__file__).parents[2]
AGAIN = """
import sys
from deltaspec.store.run import Run
from deltaspec.workflows.analysis.write_figures import plot
plot(Run.load(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.bert().save(tmp_path_factory.mktemp("run") / "run")


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def digests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of two fresh processes: the second with other settings of matplotlib, hash seed and time zone."""
    settings = tmp_path_factory.mktemp("settings")
    (settings / "matplotlibrc").write_text("lines.linewidth: 9\nsvg.hashsalt: other\npdf.fonttype: 3\n")
    found = []
    for seed, more in (("1", {}), ("2", {"MATPLOTLIBRC": str(settings), "TZ": "Asia/Tokyo"})):
        environment = {**os.environ, "PYTHONHASHSEED": seed, **more}
        subprocess.run([sys.executable, "-c", AGAIN, str(folder)], cwd=ROOT, env=environment, check=True)
        found.append(digest(folder / "figures"))
    return found


def test_two_fresh_processes_write_the_same_bytes(digests: list[dict[str, str]]) -> None:
    assert digests[0] == digests[1]
    assert set(digests[0]) == {f"{name}.{ending}" for name in FIGURES for ending in ("pdf", "svg", "png", "csv")}


def test_pdf_embeds_truetype_and_has_the_column_width(folder: Path, tmp_path: Path) -> None:
    for path in plot(Run.load(folder), str(tmp_path), formats=["pdf"], style="icml"):
        if path.suffix == ".pdf":
            data = path.read_bytes()
            assert b"/Type3" not in data
            assert b"/CIDFontType2" in data or b"/TrueType" in data
            assert b"/CreationDate" not in data
            box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", data)
            assert box is not None
            assert float(box[1]) == pytest.approx(3.25 * 72)


def test_csv_holds_what_is_drawn(folder: Path, digests: list[dict[str, str]]) -> None:
    assert digests
    run = Run.load(folder)
    with (folder / "figures" / "rank_by_role.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = tabulate_cells(run.records)
    found = [float(row["effective_rank"]) for row in rows]
    assert found == pytest.approx(cells["effective_rank"], rel=1e-9)  # the file has ten digits
    assert sorted(row["rank_90"] for row in rows) == sorted(str(record.metrics["rank_90"]) for record in run.records)
    assert [row["depth"] for row in rows if row["role"] == "embed"] == [""]
    assert "nan" not in (folder / "figures" / "spectrum.csv").read_text()


def test_a_run_without_blocks_has_no_figures_by_depth(tmp_path: Path) -> None:
    run = Run.load(synthetic.single().save(tmp_path / "run"))
    assert {path.stem for path in plot(run, formats=["svg"])} == {"rank_by_role", "spectrum", "energy"}


def test_a_folder_that_cannot_be_written_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"rank_by_depth\.png.*-o\.$"):
        plot(Run.load(folder), tmp_path / "file" / "figures", formats=["png"])


def test_unknown_formats_and_empty_runs_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--format is 'gif'"):
        plot(Run.load(folder), formats=["gif"])
    with pytest.raises(RunError, match="no finished matrix"):
        plot(Run.create_or_resume(tmp_path / "empty", {}))


def test_command_prints_the_paths(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(folder), "-o", str(tmp_path), "--format", "svg", "--style", "acl"])
    assert result.exit_code == 0, result.output
    written = sorted(str(path) for path in tmp_path.iterdir())
    assert sorted(result.output.split()) == written
    assert len(written) == 2 * len(FIGURES)


def test_command_offers_every_style_and_starts_without_matplotlib() -> None:
    code = "import sys, deltaspec.cli.plot; sys.exit(bool({'matplotlib', 'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    from deltaspec.plots.style import VENUES

    (style,) = [option for option in command.params if option.name == "style"]
    assert set(style.type.choices) == set(VENUES)
