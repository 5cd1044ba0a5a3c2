"""Registration of two scans of one participant, from which a supervised harmonizer learns.

The source, a scan at the site to be harmonized, moves; the target, a scan at the reference site, is
fixed. The registration is rigid, by normalised mutual information of the mean attenuation (mean
weighted signal over mean b0; `registration.rigid`), then by SyN between FA images
(`registration.deformable`, which defines φ and R). FA, unlike the b0, does not depend on the coil's
profile or the echo time, and its edges are those of white matter. SyN also follows noise. Its
result is therefore kept only if the mean attenuations, which SyN does not use, correlate better
than after the rigid registration.
"""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from bidsapp import __version__, sh
from bidsapp.anatomy import tissue
from bidsapp.blocks import one_thread
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError
from bidsapp.registration import rigid as rigid_registration
from bidsapp.registration.deformable import ITERATIONS, RADIUS, displacement, rotations
from bidsapp.registration.geometry import (
    canonical,
    fill_nearest,
    grid_coordinates,
    transform_points,
    world_points,
)

SMOOTHING = 0.006
"""λ of the Laplace–Beltrami penalty (Koppers et al. 2018)."""

FLOW = 20.0
"""Variance, in voxels², of the Gaussian that smooths every update of SyN (`displacement`). It is
large because scans of one head differ by the scanners' distortions alone, which are smooth."""

BLOCK = 2**14
"""Number of voxels whose coefficients are rotated at a time."""

VOLUMES = 16
"""Approximate number of volumes that are resampled at a time, to limit memory."""

OVERLAP = 0.5
"""Minimum share of the smaller brain mask that the overlap of both masks covers."""

PREFIX = "registration-"
"""Prefix of the names of the files in which registrations are kept."""

KINDS = BOTH, SOURCE, REFERENCE = range(3)
"""Kinds of `Pair`. BOTH: two scans of a participant, one at each site. SOURCE, REFERENCE: a scan of
the site to be harmonized, or of the reference site, paired with itself (`unpaired`)."""


@dataclass(frozen=True)
class Pair:
    """Runs of one participant at the site to be harmonized and at the reference site.

    Parameters
    ----------
    participant : str
    source, target : str
        Names of the runs at the two sites; one and the same run unless `kind` is BOTH.
    kind : int
        One of KINDS.
    """

    participant: str
    source: str
    target: str
    kind: int = BOTH


@dataclass(frozen=True, eq=False)
class Registration:
    """Points of a source that correspond to the voxels of a target.

    The axes of the target's grid are those of `geometry.canonical`.

    Parameters
    ----------
    overlap : (x, y, z) bool
        Voxels inside both masks.
    labels : (x, y, z) int8
        Tissue of the target (`tissue.labels`), 0 outside `overlap`.
    coordinates : (3, voxel) float32
        Voxel coordinates in the source's grid as stored, of the points that correspond to the
        voxels of `overlap`.
    rotation : (voxel, 3, 3) float32
        Rᵀ at the same voxels (`registration.deformable`): it turns directions of the source into
        those of the target, in the world.
    """

    overlap: np.ndarray
    labels: np.ndarray
    coordinates: np.ndarray
    rotation: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Registration | None:
        """Read a file that `save` wrote; None if it is missing or broken."""
        try:
            # numpy does not close a broken file that it opened itself
            with path.open("rb") as file, np.load(file) as fields:
                return cls(**fields)
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
            return None

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        part = path.with_suffix(f".{uuid.uuid4()}.part")
        with part.open("wb") as file:
            np.savez(file, **vars(self))
        part.replace(path)


@dataclass(frozen=True, eq=False)
class AlignedPair(Registration):
    """Registration with the resampled source and the target, on the target's grid.

    Parameters
    ----------
    image : (shell, x + 2, y + 2, z + 2, coefficient) float32
        SH coefficients of the source's S/S0, with a margin of one voxel. Voxels outside `overlap`
        hold the coefficients of the nearest voxel inside.
    target : (voxel of `overlap`, measurement) float32
        S/S0 of the target, in its own gradient table.
    """

    image: np.ndarray
    target: np.ndarray


