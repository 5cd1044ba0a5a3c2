"""Run (paths and entities), Dwi (signal inside a mask), and how images are opened and checked.

The signal is one float32 matrix of (voxel, measurement), so that memory is bounded by the mask and
not by the image matrix. Voxels stand in the C order of `np.nonzero(mask)`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bidsapp import sh
from bidsapp.acquisition import Acquisition, PhaseEncoding, Shell
from bidsapp.errors import DataError

FIXED_MEMORY = 1.5e9
"""Bytes that a process needs beside the signal: libraries, blocks, maps, figures."""

DAMAGE = (OSError, EOFError, ValueError, zlib.error)
"""Exceptions raised on reading a truncated or changed file."""

NOISE_VOXELS = 20_000
"""The noise level is estimated on at most this many voxels, spread evenly over the mask."""


@dataclass(frozen=True)
class Part:
    """One DWI file with its tables and sidecar. A run holds one, or several to concatenate.

    image, bval, bvec: paths; encoding: `.btens`, `.bshape` or `.tsv` with a b_delta column, or
    None for linear encoding; metadata: the sidecars merged by inheritance.
    """

    image: Path
    bval: Path
    bvec: Path
    encoding: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def files(self) -> tuple[Path, ...]:
        paths = (self.image, self.bval, self.bvec, self.encoding)
        return tuple(p for p in paths if p is not None)


@dataclass(frozen=True)
class ImageFile:
    """An image beside the DWIs (an EPI, a field map, its magnitude, a phase), with its merged
    sidecars."""

    image: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", dict(self.metadata))


FIELD_MAPS = {
    "opposite": "opposite phase encoding",
    "phasediff": "phase difference of two echoes",
    "phases": "phases of two echoes",
    "fieldmap": "measured field",
}
"""Kinds of field maps, those that are trusted most first, and what they are called."""

FIELD_UNITS = ("Hz", "rad/s", "T")


@dataclass(frozen=True)
class FieldMap:
    """Images from which the susceptibility field of a run can be computed.

    Parameters
    ----------
    kind : str
        A key of FIELD_MAPS.
    images : tuple of ImageFile or Part
        opposite: EPIs or DWIs, which with the run's own encode both ways; phasediff, fieldmap:
        one image; phases: those of the first and the second echo.
    magnitudes : tuple of ImageFile
        Magnitudes of the echoes, of all kinds but `opposite`.
    rule : str
        Why it is the run's: `B0FieldSource`, `IntendedFor` or `session` (nothing says so; both are
        of one session).

    Raises
    ------
    DataError
        An image is missing, or a sidecar does not say what is needed to compute the field.
    """

    kind: str
    images: tuple[ImageFile | Part, ...]
    magnitudes: tuple[ImageFile, ...] = ()
    rule: str = "session"

    def __post_init__(self) -> None:
        if self.kind not in FIELD_MAPS or not self.images:
            raise ValueError(f"a field map of kind {self.kind} with {len(self.images)} images")
        name, first = self.images[0].image, self.images[0].metadata
        if self.kind == "opposite":
            for part in self.images:
                try:
                    if PhaseEncoding.of_sidecar(part.metadata) is None:
                        raise DataError("PhaseEncodingDirection is missing. Add it to the sidecar.")
                except DataError as error:
                    raise DataError(f"{part.image}: {error}") from error
            return
        if not self.magnitudes:
            raise DataError(f"{name}: no magnitude image stands beside it. Add it, by the same "
                            "name but for the suffix.")
        if self.kind == "fieldmap":
            if first.get("Units") not in FIELD_UNITS:
                raise DataError(f"{name}: Units are {str(first.get('Units'))[:20]!r}; "
                                f"{', '.join(FIELD_UNITS)} are understood. Correct the sidecar.")
            return
        if self.kind == "phases" and len(self.images) < 2:
            raise DataError(f"{name}: the phase of the other echo is missing. Add it.")
        stated = ([first.get(f"EchoTime{i}") for i in (1, 2)] if self.kind == "phasediff"
                  else [image.metadata.get("EchoTime") for image in self.images])
        times = [t for t in stated if isinstance(t, int | float)]
        if len(times) != 2 or not 0 < times[0] < times[1]:
            raise DataError(f"{name}: two echo times are needed, the second larger than the first; "
                            f"found are {', '.join(str(t)[:20] for t in stated)}. Correct the "
                            "sidecar.")


@dataclass(frozen=True)
class Run:
    """What is processed as one: paths and facts, no arrays.

    entities: BIDS entities shared by all parts, by short key in BIDS order, e.g.
        {"sub": "01", "ses": "a", "acq": "x", "dir": "AP", "run": "1"}.
    t1w: the T1w image of the same session or, where it has none, of the participant.
    probsegs: grey matter, white matter and CSF probabilities in its space, or nothing.
    dataset: (name, root) of the dataset the files come from; `raw` or a derivative's name.
    batch, batch_source: the site and where it was read from.
    covariates: the participant's row of participants.tsv (and sessions.tsv), e.g. age, sex.
    preprocessed: whether the images were corrected elsewhere. Of others, what corrects them:
    phase_encoding: of all parts; None where it is unknown.
    field_maps: those that may be used, the most trusted first.
    phase: phase images of the parts, one for each, or nothing.
    notices: sentences on what is missing or broken of these.
    """

    entities: Mapping[str, str]
    parts: tuple[Part, ...]
    mask: Path | None = None
    t1w: Path | None = None
    probsegs: tuple[Path, ...] = ()
    dataset: tuple[str, Path] = ("raw", Path())
    batch: str = "unknown"
    batch_source: str = "none found"
    covariates: Mapping[str, Any] = field(default_factory=dict)
    preprocessed: bool = False
    phase_encoding: PhaseEncoding | None = None
    field_maps: tuple[FieldMap, ...] = ()
    phase: tuple[ImageFile, ...] = ()
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or "sub" not in self.entities:
            raise ValueError("a Run needs at least one part and a `sub` entity")
        object.__setattr__(self, "entities", dict(self.entities))
        object.__setattr__(self, "covariates", dict(self.covariates))

    @property
    def name(self) -> str:
        """`sub-01_ses-a_dir-AP`: the stem of every output of this run."""
        return "_".join(f"{key}-{value}" for key, value in self.entities.items())

    @property
    def participant(self) -> str:
        return self.entities["sub"]

    @property
    def session(self) -> str | None:
        return self.entities.get("ses")

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that all results depend on."""
        return tuple(f for p in self.parts for f in p.files) + ((self.mask,) if self.mask else ())

    @property
    def anatomy(self) -> tuple[Path, ...]:
        """What tissue is read from, where a method wants it."""
        return ((self.t1w,) if self.t1w else ()) + self.probsegs

    @property
    def metadata(self) -> dict[str, Any]:
        """Sidecar keys on which all parts agree."""
        first = self.parts[0].metadata
        return {k: v for k, v in first.items()
                if all(p.metadata.get(k) == v for p in self.parts[1:])}


