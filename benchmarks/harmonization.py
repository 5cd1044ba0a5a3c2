"""Every harmonizer on a travelling phantom, on people it has not seen, in one table and one figure.

    python benchmarks/harmonization.py [--participants N] [--folds K] [--methods M ...] [--out DIR]

Two sites; b 1200, 30 directions, 3 mm unless given (the design of Koppers et al. 2018). In each
fold methods learn from both scans of the other people; the scans of the people left out, at site B,
are harmonized and compared, shell by shell, with what site A measures of the same head in the same
pose, with the noise of one scan ("scan") and without ("truth"). Rows:

    none              as measured                   SH fit      degrees up to 4, not harmonized
    MPPCA, smoothing  noise or detail taken away, not harmonized
    harmonize_…       trained, ComBat on the region means of everybody
    noise             the truth itself: beside "scan", what its noise leaves

NMSE = Σ (y − ŷ)² / Σ y² of S/S0, FA and MD over the voxels whose largest share is WM, or GM, mean
over people; * where Wilcoxon's signed-rank test of the best against the second best gives p ≤ 0.01.
SSIM, mean over volumes, and sharpness are of S/S0 against the truth. Direction: median error where
the truth's FA is above 0.4. Lesion: contrast of MD relative to the truth's. ICC, CoV, AUC and age
are of mean FA and MD in WM and GM: harmonized scans of B beside scans of A; ICC and CoV are means
over the four; age: slope of MD in WM, relative to that of the truth at site B's pose.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import binary_dilation, gaussian_filter

from bidsapp import methods, sh
from bidsapp.dwi import Dwi
from bidsapp.errors import QSphereError
from bidsapp.evaluate import agreement
from bidsapp.methods import harmonizer
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit, scans
from bidsapp.simulate import phantom, site

TISSUES = {"WM": 0, "GM": 1}
BLUR = 1.5
"""Voxels, full width at half maximum, of the smoothing that is no harmonization."""

AROUND = 3
"""Voxels about a lesion that it is compared with."""

TICKS = -100, -50, 0, 50, 100, 1000, 10_000
FIBRES = 0.4
CLEAR = 0.01


@dataclass(frozen=True)
class One:
    """A person at a site: what was measured, the truth on the same grid without noise and with the
    reference's, and where tissues and a lesion are (voxel,)."""

    dwi: Dwi
    truth: np.ndarray
    noisy: np.ndarray
    tissue: np.ndarray
    lesion: np.ndarray
    around: np.ndarray


def one(scan, reference, seed):
    rows = scan.mask
    wanted = np.moveaxis(scan.reference, 0, -1)[rows]
    rng = torch.Generator().manual_seed(seed)
    sigma = np.full(wanted.shape, phantom.UNIT / reference.snr, np.float32)
    noisy = phantom.noisy(wanted, sigma, reference, rng)
    tissue = scan.tissue[:, rows].argmax(0)
    around = (binary_dilation(scan.lesion, iterations=AROUND) & ~scan.lesion)[rows] & (tissue == 0)
    dwi = Dwi(np.ascontiguousarray(np.moveaxis(scan.signal, 0, -1)[rows], np.float32), rows,
              scan.grid.affine, scan.acquisition)
    return One(dwi, wanted, noisy, tissue, scan.lesion[rows] & (tissue == 0), around)


def ratio(signal, acquisition):
    """S/S0 of every measurement."""
    s0 = np.maximum(signal[:, acquisition.b0].mean(1, keepdims=True), 1)
    return (signal / s0).astype(np.float32)


def denoised(dwi):
    from dipy.denoise.localpca import mppca

    return np.maximum(mppca(dwi.unmask(dwi.signal), mask=dwi.mask)[dwi.mask], 0).astype(np.float32)


def smoothed(dwi):
    sd = BLUR / 2.3548
    weight = gaussian_filter(dwi.mask.astype(np.float32), sd)[dwi.mask]
    return np.stack([gaussian_filter(dwi.unmask(column), sd)[dwi.mask] / weight
                     for column in dwi.signal.T], 1)


