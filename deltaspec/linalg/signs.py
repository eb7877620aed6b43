"""The sign convention of singular vectors."""

from __future__ import annotations

from torch import Tensor


def fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each pair of vectors so that the right one's largest component by magnitude is positive.

    Parameters
    ----------
    left : Tensor, (d_out, k)
    right : Tensor, (d_in, k)
    """
    if right.shape[1] == 0:
        return left, right
    top = right.gather(0, right.abs().argmax(dim=0, keepdim=True))
    sign = top.sign()
    return left * sign, right * sign
