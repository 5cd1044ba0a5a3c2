"""Grid of a network and its inputs: against coordinates of the world and known functions."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.errors import Refusal
from bidsapp.volumetric import inputs
from bidsapp.volumetric.inputs import Grid
from support import bids_tree
from support.ellipsoid import dwi_on, world

VOXEL = (2.0, 2.2, 2.9)


AFFINES = {
    "plain": bids_tree.affine(VOXEL, det=1),
    "left-handed": bids_tree.affine(VOXEL, det=-1),
    "sagittal, turned": bids_tree.affine(VOXEL, turn=(10, -7, 5), order=(1, 2, 0)),
}


@pytest.fixture(params=AFFINES)
def affine(request):
    return AFFINES[request.param]


@pytest.mark.parametrize("size", [None, 4.0, 1.5])
def test_neighbours_on_the_grid_are_one_voxel_apart_along_its_axes(affine, size):
    dwi = dwi_on(affine)
    grid = Grid.over(dwi, size)
    points = grid.volumes(world(dwi)).numpy()
    # away from the rim, where means are over fewer voxels
    inner = ndimage.binary_erosion(grid.mask.numpy(), iterations=3)
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    for axis in range(3):
        step = (np.roll(points, -1, axis + 1) - points)[:, inner]
        length = size or edges[np.argmax(np.abs(
            (affine[:3, :3] / edges).T @ grid.rotation[:, axis]))]
        assert inner.sum() > 20
        np.testing.assert_allclose(step.mean(1), length * grid.rotation[:, axis], atol=1e-3)
        assert grid.rotation[axis, axis] > 0.9
    assert np.linalg.det(grid.rotation) == pytest.approx(1)


def test_values_come_back_exactly_without_resampling(affine, rng):
    dwi = dwi_on(affine)
    values = torch.from_numpy(rng.standard_normal((len(dwi.signal), 3)).astype(np.float32))
    grid = Grid.over(dwi)
    assert torch.equal(grid.voxels(grid.volumes(values)), values)
    assert int(grid.mask.sum()) == len(values)


def test_a_voxel_within_ten_per_cent_is_not_resampled():
    dwi = dwi_on(np.diag([2.0, 2.1, 1.9, 1]))
    assert Grid.over(dwi, 2.0).ratio == (1, 1, 1)
    assert Grid.over(dwi, 2.4).ratio == pytest.approx((2.4 / 2, 2.4 / 2.1, 2.4 / 1.9))


def test_a_sliver_is_refused():
    slab = replace(dwi_on(np.diag([2.0, 2, 3, 1])), mask=np.ones((20, 20, 3), bool),
                   signal=np.ones((1200, 66), np.float32))
    with pytest.raises(Refusal, match=r"of 2 × 2 × 3 mm is on 14 × 14 × 3 voxels of the network"):
        Grid.over(slab, 3.0)
    assert Grid.over(slab, 2.0).shape == (20, 20, 5)


@pytest.mark.parametrize("size", [4.0, 1.5])
def test_linear_functions_survive_the_way_there_and_back(affine, size):
    dwi = dwi_on(affine)
    grid = Grid.over(dwi, size)
    points = world(dwi)
    error = (grid.voxels(grid.volumes(points)) - points).norm(dim=1)
    centre = (points - points.mean(0)).norm(dim=1)
    inner = centre < 0.5 * centre.max()
    assert float(error[inner].max()) < 1e-3
    assert float(error.max()) < 1.8 * size  # the rim: its mean is over voxels inside the mask


def test_coarser_voxels_average_noise(rng):
    dwi = dwi_on(np.diag([2.0, 2.0, 2.0, 1]), shape=(40, 40, 40))
    noise = torch.from_numpy(rng.standard_normal((len(dwi.signal), 4)).astype(np.float32))
    coarse = Grid.over(dwi, 6.0)
    sd = coarse.volumes(noise)[:, ndimage.binary_erosion(coarse.mask.numpy())].std()
    # mean of linear interpolation over three voxels: weights 1/24, 7/24, 8/24, 7/24, 1/24
    assert float(sd) == pytest.approx((164 / 576) ** 1.5, rel=0.05)


@pytest.mark.parametrize("size", [None, 3.3])
def test_a_block_is_a_part_of_the_whole(affine, size, rng):
    dwi = dwi_on(affine)
    values = torch.from_numpy(rng.standard_normal((len(dwi.signal), 2)).astype(np.float32))
    grid = Grid.over(dwi, size)
    block = (slice(2, 7), slice(0, 9), slice(5, grid.shape[2]))
    torch.testing.assert_close(grid.volumes(values, block),
                               grid.volumes(values)[(slice(None), *block)])


def test_directions_are_relative_to_the_grid(affine):
    dwi = dwi_on(affine)
    grid = Grid.over(dwi)
    points = grid.volumes(world(dwi)).numpy()
    x, y, z = (n // 2 for n in grid.shape)
    along = points[:, x + 3, y, z] - points[:, x, y, z]
    np.testing.assert_allclose(grid.directions(along / np.linalg.norm(along)), [1, 0, 0],
                               atol=1e-5)


def test_attenuations_are_clipped_and_0_without_signal():
    signal = torch.tensor([[1.0, 4.0], [-1.0, 1.0], [1.0, 1.0]])
    b0 = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])
    assert inputs.attenuation(signal, b0).tolist() == [[0.5, 1.0], [0.0, 0.5], [0.0, 0.0]]


def test_tables_fit_each_shell_with_what_its_directions_carry(rng):
    dwi = dwi_on(AFFINES["sagittal, turned"], scheme=((0, 1), (700, 8), (1500, 20), (3000, 64)))
    acquisition = dwi.acquisition[rng.permutation(len(dwi.acquisition))]
    part = acquisition[inputs.weighted(acquisition)]
    grid = Grid.over(dwi)
    table = inputs.describe_table(part, grid)
    highest = []
    for i, b in enumerate((0.7, 1.5, 3.0)):
        assert float(table.shells[i, 0]) == pytest.approx(b)
        of_shell = (part.bvals == 1000 * b)
        np.testing.assert_array_equal(table.shell.numpy() == i, of_shell)
        used = np.flatnonzero(table.fit[i].abs().sum(1).numpy() > 0)
        highest.append(int(sh.degrees(8)[used].max()))
        c = np.zeros(45)
        c[used] = rng.standard_normal(len(used))
        values = np.where(of_shell, sh.basis(8, grid.directions(part.bvecs)) @ c, 7.0)
        np.testing.assert_allclose(table.fit[i].numpy() @ values, c, atol=1e-4)
    assert highest == [2, 4, 8]


def test_interpolation_is_exact_up_to_its_degree(rng):
    dwi = dwi_on(np.diag([2.0, 2.0, 2.0, 1]), scheme=((0, 1), (1000, 64), (2000, 20)))
    part = dwi.acquisition[inputs.weighted(dwi.acquisition)]
    table = inputs.describe_table(part, Grid.over(dwi))
    wanted = bids_tree.directions(40, turn=1.0)
    for b, degree in ((1100.0, 8), (1900.0, 4)):
        matrix, found = inputs.interpolation(table, wanted, b)
        c = rng.standard_normal(sh.size(degree))
        values = sh.basis(degree, part.bvecs) @ c
        np.testing.assert_allclose(matrix.numpy().T @ values, sh.basis(degree, wanted) @ c,
                                   atol=1e-4)
        assert found == degree


def test_runs_without_b0_or_directions_are_refused():
    few = Acquisition(*bids_tree.table(((0, 2), (1000, 5))))
    with pytest.raises(Refusal, match=re.escape("6 directions of linear encoding")):
        inputs.weighted(few)
    whole = Acquisition(*bids_tree.table(((0, 2), (1000, 6), (2000, 5))))
    np.testing.assert_array_equal(inputs.weighted(whole), np.arange(2, 8))
    with pytest.raises(Refusal, match="0 b0 volumes"):
        inputs.weighted(whole[2:])
    planar = replace(whole, b_delta=np.where(whole.bvals > 50, -0.5, 1.0))
    with pytest.raises(Refusal, match="linear encoding"):
        inputs.weighted(planar)
