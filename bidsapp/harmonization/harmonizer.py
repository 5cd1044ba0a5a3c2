"""What the methods that map a batch to a reference batch share: which cohorts allow a training, and
how scans are read and brought together for one."""

from __future__ import annotations

import hashlib
import logging
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from bidsapp.acquisition import SAME_B, Acquisition, describe_shells, same_shell
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.harmonization import pairs
from bidsapp.harmonization.scope import COVARIATES, nearest
from bidsapp.kinds import Cohort, Fitted, Harmonized, Method, SiteHarmonizer, TrainingSettings
from bidsapp.progress import track
from bidsapp.workers import spread

log = logging.getLogger("qsphere")

MIN_PARTICIPANTS = 2
"""Of every batch: with one, a site is a person."""

INVALID = 0.01
"""Share of NaN or infinite values in a scan to learn from, at most."""

CONFOUNDED = 0.9
"""Share of a covariate's variance that batches may explain before ComBat, which keeps it, would
remove it with the batch."""

UNLIKE, UNMATCHED = 0.1, 0.5
"""The same share where nothing keeps the covariate: above the first, which for two groups of one
size is a difference of 2/3 SD, the groups are said to differ; above the second they are refused."""


class Harmonizer(SiteHarmonizer):
    """A method that `group --train … --reference-batch` trains and `--harmonize` applies.

    min_participants: participants whom every batch must have.
    """

    min_participants: ClassVar[int] = MIN_PARTICIPANTS

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where there is no b0 to divide by, or nothing weighted."""
        if not acquisition.b0.any() or not acquisition.shells:
            raise Refusal(f"{self.name} found {int(acquisition.b0.sum())} volumes without "
                          f"weighting and {describe_shells(acquisition.shells)}. Needed are a b0 "
                          "and a shell. Leave the run out, or acquire them.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """Sentences on what makes a training doubtful.

        Raises:
            UsageError: the cohort does not allow one (`runs_by_site`), as far as its tables tell.
        """
        runs_by_site(self, cohort)
        return []

    @abstractmethod
    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Models of a cohort that is ready.

        Raises:
            UsageError: a scan cannot be used.
        """

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """`_fit`, where the cohort is ready; what there is to say is logged and goes into notices.

        Raises:
            UsageError: as of `preflight` and `_fit`.
        """
        doubts = self._tell(self.preflight(cohort))
        if settings.states:
            settings.states.mkdir(parents=True, exist_ok=True)
        fitted = self._fit(cohort, settings)
        return replace(fitted, notices=[*doubts, *self._tell(fitted.notices)])

    def _tell(self, sentences: Sequence[str]) -> Sequence[str]:
        for sentence in sentences:
            log.warning("%s: %s", self.name, sentence)
        return sentences

    def load(self, cohort: Cohort, run: str) -> Dwi:
        """A scan to learn from.

        Raises:
            UsageError: more than INVALID of its values were not finite, or any still is.
        """
        assert cohort.load is not None
        dwi = cohort.load(run)
        bad = dwi.invalid + int((~np.isfinite(dwi.signal)).sum())
        if bad > INVALID * dwi.signal.size or not np.isfinite(dwi.signal).all():
            raise UsageError(
                f"--train {self.name}: {bad} values of {run} are NaN or infinite "
                f"({bad / dwi.signal.size:.1%}; up to {INVALID:.0%} is accepted, read as 0). "
                "Convert or preprocess the scan again, or leave it out with --participant-label.")
        return dwi

    def register(self, cohort: Cohort, pair: pairs.Pair, deformable: bool, folder: Path | None,
                 device: str) -> tuple[Dwi, Dwi, pairs.Registration]:
        """Source, target, and where this lies in that; kept in the folder, if any.

        Raises:
            UsageError: a scan cannot be used, they show not the same, or hardly any tissue.
        """
        source, both = self.load(cohort, pair.source), pair.kind == pairs.BOTH
        target = source if pair.target == pair.source else self.load(cohort, pair.target)
        try:
            registration = pairs.register(source, target, deformable=deformable and both,
                                  device=device, work_dir=folder,
                                  rigid=None if both else np.eye(4))
        except DataError as error:
            raise UsageError(f"--train {self.name}: {pair.source} and {pair.target}: {error} Or "
                             "leave one out with --participant-label.") from error
        if min((registration.labels == k).sum() for k in tissue.NAMES.values()) < tissue.MIN_VOXELS:
            raise UsageError(
                f"--train {self.name}: {pair.target} shows {int((registration.labels > 0).sum())} "
                f"voxels of grey and white matter, fewer than {tissue.MIN_VOXELS} of one of them. "
                "Check the brain mask, or leave the participant out with --participant-label.")
        return source, target, registration

    def register_all(self, cohort: Cohort, found: Sequence[pairs.Pair], deformable: bool,
                     folder: Path, settings: TrainingSettings) -> None:
        """Register pairs side by side, by settings.workers processes; `register` then finds the
        registrations in the folder.

        Raises:
            UsageError: as of `register`.
        """
        if settings.workers > 1:
            with spread(settings.workers) as each:
                done = each(_register, [(self, cohort, pair, deformable, folder, settings.device)
                                        for pair in found])
                for _ in track(found, f"{self.name}: registering, {settings.workers} at a time"):
                    next(done)


