"""Every harmonizer on a travelling phantom, on people it has not seen, in tables and a figure.

    python benchmarks/harmonization.py                       # Koppers et al. 2018: 30 × b 1200
    python benchmarks/harmonization.py --shells 1000 2000 3000         # Sadegheih et al. 2023
    python benchmarks/harmonization.py --methods harmonize_shresnet@blocks={1,2,3,6}
    python benchmarks/harmonization.py --methods harmonize_cyclic@share={0,0.1,0.5,1}
    python benchmarks/harmonization.py --methods harmonize_{rish,cyclic}@groups
    python benchmarks/harmonization.py --participants 4 --folds 2 --voxel-size 6 --sloppy  # a try

Two sites. In each fold methods learn from both scans of the other people; the scans of the people
left out, at site B, are harmonized and compared, shell by shell, with what site A measures of the
same head in the same pose, with the noise of one scan ("scan") and without ("truth"). Rows:

    none              as measured                   SH fit      degrees up to 4, not harmonized
    MPPCA, smoothing  noise or detail taken away, not harmonized
    harmonize_…       trained; ComBat on the region means of everybody
    noise             the truth itself: beside "scan", what its noise leaves

METHOD@blocks=N: with so many residual blocks. @share=X: of all but a share X of the people (one at
least, unless 0) it is hidden who is who, so that no pairs are made; @share=X:SEED draws others.
@groups: each learns from one half of the people at site A and the other half at site B, in order of
age taken A, B, B, A: taken by turns, those of A would be the younger.

NMSE = Σ (y − ŷ)² / Σ y² of S/S0, FA and MD over the voxels whose largest share is WM, or GM, mean
over people; with two shells or more also of NDI and ODI, by the network that ships, in every fourth
of those voxels. p: Wilcoxon's signed ranks over people. SSIM, mean over volumes, and sharpness are
of S/S0 against the truth. Direction: median error in degrees where the truth's FA is above 0.4;
turn: the same against the scan as measured. Lesion: contrast of MD relative to the truth's. ICC,
CoV, AUC and age are of mean FA and MD in WM and GM: harmonized scans of B beside scans of A; ICC
and CoV are means over the four; age: slope of MD in WM, relative to that of the truth there.

What a fold gave is kept in OUT and not computed again, nor are registrations, so that processes may
share the work: give each its --methods or --only-folds, and make the tables from all of it by
`--methods` alone.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harmonization_tables import figure, text
from travelling import PLAIN, compared, simulate

from bidsapp import methods
from bidsapp.errors import QSphereError
from bidsapp.methods import harmonizer

DESIGN = "participants", "folds", "shells", "directions", "voxel_size", "random_seed"


def variant(label, table, seed):
    """The method of a label, and in what the study that it learns from differs."""
    name, _, option = label.partition("@")
    key, _, value = option.partition("=")
    method = methods.get(name)
    people = list(dict.fromkeys(table["participant"]))
    sites = list(dict.fromkeys(table["batch"]))
    if key == "blocks":
        return method, {"statistics": table, "blocks": int(value)}
    if key == "share":
        part, _, draw = value.partition(":")
        mixed = np.random.default_rng(int(draw or seed)).permutation(people)
        known = mixed[:max(1, round(float(part) * len(mixed))) if float(part) else 0]
        hidden = ~table["participant"].isin(known) & (table["batch"] == sites[0])
        table = table.assign(participant=table["participant"] + hidden.map({True: "x", False: ""}))
    elif key == "groups":
        by_age = table.drop_duplicates("participant").sort_values("age")["participant"].tolist()
        place = {p: sites[(i + 1) // 2 % 2] for i, p in enumerate(by_age)}
        table = table[table["batch"] == table["participant"].map(place)]
    elif key:
        raise SystemExit(f"{label}: unknown is @{key}; known are @blocks=, @share=, @groups")
    return method, {"statistics": table}


def apart(table, made, sites):
    """Percent by which means over the people of the first site lie above those of the other's,
    noise-free and at the same scanner: what no method can tell from the site that compares groups.
    """
    rows = pd.DataFrame([{"site": row.batch, **found} for row in table.itertuples()
                         for person in [made[row.participant, row.batch]]
                         for found in compared(person.truth, person)])
    rows = rows[rows["measure"].isin(["mean fa", "mean md"]) & (rows["against"] == "truth")]
    means = rows.groupby(["measure", "tissue", "site"])["value"].mean().unstack()
    return (100 * (means[sites[0]] / means[sites[1]] - 1)).round(1)


def evaluate(arguments):
    """Leaves a table for each fold and method in OUT."""
    wanted = {(fold, label): arguments.out / f"fold{fold}_{label}.csv"
              for fold in arguments.only_folds or range(arguments.folds)
              for label in [*PLAIN, "noise", "home", *arguments.methods]}
    wanted = {k: path for k, path in wanted.items() if not path.exists()}
    if not wanted:
        return
    sites, people, made = simulate(arguments)
    reference, other = sites
    labels = [p.label for p in people]
    print(f"{len(made)} scans, {len(made[labels[0], other].dwi.signal)} voxels in the first",
          file=sys.stderr)
    table = pd.DataFrame([{"participant": p.label, "batch": s, "run": f"{p.label}{s}",
                           "snr_b0": np.nan, "age": p.age, "sex": p.sex}
                          for p in people for s in sites])
    dwis = {f"{p}{s}": made[p, s].dwi for p, s in made}
    study = methods.Study(
        table, (), ("age", "sex"), reference, {r: d.acquisition for r, d in dwis.items()},
        dwis.__getitem__, arguments.max_steps, arguments.random_seed,
        states=arguments.out / "states")
    ages = {p.label: p.age for p in people}
    for (fold, label), path in wanted.items():
        if path.exists():  # by another process, in the meantime
            continue
        tested = labels[fold::arguments.folds]
        own, started, trained = made, time.monotonic(), 0.0
        where = reference if label == "home" else other
        if label in PLAIN:
            way = PLAIN[label]
        elif label == "noise":
            way = None
        elif label == "home":
            way = PLAIN["none"]
        else:
            try:
                method, options = variant(label, table[~table["participant"].isin(tested)],
                                          arguments.random_seed)
                method.sloppy = arguments.sloppy
                if label.endswith("@groups"):
                    print(f"fold {fold}, people of {reference} above those of {other}, %:\n"
                          f"{apart(options['statistics'], made, sites)}", file=sys.stderr)
                (model,) = method.fit(replace(study, **options)).checkpoints.values()
            except QSphereError as error:
                print(f"{label}: {error}", file=sys.stderr)
                continue
            way = lambda dwi, m=method, c=model: m.harmonize(dwi, c, other, "cpu").signal  # noqa: E731
            trained = time.monotonic() - started
            print(f"fold {fold}, {label}: steps {model.card.training.get('steps')}, "
                  f"{trained:.0f} s", file=sys.stderr, flush=True)
        rows = []
        for who in tested:
            person, began = own[who, where], time.monotonic()
            signal = way(person.dwi) if way else person.truth
            spent = time.monotonic() - began
            rows += [{"method": label, "participant": who, "age": ages[who], "train": trained,
                      "apply": spent, **row} for row in compared(signal, person)]
            if label == "home":  # the truth there: what is beside the truth here
                rows += [{**rows[-1], "method": "home truth", **row}
                         for row in compared(person.truth, person)]
        pd.DataFrame(rows).to_csv(path, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [n for n in methods.names("harmonize_")
               if isinstance(methods.get(n), harmonizer.Harmonizer)]
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only-folds", type=int, nargs="+", help="of 0, 1, …")
    parser.add_argument("--methods", nargs="*", default=trained)
    parser.add_argument("--against", nargs="*", default=["none", "harmonize_golkov"],
                        help="what p is given against")
    parser.add_argument("--shells", type=float, nargs="+", default=[1200.0])
    parser.add_argument("--directions", type=int, default=30)
    parser.add_argument("--voxel-size", type=float, default=3.0, help="mm")
    parser.add_argument("--max-steps", type=int, help="of each stage of a training")
    parser.add_argument("--sloppy", action="store_true", help="trainings far too short, for a try")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("harmonization"))
    arguments = parser.parse_args()
    if not 2 <= arguments.folds <= arguments.participants:
        parser.error("--folds must be between 2 and the number of participants")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    design = json.dumps({k: getattr(arguments, k) for k in DESIGN})
    if not (kept := arguments.out / "design.json").exists():
        kept.write_text(design)
    elif kept.read_text() != design:
        parser.error(f"{kept} is of another design; choose another --out")
    evaluate(arguments)
    found = pd.concat([pd.read_csv(p) for p in sorted(arguments.out.glob("fold*.csv"))])
    (arguments.out / "table.md").write_text(text(found, arguments.against))
    figure(found, arguments.out / "nmse.svg")
    print((arguments.out / "table.md").read_text())


if __name__ == "__main__":
    main()
