"""Hybrid convolutional network: the tensor fit, a known operator, stands in its loss (Sadegheih et
al. 2023, doi:10.1007/s13218-023-00811-y, WP1, after Weninger et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bidsapp import training
from bidsapp.methods.paired import PairedHarmonizer
from bidsapp.methods.samples import MEASURES, Samples, all_errors
from bidsapp.networks.shresnet import CENTRE


class HybridHarmonizer(PairedHarmonizer):
    """Intensity warping, then a convolutional network that learns from signal, FA and MD."""

    network = "hybrid"
    warps = True
    adds = True
    intended_use = (
        "Maps the diffusion signal of one batch to that of the reference batch, for acquisitions "
        "and people like those under trained_for: FA and MD of each shell above all. Intensities "
        "are warped to the reference's distribution, which removes differences of anatomy, age or "
        "disease that change it. Not for diagnosis.")

    def loss(self, samples: Samples, voxels: torch.Tensor, recipe: Mapping[str, Any], device: str
             ) -> Callable[[torch.Tensor, training.Batch], torch.Tensor]:
        """Σ_m w_m e_m / ē_m over signal, FA and MD: square errors in units of their mean ē before
        the network."""
        few = voxels[::max(1, len(voxels) // recipe["validation"])]
        before = torch.cat([all_errors(b[0][:, CENTRE], b) for b in samples.blocks(few, device)], 1)
        weight = torch.tensor([recipe["loss"][m] for m in MEASURES], device=device)
        weight = weight / before.mean(1).clamp(min=1e-12)
        return lambda found, batch: weight @ all_errors(found, batch)
