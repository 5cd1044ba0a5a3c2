"""What harmonizers know of the runs that they learn from, for their cards."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from bidsapp.domain import TrainingDomain
from bidsapp.kinds import Cohort

COVARIATES = ("age", "sex")
"""Those whose ranges a card tells."""


def training_domain(cohort: Cohort, batches: Mapping[str, pd.DataFrame], sites: Iterable[str]
                    ) -> TrainingDomain:
    """Describe the runs that a harmonizer learns from.

    Parameters
    ----------
    cohort : Cohort
        Acquisitions and voxel sizes of the runs.
    batches : mapping of str to DataFrame
        Rows of the statistics by site, the reference among them.
    sites : iterable of str
        The sites that are mapped to the reference.

    Returns
    -------
    TrainingDomain
        Of just the shells that all these runs have, with their voxel sizes, the SNR of b0, and the
        ages and sexes of the participants.
    """
    rows = [row for table in batches.values() for row in table.to_dict("records")]
    sizes = [sorted(cohort.voxel_sizes[r["run"]]) for r in rows if r["run"] in cohort.voxel_sizes]

    def seen(key: str) -> tuple[Any, ...]:
        values = [r[key] for r in rows if r.get(key) == r.get(key) and r.get(key) is not None]
        if not all(isinstance(v, int | float | np.number) for v in values):
            return tuple(sorted(set(map(str, values))))
        finite = [float(v) for v in values if math.isfinite(v)]
        return (min(finite), max(finite)) if finite else ()

    return TrainingDomain.of_acquisitions(
        [cohort.acquisitions[row["run"]] for row in rows], snr=seen("snr_b0") or None,
        voxel_size=tuple((round(float(min(edge)), 3), round(float(max(edge)), 3))
                         for edge in zip(*sizes, strict=True)),
        sites=tuple(sites),
        covariates={c: values for c in COVARIATES
                    if c in cohort.covariates and (values := seen(c))})


def hash_participants(batches: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Name the participants of each site by the first 16 digits of SHA-256."""
    return {batch: sorted(hashlib.sha256(f"sub-{p}".encode()).hexdigest()[:16]
                          for p in rows["participant"].unique())
            for batch, rows in batches.items()}


def suggest_name(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing where no known name is like it."""
    known = list(known)
    near = (difflib.get_close_matches(name, known, 1, 0.4)
            or [k for k in known if name and name.lower() in k.lower()])
    return f" Did you mean {near[0]}?" if near else ""
