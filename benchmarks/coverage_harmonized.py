"""Do intervals of smt, scnn2 and dti cover what they say after harmonization? On known heads.

    python benchmarks/coverage_harmonized.py [--methods harmonize_rish harmonize_mica@series ...]
        [--estimate smt scnn2 dti] [--seeds 0 1] [--threads 1]

Heads of 11 mm voxels hold the two-compartment tissue of smt (sticks in zeppelins, Watson
densities): white matter of κ 8–32, grey matter of κ 0–2, CSF; d and f vary from voxel to voxel and
from person to person. Site B scales every degree of the signal
of every shell by a number of its own, which --seeds draw, and both sites add Rician noise (SNR 30
at site A, 24 at B, of S0 in white matter). Methods that learn from pairs do so from four people
scanned at both sites, RISH and MICA from eight others at each. They harmonize a scan of one more,
with 7 and with 1 of its b = 0 volumes. METHOD@series: the published variant.

"before": the noise as measured anew from the residual of an SH fit to what came out. "travels": the
level that travels with the signal, standard deviations widened by the method's own error. Where no
interval is written, "(none)", it is shown what they would cover. Shares of the truths within
± 1.645 SD, in WM and GM, and the bias and the root mean square error: of d (µm²/ms) and f, and for
dti of FA and MD (µm²/ms), whose truth is dti's own fit to the noise-free signal of site A.
Rows "site A" and "site B": scans not harmonized.
"""

import argparse
from dataclasses import replace

import numpy as np
import pandas as pd
import table
import torch

from bidsapp import dwi as measured
from bidsapp import kinds, methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.harmonization import harmonizer
from bidsapp.harmonization.paired import PairedHarmonizer
from bidsapp.simulate import site

SHAPE, ZOOM, S0 = (15, 17, 13), 11.0, {"wm": 1000.0, "gm": 1250.0, "csf": 2500.0}
SNR = {"A": 30.0, "B": 24.0}
WM, GM, CSF = 2, 1, 3
Z = 1.645
L_MAX = 8
PEOPLE, GROUP = 4, 8


def tissues():
    """(x, y, z): 0 air, else GM about WM about CSF."""
    grid = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    x, y, z = grid
    r = np.sqrt(sum((g / (0.46 * n)) ** 2 for g, n in zip(grid, SHAPE, strict=True)))
    out = np.where(r < 1, GM, 0)
    out[r < 0.8] = WM
    out[(np.abs(x) < 1.6) & (np.abs(y - 1) < 3) & (np.abs(z) < 1.6)] = CSF
    return out


def watson(kappa, axes):
    """(voxel, coefficient) SH of Watson densities."""
    points, weights = sh.quadrature(80)
    density = np.exp(kappa[:, None] * ((axes @ points.T) ** 2 - 1))
    density /= (density * weights).sum(1, keepdims=True)
    return density, points, weights


def attenuation(acquisition, d, f, kappa, axes):
    """(voxel, measurement) S/S0."""
    density, points, weights = watson(kappa, axes)
    b = acquisition.bvals / 1000
    cosine = (acquisition.bvecs @ points.T) ** 2
    out = np.empty((len(d), len(b)))
    for i, (own, one, share) in enumerate(zip(density * weights, d, f, strict=True)):
        radial = (1 - share) * one
        response = share * np.exp(-b[:, None] * one * cosine) + (1 - share) * np.exp(
            -b[:, None] * (radial + (one - radial) * cosine))
        out[i] = response @ own
    return out


def person(acquisition, seed):
    """Noise-free S/S0, d and f of everyone's own tissue in one anatomy."""
    labels = tissues()
    own = labels[labels > 0]
    rng = np.random.default_rng([seed, 7])
    where = np.argwhere(labels > 0) - (np.array(SHAPE) - 1) / 2

    def field(low, high):
        turn = rng.standard_normal(3)
        smooth = np.sin(where @ turn / np.linalg.norm(turn) / 3 + rng.uniform(0, 6))
        return (low + high) / 2 + (high - low) / 2 * (0.6 * smooth + 0.4 * rng.uniform(
            -1, 1, len(own)))

    d = np.select([own == WM, own == GM], [field(1.5, 2.1), field(0.9, 1.3)], 2.9)
    f = np.select([own == WM, own == GM], [field(0.45, 0.75), field(0.2, 0.4)], 0.02)
    kappa = np.select([own == WM, own == GM], [field(8, 32), field(0, 2)], 0)
    axes = np.cross(where, [0.1, 0.2, 1.0]) + [0.5, 0.1, 0.3]
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return attenuation(acquisition, d, f, kappa, axes), d, f


