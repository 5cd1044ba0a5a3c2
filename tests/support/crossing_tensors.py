"""Signals of crossing tensors, for upsamplers: any b-tensors, with and without noise."""

from dataclasses import replace

import numpy as np

from bidsapp.dwi import Dwi, noise_sd


def simulate(rng, acquisition, voxels, sd):
    """Simulate signals of one to three crossing tensors of different anisotropy, S0 = 1.

    Returns the signals with Gaussian noise of SD `sd`, and without noise, both (voxel, n).
    """
    axes = rng.standard_normal((voxels, 3, 3))
    axes /= np.linalg.norm(axes, axis=2, keepdims=True)
    share = rng.dirichlet([0.5] * 3, voxels)
    mean, excess = rng.uniform(0.7e-3, 1.1e-3, (voxels, 1)), rng.uniform(0, 1e-3, (voxels, 1))
    tensors = ((mean - excess / 3)[..., None, None] * np.eye(3)
               + excess[..., None, None] * axes[..., :, None] * axes[..., None, :])
    clean = np.einsum("vk,vkn->vn", share, np.exp(-np.einsum("nij,vkij->vkn",
                                                             acquisition.btensors, tensors)))
    return clean + rng.normal(0, sd, clean.shape), clean


def dwi_of(signal, acquisition):
    """Make a Dwi of real-valued signals (voxel, n) in a row of voxels, with its noise level."""
    dwi = Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acquisition,
              magnitude=False)
    return replace(dwi, noise_sd=noise_sd(dwi))
