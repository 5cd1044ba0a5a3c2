"""Pretraining: do encoders that learned without labels help tasks with few labelled people?

    python benchmarks/pretraining.py WORK [--workers 2]  # every start, task, number of people
    python benchmarks/pretraining.py WORK --curves       # the validations of these trainings
    python benchmarks/pretraining.py WORK --tables       # one network for four acquisitions
    python benchmarks/pretraining.py WORK --real DATA    # tissue of real DWIs against their T1w
    python benchmarks/pretraining.py WORK --speed        # a brain of 72 × 72 × 39 voxels

The design is that of Weninger et al. 2022 on two phantoms whose seeds belong to this benchmark. The
auxiliary one (no labels) has AUXILIARY people at 4 mm with 90 directions each of b 1000, 2000 and
3000 at SNR 25; the clinic 28 people (15 to learn from, 5 to validate, 8 to test) at 6 mm with 64
directions of b 1000 at SNR 15. Networks see both at 8 mm. Tissue is that of the phantom, crossings
and directions those of CSD of the same scans. `table` is the published network, on 64 channels,
with its losses (L1, angles); `any` takes any gradient table, with cross-entropy and axes. Every
start has the same schedule, the same people and the same order of crops. `bundled` is the encoder
that is shipped. All people, the shipped encoder's too, are of one simulator and atlas. Tests are
one-sided and paired: over all runs and test people, as published; over the people, whose scores are
then means of the runs; and over the runs, whose scores are means of the people. Five more labelled
people choose the weights.

--tables: people at 6 mm and SNR 20, whose scans hold four acquisitions. One network learns tissue,
or the direction of the peaks of the largest acquisition, from five people with all four, and
one for each from the same people, all with 4 × the steps; all start from the encoder of `any`.

WORK keeps scans, encoders and results; an interrupted benchmark goes on from them (a phantom whose
simulation was interrupted begins anew). Delete it after a change of methods or phantom.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import table
import torch
from scipy.stats import ttest_rel

from bidsapp import cli, methods, training
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.anatomy import t1w, tissue
from bidsapp.bids import find
from bidsapp.dwi import Dwi
from bidsapp.kinds import MethodContext, TrainingSettings
from bidsapp.methods.estimate_direction import method as direction
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit
from bidsapp.recipe.steps import load_run
from bidsapp.selection import bundled_weights
from bidsapp.simulate import anatomy, person, phantom, site
from bidsapp.volumetric import learn, scans
from bidsapp.volumetric.apply import apply
from bidsapp.volumetric.corruption import Corruption
from bidsapp.volumetric.estimator import class_loss, class_metrics, one_hot
from bidsapp.volumetric.inputs import Grid, describe_table
from bidsapp.volumetric.labels import MAX_PEAKS, label_fibres, label_tissue

CLINIC, AUXILIARY = 28, 12
TRAINING, VALIDATION, TEST = range(15), range(15, 20), range(20, 28)
LABELLED, RUNS = (2, 5, 15), 4
STARTS = {"table": ("random", "none", "mask", "artifacts"),
          "any": ("random", "artifacts", "bundled")}
COMPARISONS = (("table", ("artifacts", 15), ("none", 15)), *(
    (input_, (start, 2), ("random", 5)) for input_, start in (
        ("table", "none"), ("table", "mask"), ("table", "artifacts"), ("any", "artifacts"),
        ("any", "bundled"))))
"""Further comparisons: input, (start, people) and the (start, people) it is compared with."""
NAMES = {"random": "random", "none": "autoencoder", "mask": "masked autoencoder",
         "artifacts": "artifact removal", "bundled": "bundled"}
TASKS = ("tissue", "crossings", "direction")
SCORES = {("table", "tissue"): ("f1", "accuracy"), ("any", "tissue"): ("f1", "accuracy"),
          ("table", "crossings"): ("accuracy", "f1"), ("any", "crossings"): ("accuracy", "f1"),
          ("table", "direction"): ("mse_angles", "degrees"),
          ("any", "direction"): ("degrees", "mse_angles")}
"""Two scores of each input and task; the first is tested. Those of `table` are the published ones;
`any` estimates axes, so that the angles on a hemisphere jump for it without reason."""
LABELS = {"f1": "F1", "accuracy": "accuracy", "mse_angles": "MSE of angles",
          "degrees": "median °"}
SIMULATED, VOXEL = 6.0, 8.0
"""Voxels of the clinic's scans, and of the networks, mm. 8 mm afford trainings that converge with
few people; with 6 mm and 120 steps nearly all validations were still falling."""
PRETRAINING = training.Schedule(steps=400, learning_rate=1e-3, validate_every=100)
SCHEDULE = training.Schedule(steps=300, learning_rate=3e-3, validate_every=50,
                             precision="bf16-mixed")
"""The rate was chosen among three schedules of 120 steps on two people of the validation."""
RECIPE = learn.Recipe({"architecture": "volumetric"}, SCHEDULE, batch=2, patch=64, voxel=VOXEL)
TABLES = {"20 × b 1000": ((1000.0,), 20), "64 × b 1000": ((1000.0,), 64),
          "30 × b 1000, 2000": ((1000.0, 2000.0), 30),
          "60 × b 700, 1500, 3000": ((700.0, 1500.0, 3000.0), 60)}
*_, LARGEST = TABLES
TABLE_RUNS = 2
FOUR, LEARNERS, VALIDATORS = 11, 5, 2
ANISOTROPIC = 0.2


def simulate_scans(seed, people, acquisition, voxel, snr):
    """Yield the scan of each person at the reference site, with GM, WM and CSF of its voxels."""
    design = PhantomOptions(Path("unused"), random_seed=seed, voxel_size=voxel, snr=snr,
                            participants=people, sites=1)
    atlas, scanner = load_atlas(design.step), site.draw_sites(design)[0]
    for one in recruit(design):
        who = person.draw_person(design, atlas, one.label, one.age, one.sex, one.lesion,
                                 one.tissue)
        scan = phantom.simulate_scan(who, scanner, scanner, acquisition, atlas, design,
                                     phantom.draw_pose(design, one.label, scanner.name))
        inside = scan.mask
        shares = np.stack([scan.tissue[anatomy.TISSUES.index(t)][inside]
                           for t in ("gm", "wm", "csf")], 1).astype(np.float32)
        yield Dwi(np.ascontiguousarray(scan.signal[:, inside].T, np.float32), inside,
                  scan.grid.affine, acquisition,
                  tissue=shares / np.maximum(shares.sum(1, keepdims=True), 1))


def simulate(work, name, *arguments, rich=None):
    """Simulate people once, each in a file with its labels; rich: volumes for those of fibres."""
    folder = work / "people"
    folder.mkdir(parents=True, exist_ok=True)
    count = arguments[1]
    files = [folder / f"{name}_{i:02d}.npz" for i in range(count)]
    if not files[-1].exists():
        for i, dwi in enumerate(simulate_scans(*arguments)):
            fibres = label_fibres(dwi if rich is None else dwi.select_volumes(rich),
                                  dwi.tissue[:, 1] > 0.5)
            part = files[i].with_suffix(".part.npz")
            np.savez(part, signal=dwi.signal, mask=dwi.mask, affine=dwi.affine,
                     bvals=dwi.acquisition.bvals, bvecs=dwi.acquisition.bvecs, tissue=dwi.tissue,
                     count=fibres.count, axis=fibres.axis)
            part.replace(files[i])
            print(f"{name} {i + 1} of {count}", flush=True)
    return files


def simulate_clinic(work):
    """People of the clinic."""
    return simulate(work, "clinic", 41, CLINIC, site.gradient_table((1000.0,), 64), SIMULATED, 15.0)


def read(path):
    """A person: Dwi and labels."""
    data = np.load(path)
    dwi = Dwi(data["signal"], data["mask"], data["affine"],
              Acquisition(data["bvals"], data["bvecs"]), tissue=data["tissue"])
    return dwi, data


def labelled(path, task):
    """A person with the target of a task; None for pretraining."""
    dwi, data = read(path)
    if task is None:
        return scans.Labelled(dwi)
    if task == "tissue":
        return scans.Labelled(dwi, one_hot(dwi.tissue.argmax(1), 3), dwi.tissue.sum(1) > 0.5)
    white = data["count"] > 0
    if task == "crossings":  # in white matter, as published
        return scans.Labelled(dwi, one_hot(data["count"], MAX_PEAKS + 1), white)
    axis = Grid.over(dwi).directions(data["axis"])
    return scans.Labelled(dwi, (axis[:, direction.ROWS] * axis[:, direction.COLUMNS]).astype(
        np.float32), white)


@cache
def prepare(work, paths, task, input_):
    """Scans on the grid of the network, once in each process."""
    channels = channels_of(input_)
    folder = work / "grids" / f"{task}_{'table' if channels.directions else 'any'}"
    folder.mkdir(parents=True, exist_ok=True)
    return [scans.prepare(labelled(path, task), channels, folder,
                          f"{path.stem}_{multiprocessing.current_process().pid}")
            for path in paths]


@cache
def channels_of(input_):
    """The clinic's table, or any; its grid has the axes of the world."""
    if input_ == "any":
        return scans.Channels(VOXEL)
    clinic = site.gradient_table((1000.0,), 64)
    return scans.Channels(VOXEL, clinic.bvecs[~clinic.b0].tolist(), 1000.0)


