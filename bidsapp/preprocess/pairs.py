"""Two scans of one participant, voxel on voxel: what a supervised harmonizer learns from.

The source is moved into the target: a rigid move by normalised mutual information of the
attenuations (`preprocess.anatomy`: dense, deterministic), then antspyx' SyN (Avants et al. 2008,
doi:10.1016/j.media.2007.06.004) between FA images, with local cross-correlation over all voxels,
on one thread. FA, unlike the b0, has neither the coil's profile nor an echo time in it, and its
edges are those of white matter. SyN follows noise, too: it is kept where it makes the attenuations,
which it has not seen, more alike than the rigid move does. Of a target voxel at the world point p
the source lies at

    φ(p) = M(p + u(p)),   J = ∂φ/∂p = R S,

R the rotation of the polar decomposition (finite strain: Alexander et al. 2001,
doi:10.1109/42.963816); what the source has along n stands in the target along Rᵀ n.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from nibabel import orientations

from bidsapp import __version__, sh, tensor
from bidsapp.blocks import map_voxels, one_thread
from bidsapp.dwi import Dwi, open_image
from bidsapp.errors import DataError
from bidsapp.preprocess import anatomy, tissue

SMOOTHING = 0.006
"""λ of the Laplace–Beltrami penalty (Koppers et al. 2018)."""

ITERATIONS = (40, 20, 10)
"""Of SyN, at a quarter, half and the whole of the resolution."""

RADIUS = 3
"""Voxels, of the local cross-correlation."""

FLOW = 20.0
"""Of SyN between scans of one head (`displacement`): scanners distort smoothly."""

BLOCK = 2**14
"""Voxels whose coefficients are turned at a time."""

GRIDS = 16
"""Volumes that are resampled at a time: whole grids take memory."""

FLIP = np.array([-1.0, -1.0, 1.0])
"""World RAS+ to ITK's, LPS+."""

OVERLAP = 0.5
"""Share of the smaller brain that both must show."""

KEPT = "registration-"
"""How files begin in which registrations are kept."""

KINDS = BOTH, SOURCE, REFERENCE = range(3)
"""Kinds of `Pair`: of one participant in both batches; a scan of either alone, paired with itself,
for methods that learn from unlike people."""


@dataclass(frozen=True)
class Pair:
    """Runs of one participant in the batch to be harmonized and in the reference."""

    participant: str
    source: str
    target: str
    kind: int = BOTH


@dataclass(frozen=True, eq=False)
class Move:
    """Where the voxels of a target, its axes as of `canonical`, lie in a source.

    where: (x, y, z) bool, voxels of both masks; labels: (x, y, z) int8 of the target's tissue
        (`tissue.labels`), 0 outside `where`.
    index, turn: of the voxels of `where`, (3, voxel) float32 place in the source's grid, and
        (voxel, 3, 3) float32 Rᵀ.
    """

    where: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    turn: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Move | None:
        """As `save` left it; None where there is none that can be read."""
        try:
            # numpy leaves a broken file open that it opened itself
            with path.open("rb") as file, np.load(file) as found:
                return cls(**found)
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
            return None

    def save(self, path: Path) -> None:
        """The whole file, or none."""
        part = path.with_suffix(f".{uuid.uuid4()}.part")
        with part.open("wb") as file:
            np.savez(file, **vars(self))
        part.replace(path)


@dataclass(frozen=True, eq=False)
class Aligned(Move):
    """A pair on the target's grid.

    image: (shell, x + 2, y + 2, z + 2, coefficient) float32, the source's coefficients of S/S0,
        with a margin of one voxel; outside `where` those of the nearest voxel inside.
    target: (voxel of `where`, measurement) float32, the target's S/S0, in its own b-table.
    """

    image: np.ndarray
    target: np.ndarray


def find(statistics: pd.DataFrame, reference: str, by_session: bool = False
         ) -> dict[str, list[Pair]]:
    """Pairs by batch other than the reference: every run of a participant in the one with every
    run of theirs in the other, of the same session where that is asked for. Batches without any
    have an empty list.

    statistics: columns participant, session, batch, run; session only where it is asked for.
    """
    keys = ["participant", *(["session"] if by_session else [])]
    by = {key: list(rows["run"]) for key, rows in statistics.groupby([*keys, "batch"])}
    units = sorted(set(statistics[keys].itertuples(index=False, name=None)))
    return {batch: [Pair(unit[0], s, t) for unit in units
                    for s, t in product(by.get((*unit, batch), ()),
                                        by.get((*unit, reference), ()))]
            for batch in sorted(statistics["batch"].unique()) if batch != reference}


