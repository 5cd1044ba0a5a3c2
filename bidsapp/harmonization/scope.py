"""Description of the runs that a harmonizer learned from, for its card, and hints on names."""

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
"""Covariates whose ranges a card holds."""


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
        The shells that all these runs have, their voxel sizes, the SNR of their b0, and the ages
        and sexes of their participants.
    """
    rows = [row for table in batches.values() for row in table.to_dict("records")]
    sizes = [sorted(cohort.voxel_sizes[r["run"]]) for r in rows if r["run"] in cohort.voxel_sizes]

    def values_of(key: str) -> tuple[Any, ...]:
        """List the minimum and maximum of a numeric column, or the values of another."""
        # NaN differs from itself
        values = [r[key] for r in rows if r.get(key) == r.get(key) and r.get(key) is not None]
        if not all(isinstance(v, int | float | np.number) for v in values):
            return tuple(sorted(set(map(str, values))))
        finite = [float(v) for v in values if math.isfinite(v)]
        return (min(finite), max(finite)) if finite else ()

    return TrainingDomain.from_acquisitions(
        [cohort.acquisitions[row["run"]] for row in rows], snr=values_of("snr_b0") or None,
        voxel_size=tuple((round(float(min(edge)), 3), round(float(max(edge)), 3))
                         for edge in zip(*sizes, strict=True)),
        sites=tuple(sites),
        covariates={c: values for c in COVARIATES
                    if c in cohort.covariates and (values := values_of(c))})


def hash_participants(batches: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Hash the participants of each site.

    Parameters
    ----------
    batches : mapping of str to DataFrame
        Rows of the statistics by site.

    Returns
    -------
    dict of str to list of str
        The first 16 hexadecimal digits of SHA-256 of `sub-LABEL`, sorted, by site.
    """
    return {batch: sorted(hashlib.sha256(f"sub-{p}".encode()).hexdigest()[:16]
                          for p in rows["participant"].unique())
            for batch, rows in batches.items()}


def suggest_name(name: str, names: Iterable[str]) -> str:
    """Suggest a similar name, for the end of a message.

    Parameters
    ----------
    name : str
        The name that does not exist.
    names : iterable of str
        Those that do.

    Returns
    -------
    str
        ` Did you mean …?` with a space before it, or an empty string if no name is similar.
    """
    names = list(names)
    similar = (difflib.get_close_matches(name, names, 1, 0.4)
               or [n for n in names if name and name.lower() in n.lower()])
    return f" Did you mean {similar[0]}?" if similar else ""
