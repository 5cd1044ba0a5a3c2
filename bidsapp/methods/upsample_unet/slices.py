"""Axial slices of S/S0: training data, the linear prediction, and the error of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bidsapp.dwi import Dwi
from bidsapp.registration.geometry import canonical

MAX_RATIO = 2.0
"""S/S0 is clipped to ± MAX_RATIO; values outside come from artefacts or from too small an S0."""

KNOTS = 8
"""Number of predicted signals at which the SD of the prediction's error is calibrated."""


def number_voxels(dwi: Dwi) -> Int[np.ndarray, "z x y"]:
    """Number the voxels of axial slices.

    Parameters
    ----------
    dwi : Dwi
        Its axes may be stored in any order and direction.

    Returns
    -------
    (z, x, y) int ndarray
        Row of each voxel in the signal, −1 outside the mask, on the axes nearest to the world's
        (RAS+), cropped to the mask.
    """
    inside, _, rows = canonical(dwi.mask, dwi.affine)
    number = np.full(inside.shape, -1)
    number[inside] = rows
    box = tuple(slice(int(v.min()), int(v.max()) + 1) for v in np.nonzero(inside))
    return number[box].transpose(2, 0, 1)


def attenuation(dwi: Dwi, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "voxel n"]:
    """Compute S/S0 of some measurements, with S0 the mean b0; 0 if S0 is not above 0."""
    s0 = dwi.mean_b0[:, None]
    ratio = np.where(s0 > 0, dwi.signal[:, indices] / np.where(s0 > 0, s0, 1), 0)
    return ratio.clip(-MAX_RATIO, MAX_RATIO).astype(np.float32)


def relative_noise(dwi: Dwi, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, " voxel"] | None:
    """Compute σ/S0 of some measurements, 0 if S0 is not above 0; None if σ is unknown."""
    sigma, s0 = dwi.noise_of(indices), dwi.mean_b0
    return None if sigma is None else np.where(s0 > 0, sigma / np.where(s0 > 0, s0, 1), 0).astype(
        np.float32)


class Minibatch(NamedTuple):
    """Slices for a training step or a validation.

    Attributes
    ----------
    inputs : (slice, n, x, y) tensor
        S/S0 along the directions of the input, 0 outside the mask.
    targets : (slice, m, x, y) tensor
        S/S0 along the directions of the target.
    noise : (slice, x, y) tensor
        σ/S0 of one measurement; NaN if σ is unknown.
    mask : (slice, x, y) bool tensor
        Voxels inside the mask.
    """

    inputs: Float[torch.Tensor, "slice n x y"]
    targets: Float[torch.Tensor, "slice m x y"]
    noise: Float[torch.Tensor, "slice x y"]
    mask: Bool[torch.Tensor, "slice x y"]


class SliceDataset:
    """Slices of several runs, in files that are mapped into memory.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    most : int
        Maximum number of slices of a run; they are spread evenly over the mask.
    inputs : int
        Number of inputs, which come before the targets.
    """

    def __init__(self, folder: Path, most: int, inputs: int) -> None:
        self.folder, self.most, self.inputs = folder, most, inputs
        self.runs: list[torch.Tensor] = []  # (slice, channel, x, y): S/S0, σ/S0, mask

    def add(self, dwi: Dwi, indices: Int[np.ndarray, " channel"]) -> None:
        """Add the slices of a run, given the measurements of inputs and targets, in order."""
        number = number_voxels(dwi)
        number = number[spread_evenly(len(number), self.most)]
        inside = number >= 0
        noise = relative_noise(dwi, indices)
        values = np.column_stack([
            attenuation(dwi, indices), np.full(len(dwi.signal), np.nan) if noise is None else noise,
            np.ones(len(dwi.signal))]).astype(np.float32)
        content = np.where(inside[..., None], values[number], 0).transpose(0, 3, 1, 2)
        path = self.folder / f"{len(self.runs)}"
        np.ascontiguousarray(content).tofile(path)
        self.runs.append(torch.from_file(str(path), size=content.size).view(content.shape))

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __call__(self, numbers: Sequence[int], targets: Sequence[int],
                 device: str | torch.device = "cpu") -> Minibatch:
        """Load slices by their numbers, padded with zeros to the size of the largest.

        Parameters
        ----------
        numbers : sequence of int
            Numbers of slices, over all runs.
        targets : sequence of int
            Numbers of the targets.
        device : str or torch.device
        """
        ends = np.cumsum([len(r) for r in self.runs])
        channels = [*range(self.inputs), *(self.inputs + t for t in targets), -2, -1]
        images = []
        for number in numbers:
            run = int(np.searchsorted(ends, number, side="right"))
            images.append(self.runs[run][number - int(ends[run])][channels])
        x, y = (max(image.shape[axis] for image in images) for axis in (1, 2))
        stack = torch.stack([nn.functional.pad(i, (0, y - i.shape[2], 0, x - i.shape[1]))
                             for i in images]).to(device)
        inputs, target, rest = stack.split([self.inputs, len(targets), 2], 1)
        return Minibatch(inputs, target, rest[:, 0], rest[:, 1] > 0)


