"""Every harmonizer over several draws of a site, on simulated people it has not learned from.

    python benchmarks/harmonization.py --out DIR                    # six sites, two folds, 4 mm
    python benchmarks/harmonization.py --out DIR --only-sites siteB --methods harmonize_rish
    python benchmarks/harmonization.py --out DIR --prepare          # simulate and register alone
    python benchmarks/harmonization_tables.py DIR                   # tables of what is there
    python benchmarks/harmonization.py --out OTHER --shells 1000 2000 3000
    python benchmarks/harmonization.py --out OTHER --methods harmonize_shresnet@blocks={1,2,3}
    python benchmarks/harmonization.py --out OTHER --sites 1 --random-seed 0     # development

Sites. Site A is the reference. Sites B, C, … are drawn together (`simulate.site`, from
--random-seed), so that each effect has either sign at half of them. Each has people of its own, who
were scanned there and at A: the K-th site's come from the seed --random-seed + K. A difference
between sites is therefore never one of the same few people, and tests over sites speak of both.
Tissue is uncorrelated with age among them, so that slopes over age are of ageing.
Tables use the seeds from 100 on. Choices were made on the one site of --random-seed 0, which is in
no table.

Folds. In each, methods learn from both scans of the other people of the site; the scans at the site
of the people left out are harmonized. They are compared, shell by shell, with what site A measures
of the same head in the same pose, with the noise of one scan ("scan") and without ("truth"). Rows:

    none              as measured                   SH fit      series of degree 4, not harmonized
    MPPCA, smoothing  noise or detail taken away, not harmonized
    harmonize_…     trained
    rescan            the scan at A, beside its own truth: what a second scan there would leave
    truth             the truth itself: beside "scan", what the scan's noise leaves

METHOD@groups: unpaired. It learns from the same scans at the site, and from other people at A, as
many, scanned nowhere else; the two groups alternate in age. @share=X: of all but a share X of the
people (one at least, unless 0) it is hidden who is who, so that no pairs are made, while the same
people stay at both sites; @share=X:SEED draws others. @blocks=N: so many residual blocks.

Measures. NMSE = Σ (y − ŷ)² / Σ y² of S/S0, and of FA and MD of the shell, over the voxels
whose largest share is WM, or GM; with two shells or more also of NDI and ODI, by the network that
ships, in every fourth of those voxels. Means of FA and MD over the same voxels. SSIM, mean over
volumes, and sharpness are of S/S0 against the truth. Direction: median error in degrees where the
truth's FA is above 0.4; turn: the same against the scan as measured. Lesion: contrast of MD
relative to the truth's. Times are of the CPU, without registrations that were kept.

DIR keeps phantoms, registrations, trained models and a file of rows for each site, fold and method:
what is there is not done again, so that a run can be interrupted, and several processes can share
the work, each with its --only-sites, --only-folds or --methods. Nothing there is tied to the code
that made it, except that registrations are found by what they are made from: after a change of a
harmonizer remove its models, states (*.ckpt) and rows.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from travelling import PLAIN, PhantomScan, compare, simulate

from bidsapp import __version__, kinds, methods
from bidsapp.checkpoint import load, pack
from bidsapp.errors import QSphereError
from bidsapp.harmonization import harmonizer, pairs
from bidsapp.options import PhantomOptions
from bidsapp.phantom import recruit
from bidsapp.registration import template
from bidsapp.simulate import site

DESIGN = ("sites", "participants", "folds", "shells", "directions", "voxel_size", "max_steps",
          "sloppy", "random_seed")
TABLE_SEED = 100

MAX_STEPS = {"harmonize_shresnet": 600, "harmonize_hybrid": 1000, "harmonize_golkov": 1000}
"""Most steps of each stage of a training, unless --max-steps says otherwise; others train as
their recipe says."""

METHODS = ["harmonize_mica", "harmonize_rish", "harmonize_rish@groups", "harmonize_golkov",
           "harmonize_hybrid", "harmonize_shresnet", "harmonize_cyclic", "harmonize_cyclic@groups"]


class Site:
    """One draw of a site, its people and their scans, and where the work on them is kept.

    travelling, others: labels of the people scanned at the site and at the reference, and of those
    scanned at the reference alone. table: the rows of a `Cohort`, one for each scan. scans: from
    (participant, site) to PhantomScan.
    """

    def __init__(self, arguments, number):
        drawn = site.draw_sites(
            phantom_options(arguments, arguments.random_seed, arguments.sites + 1))
        self.reference, self.name = drawn[0].name, drawn[number + 1].name
        self.folder = arguments.out / self.name
        self.arguments = arguments
        self.seed = arguments.random_seed + number
        learned = arguments.participants * (arguments.folds - 1) // arguments.folds
        options = phantom_options(arguments, self.seed, 2, arguments.participants + learned)
        people = sorted(recruit(options), key=lambda p: p.age)
        alone = ((np.arange(learned) + 0.5) * len(people) / learned).astype(int)
        people = [*uncorrelated_with_age([p for i, p in enumerate(people) if i not in alone]),
                  *(replace(people[i], sites=(0,)) for i in alone)]
        self.travelling = [p.label for p in people if len(p.sites) == 2]
        self.others = [p.label for p in people if len(p.sites) == 1]
        self.ages = {p.label: p.age for p in people}
        pair = [drawn[0], drawn[number + 1]]
        self.scans = self._scans(options, pair, people)
        self.table = pd.DataFrame([
            {"participant": p.label, "batch": pair[i].name, "run": f"{p.label}{pair[i].name}",
             "snr_b0": np.nan, "age": p.age} for p in people for i in p.sites])
        runs = {f"{p}{s}": scan.dwi for (p, s), scan in self.scans.items()}
        self.states = self.folder / "states"
        self.cohort = kinds.Cohort(
            self.table, covariates=("age",), reference_batch=self.reference,
            acquisitions={run: dwi.acquisition for run, dwi in runs.items()},
            load=runs.__getitem__)
        self.states.mkdir(parents=True, exist_ok=True)

    def _scans(self, options, pair, people):
        kept = self.folder / "scans"
        if not kept.exists():
            began = time.process_time()
            _, _, scans = simulate(options, pair, people)
            folder = part_of(kept)
            folder.mkdir(parents=True)
            for (who, where), scan in scans.items():
                scan.save(folder / f"{who}_{where}.npz")
            drawn = {k: v for k, v in asdict(pair[1]).items() if k != "fields"}
            (self.folder / "site.json").write_text(json.dumps(drawn))
            if not kept.exists():  # another process may have been faster
                folder.rename(kept)
            log(f"{self.name}: {len(scans)} scans in {time.process_time() - began:.0f} s")
        return {tuple(path.stem.split("_")): PhantomScan.load(path)
                for path in sorted(kept.glob("*.npz"))}

    def tested(self, fold):
        """Labels of the people whom a fold leaves out."""
        return self.travelling[fold::self.arguments.folds]

    def pairs(self):
        return pairs.pair_runs(self.table, self.reference)[self.name]


def uncorrelated_with_age(people):
    """Take the slope over age out of people's tissue (`Participant.tissue`): what MD and FA then do
    over age is ageing alone, which few people would otherwise hide by chance."""
    ages, tissue = np.array([p.age for p in people]), np.array([p.tissue for p in people])
    ages -= ages.mean()
    tissue -= np.outer(ages, ages @ tissue / (ages @ ages))
    return [replace(p, tissue=tuple(z.tolist())) for p, z in zip(people, tissue, strict=True)]


def phantom_options(arguments, seed, sites, participants=1):
    return PhantomOptions(
        Path(), participants=participants, sites=sites, shells=tuple(arguments.shells),
        directions=arguments.directions, voxel_size=arguments.voxel_size, effect_directions=0,
        random_seed=seed)


def variant(label, own, tested):
    """The method of a label, and the table and the settings of its training.

    own : Site
    tested : labels of people who must not be learned from
    """
    name, _, option = label.partition("@")
    key, _, value = option.partition("=")
    changed = {"training.network.blocks": int(value)} if key == "blocks" else {}
    method = methods.get(name, context=kinds.MethodContext(
        sloppy=own.arguments.sloppy, settings={name: changed}))
    table = own.table[~own.table["participant"].isin([*tested, *own.others])]
    settings = kinds.TrainingSettings(
        max_steps=own.arguments.max_steps or MAX_STEPS.get(name), seed=own.seed,
        states=own.states)
    if key == "share":
        part, _, draw = value.partition(":")
        people = list(dict.fromkeys(table["participant"]))
        mixed = np.random.default_rng(int(draw or own.seed)).permutation(people)
        known = mixed[:max(1, round(float(part) * len(mixed))) if float(part) else 0]
        hidden = ~table["participant"].isin(known) & (table["batch"] == own.reference)
        table = table.assign(participant=table["participant"] + hidden.map({True: "x", False: ""}))
    elif key == "groups":
        table = pd.concat([table[table["batch"] == own.name],
                           own.table[own.table["participant"].isin(own.others)]])
    elif key not in ("", "blocks"):
        raise SystemExit(f"{label}: unknown is @{key}; known are @blocks=, @share=, @groups")
    return method, table, settings


def train(own, fold, label, keep=True):
    """The trained method of a label, its model, and the seconds of CPU time of its training; kept
    in the folder of the site, from where it is read if it is there."""
    method, table, settings = variant(label, own, own.tested(fold))
    kept, seconds = own.folder / "models" / f"fold{fold}_{label}", "seconds.json"
    if not kept.exists() or not keep:
        began = time.process_time()
        (model,) = method.fit(replace(own.cohort, statistics=table),
                              settings).checkpoints.values()
        spent = time.process_time() - began
        log(f"{own.name}, fold {fold}, {label}: steps {model.card.training.get('steps')}, "
            f"{spent:.0f} s")
        if not keep:
            return method, model, spent
        part = part_of(kept)
        part.mkdir(parents=True)
        for name, data in {**pack(model), seconds: json.dumps(spent).encode()}.items():
            (part / name).write_bytes(data)
        part.rename(kept)
    return method, load(kept, method.name), json.loads((kept / seconds).read_text())


def measure(own, fold, label):
    """Rows of a label for the people whom a fold leaves out."""
    where, seconds, rows = own.name, 0.0, []
    if label == "rescan":
        where, harmonize = own.reference, PLAIN["none"]
    elif label in PLAIN:
        harmonize = PLAIN[label]
    elif label != "truth":
        method, model, seconds = train(own, fold, label)
        harmonize = lambda dwi: method.harmonize(dwi, model, own.name, "cpu").signal  # noqa: E731
    for who in own.tested(fold):
        scan, began = own.scans[who, where], time.process_time()
        signal = scan.truth if label == "truth" else harmonize(scan.dwi)
        spent = time.process_time() - began
        rows += [{"site": own.name, "fold": fold, "method": label, "participant": who,
                  "age": own.ages[who], "train": seconds, "apply": spent, **row}
                 for row in compare(signal, scan)]
    return pd.DataFrame(rows)


def prepare(own):
    """Register what harmonizers will ask for: pairs, and people with RISH's templates."""
    for pair in own.pairs():
        began = time.process_time()
        source, target = (own.scans[pair.participant, s].dwi for s in (own.name, own.reference))
        pairs.register(source, target, work_dir=own.states)
        log(f"{own.name}: {pair.source} registered in {time.process_time() - began:.0f} s")
    for label in own.arguments.methods:
        for fold in folds(own.arguments) if label.startswith("harmonize_rish") else ():
            method, model, _ = train(own, fold, label, keep=False)
            for who in own.tested(fold):
                method.harmonize(own.scans[who, own.name].dwi, model, own.name, "cpu")


