"""Harmonizers on a real head: one person, one scanner, two versions of its software.

    QSPHERE_TEST_DATA=DATA python benchmarks/harmonize_retest.py    # DATA/canon_retest
    python benchmarks/harmonize_retest.py --data FOLDER --angulations ax20 --methods harmonize_rish

12 directions at b 1500, 3 mm, with the slices in several angulations; raw runs, of one direction of
phase encoding. Versions are the batches, as the program tells them apart. Angulations take the
place of participants: each in turn is left out, harmonizers learn from the others, and map the run
of the new version in the angulation left out, which is compared with the old version's, brought
together as pairs are in training, by one registration (of what was measured) for all methods. Rows:

    none                  as measured
    harmonize_…           trained without the angulation
    none, other slices    new version against old, in different angulations
    within, other slices  old version against itself, in different angulations: the floor

The last two cross grids that lie 20° or more apart; only they are alike in that. Compared are S/S0
along the target's directions, and FA and MD of its tensor; both scans as SH series of degree 2,
without a penalty. NMSE = Σ (y − ŷ)² / Σ y²; mean difference: of the means over voxels, relative to
the target's. Cells: the mean over the angulations, and each of them.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bidsapp import methods, sh
from bidsapp.bids import find
from bidsapp.cli import parse
from bidsapp.errors import QSphereError
from bidsapp.evaluate import agreement
from bidsapp.methods import harmonizer
from bidsapp.preprocess import pairs, tissue
from bidsapp.process import dwi_of

OLD, NEW = "v60d1", "v61"
"""Sessions; the first is of the reference batch."""

ENCODING = "PA"
DEGREE = 2
"""Of the series: 12 directions determine no more."""

TISSUES = {"WM": tissue.WHITE, "GM": tissue.GREY}
MEASURES = "NMSE", "mean difference"
MAPS = "signal", "fa", "md"

CAVEAT = """\
One person: what was learned holds for this head, which was in every training, and says nothing of
others; four angulations are no sample, and there are no p-values. The versions were scanned a year
apart: what differs holds repositioning, age, shim and the scanner's drift beside the software, and
the registration's errors; runs are raw (no correction of motion or distortion)."""


def read(folder):
    """(session, angulation) → run and Dwi, of the angulations that both sessions have."""
    with tempfile.TemporaryDirectory() as out:
        found = find.find(parse([str(folder), out, "participant"]))
    runs = {(r.session, r.entities["acq"]): r for label in found.participants
            for r in found.runs[label] if r.entities["dir"] == ENCODING}
    both = sorted(a for s, a in runs if s == NEW and (OLD, a) in runs)
    return both, {(s, a): (runs[s, a], dwi_of(runs[s, a])[0]) for s in (OLD, NEW) for a in both}


def unpenalised(dwi):
    """A Dwi whose penalised series, which `pairs` carries, is the plain one of `dwi`: the penalty
    would lower FA."""
    signal, (shell,) = dwi.signal.copy("K"), dwi.acquisition.shells
    directions = dwi.acquisition.bvecs[shell.indices]
    to = (np.linalg.pinv(sh.smooth_fit(DEGREE, directions, pairs.SMOOTHING))
          @ sh.smooth_fit(DEGREE, directions))
    signal[:, shell.indices] = dwi.signal[:, shell.indices] @ to.T
    return replace(dwi, signal=signal)


def compared(harmonized, source, target):
    """Rows of method, measure, tissue, map, value. harmonized: {method: Dwi}, each on the grid of
    the source, which is aligned."""
    aligned = pairs.align(source, target, l_max=DEGREE)
    (shell,) = target.acquisition.shells
    acquisition = target.acquisition[shell.indices]
    basis = sh.basis(DEGREE, acquisition.bvecs)

    def maps(c):
        signal = (c @ basis.T).astype(np.float32)
        return {"signal": signal, **agreement.shell_maps(signal, acquisition)}

    wanted = maps(aligned.target[:, shell.indices] @ sh.smooth_fit(DEGREE, acquisition.bvecs).T)
    labels, rows = aligned.labels[aligned.where], []
    for method, dwi in harmonized.items():
        (image,) = pairs.carried(unpenalised(dwi), DEGREE, aligned.index, aligned.turn,
                                 aligned.where)
        found = maps(image[1:-1, 1:-1, 1:-1][aligned.where])
        for (name, label), key in ((t, k) for t in TISSUES.items() for k in MAPS):
            one, other = (m[key][labels == label] for m in (found, wanted))
            values = agreement.nmse(one, other), one.mean(dtype=float) / other.mean(dtype=float) - 1
            rows += [{"method": method, "measure": measure, "tissue": name, "map": key,
                      "value": 100 * float(value)}
                     for measure, value in zip(MEASURES, values, strict=True)]
    return rows


