"""Pairs of scans: who they are, and one brought onto the other.

The head of `synthetic_head` is made twice from its formula: as it lies, and moved by a known rigid
transform, with fibres turned and the b-table not.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion, map_coordinates
from scipy.spatial.transform import Rotation

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError
from bidsapp.harmonization import pairs
from bidsapp.registration.deformable import rotations
from bidsapp.registration.geometry import (
    canonical,
    fill_nearest,
    grid_coordinates,
    world_points,
)
from support import bids_tree, synthetic_head

BVALS, AXES = bids_tree.table(((0, 4), (1000, 30)))
AFFINE = np.diag([*synthetic_head.ZOOMS, 1.0])
AFFINE[:3, 3] = [-(n - 1) / 2 * z for n, z in
                 zip(synthetic_head.SHAPE, synthetic_head.ZOOMS, strict=True)]
MOVE = np.eye(4)  # world of the source → world of the target
MOVE[:3, :3] = Rotation.from_euler("xyz", [6, -8, 12], degrees=True).as_matrix()
MOVE[:3, 3] = 3.0, -4.0, 2.5


def world():
    index = np.stack(np.meshgrid(*map(np.arange, synthetic_head.SHAPE), indexing="ij"), -1)
    return index @ AFFINE[:3, :3].T + AFFINE[:3, 3]


def head(pose, rng, noise):
    """The head after `pose`, each voxel the mean of 27 points inside it, and its mask."""
    labels = synthetic_head.tissues()
    turn = pose[:3, :3]
    back = np.linalg.inv(AFFINE) @ np.linalg.inv(pose)
    clean = np.zeros((*labels.shape, len(BVALS)))
    plain = [synthetic_head.signal(np.full((1, 1, 1), k), BVALS, AXES @ turn, np.random.default_rng(
        0), 0)[0][0, 0, 0] for k in range(5)]
    steps = np.stack(np.meshgrid(*[[-1 / 3, 0, 1 / 3]] * 3, indexing="ij"), -1).reshape(-1, 3)
    for step in steps:
        points = world() + step * synthetic_head.ZOOMS
        at = np.moveaxis(points @ back[:3, :3].T + back[:3, 3], -1, 0)
        found = map_coordinates(labels, at, order=0)
        clean += np.array(plain)[found] / len(steps)
    noisy = np.hypot(clean + noise * rng.standard_normal(clean.shape),
                     noise * rng.standard_normal(clean.shape)).astype(np.float32)
    mask = clean[..., 0] > 0.5 * synthetic_head.S0
    return Dwi(noisy[mask], mask, AFFINE, Acquisition(BVALS, AXES))


@pytest.fixture(scope="module")
def scans():
    rng = np.random.default_rng(5)
    return head(np.eye(4), rng, 10.0), head(MOVE, rng, 10.0)


@pytest.fixture(scope="module", params=[
    pytest.param(False, id="rigid"), pytest.param(True, id="deformable", marks=pytest.mark.slow)])
def aligned(request, scans):
    return pairs.align(*scans, l_max=4, deformable=request.param)


@pytest.fixture(scope="module")
def core():
    """White matter of the target with one axis, two voxels around included."""
    back = np.linalg.inv(AFFINE) @ np.linalg.inv(MOVE)
    at = np.moveaxis(world() @ back[:3, :3].T + back[:3, 3], -1, 0)
    labels = map_coordinates(synthetic_head.tissues(), at, order=0)
    return binary_erosion(labels == 4, np.ones((3, 3, 3)), iterations=2)


def test_coefficients_after_alignment_are_those_of_the_truth(request, core, aligned):
    """Interpolation is exact in uniform tissue. What remains is the noise of the fit,
    σ/S0 √(Σ F² + c²/4) (of the weighted volumes and of the mean of 4 b0s), of which splines keep
    most, and the error of the turn. SyN, which learns nothing there, turns a little."""
    fit = sh.smooth_fit(4, AXES[4:], pairs.SMOOTHING)
    truth = synthetic_head.signal(np.full((1, 1, 1), 4), BVALS, AXES @ MOVE[:3, :3],
                                  np.random.default_rng(0), 0)[0][0, 0, 0]
    c = fit @ (truth[4:] / synthetic_head.S0)
    sd = 10.0 / synthetic_head.S0 * np.sqrt((fit**2).sum(1) + c**2 / 4)
    found = aligned.image[0, 1:-1, 1:-1, 1:-1][core & aligned.overlap]
    assert len(found) > 200
    # axes turned by a degree change coefficients of degree l by up to l times that
    turn = np.deg2rad(1) * sh.degrees(4) * np.sqrt((c[1:]**2).sum())
    assert (np.abs(found.mean(0) - c) < 4 * sd / np.sqrt(len(found) / 8) + turn).all()
    bent = turn if "deformable" in request.node.name else 0
    assert (found.std(0) < 1.2 * sd + bent).all()
    assert (found.std(0) > 0.6 * sd).all()


def test_fibres_follow_the_head(core, aligned):
    """The axis of white matter in the source is y; in the target it is R y. Signal is least along
    it, and so is its second moment."""
    points, weights = sh.quadrature(8)
    inside = core & aligned.overlap
    values = sh.basis(4, points) @ aligned.image[0, 1:-1, 1:-1, 1:-1][inside].mean(0)
    moment = (points * (weights * values)[:, None]).T @ points
    axis = np.linalg.eigh(moment)[1][:, 0]
    assert abs(axis @ MOVE[:3, :3] @ [0, 1, 0]) > np.cos(np.deg2rad(1))
    assert abs(axis @ [0, 1, 0]) < np.cos(np.deg2rad(10))


def test_target_and_labels_are_the_targets_own(scans, aligned):
    _, target = scans
    rows = aligned.overlap[target.mask]
    np.testing.assert_allclose(aligned.target, target.signal[rows] / target.mean_b0[rows, None],
                               rtol=1e-6)
    assert not aligned.labels[~aligned.overlap].any()
    assert aligned.overlap.sum() > 0.95 * target.mask.sum()
    assert {int(k) for k in np.unique(aligned.labels)} == {0, tissue.GREY, tissue.WHITE}


@pytest.mark.slow
def test_alignment_repeats_itself(request, scans, aligned):
    again = pairs.align(*scans, l_max=4, deformable="deformable" in request.node.name)
    np.testing.assert_array_equal(again.image, aligned.image)


@pytest.mark.slow
@pytest.mark.parametrize("bend", [0, 3])
def test_a_deformation_is_kept_where_there_is_one(scans, bend):
    """SyN follows noise: heads that only moved are registered as rigid ones. A source bent by 3 mm
    is brought nearer to the truth, M and the bend's inverse, than any rigid transform brings it."""
    source, target = scans
    place = world()

    def bent(points):
        return points + bend * np.sin(points[..., 1:2] / 15) * [0, 1, 0]

    at = grid_coordinates(AFFINE, bent(place))
    mask = map_coordinates(source.mask.astype(float), at, order=1) > 0.5
    signal = np.stack([map_coordinates(source.unmask(v), at, order=3)[mask]
                       for v in source.signal.T], 1).astype(np.float32)
    source = Dwi(signal, mask, AFFINE, source.acquisition) if bend else source
    found = [pairs.register(source, target, deformable=d) for d in (True, False)]
    errors = []
    for registration in found:
        lies = bent(np.moveaxis(registration.coordinates, 0, -1) @ AFFINE[:3, :3].T + AFFINE[:3, 3])
        truth = (place[registration.overlap] - MOVE[:3, 3]) @ MOVE[:3, :3]
        errors.append(np.sqrt(np.square(lies - truth).sum(1).mean()))
    if bend:
        assert errors[0] < 0.7 * errors[1], errors
    else:
        assert errors[0] == errors[1] < 0.3, errors


