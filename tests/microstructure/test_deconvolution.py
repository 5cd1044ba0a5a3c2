"""Densities of real voxels: deconvolution against simulated truth and against the tensor."""

import numpy as np
import pytest
import torch

from bidsapp import sh, tensor
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.microstructure import deconvolution
from bidsapp.microstructure.deconvolution import deconvolve
from bidsapp.simulate import forward, odf, protocols
from bidsapp.simulate.tissue import draw_odfs
from support import synthetic_head as head
from support.app import load_first_run

AXIAL, RADIAL, GREY, WATER = 1.8, 0.25, 0.75, 3.0
ISOTROPIC = 6
"""Voxels of grey matter, and of CSF, behind those of fibres."""


def dwi_of(fraction, directions, n=60, b=(1000.0, 3000.0), sd=0.0):
    """Voxels of two crossing prolate tensors, (voxel, 2) and (voxel, 2, 3), then grey matter, then
    CSF; two shells of 30 and n directions."""
    acquisition = Acquisition(np.r_[0, 0, np.full(30, b[0]), np.full(n, b[1])], np.vstack(
        [np.zeros((2, 3)), protocols.spread(30), protocols.spread(n)]))
    outer = directions[..., :, None] * directions[..., None, :]
    d = RADIAL * np.eye(3) + (AXIAL - RADIAL) * outer
    fraction = np.r_[fraction, np.tile([1.0, 0.0], (2 * ISOTROPIC, 1))]
    d = np.concatenate([d, *(np.tile(v * np.eye(3), (ISOTROPIC, 2, 1, 1)) for v in (GREY, WATER))])
    like = torch.zeros((), dtype=torch.float64)
    clean = forward.Protocol(acquisition, 2, like).tensors(
        torch.as_tensor(fraction), torch.as_tensor(d))
    noisy = np.hypot(clean.numpy() + sd * np.random.default_rng(0).normal(size=clean.shape),
                     sd * np.random.default_rng(1).normal(size=clean.shape))
    return Dwi(1000 * noisy.astype(np.float32), np.ones((len(noisy), 1, 1), bool), np.eye(4),
               acquisition)


def crossing(angle, voxels=20):
    """Axes at an angle (degrees), turned at random; the first half of the voxels has one only."""
    turns = odf.random_rotations(voxels, torch.Generator().manual_seed(0)).numpy()
    t = np.radians(angle)
    pair = np.array([[0, 0, 1.0], [np.sin(t), 0, np.cos(t)]])
    single = np.arange(voxels) < voxels // 2
    fraction = np.where(single[:, None], [1.0, 0.0], [0.5, 0.5])
    return fraction, pair @ turns.transpose(0, 2, 1), single


def deconvolved(dwi, single, where=None):
    """Deconvolve the fibre voxels, or those of `where`."""
    voxel = np.arange(len(dwi.signal))
    fibres = len(dwi.signal) - 2 * ISOTROPIC
    return deconvolve(dwi, np.r_[single, np.zeros(2 * ISOTROPIC, bool)],
                      (voxel >= fibres) & (voxel < fibres + ISOTROPIC), voxel >= fibres + ISOTROPIC,
                      voxel < fibres if where is None else where)


@pytest.mark.slow
def test_peaks_are_the_fibres():
    """Density along the fibres is a maximum, on a grid of 3°, within 5°: of one and of two at right
    angles, where lobes of finite degree do not draw each other nearer."""
    fraction, axes, single = crossing(90)
    found = deconvolved(dwi_of(fraction, axes), single)
    assert found.shape == (len(single), 45)
    torch.testing.assert_close(found[:, 0], torch.full((len(single),), 1 / np.sqrt(4 * np.pi)),
                               atol=1e-6, rtol=0)
    grid = protocols.spread(1500)
    values = found.numpy() @ sh.basis(8, grid).T
    for v in range(len(single)):
        for axis in axes[v][fraction[v] > 0]:
            angle = np.degrees(np.arccos(np.abs(grid @ axis).clip(max=1)))
            near = np.flatnonzero(angle < 25)
            assert angle[near[values[v, near].argmax()]] < 5
    assert values.min() > -0.05 * values.max()


