"""Linear RISH: spherical harmonics of every degree scaled by maps that two groups of people give.

With c_lm the coefficients of S/S0 in a shell, RISH_l = Σ_m c_lm² and E the mean over the people of
a group at a point of their common template,

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

WANTED = 16
"""Participants of every batch that the means needed to be stable (Cetin Karayumak et al. 2019)."""

L_MAX = 6
DETERMINED = 0.75
"""Coefficients per direction of a shell, at most: with more, RISH is mostly noise."""

LEAST_DIRECTIONS = 8
"""For degree 2, by the same measure."""

REGULARIZATION = 1e-5
"""λ of the Laplace–Beltrami penalty. At 0.006, which serves networks, 30 directions would keep half
of degree 4, and the fit is what remains of the signal."""

SMOOTHING = 4.0
"""mm, full width at half maximum, of the mean RISH maps in the template."""

BOUNDS = 0.5, 2.0
"""Of π_l."""

COVERED = 0.5
"""Share of either group's people who must be seen at a point of the template."""

ALIKE = 0.5
"""Correlation with the template, below which a registration is doubtful."""


UNKNOWN_ERROR = (
    "the scales err by what the people of the two groups differ in, which moves estimates by more "
    "than noise does, and no person scanned in both batches measures by how much")
"""Why no interval can be given: on a phantom of eight unlike people in either group intervals for
noise alone covered 74–88 % in place of 90, and standard errors of the means, as if independent
between shells, 100 %."""