def keep_registrations(folder):
    """A patch under which registrations with a template are kept in the folder: they depend on
    two images of FA alone, and take nearly all of the time of RISH."""
    register = template.register

    def kept(fixed, moving, work_dir=None):
        digest = hashlib.blake2b(__version__.encode(), digest_size=16)
        for image in (fixed, moving):
            for values in (image.values, image.affine):
                digest.update(repr((values.shape, values.dtype)).encode())
                digest.update(np.ascontiguousarray(values).data)
        path = folder / f"template-{digest.hexdigest()}.npy"
        if not path.exists():
            part = part_of(path)
            with part.open("wb") as file:
                np.save(file, register(fixed, moving, work_dir))
            part.rename(path)
        return np.load(path)

    return mock.patch.object(template, "register", kept)


def part_of(path):
    """Name a temporary path to write to before renaming, so that a file is complete or absent."""
    return path.with_name(f"{path.name}.{time.time_ns()}.part")


def folds(arguments):
    return arguments.only_folds or range(arguments.folds)


def log(text):
    print(text, file=sys.stderr, flush=True)


def run(arguments):
    """Leave a file of rows for each site, fold and method."""
    for number in range(arguments.sites):
        name = site.site_name(number + 1)
        wanted = {(fold, label): arguments.out / name / f"fold{fold}_{label}.csv"
                  for fold in folds(arguments)
                  for label in [*PLAIN, "truth", "rescan", *arguments.methods]}
        missing = {k: path for k, path in wanted.items() if not path.exists()}
        if name not in (arguments.only_sites or [name]) or not (missing or arguments.prepare):
            continue
        own = Site(arguments, number)
        with keep_registrations(own.states):
            if arguments.prepare:
                prepare(own)
            for (fold, label), path in missing.items():
                if path.exists() or (arguments.prepare and label in arguments.methods):
                    continue
                try:
                    rows = measure(own, fold, label)
                except QSphereError as error:
                    log(f"{own.name}, fold {fold}, {label}: {error}")
                    continue
                part = part_of(path)
                rows.to_csv(part, index=False)
                part.rename(path)


def parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=6, help="draws, beside the reference")
    parser.add_argument("--participants", type=int, default=8, help="scanned at each site")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--only-sites", nargs="+", help="of siteB, siteC, …")
    parser.add_argument("--only-folds", type=int, nargs="+", help="of 0, 1, …")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--shells", type=float, nargs="+", default=[1200.0])
    parser.add_argument("--directions", type=int, default=30)
    parser.add_argument("--voxel-size", type=float, default=4.0, help="mm")
    parser.add_argument("--max-steps", type=int, help="of each stage of every training")
    parser.add_argument("--sloppy", action="store_true", help="trainings far too short, for a try")
    parser.add_argument("--prepare", action="store_true", help="train nothing")
    parser.add_argument("--random-seed", type=int, default=TABLE_SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main(argv=None):
    arguments = parser().parse_args(argv)
    if not 2 <= arguments.folds <= arguments.participants:
        parser().error("--folds must be between 2 and the number of participants")
    unknown = [m for m in arguments.methods if not isinstance(
        methods.get(m.partition("@")[0]), harmonizer.Harmonizer)]
    if unknown:
        parser().error(f"no harmonizers of signals: {', '.join(unknown)}")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    design = json.dumps({k: getattr(arguments, k) for k in DESIGN})
    if not (kept := arguments.out / "design.json").exists():
        kept.write_text(design)
    elif kept.read_text() != design:
        parser().error(f"{kept} is of another design; choose another --out")
    run(arguments)


if __name__ == "__main__":
    main()
