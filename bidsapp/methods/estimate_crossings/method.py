"""Number of fibre bundles of a voxel by a network on volumes (Weninger et al. 2022)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from bidsapp.kinds import Cohort, Derived, TrainingSettings
from bidsapp.volumetric import learn, scans
from bidsapp.volumetric.estimator import (
    VolumeEstimator,
    class_loss,
    class_metrics,
    find_white_matter,
    load_with_tissue,
    one_hot,
)
from bidsapp.volumetric.inputs import Grid
from bidsapp.volumetric.labels import MAX_PEAKS, choose_shell, label_fibres


class CrossingDetection(VolumeEstimator):
    """Estimator of the number of peaks, 0 to 3; the labels of its training are those of CSD."""

    intended_use = (
        "Number of fibre bundles that cross in a voxel of white matter (0 outside of it), as "
        "constrained spherical deconvolution of a longer acquisition would find them. Not for "
        "diagnosis.")

    def task(self, cohort: Cohort, settings: TrainingSettings) -> learn.Task:
        return learn.Task(partial(self._read, cohort, settings.device), MAX_PEAKS + 1,
                          partial(class_loss, self.settings("training")["loss"]), class_metrics)

    def _read(self, cohort: Cohort, device: str, run: str) -> scans.Labelled:
        choose_shell(cohort.acquisitions[run])  # before a T1w image is segmented, in vain
        dwi = load_with_tissue(cohort, run)
        white = find_white_matter(dwi, device)
        fibres = label_fibres(dwi, white)
        return scans.Labelled(dwi, one_hot(fibres.count, MAX_PEAKS + 1),
                              (fibres.valid | ~white) & (dwi.mean_b0 > 0))

    def activate(self, output: Float[torch.Tensor, "4 x y z"]) -> Float[torch.Tensor, "4 x y z"]:
        return output.softmax(0)

    def derive(self, values: Float[np.ndarray, "voxel 4"], grid: Grid) -> Derived:
        count = values.argmax(1)
        probability = values.max(1).clip(0, 1)
        return Derived({"count": count.astype(np.float32), "probability": probability})
