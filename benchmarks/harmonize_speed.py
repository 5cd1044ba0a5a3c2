"""Seconds to harmonize a brain of some 200 000 voxels, 34 volumes, by every harmonizer.

    python benchmarks/harmonize_speed.py [--voxel-size 2.2] [--threads 2] [--methods M ...]

Models are of three people at 6 mm and two steps of training: how long a model takes does not depend
on how well it was trained. Read and write, and the maps before and after, are not counted.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import table
import torch
from travelling import simulate

from bidsapp import kinds, methods
from bidsapp.harmonization import harmonizer
from bidsapp.options import PhantomOptions


def design(**more):
    return PhantomOptions(Path(), **{"participants": 3, "shells": (1200.0,), "directions": 30,
                                     "voxel_size": 6.0, "effect_directions": 0} | more)


def main():
    names = [n for n in methods.names("harmonize_")
             if isinstance(methods.get(n), harmonizer.Harmonizer)]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxel-size", type=float, default=2.2, help="mm")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=int, default=2)
    table.add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (reference, other), people, made = simulate(design())
    statistics = pd.DataFrame([{"participant": p.label, "batch": s, "run": f"{p.label}{s}",
                           "snr_b0": np.nan} for p in people for s in (reference, other)])
    dwis = {f"{p}{s}": one.dwi for (p, s), one in made.items()}
    cohort = kinds.Cohort(
        statistics, reference_batch=reference, load=dwis.__getitem__,
        acquisitions={r: d.acquisition for r, d in dwis.items()})
    settings = kinds.TrainingSettings(max_steps=2)
    _, (person,), made = simulate(design(participants=1, voxel_size=arguments.voxel_size))
    brain = made[person.label, other].dwi
    rows = []
    for name in arguments.methods:
        method = methods.get(name, context=kinds.MethodContext(sloppy=True))
        (model,) = method.fit(cohort, settings).checkpoints.values()
        wall, cpu = time.monotonic(), time.process_time()
        method.harmonize(brain, model, other, "cpu")
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU time", flush=True)
        rows.append((wall, name))
    table.show("harmonize_speed", [[name, f"{wall:.1f}"] for wall, name in sorted(rows)],
               arguments.csv, first=(
                   f"{table.count(len(brain.signal))} voxels of {arguments.voxel_size:g} mm, "
                   f"{brain.signal.shape[1]} volumes, "
                   f"{table.threads(arguments.threads)}"))


if __name__ == "__main__":
    main()
