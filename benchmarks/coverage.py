"""Do the intervals of a spherical network cover what they say? On held-out simulation.

    python benchmarks/coverage.py METHOD [--samples 200000] [--weights FOLDER]
        [--densities FILE.npy [--measured 0.5]] [--threads 2]
    python benchmarks/coverage.py METHOD --bands [--voxels 2000] [--grid 95] [--out FILE.csv] …

METHOD: estimate_scnn2, estimate_noddi or estimate_scnn3. Voxels are drawn as in training (random
protocols of the range that the card states, SNR log-uniform), with another seed; --densities (of
tools/densities.py, slices that were held out) serve for all of them, or for the share --measured,
as in training. Shares of truths within ± 1.645 SD, overall and in bands of SNR and of every true
parameter, beside the mean SD and the root mean square error of the band. Conditional on a truth, no
interval covers at its level everywhere: at the edges of the prior estimates are drawn inwards.

--bands: in every band of `bidsapp.simulate.bands` (number of Watson bundles, κ, SNR, acquisition;
an isotropic part beside a bundle, fans, no direction; parameters from the prior), as the
participant level estimates: coverage, mean error in units of the mean SD, mean square error, and,
of scnn2, that over the one of smt's posterior mean on the same
voxels. Wanted are coverage in 0.85–0.95, a mean error below 0.25 SD and a ratio up to 1.05; one row
for bundles, κ and SNR says the least and most over acquisitions; --out keeps every band.
"""

import argparse
import csv
from dataclasses import replace
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import table
import torch

from bidsapp import checkpoint, methods, selection
from bidsapp.microstructure import learn, maps
from bidsapp.simulate.bands import bands, other_bands

SNR = (10, 15, 22, 33, 50, 70, 100)
BANDS = 8
"""Number of bands of a parameter."""

COVERED, BIAS, RATIO = (0.85, 0.95), 0.25, 1.05
"""Limits asked of every band: coverage, mean error in SDs, square error over smt's."""


def in_bands(options: argparse.Namespace, method, trained: checkpoint.Checkpoint) -> None:
    """Print and keep the table of every band."""
    maps.GRID = options.grid
    smt = methods.get("estimate_smt") if method.name == "estimate_scnn2" else None
    rows = []
    for band in chain(bands(), other_bands()):
        dwi, truth = band.simulate(method.tissue, options.voxels, seed=99)
        found = maps.estimate(trained, method.tissue, dwi, "cpu")[0]
        peer = smt.apply(dwi, "cpu").maps if smt else {}
        for i, name in enumerate(method.tissue.names):
            error, sd = found[name] - truth[:, i], found[f"{name}_std"]
            row = {"acquisition": band.acquisition, "band": band.label, "snr": band.snr,
                   "parameter": name, "covered": np.mean(abs(error) <= maps.QUANTILE * sd),
                   "bias": error.mean(), "bias_in_sd": error.mean() / sd.mean(),
                   "mse": np.mean(error**2)}
            if peer:
                row["mse_over_smt"] = row["mse"] / np.mean((peer[name] - truth[:, i]) ** 2)
            rows.append(row)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    shown = {}
    for name in method.tissue.names:
        own = [r for r in rows if r["parameter"] == name]
        print(f"\n{name}\n| bundles, κ, SNR | covered | mean error, SD | MSE | MSE / smt |\n"
              "|---|---|---|---|---|")
        for key, same in groupby(own, lambda r: (r["band"], r["snr"])):
            cells = list(same)
            print(f"| {key[0]}, {key[1]:.0f} | " + " | ".join(
                f"{min(c[k] for c in cells):{f}} to {max(c[k] for c in cells):{f}}"
                if k in cells[0] else "" for k, f in (
                    ("covered", ".3f"), ("bias_in_sd", "+.2f"), ("mse", ".2e"),
                    ("mse_over_smt", ".2f"))) + " |")
            line = shown.setdefault(key, [f"{key[0]}, {key[1]:.0f}"])
            for k, form, between in (("covered", ".2f", "–"), ("bias_in_sd", "+.2f", " to "),
                                     ("mse_over_smt", ".2f", "–")):
                line.append(table.interval([c[k] for c in cells], form, between)
                            if k in cells[0] else "")
        missed = [not COVERED[0] <= r["covered"] <= COVERED[1] for r in own]
        biased = [abs(r["bias_in_sd"]) > BIAS for r in own]
        worse = [r.get("mse_over_smt", 0) > RATIO for r in own]
        print(f"{name}: of {len(own)} bands {sum(missed)} outside of {COVERED}, {sum(biased)} with "
              f"a mean error above {BIAS} SD, {sum(worse)} above {RATIO} times smt's error")
    table.show("scnn2_bands", list(shown.values()), options.csv, others=[
        f"{short}: {what}" for short in letters(method.tissue.names)
        for what in ("covered", "mean error in SD", "MSE / smt")])