def fitted(dwi, l_max=4):
    """The SH series of every shell instead of its signal."""
    signal = dwi.signal.copy("K")
    for shell in dwi.acquisition.shells:
        basis = sh.basis(l_max, dwi.acquisition.bvecs[shell.indices])
        signal[:, shell.indices] = dwi.signal[:, shell.indices] @ (
            basis @ np.linalg.pinv(basis)).T
    return signal


PLAIN = {"none": lambda dwi: dwi.signal, "SH fit": fitted, "MPPCA": denoised,
         "smoothing": smoothed}


def compared(found, person):
    """Rows of shell, measure, against, tissue, value; and means of FA and MD in WM and GM."""
    dwi, rows, means = person.dwi, [], {}
    acquisition = dwi.acquisition
    values = {"found": ratio(found, acquisition), "truth": ratio(person.truth, acquisition),
              "scan": ratio(person.noisy, acquisition)}
    for shell in acquisition.shells:
        at, name = shell.indices, f"b{shell.b:.0f}"
        maps = {k: {"signal": v[:, at], **agreement.shell_maps(v[:, at], acquisition[at])}
                for k, v in values.items()}

        def add(measure, value, against="truth", tissue="", name=name):
            rows.append({"shell": name, "measure": measure, "against": against, "tissue": tissue,
                         "value": value})

        for tissue, label in TISSUES.items():
            where = person.tissue == label
            for key in ("signal", "fa", "md"):
                for against in ("scan", "truth"):
                    pair = maps["found"][key][where], maps[against][key][where]
                    add(f"NMSE {key}", agreement.nmse(*pair), against, tissue)
                    add(f"MSE {key}", agreement.mse(*pair), against, tissue)
                if key != "signal":
                    means[f"{name} {tissue} {key}"] = [
                        float(maps[k][key][where].mean()) for k in ("found", "truth")]
        volumes = [tuple(dwi.unmask(maps[k]["signal"][:, i]) for k in ("found", "truth"))
                   for i in range(len(at))]
        for measure in (agreement.ssim, agreement.sharpness):
            add(measure.__name__, np.mean([measure(*v, dwi.mask) for v in volumes]))
        fibres = (maps["truth"]["fa"] > FIBRES) & (person.tissue == 0)
        add("direction", np.median(agreement.angle(
            *(maps[k]["direction"][fibres] for k in ("found", "truth")))))
        if min(person.lesion.sum(), person.around.sum()) > 0:
            mine, wanted = (agreement.contrast(maps[k]["md"], person.lesion, person.around)
                            for k in ("found", "truth"))
            add("lesion", mine / wanted)
    return rows, means


def learned(name, study, arguments):
    """A function of a Dwi, and the seconds its training took."""
    method = methods.get(name)
    method.sloppy = arguments.sloppy
    start = time.monotonic()
    (checkpoint,) = method.fit(study).checkpoints.values()
    (batch,) = checkpoint.card.batches
    return (lambda dwi: method.harmonize(dwi, checkpoint, batch, "cpu").signal,
            time.monotonic() - start)


def between_sites(means, people, ages, sites):
    """ICC, CoV, AUC and age by method. means: {method: {(person, site): {feature: (found,
    truth)}}}; scans of the reference site are as measured in all of them, and in "noise" the
    truth."""
    rows = []
    for name, own in means.items():
        features = sorted(next(iter(own.values())))
        table = np.array([[[own[p, s][f][0] for f in features] for s in sites] for p in people])
        measures = {"ICC": np.mean([agreement.icc(table[..., i]) for i in range(len(features))]),
                    "CoV": np.mean([agreement.variation(table[..., i])
                                    for i in range(len(features))])}
        flat = table.reshape(-1, len(features))
        measures["AUC"] = agreement.site_auc(flat, np.tile(sites, len(people)),
                                             np.repeat(people, len(sites)))[sites[1]]
        for feature in (f for f in features if f.endswith("WM md")):
            mine, wanted = (agreement.slope(ages, np.array(
                [own[p, sites[1]][feature][k] for p in people])) for k in (0, 1))
            measures[f"age {feature.split()[0]}"] = mine / wanted
        rows += [{"method": name, "measure": k, "value": float(v)} for k, v in measures.items()]
    return rows