class Rish(shared.Harmonizer):
    """Scale maps per shell and degree in a template, carried to each scan."""

    min_participants = 3

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where there is no b0, or a shell has fewer than 8 directions."""
        super().check(acquisition)
        few = [s for s in acquisition.shells
               if len(s) < LEAST_DIRECTIONS and abs(s.b_delta) > SAME_SHAPE]
        if few:
            raise Refusal(f"{self.name} found {describe_shells(few)}. Needed are "
                          f"{LEAST_DIRECTIONS} or more directions on every shell. Leave the shell "
                          "out with --bids-filter-file, or harmonize with harmonize_mica.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """As of `Harmonizer.preflight` and `harmonizer.group_differences`; and where people are
        few, unless every batch has the same people, whose differences cancel."""
        batches = shared.runs_by_site(self, cohort)
        same = len({frozenset(rows["participant"]) for rows in batches.values()}) == 1
        few = "" if same else shared.small_sites(batches, WANTED)
        told = [f"{few}; mean RISH was stable from {WANTED} in each batch on. With fewer the "
                "scales hold people's differences, too."] if few else []
        return [*told, *shared.group_differences(self, cohort, batches)]

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """A checkpoint for every batch but the reference; all share one template.

        Raises:
            UsageError: a scan cannot be used, or batches show no common part of the brain.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *targets = batches
        degrees = [_degree(shell)
                   for shell in scope.training_domain(cohort, batches, targets).shells]
        runs = [run for rows in batches.values() for run in rows["run"]]
        images = [self._fa(cohort, run, settings.device) for run in track(runs, f"{self.name}: FA")]
        mean, places = template.build(images, settings.states, settings.workers)
        least, doubts = self._alike(runs, images, mean, places)
        metrics = {"template_correlation": round(least, 3)}
        at = dict(zip(runs, places, strict=True))
        groups = {b: self._group(cohort, b, at, degrees, rows) for b, rows in batches.items()}
        checkpoints = {}
        for batch in targets:
            where = (mean.values > 0) & np.all(
                [groups[b][0] >= COVERED for b in (reference, batch)], axis=0)
            if not where.any():
                raise UsageError(f"--train {self.name}: the scans of {reference} and {batch} share "
                                 "no part of the brain. Check the brain masks.")
            rows = {b: batches[b] for b in (reference, batch)}
            domain = scope.training_domain(cohort, rows, (batch,))
            tensors, own = self._scales(groups[reference][1], groups[batch][1], where, mean.affine,
                                        domain.shells)
            name = (f"{shared.model_name(self, batch)}-to-"
                    + shared.model_name(self, reference).removeprefix(f"{self.name}_"))
            checkpoints[name] = Checkpoint(
                {"template": torch.from_numpy(mean.values), **tensors}, Card(
                    method=self.name, network={}, trained_for=domain,
                    training={"participants": scope.hash_participants(rows),
                              "data": "S/S0, FA template"},
                    intended_use=(
                        f"Scales the diffusion signal of {batch} to that of {reference} by degree "
                        "and place, for people like those under trained_for. Differences between "
                        "the groups other than the site's are removed, too. Not for diagnosis."),
                    seed=settings.seed, versions={"qsphere": __version__},
                    constants={"affine": mean.affine.tolist(), "l_max": degrees,
                               "regularization": REGULARIZATION,
                               "output": self.settings("training")["output"]},
                    metrics={**metrics, **own}, reference_batch=reference))
        model = {"Method": self.name, "Model": self.outputs["model"], "ReferenceBatch": reference,
                 "Batches": targets,
                 "Metrics": {n: dict(c.card.metrics) for n, c in checkpoints.items()}}
        return Fitted({}, model, checkpoints, doubts)

    def _fa(self, cohort: Cohort, run: str, device: str) -> Image:
        dwi = self.load(cohort, run)
        image = _fa(dwi, device)
        if not image.volume:
            raise UsageError(f"--train {self.name}: no voxel of {run} has an FA above 0. Check "
                             "image and mask, or leave it out with --participant-label.")
        return image

    def _alike(self, runs: Sequence[str], images: Sequence[Image], mean: Image,
               places: Sequence[np.ndarray]) -> tuple[float, list[str]]:
        """The least correlation of anyone with the template, and sentences on those in doubt."""
        found = [_correlation(i.at(p), mean.values) for i, p in zip(images, places, strict=True)]
        return min(found), [
            f"FA of {run} correlates with the template by {value:.2f} only; {ALIKE} or more are "
            "usual. Check its mask and its b-table, or leave it out with --participant-label."
            for run, value in zip(runs, found, strict=True) if value < ALIKE]

    def _group(self, cohort: Cohort, batch: str, at: Mapping[str, np.ndarray],
               degrees: Sequence[int], rows: pd.DataFrame) -> tuple[np.ndarray, list[np.ndarray]]:
        """Share of people seen (x, y, z), and per shell mean RISH (degree, x, y, z) of those seen,
        0 where nobody is. Everyone counts alike, however many runs they have."""
        seen: Any = 0
        total: list[Any] = [0] * len(degrees)
        people = [own for _, own in rows.groupby("participant", sort=True)]
        for own in track(people, f"{self.name}: participants of {batch}"):
            for run in own["run"]:
                dwi = self.load(cohort, run)
                signal = dwi.signal.copy("K")
                s0, weighted = dwi.mean_b0, np.flatnonzero(~dwi.acquisition.b0)
                signal[:, weighted] = np.clip(signal[:, weighted], 0, np.maximum(s0, 0)[:, None])
                inside = sample(dwi.mask.astype(np.float32), dwi.affine, at[run])
                inside = (inside > 0.5) / len(own)
                seen = seen + inside
                clipped = replace(dwi, signal=signal)
                for k, (c, usable) in enumerate(_coefficients(clipped, degrees)):
                    rish = sh.rish(torch.from_numpy(c[usable])).numpy()
                    grid = fill_nearest(rish, dwi.mask, usable)
                    total[k] = total[k] + inside * np.stack([
                        sample(grid[..., i], dwi.affine, at[run])
                        for i in range(grid.shape[-1])])
        return seen / len(people), [
            np.where(seen > 0, t / np.maximum(seen, 1e-9), 0) for t in total]

    def _scales(self, reference: Sequence[np.ndarray], source: Sequence[np.ndarray],
                where: np.ndarray, affine: np.ndarray, shells: Sequence[ShellRange]
                ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """π_l per shell (degree, x, y, z), beyond `where` that of the nearest voxel in it, and
        metrics."""
        from scipy.ndimage import gaussian_filter

        sd = SMOOTHING / 2.3548 / np.linalg.norm(affine[:3, :3], axis=0)
        tensors, metrics = {}, {}
        for of_reference, of_source, shell in zip(reference, source, shells, strict=True):
            maps = []
            for i, pair in enumerate(zip(of_reference, of_source, strict=True)):
                above, below = (gaussian_filter(e * where, sd)[where] for e in pair)
                some = (above > 0) & (below > 0)
                free = np.sqrt(np.where(some, above, 1) / np.where(some, below, 1))
                maps.append(np.clip(free, *BOUNDS))
                name = f"{shell.name}_l{2 * i}"
                metrics[f"scale_{name}"] = float(np.median(maps[-1]))
                metrics[f"bounded_{name}"] = float((free != maps[-1]).mean())
            grid = fill_nearest(np.stack(maps, -1).astype(np.float32), where)
            tensors[shell.part] = torch.from_numpy(np.moveaxis(grid, -1, 0).copy())
        return tensors, metrics

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """The signal with S0 times the change of the SH series of every shell added, or the scaled
        series in its place, at the run's directions and not below 0. b0 volumes stay, and voxels
        without S0 or with a value that is not finite.

        Raises:
            Refusal: as of `check`, a shell of another b-tensor shape, or nothing to register.
        """
        self.check(dwi.acquisition)
        constants, card = model.card.constants, model.card
        nearest = card.trained_for.nearest_shells(dwi.acquisition)
        own, affine = _fa(_clean(dwi), device), np.array(constants["affine"])
        if not own.volume:
            raise Refusal(f"{self.name} found no voxel with b0 signal and an FA above 0. Check "
                          "image and mask.")
        mean = Image(model.tensors["template"].numpy(), affine)
        place = template.register(own, mean)
        alike = _correlation(mean.at(place), own.values)
        signal, usable, clipped = _scaled(dwi, model, nearest, place)
        notices = () if alike >= ALIKE else (
            f"Harmonization: FA correlates with the template of {card.method} by {alike:.2f} only "
            f"({card.metrics['template_correlation']:.2f} or more in the training), so the scales "
            "may lie in the wrong places. Look at the brain mask and the figures.",)
        return Harmonized(
            signal, lambda other: _scaled(other, model, nearest, place)[0],
            {"rish_unchanged": int((~usable).sum()), "rish_clipped_values": clipped},
            {"SphericalHarmonicDegree": [constants["l_max"][k] for k in nearest],
             "Output": constants["output"], "Regularization": constants["regularization"],
             "TemplateCorrelation": round(alike, 3)}, notices,
            no_intervals=shared.SMOOTHED if constants["output"] == shared.SERIES else UNKNOWN_ERROR)


def _clean(dwi: Dwi) -> Dwi:
    """Voxels with a value that is not finite are 0."""
    finite = np.isfinite(dwi.signal).all(axis=1)
    return dwi if finite.all() else replace(dwi, signal=np.where(finite[:, None], dwi.signal, 0))


def _scaled(dwi: Dwi, model: Checkpoint, nearest: Sequence[int], place: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray, int]:
    """The harmonized signal, which voxels were, and how many values were raised to 0.

    nearest: the trained shell for each of the run's. place: (x, y, z, 3) of `template.register`.
    """
    constants, clean = model.card.constants, _clean(dwi)
    parts = [shell.part for shell in model.card.trained_for.shells]
    affine, output = np.array(constants["affine"]), constants["output"]
    points, signal, s0 = place[dwi.mask], dwi.signal.copy("K"), clean.mean_b0
    degrees, clipped = [constants["l_max"][k] for k in nearest], 0
    finite = np.isfinite(dwi.signal).all(axis=1)
    for shell, k, l_max, (c, usable) in zip(
            dwi.acquisition.shells, nearest, degrees, _coefficients(clean, degrees), strict=True):
        usable = usable & finite
        scale = np.stack([sample(m, affine, points[usable], beyond="nearest")
                          for m in model.tensors[parts[k]].numpy()], -1)
        scale -= output == shared.CHANGE
        scaled = c[usable] * sh.per_coefficient(torch.from_numpy(scale)).numpy()
        clipped += shared.write_series(
            signal, np.flatnonzero(usable), shell.indices, s0[usable], scaled,
            sh.basis(l_max, dwi.acquisition.bvecs[shell.indices]), output)
    return signal, usable, clipped


def _degree(shell: ShellRange) -> int:
    """Of a shell as a card holds it; 0 where the encoding has no direction."""
    if abs(shell.b_delta) <= SAME_SHAPE:
        return 0
    return sh.degree_for(DETERMINED * shell.directions[0], L_MAX)


def _coefficients(dwi: Dwi, degrees: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per shell, up to its degree: `pairs.coefficients`."""
    found = []
    for shell, l_max in zip(dwi.acquisition.shells, degrees, strict=True):
        (c,), usable = pairs.coefficients(dwi.select_shell(shell), l_max, REGULARIZATION)
        found.append((c, usable))
    return found


def _fa(dwi: Dwi, device: str) -> Image:
    """FA within the mask, 0 without b0 signal or fit."""
    maps = pairs.tensor_maps(dwi, device)
    return Image(dwi.unmask((maps["fa"] * (dwi.mean_b0 > 0) * ~maps["failed"]).astype(
        np.float32)), dwi.affine)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Over the voxels where both are above 0; 0 where they are fewer than three, or constant."""
    both = (a > 0) & (b > 0)
    if both.sum() < 3 or not min(np.ptp(a[both]), np.ptp(b[both])) > 0:
        return 0.0
    return float(np.corrcoef(a[both], b[both])[0, 1])