def _register(method: Harmonizer, *args: Any) -> None:
    method.register(*args)  # whose arrays need not be sent back


OUTPUTS = CHANGE, SERIES = "change", "series"
"""What becomes of a harmonized SH series: what it changes is added to the signal, which keeps what
no series holds; or, as published, it takes the signal's place."""

SMOOTHED = ("an SH series stands in the signal's place, so its noise is correlated over directions "
            "and what the series does not hold of the signal is missing")
"""Why no interval can be told from a series."""


def write_series(signal: np.ndarray, rows: np.ndarray, indices: np.ndarray, s0: np.ndarray,
                 coefficients: np.ndarray, basis: np.ndarray, output: str) -> int:
    """Write S0 times a series of S/S0, or add S0 times its change, never below 0.

    rows, indices: of the signal. coefficients: (row, coefficient) of the series, or of its change.
    basis: (index, coefficient). Returns how many values were raised to 0.
    """
    clipped = 0
    for i, direction in zip(indices, basis.astype(np.float32), strict=True):
        column = s0 * (coefficients @ direction) + (signal[rows, i] if output == CHANGE else 0)
        clipped += int((column < 0).sum())
        signal[rows, i] = np.maximum(column, 0)
    return clipped


NOISE_VOXELS = 10_000
"""The noise after harmonization is measured on a slab of about this many voxels."""

HALF = 0.5
"""SD of the noise added to measure what becomes of noise, as a share of the noise's own: enough to
be seen beside rounding, too little to change what a nonlinear map does."""


def noise_gain(dwi: Dwi, made: Harmonized, seed: int = 0) -> np.ndarray:
    """(measurement,) SD of the noise of each, after harmonization, in units of dwi.noise_sd.

    The map is applied again to a slab of the run with independent Gaussian noise added to the
    weighted volumes. By how much the mean of a shell over directions then changes, root mean square
    over voxels, against how much it changed before harmonization, is the gain of the shell. So it
    holds for means over directions, whatever the noise has become between them: a series keeps
    that of its own degrees and takes away the rest.
    """
    gain = dwi.noise_gain.copy() if dwi.noise_gain is not None else np.ones(len(dwi.acquisition))
    if not dwi.noise_sd:
        return gain
    slab = _slab(dwi)
    weighted = ~dwi.acquisition.b0
    noise = np.random.default_rng(seed).standard_normal(slab.signal.shape) * weighted
    noise = (HALF * dwi.noise_sd * noise).astype(np.float32)
    change = made.again(replace(slab, signal=slab.signal + noise)) - made.again(slab)
    for shell in dwi.acquisition.shells:
        before, after = (np.square(v[:, shell.indices].mean(axis=1), dtype=np.float64).mean()
                         for v in (noise, change))
        gain[shell.indices] *= np.sqrt(after / before)
    return gain


