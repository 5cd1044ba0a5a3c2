"""Intensity warping (MICA): every scan gets the intensity distribution of the reference batch.

With F_i the distribution of S/S0 in a shell of scan i, and Q = F⁻¹ its quantiles,

    Q_ref(p) = mean over participants i of the reference batch of Q_i(p),
    h_i(x) = Q_ref(F_i(x)),    S' = S0 h_i(S / S0)

(Wrobel et al. 2020, doi:10.1016/j.neuroimage.2020.117242; `harmonization.intensity`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bidsapp import __version__
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, UsageError
from bidsapp.harmonization import harmonizer as shared
from bidsapp.harmonization import intensity, scope
from bidsapp.kinds import Cohort, Fitted, Harmonized, TrainingSettings
from bidsapp.progress import track

if TYPE_CHECKING:
    import pandas as pd


WANTED = 16
"""Participants of a batch below which the training warns, as for RISH, which compares groups, too.
"""


class Mica(shared.Harmonizer):
    """Quantiles of S/S0 in the mask, by shell, and the warp from a scan's to the reference's."""

    def preflight(self, cohort: Cohort) -> list[str]:
        """As of `Harmonizer.preflight` and `harmonizer.group_differences`; and where people are
        few."""
        batches = shared.runs_by_site(self, cohort)
        few = shared.small_sites(batches, WANTED)
        doubts = shared.group_differences(self, cohort, batches)
        if few:
            doubts.insert(0, f"{few}; {WANTED} or more are needed for a mean distribution that "
                             "does not hold people's differences, which the warp would remove with "
                             "the site's")
        return doubts

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """The mean quantiles of the reference batch; one checkpoint serves all other batches.

        Raises:
            UsageError: a scan has hardly any signal above 0.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *targets = batches
        known = scope.training_domain(cohort, batches, targets)
        found = {batch: self._people(cohort, rows) for batch, rows in batches.items()}
        mean = found[reference].mean(axis=0)
        metrics = {f"distance_{shell.name}_{batch}": float(
            np.abs(people[:, k] - _others(people, batch == reference, mean)[:, k]).mean())
            for batch, people in found.items() for k, shell in enumerate(known.shells)}
        doubts = [
            f"scans of {batch} lie no further from {reference} than its own people from each other "
            "(distance_… in the card), so warping removes people's differences, and no site's. Add "
            "participants, or take another method."
            for batch in targets
            if all(metrics[f"distance_{s}_{batch}"] <= metrics[f"distance_{s}_{reference}"]
                   for s in (shell.name for shell in known.shells))]
        card = Card(
            method=self.name, network={}, trained_for=known, seed=settings.seed,
            training={"participants": scope.hash_participants(batches),
                      "data": "S/S0 within the mask"},
            intended_use=(
                f"Maps the distribution of S/S0 of one scan of {', '.join(targets)} to that of "
                f"{reference}, by shell. It knows no place and no tissue: where anatomies, ages or "
                "lesions change the distribution, that is removed too. Not for diagnosis."),
            versions={"qsphere": __version__}, metrics=metrics, reference_batch=reference)
        model = {"Method": self.name, "Model": self.outputs["model"], "Metrics": metrics,
                 "ReferenceBatch": reference, "Batches": targets}
        quantiles = torch.from_numpy(mean.astype(np.float32))
        return Fitted({}, model, {shared.model_name(self, f"to{reference}"): Checkpoint(
            {"quantiles": quantiles}, card)}, doubts)

    def _people(self, cohort: Cohort, rows: pd.DataFrame) -> np.ndarray:
        """(participant, shell, GRID) quantiles; runs of one participant are averaged."""
        people = [own["run"] for _, own in rows.groupby("participant", sort=True)]
        return np.stack([np.mean([self._quantiles(cohort, run) for run in runs], axis=0)
                         for runs in track(people, f"{self.name}: participants")])

    def _quantiles(self, cohort: Cohort, run: str) -> np.ndarray:
        """(shell, GRID) of one run."""
        assert cohort.load is not None
        try:
            return intensity.quantiles(cohort.load(run))
        except DataError as error:
            raise UsageError(f"--train {self.name}: {run} {error}") from error

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Warped weighted volumes; b0 volumes, and values that are not above 0, stay.

        Raises:
            Refusal: no b0, nothing weighted, no signal, or a shell of another b-tensor shape.
        """
        self.check(dwi.acquisition)
        reference = model.tensors["quantiles"].numpy().astype(np.float64)
        nearest = model.card.trained_for.nearest_shells(dwi.acquisition)
        own = intensity.quantiles_to_warp(dwi)

        def again(other: Dwi) -> np.ndarray:
            return intensity.warp(other, reference[nearest], own)[0]

        signal, kept = intensity.warp(dwi, reference[nearest], own)
        return Harmonized(signal, again, {"mica_unchanged_values": kept},
                          {"GridPoints": intensity.GRID,
                           "Distribution": "S/S0 within the mask, by shell"},
                          no_intervals=(
                              "a warp of whole scans errs by more than noise, and differently in "
                              "every tissue, and nothing measures by how much"))


def _others(people: np.ndarray, among: bool, mean: np.ndarray) -> np.ndarray:
    """(participant, shell, GRID) to compare people with: the reference, or, for the reference's
    own, the mean of all others of them."""
    if not among:
        return np.broadcast_to(mean, people.shape)
    return (len(people) * mean - people) / (len(people) - 1)
