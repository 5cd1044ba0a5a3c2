"""Fibre densities that networks learn from and are tested on."""

import math

import numpy as np
import pytest
import torch

from bidsapp import sh
from bidsapp.microstructure.maps import coherence
from bidsapp.simulate import odf, tissue

SINGLE = math.sqrt(5 / (4 * math.pi))
"""Norm of degree 2 of a density without dispersion."""


def drawn(count=6000, l_max=8, **how):
    return tissue.draw_odfs(count, torch.Generator().manual_seed(0), l_max, **how)


def test_densities_cover_all_dispersions_evenly():
    """Every tenth of the range from isotropic to a single fibre holds 5 % or more of the voxels:
    an even draw would give 10 %, mixtures of three bundles up to κ 32 hardly any above 0.9."""
    found = coherence(drawn())
    assert found.max() <= 1 + 1e-5
    assert np.histogram(found, 10, (0, 1))[0].min() > 0.05 * len(found)
    before = coherence(tissue.draw_bundles(6000, torch.Generator().manual_seed(0), 8))
    assert (before > 0.9).float().mean() < 0.05


def test_single_bundles_are_among_them():
    """Zonal about their main direction: Σ_m c_lm² then is (w_l)² (2l + 1)/4π, and the whole of each
    degree lies along the axis of degree 2."""
    found = drawn()
    two, four = found[:, 1:6], found[:, 6:15]
    points, _ = sh.quadrature(40)
    along = sh.basis(2, points)[:, 1:] @ two.T.numpy()
    axis = torch.from_numpy(points[along.argmax(0)]).float()
    basis = sh.evaluate(4, axis)
    share = [(part * own).sum(1) / (part.norm(dim=1) * own.norm(dim=1)).clamp(min=1e-9)
             for part, own in ((two, basis[:, 1:6]), (four, basis[:, 6:15]))]
    zonal = (share[0] > 0.995) & (share[1] > 0.98)
    assert zonal.float().mean() > 0.25
    sharp = zonal & (two.norm(dim=1) > 0.95 * SINGLE)
    assert sharp.float().mean() > 0.05, "κ of 32 and more: 7 % are drawn"


@pytest.mark.parametrize("l_max", [8, 16])
def test_densities_have_integral_1_and_are_no_sharper_than_a_fibre(l_max):
    table = odf.watson(torch.eye(3), torch.tensor([2.0, 9, 30]), 8)
    found = drawn(500, l_max, table=table)
    torch.testing.assert_close(found[:, 0], torch.full((500,), (4 * math.pi) ** -0.5))
    for l in range(2, l_max + 1, 2):
        power = found[:, sh.size(l - 2):sh.size(l)].square().sum(1)
        assert power.max() <= (2 * l + 1) / (4 * math.pi) * (1 + 1e-4)


def test_fans_spread_in_one_plane(monkeypatch):
    """κ2 of a Bingham fan is any share of κ1: with 0 it would be a bundle."""
    bingham, seen = odf.bingham, []

    def spy(axes, kappa, l_max):
        seen.append(kappa)
        return bingham(axes, kappa, l_max)

    monkeypatch.setattr(odf, "bingham", spy)
    drawn()
    kappa = torch.cat(seen)
    share = kappa[:, 1] / kappa[:, 0]
    assert len(kappa) > 300
    assert np.histogram(share, 4, (0, 1))[0].min() > 0.2 * len(kappa)


def test_none_of_a_kind_may_be_drawn():
    table = odf.watson(torch.eye(3), torch.tensor([2.0, 9, 30]), 8)
    assert drawn(5, table=table, measured=1.0).shape == (5, 45)
    assert drawn(1).shape == (1, 45)


@pytest.mark.parametrize("kappa", [2.0, 8.0])
def test_a_sharpened_watson_density_has_a_multiple_of_its_concentration(kappa):
    axis = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 3]]).double(), dim=1)
    known = odf.watson(axis, torch.tensor([kappa]).double(), 24)
    for power in (1, 2, 4):
        expected = odf.watson(axis, torch.tensor([power * kappa]).double(), 16)
        torch.testing.assert_close(odf.sharpen(known, power, 16), expected, atol=1e-6, rtol=0)


def test_bundles_of_a_band_have_the_number_and_concentration_asked_for():
    """One bundle: the power of degree 2 is that of a Watson density in the range of κ."""
    found = tissue.draw_bundles(200, torch.Generator().manual_seed(1), 8, bundles=1,
                                kappa=(4.0, 12.0))[:, 1:6].norm(dim=1)
    ends = odf.watson(torch.eye(3)[:2], torch.tensor([4.0, 12.0]), 8)[:, 1:6].norm(dim=1)
    assert ends[0] <= found.min()
    assert found.max() <= ends[1]
