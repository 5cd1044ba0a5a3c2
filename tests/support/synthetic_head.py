"""A head with known grey matter, CSF, callosum and other white matter, for tests of synthesis.

Each tissue has its own diffusivities in each shell; callosal voxels differ from each other. The
signal is computed here, from S = S0 exp(−b d(g)), and nowhere else.
"""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi, noise_sd
from support import bids_tree

SHAPE = (36, 44, 30)
ZOOMS = (3.5, 3.4, 3.6)
S0, NOISE = 1000.0, 12.0
SCHEME = ((0, 4), (1000, 20), (2000, 30))
GM, CSF = {1000: 0.80e-3, 2000: 0.70e-3}, {1000: 2.6e-3, 2000: 1.8e-3}
AXIAL, RADIAL = {1000: 1.80e-3, 2000: 1.60e-3}, {1000: 0.30e-3, 2000: 0.24e-3}
SPREAD = 0.1  # relative SD of the axial diffusivity between callosal voxels


def tissues(callosum=True):
    """(x, y, z) int: 0 air, 1 grey matter, 2 CSF, 3 callosum, 4 other white matter; world grid."""
    axes = [(np.arange(n) - (n - 1) / 2) * z for n, z in zip(SHAPE, ZOOMS, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    x, y, z = grid
    r = np.sqrt(sum((g / (0.42 * n * s)) ** 2 for g, n, s in zip(grid, SHAPE, ZOOMS, strict=True)))
    out = np.where(r < 1, 1, 0)
    out[r < 0.75] = 4
    out[(np.abs(x) < 12) & (np.abs(y) < 20) & (z < 0) & (z > -12)] = 2
    if callosum:
        out[(np.abs(x) < 19) & (np.abs(y) < 25) & (z > 4) & (z < 15)] = 3
    return out


def signal(labels, bvals, axes, rng, noise=NOISE, b_delta=1.0):
    """(x, y, z, n) float32 with Rician noise, and the axial diffusivity factor of each voxel."""
    factor = 1 + SPREAD * rng.standard_normal(labels.shape).clip(-2, 2)
    d = np.zeros((*labels.shape, len(bvals)))
    for i, b in enumerate(bvals):
        shell = int(b) if b else 1000
        # b : D / b = (1 − b_delta) MD + b_delta gᵀ D g
        along = (1 - b_delta) / 3 + b_delta * axes[i] ** 2
        d[..., i] = np.select(
            [labels == 1, labels == 2, labels == 3],
            [GM[shell], CSF[shell],
             RADIAL[shell] + (factor * AXIAL[shell] - RADIAL[shell]) * along[0]],
            RADIAL[shell] + (AXIAL[shell] - RADIAL[shell]) * along[1])
    clean = S0 * (labels > 0)[..., None] * np.exp(-np.asarray(bvals) * d)
    noisy = np.hypot(clean + noise * rng.standard_normal(clean.shape),
                     noise * rng.standard_normal(clean.shape))
    return noisy.astype(np.float32), factor


def affine():
    """Image x runs to the left, as in many scanners' files."""
    return bids_tree.affine(ZOOMS, det=-1)


def write_dataset(root, scheme=SCHEME, b_delta=None):
    """One participant of this head; b_delta: one number for all weighted volumes."""
    rng = np.random.default_rng(4)
    bvals, axes = bids_tree.table(scheme)
    data, _ = signal(tissues(), bvals, axes, rng, b_delta=1.0 if b_delta is None else b_delta)
    bids_tree.write_dataset(root, ("01",), scheme=scheme, shape=(7, 8, 9),
                            b_delta=b_delta)
    stem = root / "sub-01/dwi/sub-01_dwi"
    nib.save(nib.Nifti1Image(data, affine()), f"{stem}.nii.gz")
    np.savetxt(f"{stem}.bvec", bids_tree.fsl(axes, affine()).T, fmt="%.9f")
    stem.with_suffix(".json").write_text(json.dumps(
        {**bids_tree.SIDECAR, "EffectiveEchoSpacing": 5e-4}))
    return root


def participant(callosum=True, scheme=SCHEME, noise=NOISE):
    """Simulate the Dwi of the head inside its true mask, as a participant of its own.

    Returns the Dwi, and of each voxel its tissue and its axial diffusivity factor, both (voxel,).
    """
    bvals, axes = bids_tree.table(scheme)
    labels = tissues(callosum)
    measured, factor = signal(labels, bvals, axes, np.random.default_rng(4), noise)
    mask = labels > 0
    dwi = Dwi(measured[mask], mask, affine(), Acquisition(bvals, axes))
    return replace(dwi, noise_sd=noise_sd(dwi)), labels[mask], factor[mask]


def standardize(signal, clean, sd):
    """Scale the square of a Rician signal S with amplitude A = `clean`: to mean 0 and SD 1.

    This is (S² − A² − 2σ²) / SD of S².
    """
    return (signal**2 - clean**2 - 2 * sd**2) / np.sqrt(4 * sd**2 * clean**2 + 4 * sd**4)