def test_local_rotations_are_the_polar_part_of_the_jacobian(rng):
    """φ(p) = R S p, linear: finite strain gives Rᵀ everywhere, whatever the stretch S."""
    turn = Rotation.from_euler("zyx", [30, 20, -15], degrees=True).as_matrix()
    stretch = np.eye(3) + 0.1 * (a := rng.normal(size=(3, 3))) + 0.1 * a.T
    affine = np.diag([-2.0, 2.5, 3.0, 1.0])
    place = world_points((5, 6, 7), affine) @ (turn @ stretch).T
    np.testing.assert_allclose(rotations(place, affine),
                               np.broadcast_to(turn.T, (5, 6, 7, 3, 3)), atol=1e-10)


@pytest.mark.parametrize("how", [{"deformable": False}, pytest.param(
    {"rigid": np.eye(4)}, marks=pytest.mark.slow)])
def test_scans_that_share_nothing_are_refused(scans, how):
    source, target = scans
    lower, upper = (np.zeros_like(m) for m in (source.mask, target.mask))
    lower[:, :, :8], upper[:, :, 24:] = source.mask[:, :, :8], target.mask[:, :, 24:]
    with pytest.raises(DataError, match=r"overlap in .* voxels, less than 50 %".replace(" %", "%")):
        pairs.align(Dwi(source.signal[lower[source.mask]], lower, AFFINE, source.acquisition),
                    Dwi(target.signal[upper[target.mask]], upper, AFFINE, target.acquisition),
                    l_max=2, **how)


