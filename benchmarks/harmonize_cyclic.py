"""The cyclic harmonizer by the share of people who were scanned at both sites.

    python benchmarks/harmonize_cyclic.py [--participants 12] [--tested 4] [--shares 0 0.1 0.5 1]
        [--voxel-size 4] [--shells 1200] [--directions 30] [--max-steps N] [--threads 2]
        [--random-seeds 0]

Table 1 of Sadegheih et al. 2023 (doi:10.1007/s13218-023-00811-y) on a phantom of two sites.
Everyone but those tested is learned from, at both sites; of all but a share it is hidden who is
who, so that no pairs are made of them (one person at least where the share is not 0). NMSE of S/S0,
FA and MD of the people tested, at site B, before and after, against the noise-free signal of site A
on the same grid; mean over people.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harmonize_pairs import masked, nmse, ratios

from bidsapp import methods
from bidsapp.dwi import Dwi
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit, scans
from bidsapp.preprocess import pairs
from bidsapp.simulate import site


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--participants", type=int, default=12)
    parser.add_argument("--tested", type=int, default=4)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.5, 1])
    parser.add_argument("--voxel-size", type=float, default=4.0, help="mm")
    parser.add_argument("--shells", type=float, nargs="+", default=[1200.0])
    parser.add_argument("--directions", type=int, default=30)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seed in options.random_seeds:
        rows += [(seed, *row) for row in one(options, seed)]
    found = pd.DataFrame(rows, columns=["seed", "training", "who", "shell", "map", "where",
                                        "value"])
    order = list(dict.fromkeys(found["training"]))
    wide = found.pivot_table("value", ["map", "where", "shell"], "training")[order]
    print("NMSE against the noise-free truth, %:")
    print((100 * wide).round(3).to_string())


def one(options, seed):
    """(training, person, shell, map, tissue, NMSE) of one phantom."""
    phantom = PhantomOptions(
        Path(), participants=options.participants, shells=tuple(options.shells),
        directions=options.directions, voxel_size=options.voxel_size, effect_directions=0,
        random_seed=seed)
    sites, people = site.draw(phantom), recruit(phantom)
    dwis, made = {}, {}
    for who, _, where, scan in scans(phantom, people, sites, load_atlas(phantom.step)):
        run = who.label + where.name
        dwis[run] = Dwi(masked(scan.signal, scan), scan.mask, scan.grid.affine, scan.acquisition)
        made[run] = scan
    reference, other = (s.name for s in sites)
    mixed = np.random.default_rng(seed).permutation([p.label for p in people]).tolist()
    tested, learned = mixed[:options.tested], mixed[options.tested:]
    align, known = pairs.align, {}

    def aligned(source, target, **more):
        """Every pair once."""
        key = id(source), id(target)
        if key not in known:
            known[key] = align(source, target, **more)
        return known[key]

    pairs.align = aligned
    models = {"none": None}
    for share in options.shares:
        both = learned[:max(1, round(share * len(learned)))] if share else []
        table = [{"participant": p if p in both else p + name, "batch": name, "run": p + name,
                  "snr_b0": 25.0} for p in learned for name in (reference, other)]
        started = time.monotonic()
        method = methods.get("harmonize_cyclic")
        (model,) = method.fit(methods.Study(
            pd.DataFrame(table), (), reference_batch=reference, load=dwis.__getitem__, seed=seed,
            acquisitions={r: d.acquisition for r, d in dwis.items()},
            max_steps=options.max_steps)).checkpoints.values()
        print(f"seed {seed}, {share:.0%} ({len(both)} of {len(learned)}): steps "
              f"{model.card.training['steps']}, {time.monotonic() - started:.0f} s",
              file=sys.stderr, flush=True)
        models[f"{share:.0%}"] = (method, model)
    pairs.align = align
    for name, learner in models.items():
        for who in tested:
            dwi, scan = dwis[who + other], made[who + other]
            signal = learner[0].harmonize(dwi, learner[1], other, "cpu").signal if learner else (
                dwi.signal)
            for row in nmse(ratios(signal, dwi.acquisition),
                            ratios(masked(scan.reference, scan), dwi.acquisition),
                            dwi.acquisition, scan.tissue[:, scan.mask]):
                yield name, who, *row


if __name__ == "__main__":
    main()
