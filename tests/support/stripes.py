"""A head with stripes of fibre directions: neighbours differ, and the directions are known."""

import numpy as np

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from support import bids_tree as truth

HEAD = truth.head()
SCHEME = ((0, 3), (1000, 15), (2500, 20))


def simulate_stripes(rng, scheme=SCHEME, matrix=None):
    """Simulate the Dwi of fibres along (1, 1, 0) of the grid in one stripe, along z in the next;
    in the upper half of the head along (0, 1, 1) and x, so that no two flips are alike.

    matrix: affine of the grid.
    """
    matrix = truth.affine(turn=(8, -5, 12), det=1) if matrix is None else matrix
    x, y, z = np.indices(HEAD.shape)
    axes = (matrix[:3, :3] @ np.transpose([[1, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]])).T
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    stripe = np.where(z < np.nonzero(HEAD)[2].mean(), (x - y) // 2 % 2, 2 + (y - z) // 2 % 2)
    direction = axes[stripe[HEAD]]
    bvals, vectors = truth.table(scheme)
    along = truth.PERPENDICULAR + (truth.PARALLEL - truth.PERPENDICULAR) * (
        direction @ vectors.T) ** 2
    clean = truth.S0 * np.exp(-bvals * along)
    noisy = np.hypot(clean + 15 * rng.standard_normal(clean.shape),
                     15 * rng.standard_normal(clean.shape))
    return Dwi(noisy.astype(np.float32), HEAD, matrix, Acquisition(bvals, vectors))
