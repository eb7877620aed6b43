"""Where a method acts; how a model is trained, and on what."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltaspec.errors import OptionError

DEPTHS = re.compile(r"-?[0-9]+(?::-?[0-9]*|-[0-9]+)?|:-?[0-9]+")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Which matrices a method changes.

    Parameters
    ----------
    targets : str
        ``all`` (every linear layer of the blocks), ``attention``, ``mlp``, or a comma-separated list of these, of
        roles (q_proj, v_proj, embed, lm_head, …) and of module names (query, c_attn); else a regular expression that
        matches module paths whole. Empty takes the method's own.
    depths : str
        Blocks by index: ``0-5,11``, negative from the end (``-4:`` are the last four); empty takes all.
    split : bool
        Parts of fused matrices (c_attn, qkv_proj, gate_up_proj) one by one, even where all are meant.
    """

    targets: str = ""
    depths: str = ""
    split: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        for piece in filter(None, self.depths.split(",")):
            if not DEPTHS.fullmatch(piece.strip()):
                message = f"--depths has '{piece}': expected block indices such as 0-5,11 or -4: ."
                raise OptionError(message)
