"""Free water: speed and error on simulated voxels, beside dipy's free-water tensor.

    python benchmarks/freewater.py [--voxels 100000] [--peer-voxels 1000] [--threads 2]

At SNR 25 (Rician, b0 volumes too): 6 b0, 30 directions at b = 1000 and 60 at b = 2000 s/mm². Three
laws of held-out voxels: `mixture` (three fibres, grey matter, water; fractions uniform over their
sum), `sparse` (water uniform on 0-1, each tissue absent half the time), and `one fibre` (one tensor
and water: dipy's own model). Water is 3 µm²/ms in all of them, as dipy assumes. Ours and dipy run
in turns; the network is trained once, and its time is given apart.
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import table
import torch
from dipy.core.gradients import gradient_table
from dipy.reconst.fwdti import FreeWaterTensorModel
from simulated import (
    FREE_WATER_KINDS,
    add_rician_noise,
    as_dwi,
    simulate_free_water,
    spiral_shells,
)

from bidsapp.dwi import Dwi
from bidsapp.methods import get
from bidsapp.methods.estimate_freewater import method as freewater
from bidsapp.methods.estimate_freewater import network

SNR, S0 = 25.0, 500.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--voxels", type=int, default=100_000)
    parser.add_argument("--peer-voxels", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    acq, method = spiral_shells(((0, 6), (1000, 30), (2000, 60))), get("estimate_freewater")
    start = time.perf_counter()
    trained = network.train_network(
        freewater.literature_diffusivities(2), acq, np.array([1 / SNR]), False, options.seed, "cpu",
        get("estimate_freewater").settings("network"))
    training = time.perf_counter() - start
    network.train_network = lambda *args: trained  # `apply` now takes the time of everything else
    freewater.tissue.find_regions = refuse
    print(f"training {training:.1f} s; RMSE on mixtures of the training law {trained[1]:.4f}")
    rows = []
    print(f"{'law':<11}{'estimate':<22}{'MSE of f ± s.e.':>22}{'|FA error|':>12}{'voxels/s':>11}")
    for kind in FREE_WATER_KINDS:
        clean, truth, fa = simulate_free_water(kind, acq, options.voxels, 100 + options.seed)
        rng = np.random.default_rng([100 + options.seed, 1])
        dwi = as_dwi(S0 * add_rician_noise(clean, 1 / SNR, rng), acq, S0 / SNR)
        few = as_dwi(dwi.signal[:options.peer_voxels], acq, S0 / SNR)
        speeds: dict[str, list[float]] = {"network": [], "network, all maps": [],
                                          "dipy WLS": [], "dipy NLS": []}
        b0 = torch.as_tensor(acq.b0)
        found = {}
        for _ in range(options.repeats):
            start = time.perf_counter()
            with torch.no_grad():
                trained[0](network.normalise(torch.from_numpy(np.array(dwi.signal)), b0)[0])
            speeds["network"].append(options.voxels / (time.perf_counter() - start))
            start = time.perf_counter()
            maps = method.apply(dwi, "cpu").maps
            speeds["network, all maps"].append(options.voxels / (time.perf_counter() - start))
            found["network, all maps"] = maps["fraction"], maps["fa"]
            for name in ("WLS", "NLS"):
                f, f_fa, speed = fit_dipy(few, name)
                found[f"dipy {name}"] = f, f_fa
                speeds[f"dipy {name}"].append(speed)
        errors, of_fa = {}, {}
        for name, (f, f_fa) in found.items():
            square = (f - truth[:len(f)]) ** 2
            middle = (truth > 0.1) & (truth < 0.7)
            error = ("–" if fa is None else
                     f"{np.abs(f_fa - fa[:len(f)])[middle[:len(f)]].mean():.3f}")
            errors[name] = table.milli(square.mean())
            of_fa[name] = "" if fa is None else error
            print(f"{kind:<11}{name:<22}{square.mean():>13.2e} ± {square.std() / len(f)**0.5:.0e}"
                  f"{error:>12}{statistics.median(speeds[name]):>11.0f}")
        for name in ("WLS", "NLS"):
            peer = speeds[f"dipy {name}"]
            for ours in ("network", "network, all maps"):
                ratios = [a / b for a, b in zip(speeds[ours], peer, strict=True)]
                print(f"{kind:<11}{ours} / dipy {name}: {statistics.median(ratios):.0f} times "
                      f"({min(ratios):.0f}–{max(ratios):.0f})")
            print(f"{kind:<11}training is made up for after "
                  f"{training * statistics.median(peer):.0f} voxels of dipy {name}")
        rows += table_rows(kind, errors, of_fa, speeds)
    table.show("freewater", rows, options.csv, first=f"SNR {SNR:g}")


LAWS = {"mixture": "three fibres, grey matter, water",
        "sparse": "water uniform, tissues absent",
        "one fibre": "one fibre and water (dipy's model)"}


def table_rows(kind, errors, of_fa, speeds):
    """A row of the network with all maps, and one of both fits of dipy."""
    ours, peers = "network, all maps", ("dipy NLS", "dipy WLS")
    ratios = [[a / b for a, b in zip(speeds[ours], speeds[p], strict=True)] for p in peers]
    both = " / ".join(of_fa[p] for p in peers)
    return [[f"{LAWS.get(kind, kind)}: network", errors[ours], of_fa[ours],
             table.rate(statistics.median(speeds[ours])), ", ".join(map(table.spread, ratios))],
            ["dipy NLS / WLS", " / ".join(errors[p] for p in peers),
             both if both != " / " else "",
             " / ".join(f"{statistics.median(speeds[p]):.0f}" for p in peers), ""]]


def fit_dipy(dwi: Dwi, fit_method: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit dipy's free-water tensor; return the fraction, FA and voxels/s."""
    table = gradient_table(dwi.acquisition.bvals, bvecs=dwi.acquisition.bvecs)
    start = time.perf_counter()
    fit = FreeWaterTensorModel(table, fit_method=fit_method).fit(dwi.signal.astype(float))
    return fit.f, fit.fa, len(dwi.signal) / (time.perf_counter() - start)


def refuse(*args):
    """Simulated voxels lie in no head; do not look for tissue in them."""
    raise freewater.Refusal("no head")


if __name__ == "__main__":
    main()