@dataclass(frozen=True, eq=False)
class Dwi:
    """The signal of one run inside its mask, and how it was acquired.

    Args:
        signal: (voxel, measurement) float32, in the units of the input image.
        mask: (x, y, z) bool; as many true voxels as signal has rows, in C order.
        affine: (4, 4) voxel to world RAS+, mm.
        acquisition: as many measurements as signal has columns.
        noise_sd: SD of the noise in signal units, or None where it could not be estimated.
        noise_gain: (measurement,) by how much the noise of each is larger than noise_sd, as after
            harmonization; None for all alike. Where noise is no longer independent between
            measurements, it is the gain of independent noise that would move the mean over the
            directions of their shell as much.
        s0_known: whether the b0 volumes hold S0 without noise, as simulations may. Nothing that
            was measured is so, not even after division by the mean b0.
        invalid: number of NaN or infinite values that were read and set to 0.
        tissue: (voxel, 3) float32 probabilities of grey matter, white matter and CSF from a T1w
            image, Σ ≤ 1, or None.

    Raises:
        DataError: the mask is empty. ValueError: sizes disagree.
    """

    signal: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    acquisition: Acquisition
    noise_sd: float | None = None
    invalid: int = 0
    tissue: np.ndarray | None = None
    noise_gain: np.ndarray | None = None
    s0_known: bool = False

    def __post_init__(self) -> None:
        if not self.mask.any():
            raise DataError("the brain mask is empty. Give a mask, or check that the image holds "
                            "a head and is not all zeros.")
        if self.signal.shape != (int(self.mask.sum()), len(self.acquisition)):
            raise ValueError(f"signal of shape {self.signal.shape} for {int(self.mask.sum())} "
                             f"voxels and {len(self.acquisition)} measurements")
        if self.signal.dtype != np.float32 or self.mask.dtype != bool:
            raise ValueError("signal must be float32 and mask bool")
        if self.tissue is not None and (
                self.tissue.shape != (len(self.signal), 3) or self.tissue.dtype != np.float32
                or not (self.tissue.min() >= 0 and self.tissue.sum(axis=1).max() <= 1 + 1e-5)):
            raise ValueError("tissue must be (voxel, 3) float32 of probabilities with a sum of at "
                             f"most 1, and has shape {self.tissue.shape}, {self.tissue.dtype}")
        for name in ("signal", "mask", "affine", *(["tissue"] if self.tissue is not None else [])):
            view = np.asarray(getattr(self, name)).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    def unmask(self, values: np.ndarray) -> np.ndarray:
        """(voxel, …) values back in the image grid, (x, y, z, …), 0 outside the mask."""
        volume = np.zeros(self.mask.shape + values.shape[1:], values.dtype)
        volume[self.mask] = values
        return volume

    def select_shell(self, shell: Shell) -> Dwi:
        """The volumes of a shell, and those without weighting."""
        part = np.sort(np.r_[np.flatnonzero(self.acquisition.b0), shell.indices])
        return replace(self, signal=self.signal[:, part], acquisition=self.acquisition[part])

    @property
    def mean_b0(self) -> np.ndarray:
        """(voxel,) mean over the measurements with b < 50 s/mm²."""
        return self.signal[:, self.acquisition.b0].mean(axis=1)

    def gain(self, indices: np.ndarray) -> float:
        """Root mean square of the noise gain of some measurements."""
        if self.noise_gain is None:
            return 1.0
        return float(np.sqrt(np.mean(np.square(self.noise_gain[indices]))))

    def noise_of(self, indices: np.ndarray) -> float | None:
        """SD of the noise of some measurements, in signal units, or None where it is unknown."""
        return None if self.noise_sd is None else self.noise_sd * self.gain(indices)