def spread_evenly(count: int, most: int) -> Int[np.ndarray, " _"]:
    """Choose at most `most` of the numbers 0 … count − 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


class Linear(NamedTuple):
    """A linear prediction of targets, A x + a, with the SD s of its error.

    Attributes
    ----------
    matrix : (m, n) tensor
        A.
    shift, scale : (m,) tensor
        a and s.
    """

    matrix: Float[torch.Tensor, "m n"]
    shift: Float[torch.Tensor, " m"]
    scale: Float[torch.Tensor, " m"]

    def select(self, targets: Sequence[int], device: str | torch.device = "cpu") -> Linear:
        """Select the prediction of some targets."""
        return Linear(*(v[list(targets)].to(device) for v in self))

    def predict(self, inputs: Float[torch.Tensor, "slice n x y"]
                ) -> Float[torch.Tensor, "slice m x y"]:
        """Compute A x + a in each voxel."""
        return torch.einsum("mn,snxy->smxy", self.matrix, inputs) + self.shift[:, None, None]


def fit_linear(dataset: SliceDataset, constant: bool = False) -> Linear:
    """Fit the linear prediction to all voxels by least squares (normal equations).

    Parameters
    ----------
    dataset : SliceDataset
    constant : bool
        Whether A is 0, so that the prediction is the mean of the targets.
    """
    n = dataset.inputs
    size = dataset.runs[0].shape[1] - 1
    gram = np.zeros((size, size))
    for run in dataset.runs:
        values = run[:, :-2].movedim(1, 3)[run[:, -1] > 0].double().numpy()
        xy = np.insert(values, n, 1.0, axis=1)  # (x, 1, y)
        gram += xy.T @ xy
    used = slice(n if constant else 0, n + 1)
    targets = slice(n + 1, None)
    zz, zy, yy = gram[used, used], gram[used, targets], gram[targets, targets].diagonal()
    solution = np.zeros((n + 1, len(yy)))
    solution[used] = np.linalg.lstsq(zz, zy, rcond=None)[0]
    variance = (yy - (zy * solution[used]).sum(0)) / gram[n, n]
    return Linear(*(torch.from_numpy(np.ascontiguousarray(v, np.float32)) for v in (
        solution[:n].T, solution[n], np.sqrt(np.maximum(variance, 1e-12)))))


def hats(level: Float[np.ndarray, " voxel"], knots: Float[np.ndarray, " knot"]
         ) -> Float[np.ndarray, "voxel knot"]:
    """Compute the weights of linear interpolation between knots, constant beyond them."""
    return np.stack([np.interp(level, knots, row) for row in np.eye(len(knots))], 1)


def calibrate(predicted: Float[np.ndarray, "voxel m"], measured: Float[np.ndarray, "voxel m"],
              noise: Float[np.ndarray, " voxel"]) -> dict[str, Any]:
    """Fit the variance of the prediction's error to measurements that were held out.

    The square of measured − predicted has the expectation ν² + s², where ν = σ/S0 is the noise of
    the measurement, and

        s² = g_d ν² + Σ_k c_dk h_k(ŷ)

    is the variance of the error: noise of the inputs that reaches the prediction, with a gain g_d
    of each direction d, and what the inputs do not determine, interpolated (hats h_k) between
    predicted signals ŷ. g and c are fitted by non-negative least squares, with weights
    1/(ν² + median of squares)², since the SD of a square is proportional to its expectation.

    Parameters
    ----------
    predicted, measured : (voxel, m)
        S/S0.
    noise : (voxel,)
        ν.

    Returns
    -------
    dict
        `knots` (KNOTS,), `gain` (m,) and `variance` (m, KNOTS), as lists.
    """
    from scipy.optimize import nnls

    knots = np.quantile(predicted, (np.arange(KNOTS) + 0.5) / KNOTS)
    gain, variance = [], []
    for p, y in zip(predicted.T.astype(float), measured.T.astype(float), strict=True):
        square, nu2 = (y - p) ** 2, noise.astype(float) ** 2
        weight = 1 / (nu2 + np.median(square))
        design = np.column_stack([nu2, hats(p, knots)]) * weight[:, None]
        coefficients, _ = nnls(design, (square - nu2) * weight)
        gain.append(float(coefficients[0]))
        variance.append([float(c) for c in coefficients[1:]])
    return {"knots": [float(k) for k in knots], "gain": gain, "variance": variance}


def error_sd(predicted: Float[np.ndarray, "voxel m"], noise: Float[np.ndarray, " voxel"],
             constants: dict[str, Any], targets: Int[np.ndarray, " m"]
             ) -> Float[np.ndarray, "voxel m"]:
    """Compute the SD of the prediction's error, in units of S0.

    Parameters
    ----------
    predicted : (voxel, m)
        S/S0.
    noise : (voxel,)
        σ/S0.
    constants : dict
        Result of `calibrate`.
    targets : (m,) int
        Directions of the calibration that were predicted.
    """
    sd = np.empty_like(predicted)
    for column, d in enumerate(targets):
        rest = np.interp(predicted[:, column], constants["knots"], constants["variance"][d])
        sd[:, column] = np.sqrt(constants["gain"][d] * noise**2 + rest)
    return sd
