"""NODDI by a spherical network: error, direction and speed, and the peer AMICO.

    python benchmarks/noddi.py [--voxels 20000] [--repeats 3] [--threads 2] [--weights FOLDER]
                               [--snr 50 30] [--peer-python PATH]

The peer (its licence forbids commercial use, so never a dependency) is run by the Python of a
separate environment in which `pip install dmri-amico` was done, with what it has as defaults:
12 × 12 atoms of NDI 0.1–0.99 and ODI 0.03–0.99, 500 directions, λ 0.5 and 1e-3, no debiasing.
Both see the same noisy signals (Rician): 9 b0, 30 directions at b = 700 and 60 at 2000 s/mm²
(Zhang et al. 2012), in turns. Ours is told the true noise SD, as the app measures it.

Truth is made without spherical harmonics, by a product rule over the sphere about every voxel's
axis, in float64. NDI, ODI and FISO uniform: `whole` over all that the model allows, which is the
prior that the network was trained on, `tissue` over what AMICO's atoms span, FISO < 0.6. A
posterior mean has the least square error under its own prior; a fit has no such advantage.
Direction: median angle to the axis, where FISO < 0.6 and ODI < 0.5.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import peer
import table
import torch
from simulated import as_dwi

from bidsapp import checkpoint, selection, sh
from bidsapp.acquisition import Acquisition
from bidsapp.microstructure import maps as estimating
from bidsapp.simulate import odf, protocols
from bidsapp.simulate.tissue import NODDI

PRIORS = {"whole": ((0.0, 1.0), (0.01, 0.99), (0.0, 1.0)),
          "tissue": ((0.1, 0.99), (0.03, 0.99), (0.0, 0.6))}
LABELS = {"whole": "whole prior", "tissue": "AMICO's range, FISO < 0.6"}
PARALLEL, FREE = 1.7, 3.0

PEER = """
import os, sys, time
folder = os.path.dirname(sys.argv[2])  # is removed after the run
os.environ["HOME"] = os.environ["DIPY_HOME"] = folder
import nibabel as nib
import numpy as np
import amico
data = np.load(sys.argv[1])
signal = data["signal"][:, None, None].astype(np.float32)
nib.save(nib.Nifti1Image(signal, np.eye(4)), f"{folder}/dwi.nii")
np.savetxt(f"{folder}/dwi.scheme", np.c_[data["g"], data["b"]], fmt="%.8f")
start = time.perf_counter()
amico.lut.precompute_rotation_matrices(12, 500)
app = amico.Evaluation(folder, ".")
app.set_config("nthreads", int(data["threads"]))
app.load_data("dwi.nii", "dwi.scheme")
app.set_model("NODDI")
app.generate_kernels()
app.load_kernels()
kernels = time.perf_counter() - start
start = time.perf_counter()
app.fit()
seconds = time.perf_counter() - start
np.savez(sys.argv[2], maps=app.RESULTS["MAPs"][:, 0, 0], axis=app.RESULTS["DIRs"][:, 0, 0],
         seconds=seconds, kernels=kernels)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--snr", type=float, nargs="+", default=[50, 30])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--peer-python", type=Path)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trained = (checkpoint.load(options.weights, "estimate_noddi") if options.weights
               else selection.bundled_weights("estimate_noddi"))
    acq, times, lines = acquisition(), {"noddi": [], "AMICO": []}, []
    print(f"{'prior':<8}{'SNR':>4}  {'':<7}{'MSE NDI':>10}{'MSE ODI':>10}{'MSE FISO':>10}"
          f"{'cover 90 %':>20}{'angle, °':>10}")
    for prior, ranges in PRIORS.items():
        generator = torch.Generator().manual_seed(7)
        low, high = torch.tensor(ranges, dtype=torch.float64).T
        truth = low + (high - low) * torch.rand(options.voxels, 3, generator=generator).double()
        axis = odf.random_rotations(options.voxels, generator)[:, :, 2]
        clean = simulate(acq, truth, axis)
        for snr in options.snr:
            noise = torch.randn(2, *clean.shape, generator=generator) / snr
            signal = torch.hypot(clean + noise[0], noise[1]).numpy().astype(np.float32)
            dwi, found = as_dwi(signal, acq, 1 / snr), {}
            for _ in range(options.repeats):
                start = time.perf_counter()
                maps = estimating.estimate(trained, NODDI, dwi, "cpu")[0]
                times["noddi"].append((time.perf_counter() - start) / options.voxels)
                if options.peer_python:
                    found = peer.run(options.peer_python, PEER, b=acq.bvals, g=acq.bvecs,
                                     signal=signal, threads=np.array(options.threads))
                    times["AMICO"].append(float(found["seconds"]) / options.voxels)
            ours = np.stack([maps[name] for name in NODDI.names], 1)
            sd = np.stack([maps[f"{name}_std"] for name in NODDI.names], 1)
            cover = (abs(ours - truth.numpy()) <= estimating.QUANTILE * sd).mean(0)
            rows = [("noddi", ours, main_axis(maps["odf"]), " ".join(f"{c:.3f}" for c in cover))]
            if found:
                rows.append(("AMICO", found["maps"], found["axis"], ""))
            clear = ((truth[:, 2] < 0.6) & (truth[:, 1] < 0.5)).numpy()
            for name, values, mu, told in rows:
                error = ((values - truth.numpy()) ** 2).mean(0)
                cosine = abs((mu * axis.numpy()).sum(1))[clear].clip(0, 1)
                angle = np.rad2deg(np.median(np.arccos(cosine)))
                print(f"{prior:<8}{snr:>4.0f}  {name:<7}" + "".join(f"{e:>10.2e}" for e in error)
                      + f"{told:>20}{angle:>10.2f}")
                label = f"{LABELS[prior]}, SNR {snr:g}: {name}" if name == "noddi" else name
                lines.append([label, *map(table.milli, error), told.replace(" ", ", "),
                              f"{angle:.2f}°"])
    table.show("noddi", lines, options.csv, first=f"{table.count(options.voxels)} voxels")
    print(f"voxels/s with {options.threads} threads: " + ", ".join(
        f"{name} {1 / statistics.median(s):.0f}" for name, s in times.items() if s))
    if times["AMICO"]:
        ratios = [p / t for p, t in zip(times["AMICO"], times["noddi"], strict=True)]
        print(f"ratio to AMICO: {statistics.median(ratios):.2f} ({min(ratios):.2f}–"
              f"{max(ratios):.2f}); its kernels took {float(found['kernels']):.1f} s before that")


