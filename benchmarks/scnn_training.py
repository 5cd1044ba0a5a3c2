"""Networks of the spherical family trained on the same samples, and what each then estimates.

    python benchmarks/scnn_training.py --network published|mlp|spherical [--steps 2000]
        [--batch 500] [--seed 0] [--threads 1] [--table FILE.npy] [--measured 0.5]
        [--test-table FILE.npy ...] [--test-voxels 20000] [--state FILE] [--init FOLDER|shipped]
        [--learning-rate RATE] [--grid 59] [--hint yes|no] [--out FOLDER]

The test of Kerkelä et al. 2024: b 1 and 2.2 ms/µm² with 60 directions each, SNR 50 (Rician), S0
known, d ~ U(0, 3), f ~ U(0, 1). Step k draws its batch from (seed, k) alone, so networks with equal
--seed and --batch see the same voxels. ODFs are drawn as in training and, in a share of --measured,
are rows of --table, (row, 45) coefficients of densities; every --test-table is tested on alone,
turned at random, and so are mixtures of three Watson bundles of κ 1–32, and single bundles of κ
12–128. Beside the network the spherical mean technique of this program on the same voxels. MSE of
estimates clamped to their range; of the ODF up to degree 8, over the sphere, and, as the paper's,
at one vertex.

`published` is the paper's architecture, loss and schedule: the mean over 3072 ODF values and two
scalars (the ODF's by Parseval's theorem, up to degree 16), Adam at 1e-3, ÷ 10 after 50 % and 75 %
of the steps. Its points are a half grid exact to degree --grid in place of 3072; weights start as
He et al. 2015 propose (doi:10.1109/ICCV.2015.123), which the paper does not say. `mlp` and
`spherical` are trained as `group --train` trains estimate_mlp2 and estimate_scnn2, but without the
weight of mean errors in bands, which upsets a short training from chance; --init starts
from the weights in a folder, or those that ship, and --steps 0 tests these as they are. --out keeps
weights and card. --hint gives or takes the hint, the posterior mean of d and f from a likelihood
(`bidsapp.simulate.likelihood`), which spherical has and the others have not; the hint alone,
without any network, stands beside each.
"""

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import table
import torch
from scnn import acquisition
from simulated import as_dwi
from torch import nn

from bidsapp import checkpoint, methods, selection, sh, training
from bidsapp.blocks import map_voxels
from bidsapp.domain import TrainingDomain
from bidsapp.microstructure import learn
from bidsapp.microstructure import maps as estimating
from bidsapp.networks.scnn import Estimate, Published
from bidsapp.simulate import protocols
from bidsapp.simulate.likelihood import Likelihood, compute_hint
from bidsapp.simulate.tissue import TWO_COMPARTMENTS, draw_bundles, draw_odfs

SNR = 50.0
POINTS = 3072
"""Number of points of the published grid, which weights the ODF in the published loss."""


class Reference(nn.Module):
    """The published network, called as ours are."""

    def __init__(self, grid: int, hinted: bool) -> None:
        super().__init__()
        self.network = Published(2, 2, grid=grid, l_odf=16, hinted=hinted)
        with torch.no_grad():
            for c in self.network.convolutions:
                c.weight *= math.sqrt(2 / c.weight.shape[1]) / c.scale

    def forward(self, x: torch.Tensor, noise: torch.Tensor, shells: torch.Tensor,
                hint: torch.Tensor) -> Estimate:
        return self.network(x, hint)


def published_loss(estimate: Estimate, parameters: torch.Tensor, odf: torch.Tensor
                   ) -> torch.Tensor:
    """Mean of the squared errors of 3072 ODF values and the scalars, all together."""
    truth = nn.functional.pad(odf, (0, estimate.odf.shape[1] - odf.shape[1]))
    odf_error = learn.density_error(estimate.odf, truth).mean()
    scalars = (estimate.mean - parameters).square().sum(1).mean()
    return (POINTS * odf_error + scalars) / (POINTS + parameters.shape[1])


