"""Networks from SH coefficients of the shells to tissue parameters and the fibre orientation density.

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
    add_mean,
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
    """

    WIDTHS = (16, 32, 64, 32, 16, 1)

    def __init__(self, shells: int, parameters: int, *, l_max: int = 16, grid: int = 59,
                 l_odf: int = 8) -> None:
        super().__init__()
        self.l_max, self.l_odf = l_max, l_odf
        leaky = nn.LeakyReLU(0.1)
        eq6 = 2 * math.pi * torch.sqrt(4 * math.pi / (2 * torch.arange(0, l_max + 1, 2) + 1))
        self.convolutions = nn.ModuleList(
            ZonalConvolution(i, o, l_max, bias=False, scale=eq6 / i)
            for i, o in zip((shells, *self.WIDTHS), self.WIDTHS, strict=False))
        self.pointwise = Pointwise(l_max, l_max, grid=grid, function=leaky)
        self.head = head(sum(self.WIDTHS[:3]), 128, parameters)

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"]) -> Estimate:
        missing = sh.size(self.l_max) - len(x)
        if missing > 0:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        means = []
        for convolution in self.convolutions:
            x = self.pointwise(convolution(x))
            means.append(mean(x))
        found = self.head(torch.cat(means[:3], 1))
        return Estimate(found, torch.zeros_like(found), truncate(x, self.l_odf)[:, :, 0].T)
