"""What the methods that map a batch to a reference batch share: which studies carry a training,
what a card says of the data, and whether a run lies within it."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from bidsapp.acquisition import Acquisition, Shell
from bidsapp.checkpoint import Card
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.methods import Fitted, Method, Study
from bidsapp.preprocess import pairs, tissue

log = logging.getLogger("qsphere")

MIN_PARTICIPANTS = 2
"""Of every batch: with one, a site is a person."""

SAME_B, SAME_SHAPE = 0.05, 0.05
"""Shells are the same where b differs by at most this share, and b_delta by at most this."""

DIRECTIONS = 0.1
"""Share by which the directions of a shell may be fewer or more than any seen in training, as
where a volume was dropped."""

VOXEL = 0.05
"""Share by which an edge of the voxel may be shorter or longer than any seen in training."""

INVALID = 0.01
"""Share of NaN or infinite values in a scan to learn from, at most."""

COVARIATES = ("age", "sex")
"""Whose ranges a card tells."""

CONFOUNDED = 0.9
"""Share of a covariate's variance that batches may explain before ComBat, which keeps it, would
remove it with the batch."""

UNLIKE, UNMATCHED = 0.1, 0.5
"""The same share where nothing keeps the covariate: above the first, which for two groups of one
size is a difference of 2/3 SD, the groups are said to differ; above the second they are refused."""

OVERRIDE = "--allow-extrapolation goes on all the same, and notes it in every sidecar."


class Harmonizer(Method):
    """A method that `group --train … --reference-batch` trains and `--harmonize` applies.

    least: participants whom every batch must have.
    """

    least: ClassVar[int] = MIN_PARTICIPANTS

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where there is no b0 to divide by, or nothing weighted."""
        if not acquisition.b0.any() or not acquisition.shells:
            raise Refusal(f"{self.name} found {int(acquisition.b0.sum())} volumes without "
                          f"weighting and {shown(acquisition.shells)}. Needed are a b0 and a "
                          "shell. Leave the run out, or acquire them.")

    def ready(self, study: Study) -> list[str]:
        """Sentences on what makes a training doubtful.

        Raises:
            UsageError: the study cannot carry one (`members`), as far as its tables tell.
        """
        members(self, study)
        return []

    @abstractmethod
    def learn(self, study: Study) -> Fitted:
        """Models of a study that is ready.

        Raises:
            UsageError: a scan cannot be used.
        """

    def fit(self, study: Study) -> Fitted:
        """`learn`, where the study is ready.

        Raises:
            UsageError: as of `ready` and `learn`.
        """
        for sentence in self.ready(study):
            log.warning("%s: %s", self.name, sentence)
        if study.states:
            study.states.mkdir(parents=True, exist_ok=True)
        return self.learn(study)

    def load(self, study: Study, run: str) -> Dwi:
        """A scan to learn from.

        Raises:
            UsageError: more than INVALID of its values were not finite, or any still is.
        """
        assert study.load is not None
        dwi = study.load(run)
        bad = dwi.invalid + int((~np.isfinite(dwi.signal)).sum())
        if bad > INVALID * dwi.signal.size or not np.isfinite(dwi.signal).all():
            raise UsageError(
                f"--train {self.name}: {bad} values of {run} are NaN or infinite "
                f"({bad / dwi.signal.size:.1%}; up to {INVALID:.0%} is accepted, read as 0). "
                "Convert or preprocess the scan again, or leave it out with --participant-label.")
        return dwi

    def register(self, study: Study, pair: pairs.Pair, deformable: bool, folder: Path | None
                 ) -> tuple[Dwi, Dwi, pairs.Move]:
        """Source, target, and where this lies in that; kept in the folder, if any.

        Raises:
            UsageError: a scan cannot be used, they show not the same, or hardly any tissue.
        """
        source, both = self.load(study, pair.source), pair.kind == pairs.BOTH
        target = source if pair.target == pair.source else self.load(study, pair.target)
        try:
            move = pairs.register(source, target, deformable=deformable and both,
                                  device=study.device, work_dir=folder,
                                  rigid=None if both else np.eye(4))
        except DataError as error:
            raise UsageError(f"--train {self.name}: {pair.source} and {pair.target}: {error} Or "
                             "leave one out with --participant-label.") from error
        if min((move.labels == k).sum() for k in tissue.NAMES.values()) < tissue.MIN_VOXELS:
            raise UsageError(
                f"--train {self.name}: {pair.target} shows {int((move.labels > 0).sum())} voxels "
                f"of grey and white matter, fewer than {tissue.MIN_VOXELS} of one of them. Check "
                "the brain mask, or leave the participant out with --participant-label.")
        return source, target, move


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing where no known name is like it."""
    known = list(known)
    near = (difflib.get_close_matches(name, known, 1, 0.4)
            or [k for k in known if name and name.lower() in k.lower()])
    return f" Did you mean {near[0]}?" if near else ""


def known_reference(reference: str | None, counts: Mapping[str, int]) -> None:
    """Raises UsageError where the reference is given and no batch. counts: people by batch."""
    if reference is not None and reference not in counts:
        found = ", ".join(f"{b}: {n}" for b, n in counts.items())
        raise UsageError(f"--reference-batch {reference}: no such batch; found {found}."
                         + nearest(reference, counts))


def members(method: Harmonizer, study: Study) -> dict[str, pd.DataFrame]:
    """The runs of each batch (rows of the statistics), the reference first, in order of names.

    Raises:
        UsageError: no reference batch is given, or no batch has its name; fewer than two batches,
            or people in one; runs differ in their shells, or the method refuses one.
    """
    batches = {str(b): rows for b, rows in study.statistics.groupby("batch", sort=True)}
    counts = {b: int(rows["participant"].nunique()) for b, rows in batches.items()}
    found = ", ".join(f"{b}: {n}" for b, n in counts.items())
    reference = study.reference_batch
    known_reference(reference, counts)
    if reference is None:
        raise UsageError(f"--train {method.name} maps the other batches to one; found {found}. "
                         "Name it with --reference-batch.")
    if len(counts) < 2:
        raise UsageError(f"--train {method.name} needs at least two batches; found one ({found}). "
                         "Process participants of another site into the same OUTPUT_DIR, or tell "
                         "the sites apart with --batch-file or --batch-column.")
    if small := [b for b, n in counts.items() if n < method.least]:
        raise UsageError(f"--train {method.name} needs at least {method.least} participants in "
                         f"every batch; found {found}. Add participants to {', '.join(small)}, or "
                         "leave it out with --participant-label.")
    ordered = {b: batches[b] for b in (reference, *(b for b in batches if b != reference))}
    first = study.acquisitions[ordered[reference]["run"].iloc[0]]
    for batch, rows in ordered.items():
        for run in rows["run"]:
            shells = study.acquisitions[run].shells
            if len(shells) != len(first.shells) or not all(map(same, shells, first.shells)):
                raise UsageError(
                    f"--train {method.name}: shells differ. {run} of {batch} has {shown(shells)}; "
                    f"{ordered[reference]['run'].iloc[0]} of {reference} has "
                    f"{shown(first.shells)}. Needed are the same b-values (within {SAME_B:.0%}) "
                    "and b-tensor shapes. Leave runs out with --participant-label, or choose them "
                    "with --bids-filter-file.")
            try:
                method.check(study.acquisitions[run])
            except Refusal as refusal:
                raise UsageError(f"--train {method.name}: {run} cannot be used. {refusal}") \
                    from refusal
    return ordered


def unlike(method: Method, study: Study, batches: Mapping[str, pd.DataFrame]) -> list[str]:
    """Sentences on each batch whose people differ from the reference's, the first, in age or sex:
    where groups stand for sites, that difference would be removed as the site's.

    Raises:
        UsageError: they differ too much.
    """
    told: list[str] = []
    reference, *targets = batches
    for batch, name in product(targets, (c for c in COVARIATES if c in study.covariates)):
        groups = {b: batches[b].dropna(subset=name).groupby("participant")[name].first()
                  for b in (reference, batch)}
        both = pd.concat(list(groups.values()))
        if min(map(len, groups.values())) < MIN_PARTICIPANTS or both.nunique() < 2:
            continue
        group = np.repeat(np.eye(2), [len(g) for g in groups.values()], axis=0)
        share = explained(coded(both), by=group)
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


def explained(values: np.ndarray, by: np.ndarray) -> float:
    """The largest share, among columns, of a variance that a linear model of `by` explains."""
    residual = values - by @ np.linalg.lstsq(by, values, rcond=None)[0]
    centred = values - values.mean(axis=0)
    return float((1 - (residual**2).sum(0) / np.maximum((centred**2).sum(0), 1e-300)).max())


def trained_for(study: Study, batches: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What a card says of the runs in `batches`, as `outside` and `unusual` read it.

    shells: b (s/mm², mean), b_delta, directions (fewest, most). voxel_size: mm, (least, most) of
    the shortest, middle and longest edge. SNR of b0 and age: (least, most). sex: those seen.
    """
    rows = [row for table in batches.values() for row in table.to_dict("records")]
    per_run = [study.acquisitions[row["run"]].shells for row in rows]
    known: dict[str, Any] = {"shells": [
        {"b": round(float(np.mean([s.b for s in shells])), 1),
         "b_delta": round(float(np.mean([s.b_delta for s in shells])), 3),
         "directions": [min(map(len, shells)), max(map(len, shells))]}
        for shells in zip(*per_run, strict=True)]}
    sizes = [sorted(study.voxel_sizes[r["run"]]) for r in rows if r["run"] in study.voxel_sizes]
    if sizes:
        known["voxel_size"] = [[round(float(f(edge)), 3) for f in (min, max)]
                               for edge in zip(*sizes, strict=True)]
    for key, name in (("snr_b0", "SNR"), *((c, c) for c in COVARIATES if c in study.covariates)):
        values = [r[key] for r in rows if r.get(key) == r.get(key) and r.get(key) is not None]
        if values and all(isinstance(v, int | float | np.number) for v in values):
            known[name] = [float(min(values)), float(max(values))]
        elif values:
            known[name] = sorted(set(map(str, values)))
    return known