def effect(ratio, acquisition, seed):
    """Site B: every degree of every shell times a number."""
    rng, out = np.random.default_rng([seed, 3]), ratio.copy()
    for shell in acquisition.shells:
        basis = sh.basis(L_MAX if len(shell) >= 60 else 4, acquisition.bvecs[shell.indices])
        l = sh.degrees(sh.l_max_of(basis.shape[1]))
        gain = {k: 1 + rng.choice([-1, 1]) * rng.uniform(0.05, 0.15)
                for k in range(0, L_MAX + 1, 2)}
        c = ratio[:, shell.indices] @ np.linalg.pinv(basis).T
        out[:, shell.indices] += (c * (np.array([gain[k] for k in l]) - 1)) @ basis.T
    return out


def scan(ratio, acquisition, where, seed):
    labels = tissues()
    own = labels[labels > 0]
    level = np.select([own == WM, own == GM], [S0["wm"], S0["gm"]], S0["csf"])
    noise = S0["wm"] / SNR[where] * np.random.default_rng([seed, ord(where)]).standard_normal(
        (2, *ratio.shape))
    signal = np.hypot(level[:, None] * ratio + noise[0], noise[1]).astype(np.float32)
    affine = np.diag([ZOOM, ZOOM, ZOOM, 1.0])
    affine[:3, 3] = -ZOOM * (np.array(SHAPE) - 1) / 2
    dwi = Dwi(signal, labels > 0, affine, acquisition)
    return replace(dwi, noise_sd=measured.noise_sd(dwi))


def thinned(dwi, count):
    """With so many of the b = 0 volumes."""
    b0 = np.flatnonzero(dwi.acquisition.b0)
    kept = np.setdiff1d(np.arange(len(dwi.acquisition)), b0[count:])
    dwi = replace(dwi, signal=np.ascontiguousarray(dwi.signal[:, kept]),
                  acquisition=dwi.acquisition[kept], noise_gain=None)
    return replace(dwi, noise_sd=measured.noise_sd(dwi))


def true_maps(dwi, ratio, d, f, estimator):
    """(symbol, key of the map, factor to µm²/ms, truth) of what an estimator is judged by."""
    if estimator == "dti":
        free = replace(dwi, signal=(1000 * ratio).astype(np.float32), noise_sd=None)
        maps = methods.get("estimate_dti").apply(free, "cpu").maps
        return [("FA", "fa", 1.0, maps["fa"]), ("MD", "md", 1e3, 1e3 * maps["md"])]
    return [("d", "diffusivity", 1.0, d), ("f", "neuritefraction", 1.0, f)]


def covered(dwi, truths, estimator, factor):
    """Rows of tissue, parameter, share covered, bias, RMSE."""
    method = methods.get(f"estimate_{estimator}")
    maps = method.apply(dwi, "cpu").widen_intervals(factor, method.ranges).maps
    own = tissues()[tissues() > 0]
    for name, label in (("WM", WM), ("GM", GM)):
        at = own == label
        for symbol, key, unit, truth in truths:
            error, sd = unit * maps[key][at] - truth[at], unit * maps[f"{key}_std"][at]
            yield {"tissue": name, "of": symbol, "covered": (np.abs(error) <= Z * sd).mean(),
                   "bias": error.mean(), "rmse": np.sqrt(np.square(error).mean())}


def text(rows):
    """A line for each method, noise and number of b0, mean over the seeds so far."""
    wide = pd.DataFrame(rows).groupby(["estimator", "method", "noise", "b0", "of", "tissue"],
                                      sort=False)[["covered", "bias", "rmse"]].mean()
    return wide.unstack(["of", "tissue"]).round(3).to_string()


NOISES = {"measured": "", "before": ", noise measured anew",
          "travels": ", noise travels, intervals widened",
          "travels (none)": ", noise travels (no interval is written)"}


