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
"""Gauss–Legendre nodes in 0 < t < 1, half of a rule of 96: w_l to 1e-10 for |κ| ≤ 256, l ≤ 20."""

BINGHAM_DEGREE = 120
"""Degree of the quadrature behind Bingham coefficients: to 1e-9 for 0 ≤ κ ≤ 128, l ≤ 16."""


def half_rule(l_max: int, nodes: int, like: torch.Tensor
              ) -> tuple[Float[torch.Tensor, " node"], Float[torch.Tensor, "node _"]]:
    """Nodes 0 < t < 1 and the matrix 4π w_t P_l(t), l = 0, 2, … l_max, that turns values of an even
    function at the nodes into 2π ∫ f(t) P_l(t) dt over −1 ≤ t ≤ 1."""
    t, moments = _half_rule(l_max, nodes)
    return like.new_tensor(t), like.new_tensor(moments)


@lru_cache
def _half_rule(l_max, nodes):
    t, w = np.polynomial.legendre.leggauss(2 * nodes)
    t, w = t[nodes:], w[nodes:]
    return t, 4 * np.pi * w[:, None] * np.polynomial.legendre.legvander(t, l_max)[:, ::2]


def watson(axis: Float[torch.Tensor, "*batch 3"], kappa: Float[torch.Tensor, "*batch"],
           l_max: int) -> Float[torch.Tensor, "*batch _"]:
    """Watson density ∝ exp(κ (μ·n)²) about the axis μ: κ > 0 bundle, 0 isotropic, < 0 girdle."""
    t, moments = half_rule(l_max, NODES, kappa)
    zonal = torch.exp(kappa[..., None] * t**2 - kappa[..., None].clamp(min=0)) @ moments
    return sh.evaluate(l_max, axis) * sh.per_coefficient(zonal / zonal[..., :1])


def watson_density(directions: Float[torch.Tensor, "n 3"], axis: Float[torch.Tensor, "*batch 3"],
                   kappa: Float[torch.Tensor, "*batch"]) -> Float[torch.Tensor, "*batch n"]:
    """The same density itself (1/sr) along given directions: no truncation."""
    t, moments = half_rule(0, NODES, kappa)
    k, top = kappa[..., None], kappa[..., None].clamp(min=0)
    return (torch.exp(k * (axis @ directions.T) ** 2 - top)
            / (torch.exp(k * t**2 - top) @ moments))


def bingham(axes: Float[torch.Tensor, "*batch 2 3"], kappa: Float[torch.Tensor, "*batch 2"],
            l_max: int) -> Float[torch.Tensor, "*batch _"]:
    """Bingham density ∝ exp(κ1 (μ1·n)² + κ2 (μ2·n)²), μ1 ⊥ μ2: a bundle along μ1 that fans out
    towards μ2 where κ1 ≥ κ2 ≥ 0. κ2 = 0 is Watson's."""
    points, _ = sh.quadrature(BINGHAM_DEGREE)
    project = kappa.new_tensor(sh.projection(l_max, BINGHAM_DEGREE))
    return normalise(_bingham_relative(kappa.new_tensor(points), axes, kappa) @ project)


def bingham_density(directions: Float[torch.Tensor, "n 3"], axes: Float[torch.Tensor, "*batch 2 3"],
                    kappa: Float[torch.Tensor, "*batch 2"]) -> Float[torch.Tensor, "*batch n"]:
    """The same density itself (1/sr) along given directions: no truncation."""
    points, weights = map(kappa.new_tensor, sh.quadrature(BINGHAM_DEGREE))
    total = _bingham_relative(points, axes, kappa) @ weights
    return _bingham_relative(directions, axes, kappa) / total[..., None]


def _bingham_relative(n, axes, kappa):
    exponent = (kappa[..., None, :] @ (axes @ n.T) ** 2)[..., 0, :]
    return torch.exp(exponent - kappa.amax(-1, keepdim=True).clamp(min=0))


def mixture(share: Float[torch.Tensor, "*batch part"],
            odf: Float[torch.Tensor, "*batch part size"]) -> Float[torch.Tensor, "*batch size"]:
    """Σ_i share_i · ODF_i, normalised whatever the shares add up to."""
    return normalise((share[..., None, :] @ odf)[..., 0, :])


def normalise(odf: Float[torch.Tensor, "*batch size"]) -> Float[torch.Tensor, "*batch size"]:
    """Coefficients scaled to ∫ ODF dn = 1, as for densities from constrained deconvolution."""
    return odf / (odf[..., :1] * math.sqrt(4 * math.pi))


def sharpened(odf: Float[torch.Tensor, "*batch size"], power: int, l_max: int
              ) -> Float[torch.Tensor, "*batch _"]:
    """Densities ∝ odf^power, what is negative left out: less dispersed where power > 1. Exact but
    for the degrees above l_max, where power times the degree of `odf` reaches them."""
    own = sh.l_max_of(odf.shape[-1])
    points, _ = sh.quadrature(degree := power * own + l_max)
    values = odf @ odf.new_tensor(sh.basis(own, points)).T
    return normalise(values.clamp(min=0) ** power @ odf.new_tensor(sh.projection(l_max, degree)))


def crossing(axis: Float[torch.Tensor, "*batch 3"], angle: Float[torch.Tensor, "*batch"],
             azimuth: Float[torch.Tensor, "*batch"]) -> Float[torch.Tensor, "*batch 3"]:
    """Axes at `angle` (radian) from the given ones, turned about them by `azimuth` (radian)."""
    # the coordinate axis least aligned with `axis` gives a frame without degenerate cases
    least = torch.nn.functional.one_hot(axis.abs().argmin(-1), 3).to(axis.dtype)
    u = torch.nn.functional.normalize(torch.linalg.cross(axis, least), dim=-1)
    side = torch.cos(azimuth)[..., None] * u
    side = side + torch.sin(azimuth)[..., None] * torch.linalg.cross(axis, u)
    return torch.cos(angle)[..., None] * axis + torch.sin(angle)[..., None] * side


def random_rotations(n: int, generator: torch.Generator) -> Float[torch.Tensor, "n 3 3"]:
    """Rotations uniform over SO(3) (unit quaternions uniform on the 3-sphere), float64, on the
    generator's device. Their columns are axes uniform on the sphere."""
    q = torch.randn(n, 4, generator=generator, device=generator.device, dtype=torch.float64)
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).reshape(n, 3, 3)
