"""Network that predicts the signal of a shell in any direction from a neighbourhood of voxels.

The input x (voxel, shell, coefficient) holds SH coefficients of S/S0 up to degree 8, each divided
by the size that it has in tissue (`shells` in `methods.upsample_scnn`), so that all are near 1. The
output is in the same unit, on the shell of the query.

1. `NeighbourAverage`: averages of x over the 27 voxels of a neighbourhood. The weights come from a
   small network of rotation invariants: the squared distance of the coefficients from those of the
   centre, in units of the noise. This is non-local means (Buades et al. 2005,
   doi:10.1109/CVPR.2005.38) with learned weights, of whole functions on the sphere.
2. `UpsamplingNetwork`: zonal convolutions and SiLU on a half grid (`spherical`), with gains per
   degree and voxel, add what linear averages miss. All layers are equivariant to rotations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bidsapp.networks.scnn import amplitudes
from bidsapp.networks.spherical import Pointwise, ZonalConvolution, by_degree, mean

L_MAX, L_SD = 8, 4
"""Highest degrees of the predicted signal, and of the logarithm of its SD."""

CENTRE = 13
"""Number of the central voxel among the 27 of a neighbourhood, in C order."""

DEGREES = L_MAX // 2 + 1


class Neighbourhoods(NamedTuple):
    """Voxels to predict, and their neighbours; voxels are ordered by group, as are all inputs.

    rows: (centre, 27), rows of the voxels, in C order of their positions; any row where there is no
    voxel. present: (centre, 27), whether there is a voxel.
    """

    rows: Int[torch.Tensor, "centre 27"]
    present: Bool[torch.Tensor, "centre 27"]


class Shells(NamedTuple):
    """Shells of each group, padded to the same number.

    properties: (group, shell, PROPERTIES), see `methods.upsample_scnn.shells`; the first is 1 for a
    shell, 0 for padding. nearness: (group, shell), weight of the shell in a first estimate of the
    query's; the sum is 1. variance: (group, shell, degree), of the 2l + 1 coefficients together,
    for measurements with a noise of variance 1.
    """

    properties: Float[torch.Tensor, "group shell property"]
    nearness: Float[torch.Tensor, "group shell"]
    variance: Float[torch.Tensor, "group shell degree"]


class Coefficients(NamedTuple):
    """Prediction on the sphere.

    mean: (coefficient, centre), in the unit of the input. log_sd: (coefficient, centre), logarithm
    of the SD of S/S0, up to degree L_SD.
    """

    mean: torch.Tensor
    log_sd: torch.Tensor


class NeighbourAverage(nn.Module):
    """Average functions on the sphere over neighbours that are alike.

    Parameters
    ----------
    heads : int
        Number of averages, each with weights of its own for every degree.
    hidden : int
        Units of the hidden layers of the network of the weights.
    """

    classes: torch.Tensor
    degree_sum: torch.Tensor

    def __init__(self, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        # neighbours across a face, an edge or a corner, and the centre
        axis = torch.tensor([1, 0, 1])
        distance = (axis[:, None, None] + axis[:, None] + axis).flatten()
        self.register_buffer("classes", nn.functional.one_hot(distance, 4).float(),
                             persistent=False)
        self.register_buffer("degree_sum", by_degree(torch.eye(DEGREES)), persistent=False)
        self.net = nn.Sequential(nn.Linear(4 * DEGREES + 2, hidden), nn.SiLU(),
                                 nn.Linear(hidden, hidden), nn.SiLU(),
                                 nn.Linear(hidden, heads * DEGREES))

    def forward(self, x: Float[torch.Tensor, "voxel shell 45"],
                noise: Float[torch.Tensor, "voxel 3"], log_s0: Float[torch.Tensor, " voxel"],
                neighbours: Neighbourhoods, shells: Shells
                ) -> tuple[Float[torch.Tensor, "coef centre channel"],
                           Float[torch.Tensor, "centre feature"]]:
        """Compute the averages, with channel = shell × (centre, heads), and invariants of the
        neighbourhood."""
        index, present = neighbours
        gathered = x[index]
        centre = gathered[:, CENTRE:CENTRE + 1]
        per_group = len(index) // len(shells.variance)
        variance = shells.variance.sum(1).repeat_interleave(per_group, 0)
        sigma = noise[index]
        square = sigma.square() + sigma[:, CENTRE:CENTRE + 1].square()
        expected = square[..., :1] * variance[:, None]
        # the error of the mean b0 is that of the mean signal
        expected[..., 0] += square[..., 1] * centre[..., 0].square().sum(2)
        distance = ((gathered - centre).square().sum(2) @ self.degree_sum) / (expected + 1e-9)
        features = (distance + 0.1).log()
        s0 = (log_s0[index] - log_s0[index[:, CENTRE], None]).square() / (square[..., 1] + 4e-4)
        alike = torch.cat([features, (s0 + 0.1).log()[..., None]], 2)
        count = present.sum(1, keepdim=True).clamp(min=2) - 1
        masked = alike * present[..., None]
        typical = (masked.sum(1) - masked[:, CENTRE]) / count
        own = (centre[:, 0].square().sum(1) @ self.degree_sum) / (
            sigma[:, CENTRE, :1].square() * variance + 1e-9)
        level = sigma[:, CENTRE, :1].clamp(min=1e-3).log() + 3
        misfit = sigma[..., 2] * present
        context = torch.cat([typical[:, :DEGREES], (own[:, 1:] + 0.1).log() / 3, level,
                             count / 26.0, misfit[:, CENTRE, None],
                             misfit.sum(1, keepdim=True) / (count + 1)], 1)
        rows = torch.cat([alike, context[:, None].expand(-1, 27, -1),
                          self.classes.expand(len(index), -1, -1)[..., :3]], 2)
        logit = self.net(rows).masked_fill(~present[..., None], -1e9)
        weight = torch.softmax(logit, 1).unflatten(2, (DEGREES, self.heads))
        averages = []
        for i, part in enumerate(gathered.split([4 * i + 1 for i in range(DEGREES)], 3)):
            mixed = weight[:, :, i].mT @ part.flatten(2)
            both = torch.cat([part[:, CENTRE].flatten(1)[:, None], mixed], 1)
            averages.append(both.unflatten(2, (x.shape[1], -1)))
        average = torch.cat(averages, 3)  # centre, head, shell, coefficient
        return average.permute(3, 0, 2, 1).flatten(2), context


class UpsamplingNetwork(nn.Module):
    """Predict the signal of a shell in any direction, with its SD, for any protocol.

    The averages of all shells (`NeighbourAverage`) are embedded in channels, with weights from a
    small network of the properties of each shell relative to the query. Two blocks of zonal
    convolution and SiLU follow. The rotation invariants of all channels set the gain of each
    channel and degree. The result is added to the average of the shell nearest to the query, so
    that the network starts as a linear estimate.

    Parameters
    ----------
    properties : int
        Number of properties of a shell.
    channels : int
        Channels of each block.
    heads, attention : int
        Averages over neighbours, and hidden units of the network of their weights.
    hidden : int
        Hidden units of the network of the gains.
    grid : int
        Degree of the half grids (`spherical.Pointwise`).
    """

    def __init__(self, *, properties: int, channels: int = 24, heads: int = 3, attention: int = 32,
                 hidden: int = 96, grid: int = 21) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads
        self.average = NeighbourAverage(heads, attention)
        width = 64
        self.embed = nn.Sequential(
            nn.Linear(properties, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, (DEGREES + 2) * (1 + heads) * channels))
        self.trunk = nn.Sequential(
            nn.Linear((2 + L_MAX) * channels + 2 * DEGREES + 3, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU())
        self.gain = nn.Linear(hidden, DEGREES * (6 * channels + heads + 1))
        self.one = ZonalConvolution(channels, channels, L_MAX)
        self.two = ZonalConvolution(2 * channels, channels, L_MAX)
        self.out = ZonalConvolution(3 * channels, 1, L_MAX, bias=False)
        self.pointwise = Pointwise(L_MAX, L_MAX, grid=grid)
        self.spread = ZonalConvolution(3 * channels, 1, L_SD, bias=False)
        self.level = nn.Sequential(
            nn.Linear(hidden + 2 * (1 + L_MAX) * channels, hidden), nn.SiLU(),
            nn.Linear(hidden, 1))
        for layer in (self.out, self.spread, self.gain, self.level[-1]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Float[torch.Tensor, "voxel shell 45"],
                noise: Float[torch.Tensor, "voxel 3"], log_s0: Float[torch.Tensor, " voxel"],
                neighbours: Neighbourhoods, shells: Shells) -> Coefficients:
        """Predict the signal of the central voxels.

        Parameters
        ----------
        x : (voxel, shell, 45) tensor
            Normalised coefficients of S/S0; 0 where there is no shell.
        noise : (voxel, 3) tensor
            σ of one measurement and of the mean b0, over S0, and the logarithm of the mean square
            of what the fits of the shells leave, over that of noise alone.
        log_s0 : (voxel,) tensor
            Logarithm of S0, in any unit.
        neighbours : Neighbourhoods
        shells : Shells

        Returns
        -------
        Coefficients
        """
        averages, context = self.average(x, noise, log_s0, neighbours, shells)
        groups = averages.unflatten(1, (len(shells.properties), -1))
        y, log_means = self._embed(groups, shells.properties)
        hidden = self.trunk(torch.cat([log_means, mean(y), amplitudes(y), context], 1))
        gain = self.gain(hidden).unflatten(1, (DEGREES, -1)).transpose(0, 1)
        c = self.channels
        first, second, last, base = gain.split([c, 2 * c, 3 * c, self.heads + 1], 2)
        z = self.pointwise(self.one(y * by_degree(1 + first)))
        both = torch.cat([y, z], 2)
        w = self.pointwise(self.two(both * by_degree(1 + second)))
        every = torch.cat([both, w], 2)
        # the shell nearest to the query, averaged over neighbours
        near = (groups.unflatten(3, (-1, self.heads + 1))
                * shells.nearness[:, None, :, None]).sum(3).flatten(1, 2)
        share = near.new_tensor([0.0] + [1 / self.heads] * self.heads)
        start = (near * by_degree(share + base)).sum(2)
        predicted = start + self.out(every * by_degree(1 + last))[..., 0]
        level = self.level(torch.cat([hidden, mean(z), amplitudes(z), mean(w), amplitudes(w)], 1))
        log_sd = self.spread(every)[..., 0]
        sigma = noise[neighbours.rows[:, CENTRE], 0].clamp(min=1e-3).log()
        offset = math.sqrt(4 * math.pi) * (sigma - 1 + level[:, 0])
        return Coefficients(predicted, torch.cat([log_sd[:1] + offset, log_sd[1:]]))

    def _embed(self, groups: Float[torch.Tensor, "coef group voxels channel"],
               properties: Float[torch.Tensor, "group shell property"]
               ) -> tuple[Float[torch.Tensor, "coef centre out"],
                          Float[torch.Tensor, "centre out"]]:
        """Embed the averages, and the logarithms of their means, in a fixed number of channels."""
        weight = self.embed(properties) * properties[..., :1]
        weight = weight.unflatten(2, (DEGREES + 2, 1 + self.heads, self.channels))
        *filters, log_weight, bias = weight.movedim(2, 0)
        y = groups @ by_degree(torch.stack(filters).flatten(2, 3))
        log_mean = groups[0].clamp(min=0.01).log()
        features = log_mean @ log_weight.flatten(1, 2) + bias.sum((1, 2))[:, None]
        return y.flatten(1, 2), features.flatten(0, 1)