def pair_runs(statistics: pd.DataFrame, reference: str, by_session: bool = False
         ) -> dict[str, list[Pair]]:
    """Pair the runs of participants who were scanned at two sites.

    Parameters
    ----------
    statistics : DataFrame
        Columns participant, batch, run, and session if `by_session`.
    reference : str
        The reference site.
    by_session : bool
        Whether only runs of the same session are paired.

    Returns
    -------
    dict of str to list of Pair
        For each site but the reference: every run of a participant there with each run of the same
        participant at the reference. A site without pairs has an empty list.
    """
    keys = ["participant", *(["session"] if by_session else [])]
    by = {key: list(rows["run"]) for key, rows in statistics.groupby([*keys, "batch"])}
    units = sorted(set(statistics[keys].itertuples(index=False, name=None)))
    return {batch: [Pair(unit[0], s, t) for unit in units
                    for s, t in product(by.get((*unit, batch), ()),
                                        by.get((*unit, reference), ()))]
            for batch in sorted(statistics["batch"].unique()) if batch != reference}


def unpaired(statistics: pd.DataFrame, batch: str, reference: str) -> list[Pair]:
    """Pair every run of two sites with itself, for methods that learn without paired scans.

    Parameters
    ----------
    statistics : DataFrame
        Columns participant, batch, run.
    batch, reference : str
        The two sites.

    Returns
    -------
    list of Pair
        Their kind is SOURCE or REFERENCE.
    """
    pairs = []
    for name, kind in ((batch, SOURCE), (reference, REFERENCE)):
        rows = statistics[statistics["batch"] == name]
        pairs += [Pair(participant, run, run, kind)
                  for participant, run in zip(rows["participant"], rows["run"], strict=True)]
    return pairs


def coefficients(dwi: Dwi, l_max: int, smoothing: float = SMOOTHING
                 ) -> tuple[Float[np.ndarray, "shell voxel coef"], np.ndarray]:
    """Fit spherical harmonics to S/S0 of every shell.

    Parameters
    ----------
    dwi : Dwi
    l_max : int
        Highest degree.
    smoothing : float
        λ of the Laplace–Beltrami penalty.

    Returns
    -------
    coefficients : (shell, voxel, coefficient) float32
        0 in voxels whose S0, the mean b0, is not positive.
    usable : (voxel,) bool
        Whether S0 is positive.
    """
    s0 = dwi.mean_b0
    usable = s0 > 0
    scale = np.where(usable, 1 / np.where(usable, s0, 1), 0)
    fits = [sh.smooth_fit(l_max, dwi.acquisition.bvecs[shell.indices], smoothing)
            for shell in dwi.acquisition.shells]
    return np.stack([((dwi.signal[:, shell.indices] * scale[:, None]) @ fit.T).astype(np.float32)
                     for shell, fit in zip(dwi.acquisition.shells, fits, strict=True)]), usable


def align(source: Dwi, target: Dwi, *, l_max: int, **options: Any) -> AlignedPair:
    """Register two scans and resample the source's coefficients on the target's grid.

    Parameters
    ----------
    source, target, **options
        Arguments of `register`.
    l_max : int
        Highest degree of the coefficients.

    Returns
    -------
    AlignedPair
    """
    registration = register(source, target, **options)
    return AlignedPair(**vars(registration), image=resample(source, l_max, registration),
                       target=attenuation(target, registration))


