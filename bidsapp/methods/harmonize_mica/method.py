"""Intensity warping (MICA): every scan gets the intensity distribution of the reference batch.

With F_i the distribution of S/S0 in a shell of scan i, and Q = F⁻¹ its quantiles,

    Q_ref(p) = mean over participants i of the reference batch of Q_i(p),
    h_i(x) = Q_ref(F_i(x)),    S' = S0 h_i(S / S0)

(Wrobel et al. 2020, doi:10.1016/j.neuroimage.2020.117242). h_i is monotone: order within a shell
stays.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from bidsapp import __version__
from bidsapp.acquisition import Shell
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.methods import Fitted, Harmonized, Study
from bidsapp.methods import harmonizer as shared

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("qsphere")

GRID = 1000
"""Probabilities (k + ½) / GRID at which quantiles are taken."""

LEAST_VALID = 0.5
"""Share of the values of a shell that must be above 0, S0 too, in a scan to learn from."""


class Mica(shared.Harmonizer):
    """Quantiles of S/S0 in the mask, by shell, and the warp from a scan's to the reference's."""

    def fit(self, study: Study) -> Fitted:
        """The mean quantiles of the reference batch; one checkpoint serves all other batches.

        Raises:
            UsageError: as of `harmonizer.members`; or a scan has hardly any signal above 0.
        """
        batches = shared.members(self, study)
        known = shared.trained_for(study, batches)
        found = {batch: self._people(study, rows) for batch, rows in batches.items()}
        reference, *targets = batches
        mean = found[reference].mean(axis=0)
        metrics = {f"distance_{shared.short(shell)}_{batch}": float(
            np.abs(people[:, k] - _others(people, batch == reference, mean)[:, k]).mean())
            for batch, people in found.items() for k, shell in enumerate(known["shells"])}
        for batch in targets:
            if all(metrics[f"distance_{s}_{batch}"] <= metrics[f"distance_{s}_{reference}"]
                   for s in map(shared.short, known["shells"])):
                log.warning("%s: scans of %s lie no further from %s than its own people from each "
                            "other (distance_… in the card), so warping removes people's "
                            "differences, and no site's. Add participants, or take another method.",
                            self.name, batch, reference)
        card = Card(
            method=self.name, network={}, trained_for=known, seed=study.seed,
            training={"participants": shared.hashed(batches), "data": "S/S0 within the mask"},
            intended_use=(
                f"Maps the distribution of S/S0 of one scan of {', '.join(targets)} to that of "
                f"{reference}, by shell. It knows no place and no tissue: where anatomies, ages or "
                "lesions change the distribution, that is removed too. Not for diagnosis."),
            versions={"qsphere": __version__}, metrics=metrics, reference_batch=reference,
            batches=tuple(targets))
        model = {"Method": self.name, "Model": self.outputs["model"], "Metrics": metrics,
                 "ReferenceBatch": reference, "Batches": targets}
        quantiles = torch.from_numpy(mean.astype(np.float32))
        return Fitted({}, model, {shared.model_name(self, f"to{reference}"): Checkpoint(
            {"quantiles": quantiles}, card)})

    def _people(self, study: Study, rows: pd.DataFrame) -> np.ndarray:
        """(participant, shell, GRID) quantiles; runs of one participant are averaged."""
        return np.stack([np.mean([self._quantiles(study, run) for run in own["run"]], axis=0)
                         for _, own in rows.groupby("participant", sort=True)])

    def _quantiles(self, study: Study, run: str) -> np.ndarray:
        """(shell, GRID) of one run."""
        assert study.load is not None
        dwi = study.load(run)
        s0, found = dwi.mean_b0, []
        for shell in dwi.acquisition.shells:
            values = _ratios(dwi, s0, shell)
            share = float(np.isfinite(values).mean())
            if share < LEAST_VALID:
                raise UsageError(
                    f"--train {self.name}: {run} has a signal above 0 in only {share:.0%} of the "
                    f"values at b = {shell.b:.0f} s/mm² ({dwi.invalid} values of the run are NaN "
                    f"or infinite); needed are {LEAST_VALID:.0%}. Check image and mask, or leave "
                    "it out with --participant-label.")
            found.append(_quantiles(values))
        return np.stack(found)

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Warped weighted volumes; b0 volumes, and values that are not above 0, stay.

        Raises:
            Refusal: no b0, nothing weighted, no signal, or a shell of another b-tensor shape.
        """
        self.check(dwi.acquisition)
        reference = model.tensors["quantiles"].numpy().astype(np.float64)
        nearest = shared.matched(self, dwi.acquisition, model.card.trained_for["shells"])
        s0, signal, kept = dwi.mean_b0, dwi.signal.copy("K"), 0
        for shell, k in zip(dwi.acquisition.shells, nearest, strict=True):
            values = _ratios(dwi, s0, shell)
            good = np.isfinite(values)
            if not good.any():
                raise Refusal(f"{self.name} found no signal above 0 at b = {shell.b:.0f} s/mm². "
                              "Check image and mask, or leave the run out.")
            own = _quantiles(values)
            for i, x, here in zip(shell.indices, values.T, good.T, strict=True):
                signal[here, i] = s0[here] * _warp(x[here], own, reference[k])
            kept += int((~good).sum())
        return Harmonized(signal, {"mica_unchanged_values": kept},
                          {"GridPoints": GRID, "Distribution": "S/S0 within the mask, by shell"})


def _ratios(dwi: Dwi, s0: np.ndarray, shell: Shell) -> np.ndarray:
    """(voxel, direction) float32 S/S0 of a shell, NaN where S or S0 is not above 0."""
    signal = dwi.signal[:, shell.indices]
    good = (signal > 0) & (s0[:, None] > 0)
    signal /= np.where(s0 > 0, s0, 1)[:, None]
    signal[~good] = np.nan
    return signal


def _quantiles(values: np.ndarray) -> np.ndarray:
    """(GRID,) of those that are not NaN."""
    there = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(there, (np.arange(GRID) + 0.5) / GRID)


def _others(people: np.ndarray, among: bool, mean: np.ndarray) -> np.ndarray:
    """(participant, shell, GRID) to compare people with: the reference, or, for the reference's
    own, the mean of all others of them."""
    if not among:
        return np.broadcast_to(mean, people.shape)
    return (len(people) * mean - people) / (len(people) - 1)


def _warp(x: np.ndarray, own: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Q_ref(F(x)) by linear interpolation between the quantiles; in proportion beyond them."""
    at, where = np.unique(own, return_inverse=True)
    to = np.bincount(where, reference) / np.bincount(where)
    out = np.interp(x, at, to)
    out = np.where(x < at[0], x * (to[0] / at[0]), out)
    return np.where(x > at[-1], x * (to[-1] / at[-1]), out)
