"""What a harmonizer does to people it has not learned from, as it is applied to them.

The people of a fold are left out of the cohort, the method learns from the rest, and their scans
are harmonized. Harmonized or not, a scan is brought onto the grid of the same person's scan in the
reference batch. There, over the voxels of a tissue,

    NMSE = Σ (y − ŷ)² / Σ y²

    bias = mean of ŷ − y

of S/S0 along the directions of that scan, and of FA and MD of the shell alone. y and ŷ are those of
SH series of one degree and smoothing, for every method alike: what a series smooths is no
harmonization. What remains of differences between the people, and of local contrast, is judged in
`biology`.
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
"""Of the series; of shells of fewer than 15 directions 2, of fewer than 6, or without a direction,
0: they have neither FA nor MD."""

ROW = ["batch", "fold", "participant", "shell", "tissue", "measure"]

PER = {"nmse": "scale", "bias": "voxels", "mean": "voxels", "contrast": "edges"}
"""What a sum of `squares` is divided by."""

SHOWN = 3
"""Measures that a warning names; the table holds all."""

WORSE_BIAS = 0.01
"""Share of the mean by which a bias must grow before it is said to have risen."""


def fit(method: Harmonizer, cohort: Cohort, settings: TrainingSettings) -> Fitted:
    """What the method learns from all, with the table of its cross-validation, and the means over
    participants on the cards.

    Raises:
        UsageError: too few people for the folds; as of `method.fit`; weights to start from know
            people; a scan is not harmonized.
    """
    _unseen(method, cohort, settings)
    method.preflight(cohort)  # what is wrong without folds, too, is said first
    found = pairs.find(cohort.statistics, cohort.reference_batch or "",
                       cohort.paired_by == "session")
    parts, rows = folds(method, cohort, settings, found), []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, states=settings.states or Path(folder))
        whole = method.fit(cohort, settings)
        assert settings.states
        method.register_all(cohort, [*chain.from_iterable(found.values())],
                            not method.context.sloppy, settings.states, settings)
        cards = {batch: c.card for c in whole.checkpoints.values() for batch in c.card.batches}
        for fold, people in enumerate(parts, 1):
            log.info("%s: fold %d of %d, without sub-%s", method.name, fold, len(parts),
                     ", sub-".join(people))
            rest = method._fit(_without(cohort, people), settings)
            for batch, model in ((b, c) for c in rest.checkpoints.values() for b in c.card.batches):
                own = [p for p in found[batch] if p.participant in people]
                rows += [{"batch": batch, "fold": fold, **row,
                          "shell": cards[batch].trained_for.shells[row["shell"]].name}
                         for row in _tested(method, cohort, settings, model, batch, own)]
    table = _divided(pd.DataFrame(rows).groupby(ROW, sort=False, as_index=False).sum())
    effects = biology.of_folds(table, cohort.statistics)
    checkpoints, notices = {}, list(whole.notices)
    for name, checkpoint in whole.checkpoints.items():
        batches = checkpoint.card.batches
        left = effects[effects["batch"].isin(batches)]
        warnings = doubts(table[table["batch"].isin(batches)], left)
        for warning in warnings:
            log.warning("%s: %s", name, warning)
        notices += [f"{name}: {warning}" for warning in warnings]
        checkpoints[name] = replace(checkpoint, card=replace(
            checkpoint.card, warnings=tuple(warnings), metrics={
                **checkpoint.card.metrics, **_means(table, batches), **_kept(left, batches)}))
    short_name = method.name.removeprefix("harmonize_")
    tables = {f"desc-{short_name}_folds": table, f"desc-{short_name}_biology": effects}
    return replace(whole, checkpoints=checkpoints, notices=notices, tables={
        **whole.tables, **{k: t for k, t in tables.items() if len(t)}})


def doubts(table: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """Say in sentences what a model does worse than nothing to people not learned from.

    Parameters
    ----------
    table
        Rows of a cross-validation, of the model's batches.
    found
        `biology.of_folds` of them.

    Returns
    -------
    list of str
        Where the mean error of the signal, FA or MD rose, or the size of the mean bias of FA or MD
        grew by more than WORSE_BIAS of the mean; and which effects are lost or exaggerated.
    """
    means = table.groupby(["measure", "tissue", "shell", "batch"], as_index=False,
                          sort=False).mean(numeric_only=True)
    told = []
    rows = means.to_dict("records")
    maps = [row for row in rows if row["measure"] in biology.MAPS]
    rose = {f"{biology.place(row)} ({100 * growth:+.0f} %)": growth for row in rows
            if (growth := row["nmse_after"] / row["nmse_before"] - 1) > 0}
    biased = {f"{biology.place(row)} (from {row['bias_before']:+.2g} to {row['bias_after']:+.2g})":
              growth for row in maps
              if (growth := (abs(row["bias_after"]) - abs(row["bias_before"])) / abs(
                  row["mean_before"] - row["bias_before"])) > WORSE_BIAS}
    for what, found_in, among in (("error", rose, rows), ("mean bias", biased, maps)):
        if found_in:
            worst = sorted(found_in, key=lambda name: -found_in[name])
            told.append(
                f"in cross-validation the {what} grew for {len(worst)} of {len(among)} measures of "
                f"people not learned from, most for {'; '.join(worst[:SHOWN])}. Do not use "
                + ("this model." if len(worst) == len(among) else "harmonized maps of these.")
                + " Train with more people, or take another method.")
    for kind, what in biology.CHANGES.items():
        if effects := biology.name_effects(found, kind):
            told.append(f"in people not learned from more than {100 * biology.LOSS:.0f} % was "
                        f"{what}: {'; '.join(effects)} (cross-validation). Do not study these "
                        "effects in harmonized maps; train with more people, or another method.")
    return told


def _unseen(method: Harmonizer, cohort: Cohort, settings: TrainingSettings) -> None:
    """Raises UsageError where the training starts from weights that learned from these people."""
    if settings.init is None:
        return
    try:
        learned_from = load(settings.init, method.name).card.training["participants"]
    except DataError as error:
        raise UsageError(f"--init: {error}") from error
    seen = set(chain.from_iterable(learned_from.values()))
    rows = cohort.statistics.groupby("participant")
    if known := [str(person) for person, own in rows if seen & set(
            hash_participants({"": own})[""])]:
        raise UsageError(f"--folds {settings.folds}: the weights of --init {settings.init} have "
                         f"learned from sub-{', sub-'.join(known)}, who would be tested. Leave "
                         "--init out, or these people with --participant-label.")


def folds(method: Harmonizer, cohort: Cohort, settings: TrainingSettings,
          found: Mapping[str, Sequence[pairs.Pair]]) -> list[list[str]]:
    """The people of each fold, of every batch as many as may be.

    found: pairs by batch.

    Raises:
        UsageError: fewer people than folds were scanned in a batch and in the reference, or too few
            remain beside those of a fold.
    """
    assert settings.folds
    batches: dict[str, list[str]] = {}
    for batch, own in found.items():
        people = {p.participant for p in own}
        if len(people) < settings.folds:
            raise UsageError(
                f"--folds {settings.folds}: {len(people)} people were scanned in {batch} and in "
                f"{cohort.reference_batch}. Needed are as many as folds, and enough beside those "
                "of a fold to learn from."
                + f" Up to {len(people)} folds may do." * (len(people) > 2))
        for person in people:
            batches.setdefault(person, []).append(batch)
    mixed = np.random.default_rng([settings.seed, 1]).permutation(sorted(batches)).tolist()
    mixed.sort(key=lambda person: batches[person])
    parts = [sorted(mixed[k::settings.folds]) for k in range(settings.folds)]
    for part in parts:
        try:
            method.preflight(_without(cohort, part))
        except UsageError as error:
            raise UsageError(
                f"--folds {settings.folds}: without sub-{', sub-'.join(part)}, of one fold, there "
                f"is nothing to learn from. {error}"
                + f" Up to {len(batches)} folds leave more." * (len(part) > 1)) from error
    return parts


def _without(cohort: Cohort, people: Sequence[str]) -> Cohort:
    table = cohort.statistics
    return replace(cohort, statistics=table[~table["participant"].isin(people)])


def _tested(method: Harmonizer, cohort: Cohort, settings: TrainingSettings, model: Checkpoint,
            batch: str, own: Sequence[pairs.Pair]) -> Iterator[dict[str, Any]]:
    """Rows of `squares` of some pairs, and whose they are."""
    run = None
    for pair in track(own, f"{method.name}: testing"):
        source, target, registration = method.register(
            cohort, pair, not method.context.sloppy, settings.states, settings.device)
        if pair.source != run:
            run = pair.source
            try:
                signal = method.harmonize(source, model, batch, settings.device).signal
            except Refusal as refusal:
                raise UsageError(f"--folds {settings.folds}: {run} is not harmonized. {refusal}") \
                    from refusal
        for row in squares(source, replace(source, signal=signal), target, registration):
            yield {"participant": pair.participant, **row}


def squares(source: Dwi, made: Dwi, target: Dwi, registration: pairs.Registration
            ) -> Iterator[dict[str, Any]]:
    """Sum over voxels what is to be divided (PER), for each shell (its index), tissue and measure.

    Yields
    ------
    dict
        nmse, bias, mean and contrast (`biology`), each before (of `source`) and after (of `made`);
        scale, the squares of the target; voxels; and edges, the squares of the target's steps. Of
        the signal there is no contrast.
    """
    inside = registration.overlap
    labels, truth = registration.labels[inside], pairs.attenuation(target, registration)
    steps = biology.neighbours(inside, registration.labels)
    for k, (shell, own) in enumerate(zip(target.acquisition.shells, source.acquisition.shells,
                                         strict=True)):
        bvecs = target.acquisition.bvecs[shell.indices]
        x = tensor.design(target.acquisition.btensors[shell.indices])[:, :6]
        directed = np.linalg.matrix_rank(x) == x.shape[1]
        l_max = sh.degree_for(float(min(len(shell), len(own))), L_MAX) if directed else 0
        basis = sh.basis(l_max, bvecs).astype(np.float32)
        fit = sh.smooth_fit(l_max, bvecs, pairs.SMOOTHING).astype(np.float32)
        series = [truth[:, shell.indices] @ fit.T,
                  *(pairs.resample(dwi.select_shell(own), l_max, registration)
                    [0, 1:-1, 1:-1, 1:-1][inside] for dwi in (source, made))]
        measures = [_measures(c @ basis.T, x if l_max else None) for c in series]
        for name, value in tissue.NAMES.items():
            where, edges = labels == value, steps[:, labels[steps[0]] == value]
            for measure in measures[0]:
                every = [m[measure].astype(np.float64) for m in measures]
                y, *both = (m[where] for m in every)
                rise, *rises = ((m[edges[1]] - m[edges[0]] for m in every) if measure
                                in biology.MAPS else (np.zeros(0),) * 3)
                row = {"shell": k, "tissue": name, "measure": measure, "voxels": y.size,
                       "scale": np.square(y).sum(), "edges": np.square(rise).sum()}
                for when, own_values, own_rise in zip(("before", "after"), both, rises,
                                                      strict=True):
                    row |= {f"nmse_{when}": np.square(own_values - y).sum(),
                            f"bias_{when}": (own_values - y).sum(),
                            f"mean_{when}": own_values.sum(),
                            f"contrast_{when}": (own_rise * rise).sum()}
                yield row


def _divided(sums: pd.DataFrame) -> pd.DataFrame:
    """Rows of `squares`, added up by ROW, as means."""
    found = sums[ROW].copy()
    for name, by in PER.items():
        for when in ("before", "after"):
            # nothing over nothing is unknown
            found[f"{name}_{when}"] = sums[f"{name}_{when}"] / sums[by].where(sums[by] > 0)
    return found


def _measures(signal: np.ndarray, design: np.ndarray | None) -> dict[str, np.ndarray]:
    """S/S0 itself, FA and MD where it has a tensor."""
    if design is None:
        return {"signal": signal}
    fa, md = tensor.of_attenuation(torch.from_numpy(signal),
                                   torch.from_numpy(np.linalg.pinv(design)).float())
    return {"signal": signal, "fa": fa.numpy(), "md": md.numpy() / 1000}  # mm²/s


def _means(table: pd.DataFrame, batches: Sequence[str]) -> dict[str, float]:
    """Errors and biases over participants, for a card."""
    own = table[table["batch"].isin(batches)]
    columns = [f"{what}_{when}" for what in ("nmse", "bias") for when in ("before", "after")]
    found = own.groupby(["batch", "measure", "tissue", "shell"], as_index=False)[columns].mean()
    return {_metric(column, row, batches): row[column] for row in found.to_dict("records")
            for column in columns}


def _kept(found: pd.DataFrame, batches: Sequence[str]) -> dict[str, list[float | None]]:
    """Of each effect the ratio and the ends of its interval, None where it has none, for a card."""
    return {_metric(f"kept_{row['effect']}", row, batches): [
        row[k] if row[k] == row[k] else None for k in ("ratio", "low", "high")]
        for row in found.to_dict("records")}


def _metric(name: str, row: Mapping[Any, Any], batches: Sequence[str]) -> str:
    return "_".join([name, row["measure"], row["tissue"], row["shell"],
                     *([row["batch"]] if len(batches) > 1 else [])])
