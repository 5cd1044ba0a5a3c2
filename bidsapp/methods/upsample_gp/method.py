"""Gaussian process over b-tensors: new measurements are predicted from all weighted ones.

The process (`bidsapp.gp`) is fitted to the weighted measurements of the run. b0 volumes are left
out: they have other noise (pulsation), and hardly help. It gives weights W and, for the average
voxel, the variance of each measurement about its prediction, v with noise. Voxels of different
tissue have different errors. With e_i the leave-one-out error of measurement i (Rasmussen and
Williams 2006, equation 5.12) and v_i its variance, the factor of a voxel is

    c = mean over i of e_i² / v_i,    sd² = max(c v − σ², σ² |W|²)

where c is the mean over voxels of like anisotropy (`upsample.ErrorCurve`), i runs over the measured
shell of the target (over all weighted measurements if there is none), and the anisotropy is the
variance over i of the predictions of the noise-free signal. σ² |W|² is the noise that the weights
propagate, below which no error can be. σ² is the run's; that of the process if it is unknown or the
table has no shells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from bidsapp.acquisition import SAME_B, SAME_SHAPE, SHELL_GAP, Acquisition, describe_shells
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.gp import GaussianProcess
from bidsapp.kinds import Predicted, Upsampler
from bidsapp.upsample import ErrorCurve, determines, has_one_b, sample_voxels

MIN_DIRECTIONS = 6
"""Minimum number of weighted measurements whose b-tensor has an axis."""

MIN_ANGLE_RANGE = 15.0
"""Minimum range of the angles between the axes of all pairs of measurements, degrees. If all angles
are alike, as between the six axes of an icosahedron, the likelihood cannot tell noise from signals
that change over a smaller angle."""


class _Group(NamedTuple):
    """Error model of some targets: their columns, weights (near, n) of the noise-free signals near
    them, c as a function of the anisotropy, v, σ² and the least sd² (target,)."""

    target: np.ndarray
    smoother: torch.Tensor
    curve: ErrorCurve
    variance: torch.Tensor
    noise: float
    least: torch.Tensor


class GaussianProcessUpsampler(Upsampler):
    """Upsampler that predicts from all weighted volumes, with one covariance for all voxels."""

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if there are fewer than six weighted measurements with an axis, if these
        axes do not span the sphere, or if all angles between them are alike."""
        oriented = ~acquisition.b0 & (np.abs(acquisition.b_delta) > SAME_SHAPE)
        if oriented.sum() < MIN_DIRECTIONS:
            raise Refusal(
                f"upsample_gp predicts from {MIN_DIRECTIONS} or more weighted measurements whose "
                "b-tensor is not spherical. This acquisition has "
                f"{describe_shells(acquisition.shells)}. {MIN_DIRECTIONS} are needed: acquire more "
                "directions.")
        axes = acquisition.bvecs[oriented]
        if not determines(2, axes):
            raise Refusal(
                f"upsample_gp found {describe_shells(acquisition.shells)}, whose directions do not "
                "span the sphere. Directions that determine a tensor are needed: acquire others.")
        angles = np.degrees(np.arccos(np.abs(axes @ axes.T).clip(0, 1)))[
            np.triu_indices(len(axes), 1)]
        if np.ptp(angles) < MIN_ANGLE_RANGE:
            raise Refusal(
                f"upsample_gp found {describe_shells(acquisition.shells)}, with angles from "
                f"{angles.min():.0f}° to {angles.max():.0f}° between directions. From angles that "
                "are alike it cannot tell noise from signal; a range of "
                f"{MIN_ANGLE_RANGE:g}° is needed. Use upsample_sh, or acquire more directions.")

    def violations(self, acquisition: Acquisition, target: Acquisition,
                   voxel_size: Sequence[float] | None = None) -> list[str]:
        """List targets outside the b-values and shapes that were measured."""
        weighted, out = acquisition[~acquisition.b0], []
        low, high = weighted.bvals.min(), weighted.bvals.max()
        outside = (target.bvals < (1 - SAME_B) * low) | (target.bvals > (1 + SAME_B) * high)
        if outside.any():
            measured = f"{low:.0f}" + f" to {high:.0f}" * (round(low) != round(high))
            out.append(f"b = {target.bvals[outside][0]:.0f} s/mm² is predicted, and b = {measured} "
                       "s/mm² was measured")
        away = np.abs(np.subtract.outer(target.b_delta, weighted.b_delta)).min(1) > SAME_SHAPE
        if away.any():
            out.append(f"b_delta = {target.b_delta[away][0]:.2g} is predicted, and was not "
                       "measured")
        return out

    def predict(self, dwi: Dwi, target: Acquisition, device: str, seed: int = 0) -> Predicted:
        self.check(dwi.acquisition)
        weighted = np.flatnonzero(~dwi.acquisition.b0)
        sample, notices = sample_voxels(dwi.signal, weighted)
        process = GaussianProcess.fit(sample, dwi.acquisition[weighted])
        weights = _to(process.predict(target).weights, device)
        groups = [_group(process, sample, dwi, target, shell.indices, device)
                  for shell in target.shells]
        columns = torch.as_tensor(weighted, device=device)

        def predict(signal: torch.Tensor) -> dict[str, torch.Tensor]:
            signal = signal[:, columns]
            values = signal @ weights.T
            sd = torch.empty_like(values)
            for g in groups:
                factor = g.curve((signal @ g.smoother.T).var(1, correction=0))
                sd[:, g.target] = torch.maximum(factor[:, None] * g.variance - g.noise,
                                                g.least).sqrt()
            return {"signal": values.clamp_(min=0) if dwi.magnitude else values, "sd": sd}

        predicted = map_voxels(predict, dwi.signal, device)
        return Predicted(predicted["signal"], predicted["sd"], notices=notices, parameters={
            "Covariance": {k: float(f"{v:.4g}")
                           for k, v in process.hyperparameters._asdict().items()},
            "Uncertainty": "predictive SD, scaled by leave-one-out errors"})


