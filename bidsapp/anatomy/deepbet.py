"""Brain extraction from a T1w image by the two networks of deepbet.

Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845. The first network finds the box of the
brain in the whole image, the second segments the brain in that box. Their weights (MIT licence) are
read from the installed package `deepbet`. None of its code is imported: it needs two libraries for
what scipy does here. The masks are the same to the voxel.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from nibabel import orientations
from torch.nn.functional import interpolate

from bidsapp.errors import DataError

SMALL, LARGE = (128, 128, 128), (256, 256, 256)
"""Grids of the two networks."""

MARGIN = 0.1
"""Widening of the box on each side, as a share of its edges."""

EMPTY = 0.02
"""Share of brain in a plane, above which the box includes the plane."""

QUANTILES = (0.005, 0.995)
"""Quantiles of the image that become 0 and 1."""


def is_installed() -> bool:
    """Tell whether the package with the weights is installed."""
    try:
        metadata.distribution("deepbet")
    except metadata.PackageNotFoundError:
        return False
    return True


def extract(image: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"],
            device: str = "cpu") -> Bool[np.ndarray, "x y z"]:
    """Segment the brain in a T1w image.

    Parameters
    ----------
    image : (x, y, z)
        T1w image of a head, in any orientation; finite.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.
    device : str
        Device of torch.

    Returns
    -------
    (x, y, z) bool
        The largest connected part, without holes.

    Raises
    ------
    DataError
        The image shows no brain.
    """
    to_ras = orientations.io_orientation(affine)
    x = torch.from_numpy(orientations.apply_orientation(np.asarray(image, np.float32), to_ras)
                         .copy()).to(device)
    small = _resize(x, SMALL)
    low, high = torch.quantile(small.flatten(), x.new_tensor(QUANTILES)).tolist()
    if not high > low:
        raise DataError("the T1w image has no contrast, so no brain was found in it.")
    coarse = _largest(_run("bbox_model.pt", small, low, high).cpu().numpy() > 0.5)
    box = _box(coarse, x.shape)
    inner = x[box]
    p = _resize(_run("model.pt", _resize(inner, LARGE), low, high), inner.shape)
    mask = np.zeros(x.shape, bool)
    mask[box] = _fill(_largest(p.cpu().numpy() > 0.5))
    from_ras = orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], to_ras)
    return np.asarray(orientations.apply_orientation(mask, from_ras)).copy()


def _run(name: str, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Probability of brain, (x, y, z), by one network."""
    path = str(metadata.distribution("deepbet").locate_file(f"data/models/{name}"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        network: Any = torch.jit.load(path, map_location=x.device).eval()
        x = ((x - low) / (high - low)).clamp(0, 1)
        x = 0.226 * (x - x.mean()) / x.std() + 0.449
        return network(x[None, None])[0, 1]


def _resize(x: torch.Tensor, shape: Any) -> torch.Tensor:
    return interpolate(x[None, None], tuple(shape), mode="nearest-exact")[0, 0]


def _box(mask: np.ndarray, shape: Any) -> tuple[slice, ...]:
    """Box of a mask, widened by MARGIN, in an image of another shape and the same field of view."""
    box = []
    for axis, size in enumerate(shape):
        planes = np.flatnonzero(mask.mean(axis=tuple({0, 1, 2} - {axis})) > EMPTY)
        if not len(planes):
            raise DataError("no brain was found in the T1w image.")
        scale = size / mask.shape[axis]
        centre = round(scale * (planes[0] + planes[-1] + 1) / 2)
        half = round(scale * (1 + 2 * MARGIN) * (planes[-1] + 1 - planes[0])) / 2
        box.append(slice(max(0, int(centre - half)), min(size, int(centre + half))))
    return tuple(box)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part, over faces, edges and corners."""
    from scipy.ndimage import label

    parts, count = label(mask, np.ones((3, 3, 3)))
    if not count:
        raise DataError("no brain was found in the T1w image.")
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1


def _fill(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_fill_holes

    return binary_fill_holes(mask)
