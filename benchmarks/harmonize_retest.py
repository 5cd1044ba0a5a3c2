"""Harmonizers on a real head: one person, one scanner, two versions of its software.

    QSPHERE_TEST_DATA=DATA python benchmarks/harmonize_retest.py    # its canon_retest

12 directions at b 1500, 3 mm, the slices in several angulations; raw runs, of one direction of
phase encoding. Versions are the batches, as the program tells them apart. Angulations take the
place of participants: each in turn is left out, harmonizers learn from the others and map the new
version's run of it, which is compared with the old version's, brought together by one rigid
registration (of what was measured) for all methods; --deformable: as pairs are in training. Rows:

    none                  as measured
    harmonize_…           trained without the angulation
    within, other slices  old version against itself, in another angulation: the floor
    across, other slices  new version against old, in another angulation

The last two are alike in that their grids lie at an angle. Compared are S/S0 along the target's
directions, and FA and MD of its tensor, both scans as SH series of degree 2 without a penalty,
where S/S0 is at most 1 in both as measured: of the few voxels beyond, the b0 signal is lost, and
their squares outweigh all others. NMSE = Σ (y − ŷ)² / Σ y²; mean difference: of the means over
voxels, relative to the target's.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import table

from bidsapp import kinds, methods, sh
from bidsapp.anatomy import tissue
from bidsapp.bids import find
from bidsapp.cli import parse
from bidsapp.errors import Refusal
from bidsapp.evaluate import agreement
from bidsapp.harmonization import harmonizer, pairs
from bidsapp.recipe.steps import load_run

OLD, NEW, ENCODING = "v60d1", "v61", "PA"
"""Sessions, the reference batch's first, and the direction of phase encoding."""

DEGREE = 2
"""Highest degree of the series, which is all that 12 directions determine."""

TISSUES = {"WM": tissue.WHITE, "GM": tissue.GREY}
MAPS = {"signal": "S/S0", "fa": "FA", "md": "MD"}
MEASURES = "NMSE", "mean difference"
KINDS = "harmonized", "within", "across"

CAVEAT = """\
One person: what was learned holds for this head, which was in every training, and says nothing of
others; four angulations are no sample, and there are no p-values. The versions were scanned a year
apart: what differs holds repositioning, age, shim and the scanner's drift beside the software, and
the registration's errors; runs are raw (no correction of motion or distortion)."""


def read(folder):
    """(session, angulation) → run and Dwi, of the angulations that both sessions have."""
    with tempfile.TemporaryDirectory() as out:
        found = find.find_runs(parse([str(folder), out, "participant"]))
    runs = {(r.session, r.entities["acq"]): r for label in found.participants
            for r in found.runs[label] if r.entities["dir"] == ENCODING}
    both = sorted(a for s, a in runs if s == NEW and (OLD, a) in runs)
    return both, {(s, a): (runs[s, a], load_run(runs[s, a])[0]) for s in (OLD, NEW) for a in both}


def unpenalised(dwi):
    """A Dwi whose penalised series, which `pairs` carries, is the plain one of `dwi`: the penalty
    would lower FA."""
    signal, (shell,) = dwi.signal.copy("K"), dwi.acquisition.shells
    directions = dwi.acquisition.bvecs[shell.indices]
    to = (np.linalg.pinv(sh.smooth_fit(DEGREE, directions, pairs.SMOOTHING))
          @ sh.smooth_fit(DEGREE, directions))
    signal[:, shell.indices] = dwi.signal[:, shell.indices] @ to.T
    return replace(dwi, signal=signal)


def compared(harmonized, source, target, deformable):
    """Table of measures. harmonized: {method: Dwi}, on the grid of the source, which is aligned."""
    aligned = pairs.align(source, target, l_max=DEGREE, deformable=deformable)
    (shell,) = target.acquisition.shells
    acquisition = target.acquisition[shell.indices]
    basis = sh.basis(DEGREE, acquisition.bvecs)

    def maps(c):
        signal = (c @ basis.T).astype(np.float32)
        return {"signal": signal, **agreement.shell_maps(signal, acquisition)}

    def carried(dwi):
        (image,) = pairs.resample(unpenalised(dwi), DEGREE, aligned)
        return image[1:-1, 1:-1, 1:-1][aligned.where]

    wanted = maps(aligned.target[:, shell.indices] @ sh.smooth_fit(DEGREE, acquisition.bvecs).T)
    labels, rows = aligned.labels[aligned.where], []
    seen = ((aligned.target[:, shell.indices] <= 1).all(1)
            & (carried(source) @ basis.T <= 1).all(1))
    for method, dwi in harmonized.items():
        found = maps(carried(dwi))
        for (name, label), key in ((t, k) for t in TISSUES.items() for k in MAPS):
            one, other = (m[key][seen & (labels == label)] for m in (found, wanted))
            values = agreement.nmse(one, other), one.mean(dtype=float) / other.mean(dtype=float) - 1
            rows += [{"method": method, "measure": measure, "tissue": name, "map": key,
                      "value": 100 * float(value), "beyond": 1 - seen[labels == label].mean()}
                     for measure, value in zip(MEASURES, values, strict=True)]
    return pd.DataFrame(rows)


