"""Spherical network for neurites and soma: what planar or spherical encoding adds to linear.

    python benchmarks/scnn3.py [--voxels 20000] [--repeats 3] [--threads 2] [--weights FOLDER]
                               [--snr 29] [--reference-voxels 2000] [--steps 0] [--states FOLDER]

The protocol of Kerkelä et al. 2024, section 2.8.2: 13 b0, linear encoding of b 0.5, 1, 2, 3.5, 5
ms/µm² with 12, 12, 20, 20, 30 directions and planar of b 0.5, 1, 2 with 12, 12, 20, at the paper's
SNR of 29 (Rician). Beside it the same with the planar volumes made spherical, and made linear: as
many volumes, of the same b-values, on the same tissue. d ~ U(0, 3), f ~ U(0, 1),
f_sph ~ U(0, 1 − f), d_sph ~ U(0, min(d, 0.5)); mixtures of three Watson bundles as in scnn.py.
With --steps a network is trained further for each protocol alone, at this SNR and with such
mixtures alone (--states keeps what an interrupted training goes on from); without, one network
serves all.
`prior` is the variance of the truth, the error of one who measures nothing. `means` is the
posterior mean from the shells' means alone, by weighing draws from the prior with their Gaussian
likelihood: what the encoding tells without any network and without directions.
ODF errors are against the density up to degree 8, over the sphere and at one vertex. Rotational
SD: of 100 noise-free voxels over 60 rotations, ODFs up to degree 8.
"""

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import table
import torch
from simulated import as_dwi

from bidsapp import checkpoint, methods, selection, sh
from bidsapp.acquisition import Acquisition
from bidsapp.domain import TrainingDomain
from bidsapp.microstructure import learn
from bidsapp.microstructure import maps as estimating
from bidsapp.simulate import forward, odf, protocols
from bidsapp.simulate.tissue import THREE_COMPARTMENTS, draw_bundles

B0 = 13
LINEAR = ((500, 12), (1000, 12), (2000, 20), (3500, 20), (5000, 30))
ADDED = ((500, 12), (1000, 12), (2000, 20))
PROTOCOLS = {"linear": 1.0, "planar": -0.5, "spherical": 0.0}
ENCODINGS = {"linear": "linear alone", "planar": "linear and planar",
             "spherical": "linear and spherical"}
DRAWS = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--snr", type=float, default=29)
    parser.add_argument("--reference-voxels", type=int, default=2000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--states", type=Path)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = (checkpoint.load(options.weights, "estimate_scnn3") if options.weights
             else selection.bundled_weights("estimate_scnn3"))
    generator, tissue, sigma = torch.Generator().manual_seed(7), THREE_COMPARTMENTS, 1 / options.snr
    densities = draw_bundles(options.voxels, generator, 16)
    truth = tissue.draw(options.voxels, generator)
    print(f"{'MSE':<18}" + "".join(f"{name:>17}" for name in tissue.names)
          + f"{'ODF sphere':>12}{'vertex':>10}")
    print(f"{'prior':<18}" + "".join(f"{v:>17.2e}" for v in truth.var(0)))
    rates, covers, turns = [], [], []
    lines = [["variance of the prior", *map(table.milli, truth.var(0).tolist()), ""]]
    reference = []
    for name, b_delta in PROTOCOLS.items():
        acq = acquisition(b_delta)
        trained = for_one(start, name, acq, options) if options.steps else start
        clean = forward.Protocol(acq, 16, densities).signal(densities, tissue.compartments(truth))
        noise = sigma * torch.randn(2, *clean.shape, generator=generator)
        signal = torch.hypot(clean + noise[0], noise[1])
        means = from_means(acq, signal[:options.reference_voxels], sigma, generator)
        error = (means - truth[:len(means)]).square().mean(0)
        print(f"{name + ', means':<18}" + "".join(f"{v:>17.2e}" for v in error))
        reference.append([f"{ENCODINGS[name]}: shell means, no network",
                          *map(table.milli, error.tolist()), ""])
        dwi, times = as_dwi(signal.numpy(), acq, sigma), []
        for _ in range(options.repeats):
            begun = time.perf_counter()
            maps = estimating.estimate(trained, tissue, dwi, "cpu")[0]
            times.append((time.perf_counter() - begun) / options.voxels)
        found = np.stack([maps[key] for key in tissue.names], 1) - truth.numpy()
        sd = np.stack([maps[f"{key}_std"] for key in tissue.names], 1)
        difference = torch.from_numpy(maps["odf"]) - densities[:, :45]
        vertex = difference @ torch.from_numpy(sh.basis(8, np.array([[0.0, 0, 1]]))).float()[0]
        print(f"{name + ', scnn3':<18}" + "".join(f"{v:>17.2e}" for v in (found**2).mean(0))
              + f"{difference.square().sum(1).mean() / (4 * math.pi):>12.2e}"
              f"{vertex.square().mean():>10.2e}")
        sphere = float(difference.square().sum(1).mean() / (4 * math.pi))
        lines.append([f"{ENCODINGS[name]}: scnn3", *map(table.milli, (found**2).mean(0)),
                      f"{table.milli(sphere)}; {table.milli(float(vertex.square().mean()))}"])
        covers.append((abs(found) <= estimating.QUANTILE * sd).mean(0))
        turns.append(rotational_sd(trained, acq, sigma, generator))
        rates.append(1 / statistics.median(times))
    for title, rows, form in (("cover of 90 %", covers, ".3f"), ("rotational SD", turns, ".2e")):
        for name, row in zip(PROTOCOLS, rows, strict=True):
            print(f"{title + ', ' + name:<26}" + "".join(f"{v:>12{form}}" for v in row))
    print(f"voxels/s with {options.threads} threads: " + ", ".join(
        f"{name} {rate:.0f}" for name, rate in zip(PROTOCOLS, rates, strict=True)))
    table.show("scnn3", lines + reference, options.csv,
               first=f"{table.count(options.voxels)} voxels, SNR {options.snr:g}")
    table.show("scnn3_coverage", [
        [ENCODINGS[name], ", ".join(f"{v:.3f}" for v in cover), ", ".join(map(table.milli, turn))]
        for name, cover, turn in zip(PROTOCOLS, covers, turns, strict=True)],
        options.csv and options.csv.with_stem(f"{options.csv.stem}_coverage"))


