"""Train the bundled weights of a method: one network for all protocols.

    python tools/train_weights.py METHOD OUT [--densities FILE.npy] [--steps N]
        [--init FOLDER [--new-hints]] [--learning-rate RATE] [--state FILE] [--threads N]
        [--seed N]

METHOD is a folder of bidsapp/methods with a training.toml: an estimator, or denoise_spherical or
upsample_scnn, which take neither --densities nor --new-hints. --densities names one or more files
of tools/densities.py; a share of the simulated voxels use densities from them
(`simulate.tissue.draw_odfs`). --init names a folder of initial weights. With --new-hints the hints
are computed for the densities drawn now, not for those of the initial weights. An interrupted
training is resumed from --state (default OUT/state.ckpt). OUT receives model.safetensors and
model.json.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bidsapp import checkpoint, methods
from bidsapp.kinds import Denoiser, Upsampler
from bidsapp.methods.upsample_scnn import learn as upsampling
from bidsapp.microstructure import learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("out", type=Path)
    parser.add_argument("--densities", type=Path, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--new-hints", action="store_true")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    method = methods.get(options.method)
    saved = options.state or options.out / "state.ckpt"
    start = (checkpoint.load(options.init, method.name)
             if options.init and isinstance(method, Denoiser | Upsampler) else None)
    if isinstance(method, Upsampler) and not hasattr(method, "recipe"):
        parser.error(f"{method.name} learns from scans: use `qsphere … group --train`")
    if isinstance(method, Denoiser | Upsampler) and (options.densities or options.new_hints):
        parser.error(f"{method.name} takes neither --densities nor --new-hints")
    if isinstance(method, Denoiser):
        trained = method.train_bundled(
            steps=options.steps, learning_rate=options.learning_rate, seed=options.seed,
            device=options.device, start=start, saved=saved)
        write(trained, options.out)
        return
    recipe = method.recipe()
    schedule = recipe.schedule
    recipe = replace(recipe, schedule=replace(
        schedule, steps=options.steps or schedule.steps,
        learning_rate=options.learning_rate or schedule.learning_rate))
    if isinstance(method, Upsampler):
        trained = upsampling.train(
            method.name, recipe, seed=options.seed, device=options.device, saved=saved,
            intended_use=method.intended_use, start=start)
    else:
        trained = train_estimator(method, recipe, options, saved)
    write(trained, options.out)


def write(trained: checkpoint.Checkpoint, folder: Path) -> None:
    """Write weights and card, and print the card's metrics."""
    for name, content in checkpoint.pack(trained).items():
        (folder / name).write_bytes(content)
    print(trained.card.metrics)


def train_estimator(method: Any, recipe: learn.Recipe, options: argparse.Namespace, saved: Path
                    ) -> checkpoint.Checkpoint:
    """Train the network of an estimator."""
    table = torch.from_numpy(np.concatenate([np.load(path) for path in options.densities])
                             ) if options.densities else None
    return learn.train(
        method.name, recipe, seed=options.seed, device=options.device, table=table,
        start=learn.initial_weights(method.name, recipe, options.init) if options.init else None,
        saved=saved, intended_use=method.intended_use, new_hints=options.new_hints)


if __name__ == "__main__":
    main()
