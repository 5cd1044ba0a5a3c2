"""Runs whose mask is an ellipsoid, on any grid."""

from dataclasses import replace

import numpy as np
import torch

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from support import bids_tree


def dwi_on(affine, shape=(24, 26, 20), scheme=((0, 2), (1000, 64))):
    """A Dwi whose mask is an ellipsoid, with a signal of 1 everywhere."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij"))
    mask = (grid**2).sum(0) < 1
    acquisition = Acquisition(*bids_tree.table(scheme))
    return Dwi(np.ones((int(mask.sum()), len(acquisition)), np.float32), mask, affine, acquisition)


def world(dwi):
    """(voxel, 3) tensor of the world points of the mask's voxels."""
    points = np.argwhere(dwi.mask) @ dwi.affine[:3, :3].T + dwi.affine[:3, 3]
    return torch.from_numpy(points.astype(np.float32))


def with_signal(dwi, signal):
    """The run with another signal, whose b0 volumes are 1."""
    values = np.where(dwi.acquisition.b0, 1, signal)
    return replace(dwi, signal=values.astype(np.float32))
