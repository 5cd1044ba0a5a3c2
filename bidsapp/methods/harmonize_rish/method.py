"""Linear RISH: every spherical-harmonic degree is scaled by a map that two groups determine.

With c_lm the coefficients of S/S0 in a shell, RISH_l = Σ_m c_lm² and E the mean over the
participants of a site at a point of the common template,

    π_l = √(E_reference[RISH_l] / E_source[RISH_l]),    S' = S + S0 Σ_lm (π_l − 1) c_lm Y_lm

or, as published, S' = S0 Σ_lm π_l c_lm Y_lm

(Mirzaalian et al. 2016, doi:10.1016/j.neuroimage.2016.04.041; Cetin Karayumak et al. 2019,
doi:10.1016/j.neuroimage.2018.08.073).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from bidsapp import __version__, sh
from bidsapp.acquisition import SAME_SHAPE, Acquisition, describe_shells
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.domain import ShellRange
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.harmonization import harmonizer as shared
from bidsapp.harmonization import pairs, scope
from bidsapp.kinds import Cohort, Fitted, Harmonized, TrainingSettings
from bidsapp.progress import track
from bidsapp.registration import template
from bidsapp.registration.geometry import fill_nearest
from bidsapp.registration.image import Image, sample

RECOMMENDED_PARTICIPANTS = 16
"""Number of participants per site from which the means are stable (Cetin Karayumak et al. 2019)."""

L_MAX = 6
"""Maximum degree of the spherical harmonics."""

COEFFICIENTS_PER_DIRECTION = 0.75
"""Maximum number of coefficients per direction of a shell: with more, RISH is mostly noise."""

MIN_DIRECTIONS = 8
"""Minimum number of directions of a shell: that criterion then allows the six coefficients of
degree 2."""

REGULARIZATION = 1e-5
"""λ of the Laplace–Beltrami penalty. The 0.006 of the networks (`pairs.SMOOTHING`) would halve the
coefficients of degree 4 with 30 directions, which is not undone here."""

FWHM = 4.0
"""Full width at half maximum, in mm, of the Gaussian that smooths mean RISH in the template."""

BOUNDS = 0.5, 2.0
"""Minimum and maximum of π_l."""

MIN_COVERAGE = 0.5
"""Minimum share of the participants of each site whose masks cover a point of the template."""

MIN_CORRELATION = 0.5
"""Correlation of FA with the template below which a registration is doubtful."""

UNKNOWN_ERROR = (
    "the scales depend on the participants of the two groups, which changes estimates by more than "
    "noise does, and RISH does not measure by how much")
"""Reason why maps have no confidence interval. On a phantom with eight different people per site,
90 % intervals for noise alone covered 74–88 %, and with the standard errors of the group means,
taken as independent between shells, 100 %."""


class Rish(shared.Harmonizer):
    """Scaling of each degree of each shell by maps in a template, which is registered to a scan."""

    min_participants = 3

    def check(self, acquisition: Acquisition) -> None:
        """Refuse an acquisition without a b0, without a shell, or with too few directions.

        Raises
        ------
        Refusal
            There is no b0 or no shell, or a shell has fewer than MIN_DIRECTIONS directions. With
            spherical b-tensors, any number is accepted.
        """
        super().check(acquisition)
        refused = [s for s in acquisition.shells
                   if len(s) < MIN_DIRECTIONS and abs(s.b_delta) > SAME_SHAPE]
        if refused:
            raise Refusal(f"{self.name} found {describe_shells(refused)}. Needed are "
                          f"{MIN_DIRECTIONS} or more directions on every shell. Leave the shell "
                          "out with --bids-filter-file, or harmonize with harmonize_mica.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """Check the cohort; warn of small sites, unless all have the same participants, whose
        differences cancel, and of differences between the groups."""
        batches = shared.runs_by_site(self, cohort)
        same = len({frozenset(rows["participant"]) for rows in batches.values()}) == 1
        small = "" if same else shared.small_sites(batches, RECOMMENDED_PARTICIPANTS)
        warnings = [f"{small}. Mean RISH is stable from {RECOMMENDED_PARTICIPANTS} participants "
                    "per site. With fewer, the scales also contain differences between people."
                    ] if small else []
        return [*warnings, *shared.group_differences(self, cohort, batches)]

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a checkpoint for every site but the reference; all share one template.

        Raise UsageError if a scan cannot be used, or if two sites show no common part of the brain.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *sources = batches
        degrees = [_degree(shell)
                   for shell in scope.training_domain(cohort, batches, sources).shells]
        runs = [run for rows in batches.values() for run in rows["run"]]
        images = [self._fa(cohort, run, settings.device) for run in track(runs, f"{self.name}: FA")]
        mean, points = template.build(images, settings.states, settings.workers)
        lowest, warnings = self._check_registrations(runs, images, mean, points)
        metrics = {"template_correlation": round(lowest, 3)}
        by_run = dict(zip(runs, points, strict=True))
        groups = {b: self._mean_rish(cohort, b, by_run, degrees, rows)
                  for b, rows in batches.items()}
        checkpoints = {}
        for batch in sources:
            covered = (mean.values > 0) & np.all(
                [groups[b][0] >= MIN_COVERAGE for b in (reference, batch)], axis=0)
            if not covered.any():
                raise UsageError(f"--train {self.name}: the scans of {reference} and {batch} share "
                                 "no part of the brain. Check the brain masks.")
            rows = {b: batches[b] for b in (reference, batch)}
            domain = scope.training_domain(cohort, rows, (batch,))
            tensors, scale_metrics = self._scales(groups[reference][1], groups[batch][1], covered,
                                                  mean.affine, domain.shells)
            name = (f"{shared.model_name(self, batch)}-to-"
                    + shared.model_name(self, reference).removeprefix(f"{self.name}_"))
            checkpoints[name] = Checkpoint(
                {"template": torch.from_numpy(mean.values), **tensors}, Card(
                    method=self.name, network={}, trained_for=domain,
                    training={"participants": scope.hash_participants(rows),
                              "data": "S/S0, FA template"},
                    intended_use=(
                        f"Scales the diffusion signal of {batch} to that of {reference} by degree "
                        "and place, for participants like those under trained_for. Differences "
                        "between the groups other than the site's are removed, too. Not for "
                        "diagnosis."),
                    seed=settings.seed, versions={"qsphere": __version__},
                    constants={"affine": mean.affine.tolist(), "l_max": degrees,
                               "regularization": REGULARIZATION,
                               "output": self.settings("training")["output"]},
                    metrics={**metrics, **scale_metrics}, reference_batch=reference))
        model = {"Method": self.name, "Model": self.outputs["model"], "ReferenceBatch": reference,
                 "Batches": sources,
                 "Metrics": {n: dict(c.card.metrics) for n, c in checkpoints.items()}}
        return Fitted({}, model, checkpoints, warnings)

    def _fa(self, cohort: Cohort, run: str, device: str) -> Image:
        dwi = self.load(cohort, run)
        image = _fa(dwi, device)
        if not image.volume:
            raise UsageError(f"--train {self.name}: no voxel of {run} has an FA above 0. Check "
                             "image and mask, or leave it out with --participant-label.")
        return image

    def _check_registrations(self, runs: Sequence[str], images: Sequence[Image], mean: Image,
                             points: Sequence[np.ndarray]) -> tuple[float, list[str]]:
        """Compute the lowest correlation with the template, and warnings of runs below
        MIN_CORRELATION."""
        correlations = [_correlation(i.at(p), mean.values)
                        for i, p in zip(images, points, strict=True)]
        return min(correlations), [
            f"the correlation of FA of {run} with the template is only {value:.2f}; "
            f"{MIN_CORRELATION} or more is usual. Check its mask and its gradient table, or leave "
            "it out with --participant-label."
            for run, value in zip(runs, correlations, strict=True) if value < MIN_CORRELATION]

    def _mean_rish(self, cohort: Cohort, batch: str, points: Mapping[str, np.ndarray],
                   degrees: Sequence[int], rows: pd.DataFrame
                   ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Average RISH over the participants of a site, in the template.

        Return the share of participants whose masks cover each voxel of the template, (x, y, z),
        and for each shell the mean RISH of those, (degree, x, y, z), or 0 if there are none.
        Participants have the same weight, whatever the number of their runs.
        """
        coverage: Any = 0
        total: list[Any] = [0] * len(degrees)
        people = [of_person for _, of_person in rows.groupby("participant", sort=True)]
        for of_person in track(people, f"{self.name}: participants of {batch}"):
            for run in of_person["run"]:
                dwi = self.load(cohort, run)
                signal = dwi.signal.copy("K")
                s0, weighted = dwi.mean_b0, np.flatnonzero(~dwi.acquisition.b0)
                signal[:, weighted] = np.clip(signal[:, weighted], 0, np.maximum(s0, 0)[:, None])
                inside = sample(dwi.mask.astype(np.float32), dwi.affine, points[run]) > 0.5
                weight = inside / len(of_person)
                coverage = coverage + weight
                clipped = replace(dwi, signal=signal)
                for k, (c, usable) in enumerate(_coefficients(clipped, degrees)):
                    rish = sh.rish(torch.from_numpy(c[usable])).numpy()
                    grid = fill_nearest(rish, dwi.mask, usable)
                    total[k] = total[k] + weight * np.stack([
                        sample(grid[..., i], dwi.affine, points[run])
                        for i in range(grid.shape[-1])])
        return coverage / len(people), [
            np.where(coverage > 0, t / np.maximum(coverage, 1e-9), 0) for t in total]

    def _scales(self, reference: Sequence[np.ndarray], source: Sequence[np.ndarray],
                covered: np.ndarray, affine: np.ndarray, shells: Sequence[ShellRange]
                ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Compute π_l for each shell, (degree, x, y, z), and metrics.

        `reference` and `source` are the mean RISH of each shell at the two sites. Outside
        `covered`, the value of the nearest voxel inside holds.
        """
        from scipy.ndimage import gaussian_filter

        sd = FWHM / 2.3548 / np.linalg.norm(affine[:3, :3], axis=0)
        tensors, metrics = {}, {}
        for of_reference, of_source, shell in zip(reference, source, shells, strict=True):
            maps = []
            for i, pair in enumerate(zip(of_reference, of_source, strict=True)):
                upper, lower = (gaussian_filter(e * covered, sd)[covered] for e in pair)
                valid = (upper > 0) & (lower > 0)
                ratio = np.sqrt(np.where(valid, upper, 1) / np.where(valid, lower, 1))
                maps.append(np.clip(ratio, *BOUNDS))
                name = f"{shell.name}_l{2 * i}"
                metrics[f"scale_{name}"] = float(np.median(maps[-1]))
                metrics[f"bounded_{name}"] = float((ratio != maps[-1]).mean())
            grid = fill_nearest(np.stack(maps, -1).astype(np.float32), covered)
            tensors[shell.part] = torch.from_numpy(np.moveaxis(grid, -1, 0).copy())
        return tensors, metrics

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Add S0 times the change of each shell's SH series to the signal, or replace the signal by
        the scaled series (`output`).

        The result has the run's directions and is not below 0. b0 volumes are unchanged, and so are
        voxels without S0 or with a value that is not finite.

        Raises
        ------
        Refusal
            `check` refuses the acquisition, a shell has another b-tensor shape than in the
            training, or no voxel has both a b0 signal and an FA above 0.
        """
        self.check(dwi.acquisition)
        constants, card = model.card.constants, model.card
        nearest = card.trained_for.nearest_shells(dwi.acquisition)
        fa, affine = _fa(_clean(dwi), device), np.array(constants["affine"])
        if not fa.volume:
            raise Refusal(f"{self.name} found no voxel with b0 signal and an FA above 0. Check "
                          "image and mask.")
        mean = Image(model.tensors["template"].numpy(), affine)
        in_template = template.register(fa, mean)
        correlation = _correlation(mean.at(in_template), fa.values)
        signal, usable, clipped = _scale(dwi, model, nearest, in_template)
        notices = () if correlation >= MIN_CORRELATION else (
            f"Harmonization: the correlation of FA with the template of {card.method} is only "
            f"{correlation:.2f} ({card.metrics['template_correlation']:.2f} or more in the "
            "training), so that the scales may be misplaced. Check the brain mask and the "
            "figures.",)
        return Harmonized(
            signal, lambda other: _scale(other, model, nearest, in_template)[0],
            {"rish_unchanged": int((~usable).sum()), "rish_clipped_values": clipped},
            {"SphericalHarmonicDegree": [constants["l_max"][k] for k in nearest],
             "Output": constants["output"], "Regularization": constants["regularization"],
             "TemplateCorrelation": round(correlation, 3)}, notices,
            no_intervals=shared.SMOOTHED if constants["output"] == shared.SERIES else UNKNOWN_ERROR)


def _clean(dwi: Dwi) -> Dwi:
    """Set all measurements of voxels with a value that is not finite to 0."""
    finite = np.isfinite(dwi.signal).all(axis=1)
    return dwi if finite.all() else replace(dwi, signal=np.where(finite[:, None], dwi.signal, 0))


def _scale(dwi: Dwi, model: Checkpoint, nearest: Sequence[int], in_template: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray, int]:
    """Compute the harmonized signal, the voxels that were harmonized, and the number of values
    raised to 0.

    `nearest` is the index of the trained shell for each shell of the run; `in_template`,
    (x, y, z, 3), are the world points of the template at the voxels of the run.
    """
    constants, clean = model.card.constants, _clean(dwi)
    parts = [shell.part for shell in model.card.trained_for.shells]
    affine, output = np.array(constants["affine"]), constants["output"]
    masked, signal, s0 = in_template[dwi.mask], dwi.signal.copy("K"), clean.mean_b0
    degrees, clipped = [constants["l_max"][k] for k in nearest], 0
    finite = np.isfinite(dwi.signal).all(axis=1)
    for shell, k, l_max, (c, usable) in zip(
            dwi.acquisition.shells, nearest, degrees, _coefficients(clean, degrees), strict=True):
        usable = usable & finite
        scale = np.stack([sample(m, affine, masked[usable], beyond="nearest")
                          for m in model.tensors[parts[k]].numpy()], -1)
        scale -= output == shared.CHANGE
        scaled = c[usable] * sh.per_coefficient(torch.from_numpy(scale)).numpy()
        clipped += shared.write_series(
            signal, np.flatnonzero(usable), shell.indices, s0[usable], scaled,
            sh.basis(l_max, dwi.acquisition.bvecs[shell.indices]), output)
    return signal, usable, clipped


def _degree(shell: ShellRange) -> int:
    """Choose the degree for a shell of a card; 0 if its b-tensors are spherical."""
    if abs(shell.b_delta) <= SAME_SHAPE:
        return 0
    return sh.degree_for(COEFFICIENTS_PER_DIRECTION * shell.directions[0], L_MAX)


def _coefficients(dwi: Dwi, degrees: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fit the coefficients of each shell up to its degree (`pairs.coefficients`)."""
    by_shell = []
    for shell, l_max in zip(dwi.acquisition.shells, degrees, strict=True):
        (c,), usable = pairs.coefficients(dwi.select_shell(shell), l_max, REGULARIZATION)
        by_shell.append((c, usable))
    return by_shell


def _fa(dwi: Dwi, device: str) -> Image:
    """Compute FA within the mask, 0 where there is no b0 signal or the fit fails."""
    maps = tissue.tensor_maps(dwi, device)
    return Image(dwi.unmask((maps["fa"] * (dwi.mean_b0 > 0) * ~maps["failed"]).astype(
        np.float32)), dwi.affine)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlate two images over the voxels where both are above 0; 0 if there are fewer than three
    or if an image is constant there."""
    both = (a > 0) & (b > 0)
    if both.sum() < 3 or not min(np.ptp(a[both]), np.ptp(b[both])) > 0:
        return 0.0
    return float(np.corrcoef(a[both], b[both])[0, 1])
