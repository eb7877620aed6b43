"""LoRA-XS: ΔW = B R A, where B = U_r S_r and A = V_rᵀ are the base's own top directions, frozen, and R is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import CheckpointError, NumericalError
from deltaspec.linalg.signs import fix_signs
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.truncated import truncate
from deltaspec.options.methods.shared_factors import LoraXsOptions
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Method, fill, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, check_ranks, module_at
from deltaspec.training.sites.site import Site

FROZEN = (".lora_xs_A", ".lora_xs_B")


class LoraXsUpdate(Update):
    """R (r, r) of one site, zero at the start, between A (r, d_in) and B (d_out, r)."""

    def __init__(self, site: Site, base: nn.Module, options: LoraXsOptions) -> None:
        super().__init__(site)
        self.dropout = options.dropout
        weight, r = base_matrix(base, site), options.rank
        self.R = make_parameter((r, r), weight)
        if weight.is_meta:
            pair = weight.new_empty(r, site.shape[1]), weight.new_empty(site.shape[0], r)
        else:
            pair = top_directions(weight.detach(), r, name=site.name)
        self.A, self.B = (nn.Parameter(factor.to(weight.device).float(), requires_grad=False) for factor in pair)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · B R A x, one factor after the other."""
        if self.site.kind == "embedding":
            scale = getattr(base, "embed_scale", 1.0)  # Gemma's embeddings multiply what they look up
            h = F.dropout(F.embedding(x, self.B), self.dropout, self.training) * scale
            return y + F.linear(F.linear(h, self.R.T * weight), self.A.T).to(y.dtype)
        h = F.linear(F.dropout(x.to(self.R.dtype), self.dropout, self.training), self.A)
        return y + F.linear(F.linear(h, self.R * weight), self.B).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return R A and B."""
        return self.R @ self.A, self.B

    def tensors(self) -> dict[str, Tensor]:
        """Return all three."""
        return {"lora_xs_R": self.R, FROZEN[0][1:]: self.A, FROZEN[1][1:]: self.B}


def top_directions(weight: Tensor, rank: int, *, name: str) -> tuple[Tensor, Tensor]:
    """Compute A = V_rᵀ and B = U_r S_r of the best approximation W ≈ B A, in float64.

    Parameters
    ----------
    weight : Tensor, (d_out, d_in)
    rank : int
        Directions beyond the matrix's own rank are zero.
    name : str
        For the error.

    Returns
    -------
    Tensor, (rank, d_in), orthonormal rows, and Tensor, (d_out, rank), orthogonal columns, float64

    Raises
    ------
    CheckpointError
        If the weight holds NaN or infinity.

    References
    ----------
    Bałazy et al., LoRA-XS, 2024, section 3.

    Examples
    --------
    >>> import torch
    >>> lora_A, lora_B = top_directions(torch.diag(torch.tensor([1.0, 5.0])), 1, name="weight")
    >>> (lora_B @ lora_A).round(decimals=6) + 0
    tensor([[0., 0.],
            [0., 5.]], dtype=torch.float64)
    """
    try:
        shape = (weight.shape[0], weight.shape[1])
        found = truncate(Streamed(lambda: iter([weight.double()]), shape, weight.device), rank=rank)
    except NumericalError as cause:
        message = f"Cannot decompose '{name}' of the base for LoRA-XS: {cause} Take another base, or leave it out."
        raise CheckpointError(message) from cause
    left, right = fix_signs(found.left * found.singular_values, found.right)
    missing = rank - right.shape[1]
    return F.pad(right.T, (0, 0, 0, missing)), F.pad(left, (0, missing))


class LoraXsAttachment(Attachment):
    """LoRA-XS, whose projections need not be stored."""

    options: LoraXsOptions

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; projections that are not among them stay as the base gave them."""
        computed = () if any(name.endswith(FROZEN) for name in tensors) else FROZEN
        fill({name: tensor for name, tensor in self.state().items() if not name.endswith(computed)}, tensors)

    def released(self) -> dict[str, Tensor]:
        """Return every R, and the projections where they are to be saved."""
        left = () if self.options.save_projection else FROZEN
        return {name: tensor for name, tensor in self.state().items() if not name.endswith(left)}

    def stored(self) -> int:
        """Count what a released adapter holds, projections included where they are saved."""
        return sum(tensor.numel() for tensor in self.released().values())


def attach(model: nn.Module, sites: Sequence[Site], options: LoraXsOptions, *, name: str, seed: int) -> Attachment:
    """Put LoRA-XS at every site; nothing is random.

    Arguments are as of every method's attach, see Method.

    Raises
    ------
    CheckpointError
        If a weight holds NaN or infinity.
    OptionError
        If the rank exceeds a site's sides.
    """
    del seed
    check_ranks(sites, options.rank)
    updates = [LoraXsUpdate(site, module_at(model, site.path), options) for site in sites]
    return LoraXsAttachment(model, updates, name=name, method="lora_xs", options=options)


METHOD = Method(
    title="LoRA-XS",
    reference="Bałazy et al., 2024, arXiv:2405.17604",
    options=LoraXsOptions,
    attach=attach,
)
