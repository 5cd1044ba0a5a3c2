"""Labels that networks on whole volumes learn from: tissues and fibres.

Tissues are those of the T1w image. Fibres are the peaks of the fibre orientation density (FOD) from
constrained spherical deconvolution of one shell (Tournier et al. 2007,
doi:10.1016/j.neuroimage.2007.02.016; dipy's implementation), with the definitions of the paper that
`methods/pretrain_artifacts` implements: a peak has at least half the amplitude of the largest one
and is more than 25° from the others.
"""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bidsapp import sh
from bidsapp.acquisition import Acquisition, Shell, describe_shells
from bidsapp.anatomy.tissue import MIN_VOXELS, SINGLE_FIBRE_FA, single_fibres, tensor_maps
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal

log = logging.getLogger(__name__)

MIN_PROBABILITY = 0.5
"""Smallest sum of the probabilities of the tissues in a voxel that gets a label."""

MAX_DEGREE, MIN_DEGREE = 8, 4
"""Degree of the FOD: that of the paper, and the lowest that shows a crossing."""

BEST_B = 3000.0
"""b-value of the highest angular contrast, s/mm² (Tournier et al. 2013, doi:10.1002/nbm.3017)."""

MAX_PEAKS, MIN_RATIO, MIN_ANGLE = 3, 0.5, 25.0
"""Largest number of peaks, smallest amplitude relative to the largest, and smallest angle between
two in degrees, as in the paper."""

SUBDIVISIONS = 4
"""Number of times that the faces of an icosahedron are divided, for the directions among which
peaks are found: 1281 on a half sphere, about 4° apart."""

BLOCK = 4096
"""Voxels whose densities are in memory at a time."""


class Fibres(NamedTuple):
    """Peaks of the FOD.

    Attributes
    ----------
    count : (voxel,) int64
        Number of peaks, 1 to 3; 0 where not `valid`.
    axis : (voxel, 3) float32
        The largest peak, a unit vector in world RAS+ of arbitrary sign; 0 where not `valid`.
    valid : (voxel,) bool
        Voxels of white matter with a density.
    notice : str
        The shell, its directions and the degree of the densities, as a sentence.
    """

    count: Int[np.ndarray, " voxel"]  # type: ignore[assignment]  # tuple.count is shadowed
    axis: Float[np.ndarray, "voxel 3"]
    valid: Bool[np.ndarray, " voxel"]
    notice: str


def label_tissue(tissue: Float[np.ndarray, "voxel 3"]) -> Int[np.ndarray, " voxel"]:
    """Label the tissue of the highest probability.

    Parameters
    ----------
    tissue : (voxel, 3)
        Probabilities of grey matter, white matter and CSF (`Dwi.tissue`).

    Returns
    -------
    (voxel,) int64
        1 grey matter, 2 white matter, 3 CSF, as in BIDS; 0 where the probabilities sum to less than
        MIN_PROBABILITY.

    Examples
    --------
    >>> label_tissue(np.array([[0.2, 0.7, 0.1], [0.1, 0.0, 0.8], [0.3, 0.0, 0.1]]))
    array([2, 3, 0])
    """
    return np.where(tissue.sum(1) >= MIN_PROBABILITY, tissue.argmax(1) + 1, 0)


def label_fibres(dwi: Dwi, white: Bool[np.ndarray, " voxel"]) -> Fibres:
    """Count the fibres of white matter and find the axis of the largest.

    Parameters
    ----------
    dwi : Dwi
        The shell whose directions carry the highest degree is used; of several, the one with the
        b-value closest to BEST_B.
    white : (voxel,) bool
        Voxels of white matter. The response is that of the single fibres among them
        (`anatomy.tissue.single_fibres`).

    Returns
    -------
    Fibres

    Raises
    ------
    Refusal
        There is no b0, no shell has directions for MIN_DEGREE, or there are fewer than MIN_VOXELS
        voxels of single fibres.
    """
    shell, degree = choose_shell(dwi.acquisition)
    usable = white & (dwi.mean_b0 > 0)
    single = _find_single(dwi, usable)
    notice = (f"Fibres were counted by spherical deconvolution of degree {degree} at b = "
              f"{shell.b:.0f} s/mm² ({len(shell)} directions).")
    if degree < MAX_DEGREE:
        notice += (f" Degree {MAX_DEGREE}, which resolves smaller angles, takes "
                   f"{sh.size(MAX_DEGREE)} directions that are spread over the sphere.")
    log.info("%s", notice)
    n = len(dwi.signal)
    count, axis = np.zeros(n, np.int64), np.zeros((n, 3), np.float32)
    rows = np.flatnonzero(usable)
    densities = _deconvolve(dwi, shell, degree, single, rows)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        count[rows[part]], axis[rows[part]] = find_peaks(densities[part])
    return Fibres(count, axis, count > 0, notice)


