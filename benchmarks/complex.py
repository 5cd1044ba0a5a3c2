"""Does phase help? Magnitude and complex series of the phantom against the truth, in one run.

    python benchmarks/complex.py [--seeds 2] [--snr 5 10 20 30]

A slab of the phantom's brain at 3 mm, 6 × b 0 and 30 × b 1000, 3000 and 5000 s/mm², with a smooth
background phase and the phase of shots (one per slice and volume) and complex noise whose level
varies in space; SNR is that of white matter at b 0, for the mean level. Series are: the magnitude
as measured; the magnitude denoised, its floor removed; the complex series, its phase removed, the
real part as measured and denoised. S is in units of white matter's at b 0, over all voxels of the
brain; FA and MD (µm²/ms) are of the tensor through b 0 and the one shell, d (µm²/ms) and f of the
spherical mean technique through b 0, b 1000 and a higher shell, all in white and grey matter,
against the same fits of the noise-free signal. The estimator is told the noise of the measured
magnitude, and no noise where its law is Gaussian.
"""

import argparse

import numpy as np
import table
import torch
from denoise import noise_level, rms, simulate

from bidsapp import tensor
from bidsapp.dwi import Dwi
from bidsapp.methods import get
from bidsapp.preprocess.denoise import denoise
from bidsapp.preprocess.phase import remove_phase
from bidsapp.simulate import noise

SCHEME = ((0, 6), (1000, 30), (3000, 30), (5000, 30))
SHELLS = (1000, 3000, 5000)
PAYS = 0.9
"""Ratio of errors with phase and without below which phase is worth keeping."""

NAMES = ("S", "FA", "MD", "d", "f")


def measure_complex(scene, snr, seed):
    """Noise SD (x, y, z), and complex series with background and shot phase."""
    sigma = noise_level(scene.position, snr)
    shape, n = scene.mask.shape, scene.clean.shape[3]
    position = torch.as_tensor(scene.position.reshape(-1, 3), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shot = torch.arange(shape[2]).repeat(shape[0] * shape[1])  # one per slice
    phase = np.pi * noise.smooth_field(position, 4, 1, generator) + noise.shot_phase(
        position, shot, n, generator)
    series = noise.complex_noise(torch.as_tensor(scene.clean).reshape(-1, n), phase,
                                 torch.as_tensor(sigma).reshape(-1, 1), generator)
    return sigma, series.numpy().reshape(scene.clean.shape)


def estimates(scene, signal, noise_sd):
    """{shell: {quantity: values}} of a signal (x, y, z, n)."""
    brain = scene.wm | scene.gm
    values, b = signal[scene.mask], scene.acquisition.bvals
    out = {}
    for shell in SHELLS:
        alone, both = (np.flatnonzero(np.isin(b, (0, *shells)))
                       for shells in ((shell,), (1000, shell)))
        maps = tensor.fit(torch.as_tensor(values[brain][:, alone], dtype=torch.float64),
                          tensor.design(scene.acquisition[alone].btensors))
        out[shell] = {"S": values[:, b == shell], "FA": maps["fa"].numpy(),
                      "MD": 1e3 * maps["md"].numpy()}
        if shell == SHELLS[0]:
            continue
        dwi = Dwi(np.ascontiguousarray(values[brain][:, both], np.float32),
                  np.ones((int(brain.sum()), 1, 1), bool), np.eye(4), scene.acquisition[both],
                  noise_sd)
        smt = get("estimate_smt").apply(dwi, "cpu").maps
        out[shell] |= {"d": smt["diffusivity"], "f": smt["neuritefraction"]}
    return out


def series_of(measured, sigma, mask):
    """(name, signal, noise SD that an estimator is told or None)."""
    level = float(sigma[mask].mean())
    magnitude = np.abs(measured)
    real = np.ascontiguousarray(remove_phase(measured).real)
    yield "magnitude", magnitude, level
    yield "magnitude, denoised", denoise(magnitude).signal, None
    yield "complex", real, None
    yield "complex, denoised", denoise(real, rician=False).signal, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--snr", type=float, nargs="+", default=[5, 10, 20, 30])
    parser.add_argument("--size", type=int, nargs=3, default=[60, 74, 8])
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scenes = {seed: simulate(seed, SCHEME, 3.0, options.size) for seed in options.seeds}
    truths = {seed: estimates(scene, scene.clean, None) for seed, scene in scenes.items()}
    rows = []
    for snr in options.snr:
        errors: dict = {}
        for seed, scene in scenes.items():
            sigma, measured = measure_complex(scene, snr, seed)
            for name, signal, told in series_of(measured, sigma, scene.mask):
                for shell, maps in estimates(scene, signal, told).items():
                    for key, values in maps.items():
                        errors.setdefault((shell, name, key), []).append(
                            (values - truths[seed][shell][key]).ravel())
        joined = {key: np.concatenate(parts) for key, parts in errors.items()}
        for shell in SHELLS:
            for name in dict.fromkeys(name for _, name, _ in joined):
                cells = []
                known = [key for key in NAMES if (shell, name, key) in joined]
                for key in NAMES:
                    error = joined.get((shell, name, key), np.zeros(0))
                    cells.append(f"{error.mean():+.4f}, {rms(error):.4f}" if len(error) else "")
                pays = ""
                if name == "complex, denoised":
                    pays = ", ".join(key for key in known if rms(joined[shell, name, key])
                                     < PAYS * rms(joined[shell, "magnitude, denoised", key]))
                    pays = pays or "none"
                rows.append([f"SNR {snr:g}, b {shell}, {name}", *cells, pays])
                print(*rows[-1], sep=" | ", flush=True)
    table.show("complex", rows, options.csv)


if __name__ == "__main__":
    main()
