"""Susceptibility field: error against a simulated truth, agreement of a real pair, and time.

    python benchmarks/distortion.py [--pyhysco PYTHON] [--unpile PYTHON] [--data DIR] [--csv FILE]

The simulated heads (72 × 72 × 39, 3 mm) are formulas: folded tissue, and the dipole fields of air
spheres at the sinus and the ears with a quadratic shim. Each line is sampled at eight points per
voxel, whose signal is moved to where the field puts it and summed per voxel, so that nothing of the
correction is used. Peers run in the Python of their own environments.
"""

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import table
import torch
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import PhaseEncoding
from bidsapp.preprocess import distortion

SHAPE, SIZE, READOUT = (72, 72, 39), 3.0, 0.0475
FINE = 8
SPHERES = (((0, 62, -34), 13.0, 110.0), ((46, -12, -38), 9.0, 90.0), ((-46, -12, -38), 9.0, 90.0))
"""Centres and radii (mm) of the air spheres, and the field at their surfaces (Hz)."""

AFFINE = np.diag([-SIZE, SIZE, SIZE, 1.0])
AFFINE[:3, 3] = -AFFINE[:3, :3] @ (np.array(SHAPE) - 1) / 2


def field(x):
    """Field (Hz) at world points (…, 3): dipoles, and a shim."""
    h = 8 + 0.12 * x[..., 0] + 0.15 * x[..., 1] - 25 * (x[..., 2] / 60) ** 2
    for centre, radius, strength in SPHERES:
        d = x - centre
        r = np.sqrt((d**2).sum(-1)).clip(radius)
        h = h + strength / 2 * (radius / r) ** 3 * (3 * (d[..., 2] / r) ** 2 - 1)
    return h


def step(distance, width=1.0):
    return 1 / (1 + np.exp(-(distance / width).clip(-40, 40)))


def tissue(x):
    """b0 signal at world points (…, 3), white matter 1: folded cortex, ventricles and air."""
    a, b, c = x[..., 0], x[..., 1], x[..., 2]
    r = np.sqrt((a / 68) ** 2 + (b / 84) ** 2 + (c / 58) ** 2)
    folds = np.sin(0.24 * a + 1) * np.sin(0.21 * b) + np.sin(0.26 * c) * np.cos(0.23 * a - 0.1 * b)
    brain = step((1 - r) * 65)
    white = step((0.84 - 0.08 * folds - r) * 65)
    sulci = step((r - 0.9 + 0.05 * folds) * 65) * brain
    ventricle = step((1 - np.sqrt(((abs(a) - 12) / 8) ** 2 + (b / 34) ** 2
                                  + ((c - 8) / 12) ** 2)) * 8)
    nuclei = step((1 - np.sqrt(((abs(a) - 24) / 8) ** 2 + ((b - 6) / 18) ** 2
                               + (c / 12) ** 2)) * 8)
    scalp = step((1.16 - r) * 65) * step((r - 1.07) * 65)
    s = brain * (1.35 - 0.35 * white + 1.1 * sulci) + 0.15 * nuclei + 2 * ventricle + 0.4 * scalp
    for centre, radius, _ in SPHERES:
        s = s * step(np.sqrt(((x - centre) ** 2).sum(-1)) - radius)
    return s * (1 + 0.002 * b + 0.001 * c)


def world(shape, affine, axis=1, fine=1):
    """World points of the voxels, with `fine` points per voxel along an axis."""
    index = [np.arange(n, dtype=float) for n in shape]
    index[axis] = (np.arange(shape[axis] * fine) + 0.5) / fine - 0.5
    return np.stack(np.meshgrid(*index, indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


def acquire(shape, affine, encoding, move=None):
    """EPI of the head, its signal moved along the phase axis and summed per voxel."""
    axis = encoding.axis
    x = world(shape, affine, axis, FINE)
    if move is not None:
        back = np.linalg.inv(move)
        x = x @ back[:3, :3].T + back[:3, 3]
    n = shape[axis]
    at = ((np.arange(n * FINE) + 0.5) / FINE - 0.5).reshape([-1 if a == axis else 1
                                                            for a in range(3)])
    to = np.moveaxis(at + encoding.sign * encoding.readout * field(x), axis, -1).reshape(-1, n
                                                                                        * FINE)
    mass = np.moveaxis(tissue(x), axis, -1).reshape(to.shape) / FINE
    # a point of signal is a box of its own width, shared by the two voxels that it touches
    low = np.floor(to + 0.5 - 0.5 / FINE).astype(int)
    over = ((to + 0.5 + 0.5 / FINE - (low + 1)) * FINE).clip(0, 1)
    out = np.zeros((len(to), n + 2))
    line = np.arange(len(to))[:, None]
    for cell, part in ((low, mass * (1 - over)), (low + 1, mass * over)):
        np.add.at(out, (line, (cell + 1).clip(0, n + 1)), part)
    rest = [m for a, m in enumerate(shape) if a != axis]
    return np.moveaxis(out[:, 1:-1].reshape(*rest, n), -1, axis)


def noisy(image, snr, rng):
    sd = 1 / snr
    return np.hypot(image + rng.normal(0, sd, image.shape), rng.normal(0, sd, image.shape))


def moved(degrees, mm):
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    move[:3, 3] = mm
    return move
