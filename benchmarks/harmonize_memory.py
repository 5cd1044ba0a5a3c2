"""Memory that a training takes, by the number of people it learns from.

    python benchmarks/harmonize_memory.py [--voxel-size 2.2] [--people 2 4 8] [--method M]

Scans of one simulated head, each with noise of its own, lie on disk; a process of its own for each
number registers them (rigidly) and trains for a few steps. Told is the most memory that no file
stands behind (resident less shared: what the system cannot take back), and what lay on disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import table
import torch
from harmonize_speed import design
from travelling import simulate

from bidsapp import kinds, methods
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi

STEPS = 200
SITES = "siteA", "siteB"


def write(folder, people, voxel_size):
    """A file for each scan, and one for what they share."""
    _, (person,), made = simulate(design(participants=1, voxel_size=voxel_size))
    for k, site in enumerate(SITES):
        dwi = made[person.label, site].dwi
        np.savez(folder / f"{site}.npz", mask=dwi.mask, affine=dwi.affine,
                 bvals=dwi.acquisition.bvals, bvecs=dwi.acquisition.bvecs)
        for i in range(people):
            noise = np.random.default_rng([i, k]).standard_normal(dwi.signal.shape, np.float32)
            np.save(folder / f"{i}{site}.npy", np.hypot(dwi.signal, dwi.noise_sd * noise))


def train(folder, people, name):
    """(MB of memory, MB of files)"""
    shared = {site: np.load(folder / f"{site}.npz") for site in SITES}
    tables = {site: Acquisition(s["bvals"], s["bvecs"]) for site, s in shared.items()}
    rows = [(str(i), site, f"{i}{site}", np.nan) for i in range(people) for site in SITES]
    statistics = pd.DataFrame(rows, columns=["participant", "batch", "run", "snr_b0"])

    def load(run):
        site = run[-len(SITES[0]):]
        return Dwi(np.load(folder / f"{run}.npy"), shared[site]["mask"], shared[site]["affine"],
                   tables[site])

    method = methods.get(name, context=kinds.MethodContext(sloppy=True))
    own, done = psutil.Process(), threading.Event()
    most = [0, 0]

    with tempfile.TemporaryDirectory(dir=folder) as states:
        def watch():
            while not done.wait(0.2):
                memory = own.memory_info()
                most[0] = max(most[0], memory.rss - memory.shared)
                with suppress(FileNotFoundError):  # gone in the meantime
                    files = [p for p in Path(tempfile.gettempdir()).rglob("*") if p.is_file()]
                    most[1] = max(most[1], sum(p.stat().st_size for p in files))

        watcher = threading.Thread(target=watch)
        watcher.start()
        tempfile.tempdir = states
        method.fit(kinds.Cohort(
            statistics, reference_batch=SITES[0], load=load,
            acquisitions={r: tables[s] for _, s, r, _ in rows}),
            kinds.TrainingSettings(max_steps=STEPS, states=Path(states)))
        done.set()
        watcher.join()
    return [m / 2**20 for m in most]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxel-size", type=float, default=2.2, help="mm")
    parser.add_argument("--people", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--method", default="harmonize_shresnet")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    table.add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.in_folder:
        print(json.dumps(train(arguments.in_folder, arguments.people[0], arguments.method)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, max(arguments.people), arguments.voxel_size)
        scan = (folder / f"0{SITES[0]}.npy").stat().st_size / 2**20
        voxels, volumes = np.load(folder / f"0{SITES[0]}.npy", mmap_mode="r").shape
        rows = []
        for people in arguments.people:
            made = subprocess.run(
                [sys.executable, __file__, "--in-folder", name, "--people", str(people),
                 "--method", arguments.method], check=True, stdout=subprocess.PIPE, text=True)
            memory, disk = json.loads(made.stdout)
            print(f"{arguments.method}, {people} people: {memory:.0f} MB of memory, {disk:.0f} MB "
                  f"of temporary files; a scan has {scan:.0f} MB", flush=True)
            rows.append([f"{arguments.method} of {people} people" if not rows else f"of {people}",
                         f"{memory:.0f}", f"{disk:.0f}"])
        table.show("harmonize_memory", rows, arguments.csv, first=(
            f"scans of {table.count(round(voxels, -3))} voxels of {arguments.voxel_size:g} mm, "
            f"{volumes} volumes, {scan:.0f} MB each"))


if __name__ == "__main__":
    main()
