"""Direction of the largest fibre bundle of a voxel by a network on volumes (Weninger et al. 2022).

The published target are the polar and azimuthal angles of the direction n on a hemisphere, over π.
They jump where n leaves the hemisphere. By default the target is the matrix n nᵀ, which does not:
the network then estimates E[n nᵀ], whose principal eigenvector is the direction, and whose largest
eigenvalue is the expected cos² of the angle between the estimate and n.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bidsapp.kinds import Cohort, Derived, TrainingSettings
from bidsapp.volumetric import learn, scans
from bidsapp.volumetric.estimator import VolumeEstimator, find_white_matter, load_with_tissue
from bidsapp.volumetric.inputs import Grid
from bidsapp.volumetric.labels import choose_shell, label_fibres

AXIS, ANGLES = "axis", "angles"
"""Targets: the elements of n nᵀ, or the angles over π as published."""

ROWS, COLUMNS = (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)
"""Elements of n nᵀ in the order of the outputs."""


class DirectionEstimation(VolumeEstimator):
    """Estimator of the direction of the largest peak; the labels of its training are those of CSD.
    """

    intended_use = (
        "Direction of the largest fibre bundle of a voxel of white matter, as constrained "
        "spherical deconvolution of a longer acquisition would find it. In other tissue it means "
        "nothing. Not for diagnosis.")

    def task(self, cohort: Cohort, settings: TrainingSettings) -> learn.Task:
        target = self.settings("training")["target"]
        return learn.Task(partial(self._read, cohort, settings.device),
                          2 if target == ANGLES else len(ROWS),
                          partial(direction_loss, target), direction_metrics)

    def _read(self, cohort: Cohort, device: str, run: str) -> scans.Labelled:
        choose_shell(cohort.acquisitions[run])  # before a T1w image is segmented, in vain
        dwi = load_with_tissue(cohort, run)
        fibres = label_fibres(dwi, find_white_matter(dwi, device))
        axis = Grid.over(dwi).directions(fibres.axis)
        return scans.Labelled(dwi, (axis[:, ROWS] * axis[:, COLUMNS]).astype(np.float32),
                              fibres.valid)

    def activate(self, output: Float[torch.Tensor, "out x y z"]
                 ) -> Float[torch.Tensor, "6 x y z"]:
        return to_dyad(output)

    def derive(self, values: Float[np.ndarray, "voxel 6"], grid: Grid) -> Derived:
        dyads = to_matrix(torch.from_numpy(values))
        eigenvalues, vectors = torch.linalg.eigh(dyads)
        direction = vectors[:, :, 2].numpy() @ grid.rotation.T
        coherence = eigenvalues[:, 2].clamp(0, 1)
        return Derived({"direction": direction.astype(np.float32),
                        "coherence": coherence.numpy()})


def to_matrix(elements: Float[torch.Tensor, "*n 6"]) -> Float[torch.Tensor, "*n 3 3"]:
    """Arrange the six elements of symmetric matrices."""
    order = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])
    return elements[..., order.to(elements.device)]


def to_dyad(output: Float[torch.Tensor, "out ..."]) -> Float[torch.Tensor, "6 ..."]:
    """Convert outputs to the elements of n nᵀ; of two outputs, the angles of n over π."""
    if len(output) == len(ROWS):
        return output
    polar, azimuth = math.pi * output
    n = torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()])
    return n[list(ROWS)] * n[list(COLUMNS)]


def to_angles(axis: Float[torch.Tensor, "n 3"]) -> Float[torch.Tensor, "2 n"]:
    """Compute polar and azimuthal angle over π, both in [0, 1], of axes on the hemisphere y ≥ 0."""
    x, y, z = (axis * torch.where(axis[:, 1:2] < 0, -1, 1)).T
    return torch.stack([z.clamp(-1, 1).acos(), torch.atan2(y, x)]) / math.pi


def principal(elements: Float[torch.Tensor, "6 n"]) -> Float[torch.Tensor, "n 3"]:
    """Compute the eigenvectors of the largest eigenvalues."""
    return torch.linalg.eigh(to_matrix(elements.T))[1][:, :, 2]


def direction_loss(target: str, output: Float[torch.Tensor, "out x y z"], example: scans.Example
                   ) -> torch.Tensor:
    """Compute the mean square error of the angles over π, or of the elements of n nᵀ as a matrix
    (‖·‖²_F), over the valid voxels."""
    output, dyad = output[:, example.valid], example.target[:, example.valid]
    if target == ANGLES:
        return (output - to_angles(principal(dyad))).square().mean()
    return to_matrix((output - dyad).T).square().sum((1, 2)).mean()


def direction_metrics(output: Float[torch.Tensor, "out x y z"], example: scans.Example
                      ) -> dict[str, Any]:
    """Compute `mse_angles` (of the angles over π) and `degrees`, the median angle between axes."""
    truth = principal(example.target[:, example.valid])
    estimate = principal(to_dyad(output[:, example.valid]))
    cosine = (truth * estimate).sum(1).abs().clamp(max=1)
    angles = (to_angles(estimate) if len(output) == len(ROWS)
              else output[:, example.valid])
    return {"mse_angles": float((angles - to_angles(truth)).square().mean()),
            "degrees": float(cosine.acos().rad2deg().median())}