def recipe_of(options: argparse.Namespace) -> learn.Recipe:
    name = {"mlp": "estimate_mlp2"}.get(options.network, "estimate_scnn2")
    known = methods.get(name).recipe("one")
    steps = max(1, options.steps)
    schedule = replace(known.schedule, steps=steps,
                       validate_every=min(known.schedule.validate_every, steps))
    if options.network == "published":
        schedule = training.Schedule(options.steps, 1e-3, decay="step", validate_every=100)
    if options.learning_rate:
        schedule = replace(schedule, learning_rate=options.learning_rate)
    network = dict(known.network)
    if options.hint:
        network["hinted"] = options.hint == "yes"
    return replace(
        known, schedule=schedule, batch=options.batch, groups=1, network=network, passes=1,
        unbiased=0.0, odfs={"measured": options.measured} if options.table else {},
        acquisition=acquisition(), s0_known=True,
        trained_for=TrainingDomain.from_acquisitions([acquisition()], snr=(SNR, SNR)))


def trained(options: argparse.Namespace, densities: torch.Tensor | None
            ) -> tuple[nn.Module, learn.Recipe, torch.Tensor, float]:
    """The network, its recipe, the power of densities of its hints, and samples per second."""
    recipe = recipe_of(options)
    if options.network == "published":
        with training.seeded(options.seed):
            network: nn.Module = Reference(options.grid, options.hint == "yes")
        simulate = learn.Simulator(recipe, densities)
        simulate.hinted = options.hint == "yes"
        start = time.perf_counter()
        history = training.train(
            network, simulate.draw_pool,
            lambda model, b: published_loss(model(*b.inputs), b.parameters, b.odf), recipe.schedule,
            seed=options.seed, device="cpu", saved=options.state, name="published")
        seconds = time.perf_counter() - start
        print(f"loss {history[0]['loss']:.3g} → {history[-1]['loss']:.3g}")
        return network, recipe, simulate.power, recipe.schedule.steps * recipe.batch / seconds
    method = "estimate_mlp2" if options.network == "mlp" else "estimate_scnn2"
    start_from = None
    if options.init:
        start_from = (selection.bundled_weights(method) if options.init == "shipped"
                      else checkpoint.load(Path(options.init), method))
    found = start_from if start_from and not options.steps else learn.train(
        method, recipe, seed=options.seed, device="cpu", saved=options.state, table=densities,
        start=start_from)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, content in checkpoint.pack(found).items():
            (options.out / name).write_bytes(content)
    print({k: round(v, 4) for k, v in found.card.metrics.items()})
    network = found.into(estimating.build(recipe.tissue, found.card.network, grid=estimating.GRID))
    power = estimating.read_density_power(found.card)
    return network, recipe, power, found.card.training["samples"] / max(
        found.card.training["seconds"], 1)


