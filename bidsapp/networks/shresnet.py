"""Networks that map SH coefficients from one scanner to another, on patches of 3×3×3 voxels.

The input (voxel, 27, coefficient) holds the neighbourhood of each voxel in C order, with the voxel
itself at CENTRE. The output is (voxel, coefficient). Convolutions pad each patch with zeros, not
with the voxels around it, so that the receptive field is 27 voxels however deep the network is. A
convolution is therefore a linear map from 27 × in to 27 × out numbers, computed as one matrix
product.
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
"""Number of voxels in a patch, and index of its central voxel."""

OFFSETS = np.array(list(product((-1, 0, 1), repeat=3)))
"""(27, 3) offsets of the voxels of a patch from its central voxel."""


class PatchConvolution(nn.Module):
    """A 3×3×3 convolution with zero padding inside each patch.

    Its weights (out, in, 3, 3, 3) and their initial values are those of torch's Conv3d; the bias
    starts at 0.
    """

    taps: torch.Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        convolution = nn.Conv3d(channels_in, channels_out, 3)
        self.weight = convolution.weight
        self.bias = nn.Parameter(torch.zeros(channels_out))
        step = OFFSETS[None] - OFFSETS[:, None] + 1  # (output voxel, input voxel, axis)
        tap = step @ [9, 3, 1]
        tap[((step < 0) | (step > 2)).any(-1)] = PATCH  # a row of zeros in `matrix`
        self.register_buffer("taps", torch.from_numpy(tap.T.ravel()), persistent=False)

    def identity(self, factor: float = 1.0) -> PatchConvolution:
        """Set the weights to a multiple of the identity, and return the layer."""
        nn.init.dirac_(self.weight)
        with torch.no_grad():
            self.weight.mul_(factor)
        return self

    def matrix(self) -> Float[torch.Tensor, "inside outside"]:
        """Compute the (27 in, 27 out) matrix of the convolution of a flat patch."""
        out, inside = self.weight.shape[:2]
        kernel = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 2).flatten(1)  # one row per tap
        rows = nn.functional.pad(kernel, (0, 0, 0, 1)).index_select(0, self.taps)
        return rows.view(PATCH, PATCH, inside, out).transpose(1, 2).reshape(
            PATCH * inside, PATCH * out)

    def forward(self, x: Float[torch.Tensor, "voxel 27 channel"]
                ) -> Float[torch.Tensor, "voxel 27 out"]:
        return (x.flatten(1) @ self.matrix()).unflatten(1, (PATCH, -1)) + self.bias


class FunctionalUnit(nn.Sequential):
    """Three convolutions from the coefficients of all degrees to those of one, with ReLU after the
    first two."""

    def __init__(self, coefficients: int, degree: int) -> None:
        super().__init__(PatchConvolution(coefficients, coefficients), nn.ReLU(),
                         PatchConvolution(coefficients, coefficients), nn.ReLU(),
                         PatchConvolution(coefficients, 2 * degree + 1))


class ResBlock(nn.Module):
    """A residual block: x minus the output of one functional unit per degree."""

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(FunctionalUnit(sh.size(l_max), l)
                                   for l in range(0, l_max + 1, 2))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]
                ) -> Float[torch.Tensor, "voxel 27 coef"]:
        return x - torch.cat([unit(x) for unit in self.units], 2)


class SHResNet(nn.Module):
    """The SHResNet of Koppers et al. 2018 (arXiv:1808.01595, fig. 1).

    It consists of two convolutions (pre), residual blocks, two convolutions (post), and a final
    convolution without padding, 3×3×3 → 1, of the difference post − pre. The paper does
    not give the initial weights. Here the network starts as the identity, that is, without
    harmonization: the convolutions around the blocks start as the identity, except the last of
    them, which starts at 0; the final convolution starts as −1 in the centre, since post − pre is
    then −x.

    Parameters
    ----------
    blocks : int
        Number of residual blocks.
    l_max : int
        Degree of the coefficients.
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
        """Return the same function in a faster form, for application."""
        return Folded(self)