def test_canonical_grid_is_the_same_however_an_image_is_stored(rng):
    """Axes turned, in another order: mask, world points and rows of one grid."""
    mask = rng.random((4, 5, 6)) < 0.5
    values, affine = rng.normal(size=int(mask.sum())), np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 5, -6, 7
    image = np.zeros(mask.shape)
    image[mask] = values
    stored = image[::-1].transpose(2, 0, 1)
    turn = np.eye(4)[:, [2, 0, 1, 3]] @ np.eye(4)
    turn[0] *= -1
    turn[0, 3] = mask.shape[0] - 1
    inside, world, rows = canonical(stored != 0, affine @ turn)
    np.testing.assert_array_equal(inside, mask)
    np.testing.assert_allclose(world, affine)
    np.testing.assert_array_equal(stored[stored != 0][rows], values)


def test_filled_takes_the_nearest(rng):
    mask = np.zeros((7, 8, 9), bool)
    mask[2:5, 3:6, 4:7] = True
    values = rng.normal(size=(27, 6)).astype(np.float32)
    usable = np.ones(27, bool)
    usable[13] = False
    wide = fill_nearest(values[usable], mask, usable, margin=1)
    assert wide.shape == (9, 10, 11, 6)
    np.testing.assert_array_equal(wide[0, 0, 0], values[0])
    np.testing.assert_array_equal(wide[-1, -1, -1], values[-1])
    grid = wide[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(grid[mask][usable], values[usable])
    assert any((grid[3, 4, 5] == values[i]).all() for i in (4, 10, 12, 14, 16, 22))


def test_pairs_are_every_run_with_every_run():
    table = pd.DataFrame([("01", "A", "a1"), ("01", "A", "a2"), ("01", "B", "b1"),
                          ("02", "A", "a3"), ("03", "B", "b3"), ("03", "C", "c3")],
                         columns=["participant", "batch", "run"])
    found = pairs.pair_runs(table, "B")
    assert found == {"A": [pairs.Pair("01", "a1", "b1"), pairs.Pair("01", "a2", "b1")],
                     "C": [pairs.Pair("03", "c3", "b3")]}


def test_pairs_of_one_session():
    """As where two coils are compared before and after years."""
    table = pd.DataFrame([("01", "x", "A", "a1"), ("01", "x", "B", "b1"), ("01", "y", "A", "a2"),
                          ("01", "y", "B", "b2"), ("01", "z", "B", "b3")],
                         columns=["participant", "session", "batch", "run"])
    assert pairs.pair_runs(table, "A", by_session=True) == {
        "B": [pairs.Pair("01", "b1", "a1"), pairs.Pair("01", "b2", "a2")]}
    assert len(pairs.pair_runs(table, "A")["B"]) == 6


def test_labels_of_a_t1w_image_are_the_likelier():
    mask = np.ones((1, 1, 4), bool)
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6], [0.6, 0.3, 0.1]], np.float32)
    dwi = Dwi(np.ones((4, 34), np.float32), mask, AFFINE, Acquisition(BVALS, AXES), tissue=p)
    found = tissue.labels(dwi, np.ones(4), np.ones(4), np.array([True, True, True, False]))
    assert found.tolist() == [tissue.GREY, tissue.WHITE, 0, 0]
