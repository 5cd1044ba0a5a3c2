"""Test voxels in bands of dispersion, SNR and acquisition.

An estimator may be right on average and wrong where it is used, as in coherent white matter. Each
band holds voxels of one number of Watson bundles, one range of κ, one SNR and one acquisition, with
parameters from the prior of the tissue model; further bands hold a bundle beside an isotropic part,
fans, and densities without direction. No training draws from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.simulate import forward, odf
from bidsapp.simulate.protocols import spread
from bidsapp.simulate.tissue import TissueModel, draw_bundles

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
    """A number of bundles (0 for a Bingham fan of κ1 in the range and κ2 below it), their range of
    κ, S0 over the noise SD, a key of ACQUISITIONS, and the range of the isotropic share."""

    bundles: int
    kappa: tuple[float, float]
    snr: float
    acquisition: str
    isotropic: tuple[float, float] = (0.0, 0.0)

    @property
    def label(self) -> str:
        """`1, 12–32`, with what is added to bundles."""
        if self.isotropic == (1.0, 1.0):
            return "isotropic"
        low, high = self.isotropic
        return (f"{self.bundles or 'fan'}, {self.kappa[0]:.0f}–{self.kappa[1]:.0f}"
                + f" + {100 * low:.0f}–{100 * high:.0f} % isotropic" * bool(high))

    def simulate(self, tissue: TissueModel, voxels: int, seed: int) -> tuple[Dwi, np.ndarray]:
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
             list(ACQUISITIONS).index(self.acquisition),
             *([round(100 * share) for share in self.isotropic] if self.isotropic[1] else [])]
        ).generate_state(1)[0]))
        truth = tissue.draw(voxels, generator)
        densities = self._densities(voxels, generator)
        clean = forward.Protocol(acquired, L_MAX, densities).signal(
            densities, tissue.compartments(truth))
        noise = torch.randn(2, *clean.shape, generator=generator) / self.snr
        signal = torch.hypot(clean + noise[0], noise[1]).numpy()
        return Dwi(signal, np.ones((voxels, 1, 1), bool), np.eye(4), acquired,
                   noise_sd=1 / self.snr), truth.numpy()


    def _densities(self, voxels: int, generator: torch.Generator) -> torch.Tensor:
        if self.bundles:
            made = draw_bundles(voxels, generator, L_MAX, bundles=self.bundles, kappa=self.kappa)
        else:
            low, high = self.kappa
            share = torch.rand(2, voxels, generator=generator)
            kappa = low * (high / low) ** share[0]
            axes = odf.random_rotations(voxels, generator).float().mT[:, :2]
            made = odf.bingham(axes, torch.stack([kappa, kappa * share[1]], 1), L_MAX)
        low, high = self.isotropic
        if high:
            made[:, 1:] *= 1 - low - (high - low) * torch.rand(voxels, 1, generator=generator)
        return made


def bands() -> Iterator[Band]:
    """Bundles alone: every number, range of κ, SNR and acquisition."""
    return (Band(*key) for key in product(BUNDLES, KAPPAS, SNRS, ACQUISITIONS))


def other_bands() -> Iterator[Band]:
    """A bundle beside an isotropic part, fans, and densities without direction."""
    for (bundles, isotropic), snr, acquired in product(
            ((1, (0.2, 0.6)), (0, (0.0, 0.0)), (1, (1.0, 1.0))), SNRS, ACQUISITIONS):
        yield Band(bundles, (12.0, 32.0), snr, acquired, isotropic)