def widening(dwi: Dwi, errors: Sequence[float]) -> float:
    """By how much intervals of a harmonized Dwi are wider for the method's own errors.

    √(1 + mean over shells of (error / noise)²), both relative to the median over voxels of the mean
    over directions. errors: as of `Harmonized`. 1 where the noise is not known.
    """
    ratios = []
    for shell, error in zip(dwi.acquisition.shells, errors, strict=True):
        sigma = dwi.noise_of(shell.indices)
        level = float(np.median(dwi.signal[:, shell.indices].mean(axis=1)))
        ratios.append((error * level / sigma) ** 2 * len(shell) if sigma else 0.0)
    return float(np.sqrt(1 + np.mean(ratios)))


def _slab(dwi: Dwi) -> Dwi:
    """Whole slices about the middle of the mask, along the last axis."""
    count = np.cumsum(dwi.mask.sum(axis=(0, 1)))
    middle, half = count[-1] / 2, NOISE_VOXELS / 2
    low, high = np.searchsorted(count, [middle - half, middle + half])
    mask = np.zeros_like(dwi.mask)
    mask[..., low:high + 1] = dwi.mask[..., low:high + 1]
    rows = mask[dwi.mask]
    return replace(dwi, signal=dwi.signal[rows], mask=mask,
                   tissue=None if dwi.tissue is None else dwi.tissue[rows])


def known_reference(reference: str | None, counts: Mapping[str, int]) -> None:
    """Raises UsageError where the reference is given and no batch. counts: people by batch."""
    if reference is not None and reference not in counts:
        found = ", ".join(f"{b}: {n}" for b, n in counts.items())
        raise UsageError(f"--reference-batch {reference}: no such batch; found {found}."
                         + nearest(reference, counts))


def runs_by_site(method: Harmonizer, cohort: Cohort) -> dict[str, pd.DataFrame]:
    """The runs of each batch (rows of the statistics), the reference first, in order of names.

    Raises:
        UsageError: no reference batch is given, or no batch has its name; fewer than two batches,
            or people in one; runs differ in their shells, or the method refuses one.
    """
    batches = {str(b): rows for b, rows in cohort.statistics.groupby("batch", sort=True)}
    counts = {b: int(rows["participant"].nunique()) for b, rows in batches.items()}
    found = ", ".join(f"{b}: {n}" for b, n in counts.items())
    reference = cohort.reference_batch
    known_reference(reference, counts)
    if reference is None:
        raise UsageError(f"--train {method.name} maps the other batches to one; found {found}. "
                         "Name it with --reference-batch.")
    if len(counts) < 2:
        raise UsageError(f"--train {method.name} needs at least two batches; found one ({found}). "
                         "Process participants of another site into the same OUTPUT_DIR, or tell "
                         "the sites apart with --batch-file or --batch-column.")
    if small := [b for b, n in counts.items() if n < method.min_participants]:
        raise UsageError(f"--train {method.name} needs at least {method.min_participants} "
                         f"participants in every batch; found {found}. Add participants to "
                         f"{', '.join(small)}, or leave it out with --participant-label.")
    ordered = {b: batches[b] for b in (reference, *(b for b in batches if b != reference))}
    first = cohort.acquisitions[ordered[reference]["run"].iloc[0]]
    for batch, rows in ordered.items():
        for run in rows["run"]:
            shells = cohort.acquisitions[run].shells
            if len(shells) != len(first.shells) or not all(
                    map(same_shell, shells, first.shells)):
                raise UsageError(
                    f"--train {method.name}: shells differ. {run} of {batch} has "
                    f"{describe_shells(shells)}; "
                    f"{ordered[reference]['run'].iloc[0]} of {reference} has "
                    f"{describe_shells(first.shells)}. Needed are the same b-values (within "
                    f"{SAME_B:.0%}) and b-tensor shapes. Leave runs out with --participant-label, "
                    "or choose them with --bids-filter-file.")
            try:
                method.check(cohort.acquisitions[run])
            except Refusal as refusal:
                raise UsageError(f"--train {method.name}: {run} cannot be used. {refusal}") \
                    from refusal
    return ordered


