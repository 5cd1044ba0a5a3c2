"""Fit a mixture of the participant's tissues to each voxel, for synthetic images.

The attenuation of a voxel is decomposed into fibres of a fixed set of directions, grey matter and
CSF, all with the mean diffusivities of the participant (`simulate.mixture`), by least squares with
non-negative weights. This is spherical deconvolution (Dell'Acqua et al. 2007,
doi:10.1109/TBME.2007.891166, as extended to tissues by Jeurissen et al. 2014,
doi:10.1016/j.neuroimage.2014.07.061) with a fibre response of one prolate tensor per shell. Its
lobes give up to three fibre directions.
"""

from __future__ import annotations

import numpy as np
import torch

from bidsapp.acquisition import Acquisition
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.simulate.mixture import FIBRES, Diffusivities, attenuation, draw_tensors

DIRECTIONS = 128
"""Number of directions on the half sphere; neighbours are 13° apart."""

STEPS = 200
"""Steps of the accelerated projected gradient method."""

CONE = 25.0
"""Half angle (degrees) of the cone of a fibre population."""

MIN_SHARE = 0.1
"""Populations smaller than this share of the largest are discarded."""

BLOCK = 4096
"""Voxels per block on a CPU, so that their weights fit in the cache."""


def unmix(dwi: Dwi, measured: Diffusivities, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Decompose each voxel into fibre populations, grey matter and CSF.

    The signal determines the fibre populations. Fibre weight outside of the three largest, or in
    populations below MIN_SHARE, counts as grey matter. Where `Dwi.tissue` is given, it determines
    the fractions of white matter, grey matter and CSF; if its sum is below 1, the signal determines
    the rest. White matter of `Dwi.tissue` without fibres in the signal counts as grey matter.

    Parameters
    ----------
    dwi : Dwi
    measured : Diffusivities
        Diffusivities of the participant.
    device : str

    Returns
    -------
    fractions : (voxel, 5) ndarray
        Fractions of the three largest fibre populations, grey matter and CSF; their sum is 1. A
        missing population has the fraction 0.
    directions : (voxel, 3, 3) ndarray
        Unit vectors, world RAS+. A missing population has the direction of the first.
    """
    axes = half_sphere(DIRECTIONS)
    system = dictionary(axes, measured, dwi.acquisition)
    noise, b0 = dwi.noise_sd or 0.0, dwi.acquisition.b0

    def fit(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        a, n = signal.new_tensor(system), signal.new_tensor(axes)
        s0 = signal[:, b0].mean(1, keepdim=True)
        clean = torch.sqrt((signal**2 - noise**2).clamp(min=0))  # without the noise floor
        w = _nonnegative(a, torch.where(s0 > 0, clean / s0, 0).clamp(max=2))
        share, direction = _lobes(w[:, :-2], n)
        rest = w[:, :-2].sum(1, keepdim=True) - share.sum(1, keepdim=True)
        return {"parts": torch.cat([share, w[:, -2:-1] + rest, w[:, -1:]], 1),
                "direction": direction}

    fitted = map_voxels(fit, dwi.signal, device, BLOCK if device == "cpu" else None)
    parts = fitted["parts"].astype(float)
    empty = parts.sum(axis=1) <= 0
    parts[empty, len(FIBRES)] = 1
    parts /= parts.sum(axis=1, keepdims=True)
    if dwi.tissue is not None:
        white = parts[:, :len(FIBRES)].sum(axis=1, keepdims=True)
        gm, wm, csf = dwi.tissue.astype(float).T
        fibres = parts[:, :len(FIBRES)] / np.where(white > 0, white, 1) * wm[:, None]
        anatomical = np.column_stack([fibres, gm + np.where(white[:, 0] > 0, 0, wm), csf])
        parts = anatomical + (1 - anatomical.sum(axis=1, keepdims=True)).clip(0) * parts
    return parts / parts.sum(axis=1, keepdims=True), fitted["direction"].astype(float)


def half_sphere(count: int) -> np.ndarray:
    """Spread (count, 3) unit vectors evenly over z > 0 (golden spiral)."""
    z = 1 - (np.arange(count) + 0.5) / count
    phi = np.arange(count) * np.pi * (3 - np.sqrt(5))
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z])


def dictionary(axes: np.ndarray, measured: Diffusivities, acquisition: Acquisition) -> np.ndarray:
    """Compute (axis + 2, measurement) attenuations of a fibre along each axis, grey matter, CSF."""
    tensors = draw_tensors("syn", measured, np.repeat(axes[:, None], len(FIBRES), axis=1), 0)
    columns = np.concatenate([tensors[:, 0], tensors[:1, -2], tensors[:1, -1]])[:, None]
    return attenuation(np.ones((len(columns), 1)), columns, acquisition, "cpu")


def _nonnegative(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Minimise |w a − y|² over w ≥ 0 (voxel, k) (Beck & Teboulle 2009, doi:10.1137/080716542)."""
    gram, right = a @ a.T, y @ a.T
    step = 1 / torch.linalg.eigvalsh(gram.double())[-1].to(a)
    w = extrapolated = torch.full_like(right, 1 / len(a))
    t = 1.0
    for _ in range(STEPS):
        moved = (extrapolated - step * (extrapolated @ gram - right)).clamp(min=0)
        next_t = (1 + (1 + 4 * t * t) ** 0.5) / 2
        extrapolated, w, t = moved + (t - 1) / next_t * (moved - w), moved, next_t
    return w


def _lobes(weight: torch.Tensor, axes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find weights (voxel, 3) and mean axes (voxel, 3, 3) of the three largest lobes.

    A lobe is the cone of half angle CONE that holds the largest weight.
    """
    near = ((axes @ axes.T).abs() > np.cos(np.radians(CONE))).to(weight)
    outer = (axes[:, :, None] * axes[:, None]).flatten(1)
    shares, directions = [], []
    for _ in FIBRES:
        lobe = weight * near[(weight @ near).argmax(1)]
        mean = torch.linalg.eigh((lobe @ outer).unflatten(1, (3, 3)))[1][:, :, 2]
        shares.append(lobe.sum(1))
        directions.append(mean)
        weight = weight - lobe
    share = torch.stack(shares, 1)
    share = torch.where(share >= MIN_SHARE * share[:, :1], share, 0)
    direction = torch.stack(directions, 1)
    return share, torch.where((share > 0)[:, :, None], direction, direction[:, :1])
