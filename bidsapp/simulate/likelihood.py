"""Most likely tissue parameters of a voxel where its fibres may be arranged anyhow.

With S_lm,s = k_l(θ, s) w_lm + noise and w_lm ~ N(0, C_l), the unknown density integrates out. Per
degree, with y_s = S_lm,s/ν_s, κ_s = k_l,s/ν_s and ν_s = σ √(4π/n_s) the noise of a coefficient,

    y ~ N(0, I + C κ κᵀ):   −2 log L = Σ_m [|y|² − (κ·y)²/a] + (2l + 1) log(C a),  a = 1/C + |κ|²,

so the powers Σ_m y_s y_t are all that counts. The means over the sphere, degree 0, do not depend on
the density; noise of the mean b0 moves them together. The maximum over θ is found by damped
Fisher scoring for all voxels at once. A network starts from it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float

from bidsapp import sh
from bidsapp.simulate import forward
from bidsapp.simulate.tissue import Tissue

L_MAX = 8
STEPS = 6
DIFFERENCE = 1e-3
"""Of a parameter's range: step of the numerical derivative of the kernel."""


class Likelihood:
    """log L and its derivatives for voxels with coefficients x, noise and shells (as the networks
    take them), under densities of the given power (C_2, C_4, …)."""

    def __init__(self, tissue: Tissue, power: Float[torch.Tensor, " degree"],
                 x: Float[torch.Tensor, "coef voxel shell"], noise: Float[torch.Tensor, "voxel 2"],
                 shells: Float[torch.Tensor, "group shell 3"]) -> None:
        self.tissue, self.power, self.shells = tissue, power, shells
        each = shells.repeat_interleave(x.shape[1] // len(shells), 0)
        self.b, self.b_delta, scale = each.unbind(-1)
        there = scale > 0
        self.weight = there / (noise[:, :1] * scale.clamp(min=1e-3))  # 1/SD of a mean
        self.mean = x[0] * self.weight / math.sqrt(4 * math.pi)
        self.b0_noise = noise[:, 1:]
        self.gram, self.use = [], []
        for l in range(2, L_MAX + 1, 2):
            y = x[sh.size(l - 2):sh.size(l)].movedim(0, 1) * (
                self.weight / math.sqrt(4 * math.pi))[:, None]
            self.gram.append(y.mT @ y)
            self.use.append((y != 0).any(1).to(y.dtype))
        self.low, self.high = x.new_tensor(tissue.ranges).T

    def kernel(self, theta: Float[torch.Tensor, "voxel n"]
               ) -> Float[torch.Tensor, "voxel shell 5"]:
        return self._kernel(theta, self.b, self.b_delta)

    def of_protocols(self, points: Float[torch.Tensor, "point n"]
                     ) -> Float[torch.Tensor, "voxel point shell 5"]:
        """The kernel at points that all voxels share, computed once per protocol."""
        groups, count = len(self.shells), len(points)
        each = self.shells[..., :2].repeat_interleave(count, 0)
        k = self._kernel(points.repeat(groups, 1), *each.unbind(-1)).unflatten(0, (groups, count))
        return k.repeat_interleave(len(self.mean) // groups, 0)

    def _kernel(self, theta, b, b_delta):
        parts = self.tissue.compartments(theta)
        if self.tissue.aligned is not None:  # the axis is unknown: as if dispersed, too
            parts = parts + self.tissue.aligned(theta)
        return forward.kernel(parts, 1000 * b, b_delta, L_MAX)

    def value(self, k: Float[torch.Tensor, "voxel ... shell 5"]
              ) -> Float[torch.Tensor, "voxel ..."]:
        """log L less a constant, of one or more points per voxel."""
        if k.ndim == 3:
            return self.value(k[:, None])[:, 0]
        weight = self.weight[:, None]
        p = k[..., 0] / (4 * math.pi) * weight
        r, q = self.mean[:, None] - p, self.b0_noise[:, None] * p
        one = 1 + (q * q).sum(-1)
        total = (r * r).sum(-1) - (r * q).sum(-1) ** 2 / one + one.log()
        for i, (gram, use) in enumerate(zip(self.gram, self.use, strict=True)):
            c = self.power[i]
            kappa = k[..., i + 1] * (weight * use[:, None] / math.sqrt(4 * math.pi))
            a = 1 / c + (kappa * kappa).sum(-1)
            total = total - (kappa * (kappa @ gram)).sum(-1) / a + (4 * i + 5) * (c * a).log()
        return -total / 2

    def scoring(self, theta: Float[torch.Tensor, "voxel n"], k: Float[torch.Tensor, "voxel shell 5"]
                ) -> tuple[Float[torch.Tensor, "voxel n"], Float[torch.Tensor, "voxel n n"]]:
        """Gradient of log L and Fisher's information; that the share of b0 noise depends on θ is
        left out."""
        span = self.high - self.low
        slopes = []
        for j in range(theta.shape[1]):
            step = torch.zeros_like(theta)
            up = theta[:, j] < (self.low + self.high)[j] / 2
            step[:, j] = torch.where(up, 1, -1) * DIFFERENCE * span[j]
            slopes.append((self.kernel(theta + step) - k) / step[:, j, None, None])
        slope = torch.stack(slopes, -1)  # voxel shell degree n
        p = k[..., 0] / (4 * math.pi) * self.weight
        jacobian = slope[:, :, 0] / (4 * math.pi) * self.weight[..., None]
        r, q = self.mean - p, self.b0_noise * p
        one = (1 + (q * q).sum(1))[:, None]
        r = r - q * (r * q).sum(1, keepdim=True) / one
        across = jacobian.mT @ q[..., None]
        gradient = (jacobian.mT @ r[..., None])[..., 0]
        fisher = jacobian.mT @ jacobian - across @ across.mT / one[..., None]
        for i, (gram, use) in enumerate(zip(self.gram, self.use, strict=True)):
            c, n = self.power[i], 4 * i + 5
            scale = self.weight * use / math.sqrt(4 * math.pi)
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


def most_likely(likelihood: Likelihood, starts: Float[torch.Tensor, "start n"]
                ) -> tuple[Float[torch.Tensor, "voxel n"], Float[torch.Tensor, "voxel n n"],
                           Float[torch.Tensor, " voxel"]]:
    """θ within its range that maximises L, from the best of `starts`; Fisher's information in
    units of the ranges, and log L there."""
    low, span = likelihood.low, likelihood.high - likelihood.low
    every = likelihood.of_protocols(starts)
    best, first = likelihood.value(every).max(1)
    theta, k = starts[first], every[torch.arange(len(every), device=first.device), first]
    damping = torch.full_like(best, 1e-2)
    eye = torch.eye(len(span), dtype=k.dtype, device=k.device)
    for _ in range(STEPS):
        gradient, fisher = likelihood.scoring(theta, k)
        gradient, fisher = gradient * span, fisher * span[:, None] * span
        unit = (theta - low) / span
        held = ((unit <= 0) & (gradient < 0)) | ((unit >= 1) & (gradient > 0))
        free = (~held).to(k.dtype)
        normal = fisher * free[:, None] * free[..., None]
        normal = normal + eye * (damping[:, None] * torch.diagonal(fisher, dim1=1, dim2=2)
                                 + 1.0)[:, None]
        step = torch.linalg.solve(normal, gradient * free).clamp(-0.3, 0.3)
        moved = low + span * (unit + step).clamp(0, 1)
        here = likelihood.kernel(moved)
        value = likelihood.value(here)
        better = value > best
        best = torch.where(better, value, best)
        theta = torch.where(better[:, None], moved, theta)
        k = torch.where(better[:, None, None], here, k)
        damping = (damping * torch.where(better, 0.1, 10.0)).clamp(1e-6, 1e6)
    _, fisher = likelihood.scoring(theta, k)
    return theta, fisher * span[:, None] * span, best


@torch.no_grad()
def hint(likelihood: Likelihood) -> Float[torch.Tensor, "voxel _"]:
    """What a network starts from, (voxel, n (n + 3)/2): the most likely θ in units of its range,
    and log SDs and correlations of (F + 12 I)⁻¹, 1/12 being the variance of the prior."""
    n = len(likelihood.low)
    span = likelihood.high - likelihood.low
    starts = likelihood.low + span * _starts(n).to(span)
    theta, fisher, _ = most_likely(likelihood, starts)
    unit = (theta - likelihood.low) / span
    covariance = torch.linalg.inv(fisher + 12 * torch.eye(n, dtype=span.dtype, device=span.device))
    sd = torch.diagonal(covariance, dim1=1, dim2=2).clamp(min=1e-10).sqrt()
    rows, columns = torch.triu_indices(n, n, 1)
    correlation = (covariance / (sd[:, :, None] * sd[:, None]))[:, rows, columns]
    return torch.cat([2 * unit - 1, sd.log() + 2, correlation], 1)


def _starts(n: int) -> torch.Tensor:
    """Points within the unit cube: 4 × 4 where there are two parameters, else a Sobol sequence."""
    if n == 2:
        grid = torch.tensor([0.12, 0.35, 0.6, 0.88])
        return torch.cartesian_prod(grid, grid)
    return torch.quasirandom.SobolEngine(n).draw(33)[1:]