def acquisition() -> Acquisition:
    return Acquisition(np.repeat([0, 700, 2000], [9, 30, 60]), np.concatenate(
        [np.zeros((9, 3)), protocols.spread(30), protocols.spread(60)]))


def simulate(acq: Acquisition, truth: torch.Tensor, axis: torch.Tensor, block: int = 100,
             nodes: int = 32, turns: int = 16) -> torch.Tensor:
    """(voxel, measurement) S/S0: Gauss's rule in t = n·μ over 0–1, midpoints of turns about μ."""
    t, weight = map(torch.tensor, np.polynomial.legendre.leggauss(2 * nodes))
    t, weight = t[nodes:], weight[nodes:]
    turn = torch.cos((torch.arange(turns).double() + 0.5) * math.pi / turns)
    b, g = torch.tensor(acq.bvals / 1000), torch.tensor(acq.bvecs)
    out = []
    for part, mu in zip(truth.split(block), axis.split(block), strict=True):
        ndi, odi, fiso = part[:, :, None].unbind(1)
        watson = weight * torch.exp((t**2 - 1) / torch.tan(odi * math.pi / 2))
        watson = watson / watson.sum(1, keepdim=True)
        tau = (watson @ t**2)[:, None]
        along = mu @ g.T
        across = (1 - along**2).clamp(min=0).sqrt()[..., None, None] * (1 - t**2).sqrt()[:, None]
        cosine = along[..., None, None] * t[:, None] + across * turn
        sticks = torch.exp(-PARALLEL * b[:, None, None] * cosine**2).mean(-1)
        radial = 1 - ndi * (1 + tau) / 2
        level = radial + (1 - ndi * (1 - tau) - radial) * along**2
        inside = (sticks * watson[:, None]).sum(-1)
        outside = torch.exp(-PARALLEL * b * level)
        out.append((1 - fiso) * (ndi * inside + (1 - ndi) * outside) + fiso * torch.exp(-FREE * b))
    return torch.cat(out)


def main_axis(density: np.ndarray) -> np.ndarray:
    """(voxel, 3): the direction of the largest second moment."""
    points, weights = sh.quadrature(10)
    values = density @ sh.basis(8, points).T * weights
    return np.linalg.eigh(np.einsum("vn,ni,nj->vij", values, points, points))[1][:, :, 2]


if __name__ == "__main__":
    main()