def register(source: Dwi, target: Dwi, *, deformable: bool = True, device: str = "cpu",
             work_dir: Path | None = None, rigid: np.ndarray | None = None) -> Registration:
    """Register a source to a target. On a CPU, repeated results are identical to the byte.

    Parameters
    ----------
    source, target : Dwi
    deformable : bool
        Whether SyN follows the rigid registration.
    device : str
        Device of the tensor fits.
    work_dir : Path, optional
        Folder in which the registration is kept and read again for the same scans and options.
    rigid : (4, 4), optional
        Transform from the target's to the source's world coordinates in mm; computed if None.

    Returns
    -------
    Registration

    Raises
    ------
    DataError
        The overlap of the masks is less than OVERLAP of the smaller one.
    """
    if work_dir is None:
        return _register(source, target, deformable, device, None, rigid)
    matrix = None if rigid is None else rigid.tolist()
    path = work_dir / f"{PREFIX}{_digest(source, target, deformable, device, matrix)}.npz"
    registration = Registration.load(path)
    if registration is None:
        registration = _register(source, target, deformable, device, work_dir, rigid)
        registration.save(path)
    return registration


def _digest(source: Dwi, target: Dwi, *options: Any) -> str:
    """Hash everything that determines a registration."""
    parameters = options, __version__, ITERATIONS, RADIUS, FLOW
    digest = hashlib.blake2b(repr(parameters).encode(), digest_size=16)
    for dwi in (source, target):
        for values in (dwi.signal, dwi.mask, dwi.affine, dwi.acquisition.bvals,
                       dwi.acquisition.btensors, dwi.tissue):
            digest.update(repr(None if values is None else (values.shape, values.dtype)).encode())
            if values is not None:  # avoid a copy: signals may be large, in either memory order
                digest.update(np.ascontiguousarray(
                    values if values.flags.c_contiguous else values.T).data)
    return digest.hexdigest()


def _register(source: Dwi, target: Dwi, deformable: bool, device: str, work_dir: Path | None,
              rigid: np.ndarray | None) -> Registration:
    from scipy.ndimage import map_coordinates

    mask, affine, rows = canonical(target.mask, target.affine)
    target = replace(target, signal=target.signal[rows], mask=mask, affine=affine,
                     tissue=None if target.tissue is None else target.tissue[rows])
    usable = source.mean_b0 > 0
    maps = tissue.tensor_maps(target, device)
    if rigid is None:
        rigid = rigid_registration.align(target, source.unmask(_mean_attenuation(source)),
                                         source.affine)
    coordinates = grid_coordinates(source.affine,
                                   world_points(mask.shape, rigid @ target.affine))
    rotation = np.broadcast_to(rigid[:3, :3].T, (*mask.shape, 3, 3))
    if deformable:
        fa = source.unmask(tissue.tensor_maps(source, device)["fa"])
        resampled = map_coordinates(fa, coordinates, order=1)
        u = displacement(target.unmask(maps["fa"]), resampled * mask, target.affine, work_dir,
                         flow=FLOW)
        points = transform_points(rigid, world_points(mask.shape, target.affine) + u)
        deformed = grid_coordinates(source.affine, points)
        before, after = _correlations(source, target, coordinates, deformed)
        if after > before:
            coordinates, rotation = deformed, rotations(points, target.affine)
    inside = source.unmask(usable).astype(np.float32)
    overlap = mask & (map_coordinates(inside, coordinates, order=1) > 0.5)
    overlap[mask] &= target.mean_b0 > 0
    smaller = min(source.mask.sum() * _voxel_volume(source), mask.sum() * _voxel_volume(target))
    if overlap.sum() * _voxel_volume(target) < OVERLAP * smaller:
        raise DataError(f"the brain masks of these scans overlap in {int(overlap.sum())} voxels, "
                        f"less than {OVERLAP:.0%} of the smaller one. Check that both scans show "
                        "the same part of the same head, and check their masks.")
    labels = target.unmask(tissue.labels(target, maps["md"], maps["fa"],
                                         (target.mean_b0 > 0) & ~maps["failed"]))
    return Registration(overlap, labels * overlap, coordinates[:, overlap].astype(np.float32),
                        rotation[overlap].astype(np.float32))


def _voxel_volume(dwi: Dwi) -> float:
    """Compute the volume of a voxel in mm³."""
    return abs(np.linalg.det(dwi.affine[:3, :3]))