def peak_memory(voxels: int, measurements: int) -> float:
    """Bytes at most while a signal of this size is processed: twice itself and FIXED_MEMORY."""
    return 2 * 4 * voxels * measurements + FIXED_MEMORY


def noise_sd(dwi: Dwi) -> float | None:
    """SD of the noise, in signal units: residual of an SH fit per shell, pooled, median of voxels.

    A shell of n directions is fitted with the most SH coefficients p ≤ 0.75 n (and the b0 volumes
    with their mean), and σ² = Σ residual² / Σ (n − p) per voxel; the median over voxels divided by
    the median of χ²_ν/ν makes it unbiased for Gaussian noise. None when Σ (n − p) < 4.
    """
    step = max(1, len(dwi.signal) // NOISE_VOXELS)
    signal = dwi.signal[::step].astype(np.float64)
    squares, dof = np.zeros(len(signal)), 0
    acquisition = dwi.acquisition
    groups = [(s.indices, True) for s in acquisition.shells]
    groups += [(np.flatnonzero(acquisition.b0), False)]
    for indices, weighted in groups:
        if len(indices) < 2:
            continue
        basis = (sh.independent(sh.basis(sh.degree_for(0.75 * len(indices)),
                                         acquisition.bvecs[indices]))
                 if weighted else np.ones((len(indices), 1)))
        q, _ = np.linalg.qr(basis)
        values = signal[:, indices]
        squares += np.sum((values - values @ q @ q.T) ** 2, axis=1)
        dof += len(indices) - basis.shape[1]
    if dof < 4:
        return None
    from scipy.stats import chi2

    return float(np.sqrt(np.median(squares) / chi2.median(dof)))


def open_image(path: Path) -> Any:
    """A NIfTI image of real numbers, its data still on disk, its file open for reading in order.

    Raises:
        DataError: missing, a broken link, empty, not an image, of complex numbers or colours, or
            without a place in the world: its affine is not finite or cannot be inverted.
    """
    if not path.exists():
        what = "is a link to a file that is not here" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {what}. Fetch it (e.g. `datalad get {path.name}`) or copy it.")
    try:
        image: Any = nib.load(path, keep_file_open=True)
    except Exception as error:  # nibabel raises many kinds on damaged headers
        raise DataError(f"{path}: cannot be read as NIfTI ({error}). "
                        "Copy or convert the file again.") from error
    _require_place(image, path)
    if (stored := image.get_data_dtype()).kind not in "iuf":
        kind = f"complex numbers ({stored})" if stored.kind == "c" else "colours, not numbers"
        raise DataError(f"{path}: holds {kind}. One real number per voxel is needed: of complex "
                        "data, write the magnitude and the phase as two files, with part-mag and "
                        "part-phase in their names.")
    return image


def _require_place(image: Any, path: Path) -> None:
    """Raise DataError unless voxel sizes, affine, qform and sform are finite, and the affine can
    be inverted."""
    try:
        matrices = (image.affine, image.get_qform(coded=True)[0], image.get_sform(coded=True)[0])
        finite = np.isfinite(image.header.get_zooms()[:3]).all() and all(
            np.isfinite(m).all() for m in matrices if m is not None)
        invertible = finite and np.linalg.cond(image.affine[:3, :3]) < 1e6
    except Exception as error:  # nibabel raises many kinds on quaternions that are no rotation
        raise DataError(f"{path}: its qform cannot be read ({error}). Convert the file again.") \
            from error
    if not finite:
        raise DataError(f"{path}: its qform, sform or voxel size holds numbers that are not "
                        "finite. Convert the file again, or correct its header.")
    if not invertible:
        raise DataError(f"{path}: its affine cannot be inverted, so no direction is known. "
                        "Convert the file again, or correct its header.")


def read_array(image: Any, dtype: Any = None) -> np.ndarray:
    """All values of an image from `open_image`, scaled as its header says.

    Raises:
        DataError: the file is damaged: it is truncated, or its checksum or length is wrong.
    """
    try:
        values = np.asarray(image.dataobj, dtype)
    except DAMAGE as error:
        raise DataError(f"{image.get_filename()}: ends or breaks before its end ({error}). Copy or "
                        "make the file again.") from error
    check_end(image)
    return values


def check_end(image: Any) -> None:
    """Read on behind the last value: there gzip keeps its checksum, and there the file must end.

    Call it when all values were read in order, so that nothing is read twice.

    Raises:
        DataError: the checksum or the length is wrong, or something follows the values.
    """
    data = image.dataobj
    if isinstance(data, np.ndarray):  # the image was made in memory
        return
    # nibabel has no public name for the stream that it keeps open
    with data._get_fileobj() as stream:
        try:
            stream.seek(data.offset + math.prod(data.shape) * data.dtype.itemsize)
            surplus = stream.read(1)
        except DAMAGE as error:
            raise DataError(f"{image.get_filename()}: is damaged: its values are not those that "
                            f"were written ({error}). Copy or convert the file again.") from error
    if surplus:
        raise DataError(f"{image.get_filename()}: is longer than its header says: bytes follow the "
                        f"last of its values ({' × '.join(map(str, data.shape))}). Copy or convert "
                        "the file again.")
