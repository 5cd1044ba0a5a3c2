"""Harmonizers that learn from pairs, on a travelling phantom, in cross-validation by participant.

    python benchmarks/harmonize_pairs.py                     # Koppers et al. 2018: 30 × b 1200
    python benchmarks/harmonize_pairs.py --shells 1000 2000 3000      # Sadegheih et al. 2023
    python benchmarks/harmonize_pairs.py --blocks 1 2 3 6 --methods harmonize_shresnet
    python benchmarks/harmonize_pairs.py --participants 4 --folds 2 --voxel-size 6 --sloppy
    python benchmarks/harmonize_pairs.py --speed             # a brain of 200 000 voxels

Two sites; everyone is scanned at both. Of those whom a fold has not seen, site B's scans before
and after are compared with the noise-free signal of site A on the same grid ("truth"), and with
site A's own noisy scan, brought together as pairs are in training ("scan"). NMSE = Σ (y − ŷ)² /
Σ y² over voxels, per shell, mean over people; tissue is the largest share of the phantom's. FA and
MD are of the shell's tensor. Beside NMSE, against the truth, `evaluate.agreement`: SSIM of S/S0,
sharpness of its mean and contrast of lesions (MD over that of other white matter, less 1; 1 is the
truth's): what smooths wins by NMSE and loses here. p: Wilcoxon's signed ranks over people, against
no harmonization.

"noise" is the truth against itself with site A's noise: the floor of the column "scan". "series"
is the measured signal as a smooth SH series; "mppca" (with --mppca) is dipy's denoising of it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import wilcoxon

from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit, scans
from bidsapp.preprocess import pairs
from bidsapp.simulate import site

TISSUES = {"WM": 0, "GM": 1}
NAMES = ["harmonize_shresnet", "harmonize_hybrid", "harmonize_golkov"]


def masked(values, scan):
    return np.ascontiguousarray(np.moveaxis(values, 0, -1)[scan.mask], np.float32)


def ratios(signal, acquisition):
    """(voxel, direction) S/S0 of each shell."""
    s0 = np.maximum(signal[:, acquisition.b0].mean(1), 1)[:, None]
    return [signal[:, shell.indices] / s0 for shell in acquisition.shells]


def series(dwi):
    """Its signal as the networks see it."""
    values, _ = pairs.coefficients(dwi, 4)
    signal = dwi.signal.copy()
    for shell, c in zip(dwi.acquisition.shells, values, strict=True):
        signal[:, shell.indices] = dwi.mean_b0[:, None] * (
            c @ sh.basis(4, dwi.acquisition.bvecs[shell.indices]).T)
    return signal


def mppca(dwi):
    from dipy.denoise.localpca import mppca as denoise

    return denoise(dwi.unmask(dwi.signal), mask=dwi.mask)[dwi.mask].astype(np.float32)


def maps(ratio, acquisition, shell):
    """S/S0 of a shell, and FA and MD (mm²/s) of its tensor."""
    found = agreement.shell_maps(ratio, acquisition[shell.indices])
    return {"signal": ratio, "FA": found["fa"], "MD": found["md"]}


def nmse(found, truth, acquisition, shares):
    """(against, shell, map, tissue) NMSE of (voxel, direction) S/S0 by shell; shares (3, voxel)."""
    for one, other, shell in zip(found, truth, acquisition.shells, strict=True):
        ours, theirs = maps(one, acquisition, shell), maps(other, acquisition, shell)
        for tissue, k in TISSUES.items():
            where = shares.argmax(0) == k
            for key in ours:
                yield (f"b{shell.b:.0f}", key, tissue,
                       agreement.nmse(ours[key][where], theirs[key][where]))


def looks(found, truth, scan, acquisition):
    """(shell, measure, where, value) that smoothing lowers."""
    def image(values):
        out = np.zeros(scan.mask.shape)
        out[scan.mask] = values
        return out

    lesion = scan.lesion[scan.mask]
    white = (scan.tissue[:, scan.mask].argmax(0) == 0) & ~lesion
    for one, other, shell in zip(found, truth, acquisition.shells, strict=True):
        name = f"b{shell.b:.0f}"
        yield name, "SSIM", "mask", np.mean([
            agreement.ssim(image(a), image(b), scan.mask)
            for a, b in zip(one.T, other.T, strict=True)])
        yield name, "sharpness", "mask", agreement.sharpness(
            image(one.mean(1)), image(other.mean(1)), scan.mask)
        if lesion.sum() >= 10:
            contrast = [agreement.contrast(maps(v, acquisition, shell)["MD"], lesion, white)
                        for v in (one, other)]
            yield name, "lesion", "WM", contrast[0] / contrast[1]


def learner(name, blocks, arguments):
    method = methods.get(name)
    method.sloppy = arguments.sloppy
    if blocks:
        own = method.settings
        method.settings = lambda table, *v: {**own(table, *v), "network": {"blocks": blocks}}
    return method


def speed(voxels, threads):
    """Seconds to apply, with first weights, to a ball of so many voxels, 4 × b0 and 30 × b 1200."""
    torch.set_num_threads(threads)
    directions = sh.quadrature(18)[0]
    directions = directions[np.linspace(0, len(directions) - 1, 30).astype(int)]
    acquisition = Acquisition(np.r_[np.zeros(4), np.full(30, 1200.0)],
                              np.r_[np.zeros((4, 3)), directions])
    edge = int(np.ceil((voxels * 6 / np.pi) ** (1 / 3))) + 1
    grid = np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij")
    mask = sum(g * g for g in grid) <= 1
    rng = np.random.default_rng(0)
    signal = 800 * np.exp(-acquisition.bvals / 1000 * rng.uniform(0.3, 1, (int(mask.sum()), 1)))
    signal = np.asfortranarray(signal + 20 * rng.standard_normal(signal.shape), np.float32)
    dwi = Dwi(signal, mask, np.diag([2.0, 2, 2, 1]), acquisition)
    known = {"shells": [{"b": 1200.0, "b_delta": 1.0, "directions": [30, 30]}]}
    for name in [*NAMES, "harmonize_mica"]:
        method, tensors, network = methods.get(name), {}, {}
        if name != "harmonize_mica":
            network = method.settings("training")["network"]
            tensors = {f"shell0.{k}": v for k, v in method.build(network).state_dict().items()}
        levels = torch.linspace(0.1, 0.9, 1000)
        tensors["quantiles"] = levels.expand(*([1] if name == "harmonize_mica" else [2, 1]), 1000)
        model = Checkpoint(tensors, Card(name, network, known, {}, "", 0, {}, constants={
            "l_max": 4, "smoothing": pairs.SMOOTHING}))
        wall, cpu = time.monotonic(), time.process_time()
        method.harmonize(dwi, model, "B", "cpu")
        print(f"{name}: {len(signal)} voxels in {time.monotonic() - wall:.1f} s, "
              f"{time.process_time() - cpu:.1f} s of CPU time, {threads} threads")


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--shells", type=float, nargs="+", default=[1200.0])
    parser.add_argument("--directions", type=int, default=30)
    parser.add_argument("--voxel-size", type=float, default=3.0, help="mm")
    parser.add_argument("--methods", nargs="+", default=NAMES)
    parser.add_argument("--blocks", type=int, nargs="+", help="of SHResNet, one after another")
    parser.add_argument("--max-steps", type=int, help="of each stage of a training")
    parser.add_argument("--sloppy", action="store_true", help="rigid registration, 1 brief stage")
    parser.add_argument("--mppca", action="store_true", help="dipy's denoising, too (minutes)")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", type=int, nargs="?", const=200_000, metavar="VOXELS",
                        help="measure application alone")
    return parser.parse_args()


def main():
    arguments = parsed()
    if arguments.speed:
        speed(arguments.speed, arguments.threads)
        return
    torch.set_num_threads(arguments.threads)
    options = PhantomOptions(
        Path(), participants=arguments.participants, shells=tuple(arguments.shells),
        directions=arguments.directions, voxel_size=arguments.voxel_size, effect_directions=0,
        random_seed=arguments.random_seed)
    sites, people = site.draw(options), recruit(options)
    began, dwis, made, table = time.monotonic(), {}, {}, []
    for who, _, where, scan in scans(options, people, sites, load_atlas(options.step)):
        run = f"{who.label}{where.name}"
        dwis[run] = Dwi(masked(scan.signal, scan), scan.mask, scan.grid.affine, scan.acquisition)
        made[run] = scan
        table.append({"participant": who.label, "batch": where.name, "run": run, "snr_b0": 25.0})
    print(f"{len(dwis)} scans of {[len(d.signal) for d in dwis.values()][:3]} … voxels in "
          f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    reference, other = (s.name for s in sites)
    statistics = pd.DataFrame(table)
    align, known = pairs.align, {}

    def aligned(source, target, *, deformable=not arguments.sloppy, **more):
        """Every pair once for all methods and folds."""
        key = id(source), id(target)
        if key not in known:
            known[key] = align(source, target, deformable=deformable, **more)
        return known[key]

    pairs.align = aligned
    variants = [(name, blocks) for name in arguments.methods for blocks in (
        arguments.blocks or [None] if name == "harmonize_shresnet" else [None])]
    mixed = np.random.default_rng(arguments.random_seed).permutation([p.label for p in people])
    rows, seconds = [], {}
    for fold, tested in enumerate(np.array_split(mixed, arguments.folds), 1):
        study = methods.Study(
            statistics[~statistics["participant"].isin(tested)], (), reference_batch=reference,
            acquisitions={r: d.acquisition for r, d in dwis.items()}, load=dwis.__getitem__,
            max_steps=arguments.max_steps, seed=arguments.random_seed)
        harmonizers = {"none": lambda dwi: dwi.signal, "series": series}
        if arguments.mppca:
            harmonizers["mppca"] = mppca
        for name, blocks in variants:
            method, started = learner(name, blocks, arguments), time.monotonic()
            (model,) = method.fit(study).checkpoints.values()
            label = name.removeprefix("harmonize_") + (f" {blocks}" if blocks else "")
            seconds.setdefault(f"training {label}", []).append(time.monotonic() - started)
            print(f"fold {fold}: {label}: steps {model.card.training['steps']}, "
                  f"{seconds[f'training {label}'][-1]:.0f} s", file=sys.stderr)
            harmonizers[label] = lambda dwi, m=method, c=model: m.harmonize(
                dwi, c, other, "cpu").signal
        for who in tested:
            dwi, scan = dwis[who + other], made[who + other]
            target, own = dwis[who + reference], made[who + reference]
            truth = ratios(masked(scan.reference, scan), dwi.acquisition)
            moved = aligned(dwi, target, l_max=4)
            theirs = [moved.target[:, s.indices] for s in target.acquisition.shells]
            for label, harmonize in harmonizers.items():
                started = time.monotonic()
                signal = harmonize(dwi)
                seconds.setdefault(f"applying {label}", []).append(time.monotonic() - started)
                found = ratios(signal, dwi.acquisition)
                rows += [(label, who, "truth", *row) for row in (
                    *nmse(found, truth, dwi.acquisition, scan.tissue[:, scan.mask]),
                    *looks(found, truth, scan, dwi.acquisition))]
                image = pairs.carried(Dwi(signal, dwi.mask, dwi.affine, dwi.acquisition), 4,
                                      moved.index, moved.turn, moved.where)
                there = [c[1:-1, 1:-1, 1:-1][moved.where]
                         @ sh.basis(4, target.acquisition.bvecs[s.indices]).T
                         for c, s in zip(image, target.acquisition.shells, strict=True)]
                rows += [(label, who, "scan", *row) for row in nmse(
                    there, theirs, target.acquisition, own.tissue[:, moved.where])]
            rows += [("noise", who, "scan", *row) for row in nmse(
                ratios(masked(own.reference, own), target.acquisition),
                ratios(target.signal, target.acquisition), target.acquisition,
                own.tissue[:, own.mask])]
    report(pd.DataFrame(rows, columns=["method", "who", "against", "shell", "map", "where",
                                       "value"]))
    print({k: round(float(np.mean(v)), 1) for k, v in seconds.items()}, "s")


def report(found):
    """Means over people, the change against none and its p."""
    keys, order = ["against", "map", "where", "shell"], list(dict.fromkeys(found["method"]))
    wide = found.pivot_table("value", [*keys, "who"], "method")[order]
    mean = wide.groupby(keys).mean()
    errors = mean.index.get_level_values("map").isin(["signal", "FA", "MD"])
    print("NMSE, %:")
    print((100 * mean[errors]).round(3).to_string())
    print("change of NMSE against none, %:")
    print((100 * mean[errors].div(mean[errors]["none"], axis=0) - 100).round(1).to_string())
    print("p of it (Wilcoxon, two-sided):")
    p = {key: {m: wilcoxon(own[m], own["none"]).pvalue for m in order
               if m not in ("none", "noise") and (own[m] != own["none"]).any()}
         for key, own in wide.groupby(keys) if key[1] in ("signal", "FA", "MD")}
    print(pd.DataFrame(p).T.round(4).to_string())
    print("likeness (SSIM; sharpness and contrast of lesions over the truth's):")
    print(mean[~errors].drop(columns="noise").round(3).to_string())


if __name__ == "__main__":
    main()
