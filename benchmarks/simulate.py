"""Signals of the constrained two-compartment model: speed, and the peers dipy and dmipy-fit.

    python benchmarks/simulate.py [--voxels 100000] [--repeats 5] [--threads 2] [--peer-python PATH]

One b0, 60 directions at b = 1000 and 60 at 2200 s/mm², float32. Ours: stick and zeppelin convolved
with a Watson density, in blocks, from ODF coefficients at hand and with the ODFs drawn as well;
the same without an ODF, as two tensors. dipy's `multi_tensor` makes two tensors without an ODF.
dmipy-fit (AGPL, so never a dependency; run by the Python of a separate environment in which
`pip install dmipy-fit` was done) makes the Watson-distributed model. Errors are the largest
difference from dense integration over the sphere in float64, over the first voxels.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import peer
import table
import torch
from dipy.sims.voxel import multi_tensor
from simulated import two_shells

from bidsapp import sh
from bidsapp.simulate import forward, odf

BLOCK = 4096
CHECKED = 200

PEER = """
import sys, time
import numpy as np
from dmipy_fit.core.acquisition_scheme import acquisition_scheme_from_bvalues
from dmipy_fit.core.modeling_framework import MultiCompartmentModel
from dmipy_fit.distributions.distribute_models import SD1WatsonDistributed
from dmipy_fit.signal_models.cylinder_models import C1Stick
from dmipy_fit.signal_models.gaussian_models import G2Zeppelin
data = np.load(sys.argv[1])
scheme = acquisition_scheme_from_bvalues(data["b"] * 1e6, data["g"])
bundle = SD1WatsonDistributed([C1Stick(), G2Zeppelin()])
bundle.set_tortuous_parameter("G2Zeppelin_1_lambda_perp", "C1Stick_1_lambda_par",
                              "partial_volume_0")
bundle.set_equal_parameter("G2Zeppelin_1_lambda_par", "C1Stick_1_lambda_par")
model = MultiCompartmentModel([bundle])
values = {"lambda_par": data["d"] * 1e-9, "partial_volume_0": data["f"],
          "SD1Watson_1_odi": 2 / np.pi * np.arctan(1 / data["kappa"]),
          "SD1Watson_1_mu": np.stack([np.arccos(data["mu"][:, 2]),
                                      np.arctan2(data["mu"][:, 1], data["mu"][:, 0])], 1)}
vector = model.parameters_to_parameter_vector(
    **{name: next(v for k, v in values.items() if name.endswith(k))
       for name in model.parameter_names})
