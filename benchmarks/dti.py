"""Tensor fit against dipy's WLS: voxels/s and agreement, in one run.

    python benchmarks/dti.py [--voxels 100000] [--repeats 5] [--threads 2]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from dipy.reconst.dti import TensorModel

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.methods import get


def seconds(function, at_least=1.0):
    """Mean duration over as many calls as fill `at_least` seconds, and the result of the last."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        result = function()
        calls += 1
    return (time.perf_counter() - start) / calls, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    print(f"{'volumes':>8}{'ours vox/s':>12}{'dipy vox/s':>12}{'ratio':>7}{'range':>14}"
          f"{'max |dFA|':>11}{'max rel dMD':>12}")
    for n in (21, 65, 105):
        g = rng.normal(size=(n, 3))
        b = np.where(np.arange(n) % 16 == 0, 0.0, 1000.0 * (1 + np.arange(n) % 2))
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


if __name__ == "__main__":
    main()