def for_one(start: checkpoint.Checkpoint, name: str, acq: Acquisition,
            options: argparse.Namespace) -> checkpoint.Checkpoint:
    """The network trained further for one protocol, by the recipe of `group --train`, at one SNR
    and with Watson mixtures alone, as it is tested."""
    known = methods.get("estimate_scnn3").recipe("one")
    schedule = replace(known.schedule, steps=options.steps)
    recipe = replace(known, schedule=schedule, acquisition=acq,
                     trained_for=TrainingDomain.from_acquisitions(
                         [acq], snr=(options.snr, options.snr)))
    saved = options.states / f"scnn3_{name}.ckpt" if options.states else None
    found = learn.train("estimate_scnn3", recipe, seed=0, device="cpu", saved=saved, start=start)
    print(f"{name}: {found.card.training['samples']} samples in {found.card.training['seconds']} s")
    return found


def acquisition(b_delta: float) -> Acquisition:
    """13 b0, the linear shells, and the added ones of the given shape; linear ones join the linear
    shell of their b, and all directions of a shell are spread together."""
    shells = [(b, n, 1.0) for b, n in LINEAR] + [(b, n, b_delta) for b, n in ADDED]
    if b_delta == 1:
        added = dict(ADDED)
        shells = [(b, n + added.get(b, 0), 1.0) for b, n in LINEAR]
    b, n, shape = map(np.array, zip(*shells, strict=True))
    return Acquisition(np.r_[np.zeros(B0), np.repeat(b, n)],
                       np.concatenate([np.zeros((B0, 3)), *map(protocols.spread, n.tolist())]),
                       np.r_[np.ones(B0), np.repeat(shape, n)])


def from_means(acq: Acquisition, signal: torch.Tensor, sigma: float, generator: torch.Generator
               ) -> torch.Tensor:
    """(voxel, 4) posterior mean of the parameters given the means over shells, S0 from the b0."""
    tissue, shells = THREE_COMPARTMENTS, acq.shells
    points = tissue.draw(DRAWS, generator)
    b, b_delta, count = (torch.tensor([f(s) for s in shells]) for f in (
        lambda s: s.b, lambda s: s.b_delta, len))
    expected = forward.kernel(tissue.compartments(points), b.numpy(), b_delta.numpy(), 0)[..., 0]
    expected = (expected / (4 * math.pi)) ** 2
    expected = ((expected + sigma**2) / (1 + sigma**2)).sqrt()  # mean of Rice's law, nearly
    s0 = signal[:, torch.from_numpy(acq.b0)].mean(1, keepdim=True)
    measured = torch.stack([signal[:, torch.from_numpy(s.indices)].mean(1) for s in shells], 1) / s0
    weight = count.sqrt() / sigma
    shared = expected * weight * sigma / B0**0.5  # noise of S0 moves all shells together
    one = 1 + (shared**2).sum(1)
    out = []
    for part in measured.split(20):
        r = (part[:, None] - expected) * weight
        fit = (r**2).sum(2) - (r * shared).sum(2) ** 2 / one + one.log()
        out.append(torch.softmax(-fit / 2, 1) @ points)
    return torch.cat(out)


def rotational_sd(trained: checkpoint.Checkpoint, acq: Acquisition, sigma: float,
                  generator: torch.Generator, count: int = 100, turns: int = 60) -> np.ndarray:
    """Mean over voxels of the SD over rotations, by parameter; no noise."""
    tissue = THREE_COMPARTMENTS
    one, p = draw_bundles(count, generator, 8), tissue.draw(count, generator)
    rotations = odf.random_rotations(turns, generator).float()
    every = torch.cat([sh.rotate(one, r) for r in rotations])
    clean = forward.Protocol(acq, 8, every).signal(every, tissue.compartments(p.repeat(turns, 1)))
    maps = estimating.estimate(trained, tissue, as_dwi(clean.numpy(), acq, sigma), "cpu")[0]
    return np.array([maps[k].reshape(turns, count).std(0).mean() for k in tissue.names])


if __name__ == "__main__":
    main()
