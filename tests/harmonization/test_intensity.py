"""Warps between distributions of S/S0, where the right warp is known."""

import numpy as np
import pytest

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError
from bidsapp.harmonization import intensity
from support import bids_tree

ACQUISITION = Acquisition(*bids_tree.table(((0, 2), (1000, 12), (2000, 16))))
MASK = np.ones((7, 8, 9), bool)


def scan(rng, low, power=1.0):
    """S/S0 uniform between low and 0.9, at b 2000 half of that, to a power, as a scanner bends."""
    ratio = rng.uniform(low, 0.9, (MASK.sum(), 30)) * np.r_[np.ones(14), np.full(16, 0.5)]
    ratio[:, :2] = 1
    return Dwi((500 * ratio**power).astype(np.float32), MASK, np.eye(4), ACQUISITION)


def test_quantiles_are_those_of_the_distribution(rng):
    """Those of a uniform distribution are within the bound of Dvoretzky, Kiefer and Wolfowitz for n
    values, at 1e-6."""
    p = (np.arange(intensity.GRID) + 0.5) / intensity.GRID
    found = intensity.quantiles(scan(rng, 0.1))
    for row, n, scale in zip(found, (12, 16), (1, 0.5), strict=True):
        error = np.sqrt(np.log(2 / 1e-6) / (2 * n * MASK.sum()))
        assert np.abs(row - scale * (0.1 + 0.8 * p)).max() < 0.8 * scale * error


def test_one_warp_for_all_keeps_who_is_different(rng):
    """Learned from one person, the warp undoes a scanner's bend in another whose signals are
    higher; a warp to the reference's own distribution makes both alike."""
    learned = [intensity.quantiles(scan(np.random.default_rng(1), 0.1, power))
               for power in (1.3, 1.0)]
    bent, straight = (scan(np.random.default_rng(2), 0.4, power) for power in (1.3, 1.0))
    found, kept = intensity.warp(bent, learned[1], learned[0])
    assert kept == 0
    np.testing.assert_array_equal(found[:, :2], bent.signal[:, :2])
    before = np.abs(bent.signal - straight.signal).max()
    assert np.abs(found - straight.signal).max() < 0.01 * before
    alike, _ = intensity.warp(bent, learned[1], intensity.quantiles_to_warp(bent))
    assert np.abs(alike - straight.signal).max() > before


def test_dark_scans_are_refused(rng):
    dwi = scan(rng, 0.1)
    dark = Dwi(dwi.signal * (rng.random(dwi.signal.shape) < 0.3), MASK, np.eye(4), ACQUISITION)
    with pytest.raises(DataError, match=r"only \d\d% of the values at b = 1000"):
        intensity.quantiles(dark)
