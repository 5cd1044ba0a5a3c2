"""Signals of two compartments, for spherical networks, and a recipe that trains one briefly."""

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from bidsapp import methods, sh, training
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.microstructure import learn
from bidsapp.simulate import forward, protocols, tissue


def acquisition(b=(1000, 2200), n=(30, 60), b0=2):
    """Make an acquisition, b0s first, with the directions of its shells turned against each other.

    b: of each shell, in s/mm²; n: directions of each; b0: number of b0 volumes.
    """
    turns = Rotation.random(len(b), random_state=3)
    g = [turn.apply(protocols.spread(k)) for turn, k in zip(turns, n, strict=True)]
    return Acquisition(np.r_[np.zeros(b0), np.repeat(b, n)],
                       np.concatenate([np.zeros((b0, 3)), *g]))


def coefficients(voxels, dtype, rotation=None, seed=0):
    """Simulate coefficients (45, voxel, 3) of signals of two shells; a third shell is absent.

    rotation: turns the fibre densities.
    """
    generator = torch.Generator().manual_seed(seed)
    densities = tissue.draw_odfs(voxels, generator, 8).double()
    parameters = tissue.TWO_COMPARTMENTS.draw(voxels, generator).double()
    if rotation is not None:
        densities = sh.rotate(densities, rotation)
    k = forward.kernel(tissue.TWO_COMPARTMENTS.compartments(parameters), np.array([1e3, 2.2e3]),
                       np.ones(2), 8)
    s = forward.convolve(densities, k).permute(2, 0, 1)
    return torch.cat([s, torch.zeros_like(s[:, :, :1])], 2).to(dtype)


def simulate_voxels(acq, n=60, sigma=0.02, seed=5, strange=False):
    """Simulate the Dwi of n voxels of the two-compartment model, with an S0 of 300.

    sigma: SD of the Rician noise relative to S0. strange: weighted volumes are scaled by factors
    from 0.3 to 1.7, as in no tissue.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = tissue.TWO_COMPARTMENTS
    clean = forward.Protocol(acq, 12, torch.zeros(1)).signal(
        tissue.draw_odfs(n, generator, 12), parts.compartments(parts.draw(n, generator)))
    signal = 300 * torch.hypot(clean + sigma * torch.randn(clean.shape, generator=generator),
                               sigma * torch.randn(clean.shape, generator=generator))
    if strange:
        signal[:, ~torch.as_tensor(acq.b0)] *= torch.linspace(0.3, 1.7, int((~acq.b0).sum()))
    return Dwi(signal.numpy().astype(np.float32), np.ones((n, 1, 1), bool), np.eye(4), acq,
               300 * sigma)


def small_recipe(steps=300):
    """Make the recipe of estimate_scnn2 with a small network and few steps."""
    recipe = methods.get("estimate_scnn2").recipe()
    return learn.Recipe(
        recipe.tissue, {"architecture": "spherical", "widths": (8, 8), "degrees": (4, 4), "tail": 4,
                        "hidden": 32, "grid": 11},
        training.Schedule(steps, 5e-3, validate_every=50, decay="cosine"), recipe.trained_for,
        batch=128, groups=4, held_out=2048)
