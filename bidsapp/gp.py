"""Gaussian process over b-tensors: prediction of a measurement from others.

The signals of a voxel have mean 0 and, for measurements i and j with b-value b, shape δ and axis n,
the covariance

    K_ij = s_i s_j [c₀ E₀(b_i, b_j) + u_i u_j A_ij E₁(b_i, b_j)] D(δ_i, δ_j) + σ² 1(i = j)
    E(b, b') = exp(−(log b − log b')² / 2ℓ²),    D(δ, δ') = exp(−(δ − δ')² / 2ℓ_δ²)
    A_ij = c₁ [C(θ) + C(π − θ)] + c₂ P₂(cos θ) + c₄ r_i r_j P₄(cos θ)
    C(θ) = 1 − 3θ/2a + θ³/2a³ for θ ≤ a ≤ π, otherwise 0;    u = |δ| r, r = 1 − exp(−b/β)

where cos θ = n_i·n_j and P_l are the Legendre polynomials. The first term is the mean over
directions, the second the part that depends on the direction, which grows with the weighting. s_i
is the root mean square of the signals with about the b-value and shape of i. All voxels share the
covariance. C and E₁ are the spherical covariance and the squared exponential of Andersson and
Sotiropoulos 2015 (doi:10.1016/j.neuroimage.2015.07.067). The spherical covariance is that of rough
functions; P₂ and P₄ add the smooth ones that signals of limited b are. c₀, E₀, u and D extend it to
tables without shells, to b0 volumes and to tensor-valued encoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp.acquisition import B0_MAX, Acquisition

SAME_LOG_B, SAME_DELTA = 0.1, 0.1
"""SD of the weights by which s averages over log b and over the shape of the b-tensor."""

BOUNDS = {"mean": (1e-3, 10.0), "direction": (1e-6, 10.0), "second": (1e-6, 10.0),
          "fourth": (1e-6, 10.0), "noise": (1e-5, 1.0),
          "angle": (0.3, math.pi), "mean_log_b": (0.1, 10.0), "direction_log_b": (0.1, 10.0),
          "shape": (0.1, 10.0), "saturation": (100.0, 10_000.0)}
"""Limits of the hyper-parameters."""

START = {"mean": 1.0, "direction": 0.03, "second": 0.1, "fourth": 0.03, "noise": 0.05,
         "angle": 1.5, "mean_log_b": 1.0, "direction_log_b": 1.0, "shape": 1.0,
         "saturation": 1000.0}
"""Hyper-parameters at which the fit starts. Those that a table does not determine stay there."""


class Hyperparameters(NamedTuple):
    """Hyper-parameters of the covariance.

    Attributes
    ----------
    mean, direction, second, fourth : float
        c₀, c₁, c₂ and c₄.
    noise : float
        σ², relative to the mean of s².
    angle : float
        a, rad.
    mean_log_b, direction_log_b, shape : float
        ℓ of E₀, ℓ of E₁ and ℓ_δ.
    saturation : float
        β, s/mm².
    """

    mean: float
    direction: float
    second: float
    fourth: float
    noise: float
    angle: float
    mean_log_b: float
    direction_log_b: float
    shape: float
    saturation: float


class Prediction(NamedTuple):
    """Prediction of m measurements from n.

    Attributes
    ----------
    weights : (m, n)
        The prediction of signals (voxel, n) is `signal @ weights.T`.
    sd : (m,)
        SD of the measurement about its prediction, noise included: on average over the voxels,
        and at b-values that were measured. At others it is too small: in a simulated head the
        errors were 3.2 to 3.6 times as large.
    """

    weights: Float[np.ndarray, "m n"]
    sd: Float[np.ndarray, " m"]


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Gaussian process that was fitted to an acquisition; see the module's equations.

    Parameters
    ----------
    acquisition : Acquisition
        The n measurements from which others are predicted.
    power : (n,)
        Mean square of the signal of each.
    hyperparameters : Hyperparameters
        Of the covariance.
    """

    acquisition: Acquisition
    power: Float[np.ndarray, " n"]
    hyperparameters: Hyperparameters

    @classmethod
    def fit(cls, signal: Float[np.ndarray, "voxel n"], acquisition: Acquisition,
            start: Hyperparameters | None = None) -> GaussianProcess:
        """Fit the hyper-parameters by maximum marginal likelihood.

        The likelihood depends on the voxels through their mean square M = Σ y yᵀ / voxels alone:
        log p = −(voxels / 2) (log |K| + tr K⁻¹ M) + constant.

        Parameters
        ----------
        signal : (voxel, n)
            Signals, finite.
        acquisition : Acquisition
            Of the n measurements.
        start : Hyperparameters, optional
            Where the search starts.

        Returns
        -------
        GaussianProcess
        """
        from scipy.optimize import minimize

        y = np.asarray(signal, np.float64)
        moment = y.T @ y / len(y)
        process = cls(acquisition, np.diag(moment), start or Hyperparameters(**START))
        scale = process._scale(acquisition)
        matrix = torch.from_numpy(moment / np.outer(scale, scale))
        noise = torch.from_numpy(np.mean(scale**2) / scale**2)
        parts = _distances(acquisition, acquisition)

        def objective(logs: np.ndarray) -> tuple[float, np.ndarray]:
            theta = torch.tensor(logs, requires_grad=True)
            h = Hyperparameters(*theta.exp())
            k = _covariance(h, *parts) + torch.diag(h.noise * noise)
            factor = torch.linalg.cholesky(k)
            value = factor.diagonal().log().sum() \
                + torch.cholesky_solve(matrix, factor).diagonal().sum() / 2
            return value.item(), torch.autograd.grad(value, theta)[0].numpy()

        fitted = minimize(objective, np.log(process.hyperparameters), jac=True, method="L-BFGS-B",
                          bounds=np.log([BOUNDS[k] for k in Hyperparameters._fields]),
                          options={"maxiter": 200}).x
        return cls(acquisition, np.diag(moment), Hyperparameters(*np.exp(fitted).tolist()))

    def leave_one_out(self) -> Prediction:
        """Predict each measurement from all others: Ŷ = Y − diag(1 / [K⁻¹]ᵢᵢ) K⁻¹ Y.

        (Rasmussen and Williams 2006, equation 5.12)
        """
        precision = np.linalg.inv(self._measured())
        variance = 1 / np.diag(precision)
        weights = np.eye(len(precision)) - variance[:, None] * precision
        np.fill_diagonal(weights, 0)  # but for rounding it is 0
        return Prediction(weights, np.sqrt(variance))

    def predict(self, target: Acquisition, use: Bool[np.ndarray, " n"] | None = None) -> Prediction:
        """Predict measurements of another acquisition.

        Parameters
        ----------
        target : Acquisition
            The m measurements that are predicted.
        use : (n,) bool, optional
            The measurements from which they are predicted; the weights of the others are 0.
            Default: all.

        Returns
        -------
        Prediction
        """
        use = np.ones(len(self.acquisition), bool) if use is None else use
        across = self._signal(target, self.acquisition[use])
        weights = np.zeros((len(target), len(use)))
        weights[:, use] = np.linalg.solve(self._measured()[np.ix_(use, use)], across.T).T
        variance = np.diag(self._signal(target, target)) + self.noise \
            - np.sum(weights[:, use] * across, axis=1)
        return Prediction(weights, np.sqrt(np.maximum(variance, 0)))

    @property
    def noise(self) -> float:
        """Variance of the noise, in signal units squared."""
        return float(self.hyperparameters.noise * np.mean(self._scale(self.acquisition)**2))

    def _measured(self) -> np.ndarray:
        """(n, n) covariance of the measured signals."""
        return self._signal(self.acquisition, self.acquisition) \
            + self.noise * np.eye(len(self.acquisition))

    def _signal(self, a: Acquisition, b: Acquisition) -> np.ndarray:
        """(len(a), len(b)) covariance of the signals without noise."""
        k = _covariance(self.hyperparameters, *_distances(a, b)).numpy()
        return np.outer(self._scale(a), self._scale(b)) * k

    def _scale(self, acquisition: Acquisition) -> np.ndarray:
        """s of some measurements: root of the weighted mean of the power near b and δ."""
        log_b, delta = (np.subtract.outer(at, of) for at, of in
                        zip(_position(acquisition), _position(self.acquisition), strict=True))
        near = (log_b / SAME_LOG_B)**2 + (delta / SAME_DELTA)**2
        weight = np.exp(-(near - near.min(1, keepdims=True)) / 2)
        return np.sqrt(weight @ self.power / weight.sum(1)).clip(1e-12)