def find_peaks(densities: Float[torch.Tensor, "voxel _"]
               ) -> tuple[Int[np.ndarray, " voxel"], Float[np.ndarray, "voxel 3"]]:
    """Count the peaks of orientation densities and find the largest.

    Parameters
    ----------
    densities : (voxel, size(l_max))
        Coefficients in the basis of `bidsapp.sh`.

    Returns
    -------
    count : (voxel,) int64
        Maxima with at least MIN_RATIO of the largest amplitude that are more than MIN_ANGLE from
        all larger ones; at most MAX_PEAKS. 0 where the density is nowhere positive.
    axis : (voxel, 3)
        Unit vector along the largest, or 0 if there is none.
    """
    l_max = sh.l_max_of(densities.shape[1])
    points, neighbours = _half_sphere()
    values = densities.numpy() @ sh.basis(l_max, points).T.astype(densities.numpy().dtype)
    maxima = values > 0
    for column in neighbours.T:
        maxima &= values >= values[:, column]
    left = np.where(maxima, values, 0)
    close = np.abs(points @ points.T) >= np.cos(np.radians(MIN_ANGLE))
    row = np.arange(len(left))
    largest = left.argmax(1)
    top = left[row, largest]
    count = np.zeros(len(left), np.int64)
    for _ in range(MAX_PEAKS):
        peak = left.argmax(1)
        height = left[row, peak]
        count += (height > 0) & (height >= MIN_RATIO * top)
        left[close[peak]] = 0
    axis = _refine(densities.double(), torch.from_numpy(points[largest]), l_max).numpy()
    return count, np.where(count[:, None] > 0, axis, 0)


@lru_cache
def _half_sphere() -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "n 6"]]:
    """Directions of a half sphere, and the neighbours of each; one with five has one twice."""
    from dipy.core.sphere import HemiSphere, unit_icosahedron

    half = HemiSphere.from_sphere(unit_icosahedron.subdivide(n=SUBDIVISIONS))
    lists: list[list[int]] = [[] for _ in half.vertices]
    for a, b in half.edges:
        lists[a].append(int(b))
        lists[b].append(int(a))
    return half.vertices, np.array([(near * 2)[:6] for near in lists])


def _refine(densities: Float[torch.Tensor, "voxel _"], axis: Float[torch.Tensor, "voxel 3"],
            l_max: int, step: float = 0.02) -> Float[torch.Tensor, "voxel 3"]:
    """Move maxima among directions to those of the densities, by a step of Newton's method.

    step: distance of the finite differences, radians.
    """
    helper = torch.eye(3, dtype=axis.dtype)[axis.abs().argmin(1)]
    u = torch.nn.functional.normalize(torch.linalg.cross(axis, helper), dim=1)
    v = torch.linalg.cross(axis, u)

    def height(a: float, b: float) -> torch.Tensor:
        at = torch.nn.functional.normalize(axis + step * (a * u + b * v), dim=1)
        return (densities * sh.evaluate(l_max, at)).sum(1)

    centre, right, left, up, down = (height(*at) for at in (
        (0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)))
    gradient = torch.stack([right - left, up - down], 1) / 2
    uu, vv = right + left - 2 * centre, up + down - 2 * centre
    uv = height(1, 1) - right - up + centre
    determinant = uu * vv - uv ** 2
    move = torch.stack([uv * gradient[:, 1] - vv * gradient[:, 0],
                        uv * gradient[:, 0] - uu * gradient[:, 1]], 1) / determinant[:, None]
    # where the maximum is no clear one, the direction stays
    good = (uu < 0) & (determinant > 0) & (move.norm(dim=1) * step < np.radians(4))
    move = torch.where(good[:, None], move, 0)
    return torch.nn.functional.normalize(
        axis + step * (move[:, :1] * u + move[:, 1:] * v), dim=1)


