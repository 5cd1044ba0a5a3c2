"""Upsampling: predicted volumes, and tensors of given and predicted ones, against truth.

    python benchmarks/upsampling.py [--people 2] [--rows "30 → 90" …]   # side by side
    python benchmarks/upsampling.py --tables         # tables of other b and numbers of directions
    python benchmarks/upsampling.py --lesion         # contrast of a lesion in new volumes
    python benchmarks/upsampling.py --speed          # 72 × 72 × 39 voxels, 20 → 90 directions

The phantom has 90 directions of b 1000 at two sites, A (the reference) and B (other noise with four
coils, resolution, echo time, b-value, …). Its seed belongs to this benchmark: no method may be
trained on it. Truth is the expected magnitude of each measurement, which is what the methods
predict. Rough tissue (rough_tissue.py) has neighbours as unlike as real ones, which the phantom has
not, and other tissue than any training. The given directions are `upsample.subset` of the measured
ones, a greedy spread choice, and the others are held out. Errors are root mean squares over voxels
and new volumes of S/S0, and over voxels of FA (weighted least squares of given and predicted
volumes). Angles of the first eigenvector are means over voxels whose FA is above 0.2. "few" is the
tensor of the given volumes alone. Coverage is the share of held-out measurements within 90 %
intervals, and of truth within those without noise. Wilcoxon tests are paired over axial slices
(coronal ones of a slab) of 50 voxels or more, of all people.

--cache FOLDER keeps what was measured of each scan by each method, and goes on from it. Delete the
files of a method that changed.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rough_tissue
import table
import torch
from scipy.ndimage import binary_dilation
from scipy.stats import wilcoxon

from bidsapp import cli, kinds, methods, tensor
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.bids import find
from bidsapp.dwi import Dwi, noise_sd, peak_memory
from bidsapp.errors import Refusal
from bidsapp.evaluate import agreement
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit
from bidsapp.recipe.steps import load_run
from bidsapp.simulate import noise, person, phantom, site
from bidsapp.upsample import Z90, spread, subset

SEED = 22
FEW, BASELINES = "few", ("upsample_sh", "upsample_gp")
SLICE_VOXELS, MIN_FA = 50, 0.2
FA_BANDS = {"FA ≥ 0.4": (0.4, 2.0), "0.2–0.4": (0.2, 0.4), "< 0.2": (0.0, 0.2)}
AROUND = 3
"""Voxels about a lesion that it is compared with."""


class Scene(NamedTuple):
    """A scan, and what a method is given of it.

    dwi: (voxel, n) as measured; truth: (voxel, n) expected signals, or None; given, new: volumes;
    bands: (voxel,) int, or −1; s0: (voxel,) that signals are divided by; lesion, around: (voxel,)
    bool, or None.
    """

    row: str
    unit: str
    dwi: Dwi
    truth: np.ndarray | None
    given: np.ndarray
    new: np.ndarray
    bands: np.ndarray
    s0: np.ndarray
    lesion: np.ndarray | None = None
    around: np.ndarray | None = None

    @property
    def slices(self) -> np.ndarray:
        """(voxel,) index of the slice: axial, or coronal if there are fewer than 6."""
        return np.nonzero(self.dwi.mask)[2 if self.dwi.mask.shape[2] > 5 else 1]

    @property
    def limited(self) -> Dwi:
        """The given volumes, with the noise level that they show."""
        dwi = self.dwi.select_volumes(self.given)
        return Dwi(dwi.signal, dwi.mask, dwi.affine, dwi.acquisition, magnitude=dwi.magnitude,
                   noise_sd=noise_sd(dwi))

    def reduced(self, row: str, given: int) -> "Scene":
        """The same scan of the given volumes alone, of which fewer are given."""
        part = self.dwi.select_volumes(self.given)
        few, new = split(part.acquisition, given)
        return self._replace(row=row, dwi=part, truth=self.truth[:, self.given], given=few, new=new)


def split(acquisition, count):
    """b0 volumes and a spread subset of the weighted ones; all others."""
    weighted = np.flatnonzero(~acquisition.b0)
    given = weighted[subset(acquisition.bvecs[weighted], count)]
    return (np.sort(np.r_[np.flatnonzero(acquisition.b0), given]),
            np.setdiff1d(weighted, given))


def simulate(acquisition, options, lesions=0.0, sites=(0, 1), people=None):
    """Yield (person, site, Scene without rows) of the phantom: whole brains."""
    design = PhantomOptions(Path("unused"), random_seed=SEED, voxel_size=options.voxel_size,
                            participants=people or options.people, lesions=lesions, sites=2,
                            effect_directions=0)
    silent = PhantomOptions(Path("unused"), random_seed=SEED, voxel_size=options.voxel_size,
                            sites=2, effect_directions=0, snr=float("inf"))
    atlas, scanners, quiet = load_atlas(design.step), site.draw_sites(design), site.draw_sites(
        silent)
    for participant in recruit(design):
        who = person.draw_person(design, atlas, participant.label, participant.age,
                                 participant.sex, participant.lesion, participant.tissue)
        for k in sites:
            where = scanners[k]
            scan = phantom.simulate_scan(who, quiet[k], quiet[0], acquisition, atlas, design,
                                         phantom.draw_pose(design, participant.label, where.name))
            inside = scan.mask
            clean = np.moveaxis(scan.signal, 0, -1)[inside].astype(np.float64)
            sigma = phantom.UNIT * where.sigma(scan.grid.points).reshape(scan.grid.shape)[inside]
            truth = noise.mean(clean, sigma[:, None], where.coils)
            rng = torch.Generator().manual_seed(1000 * k + int(participant.label))
            measured = phantom.add_noise(clean, sigma[:, None], where, rng)
            dwi = Dwi(measured.astype(np.float32), inside, scan.grid.affine, acquisition)
            tissue = scan.tissue[:, inside].argmax(0)
            wm = tissue == 0
            lesion = scan.lesion[inside] & wm
            around = (binary_dilation(scan.lesion, iterations=AROUND) & ~scan.lesion)[inside] & wm
            s0 = clean[:, acquisition.b0].mean(1)
            yield participant.label, where.name, Scene(
                "", f"{participant.label} {where.name}", dwi, truth.astype(np.float32),
                *split(acquisition, 1), tissue, s0, lesion, around)


def ninety():
    """The 90 directions of the phantom and its b0 volumes."""
    return site.gradient_table((1000.0,), 90)


def chosen(row, options):
    """Whether --rows asks for a row, or for some that begin with `row`."""
    return any(row.startswith(r) or r.startswith(row) for r in options.rows)


def phantom_scenes(options) -> Iterator[Scene]:
    """30 → 90 and 6 → 30."""
    if not any(chosen(f"{counts}, phantom", options) for counts in ("30 → 90", "6 → 30")):
        return
    given, new = split(ninety(), 30)
    for _, where, scene in simulate(ninety(), options):
        of = scene._replace(row=f"30 → 90, phantom, {where}", given=given, new=new)
        yield of
        yield of.reduced(f"6 → 30, phantom, {where}", 6)


def rough_scenes(options) -> Iterator[Scene]:
    """30 → 90, 12 → 30 and 6 → 30 of the tissue of rough_tissue.py, SNR 20 of white matter."""
    if not any(chosen(f"{n}, rough tissue", options) for n in ("30 → 90", "12 → 30", "6 → 30")):
        return
    acquisition, sigma = ninety(), 0.05
    given, new = split(acquisition, 30)
    for seed in range(1, options.people + 1):
        tissue = rough_tissue.draw(seed)
        clean = rough_tissue.signal(tissue, acquisition)
        mask = np.ones(tissue.label.shape, bool)
        noisy = rough_tissue.measure(clean, sigma, 100 + seed)[mask]
        dwi = Dwi((1000 * noisy).astype(np.float32), mask, np.diag([2.5, 2.5, 2.5, 1]), acquisition)
        truth = (1000 * rough_tissue.expected(clean, sigma)[mask]).astype(np.float32)
        scene = Scene("30 → 90, rough tissue", str(seed), dwi, truth, given, new,
                      tissue.label[mask], 1000 * clean[mask][:, acquisition.b0].mean(1))
        yield scene
        yield scene.reduced("12 → 30, rough tissue", 12)
        yield scene.reduced("6 → 30, rough tissue", 6)


def load_real(data, name, wanted, b=None):
    """Name and Dwi, of the shell b or of all, of the first run of a dataset whose name holds
    `wanted`; None without the dataset. Voxels without signal are left out: raw masks hold some."""
    if not (data / name).is_dir():
        return None
    found = find.find_runs(cli.parse([str(data / name), "unused", "participant"]))
    run = next(r for label in found.participants for r in found.runs[label] if wanted in r.name)
    dwi = load_run(run)[0]
    if b:
        dwi = dwi.select_shell(next(s for s in dwi.acquisition.shells if abs(s.b - b) < 0.05 * b))
    s0 = dwi.mean_b0
    usable = (s0 > 0.2 * np.median(s0)) & (dwi.signal > 0).all(1)
    return run.name, Dwi(dwi.signal[usable], dwi.unmask(usable), dwi.affine, dwi.acquisition)


def real_scenes(options) -> Iterator[Scene]:
    """Shells of real runs, as they were measured; those of siemens_xa30 and canon_retest moved."""
    for row, name, wanted, b, count in (
            ("20 → 60, mdt_multishell b 2000", "mdt_multishell", "acq-b1kb2k", 2000, 20),
            ("12 → 30, mdt_multishell b 1000", "mdt_multishell", "acq-b1kb2k", 1000, 12),
            ("6 → 30, mdt_multishell b 1000", "mdt_multishell", "acq-b1kb2k", 1000, 6),
            ("10 → 20, siemens_xa30 b 2500, raw", "siemens_xa30", "dir-AP", 2500, 10),
            ("10 → 16, uih_dti16 b 930", "uih_dti16", "", 930, 10),
            ("6 → 16, uih_dti16 b 930", "uih_dti16", "", 930, 6),
            ("6 → 12, canon_retest b 1500", "canon_retest", "", 1500, 6)):
        if not chosen(row, options):
            continue
        if (run := load_real(options.data, name, wanted, b)) is None:
            print(f"{row}: there is no {options.data / name}")
            continue
        name, dwi = run
        fa = tensor_of(dwi.signal, dwi.acquisition)[0]
        bands = np.full(len(fa), -1)
        for i, (low, high) in enumerate(FA_BANDS.values()):
            bands[(fa >= low) & (fa < high)] = i
        yield Scene(row, name, dwi, None, *split(dwi.acquisition, count), bands, dwi.mean_b0)


def tensor_of(signal, acquisition):
    """FA (voxel,) and first eigenvectors (voxel, 3)."""
    chosen = tensor.volumes(acquisition)
    maps = tensor.fit(torch.as_tensor(signal[:, chosen], dtype=torch.float64),
                      tensor.design(acquisition[chosen].btensors))
    return maps["fa"].numpy(), maps["direction"].numpy()


def load_method(name, options):
    return methods.get(name, context=kinds.MethodContext(models=options.models,
                                                         allow_extrapolation=True))


def predict(name, scene, options):
    """Predicted new volumes; None with a message if the method cannot."""
    method, limited, target = load_method(name, options), scene.limited, scene.dwi.acquisition[
        scene.new]
    fixed = method.target(limited.acquisition)
    try:
        method.check(limited.acquisition)
        if fixed is not None:
            cosine = np.abs(target.bvecs @ fixed.bvecs.T)
            if cosine.max(1, initial=0).min() < 1 - 1e-6:
                print(f"{scene.row}, {name}: predicts other directions")
                return None
        for text in method.violations(limited.acquisition, target):
            print(f"{scene.row}, {name}: outside of its training: {text}")
        return method.predict(limited, target, "cpu", 0)
    except Refusal as error:
        print(f"{scene.row}, {name}: refused: {error}")
        return None


def measure(scene, name, options):
    """Sums over voxels of squares, angles and coverage, {measure: (sum, count)}, each of
    (slice, band)."""
    acquisition, dwi = scene.dwi.acquisition, scene.dwi
    out, keys = {}, (scene.slices, scene.bands)
    slices, bands = int(scene.slices.max()) + 1, int(scene.bands.max()) + 1

    def add(measure_name, values, use=None):
        """values: (voxel, …), summed."""
        values = values.reshape(len(values), -1)
        use = np.ones(len(values), bool) if use is None else use
        total, count = np.zeros((2, slices, bands))
        at = tuple(k[use] for k in keys)
        np.add.at(total, at, values[use].sum(1))
        np.add.at(count, at, values.shape[1])
        out[measure_name] = (total.tolist(), count.tolist())

    if name == FEW:
        signal = dwi.signal[:, scene.given]
        order = scene.given
    else:
        start = time.process_time()
        predicted = predict(name, scene, options)
        if predicted is None:
            return None
        out["seconds"] = time.process_time() - start
        limited, s0 = scene.limited, scene.s0[:, None]
        sigma = limited.noise_of(np.flatnonzero(~limited.acquisition.b0))
        held_out = dwi.signal[:, scene.new]
        add("signal, measured", ((predicted.signal - held_out) / s0)**2)
        if predicted.sd is not None and sigma:
            add("coverage, measured", np.abs(predicted.signal - held_out)
                <= Z90 * np.hypot(predicted.sd, sigma))
        if scene.truth is not None:
            error = predicted.signal - scene.truth[:, scene.new]
            add("signal, truth", (error / s0)**2)
            if predicted.sd is not None:
                add("coverage, truth", np.abs(error) <= Z90 * predicted.sd)
                add("sd", (predicted.sd / s0)**2)
        signal = np.concatenate([limited.signal, predicted.signal], 1)
        order = np.r_[scene.given, scene.new]
    fa, direction = tensor_of(signal, acquisition[order])
    for against, reference in (("measured", dwi.signal), ("truth", scene.truth)):
        if reference is not None:
            wanted, axis = tensor_of(reference, acquisition)
            add(f"fa, {against}", (fa - wanted)**2)
            cosine = np.abs((direction * axis).sum(1)).clip(0, 1)
            add(f"angle, {against}", np.degrees(np.arccos(cosine)), wanted > MIN_FA)
    return out


def cached(options, kind, scene, name, function):
    """The result of a function of scene and method, kept in the folder of --cache."""
    if not options.cache:
        return function(scene, name, options)
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = f"{options.people}people_{options.voxel_size:g}mm"
    key = "_".join((kind, settings, scene.row, scene.unit, name))
    file = options.cache / f"{key.replace(' ', '')}.json"
    if not file.exists():
        result = function(scene, name, options)
        if result is None:
            return None
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())


class Rows:
    """Collect the measures of each row, method and scan."""

    def __init__(self):
        self.values = {}

    def add(self, row, name, result):
        if result is not None:
            self.values.setdefault(row, {}).setdefault(name, []).append(result)

    def total(self, row, name, measure_name, root=True):
        """All, and each band: (root of the) mean over voxels; None if it was not measured."""
        parts = [r[measure_name] for r in self.values[row].get(name, []) if measure_name in r]
        if not parts:
            return None
        total, count = (sum(np.array(p[i]).sum(0) for p in parts) for i in (0, 1))
        with np.errstate(invalid="ignore"):
            values = np.r_[total.sum() / count.sum(), total / count]
        return np.sqrt(values) if root else values

    def by_slice(self, row, name, measure_name):
        """RMSE of each slice with enough voxels."""
        parts = [r[measure_name] for r in self.values[row].get(name, []) if measure_name in r]
        total, count = (np.concatenate([np.array(p[i]).sum(1) for p in parts]) for i in (0, 1))
        voxels = np.concatenate([np.array(r[next(k for k in r if k.startswith("fa"))][1]).sum(1)
                                 for r in self.values[row][name]])
        return np.sqrt(total / count.clip(1e-9))[voxels >= SLICE_VOXELS]

    def change(self, row, name, other, measure_name):
        """`−12 % (p 3e-8)`: change of the RMSE from another method's; empty if there is none."""
        if name == other or other not in self.values[row]:
            return ""
        mine, theirs = (self.total(row, n, measure_name) for n in (name, other))
        if mine is None or theirs is None:
            return ""
        a, b = (self.by_slice(row, n, measure_name) for n in (name, other))
        p = f" (p {wilcoxon(a, b).pvalue:.0e})" if len(a) > 5 else ""
        return f"{100 * (mine[0] / theirs[0] - 1):+.0f} %{p}"


