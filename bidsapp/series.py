"""Series: the volumes of a run on their grid, read from disk on demand.

Volumes should be read in order: a compressed file is then read only once, while each step back
reads it from its start.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import DAMAGE, Dwi, Run, check_end, open_image, peak_memory
from bidsapp.errors import DataError


@dataclass(frozen=True, eq=False)
class Series:
    """The volumes of a run, its parts one after another.

    Parameters
    ----------
    images : tuple of nibabel images
        Magnitudes, (x, y, z, volume) each, all of the shape of the first, whose affine is used.
    acquisition : Acquisition
        As many measurements as the images have volumes.

    Raises
    ------
    DataError
        An image is not 4-D, has another shape (x, y, z) than the first, or the numbers of volumes
        differ.
    """

    images: tuple[Any, ...]
    acquisition: Acquisition

    def __post_init__(self) -> None:
        for image in self.images:
            if len(image.shape) != 4:
                raise DataError(f"{image.get_filename()}: has {len(image.shape)} dimensions, a DWI "
                                "needs 4 (x, y, z, volume). Convert the whole series, not a single "
                                "volume.")
            if image.shape[:3] != self.shape:
                raise DataError(f"{image.get_filename()}: has the grid "
                                f"{' × '.join(map(str, image.shape[:3]))}, but the series has "
                                f"{' × '.join(map(str, self.shape))}. Process the two separately.")
        volumes = [image.shape[3] for image in self.images]
        if sum(volumes) != len(self.acquisition):
            raise DataError(f"{self.images[0].get_filename()}: has {sum(volumes)} volumes, but "
                            f"{len(self.acquisition)} measurements. Export both again.")

    @classmethod
    def from_run(cls, run: Run, acquisition: Acquisition) -> Series:
        """Open the images of a run.

        Parameters
        ----------
        run : Run
            Paths of the images.
        acquisition : Acquisition
            Acquisition of all parts.

        Raises
        ------
        DataError
            The images do not make a series (see the class), or a file cannot be opened.
        """
        return cls(tuple(open_image(part.image) for part in run.parts), acquisition)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(x, y, z) of the grid."""
        x, y, z = self.images[0].shape[:3]
        return x, y, z

    @property
    def affine(self) -> Float[np.ndarray, "4 4"]:
        """Voxel to world RAS+, mm."""
        return np.asarray(self.images[0].affine)

    def __len__(self) -> int:
        return len(self.acquisition)

    def __iter__(self) -> Iterator[Float[np.ndarray, "x y z"]]:
        """Yield the volumes in order, as they are stored, and check the end of each file."""
        for image in self.images:
            for i in range(image.shape[3]):
                yield read_volume(image, i)
            check_end(image)

    def mean(self, volumes: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "x y z"]:
        """Compute the mean magnitude of some volumes; NaN and Inf count as 0.

        Parameters
        ----------
        volumes : (n,) bool
            The volumes that are averaged.

        Returns
        -------
        (x, y, z) float32

        Raises
        ------
        DataError
            No volume is selected, or a file is damaged.
        """
        total: np.ndarray | None = None
        for chosen, (k, i) in zip(volumes, self._positions(), strict=True):
            if chosen:
                volume = read_volume(self.images[k], i)
                volume[~np.isfinite(volume)] = 0
                total = volume if total is None else total + volume
        if total is None:
            raise DataError(f"{self.images[0].get_filename()}: no volume to average.")
        return np.asarray(total / int(volumes.sum()))

    def load(self) -> tuple[Float[np.ndarray, "x y z n"], int]:
        """Read all volumes on the whole grid.

        NaN and Inf become 0 and are counted.

        Returns
        -------
        volumes : (x, y, z, n) float32
            Stored volume by volume, so that each is contiguous.
        invalid : int
            Number of values that were set to 0.

        Raises
        ------
        DataError
            A file is damaged, or a volume holds no finite value.
        """
        volumes = np.moveaxis(np.empty((len(self), *self.shape), np.float32), 0, -1)
        invalid = 0
        for i, volume in enumerate(self):
            bad = ~np.isfinite(volume)
            if bad.all():
                raise DataError(
                    f"{self.images[0].get_filename()}: volume {i} holds no finite value. Remove it "
                    "from the image, .bval and .bvec, or convert the series again.")
            invalid += int(bad.sum())
            volume[bad] = 0
            volumes[..., i] = volume
        return volumes, invalid

    def within(self, mask: Bool[np.ndarray, "x y z"], *, memory: float = np.inf,
               work_dir: Path | None = None) -> Dwi:
        """Read the magnitude inside a mask, volume by volume.

        NaN and Inf become 0 and are counted. Each part with b0 volumes is scaled so that their mean
        in the mask equals that of the first such part. The signal is stored volume by volume, so
        that each volume is written at once.

        Parameters
        ----------
        mask : (x, y, z) bool
            The voxels that are read.
        memory : float
            Bytes that may be used. A signal that needs more (`peak_memory`) is mapped from an
            unnamed file in `work_dir`, of which the system keeps in memory what fits.
        work_dir : Path, optional
            Folder of that file; default: the system's temporary folder.

        Returns
        -------
        Dwi

        Raises
        ------
        DataError
            An image is damaged (its checksum or length is wrong), a volume has no finite value
            inside the mask, the mask is empty, or the disk has no room for the signal.
        """
        signal = _allocate(int(mask.sum()), len(self), memory, work_dir)
        invalid, first, reference = 0, 0, None
        for image in self.images:
            part = slice(first, first := first + image.shape[3])
            for i in range(image.shape[3]):
                values = read_volume(image, i)[mask]
                bad = ~np.isfinite(values)
                if bad.all() and bad.size:
                    raise DataError(
                        f"{image.get_filename()}: volume {i} holds no finite value inside the "
                        "mask. Remove it from the image, .bval and .bvec, or convert the series "
                        "again.")
                invalid += int(bad.sum())
                values[bad] = 0
                signal[:, part.start + i] = values
            check_end(image)
            b0 = self.acquisition[part].b0
            if len(self.images) > 1 and b0.any():
                level = float(signal[:, part][:, b0].mean(dtype=np.float64))
                if reference is None:
                    reference = level
                elif level > 0:
                    signal[:, part] *= reference / level
        return Dwi(signal, mask, self.affine, self.acquisition, invalid=invalid)

    def _positions(self) -> Iterator[tuple[int, int]]:
        """Index of the image, and of the volume in it, for each volume."""
        return ((k, i) for k, image in enumerate(self.images) for i in range(image.shape[3]))