def coefficients(dwi: Dwi, l_max: int, smoothing: float = SMOOTHING
                 ) -> tuple[Float[np.ndarray, "shell voxel coef"], np.ndarray]:
    """SH coefficients of S/S0 per shell, float32, and (voxel,) bool where S0, the mean b0, is
    positive; 0 elsewhere."""
    s0 = dwi.mean_b0
    usable = s0 > 0
    scale = np.where(usable, 1 / np.where(usable, s0, 1), 0)
    fits = [sh.smooth_fit(l_max, dwi.acquisition.bvecs[shell.indices], smoothing)
            for shell in dwi.acquisition.shells]
    return np.stack([((dwi.signal[:, shell.indices] * scale[:, None]) @ fit.T).astype(np.float32)
                     for shell, fit in zip(dwi.acquisition.shells, fits, strict=True)]), usable


def canonical(mask: np.ndarray, affine: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, " voxel"]]:
    """Mask and affine with axes as near to the world's (RAS+) as may be, and the row that each
    voxel of the mask then comes from: a network of patches must not depend on how an image is
    stored."""
    axes = orientations.io_orientation(affine)
    row = np.full(mask.shape, -1)
    row[mask] = np.arange(mask.sum())
    row = np.ascontiguousarray(orientations.apply_orientation(row, axes))
    inside = row >= 0
    return inside, affine @ orientations.inv_ornt_aff(axes, mask.shape), row[inside]


def filled(values: Float[np.ndarray, "voxel coef"], mask: np.ndarray,
           usable: np.ndarray | None = None, margin: int = 0) -> Float[np.ndarray, "x y z coef"]:
    """Values of the mask's (usable) voxels on the grid, `margin` voxels wider on every side; those
    of the nearest of them everywhere else."""
    from scipy.ndimage import distance_transform_edt

    inside = mask.copy()
    if usable is not None:
        inside[mask] = usable
    inside = np.pad(inside, margin)
    nearest = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    row = np.zeros(inside.shape, np.int32)
    row[inside] = np.arange(len(values))
    return values[row[tuple(nearest)]]


def alone(statistics: pd.DataFrame, batch: str, reference: str) -> list[Pair]:
    """Every run of the two batches with itself. statistics: as of `find`."""
    found = []
    for name, kind in ((batch, SOURCE), (reference, REFERENCE)):
        rows = statistics[statistics["batch"] == name]
        found += [Pair(person, run, run, kind)
                  for person, run in zip(rows["participant"], rows["run"], strict=True)]
    return found


def align(source: Dwi, target: Dwi, *, l_max: int, **how: Any) -> Aligned:
    """The source's coefficients, turned, on the target's grid. how, errors: of `register`."""
    move = register(source, target, **how)
    return Aligned(**vars(move), image=carried(source, l_max, move), target=ratios(target, move))


def register(source: Dwi, target: Dwi, *, deformable: bool = True, device: str = "cpu",
             work_dir: Path | None = None, rigid: np.ndarray | None = None) -> Move:
    """Where the target lies in the source. Reproducible to the byte on a CPU.

    work_dir: folder in which it is kept, and found when the same scans are registered again.
    rigid: (4, 4) world move from target to source, where it is known.

    Raises:
        DataError: hardly any voxel is in both masks.
    """
    if work_dir is None:
        return _register(source, target, deformable, device, None, rigid)
    known = None if rigid is None else rigid.tolist()
    kept = work_dir / f"{KEPT}{_digest(source, target, deformable, device, known)}.npz"
    move = Move.load(kept)
    if move is None:
        move = _register(source, target, deformable, device, work_dir, rigid)
        move.save(kept)
    return move


def _digest(source: Dwi, target: Dwi, *how: Any) -> str:
    """Of all that determines a registration."""
    by = how, __version__, ITERATIONS, RADIUS, FLOW
    digest = hashlib.blake2b(repr(by).encode(), digest_size=16)
    for dwi in (source, target):
        for own in (dwi.signal, dwi.mask, dwi.affine, dwi.acquisition.bvals,
                    dwi.acquisition.btensors, dwi.tissue):
            digest.update(repr(None if own is None else (own.shape, own.dtype)).encode())
            if own is not None:  # signals stand by voxel or by volume, and may be large
                digest.update(np.ascontiguousarray(own if own.flags.c_contiguous else own.T).data)
    return digest.hexdigest()


