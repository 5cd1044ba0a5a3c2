"""What harmonization did to a run: signal by shell, FA, MD and fibre directions."""

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
"""(voxel,) before and after."""


@dataclass(frozen=True, eq=False)
class Change:
    """Before and after, voxel by voxel.

    signal: mean over the volumes of each shell, over the mean b0, by the shell's name. maps: fa
    (1) and md (mm²/s) of the tensor of volumes up to b = 1500 s/mm², none where they determine no
    tensor. angle: (voxel,) degrees between the principal directions, in the single-fibre voxels
    of the signal before.
    """

    signal: Mapping[str, Pair]
    maps: Mapping[str, Pair]
    angle: np.ndarray

    @property
    def median_angle(self) -> float | None:
        """None where there are too few single-fibre voxels."""
        enough = len(self.angle) >= tissue.MIN_VOXELS
        return float(np.median(self.angle)) if enough else None


def compare_signals(before: Dwi, after: Dwi, device: str) -> Change:
    """Compare two signals of one run."""
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


def summarize_change(found: Change, after: Dwi) -> dict[str, Any]:
    """For the QC table: signal by shell and noise after harmonization, and the angular change."""
    levels = {f"harmonized_{shell_name(s)}_signal": float(np.median(mean_volume(after, s.indices)))
              for s in after.acquisition.shells}
    weighted = np.flatnonzero(~after.acquisition.b0)
    return {"harmonized_noise_sd": after.noise_of(weighted), **levels,
            "harmonization_angle": found.median_angle, "harmonization_voxels": len(found.angle)}