def loss_of(task, input_):
    """Published losses for `table`, and ours for `any`: number of outputs, loss, metrics."""
    if task == "direction":
        target = direction.ANGLES if input_ == "table" else direction.AXIS
        return (2 if target == direction.ANGLES else 6,
                partial(direction.direction_loss, target), direction.direction_metrics)
    kind = "l1" if input_ == "table" else "cross-entropy"
    return 3 if task == "tissue" else MAX_PEAKS + 1, partial(class_loss, kind), class_metrics


def pretrain(work, input_, kind):
    """Weights of an encoder pretrained on the auxiliary phantom."""
    file = work / f"encoder_{input_}_{kind}.pt"
    if not file.exists():
        people = prepare(work, tuple(sorted((work / "people").glob("auxiliary_*.npz"))), None,
                         input_)
        channels = channels_of(input_)
        corruption = Corruption(kind, VOXEL)

        def loss(output, example):
            return (output - example.clean)[:, example.valid].square().mean()

        recipe = replace(RECIPE, input=input_, schedule=PRETRAINING)
        network, _ = learn.initial_network(
            recipe, len(channels.directions) or None, channels, 0, None)
        held = learn.Validation(people[-2:], RECIPE.patch, corruption, 1)
        history = learn.train(network, learn.Sampler(people[:-2], recipe, corruption), held, loss,
                              PRETRAINING, TrainingSettings(seed=1), None, f"{input_}, {kind}")
        torch.save(network.get_submodule(learn.ENCODER).state_dict(), file)
        print(input_, kind, [round(row["validation"], 5) for row in history], flush=True)
    return torch.load(file)


