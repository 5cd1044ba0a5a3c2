"""Networks from SH coefficients of the shells to tissue parameters and the density of fibres.

Input: x (coefficient, voxel, shell), the SH coefficients of S/S0 on every shell, 0 above the degree
that a shell's directions determine. Output: `Estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.networks.spherical import (
    Pointwise,
    ZonalConvolution,
    by_degree,
    mean,
    power,
    truncate,
)

ISOTROPIC = 1 / math.sqrt(4 * math.pi)
"""c_00 of a density with ∫ = 1."""


class Estimate(NamedTuple):
    """mean: (voxel, parameter). log_sd: its posterior SD, log. odf: (voxel, coefficient)."""

    mean: torch.Tensor
    log_sd: torch.Tensor
    odf: torch.Tensor


def hint_size(parameters: int) -> int:
    """Count means, log SDs and correlations of a hint."""
    return parameters * (parameters + 3) // 2


def head(features: int, hidden: int, out: int) -> nn.Sequential:
    """features → hidden → hidden → out with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Published(nn.Module):
    """The network of Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415).

    Six zonal convolutions of degree 16, widths 16-32-64-32-16-1, which average over channels with
    the factor 2π √(4π/(2l + 1)) of eq. 6 and have no bias; leaky ReLU of slope 0.1 after each;
    means over the sphere of the first three (16 + 32 + 64) to a head of 112 → 128 → 128 → n. The
    3072 HEALPix points give way to a half grid with exact quadrature; `grid` 59 (601 points)
    departs by 2e-3 from the limit of all points where theirs, on which leaky ReLU's kink falls
    as well, departs by as much. The last output is the density.

    hinted: whether, for comparison, head and output get the hint of `SphericalNetwork`, which the
    paper has not.
    """

    WIDTHS = (16, 32, 64, 32, 16, 1)

    def __init__(self, shells: int, parameters: int, *, l_max: int = 16, grid: int = 59,
                 l_odf: int = 8, hinted: bool = False) -> None:
        super().__init__()
        self.l_max, self.l_odf = l_max, l_odf
        hints = hint_size(parameters) * hinted
        leaky = nn.LeakyReLU(0.1)
        eq6 = 2 * math.pi * torch.sqrt(4 * math.pi / (2 * torch.arange(0, l_max + 1, 2) + 1))
        self.convolutions = nn.ModuleList(
            ZonalConvolution(i, o, l_max, bias=False, scale=eq6 / i)
            for i, o in zip((shells, *self.WIDTHS), self.WIDTHS, strict=False))
        self.pointwise = Pointwise(l_max, l_max, grid=grid, function=leaky)
        self.head = head(sum(self.WIDTHS[:3]) + hints, 128, parameters)
        self.shortcut = nn.Linear(hints, parameters, bias=False) if hinted else None

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"],
                hint: Float[torch.Tensor, "voxel hint"] | None = None) -> Estimate:
        missing = sh.size(self.l_max) - len(x)
        if missing > 0:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        means = []
        for convolution in self.convolutions:
            x = self.pointwise(convolution(x))
            means.append(mean(x))
        features = torch.cat(means[:3], 1)
        if self.shortcut is None or hint is None:
            found = self.head(features)
        else:
            found = self.head(torch.cat([features, hint], 1)) + self.shortcut(hint)
        return Estimate(found, torch.zeros_like(found), truncate(x, self.l_odf)[:, :, 0].T)