def test_two_fibres_are_less_sharp_than_one():
    fraction, axes, single = crossing(70)
    found = deconvolved(dwi_of(fraction, axes, sd=0.02), single)
    power = found[:, 1:6].square().sum(1)
    assert power[single].min() > power[~single].max()


def test_grey_matter_and_water_have_none():
    """Only what is white matter gives a row."""
    fraction, axes, single = crossing(70)
    dwi = dwi_of(fraction, axes, sd=0.02)
    assert len(deconvolved(dwi, single, np.ones(len(dwi.signal), bool))) == len(single)


def test_they_are_drawn_from():
    """In a table of `draw_odfs`: each row turned, its power by degree kept."""
    fraction, axes, single = crossing(70)
    table = deconvolved(dwi_of(fraction, axes), single)
    drawn = draw_odfs(50, torch.Generator().manual_seed(0), 8, table=table, measured=1.0)

    def power(c):
        return torch.stack([c[:, 1:6].square().sum(1), c[:, 6:15].square().sum(1)], 1)

    apart = (power(drawn)[:, None] - power(table)).norm(dim=2).amin(1)
    assert float(apart.max()) < 1e-5 * float(power(table).max())


@pytest.mark.parametrize("n,kind", [(40, "one"), (60, "none")])
def test_refuses_what_it_cannot_deconvolve(n, kind):
    fraction, axes, single = crossing(70)
    with pytest.raises(Refusal, match="45 directions in one of them, and voxels of"):
        deconvolved(dwi_of(fraction, axes, n=n), single & (kind == "one"))


@pytest.mark.slow
def test_a_study_gives_densities_of_its_own(tmp_path, caplog):
    """From whole runs: white matter of the head whose fibres run along x or y, in world axes; a run
    that cannot be deconvolved is left out, and said."""
    folders = {n: head.write_dataset(tmp_path / str(n), scheme=((0, 4), (1000, 20), (2000, n)))
               for n in (30, 45)}
    found = deconvolution.deconvolve_study(
        lambda name: load_first_run(folders[int(name)]), ["30", "45"], voxels=100, seed=0,
        device="cpu")
    assert ("30: no densities could be estimated for the training: deconvolution found 4 b0 volumes"
            in caplog.text)
    assert 10 <= len(found) <= 50
    grid = protocols.spread(1500)
    peak = np.abs(grid[(found.numpy() @ sh.basis(8, grid).T).argmax(1)])
    assert np.median(peak[:, :2].max(1)) > np.cos(np.radians(6))
    assert deconvolution.deconvolve_study(lambda _: load_first_run(folders[30]), ["a"], voxels=9,
                                          seed=0, device="cpu") is None


@pytest.mark.slow
def test_real_densities_follow_the_tensor(test_data):
    """In callosal voxels of one direction the density points where the tensor does."""
    dwi = load_first_run(test_data("mdt_multishell"))
    regions = tissue.find_regions(dwi, "cpu")
    one = regions.single_fibre
    found = deconvolve(dwi, one, regions.gm, regions.csf, one)
    assert len(found) == one.sum()
    grid = protocols.spread(1500)
    peak = grid[(found.numpy() @ sh.basis(8, grid).T).argmax(1)]
    direction = tensor.fit(torch.from_numpy(dwi.signal[one].copy()),
                           tensor.design(dwi.acquisition.btensors))["direction"].numpy()
    angle = np.degrees(np.arccos(np.abs((peak * direction).sum(1)).clip(max=1)))
    assert np.median(angle) < 6 and np.quantile(angle, 0.9) < 15


def test_study_without_white_matter_among_its_voxels(monkeypatch, tmp_path):
    """All of the few voxels that are drawn may lie elsewhere: then there are no densities."""
    folder = head.write_dataset(tmp_path, scheme=((0, 4), (1000, 20), (2000, 45)))
    monkeypatch.setattr(deconvolution, "MIN_WHITE", 2.0)
    assert deconvolution.deconvolve_study(lambda _: load_first_run(folder), ["a"], voxels=3,
                                          seed=0, device="cpu") is None
