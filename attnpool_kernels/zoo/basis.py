"""Bases of distances and angles: Gaussians (SchNet, PaiNN), Bessel functions (DimeNet)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussians(distance: Tensor, centres: Tensor, coefficient: float | Tensor) -> Tensor:
    """[..., G]: exp(coefficient · (d - centre)²), with the libraries' numbers.

    Exponents end at -60. Between -87 and -103 float32 has denormal numbers, and a few of them in a
    matrix make a CPU's matrix products ten times slower; what lies below 1e-26 changes no sum.
    """
    exponents = coefficient * (distance[..., None] - centres).square()
    return exponents.clamp(min=-60.0).exp()


def gaussians_and_slopes(distance: Tensor, centres: Tensor, coefficient: float | Tensor) -> Tensor:
    """[2E, G]: ``gaussians`` of distances [E], and below them the derivatives by the distance."""
    away = distance[:, None] - centres
    values = (coefficient * away.square()).clamp_(min=-60.0).exp_()
    return torch.cat([values, away.mul_(2 * coefficient).mul_(values)])


class GaussianSmearing(torch.nn.Module):
    """PyG's GaussianSmearing through ``gaussians``; the same buffer."""

    offset: Tensor

    def __init__(self, num_gaussians: int, cutoff: float) -> None:
        super().__init__()
        offset = torch.linspace(0.0, cutoff, num_gaussians)
        self.coeff = -0.5 / (offset[1] - offset[0]).item() ** 2
        self.register_buffer("offset", offset)

    def forward(self, distance: Tensor) -> Tensor:
        return gaussians(distance, self.offset, self.coeff)

    def with_slopes(self, distance: Tensor) -> Tensor:
        return gaussians_and_slopes(distance, self.offset, self.coeff)


class GaussianRBF(torch.nn.Module):
    """SchNetPack's GaussianRBF through ``gaussians``; the same buffers."""

    widths: Tensor
    offsets: Tensor

    def __init__(self, n_rbf: int, cutoff: float) -> None:
        super().__init__()
        self.n_rbf = n_rbf
        offsets = torch.linspace(0.0, cutoff, n_rbf)
        self.register_buffer("widths", (offsets[1] - offsets[0]).expand(n_rbf).clone())
        self.register_buffer("offsets", offsets)

    def forward(self, distance: Tensor) -> Tensor:
        return gaussians(distance, self.offsets, -0.5 / self.widths**2)

    def with_slopes(self, distance: Tensor) -> Tensor:
        return gaussians_and_slopes(distance, self.offsets, -0.5 / self.widths**2)


class SphericalBasis(torch.nn.Module):
    r"""The two-dimensional basis of DimeNet, with the numbers of PyG's SphericalBasisLayer.

    ::

        b_ln(d, θ) = envelope(d) · N_ln j_l(z_ln d) · Y_l0(θ)      l < num_spherical, n < num_radial

    z_ln: zeros of the spherical Bessel functions j_l; N_ln = (j_{l+1}(z_ln)² / 2)^(-1/2);
    Y_l0 = sqrt((2l + 1) / 4π) P_l(cos θ). PyG derives 42 formulas with sympy each time a model is
    made (seconds), which cannot be pickled, and evaluates them at θ = atan2(|a × b|, a·b), whose
    second derivative is NaN for atoms in a line. Here j_l and P_l come from their recurrences, and
    P_l is a polynomial of the cosine, smooth everywhere.

    The constants are no part of a state dict. They are kept in float64, and every change of the
    dtype or the device rounds them anew: a module has the same ones whatever it has been before.
    """

    zeros: Tensor  # [L, N]
    norms: Tensor  # [L, N]

    def __init__(self, num_spherical: int, num_radial: int, envelope: torch.nn.Module) -> None:
        super().__init__()
        from torch_geometric.nn.models.dimenet_utils import Jn, Jn_zeros

        zeros = Jn_zeros(num_spherical, num_radial)
        norms = [(0.5 * Jn(row, l + 1) ** 2) ** -0.5 for l, row in enumerate(zeros)]
        self.envelope = envelope
        self._exact: dict[str, list[list[float]]] = {}
        for name, rows in (("zeros", zeros), ("norms", norms)):
            self._exact[name] = [[float(x) for x in row] for row in rows]
            self.register_buffer(name, torch.tensor(self._exact[name]), persistent=False)

    def _apply(self, fn, recurse=True):
        before = self.norms.dtype, self.norms.device
        super()._apply(fn, recurse)
        dtype, device = self.norms.dtype, self.norms.device
        if (dtype, device) != before:
            for name, rows in self._exact.items():
                setattr(self, name, torch.tensor(rows, dtype=dtype, device=device))
        return self

    def forward(self, distance: Tensor, cosine: Tensor, idx_kj: Tensor) -> Tensor:
        """[T, L·N] from distances [E] in units of the cutoff, cosines [T] and the edge of each."""
        norms = self.norms.to(distance.dtype)  # weights may be given another dtype without it
        radial = self.envelope(distance)[:, None, None] * norms * self._bessel(distance)
        return (radial[idx_kj] * self._legendre(cosine)[:, :, None]).flatten(1)

    def _bessel(self, distance: Tensor) -> Tensor:
        """[E, L, N]: j_l(z_ln d) by j_{l+1}(x) = (2l + 1) / x · j_l(x) - j_{l-1}(x)."""
        rows = []
        for l, zeros in enumerate(self.zeros.to(distance.dtype)):
            x = distance[:, None] * zeros
            below, this = x.cos() / x, x.sin() / x  # j_-1, j_0
            for k in range(l):
                below, this = this, (2 * k + 1) / x * this - below
            rows.append(this)
        return torch.stack(rows, 1)

    def _legendre(self, x: Tensor) -> Tensor:
        """[T, L]: sqrt((2l + 1) / 4π) P_l(x) by (l + 1) P_{l+1} = (2l + 1) x P_l - l P_{l-1}."""
        rows = [torch.ones_like(x), x]
        for l in range(1, len(self.zeros) - 1):
            rows.append(((2 * l + 1) * x * rows[l] - l * rows[l - 1]) / (l + 1))
        factors = [((2 * l + 1) / (4 * math.pi)) ** 0.5 for l in range(len(self.zeros))]
        return torch.stack(rows, 1) * x.new_tensor(factors)
