"""Simulated tissue that is as rough as real tissue, and unlike that of any training.

It shares no code with bidsapp.simulate. White matter has two crossing bundles whose diffusivities
are gamma-distributed (Jensen and Helpern 2010 show why such signals fit), grey matter is nearly
isotropic, and there is CSF. All fields are smoothed white noise. The median angle of the first
eigenvector between neighbouring voxels is 17° (`neighbour_angle`), where real scans of 2 to 3 mm
have 9 to 21° and the phantom of the program 6 to 7°.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import i0e, i1e

SMOOTHING = 2.1
"""SD of the Gaussian that smooths the fields, voxels."""

SPREAD = 0.25
"""Variance over mean of the diffusivities of a bundle."""


class Tissue(NamedTuple):
    """Fields on a grid: first and second axis (x, y, z, 3); share of the first bundle, axial and
    radial diffusivity (µm²/ms), S0 (x, y, z); and the tissue: 0 white, 1 grey, 2 CSF."""

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    axial: np.ndarray
    radial: np.ndarray
    s0: np.ndarray
    label: np.ndarray


def draw(seed, shape=(24, 24, 12), smoothing=SMOOTHING):
    """Draw the Tissue of a grid."""
    rng = np.random.default_rng(seed)

    def field(width):
        values = gaussian_filter(rng.standard_normal(shape), width, mode="wrap")
        return (values - values.mean()) / values.std()

    def axes():
        v = np.stack([field(smoothing) for _ in range(3)], -1)
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    first, second, depth = axes(), axes(), field(0.8 * smoothing)
    label = np.where(depth < -1.2, 2, np.where(depth > 0, 0, 1))
    return Tissue(first, second, (0.75 + 0.25 * field(smoothing)).clip(0.3, 1),
                  (1.7 + 0.15 * field(smoothing)).clip(1, 2.4),
                  (0.35 + 0.08 * field(smoothing)).clip(0.15, 0.8),
                  np.choose(label, [1.0, 1.3, 2.2]) * np.exp(0.05 * field(smoothing)), label)


def attenuate(b, mean, spread):
    """S/S0 of gamma-distributed diffusivities; b in ms/µm²."""
    return (1 + b * spread) ** (-mean / spread)


def signal(tissue, acquisition):
    """Noise-free signal (x, y, z, n) of linear encoding."""
    volumes = []
    for b, axis in zip(acquisition.bvals / 1000, acquisition.bvecs, strict=True):
        along, across = ((v @ axis) ** 2 for v in (tissue.first, tissue.second))
        white = sum(share * attenuate(b, tissue.radial + (tissue.axial - tissue.radial) * c, SPREAD)
                    for share, c in ((tissue.share, along), (1 - tissue.share, across)))
        grey = 0.7 * attenuate(b, 0.85, 0.3) + 0.3 * np.exp(-b * (0.5 + 0.7 * along))
        volumes.append(tissue.s0 * np.choose(tissue.label, [white, grey, np.exp(-3 * b)]))
    return np.stack(volumes, -1)


def measure(clean, sigma, seed):
    """Add Rician noise."""
    rng = np.random.default_rng(seed)
    real, imaginary = sigma * rng.standard_normal((2, *clean.shape))
    return np.hypot(clean + real, imaginary)


def expected(clean, sigma):
    """Expected magnitude under Rician noise."""
    y = clean**2 / (4 * sigma**2)
    return sigma * np.sqrt(np.pi / 2) * ((1 + 2 * y) * i0e(y) + 2 * y * i1e(y))


def neighbour_angle(direction, fa, mask, least=0.25):
    """Median angle (°) of the first eigenvector between voxels that share a face, both of FA above
    `least`; direction: (voxel, 3), fa: (voxel,), mask: (x, y, z)."""
    axes, use = np.zeros((*mask.shape, 3)), np.zeros(mask.shape, bool)
    axes[mask], use[mask] = direction, fa > least
    cosines = []
    for k in range(3):
        a, b = (np.moveaxis(x, k, 0)[:-1] for x in (axes, use)), (
            np.moveaxis(x, k, 0)[1:] for x in (axes, use))
        (v, p), (w, q) = a, b
        cosines.append(np.abs((v * w).sum(-1))[p & q])
    return float(np.degrees(np.median(np.arccos(np.concatenate(cosines).clip(0, 1)))))
