"""Fibre orientation densities with known truth, as spherical-harmonic coefficients.

A density w(n) on the sphere, antipodally symmetric and with ∫ w dn = 1, is given by coefficients
in the basis of `bidsapp.sh`; normalised means c_00 = 1/√(4π). A zonal density w(n·μ) has, by
Funk–Hecke, the coefficients

    c_lm = w_l Y_lm(μ),    w_l = 2π ∫ w(t) P_l(t) dt  over −1 ≤ t ≤ 1,    w_0 = 1.

Axes and directions are unit vectors in the frame of the b-table (world RAS+).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float

from bidsapp import sh

NODES = 48
"""Gauss–Legendre nodes in 0 < t < 1, half of a rule of 96 nodes. The error of w_l is below 1e-10
for |κ| ≤ 256 and l ≤ 20."""

BINGHAM_DEGREE = 120
"""Degree of the quadrature of Bingham coefficients. Their error is below 1e-9 for 0 ≤ κ ≤ 128 and
l ≤ 16."""


def half_rule(l_max: int, nodes: int, like: torch.Tensor
              ) -> tuple[Float[torch.Tensor, " node"], Float[torch.Tensor, "node _"]]:
    """Compute a Gauss–Legendre rule for the Legendre moments of even functions.

    Parameters
    ----------
    l_max : int
        Highest (even) degree.
    nodes : int
        Number of nodes in 0 < t < 1.
    like : tensor
        Tensor whose dtype and device are used.

    Returns
    -------
    t : (node,) tensor
        Nodes, 0 < t < 1.
    moments : (node, degree) tensor
        4π w_t P_l(t), l = 0, 2, … l_max. f(t) @ moments is 2π ∫ f(t) P_l(t) dt over −1 ≤ t ≤ 1.
    """
    t, moments = _half_rule(l_max, nodes)
    return like.new_tensor(t), like.new_tensor(moments)


@lru_cache
def _half_rule(l_max, nodes):
    t, w = np.polynomial.legendre.leggauss(2 * nodes)
    t, w = t[nodes:], w[nodes:]
    return t, 4 * np.pi * w[:, None] * np.polynomial.legendre.legvander(t, l_max)[:, ::2]


def watson(axis: Float[torch.Tensor, "*batch 3"], kappa: Float[torch.Tensor, "*batch"],
           l_max: int) -> Float[torch.Tensor, "*batch _"]:
    """Compute coefficients of Watson densities ∝ exp(κ (μ·n)²) about axes μ.

    κ > 0 gives a bundle, κ = 0 an isotropic density and κ < 0 a girdle.
    """
    t, moments = half_rule(l_max, NODES, kappa)
    zonal = torch.exp(kappa[..., None] * t**2 - kappa[..., None].clamp(min=0)) @ moments
    return sh.evaluate(l_max, axis) * sh.per_coefficient(zonal / zonal[..., :1])


def watson_density(directions: Float[torch.Tensor, "n 3"], axis: Float[torch.Tensor, "*batch 3"],
                   kappa: Float[torch.Tensor, "*batch"]) -> Float[torch.Tensor, "*batch n"]:
    """Evaluate Watson densities (1/sr) along directions, without truncation."""
    t, moments = half_rule(0, NODES, kappa)
    k, top = kappa[..., None], kappa[..., None].clamp(min=0)
    return (torch.exp(k * (axis @ directions.T) ** 2 - top)
            / (torch.exp(k * t**2 - top) @ moments))


def bingham(axes: Float[torch.Tensor, "*batch 2 3"], kappa: Float[torch.Tensor, "*batch 2"],
            l_max: int) -> Float[torch.Tensor, "*batch _"]:
    """Compute coefficients of Bingham densities ∝ exp(κ1 (μ1·n)² + κ2 (μ2·n)²), μ1 ⊥ μ2.

    With κ1 ≥ κ2 ≥ 0 this is a bundle along μ1 that fans out towards μ2; κ2 = 0 is a Watson density.
    """
    points, _ = sh.quadrature(BINGHAM_DEGREE)
    project = kappa.new_tensor(sh.projection(l_max, BINGHAM_DEGREE))
    return normalise(_bingham_relative(kappa.new_tensor(points), axes, kappa) @ project)


def bingham_density(directions: Float[torch.Tensor, "n 3"], axes: Float[torch.Tensor, "*batch 2 3"],
                    kappa: Float[torch.Tensor, "*batch 2"]) -> Float[torch.Tensor, "*batch n"]:
    """Evaluate Bingham densities (1/sr) along directions, without truncation."""
    points, weights = map(kappa.new_tensor, sh.quadrature(BINGHAM_DEGREE))
    total = _bingham_relative(points, axes, kappa) @ weights
    return _bingham_relative(directions, axes, kappa) / total[..., None]


def _bingham_relative(n, axes, kappa):
    exponent = (kappa[..., None, :] @ (axes @ n.T) ** 2)[..., 0, :]
    return torch.exp(exponent - kappa.amax(-1, keepdim=True).clamp(min=0))


def mixture(share: Float[torch.Tensor, "*batch part"],
            odf: Float[torch.Tensor, "*batch part size"]) -> Float[torch.Tensor, "*batch size"]:
    """Mix ODFs: Σ_i share_i ODF_i, normalised, so that the shares need not add up to 1."""
    return normalise((share[..., None, :] @ odf)[..., 0, :])


def normalise(odf: Float[torch.Tensor, "*batch size"]) -> Float[torch.Tensor, "*batch size"]:
    """Scale coefficients to ∫ ODF dn = 1."""
    return odf / (odf[..., :1] * math.sqrt(4 * math.pi))


def sharpen(odf: Float[torch.Tensor, "*batch size"], power: int, l_max: int
              ) -> Float[torch.Tensor, "*batch _"]:
    """Sharpen densities: the result is ∝ max(odf, 0)^power, less dispersed if power > 1.

    Parameters
    ----------
    odf : (…, size) tensor
        Coefficients.
    power : int
    l_max : int
        Degree of the result. Higher degrees, up to power times that of `odf`, are truncated.

    Returns
    -------
    (…, size(l_max)) tensor
        Normalised coefficients.
    """
    degree_in = sh.l_max_of(odf.shape[-1])
    points, _ = sh.quadrature(degree := power * degree_in + l_max)
    values = odf @ odf.new_tensor(sh.basis(degree_in, points)).T
    return normalise(values.clamp(min=0) ** power @ odf.new_tensor(sh.projection(l_max, degree)))


def crossing(axis: Float[torch.Tensor, "*batch 3"], angle: Float[torch.Tensor, "*batch"],
             azimuth: Float[torch.Tensor, "*batch"]) -> Float[torch.Tensor, "*batch 3"]:
    """Compute axes that cross the given ones at `angle`, with `azimuth` about them (radian)."""
    # the coordinate axis least aligned with `axis` avoids degenerate cases
    least = torch.nn.functional.one_hot(axis.abs().argmin(-1), 3).to(axis.dtype)
    u = torch.nn.functional.normalize(torch.linalg.cross(axis, least), dim=-1)
    perpendicular = torch.cos(azimuth)[..., None] * u
    perpendicular = perpendicular + torch.sin(azimuth)[..., None] * torch.linalg.cross(axis, u)
    return torch.cos(angle)[..., None] * axis + torch.sin(angle)[..., None] * perpendicular


def random_rotations(n: int, generator: torch.Generator) -> Float[torch.Tensor, "n 3 3"]:
    """Draw rotations uniformly over SO(3).

    Unit quaternions are uniform on the 3-sphere; the columns of the matrices are uniform on the
    sphere.

    Parameters
    ----------
    n : int
    generator : torch.Generator
        Its device is used.

    Returns
    -------
    (n, 3, 3) tensor
        float64.
    """
    q = torch.randn(n, 4, generator=generator, device=generator.device, dtype=torch.float64)
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).reshape(n, 3, 3)