def lines(rows):
    """Rows of the table: a line for each estimator, method and noise, mean over the seeds."""
    shares = pd.DataFrame(rows).groupby(
        ["estimator", "method", "noise", "b0", "tissue", "of"], sort=False)["covered"].mean()
    found = []
    for estimator, method, noise in dict.fromkeys(k[:3] for k in shares.index):
        own = shares[estimator, method, noise]
        name = "the reference site itself" if method == "site A" else method
        found.append([f"{estimator}: {name}{NOISES[noise]}", *(
            f"{own[b0, tissue, 'd']:.2f} / {own[b0, tissue, 'f']:.2f}"
            for b0 in (7, 1) for tissue in ("WM", "GM"))])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[
        n for n in methods.names("harmonize_")
        if isinstance(methods.get(n), harmonizer.Harmonizer)])
    parser.add_argument("--estimate", nargs="+", default=["smt", "scnn2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--directions", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=40, help="of 2560 voxels each")
    parser.add_argument("--threads", type=int, default=1)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spread = site.gradient_table((1000.0, 2200.0), options.directions)
    weighted = np.flatnonzero(~spread.b0)
    acquisition = Acquisition(np.append(np.zeros(7), spread.bvals[weighted]),
                              np.concatenate([np.zeros((7, 3)), spread.bvecs[weighted]]))
    people = [person(acquisition, i) for i in range(1 + 2 * GROUP)]
    ratio, d, f = people[0]
    rows = []
    for seed in options.seeds:
        def load(run, seed=seed):
            i, where = int(run[:-1]), run[-1]
            own = people[i][0]
            return scan(effect(own, acquisition, seed) if where == "B" else own, acquisition,
                        where, 100 * seed + i)

        def study(runs, load=load):
            return kinds.Cohort(
                pd.DataFrame({"participant": [r[:-1] for r in runs], "batch": [r[-1] for r in runs],
                              "run": runs, "snr_b0": 30.0}), reference_batch="A",
                acquisitions=dict.fromkeys(runs, acquisition), load=load,
                voxel_sizes=dict.fromkeys(runs, (ZOOM,) * 3))

        scans = {where: load(f"0{where}") for where in "AB"}
        truths = {e: true_maps(scans["A"], ratio, d, f, e) for e in options.estimate}
        pairs = study([f"{i}{w}" for i in range(1, PEOPLE + 1) for w in "AB"])
        groups = study([f"{i}{'AB'[i % 2]}" for i in range(1, 2 * GROUP + 1)])

        def add(label, noise, dwi, factor=1.0, seed=seed, truths=truths):
            for estimator in options.estimate:
                b0 = int(dwi.acquisition.b0.sum())
                rows.extend({"method": label, "noise": noise, "b0": b0, "estimator": estimator,
                             "seed": seed, **row} for row in covered(
                                 dwi, truths[estimator], estimator, factor))

        for count in (7, 1):
            for where in "AB":
                add(f"site {where}", "measured", thinned(scans[where], count))
        for label in options.methods:
            print(text(rows), flush=True)
            name, _, output = label.partition("@")
            method = methods.get(name)
            wanted = {"stages.epochs": options.epochs, "output": output}
            texts = [f"{name}.{key}={value}" for key, value in wanted.items()
                     if value and method.paths(key)]
            method = methods.get(name, context=kinds.MethodContext(
                sloppy=True, settings=methods.read_settings(texts, [method], True, sloppy=True)))
            (model,) = method.fit(pairs if isinstance(method, PairedHarmonizer) else groups,
                                  kinds.TrainingSettings()).checkpoints.values()
            for count in (7, 1):
                dwi = thinned(scans["B"], count)
                made = method.harmonize(dwi, model, "B", "cpu")
                new = replace(dwi, signal=made.signal)
                add(label, "before", replace(new, noise_sd=measured.noise_sd(new)))
                new = replace(new, noise_gain=harmonizer.noise_gain(dwi, made))
                factor = 1.0 if made.no_intervals else harmonizer.widening(new, made.errors)
                add(label, "travels" + " (none)" * bool(made.no_intervals), new, factor)
                print(label, count, "gain by shell", [
                    round(new.gain(s.indices), 3) for s in new.acquisition.shells], "own error", [
                    round(e, 4) for e in made.errors], "factor", round(factor, 2), flush=True)
        print(text(rows), flush=True)
    table.show("coverage_harmonized", lines(rows), options.csv, first=(
        f"share of d / f within 90 % intervals, {len(options.seeds)} draws of a site"))


if __name__ == "__main__":
    main()
