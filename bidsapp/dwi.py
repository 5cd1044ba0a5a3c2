"""Run (paths and entities) and Dwi (signal inside a mask); opening and checking of images.

The signal is one float32 matrix of (voxel, measurement), so that memory depends on the mask and not
on the size of the image. Voxels are in the C order of `np.nonzero(mask)`.
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
from bidsapp.acquisition import SAME_SHAPE, Acquisition, PhaseEncoding, Shell
from bidsapp.errors import DataError

FIXED_MEMORY = 1.5e9
"""Memory of a process besides the signal (libraries, blocks, maps, figures), in bytes."""

DAMAGE = (OSError, EOFError, ValueError, zlib.error)
"""Exceptions that are raised when a truncated or changed file is read."""

NOISE_VOXELS = 20_000
"""Number of voxels, at least, for the estimate of the noise level, spread evenly over the mask; all
voxels of a smaller mask."""

NOISE_DIRECTIONS = 8
"""Smallest number of directions of a shell for the noise level: 0.75 times as many determine SH
degree 2."""

MIN_RESIDUALS = 2
"""Smallest number of degrees of freedom per voxel for the noise level: those of a shell of
NOISE_DIRECTIONS alone."""


@dataclass(frozen=True)
class Part:
    """One DWI file with its tables and sidecar. A run has one, or several to concatenate.

    Parameters
    ----------
    image, bval, bvec : Path
        The files.
    encoding : Path, optional
        A `.btens`, a `.bshape`, or a `.tsv` with a column b_delta; None for linear encoding.
    metadata : mapping
        Keys of the sidecars, merged by inheritance.
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
        """All files of the part but its sidecars."""
        paths = (self.image, self.bval, self.bvec, self.encoding)
        return tuple(p for p in paths if p is not None)


@dataclass(frozen=True)
class ImageFile:
    """An image besides the DWIs (an EPI, a field map, its magnitude, a phase), with the keys of its
    merged sidecars."""

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
"""Kinds of field maps with their names, the most trusted first."""

FIELD_UNITS = {"Hz": 1.0, "rad/s": 1 / (2 * math.pi), "T": 42.577e6}
"""Units that a measured field may have, in Hz."""


@dataclass(frozen=True)
class FieldMap:
    """Images from which the susceptibility field of a run can be computed.

    Parameters
    ----------
    kind : str
        A key of FIELD_MAPS.
    images : tuple of ImageFile or Part
        `opposite`: EPIs or DWIs of the opposite phase encoding. `phasediff`, `fieldmap`: one
        image. `phases`: those of the first and of the second echo.
    magnitudes : tuple of ImageFile
        Magnitudes of the echoes, for all kinds but `opposite`.
    rule : str
        Rule by which it belongs to the run: `B0FieldSource`, `IntendedFor`, `session` if no
        sidecar assigns it and both are of one session, or `run` if its images are parts of the run
        (merged runs).

    Raises
    ------
    DataError
        An image is missing, or a sidecar lacks what is needed to compute the field.
    ValueError
        The kind is unknown, or there is no image.
    """

    kind: str
    images: tuple[ImageFile | Part, ...]
    magnitudes: tuple[ImageFile, ...] = ()
    rule: str = "session"

    def __post_init__(self) -> None:
        if self.kind not in FIELD_MAPS or not self.images:
            raise ValueError(f"the field map has the kind {self.kind} and {len(self.images)} "
                             "images")
        name, first = self.images[0].image, self.images[0].metadata
        if self.kind == "opposite":
            for part in self.images:
                try:
                    if PhaseEncoding.from_sidecar(part.metadata) is None:
                        raise DataError("PhaseEncodingDirection is missing. Add it to the sidecar.")
                except DataError as error:
                    raise DataError(f"{part.image}: {error}") from error
            return
        if not self.magnitudes:
            raise DataError(f"{name}: has no magnitude image beside it. Add one of the same name "
                            "with the suffix of a magnitude.")
        if self.kind == "fieldmap":
            if first.get("Units") not in FIELD_UNITS:
                raise DataError(f"{name}: Units are {str(first.get('Units'))[:20]!r}; "
                                f"{', '.join(FIELD_UNITS)} are supported. Correct the sidecar.")
            return
        if self.kind == "phases" and len(self.images) < 2:
            raise DataError(f"{name}: the phase of the other echo is missing. Add it.")
        if self.echo_times is None:
            raise DataError(f"{name}: the echo times are "
                            f"{', '.join(str(t)[:20] for t in self._stated_times)}. Two are "
                            "needed, the second larger than the first. Correct the sidecar.")

    @property
    def echo_times(self) -> tuple[float, float] | None:
        """Echo times of a phase difference or of two phases, s; None if there are none."""
        times = [float(t) for t in self._stated_times if isinstance(t, int | float)]
        return (times[0], times[1]) if len(times) == 2 and 0 < times[0] < times[1] else None

    @property
    def _stated_times(self) -> list[Any]:
        if self.kind == "phasediff":
            return [self.images[0].metadata.get(f"EchoTime{i}") for i in (1, 2)]
        return [i.metadata.get("EchoTime") for i in self.images] if self.kind == "phases" else []


