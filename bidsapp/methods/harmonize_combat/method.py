"""ComBat on map statistics: location and scale of each batch, shrunk by empirical Bayes.

y_ijg = α_g + X_ij β_g + γ_ig + δ_ig ε_ijg   (batch i, participant j, feature g)
(Johnson 2007, eq. 1) is fitted by the neuroCombat package (Fortin 2018); X holds the covariates
to keep.
"""

from __future__ import annotations

import contextlib
import io
from unittest import mock

import numpy as np
import pandas as pd

from bidsapp.acquisition import Acquisition
from bidsapp.errors import Refusal, UsageError
from bidsapp.methods import Fitted, Method, Study
from bidsapp.methods.harmonizer import CONFOUNDED, coded, explained, known_reference

MIN_PARTICIPANTS = 3


class Combat(Method):
    """neuroCombat over one row per participant and batch (runs of a batch are averaged first)."""

    def check(self, acquisition: Acquisition) -> None:
        raise Refusal("ComBat works on tables of map statistics, not on images. Use "
                      "`group --train harmonize_combat` after the participants.")

    def fit(self, study: Study) -> Fitted:
        """Harmonized statistics and the batch effects.

        Covariates are used where every participant has them: numeric as they are, others as
        categories; those that are the same for all, or a text of one's own for each, are left out.

        Raises:
            UsageError: one batch; fewer than 3 participants in a batch; NaN or constant features;
                a covariate confounded with the batch; covariates that depend on each other, or
                too many for the participants; an unknown reference batch.
        """
        from neuroCombat import neuroCombat

        features = list(study.features)
        table = study.statistics
        kept = [c for c in study.covariates if table[c].notna().all() and table[c].nunique() > 1
                and not self._is_label(table, c)]
        runs = table.groupby(["participant", "batch"], sort=True)
        means = runs[features].agg(_mean)
        rows = pd.concat([means, runs[kept].first()], axis=1).reset_index()
        self._refuse(rows, features, kept, study.reference_batch)
        numeric = [c for c in kept if pd.api.types.is_numeric_dtype(rows[c])]
        # it prints each of its steps, and with a reference batch calls np.int, gone from numpy 2
        with (contextlib.redirect_stdout(io.StringIO()),
              mock.patch.object(np, "int", int, create=True)):
            result = neuroCombat(
                dat=rows[features].to_numpy(float).T, covars=rows[["batch", *kept]],
                batch_col="batch", categorical_cols=[c for c in kept if c not in numeric],
                continuous_cols=numeric, ref_batch=study.reference_batch)
        harmonized = rows[["participant", "batch", *kept]].copy()
        harmonized[features] = result["data"].T
        estimates = result["estimates"]
        batches = [str(b) for b in estimates["batches"]]
        model = {
            "Method": self.name, "Model": self.outputs["model"], "Batches": {
                b: int((rows["batch"] == b).sum()) for b in batches},
            "ReferenceBatch": study.reference_batch, "Covariates": kept, "Features": features,
            "Gamma": dict(zip(batches, np.asarray(estimates["gamma.star"]).tolist(), strict=True)),
            "Delta": dict(zip(batches, np.asarray(estimates["delta.star"]).tolist(), strict=True)),
        }
        return Fitted({"desc-combat_dwimap": harmonized}, model)

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


def _mean(values: pd.Series) -> float:
    """NaN where any is, so that it is refused rather than skipped."""
    return values.mean(skipna=False)
