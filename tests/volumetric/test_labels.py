"""Labels of tissues and fibres, against known numbers and axes of fibres, and against dipy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dipy.core.sphere import Sphere
from dipy.direction import peak_directions

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.simulate import odf, protocols
from bidsapp.volumetric import labels

AXIAL, RADIAL = 1.8e-3, 0.2e-3
SHAPE = (10, 10, 6)


def acquisition(shells=((3000.0, 64),), b0=2):
    counts = [b0, *(n for _, n in shells)]
    return Acquisition(np.repeat([0.0, *(b for b, _ in shells)], counts),
                       np.vstack([np.zeros((b0, 3)), *(protocols.spread(n) for _, n in shells)]))


def head(table, angle=90.0, sd=0.01, seed=0):
    """(Dwi, number of fibres, axes of the fibres (voxel, 3, 3), their shares): each voxel has one
    fibre, two of shares 0.6 and 0.4 at an angle, or three at right angles (0.4, 0.3, 0.3)."""
    n = int(np.prod(SHAPE))
    rng = np.random.default_rng(seed)
    number = np.arange(n) % 3 + 1
    t = np.radians(angle)
    axes = np.tile(np.eye(3), (n, 1, 1))
    axes[number == 2, 1] = (np.cos(t), np.sin(t), 0)
    turns = odf.random_rotations(n, torch.Generator().manual_seed(seed)).numpy()
    axes = axes @ turns.transpose(0, 2, 1)
    share = np.array([(1, 0, 0), (0.6, 0.4, 0), (0.4, 0.3, 0.3)])[number - 1]
    cosine = np.einsum("vfi,mi->vfm", axes, table.bvecs)
    signal = np.einsum("vf,vfm->vm", share, np.exp(
        -table.bvals * (RADIAL + (AXIAL - RADIAL) * cosine ** 2)))
    noisy = np.hypot(signal + sd * rng.standard_normal(signal.shape),
                     sd * rng.standard_normal(signal.shape))
    affine = np.diag([-4.0, 4, 4, 1])  # x runs to the left
    return Dwi(1000 * noisy.astype(np.float32), np.ones(SHAPE, bool), affine,
               table), number, axes


def degrees(a, b):
    return np.degrees(np.arccos(np.abs((a * b).sum(-1)).clip(0, 1)))


def test_fibres_are_counted_and_found():
    dwi, number, axes = head(acquisition())
    white = np.arange(len(number)) % 7 > 0
    found = labels.label_fibres(dwi, white)
    assert found.count.dtype == np.int64 and found.axis.dtype == np.float32
    np.testing.assert_array_equal(found.valid, white)
    assert not found.count[~white].any() and not found.axis[~white].any()
    assert np.mean(found.count[white] == number[white]) > 0.95
    np.testing.assert_allclose(np.linalg.norm(found.axis[white], axis=1), 1, atol=1e-6)
    error = degrees(found.axis, axes[:, 0])[white]
    assert np.quantile(error[number[white] == 1], 0.95) < 2
    assert np.quantile(error[number[white] == 2], 0.95) < 4
    assert "degree 8 at b = 3000" in found.notice and "64 directions" in found.notice


def test_fewer_directions_carry_a_lower_degree():
    """The shell is used whose directions carry the highest degree, then by its b-value."""
    few = labels.label_fibres(*with_white(head(acquisition(((1000.0, 30),)))[0]))
    assert "degree 6 at b = 1000 s/mm² (30 directions)" in few.notice and "45" in few.notice
    for shells, b in ((((1000.0, 60), (3000.0, 30)), 1000), (((1000.0, 60), (2000.0, 60)), 2000)):
        dwi, number, axes = head(acquisition(shells))
        found = labels.label_fibres(*with_white(dwi))
        assert f"degree 8 at b = {b}" in found.notice
        assert np.median(degrees(found.axis, axes[:, 0])[number == 1]) < 2


def with_white(dwi):
    return dwi, np.ones(len(dwi.signal), bool)


@pytest.mark.parametrize("table,message", [
    (acquisition(b0=0), "0 b0 volumes"),
    (acquisition(((1000.0, 12),)), "has 2 b0 volumes and 12 × b 1000"),
    (replace(acquisition(), bvecs=np.vstack([np.zeros((2, 3)), np.tile(
        protocols.spread(8), (8, 1))])), "64 × b 3000"),  # eight directions, repeated
])
def test_refuses_a_table_without_fibres(table, message):
    dwi, *_ = head(table)
    with pytest.raises(Refusal, match=message):
        labels.label_fibres(*with_white(dwi))


def test_refuses_white_matter_without_single_fibres():
    dwi, number, _ = head(acquisition())
    with pytest.raises(Refusal, match=r"0 single-fibre voxels .* in 200 voxels of white matter"):
        labels.label_fibres(dwi, number == 3)


def test_no_signal_has_no_label():
    dwi, *_ = head(acquisition())
    signal = dwi.signal.copy()
    signal[5] = 0
    found = labels.label_fibres(replace(dwi, signal=signal), np.ones(len(signal), bool))
    assert not found.valid[5] and found.count[5] == 0 and found.valid.sum() == len(signal) - 1


@pytest.mark.parametrize("l_max", [4, 8])
def test_peaks_are_those_of_dipy(rng, l_max):
    """Random densities have as many peaks as dipy finds on the same directions and thresholds."""
    density = torch.from_numpy(rng.standard_normal((60, sh.size(l_max))))
    density[:, 0] = 6  # few negative values, of which dipy makes another threshold
    count, axis = labels.find_peaks(density)
    points, _ = labels._half_sphere()
    sphere = Sphere(xyz=np.vstack([points, -points]))
    values = density.numpy() @ sh.basis(l_max, sphere.vertices).T
    same = 0
    for row, n, found, coefficients in zip(values, count, axis, density.numpy(), strict=True):
        directions, heights, _ = peak_directions(row, sphere, relative_peak_threshold=0,
                                                 min_separation_angle=labels.MIN_ANGLE)
        assert degrees(found, directions[0]) < 4
        same += n == min(3, int((heights >= 0.5 * heights[0]).sum()))
        # between the directions is a higher value
        assert sh.basis(l_max, found[None])[0] @ coefficients >= heights[0] - 1e-9
    assert same >= 57  # ties at 25°


def test_peaks_closer_than_25_degrees_are_one():
    """Two sharp lobes at an angle; of three at 90° and one lower than half, three count."""
    def lobes(axes, weights):
        points, w = sh.quadrature(40)
        density = sum(k * np.exp(60 * ((points @ a) ** 2 - 1)) for a, k in zip(
            np.array(axes, float), weights, strict=True))
        return (w * density) @ sh.basis(20, points)

    def at(angle):
        return np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0

    rows = [lobes([at(0), at(22)], [1, 0.9]), lobes([at(0), at(32)], [1, 0.9]),
            lobes(np.eye(3), [1, 0.8, 0.6]), lobes(np.eye(3), [1, 0.8, 0.4]),
            np.zeros(sh.size(20))]
    count, axis = labels.find_peaks(torch.from_numpy(np.array(rows)))
    assert count.tolist() == [1, 2, 3, 2, 0]
    assert degrees(axis[2:4], np.eye(3)[0]).max() < 0.1
    assert not axis[4].any()


def test_tissue_of_the_highest_probability():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.1], [0, 0.1, 0.5], [0.2, 0.1, 0.1], [0, 0, 0.5]])
    np.testing.assert_array_equal(labels.label_tissue(p), [1, 2, 3, 0, 3])