@dataclass(frozen=True)
class Run:
    """The images that are processed together: paths and metadata, no arrays.

    Parameters
    ----------
    entities : mapping
        BIDS entities that all parts share, by short key in BIDS order, such as
        {"sub": "01", "ses": "a", "acq": "x", "dir": "AP", "run": "1"}.
    parts : tuple of Part
        The DWI files, in order.
    mask : Path, optional
        Brain mask that comes with the data.
    t1w : Path, optional
        T1w image of the session or, if it has none, of the participant.
    probsegs : tuple of Path
        Grey matter, white matter and CSF probabilities in the space of `t1w`, or empty.
    dataset : tuple
        Name and root of the dataset of the files: `raw`, or the name of a derivative.
    batch, batch_source : str
        The site, and where it was read from.
    covariates : mapping
        The participant's row of participants.tsv and sessions.tsv, such as age and sex.
    preprocessed : bool
        Whether the images are already corrected. The fields below are set only if they are not.
    phase_encoding : PhaseEncoding, optional
        Phase encoding of the first part with b0 volumes, which only the parts of merged runs do not
        share; None if unknown.
    field_maps : tuple of FieldMap
        Field maps that may be used, the most trusted first.
    phase : tuple of ImageFile
        Phase image of each part, or the imaginary part if the images are `part-real`; or empty.
    notices : tuple of str
        Sentences on corrections that are missing or broken.

    Raises
    ------
    ValueError
        There is no part, or no `sub` entity.
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
        """The stem of all outputs of the run, such as `sub-01_ses-a_dir-AP`."""
        return "_".join(f"{key}-{value}" for key, value in self.entities.items())

    @property
    def participant(self) -> str:
        """Label of the participant."""
        return self.entities["sub"]

    @property
    def session(self) -> str | None:
        """Label of the session; None if there is none."""
        return self.entities.get("ses")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that every result depends on: images, tables and mask."""
        return tuple(f for p in self.parts for f in p.files) + ((self.mask,) if self.mask else ())

    @property
    def anatomy(self) -> tuple[Path, ...]:
        """The files that tissue probabilities are computed from, if a method needs them."""
        return ((self.t1w,) if self.t1w else ()) + self.probsegs

    @property
    def metadata(self) -> dict[str, Any]:
        """The sidecar keys that have the same value in all parts."""
        first = self.parts[0].metadata
        return {k: v for k, v in first.items()
                if all(p.metadata.get(k) == v for p in self.parts[1:])}


