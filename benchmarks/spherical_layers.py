"""Layers on the sphere in a denoising autoencoder: work package 5 of Sadegheih et al. 2023.

    python benchmarks/spherical_layers.py [--weights FOLDER] [--csv FILE]
    python benchmarks/spherical_layers.py --tune       # learning rates, on a seed of their own
    python benchmarks/spherical_layers.py --fa         # FA of other tissue and of real runs

Every layer and nonlinearity, with the same widths, steps, minibatches and simulated voxels, two
seeds each (one for ten times as many steps), beside MP-PCA and Patch2Self (dipy), the default
denoiser, and the bundled weights. All are applied to people of the phantom that no training saw, in
white matter, with Rician noise; the image denoisers remove its floor, too, Patch2Self with the
noise of the residuals of SH fits. SNR is that of white matter at b 0. Truth of the signal and of
the tensor is noise-free; fODF (CSD of dipy, b 2500) and scnn2 are compared with their estimates
from the noise-free signal. Voxels/s are those of one thread. --weights keeps the networks, so that
a second run does not train them again. --only shows the rows that begin so.
"""

import argparse
import itertools
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import rough_tissue
import table
import torch
import upsampling
from denoise import Scene, simulate
from dipy.core.gradients import gradient_table
from dipy.data import get_sphere
from dipy.reconst.csdeconv import ConstrainedSphericalDeconvModel, response_from_mask_ssst
from simulated import spiral_shells

from bidsapp import checkpoint, kinds, methods, sh, tensor, training
from bidsapp.acquisition import describe_shells
from bidsapp.domain import TrainingDomain
from bidsapp.dwi import Dwi, noise_sd
from bidsapp.methods.denoise_spherical import learn
from bidsapp.methods.denoise_spherical.method import apply_network
from bidsapp.networks import autoencoder
from bidsapp.preprocess.denoise import denoise, remove_floor
from bidsapp.simulate import noise, odf

SCHEME = ((0, 8), (1000, 30), (2500, 60))
ACQUISITION = spiral_shells(SCHEME)
CSD_SHELL = 1
SNR = (10, 20, 30)
TRAINED_SNR = (8.0, 40.0)
STEPS, LONG, BATCH, GRID = 800, 8000, 256, 17
SEED_OF_CHOICES = 0
TRAINING_SEEDS = (1, 2)
PEOPLE, COHORT = (2, 3), (4, 5)
WIDTHS, WIDE = (32, 16, 32), (256, 128, 256)
SCNN_VOXELS, CSD_VOXELS, WM_VOXELS = 400, 300, 1200
TRIED = {"zonal": (1e-2, 3e-2), "local": (3e-3, 1e-2), "signal": (3e-3, 1e-2),
         "connected": (1e-3, 3e-3, 1e-2)}
RATES = {"zonal": 3e-2, "local": 3e-3, "signal": 3e-3, "connected": 3e-3}
"""Learning rates: the best of TRIED with ReLU (`tune`), on a seed of its own."""


class Network(NamedTuple):
    """A network to train for the table of this benchmark."""

    layer: str
    nonlinearity: str = "relu"
    space: str = "signal"
    widths: tuple[int, ...] = WIDTHS
    shortcut: bool = False
    rate: float | None = None
    steps: int = STEPS

    @property
    def name(self):
        return " ".join([self.layer, self.nonlinearity, self.space, *map(str, self.widths)]
                        + ["shortcut"] * self.shortcut
                        + [f"{self.steps} steps"] * (self.steps != STEPS))

    @property
    def description(self):
        return {"architecture": "autoencoder", "layer": self.layer, "space": self.space,
                "nonlinearity": self.nonlinearity, "widths": list(self.widths), "grid": GRID,
                "shortcut": self.shortcut, "shells": len(ACQUISITION.shells),
                "directions": max(map(len, ACQUISITION.shells))}


NETWORKS = [
    *(Network(*which) for which in itertools.product(
        autoencoder.LAYERS, autoencoder.NONLINEARITIES, autoencoder.SPACES)
      if which[2] == "signal" or not autoencoder.needs_table(which[0])),
    Network("connected", widths=WIDE, rate=1e-3),
    Network("connected", widths=WIDE, rate=1e-3, steps=LONG), Network("zonal", steps=LONG),
    Network("zonal", shortcut=True)]


