"""What comparisons draw, against the columns; then that nothing overlaps."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex

from deltaspec.plots.comparison import COLOURS, MARKERS, draw_change, draw_learning, wrap
from deltaspec.plots.style import GUIDE_COLOUR, NULL_COLOUR, VENUES, use_venue
from deltaspec.plots.tables import to_columns, to_rows

METHODS = (
    "full",
    "last layers",
    "BitFit",
    *(f"LoRA r={r}" for r in (1, 4, 16, 64)),
    "VB-LoRA",
    "VeRA",
    "series",
    "parallel",
)
LONG = (
    "lora r=16 alpha=32.0 targets=q_proj,v_proj",
    "lora r=64 alpha=128.0 targets=q_proj,k_proj,v_proj,o_proj dropout=0.05",
    "full",
    "vblora vectors=90 vector_length=128",
)
PLAIN = ("BitFit", "series", "parallel")  # without ΔW


def make(labels, seeds=1, **fixed):
    """Rows of a comparison as it draws them; those of one label lie near each other."""
    generator, rows = random.Random(0), []
    for seed in range(seeds):
        for number, label in enumerate(labels):
            near = generator.random
            row = {"label": label, "metric": "accuracy", "kept_metric": "accuracy", "kept_before": 0.79 + 0.002 * seed}
            row |= {"learned": 0.62 + 0.01 * number + 0.005 * near(), "kept": 0.78 - 0.05 * near()}
            row |= {"effective_rank": 1.0 + 3**number * near(), "overlap": 0.3 * near(), "overlap_null": 0.021}
            row |= {"intruders": 0.5 * near(), "intruders_null": 0.5 * near(), **fixed}
            none = dict.fromkeys(("effective_rank", "overlap", "overlap_null", "intruders", "intruders_null"))
            rows.append(row | none if label in PLAIN else row)
    return to_columns(rows)


def points(ax):
    """Colour, marker's vertices and place of each point, the large ones last."""
    found = []
    for collection in ax.collections:
        colour, path = to_hex(collection.get_facecolor()[0]).upper(), collection.get_paths()[0].vertices.tobytes()
        found += [(collection.get_sizes()[0], colour, path, *map(float, place)) for place in collection.get_offsets()]
    return sorted(found, key=lambda point: point[0])


def test_learning_draws_every_training_and_the_means():
    columns = make(METHODS, seeds=3)
    ax = draw_learning(columns).axes[0]
    rows, drawn = to_rows(columns), points(ax)
    large = [point for point in drawn if point[0] > 15]
    small = [point for point in drawn if point[0] < 15]
    assert {(x, y) for *_, x, y in small} == {(row["learned"], row["kept"]) for row in rows}
    assert len(small) == 33 and len(large) == 11
    looks = {}
    for label in METHODS:
        members = [row for row in rows if row["label"] == label]
        place = [np.mean([row[name] for row in members]) for name in ("learned", "kept")]
        (look,) = [tuple(point[1:3]) for point in large if np.allclose(point[3:], place, rtol=1e-12)]
        looks[label] = look
        assert {tuple(point[1:3]) for point in small if point[3:] in [(r["learned"], r["kept"]) for r in members]} == {
            look
        }
    assert len(set(looks.values())) == len(METHODS) > len(COLOURS) == len(MARKERS)
    (line,) = ax.lines
    assert list(line.get_ydata()) == pytest.approx([np.mean([row["kept_before"] for row in rows])] * 2, rel=1e-12)
    assert to_hex(line.get_color()).upper() == GUIDE_COLOUR


def test_change_draws_every_training_the_means_and_nulls():
    columns = make(METHODS, seeds=3)
    figure = draw_change(columns)
    rows = [row for row in to_rows(columns) if row["label"] not in PLAIN]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [label for label in METHODS if label not in PLAIN]
    for ax, name in zip(figure.axes, ("effective_rank", "overlap", "intruders"), strict=True):
        for place, label in enumerate(labels):
            members = [row for row in rows if row["label"] == label]
            drawn = [x for line in ax.lines for x, y in zip(*line.get_data(), strict=True) if y == place]
            assert sorted(drawn) == sorted(row[name] for row in members)
            ticks = {
                to_hex(c.get_color()[0]).upper(): p
                for c in ax.collections
                for p in c.get_paths()
                if p.vertices[:, 1].mean() == pytest.approx(place)
            }
            assert ticks["#000000"].vertices[0, 0] == pytest.approx(np.mean([row[name] for row in members]))
            assert (NULL_COLOUR in ticks) is (name != "effective_rank")
            if name != "effective_rank":
                null = np.mean([row[f"{name}_null"] for row in members])
                assert ticks[NULL_COLOUR].vertices[0, 0] == pytest.approx(null)