def learned(scans, angulations, names, seed):
    """{method: function of a Dwi of the new version}, and {method: why it was not trained}."""
    runs = {(s, a): scans[s, a][0] for s in (OLD, NEW) for a in angulations}
    table = pd.DataFrame([{"participant": a, "session": s, "run": r.name, "batch": r.batch,
                           "snr_b0": np.nan} for (s, a), r in runs.items()])
    dwis = {runs[k].name: scans[k][1] for k in runs}
    study = methods.Study(
        table, (), (), runs[OLD, angulations[0]].batch,
        {name: dwi.acquisition for name, dwi in dwis.items()}, dwis.__getitem__, seed=seed,
        voxel_sizes={name: size(dwi) for name, dwi in dwis.items()})
    batch, ways, refused = runs[NEW, angulations[0]].batch, {}, {}

    def way(method, checkpoint):
        def harmonize(dwi):
            harmonizer.check(checkpoint.card, dwi.acquisition, size(dwi), batch)
            return replace(dwi, signal=method.harmonize(dwi, checkpoint, batch, "cpu").signal)
        return harmonize

    for name in names:
        method, start = methods.get(name), time.monotonic()
        try:
            (checkpoint,) = method.fit(study).checkpoints.values()
        except QSphereError as error:
            refused[name] = str(error)
            continue
        ways[name] = way(method, checkpoint)
        progress(f"{name} trained in {time.monotonic() - start:.0f} s: {checkpoint.card.metrics}")
    return ways, refused


def size(dwi):
    return tuple(np.linalg.norm(dwi.affine[:3, :3], axis=0))


def progress(text):
    print(text, file=sys.stderr, flush=True)


def evaluate(arguments):
    """Long table, and why methods were not trained."""
    angulations, scans = read(arguments.data)
    rows, refused = [], {}
    for left_out in arguments.angulations or angulations:
        others = [a for a in angulations if a != left_out]
        ways, refused = learned(scans, others, arguments.methods, arguments.random_seed)
        source, target = scans[NEW, left_out][1], scans[OLD, left_out][1]
        found = compared({"none": source, **{n: way(source) for n, way in ways.items()}},
                         source, target)
        for name, session in (("none, other slices", NEW), ("within, other slices", OLD)):
            for other in others if arguments.floor else ():
                dwi = scans[session, other][1]
                found += compared({name: dwi}, dwi, target)
        rows += [{"angulation": left_out, **row} for row in found]
        progress(f"{left_out}: done")
    return pd.DataFrame(rows), refused


def text(rows):
    """The markdown table: cells are the mean over angulations and each."""
    angulations = sorted(rows["angulation"].unique())
    columns = [(k, t) for k in MAPS for t in TISSUES]
    names = {"signal": "S/S0", "fa": "FA", "md": "MD"}
    lines = [[f"%; mean ({', '.join(angulations)})", *(f"{names[k]} {t}" for k, t in columns)],
             ["---"] * (len(columns) + 1)]
    values = rows.groupby(["measure", "method", "map", "tissue", "angulation"])["value"].mean()
    for measure in MEASURES:
        sign = "" if measure == MEASURES[0] else "+"
        for method in rows["method"].unique():
            cells = (values[measure, method, k, t] for k, t in columns)
            lines.append([f"{measure}: {method}", *(
                f"{v.mean():{sign}.2f} ({', '.join(f'{x:{sign}.2f}' for x in v[angulations])})"
                for v in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trained = [n for n in methods.names("harmonize_")
               if isinstance(methods.get(n), harmonizer.Harmonizer)]
    shared = os.environ.get("QSPHERE_TEST_DATA",
                            Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--data", type=Path, default=Path(shared) / "canon_retest")
    parser.add_argument("--methods", nargs="*", choices=trained, default=trained)
    parser.add_argument("--angulations", nargs="*", help="that are left out in turn; default: all")
    parser.add_argument("--no-floor", dest="floor", action="store_false",
                        help="leave out what compares different angulations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random-seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, refused = evaluate(arguments)
    print(text(rows))
    print("\n" + CAVEAT)
    if refused:
        print("\nNot trained:\n\n" + "\n".join(f"- {why}" for why in refused.values()))


if __name__ == "__main__":
    main()
