"""What a card says of the runs that a harmonizer was trained on, and whether another run is one of
their kind."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bidsapp.acquisition import Acquisition, Shell
from bidsapp.checkpoint import Card
from bidsapp.errors import Refusal
from bidsapp.methods import Cohort, Method

SAME_B, SAME_SHAPE = 0.05, 0.05
"""Shells are the same where b differs by at most this share, and b_delta by at most this."""

DIRECTIONS = 0.1
"""Share by which the directions of a shell may be fewer or more than any seen in training, as
where a volume was dropped."""

VOXEL = 0.05
"""Share by which an edge of the voxel may be shorter or longer than any seen in training."""

COVARIATES = ("age", "sex")
"""Whose ranges a card tells."""

OVERRIDE = "--allow-extrapolation goes on all the same, and notes it in every sidecar."


def trained_for(cohort: Cohort, batches: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What a card says of the runs in `batches`, as `outside` and `unusual` read it.

    shells: b (s/mm², mean), b_delta, directions (fewest, most). voxel_size: mm, (least, most) of
    the shortest, middle and longest edge. SNR of b0 and age: (least, most). sex: those seen.
    """
    rows = [row for table in batches.values() for row in table.to_dict("records")]
    per_run = [cohort.acquisitions[row["run"]].shells for row in rows]
    known: dict[str, Any] = {"shells": [
        {"b": round(float(np.mean([s.b for s in shells])), 1),
         "b_delta": round(float(np.mean([s.b_delta for s in shells])), 3),
         "directions": [min(map(len, shells)), max(map(len, shells))]}
        for shells in zip(*per_run, strict=True)]}
    sizes = [sorted(cohort.voxel_sizes[r["run"]]) for r in rows if r["run"] in cohort.voxel_sizes]
    if sizes:
        known["voxel_size"] = [[round(float(f(edge)), 3) for f in (min, max)]
                               for edge in zip(*sizes, strict=True)]
    for key, name in (("snr_b0", "SNR"), *((c, c) for c in COVARIATES if c in cohort.covariates)):
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


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing where no known name is like it."""
    known = list(known)
    near = (difflib.get_close_matches(name, known, 1, 0.4)
            or [k for k in known if name and name.lower() in k.lower()])
    return f" Did you mean {near[0]}?" if near else ""