def tune(work, input_, start, task, people, run):
    """Train a task from a start on labelled people; metrics of each test person, and validation."""
    file = work / "results" / f"{input_}_{start}_{task}_{people}_{run}.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    everybody = prepare(work, tuple(sorted((work / "people").glob("clinic_*.npz"))), task, input_)
    chosen = np.random.default_rng(run).permutation(TRAINING)[:people]
    channels, (outputs, loss, metrics) = channels_of(input_), loss_of(task, input_)
    groups = [[everybody[i] for i in part] for part in (chosen, VALIDATION, TEST)]
    recipe = replace(RECIPE, input=input_, subsample=False)
    network, _ = learn.initial_network(recipe, outputs, channels, run, None)
    encoder = network.get_submodule(learn.ENCODER)
    if start == "bundled":
        bundled_weights(learn.PRETRAINING).part(learn.ENCODER).into(encoder)
    elif start != "random":
        encoder.load_state_dict(pretrain(work, input_, start))
    history = learn.train(
        network, learn.Sampler(groups[0], recipe),
        [scans.cut_middle(s, RECIPE.patch) for s in groups[1]], loss, SCHEDULE,
        TrainingSettings(seed=run), None, file.stem)
    result = {"test": [learn.evaluate(network, [scans.cut_middle(s, RECIPE.patch)], metrics)
                       for s in groups[2]],
              "validation": [row["validation"] for row in history]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result))
    return result