def learned(scans, angulations, names):
    """{method: function of a Dwi of the new version}."""
    runs = {(s, a): scans[s, a][0] for s in (OLD, NEW) for a in angulations}
    statistics = pd.DataFrame([{"participant": a, "session": s, "run": r.name, "batch": r.batch}
                          for (s, a), r in runs.items()])
    dwis = {runs[k].name: scans[k][1] for k in runs}
    reference, batch = (runs[s, angulations[0]].batch for s in (OLD, NEW))
    cohort = kinds.Cohort(
        statistics, reference_batch=reference, load=dwis.__getitem__,
        acquisitions={name: dwi.acquisition for name, dwi in dwis.items()})

    def trained(method):
        (checkpoint,) = method.fit(cohort, kinds.TrainingSettings()).checkpoints.values()
        return lambda dwi: replace(
            dwi, signal=method.harmonize(dwi, checkpoint, batch, "cpu").signal)

    return {name: trained(methods.get(name)) for name in names}


def evaluate(arguments, folder):
    """Long table, and why methods were not trained."""
    angulations, scans = read(arguments.data)
    names, refused, tables = [], [], []
    for name in arguments.methods:
        try:
            methods.get(name).check(scans[OLD, angulations[0]][1].acquisition)
            names.append(name)
        except Refusal as refusal:
            refused.append(str(refusal))

    def rows(kind, at):
        if kind == "harmonized":
            source = scans[NEW, at][1]
            ways = learned(scans, [a for a in angulations if a != at], names)
            found = {"none": source, **{name: way(source) for name, way in ways.items()}}
        else:
            other = angulations[angulations.index(at) - 1]
            source = scans[OLD if kind == "within" else NEW, other][1]
            found = {f"{kind}, other slices": source}
        return compared(found, source, scans[OLD, at][1], arguments.deformable)

    for kind, at in product(arguments.kinds, arguments.angulations or angulations):
        file = folder / f"{kind}_{at}.csv"
        if not file.exists():
            rows(kind, at).to_csv(file, index=False)
        tables.append(pd.read_csv(file).assign(angulation=at))
    return pd.concat(tables), refused


def lines(rows):
    """Name of the first column, and rows of cells: the mean over angulations and each."""
    angulations = sorted(rows["angulation"].unique())
    columns = [(k, t) for k in MAPS for t in TISSUES]
    found = []
    values = rows.set_index(["measure", "method", "map", "tissue", "angulation"])
    values = values["value"].sort_index()
    for measure, sign in zip(MEASURES, ("", "+"), strict=True):
        for method in rows["method"].unique():
            cells = (values[measure, method, k, t].reindex(angulations) for k, t in columns)
            found.append([f"{measure}: {method}", *(
                f"{v.mean():{sign}.1f} ({', '.join(f'{x:{sign}.1f}' for x in v)})"
                for v in cells)])
    return f"%: mean ({', '.join(angulations)})", found


def left_out(rows):
    beyond = rows.groupby("tissue")["beyond"].max()
    return ("Left out, at most: "
            + ", ".join(f"{v:.1%} of {t}" for t, v in beyond.items()) + ".")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trained = [n for n in methods.names("harmonize_")
               if isinstance(methods.get(n), harmonizer.Harmonizer)]
    shared = os.environ.get("QSPHERE_TEST_DATA",
                            Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--data", type=Path, default=Path(shared) / "canon_retest")
    parser.add_argument("--out", type=Path, help="keeps what is done, and goes on from it")
    parser.add_argument("--methods", nargs="*", choices=trained, default=trained)
    parser.add_argument("--angulations", nargs="*", help="to leave out in turn; default: all")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--deformable", action="store_true", help="SyN, too: some minutes a pair")
    table.add_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows, refused = evaluate(arguments, folder)
    first, cells = lines(rows)
    table.show("retest", cells, arguments.csv, first=first)
    print("", left_out(rows), CAVEAT, *(f"Not trained: {why}" for why in refused), sep="\n\n")


if __name__ == "__main__":
    main()
