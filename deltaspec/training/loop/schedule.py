"""The learning rate of each step."""

from __future__ import annotations

import math

from deltaspec.options.training import LoopOptions


def rate_at(step: int, total: int, options: LoopOptions) -> float:
    """Return the learning rate of a step: a linear rise, then constant, a line or half a cosine down to 0.

    Parameters
    ----------
    step : int
        From 0; the first one of a warm-up over w steps has 1/w of the rate.
    total : int
        Steps of the whole training.
    options : LoopOptions
        Of which lr, warmup and schedule count.

    Examples
    --------
    >>> options = LoopOptions(lr=1.0, warmup=2, schedule="linear")
    >>> [rate_at(step, 6, options) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(round(options.warmup * total) if options.warmup < 1 else int(options.warmup), total)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    falls = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return options.lr * falls[options.schedule]
