"""Acquisition of a series: b-values, directions, b-tensor shapes and phase encoding.

The frame is always world RAS+; the b-vectors of files are converted when they are read
(`bidsapp.bids`). b is in s/mm², times are in s. An axially symmetric b-tensor with axis n, trace b
and shape b_Δ is

    B = b [ (1 − b_Δ)/3 · I + b_Δ · n nᵀ ],    b_Δ = 1 linear, 0 spherical, −½ planar

(Eriksson et al. 2015, doi:10.1063/1.4913502; Westin et al. 2016,
doi:10.1016/j.neuroimage.2016.02.039).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bidsapp.errors import DataError

B0_MAX = 50.0
"""Volumes with b below this (s/mm²) count as not diffusion-weighted."""

B_MAX = 100_000.0
"""Largest b-value of any acquisition, in s/mm². Larger numbers are in another unit."""

SHELL_GAP, SHELL_GAP_MIN = 0.1, 60.0
"""Largest step between neighbouring b-values of one shell, as a share of b and in s/mm²; the larger
of the two applies."""

NORM_TOLERANCE = 0.02
"""Largest deviation of a b-vector's length from 1."""

SAME_B, SAME_SHAPE = 0.05, 0.05
"""Largest differences between shells that count as the same: in b, as a share of it, and in
b_delta."""

READOUT_MAX = 1.0
"""Upper limit of the total readout time of an EPI, in s. Larger numbers are in ms."""


@dataclass(frozen=True)
class PhaseEncoding:
    """Direction of the phase encoding and total readout time of an EPI image.

    Parameters
    ----------
    axis : int
        Voxel axis of the image: 0, 1 or 2 (i, j or k in BIDS).
    sign : int
        −1 for a direction that BIDS writes with a minus (`j-`), otherwise 1.
    readout : float, optional
        Total readout time as BIDS defines it, in s, between 0 and 1; None if it is unknown.

    Raises
    ------
    DataError
        A value is outside of these.
    """

    axis: int
    sign: int
    readout: float | None = None

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2) or self.sign not in (1, -1):
            raise DataError(f"the phase encoding has axis {self.axis!r} and sign {self.sign!r}. "
                            "The axis must be 0, 1 or 2, and the sign 1 or -1.")
        if self.readout is not None and not (isinstance(self.readout, int | float)
                                             and 0 < self.readout < READOUT_MAX):
            raise DataError(
                f"TotalReadoutTime is {str(self.readout)[:20]}; a number of seconds between 0 and "
                f"{READOUT_MAX:g} is needed. Correct the sidecar: divide milliseconds by 1000.")

    @classmethod
    def from_sidecar(cls, metadata: Mapping[str, Any]) -> PhaseEncoding | None:
        """Read PhaseEncodingDirection and TotalReadoutTime of a sidecar.

        Parameters
        ----------
        metadata : mapping
            Keys of the sidecar.

        Returns
        -------
        PhaseEncoding or None
            None if the sidecar has no direction, whatever its readout time.

        Raises
        ------
        DataError
            The direction is none of BIDS, or the readout time is not between 0 and 1 s.
        """
        if (direction := metadata.get("PhaseEncodingDirection")) is None:
            return None
        if direction not in ("i", "j", "k", "i-", "j-", "k-"):
            raise DataError(f"PhaseEncodingDirection is {str(direction)[:20]!r}; i, j, k, i-, j- "
                            "or k- is needed. Correct the sidecar.")
        return cls("ijk".index(direction[0]), -1 if direction.endswith("-") else 1,
                   metadata.get("TotalReadoutTime"))

    @property
    def direction(self) -> str:
        """The direction as BIDS writes it, such as `j-`."""
        return "ijk"[self.axis] + "-" * (self.sign < 0)

    def opposes(self, other: PhaseEncoding | None) -> bool:
        """Tell whether another phase encoding has the same axis and the opposite sign."""
        return other is not None and (other.axis, other.sign) == (self.axis, -self.sign)


def read_partial_fourier(metadata: Mapping[str, Any]) -> float | None:
    """Read PartialFourier of a sidecar: the share of k-space that was sampled along the phase
    encoding.

    Parameters
    ----------
    metadata : mapping
        Keys of the sidecar.

    Returns
    -------
    float or None
        None if the sidecar has no such key.

    Raises
    ------
    DataError
        It is no number above 0 and at most 1.
    """
    share = metadata.get("PartialFourier")
    if share is not None and not (isinstance(share, int | float) and not isinstance(share, bool)
                                  and 0 < share <= 1):
        raise DataError(f"PartialFourier is {str(share)[:20]!r}; a number above 0 and at most 1 is "
                        "needed. Gibbs ringing along the phase encoding is left as it is, since "
                        "its correction may be wrong there. Correct the sidecar: write 6/8 as "
                        "0.75.")
    return share


