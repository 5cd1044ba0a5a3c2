"""U-Net of Ronneberger et al. 2015 (doi:10.1007/978-3-319-24574-4_28), for slices or volumes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import nn


class UNet(nn.Module):
    """A U-Net for grids of any size.

    Each level has two 3×3 (or 3×3×3) convolutions with zero padding, each followed by a
    normalisation and ReLU. A coarser level starts with a maximum over 2×2 (2×2×2) voxels and has
    twice as many channels. On the way back, values are enlarged and joined with those of the finer
    level. A final 1×1 convolution makes the outputs. Grids whose size is no multiple of 2^levels
    are padded with zeros at their ends, and the outputs are cropped.

    Parameters
    ----------
    inputs : int
        Number of channels.
    outputs : int, optional
        Number of outputs; None for the `width` features before the final convolution.
    width : int
        Channels of the finest level.
    levels : int
        Number of times that the grid is halved.
    dimension : int
        2 for slices, 3 for volumes.
    normalisation : str
        `batch`, or `instance`: of each channel over one image.
    enlarge : str
        `repeat` values, or `transposed` convolutions, as in the original; these leave a
        checkerboard.
    """

    def __init__(self, *, inputs: int, outputs: int | None, width: int = 16, levels: int = 2,
                 dimension: int = 2, normalisation: str = "batch", enlarge: str = "repeat") -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimension]
        transposed = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimension]
        normalise: Any = {"batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimension],
                          "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimension]
                          }[normalisation]

        def level(channels_in: int, channels_out: int) -> nn.Sequential:
            return nn.Sequential(*(
                layer for a, b in pairwise([channels_in, channels_out, channels_out])
                for layer in (convolution(a, b, 3, padding=1, bias=False),
                              normalise(b, affine=True), nn.ReLU())))

        widths = [width * 2**k for k in range(levels + 1)]
        self.down = nn.ModuleList(level(a, b) for a, b in pairwise([inputs, *widths]))
        self.up = nn.ModuleList(level(fine + coarse, fine) for fine, coarse in pairwise(widths))
        self.reduce = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dimension](2)
        self.enlarge = nn.ModuleList(
            {"repeat": nn.Upsample(scale_factor=2, mode="nearest"),
             "transposed": transposed(n, n, 2, stride=2)}[enlarge] for n in widths[1:])
        self.final = nn.Identity() if outputs is None else convolution(width, outputs, 1)

    def forward(self, x: Float[torch.Tensor, "image channel *grid"]
                ) -> Float[torch.Tensor, "image out *grid"]:
        step = 2 ** len(self.up)
        ends = [p for n in reversed(x.shape[2:]) for p in (0, -n % step)]  # last axis first
        features = [self.down[0](nn.functional.pad(x, ends))]
        for level in list(self.down)[1:]:
            features.append(level(self.reduce(features[-1])))
        y = features.pop()
        for level, enlarge in zip(reversed(self.up), reversed(self.enlarge), strict=True):
            y = level(torch.cat([features.pop(), enlarge(y)], 1))
        return self.final(y)[(..., *(slice(n) for n in x.shape[2:]))]
