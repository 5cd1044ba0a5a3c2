"""Hybrid convolutional network: its loss contains the tensor fit, a known operator.

(Sadegheih et al. 2023, doi:10.1007/s13218-023-00811-y, WP1, after Weninger et al. 2022.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bidsapp.harmonization.paired import PairedHarmonizer
from bidsapp.harmonization.patches import PatchDataset, PatchMinibatch, weighted_loss


class HybridHarmonizer(PairedHarmonizer):
    """Intensity warping, then a convolutional network with a loss of signal, FA and MD."""

    warps_intensity = True
    intended_use = (
        "Maps the diffusion signal of one site to that of the reference site, for acquisitions "
        "and participants like those under trained_for. It is trained for FA and MD of each shell "
        "above all. Fibre directions may change. Not for diagnosis.")

    def loss(self, samples: PatchDataset, voxels: torch.Tensor, recipe: Mapping[str, Any],
             device: str) -> Callable[[torch.Tensor, PatchMinibatch], torch.Tensor]:
        return weighted_loss(recipe["loss"], samples, voxels, recipe["validation"], device)
