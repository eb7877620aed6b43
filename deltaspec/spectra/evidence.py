"""What metrics are computed from."""

from __future__ import annotations

import numpy as np

from deltaspec.spectra.noise import Vector, noise_sigma
from deltaspec.types import Rounding, Spectrum

Value = float | int | bool | None


class Evidence:
    """All that metrics are computed from: a spectrum, the base's norm and the rounding of the stored delta.

    Parameters
    ----------
    spectrum : Spectrum
    base_norm : float or None
        ‖W_base‖_F; None for base and tuned spectra.
    rounding : Rounding or None
        None where no storage rounding enters the matrix: base and tuned spectra.
    unrounded : bool
        The delta comes from an adapter's own parameters, so no rounding of stored weights is in it.
    """

    def __init__(
        self,
        spectrum: Spectrum,
        *,
        base_norm: float | None = None,
        rounding: Rounding | None = None,
        unrounded: bool = False,
    ) -> None:
        self.values: Vector = spectrum.singular_values.numpy()
        self.shape = spectrum.shape
        self.error_bound = spectrum.error_bound
        self.energy = spectrum.energy
        self.norm = float(np.sqrt(spectrum.energy))
        top = float(self.values[0]) if self.values.size else 0.0
        self.zero = top == 0.0  # every rank is 0, and there is nothing to resolve
        # Relative to σ₁², so that no power of a tiny value underflows.
        self.squares: Vector = (self.values / top) ** 2 if top else np.zeros_like(self.values)
        self.sum_squares = float(self.squares.sum())
        self.base_norm, self.rounding, self.unrounded = base_norm, rounding, unrounded
        self.noise = noise_sigma(self.values, *self.shape)

    def above(self, edge: float) -> int:
        """Count the singular values above ``edge``."""
        return int((self.values > edge).sum())
