"""Networks from SH coefficients of one scanner to those of another, for patches of 3×3×3 voxels.

Input: (voxel, 27, coefficient), the neighbours of each voxel in C order, itself at CENTRE. Output:
(voxel, coefficient). A convolution with padding inside a patch is not one over the volume: beyond
the patch lie zeros, so that nothing but the 27 voxels counts, however deep the network. It is a
linear map from 27 × in to 27 × out numbers, and computed so, as one matrix product.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from bidsapp import sh
from bidsapp.networks.mlp import mlp

PATCH, CENTRE = 27, 13
OFFSETS = np.array(list(product((-1, 0, 1), repeat=3)))
"""(27, 3) steps from a voxel to its neighbours."""


class PatchConvolution(nn.Module):
    """A 3×3×3 convolution with zero padding inside each patch (torch's Conv3d: same weights (out,
    in, 3, 3, 3), same initial weights; the bias starts at 0)."""

    taps: torch.Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        convolution = nn.Conv3d(channels_in, channels_out, 3)
        self.weight = convolution.weight
        self.bias = nn.Parameter(torch.zeros(channels_out))
        step = OFFSETS[None] - OFFSETS[:, None] + 1  # out position, in position
        tap = step @ [9, 3, 1]
        tap[((step < 0) | (step > 2)).any(-1)] = PATCH
        self.register_buffer("taps", torch.from_numpy(tap.T.ravel()), persistent=False)

    def identity(self, factor: float = 1.0) -> PatchConvolution:
        """Starts as a multiple of the identity."""
        nn.init.dirac_(self.weight)
        with torch.no_grad():
            self.weight.mul_(factor)
        return self

    def forward(self, x: Float[torch.Tensor, "voxel 27 channel"]
                ) -> Float[torch.Tensor, "voxel 27 out"]:
        out, inside = self.weight.shape[:2]
        kernel = nn.functional.pad(self.weight.flatten(2), (0, 1))[..., self.taps]
        matrix = kernel.unflatten(2, (PATCH, PATCH)).permute(2, 1, 3, 0).reshape(
            PATCH * inside, PATCH * out)
        return (x.flatten(1) @ matrix).unflatten(1, (PATCH, out)) + self.bias


class FunctionalUnit(nn.Sequential):
    """The coefficients of one degree from those of all: three convolutions, ReLU after the first
    two."""

    def __init__(self, coefficients: int, degree: int) -> None:
        super().__init__(PatchConvolution(coefficients, coefficients), nn.ReLU(),
                         PatchConvolution(coefficients, coefficients), nn.ReLU(),
                         PatchConvolution(coefficients, 2 * degree + 1))


class ResBlock(nn.Module):
    """x − (coefficients of every degree by its functional unit)."""

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(FunctionalUnit(sh.size(l_max), l)
                                   for l in range(0, l_max + 1, 2))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]
                ) -> Float[torch.Tensor, "voxel 27 coef"]:
        return x - torch.cat([unit(x) for unit in self.units], 2)


class SHResNet(nn.Module):
    """Koppers et al. 2018, fig. 1: two convolutions, residual blocks, two convolutions, from which
    the result of the first two is subtracted, and a last one without padding, 3×3×3 → 1.

    The paper says nothing of the first weights. Here the network starts as the identity, which is
    no harmonization: the convolutions around the blocks are, the last of them 0, the final one −1.
    """

    def __init__(self, *, blocks: int = 2, l_max: int = 4) -> None:
        super().__init__()
        size = sh.size(l_max)
        self.pre = nn.Sequential(PatchConvolution(size, size).identity(),
                                 PatchConvolution(size, size).identity())
        self.blocks = nn.Sequential(*(ResBlock(l_max) for _ in range(blocks)))
        self.post = nn.Sequential(PatchConvolution(size, size).identity(),
                                  PatchConvolution(size, size).identity(0.0))
        self.final = nn.Linear(PATCH * size, size)
        with torch.no_grad():
            self.final.weight.zero_()[:, CENTRE * size:(CENTRE + 1) * size] = -torch.eye(size)
            self.final.bias.zero_()

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        x = self.pre(x)
        return self.final((self.post(self.blocks(x)) - x).flatten(1))


class QSpacePerceptron(nn.Module):
    """The q-space network of Golkov et al. 2016 (doi:10.1109/TMI.2016.2551324), from coefficients
    to coefficients of the central voxel: three hidden layers of 150 units, ReLU and dropout of
    0.1."""

    def __init__(self, *, hidden: int = 150, dropout: float = 0.1, l_max: int = 4) -> None:
        super().__init__()
        size = sh.size(l_max)
        self.layers = mlp([size, hidden, hidden, hidden, size],
                          lambda: nn.Sequential(nn.ReLU(), nn.Dropout(dropout)))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        return self.layers(x[:, CENTRE])


NETWORKS: dict[str, type[nn.Module]] = {"shresnet": SHResNet, "golkov": QSpacePerceptron}


def neighbours(shape: tuple[int, ...]) -> Int[np.ndarray, " 27"]:
    """Steps in C order from a voxel of an image of this shape to its neighbours."""
    return OFFSETS @ [shape[1] * shape[2], shape[2], 1]


def patches(image: Float[torch.Tensor, "voxel coef"], centres: Int[torch.Tensor, " n"],
            steps: Int[torch.Tensor, "_ 27"]) -> Float[torch.Tensor, "n 27 coef"]:
    """Patches about voxels of a flat image, none of them on its faces.

    steps: `neighbours` of the image, one row; or a row for each centre, where several images stand
    one after another.
    """
    return image[centres[:, None] + steps]