def cell(values, form):
    """`0.021 (0.020 / 0.022 / 0.023)`: all and the bands."""
    if values is None:
        return ""
    bands = " / ".join("–" if np.isnan(v) else f"{v:{form}}" for v in values[1:])
    return f"{values[0]:{form}} ({bands})"


def compare(options):
    names, rows = [FEW, *options.methods], Rows()
    for scenes in (real_scenes, rough_scenes, phantom_scenes):
        for scene in scenes(options):
            if not chosen(scene.row, options):
                continue
            for name in names:
                rows.add(scene.row, name, cached(options, "compare", scene, name, measure))
            print(f"done: {scene.row}, {scene.unit}", flush=True)
    lines = []
    for row in rows.values:
        against = "truth" if "phantom" in row or "rough" in row else "measured"
        lines += [[
            f"{row}: {name}", cell(rows.total(row, name, "signal, truth"), ".4f"),
            cell(rows.total(row, name, "signal, measured"), ".4f"),
            cell(rows.total(row, name, "fa, truth"), ".4f"),
            cell(rows.total(row, name, "fa, measured"), ".4f"),
            cell(rows.total(row, name, f"angle, {against}", root=False), ".1f"),
            cell(rows.total(row, name, "coverage, measured", root=False), ".2f"),
            cell(rows.total(row, name, "coverage, truth", root=False), ".2f"),
            rows.change(row, name, FEW, f"fa, {against}"),
            *(rows.change(row, name, other, f"signal, {against}") for other in BASELINES)]
            for name in rows.values[row]]
    table.show("upsampling", lines, options.csv)