def compare(network: nn.Module, power: torch.Tensor, voxels: int,
            densities: torch.Tensor | None = None, seed: int = 99, **bundles: Any
            ) -> dict[str, Mapping[str, float]]:
    """MSE by estimator and quantity on held-out voxels: of densities alone, or `draw_bundles`."""
    generator = torch.Generator().manual_seed(seed)
    acq, tissue = acquisition(), TWO_COMPARTMENTS
    side = protocols.from_acquisition(acq, acq.shells, learn.L_SIMULATED,
                                      s0_known=True).to(torch.zeros(()))
    truth = tissue.draw(voxels, generator)
    l_max = learn.L_SIMULATED
    odfs = (draw_bundles(voxels, generator, l_max, **bundles) if densities is None else
            draw_odfs(voxels, generator, l_max, table=densities, measured=1.0))
    clean = side.signals(side.coefficients(odfs, tissue.compartments(truth)))

    def normal() -> torch.Tensor:
        return torch.randn(clean.shape, generator=generator) / SNR

    noisy = torch.hypot(clean + normal(), normal())
    vertex = torch.from_numpy(sh.basis(8, np.array([[0.0, 0, 1]])))[0].float()

    def of_block(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        x = side.fit_signals(signal.view(1, len(signal), *noisy.shape[2:]))
        noise = torch.tensor([1 / SNR, 0.0]).expand(len(signal), 2)
        likely = compute_hint(Likelihood(tissue, power, x, noise, side.shells))
        found = network(x, noise, side.shells, likely)
        return {"mean": estimating.clamp_parameters(tissue, found.mean), "odf": found.odf[:, :45],
                "hint": (likely[:, :2] + 1) / 2 * likely.new_tensor(tissue.ranges)[:, 1]}

    flat = noisy[0].flatten(1)
    with torch.inference_mode():
        found = {k: torch.from_numpy(v) for k, v in map_voxels(
            of_block, flat.numpy(), "cpu", estimating.BLOCK).items()}
    error = (found["mean"] - truth).square().mean(0)
    odf_error = found["odf"] - odfs[:, :45]
    rows: dict[str, Mapping[str, float]] = {"network": {
        "d": float(error[0]), "f": float(error[1]),
        "ODF": float(odf_error.square().sum(1).mean() / (4 * math.pi)),
        "ODF at a vertex": float((odf_error @ vertex).square().mean())}}
    hinted = (found["hint"] - truth).square().mean(0)
    rows["hint alone"] = {"d": float(hinted[0]), "f": float(hinted[1])}
    dwi = as_dwi(np.concatenate([np.ones((voxels, 1)), flat.numpy()], 1), acq, 1 / SNR,
                 s0_known=True)
    smt = methods.get("estimate_smt").apply(dwi, "cpu").maps
    for name, suffix in (("smt posterior mean", ""), ("smt least squares", "_mode")):
        rows[name] = {short: float(np.mean((smt[key + suffix] - truth[:, i].numpy()) ** 2))
                      for i, (short, key) in enumerate(zip("df", tissue.names, strict=True))}
    return rows


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True,
                        choices=("published", "mlp", "spherical"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--measured", type=float, default=0.5)
    parser.add_argument("--test-table", type=Path, nargs="*", default=[])
    parser.add_argument("--test-voxels", type=int, default=20_000)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--init")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--grid", type=int, default=59)
    parser.add_argument("--hint", choices=("yes", "no"))
    parser.add_argument("--out", type=Path)
    table.add_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Mapping[str, float]]]:
    options = options_of(argv)
    torch.set_num_threads(options.threads)

    def read(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.load(path).astype(np.float32))

    network, recipe, power, rate = trained(options, read(options.table) if options.table else None)
    print(f"{options.network}: {recipe.schedule.steps} steps of {recipe.batch}, {rate:.0f} "
          f"samples/s of training on {options.threads} threads, simulation and validation included")
    results = {"Watson mixtures": compare(network, power, options.test_voxels),
               "single bundles": compare(network, power, options.test_voxels, bundles=1,
                                         kappa=(12.0, 128.0))}
    for path in options.test_table:
        results[path.stem] = compare(network, power, options.test_voxels, read(path))
    print(f"{'':<40}{'MSE d':>10}{'MSE f':>10}{'ODF':>10}{'vertex':>10}")
    for kind, rows in results.items():
        for name, row in rows.items():
            shown = options.network if name == "network" else name
            print(f"{kind[:20] + ', ' + shown:<40}" + "".join(f"{v:>10.2e}" for v in row.values()))
    table.show("scnn_training", [[f"--network {options.network}", table.rate(rate)]], options.csv,
               first=f"the same samples, {table.threads(options.threads)}")
    table.show("scnn2_paper", [
        [options.network if name == "network" else name,
         *(", ".join(f"{1000 * v:.3g}" for v in rows[name].values()) for rows in results.values())]
        for name in next(iter(results.values()))],
        options.csv and options.csv.with_stem(f"{options.csv.stem}_paper"), others=list(results))
    return results


if __name__ == "__main__":
    main()
