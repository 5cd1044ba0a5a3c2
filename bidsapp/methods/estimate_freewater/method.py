"""Free water by a network that is trained on mixtures of the participant's tissues.

Weninger et al. 2020 (doi:10.1007/978-3-030-52893-5_8), with the mixtures of `simulate.mixture`.
README.md describes the changes and the reasons. Internal units: b in ms/µm², D in µm²/ms.
"""

from __future__ import annotations

import numpy as np
import torch

from bidsapp import tensor
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Derived, Estimator
from bidsapp.methods.estimate_freewater import network
from bidsapp.simulate import mixture
from bidsapp.simulate.mixture import Diffusivities

MAX_WATER = 0.8
"""Fraction above which a voxel is not corrected, because too little tissue remains."""

ASSUMED_SNR = 25.0
"""S0 over the noise SD assumed if the noise could not be measured (as in the paper)."""

NOISE_LEVELS = 101
"""Number of quantiles of the noise SD over S0 of the run, from which the training draws."""

AXIAL, RADIAL, GREY, WATER = (1.4, 2.0), (0.15, 0.45), (0.7, 0.9), 3.0
"""Diffusivities of the literature (µm²/ms): ranges of single fibres and grey matter of adults
(Pierpaoli et al. 1996, doi:10.1148/radiology.201.3.8939209), and free water at 37 °C."""


class FreeWater(Estimator):
    """Estimator of the free-water fraction, its SD, and FA and MD of the remaining tissue."""

    wants_tissue = True

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if there is no b0, or if no shell determines a fibre's tensor."""
        mixture.check(acquisition)

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        acquisition = dwi.acquisition
        self.check(acquisition)
        notices: list[str] = []
        try:
            regions = tissue.find_regions(dwi, device)
            diffusivities = mixture.measure(dwi, regions.gm, regions.csf, regions.single_fibre,
                                            device)
            source = "measured in this run"
            notices += regions.notices
        except Refusal as refusal:
            diffusivities, source = literature_diffusivities(len(acquisition.shells)), "literature"
            notices.append("Free water: the network was trained with diffusivities of the "
                           "literature, because those of this run could not be measured "
                           f"({refusal})")
        s0 = dwi.mean_b0
        sigma = dwi.noise_of(np.flatnonzero(~acquisition.b0))
        noise = (np.quantile(sigma / s0[s0 > 0], np.linspace(0, 1, NOISE_LEVELS))
                 if sigma and (s0 > 0).any() else np.array([1 / ASSUMED_SNR]))
        options = self.settings("network")
        model, error = network.train_network(diffusivities, acquisition, noise, dwi.s0_known,
                                             seed, device, options)

        water = torch.as_tensor(water_attenuation(diffusivities, acquisition),
                                dtype=torch.float32, device=device)
        b0 = torch.as_tensor(acquisition.b0, device=device)
        chosen = tensor.volumes(acquisition)
        x = tensor.design(acquisition[chosen].btensors)

        def estimate(signal: torch.Tensor) -> dict[str, torch.Tensor]:
            attenuation, s0 = network.normalise(signal, b0)
            fraction, sd = model(attenuation)
            water_s0 = torch.where(fraction > MAX_WATER, 0, fraction) * s0
            fit = tensor.fit((signal - water_s0[:, None] * water)[:, chosen], x)
            fa, md, failed = fit["fa"], fit["md"], fit["failed"]
            uncorrected = (water_s0 == 0) | failed | fit["clamped"]
            if uncorrected.any():
                original = tensor.fit(signal[uncorrected][:, chosen], x)
                for values, key in ((fa, "fa"), (md, "md"), (failed, "failed")):
                    values[uncorrected] = original[key]
            return {"fraction": fraction, "fraction_std": sd, "fa": fa, "md": md,
                    "uncorrected": uncorrected, "usable": (s0 > 0) & ~failed}

        maps = map_voxels(estimate, dwi.signal, device)
        usable, uncorrected = maps.pop("usable"), maps.pop("uncorrected")
        maps = {name: np.where(usable, values, 0).astype(np.float32)
                for name, values in maps.items()}
        shells = acquisition.shells
        counts = {"freewater_no_estimate": int((~usable).sum()),
                  "freewater_not_corrected": int((uncorrected & usable).sum())}
        return Derived(maps, counts, {
            "Diffusivities": source,
            "WaterDiffusivity": {f"b{s.b:.0f}": float(f"{d / 1000:.4g}") for s, d in zip(
                shells, diffusivities.csf_mean, strict=True)},
            "CorrectedUpTo": MAX_WATER,
            "NotCorrected": f"where the fraction is above {MAX_WATER}, or no tensor with positive "
                            "eigenvalues is left, FA and MD are those of the signal as it is",
            "NoiseSD": sigma or f"assumed: S0 / {ASSUMED_SNR:.0f}",
            "TrainingSamples": options["samples"], "TrainingSteps": options["schedule"]["steps"],
            "HeldOutRMSE": float(f"{error:.3g}")}, usable, notices)


def literature_diffusivities(shells: int) -> Diffusivities:
    """Create diffusivities of the literature, independent of b, for all shells.

    Parameters
    ----------
    shells : int
        Number of shells.

    Returns
    -------
    Diffusivities
    """
    axial, radial = (np.repeat(a.reshape(-1, 1), shells, 1) for a in np.meshgrid(
        np.linspace(*AXIAL, 7), np.linspace(*RADIAL, 7)))
    gm = np.repeat(np.linspace(*GREY, 9)[:, None], shells, 1)
    csf = np.full((1, shells), WATER)
    return Diffusivities(axial, radial, gm, csf, gm.mean(0), csf[0])


def water_attenuation(diffusivities: Diffusivities, acquisition: Acquisition) -> np.ndarray:
    """Compute S/S0 (measurement,) of CSF of mean diffusivity."""
    csf = diffusivities.csf_mean[None, None, :, None] * np.array([1, 0, 0, 1, 0, 1])
    return mixture.attenuation(np.ones((1, 1)), csf, acquisition, "cpu")[0]