def _correlations(source: Dwi, target: Dwi, *coordinates: Float[np.ndarray, "3 x y z"]
                  ) -> list[float]:
    """Correlate the mean attenuations of two scans after each of several registrations.

    The voxels are those of the target's mask that all registrations map into the source's; the
    correlation is 0 if there are fewer than three.
    """
    from scipy.ndimage import map_coordinates

    images = source.mask.astype(np.float32), source.unmask(_mean_attenuation(source))
    inside, resampled = (np.stack([map_coordinates(image, points[:, target.mask], order=1)
                                   for points in coordinates]) for image in images)
    common = (inside > 0.99).all(axis=0)
    reference = _mean_attenuation(target)[common]
    return [float(np.corrcoef(values[common], reference)[0, 1]) if common.sum() > 2 else 0.0
            for values in resampled]


def attenuation(target: Dwi, registration: Registration
                ) -> Float[np.ndarray, "voxel measurement"]:
    """Compute the target's S/S0, float32, at the voxels of `registration.overlap`."""
    mask, _, rows = canonical(target.mask, target.affine)
    rows = rows[registration.overlap[mask]]
    return (target.signal[rows] / target.mean_b0[rows, None]).astype(np.float32)


def resample(source: Dwi, l_max: int, registration: Registration
             ) -> Float[np.ndarray, "shell x y z coef"]:
    """Resample and rotate the source's coefficients of S/S0 on the target's grid.

    The result is `AlignedPair.image`. Interpolation is by cubic splines: linear interpolation would
    smooth the network's input in the training, but not in the application.
    """
    shells, usable = coefficients(source, l_max)
    rotated = [_rotate(_interpolate(values[usable], source.mask, usable, registration),
                       registration.rotation) for values in shells]
    return np.stack([fill_nearest(values, registration.overlap, margin=1) for values in rotated])


def resample_measurements(source: Dwi, registration: Registration
                          ) -> Float[np.ndarray, "voxel measurement"]:
    """Resample the source's S/S0 at the voxels of `registration.overlap` by cubic splines.

    The directions are not rotated: FA, MD and means over directions do not depend on it.
    """
    s0 = source.mean_b0
    usable = s0 > 0
    count = len(source.acquisition)
    parts = np.array_split(np.arange(count), -(-count // VOLUMES))
    return np.concatenate([_interpolate(
        (source.signal[:, part][usable] / s0[usable, None]).astype(np.float32), source.mask, usable,
        registration) for part in parts], 1)


def _interpolate(values: Float[np.ndarray, "usable k"], mask: np.ndarray, usable: np.ndarray,
                 registration: Registration) -> Float[np.ndarray, "voxel k"]:
    """Interpolate values of the usable voxels of a source, by cubic splines, at the voxels of
    `overlap`."""
    from scipy.ndimage import map_coordinates

    grid = fill_nearest(values, mask, usable)
    return np.stack([map_coordinates(component, registration.coordinates, order=3, mode="nearest")
                     for component in np.moveaxis(grid, -1, 0)], -1)


def _mean_attenuation(dwi: Dwi) -> Float[np.ndarray, " voxel"]:
    """Compute the mean weighted signal over the mean b0, clipped to 0–1."""
    s0 = dwi.mean_b0
    weighted = dwi.signal[:, ~dwi.acquisition.b0].mean(axis=1)
    return (weighted / np.where(s0 > 0, s0, np.inf)).clip(0, 1)


def _rotate(values: Float[np.ndarray, "voxel coef"], rotation: Float[np.ndarray, "voxel 3 3"]
            ) -> Float[np.ndarray, "voxel coef"]:
    """Rotate the coefficients of each voxel."""
    with one_thread():
        parts = [sh.rotate(torch.from_numpy(values[i:i + BLOCK]),
                           torch.from_numpy(np.ascontiguousarray(rotation[i:i + BLOCK],
                                                                 np.float32)))
                 for i in range(0, len(values), BLOCK)]
    return torch.cat(parts).numpy()
