"""Application of a network to a run, in overlapping blocks of its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from jaxtyping import Float

from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.networks.volumetric import VolumeNetwork
from bidsapp.volumetric import inputs
from bidsapp.volumetric.inputs import Block, Grid

OVERLAP = 16
"""Voxels that neighbouring blocks share along an axis, half a block at most. Instance
normalisation takes the statistics of a block, so that blocks differ; their results are blended
linearly over the overlap."""


@torch.inference_mode()
def apply(network: VolumeNetwork, dwi: Dwi, grid: Grid, matrix: Float[torch.Tensor, "n channel"],
          activate: Callable[[torch.Tensor], torch.Tensor], patch: int, device: str
          ) -> Float[np.ndarray, "voxel out"]:
    """Apply a network to all voxels of a run.

    Parameters
    ----------
    network : VolumeNetwork
        On the device, in eval mode.
    dwi : Dwi
        Its measurements of `inputs.weighted` are the n of the matrix.
    grid : Grid
    matrix : (n, channel)
        From S/S0 to the channels.
    activate : callable
        (out, x, y, z) → (k, x, y, z): what is blended, such as probabilities.
    patch : int
        Largest number of voxels of a block along an axis.
    device : str

    Returns
    -------
    (voxel, k)
    """
    measurements = inputs.weighted(dwi.acquisition)
    b0 = dwi.acquisition.b0
    weights = matrix.to(device)

    def channels(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"channels": inputs.attenuation(
            signal[:, measurements], signal[:, b0]) @ weights}

    values = torch.from_numpy(map_voxels(channels, dwi.signal, device)["channels"])
    total: torch.Tensor | None = None
    weight = torch.zeros(grid.shape)
    for block in blocks(grid.shape, patch):
        if not grid.mask[block].any():
            continue
        features = network.features(grid.volumes(values, block)[None].to(device))
        out = activate(network.head(features)[0]).cpu()
        ramp = taper(block, grid.shape, overlap(patch))
        if total is None:
            total = torch.zeros(len(out), *grid.shape)
        total[(slice(None), *block)] += ramp * out
        weight[block] += ramp
    assert total is not None
    return grid.voxels(total / weight.clamp(min=1e-6)).numpy()


def blocks(shape: tuple[int, int, int], patch: int) -> Iterator[Block]:
    """Cover a grid with blocks of at most `patch` voxels along an axis, which overlap by
    `overlap(patch)` or more."""
    shared = overlap(patch)

    def parts(n: int) -> list[slice]:
        if n <= patch:
            return [slice(0, n)]
        count = -(-(n - shared) // (patch - shared))
        return [slice(start, start + patch)
                for start in np.linspace(0, n - patch, count).round().astype(int).tolist()]

    yield from product(*map(parts, shape))


def overlap(patch: int) -> int:
    """Number of voxels that neighbouring blocks share along an axis, at least."""
    return min(OVERLAP, patch // 2)


def taper(block: Block, shape: tuple[int, int, int], width: int
          ) -> Float[torch.Tensor, "x y z"]:
    """Weights of a block: 1, falling linearly over `width` voxels towards its faces inside the
    grid."""
    ramps = []
    for part, n in zip(block, shape, strict=True):
        i = torch.arange(part.start, part.stop, dtype=torch.float32)
        low = (i - part.start + 1) / width if part.start > 0 else torch.ones_like(i)
        high = (part.stop - i) / width if part.stop < n else torch.ones_like(i)
        ramps.append(torch.minimum(low, high).clamp(max=1))
    return torch.einsum("x,y,z->xyz", *ramps)
