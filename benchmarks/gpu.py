"""How much faster a GPU is than the CPU of the same machine.

    python benchmarks/gpu.py [--device cuda] [--voxels 100000] [--threads N] [--csv FILE]

Rows: the maps of a brain by scnn2 (the weights that ship; 100 000 voxels, two shells of 60
directions); a tensor fit of the same brain; and a step of the trainings of scnn2 for all protocols
(a minibatch of its recipe, simulation included) and of SHResNet (a minibatch of its recipe). Each
is done once before it is timed, then for two seconds at least; a GPU is waited for. The CPU has
a tenth of the voxels, whose time is told for all. With the tests of `make gpu` it takes less than
eight minutes on one card.
"""

import argparse
import time

import numpy as np
import table
import torch

from bidsapp import methods, tensor, training
from bidsapp.acquisition import Acquisition
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.microstructure import learn
from bidsapp.networks.builder import build_network
from bidsapp.networks.shresnet import CENTRE, PATCH
from bidsapp.simulate import protocols

AT_LEAST = 2.0
"""Seconds of each measurement."""

SHARE = 10
"""The CPU has one in so many voxels."""


def brain(voxels):
    """Random tensors with Rician noise; two shells of 60 directions."""
    g = protocols.spread(60)
    acquisition = Acquisition(np.r_[0, 0, np.repeat([1000, 2200], 60)],
                              np.concatenate([np.zeros((2, 3)), g, g]))
    rng = np.random.default_rng(0)
    d = rng.normal(size=(voxels, 3, 3)) * 0.02
    d = d @ d.transpose(0, 2, 1) + 3e-4 * np.eye(3)
    signal = 300 * np.exp(-np.einsum("nij,vij->vn", acquisition.btensors, d))
    noise = rng.normal(0, 8, (2, *signal.shape))
    signal = np.hypot(signal + noise[0], noise[1]).astype(np.float32)
    return Dwi(signal, np.ones((voxels, 1, 1), bool), np.eye(4), acquisition, 8.0)


def seconds(function, device):
    """Time a call: the mean over as many calls as take AT_LEAST seconds, without the first."""
    def wait():
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    function()
    wait()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < AT_LEAST:
        function()
        wait()
        calls += 1
    return (time.perf_counter() - start) / calls


def training_step(network, loss, schedule, device):
    """A call that draws a minibatch and takes a step by it."""
    network = network.to(device).train()
    optimizer = training.OPTIMIZERS[schedule["optimizer"]](network.parameters(),
                                                           lr=schedule["learning_rate"])
    generator = torch.Generator(device).manual_seed(1)

    def step():
        optimizer.zero_grad()
        loss(network, generator).backward()
        optimizer.step()

    return step


def scnn2_step(device):
    method = methods.get("estimate_scnn2")
    recipe = method.recipe()
    simulate = learn.Simulator(recipe)

    def loss(network, generator):
        batch = simulate(recipe.batch, recipe.groups, generator)
        return learn.compute_loss(recipe, network(*batch[:4]), batch[4], batch[5], batch[1])

    return training_step(learn.build(recipe.tissue, recipe.network), loss, vars(recipe.schedule),
                         device)


def shresnet_step(device):
    recipe = methods.get("harmonize_shresnet").settings("training")
    network, stage = build_network(recipe["network"]), recipe["stages"][0]
    coefficients = network.final.weight.shape[0]

    def loss(network, generator):
        x = torch.randn(stage["batch"], PATCH, coefficients, generator=generator, device=device)
        return (network(x) - 0.9 * x[:, CENTRE]).square().mean()

    return training_step(network, loss, {"optimizer": "adam", **stage}, device)


def measured(device, voxels):
    """(what, seconds) of one device."""
    own = voxels // SHARE if device == "cpu" else voxels
    dwi, method = brain(own), methods.get("estimate_scnn2")
    x = tensor.design(dwi.acquisition.btensors)
    whole = voxels / own
    maps = whole * seconds(lambda: method.apply(dwi, device), device)
    fit = whole * seconds(lambda: map_voxels(
        lambda signal: tensor.fit(signal, x), dwi.signal, device), device)
    with training.seeded(1):
        return {f"maps of scnn2, {table.count(voxels)} voxels": maps,
                f"tensor fit, {table.count(voxels)} voxels": fit,
                "training step of scnn2": seconds(scnn2_step(device), device),
                "training step of harmonize_shresnet": seconds(shresnet_step(device), device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--voxels", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = (torch.cuda.get_device_name(options.device) if options.device.startswith("cuda")
            else options.device)
    times = [measured(device, options.voxels) for device in ("cpu", options.device)]
    table.print_and_write(
        ["seconds", f"CPU, {table.threads(options.threads)}", name, "CPU / GPU"],
        [[what, f"{times[0][what]:.3g}", f"{times[1][what]:.3g}",
          f"{times[0][what] / times[1][what]:.3g}"] for what in times[0]], options.csv)


if __name__ == "__main__":
    main()
