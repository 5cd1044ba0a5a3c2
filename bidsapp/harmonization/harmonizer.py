"""Base class of the methods that map the signal of a site to that of a reference site.

It checks whether a cohort allows a training, reads and registers the scans that a method learns
from, writes harmonized series, and measures what harmonization does to noise.
"""

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
from bidsapp.harmonization.scope import COVARIATES, suggest_name
from bidsapp.kinds import Cohort, Fitted, Harmonized, Method, SiteHarmonizer, TrainingSettings
from bidsapp.progress import track
from bidsapp.workers import spread

log = logging.getLogger("qsphere")

MIN_PARTICIPANTS = 2
"""Minimum number of participants per site: with one, site and participant are confounded."""

MAX_INVALID = 0.01
"""Maximum share of NaN or infinite values in a scan that `Harmonizer.load` accepts."""

CONFOUNDED = 0.9
"""Maximum share of a covariate's variance that sites may explain in ComBat, which models the
covariate in order to keep its effect. Above it, the effect would be removed with the site's."""

WARN_DIFFERENCE, MAX_DIFFERENCE = 0.1, 0.5
"""The same share for methods that compare groups and model no covariate: they warn above the first
and refuse above the second. 0.1 is a difference of 2/3 SD between two groups of equal size."""


class Harmonizer(SiteHarmonizer):
    """A method that `group --train … --reference-batch` trains and `--harmonize` applies.

    Attributes
    ----------
    min_participants : int
        Minimum number of participants per site.
    """

    min_participants: ClassVar[int] = MIN_PARTICIPANTS

    def check(self, acquisition: Acquisition) -> None:
        """Refuse an acquisition without a b0 or without a shell.

        Raises
        ------
        Refusal
            There is no b0 to divide by, or no diffusion-weighted volume.
        """
        if not acquisition.b0.any() or not acquisition.shells:
            raise Refusal(f"{self.name} found {int(acquisition.b0.sum())} b0 volumes and "
                          f"{describe_shells(acquisition.shells)}. Needed are a b0 and a shell. "
                          "Leave the run out, or acquire them.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """Check from its tables whether a cohort allows a training, before any scan is read.

        Returns
        -------
        list of str
            Warnings, one sentence each.

        Raises
        ------
        UsageError
            The cohort does not allow a training (`runs_by_site`).
        """
        runs_by_site(self, cohort)
        return []

    @abstractmethod
    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train on a cohort that passed `preflight`; raise UsageError if a scan cannot be used."""

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Check the cohort and train; warnings are logged and returned as notices.

        Raises
        ------
        UsageError
            The cohort does not allow a training (`preflight`), or a scan cannot be used.
        """
        warnings = self._log_warnings(self.preflight(cohort))
        if settings.states:
            settings.states.mkdir(parents=True, exist_ok=True)
        fitted = self._fit(cohort, settings)
        return replace(fitted, notices=[*warnings, *self._log_warnings(fitted.notices)])

    def _log_warnings(self, sentences: Sequence[str]) -> Sequence[str]:
        for sentence in sentences:
            log.warning("%s: %s", self.name, sentence)
        return sentences

    def load(self, cohort: Cohort, run: str) -> Dwi:
        """Load a scan that the method learns from.

        Raises
        ------
        UsageError
            More than MAX_INVALID of its values were NaN or infinite when it was read, or any still
            is.
        """
        assert cohort.load is not None
        dwi = cohort.load(run)
        invalid = dwi.invalid + int((~np.isfinite(dwi.signal)).sum())
        if invalid > MAX_INVALID * dwi.signal.size or not np.isfinite(dwi.signal).all():
            raise UsageError(
                f"--train {self.name}: {invalid} values of {run} are NaN or infinite "
                f"({invalid / dwi.signal.size:.1%}; up to {MAX_INVALID:.0%} is accepted and read "
                "as 0). Convert or preprocess the scan again, or leave it out with "
                "--participant-label.")
        return dwi

    def register(self, cohort: Cohort, pair: pairs.Pair, deformable: bool, folder: Path | None,
                 device: str) -> tuple[Dwi, Dwi, pairs.Registration]:
        """Load the two scans of a pair and register the source to the target.

        Parameters
        ----------
        cohort : Cohort
            Loads the scans.
        pair : Pair
            The runs. A run that is paired with itself gets the identity.
        deformable : bool
            Whether SyN follows the rigid registration.
        folder : Path, optional
            Folder in which registrations are kept.
        device : str
            Device of the tensor fits.

        Returns
        -------
        source, target : Dwi
        registration : Registration

        Raises
        ------
        UsageError
            A scan cannot be used, the two do not overlap, or they show too little grey or white
            matter.
        """
        source, paired = self.load(cohort, pair.source), pair.kind == pairs.BOTH
        target = source if pair.target == pair.source else self.load(cohort, pair.target)
        try:
            registration = pairs.register(source, target, deformable=deformable and paired,
                                  device=device, work_dir=folder,
                                  rigid=None if paired else np.eye(4))
        except DataError as error:
            raise UsageError(f"--train {self.name}: {pair.source} and {pair.target}: {error} "
                             "Otherwise leave one of them out with --participant-label."
                             ) from error
        if min((registration.labels == k).sum() for k in tissue.NAMES.values()) < tissue.MIN_VOXELS:
            raise UsageError(
                f"--train {self.name}: {pair.target} shows {int((registration.labels > 0).sum())} "
                f"voxels of grey and white matter. Needed are {tissue.MIN_VOXELS} of each. "
                "Check the brain mask, or leave the participant out with --participant-label.")
        return source, target, registration

    def register_all(self, cohort: Cohort, scans: Sequence[pairs.Pair], deformable: bool,
                     folder: Path, settings: TrainingSettings) -> None:
        """Register pairs side by side, by `settings.workers` processes.

        `register` then finds the registrations in the folder.

        Raises
        ------
        UsageError
            As of `register`.
        """
        if settings.workers > 1:
            with spread(settings.workers) as each:
                done = each(_register, [(self, cohort, pair, deformable, folder, settings.device)
                                        for pair in scans])
                for _ in track(scans, f"{self.name}: registering, {settings.workers} at a time"):
                    next(done)


def _register(method: Harmonizer, *args: Any) -> None:
    """Call `method.register` without sending its result back."""
    method.register(*args)


OUTPUTS = CHANGE, SERIES = "change", "series"
"""How a harmonized SH series becomes a signal. `change`: its difference from the series before is
added to the signal, which keeps what a series does not represent: higher degrees and noise.
`series`: it replaces the signal, as published."""

SMOOTHED = ("an SH series replaces the signal, so that its noise is correlated over directions and "
            "the part of the signal that the series does not represent is missing")
"""Reason why maps have no confidence interval after a series replaced the signal."""


def write_series(signal: np.ndarray, rows: np.ndarray, indices: np.ndarray, s0: np.ndarray,
                 coefficients: np.ndarray, basis: np.ndarray, output: str) -> int:
    """Write S0 times a series of S/S0 into a signal, or add S0 times its change, never below 0.

    Parameters
    ----------
    signal : (voxel, measurement) float32
        Modified in place.
    rows, indices : (row,) and (index,) int
        Voxels and measurements of the signal to write.
    s0 : (row,)
        Mean b0.
    coefficients : (row, coefficient)
        SH coefficients of the series, or of its change.
    basis : (index, coefficient)
        SH basis along the directions of the measurements.
    output : str
        One of OUTPUTS.

    Returns
    -------
    int
        Number of values that were raised to 0.
    """
    clipped = 0
    for i, direction in zip(indices, basis.astype(np.float32), strict=True):
        column = s0 * (coefficients @ direction) + (signal[rows, i] if output == CHANGE else 0)
        clipped += int((column < 0).sum())
        signal[rows, i] = np.maximum(column, 0)
    return clipped


NOISE_VOXELS = 10_000
"""Approximate number of voxels of the slab on which the noise after harmonization is measured."""

ADDED_NOISE = 0.5
"""SD of the noise that is added to measure the noise gain, as a share of the SD of the run's noise.
It is well above rounding, and too small to change how a nonlinear map acts."""


def noise_gain(dwi: Dwi, harmonized: Harmonized, seed: int = 0) -> np.ndarray:
    """Measure the factor by which harmonization changes the noise of each measurement.

    The method is applied again to a slab of the run, without and with independent Gaussian noise
    added to the weighted volumes. The difference is the noise after harmonization. The gain of a
    shell compares the mean over directions of this noise with that of the added noise (ratio of
    root mean squares over voxels). It does not describe the correlation of noise between
    directions: a series keeps the noise of its own degrees and removes the rest.

    Parameters
    ----------
    dwi : Dwi
        The run before harmonization.
    harmonized : Harmonized
        Its harmonized signal.
    seed : int
        Seed of the added noise.

    Returns
    -------
    (measurement,) ndarray
        SD of the noise of each measurement after harmonization, in units of `dwi.noise_sd`; the
        present gain (`dwi.noise_gain`, or 1) if that is unknown, and for b0 volumes.
    """
    gain = dwi.noise_gain.copy() if dwi.noise_gain is not None else np.ones(len(dwi.acquisition))
    if not dwi.noise_sd:
        return gain
    slab = _slab(dwi)
    weighted = ~dwi.acquisition.b0
    noise = np.random.default_rng(seed).standard_normal(slab.signal.shape) * weighted
    noise = (ADDED_NOISE * dwi.noise_sd * noise).astype(np.float32)
    change = (harmonized.reapply(replace(slab, signal=slab.signal + noise))
              - harmonized.reapply(slab))
    for shell in dwi.acquisition.shells:
        before, after = (np.square(v[:, shell.indices].mean(axis=1), dtype=np.float64).mean()
                         for v in (noise, change))
        gain[shell.indices] *= np.sqrt(after / before)
    return gain


def widening(dwi: Dwi, errors: Sequence[float]) -> float:
    """Compute the factor by which the harmonizer's error widens the intervals of a harmonized run.

    It is √(1 + mean over shells of (error / noise)²), in the median voxel. Both are SDs of the mean
    over the n directions of a shell; the noise is that of one measurement over √n.

    Parameters
    ----------
    dwi : Dwi
        The harmonized run.
    errors : sequence of float
        `Harmonized.errors`.

    Returns
    -------
    float
        1 if the noise is unknown.
    """
    ratios = []
    for shell, error in zip(dwi.acquisition.shells, errors, strict=True):
        sigma = dwi.noise_of(shell.indices)
        level = float(np.median(dwi.signal[:, shell.indices].mean(axis=1)))
        ratios.append((error * level / sigma) ** 2 * len(shell) if sigma else 0.0)
    return float(np.sqrt(1 + np.mean(ratios)))


def _slab(dwi: Dwi) -> Dwi:
    """Select about NOISE_VOXELS voxels: whole slices, along the last axis, around the middle of the
    mask."""
    count = np.cumsum(dwi.mask.sum(axis=(0, 1)))
    middle, half = count[-1] / 2, NOISE_VOXELS / 2
    low, high = np.searchsorted(count, [middle - half, middle + half])
    mask = np.zeros_like(dwi.mask)
    mask[..., low:high + 1] = dwi.mask[..., low:high + 1]
    rows = mask[dwi.mask]
    return replace(dwi, signal=dwi.signal[rows], mask=mask,
                   tissue=None if dwi.tissue is None else dwi.tissue[rows])


def check_reference(reference: str | None, counts: Mapping[str, int]) -> None:
    """Check that the reference site exists.

    Parameters
    ----------
    reference : str or None
        Value of `--reference-batch`.
    counts : mapping of str to int
        Number of participants by site.

    Raises
    ------
    UsageError
        A reference is given, and no site has its name.
    """
    if reference is not None and reference not in counts:
        sites = ", ".join(f"{b}: {n}" for b, n in counts.items())
        raise UsageError(f"--reference-batch {reference}: no such site; found {sites}."
                         + suggest_name(reference, counts))


def runs_by_site(method: Harmonizer, cohort: Cohort) -> dict[str, pd.DataFrame]:
    """Group the runs by site, after checking that the method can be trained on them.

    Returns
    -------
    dict of str to DataFrame
        Rows of `Cohort.statistics` by site: the reference first, then the others in alphabetical
        order.

    Raises
    ------
    UsageError
        The reference site is missing or unknown, there are too few sites or too few participants
        at one, the shells of runs differ, or the method refuses a run.
    """
    batches = {str(b): rows for b, rows in cohort.statistics.groupby("batch", sort=True)}
    counts = {b: int(rows["participant"].nunique()) for b, rows in batches.items()}
    sites = ", ".join(f"{b}: {n}" for b, n in counts.items())
    reference = cohort.reference_batch
    check_reference(reference, counts)
    if reference is None:
        raise UsageError(f"--train {method.name} maps the other sites to a reference site; found "
                         f"{sites}. Name the reference with --reference-batch.")
    if len(counts) < 2:
        raise UsageError(f"--train {method.name} needs at least two sites; found one ({sites}). "
                         "Process participants of another site into the same OUTPUT_DIR, or "
                         "assign runs to sites with --batch-file or --batch-column.")
    if small := [b for b, n in counts.items() if n < method.min_participants]:
        raise UsageError(f"--train {method.name} needs at least {method.min_participants} "
                         f"participants at every site; found {sites}. Add participants to "
                         f"{', '.join(small)}, or leave the site out with --participant-label.")
    ordered = {b: batches[b] for b in (reference, *(b for b in batches if b != reference))}
    _check_runs(method, cohort, ordered, reference)
    return ordered


def _check_runs(method: Harmonizer, cohort: Cohort, batches: Mapping[str, pd.DataFrame],
                reference: str) -> None:
    """Refuse runs that `check` refuses, or with other shells than the reference's first run."""
    first_run = batches[reference]["run"].iloc[0]
    first = cohort.acquisitions[first_run]
    for batch, rows in batches.items():
        for run in rows["run"]:
            shells = cohort.acquisitions[run].shells
            if len(shells) != len(first.shells) or not all(
                    map(same_shell, shells, first.shells)):
                raise UsageError(
                    f"--train {method.name}: shells differ. {run} of {batch} has "
                    f"{describe_shells(shells)}; {first_run} of {reference} has "
                    f"{describe_shells(first.shells)}. Needed are the same b-values (within "
                    f"{SAME_B:.0%}) and b-tensor shapes. Leave runs out with --participant-label, "
                    "or select them with --bids-filter-file.")
            try:
                method.check(cohort.acquisitions[run])
            except Refusal as refusal:
                raise UsageError(f"--train {method.name}: {run} cannot be used. {refusal}") \
                    from refusal


def group_differences(method: Method, cohort: Cohort, batches: Mapping[str, pd.DataFrame]
                      ) -> list[str]:
    """Describe the sites whose participants differ from those of the reference in age or sex.

    A method that compares groups would remove that difference with the site's.

    Parameters
    ----------
    method : Method
        Named in messages.
    cohort : Cohort
        Its `covariates` are compared.
    batches : mapping of str to DataFrame
        Result of `runs_by_site`.

    Returns
    -------
    list of str
        A sentence for each site and covariate with a difference above WARN_DIFFERENCE.

    Raises
    ------
    UsageError
        A difference is above MAX_DIFFERENCE.
    """
    sentences: list[str] = []
    reference, *sources = batches
    for batch, name in product(sources, (c for c in COVARIATES if c in cohort.covariates)):
        groups = {b: batches[b].dropna(subset=name).groupby("participant")[name].first()
                  for b in (reference, batch)}
        both = pd.concat(list(groups.values()))
        if min(map(len, groups.values())) < MIN_PARTICIPANTS or both.nunique() < 2:
            continue
        group = np.repeat(np.eye(2), [len(g) for g in groups.values()], axis=0)
        share = variance_explained(encode_covariate(both), by=group)
        text = (f"{name} differs between "
                f"{' and '.join(map(_describe_group, groups, groups.values()))}, so that the site "
                f"explains {share:.0%} of its variance")
        if share > MAX_DIFFERENCE:
            raise UsageError(
                f"--train {method.name}: {text}. Up to {MAX_DIFFERENCE:.0%} is accepted, because "
                f"the effect of {name} would be removed with that of the site. Add participants, "
                "or leave out those without a match at the other site with --participant-label.")
        if share > WARN_DIFFERENCE:
            sentences.append(
                f"{text}. Part of the effect of {name} is removed with that of the site. To keep "
                f"it, matched groups ({WARN_DIFFERENCE:.0%} or less) are needed.")
    return sentences


def small_sites(batches: Mapping[str, pd.DataFrame], minimum: int) -> str:
    """List the sites with too few participants.

    Parameters
    ----------
    batches : mapping of str to DataFrame
        Rows of the statistics by site.
    minimum : int
        Number of participants below which a site is listed.

    Returns
    -------
    str
        The start of a sentence (`A has 3 participants, B has 4 participants`); empty if every site
        has enough.
    """
    counts = {b: int(rows["participant"].nunique()) for b, rows in batches.items()}
    return ", ".join(f"{b} has {n} participants" for b, n in counts.items() if n < minimum)


def _describe_group(batch: str, values: pd.Series) -> str:
    if pd.api.types.is_numeric_dtype(values):
        return f"{batch} ({values.mean():.3g} ± {values.std():.2g}, {len(values)} participants)"
    return f"{batch} ({', '.join(f'{n} {v}' for v, n in values.value_counts().items())})"


def encode_covariate(values: pd.Series) -> np.ndarray:
    """Encode a covariate as standardised columns for a linear model.

    Numbers give one column. Categories give an indicator column each, except for the first.

    Returns
    -------
    (row, column) ndarray
    """
    columns = (values.to_numpy(float)[:, None] if pd.api.types.is_numeric_dtype(values)
               else pd.get_dummies(values, dtype=float).to_numpy()[:, 1:])
    return (columns - columns.mean(axis=0)) / np.maximum(columns.std(axis=0), 1e-12)


def variance_explained(values: np.ndarray, by: np.ndarray) -> float:
    """Compute the largest share of a column's variance that a linear model explains.

    Parameters
    ----------
    values : (row, column)
        Variables to explain.
    by : (row, regressor)
        Design of the linear model, whose columns span the constant.

    Returns
    -------
    float
        Maximum over the columns of R².
    """
    residual = values - by @ np.linalg.lstsq(by, values, rcond=None)[0]
    centred = values - values.mean(axis=0)
    return float((1 - (residual**2).sum(0) / np.maximum((centred**2).sum(0), 1e-300)).max())


def model_name(method: Method, *batches: str) -> str:
    """Name the folder of a model under group/models by its method and sites.

    A site's name loses all characters but letters and digits. If it loses any, a digest of the
    whole name is appended.
    """
    def plain(batch: str) -> str:
        short = re.sub(r"[^A-Za-z0-9]", "", batch)
        return short if short == batch else (
            f"{short}{hashlib.sha256(batch.encode()).hexdigest()[:6]}")

    return "_".join([method.name, *map(plain, batches)])