def letters(names):
    """d and f of diffusivity and neuritefraction; else the names as they are."""
    return ["d", "f"] if list(names) == ["diffusivity", "neuritefraction"] else list(names)


def in_training(options: argparse.Namespace, method, trained: checkpoint.Checkpoint) -> None:
    """Print the table of voxels drawn as in training."""
    recipe, tissue, densities = method.recipe(), method.tissue, None
    if options.densities:
        densities = torch.from_numpy(np.load(options.densities))
        recipe = replace(recipe, odfs={**recipe.odfs, "measured": options.measured})
    simulate = learn.Simulator(recipe, densities, maps.read_density_power(trained.card))
    network = trained.into(maps.build(tissue, trained.card.network, grid=options.grid))
    generator = torch.Generator().manual_seed(20_000)
    batches = [simulate(1024, 64, generator) for _ in range(options.samples // 1024)]
    found, truth, density, noise = learn.predict(network, batches)
    error = maps.clamp_parameters(tissue, found.mean) - truth
    sd = maps.calibrate_sd(tissue, found, noise, trained.card.constants)
    inside, snr = (error.abs() <= maps.QUANTILE * sd).float(), 1 / noise[:, 0]
    shares: dict[str, torch.Tensor] = {}
    print(f"{len(truth)} voxels; error of the density over the sphere {density.mean():.2e}")

    def tell(label: str, rows: torch.Tensor) -> None:
        shares[label] = inside[rows].mean(0)
        print(f"{label:<34}{int(rows.sum()):>8}" + "".join(
            f"{inside[rows, i].mean():>9.3f}{sd[rows, i].mean():>8.3f}"
            f"{error[rows, i].square().mean().sqrt():>8.3f}" for i in range(len(tissue.names))))

    print(f"{'':<34}{'voxels':>8}" + "".join(f"{n[:15]:>17}{'':>8}" for n in tissue.names))
    print(f"{'':<42}" + f"{'covered':>9}{'SD':>8}{'error':>8}" * len(tissue.names))
    tell("all", torch.ones(len(truth), dtype=torch.bool))
    for low, high in pairwise(SNR):
        tell(f"SNR {low}–{high}", (snr >= low) & (snr < high))
    for i, (name, (low, high)) in enumerate(zip(tissue.names, tissue.ranges, strict=True)):
        edges = np.linspace(low, high, BANDS + 1)
        for a, b in pairwise(edges):
            tell(f"{name} {a:.3g}–{b:.3g}", (truth[:, i] >= a) & (truth[:, i] < b))
    short = letters(tissue.names)
    lines = [[f"held out, as in training, {table.count(len(truth))} voxels",
              *(f"{v:.3f}" for v in shares["all"].tolist())]]
    for start, label in (("SNR", f"lowest and highest of {len(SNR) - 1} bands of SNR"), *(
            (name, f"of {BANDS} bands of true {s}")
            for name, s in zip(tissue.names, short, strict=True))):
        own = torch.stack([v for k, v in shares.items() if k.startswith(f"{start} ")])
        lines.append([label, *(table.interval(v.tolist(), ".3f") for v in own.T)])
    table.show("scnn2_coverage", lines, options.csv, others=short, first=(
        f"share of truths within the 90 % interval of {method.short}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--densities", type=Path)
    parser.add_argument("--measured", type=float, default=1.0)
    parser.add_argument("--bands", action="store_true")
    parser.add_argument("--voxels", type=int, default=2000)
    parser.add_argument("--grid", type=int, default=maps.GRID)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method = methods.get(options.method, "estimate")
    trained = (checkpoint.load(options.weights, method.name) if options.weights
               else selection.bundled_weights(method.name))
    (in_bands if options.bands else in_training)(options, method, trained)


if __name__ == "__main__":
    main()