def new_tables():
    """Tables by name: given, and directions to predict."""
    rng = np.random.default_rng(SEED)

    def shells(*parts, random=False, to=None):
        given, new = [], []
        for b, n, m in parts:
            v = rng.standard_normal((n, 3))
            g = (v / np.linalg.norm(v, axis=1, keepdims=True) if random
                 else spread(np.zeros((0, 3)), n, seed=int(b)))
            given.append(Acquisition(np.full(n, float(b)), g))
            new.append(Acquisition(np.full(m, float(to or b)), spread(g, m)))
        b0 = Acquisition(np.zeros(4), np.zeros((4, 3)))
        return concatenate([b0, *given]), concatenate(new)

    return {"21 of b 800": shells((800, 21, 40)),
            "16 of b 1100 and 40 of b 2300": shells((1100, 16, 20), (2300, 40, 40)),
            "50 random of b 3000": shells((3000, 50, 40), random=True),
            "45 of b 2000, b 3000 predicted": shells((2000, 45, 40), to=3000),
            "45 of b 3000, b 1000 predicted": shells((3000, 45, 40), to=1000),
            "outside: 45 of b 8000": shells((8000, 45, 40)),
            "outside: 45 of b 8000, b 4000 predicted": shells((8000, 45, 40), to=4000)}


