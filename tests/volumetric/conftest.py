"""A run, and the same on the grid of a network."""

import numpy as np
import pytest

from bidsapp.volumetric import scans
from support import ellipsoid


@pytest.fixture
def dwi():
    """A run of two shells with random signals."""
    run = ellipsoid.dwi_on(np.diag([-6.0, 6, 6, 1]), (20, 22, 18), ((0, 2), (1000, 12), (2000, 20)))
    return ellipsoid.with_signal(run, np.random.default_rng(0).uniform(0, 1, run.signal.shape))


@pytest.fixture
def scan(dwi, tmp_path):
    """The run with two random targets."""
    target = np.random.default_rng(1).uniform(0, 1, (len(dwi.signal), 2)).astype(np.float32)
    return scans.prepare(scans.Labelled(dwi, target), scans.Channels(6.0), tmp_path, "run")
