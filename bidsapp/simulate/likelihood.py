"""Likelihood of tissue parameters, marginalised over the fibre density, and hints computed from it.

A hint is a first estimate of the parameters with its covariance, an input of the networks.

With S_lm,s = k_l(θ, s) w_lm + noise and w_lm ~ N(0, C_l), the unknown density is integrated out.
For each degree, with y_s = S_lm,s/ν_s, κ_s = k_l,s/ν_s and ν_s = σ √(4π/n_s) the noise of a
coefficient,

    y ~ N(0, I + C κ κᵀ):   2 log L = Σ_m [C (κ·y)²/a − |y|²] − (2l + 1) log a,  a = 1 + C |κ|²,

so the products Σ_m y_s y_t of shells s and t are sufficient statistics (`gram`). Densities differ
in power: C_l takes one of several values with equal probability, and L is the mean over them. The
means over the sphere (degree 0) do not depend on the density. They share the noise of the mean b0,
so that in units of their own noise their covariance is I + q qᵀ, with q the SD that this b0 causes.

With two parameters, the mean and covariance of θ under a uniform prior are sums over a lattice:
first over the whole range, then four times over points within 2.5 SD of the previous mean. With
more parameters, damped Fisher scoring finds the maximum of L for a single C_l. Both treat all
voxels at once.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float

from bidsapp import sh
from bidsapp.simulate import forward
from bidsapp.simulate.tissue import TissueModel

L_MAX = 8
"""Highest degree of the coefficients."""

NODES = 10
"""Nodes of the kernel's quadrature; its error is below 3e-8 for b · d from −7.5 to 15."""

ROUNDING = 1e-5
"""Share of its range by which a parameter may lie beyond a bound and still count: float32 rounds a
point at the bound to either side."""

LATTICE, REFINED, WITHIN = 12, 8, 2.5
"""Points per parameter of the first lattice and of later ones; half width of a later one in SDs."""

ROUNDS = 4
"""Number of later lattices."""

MIN_POINTS = 4.0
"""Minimum effective number of lattice points, 1/Σ weight² (Kish). On a lattice that is too coarse
for L, a single point would have all of the weight; L is then flattened, except on the last lattice.
Hints depend on the constants of this module: networks must be trained again if one changes."""

STEPS = 6
"""Steps of Fisher scoring."""

DIFFERENCE = 1e-3
"""Step of the numerical derivative of the kernel, relative to a parameter's range."""


def needs_search(tissue: TissueModel) -> bool:
    """Tell whether a model has too many parameters for a lattice, so that L is maximised
    instead."""
    return len(tissue.names) > 2


