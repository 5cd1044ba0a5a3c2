"""Harmonizers that learn from pairs, on a travelling phantom: NMSE of S/S0, FA and MD.

    python benchmarks/harmonize_pairs.py [--participants N] [--tested K] [--max-steps N]

Two sites, b 1200, 30 directions, 3 mm (the design of Koppers et al. 2018). All but the last K
people are trained and validated on. Of those K, site B's scans before and after are compared with
the noise-free signal of site A on the same grid ("truth"), and with site A's own noisy scan,
brought together as pairs are in training ("scan"). NMSE = Σ (y − ŷ)² / Σ y² over voxels, mean over
people; tissue is the largest share of the phantom's. FA and MD of a tensor on the weighted signal.

"noise" is the truth against the truth with site A's noise added: the floor of the column "scan".
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bidsapp import methods, sh, tensor
from bidsapp.dwi import Dwi
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit, scans
from bidsapp.preprocess import pairs
from bidsapp.simulate import site

TISSUES = {"WM": 0, "GM": 1}


def masked(values, scan):
    return np.ascontiguousarray(np.moveaxis(values, 0, -1)[scan.mask], np.float32)


def maps(ratio, acquisition):
    """S/S0 of the weighted volumes, FA and MD (µm²/ms)."""
    weighted = acquisition[~acquisition.b0]
    table = np.vstack([tensor.design(weighted.btensors), tensor.design(np.zeros((1, 3, 3)))])
    full = np.concatenate([np.maximum(ratio, 1e-3), np.ones((len(ratio), 1))], 1)
    fitted = tensor.fit(torch.from_numpy(full.astype(np.float64)), table)
    return {"signal": ratio, "FA": fitted["fa"].numpy(), "MD": 1e3 * fitted["md"].numpy()}


def ratio_of(signal, acquisition):
    return signal[:, ~acquisition.b0] / np.maximum(signal[:, acquisition.b0].mean(1), 1)[:, None]


def nmse(found, truth):
    return float(np.square(found - truth).sum() / np.square(truth).sum())


def rows(name, against, found, truth, acquisition, shares):
    """NMSE by tissue and map; shares: (3, voxel)."""
    one, other = maps(found, acquisition), maps(truth, acquisition)
    return [{"method": name, "against": against, "tissue": tissue, "map": key,
             "nmse": nmse(one[key][where], other[key][where])}
            for tissue, k in TISSUES.items() for where in [shares.argmax(0) == k] for key in one]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--tested", type=int, default=2)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--methods", nargs="+", default=["harmonize_shresnet", "harmonize_golkov"])
    parser.add_argument("--random-seed", type=int, default=0)
    arguments = parser.parse_args()
    options = PhantomOptions(Path(), participants=arguments.participants, shells=(1200.0,),
                             effect_directions=0, random_seed=arguments.random_seed)
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
    tested = [p.label for p in people[-arguments.tested:]]
    statistics = pd.DataFrame(table)
    study = methods.Study(
        statistics[~statistics["participant"].isin(tested)], (), reference_batch=reference,
        acquisitions={r: d.acquisition for r, d in dwis.items()}, load=dwis.__getitem__,
        max_steps=arguments.max_steps, seed=arguments.random_seed)
    harmonizers = {"none": lambda dwi: dwi.signal}
    for name in arguments.methods:
        method = methods.get(name)
        (checkpoint,) = method.fit(study).checkpoints.values()
        print(name, dict(checkpoint.card.training), dict(checkpoint.card.metrics), file=sys.stderr)
        harmonizers[name] = lambda dwi, m=method, c=checkpoint: m.harmonize(
            dwi, c, other, "cpu").signal
    found, seconds = [], {}
    for label in tested:
        dwi, target, scan = dwis[label + other], dwis[label + reference], made[label + other]
        truth = ratio_of(masked(scan.reference, scan), dwi.acquisition)
        shares = scan.tissue[:, scan.mask]
        for name, harmonize in harmonizers.items():
            start = time.monotonic()
            signal = harmonize(dwi)
            seconds[name] = time.monotonic() - start
            found += rows(name, "truth", ratio_of(signal, dwi.acquisition), truth,
                          dwi.acquisition, shares)
            if name == "none":  # as smooth on the sphere as what the networks return
                (c,), _ = pairs.coefficients(dwi, 4)
                basis = sh.basis(4, dwi.acquisition.bvecs[~dwi.acquisition.b0])
                found += rows("SH series alone", "truth", c @ basis.T, truth, dwi.acquisition,
                              shares)
            moved = pairs.align(Dwi(signal, dwi.mask, dwi.affine, dwi.acquisition), target, l_max=4)
            acquisition = target.acquisition
            basis = sh.basis(4, acquisition.bvecs[~acquisition.b0])
            found += rows(name, "scan", moved.image[0, 1:-1, 1:-1, 1:-1][moved.where] @ basis.T,
                          moved.target[:, ~acquisition.b0], acquisition,
                          made[label + reference].tissue[:, moved.where])
        noisy, own = dwis[label + reference], made[label + reference]
        clean = ratio_of(masked(own.reference, own), noisy.acquisition)
        found += rows("noise", "scan", clean, ratio_of(noisy.signal, noisy.acquisition),
                      noisy.acquisition, own.tissue[:, own.mask])
    mean = pd.DataFrame(found).groupby(["against", "map", "tissue", "method"])["nmse"].mean()
    mean = mean.unstack("method")
    print((100 * mean).round(3).to_string())
    print("change against none, %:")
    print((100 * mean.div(mean["none"], axis=0) - 100).round(1).to_string())
    print({k: round(v, 1) for k, v in seconds.items()}, "s to apply")


if __name__ == "__main__":
    main()