def _group(process: GaussianProcess, sample: np.ndarray, dwi: Dwi, target: Acquisition,
           rows: np.ndarray, device: str) -> _Group:
    """Error model of the targets of one shell."""
    acquisition = process.acquisition
    near = _near(acquisition, target[rows])
    smoother, loo = process.predict(acquisition[near]).weights, process.leave_one_out()
    error = sample[:, near] - sample @ loo.weights[near].T
    curve = ErrorCurve.fit((sample @ smoother.T).var(1),
                           np.square(error / loo.sd[near]).mean(1), device)
    # the noise of a run is that of SH fits, which exaggerate it if the table has no shells
    shells = all(has_one_b(acquisition, s) for s in acquisition.shells)
    measured = np.flatnonzero(~dwi.acquisition.b0)[near]
    sigma, prediction = dwi.noise_of(measured) if shells else None, process.predict(target[rows])
    noise = process.noise if sigma is None else sigma**2
    return _Group(rows, _to(smoother, device), curve, _to(prediction.sd**2, device), noise,
                  _to(noise * np.square(prediction.weights).sum(1), device))


def _near(acquisition: Acquisition, target: Acquisition) -> np.ndarray:
    """Indices of the measurements with the b and shape of the targets, or of all if there are fewer
    than MIN_DIRECTIONS."""
    b, b_delta = acquisition.bvals[:, None], acquisition.b_delta[:, None]
    near = np.flatnonzero(((np.abs(b - target.bvals) <= SHELL_GAP * target.bvals)
                           & (np.abs(b_delta - target.b_delta) <= SAME_SHAPE)).any(1))
    return near if len(near) >= MIN_DIRECTIONS else np.arange(len(acquisition))


def _to(values: np.ndarray, device: str) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)