def combat(means, people, sites):
    """Region means of everybody after ComBat, as `between_sites` takes them."""
    features = sorted(means[people[0], sites[0]])
    table = pd.DataFrame([{"participant": p, "batch": s, **{f: means[p, s][f][0] for f in features}}
                          for p in people for s in sites])
    study = methods.Study(table, tuple(features), reference_batch=sites[0])
    found = methods.get("harmonize_combat").fit(study).tables["desc-combat_dwimap"]
    return {(r["participant"], r["batch"]): {
        f: [r[f], means[r["participant"], r["batch"]][f][1]] for f in features}
        for r in found.to_dict("records")}


def simulate(arguments):
    options = PhantomOptions(
        Path(), participants=arguments.participants, shells=tuple(arguments.shells),
        directions=arguments.directions, voxel_size=arguments.voxel_size, effect_directions=0,
        random_seed=arguments.random_seed)
    sites, people = site.draw(options), recruit(options)
    made = {}
    for i, (who, _, where, scan) in enumerate(scans(options, people, sites,
                                                    load_atlas(options.step))):
        made[who.label, where.name] = one(scan, sites[0], 1000 * arguments.random_seed + i)
    return [s.name for s in sites], people, made


def evaluate(arguments):
    """Long tables: per participant; between sites; seconds by method."""
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
        dwis.__getitem__, arguments.max_steps, arguments.random_seed)
    at_home = {p: {"none": compared(made[p, reference].dwi.signal, made[p, reference])[1],
                   "noise": compared(made[p, reference].truth, made[p, reference])[1]}
               for p in labels}
    rows, means, seconds = [], {}, []
    for fold in range(arguments.folds):
        held = labels[fold::arguments.folds]
        own = replace(study, statistics=table[~table["participant"].isin(held)])
        ways = dict(PLAIN)
        for name in arguments.methods:
            try:
                ways[name], took = learned(name, own, arguments)
                seconds.append({"method": name, "train": took})
            except QSphereError as error:
                print(f"{name}: {error}", file=sys.stderr)
        for label in held:
            person = made[label, other]
            for name, way in {**ways, "noise": lambda _, p=person: p.truth}.items():
                start = time.monotonic()
                found, regions = compared(way(person.dwi), person)
                seconds.append({"method": name, "apply": time.monotonic() - start})
                rows += [{"method": name, "participant": label, **row} for row in found]
                means.setdefault(name, {}).update({
                    (label, other): regions,
                    (label, reference): at_home[label]["noise" if name == "noise" else "none"]})
    if len(labels) >= 3:
        means["harmonize_combat"] = combat(means["none"], labels, sites)
    ages = np.array([p.age for p in people])
    return (pd.DataFrame(rows), pd.DataFrame(between_sites(means, labels, ages, sites)),
            pd.DataFrame(seconds).groupby("method").mean())


def text(rows, between, seconds):
    """The markdown table; a row for each method and shell."""
    mean = rows.groupby(["shell", "method", "measure", "against", "tissue"])["value"].mean()
    best = {}
    for key, part in rows[rows["measure"].str.startswith("NMSE") & (rows["method"] != "noise")
                          ].groupby(["shell", "measure", "against", "tissue"]):
        errors = part.pivot(index="participant", columns="method", values="value")
        best[key] = agreement.better_than_second({m: errors[m].to_numpy() for m in errors})
    order = [*PLAIN, *sorted(set(rows["method"]) - {*PLAIN, "noise"}), "noise"]
    across = between.set_index(["method", "measure"])["value"]
    errors = [(f"NMSE {k}", a, t) for a in ("scan", "truth") for k in ("signal", "fa", "md")
              for t in TISSUES]
    others = ["ssim", "sharpness", "direction", "lesion"]
    head = ["method", "shell", *(f"{m.split()[1]} {t}, {a}" for m, a, t in errors), *others,
            "ICC", "CoV", "AUC", "age", "train, s"]
    lines = [head, ["---"] * len(head)]
    for shell in sorted(set(rows["shell"]), key=lambda s: int(s[1:])):
        for method in [*order, "harmonize_combat"]:
            cells = [method, shell]
            for measure, against, tissue in errors:
                value = mean.get((shell, method, measure, against, tissue), np.nan)
                first, _, p = best[shell, measure, against, tissue]
                mark = ("*" if p <= CLEAR else "") if first == method else ""
                cells.append("" if value != value else f"{100 * value:.3g}{mark}")
            cells += [shown(mean.get((shell, method, m, "truth", ""))) for m in others]
            cells += [shown(across.get((method, m))) for m in ("ICC", "CoV", "AUC", f"age {shell}")]
            cells.append(shown(seconds["train"].get(method)))
            lines.append(cells)
    worth = [f"{' '.join(k)}: {b} before {s}, p = {p:.2g}" for k, (b, s, p) in best.items()]
    return ("\n".join("| " + " | ".join(line) + " |" for line in lines)
            + "\n\nNMSE in %. Best against second best:\n\n- " + "\n- ".join(worth) + "\n")


