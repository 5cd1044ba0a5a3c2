"""Grey matter, white matter and CSF from diffusion signals alone (Weninger et al. 2022)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from bidsapp.errors import Refusal
from bidsapp.kinds import Cohort, Derived, TrainingSettings
from bidsapp.volumetric import learn, scans
from bidsapp.volumetric.estimator import (
    VolumeEstimator,
    class_loss,
    class_metrics,
    load_with_tissue,
    one_hot,
)
from bidsapp.volumetric.inputs import Grid
from bidsapp.volumetric.labels import label_tissue

CLASSES = ("gm", "wm", "csf")
"""Tissues in the order of `Dwi.tissue`; their labels in the segmentation count from 1."""


class TissueSegmentation(VolumeEstimator):
    """Estimator of tissue probabilities; the labels of its training are those of T1w images."""

    intended_use = (
        "Grey matter, white matter and CSF of the brain from diffusion signals alone, where there "
        "is no T1w image. What was rare in the training, such as lesions, gets the label of what "
        "it resembles. Not for diagnosis.")

    def task(self, cohort: Cohort, settings: TrainingSettings) -> learn.Task:
        return learn.Task(partial(self._read, cohort), len(CLASSES),
                          partial(class_loss, self.settings("training")["loss"]), class_metrics)

    def _read(self, cohort: Cohort, run: str) -> scans.Labelled:
        dwi = load_with_tissue(cohort, run)
        if dwi.tissue is None:
            raise Refusal("it has no T1w image that its tissue could be learned from. Add one, or "
                          "use the bundled weights (without training).")
        labels = label_tissue(dwi.tissue)
        valid = (labels > 0) & (dwi.mean_b0 > 0)
        return scans.Labelled(dwi, one_hot(np.maximum(labels, 1) - 1, len(CLASSES)), valid)

    def activate(self, output: Float[torch.Tensor, "3 x y z"]) -> Float[torch.Tensor, "3 x y z"]:
        return output.softmax(0)

    def derive(self, values: Float[np.ndarray, "voxel 3"], grid: Grid) -> Derived:
        maps = dict(zip(CLASSES, values.T.clip(0, 1), strict=True))
        return Derived({**maps, "segmentation": values.argmax(1).astype(np.float32) + 1})