def train(network, seed, folder=None):
    """Train a network on simulated voxels, or load it from a folder."""
    place = folder / f"{network.name} {seed}".replace(" ", "_") if folder else None
    if place and place.exists():
        return checkpoint.load(place)
    domain = TrainingDomain.from_acquisitions([ACQUISITION], snr=TRAINED_SNR)
    simulator = learn.Simulator(domain, ACQUISITION, batch=BATCH)
    held_out = [simulator(4096, 1, torch.Generator().manual_seed(1000 + seed))]
    schedule = training.Schedule(network.steps, network.rate or RATES[network.layer],
                                 decay="cosine", validate_every=network.steps)
    trained = learn.train("denoise_spherical", network.description, simulator.draw, held_out,
                          schedule, domain, seed=seed, device="cpu", exponent=0.0,
                          intended_use="benchmark", constants={
                              "directions": ACQUISITION.bvecs.tolist()}
                          if autoencoder.needs_table(network.layer) else {},
                          data={"data": "simulated voxels", "floor": "removed"})
    if place:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in checkpoint.pack(trained).items():
            (place / name).write_bytes(content)
    return trained


def rotation_sd(function, voxels=256, rotations=8):
    """SD over rotations of the object, in S/S0: root mean square over the sphere, of the second
    shell. function: noise-free S/S0 (voxel, measurement) → the same."""
    generator = torch.Generator().manual_seed(7)
    odfs, parts = learn.simulate_tissue(voxels, generator)
    stack = learn.select_stack(ACQUISITION, ACQUISITION.shells).to(odfs)
    shell = ACQUISITION.shells[CSD_SHELL]
    fit = torch.linalg.pinv(torch.from_numpy(sh.basis(8, ACQUISITION.bvecs[shell.indices])))
    outputs = []
    for turn in odf.random_rotations(rotations, generator):
        clean = stack.signals(stack.coefficients(sh.rotate(odfs, turn), parts))[0]
        signal = torch.ones(voxels, len(ACQUISITION))
        for i, s in enumerate(ACQUISITION.shells):
            signal[:, s.indices] = clean[:, i, :len(s)]
        out = torch.as_tensor(function(signal.numpy())[:, shell.indices]).double() @ fit.T
        outputs.append(sh.rotate(out, turn.T))
    deviation = torch.stack(outputs) - torch.stack(outputs).mean(0)
    return float((deviation.square().sum(-1).mean() / (4 * np.pi)).sqrt())


def as_dwi(signal, sd):
    return Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4),
               ACQUISITION, sd)


def smooth(signal):
    """The SH fit that networks on the sphere start from, alone; signal: (voxel, measurement)."""
    out = signal.copy()
    for shell in ACQUISITION.shells:
        axes = ACQUISITION.bvecs[shell.indices]
        l_max = sh.degree_for(len(shell), learn.L_FIT)
        out[:, shell.indices] = (signal[:, shell.indices]
                                 @ sh.smooth_fit(l_max, axes, autoencoder.SMOOTHING).T
                                 @ sh.basis(l_max, axes).T)
    return out


class Reference(NamedTuple):
    """Noise-free signal of white matter (voxel, measurement), and what is estimated from it."""

    scene: Scene
    rows: np.ndarray
    clean: np.ndarray
    tensor: dict[str, np.ndarray]
    csd: ConstrainedSphericalDeconvModel
    fodf: np.ndarray
    scnn: dict[str, np.ndarray]


def fit_tensor(signal):
    chosen = tensor.volumes(ACQUISITION)
    maps = tensor.fit(torch.as_tensor(signal[:, chosen], dtype=torch.float64),
                      tensor.design(ACQUISITION[chosen].btensors))
    return {k: maps[k].numpy() for k in ("fa", "md", "direction")}


def csd_volumes():
    return np.sort(np.r_[np.flatnonzero(ACQUISITION.b0), ACQUISITION.shells[CSD_SHELL].indices])


