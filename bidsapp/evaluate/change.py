"""Change of a run by harmonization: signal by shell, FA, MD and fibre directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bidsapp import tensor
from bidsapp.anatomy import tissue
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.evaluate.quality import mean_volume, shell_name

Pair = tuple[np.ndarray, np.ndarray]
"""Values, (voxel,), before and after."""


@dataclass(frozen=True, eq=False)
class Change:
    """Voxel values before and after harmonization.

    Parameters
    ----------
    signal : mapping of str to Pair
        Mean over the volumes of each shell, divided by the mean b0, by the shell's name. It is 0 if
        the mean b0 is not positive, and not divided if there is no b0 volume.
    maps : mapping of str to Pair
        fa (1) and md (mm²/s) of the tensor of the volumes that `tensor.volumes` selects; empty if
        they do not determine a tensor.
    angle : (single-fibre voxel,)
        Angle in degrees between the principal directions before and after, in the voxels that had
        a single fibre before (`tissue.single_fibres`).
    """

    signal: Mapping[str, Pair]
    maps: Mapping[str, Pair]
    angle: np.ndarray

    @property
    def median_angle(self) -> float | None:
        """Median angle in degrees; None if there are too few single-fibre voxels."""
        enough = len(self.angle) >= tissue.MIN_VOXELS
        return float(np.median(self.angle)) if enough else None


def compare_signals(before: Dwi, after: Dwi, device: str) -> Change:
    """Compare the signals of a run before and after harmonization.

    Parameters
    ----------
    before, after : Dwi
    device : str
        Device of the tensor fits.

    Returns
    -------
    Change
    """
    acquisition = before.acquisition
    signal = {}
    for shell in acquisition.shells:
        levels = []
        for dwi in (before, after):
            s0 = dwi.mean_b0 if acquisition.b0.any() else np.ones(len(dwi.signal))
            level = mean_volume(dwi, shell.indices)
            levels.append(np.where(s0 > 0, level / np.where(s0 > 0, s0, 1), 0))
        signal[shell_name(shell)] = (levels[0], levels[1])
    chosen = tensor.volumes(acquisition)
    x = tensor.design(acquisition[chosen].btensors)
    if np.linalg.matrix_rank(x) < tensor.TERMS:
        return Change(signal, {}, np.zeros(0))
    fits = [map_voxels(lambda s: tensor.fit(s[:, chosen], x), dwi.signal, device)
            for dwi in (before, after)]
    single, _ = tissue.single_fibres(before, np.where(fits[0]["failed"], 0, fits[0]["fa"]),
                                     fits[0]["direction"])
    cosine = np.abs((fits[0]["direction"] * fits[1]["direction"])[single].sum(axis=1))
    return Change(signal, {k: (fits[0][k], fits[1][k]) for k in ("fa", "md")},
                  np.degrees(np.arccos(np.clip(cosine, 0, 1))))


def summarize_change(change: Change, after: Dwi) -> dict[str, Any]:
    """Summarize a change for the QC table.

    Parameters
    ----------
    change : Change
    after : Dwi
        The harmonized run.

    Returns
    -------
    dict
        Noise and median signal of each shell after harmonization, in signal units, the median
        angle, and the number of single-fibre voxels.
    """
    levels = {f"harmonized_{shell_name(s)}_signal": float(np.median(mean_volume(after, s.indices)))
              for s in after.acquisition.shells}
    weighted = np.flatnonzero(~after.acquisition.b0)
    return {"harmonized_noise_sd": after.noise_of(weighted), **levels,
            "harmonization_angle": change.median_angle, "harmonization_voxels": len(change.angle)}