class Affine:
    """The affine map x ↦ x A + a, in float64."""

    def __init__(self, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        self.matrix, self.shift = matrix.detach().double(), shift.detach().double()

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Affine:
        """Write a convolution or a fully connected layer as an affine map of flat patches."""
        if isinstance(layer, PatchConvolution):
            return cls(layer.matrix(), layer.bias.repeat(PATCH))
        assert isinstance(layer, nn.Linear)
        return cls(layer.weight.T, layer.bias)

    def then(self, other: Affine) -> Affine:
        """Return this map, followed by another."""
        return Affine(self.matrix @ other.matrix, self.shift @ other.matrix + other.shift)


class Folded:
    """An SHResNet in which consecutive linear maps are merged.

    With P the first two convolutions, E the last two and the final one together, F the final one
    alone (without its bias in F z_1), and U_i the units of block i,

        z_1 = P x,  z_{i+1} = z_i − U_i(z_i),  out = E z_n − E U_n(z_n) − F z_1.

    The first maps of U_1 absorb P, and the last maps of U_n absorb E, so that only the 15
    coefficients of the output are computed instead of all 27 × 15 after the last block. The values
    of z are ordered by degree.
    """

    def __init__(self, network: SHResNet) -> None:
        dtype, size = network.final.weight.dtype, network.final.weight.shape[0]
        blocks = [[[Affine.from_layer(layer) for layer in unit.children()
                    if isinstance(layer, PatchConvolution)]
                   for unit in block.get_submodule("units").children()]
                  for block in network.blocks.children()]
        index = torch.arange(PATCH * size).view(PATCH, size)
        widths = [len(three.shift) // PATCH for *_, three in blocks[0]]
        order = torch.cat([part.flatten() for part in index.split(widths, 1)])
        self.parts = [PATCH * w for w in widths]
        pre = Affine.from_layer(network.pre[0]).then(Affine.from_layer(network.pre[1]))
        final = Affine.from_layer(network.final)
        end = Affine.from_layer(network.post[0]).then(
            Affine.from_layer(network.post[1])).then(final)
        end = Affine(end.matrix[order], end.shift)
        bare = Affine(final.matrix, 0 * final.shift)
        self.skip = _plain(pre.then(bare), dtype)
        self.pre = _plain(Affine(pre.matrix[:, order], pre.shift[order]), dtype)
        self.units: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = []
        # shifts of the blocks so far, which are not subtracted from z itself
        missing = torch.zeros_like(end.matrix[:, 0])
        for i, block in enumerate(blocks):
            units = []
            for (one, two, three), rows in zip(block, end.matrix.split(self.parts), strict=True):
                first = pre.then(one) if i == 0 else Affine(
                    one.matrix[order], one.shift - missing @ one.matrix[order])
                last = three if i < len(blocks) - 1 else Affine(three.matrix @ rows, three.shift)
                units.append([_plain(part, dtype) for part in (first, two, last)])
            self.units.append(units)
            if i == len(blocks) - 1:
                self.end = _plain(Affine(end.matrix, end.shift - missing @ end.matrix), dtype)
                self.end[1].sub_((torch.cat([three.shift for *_, three in block])
                                  @ end.matrix).to(dtype))
            missing = missing + torch.cat([three.shift for *_, three in block])

    def __call__(self, x: Float[torch.Tensor, "voxel 27 coef"]
                 ) -> Float[torch.Tensor, "voxel coef"]:
        source = x = x.flatten(1)
        z = _through(x, self.pre)
        for units in self.units[:-1]:
            source = z = torch.cat([
                torch.addmm(part, hidden, matrix, alpha=-1)
                for part, (hidden, matrix) in zip(z.split(self.parts, 1), _hidden(source, units),
                                                 strict=True)], 1)
        out = _through(z, self.end) - _through(x, self.skip)
        for hidden, matrix in _hidden(source, self.units[-1]):
            out.addmm_(hidden, matrix, alpha=-1)
        return out


def _hidden(source: torch.Tensor, units: list[list[tuple[torch.Tensor, torch.Tensor]]]
            ) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute the second hidden layer of each unit, and return the matrix of its last map."""
    return [(_through(_through(source, one).relu_(), two).relu_(), matrix)
            for one, two, (matrix, _) in units]


def _plain(affine: Affine, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return affine.matrix.to(dtype).contiguous(), affine.shift.to(dtype)


def _through(x: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    matrix, shift = affine
    return torch.addmm(shift, x, matrix)


class QSpacePerceptron(nn.Module):
    """The q-space network of Golkov et al. 2016 (doi:10.1109/TMI.2016.2551324).

    It maps the coefficients of the central voxel alone, through three hidden layers of 150 units
    with ReLU and a dropout of 0.1.
    """

    def __init__(self, *, hidden: int = 150, dropout: float = 0.1, l_max: int = 4) -> None:
        super().__init__()
        size = sh.size(l_max)
        self.layers = mlp([size, hidden, hidden, hidden, size],
                          lambda: nn.Sequential(nn.ReLU(), nn.Dropout(dropout)))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        return self.layers(x[:, CENTRE])


class HybridCNN(nn.Module):
    """A 3×3×3 convolution without padding, then 1×1×1 convolutions, with ReLU between them.

    The output is added to the coefficients of the central voxel. The network starts as the
    identity, since its last layer starts at 0.
    """

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
    """Compute the steps of the flat index (C order) from a voxel to the 27 voxels of its patch.

    Parameters
    ----------
    shape : tuple of int
        Shape of the image.

    Returns
    -------
    (27,) ndarray
    """
    return OFFSETS @ [shape[1] * shape[2], shape[2], 1]


def patches(image: Float[torch.Tensor, "voxel coef"], centres: Int[torch.Tensor, " n"],
            steps: Int[torch.Tensor, "_ 27"]) -> Float[torch.Tensor, "n 27 coef"]:
    """Extract the patches around voxels of a flat image.

    Parameters
    ----------
    image : (voxel, coefficient)
        One image, or several one after another, in C order.
    centres : (n,)
        Indices of the central voxels; none may lie on a face of its image.
    steps : (1, 27) or (n, 27)
        `neighbours` of the image, or those of the image of each centre.

    Returns
    -------
    (n, 27, coefficient)
    """
    return image[centres[:, None] + steps]
