"""Convert gradient tables between files, in the convention of FSL, and `Acquisition`.

FSL's b-vectors are relative to the axes of the image, with x flipped if det(affine) > 0. With Q the
orthogonal polar factor of affine[:3, :3] (the axes of the voxels without their sizes and shear,
with the sign of the determinant), and F = diag(−1, 1, 1) if det > 0 and I otherwise,

    n_world = Q F n_fsl,        n_fsl = F Qᵀ n_world.

A b-tensor encoding file gives the shape of each volume's b-tensor; there are three formats. A
`.btens` has one line per volume with 9 numbers (3×3, row by row) or 6 (xx xy xz yy yz zz), in the
frame of the .bvec and in s/mm². Lines that start with # are comments, of which `# frame: world`
(RAS+) and `# units: ms/um2` change frame and unit. Its tensors replace b-values and b-vectors, and
their traces must agree with the .bval within 10 % or 50 s/mm². A `.bshape` has one b_Δ per volume,
and a `.tsv` has it in a column `b_delta`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bidsapp.acquisition import B0_MAX, NORM_TOLERANCE, Acquisition, concatenate
from bidsapp.bids.inherit import require_file
from bidsapp.dwi import Part, Run, open_image
from bidsapp.errors import DataError

ASYMMETRY_MAX = 0.05
"""Tolerance for the b-tensors of a file, as a share of b: for the difference between the two
similar eigenvalues, between the tensor and its transpose, and of a negative eigenvalue from 0."""

TIMES = {
    "small_delta": ("DiffusionPulse_delta_s", "SmallDelta", "DiffusionGradientPulseDuration"),
    "big_delta": ("DiffusionTimeDelta_s", "LargeDelta", "BigDelta"),
    "echo_time": ("EchoTime",),
}
"""Sidecar keys of pulse duration, pulse separation and echo time, in s. The first one present is
used."""


def load_acquisition(run: Run) -> Acquisition:
    """Read the gradient tables of the parts of a run and concatenate them in order.

    Parameters
    ----------
    run : Run
        Run with one or several parts.

    Returns
    -------
    Acquisition

    Raises
    ------
    DataError
        A part cannot be read (`read_acquisition`); the run has no b0 volume or nothing else; or its
        largest b-value is below 20, which looks like ms/µm².
    """
    bvals = np.concatenate([_numbers(part.bval) for part in run.parts])
    files = ", ".join(str(part.bval) for part in run.parts)
    largest, smallest = bvals.max(), bvals.min()
    if largest == 0:
        raise DataError(f"{files}: all {len(bvals)} b-values are 0, so nothing is "
                        "diffusion-weighted. Give the table of the weighted series.")
    if 0 < largest < 20:
        raise DataError(f"{files}: the largest b-value is {largest:g}, which looks like ms/µm². "
                        "b-values are needed in s/mm²: multiply the table by 1000.")
    if 0 < largest < B0_MAX:
        raise DataError(f"{files}: only b0 volumes (b < {B0_MAX:g} s/mm²; the largest is "
                        f"{largest:g}). Weighted volumes are needed: leave the run out with "
                        "--bids-filter-file, or join it with its weighted series.")
    if smallest >= B0_MAX:
        raise DataError(f"{files}: no b0 volume (b < {B0_MAX:g} s/mm²; the smallest is "
                        f"{smallest:g}). At least one is needed: add the b0 volume of the same "
                        "series to image and table.")
    return concatenate([read_acquisition(part) for part in run.parts])


def read_acquisition(part: Part) -> Acquisition:
    """Read the gradient table of one file, with directions in world RAS+.

    Parameters
    ----------
    part : Part
        Image with its tables.

    Returns
    -------
    Acquisition

    Raises
    ------
    DataError
        A table is missing, not numeric, or not of the length of the image, which must be 4-D; or
        its values are not allowed (`Acquisition`). The message names the file and a remedy.
    """
    image = open_image(part.image)
    if len(image.shape) != 4:
        raise DataError(f"{part.image}: has {len(image.shape)} dimensions, a DWI needs 4 "
                        "(x, y, z, volume). Convert the whole series, not a single volume.")
    n, affine = image.shape[3], image.affine
    bvals = _numbers(part.bval)
    bvecs = _vectors(part.bvec)
    if not n == bvals.size == len(bvecs):
        raise DataError(f"{part.image} has {n} volumes, {part.bval.name} {bvals.size} b-values "
                        f"and {part.bvec.name} {len(bvecs)} b-vectors; the three must be equal. "
                        "Export the three from the same series again, or remove the surplus.")
    directions = to_world(bvecs, affine)
    b_delta = None
    if part.encoding is not None:
        bvals, directions, b_delta = _encoding(part.encoding, bvals, directions, affine)
    try:
        return Acquisition(bvals, directions, b_delta, **_times(part.metadata))
    except DataError as error:
        others = [p.name for p in (part.bvec, part.encoding) if p]
        raise DataError(f"{part.bval} with {' and '.join(others)}: {error}") from error


def read_target(path: Path, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Read measurements that are to be predicted.

    Parameters
    ----------
    path : Path
        A .bvec in FSL's convention, relative to the axes of the image beside it (same name,
        .nii.gz or .nii) or, without one, of the run; with the .bval beside it, if there is one.
        Without it vectors of length 0 are left out, as those of b0 volumes. Or a
        .b: rows x y z b, in world RAS+, as MRtrix writes them.
    affine : (4, 4)
        Affine of the run's image.

    Returns
    -------
    bvecs : (n, 3)
        World RAS+.
    bvals : (n,) or None
        s/mm²; None if only directions are given.

    Raises
    ------
    DataError
        A file cannot be read, or does not hold such a table.
    """
    if not path.exists() and not path.is_symlink():
        raise DataError(f"{path}: does not exist. Correct the path.")
    bvecs, bvals = _read_target(path, affine)
    try:
        Acquisition(np.full(len(bvecs), B0_MAX) if bvals is None else bvals, bvecs)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return bvecs, bvals