def fit_csd(model, signal):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(signal[:CSD_VOXELS, csd_volumes()].astype(np.float64)).shm_coeff


def fit_scnn(signal, sd):
    maps = methods.get("estimate_scnn2").apply(as_dwi(signal[:SCNN_VOXELS], sd), "cpu").maps
    return {k: maps[k] for k in ("diffusivity", "neuritefraction")}


def refer(seed, size):
    scene = simulate(seed, SCHEME, 2.5, size)
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(scene.wm)
    rows = rng.permutation(rows)[:WM_VOXELS]
    clean = scene.clean[scene.mask][rows]
    maps = fit_tensor(clean)
    volumes = csd_volumes()
    gradients = gradient_table(ACQUISITION.bvals[volumes], bvecs=ACQUISITION.bvecs[volumes])
    single = maps["fa"] >= np.quantile(maps["fa"], 0.97)
    response, _ = response_from_mask_ssst(gradients, clean[:, None, None, volumes],
                                          single[:, None, None])
    csd = ConstrainedSphericalDeconvModel(gradients, response, sh_order_max=8)
    return Reference(scene, rows, clean, maps, csd, fit_csd(csd, clean), fit_scnn(clean, 1e-2))


SPHERE = get_sphere(name="repulsion724")


def measure(reference, signal):
    """Measures of denoised white matter (voxel, measurement) by name."""
    weighted = ~ACQUISITION.b0
    clean, maps = reference.clean, fit_tensor(signal)
    sd = noise_sd(as_dwi(signal, None))
    scnn = fit_scnn(signal, sd)
    fodf = fit_csd(reference.csd, signal)
    difference = np.linalg.norm(fodf - reference.fodf, axis=1)
    basis = reference_basis(fodf.shape[1])
    peaks = [SPHERE.vertices[(c @ basis.T).argmax(1)] for c in (fodf, reference.fodf)]

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x))))

    def angle(a, b):
        return np.degrees(np.arccos(np.abs((a * b).sum(1)).clip(0, 1)))

    return {
        "mse": float(np.square(signal - clean)[:, weighted].mean()),
        "fa": rms(maps["fa"] - reference.tensor["fa"]),
        "md": 1e3 * rms(maps["md"] - reference.tensor["md"]),
        "v1": float(np.median(angle(maps["direction"], reference.tensor["direction"]))),
        "fodf": float(np.sqrt(np.mean(difference**2)
                              / np.mean(np.square(reference.fodf).sum(1)))),
        "peak": float(np.mean(angle(*peaks))),
        **{k: rms(scnn[k] - reference.scnn[k]) for k in scnn}}


def reference_basis(coefficients):
    """Basis of dipy's fODF at the vertices of SPHERE."""
    from dipy.reconst.shm import real_sh_descoteaux

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return real_sh_descoteaux(sh.l_max_of(coefficients), SPHERE.theta, SPHERE.phi)[0]


def train_on_cohort(size):
    """The bundled architecture, trained on noisy scans at SNR 20 of other people."""
    runs = {}
    for seed in COHORT:
        scene = simulate(seed, SCHEME, 2.5, size)
        runs[f"sub-{seed}"] = noisy_image(scene, 20, seed)
    statistics = pd.DataFrame({"run": list(runs), "participant": list(runs), "snr_b0": 20.0})
    cohort = kinds.Cohort(statistics, acquisitions=dict.fromkeys(runs, ACQUISITION),
                          load=runs.__getitem__)
    settings = {"training.batch": BATCH, "training.held_out": 4096,
                "training.network.grid": GRID, "training.schedule.validate_every": STEPS}
    method = methods.get("denoise_spherical", context=kinds.MethodContext(
        settings={"denoise_spherical": settings}))
    (trained,) = method.fit(cohort, kinds.TrainingSettings(max_steps=STEPS)).checkpoints.values()
    return trained


def noisy_image(scene, snr, seed):
    generator = torch.Generator().manual_seed(100 * seed + snr)
    noisy = noise.rician(torch.as_tensor(scene.clean), 1 / snr, generator).numpy()
    dwi = Dwi(noisy[scene.mask], scene.mask, np.eye(4), ACQUISITION)
    return replace(dwi, noise_sd=noise_sd(dwi))