def _register(source: Dwi, target: Dwi, deformable: bool, device: str, work_dir: Path | None,
              rigid: np.ndarray | None) -> Move:
    from scipy.ndimage import map_coordinates

    mask, affine, rows = canonical(target.mask, target.affine)
    target = replace(target, signal=target.signal[rows], mask=mask, affine=affine,
                     tissue=None if target.tissue is None else target.tissue[rows])
    usable = source.mean_b0 > 0
    maps = tensor_maps(target, device)
    if rigid is None:
        rigid = anatomy.align(target, source.unmask(_attenuation(source)), source.affine)
    place, at = world(target.mask.shape, rigid @ target.affine), np.linalg.inv(source.affine)
    turn = np.broadcast_to(rigid[:3, :3].T, (*target.mask.shape, 3, 3))
    if deformable:
        fa = source.unmask(tensor_maps(source, device)["fa"])
        moved = map_coordinates(fa, indices(at, place), order=1)
        u = displacement(target.unmask(maps["fa"]), moved * target.mask, target.affine,
                         work_dir, flow=FLOW)
        bent = transformed(rigid, world(target.mask.shape, target.affine) + u)
        before, after = _alike(source, target, indices(at, place), indices(at, bent))
        if after > before:
            place, turn = bent, _rotations(bent, target.affine)
    index = indices(at, place)
    inside = source.unmask(usable).astype(np.float32)
    where = target.mask & (map_coordinates(inside, index, order=1) > 0.5)
    where[target.mask] &= target.mean_b0 > 0
    least = OVERLAP * min(source.mask.sum() * abs(np.linalg.det(source.affine[:3, :3])),
                          target.mask.sum() * abs(np.linalg.det(target.affine[:3, :3])))
    if where.sum() * abs(np.linalg.det(target.affine[:3, :3])) < least:
        raise DataError(f"the scans of this participant share {int(where.sum())} voxels, less than "
                        f"{OVERLAP:.0%} of the smaller brain mask. Check that both show the same "
                        "part of the same head, and their masks.")
    labels = target.unmask(tissue.labels(target, maps["md"], maps["fa"],
                                         (target.mean_b0 > 0) & ~maps["failed"]))
    return Move(where, labels * where, index[:, where].astype(np.float32),
                turn[where].astype(np.float32))


def _alike(source: Dwi, target: Dwi, *moves: Float[np.ndarray, "3 x y z"]) -> list[float]:
    """Correlation of the attenuations by either move, where both lie in both masks; 0 where those
    are fewer than three voxels."""
    from scipy.ndimage import map_coordinates

    images = source.mask.astype(np.float32), source.unmask(_attenuation(source))
    inside, moved = (np.stack([map_coordinates(i, m[:, target.mask], order=1) for m in moves])
                     for i in images)
    common = (inside > 0.99).all(axis=0)
    wanted = _attenuation(target)[common]
    return [float(np.corrcoef(own[common], wanted)[0, 1]) if common.sum() > 2 else 0.0
            for own in moved]


def ratios(target: Dwi, move: Move) -> Float[np.ndarray, "voxel measurement"]:
    """The target's own S/S0 at the voxels of `where`."""
    mask, _, rows = canonical(target.mask, target.affine)
    rows = rows[move.where[mask]]
    return (target.signal[rows] / target.mean_b0[rows, None]).astype(np.float32)


def carried(source: Dwi, l_max: int, move: Move) -> Float[np.ndarray, "shell x y z coef"]:
    """The source's coefficients of S/S0 on the target's grid: `image` of `Aligned`.

    By cubic splines, which smooth little: a network that learned from smoothed input would be
    applied to input that is not.
    """
    values, usable = coefficients(source, l_max)
    return np.stack([filled(_turned(_moved(own[usable], source.mask, usable, move), move.turn),
                            move.where, margin=1) for own in values])


