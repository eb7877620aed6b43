"""Rank against training step: the columns against NumPy, and what is drawn against the columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from deltaspec.plots.style import ROLE_STYLE, VENUES
from deltaspec.plots.tables import to_rows
from deltaspec.plots.trajectory import STEP_FIGURES, draw_rank_by_step, draw_share_by_step, tabulate_steps
from tests.figures import synthetic


def make_steps(*numbers, kind=synthetic.bert):
    return [(number, kind().records if not place else kind().records[:-1]) for place, number in enumerate(numbers)]


@pytest.fixture(scope="module")
def columns():
    return tabulate_steps(make_steps(125, 250, 500, 1000))


def test_rows_are_medians_over_a_roles_matrices(columns):
    steps = make_steps(125, 250, 500, 1000)
    rows = {(row["role"], row["step"]): row for row in to_rows(columns)}
    assert "embed" not in {role for role, _ in rows}
    assert len(rows) == 4 * len(synthetic.BERT)
    for step, records in steps:
        members = [r for r in records if r.key.role == "up_proj"]
        for name in ("effective_rank", "rank_90", "effective_rank_ratio"):
            found = np.median([r.metrics[name] for r in members])
            assert rows["up_proj", step][name] == pytest.approx(found)
        assert rows["up_proj", step]["effective_rank_max"] == max(r.metrics["effective_rank"] for r in members)
        assert math.isnan(rows["up_proj", step]["relative_norm"])  # these records have none


@pytest.mark.parametrize("name", STEP_FIGURES)
@pytest.mark.parametrize("style", VENUES)
def test_lines_are_the_columns_in_the_roles_colours(columns, name, style):
    figure = STEP_FIGURES[name].draw(columns, style=style)
    figure.draw_without_rendering()
    drawn = ("effective_rank", "rank_90") if name == "rank_by_step" else ("effective_rank_ratio", "rank_90_ratio")
    for ax, column in zip(figure.axes, drawn, strict=True):
        (line,) = [line for line in ax.lines if line.get_label() == "q_proj"]
        rows = [row for row in to_rows(columns) if row["role"] == "q_proj"]
        assert list(line.get_xdata()) == [row["step"] for row in rows] == [125, 250, 500, 1000]
        assert np.array_equal(line.get_ydata(), [row[column] for row in rows], equal_nan=True)
        assert to_hex(line.get_color()).upper() == ROLE_STYLE["q_proj"][0]
        white = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        assert sum(len(line.get_xdata()) for line in white) == sum(
            2 * row[f"{column.removesuffix('_ratio')}_with_rounding"] > row["matrices"] for row in to_rows(columns)
        )
        width = figure.get_window_extent().width
        assert all(t.get_window_extent().x0 >= 0 and t.get_window_extent().x1 <= width for t in ax.get_xticklabels())


@pytest.mark.parametrize(
    ("numbers", "scale"),
    [
        ((125, 250, 500, 1000), "log"),
        ((100, 200, 300, 400), "linear"),
        ((0, 1, 2, 4, 8, 512), "symlog"),
        ((7,), "linear"),
    ],
)
def test_the_axis_fits_the_steps(numbers, scale):
    figure = draw_rank_by_step(tabulate_steps(make_steps(*numbers)))
    figure.draw_without_rendering()
    assert figure.axes[0].get_xscale() == scale
    texts = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    if scale != "linear":
        assert texts == [str(number) for number in numbers]


def test_each_stack_has_its_own_panels_and_a_model_without_blocks_has_lines():
    assert len(draw_share_by_step(tabulate_steps(make_steps(1, 2, kind=synthetic.t5))).axes) == 6
    assert {*tabulate_steps(make_steps(1, kind=synthetic.single))["role"]} == {"other"}