def compare_tables(options):
    rows = Rows()
    for row, (given, new) in new_tables().items():
        if not chosen(row, options):
            continue
        both = concatenate([given, new])
        for _, _, scene in simulate(both, options, sites=(0,)):
            n = len(given)
            scene = scene._replace(row=row, given=np.arange(n), new=np.arange(n, len(both)))
            for name in options.methods:
                rows.add(row, name, cached(options, "tables", scene, name, measure))
        print(f"done: {row}", flush=True)
    lines = [[f"{row}: {name}", cell(rows.total(row, name, "signal, truth"), ".4f"),
              cell(rows.total(row, name, "sd"), ".4f"),
              cell(rows.total(row, name, "coverage, measured", root=False), ".2f"),
              cell(rows.total(row, name, "coverage, truth", root=False), ".2f"),
              *(rows.change(row, name, other, "signal, truth") for other in BASELINES)]
             for row in rows.values for name in rows.values[row]]
    table.show("upsampling_tables", lines, options.csv)


def measure_lesion(scene, name, options):
    """Contrast over that of truth: in new volumes (slope over volumes), of FA and of MD."""
    acquisition, order = scene.dwi.acquisition, np.r_[scene.given, scene.new]
    if name == FEW:
        signal, order, new = scene.dwi.signal[:, scene.given], scene.given, None
    elif name == "measured":
        signal, new = scene.dwi.signal[:, order], scene.dwi.signal[:, scene.new]
    else:
        predicted = predict(name, scene, options)
        if predicted is None:
            return None
        new = predicted.signal
        signal = np.concatenate([scene.dwi.signal[:, scene.given], new], 1)

    def contrasts(values):
        return np.array([agreement.contrast(v, scene.lesion, scene.around) for v in values.T])

    def maps(values, table_of):
        chosen = tensor.volumes(table_of)
        fitted = tensor.fit(torch.as_tensor(values[:, chosen], dtype=torch.float64),
                            tensor.design(table_of[chosen].btensors))
        return {k: fitted[k].numpy() for k in ("fa", "md")}

    out, mine, wanted = {}, maps(signal, acquisition[order]), maps(scene.truth, acquisition)
    for key in mine:
        a, b = (agreement.contrast(m[key], scene.lesion, scene.around) for m in (mine, wanted))
        out[key] = a / b
    if new is not None:
        truth = contrasts(scene.truth[:, scene.new] / scene.s0[:, None])
        here = contrasts(new / scene.s0[:, None])
        out |= {"signal": float(here @ truth / (truth @ truth)), "contrast": float(truth.mean()),
                "worst": float(np.abs(here - truth).max())}
    return out


