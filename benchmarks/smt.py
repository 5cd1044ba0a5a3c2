"""Spherical mean technique: speed and error on simulated voxels, and the peer dmipy-fit.

    python benchmarks/smt.py [--voxels 20000] [--repeats 5] [--threads 2] [--peer-python PATH]

The peer (AGPL, so never a dependency) is run by the Python of a separate environment in which
`pip install dmipy-fit` was done. Both fit the constrained two-compartment model at SNR 50 (Rician),
one noise-free b0, 60 directions at b = 1000 and 2200 s/mm², Watson-mixture ODFs.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import peer
import table
import torch
from simulated import add_rician_noise, as_dwi, simulate_two_compartments, two_shells

from bidsapp.methods import get

PEER = """
import sys, time
import numpy as np
from dmipy_fit.core.acquisition_scheme import acquisition_scheme_from_bvalues
from dmipy_fit.core.modeling_framework import MultiCompartmentSphericalMeanModel
from dmipy_fit.signal_models.cylinder_models import C1Stick
from dmipy_fit.signal_models.gaussian_models import G2Zeppelin
data = np.load(sys.argv[1])
scheme = acquisition_scheme_from_bvalues(data["b"] * 1e6, data["g"])
model = MultiCompartmentSphericalMeanModel([C1Stick(), G2Zeppelin()])
model.set_tortuous_parameter("G2Zeppelin_1_lambda_perp", "C1Stick_1_lambda_par",
                             "partial_volume_0", "partial_volume_1")
model.set_equal_parameter("G2Zeppelin_1_lambda_par", "C1Stick_1_lambda_par")
start = time.perf_counter()
fit = model.fit(scheme, data["signal"]).fitted_parameters
seconds = time.perf_counter() - start
d = [v for k, v in fit.items() if k.endswith("lambda_par")][0] * 1e9
np.savez(sys.argv[2], d=d, f=fit["partial_volume_0"], seconds=seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-voxels", type=int, default=500)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(7)
    acq = two_shells(rng)
    d, f = rng.uniform(0, 3, options.voxels), rng.uniform(0, 1, options.voxels)
    signal = simulate_two_compartments(acq, d, f, rng)
    signal[:, 1:] = add_rician_noise(signal[:, 1:], 0.02, rng)
    method, dwi = get("estimate_smt"), as_dwi(signal, acq, 0.02, s0_known=True)
    times, peers, found = [], [], None
    for _ in range(options.repeats):
        start = time.perf_counter()
        maps = method.apply(dwi, "cpu").maps
        times.append((time.perf_counter() - start) / options.voxels)
        if options.peer_python:
            found = peer.run(options.peer_python, PEER, b=acq.bvals, g=acq.bvecs,
                             signal=signal[:options.peer_voxels])
            peers.append(float(found["seconds"]) / options.peer_voxels)
    print(f"{'estimate':<16}{'vox/s':>9}{'MSE d':>10}{'MSE f':>10}   (µm²/ms)², 1")
    rows = [("posterior mean", times, maps["diffusivity"], maps["neuritefraction"]),
            ("least squares", times, maps["diffusivity_mode"], maps["neuritefraction_mode"])]
    if found is not None:
        rows.append(("dmipy-fit", peers, found["d"], found["f"]))
    lines = []
    for name, seconds, d_found, f_found in rows:
        n = len(d_found)
        print(f"{name:<16}{1 / statistics.median(seconds):>9.0f}"
              f"{np.mean((d_found - d[:n])**2):>10.2e}{np.mean((f_found - f[:n])**2):>10.2e}")
        speed = table.rate(1 / statistics.median(seconds))
        lines.append([name if seconds is times else f"{name}, first {n} voxels",
                      "" if name == "least squares" else
                      f"{speed} (both estimates)" if seconds is times else speed,
                      *(table.milli(np.mean((v - truth[:n])**2))
                        for v, truth in ((d_found, d), (f_found, f)))])
    table.show("smt", lines, options.csv,
               first=f"estimate, {table.count(options.voxels)} voxels")
    if peers:
        ratios = [p / t for p, t in zip(peers, times, strict=True)]
        print(f"ratio to the peer: median {statistics.median(ratios):.0f}, "
              f"{min(ratios):.0f}–{max(ratios):.0f}")


if __name__ == "__main__":
    main()
