"""Tensor fit against dipy's WLS: voxels/s and agreement, in one run.

    python benchmarks/dti.py [--voxels 100000] [--repeats 5] [--threads 2]
    python benchmarks/dti.py --shells [--data DIR]

With --shells: medians of FA and MD on series of several shells, of this program, of dipy's WLS up
to b = 1500 s/mm² and of dipy's WLS through all shells. Simulated are white matter (0.7 of a tensor
of 1.9, 0.5, 0.5 and 0.3 of one of 0.9, 0.05, 0.05 µm²/ms) and CSF (3 µm²/ms) at SNR 20 and 60,
Rician; real ones lie in DIR, as CONTRIBUTING.md says.
"""

import argparse
import statistics
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import table
import torch
from dipy.reconst.dti import TensorModel

from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.dwi import Dwi
from bidsapp.methods import get


def seconds(function, at_least=1.0):
    """Mean duration over as many calls as fill `at_least` seconds, and the result of the last."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        result = function()
        calls += 1
    return (time.perf_counter() - start) / calls, result


def simulated(rng):
    """(name, (voxel, n) signals, acquisition)."""
    b = np.repeat([0, 700, 1500, 3000, 6000], [5, 20, 30, 40, 60]).astype(float)
    g = rng.normal(size=(len(b), 3))
    acquisition = Acquisition(b, g / np.linalg.norm(g, axis=1, keepdims=True))
    turn = np.linalg.qr(rng.normal(size=(5000, 3, 3)))[0]

    def decay(eigenvalues):
        d = np.einsum("vij,j,vkj->vik", turn, np.array(eigenvalues) * 1e-3, turn)
        return np.exp(-np.einsum("nij,vij->vn", acquisition.btensors, d))

    white = 300 * (0.7 * decay([1.9, 0.5, 0.5]) + 0.3 * decay([0.9, 0.05, 0.05]))
    for name, clean in (("simulated WM", white), ("simulated CSF", 900 * decay([3.0] * 3))):
        yield name, np.hypot(clean + rng.normal(0, 15, clean.shape),
                             rng.normal(0, 15, clean.shape)), acquisition


def real(folder):
    for name, stems in (
            ("mdt_multishell", ["sub-01/dwi/sub-01_acq-b1kb2k"]),
            ("nyu_3shell", ["sub-D3/dwi/sub-D3_acq-b1000", "sub-D3/dwi/sub-D3_acq-b250b2000"])):
        paths = [folder / name / stem for stem in stems]
        acquisition = concatenate([Acquisition(
            np.loadtxt(f"{p}_dwi.bval"), np.loadtxt(f"{p}_dwi.bvec").T) for p in paths])
        signal = np.concatenate([np.asarray(nib.load(f"{p}_dwi.nii.gz").dataobj, np.float32)
                                 for p in paths], axis=-1).reshape(-1, len(acquisition))
        s0 = signal[:, acquisition.b0].mean(1)
        yield name, signal[(signal > 0).all(1) & (s0 > 0.3 * np.percentile(s0, 95))], acquisition


def compare_shells(folder, path) -> None:
    rows = []
    print(f"{'series':<15}{'voxels':>8}  {'b, s/mm²':<20}{'used':<12}"
          + "".join(f"{f'{who} {what}':>14}" for what in ("FA", "MD")
                    for who in ("ours", "dipy ≤1500", "dipy all"))
          + f"{'max |dFA|':>11}{'max rel dMD':>12}")
    for name, signal, acquisition in (*simulated(np.random.default_rng(0)), *real(folder)):
        signal = signal.astype(np.float32)
        low = np.flatnonzero(acquisition.bvals < 1575)
        ours = get("estimate_dti").apply(Dwi(signal, np.ones((len(signal), 1, 1), bool), np.eye(4),
                                             acquisition), "cpu")
        below, every = (TensorModel(acquisition[part].to_dipy(), fit_method="WLS").fit(
            signal[:, part]) for part in (low, np.arange(len(acquisition))))
        maps = ours.maps
        print(f"{name:<15}{len(signal):>8}  "
              f"{' '.join(f'{s.b:.0f}' for s in acquisition.shells):<20}"
              f"{ours.counts['dti_shells']:<12}"
              + "".join(f"{np.median(v):>14.3f}" for v in (maps["fa"], below.fa, every.fa))
              + "".join(f"{1e3 * np.median(v):>14.3f}" for v in (maps["md"], below.md, every.md))
              + f"{np.abs(maps['fa'] - below.fa).max():>11.1e}"
              f"{np.abs(maps['md'] / below.md - 1).max():>12.1e}")
        rows.append([
            f"{name}, {table.count(len(signal))} voxels",
            " ".join(f"{s.b:.0f}" for s in acquisition.shells), ours.counts["dti_shells"],
            ", ".join(f"{np.median(v):.3f}" for v in (maps["fa"], below.fa, every.fa)),
            ", ".join(f"{1e3 * np.median(v):.3f}" for v in (maps["md"], below.md, every.md))])
    table.show("dti_shells", rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shells", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--voxels", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.shells:
        compare_shells(options.data, options.csv)
        return
    rng, rows = np.random.default_rng(0), []
    print(f"{'volumes':>8}{'ours vox/s':>12}{'dipy vox/s':>12}{'ratio':>7}{'range':>14}"
          f"{'max |dFA|':>11}{'max rel dMD':>12}")
    for n in (21, 65, 105):
        g = rng.normal(size=(n, 3))
        b = np.where(np.arange(n) % 16 == 0, 0.0, 750.0 * (1 + np.arange(n) % 2))
        acq = Acquisition(b, g / np.linalg.norm(g, axis=1, keepdims=True))
        a = rng.normal(size=(options.voxels, 3, 3)) * 0.02
        d = a @ a.transpose(0, 2, 1) + 3e-4 * np.eye(3)
        clean = 300 * np.exp(-np.einsum("nij,vij->vn", acq.btensors, d))
        signal = np.hypot(clean + rng.normal(0, 8, clean.shape), rng.normal(0, 8, clean.shape))
        dwi = Dwi(np.asfortranarray(signal.astype(np.float32)),
                  np.ones((options.voxels, 1, 1), bool), np.eye(4), acq)
        method = get("estimate_dti")

        def peer(acq=acq, dwi=dwi):
            fit = TensorModel(acq.to_dipy(), fit_method="WLS", return_S0_hat=True).fit(dwi.signal)
            return fit.fa, fit.md, fit.ad, fit.rd, fit.directions

        def ours(method=method, dwi=dwi):
            return method.apply(dwi, "cpu").maps

        times = []
        for _ in range(options.repeats):  # in pairs, so that both see the same load
            t, maps = seconds(ours)
            p, (fa, md, *_) = seconds(peer)
            times.append((t, p))
        ratios = [p / t for t, p in times]
        print(f"{n:>8}{options.voxels / statistics.median(t for t, _ in times):>12.0f}"
              f"{options.voxels / statistics.median(p for _, p in times):>12.0f}"
              f"{statistics.median(ratios):>7.1f}{min(ratios):>7.1f}–{max(ratios):<6.1f}"
              f"{np.abs(maps['fa'] - fa).max():>11.1e}{np.abs(maps['md'] / md - 1).max():>12.1e}")
        rows.append([f"{n} volumes", *(table.rate(options.voxels / statistics.median(t))
                                       for t in zip(*times, strict=True)),
                     table.spread(ratios, ".1f")])
    table.show("dti", rows, options.csv)


if __name__ == "__main__":
    main()
