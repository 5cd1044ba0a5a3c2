"""Networks from the SH coefficients of the shells to tissue parameters and the fibre density.

The input x (coefficient, voxel, shell) holds the SH coefficients of S/S0 on each shell. They are 0
above the degree that the shell's directions determine. Other inputs are the noise (voxel, 2), σ of
one measurement and of the mean b0 over S0; the shells (group, shell, 3), b in ms/µm², b_delta and
1/√directions; and the hint of each voxel (`simulate.likelihood.compute_hint`). The output is an
`Estimate`.
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
"""Coefficient c_00 of a density whose integral over the sphere is 1."""


class Estimate(NamedTuple):
    """The estimates of a network.

    mean: (voxel, parameter), posterior mean, in the unit of each parameter. log_sd: (voxel,
    parameter), logarithm of the posterior SD. odf: (voxel, coefficient) of the fibre density with
    ∫ = 1.
    """

    mean: torch.Tensor
    log_sd: torch.Tensor
    odf: torch.Tensor


def hint_size(parameters: int) -> int:
    """Compute the size of a hint: means, log SDs and correlations of the parameters."""
    return parameters * (parameters + 3) // 2


def head(features: int, hidden: int, out: int) -> nn.Sequential:
    """Build a perceptron with two hidden layers, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Published(nn.Module):
    """The network of Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415).

    It has six zonal convolutions of degree 16 with widths 16-32-64-32-16-1. They average over
    channels with the factor 2π √(4π/(2l + 1)) of eq. 6, have no bias, and are each followed by a
    leaky ReLU of slope 0.1. The means over the sphere of the first three (16 + 32 + 64) are the
    input of a head of 112 → 128 → 128 → n. The output of the last convolution is the density. There
    are no posterior SDs (log_sd is 0), and the integral of the density is not exactly 1.

    The paper uses 3072 HEALPix points. Here a half grid with exact quadrature replaces them: with
    `grid` 59 (601 points) the output differs by 2e-3 from the limit of infinitely many points, as
    much as with the paper's points, since both grids sample the kink of the leaky ReLU.

    Parameters
    ----------
    shells : int
        Number of shells.
    parameters : int
        Number of tissue parameters.
    l_max : int
        Degree of the convolutions.
    grid : int
        Degree of the half grid (`Pointwise`).
    l_odf : int
        Degree of the density.
    hinted : bool
        Whether head and output get the hint of `SphericalNetwork`, for comparison; the paper has
        no hints.
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
            values = self.head(features)
        else:
            values = self.head(torch.cat([features, hint], 1)) + self.shortcut(hint)
        return Estimate(values, torch.zeros_like(values), truncate(x, self.l_odf)[:, :, 0].T)


def shell_properties(shells: Float[torch.Tensor, "group shell 3"]
                     ) -> Float[torch.Tensor, "group shell 5"]:
    """Compute the inputs, of size about 1, of a network of the properties of shells.

    Parameters
    ----------
    shells : (group, shell, 3) tensor
        b (ms/µm²), b_delta and 1/√directions.

    Returns
    -------
    (group, shell, 5) tensor
    """
    b, b_delta, noise = shells.unbind(-1)
    return torch.stack([b.clamp(min=0.01).log(), b - 2, b_delta, 4 * noise,
                        noise.clamp(min=0.01).log() + 2], -1)


class ShellEmbedding(nn.Module):
    """Embed any set of shells in a fixed number of channels, y_lm,c = Σ_s W_l,c(shell s) x_lm,s.

    The weights W are a smooth function, a small network, of the properties of the shell: b in
    ms/µm², b_delta, and 1/√directions (0 if there is no shell). The logarithms of the means over
    the sphere, which are nearly linear in diffusivity, are embedded in the same way:
    Σ_s V_c(shell s) log x̄_s + U_c(shell s).

    The shells of several protocols are one array (group, shell, 3). Voxels are ordered by group,
    with the same number of voxels in each.

    Parameters
    ----------
    channels : int
        Number of channels.
    l_max : int
        Degree of the channels.
    hidden : int
        Units of each hidden layer of the small network.
    """

    SCALE = (0.3, 2.0, 5.0, 10.0, 10.0)
    """Approximate inverse of the signal coefficients' size by degree, so that channels are near 1
    at all degrees."""

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
        weight = self.net(shell_properties(shells)) * (shells[..., 2:] > 0)
        weight = weight.unflatten(-1, (-1, self.channels)).movedim(2, 0)
        *filters, log_weight, bias = weight
        groups = x.unflatten(1, (len(shells), -1))
        log_mean = (groups[0] * ISOTROPIC).clamp(min=0.005).log()
        log_means = log_mean @ log_weight + bias.sum(1, keepdim=True)
        scaled = torch.stack([w * c for w, c in zip(filters, self.SCALE, strict=False)])
        y = truncate(groups.flatten(1, 2), 2 * self.degrees - 2).unflatten(
            1, groups.shape[1:3]) @ by_degree(scaled)
        return y.flatten(1, 2), log_means.flatten(0, 1)


def amplitudes(x: Float[torch.Tensor, "coef voxel channel"]) -> Float[torch.Tensor, "voxel _"]:
    """Compute the square root and the logarithm of the power of each degree.

    Ratios of powers between channels separate the kernel from the density; they are differences of
    logarithms.
    """
    p = power(x)
    return torch.cat([*(p + 1e-3).sqrt(), *(p + 3e-3).log()], 1)


class Encoder(nn.Module):
    """Encode any set of shells as features on the sphere.

    The embedding of the shells is followed by blocks of zonal convolution and SiLU on a half grid.

    Parameters
    ----------
    widths, degrees : sequence of int
        Channels and degree of the embedding and of each block.
    grid : int
        Degree of the half grids (`Pointwise`).

    Attributes
    ----------
    channels : int
        Number of channels of the features.
    pooled : int
        Number of rotation invariants of the features.
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
        """Compute the features of the embedding and of the last block (parts), and the rotation
        invariants of all blocks (pools)."""
        y, log_means = self.embed(x, shells)
        parts, pools = [y], [log_means, mean(y), amplitudes(y)]
        for convolution, pointwise in zip(self.convolutions, self.pointwise, strict=True):
            y = convolution(y)
            pools.append(amplitudes(y))
            y = pointwise(y)
            pools.append(mean(y))
        if len(self.convolutions):
            parts.append(y)
        return parts, pools


