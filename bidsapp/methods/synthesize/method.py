"""Single-voxel signals with known truth, synthesized from the diffusivities of one participant.

Sadegheih et al. 2023 (doi:10.1007/s13218-023-00811-y, WP2); README.md describes the choices that
the paper leaves open. The mixtures are those of `simulate.mixture`, with S0 and the noise SD of the
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from bidsapp.acquisition import Acquisition, Shell
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.kinds import Derived, Synthesizer, Synthetic, SyntheticImage
from bidsapp.methods.synthesize import score
from bidsapp.options import Options
from bidsapp.simulate import mixture
from bidsapp.simulate.mixture import COMPARTMENTS, FIBRES, Diffusivities, Mixtures
from bidsapp.simulate.unmix import unmix

BLOCK = 20_000
"""Voxels of a whole image that are simulated at a time."""

ASSUMED_SNR = 25.0
"""S0 over the noise SD assumed if the noise could not be measured (as Weninger et al. 2020)."""

TERMS = ("dxx", "dxy", "dxz", "dyy", "dyz", "dzz")
"""Names of the entries of a tensor, in the order of `Mixtures.tensors`."""


class Synthesis(Synthesizer):
    """Synthesizer of mixtures of three fibre populations, grey matter and CSF with the gradient
    table of a run."""

    wants_tissue = True

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if there is no b0, or if no shell determines a fibre's tensor."""
        mixture.check(acquisition)

    def run(self, dwi: Dwi, options: Options, device: str) -> Derived:
        result = self.synthesize(dwi, options.synthesize, options.random_seed, device,
                                 voxels=options.synthesize_voxels, image=options.synthesize_image)
        return replace(result.derived, notices=result.notices, synthetic=result)

    def synthesize(self, dwi: Dwi, modes: Sequence[str], seed: int, device: str, *,
                   voxels: int = 10_000, image: bool = False) -> Synthetic:
        """Simulate voxels with known truth in each mode.

        Fractions, directions and noise depend on the seed and not on the mode, so that modes can be
        compared voxel by voxel.

        Parameters
        ----------
        dwi : Dwi
        modes : sequence of str
        seed : int
        device : str
        voxels : int
            Number of voxels in each mode.
        image : bool
            Whether to simulate a whole image in each mode, too.

        Returns
        -------
        Synthetic

        Raises
        ------
        Refusal
            The acquisition is not sufficient, or a tissue has too few voxels.
        """
        self.check(dwi.acquisition)
        shells = dwi.acquisition.shells
        regions = tissue.find_regions(dwi, device)
        measured = mixture.measure(dwi, regions.gm, regions.csf, regions.single_fibre, device)
        s0 = float(np.median(dwi.mean_b0))
        sd = dwi.noise_sd or s0 / ASSUMED_SNR
        signals, truth = {}, {}
        columns: dict[str, dict[str, dict[str, str]]] = {}
        for mode in modes:
            mixtures = mixture.mix(mode, measured, dwi.acquisition, voxels, seed, device)
            signals[mode] = _add_noise(s0 * mixtures.attenuation, sd, [seed, 1])
            truth[mode], columns[mode] = _tabulate_truth(mixtures, shells)
        images = {}
        if image:
            layout = unmix(dwi, measured, device)
            images = {mode: _simulate_image(mode, dwi, measured, layout, sd, seed, device)
                      for mode in modes}
        labels = np.select([regions.single_fibre, regions.gm, regions.csf], [3, 1, 2], 0)
        parameters = {
            "S0": s0, "NoiseSD": sd, "NoiseLaw": "Rician",
            "NoiseSource": "residuals of SH fits to this run" if dwi.noise_sd
            else f"assumed: S0 / {ASSUMED_SNR:.0f}",
            "TissueSource": regions.source, "GreyMatterVoxels": int(regions.gm.sum()),
            "CSFVoxels": int(regions.csf.sum()),
            "SingleFibreVoxels": int(regions.single_fibre.sum()),
            "SingleFibreRegion": "corpus callosum" if regions.callosum else "brain",
            **_summarise_diffusivities(measured, shells)}
        notices = [*regions.notices, *([] if regions.callosum else [
            f"Synthesis: fewer than {tissue.MIN_VOXELS} voxels with FA > "
            f"{tissue.SINGLE_FIBRE_FA:g} were found in the corpus callosum. The "
            f"{parameters['SingleFibreVoxels']} such voxels of the whole brain were used as "
            "single fibres instead."])]
        if len(shells) == 1:
            notices.append("Synthesis: the run has a single shell, so the signals contain no "
                           "dependence on b beyond one tensor per fibre.")
        return Synthetic(signals, truth, columns,
                         Derived({"tissue": labels.astype(np.float32)}, {}, parameters),
                         parameters, notices, images,
                         score.score_modes(dwi, measured, modes, s0, sd, seed, device,
                                           self.settings("score")))


def _add_noise(clean: np.ndarray, sd: float, seed: Sequence[int]) -> np.ndarray:
    """Add Rician noise. Seeds are [seed, 1] of single voxels and [seed, 5, block] of an image, so
    that they differ from those of `simulate.mixture`."""
    noise = np.random.default_rng(seed).standard_normal((2, *clean.shape))
    return np.hypot(clean + sd * noise[0], sd * noise[1]).astype(np.float32)


