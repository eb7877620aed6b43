"""What the figures draw, against NumPy; then that nothing overlaps."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from deltaspec.plots.energy import draw_energy
from deltaspec.plots.figures import FIGURES
from deltaspec.plots.heatmap import draw_heatmap, select_ratios
from deltaspec.plots.rank_by_depth import draw_rank_by_depth, select_depths
from deltaspec.plots.rank_by_role import draw_rank_by_role
from deltaspec.plots.spectrum import choose_matrices, draw_spectrum, tabulate_spectra
from deltaspec.plots.style import ROLE_STYLE, use_venue
from deltaspec.plots.tables import MAX_POINTS, tabulate_cells, tabulate_energy, thin_ranks
from tests.figures import synthetic


def find_line(ax: Axes, role: str) -> Line2D:
    (line,) = [line for line in ax.lines if line.get_label() == role]
    return line


def test_by_depth_draws_the_median_over_experts_with_smallest_and_largest() -> None:
    run = synthetic.mixture()
    figure = draw_rank_by_depth(select_depths(tabulate_cells(run.records)))
    line = find_line(figure.axes[1], "down_proj")
    for depth, drawn in zip(*line.get_data(), strict=True):
        ranks = [r.metrics["rank_90"] for r in run.records if (r.key.role, r.key.depth) == ("down_proj", depth)]
        assert len(ranks) == 16
        assert drawn == np.median(ranks)
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert to_hex(line.get_color()).upper() == ROLE_STYLE["down_proj"][0]
    assert line.get_marker() == ROLE_STYLE["down_proj"][1]


def test_by_depth_hollows_what_rounding_explains_and_leaves_embeddings_out() -> None:
    run = synthetic.bert()
    figure = draw_rank_by_depth(select_depths(tabulate_cells(run.records)))
    inside = [r for r in run.records if r.key.depth is not None]
    shares = []
    for ax, name in zip(figure.axes, ("effective_rank", "rank_90"), strict=True):
        white = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        hollow = {(to_hex(line.get_color()).upper(), x) for line in white for x in line.get_xdata()}
        counted = [r for r in inside if not r.metrics["resolved"] or r.metrics[name] > r.metrics["rank_above_rounding"]]
        assert hollow == {(ROLE_STYLE[r.key.role][0], r.key.depth) for r in counted}
        shares.append(len(counted) / len(inside))
    assert 0 < min(shares) < 1
    assert "embed" not in [line.get_label() for line in figure.axes[0].lines]


def test_each_stack_has_its_own_panels() -> None:
    figure = draw_rank_by_depth(select_depths(tabulate_cells(synthetic.t5().records)))
    assert [ax.get_title(loc="left") for ax in figure.axes[::2]] == ["encoder", "decoder", "cross"]
    assert list(find_line(figure.axes[0], "q_proj").get_xdata()) == list(range(8))
    assert {line.get_label() for line in figure.axes[4].lines if not line.get_label().startswith("_")} == set(
        synthetic.LLAMA[:4]
    )


def test_by_role_draws_every_layer_and_the_median() -> None:
    run = synthetic.bert()
    ax = draw_rank_by_role(tabulate_cells(run.records)).axes[0]
    place = [text.get_text() for text in ax.get_yticklabels()].index("v_proj")
    points = [x for line in ax.lines for x, y in zip(*line.get_data(), strict=True) if abs(y - place) < 0.5]
    ranks = [r.metrics["effective_rank"] for r in run.records if r.key.role == "v_proj"]
    assert sorted(points) == sorted(ranks)
    ticks = [path.vertices[0, 0] for c in ax.collections for path in c.get_paths() if c.get_zorder() == 4]
    assert ticks[place] == pytest.approx(np.median(ranks))


def test_noise_far_beyond_the_data_does_not_squeeze_it() -> None:
    columns = tabulate_cells(synthetic.bert().records)
    columns["effective_rank"] = [8.0 for _ in columns["effective_rank"]]
    assert draw_rank_by_role(columns).axes[0].get_xlim()[1] < 10


def test_heatmap_leaves_missing_cells_blank_and_hatches_unresolved_ones() -> None:
    run = synthetic.bert()
    missing = run.records.pop(9)
    ax = draw_heatmap(select_ratios(tabulate_cells(run.records))).axes[0]
    drawn = ax.collections[0].get_array()
    row = synthetic.BERT.index(missing.key.role)
    assert np.argwhere(np.ma.getmaskarray(drawn)).tolist() == [[row, missing.key.depth]]
    for record in run.records:
        if record.key.depth is not None:
            value = drawn[synthetic.BERT.index(record.key.role), record.key.depth]
            assert value == record.metrics["effective_rank_ratio"]
    hatched = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in ax.patches if patch.get_hatch()}
    counted = [r for r in run.records if r.metrics["effective_rank"] > r.metrics["rank_above_rounding"]]
    assert hatched == {(r.key.depth, synthetic.BERT.index(r.key.role)) for r in counted if r.key.depth is not None}


def test_spectrum_draws_the_values_the_edge_and_noise_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaspec.spectra.nulls.null_singular_values", lambda m, n: np.linspace(9, 1, min(m, n)))
    run = synthetic.bert()
    chosen = choose_matrices(run.records)
    assert [(r.key.role, r.key.depth) for r in chosen] == [(role, 3) for role in synthetic.BERT] + [("embed", None)]
    ax = draw_spectrum(tabulate_spectra(chosen, run.values)).axes[0]
    noise, edge, values = ax.lines
    index = np.array(values.get_xdata())
    assert (index[0], index[-1], len(index) <= MAX_POINTS) == (1, 384, True)
    assert np.array_equal(values.get_ydata(), run.values(chosen[0])[index - 1])
    assert np.allclose(noise.get_ydata(), np.linspace(9, 1, 384)[index - 1] * chosen[0].metrics["noise_sigma"])
    assert set(edge.get_ydata()) == {chosen[0].metrics["rounding_edge"]}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_of_many_roles_the_spectrum_shows_those_that_changed_and_have_most_matrices() -> None:
    run = synthetic.llama()
    pooler, tall = synthetic.MatrixKey("pooler.weight", role="pooler"), synthetic.MatrixKey("conv.weight", role="conv")
    run.records += [
        synthetic.make_record(pooler, (4000, 4000), np.zeros(4000)),
        synthetic.make_record(tall, (9000, 2), np.array([3.0, 1.0])),
    ]
    assert [record.key.role for record in choose_matrices(run.records)] == [*synthetic.LLAMA, "embed"]


def test_spectrum_of_zeros_says_so_and_numerical_dust_is_not_drawn() -> None:
    run = synthetic.one_layer()
    columns = tabulate_spectra(choose_matrices(run.records), run.values)
    ax = draw_spectrum(columns).axes[1]
    assert ax.get_title(loc="left") == "k_proj, layer 0"
    assert [text.get_text() for text in ax.texts] == ["zero"]
    dusty = np.array([1.0, 1e-12, 0.0])
    record = synthetic.make_record(run.records[0].key, (3, 3), dusty)
    drawn = tabulate_spectra([record], lambda _: dusty)["singular_value"]
    assert drawn[0] == 1
    assert all(map(math.isnan, drawn[1:]))


def test_energy_is_the_cumulated_squares_of_the_median_layer() -> None:
    run = synthetic.bert()
    ax = draw_energy(tabulate_energy(run.records, run.values)).axes[0]
    line = find_line(ax, "up_proj")
    spectra = [run.values(r) ** 2 for r in run.records if r.key.role == "up_proj"]
    kept = np.median([np.cumsum(s) / s.sum() for s in spectra], axis=0)
    ranks = np.array(line.get_xdata())
    assert np.allclose(line.get_ydata(), kept[ranks - 1], rtol=1e-12)
    assert ranks[-1] == 384
    assert set(ax.lines[0].get_ydata()) == {0.9}


def test_ranks_are_whole_distinct_and_reach_both_ends() -> None:
    for count in (1, 2, 7, 200, 4096, 32000):
        ranks = thin_ranks(count)
        assert (ranks[0], ranks[-1]) == (1, count)
        assert (np.diff(ranks) > 0).all()
        assert len(ranks) <= MAX_POINTS
    assert thin_ranks(0).size == 0


def test_base_spectra_are_drawn_only_where_there_is_no_update() -> None:
    run = synthetic.bert()
    base = synthetic.make_record(run.records[0].key, (4, 4), np.ones(4))
    object.__setattr__(base, "spectrum_of", "base")
    assert set(tabulate_cells([*run.records, base])["spectrum_of"]) == {"delta"}
    assert tabulate_cells([base])["spectrum_of"] == ["base"]


@pytest.mark.parametrize(
    ("name", "style"), [*product(synthetic.RUNS, ["neurips", "icml"]), ("mixture", "slides"), ("t5", "acl")]
)
def test_nothing_overlaps_or_leaves_the_page(name: str, style: str) -> None:
    run = synthetic.RUNS[name]()
    drawn = 0
    for entry in FIGURES.values():
        columns = entry.tabulate(run.records, run.values)
        if not columns:
            continue
        drawn += 1
        figure = entry.draw(columns, style=style)
        with use_venue(style):
            figure.draw_without_rendering()
        panels = [ax.get_tightbbox() for ax in figure.axes]
        legends = [legend.get_window_extent() for legend in figure.legends]
        page = figure.bbox.padded(figure.dpi / 72)
        for box in panels + legends:
            assert page.x0 <= box.x0
            assert box.x1 <= page.x1
            assert page.y0 <= box.y0
            assert box.y1 <= page.y1
        for panel in panels:
            assert not any(panel.overlaps(legend) for legend in legends)
    assert drawn == (3 if name == "single" else 5)


def test_plots_know_no_pyplot() -> None:
    folder = Path(synthetic.__file__).parents[2] / "deltaspec" / "plots"
    assert not [file.name for file in folder.glob("*.py") if "pyplot" in file.read_text(encoding="utf-8")]