class Head(nn.Module):
    """Estimate parameters with their posterior SD, and the density, from features on the sphere.

    `trunk`, `again` and `scalars` give the parameters; `narrow`, `gain`, `mix`, `sharpen` and `out`
    give the density.

    Parameters
    ----------
    channels : int
        Number of channels of the features.
    inputs : int
        Number of invariants and of noise values, without hints.
    parameters, grid, hidden, tail, l_odf, hinted
        As in `SphericalNetwork`.
    """

    def __init__(self, channels: int, inputs: int, parameters: int, *, grid: int, hidden: int,
                 tail: int, l_odf: int, hinted: bool) -> None:
        super().__init__()
        self.l_odf = l_odf
        hints = hint_size(parameters) * hinted
        self.trunk = nn.Sequential(
            nn.Linear(inputs + hints, hidden), nn.SiLU(),
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
        noise = torch.cat([noise.clamp(min=1e-3).log()[:, :1] + 4, 10 * noise], 1)
        hint = hint if self.shortcut else hint[:, :0]
        hidden = self.trunk(torch.cat([*pools, noise, hint], 1))
        odf, features = self.density(parts, hidden)
        values, log_sd = self.scalars(self.again(torch.cat([hidden, features], 1))).chunk(2, 1)
        if self.shortcut:
            values = values + self.shortcut(hint)
        return Estimate(values, log_sd - 2, odf)

    def density(self, parts: list[torch.Tensor], hidden: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the density (voxel, coefficient), and the invariants of its deconvolution."""
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
    """Estimate tissue parameters with their posterior SD, and the fibre density, for any protocol.

    The encoder embeds the shells and applies blocks of zonal convolution and SiLU on a half grid.
    The head takes the rotation invariants of its features (means, and powers of each degree), the
    noise, and a hint: the parameters and their covariance under normally distributed densities
    (`simulate.likelihood`). The density is a combination of channels, whose gain at each degree the
    head sets in each voxel (a deconvolution with the kernel of that voxel), followed by one more
    block. The last layers of the head see the invariants of that deconvolution, which show whether
    the kernel was right, and give the parameters.

    Parameters
    ----------
    parameters : int
        Number of tissue parameters.
    widths, degrees : sequence of int
        Channels and degree of the embedding and of each block.
    grid : int
        Degree of the half grids (`Pointwise`).
    hidden : int
        Units of each hidden layer of the head.
    tail : int
        Channels of the last block.
    l_odf : int
        Degree of the density.
    hinted : bool
        Whether the network uses hints; without, `forward` ignores them.
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