def combinations():
    """(input, start, task, people, run), the runs outermost, so that a part is balanced."""
    for input_, starts in STARTS.items():
        yield from ((input_, start, task, people, run) for run, task, people, start in
                    itertools.product(range(1, RUNS + 1), TASKS, LABELLED, starts))


def compare(options):
    work = options.work
    simulate_clinic(work)
    simulate(work, "auxiliary", 42, AUXILIARY, site.gradient_table(
        (1000.0, 2000.0, 3000.0), 90), 4.0, 25.0)
    for input_, kind in (("table", "none"), ("table", "mask"), ("table", "artifacts"),
                         ("any", "artifacts")):
        pretrain(work, input_, kind)
    todo = list(combinations())
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.starmap(tune, [(work, *one) for one in todo], chunksize=1)
    results = {one: tune(work, *one) for one in todo}
    if options.curves:
        show_curves(results, options.csv)
        return
    rows = []
    for (input_, starts), task, people in itertools.product(STARTS.items(), TASKS, LABELLED):
        values = {start: read_scores(results, input_, start, task, people) for start in starts}
        rows += [[f"{input_}, {task}, {people} people: {NAMES[start]}",
                  *describe(scores, None if start == "random" else values["random"],
                            SCORES[input_, task])] for start, scores in values.items()]
    for task, (input_, *pair) in itertools.product(TASKS, COMPARISONS):
        scores, reference = (read_scores(results, input_, start, task, people)
                             for start, people in pair)
        label = " against ".join(f"{NAMES[start]} with {people}" for start, people in pair)
        rows.append([f"{input_}, {task}: {label}",
                     *describe(scores, reference, SCORES[input_, task])])
    table.show("pretraining", rows, options.csv)


def read_scores(results, input_, start, task, people):
    """Scores by name, each (run, person)."""
    tests = [results[input_, start, task, people, run]["test"] for run in range(1, RUNS + 1)]
    return {name: np.array([[t[name] for t in run] for run in tests])
            for name in SCORES[input_, task]}


def describe(scores, reference, names):
    """Scores, means and range of the runs; change of the first from a reference; p-values."""
    row = []
    for name in names:
        runs, digits = scores[name].mean(1), 1 if name == "degrees" else 4
        row.append(f"{LABELS[name]} {runs.mean():.{digits}f} "
                   f"({runs.min():.{digits}f}–{runs.max():.{digits}f})")
    if reference is None:
        return [*row, *[""] * 4]
    score, compared = scores[names[0]], reference[names[0]]
    better = "less" if names[0] in ("mse_angles", "degrees") else "greater"
    return [*row, f"{100 * (score.mean() / compared.mean() - 1):+.1f} %", *(
        f"{ttest_rel(x, y, alternative=better).pvalue:.1g}" for x, y in (
            (score.ravel(), compared.ravel()), (score.mean(0), compared.mean(0)),
            (score.mean(1), compared.mean(1))))]


def show_curves(results, path):
    """Validation losses with 15 labelled people, means of the runs: figure 2a of the paper."""
    steps = range(SCHEDULE.validate_every, SCHEDULE.steps + 1, SCHEDULE.validate_every)
    table.show("pretraining_curves", [
        [f"{task}: {NAMES[start]}", *(f"{v:.4f}" for v in np.mean(
            [results["table", start, task, max(LABELLED), run]["validation"]
             for run in range(1, RUNS + 1)], 0))]
        for task in TASKS for start in STARTS["table"]], path,
        others=[f"step {i}" for i in steps])


