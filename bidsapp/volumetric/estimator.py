"""Base class of the methods that estimate maps by a network on volumes, and their losses."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp import selection
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.kinds import Cohort, Derived, Fitted, TrainingSettings
from bidsapp.networks.builder import build_network
from bidsapp.volumetric import inputs, learn, scans
from bidsapp.volumetric.apply import apply
from bidsapp.volumetric.inputs import Grid

LOSSES = CROSS_ENTROPY, L1 = "cross-entropy", "l1"
"""Losses of class probabilities (`class_loss`)."""


class VolumeEstimator(selection.NetworkEstimator):
    """Estimator of maps by a network on volumes, which learns them from labels of the runs.

    Attributes
    ----------
    intended_use : str
        Text of the model card, set by each method.
    """

    intended_use: ClassVar[str]

    @abstractmethod
    def task(self, cohort: Cohort, settings: TrainingSettings) -> learn.Task:
        """Describe what the network learns."""

    @abstractmethod
    def activate(self, output: Float[torch.Tensor, "out x y z"]
                 ) -> Float[torch.Tensor, "k x y z"]:
        """Convert outputs to values that may be averaged, such as probabilities."""

    @abstractmethod
    def derive(self, values: Float[np.ndarray, "voxel k"], grid: Grid) -> Derived:
        """Convert values of the voxels of a run to maps."""

    @cached_property
    def weights(self) -> list[Checkpoint]:
        """All networks, those of one table first: where one fits, it was trained for that."""
        return sorted(super().weights, key=lambda c: c.card.network["any_table"])

    def check(self, acquisition: Acquisition) -> None:
        """Check that there are weights for an acquisition.

        Raises
        ------
        Refusal
            No network supports the acquisition, or it has no b0 or no shell of 6 linear directions.
        """
        inputs.weighted(acquisition)
        super().check(acquisition)

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        checkpoint = self.select(dwi.acquisition)
        card = checkpoint.card
        shells, violations = selection.select_shells(card, dwi.acquisition,
                                                     allow=self.context.allow_extrapolation)
        usable = np.concatenate([s.indices for s in inputs.usable_shells(dwi.acquisition)])
        shells = [s for s in shells if np.isin(s.indices, usable).all()]
        parameters, notices = selection.describe_shells_used(card, dwi.acquisition, shells,
                                                             violations)
        channels = scans.Channels(**card.constants["channels"])
        used = np.sort(np.concatenate([np.flatnonzero(dwi.acquisition.b0),
                                       *(s.indices for s in shells)]))
        dwi = dwi.select_volumes(used)
        grid = Grid.over(dwi, channels.voxel)
        network: Any = checkpoint.into(build_network(card.network)).to(device)
        measured = dwi.acquisition[inputs.weighted(dwi.acquisition)]
        if channels.directions:
            matrix, degree = channels.interpolate(measured, grid)
            if degree is not None:
                parameters["InterpolationDegree"] = degree
            if degree is not None and degree < inputs.DEGREE:
                notices.append(f"{self.short}: the signal was interpolated to the table of the "
                               f"training with SH of degree {degree}, since the directions "
                               "determine no more.")
        else:
            matrix = network.matrix(inputs.describe_table(measured, grid).to(device)).detach()
        snr = dwi.snr_of(inputs.weighted(dwi.acquisition))
        notices += [f"{self.short}: {text}" for text in (
            f"the network learned from {card.training['data']} ({card.training['runs']} runs, "
            f"{card.training['steps']} steps).", *card.warnings,
            *card.trained_for.warnings(snr, {}))]
        values = apply(network, dwi, grid, matrix, self.activate, card.training["patch"], device)
        derived = self.derive(values, grid)
        # the grid may leave voxels at a ragged edge of the mask out
        inside = grid.voxels(torch.ones(1, *grid.shape)).numpy()[:, 0] > 0
        valid = inside & (dwi.mean_b0 > 0)
        size = inputs.describe_edges(np.linalg.norm(dwi.affine[:3, :3], axis=0))
        if grid.ratio != (1, 1, 1):
            notices.append(f"{self.short}: voxels of {size} mm were resampled to "
                           f"{channels.voxel:.3g} mm, those of the training, and the results "
                           "back.")
        return replace(
            derived, valid=valid, maps={k: (v.T * valid).T for k, v in derived.maps.items()},
            notices=[*derived.notices, *notices],
            parameters={**derived.parameters, **parameters, "Weights": card.sha256,
                        "TrainingData": card.training["data"], "NetworkVoxel": channels.voxel})

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a network on the labels of the cohort, from the encoder of `--init` or the bundled
        one."""
        start = learn.choose_start(self, settings.init)
        name, checkpoint = learn.fit(self, self.task(cohort, settings), cohort, settings,
                                     intended_use=self.intended_use, start=start)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": dict(checkpoint.card.metrics),
                           "UsedFor": "runs within their training domain",
                           "MetricsOf": "the middle of the held-out runs"}, {name: checkpoint})


def find_white_matter(dwi: Dwi, device: str) -> Bool[np.ndarray, " voxel"]:
    """Find white matter by the posteriors of the T1w image, or else by MD and FA
    (`tissue.labels`)."""
    fitted = tissue.tensor_maps(dwi, device)
    usable = (dwi.mean_b0 > 0) & ~fitted["failed"]
    return tissue.labels(dwi, fitted["md"], fitted["fa"], usable) == tissue.WHITE


def load_with_tissue(cohort: Cohort, run: str) -> Dwi:
    """Load a run with the tissue probabilities of its T1w image, if it has one."""
    assert cohort.load
    return replace(cohort.load(run), tissue=cohort.tissue(run) if cohort.tissue else None)


def class_loss(kind: str, output: Float[torch.Tensor, "class x y z"], example: scans.Example
               ) -> torch.Tensor:
    """Compute the loss of class probabilities against one-hot labels, over the valid voxels.

    Parameters
    ----------
    kind : str
        `cross-entropy`, or `l1`: Σ |p − label| of the probabilities p, as published.
    output : (class, x, y, z)
        Logits.
    example : Example
        Its target has the labels, whose sum is 1 in valid voxels.
    """
    logits, label = output[:, example.valid], example.target[:, example.valid]
    if kind == L1:
        return (logits.softmax(0) - label).abs().sum(0).mean()
    return -(label * logits.log_softmax(0)).sum(0).mean()


def one_hot(labels: np.ndarray, classes: int) -> Float[np.ndarray, "voxel class"]:
    """Convert labels 0 … classes − 1 to one-hot rows."""
    return np.eye(classes, dtype=np.float32)[labels]


def class_metrics(output: Float[torch.Tensor, "class x y z"], example: scans.Example
                  ) -> dict[str, float]:
    """Compute `accuracy` and `f1`, the mean over classes of the F1 score (Dice coefficient)."""
    predicted = output[:, example.valid].argmax(0)
    label = example.target[:, example.valid].argmax(0)
    scores = []
    for k in label.unique():
        both = ((predicted == k) & (label == k)).sum()
        scores.append(float(2 * both / ((predicted == k).sum() + (label == k).sum())))
    return {"accuracy": float((predicted == label).float().mean()), "f1": float(np.mean(scores))}