start = time.perf_counter()
signal = model.simulate_signal(scheme, vector)
np.savez(sys.argv[2], signal=signal, seconds=time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-voxels", type=int, default=500)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    acq = two_shells(np.random.default_rng(7))
    generator = torch.Generator().manual_seed(7)
    n = options.voxels
    d = 3 * torch.rand(n, generator=generator)
    f = torch.rand(n, generator=generator)
    kappa = torch.exp(torch.rand(n, generator=generator) * np.log(32))
    turn = odf.random_rotations(n, generator).float()
    mu = turn[..., 2]
    weights = {l: odf.watson(mu, kappa, l) for l in (8, 12)}

    def convolved(rows, l_max):
        return protocols[l_max].signal(weights[l_max][rows],
                                       forward.two_compartments(d[rows], f[rows]))

    def drawn(rows, l_max):
        return protocols[l_max].signal(odf.watson(mu[rows], kappa[rows], l_max),
                                       forward.two_compartments(d[rows], f[rows]))

    def tensors(rows, l_max):
        return protocols[l_max].tensors(torch.stack([f[rows], 1 - f[rows]], 1),
                                        pair(d[rows], f[rows], turn[rows]))

    protocols = {l: forward.Protocol(acq, l, d) for l in (8, 12)}
    gtab, few = acq.to_dipy(), slice(0, options.peer_voxels)
    jobs = [("ODF at hand, l ≤ 8", convolved, 8), ("ODF at hand, l ≤ 12", convolved, 12),
            ("Watson ODF drawn, l ≤ 8", drawn, 8), ("Watson ODF drawn, l ≤ 12", drawn, 12),
            ("two tensors", tensors, 8)]
    times: dict[str, list[float]] = {}
    found = None
    for _ in range(options.repeats):
        for name, job, l_max in jobs:
            start = time.perf_counter()
            for at in range(0, n, BLOCK):
                job(slice(at, at + BLOCK), l_max)
            times.setdefault(name, []).append((time.perf_counter() - start) / n)
        start = time.perf_counter()
        theirs = dipy(gtab, d[few].tolist(), f[few].tolist(), mu[few].double().numpy())
        times.setdefault("dipy multi_tensor", []).append(
            (time.perf_counter() - start) / len(theirs))
        if options.peer_python:
            found = peer.run(options.peer_python, PEER, b=acq.bvals, g=acq.bvecs, d=d[few],
                             f=f[few], kappa=kappa[few], mu=mu[few])
            times.setdefault("dmipy-fit Watson", []).append(float(found["seconds"]) / len(theirs))
    first = slice(0, CHECKED)
    dense = integrated(acq, d[first], f[first], kappa[first], mu[first])
    errors = {name: abs(job(first, l_max).numpy() - dense).max() for name, job, l_max in jobs[:4]}
    errors["two tensors"] = abs(tensors(few, 8).numpy() - theirs).max()
    if found is not None:
        signal = found["signal"][first]
        errors["dmipy-fit Watson"] = abs(signal - dense[:len(signal)]).max()
    base = times["dipy multi_tensor"]
    print(f"{'':<28}{'vox/s':>10}{'x dipy (range)':>28}{'error':>10}")
    for name, seconds in times.items():
        ratio = [b / s for b, s in zip(base, seconds, strict=True)]
        print(f"{name:<28}{1 / statistics.median(seconds):>10.0f}{statistics.median(ratio):>12.1f}"
              f" ({min(ratio):.1f}–{max(ratio):.1f})".ljust(68)
              + (f"{errors[name]:.1e}" if name in errors else ""))
    table.show("simulate", [
        [name, table.rate(1 / statistics.median(seconds)),
         "1" if seconds is base else table.spread([b / s for b, s in zip(
             base, seconds, strict=True)], ".3g"),
         f"{errors[name]:.1e}".replace("e-0", "e-") if name in errors else ""]
        for name, seconds in times.items()], options.csv,
        first=f"{table.count(n)} voxels, {len(acq)} volumes")


def pair(d, f, turn):
    """(voxel, 2, 3, 3): stick and zeppelin along the third column of each rotation."""
    zero = torch.zeros_like(d)
    stick = torch.stack([zero, zero, d], -1)
    zeppelin = torch.stack([(1 - f) * d, (1 - f) * d, d], -1)
    axes = turn[:, None]
    return axes * torch.stack([stick, zeppelin], 1)[:, :, None] @ axes.mT


def dipy(gtab, diffusivities, fractions, mu):
    angles = np.rad2deg([np.arccos(mu[:, 2]), np.arctan2(mu[:, 1], mu[:, 0])]).T
    out = []
    for d, f, angle in zip(diffusivities, fractions, angles, strict=True):
        evals = 1e-3 * np.array([[d, 0, 0], [d, (1 - f) * d, (1 - f) * d]])
        out.append(multi_tensor(gtab, evals, S0=1.0, angles=[angle, angle],
                                fractions=[100 * f, 100 - 100 * f], snr=None)[0])
    return np.stack(out)


def integrated(acq, d, f, kappa, mu):
    """S/S0 by summing kernel times density over an exact quadrature of degree 200, float64."""
    n, w = map(torch.tensor, sh.quadrature(200))
    d, f, kappa, mu = (a.double() for a in (d, f, kappa, mu))
    density = torch.exp(kappa[:, None] * ((mu @ n.T) ** 2 - 1)) * w
    density = density / density.sum(1, keepdim=True)
    b, along = torch.tensor(acq.bvals) / 1000, (torch.tensor(acq.bvecs) @ n.T) ** 2
    out = []
    for i in range(len(d)):
        stick = torch.exp(-b[:, None] * d[i] * along)
        zeppelin = torch.exp(-b[:, None] * d[i] * (1 - f[i] + f[i] * along))
        out.append((f[i] * stick + (1 - f[i]) * zeppelin) @ density[i])
    return torch.stack(out).numpy()


if __name__ == "__main__":
    main()