class Likelihood:
    """Log likelihood of tissue parameters, and its derivatives.

    Parameters
    ----------
    tissue : TissueModel
    power : (case, degree) tensor
        Powers (C_2, C_4, …) of the densities; each row has the same probability.
    x : (coefficient, voxel, shell) tensor
        Fitted coefficients of S/S0, voxels group by group (`Protocols.fit_signals`).
    noise : (voxel, 2) tensor
        σ/S0 of one measurement and of the mean b0.
    shells : (group, shell, 3) tensor
        b (ms/µm²), b_delta and 1/√directions (`Protocols.shells`).
    """

    def __init__(self, tissue: TissueModel, power: Float[torch.Tensor, "case degree"],
                 x: Float[torch.Tensor, "coef voxel shell"], noise: Float[torch.Tensor, "voxel 2"],
                 shells: Float[torch.Tensor, "group shell 3"]) -> None:
        self.tissue, self.power, self.shells = tissue, power, shells
        scale = shells[..., 2].repeat_interleave(x.shape[1] // len(shells), 0)
        self.weight = (scale > 0) / (noise[:, :1] * scale.clamp(min=1e-3))  # 1/SD of a mean
        self.mean = x[0] * self.weight / math.sqrt(4 * math.pi)
        self.b0_noise = noise[:, 1:]
        self.gram, self.scale = [], []
        for l in range(2, L_MAX + 1, 2):
            part = x[sh.size(l - 2):sh.size(l)].movedim(0, 1)
            self.scale.append(self.weight / math.sqrt(4 * math.pi) * (part != 0).any(1))  # 1/ν
            y = part * self.scale[-1][:, None]
            self.gram.append(y.mT @ y)
        self.low, self.high = x.new_tensor(tissue.ranges).T

    def kernel(self, points: Float[torch.Tensor, "part point n"]
               ) -> Float[torch.Tensor, "part point shell 5"]:
        """Compute the kernels k_l at parameters `points`, l = 0, 2, … 8.

        A part is a voxel, or a group of voxels that share the points.
        """
        each = self.shells.repeat_interleave(
            len(points) // len(self.shells), 0).repeat_interleave(points.shape[1], 0)
        theta = points.flatten(0, 1)
        parts = self.tissue.compartments(theta)
        if self.tissue.aligned is not None:  # approximated as dispersed, since the axis is unknown
            parts = parts + self.tissue.aligned(theta)
        return forward.kernel(parts, 1000 * each[..., 0], each[..., 1], L_MAX, NODES).unflatten(
            0, points.shape[:2])

    def value(self, k: Float[torch.Tensor, "part point shell 5"]
              ) -> Float[torch.Tensor, "voxel point"]:
        """Compute log L, up to a constant, from the kernels that `kernel` returns."""
        def split(v: torch.Tensor) -> torch.Tensor:
            return v.unflatten(0, (len(k), -1))

        p = k[:, None, ..., 0] / (4 * math.pi) * split(self.weight)[:, :, None]
        r, q = split(self.mean)[:, :, None] - p, split(self.b0_noise)[:, :, None] * p
        one = 1 + (q * q).sum(-1)  # |I + q qᵀ|; its inverse is I − q qᵀ / one
        total = ((r * q).sum(-1) ** 2 / one - (r * r).sum(-1) - one.log()) / 2
        for i, (gram, scale) in enumerate(zip(self.gram, self.scale, strict=True)):
            k_l = k[..., i + 1]
            scaled = (gram * scale[:, :, None] * scale[:, None]).flatten(1)
            along = split(scaled) @ (k_l[..., None] * k_l[..., None, :]).flatten(2).mT  # Σ_m (κ·y)²
            length = split(scale * scale) @ (k_l * k_l).mT  # |κ|²
            cases = []
            for c in self.power[:, i]:
                a = 1 + c * length
                cases.append((along * (c / a) - (4 * i + 5) * a.log()) / 2)  # 4i + 5 = 2l + 1
            total = total + torch.stack(cases).logsumexp(0)
        return total.flatten(0, 1)

    def scoring(self, theta: Float[torch.Tensor, "voxel n"], k: Float[torch.Tensor, "voxel shell 5"]
                ) -> tuple[Float[torch.Tensor, "voxel n"], Float[torch.Tensor, "voxel n n"]]:
        """Compute the gradient of log L and the Fisher information for the first row of `power`.

        The dependence of the b0 noise term on θ is neglected.
        """
        span = self.high - self.low
        slopes = []
        for j in range(theta.shape[1]):
            step = torch.zeros_like(theta)
            up = theta[:, j] < (self.low + self.high)[j] / 2
            step[:, j] = torch.where(up, 1, -1) * DIFFERENCE * span[j]
            slopes.append((self.kernel((theta + step)[:, None])[:, 0] - k)
                          / step[:, j, None, None])
        slope = torch.stack(slopes, -1)  # voxel shell degree n
        p = k[..., 0] / (4 * math.pi) * self.weight
        jacobian = slope[:, :, 0] / (4 * math.pi) * self.weight[..., None]
        r, q = self.mean - p, self.b0_noise * p
        one = (1 + (q * q).sum(1))[:, None]
        r = r - q * (r * q).sum(1, keepdim=True) / one
        across = jacobian.mT @ q[..., None]
        gradient = (jacobian.mT @ r[..., None])[..., 0]
        fisher = jacobian.mT @ jacobian - across @ across.mT / one[..., None]
        for i, (gram, scale) in enumerate(zip(self.gram, self.scale, strict=True)):
            c, n = self.power[0, i], 4 * i + 5
            kappa = k[..., i + 1] * scale
            jacobian = slope[:, :, i + 1] * scale[..., None]
            square = (kappa * kappa).sum(1, keepdim=True)
            a = 1 / c + square
            gk = (gram @ kappa[..., None])[..., 0]
            by_kappa = gk / a - kappa * ((kappa * gk).sum(1, keepdim=True) / a**2 + n / a)
            gradient = gradient + (jacobian.mT @ by_kappa[..., None])[..., 0]
            along = jacobian.mT @ kappa[..., None]
            whole = (1 + c * square)[..., None]
            fisher = fisher + n * c**2 * (
                square[..., None] / whole * (jacobian.mT @ jacobian)
                + along @ along.mT * (1 / whole**2 - c * square[..., None] / whole**2))
        return gradient, fisher


@torch.no_grad()
def compute_posterior(likelihood: Likelihood) -> tuple[Float[torch.Tensor, "voxel n"],
                                                       Float[torch.Tensor, "voxel n n"]]:
    """Compute the posterior mean and covariance of θ on lattices, with θ scaled to 0–1 by its
    ranges."""
    low, span = likelihood.low, likelihood.high - likelihood.low
    eye = torch.eye(len(span), dtype=span.dtype, device=span.device)

    def lattice(along: torch.Tensor) -> Float[torch.Tensor, "point n"]:
        return torch.cartesian_prod(*[along.to(span)] * len(span))

    unit = lattice((torch.arange(LATTICE) + 0.5) / LATTICE).expand(len(likelihood.shells), -1, -1)
    value = likelihood.value(likelihood.kernel(low + span * unit))
    mean, covariance = _moments(unit[:1], _flatten(value))
    cell, z = eye / LATTICE**2, lattice(torch.linspace(-WITHIN, WITHIN, REFINED))
    for last in range(ROUNDS)[::-1]:
        root = torch.linalg.cholesky(covariance + cell / 12)  # variance within a cell
        unit = mean[:, None] + z @ root.mT
        value = likelihood.value(likelihood.kernel(low + span * unit.clamp(0, 1)))
        outside = (unit < -ROUNDING) | (unit > 1 + ROUNDING)
        value = torch.where(outside.any(-1), -1e9, value)
        mean, covariance = _moments(unit, _flatten(value) if last else value.softmax(1))
        cell = root @ root.mT * (2 * WITHIN / (REFINED - 1)) ** 2
    return mean, covariance + cell / 12


def _flatten(value: Float[torch.Tensor, "voxel point"]) -> Float[torch.Tensor, "voxel point"]:
    """Compute weights ∝ L^t, with the largest t = 0.6^k that gives MIN_POINTS effective points."""
    value = value - value.amax(1, keepdim=True)
    for _ in range(12):
        concentrated = value.softmax(1).square().sum(1, keepdim=True) > 1 / MIN_POINTS
        value = torch.where(concentrated, 0.6 * value, value)
    return value.softmax(1)


def _moments(unit: Float[torch.Tensor, "#voxel point n"], weight: Float[torch.Tensor, "voxel point"]
             ) -> tuple[Float[torch.Tensor, "voxel n"], Float[torch.Tensor, "voxel n n"]]:
    mean = (weight[:, None] @ unit)[:, 0]
    deviation = unit - mean[:, None]
    return mean, (deviation * weight[..., None]).mT @ deviation


def maximise_likelihood(likelihood: Likelihood, starts: Float[torch.Tensor, "start n"]
                ) -> tuple[Float[torch.Tensor, "voxel n"], Float[torch.Tensor, "voxel n n"],
                           Float[torch.Tensor, " voxel"]]:
    """Maximise L for the first row of `power`.

    Parameters
    ----------
    likelihood : Likelihood
    starts : (start, n) tensor
        Candidate parameters; each voxel starts from the most likely of them.

    Returns
    -------
    theta : (voxel, n) tensor
        Parameters within their ranges.
    fisher : (voxel, n, n) tensor
        Fisher information of the parameters scaled to 0–1 by their ranges.
    value : (voxel,) tensor
        log L at `theta`, up to a constant.
    """
    low, span = likelihood.low, likelihood.high - likelihood.low
    every = likelihood.kernel(starts.expand(len(likelihood.shells), -1, -1))
    best, first = likelihood.value(every).max(1)
    theta = starts[first]
    k = likelihood.kernel(theta[:, None])[:, 0]
    damping = torch.full_like(best, 1e-2)
    eye = torch.eye(len(span), dtype=k.dtype, device=k.device)
    for _ in range(STEPS):
        gradient, fisher = likelihood.scoring(theta, k)
        gradient, fisher = gradient * span, fisher * span[:, None] * span
        unit = (theta - low) / span
        at_bound = ((unit <= 0) & (gradient < 0)) | ((unit >= 1) & (gradient > 0))
        free = (~at_bound).to(k.dtype)
        normal = fisher * free[:, None] * free[..., None]
        normal = normal + eye * (damping[:, None] * torch.diagonal(fisher, dim1=1, dim2=2)
                                 + 1.0)[:, None]
        step = torch.linalg.solve(normal, gradient * free).clamp(-0.3, 0.3)
        moved = low + span * (unit + step).clamp(0, 1)
        trial = likelihood.kernel(moved[:, None])
        value, trial = likelihood.value(trial)[:, 0], trial[:, 0]
        better = value > best
        best = torch.where(better, value, best)
        theta = torch.where(better[:, None], moved, theta)
        k = torch.where(better[:, None, None], trial, k)
        damping = (damping * torch.where(better, 0.1, 10.0)).clamp(1e-6, 1e6)
    _, fisher = likelihood.scoring(theta, k)
    return theta, fisher * span[:, None] * span, best


@torch.no_grad()
def compute_hint(likelihood: Likelihood) -> Float[torch.Tensor, "voxel _"]:
    """Compute the hint of each voxel, an input of a network.

    Parameters
    ----------
    likelihood : Likelihood

    Returns
    -------
    (voxel, n (n + 3)/2) tensor
        Estimates of the n parameters (−1 to 1 over the range), log SDs + 2 (of parameters scaled
        to 0–1), and correlations. For two parameters, estimate and covariance are those of the
        posterior; for more, they are the maximum of L and (F + 12 I)⁻¹, with F the Fisher
        information and 1/12 the variance of a uniform prior.
    """
    n = len(likelihood.low)
    if not needs_search(likelihood.tissue):
        unit, covariance = compute_posterior(likelihood)
    else:
        span = likelihood.high - likelihood.low
        starts = torch.quasirandom.SobolEngine(n).draw(33)[1:].to(span)
        theta, fisher, _ = maximise_likelihood(likelihood, likelihood.low + span * starts)
        unit = (theta - likelihood.low) / span
        covariance = torch.linalg.inv(fisher + 12 * torch.eye(n).to(span))
    sd = torch.diagonal(covariance, dim1=1, dim2=2).clamp(min=1e-10).sqrt()
    rows, columns = torch.triu_indices(n, n, 1)
    correlation = (covariance / (sd[:, :, None] * sd[:, None]))[:, rows, columns]
    return torch.cat([2 * unit - 1, sd.log() + 2, correlation], 1)