def processors(folder, size, only=("",)):
    """(name, training seed, function, parameters) of the denoisers whose name begins so; function:
    (image, rows) → (voxel, measurement) of the rows of the mask."""
    only = tuple(only)

    def network(trained):
        shells = ACQUISITION.shells

        def apply(dwi, rows):
            return apply_network(trained, as_dwi(dwi.signal[rows], dwi.noise_sd), shells, "cpu")[0]

        return apply, sum(v.numel() for v in trained.tensors.values()), trained

    def image(name):
        def apply(dwi, rows):
            out = denoise(dwi.unmask(dwi.signal), dwi.mask, method=name, rician=True,
                          bvals=ACQUISITION.bvals)
            signal = out.signal[dwi.mask][rows]
            if out.sigma is None:  # the method estimates no noise, and leaves the floor
                sd = torch.full((len(rows),), dwi.noise_sd)
                signal = remove_floor(torch.from_numpy(signal), sd)["signal"].numpy()
            return signal

        return apply, None, None

    if "as measured".startswith(only):
        yield "as measured", 0, lambda dwi, rows: dwi.signal[rows], None, None
    if (label := "SH fit, λ 0.006").startswith(only):
        yield label, 0, lambda dwi, rows: smooth(dwi.signal[rows]), None, None
    for which in NETWORKS:
        for seed in TRAINING_SEEDS if which.steps == STEPS else TRAINING_SEEDS[:1]:
            if which.name.startswith(only):
                yield which.name, seed, *network(train(which, seed, folder=folder))
    if (label := "zonal relu signal 32 16 32 shortcut, cohort").startswith(only):
        yield label, 0, *network(train_on_cohort(size))
    if (label := "bundled weights, any table").startswith(only):
        yield label, 0, *network(checkpoint.load(
            Path(methods.__file__).parent.parent / "weights/denoise_spherical"))
    for label, name in (("default denoiser (pca)", "pca"), ("dipy MP-PCA", "mppca"),
                        ("dipy Patch2Self", "patch2self")):
        if label.startswith(only):
            yield label, 0, *image(name)


def noise_free_output(trained):
    """Function of noise-free S/S0, at the noise level of SNR 20."""
    def function(signal):
        return apply_network(trained, as_dwi(signal, 0.05), ACQUISITION.shells, "cpu")[0]

    return function


def compare(options):
    references = {seed: refer(seed, options.size) for seed in PEOPLE}
    images = {(seed, snr): noisy_image(references[seed].scene, snr, seed)
              for seed in PEOPLE for snr in SNR}
    results = {}
    for name, seed, function, parameters, trained in processors(options.weights, options.size,
                                                               options.only):
        voxels = seconds = 0
        found = {}
        for (person, snr), dwi in images.items():
            rows = references[person].rows
            start = time.process_time()
            signal = function(dwi, rows)
            seconds += time.process_time() - start
            voxels += len(rows) if parameters or trained else len(dwi.signal)
            found.setdefault(snr, []).append(measure(references[person], signal))
        turned = smooth if name.startswith("SH fit") else trained and noise_free_output(trained)
        results.setdefault(name, []).append((found, voxels / seconds if seconds else 0, parameters,
                                             rotation_sd(turned) if turned else None))
        print(name, seed, *(f"{np.mean([m['mse'] for m in found[s]]):.2e}" for s in SNR),
              flush=True)
    rows = [row(name, runs) for name, runs in results.items()]
    table.show("spherical_layers", rows, options.csv)


