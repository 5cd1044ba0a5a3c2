"""ComBat on map statistics: location and scale of each site, shrunk by empirical Bayes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bidsapp.errors import UsageError
from bidsapp.harmonization.harmonizer import (
    CONFOUNDED,
    check_reference,
    encode_covariate,
    variance_explained,
)
from bidsapp.kinds import Cohort, Fitted, GroupAnalysis, TrainingSettings
from bidsapp.methods.harmonize_combat.equations import BatchEffects, estimate

log = logging.getLogger("qsphere")

MIN_PARTICIPANTS = 3
"""Minimum number of participants per site, and of rows in excess of the columns of the design."""

CONSTANT = 1e-10
"""Standard deviation at a site, relative to the mean, up to which a feature counts as constant."""


class Combat(GroupAnalysis):
    """ComBat on one row per participant and site, the mean over the participant's runs there."""

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Harmonize the statistics and estimate the site effects.

        Features are map statistics. A covariate is used if every participant has it: numbers as
        they are, others as categories. It is left out if it is the same for all participants, or a
        different text for each. Features that are constant at a site are left out with a notice.

        Raises
        ------
        UsageError
            There are too few sites, participants or varying features, values are missing, a
            covariate is confounded with the site, covariates depend on each other or are too many,
            or the reference site is unknown.
        """
        rows, covariates = self._rows(cohort)
        self._refuse(rows, list(cohort.features), covariates, cohort.reference_batch)
        design, batches = _design(rows, covariates), sorted(set(rows["batch"]))
        features = _varying(rows, list(cohort.features), design)
        effects = _learn(rows, features, design, batches, cohort.reference_batch)
        harmonized = rows[["participant", "batch", *covariates]].copy()
        harmonized[features] = _remove(effects, rows, features, design, batches)
        model = {
            "Method": self.name, "Model": self.outputs["model"], "Batches": {
                b: int((rows["batch"] == b).sum()) for b in batches},
            "ReferenceBatch": cohort.reference_batch, "Covariates": covariates,
            "Features": features,
            "Alpha": effects.alpha.tolist(),
            "Beta": dict(zip(design.columns, effects.beta.tolist(), strict=True)),
            "Sigma": effects.sigma.tolist(),
            "Gamma": dict(zip(batches, effects.gamma.tolist(), strict=True)),
            "Delta": dict(zip(batches, effects.delta.tolist(), strict=True)),
        }
        constant = [f for f in cohort.features if f not in features]
        notices = [f"ComBat left out {', '.join(constant)}: at one site the value is the same for "
                   "all participants, or is determined by the covariates, so that it cannot be "
                   "scaled. Check that the participants are different scans."] if constant else []
        for notice in notices:
            log.warning("%s: %s", self.name, notice)
        return Fitted({"desc-combat_dwimap": harmonized}, model, notices=notices)

    def cross_validate(self, cohort: Cohort, parts: Sequence[Sequence[str]]) -> pd.DataFrame:
        """Harmonize each part of the participants with site effects learned from the other parts.

        Parameters
        ----------
        cohort
            The participants, as for `fit`.
        parts
            Participants of each part. Every participant is in exactly one part.

        Returns
        -------
        DataFrame
            Participant, batch, covariates and harmonized features, as in the table of `fit`. Only
            features are left that `fit` would accept whichever part is left out.

        Raises
        ------
        UsageError
            `fit` would refuse the participants of the other parts, or they lack a site or a
            category of a covariate.
        """
        rows, covariates = self._rows(cohort)
        features, harmonized = list(cohort.features), rows.copy()
        design, batches = _design(rows, covariates), sorted(set(rows["batch"]))
        tests = [rows["participant"].isin(part).to_numpy() for part in parts]
        for part, tested in zip(parts, tests, strict=True):
            rest = rows[~tested]
            for column in ("batch", *(c for c in covariates if not
                                      pd.api.types.is_numeric_dtype(rows[c]))):
                if lacking := sorted(set(rows[column]) - set(rest[column])):
                    raise UsageError(
                        f"ComBat: without sub-{', sub-'.join(part)}, no participant of "
                        f"{'site' if column == 'batch' else column} "
                        f"{', '.join(map(str, lacking))} is left to learn from. Use smaller parts.")
            self._refuse(rest, features, covariates, cohort.reference_batch)
            features = _varying(rest, features, design[~tested])
        for tested in tests:
            effects = _learn(rows[~tested], features, design[~tested], batches,
                             cohort.reference_batch)
            harmonized.loc[tested, features] = _remove(
                effects, rows[tested], features, design[tested], batches)
        return harmonized[["participant", "batch", *covariates, *features]]

    def _rows(self, cohort: Cohort) -> tuple[pd.DataFrame, list[str]]:
        """Average the runs of each participant at each site; return this table and the covariates
        that are used."""
        table = cohort.statistics
        covariates = [c for c in cohort.covariates if table[c].notna().all()
                      and table[c].nunique() > 1 and not self._is_label(table, c)]
        runs = table.groupby(["participant", "batch"], sort=True)
        means = runs[list(cohort.features)].agg(_mean)
        return pd.concat([means, runs[covariates].first()], axis=1).reset_index(), covariates

    def _is_label(self, table: pd.DataFrame, column: str) -> bool:
        """Check whether a text differs for every participant, as dates and names do."""
        return (not pd.api.types.is_numeric_dtype(table[column])
                and table[column].nunique() >= table["participant"].nunique())

    def _refuse(self, rows: pd.DataFrame, features: list[str], covariates: list[str],
                reference: str | None) -> None:
        """Refuse a cohort that does not allow ComBat."""
        counts = rows["batch"].value_counts().sort_index()
        sites = ", ".join(f"{b}: {n}" for b, n in counts.items())
        if not features:
            raise UsageError("ComBat: no map statistics were found. Run the participant level "
                             "with --estimate first.")
        if len(counts) < 2:
            raise UsageError(f"ComBat needs at least two sites; found one ({sites}). Process "
                             "participants of another site into the same OUTPUT_DIR, or assign "
                             "runs to sites with --batch-file or --batch-column.")
        if (small := counts[counts < MIN_PARTICIPANTS]).size:
            raise UsageError(f"ComBat needs at least {MIN_PARTICIPANTS} participants at every "
                             f"site; found {sites}. Add participants to {', '.join(small.index)}, "
                             "or leave the site out with --participant-label.")
        if (missing := rows.columns[rows.isna().any()].intersection(features)).size:
            people = rows.loc[rows[missing].isna().any(axis=1), "participant"].unique()
            raise UsageError(f"ComBat cannot use missing values: {', '.join(missing[:5])} "
                             f"of {', '.join(f'sub-{p}' for p in people[:5])} are NaN. Leave them "
                             "out with --participant-label, or process all participants with "
                             "--estimate and methods that all acquisitions support.")
        self._refuse_covariates(rows, covariates)
        check_reference(reference, {str(b): int(n) for b, n in counts.items()})

    def _refuse_covariates(self, rows: pd.DataFrame, covariates: list[str]) -> None:
        """Refuse covariates that are confounded with the site, redundant or too many."""
        batch = pd.get_dummies(rows["batch"], dtype=float).to_numpy()
        design = batch
        for name in covariates:
            columns = encode_covariate(rows[name])
            if (share := variance_explained(columns, by=batch)) > CONFOUNDED:
                raise UsageError(
                    f"ComBat: {name} is confounded with the site (sites explain {share:.0%} of its "
                    f"variance; up to {CONFOUNDED:.0%} is accepted). Its effect would be removed "
                    "with the site's. Add participants so that the sites overlap, or take "
                    f"{name} out of participants.tsv if its effect need not be kept.")
            design = np.column_stack([design, columns])
            if np.linalg.matrix_rank(design, tol=1e-6 * np.sqrt(len(rows))) < design.shape[1]:
                raise UsageError(
                    f"ComBat: {name} is determined by the site and the covariates before it "
                    f"({', '.join(covariates[:covariates.index(name)]) or 'none'}), so that their "
                    "effects cannot be separated. Take one of them out of participants.tsv.")
        if len(rows) - design.shape[1] < MIN_PARTICIPANTS:
            raise UsageError(
                f"ComBat: {design.shape[1] - batch.shape[1]} columns of covariates "
                f"({', '.join(covariates)}) and {batch.shape[1]} sites are too many for "
                f"{len(rows)} rows. Needed are at least {MIN_PARTICIPANTS} more rows than the sum "
                "of both. Take covariates out of participants.tsv, or add participants.")
        if covariates and variance_explained(batch, by=np.column_stack(
                [np.ones(len(rows)), design[:, batch.shape[1]:]])) > CONFOUNDED:
            raise UsageError(
                f"ComBat: {', '.join(covariates)} together are confounded with the site (they "
                f"explain more than {CONFOUNDED:.0%} of it). Their effects would be removed with "
                "the site's. Add participants so that the sites overlap, or take covariates out "
                "of participants.tsv.")


def _design(rows: pd.DataFrame, covariates: Sequence[str]) -> pd.DataFrame:
    """Create a column per numeric covariate, and indicator columns for others (`encode_covariate`
    without standardisation)."""
    columns = [rows[[c]] if pd.api.types.is_numeric_dtype(rows[c])
               else pd.get_dummies(rows[[c]], drop_first=True) for c in covariates]
    return pd.concat([rows[[]], *columns], axis=1).astype(float)


def _varying(rows: pd.DataFrame, features: Sequence[str], design: pd.DataFrame) -> list[str]:
    """Select the features that vary at every site, before and after covariates are regressed out.

    Raise UsageError if fewer than two are left, from which no prior can be estimated.
    """
    values = rows[features].to_numpy(float)
    x = np.column_stack([pd.get_dummies(rows["batch"], dtype=float), design])
    residual = values - x @ np.linalg.lstsq(x, values, rcond=None)[0]
    sd = np.min([v[rows["batch"] == b].std(axis=0) for v in (values, residual)
                 for b in set(rows["batch"])], axis=0)
    varies = sd > CONSTANT * np.abs(values).mean(axis=0)
    if varies.sum() < 2:
        constant = [f for f, v in zip(features, varies, strict=True) if not v]
        raise UsageError(
            f"ComBat learns from the spread of site effects over map statistics; found "
            f"{varies.sum()} that vary at every site"
            f"{f' ({constant[0]}, for example, does not vary)' if constant else ''}. Needed are "
            "two. Check that the participants are different scans, or add methods to --estimate.")
    return [f for f, v in zip(features, varies, strict=True) if v]


def _learn(rows: pd.DataFrame, features: Sequence[str], design: pd.DataFrame,
           batches: Sequence[str], reference: str | None) -> BatchEffects:
    """Estimate the site effects from the rows of a table (`equations.estimate`)."""
    return estimate(rows[features].to_numpy(float), design.to_numpy(), _codes(rows, batches),
                    None if reference is None else batches.index(reference))


def _remove(effects: BatchEffects, rows: pd.DataFrame, features: Sequence[str],
            design: pd.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """Remove the site effects from the rows of a table, (row, feature)."""
    return effects.remove(rows[features].to_numpy(float), design.to_numpy(), _codes(rows, batches))


def _codes(rows: pd.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """List the index of each row's site."""
    return np.array([batches.index(b) for b in rows["batch"]])


def _mean(values: pd.Series) -> float:
    """Average values; NaN if any is NaN, so that it is refused rather than skipped."""
    return values.mean(skipna=False)
