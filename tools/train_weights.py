"""Train the bundled weights of a method: one network for all protocols.

    python tools/train_weights.py METHOD OUT [--densities FILE.npy] [--steps N] [--set KEY=VALUE …]
        [--people FOLDER]
        [--init FOLDER [--new-hints]] [--learning-rate RATE] [--state FILE] [--threads N]
        [--seed N]

METHOD is a folder of bidsapp/methods with a training.toml: an estimator, or denoise_spherical or
upsample_scnn, which take neither --densities nor --new-hints. pretrain_artifacts, estimate_tissue,
estimate_crossings and estimate_direction learn from a phantom that is simulated in memory
(`phantom_cohort`), and take --init, --steps, --set and --seed. --densities names one or more files
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
import pandas as pd
import torch

from bidsapp import checkpoint, methods
from bidsapp.dwi import Dwi
from bidsapp.kinds import Cohort, Denoiser, MethodContext, TrainingSettings, Upsampler
from bidsapp.methods.upsample_scnn import learn as upsampling
from bidsapp.microstructure import learn
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit
from bidsapp.simulate import anatomy, person, phantom, site
from bidsapp.volumetric.estimator import VolumeEstimator

PEOPLE, SCANNED, SITES, VOXEL, SEED = 6, 4, 2, 3.0, 51
SHELLS, DIRECTIONS = (700.0, 1000.0, 2000.0, 3000.0), 60
"""The phantom of the networks on volumes: its first SCANNED of PEOPLE are simulated. No test or
benchmark has its seed."""


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
    parser.add_argument("--people", type=Path, help="folder of the phantom; default: OUT/people")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    method = methods.get(options.method)
    if method.name == "pretrain_artifacts" or isinstance(method, VolumeEstimator):
        if options.densities or options.new_hints or options.learning_rate or options.state:
            parser.error(f"{method.name} takes none of --densities, --new-hints, --state and "
                         "--learning-rate: use --set schedule.learning_rate=…, and OUT of the "
                         "interrupted training to resume it")
        write(train_on_phantom(method.name, options), options.out)
        return
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


def train_on_phantom(name: str, options: argparse.Namespace) -> checkpoint.Checkpoint:
    """Train a network on volumes on the people of `phantom_cohort`."""
    settings = methods.read_settings([f"{name}.{text}" for text in options.set],
                                     [methods.get(name)], training=True)
    method = methods.trainable(name, MethodContext(settings=settings))
    cohort = phantom_cohort(options.people or options.out / "people")
    fitted = method.fit(cohort, TrainingSettings(
        max_steps=options.steps, seed=options.seed, device=options.device, init=options.init,
        states=options.out))
    (trained,) = fitted.checkpoints.values()
    return replace(trained, card=replace(trained.card, training={
        **trained.card.training, "data": f"simulated phantom, seed {SEED}: {SCANNED} people at "
        f"{SITES} sites, {VOXEL:g} mm"}))


def phantom_cohort(folder: Path) -> Cohort:
    """Simulate people at sites, each scan once, in a file of a folder.

    The folder may be shared by several trainings.

    Sites differ in noise, resolution, bias field, echo time and b-value, as in `qsphere-phantom`.
    The tissue is that of the phantom, as a perfect T1w image would show it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    design = PhantomOptions(Path("unused"), random_seed=SEED, voxel_size=VOXEL, sites=SITES,
                            participants=PEOPLE, shells=SHELLS, directions=DIRECTIONS)
    atlas, scanners = load_atlas(design.step), site.draw_sites(design)
    table = site.gradient_table(SHELLS, DIRECTIONS)
    rows = []
    for one in recruit(design)[:SCANNED]:
        who = None
        for scanner in scanners:
            run = f"{one.label}{scanner.name}"
            rows.append((one.label, scanner.name, run, scanner.snr))
            file = folder / f"{run}.npz"
            if file.exists():
                continue
            who = who or person.draw_person(design, atlas, one.label, one.age, one.sex, one.lesion,
                                            one.tissue)
            scan = phantom.simulate_scan(who, scanner, scanners[0], table, atlas, design,
                                         phantom.draw_pose(design, one.label, scanner.name))
            inside = scan.mask
            shares = np.stack([scan.tissue[anatomy.TISSUES.index(t)][inside]
                               for t in ("gm", "wm", "csf")], 1)
            np.savez(folder / f"{run}.part.npz", signal=scan.signal[:, inside].T, mask=inside,
                     affine=scan.grid.affine, tissue=shares.astype(np.float32))
            (folder / f"{run}.part.npz").replace(file)
            print(f"{run} simulated", flush=True)

    def read(run: str) -> Any:
        return np.load(folder / f"{run}.npz")

    def load(run: str) -> Dwi:
        data = read(run)
        return Dwi(np.ascontiguousarray(data["signal"], np.float32), data["mask"],
                   data["affine"], table)

    def tissue(run: str) -> np.ndarray:
        shares = read(run)["tissue"]
        return shares / np.maximum(shares.sum(1, keepdims=True), 1)

    statistics = pd.DataFrame(rows, columns=["participant", "batch", "run", "snr_b0"])
    runs = list(statistics["run"])
    return Cohort(statistics, acquisitions=dict.fromkeys(runs, table), load=load, tissue=tissue,
                  voxel_sizes=dict.fromkeys(runs, (VOXEL,) * 3))


if __name__ == "__main__":
    main()
