"""ComBat as the neuroCombat package computes it, for comparison."""

import contextlib
import io
import sys
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
from neuroCombat import neuroCombat


def harmonize(values, covariates, reference=None, tolerance=1e-10):
    """(row, feature) values without batch effects, and the package's estimates.

    covariates: DataFrame with a column `batch`. tolerance: of the iteration of γ and δ, which the
    package ends at 1e-4.
    """
    module = sys.modules["neuroCombat.neuroCombat"]
    others = covariates.columns.drop("batch")
    numeric = [c for c in others if pd.api.types.is_numeric_dtype(covariates[c])]
    # it prints each of its steps, and with a reference batch calls np.int, gone from numpy 2, and
    # divides by the spread of the reference's variances, which is 0; these it then does not use
    with (contextlib.redirect_stdout(io.StringIO()),
          np.errstate(divide="ignore", invalid="ignore"),
          mock.patch.object(np, "int", int, create=True),
          mock.patch.object(module, "it_sol", partial(module.it_sol, conv=tolerance))):
        result = neuroCombat(
            dat=np.asarray(values, float).T, covars=covariates, batch_col="batch",
            categorical_cols=[c for c in others if c not in numeric], continuous_cols=numeric,
            ref_batch=reference)
    return result["data"].T, result["estimates"]
