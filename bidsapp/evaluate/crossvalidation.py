"""What a harmonizer does to people it has not learned from, as it is applied to them.

The people of a fold are left out of the study, the method learns from the rest, and their scans are
harmonized. Harmonized or not, a scan is brought onto the grid of the same person's scan in the
reference batch. There, over the voxels of a tissue,

    NMSE = Σ (y − ŷ)² / Σ y²

of S/S0 along the directions of that scan, and of FA and MD of the shell alone. y and ŷ are those of
SH series of one degree and smoothing, for every method alike: what a series smooths is no
harmonization.
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
from bidsapp.checkpoint import Checkpoint, load
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.methods import Fitted, Study
from bidsapp.methods.harmonizer import Harmonizer
from bidsapp.methods.scope import hashed, short
from bidsapp.preprocess import pairs, tissue
from bidsapp.progress import track

log = logging.getLogger("qsphere")

L_MAX = 4
"""Of the series; of shells of fewer than 15 directions 2, of fewer than 6, or without a direction,
0: they have neither FA nor MD."""

ROW = ["batch", "fold", "participant", "shell", "tissue", "measure"]


def fit(method: Harmonizer, study: Study) -> Fitted:
    """What the method learns from all, with the table of its cross-validation, and the means over
    participants on the cards.

    Raises:
        UsageError: too few people for the folds; as of `method.fit`; weights to start from know
            people; a scan is not harmonized.
    """
    _unseen(method, study)
    method.ready(study)  # what is wrong without folds, too, is said first
    found = pairs.find(study.statistics, study.reference_batch or "",
                       study.paired_by == "session")
    parts, rows = folds(method, study, found), []
    with tempfile.TemporaryDirectory() as folder:
        study = replace(study, states=study.states or Path(folder))
        whole = method.fit(study)
        cards = {batch: c.card for c in whole.checkpoints.values() for batch in c.card.batches}
        for fold, people in enumerate(parts, 1):
            log.info("%s: fold %d of %d, without sub-%s", method.name, fold, len(parts),
                     ", sub-".join(people))
            rest = method.learn(_without(study, people))
            for batch, model in ((b, c) for c in rest.checkpoints.values() for b in c.card.batches):
                own = [p for p in found[batch] if p.participant in people]
                rows += [{"batch": batch, "fold": fold, **row,
                          "shell": short(cards[batch].trained_for["shells"][row["shell"]])}
                         for row in _tested(method, study, model, batch, own)]
    table = pd.DataFrame(rows).groupby(ROW, sort=False, as_index=False).sum()
    scale = table.pop("scale")
    for when in ("nmse_before", "nmse_after"):
        table[when] /= scale
    checkpoints = {name: replace(c, card=replace(c.card, metrics={
        **c.card.metrics, **_means(table, c.card.batches)}))
        for name, c in whole.checkpoints.items()}
    return replace(whole, checkpoints=checkpoints, tables={
        **whole.tables, f"desc-{method.name.removeprefix('harmonize_')}_folds": table})


def _unseen(method: Harmonizer, study: Study) -> None:
    """Raises UsageError where the training starts from weights that learned from these people."""
    if study.init is None:
        return
    try:
        learned_from = load(study.init, method.name).card.training["participants"]
    except DataError as error:
        raise UsageError(f"--init: {error}") from error
    seen = set(chain.from_iterable(learned_from.values()))
    rows = study.statistics.groupby("participant")
    if known := [str(person) for person, own in rows if seen & set(hashed({"": own})[""])]:
        raise UsageError(f"--folds {study.folds}: the weights of --init {study.init} have learned "
                         f"from sub-{', sub-'.join(known)}, who would be tested. Leave --init out, "
                         "or these people with --participant-label.")


def folds(method: Harmonizer, study: Study, found: Mapping[str, Sequence[pairs.Pair]]
          ) -> list[list[str]]:
    """The people of each fold, of every batch as many as may be.

    found: pairs by batch.

    Raises:
        UsageError: fewer people than folds were scanned in a batch and in the reference, or too few
            remain beside those of a fold.
    """
    assert study.folds
    batches: dict[str, list[str]] = {}
    for batch, own in found.items():
        people = {p.participant for p in own}
        if len(people) < study.folds:
            raise UsageError(
                f"--folds {study.folds}: {len(people)} people were scanned in {batch} and in "
                f"{study.reference_batch}. Needed are as many as folds, and enough beside those of "
                "a fold to learn from." + f" Up to {len(people)} folds may do." * (len(people) > 2))
        for person in people:
            batches.setdefault(person, []).append(batch)
    mixed = np.random.default_rng([study.seed, 1]).permutation(sorted(batches)).tolist()
    mixed.sort(key=lambda person: batches[person])
    parts = [sorted(mixed[k::study.folds]) for k in range(study.folds)]
    for part in parts:
        try:
            method.ready(_without(study, part))
        except UsageError as error:
            raise UsageError(
                f"--folds {study.folds}: without sub-{', sub-'.join(part)}, of one fold, there "
                f"is nothing to learn from. {error}"
                + f" Up to {len(batches)} folds leave more." * (len(part) > 1)) from error
    return parts


def _without(study: Study, people: Sequence[str]) -> Study:
    table = study.statistics
    return replace(study, statistics=table[~table["participant"].isin(people)], folds=None)


def _tested(method: Harmonizer, study: Study, model: Checkpoint, batch: str,
            own: Sequence[pairs.Pair]) -> Iterator[dict[str, Any]]:
    """Rows of `squares` of some pairs, and whose they are."""
    run = None
    for pair in track(own, f"{method.name}: testing"):
        source, target, move = method.register(study, pair, not method.sloppy, study.states)
        if pair.source != run:
            run = pair.source
            try:
                signal = method.harmonize(source, model, batch, study.device).signal
            except Refusal as refusal:
                raise UsageError(f"--folds {study.folds}: {run} is not harmonized. {refusal}") \
                    from refusal
        for row in squares(source, replace(source, signal=signal), target, move):
            yield {"participant": pair.participant, **row}


def squares(source: Dwi, made: Dwi, target: Dwi, move: pairs.Move) -> Iterator[dict[str, Any]]:
    """For each shell (its index), tissue and measure the sum of square errors before (of `source`)
    and after (of `made`), and of squares of the target (scale)."""
    labels, truth = move.labels[move.where], pairs.ratios(target, move)
    for k, (shell, own) in enumerate(zip(target.acquisition.shells, source.acquisition.shells,
                                         strict=True)):
        bvecs = target.acquisition.bvecs[shell.indices]
        x = tensor.design(target.acquisition.btensors[shell.indices])[:, :6]
        directed = np.linalg.matrix_rank(x) == x.shape[1]
        l_max = sh.degree_for(float(min(len(shell), len(own))), L_MAX) if directed else 0
        basis = sh.basis(l_max, bvecs).astype(np.float32)
        fit = sh.smooth_fit(l_max, bvecs, pairs.SMOOTHING).astype(np.float32)
        series = [truth[:, shell.indices] @ fit.T,
                  *(pairs.carried(dwi.of(own), l_max, move)[0, 1:-1, 1:-1, 1:-1][move.where]
                    for dwi in (source, made))]
        measures = [_measures(c @ basis.T, x if l_max else None) for c in series]
        for name, value in tissue.NAMES.items():
            where = labels == value
            for measure in measures[0]:
                y, before, after = (m[measure][where].astype(np.float64) for m in measures)
                yield {"shell": k, "tissue": name, "measure": measure,
                       "nmse_before": np.square(before - y).sum(),
                       "nmse_after": np.square(after - y).sum(), "scale": np.square(y).sum()}


def _measures(signal: np.ndarray, design: np.ndarray | None) -> dict[str, np.ndarray]:
    """S/S0 itself, FA and MD where it has a tensor."""
    if design is None:
        return {"signal": signal}
    fa, md = tensor.of_attenuation(torch.from_numpy(signal),
                                   torch.from_numpy(np.linalg.pinv(design)).float())
    return {"signal": signal, "fa": fa.numpy(), "md": md.numpy()}


def _means(table: pd.DataFrame, batches: Sequence[str]) -> dict[str, float]:
    """Over participants, for a card."""
    own = table[table["batch"].isin(batches)]
    found = own.groupby(["batch", "measure", "tissue", "shell"], as_index=False)[
        ["nmse_before", "nmse_after"]].mean()
    return {"_".join([when, row["measure"], row["tissue"], row["shell"],
                      *([row["batch"]] if len(batches) > 1 else [])]): row[when]
            for row in found.to_dict("records") for when in ("nmse_before", "nmse_after")}