def _read_target(path: Path, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if path.suffix == ".b":
        rows = _rows(path)[0]
        if any(len(row) != 4 for row in rows):
            raise DataError(f"{path}: rows of 4 numbers, x y z b, are needed. Export the table as "
                            "MRtrix writes it (mrinfo -export_grad_mrtrix).")
        table = np.array(rows)
        return table[:, :3], table[:, 3]
    image = next((p for p in target_files(path) if p.suffix in (".gz", ".nii")), None)
    bvecs = to_world(_vectors(path), affine if image is None else open_image(image).affine)
    bval = path.with_suffix(".bval")
    if not bval.is_file():  # vectors of length 0 are those of b0 volumes
        bvecs = bvecs[bvecs.any(1)]
    lengths = np.linalg.norm(bvecs, axis=1)
    if not len(bvecs):
        raise DataError(f"{path}: all vectors are 0. Directions are needed: export the table "
                        "again.")
    if not bval.is_file() and (np.abs(lengths - 1) > NORM_TOLERANCE).any():
        raise DataError(f"{path}: vector {int(np.argmax(np.abs(lengths - 1)))} has length "
                        f"{lengths[np.argmax(np.abs(lengths - 1))]:.3g}, and there is no "
                        f"{bval.name} beside it which says that it is a b0. Unit vectors, or 0 for "
                        "a b0, are needed: add the .bval, or correct the vector.")
    bvals = _numbers(bval) if bval.is_file() else None
    if bvals is not None and len(bvals) != len(bvecs):
        raise DataError(f"{path} has {len(bvecs)} vectors and {bval.name} {len(bvals)} b-values. "
                        "As many are needed: export both again.")
    return bvecs, bvals


def target_files(path: Path) -> list[Path]:
    """List the files that `read_target` reads."""
    beside = [path.with_suffix(extension) for extension in (".bval", ".nii.gz", ".nii")]
    return [path, *(p for p in beside if path.suffix != ".b" and p.is_file())]


def largest_b(part: Part) -> float:
    """Find the largest b-value of a file, s/mm²; infinite if its table cannot be read."""
    try:
        return float(_numbers(part.bval).max())
    except DataError:
        return math.inf


def to_world(bvecs: Float[np.ndarray, "n 3"], affine: Float[np.ndarray, "4 4"]
             ) -> Float[np.ndarray, "n 3"]:
    """Convert b-vectors (n, 3) from FSL's convention to world RAS+, for any invertible affine."""
    return bvecs @ fsl_axes(affine).T


def to_fsl(acquisition: Acquisition, affine: Float[np.ndarray, "4 4"]
           ) -> Float[np.ndarray, "3 n"]:
    """Convert directions to a .bvec (3, n), in FSL's convention for an image with an affine."""
    return fsl_axes(affine).T @ acquisition.bvecs.T


def text(table: np.ndarray) -> str:
    """Format a table as a .bval (1, n) or .bvec (3, n) file."""
    return "".join(" ".join(f"{v:.8g}" for v in row + 0.0) + "\n" for row in table)  # no -0


def btens_text(acquisition: Acquisition, affine: np.ndarray) -> str:
    """Format b-tensors as a .btens file: lines of 9 numbers, s/mm², in the frame of the .bvec."""
    axes = fsl_axes(affine)
    rows = (axes.T @ acquisition.btensors @ axes).reshape(-1, 9)
    return "".join(" ".join(f"{v:.6g}" for v in row + 0.0) + "\n" for row in rows)


def fsl_axes(affine: np.ndarray) -> np.ndarray:
    """Compute Q F of this module's equation: axes of the .bvec in world RAS+, as columns (3, 3).

    It is orthogonal with determinant −1 for any affine.
    """
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    u, _, vt = np.linalg.svd(linear)
    flip = -1.0 if np.linalg.det(linear) > 0 else 1.0
    return u @ vt @ np.diag([flip, 1.0, 1.0])


def _rows(path: Path) -> tuple[list[np.ndarray], str]:
    """Read the rows of numbers and the comments of a text file."""
    try:
        text = require_file(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Copy or export it again.") \
            from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    comments = "\n".join(line for line in lines if line.startswith("#"))
    rows = []
    for line in lines:
        if line.startswith("#"):
            continue
        for token in (tokens := re.findall(r"[^\s,;]+", line)):
            if not _is_number(token):
                raise DataError(f"{path}: holds {token[:20]!r}, which is not a finite number. "
                                "Numbers separated by spaces are needed: export the table again.")
        rows.append(np.array(tokens, dtype=np.float64))
    if not rows:
        raise DataError(f"{path}: is empty. Copy or export the table again.")
    return rows, comments


def _is_number(token: str) -> bool:
    try:
        return math.isfinite(float(token))
    except ValueError:
        return False


def _numbers(path: Path) -> np.ndarray:
    """All numbers of a file, whether in one row or in one column."""
    return np.concatenate(_rows(path)[0])


def _vectors(path: Path) -> np.ndarray:
    """(n, 3) from 3 rows of n numbers or, if there are not 3 rows, from n rows of 3."""
    rows, _ = _rows(path)
    lengths = {len(row) for row in rows}
    if len(lengths) == 1:
        if len(rows) == 3:
            return np.array(rows).T
        if lengths == {3}:
            return np.array(rows)
    counts = " or ".join(map(str, sorted(lengths)))
    raise DataError(f"{path}: holds {len(rows)} rows of {counts} numbers; 3 rows of one number per "
                    "volume are needed (or one row of 3 per volume). Export the table again.")


def _times(metadata: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: next((float(metadata[k]) for k in keys
                        if isinstance(metadata.get(k), int | float) and metadata[k] > 0), None)
            for name, keys in TIMES.items()}


def _encoding(path: Path, bvals: np.ndarray, directions: np.ndarray, affine: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read an encoding file: b (s/mm²), directions (world RAS+) and b_delta of each volume.

    b and directions are those of a .btens. Other formats have none: the given ones are returned.
    """
    if path.suffix == ".btens":
        b, directions, b_delta = _decompose(_tensors(path, affine, len(bvals)), path)
        different = np.abs(b - bvals) > np.maximum(B0_MAX, 0.1 * bvals)
        if different.any():
            i = int(np.argmax(different))
            raise DataError(f"{path}: the b-tensor of volume {i} has trace {b[i]:g} s/mm², the "
                            f".bval says {bvals[i]:g}. Correct one of them; if the tensors are in "
                            "ms/µm², add the line `# units: ms/um2`.")
        return b, directions, b_delta
    if path.suffix == ".tsv":
        import pandas as pd

        try:
            table = pd.read_csv(require_file(path), sep="\t")
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as a table ({error}). It must be a text file "
                            "with columns separated by tabs.") from error
        if "b_delta" not in table:
            raise DataError(f"{path}: has no column b_delta. Add it (1 linear, 0 spherical, -0.5 "
                            "planar), or remove the file if all encoding is linear.")
        b_delta = pd.to_numeric(table["b_delta"], errors="coerce").to_numpy(np.float64)
    else:
        b_delta = _numbers(path)
    if len(b_delta) != len(bvals):
        raise DataError(f"{path}: holds {len(b_delta)} values of b_delta for {len(bvals)} volumes; "
                        "one per volume is needed.")
    return bvals, directions, b_delta


def _tensors(path: Path, affine: np.ndarray, n: int) -> np.ndarray:
    """(n, 3, 3) b-tensors in world RAS+, s/mm²."""
    rows, comments = _rows(path)
    lengths = {len(row) for row in rows}
    if len(rows) != n or lengths not in ({6}, {9}):
        raise DataError(f"{path}: holds {len(rows)} lines of {sorted(lengths)} numbers for {n} "
                        "volumes; one line of 9 (3×3, row by row) or 6 (xx xy xz yy yz zz) per "
                        "volume is needed.")
    table = np.array(rows)
    if table.shape[1] == 6:
        table = table[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]]
    tensors = table.reshape(-1, 3, 3)
    stated = {k: re.search(rf"{k}:\s*(\S+)", comments) for k in ("units", "frame")}
    units, frame = (m.group(1).lower().replace("²", "2").replace("µ", "u").replace("μ", "u")
                    if m else default
                    for m, default in zip(stated.values(), ("s/mm2", "bvec"), strict=True))
    scale = {"s/mm2": 1.0, "ms/um2": 1e3, "s/m2": 1e-6}.get(units)
    if scale is None or frame not in ("bvec", "world"):
        raise DataError(f"{path}: states units {units} and frame {frame}; supported are s/mm2, "
                        "ms/um2, s/m2, and bvec, world.")
    if frame == "bvec":
        axes = fsl_axes(affine)
        tensors = axes @ tensors @ axes.T
    return tensors * scale


def _decompose(tensors: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """b (trace), symmetry axis (unit) and b_delta of axially symmetric tensors.

    The axis belongs to the eigenvalue λ∥ that differs most from the other two, whose mean is λ⊥;
    b_Δ = (λ∥ − λ⊥) / b, or 1 for b0 volumes.
    """
    skew = np.abs(tensors - np.swapaxes(tensors, 1, 2)).max(axis=(1, 2))
    values, vectors = np.linalg.eigh((tensors + np.swapaxes(tensors, 1, 2)) / 2)
    b = values.sum(axis=1)
    weighted = b >= B0_MAX
    lower, upper = np.diff(values, axis=1).T  # gaps of the ascending eigenvalues
    single = np.where(upper >= lower, 2, 0)  # position of λ∥
    rows = np.arange(len(b))
    for bad, property_ in (
        (b < -B0_MAX, "has a negative trace"),
        (skew > ASYMMETRY_MAX * np.maximum(b, B0_MAX), "is not symmetric"),
        (weighted & (np.minimum(lower, upper) > ASYMMETRY_MAX * b),
         "is not axially symmetric (three different eigenvalues), which is not supported"),
        (weighted & (values[:, 0] < -ASYMMETRY_MAX * b), "has a negative eigenvalue"),
    ):
        if bad.any():
            i = int(np.argmax(bad))
            raise DataError(f"{path}: the b-tensor of volume {i} {property_}; its eigenvalues are "
                            f"{np.array2string(values[i], precision=4)}. Correct the file, or "
                            "remove the volume from image and tables.")
    parallel = values[rows, single]
    shape = (3 * parallel - b) / 2 / np.where(weighted, b, 1)
    b_delta = np.where(weighted, np.clip(shape, -0.5, 1), 1.0)
    return np.maximum(b, 0), vectors[rows, :, single], b_delta