def row(name, runs):
    """A row of the table: means over people and training seeds."""
    def cells(key, form, scale=1.0):
        return ", ".join(f"{scale * np.mean([m[key] for r in runs for m in r[0][snr]]):{form}}"
                         for snr in SNR)

    def pair(keys, form):
        return "; ".join(cells(k, form) for k in keys)

    rates = [r[1] for r in runs]
    per_seed = [1e3 * np.mean([m["mse"] for m in r[0][20]]) for r in runs]
    sds = [r[3] for r in runs if r[3] is not None]
    return [name, f"{runs[0][2]}" if runs[0][2] else "",
            table.milli(float(np.mean(sds))) if sds else "",
            "" if name in ("as measured", "SH fit, λ 0.006") else table.rate(np.median(rates)),
            cells("mse", ".2f", 1e3), table.interval(per_seed) if len(runs) > 1 else "",
            cells("fa", ".3f"), cells("md", ".3f"), cells("v1", ".1f"), cells("fodf", ".2f"),
            cells("peak", ".1f"), pair(("diffusivity", "neuritefraction"), ".3f")]


def compare_fa(options):
    """The bundled weights on tissue unlike that of their training, and on real runs."""
    rows = []
    for scheme in (((1000, 12),), ((1000, 30),), ((2500, 60),), ((1000, 30), (2500, 60))):
        acquisition = spiral_shells(((0, 8), *scheme))
        for snr in (20, 60):
            scans = []
            for seed in PEOPLE:
                tissue = rough_tissue.draw(seed)
                clean = rough_tissue.signal(tissue, acquisition)
                mask = np.ones(tissue.label.shape, bool)
                signal = 1000 * rough_tissue.measure(clean, 1 / snr, seed)[mask]
                scans.append((Dwi(signal.astype(np.float32), mask, np.eye(4), acquisition),
                              1000 * clean[mask], tissue.label[mask] == 0))
            name = " and ".join(f"{n} × b {b}" for b, n in scheme)
            rows.append(fa_row(f"rough tissue, {name}, SNR {snr}", scans))
    for name, wanted in (("mdt_multishell", "acq-b1kb2k"), ("uih_dti16", ""),
                         ("canon_retest", ""), ("siemens_xa30", "dir-AP")):
        if run := upsampling.load_real(options.data, name, wanted):
            rows.append(fa_row(f"{name}, {describe_shells(run[1].acquisition.shells)}",
                               [(run[1], None, np.ones(len(run[1].signal), bool))]))
    table.show("spherical_fa", rows, options.csv)


def fa_row(label, scans):
    """A row: errors in white matter if there is truth, else differences from the measured signal.
    scans: (Dwi, noise-free signal or None, voxels)."""
    square, errors, references = [], [], []
    for dwi, clean, voxels in scans:
        dwi = replace(dwi, noise_sd=noise_sd(dwi))
        signals = dwi.signal, methods.get("denoise_spherical").denoise(dwi, "cpu").signal
        maps = [upsampling.tensor_of(s, dwi.acquisition)[0][voxels] for s in signals]
        reference = maps[0]
        if clean is not None:
            reference = upsampling.tensor_of(clean, dwi.acquisition)[0][voxels]
            square.append([np.mean(np.square((s - clean) / clean[:, :1])[voxels][
                :, ~dwi.acquisition.b0]) for s in signals])
        references.append(reference)
        errors.append([m - reference for m in maps])
    reference, errors = np.concatenate(references), np.concatenate(errors, 1)
    print(f"{label}: done", flush=True)

    def biases(values):
        return ", ".join(f"{values[(reference >= low) & (reference < high)].mean():+.3f}"
                         for low, high in ((0.15, 0.3), (0.3, 0.5), (0.5, 2)))

    rmse = np.sqrt(np.mean(errors**2, 1))
    before = square and " → ".join(f"{1e3 * v:.2f}" for v in np.mean(square, 0))
    return [label, before or "", f"{rmse[0]:.3f} → {rmse[1]:.3f}" if square else "",
            biases(errors[0]) if square else "", biases(errors[1])]


def tune(_):
    for network in (*map(Network, autoencoder.LAYERS), Network("connected", widths=WIDE)):
        for rate in TRIED[network.layer]:
            trained = train(network._replace(rate=rate), SEED_OF_CHOICES)
            print(network.name, rate, table.milli(trained.card.metrics["mse_output"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--fa", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get(
        "QSPHERE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared/data")))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--size", type=int, nargs=3, default=(40, 40, 8))
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (tune if options.tune else compare_fa if options.fa else compare)(options)


if __name__ == "__main__":
    main()
