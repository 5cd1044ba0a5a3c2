"""Do the intervals of a spherical network cover what they say? On held-out simulation.

    python benchmarks/coverage.py METHOD [--samples 200000] [--weights FOLDER]
        [--densities FILE.npy [--measured 0.5]] [--threads 2]

METHOD: estimate_scnn2, estimate_noddi or estimate_scnn3. Voxels are drawn as in training (random
protocols of the range that the card states, SNR log-uniform), with another seed; --densities (of
tools/densities.py, slices that were held out) serve for all of them, or for the share --measured,
as in training. Shares of truths within ± 1.645 SD, overall and in bands of SNR and of every true
parameter, beside the mean SD and the root mean square error of the band. Conditional on a truth, no
interval covers at its level everywhere: at the edges of the prior estimates are drawn inwards.
"""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from bidsapp import checkpoint, methods
from bidsapp.microstructure import learn, maps
from bidsapp.networks.scnn import SphericalNetwork

SNR = (10, 15, 22, 33, 50, 70, 100)
BANDS = 8
"""Of a parameter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--densities", type=Path)
    parser.add_argument("--measured", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method = methods.get(options.method, "estimate")
    trained = (checkpoint.load(options.weights, method.name) if options.weights
               else maps.shipped(method.name))
    recipe, tissue = method.recipe(), method.tissue
    table = None
    if options.densities:
        table = torch.from_numpy(np.load(options.densities))
        recipe = replace(recipe, odfs={**recipe.odfs, "measured": options.measured})
    simulate = learn.Simulator(recipe, table)
    simulate.power = maps.known_power(trained.card)
    network = trained.into(SphericalNetwork(
        len(tissue.names), **{**trained.card.network, "grid": maps.GRID})).eval()
    generator = torch.Generator().manual_seed(20_000)
    parts = [learn.predictions(network, [simulate(1024, 64, generator)])
             for _ in range(options.samples // 1024)]
    mean, sd, truth, density, noise = (torch.cat(p) for p in zip(*parts, strict=True))
    error = maps.clamped(tissue, mean) - truth
    sd = maps.calibrated(tissue, sd, trained.card.constants)
    inside = (error.abs() <= maps.QUANTILE * sd).float()
    print(f"{len(truth)} voxels; error of the density over the sphere {density.mean():.2e}")

    def tell(label: str, rows: torch.Tensor) -> None:
        print(f"{label:<34}{int(rows.sum()):>8}" + "".join(
            f"{inside[rows, i].mean():>9.3f}{sd[rows, i].mean():>8.3f}"
            f"{error[rows, i].square().mean().sqrt():>8.3f}" for i in range(len(tissue.names))))

    print(f"{'':<34}{'voxels':>8}" + "".join(f"{n[:15]:>17}{'':>8}" for n in tissue.names))
    print(f"{'':<42}" + f"{'covered':>9}{'SD':>8}{'error':>8}" * len(tissue.names))
    tell("all", torch.ones(len(truth), dtype=torch.bool))
    for low, high in pairwise(SNR):
        tell(f"SNR {low}–{high}", (1 / noise >= low) & (1 / noise < high))
    for i, (name, (low, high)) in enumerate(zip(tissue.names, tissue.ranges, strict=True)):
        edges = np.linspace(low, high, BANDS + 1)
        for a, b in pairwise(edges):
            tell(f"{name} {a:.3g}–{b:.3g}", (truth[:, i] >= a) & (truth[:, i] < b))


if __name__ == "__main__":
    main()
