"""Application in overlapping blocks: against the application to the whole grid."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from bidsapp.networks.volumetric import VolumeNetwork
from bidsapp.volumetric.apply import OVERLAP, apply, blocks, overlap, taper
from bidsapp.volumetric.inputs import Grid
from support import ellipsoid


class Local(VolumeNetwork):
    """Its output depends on its own voxel alone."""

    def __init__(self):
        super().__init__(channels=3, any_table=False, levels=1)
        self.head = nn.Conv3d(3, 2, 1)
        self.seen = []

    def features(self, channels):
        self.seen.append(channels.shape[2:])
        return torch.tanh(channels)


class Mean(Local):
    """Its output depends on the whole block, as that of instance normalisation does."""

    def features(self, channels):
        return channels * 0 + channels.mean((2, 3, 4), keepdim=True)


@pytest.fixture
def dwi(rng):
    made = ellipsoid.dwi_on(np.diag([-2.0, 2.0, 2.0, 1]), shape=(60, 30, 40),
                            scheme=((0, 1), (1000, 6)))
    return ellipsoid.with_signal(made, rng.uniform(0, 1, made.signal.shape))


@pytest.mark.parametrize("size", [None, 2.6])
def test_blocks_give_what_the_whole_gives(dwi, rng, size):
    grid, network = Grid.over(dwi, size), Local()
    matrix = torch.from_numpy(rng.standard_normal((6, 3)).astype(np.float32))
    found = apply(network, dwi, grid, matrix, torch.exp, 24, "cpu")
    assert len(network.seen) > 4
    assert max(max(shape) for shape in network.seen) <= 24
    ratio = torch.tensor(dwi.signal[:, 1:])  # the b0 is 1
    with torch.inference_mode():
        volume = torch.tanh(grid.volumes(ratio @ matrix))
        want = grid.voxels(network.head(volume[None])[0].exp())
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_blocks_that_differ_are_blended_without_steps(dwi):
    grid = Grid.over(dwi)
    found = apply(Mean(), dwi, grid, torch.ones(6, 3), lambda y: y, 24, "cpu")
    volume = grid.volumes(torch.from_numpy(found))
    inside = grid.mask[1:] & grid.mask[:-1]
    steps = (volume[:, 1:] - volume[:, :-1])[:, inside].abs().amax(1)
    spread = volume[:, grid.mask].amax(1) - volume[:, grid.mask].amin(1)
    assert (spread > 0).all()
    assert (steps <= 1.5 * spread / OVERLAP).all()


@pytest.mark.parametrize("patch", [16, 24, 40])
@pytest.mark.parametrize("shape", [(5, 24, 60), (25, 40, 41)])
def test_blocks_cover_the_grid_and_overlap(shape, patch):
    count, weight = torch.zeros(shape), torch.zeros(shape)
    for block in blocks(shape, patch):
        assert all(part.stop - part.start == min(patch, n)
                   for part, n in zip(block, shape, strict=True))
        count[block] += 1
        weight[block] += taper(block, shape, overlap(patch))
    assert count.min() == 1
    assert weight.min() > 0
    starts = sorted({block[2].start for block in blocks(shape, patch)})
    assert all(b - a <= patch - min(16, patch // 2) for a, b in pairwise(starts))
