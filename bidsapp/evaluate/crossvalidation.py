"""K-fold cross-validation of a harmonizer over participants scanned at a site and the reference.

The participants of a fold are held out, the method learns from the others, and the scans of the
held-out participants are harmonized. Measured and harmonized scans are resampled on the grid of the
same participant's scan at the reference site. With y that scan, and ŷ the measured or the
harmonized one, over the voxels of a tissue,

    NMSE = Σ (y − ŷ)² / Σ y²

    bias = mean of ŷ − y

are computed for S/S0 along the directions of y, and for FA and MD of each shell alone. y and ŷ come
from SH series of the same degree and smoothing for all methods, so that the smoothing of a series
does not count as harmonization. `biology` judges the differences between participants and the local
contrast.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bidsapp import sh, tensor
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import Checkpoint, load
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.evaluate import biology
from bidsapp.harmonization import pairs
from bidsapp.harmonization.harmonizer import Harmonizer
from bidsapp.harmonization.scope import hash_participants
from bidsapp.kinds import Cohort, Fitted, TrainingSettings
from bidsapp.progress import track

log = logging.getLogger("qsphere")

L_MAX = 4
"""Maximum degree of the series. It is 2 for shells of fewer than 15 directions, and 0, without FA
and MD, for fewer than 6 and for encodings without a direction."""

ROW = ["batch", "fold", "participant", "shell", "tissue", "measure"]
"""Columns that identify a row of the table of a cross-validation."""

PER = {"nmse": "scale", "bias": "voxels", "mean": "voxels", "contrast": "edges"}
"""Columns of `sum_squares` by which its sums are divided, by the name of the sum."""

SHOWN = 3
"""Number of measures that a warning names; the table holds all."""

WORSE_BIAS = 0.01
"""Minimum growth of a bias that is reported, as a share of the mean at the reference site."""


def fit(method: Harmonizer, cohort: Cohort, settings: TrainingSettings) -> Fitted:
    """Train a method on all participants, and cross-validate it.

    Parameters
    ----------
    method : Harmonizer
    cohort : Cohort
    settings : TrainingSettings
        `folds` is the number of folds.

    Returns
    -------
    Fitted
        The result of `method.fit` with all participants. Added are the tables of the
        cross-validation and of its effects (`biology.judge_folds`) and, on the model cards, means
        over participants and warnings.

    Raises
    ------
    UsageError
        `method.fit` refuses the cohort, there are too few participants for the folds, the initial
        weights learned from participants of the cohort, or a scan cannot be harmonized.
    """
    _check_init(method, cohort, settings)
    method.preflight(cohort)  # report problems that do not depend on the folds first
    by_site = pairs.pair_runs(cohort.statistics, cohort.reference_batch or "",
                              cohort.paired_by == "session")
    folds, rows = split_folds(method, cohort, settings, by_site), []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, states=settings.states or Path(folder))
        whole = method.fit(cohort, settings)
        assert settings.states
        method.register_all(cohort, [*chain.from_iterable(by_site.values())],
                            not method.context.sloppy, settings.states, settings)
        cards = {batch: c.card for c in whole.checkpoints.values() for batch in c.card.batches}
        for fold, people in enumerate(folds, 1):
            log.info("%s: fold %d of %d, without sub-%s", method.name, fold, len(folds),
                     ", sub-".join(people))
            rest = method._fit(_without(cohort, people), settings)
            for batch, model in ((b, c) for c in rest.checkpoints.values() for b in c.card.batches):
                tested = [p for p in by_site[batch] if p.participant in people]
                rows += [{"batch": batch, "fold": fold, **row,
                          "shell": cards[batch].trained_for.shells[row["shell"]].name}
                         for row in _test_pairs(method, cohort, settings, model, batch, tested)]
    table = _divide(pd.DataFrame(rows).groupby(ROW, sort=False, as_index=False).sum())
    effects = biology.judge_folds(table, cohort.statistics)
    checkpoints, notices = {}, list(whole.notices)
    for name, checkpoint in whole.checkpoints.items():
        batches = checkpoint.card.batches
        of_model = effects[effects["batch"].isin(batches)]
        warnings = describe_deterioration(table[table["batch"].isin(batches)], of_model)
        for warning in warnings:
            log.warning("%s: %s", name, warning)
        notices += [f"{name}: {warning}" for warning in warnings]
        checkpoints[name] = replace(checkpoint, card=replace(
            checkpoint.card, warnings=tuple(warnings), metrics={
                **checkpoint.card.metrics, **_means(table, batches),
                **_effect_metrics(of_model, batches)}))
    short_name = method.name.removeprefix("harmonize_")
    tables = {f"desc-{short_name}_folds": table, f"desc-{short_name}_biology": effects}
    return replace(whole, checkpoints=checkpoints, notices=notices, tables={
        **whole.tables, **{k: t for k, t in tables.items() if len(t)}})


def describe_deterioration(table: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    """Describe in sentences what a model makes worse in held-out participants.

    Parameters
    ----------
    table
        Rows of a cross-validation for the sites of the model.
    effects
        `biology.judge_folds` of these rows.

    Returns
    -------
    list of str
        The measures whose mean NMSE rose, the maps (FA and MD) whose absolute mean bias grew by
        more than WORSE_BIAS of the mean, and the effects that are lost or exaggerated.
    """
    means = table.groupby(["measure", "tissue", "shell", "batch"], as_index=False,
                          sort=False).mean(numeric_only=True)
    sentences = []
    rows = means.to_dict("records")
    maps = [row for row in rows if row["measure"] in biology.MAPS]
    errors = {f"{biology.place(row)} ({100 * growth:+.0f} %)": growth for row in rows
              if (growth := row["nmse_after"] / row["nmse_before"] - 1) > 0}
    biased = {f"{biology.place(row)} (from {row['bias_before']:+.2g} to {row['bias_after']:+.2g})":
              growth for row in maps
              if (growth := (abs(row["bias_after"]) - abs(row["bias_before"])) / abs(
                  row["mean_before"] - row["bias_before"])) > WORSE_BIAS}
    for what, growths, among in (("error", errors, rows), ("mean bias", biased, maps)):
        if growths:
            worst = sorted(growths, key=lambda name: -growths[name])
            sentences.append(
                f"in cross-validation the {what} in held-out participants grew for {len(worst)} of "
                f"{len(among)} measures, most for {'; '.join(worst[:SHOWN])}. Do not use "
                + ("this model." if len(worst) == len(among) else "harmonized maps of these.")
                + " Train with more participants, or use another method.")
    for verdict, change in biology.CHANGES.items():
        if names := biology.name_effects(effects, verdict):
            sentences.append(
                f"in cross-validation more than {100 * biology.LOSS:.0f} % was {change} effects in "
                f"held-out participants: {'; '.join(names)}. Do not study these effects in "
                "harmonized maps. Train with more participants, or use another method.")
    return sentences


def _check_init(method: Harmonizer, cohort: Cohort, settings: TrainingSettings) -> None:
    """Refuse initial weights that learned from participants of the cohort."""
    if settings.init is None:
        return
    try:
        learned_from = load(settings.init, method.name).card.training["participants"]
    except DataError as error:
        raise UsageError(f"--init: {error}") from error
    hashes = set(chain.from_iterable(learned_from.values()))
    rows = cohort.statistics.groupby("participant")
    if learned := [str(person) for person, of_person in rows if hashes & set(
            hash_participants({"": of_person})[""])]:
        raise UsageError(f"--folds {settings.folds}: the weights of --init {settings.init} have "
                         f"learned from sub-{', sub-'.join(learned)}. The test needs participants "
                         "that no training used. Leave --init out, or leave these participants "
                         "out with --participant-label.")


def split_folds(method: Harmonizer, cohort: Cohort, settings: TrainingSettings,
                by_site: Mapping[str, Sequence[pairs.Pair]]) -> list[list[str]]:
    """Split the participants into folds, with those of the same sites spread evenly.

    Parameters
    ----------
    method : Harmonizer
        Checks that the participants outside a fold suffice for a training.
    cohort : Cohort
    settings : TrainingSettings
        Number of folds, and seed.
    by_site : mapping of str to sequence of Pair
        Pairs of each site with the reference.

    Returns
    -------
    list of list of str
        Participants of each fold.

    Raises
    ------
    UsageError
        Fewer participants than folds were scanned at a site and at the reference, or the
        participants outside a fold are too few for a training.
    """
    assert settings.folds
    sites_of: dict[str, list[str]] = {}
    for batch, scans in by_site.items():
        people = {p.participant for p in scans}
        if len(people) < settings.folds:
            raise UsageError(
                f"--folds {settings.folds}: {len(people)} participants were scanned at {batch} and "
                f"at {cohort.reference_batch}. Needed are at least as many as folds, and enough "
                "outside each fold to learn from."
                + f" Use up to {len(people)} folds." * (len(people) > 2))
        for person in people:
            sites_of.setdefault(person, []).append(batch)
    shuffled = np.random.default_rng([settings.seed, 1]).permutation(sorted(sites_of)).tolist()
    shuffled.sort(key=lambda person: sites_of[person])
    folds = [sorted(shuffled[k::settings.folds]) for k in range(settings.folds)]
    for fold in folds:
        try:
            method.preflight(_without(cohort, fold))
        except UsageError as error:
            raise UsageError(
                f"--folds {settings.folds}: without the participants of one fold, "
                f"sub-{', sub-'.join(fold)}, the training is not possible. {error}"
                + f" More folds, up to {len(sites_of)}, hold fewer participants out."
                * (len(fold) > 1)) from error
    return folds


def _without(cohort: Cohort, people: Sequence[str]) -> Cohort:
    table = cohort.statistics
    return replace(cohort, statistics=table[~table["participant"].isin(people)])


def _test_pairs(method: Harmonizer, cohort: Cohort, settings: TrainingSettings, model: Checkpoint,
                batch: str, scans: Sequence[pairs.Pair]) -> Iterator[dict[str, Any]]:
    """Harmonize the sources of some pairs, and yield the rows of `sum_squares` with the
    participant."""
    run = None
    for pair in track(scans, f"{method.name}: testing"):
        source, target, registration = method.register(
            cohort, pair, not method.context.sloppy, settings.states, settings.device)
        if pair.source != run:
            run = pair.source
            try:
                signal = method.harmonize(source, model, batch, settings.device).signal
            except Refusal as refusal:
                raise UsageError(f"--folds {settings.folds}: {run} cannot be harmonized. "
                                 f"{refusal}") from refusal
        for row in sum_squares(source, replace(source, signal=signal), target, registration):
            yield {"participant": pair.participant, **row}


def sum_squares(source: Dwi, harmonized: Dwi, target: Dwi, registration: pairs.Registration
                ) -> Iterator[dict[str, Any]]:
    """Sum errors, values and contrast over the voxels of each tissue, to be divided later (PER).

    Parameters
    ----------
    source, harmonized : Dwi
        A run before and after harmonization.
    target : Dwi
        The same participant's run at the reference site.
    registration : Registration
        Registration of the target to the source. Sums are over its `overlap`, on the target's grid.

    Yields
    ------
    dict
        shell (its index), tissue and measure; nmse, bias, mean and contrast (`biology`), each
        before and after, as sums; scale, the sum of the target's squares; voxels, the number of
        values; and edges, the sum of squares of the target's differences between neighbours. The
        signal has no contrast.
    """
    inside = registration.overlap
    labels, truth = registration.labels[inside], pairs.attenuation(target, registration)
    neighbours = biology.neighbours(inside, registration.labels)
    for k, (shell, source_shell) in enumerate(zip(
            target.acquisition.shells, source.acquisition.shells, strict=True)):
        bvecs = target.acquisition.bvecs[shell.indices]
        x = tensor.design(target.acquisition.btensors[shell.indices])[:, :6]
        has_tensor = np.linalg.matrix_rank(x) == x.shape[1]
        n_directions = float(min(len(shell), len(source_shell)))
        l_max = sh.degree_for(n_directions, L_MAX) if has_tensor else 0
        basis = sh.basis(l_max, bvecs).astype(np.float32)
        fit = sh.smooth_fit(l_max, bvecs, pairs.SMOOTHING).astype(np.float32)
        # of the target, of the source, and of the harmonized source
        series = [truth[:, shell.indices] @ fit.T,
                  *(pairs.resample(dwi.select_shell(source_shell), l_max, registration)
                    [0, 1:-1, 1:-1, 1:-1][inside] for dwi in (source, harmonized))]
        measures = [_measures(c @ basis.T, x if l_max else None) for c in series]
        for name, value in tissue.NAMES.items():
            rows, first, second = labels == value, *neighbours[:, labels[neighbours[0]] == value]
            for measure in measures[0]:
                maps = [m[measure].astype(np.float64) for m in measures]
                y, *both = (m[rows] for m in maps)
                y_steps, *both_steps = ((m[second] - m[first] for m in maps) if measure
                                        in biology.MAPS else (np.zeros(0),) * 3)
                row = {"shell": k, "tissue": name, "measure": measure, "voxels": y.size,
                       "scale": np.square(y).sum(), "edges": np.square(y_steps).sum()}
                for when, values, steps in zip(("before", "after"), both, both_steps, strict=True):
                    row |= {f"nmse_{when}": np.square(values - y).sum(),
                            f"bias_{when}": (values - y).sum(),
                            f"mean_{when}": values.sum(),
                            f"contrast_{when}": (steps * y_steps).sum()}
                yield row


def _divide(sums: pd.DataFrame) -> pd.DataFrame:
    """Divide the rows of `sum_squares`, added up by ROW, by their divisors."""
    table = sums[ROW].copy()
    for name, by in PER.items():
        for when in ("before", "after"):
            # 0 / 0 is NaN, without a warning
            table[f"{name}_{when}"] = sums[f"{name}_{when}"] / sums[by].where(sums[by] > 0)
    return table


def _measures(signal: np.ndarray, design: np.ndarray | None) -> dict[str, np.ndarray]:
    """Compute the measures of S/S0: the signal itself, and FA and MD if there is a design."""
    if design is None:
        return {"signal": signal}
    fa, md = tensor.fa_and_md(torch.from_numpy(signal),
                              torch.from_numpy(np.linalg.pinv(design)).float())
    return {"signal": signal, "fa": fa.numpy(), "md": md.numpy() / 1000}  # mm²/s


def _means(table: pd.DataFrame, batches: Sequence[str]) -> dict[str, float]:
    """Average errors and biases over participants, for a card."""
    of_model = table[table["batch"].isin(batches)]
    columns = [f"{what}_{when}" for what in ("nmse", "bias") for when in ("before", "after")]
    means = of_model.groupby(["batch", "measure", "tissue", "shell"],
                             as_index=False)[columns].mean()
    return {_metric(column, row, batches): row[column] for row in means.to_dict("records")
            for column in columns}


def _effect_metrics(effects: pd.DataFrame, batches: Sequence[str]
                    ) -> dict[str, list[float | None]]:
    """List the ratio of each effect and the ends of its interval, None if missing, for a card."""
    return {_metric(f"kept_{row['effect']}", row, batches): [
        row[k] if row[k] == row[k] else None for k in ("ratio", "low", "high")]
        for row in effects.to_dict("records")}


def _metric(name: str, row: Mapping[Any, Any], batches: Sequence[str]) -> str:
    return "_".join([name, row["measure"], row["tissue"], row["shell"],
                     *([row["batch"]] if len(batches) > 1 else [])])