def four(work):
    """People with all four acquisitions: files, and the volumes of each acquisition."""
    parts = [site.gradient_table(*t) for t in TABLES.values()]
    weighted = [p[np.flatnonzero(~p.b0)] for p in parts]
    b0 = parts[0][np.flatnonzero(parts[0].b0)]
    ends = len(b0) + np.cumsum([0, *map(len, weighted)])
    columns = {name: np.r_[:len(b0), ends[i]:ends[i + 1]] for i, name in enumerate(TABLES)}
    return simulate(work, "four", 43, FOUR, concatenate([b0, *weighted]), SIMULATED, 20.0,
                    rich=columns[LARGEST]), columns


@cache
def prepare_four(work, task):
    """Scans of each acquisition on the grid of the network, once in each process."""
    paths, columns = four(work)
    folder = work / "grids" / f"four_{task}"
    folder.mkdir(parents=True, exist_ok=True)
    groups = {name: [] for name in TABLES}
    for path in paths:
        one = labelled(path, task)
        for number, name in enumerate(TABLES):
            groups[name].append(scans.prepare(
                replace(one, dwi=one.dwi.select_volumes(columns[name])), channels_of("any"), folder,
                f"{number}_{path.stem}_{multiprocessing.current_process().pid}"))
    return groups


def tune_tables(work, task, run, names):
    """Train a task on acquisitions, from the encoder; score of each test person with each."""
    which = "all" if len(names) > 1 else list(TABLES).index(names[0])
    file = work / "results" / f"four_{task}_{run}_{which}.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    groups, (outputs, loss, metrics) = prepare_four(work, task), loss_of(task, "any")
    recipe = replace(RECIPE, subsample=False)
    network, _ = learn.initial_network(recipe, outputs, channels_of("any"), run, None)
    network.get_submodule(learn.ENCODER).load_state_dict(pretrain(work, "any", "artifacts"))
    people, held = range(LEARNERS), range(LEARNERS, LEARNERS + VALIDATORS)
    learn.train(network, learn.Sampler([groups[n][i] for n in names for i in people], recipe),
                [scans.cut_middle(groups[n][i], RECIPE.patch) for n in names for i in held], loss,
                replace(SCHEDULE, steps=SCHEDULE.steps * len(TABLES)), TrainingSettings(seed=run),
                None, file.stem)
    result = {n: [learn.evaluate(network, [scans.cut_middle(scan, RECIPE.patch)], metrics)
                  for scan in groups[n][LEARNERS + VALIDATORS:]] for n in names}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result))
    return result


def compare_tables(options):
    """One network for four acquisitions beside one for each."""
    work, every = options.work, tuple(TABLES)
    four(work)
    pretrain(work, "any", "artifacts")
    keys = {"tissue": ("f1", "accuracy"), "direction": ("degrees",)}
    todo = list(itertools.product(keys, range(1, TABLE_RUNS + 1), [every, *((n,) for n in every)]))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = dict(zip(todo, pool.starmap(tune_tables, [(work, *one) for one in todo],
                                              chunksize=1), strict=True))

    def describe_runs(task, key, name, names):
        """Mean over the test people, of each run."""
        return np.array([np.mean([person[key] for person in results[task, run, names][name]])
                         for run in range(1, TABLE_RUNS + 1)])

    rows = []
    for task, scores in keys.items():
        for key, name in itertools.product(scores, TABLES):
            joint, own = (describe_runs(task, key, name, names) for names in (every, (name,)))
            digits = 1 if key == "degrees" else 3
            rows.append([f"{name}: {task}, {LABELS[key]}", *(
                f"{x.mean():.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in x)})"
                for x in (joint, own)), f"{100 * (joint.mean() / own.mean() - 1):+.1f} %"])
    table.show("pretraining_tables", rows, options.csv)