@dataclass(frozen=True)
class Shell:
    """Measurements that share b and b_delta.

    Parameters
    ----------
    b : float
        Mean b-value, s/mm².
    b_delta : float
        Mean shape of the b-tensors.
    indices : (n,) int
        Positions in the acquisition, ascending.
    """

    b: float
    b_delta: float
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Acquisition:
    """A gradient table with tensor-valued encoding, checked and copied when it is made.

    Parameters
    ----------
    bvals : (n,)
        b-values, 0 to 100 000 s/mm².
    bvecs : (n, 3)
        Symmetry axes of the b-tensors in world RAS+, finite. If b ≥ 50 s/mm² and b_delta ≠ 0, their
        length must be 1 within 2 %. All but zero vectors are normalised.
    b_delta : (n,), optional
        Shapes of the b-tensors, within [−½, 1]; default: linear encoding.
    small_delta, big_delta, echo_time : float, optional
        Pulse duration δ, pulse separation Δ and echo time, in s; None if unknown.

    Raises
    ------
    DataError
        A value is not allowed. The message names the first such volume, counted from 0, and a
        remedy.
    """

    bvals: np.ndarray
    bvecs: np.ndarray
    b_delta: Any = None  # an array after __post_init__
    small_delta: float | None = None
    big_delta: float | None = None
    echo_time: float | None = None

    def __post_init__(self) -> None:
        bvals = np.array(self.bvals, dtype=np.float64)
        bvecs = np.array(self.bvecs, dtype=np.float64)
        b_delta = np.array(
            np.ones(len(np.atleast_1d(bvals))) if self.b_delta is None else self.b_delta,
            dtype=np.float64,
        )
        if bvals.ndim != 1 or len(bvals) == 0:
            raise DataError(
                f"the b-values have the shape {bvals.shape}; one number per volume is needed. "
                "Write them as one line of numbers in s/mm²."
            )
        if bvecs.shape != (len(bvals), 3) or b_delta.shape != bvals.shape:
            raise DataError(
                f"there are {len(bvals)} b-values, b-vectors of shape {bvecs.shape} and b_delta of "
                f"shape {b_delta.shape}; one vector and one b_delta per volume are needed. Export "
                "the three again from the same series."
            )
        _reject(~np.isfinite(bvals) | (bvals < 0), "b-value {v} of volume {i} is not a number ≥ 0 "
                "s/mm². Correct it, or remove the volume from image and table.", bvals)
        _reject(bvals > B_MAX, f"b-value {{v}} of volume {{i}} is above {B_MAX:,.0f} s/mm², which "
                "no scanner reaches. b-values are needed in s/mm²: divide values in s/m² by 1 000 "
                "000; convert values in other units so that they agree with the protocol.", bvals)
        _reject((b_delta < -0.5 - 1e-6) | (b_delta > 1 + 1e-6) | ~np.isfinite(b_delta),
                "b_delta {v} of volume {i} lies outside [-0.5, 1] (1 linear, 0 spherical, -0.5 "
                "planar). Correct the encoding file.", b_delta)
        _reject(~np.isfinite(bvecs).all(1), "b-vector {v} of volume {i} is not finite. Correct it, "
                "or remove the volume from image and table.", bvecs)
        norm = np.linalg.norm(bvecs, axis=1)
        oriented = (bvals >= B0_MAX) & (np.abs(b_delta) > 1e-6)
        _reject(oriented & (norm < 1e-6), "the b-vector of volume {i} (b = {v} s/mm²) is zero: a "
                "weighted volume needs a direction. Take the table from the scanner again; if the "
                "volume is a trace image, remove it from image and table.", bvals)
        _reject(oriented & (np.abs(norm - 1) > NORM_TOLERANCE), "the b-vector of volume {i} has "
                "length {v}, 1 is needed. If lengths encode the b-value, scale the b-values by the "
                "squared length and normalise the vectors.", norm)
        bvecs[norm > 1e-6] /= norm[norm > 1e-6, None]
        for array in (bvals, bvecs, b_delta):
            array.flags.writeable = False
        object.__setattr__(self, "bvals", bvals)
        object.__setattr__(self, "bvecs", bvecs)
        object.__setattr__(self, "b_delta", b_delta)

    def __len__(self) -> int:
        return len(self.bvals)

    def __getitem__(self, index) -> Acquisition:
        """Select measurements by a slice, a boolean array or an array of indices."""
        return replace(self, bvals=np.atleast_1d(self.bvals[index]),
                       bvecs=np.atleast_2d(self.bvecs[index]),
                       b_delta=np.atleast_1d(self.b_delta[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Acquisition) and all(
            np.array_equal(a, b, equal_nan=True)  # unknown times are NaN
            for a, b in zip(self._tables(), other._tables(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _tables(self):
        times = (self.small_delta, self.big_delta, self.echo_time)
        return self.bvals, self.bvecs, self.b_delta, np.array(times, dtype=float)

    @property
    def b0(self) -> np.ndarray:
        """(n,) bool: the measurements that are not diffusion-weighted (b < 50 s/mm²)."""
        return self.bvals < B0_MAX

    @property
    def btensors(self) -> np.ndarray:
        """(n, 3, 3) b-tensors in world RAS+, s/mm²."""
        b, s = self.bvals[:, None, None], self.b_delta[:, None, None]
        outer = self.bvecs[:, :, None] * self.bvecs[:, None, :]
        return b * ((1 - s) / 3 * np.eye(3) + s * outer)

    @property
    def shells(self) -> tuple[Shell, ...]:
        """Weighted measurements grouped by b_delta (rounded to 0.05) and b, ascending in b.

        A step between sorted b-values above max(60 s/mm², 10 % of b) starts a new shell. b-values
        without such a step form one shell, however wide.
        """
        groups = []
        shape = np.round(self.b_delta / 0.05) * 0.05
        for s in np.unique(shape[~self.b0]):
            index = np.flatnonzero((shape == s) & ~self.b0)
            index = index[np.argsort(self.bvals[index], kind="stable")]
            b = self.bvals[index]
            cuts = np.flatnonzero(np.diff(b) > np.maximum(SHELL_GAP_MIN, SHELL_GAP * b[:-1])) + 1
            groups += [Shell(float(self.bvals[part].mean()), float(self.b_delta[part].mean()),
                             np.sort(part)) for part in np.split(index, cuts)]
        return tuple(sorted(groups, key=lambda g: (round(g.b), -g.b_delta)))

    def rotated(self, rotation: np.ndarray) -> Acquisition:
        """Rotate the axes of the measurements, n → R n.

        Parameters
        ----------
        rotation : (3, 3) or (n, 3, 3)
            Orthogonal matrix R of all measurements, or one of each.

        Returns
        -------
        Acquisition

        Raises
        ------
        ValueError
            A matrix is not orthogonal, or their number is not that of the measurements.
        """
        rotation = np.asarray(rotation, dtype=np.float64)
        if (rotation.shape not in ((3, 3), (len(self), 3, 3))
                or not np.allclose(rotation @ np.swapaxes(rotation, -1, -2), np.eye(3), atol=1e-5)):
            raise ValueError("rotation must be an orthogonal (3, 3) matrix, or one per measurement")
        return replace(self, bvecs=(rotation @ self.bvecs[..., None])[..., 0])

    def to_dipy(self):
        """Convert to dipy's GradientTable, with b-tensors unless all are linear."""
        from dipy.core.gradients import gradient_table

        linear = bool(np.all(self.b_delta > 1 - 1e-6))
        return gradient_table(self.bvals, bvecs=self.bvecs, b0_threshold=B0_MAX,
                              btens=None if linear else self.btensors)


def concatenate(acquisitions: list[Acquisition]) -> Acquisition:
    """Join acquisitions in order. A time that differs between them becomes None."""
    first = acquisitions[0]
    times = {
        name: getattr(first, name)
        if all(getattr(a, name) == getattr(first, name) for a in acquisitions) else None
        for name in ("small_delta", "big_delta", "echo_time")
    }
    return Acquisition(
        np.concatenate([a.bvals for a in acquisitions]),
        np.concatenate([a.bvecs for a in acquisitions]),
        np.concatenate([a.b_delta for a in acquisitions]), **times)


def same_shell(a: Shell, b: Shell) -> bool:
    """Tell whether two shells have equal b (within 5 % of the second's) and b-tensor shape."""
    return abs(a.b - b.b) <= SAME_B * b.b and abs(a.b_delta - b.b_delta) <= SAME_SHAPE


def describe_shells(shells: Sequence[Shell]) -> str:
    """Describe shells for messages: `16 × b 1000, 16 × b 2000`."""
    return ", ".join(f"{len(s)} × b {s.b:.0f}{describe_shape(s.b_delta)}"
                     for s in shells) or "nothing weighted"


def describe_shape(b_delta: float) -> str:
    """Describe a b-tensor's shape for messages: ` (b_delta 0)`, or empty if it is linear."""
    return "" if abs(b_delta - 1) <= SAME_SHAPE else f" (b_delta {b_delta:.2g})"


def _reject(bad: Any, message: str, values: np.ndarray) -> None:
    """Raise DataError if any volume is bad: about the first one, i, with its value v."""
    if bad.any():
        i = int(np.argmax(bad))
        value = values[i]
        text = f"{value:g}" if np.ndim(value) == 0 else np.array2string(value, precision=4)
        raise DataError(message.format(i=i, v=text))