class ShellEmbedding(nn.Module):
    """Any set of shells → a fixed number of channels: y_lm,c = Σ_s W_l,c(shell s) x_lm,s, where the
    weights are a smooth function, a small network, of what the shell is: b in ms/µm², b_delta,
    1/√directions (0 where there is no shell). Likewise Σ_s V_c(shell s) log x̄_s + U_c(shell s) of
    the logarithms of the means over the sphere, which are nearly linear in diffusivity.

    Shells of several protocols stand side by side, (group, shell, 3); voxels go group by group.
    """

    SCALE = (0.3, 2.0, 5.0, 10.0, 10.0)
    """About the inverse of the size of signal coefficients by degree, so that channels are near 1
    for all degrees."""

    def __init__(self, channels: int, *, l_max: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.channels, self.degrees = channels, l_max // 2 + 1
        last = nn.Linear(hidden, (self.degrees + 2) * channels)
        nn.init.normal_(last.weight, std=1.5 / math.sqrt(hidden))
        self.net = nn.Sequential(nn.Linear(5, hidden), nn.SiLU(), nn.Linear(hidden, hidden),
                                 nn.SiLU(), last)

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"],
                shells: Float[torch.Tensor, "group shell 3"]
                ) -> tuple[Float[torch.Tensor, "_ voxel channel"],
                           Float[torch.Tensor, "voxel channel"]]:
        b, b_delta, noise = shells.unbind(-1)
        told = torch.stack([b.clamp(min=0.01).log(), b - 2, b_delta, 4 * noise,
                            noise.clamp(min=0.01).log() + 2], -1)
        found = self.net(told) * (noise > 0)[..., None]
        weight = found.unflatten(-1, (-1, self.channels)).movedim(2, 0)
        *filters, log_weight, bias = weight
        groups = x.unflatten(1, (len(shells), -1))
        log_mean = (groups[0] * ISOTROPIC).clamp(min=0.005).log()
        told = log_mean @ log_weight + bias.sum(1, keepdim=True)
        scaled = torch.stack([w * c for w, c in zip(filters, self.SCALE, strict=False)])
        y = truncate(groups.flatten(1, 2), 2 * self.degrees - 2).unflatten(
            1, groups.shape[1:3]) @ by_degree(scaled)
        return y.flatten(1, 2), told.flatten(0, 1)


def amplitudes(x: Float[torch.Tensor, "coef voxel channel"]) -> Float[torch.Tensor, "voxel _"]:
    """√ and log of the power per degree: ratios of powers between channels, which tell the kernel
    from the density, are differences of logarithms."""
    p = power(x)
    return torch.cat([*(p + 1e-3).sqrt(), *(p + 3e-3).log()], 1)