def shown(value):
    return "" if value is None or value != value else f"{value:.3g}"


def figure(rows, path):
    """NMSE relative to none: a panel for each shell and target, a group of points for each map."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    part = rows[rows["measure"].str.startswith("NMSE")]
    key = ["shell", "against", "measure", "tissue", "participant"]
    table = part.pivot(index=key, columns="method", values="value")
    change = 100 * table.div(table["none"], axis=0) - 100
    shells = sorted(set(rows["shell"]), key=lambda s: int(s[1:]))
    names = [m for m in change.columns if m not in ("none", "noise")]
    page, axes = plt.subplots(len(shells), 2, figsize=(11, 3.5 * len(shells) + 0.5), squeeze=False,
                              sharey="row", layout="constrained")
    for row, shell in zip(axes, shells, strict=True):
        for panel, against in zip(row, ("scan", "truth"), strict=True):
            own = change.loc[shell, against]
            groups = [(m, t) for m in ("NMSE signal", "NMSE fa", "NMSE md") for t in TISSUES]
            for i, name in enumerate(names):
                for j, group in enumerate(groups):
                    y = own.loc[group, name]
                    x = np.full(len(y), j + (i - (len(names) - 1) / 2) * 0.8 / len(names))
                    panel.plot(x, y, ".", color=f"C{i}", label=name if j == 0 else None, ms=4)
                    panel.plot(x[:1], y.mean(), "_", color=f"C{i}", ms=10)
            panel.axhline(0, color="0.6", lw=0.8)
            panel.set_xticks(range(len(groups)), [f"{m.split()[1]} {t}" for m, t in groups])
            panel.set_title(f"{shell}, against the {against}")
            panel.set_yscale("symlog", linthresh=100)
            panel.set_yticks(TICKS, [f"{t:g}" for t in TICKS])
            panel.set_ylim(bottom=-100)
    page.supylabel("change of NMSE, %")
    page.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    plt.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trained = [n for n in methods.names("harmonize_")
               if isinstance(methods.get(n), harmonizer.Harmonizer)]
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=trained, default=trained)
    parser.add_argument("--shells", type=float, nargs="+", default=[1200.0])
    parser.add_argument("--directions", type=int, default=30)
    parser.add_argument("--voxel-size", type=float, default=3.0, help="mm")
    parser.add_argument("--max-steps", type=int, help="of each stage of a training")
    parser.add_argument("--sloppy", action="store_true", help="trainings far too short, for a try")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("harmonization"))
    arguments = parser.parse_args()
    if not 2 <= arguments.folds <= arguments.participants:
        parser.error("--folds must be between 2 and the number of participants")
    rows, between, seconds = evaluate(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(arguments.out / "participants.csv", index=False)
    between.to_csv(arguments.out / "sites.csv", index=False)
    table = text(rows, between, seconds)
    (arguments.out / "table.md").write_text(table)
    figure(rows, arguments.out / "nmse.svg")
    print(table)
    print(seconds.round(1).to_string())


if __name__ == "__main__":
    main()
