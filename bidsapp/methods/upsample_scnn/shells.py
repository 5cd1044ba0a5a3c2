"""Fits of shells with the expected size of coefficients as prior, the input of the network.

The coefficients c of S/S0 on a shell are estimated from the signals y along its directions by the
posterior mean for normally distributed coefficients of mean 0 and variance P_l(b) and noise of
variance σ²/FEWER,

    c = (BᵀB + σ²/FEWER diag(1/P_l))⁻¹ Bᵀ y,    no prior for l = 0,

up to degree 8 for any number of directions: degrees that the directions do not determine become
small, but nothing that was measured is left out. The network averages over neighbours, hence the
smaller noise. P_l is that of a bundle of the two-compartment model (REFERENCE). Coefficients are
then divided by √P_l, so that all are near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from bidsapp import sh
from bidsapp.networks.upsampling import Shells
from bidsapp.simulate import forward, odf
from bidsapp.simulate.protocols import L_FIT, Protocols

REFERENCE = (2.0, 0.6, 16.0)
"""Diffusivity (µm²/ms), neurite fraction and κ of the bundle that gives P_l."""

MIN_POWER = 1e-8
"""Smallest P_l."""

FEWER = 4.0
"""Factor by which averaging over neighbours is assumed to lower the variance of the noise."""

MIN_PRIOR = 1e-3
"""Smallest weight of the prior relative to BᵀB, so that uneven directions can be fitted."""

SAME_LOG_B, NEAR_LOG_B = 0.03, 0.15
"""Differences of log b up to which a shell counts as that of the query, and up to which it matters
much for a first estimate."""

PROPERTIES = 14
"""Number of properties of a shell: whether it is present; log b, absolute and relative to that of
the query; whether it is the query; the share of a coefficient of degree 2, 4, 6 and 8 that the fit
keeps; the logarithm of the noise of the coefficients of degree 0, 2, … 8; and whether the noise is
Rician."""


@dataclass(frozen=True)
class ShellFits:
    """Fits of the shells of each group, and what the network needs to know of them.

    Parameters
    ----------
    matrix : (group, shell, 45, direction) tensor
        From S/S0 to normalised coefficients.
    shells : Shells
    scale : (group, 45) tensor
        From normalised coefficients of the query to those of S/S0.
    remainder : (group, shell, direction, direction) tensor
        From S/S0 to the part that the fits leave, divided by the root of its mean square for noise
        of variance 1, over all shells.
    """

    matrix: Float[torch.Tensor, "group shell 45 direction"]
    shells: Shells
    scale: Float[torch.Tensor, "group 45"]
    remainder: Float[torch.Tensor, "group shell direction direction"]


def power(b: Float[torch.Tensor, "*batch"]) -> Float[torch.Tensor, "*batch degree"]:
    """Compute P_l, the mean square of each coefficient of S/S0 in the reference bundle.

    Parameters
    ----------
    b : (…) tensor
        b-values of linear encoding, ms/µm².

    Returns
    -------
    (…, degree) tensor
        P_l of the degrees 0, 2, … 8.
    """
    d, f, kappa = (b.new_tensor([v]) for v in REFERENCE)
    k = forward.kernel(forward.two_compartments(d, f), 1000 * b.reshape(1, -1),
                       torch.ones(1, b.numel()).to(b), L_FIT)[0]
    t, moments = odf.half_rule(L_FIT, odf.NODES, b)
    zonal = torch.exp(kappa * (t**2 - 1)) @ moments
    squares = (k * zonal / zonal[0]).square() / (4 * math.pi)
    return squares.clamp(min=MIN_POWER).view(*b.shape, -1)


def fit_shells(protocols: Protocols, query: Float[torch.Tensor, " group"],
               sigma: Float[torch.Tensor, " group"], magnitude: Bool[torch.Tensor, " group"]
               ) -> ShellFits:
    """Fit the shells of protocols for the prediction of one shell of each.

    Parameters
    ----------
    protocols : Protocols
        Shells of linear encoding. The basis has a degree of 8 or more.
    query : (group,) tensor
        b-value of the shell to predict, ms/µm².
    sigma : (group,) tensor
        Typical σ/S0.
    magnitude : (group,) bool tensor
        Whether the noise is Rician.

    Returns
    -------
    ShellFits
    """
    dtype = protocols.b.dtype
    b, query, sigma = protocols.b.double(), query.double(), sigma.double()
    present = (protocols.count > 0).double()
    design = protocols.basis[..., :sh.size(L_FIT)].double()
    size = power(b)
    prior = sh.per_coefficient(sigma.square()[:, None, None] / FEWER / size)
    floor = MIN_PRIOR * protocols.count.double().clamp(min=1)[..., None] / (4 * math.pi)
    prior = torch.maximum(prior, floor)
    prior[..., 0] = 0
    normal = design.mT @ design + torch.diag_embed(prior)
    normal[..., 0, 0] += 1 - present
    fit = torch.linalg.solve(normal, design.mT)
    response = _degree_sums((fit @ design).diagonal(dim1=-2, dim2=-1))
    inside = design.square().sum(-1, keepdim=True) > 0
    remainder = (torch.eye(design.shape[2]).to(design) - design @ fit) * inside
    expected = remainder.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-9)
    response = response / (4 * torch.arange(L_FIT // 2 + 1).to(response) + 1)
    fit = fit / sh.per_coefficient(size.sqrt())[..., None]
    variance = _degree_sums(fit.square().sum(-1)) * present[..., None]
    away = b.log() - query.log()[:, None]
    near = torch.exp(-(away / NEAR_LOG_B).square() / 2) * present
    # far from all shells the nearest one counts, as if it were near
    nearest = torch.zeros_like(near).scatter(1, torch.where(
        present > 0, away.abs(), math.inf).argmin(1, keepdim=True), 1.0)
    near = near + 1e-3 * nearest
    properties = torch.cat([
        present[..., None], b.log()[..., None], away.clamp(-2.5, 2.5)[..., None],
        torch.exp(-(away / SAME_LOG_B).square() / 2)[..., None], response[..., 1:],
        ((variance * sigma.square()[:, None, None]) + 1e-4).log() / 3,
        magnitude[:, None, None].expand_as(b[..., None])], -1) * present[..., None]
    shells = Shells(*(v.to(dtype) for v in (
        properties, near / near.sum(1, keepdim=True), variance)))
    scale = sh.per_coefficient(power(query).sqrt())
    return ShellFits(fit.to(dtype), shells, scale.to(dtype),
                     (remainder / expected.sqrt()).to(dtype))


def _degree_sums(values: Float[torch.Tensor, "*batch 45"]) -> Float[torch.Tensor, "*batch degree"]:
    """Sum over the coefficients of each degree."""
    parts = values.split([4 * i + 1 for i in range(L_FIT // 2 + 1)], -1)
    return torch.stack([part.sum(-1) for part in parts], -1)
