"""ComBat's equations (Johnson et al. 2007, section 3; Fortin et al. 2017).

    y_ijg = α_g + x_ij β_g + σ_g (γ_ig + √δ_ig ε_ijg)

For participant j with covariates x_ij, site (batch) i shifts feature g by γ_ig and scales its
variance by δ_ig, in units of the residual standard deviation σ_g. The priors over features are
normal for γ_ig and inverse gamma for δ_ig: empirical Bayes shrinks both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-8
"""Change of γ, and relative change of δ, below which the iteration ends."""


@dataclass(frozen=True)
class BatchEffects:
    """Estimates of ComBat.

    Parameters
    ----------
    alpha : (feature,)
        Grand mean, or mean of the reference site, at covariates of 0.
    beta : (covariate, feature)
        Effects of the covariates.
    sigma : (feature,)
        Residual standard deviation, of the reference site alone if there is one.
    gamma, delta : (batch, feature)
        Shift, and factor of the variance, of each site.
    """

    alpha: np.ndarray
    beta: np.ndarray
    sigma: np.ndarray
    gamma: np.ndarray
    delta: np.ndarray

    def remove(self, values: np.ndarray, covariates: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Remove the effect of each row's site and keep the effects of its covariates.

        Parameters
        ----------
        values, covariates, batch
            Arguments of `estimate`; the rows may be those of other participants.

        Returns
        -------
        np.ndarray
            (row, feature).
        """
        expected = self.alpha + covariates @ self.beta
        z = (values - expected) / self.sigma
        return expected + self.sigma * (z - self.gamma[batch]) / np.sqrt(self.delta[batch])


def estimate(values: np.ndarray, covariates: np.ndarray, batch: np.ndarray,
             reference: int | None = None) -> BatchEffects:
    """Estimate site effects by least squares and parametric empirical Bayes.

    Parameters
    ----------
    values
        (row, feature), finite, at least two features. The residuals of each vary at every site.
    covariates
        (row, covariate), of full rank together with the indicators of the sites.
    batch
        (row,) int: index of each row's site, from 0.
    reference
        Index of the site that is left as it is; default: all sites move to the grand mean.

    Returns
    -------
    BatchEffects
    """
    batches = np.eye(batch.max() + 1)[batch]
    design = np.column_stack([batches, covariates])
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    means, beta = np.split(coefficients, [batches.shape[1]])
    alpha = batches.mean(axis=0) @ means if reference is None else means[reference]
    residual = values - design @ coefficients
    sigma = np.sqrt((residual[(reference is None) | (batch == reference)] ** 2).mean(axis=0))
    z = (values - alpha - covariates @ beta) / sigma
    gamma, delta = np.zeros_like(means), np.ones_like(means)
    for i in range(len(means)):
        if i != reference:
            gamma[i], delta[i] = _shrink(z[batch == i])
    return BatchEffects(alpha, beta, sigma, gamma, delta)


def _shrink(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate γ and δ, (feature,), of one site.

    Each is the mean of its posterior given the other; they are updated in turn until convergence.
    """
    n = len(z)
    gamma_hat, delta_hat = z.mean(axis=0), z.var(axis=0, ddof=1)
    # priors γ ~ N(γ̄, τ²) and δ ~ inverse gamma(λ, θ), from moments over the features
    gamma_bar, tau2 = gamma_hat.mean(), gamma_hat.var(ddof=1)
    m, s2 = delta_hat.mean(), delta_hat.var(ddof=1)
    # λ = m² / s² + 2 and θ = m³ / s² + m; both are multiplied by s² below, because s² may be 0
    gamma, delta, change = gamma_hat, delta_hat, np.inf
    while change > TOLERANCE:
        before = gamma, delta
        gamma = (n * tau2 * gamma_hat + delta * gamma_bar) / (n * tau2 + delta)
        squares = ((z - gamma) ** 2).sum(axis=0)
        delta = (m**3 + s2 * (m + squares / 2)) / (m**2 + s2 * (2 + n / 2 - 1))
        change = max(np.abs(gamma - before[0]).max(), np.abs(delta / before[1] - 1).max())
    return gamma, delta