def compare_real(options):
    """Dice of tissue from the DWI alone with that of the T1w image, in preprocessed scans."""
    rows = []
    for name in ("siemens_xa30", "uih_dti16"):
        raw, out = options.real / name, options.work / "real" / name
        if not out.exists():
            cli.main([str(raw), str(out), "participant", "--estimate", "dti"])
        found = find.find_runs(cli.parse([str(raw), "unused", "participant", "--derivatives",
                                          str(out)]))
        for label in found.participants:
            for run in found.runs[label]:
                if run.t1w:
                    rows += compare_run(run, f"{name}, {run.name}")
    table.show("pretraining_real", rows, options.csv)


def compare_run(run, name):
    """Rows of one run: the labels of MD and FA, which leave mixed voxels out; a rule of MD and FA
    that leaves none out; and those of the network."""
    dwi = load_run(run)[0]
    truth = label_tissue(t1w.posteriors(dwi, run.t1w, run.probsegs))
    fitted = tissue.tensor_maps(dwi, "cpu")
    grey, white, csf = tissue.classes(dwi, fitted["md"], fitted["fa"],
                                      (dwi.mean_b0 > 0) & ~fitted["failed"])
    method = methods.get("estimate_tissue", context=MethodContext(allow_extrapolation=True))
    network = method.apply(dwi, "cpu").maps["segmentation"].astype(int)
    rows = []
    every = np.where(csf, 3, np.where(fitted["fa"] > ANISOTROPIC, 2, 1))
    for kind, labels in (("MD and FA, without mixed voxels", grey + 2 * white + 3 * csf),
                         (f"CSF by MD, white matter by FA above {ANISOTROPIC}", every),
                         ("estimate_tissue", network)):
        labels = np.where(truth > 0, labels, 0)
        dice = [2 * ((labels == k) & (truth == k)).sum()
                / max(1, (labels == k).sum() + (truth == k).sum()) for k in (1, 2, 3)]
        rows.append([f"{name}: {kind}", *(f"{d:.2f}" for d in dice)])
    return rows


def measure_speed(options):
    """Seconds of an epoch of the clinic, and of an application, on the threads of torch."""
    shape, acquisition = (72, 72, 39), site.gradient_table((1000.0, 2000.0), 30)
    rng = np.random.default_rng(0)
    mask = np.ones(shape, bool)
    dwi = Dwi(rng.uniform(100, 1000, (mask.sum(), len(acquisition))).astype(np.float32), mask,
              np.diag([3.0, 3, 3, 1]), acquisition)
    grid, channels = Grid.over(dwi), channels_of("any")
    network, _ = learn.initial_network(RECIPE, 3, channels, 0, None)
    weighted = acquisition[np.flatnonzero(~acquisition.b0)]
    matrix = network.matrix(describe_table(weighted, grid)).detach()
    rows = []
    for _ in range(2):  # the first call is a rehearsal
        began, cpu = time.perf_counter(), time.process_time()
        apply(network.eval(), dwi, grid, matrix, lambda y: y.softmax(0), RECIPE.patch, "cpu")
        rows = [["application to 72 × 72 × 39 voxels, 60 directions",
                 f"{time.perf_counter() - began:.1f}", f"{time.process_time() - cpu:.1f}"]]
    people = prepare(options.work, tuple(simulate_clinic(options.work)[:15]), "tissue", "any")
    outputs, loss, _ = loss_of("tissue", "any")
    network, _ = learn.initial_network(RECIPE, outputs, channels, 0, None)
    began, cpu = time.perf_counter(), time.process_time()
    learn.train(network, learn.Sampler(people, RECIPE), [scans.cut_middle(people[0], 64)], loss,
                replace(SCHEDULE, steps=8), TrainingSettings(), None, "epoch")
    rows.append([f"an epoch of 15 people of 64 directions at {VOXEL:g} mm",
                 f"{time.perf_counter() - began:.1f}", f"{time.process_time() - cpu:.1f}"])
    table.show("pretraining_speed", rows, options.csv)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--real", type=Path, metavar="DATA")
    table.add_option(parser)
    options = parser.parse_args()
    if options.speed:
        measure_speed(options)
        return
    torch.set_num_threads(1)
    if options.tables:
        compare_tables(options)
    elif options.real:
        compare_real(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