def read_volume(image: Any, i: int) -> Float[np.ndarray, "x y z"]:
    """Read volume i of a 4-D image as float32, scaled by its header.

    Raises
    ------
    DataError
        The file is damaged or truncated before the end of this volume.
    """
    try:
        # copied, since the array of nibabel may be read-only
        return np.array(image.dataobj[..., i], dtype=np.float32)
    except DAMAGE as error:
        raise DataError(f"{image.get_filename()}: is damaged or truncated before volume {i} of "
                        f"{image.shape[3]} ({error}). Copy or convert the file again.") from error


def _allocate(voxels: int, measurements: int, memory: float, work_dir: Path | None) -> np.ndarray:
    """Allocate (voxel, measurement) float32 with contiguous volumes, in memory or in a file."""
    if peak_memory(voxels, measurements) <= memory:
        return np.empty((measurements, voxels), np.float32).T
    with tempfile.TemporaryFile(dir=work_dir) as file:
        _reserve(file.fileno(), 4 * voxels * measurements, work_dir)
        return np.memmap(file, np.float32, "r+", shape=(measurements, voxels)).T


def _reserve(descriptor: int, size: int, folder: Path | None) -> None:
    """Reserve disk space, since a full disk under a memory map would kill the process."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise DataError(f"{folder or tempfile.gettempdir()}: has no room for {size / 1e9:.1f} GB "
                        f"({error.strerror}). Give a --work-dir with more space, or a higher "
                        "--mem-mb.") \
            from error