def choose_shell(acquisition: Acquisition) -> tuple[Shell, int]:
    """Choose the linear shell that `label_fibres` describes, and the degree that it carries.

    Raises
    ------
    Refusal
        There is no b0, or no shell has directions for MIN_DEGREE.
    """
    shells = [(s, _degree(acquisition.bvecs[s.indices]))
              for s in acquisition.shells if s.b_delta > 0.95]
    carried = [(s, degree) for s, degree in shells if degree >= MIN_DEGREE]
    if not acquisition.b0.any() or not carried:
        raise Refusal(
            f"labels by spherical deconvolution need a b0 and a shell of {sh.size(MIN_DEGREE)} "
            "directions that are spread over the sphere. It has "
            f"{int(acquisition.b0.sum())} b0 volumes and {describe_shells(acquisition.shells)}.")
    return max(carried, key=lambda pair: (pair[1], -abs(pair[0].b - BEST_B)))


def _degree(directions: Float[np.ndarray, "n 3"]) -> int:
    """Highest even degree up to MAX_DEGREE that directions determine."""
    degree = sh.degree_for(len(directions), MAX_DEGREE)
    while np.linalg.cond(sh.basis(degree, directions)) > sh.MAX_CONDITION:
        degree -= 2
    return degree


def _find_single(dwi: Dwi, white: Bool[np.ndarray, " voxel"]) -> Bool[np.ndarray, " voxel"]:
    """Find the single fibres of white matter. Raises Refusal if there are too few."""
    maps = tensor_maps(dwi, "cpu")
    found, _ = single_fibres(dwi, maps["fa"] * (white & ~maps["failed"]), maps["direction"])
    if found.sum() < MIN_VOXELS:
        raise Refusal(
            f"{int(found.sum())} single-fibre voxels (FA > {SINGLE_FIBRE_FA:g}) were found in "
            f"{int(white.sum())} voxels of white matter, {MIN_VOXELS} or more are needed for the "
            "response of spherical deconvolution. Acquire the corpus callosum, at smaller voxels "
            "or higher SNR, or leave the run out of the training.")
    return found


def _deconvolve(dwi: Dwi, shell: Shell, degree: int, single: Bool[np.ndarray, " voxel"],
                rows: Int[np.ndarray, " row"]) -> Float[torch.Tensor, "row _"]:
    """Coefficients of the FOD of some voxels, in the basis of `bidsapp.sh`; 0 if it failed."""
    from dipy.core.gradients import gradient_table
    from dipy.core.sphere import Sphere
    from dipy.reconst.csdeconv import ConstrainedSphericalDeconvModel, response_from_mask_ssst

    b0 = np.flatnonzero(dwi.acquisition.b0)
    volumes = np.r_[b0, shell.indices]
    bvecs = dwi.acquisition.bvecs[volumes].copy()
    bvecs[:len(b0)] = 0
    table = gradient_table(np.repeat([0.0, shell.b], [len(b0), len(shell)]), bvecs=bvecs)
    response, _ = response_from_mask_ssst(table, dwi.signal[single][:, volumes].astype(float),
                                          np.ones(int(single.sum()), bool))
    points, weights = sh.quadrature(2 * degree)
    to_coefficients = weights[:, None] * sh.basis(degree, points)
    out = np.zeros((len(rows), sh.size(degree)), np.float32)
    with warnings.catch_warnings():  # dipy warns that it deconvolves in its old basis
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        model = ConstrainedSphericalDeconvModel(table, response, sh_order_max=degree)
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            fit = model.fit(dwi.signal[rows[part]][:, volumes].astype(float))
            # sampled and projected, so that no convention of the basis matters
            out[part] = fit.odf(Sphere(xyz=points)) @ to_coefficients
    return torch.from_numpy(np.where(np.isfinite(out).all(1, keepdims=True), out, 0))
