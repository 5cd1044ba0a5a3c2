"""Multilayer perceptrons: plain layers, and the baseline of the spherical networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.networks.scnn import ISOTROPIC, Estimate, ShellEmbedding, hint_size
from bidsapp.networks.spherical import by_degree


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU,
        norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """Build a perceptron (…, widths[0]) → (…, widths[-1]).

    Parameters
    ----------
    widths : sequence of int
        Sizes of the input, of each hidden layer and of the output.
    activation : callable
        Makes the nonlinearity after each hidden layer.
    norm : callable, optional
        Makes, from the width, the normalisation between a hidden layer and its nonlinearity:
        nn.BatchNorm1d or nn.LayerNorm.

    Returns
    -------
    torch.nn.Sequential
        The layers in order.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (inside, outside) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inside, outside))
        if i < last:
            layers += [*([norm(outside)] if norm else []), activation()]
    return nn.Sequential(*layers)


class Perceptron(nn.Module):
    """The perceptron baseline of Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415).

    It has hidden layers of 512 units with batch normalisation and ReLU, and is not equivariant: it
    must learn rotations from the data. Its inputs are the coefficients up to degree 8 of a fixed
    number of shells in a fixed order, scaled by degree to about 1, the noise, and the hint, if any.
    Its outputs are those of `SphericalNetwork`. `forward` takes the arguments of
    `SphericalNetwork`, but does not use the shells, since a perceptron serves a single acquisition.

    Parameters
    ----------
    parameters : int
        Number of tissue parameters.
    shells : int
        Number of shells.
    widths : sequence of int
        Units of each hidden layer.
    l_odf : int
        Degree of the density.
    hinted : bool
        Whether the network takes hints.
    """

    scale: torch.Tensor

    def __init__(self, parameters: int, *, shells: int, widths: Sequence[int] = (512, 512, 512),
                 l_odf: int = 8, hinted: bool = False) -> None:
        super().__init__()
        scale = by_degree(torch.tensor(ShellEmbedding.SCALE))[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.outputs = (parameters, parameters, sh.size(l_odf) - 1)
        self.hints = hint_size(parameters) * hinted
        self.layers = mlp([shells * len(scale) + 2 + self.hints, *widths, sum(self.outputs)],
                          norm=nn.BatchNorm1d)

    def forward(self, x: Float[torch.Tensor, "coef voxel shell"],
                noise: Float[torch.Tensor, "voxel 2"],
                shells: Float[torch.Tensor, "group shell 3"],
                hint: Float[torch.Tensor, "voxel hint"]) -> Estimate:
        flat = (x * self.scale).transpose(0, 1).flatten(1)
        sigma, b0_sigma = noise.split(1, 1)
        features = torch.cat([flat, sigma.clamp(min=1e-3).log() + 4, 10 * b0_sigma,
                              hint[:, :self.hints]], 1)
        mean, log_sd, odf = self.layers(features).split(self.outputs, 1)
        return Estimate(mean, log_sd - 2,
                        torch.cat([torch.full_like(odf[:, :1], ISOTROPIC), odf], 1))