def hashed(batches: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Of each batch the people of whom something was learned, as the first 16 digits of SHA-256."""
    return {batch: sorted(hashlib.sha256(f"sub-{p}".encode()).hexdigest()[:16]
                          for p in rows["participant"].unique())
            for batch, rows in batches.items()}


def model_name(method: Method, *batches: str) -> str:
    """The folder of a model under group/models: method and batches. What a file's name cannot hold
    is left out, and a digest of the batch's whole name added."""
    def plain(batch: str) -> str:
        short = re.sub(r"[^A-Za-z0-9]", "", batch)
        return short if short == batch else (
            f"{short}{hashlib.sha256(batch.encode()).hexdigest()[:6]}")

    return "_".join([method.name, *map(plain, batches)])


def check(card: Card, acquisition: Acquisition, voxel_size: Sequence[float], batch: str, *,
          allow: bool = False) -> list[str]:
    """In what a run lies outside of what a model was trained for, where that is allowed.

    Raises:
        Refusal: it does, and is not allowed; says how, and the remedy.
    """
    found = outside(card, acquisition, voxel_size, batch)
    if found and not allow:
        meant = nearest(batch, card.batches) if batch not in card.batches else ""
        raise Refusal(f"{card.method}, trained to map {', '.join(card.batches)} to "
                      f"{card.reference_batch}, does not fit: {'; '.join(found)}.{meant} Train on "
                      f"such runs (group --train {card.method} --reference-batch "
                      f"{card.reference_batch}), or leave the run out. {OVERRIDE}")
    return found


def outside(card: Card, acquisition: Acquisition, voxel_size: Sequence[float], batch: str
            ) -> list[str]:
    """Each way in which a run lies outside of what a model was trained for: batch, shells,
    directions, voxel size (mm)."""
    found, known = [], card.trained_for
    if batch not in card.batches:
        found.append(f"the batch is {batch}, known are {', '.join(card.batches)}"
                     f" ({card.reference_batch} is the reference)")
    shells, wanted = acquisition.shells, [shell_of(w) for w in known["shells"]]
    if len(shells) != len(wanted) or not all(map(same, shells, wanted)):
        found.append(f"the run has {shown(shells)}; needed are "
                     + ", ".join(f"b = {w.b:.0f}" + _shape(w) for w in wanted) + " s/mm²")
    else:
        for shell, seen in zip(shells, known["shells"], strict=True):
            low, high = seen["directions"]
            if not (1 - DIRECTIONS) * low <= len(shell) <= (1 + DIRECTIONS) * high:
                found.append(f"{len(shell)} directions at b = {shell.b:.0f} s/mm², "
                             f"{_range(low, high)} were seen in training")
    edges = zip(sorted(voxel_size), known.get("voxel_size", ()), strict=False)
    if any(not (1 - VOXEL) * low <= edge <= (1 + VOXEL) * high for edge, (low, high) in edges):
        found.append("the voxel is " + " × ".join(f"{s:.3g}" for s in sorted(voxel_size))
                     + " mm, seen in training were "
                     + " × ".join(_range(*ends) for ends in known["voxel_size"]) + " mm")
    return found


def unusual(card: Card, facts: Mapping[str, Any]) -> list[str]:
    """Sentences on SNR and covariates that training has not seen: worth a look, no refusal."""
    told = []
    for name in ("SNR", *COVARIATES):
        seen, value = card.trained_for.get(name), facts.get(name)
        if not seen or value is None or value != value:
            continue
        if isinstance(seen[0], str):
            beyond = str(value) not in seen
        else:
            beyond = isinstance(value, int | float) and not seen[0] <= value <= seen[1]
        if beyond:
            among = ", ".join(seen) if isinstance(seen[0], str) else _range(*seen)
            shown_value = f"{value:.3g}" if isinstance(value, float) else value
            told.append(f"Harmonization: {name} is {shown_value}, and {among} in the training.")
    return told


def matched(method: Method, acquisition: Acquisition, known: Sequence[Mapping[str, Any]]
            ) -> list[int]:
    """For each shell of an acquisition the index of the nearest in b of those known (`shells` of
    `trained_for`) that have its b-tensor shape.

    Raises:
        Refusal: there is none of that shape.
    """
    found = []
    for shell in acquisition.shells:
        alike = [i for i, w in enumerate(known) if abs(w["b_delta"] - shell.b_delta) <= SAME_SHAPE]
        if not alike:
            raise Refusal(f"{method.name} knows no shell of b_delta {shell.b_delta:.2g}, as the "
                          f"run has at b = {shell.b:.0f} s/mm². Train on such runs.")
        found.append(min(alike, key=lambda i: abs(known[i]["b"] - shell.b)))
    return found


def same(a: Shell, b: Shell) -> bool:
    return abs(a.b - b.b) <= SAME_B * b.b and abs(a.b_delta - b.b_delta) <= SAME_SHAPE


def shell_of(known: Mapping[str, Any]) -> Shell:
    return Shell(known["b"], known["b_delta"], np.arange(known["directions"][0]))


def shown(shells: Sequence[Shell]) -> str:
    """`16 × b 1000, 16 × b 2000`, for messages."""
    return ", ".join(f"{len(s)} × b {s.b:.0f}{_shape(s)}" for s in shells) or "nothing weighted"


def short(known: Mapping[str, Any]) -> str:
    """`b1000`, of a shell as a card holds it."""
    return f"b{known['b']:.0f}" + ("" if abs(known["b_delta"] - 1) <= SAME_SHAPE
                                   else f"d{100 * known['b_delta']:.0f}")


def _shape(shell: Shell) -> str:
    return "" if abs(shell.b_delta - 1) <= SAME_SHAPE else f" (b_delta {shell.b_delta:.2g})"


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}"
