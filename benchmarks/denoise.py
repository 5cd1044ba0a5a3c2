"""Denoising and unringing against the truth of the phantom, beside dipy, in one run.

    python benchmarks/denoise.py [--seeds 2 3] [--snr 10 20 30]
    python benchmarks/denoise.py --choices            # the defaults, on a seed of their own
    python benchmarks/denoise.py --gibbs              # unringing: difference from dipy and speed

A block of the phantom's brain at 2.5 mm, 8 × b 0, 30 × b 1000, 30 × b 2000 and 32 × b 3000 s/mm²,
with Rician noise whose level varies in space. SNR is that of white matter at b 0, for the mean
noise level. Truth is the noise-free signal, and FA and MD are those of its tensor fit. The residual
is what a method removed, if it leaves the floor in place: its correlation with the true signal over
voxels, the mean of |r| over volumes, shows anatomy in it. CPU seconds of one thread.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import table
import torch
from dipy.denoise.gibbs import gibbs_removal
from simulated import spiral_shells

from bidsapp import tensor
from bidsapp.acquisition import Acquisition
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas
from bidsapp.preprocess.denoise import denoise
from bidsapp.preprocess.gibbs import unring
from bidsapp.simulate import noise, person, phantom, site

SCHEME = ((0, 8), (1000, 30), (2000, 30), (3000, 32))
SEED_OF_CHOICES = 1
CSF = 0.5
"""Share of a tissue above which a voxel belongs to CSF; white and grey matter need TISSUE."""
TISSUE = 0.8


class Scene(NamedTuple):
    """Noise-free series of a block of the brain.

    clean: (x, y, z, n), white matter is near 1 at b 0; mask: (x, y, z); wm, gm, csf: (voxel,) bool
    in the mask; position: (x, y, z, 3) within −1 to 1.
    """

    clean: np.ndarray
    mask: np.ndarray
    wm: np.ndarray
    gm: np.ndarray
    csf: np.ndarray
    position: np.ndarray
    acquisition: Acquisition


def simulate(seed, scheme, voxel, size):
    """Simulate a person of the phantom, without site effects; size: (3,) voxels of the block."""
    options = PhantomOptions(Path("unused"), random_seed=seed, voxel_size=voxel, snr=float("inf"),
                             effects=0.0, sites=1)
    atlas, scanner = load_atlas(options.step), site.draw_sites(options)[0]
    who = person.draw_person(options, atlas, "01", 50.0, "F", False)
    acquisition = spiral_shells(scheme)
    scan = phantom.simulate_scan(who, scanner, scanner, acquisition, atlas, options,
                                 phantom.draw_pose(options, "01", scanner.name))
    block = tuple(slice((n - k) // 2, (n - k) // 2 + k)
                  for n, k in zip(scan.mask.shape, size, strict=True))
    mask = scan.mask[block]
    wm, gm, csf = scan.tissue[(slice(None), *block)][:, mask] > np.array([[TISSUE], [TISSUE],
                                                                         [CSF]])
    position = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"), -1)
    clean = np.moveaxis(scan.reference, 0, -1)[block] / phantom.UNIT
    return Scene(clean.astype(np.float32), mask, wm, gm, csf, position, acquisition)


def noise_level(position, snr):
    """(x, y, z) noise SD, highest in the middle as behind receive coils."""
    x, y, z = np.moveaxis(position, -1, 0)
    return (np.exp(0.35 * np.cos(1.5 * x) * np.cos(1.5 * y) - 0.15 + 0.2 * z) / snr
            ).astype(np.float32)


def fa_and_md(signal, acquisition):
    """FA and MD (µm²/ms) of (voxel, n) signals."""
    chosen = tensor.volumes(acquisition)
    maps = tensor.fit(torch.as_tensor(signal[:, chosen], dtype=torch.float64),
                      tensor.design(acquisition[chosen].btensors))
    return maps["fa"].numpy(), 1e3 * maps["md"].numpy()


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def measure(scene, sigma, signal, residual):
    """Measures of a signal (x, y, z, n) by name; residual: of the same shape, or None."""
    mask, b = scene.mask, scene.acquisition.bvals
    truth, values = scene.clean[mask], signal[mask]
    fa, md = (a - b for a, b in zip(fa_and_md(values, scene.acquisition),
                                    fa_and_md(truth, scene.acquisition), strict=True))
    high = b == b.max()
    csf = scene.csf
    out = {
        "NMSE": np.square(values - truth).sum() / np.square(truth).sum(),
        "NMSE b max": np.square(values - truth)[:, high].sum() / np.square(truth[:, high]).sum(),
        "FA": rms(fa[scene.wm | scene.gm]), "MD": rms(md[scene.wm | scene.gm]),
        "MD CSF": md[csf].mean(),
        "floor": (values[csf][:, high] - truth[csf][:, high]).mean() / sigma[mask][csf].mean(),
        "residual": np.nan}
    if residual is not None:
        rest = residual[mask] / sigma[mask][:, None]
        out["residual"] = np.mean([abs(np.corrcoef(rest[:, i], truth[:, i])[0, 1])
                                   for i in range(truth.shape[1])])
    return out


def timed(function, *arguments, **options):
    start = time.process_time()
    return function(*arguments, **options), time.process_time() - start


def noisy_magnitude(scene, snr, seed):
    sigma = noise_level(scene.position, snr)
    generator = torch.Generator().manual_seed(seed)
    return sigma, noise.rician(torch.as_tensor(scene.clean), torch.as_tensor(sigma)[..., None],
                               generator).numpy()


def cells(measures, seconds):
    """Format the mean of measures over seeds."""
    mean = {name: float(np.mean([m[name] for m in measures])) for name in measures[0]}
    return [table.milli(mean["NMSE"]), table.milli(mean["NMSE b max"]), f"{mean['FA']:.4f}",
            f"{mean['MD']:.4f}", f"{mean['MD CSF']:+.3f}", f"{mean['floor']:+.2f}",
            "" if np.isnan(mean["residual"]) else f"{mean['residual']:.3f}",
            "" if not seconds else f"{np.mean(seconds):.1f}"]


def compare(options):
    rows = []
    methods = {
        "as measured": None, "pca": {}, "pca, least squared error": {"loss": "frobenius"},
        "pca, floor kept": {"rician": False},
        "dipy MP-PCA": {"method": "mppca", "rician": False},
        "dipy MP-PCA, floor removed as ours": {"method": "mppca"},
        "dipy Patch2Self": {"method": "patch2self"}}
    scenes = {seed: simulate(seed, SCHEME, 2.5, options.size) for seed in options.seeds}
    for snr in options.snr:
        for name, method in methods.items():
            measures, seconds = [], []
            for seed, scene in scenes.items():
                sigma, noisy = noisy_magnitude(scene, snr, seed)
                if method is None:
                    measures.append(measure(scene, sigma, noisy, None))
                    continue
                out, used = timed(denoise, noisy, bvals=scene.acquisition.bvals, **method)
                kept = method.get("rician") is False or method.get("method") == "patch2self"
                measures.append(measure(scene, sigma, out.signal,
                                        noisy - out.signal if kept else None))
                seconds.append(used)
            rows.append([f"SNR {snr:g}, {name}", *cells(measures, seconds)])
            print(*rows[-1], sep=" | ", flush=True)
    table.show("denoise", rows, options.csv)


def choose(options):
    rows = []
    scene = simulate(SEED_OF_CHOICES, SCHEME, 2.5, options.size)
    for snr in options.snr:
        sigma, noisy = noisy_magnitude(scene, snr, SEED_OF_CHOICES)
        for patch, stride, loss in (
                ((5, 5, 5), 2, "operator"), ((5, 5, 5), 2, "frobenius"), ((5, 5, 5), 1, "operator"),
                ((5, 5, 5), 3, "operator"), ((3, 3, 3), 2, "operator"), ((5, 5, 3), 2, "operator"),
                ((7, 7, 7), 2, "operator"), ((11, 11, 1), 2, "operator")):
            out, used = timed(denoise, noisy, patch=patch, stride=stride, loss=loss)
            kept = denoise(noisy, patch=patch, stride=stride, loss=loss, rician=False)
            shape = " × ".join(map(str, patch))
            rows.append([f"SNR {snr:g}, {shape} voxels, stride {stride}, {loss}",
                         *cells([measure(scene, sigma, out.signal, noisy - kept.signal)], [used])])
            print(*rows[-1], sep=" | ", flush=True)
    table.show("denoise_choices", rows, options.csv)


def compare_unringing(options):
    rows, rng = [], np.random.default_rng(0)
    scene = simulate(2, SCHEME[:2], 2.0, (90, 111, 2))
    # two more samples per voxel and a cut through k-space make ringing at the tissues' edges
    for size in ((64, 64), (90, 110), (96, 96), (111, 90)):
        fine = np.repeat(np.repeat(scene.clean, 4, 0), 4, 1)
        k = np.fft.fftshift(np.fft.fft2(fine, axes=(0, 1)), axes=(0, 1))
        cut = tuple(slice((n - m) // 2, (n - m) // 2 + m)
                    for n, m in zip(k.shape, size, strict=False))
        clean = np.fft.ifft2(np.fft.ifftshift(k[cut], axes=(0, 1)), axes=(0, 1))
        clean = clean * np.prod(size) / np.prod(fine.shape[:2])
        e = 0.02 * rng.normal(size=(2, *clean.shape))
        noisy = np.abs(clean + e[0] + 1j * e[1]).astype(np.float32)[..., :16]
        ours, peers, slices = [], [], noisy.shape[2] * noisy.shape[3]
        for _ in range(3):  # in turns, so that both see the same load
            out, used = timed(unring, noisy)
            ours.append(used / slices)
            peer, used = timed(gibbs_removal, noisy, slice_axis=2, inplace=False)
            peers.append(used / slices)
        difference = np.abs(out.volumes - peer) / peer.max()
        rows.append([f"{size[0]} × {size[1]}", f"{1e3 * np.median(ours):.1f}",
                     f"{1e3 * np.median(peers):.1f}",
                     table.spread([p / o for o, p in zip(ours, peers, strict=True)], ".1f"),
                     table.milli(float(difference.max())),
                     f"{1e6 * (difference > 1e-3).mean():.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    table.show("gibbs", rows, options.csv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("--gibbs", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--snr", type=float, nargs="+", default=[10, 20, 30])
    parser.add_argument("--size", type=int, nargs=3, default=[24, 28, 16])
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.gibbs:
        compare_unringing(options)
    elif options.choices:
        choose(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