def _simulate_image(mode: str, dwi: Dwi, measured: Diffusivities,
                    layout: tuple[np.ndarray, np.ndarray], sd: float, seed: int, device: str
                    ) -> SyntheticImage:
    """Simulate the voxels of the mask with their mean b0.

    `layout` holds the fractions (voxel, 5) and directions (voxel, 3, 3) that `unmix` returns.
    """
    signal = np.empty(dwi.signal.shape, np.float32, order="F")
    diffusivities: list[np.ndarray] = []
    for k, start in enumerate(range(0, len(signal), BLOCK)):
        rows = slice(start, start + BLOCK)
        mixtures = mixture.simulate_given(mode, measured, dwi.acquisition, layout[0][rows],
                                          layout[1][rows], [seed, 4, k], device)
        signal[rows] = _add_noise(dwi.mean_b0[rows, None] * mixtures.attenuation, sd, [seed, 5, k])
        diffusivities.append(_list_diffusivities(mixtures))
    shells = _shell_names(dwi.acquisition.shells)
    fibre_names = [f"{c}_{direction}" for c in FIBRES for direction in ("axial", "radial")]
    names = [f"{name}_{b}" for b in shells
             for name in [*(fibre_names if mode != mixture.RANDOM else []), "gm", "csf"]]
    truth = {"fraction": layout[0], "diffusivity": np.concatenate(diffusivities)}
    volumes: dict[str, Sequence[str]] = {"fraction": COMPARTMENTS, "diffusivity": names}
    if mode == mixture.RANDOM:
        volumes["diffusivity"] = [*names, *(f"wm_volume{i}" for i in range(len(dwi.acquisition)))]
    else:
        truth["direction"] = layout[1].reshape(-1, 9)
        volumes["direction"] = [f"{c}_{axis}" for c in FIBRES for axis in "xyz"]
    return SyntheticImage(signal, {k: v.astype(np.float32) for k, v in truth.items()}, volumes, {
        "S0": "mean b0 of each voxel", "NoiseSeed": [seed, 5]})


def _list_diffusivities(mixtures: Mixtures) -> np.ndarray:
    """List diffusivities (voxel, k) in mm²/s: per shell axial and radial of each fibre, grey matter
    and CSF; then, in `random-wm`, white matter in each volume."""
    xx, trace = mixtures.tensors[..., 0], mixtures.tensors[..., [0, 3, 5]].sum(-1)
    values = [xx[:, -2:]]
    if mixtures.profile is None:
        n = mixtures.directions[..., None, :]
        t = mixtures.tensors[:, :len(FIBRES)]
        along = ((n**2 * t[..., [0, 3, 5]]).sum(-1) + 2 * (
            n[..., [0, 0, 1]] * n[..., [1, 2, 2]] * t[..., [1, 2, 4]]).sum(-1))
        across = (trace[:, :len(FIBRES)] - along) / 2
        values.insert(0, np.stack([along, across], 2).reshape(len(t), -1, t.shape[2]))
    by_shell = np.concatenate(values, 1).transpose(0, 2, 1).reshape(len(xx), -1)
    profile = [] if mixtures.profile is None else [mixtures.profile]
    return np.concatenate([by_shell, *profile], 1) / 1000


def _shell_names(shells: Sequence[Shell]) -> list[str]:
    """Name shells b1000 or b1000m50 (b_delta −0.50), which are valid names in MATLAB."""
    return [f"b{s.b:.0f}" + ("" if s.b_delta > 0.95 else
                             f"{'m' if s.b_delta < 0 else 'p'}{abs(s.b_delta) * 100:.0f}")
            for s in shells]


def _tabulate_truth(mixtures: Mixtures, shells: Sequence[Shell]
                    ) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """Tabulate the truth, one row per voxel (diffusivities in mm²/s), and describe each column."""
    columns: dict[str, np.ndarray] = {}
    descriptions: dict[str, dict[str, str]] = {}

    def add(name: str, values: np.ndarray, description: str, units: str) -> None:
        columns[name], descriptions[name] = values, {"Description": description, "Units": units}

    for c, name in enumerate(COMPARTMENTS):
        add(f"{name}_fraction", mixtures.fractions[:, c], f"Signal fraction of {name} at b = 0",
            "unitless")
    fibres = FIBRES if mixtures.profile is None else ()
    for c, name in enumerate(fibres):
        for k, axis in enumerate("xyz"):
            add(f"{name}_direction_{axis}", mixtures.directions[:, c, k],
                f"{axis} of the fibre direction of {name}, world axes (RAS+); its sign means "
                "nothing", "unitless")
    for i, (label, shell) in enumerate(zip(_shell_names(shells), shells, strict=True)):
        where = f"at b = {shell.b:.0f} s/mm², b_delta = {shell.b_delta:.2g}"
        for c, name in enumerate(fibres):
            for k, term in enumerate(TERMS):
                add(f"{name}_{label}_{term}", mixtures.tensors[:, c, i, k] / 1000,
                    f"{term} of the diffusion tensor of {name} {where}, world axes (RAS+)",
                    "mm^2/s")
        for c, name in enumerate(("gm", "csf"), len(fibres)):
            add(f"{name}_{label}_d", mixtures.tensors[:, c, i, 0] / 1000,
                f"Diffusivity of {name} {where}", "mm^2/s")
    for i, values in enumerate(() if mixtures.profile is None else mixtures.profile.T):
        add(f"wm_volume{i}_d", values / 1000,
            f"Diffusivity of wm1, wm2 and wm3 in volume {i} (counted from 0)", "mm^2/s")
    return pd.DataFrame(columns), descriptions


def _summarise_diffusivities(measured: Diffusivities, shells: Sequence[Shell]
                             ) -> Mapping[str, Mapping[str, float]]:
    """Summarise mean diffusivities (mm²/s) by shell for the sidecar."""
    means = {"GreyMatter": measured.gm_mean, "CSF": measured.csf_mean,
             "SingleFibreAxial": measured.axial.mean(0),
             "SingleFibreRadial": measured.radial.mean(0)}
    return {f"{name}Diffusivity": {label: float(f"{v / 1000:.4g}") for label, v in zip(
        _shell_names(shells), values, strict=True)} for name, values in means.items()}
