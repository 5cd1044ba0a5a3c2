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

    def matrix(self) -> Float[torch.Tensor, "inside outside"]:
        """(27 in, 27 out): what it is to a flat patch."""
        out, inside = self.weight.shape[:2]
        kernel = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 2).flatten(1)  # a row for each tap
        rows = nn.functional.pad(kernel, (0, 0, 0, 1)).index_select(0, self.taps)
        return rows.view(PATCH, PATCH, inside, out).transpose(1, 2).reshape(
            PATCH * inside, PATCH * out)

    def forward(self, x: Float[torch.Tensor, "voxel 27 channel"]
                ) -> Float[torch.Tensor, "voxel 27 out"]:
        return (x.flatten(1) @ self.matrix()).unflatten(1, (PATCH, -1)) + self.bias


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

    def folded(self) -> Folded:
        """The same function, quicker: for application."""
        return Folded(self)


class Affine:
    """x ↦ x A + a, in float64."""

    def __init__(self, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        self.matrix, self.shift = matrix.detach().double(), shift.detach().double()

    @classmethod
    def of(cls, layer: nn.Module) -> Affine:
        """A convolution, or a fully connected layer, on flat patches."""
        if isinstance(layer, PatchConvolution):
            return cls(layer.matrix(), layer.bias.repeat(PATCH))
        assert isinstance(layer, nn.Linear)
        return cls(layer.weight.T, layer.bias)

    def then(self, other: Affine) -> Affine:
        return Affine(self.matrix @ other.matrix, self.shift @ other.matrix + other.shift)


class Folded:
    """An SHResNet whose linear maps that follow each other are one. With P the first convolutions,
    E the last, F the final one of them, and U_i the units of block i,

        z_1 = P x,  z_{i+1} = z_i − U_i(z_i),  out = E z_n − E U_n(z_n) − F z_1:

    the first maps of U_1 take P in and the last of U_n take E in, so that of the 27 × 15 numbers
    after the last block, only the 15 that they are for are made. Numbers of z stand by degree.
    """

    def __init__(self, network: SHResNet) -> None:
        kind, size = network.final.weight.dtype, network.final.weight.shape[0]
        blocks = [[[Affine.of(layer) for layer in unit.children()
                    if isinstance(layer, PatchConvolution)]
                   for unit in block.get_submodule("units").children()]
                  for block in network.blocks.children()]
        place = torch.arange(PATCH * size).view(PATCH, size)
        widths = [len(three.shift) // PATCH for *_, three in blocks[0]]
        order = torch.cat([part.flatten() for part in place.split(widths, 1)])
        self.parts = [PATCH * w for w in widths]
        pre = Affine.of(network.pre[0]).then(Affine.of(network.pre[1]))
        final = Affine.of(network.final)
        end = Affine.of(network.post[0]).then(Affine.of(network.post[1])).then(final)
        end = Affine(end.matrix[order], end.shift)
        bare = Affine(final.matrix, 0 * final.shift)
        self.skip = _plain(pre.then(bare), kind)
        self.pre = _plain(Affine(pre.matrix[:, order], pre.shift[order]), kind)
        self.units: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = []
        missing = torch.zeros_like(end.matrix[:, 0])  # what z as computed has too much
        for i, block in enumerate(blocks):
            units = []
            for (one, two, three), rows in zip(block, end.matrix.split(self.parts), strict=True):
                first = pre.then(one) if i == 0 else Affine(
                    one.matrix[order], one.shift - missing @ one.matrix[order])
                last = three if i < len(blocks) - 1 else Affine(three.matrix @ rows, three.shift)
                units.append([_plain(part, kind) for part in (first, two, last)])
            self.units.append(units)
            if i == len(blocks) - 1:
                self.end = _plain(Affine(end.matrix, end.shift - missing @ end.matrix), kind)
                self.end[1].sub_((torch.cat([three.shift for *_, three in block])
                                  @ end.matrix).to(kind))
            missing = missing + torch.cat([three.shift for *_, three in block])

    def __call__(self, x: Float[torch.Tensor, "voxel 27 coef"]
                 ) -> Float[torch.Tensor, "voxel coef"]:
        source = x = x.flatten(1)
        z = _through(x, self.pre)
        for units in self.units[:-1]:
            source = z = torch.cat([
                torch.addmm(own, hidden, matrix, alpha=-1)
                for own, (hidden, matrix) in zip(z.split(self.parts, 1), _hidden(source, units),
                                                 strict=True)], 1)
        out = _through(z, self.end) - _through(x, self.skip)
        for hidden, matrix in _hidden(source, self.units[-1]):
            out.addmm_(hidden, matrix, alpha=-1)
        return out


def _hidden(source: torch.Tensor, units: list[list[tuple[torch.Tensor, torch.Tensor]]]
            ) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each unit the second hidden layer, and the matrix that it meets next."""
    return [(_through(_through(source, one).relu_(), two).relu_(), matrix)
            for one, two, (matrix, _) in units]


def _plain(affine: Affine, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return affine.matrix.to(kind).contiguous(), affine.shift.to(kind)


def _through(x: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    matrix, shift = affine
    return torch.addmm(shift, x, matrix)


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


class HybridCNN(nn.Module):
    """A 3×3×3 convolution without padding, then 1×1×1 ones, ReLU between them; what comes out is
    added to the coefficients of the central voxel. Starts as the identity: the last layer is 0."""

    def __init__(self, *, hidden: int = 128, layers: int = 2, l_max: int = 4) -> None:
        super().__init__()
        size = sh.size(l_max)
        self.layers = mlp([PATCH * size, *[hidden] * layers, size], nn.ReLU)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        return x[:, CENTRE] + self.layers(x.flatten(1))


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