def compare_lesions(options):
    given, new = split(ninety(), 30)
    found = {}
    for label, _, scene in simulate(ninety(), options, lesions=1.0, sites=(0,)):
        scene = scene._replace(row="lesion", given=given, new=new)
        print(f"{label}: {scene.lesion.sum()} voxels in the lesion, {scene.around.sum()} around")
        for name in (FEW, "measured", *options.methods):
            result = cached(options, "lesion", scene, name, measure_lesion)
            if result is not None:
                found.setdefault(name, []).append(result)

    def cells(results, key, form):
        values = [r[key] for r in results if key in r]
        return (f"{np.median(values):{form}} ({table.interval(values, form, ' to ')})" if values
                else "")

    table.show("upsampling_lesion", [[name, *(cells(results, key, form) for key, form in (
        ("contrast", ".3f"), ("signal", ".2f"), ("worst", ".3f"), ("fa", ".2f"), ("md", ".2f")))]
        for name, results in found.items()], options.csv)


def run_once(name, shape, threads, models, queue):
    """Seconds (wall, CPU) and peak memory (GB) of one prediction in a fresh process."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(SEED)
    measured = spread(np.zeros((0, 3)), 20)
    acquisition = Acquisition(np.r_[0.0, np.full(20, 1000.0)], np.vstack([np.zeros(3), measured]))
    target = Acquisition(np.full(70, 1000.0), spread(measured, 70))
    mask = np.ones(shape, bool)
    d = rng.uniform(0.2e-3, 2.2e-3, (mask.sum(), 3)).astype(np.float32)
    signal = np.hypot(1000 * np.exp(-acquisition.bvals * (d @ (acquisition.bvecs**2).T)), 40)
    dwi = Dwi(signal.astype(np.float32), mask, np.diag([3.0, 3.0, 3.0, 1.0]), acquisition, 40.0)
    del signal, d
    method = methods.get(name, context=kinds.MethodContext(models=models,
                                                           allow_extrapolation=True))
    wall, cpu = time.monotonic(), time.process_time()
    try:
        method.predict(dwi, target, "cpu", 0)
    except Refusal as error:
        queue.put(str(error))
        return
    queue.put((time.monotonic() - wall, time.process_time() - cpu,
               resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def time_methods(options):
    lines, context = [], multiprocessing.get_context("spawn")
    bound = peak_memory(int(np.prod(options.shape)), 91) / 1e9
    for name in options.methods:
        queue = context.Queue()
        process = context.Process(target=run_once, args=(
            name, tuple(options.shape), options.threads, options.models, queue))
        process.start()
        result = queue.get()
        process.join()
        if isinstance(result, str):
            print(f"{name}: {result}")
            continue
        wall, cpu, memory = result
        lines.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{memory:.2f}", f"{bound:.2f}"])
    table.show("upsampling_speed", lines, options.csv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("tables", "lesion", "speed"):
        parser.add_argument(f"--{flag}", action="store_true")
    names = methods.names("upsample_")
    shared = os.environ.get("QSPHERE_TEST_DATA",
                            Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", nargs="+", default=[""], help="rows that begin so; default: all")
    parser.add_argument("--people", type=int, default=2)
    parser.add_argument("--voxel-size", type=float, default=3.0, help="mm, of the phantom")
    parser.add_argument("--data", type=Path, default=Path(shared))
    parser.add_argument("--models", type=Path, help="folder of models of the group level")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int, default=2, help="of --speed")
    parser.add_argument("--shape", type=int, nargs=3, default=[72, 72, 39], help="of --speed")
    table.add_option(parser)
    options = parser.parse_args()
    if options.speed:
        time_methods(options)
        return
    torch.set_num_threads(1)
    if options.tables:
        compare_tables(options)
    elif options.lesion:
        compare_lesions(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
