"""A scan on the grid of a network."""

import numpy as np
import pytest

from bidsapp.volumetric import scans
from support import ellipsoid


@pytest.fixture
def scan(tmp_path):
    """A run of two shells and random signals, as Dwi and as Scan with two random targets."""
    rng = np.random.default_rng(0)
    dwi = ellipsoid.dwi_on(np.diag([-6.0, 6, 6, 1]), (20, 22, 18), ((0, 2), (1000, 12), (2000, 20)))
    dwi = ellipsoid.with_signal(dwi, rng.uniform(0, 1, dwi.signal.shape))
    target = rng.uniform(0, 1, (len(dwi.signal), 2)).astype(np.float32)
    return dwi, scans.prepare(scans.Labelled(dwi, target), scans.Channels(6.0), tmp_path, "run")