def group_differences(method: Method, cohort: Cohort, batches: Mapping[str, pd.DataFrame]
                      ) -> list[str]:
    """Sentences on each batch whose people differ from the reference's, the first, in age or sex:
    where groups stand for sites, that difference would be removed as the site's.

    Raises:
        UsageError: they differ too much.
    """
    told: list[str] = []
    reference, *targets = batches
    for batch, name in product(targets, (c for c in COVARIATES if c in cohort.covariates)):
        groups = {b: batches[b].dropna(subset=name).groupby("participant")[name].first()
                  for b in (reference, batch)}
        both = pd.concat(list(groups.values()))
        if min(map(len, groups.values())) < MIN_PARTICIPANTS or both.nunique() < 2:
            continue
        group = np.repeat(np.eye(2), [len(g) for g in groups.values()], axis=0)
        share = variance_explained(coded(both), by=group)
        text = (f"{name} differs between {' and '.join(map(_group, groups, groups.values()))}, so "
                f"that the batch explains {share:.0%} of it")
        if share > UNMATCHED:
            raise UsageError(
                f"--train {method.name}: {text}; up to {UNMATCHED:.0%} is accepted, for the effect "
                f"of {name} would be removed with the site's. Add participants, or leave out with "
                "--participant-label those who have nobody like them in the other batch.")
        if share > UNLIKE:
            told.append(f"{text}. Part of the effect of {name} is removed with the site's; groups "
                        f"that are alike ({UNLIKE:.0%} or less) are needed to keep it.")
    return told


def small_sites(batches: Mapping[str, pd.DataFrame], wanted: int) -> str:
    """Which batches have fewer participants, as the start of a sentence; empty where none has."""
    counts = {b: int(rows["participant"].nunique()) for b, rows in batches.items()}
    return ", ".join(f"{b} has {n} participants" for b, n in counts.items() if n < wanted)


def _group(batch: str, values: pd.Series) -> str:
    if pd.api.types.is_numeric_dtype(values):
        return f"{batch} ({values.mean():.3g} ± {values.std():.2g}, {len(values)} people)"
    return f"{batch} ({', '.join(f'{n} {v}' for v, n in values.value_counts().items())})"


def coded(values: pd.Series) -> np.ndarray:
    """Standardised columns of a covariate: numbers as they are, others as categories, of which the
    first has no column."""
    columns = (values.to_numpy(float)[:, None] if pd.api.types.is_numeric_dtype(values)
               else pd.get_dummies(values, dtype=float).to_numpy()[:, 1:])
    return (columns - columns.mean(axis=0)) / np.maximum(columns.std(axis=0), 1e-12)


def variance_explained(values: np.ndarray, by: np.ndarray) -> float:
    """The largest share, among columns, of a variance that a linear model of `by` explains."""
    residual = values - by @ np.linalg.lstsq(by, values, rcond=None)[0]
    centred = values - values.mean(axis=0)
    return float((1 - (residual**2).sum(0) / np.maximum((centred**2).sum(0), 1e-300)).max())


def model_name(method: Method, *batches: str) -> str:
    """The folder of a model under group/models: method and batches. What a file's name cannot hold
    is left out, and a digest of the batch's whole name added."""
    def plain(batch: str) -> str:
        short = re.sub(r"[^A-Za-z0-9]", "", batch)
        return short if short == batch else (
            f"{short}{hashlib.sha256(batch.encode()).hexdigest()[:6]}")

    return "_".join([method.name, *map(plain, batches)])
