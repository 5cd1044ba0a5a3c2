"""Spherical harmonics: a regularised fit of each shell, evaluated along new directions.

With Y the basis along the n measured directions of a shell and y along a new one, the prediction of
the signals S is linear in them (Descoteaux et al. 2007, doi:10.1002/mrm.21277):

    Ŝ = w S,    w = y (YᵀY + λ L)⁻¹ Yᵀ,    L = diag(l²(l + 1)²).

Its error is the noise that w propagates and a bias: shrinkage by λ, and degrees above the highest.
With the smoother H = Y (YᵀY + λ L)⁻¹ Yᵀ, residuals show the sum of noise and bias,

    τ² = |S − H S|² / tr (1 − H)²,    sd² = σ² |w|² + max(τ² − σ², 0),

where τ² is the mean over voxels of like anisotropy, |H S − mean|²/n (`upsample.ErrorCurve`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from bidsapp import sh
from bidsapp.acquisition import (
    SAME_B,
    SAME_SHAPE,
    Acquisition,
    Shell,
    describe_shape,
    describe_shells,
)
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Predicted, Upsampler
from bidsapp.upsample import ErrorCurve, determines, has_one_b, sample_voxels

LAPLACE_BELTRAMI = 0.006
"""λ (Descoteaux et al. 2007)."""

L_MAX, REDUNDANCY, MIN_DIRECTIONS = 8, 1.3, 6
"""Highest degree, minimum number of directions per coefficient from degree 4 on, and minimum number
of directions, which determine degree 2."""


class _Group(NamedTuple):
    """Predictions from one shell: its volumes, the targets, w (target, n), H and the parts of sd²;
    `curve` is None if the noise is unknown."""

    measured: torch.Tensor
    target: np.ndarray
    weights: torch.Tensor
    smoother: torch.Tensor
    noise: torch.Tensor
    sigma: float
    curve: ErrorCurve | None


class SphericalHarmonics(Upsampler):
    """Upsampler that evaluates a spherical-harmonic fit of each shell."""

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if no shell determines a fit of degree 2."""
        if not any(degree(acquisition, shell) for shell in acquisition.shells):
            raise Refusal(
                f"upsample_sh fits spherical harmonics to each shell. This acquisition has "
                f"{describe_shells(acquisition.shells)}. A shell of {MIN_DIRECTIONS} or more "
                "directions, spread over the sphere, with one b-value and a b-tensor that is not "
                "spherical, is needed. Use upsample_gp for tables without shells.")

    def shells(self, acquisition: Acquisition) -> list[Shell]:
        """List the shells that determine a fit of degree 2."""
        return [s for s in acquisition.shells if degree(acquisition, s)]

    def check_target(self, acquisition: Acquisition, target: Acquisition) -> None:
        """Raise Refusal if a target is on no shell that can be fitted."""
        _sources(acquisition, target)

    def predict(self, dwi: Dwi, target: Acquisition, device: str, seed: int = 0) -> Predicted:
        self.check(dwi.acquisition)
        shells, source = _sources(dwi.acquisition, target)
        groups = [_group(dwi, shells[k], np.flatnonzero(source == k), target, device)
                  for k in np.unique(source)]

        def predict(signal: torch.Tensor) -> dict[str, torch.Tensor]:
            out = {"signal": signal.new_empty(len(signal), len(target))}
            if known:
                out["sd"] = torch.empty_like(out["signal"])
            for g in groups:
                values = signal[:, g.measured]
                out["signal"][:, g.target] = values @ g.weights.T
                if g.curve:
                    bias = g.curve((values @ g.smoother.T).var(1, correction=0)) - g.sigma**2
                    out["sd"][:, g.target] = (g.noise + bias.clamp(min=0)[:, None]).sqrt()
            if dwi.magnitude:
                out["signal"].clamp_(min=0)
            return out

        known = all(g.curve for g in groups)
        predicted = map_voxels(predict, dwi.signal, device)
        used = [shells[k] for k in np.unique(source)]
        return Predicted(predicted["signal"], predicted.get("sd"), parameters={
            "Shells": [round(s.b) for s in used],
            "Degrees": [degree(dwi.acquisition, s) for s in used],
            "LaplaceBeltrami": LAPLACE_BELTRAMI,
            "Uncertainty": "noise and residuals of the fit" if known
            else "not given: the noise is unknown"})


def degree(acquisition: Acquisition, shell: Shell) -> int:
    """Find the degree of the fit of a shell; 0 if the shell cannot be used.

    It is the highest one up to L_MAX with REDUNDANCY directions per coefficient (degree 2: with
    MIN_DIRECTIONS) that the directions determine (`upsample.determines`).
    """
    if (len(shell) < MIN_DIRECTIONS or abs(shell.b_delta) <= SAME_SHAPE
            or not has_one_b(acquisition, shell)):
        return 0
    highest = max(2, sh.degree_for(len(shell) / REDUNDANCY, L_MAX))
    directions = acquisition.bvecs[shell.indices]
    return next((l for l in range(highest, 0, -2) if determines(l, directions)), 0)


def _sources(acquisition: Acquisition, target: Acquisition) -> tuple[list[Shell], np.ndarray]:
    """Shells that can be fitted, and the one (target,) that each target belongs to."""
    shells = [s for s in acquisition.shells if degree(acquisition, s)]
    b, b_delta = (np.array([getattr(s, k) for s in shells]) for k in ("b", "b_delta"))
    away = np.abs(np.log(target.bvals.clip(1)[:, None] / b))
    other = np.abs(target.b_delta[:, None] - b_delta) > SAME_SHAPE
    source = np.where(other, np.inf, away).argmin(1)
    rows = np.arange(len(target))
    wrong = other[rows, source] | (np.abs(target.bvals - b[source]) > SAME_B * b[source])
    if wrong.any():
        i = int(wrong.argmax())
        raise Refusal(
            f"upsample_sh cannot predict b = {target.bvals[i]:.0f} s/mm²"
            f"{describe_shape(target.b_delta[i])}: the shells that it can fit are "
            f"{describe_shells(shells)}. b within {SAME_B:.0%} of a shell's, and its b-tensor "
            "shape, are needed. Choose targets on these shells, or use upsample_gp.")
    return shells, source


def _group(dwi: Dwi, shell: Shell, rows: np.ndarray, target: Acquisition, device: str) -> _Group:
    l_max = degree(dwi.acquisition, shell)
    directions = dwi.acquisition.bvecs[shell.indices]
    fit = sh.smooth_fit(l_max, directions, LAPLACE_BELTRAMI)
    weights, smoother = (sh.basis(l_max, g) @ fit for g in (target.bvecs[rows], directions))
    sigma, curve = dwi.noise_of(shell.indices), None
    rest = np.eye(len(shell)) - smoother
    if sigma is not None:
        sample, _ = sample_voxels(dwi.signal, shell.indices)
        square = np.square(sample @ rest.T).sum(1) / np.square(rest).sum()
        curve = ErrorCurve.fit((sample @ smoother.T).var(1), square, device)
    w, h, noise = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (
        weights, smoother, (sigma or 0.0)**2 * np.square(weights).sum(1)))
    return _Group(torch.as_tensor(shell.indices, device=device), rows, w, h, noise, sigma or 0.0,
                  curve)