class Encoder(nn.Module):
    """Any set of shells → features on the sphere: the shells' embedding, then blocks of zonal
    convolution and SiLU on a half grid.

    widths, degrees: channels and degree of the embedding and of every block. grid: degree of the
    half grids (`Pointwise`). channels: of the features. pooled: number of their invariants.
    """

    def __init__(self, widths: Sequence[int], degrees: Sequence[int], grid: int) -> None:
        super().__init__()
        self.embed = ShellEmbedding(widths[0], l_max=degrees[0])
        steps = list(zip(widths, widths[1:], degrees, degrees[1:], strict=False))
        self.convolutions = nn.ModuleList(
            ZonalConvolution(i, o, min(a, b)) for i, o, a, b in steps)
        self.pointwise = nn.ModuleList(
            Pointwise(min(a, b), b, grid=grid) for *_, a, b in steps)
        self.pooled = widths[0] * (2 + degrees[0]) + sum(
            o * (1 + min(a, b)) for _, o, a, b in steps)
        self.channels = widths[0] + widths[-1] * (len(widths) > 1)

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"],
                shells: Float[torch.Tensor, "group shell 3"]
                ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Features of the embedding and of the last block, and invariants of all."""
        y, told = self.embed(x, shells)
        parts, pools = [y], [told, mean(y), amplitudes(y)]
        for convolution, pointwise in zip(self.convolutions, self.pointwise, strict=True):
            y = convolution(y)
            pools.append(amplitudes(y))
            y = pointwise(y)
            pools.append(mean(y))
        if len(self.convolutions):
            parts.append(y)
        return parts, pools


class Head(nn.Module):
    """Features on the sphere → parameters with their posterior SD, and the density.

    channels: of the features. seen: number of invariants, noise and hints. grid: as of `Encoder`.
    The others: as of `SphericalNetwork`.
    """

    def __init__(self, channels: int, seen: int, parameters: int, *, grid: int, hidden: int,
                 tail: int, l_odf: int, hinted: bool) -> None:
        super().__init__()
        self.l_odf = l_odf
        hints = hint_size(parameters) * hinted
        self.trunk = nn.Sequential(
            nn.Linear(seen + hints, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.again = nn.Sequential(
            nn.Linear(hidden + tail * (1 + l_odf), hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU())
        self.scalars = nn.Linear(hidden, 2 * parameters)
        self.shortcut = nn.Linear(hints, parameters, bias=False) if hinted else None
        self.narrow = ZonalConvolution(channels, 2 * tail, l_odf, bias=False)
        self.gain = nn.Linear(hidden, 2 * tail * (l_odf // 2 + 1))
        self.mix = ZonalConvolution(2 * tail, tail, l_odf)
        self.sharpen = Pointwise(l_odf, l_odf, grid=grid)
        self.out = ZonalConvolution(2 * tail, 1, l_odf, bias=False)

    def forward(self, parts: list[torch.Tensor], pools: list[torch.Tensor],
                noise: Float[torch.Tensor, "voxel 2"], hint: Float[torch.Tensor, "voxel hint"]
                ) -> Estimate:
        level = torch.cat([noise.clamp(min=1e-3).log()[:, :1] + 4, 10 * noise], 1)
        hint = hint if self.shortcut else hint[:, :0]
        hidden = self.trunk(torch.cat([*pools, level, hint], 1))
        odf, seen = self.density(parts, hidden)
        found, log_sd = self.scalars(self.again(torch.cat([hidden, seen], 1))).chunk(2, 1)
        if self.shortcut:
            found = found + self.shortcut(hint)
        return Estimate(found, log_sd - 2, odf)

    def density(self, parts: list[torch.Tensor], hidden: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """(voxel, coefficient), and the invariants of the deconvolution behind it."""
        size = sh.size(self.l_odf)
        padded = [nn.functional.pad(truncate(y, self.l_odf), (0, 0, 0, 0, 0, max(0, size - len(y))))
                  for y in parts]
        gain = self.gain(hidden).unflatten(1, (self.l_odf // 2 + 1, -1))
        z = self.mix(self.narrow(torch.cat(padded, 2)) * by_degree(gain.transpose(0, 1)))
        sharp = self.sharpen(z)
        odf = self.out(torch.cat([z, sharp], 2))[1:, :, 0].T
        return (torch.cat([torch.full_like(odf[:, :1], ISOTROPIC), odf], 1),
                torch.cat([mean(sharp), amplitudes(z)], 1))


class SphericalNetwork(nn.Module):
    """Tissue parameters with their posterior SD, and the density of fibres, from any protocol.

    Embedded shells pass blocks of zonal convolution and SiLU on a half grid, the encoder. Means and
    powers per degree, which do not change with rotation, go to a head with the noise and a hint,
    what parameters and their covariance are under normal densities (`simulate.likelihood`). The
    density is a combination of channels whose gain per degree the head sets voxel by voxel (a
    deconvolution with the kernel of that voxel), followed by one more block. What that
    deconvolution looks like, again by means and powers, tells the head's last layers whether the
    kernel was right; they give the parameters.

    Args:
        parameters: number of scalars.
        widths, degrees: channels and degree of the embedding and of every block.
        grid: degree of the half grids (`Pointwise`).
        tail: channels of the last block.
        hinted: whether it gets hints; where not, `forward` takes none of any size.
    """

    def __init__(self, parameters: int, *, widths: Sequence[int] = (32, 16),
                 degrees: Sequence[int] = (8, 8), grid: int = 21, hidden: int = 128,
                 tail: int = 8, l_odf: int = 8, hinted: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(widths, degrees, grid)
        self.head = Head(self.encoder.channels, self.encoder.pooled + 3, parameters, grid=grid,
                         hidden=hidden, tail=tail, l_odf=l_odf, hinted=hinted)

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"],
                noise: Float[torch.Tensor, "voxel 2"],
                shells: Float[torch.Tensor, "group shell 3"],
                hint: Float[torch.Tensor, "voxel hint"]) -> Estimate:
        return self.head(*self.encoder(x, shells), noise, hint)