@pytest.mark.parametrize("draw", [draw_learning, draw_change])
@pytest.mark.parametrize("style", VENUES)
@pytest.mark.parametrize(
    "columns",
    [
        pytest.param(make(METHODS, seeds=3), id="many"),
        pytest.param(make(METHODS[:2]), id="two"),
        pytest.param(make(METHODS[:1]), id="one"),
        pytest.param(make(LONG), id="long"),
        pytest.param(make(LONG[:2], learned=0.5, kept=0.5, overlap=0.02, effective_rank=4.0), id="equal"),
        pytest.param(make(METHODS[:3], intruders=0.0, intruders_null=0.0), id="no intruders"),
        pytest.param(make(METHODS[:3], kept_before=None, overlap=None, overlap_null=math.nan), id="no full"),
        pytest.param(make(METHODS, seeds=2, metric="perplexity", kept_metric="perplexity"), id="perplexity"),
    ],
)
def test_nothing_overlaps_or_leaves_the_page(draw, style, columns):
    figure = draw(columns, style=style)
    with use_venue(style):
        figure.draw_without_rendering()
    panels, legends = (
        [ax.get_tightbbox() for ax in figure.axes],
        [legend.get_window_extent() for legend in figure.legends],
    )
    page = figure.bbox.padded(figure.dpi / 72)
    for box in panels + legends:
        assert page.x0 <= box.x0 and box.x1 <= page.x1
        assert page.y0 <= box.y0 and box.y1 <= page.y1
    for number, panel in enumerate(panels):
        assert not any(panel.overlaps(legend) for legend in legends)
        assert not any(panel.overlaps(other) for other in panels[:number])
    for ax in figure.axes:
        assert ax.get_window_extent().width > 0.1 * figure.bbox.width
        for axis in (ax.xaxis, ax.yaxis) if ax is figure.axes[0] else (ax.xaxis,):
            low, high = sorted(axis.get_view_interval())
            shown = [
                text for text, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True) if low <= at <= high
            ]
            boxes = [text.get_window_extent() for text in shown if text.get_text()]
            assert not any(one.overlaps(other) for one, other in pairwise(boxes))
            assert len({text.get_text() for text in shown}) == len(shown) or axis is ax.yaxis
            assert not any(re.search(r"\.\d*0%$", text.get_text()) for text in shown)


def test_without_a_number_there_is_no_panel():
    """A training alone has no full fine-tuning to compare with; NaN is no number."""
    columns = make(METHODS[:1], overlap=None, overlap_null=math.nan, intruders=math.nan)
    assert [ax.get_xlabel() for ax in draw_change(columns).axes] == ["effective rank"]
    columns = make(("lora", "vera"))
    columns["overlap"][1] = math.nan
    middle = draw_change(columns).axes[1]
    assert [line.get_xdata()[0] for line in middle.lines] == [columns["overlap"][0]]
    columns["learned"][1] = math.nan
    assert len(points(draw_learning(columns).axes[0])) == 1


def test_ranks_far_apart_are_on_a_logarithmic_axis():
    for ranks, scale in (((1.0, 19.0), "linear"), ((1.0, 300.0), "log"), ((0.0, 300.0), "linear")):
        columns = make(("lora", "full"))
        columns["effective_rank"] = list(ranks)
        ax = draw_change(columns).axes[0]
        assert ax.get_xscale() == scale
        assert ax.get_xlim()[0] == 0 or scale == "log"


def test_perplexities_are_drawn_turned_round():
    columns = make(("lora", "full"), metric="perplexity", kept_metric="perplexity", kept_before=-30.0)
    columns["learned"], columns["kept"] = [-12.0, -14.0], [-31.0, -40.0]
    figure = draw_learning(columns)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    assert sorted(point[3:] for point in points(ax)) == [(-14.0, -40.0), (-12.0, -31.0)]
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert all(float(text) == pytest.approx(-place) for text, place in zip(labels, ax.get_xticks(), strict=True))
    assert "reversed" in ax.get_xlabel() and "reversed" in ax.get_ylabel()


def test_labels_break_between_words_and_after_commas():
    for label in LONG:
        for width in (8, 20, 40, 100):
            lines = wrap(label, width).split("\n")
            words = max(len(piece) for piece in re.split("[ ,]", label)) + 1
            assert max(map(len, lines)) <= max(width + 1, words)
            assert re.sub(r"[ \n]", "", "".join(lines)) == label.replace(" ", "")
    assert wrap("full", 2) == "full"
