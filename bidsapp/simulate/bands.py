"""Test voxels in bands (strata) of dispersion, SNR and acquisition.

An estimator may be right on average but wrong for some tissue, such as coherent white matter. Each
band holds voxels of one number of Watson bundles, one range of κ, one SNR and one acquisition, with
parameters from the prior of the tissue model. Other bands hold a bundle beside an isotropic part,
fans, and isotropic densities. No training uses these voxels.
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
"""Degree of densities and signals. It exceeds that of the training, so that tests include the error
of the truncation."""

BUNDLES = (1, 2, 3)
"""Numbers of Watson bundles."""

KAPPAS = ((1.0, 4.0), (4.0, 12.0), (12.0, 32.0), (32.0, 128.0))
"""Ranges of the concentration of a bundle."""

SNRS = (10.0, 20.0, 50.0)
"""S0 over the noise SD."""


def acquisition(b0: int, shells: Mapping[float, int]) -> Acquisition:
    """Create an acquisition of `b0` volumes, then shells {b in s/mm²: directions}, spread
    evenly."""
    return Acquisition(np.r_[np.zeros(b0), np.repeat(list(shells), list(shells.values()))],
                       np.concatenate([np.zeros((b0, 3)), *map(spread, shells.values())]))


ACQUISITIONS = {
    "1000 × 60, 2200 × 60": acquisition(4, {1000: 60, 2200: 60}),
    "1000 × 30, 2000 × 60": acquisition(13, {1000: 30, 2000: 60}),
    "700 × 16, 2500 × 32": acquisition(2, {700: 16, 2500: 32}),
    "1000, 2000, 3000 × 90": acquisition(18, {1000: 90, 2000: 90, 3000: 90})}
"""Acquisitions: that of the test of Kerkelä et al. 2024, that of the data set mdt_multishell of the
benchmarks, a short clinical one, and that of the Human Connectome Project."""


@dataclass(frozen=True)
class Band:
    """Definition of the voxels of a band.

    Parameters
    ----------
    bundles : int
        Number of Watson bundles; 0 for a Bingham fan with κ1 in the range and κ2 ≤ κ1.
    kappa : (float, float)
        Range of κ; log κ is uniform.
    snr : float
        S0 over the noise SD.
    acquisition : str
        Key of ACQUISITIONS.
    isotropic : (float, float)
        Range of the share of an isotropic part.
    """

    bundles: int
    kappa: tuple[float, float]
    snr: float
    acquisition: str
    isotropic: tuple[float, float] = (0.0, 0.0)

    @property
    def label(self) -> str:
        """Name of the density, such as `1, 12–32 + 20–60 % isotropic`."""
        if self.isotropic == (1.0, 1.0):
            return "isotropic"
        low, high = self.isotropic
        return (f"{self.bundles or 'fan'}, {self.kappa[0]:.0f}–{self.kappa[1]:.0f}"
                + f" + {100 * low:.0f}–{100 * high:.0f} % isotropic" * bool(high))

    def simulate(self, tissue: TissueModel, voxels: int, seed: int) -> tuple[Dwi, np.ndarray]:
        """Simulate a run of the band, with Rician noise of known SD, and its truth.

        Parameters
        ----------
        tissue : TissueModel
            Model without prescribed densities (`watson`) and `aligned` compartments.
        voxels : int
        seed : int

        Returns
        -------
        dwi : Dwi
            `voxels` in a row, S0 = 1.
        truth : (voxel, parameter) ndarray
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
            odfs = draw_bundles(voxels, generator, L_MAX, bundles=self.bundles, kappa=self.kappa)
        else:
            low, high = self.kappa
            uniform = torch.rand(2, voxels, generator=generator)
            kappa = low * (high / low) ** uniform[0]
            axes = odf.random_rotations(voxels, generator).float().mT[:, :2]
            odfs = odf.bingham(axes, torch.stack([kappa, kappa * uniform[1]], 1), L_MAX)
        low, high = self.isotropic
        if high:
            odfs[:, 1:] *= 1 - low - (high - low) * torch.rand(voxels, 1, generator=generator)
        return odfs


def bands() -> Iterator[Band]:
    """Iterate over the bands of bundles alone: every number, range of κ, SNR and acquisition."""
    return (Band(*key) for key in product(BUNDLES, KAPPAS, SNRS, ACQUISITIONS))


def other_bands() -> Iterator[Band]:
    """Iterate over bands of a bundle with an isotropic part, of fans and of isotropic densities."""
    for (bundles, isotropic), snr, acquired in product(
            ((1, (0.2, 0.6)), (0, (0.0, 0.0)), (1, (1.0, 1.0))), SNRS, ACQUISITIONS):
        yield Band(bundles, (12.0, 32.0), snr, acquired, isotropic)