@dataclass(frozen=True, eq=False)
class Dwi:
    """The signal of one run inside its mask, and its acquisition; the images are read-only.

    Parameters
    ----------
    signal : (voxel, measurement) float32
        Signal in the units of the input image.
    mask : (x, y, z) bool
        Brain mask; its voxels in C order are the rows of the signal.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.
    acquisition : Acquisition
        Its measurements are the columns of the signal.
    noise_sd : float, optional
        SD of the noise in signal units; None if it could not be estimated.
    invalid : int
        Number of NaN and infinite values that were set to 0 when the signal was read.
    tissue : (voxel, 3) float32, optional
        Probabilities of grey matter, white matter and CSF from a T1w image, Σ ≤ 1.
    noise_gain : (measurement,), optional
        Noise SD of each measurement as a multiple of `noise_sd`, which harmonization changes; None
        if it is 1 for all. Where harmonization made the noise of a shell correlated, the factor is
        that of independent noise with the same SD of the mean over directions.
    s0_known : bool
        Whether the b0 volumes are S0 without noise, as in simulations. Measured volumes never are,
        not even after division by the mean b0.
    magnitude : bool
        Whether the signal is the magnitude of complex data, so that its noise is Rician. If not,
        it is the real part after removal of the phase, with Gaussian noise and no noise floor.

    Raises
    ------
    DataError
        The mask is empty.
    ValueError
        Shapes or types are not as above.
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
    magnitude: bool = True

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
        """Put (voxel, …) values on the grid, (x, y, z, …); they are 0 outside the mask."""
        volume = np.zeros(self.mask.shape + values.shape[1:], values.dtype)
        volume[self.mask] = values
        return volume

    def select_shell(self, shell: Shell) -> Dwi:
        """Select the volumes of a shell and the b0 volumes."""
        return self.select_volumes(np.sort(np.r_[np.flatnonzero(self.acquisition.b0),
                                                 shell.indices]))

    def select_volumes(self, index: np.ndarray) -> Dwi:
        """Select some measurements, by a boolean array or indices."""
        return replace(self, signal=np.ascontiguousarray(self.signal[:, index]),
                       acquisition=self.acquisition[index],
                       noise_gain=None if self.noise_gain is None else self.noise_gain[index])

    def middle_slab(self, voxels: int) -> Dwi:
        """Select a slab of whole slices (third axis) around the middle of the mask.

        Parameters
        ----------
        voxels : int
            Maximum number of voxels; exceeded only if one slice has more.

        Returns
        -------
        Dwi
            On the same grid, with the mask of the slab.
        """
        counts = self.mask.sum((0, 1))
        total = np.r_[0, np.cumsum(counts)]
        low = int(np.searchsorted(total, total[-1] / 2, side="right")) - 1  # half below and above
        high = low + 1
        while True:
            # the next slice is the one that keeps the middle in the middle
            sides = [(low - 1, high), (low, high + 1)]
            wider = [s for s in sides if s[0] >= 0 and s[1] <= len(counts)
                     and total[s[1]] - total[s[0]] <= voxels]
            if not wider:
                break
            low, high = min(wider, key=lambda s: abs(total[s[0]] + total[s[1]] - total[-1]))
        inside = np.zeros(len(counts), bool)
        inside[low:high] = True
        rows = np.broadcast_to(inside, self.mask.shape)[self.mask]
        return replace(self, signal=self.signal[rows], mask=self.mask & inside,
                       tissue=None if self.tissue is None else self.tissue[rows])

    @property
    def mean_b0(self) -> np.ndarray:
        """(voxel,) mean of the b0 volumes (b < 50 s/mm²)."""
        return self.signal[:, self.acquisition.b0].mean(axis=1)

    def gain(self, indices: np.ndarray) -> float:
        """Compute the root mean square of the noise gain of some measurements."""
        if self.noise_gain is None:
            return 1.0
        return float(np.sqrt(np.mean(np.square(self.noise_gain[indices]))))

    def noise_of(self, indices: np.ndarray) -> float | None:
        """Compute the noise SD of some measurements, in signal units; None if it is unknown."""
        return None if self.noise_sd is None else self.noise_sd * self.gain(indices)

    def snr_of(self, indices: np.ndarray) -> float | None:
        """Divide the median of the mean b0 by the noise of some measurements; None if unknown."""
        noise = self.noise_of(indices)
        return float(np.median(self.mean_b0)) / noise if noise else None


def peak_memory(voxels: int, measurements: int) -> float:
    """Estimate the peak memory of processing a signal: twice its size plus FIXED_MEMORY, bytes."""
    return 2 * 4 * voxels * measurements + FIXED_MEMORY


def noise_sd(dwi: Dwi) -> float | None:
    """Estimate the noise SD from the residuals of SH fits.

    Each shell of n directions is fitted with the largest number p ≤ 0.75 n of SH coefficients of
    degree 2 to 8, and the b0 volumes with their mean (p = 1); a single volume is left out. In each
    voxel Σ residual² of Gaussian noise is distributed as σ² χ²_ν with ν = Σ (n − p). Therefore σ²
    is estimated as the median of Σ residual² over voxels, divided by the median of χ²_ν.

    A shell of fewer than NOISE_DIRECTIONS directions is left out, because degree 2 leaves it too
    few residuals, and with degree 0 the anisotropy of tissue counts as noise: the estimate is then
    1.3, 1.9 and 3.1 times the noise at b 1000 and SNR 10, 20 and 40 (simulated tensors, 6
    directions). 8 to 19 directions, with degree 2, give 1.0, 1.1 and 1.3 times the noise, and up to
    1.5 times at b 2000 and SNR 40; 20 or more 0.9 to 1.05 times.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series.

    Returns
    -------
    float or None
        SD in signal units; None if ν < MIN_RESIDUALS.
    """
    step = max(1, len(dwi.signal) // NOISE_VOXELS)
    signal = dwi.signal[::step].astype(np.float64)
    squares, dof = np.zeros(len(signal)), 0
    acquisition = dwi.acquisition
    groups = [(s.indices, True) for s in acquisition.shells if len(s) >= NOISE_DIRECTIONS
              or abs(s.b_delta) <= SAME_SHAPE]
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
    if dof < MIN_RESIDUALS:
        return None
    from scipy.stats import chi2

    return float(np.sqrt(np.median(squares) / chi2.median(dof)))


def open_image(path: Path) -> Any:
    """Open a NIfTI image of real numbers, without reading its data.

    Parameters
    ----------
    path : Path
        File of the image. It stays open, so that volumes can be read in order.

    Returns
    -------
    nibabel image

    Raises
    ------
    DataError
        The file is missing, a broken link, empty or not an image; it holds complex numbers or
        colours; or its affine is not finite or cannot be inverted.
    """
    if not path.exists():
        state = "is a link to a missing file" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {state}. Fetch it (e.g. `datalad get {path.name}`) or copy it.")
    try:
        image: Any = nib.load(path, keep_file_open=True)
    except Exception as error:  # nibabel raises many kinds on damaged headers
        raise DataError(f"{path}: cannot be read as NIfTI ({error}). "
                        "Copy or convert the file again.") from error
    _require_geometry(image, path)
    if (stored := image.get_data_dtype()).kind not in "iuf":
        content = f"complex numbers ({stored})" if stored.kind == "c" else "colours, not numbers"
        raise DataError(f"{path}: holds {content}. One real number per voxel is needed: write the "
                        "magnitude and the phase of complex data as two files, with part-mag and "
                        "part-phase in their names.")
    return image


def _require_geometry(image: Any, path: Path) -> None:
    """Raise DataError unless voxel sizes, affine, qform and sform are finite, and the affine can be
    inverted."""
    try:
        matrices = (image.affine, image.get_qform(coded=True)[0], image.get_sform(coded=True)[0])
        finite = np.isfinite(image.header.get_zooms()[:3]).all() and all(
            np.isfinite(m).all() for m in matrices if m is not None)
        invertible = finite and np.linalg.cond(image.affine[:3, :3]) < 1e6
    except Exception as error:  # nibabel raises many kinds on invalid quaternions
        raise DataError(f"{path}: its qform cannot be read ({error}). Convert the file again.") \
            from error
    if not finite:
        raise DataError(f"{path}: its qform, sform or voxel size holds numbers that are not "
                        "finite. Convert the file again, or correct its header.")
    if not invertible:
        raise DataError(f"{path}: its affine cannot be inverted, so directions are unknown. "
                        "Convert the file again, or correct its header.")


def read_array(image: Any, dtype: Any = None) -> np.ndarray:
    """Read all values of an image, scaled by its header.

    Parameters
    ----------
    image : nibabel image
        An image from `open_image`.
    dtype : numpy dtype, optional
        Type of the values; default: that of the file, or float64 if its header scales the values.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    DataError
        The file is damaged: it is truncated, or its checksum or length is wrong.
    """
    try:
        values = np.asarray(image.dataobj, dtype)
    except DAMAGE as error:
        raise DataError(f"{image.get_filename()}: is damaged or truncated ({error}). Copy or "
                        "convert the file again.") from error
    check_end(image)
    return values


def check_end(image: Any) -> None:
    """Check that a file ends after its last value, and the gzip checksum, which follows that value.

    It should be called after all values were read in order, so that nothing is read twice.

    Parameters
    ----------
    image : nibabel image
        An image from `open_image`.

    Raises
    ------
    DataError
        The checksum or the length is wrong, or something follows the values.
    """
    data = image.dataobj
    if isinstance(data, np.ndarray):  # an image in memory
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