def _position(acquisition: Acquisition) -> tuple[np.ndarray, np.ndarray]:
    """log b, and δ as it is without diffusion weighting."""
    return (np.log(acquisition.bvals.clip(B0_MAX)),
            np.where(acquisition.b0, 1.0, acquisition.b_delta))


def _distances(a: Acquisition, b: Acquisition) -> tuple[torch.Tensor, ...]:
    """(len(a), len(b)): differences of log b and of δ, b, b', |δ δ'|, and the angle θ."""
    (log_a, delta_a), (log_b, delta_b) = _position(a), _position(b)
    return tuple(map(torch.from_numpy, (
        np.subtract.outer(log_a, log_b), np.subtract.outer(delta_a, delta_b),
        np.array(a.bvals)[:, None], np.array(b.bvals),
        np.abs(np.outer(a.b_delta, b.b_delta)), np.arccos((a.bvecs @ b.bvecs.T).clip(-1, 1)))))


def _covariance(h: Hyperparameters, log_b: torch.Tensor, delta: torch.Tensor, b: torch.Tensor,
                other_b: torch.Tensor, deltas: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """K without s and σ²."""
    mean, direction = (torch.exp(-log_b**2 / (2 * length**2))
                       for length in (h.mean_log_b, h.direction_log_b))
    rise, other_rise = (1 - torch.exp(-x / h.saturation) for x in (b, other_b))
    u = deltas * rise * other_rise
    x = torch.cos(theta)**2
    angle = _spherical(theta / h.angle) + _spherical((math.pi - theta) / h.angle)
    return torch.exp(-delta**2 / (2 * h.shape**2)) * (
        h.mean * mean + u * direction * (
            h.direction * angle + h.second * (3 * x - 1) / 2
            + h.fourth * rise * other_rise * (35 * x**2 - 30 * x + 3) / 8))


def _spherical(x: torch.Tensor) -> torch.Tensor:
    """C at θ = a x."""
    return torch.where(x < 1, 1 - 1.5 * x + 0.5 * x**3, 0.0)
