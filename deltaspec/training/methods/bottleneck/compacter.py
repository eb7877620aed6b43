"""Compacter: bottlenecks after sublayers whose matrices are sums of Kronecker products with shared small factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.errors import OptionError
from deltaspec.options.methods.bottleneck import CompacterOptions
from deltaspec.training.methods.base_weights.own import TrainedInPlace
from deltaspec.training.methods.bottleneck.placement import ACTIVATIONS, place
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, base_parameters, module_at
from deltaspec.training.sites.site import Site

SHARED = "compacter_A"


def apply_kronecker(x: Tensor, shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiply by W = Σ_i A_i ⊗ (s_i t_iᵀ) without forming it: n(d_out + d_in) + n³ multiplications a row.

    Parameters
    ----------
    x : Tensor, (…, d_in)
    shared : Tensor, (n, n, n)
        A_i along the first axis.
    left : Tensor, (n, d_out / n)
        s_i as rows.
    right : Tensor, (n, d_in / n)
        t_i as rows.

    Returns
    -------
    Tensor, (…, d_out)

    References
    ----------
    Mahabadi et al., Compacter, NeurIPS 2021, equation 5.

    Examples
    --------
    >>> import torch
    >>> shared, left, right = torch.eye(2).expand(2, 2, 2), torch.ones(2, 1), torch.ones(2, 2)
    >>> apply_kronecker(torch.tensor([1.0, 2.0, 3.0, 4.0]), shared, left, right)
    tensor([ 6., 14.])
    """
    inner = x.reshape(*x.shape[:-1], shared.shape[0], -1) @ right.T  # (…, column of A, i)
    mixed = torch.einsum("iab,...bi->...ai", shared, inner)
    return (mixed @ left).flatten(-2)


class CompacterUpdate(Update):
    """Two Kronecker layers and their biases; s of the upper one starts at zero.

    Its product is then zero and the model unchanged, yet s has a gradient, since A and t are not zero; after one step
    the other factors have theirs.
    """

    def __init__(
        self,
        site: Site,
        base: nn.Module,
        options: CompacterOptions,
        *,
        shared: nn.Parameter,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site)
        self.options, self.factors_A = options, shared
        like, n, d = base_matrix(base, site), options.factors, site.shape[0]
        r = d // options.reduction
        if not r or d % n or r % n:
            message = (
                f"--factors is {n} and --reduction {options.reduction}, but '{site.name}' is {d} wide: --factors must "
                f"divide it, and the bottleneck, {r}."
            )
            raise OptionError(message)

        def glorot(t: Tensor) -> None:
            bound = math.sqrt(6 / sum(t.shape))
            t.uniform_(-bound, bound, generator=generator)

        self.down_s, self.down_t = make_parameter((n, r // n), like, glorot), make_parameter((n, d // n), like, glorot)
        self.up_s, self.up_t = make_parameter((n, d // n), like), make_parameter((n, r // n), like, glorot)
        self.down_bias, self.up_bias = make_parameter((r,), like), make_parameter((d,), like)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · the bottleneck of y."""
        del x, base
        h = apply_kronecker(y.to(self.up_s.dtype), self.factors_A, self.down_s, self.down_t) + self.down_bias
        added = apply_kronecker(ACTIVATIONS[self.options.activation](h), self.factors_A, self.up_s, self.up_t)
        return y + (weight * (added + self.up_bias)).to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the shared factors."""
        names = ("down_s", "down_t", "down_bias", "up_s", "up_t", "up_bias")
        return {f"compacter_{name}": getattr(self, name) for name in names}

    def shared(self) -> dict[str, Tensor]:
        """Return the A_i."""
        return {SHARED: self.factors_A}


class CompacterAttachment(Attachment):
    """Compacter's updates and the base's normalisations in training."""

    def __init__(self, model: nn.Module, updates: Sequence[Update], *, name: str, options: CompacterOptions) -> None:
        super().__init__(model, updates, name=name, method="compacter", options=options)
        norms = find_norms(model) if options.norms else {}
        self.norms = TrainedInPlace(norms)
        self.hooks = _widen(model, norms)

    def enable(self, weight: float) -> None:
        """Let updates and norms act with a weight."""
        super().enable(weight)
        self.norms.enable(weight)

    def detach(self) -> None:
        """Take the updates off, and give the norms their original values back."""
        super().detach()
        self.norms.restore()
        for hook in self.hooks:
            hook.remove()

    def state(self) -> dict[str, Tensor]:
        """Return the updates, the shared factors and the norms."""
        return super().state() | {f"{PREFIX}{name}": tensor for name, tensor in self.norms.values().items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what the optimiser changes."""
        return super().trained() | {f"{PREFIX}{name}": p for name, p in self.norms.parameters.items()}

    def count_by_role(self) -> dict[str, int]:
        """Count the updates by the role of their site, and the norms."""
        counts = super().count_by_role()
        if self.norms.parameters:
            counts["norm"] = counts.pop("other")
        return counts


def find_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base's own normalisations by name."""
    modules = dict(model.named_modules())
    return {
        name: parameter
        for name, parameter in base_parameters(model).items()
        if "norm" in type(modules.get(name.rpartition(".")[0])).__name__.lower()
    }


def _widen(model: nn.Module, norms: Mapping[str, nn.Parameter]) -> list[RemovableHandle]:
    """Give narrow norms float32 values to train, and let them compute in float32 between narrow inputs and outputs."""
    narrow: dict[str, torch.dtype] = {}
    for name, parameter in norms.items():
        if parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize:
            narrow[name.rpartition(".")[0]] = parameter.dtype
            parameter.data = parameter.data.float()
    hooks: list[RemovableHandle] = []
    for path, dtype in narrow.items():
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(_widen_inputs))
        hooks.append(module.register_forward_hook(partial(_narrow_outputs, dtype=dtype)))
    return hooks


def _widen_inputs(module: nn.Module, given: tuple[object, ...]) -> tuple[object, ...]:
    del module
    return tuple(value.float() if isinstance(value, Tensor) else value for value in given)


def _narrow_outputs(module: nn.Module, given: tuple[object, ...], found: Tensor, *, dtype: torch.dtype) -> Tensor:
    del module, given
    return found.to(dtype)


def attach(
    model: nn.Module, sites: Sequence[Site], options: CompacterOptions, *, name: str, seed: int
) -> CompacterAttachment:
    """Put a Kronecker bottleneck after every site of the placement; arguments as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If no site is left, or the factors do not divide a width.
    """
    kept = place(sites, options.placement, cross=options.cross)
    generator = torch.Generator().manual_seed(seed)
    like = base_matrix(module_at(model, kept[0].path), kept[0])
    shared = make_parameter((options.factors,) * 3, like, lambda t: t.normal_(0, 0.01, generator=generator))
    updates = [
        CompacterUpdate(site, module_at(model, site.path), options, shared=shared, generator=generator) for site in kept
    ]
    return CompacterAttachment(model, updates, name=name, options=options)


METHOD = Method(
    title="Compacter",
    reference="Mahabadi et al., NeurIPS 2021, arXiv:2106.04647",
    options=CompacterOptions,
    attach=attach,
    space="activation",
    sites="o_proj,down_proj",
)
