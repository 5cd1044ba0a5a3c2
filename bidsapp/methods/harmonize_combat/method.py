"""ComBat on map statistics: location and scale of each batch, shrunk by empirical Bayes.

y_ijg = α_g + X_ij β_g + γ_ig + δ_ig ε_ijg   (batch i, participant j, feature g)
(Johnson 2007, eq. 1) is fitted by the neuroCombat package (Fortin 2018); X holds the covariates
to keep.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from bidsapp.errors import UsageError
from bidsapp.methods import Cohort, Fitted, GroupAnalysis, TrainingSettings
from bidsapp.methods.harmonizer import CONFOUNDED, coded, explained, known_reference

MIN_PARTICIPANTS = 3


class Combat(GroupAnalysis):
    """neuroCombat over one row per participant and batch (runs of a batch are averaged first)."""

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Harmonized statistics and the batch effects.

        Covariates are used where every participant has them: numeric as they are, others as
        categories; those that are the same for all, or a text of one's own for each, are left out.

        Raises:
            UsageError: one batch; fewer than 3 participants in a batch; NaN or constant features;
                a covariate confounded with the batch; covariates that depend on each other, or
                too many for the participants; an unknown reference batch.
        """
        rows, kept = self._rows(cohort)
        features = list(cohort.features)
        result = self._learn(rows, features, kept, cohort.reference_batch)
        harmonized = rows[["participant", "batch", *kept]].copy()
        harmonized[features] = result["data"].T
        estimates = result["estimates"]
        batches = _batches(rows)
        model = {
            "Method": self.name, "Model": self.outputs["model"], "Batches": {
                b: int((rows["batch"] == b).sum()) for b in batches},
            "ReferenceBatch": cohort.reference_batch, "Covariates": kept, "Features": features,
            "Gamma": dict(zip(batches, np.asarray(estimates["gamma.star"]).tolist(), strict=True)),
            "Delta": dict(zip(batches, np.asarray(estimates["delta.star"]).tolist(), strict=True)),
        }
        return Fitted({"desc-combat_dwimap": harmonized}, model)

    def cross_validate(self, cohort: Cohort, parts: Sequence[Sequence[str]]) -> pd.DataFrame:
        """Harmonize everyone by what ComBat learns from the people of the other parts.

        Parameters
        ----------
        cohort
            As of `fit`.
        parts
            Participants of each part; together everyone, nobody twice.

        Returns
        -------
        DataFrame
            As the table of `fit`: participant, batch, covariates and harmonized features.

        Raises
        ------
        UsageError
            As of `fit`, of the people left to learn from; nobody of a batch, or of a category of a
            covariate, is left among them.
        """
        rows, kept = self._rows(cohort)
        features, harmonized = list(cohort.features), rows.copy()
        design = np.column_stack([np.ones(len(rows)), *(
            rows[c].to_numpy(float)[:, None] if pd.api.types.is_numeric_dtype(rows[c])
            else pd.get_dummies(rows[c], dtype=float).to_numpy()[:, 1:] for c in kept)])
        for part in parts:
            tested = rows["participant"].isin(part).to_numpy()
            rest = rows[~tested].reset_index(drop=True)
            for column in ("batch", *(c for c in kept if not
                                      pd.api.types.is_numeric_dtype(rows[c]))):
                if lacking := sorted(set(rows[column]) - set(rest[column])):
                    raise UsageError(
                        f"ComBat: without sub-{', sub-'.join(part)} nobody of {column} "
                        f"{', '.join(map(str, lacking))} is left to learn from. Give fewer people "
                        "to a part.")
            estimates = self._learn(rest, features, kept, cohort.reference_batch)["estimates"]
            # neuroCombat gives Xβ of its own people alone
            beta = np.linalg.lstsq(design[~tested], estimates["mod.mean"].T, rcond=None)[0]
            expected = estimates["stand.mean"][:, :1].T + design[tested] @ beta
            sd = np.sqrt(estimates["var.pooled"]).T
            at = [_batches(rest).index(str(b)) for b in rows["batch"][tested]]
            z = (rows.loc[tested, features].to_numpy(float) - expected) / sd
            harmonized.loc[tested, features] = expected + sd * (
                z - estimates["gamma.star"][at]) / np.sqrt(estimates["delta.star"][at])
        return harmonized

    def _rows(self, cohort: Cohort) -> tuple[pd.DataFrame, list[str]]:
        """A row for each participant and batch, and the covariates that are kept."""
        table = cohort.statistics
        kept = [c for c in cohort.covariates if table[c].notna().all() and table[c].nunique() > 1
                and not self._is_label(table, c)]
        runs = table.groupby(["participant", "batch"], sort=True)
        means = runs[list(cohort.features)].agg(_mean)
        return pd.concat([means, runs[kept].first()], axis=1).reset_index(), kept

    def _learn(self, rows: pd.DataFrame, features: list[str], kept: list[str],
               reference: str | None) -> dict[str, Any]:
        """What neuroCombat makes of rows that it can carry."""
        from neuroCombat import neuroCombat

        self._refuse(rows, features, kept, reference)
        numeric = [c for c in kept if pd.api.types.is_numeric_dtype(rows[c])]
        # it prints each of its steps, and with a reference batch calls np.int, gone from numpy 2
        with (contextlib.redirect_stdout(io.StringIO()),
              mock.patch.object(np, "int", int, create=True)):
            return neuroCombat(
                dat=rows[features].to_numpy(float).T, covars=rows[["batch", *kept]],
                batch_col="batch", categorical_cols=[c for c in kept if c not in numeric],
                continuous_cols=numeric, ref_batch=reference)

    def _is_label(self, table: pd.DataFrame, column: str) -> bool:
        """Whether a text differs for every participant, as dates and names do."""
        return (not pd.api.types.is_numeric_dtype(table[column])
                and table[column].nunique() >= table["participant"].nunique())

    def _refuse(self, rows: pd.DataFrame, features: list[str], covariates: list[str],
                reference: str | None) -> None:
        counts = rows["batch"].value_counts().sort_index()
        found = ", ".join(f"{b}: {n}" for b, n in counts.items())
        if not features:
            raise UsageError("ComBat: no map statistics were found. Run the participant level "
                             "with --estimate first.")
        if len(counts) < 2:
            raise UsageError(f"ComBat needs at least two batches; found one ({found}). Process "
                             "participants of another site into the same OUTPUT_DIR, or tell the "
                             "sites apart with --batch-file or --batch-column.")
        if (small := counts[counts < MIN_PARTICIPANTS]).size:
            raise UsageError(f"ComBat needs at least {MIN_PARTICIPANTS} participants in every "
                             f"batch; found {found}. Add participants to {', '.join(small.index)}, "
                             "or leave it out with --participant-label.")
        if (holes := rows.columns[rows.isna().any()].intersection(features)).size:
            who = rows.loc[rows[holes].isna().any(axis=1), "participant"].unique()
            raise UsageError(f"ComBat cannot use missing values: {', '.join(holes[:5])} "
                             f"of {', '.join(f'sub-{w}' for w in who[:5])} are NaN. Leave them out "
                             "with --participant-label, or process everybody with --estimate and "
                             "the methods that all acquisitions allow.")
        within = rows.groupby("batch")[features].std()
        if (flat := within.columns[(within <= 1e-12 * rows[features].abs().mean()).any()]).size:
            raise UsageError(f"ComBat cannot scale {', '.join(flat[:5])}: the value is the same "
                             "for everyone in a batch. Check that the participants are different "
                             "scans.")
        batch = pd.get_dummies(rows["batch"], dtype=float).to_numpy()
        design = batch
        for name in covariates:
            columns = coded(rows[name])
            if (share := explained(columns, by=batch)) > CONFOUNDED:
                raise UsageError(
                    f"ComBat: {name} is confounded with the batch (batches explain "
                    f"{share:.0%} of it; up to {CONFOUNDED:.0%} is accepted), so "
                    "removing the batch would remove its effect too. Add participants that "
                    "overlap, or "
                    f"take {name} out of participants.tsv if it must not be kept.")
            design = np.column_stack([design, columns])
            if np.linalg.matrix_rank(design, tol=1e-6 * np.sqrt(len(rows))) < design.shape[1]:
                raise UsageError(
                    f"ComBat: {name} follows from the batch and the covariates before it "
                    f"({', '.join(covariates[:covariates.index(name)]) or 'none'}), so their "
                    "effects cannot be told apart. Take one of them out of participants.tsv.")
        if len(rows) - design.shape[1] < MIN_PARTICIPANTS:
            raise UsageError(
                f"ComBat: {design.shape[1] - batch.shape[1]} columns of covariates "
                f"({', '.join(covariates)}) and {batch.shape[1]} batches are too much for "
                f"{len(rows)} rows; at least {MIN_PARTICIPANTS} more rows than these are needed. "
                "Take covariates out of participants.tsv, or add participants.")
        if covariates and explained(batch, by=np.column_stack(
                [np.ones(len(rows)), design[:, batch.shape[1]:]])) > CONFOUNDED:
            raise UsageError(
                f"ComBat: {', '.join(covariates)} together are confounded with the batch (they "
                f"explain more than {CONFOUNDED:.0%} of it), so removing the batch would remove "
                "their effects too. Add participants that overlap, or take covariates out of "
                "participants.tsv.")
        known_reference(reference, {str(b): int(n) for b, n in counts.items()})


def _batches(rows: pd.DataFrame) -> list[str]:
    """In the order of neuroCombat's estimates, which with a reference batch names them 0, 1, …"""
    return [str(b) for b in np.unique(rows["batch"])]


def _mean(values: pd.Series) -> float:
    """NaN where any is, so that it is refused rather than skipped."""
    return values.mean(skipna=False)
