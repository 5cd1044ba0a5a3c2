"""Test voxels in bands of dispersion, SNR and acquisition.

An estimator may be right on average and wrong where it is used, as in coherent white matter. Each
band holds voxels of one number of Watson bundles, one range of κ, one SNR and one acquisition, with
parameters from the prior of the tissue model. No training draws from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.simulate import forward
from bidsapp.simulate.protocols import spread
from bidsapp.simulate.tissue import Tissue, draw_bundles

L_MAX = 20
"""Degree of densities and signals, above that of the training, so that the test sees its error."""

BUNDLES = (1, 2, 3)
KAPPAS = ((1.0, 4.0), (4.0, 12.0), (12.0, 32.0), (32.0, 128.0))
SNRS = (10.0, 20.0, 50.0)


def acquisition(b0: int, shells: Mapping[float, int]) -> Acquisition:
    """b0 volumes, then shells {b in s/mm²: directions}, each spread evenly."""
    return Acquisition(np.r_[np.zeros(b0), np.repeat(list(shells), list(shells.values()))],
                       np.concatenate([np.zeros((b0, 3)), *map(spread, shells.values())]))


ACQUISITIONS = {
    "1000 × 60, 2200 × 60": acquisition(4, {1000: 60, 2200: 60}),
    "1000 × 30, 2000 × 60": acquisition(13, {1000: 30, 2000: 60}),
    "700 × 16, 2500 × 32": acquisition(2, {700: 16, 2500: 32}),
    "1000, 2000, 3000 × 90": acquisition(18, {1000: 90, 2000: 90, 3000: 90})}
"""The published test; mdt_multishell's; a short clinical one; the Human Connectome Project's."""


@dataclass(frozen=True)
class Band:
    """A number of bundles, their range of κ, S0 over the noise SD, and a key of ACQUISITIONS."""

    bundles: int
    kappa: tuple[float, float]
    snr: float
    acquisition: str

    def simulate(self, tissue: Tissue, voxels: int, seed: int) -> tuple[Dwi, np.ndarray]:
        """Draw a run of the band, with Rician noise of known SD, and its truth.

        Returns
        -------
        Dwi
            `voxels` in a row, S0 = 1.
        (voxel, parameter) ndarray
            Parameters of the tissue model, in the order of its names.
        """
        acquired = ACQUISITIONS[self.acquisition]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(
            [seed, self.bundles, int(self.kappa[0]), int(self.snr),
             list(ACQUISITIONS).index(self.acquisition)]).generate_state(1)[0]))
        truth = tissue.draw(voxels, generator)
        densities = draw_bundles(voxels, generator, L_MAX, bundles=self.bundles, kappa=self.kappa)
        clean = forward.Protocol(acquired, L_MAX, densities).signal(
            densities, tissue.compartments(truth))
        noise = torch.randn(2, *clean.shape, generator=generator) / self.snr
        signal = torch.hypot(clean + noise[0], noise[1]).numpy()
        return Dwi(signal, np.ones((voxels, 1, 1), bool), np.eye(4), acquired,
                   noise_sd=1 / self.snr), truth.numpy()


def bands() -> Iterator[Band]:
    """Every band."""
    return (Band(*key) for key in product(BUNDLES, KAPPAS, SNRS, ACQUISITIONS))
