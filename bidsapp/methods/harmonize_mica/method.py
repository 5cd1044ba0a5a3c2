"""Intensity warping (MICA): every scan gets the intensity distribution of the reference site.

With F_i the cumulative distribution of S/S0 in a shell of scan i, and Q = F⁻¹ its quantiles,

    Q_ref(p) = mean over participants i of the reference site of Q_i(p),
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


RECOMMENDED_PARTICIPANTS = 16
"""Recommended number of participants per site. It is that of RISH, which also compares groups."""


class Mica(shared.Harmonizer):
    """Warp from the quantiles of S/S0 in a scan's mask to those of the reference site, by shell."""

    def preflight(self, cohort: Cohort) -> list[str]:
        """Check the cohort; warn of differences between the groups and of small sites."""
        batches = shared.runs_by_site(self, cohort)
        small = shared.small_sites(batches, RECOMMENDED_PARTICIPANTS)
        warnings = shared.group_differences(self, cohort, batches)
        if small:
            warnings.insert(
                0, f"{small}. In smaller groups than {RECOMMENDED_PARTICIPANTS}, the mean "
                "distribution depends on who is in the group, and the warp would remove those "
                "differences with the site's. Add participants.")
        return warnings

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Average the quantiles of the reference site; one checkpoint serves all other sites.

        Raise UsageError if a scan has too few values above 0.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *sources = batches
        domain = scope.training_domain(cohort, batches, sources)
        by_site = {batch: self._site_quantiles(cohort, rows) for batch, rows in batches.items()}
        mean = by_site[reference].mean(axis=0)
        metrics = {f"distance_{shell.name}_{batch}": float(
            np.abs(people[:, k] - _others(people, batch == reference, mean)[:, k]).mean())
            for batch, people in by_site.items() for k, shell in enumerate(domain.shells)}
        warnings = [
            f"scans of {batch} differ no more from those of {reference} than the participants of "
            f"{reference} differ among each other (distance_… in the card). The warp would remove "
            "differences between people rather than between sites. Add participants, or use "
            "another method."
            for batch in sources
            if all(metrics[f"distance_{s}_{batch}"] <= metrics[f"distance_{s}_{reference}"]
                   for s in (shell.name for shell in domain.shells))]
        card = Card(
            method=self.name, network={}, trained_for=domain, seed=settings.seed,
            training={"participants": scope.hash_participants(batches),
                      "data": "S/S0 within the mask"},
            intended_use=(
                f"Maps the distribution of S/S0 of one scan of {', '.join(sources)} to that of "
                f"{reference}, by shell. The map does not depend on place or tissue: effects of "
                "anatomy, age or lesions on the distribution are removed, too. Not for "
                "diagnosis."),
            versions={"qsphere": __version__}, metrics=metrics, reference_batch=reference)
        model = {"Method": self.name, "Model": self.outputs["model"], "Metrics": metrics,
                 "ReferenceBatch": reference, "Batches": sources}
        quantiles = torch.from_numpy(mean.astype(np.float32))
        return Fitted({}, model, {shared.model_name(self, f"to{reference}"): Checkpoint(
            {"quantiles": quantiles}, card)}, warnings)

    def _site_quantiles(self, cohort: Cohort, rows: pd.DataFrame) -> np.ndarray:
        """Compute quantiles, (participant, shell, GRID), averaged over a participant's runs."""
        by_person = [table["run"] for _, table in rows.groupby("participant", sort=True)]
        return np.stack([np.mean([self._quantiles(cohort, run) for run in runs], axis=0)
                         for runs in track(by_person, f"{self.name}: participants")])

    def _quantiles(self, cohort: Cohort, run: str) -> np.ndarray:
        """Compute the quantiles, (shell, GRID), of one run."""
        try:
            return intensity.quantiles(self.load(cohort, run))
        except DataError as error:
            raise UsageError(f"--train {self.name}: {run} {error}") from error

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Warp the weighted volumes. b0 volumes and values that are not above 0 are unchanged.

        Raises
        ------
        Refusal
            There is no b0, no weighted volume or no signal, or a shell has another b-tensor shape
            than in the training.
        """
        self.check(dwi.acquisition)
        reference = model.tensors["quantiles"].numpy().astype(np.float64)
        nearest = model.card.trained_for.nearest_shells(dwi.acquisition)
        source = intensity.quantiles_to_warp(dwi)

        def reapply(other: Dwi) -> np.ndarray:
            return intensity.warp(other, reference[nearest], source)[0]

        signal, unchanged = intensity.warp(dwi, reference[nearest], source)
        return Harmonized(signal, reapply, {"mica_unchanged_values": unchanged},
                          {"GridPoints": intensity.GRID,
                           "Distribution": "S/S0 within the mask, by shell"},
                          no_intervals=(
                              "the error of a warp of whole scans is larger than the noise, "
                              "differs between tissues, and is not measured"))


def _others(people: np.ndarray, leave_one_out: bool, mean: np.ndarray) -> np.ndarray:
    """Compute the quantiles, (participant, shell, GRID), to compare those of participants with.

    They are the mean of the reference site, or with `leave_one_out`, for its own participants, the
    mean of its other participants.
    """
    if not leave_one_out:
        return np.broadcast_to(mean, people.shape)
    return (len(people) * mean - people) / (len(people) - 1)