def resampled(source: Dwi, move: Move) -> Float[np.ndarray, "voxel measurement"]:
    """The source's S/S0 at the voxels of `where`, along its own directions, not turned: FA and MD
    do not turn. By cubic splines, as `carried`."""
    s0 = source.mean_b0
    usable = s0 > 0
    parts = np.array_split(np.arange(len(source.acquisition)), -(-len(source.acquisition) // GRIDS))
    return np.concatenate([_moved(
        (source.signal[:, part][usable] / s0[usable, None]).astype(np.float32), source.mask, usable,
        move) for part in parts], 1)


def _moved(values: Float[np.ndarray, "usable k"], mask: np.ndarray, usable: np.ndarray,
           move: Move) -> Float[np.ndarray, "voxel k"]:
    """Values of the usable voxels of a source at the voxels of `where`."""
    from scipy.ndimage import map_coordinates

    grid = filled(values, mask, usable)
    return np.stack([map_coordinates(component, move.index, order=3, mode="nearest")
                     for component in np.moveaxis(grid, -1, 0)], -1)


def tensor_maps(dwi: Dwi, device: str) -> Mapping[str, np.ndarray]:
    chosen = tensor.volumes(dwi.acquisition)
    x = tensor.design(dwi.acquisition[chosen].btensors)
    return map_voxels(lambda signal: tensor.fit(signal[:, chosen], x), dwi.signal, device)


def _attenuation(dwi: Dwi) -> Float[np.ndarray, " voxel"]:
    s0 = dwi.mean_b0
    weighted = dwi.signal[:, ~dwi.acquisition.b0].mean(axis=1)
    return (weighted / np.where(s0 > 0, s0, np.inf)).clip(0, 1)


def world(shape: Sequence[int], affine: np.ndarray) -> Float[np.ndarray, "x y z 3"]:
    """World points of all voxels."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return transformed(affine, index)


def transformed(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ affine[:3, :3].T + affine[:3, 3]


def indices(inverse: np.ndarray, place: Float[np.ndarray, "*grid 3"]) -> np.ndarray:
    """(3, …) of world points."""
    return np.moveaxis(transformed(inverse, place), -1, 0)


def displacement(fixed: np.ndarray, moving: np.ndarray, affine: np.ndarray, work_dir: Path | None,
                 iterations: Sequence[int] = ITERATIONS, flow: float = 3.0
                 ) -> Float[np.ndarray, "x y z 3"]:
    """u of SyN, world mm, between two images on one grid. flow: variance, in voxels, of the
    Gaussian that every update is smoothed by; antspyx' own, which serves unlike heads."""
    images = [to_ants(v, affine) for v in (fixed, moving)]
    import ants

    with anatomy.temporary(work_dir) as folder:
        found = ants.registration(
            *images,
            type_of_transform="SyNOnly", initial_transform="Identity", syn_metric="CC",
            syn_sampling=RADIUS, reg_iterations=iterations, flow_sigma=flow,
            outprefix=f"{folder}/syn")
        warp = next(f for f in found["fwdtransforms"] if f.endswith(".nii.gz"))
        u = np.asarray(open_image(Path(warp)).dataobj, np.float64)[..., 0, :]
    return u * FLIP


def to_ants(values: np.ndarray, affine: np.ndarray) -> Any:
    """antspyx' image; it will repeat itself: on one thread, from one seed."""
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    os.environ.setdefault("ANTS_RANDOM_SEED", "1")
    import ants

    size = np.linalg.norm(affine[:3, :3], axis=0)
    return ants.from_numpy(
        np.ascontiguousarray(values, np.float32), origin=(FLIP * affine[:3, 3]).tolist(),
        spacing=size.tolist(), direction=FLIP[:, None] * affine[:3, :3] / size)


def _rotations(place: np.ndarray, affine: np.ndarray) -> Float[np.ndarray, "x y z 3 3"]:
    """Rᵀ of the polar decomposition of ∂φ/∂p, φ at the voxels of a grid."""
    slopes = np.stack(np.gradient(place, axis=(0, 1, 2)), -1)  # world axis, voxel axis
    left, _, right = np.linalg.svd(slopes @ np.linalg.inv(affine[:3, :3]))
    left[..., -1] *= np.linalg.det(left @ right)[..., None]
    return (left @ right).swapaxes(-1, -2)


def _turned(values: Float[np.ndarray, "voxel coef"], turn: Float[np.ndarray, "voxel 3 3"]
            ) -> Float[np.ndarray, "voxel coef"]:
    with one_thread():
        parts = [sh.rotate(torch.from_numpy(values[i:i + BLOCK]),
                           torch.from_numpy(np.ascontiguousarray(turn[i:i + BLOCK], np.float32)))
                 for i in range(0, len(values), BLOCK)]
    return torch.cat(parts).numpy()
