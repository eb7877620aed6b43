"""view_matrix: reading order, no copies, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaspec.architecture.views import alternating_parts, attention_parts, equal_parts, view_matrix, whole
from deltaspec.errors import CheckpointError
from deltaspec.types import View


def test_reading_order() -> None:
    stored = torch.arange(2 * 5 * 6).reshape(2, 5, 6)
    view = View((4, 5), expert=1, transposed=True, groups=2, start=1, stop=3)
    rows = stored.numpy()[1].T
    expected = rows[[1, 2, 4, 5]]
    assert view_matrix(stored, view).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    "view",
    [
        whole((6, 4)),
        whole((6, 4), transposed=True),
        equal_parts(whole((6, 4)), 3)[1],
        alternating_parts(whole((6, 4)), 2)[1],
    ],
)
def test_no_copy_where_strides_allow(view: View) -> None:
    stored = torch.zeros(6, 4)
    view_matrix(stored, view).fill_(1)
    assert int(stored.sum()) == view.shape[0] * view.shape[1]


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((6,), View((6, 1))),
        ((), View((1, 1))),
        ((6, 4), View((6, 5))),
        ((6, 4), View((4, 6))),
        ((6, 4), View((6, 4), groups=4)),
        ((6, 4), View((6, 4), groups=0)),
        ((6, 4), View((3, 4), start=4, stop=7)),
        ((6, 4), View((3, 4), start=-3)),
        ((2, 6, 4), View((6, 4), expert=2)),
        ((2, 6, 4), View((6, 4), expert=-1)),
        ((6, 4), View((6, 4), expert=0)),
        ((), View((6, 4), expert=0)),
    ],
)
def test_a_view_that_does_not_fit_is_refused(shape: tuple[int, ...], view: View) -> None:
    with pytest.raises(CheckpointError, match=r"expected one that fits .* found shape"):
        view_matrix(torch.zeros(shape), view)


def test_parts_that_do_not_add_up_are_none() -> None:
    assert equal_parts(whole((7, 4)), 2) == ()
    assert alternating_parts(whole((7, 4)), 2) == ()
    assert attention_parts(whole((48, 24)), (4, 2, 5), grouped=False) == ()
    assert attention_parts(whole((42, 24)), (3, 2, 6), grouped=True) == ()


@pytest.mark.parametrize(
    ("view", "height"),
    [
        (View((6, 3)), 6),
        (View((4, 3), start=2), 6),
        (View((2, 3), start=1, stop=3), 6),
        (View((6, 3), groups=3, start=2, stop=4), 18),
        (View((9, 3), groups=3, start=3), 18),
    ],
)
def test_rows_of_a_part(view: View, height: int) -> None:
    wanted = np.arange(height).reshape(view.groups, -1)[:, view.start : view.stop].ravel()
    rows = torch.arange(height)
    assert view.take(rows).tolist() == wanted.tolist()
    assert view.take(rows.expand(2, 5, height), axis=-1)[1, 4].tolist() == wanted.tolist()
    assert len(wanted) == view.shape[0]
