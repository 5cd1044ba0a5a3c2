"""Draw the plots of the results page from the tables in benchmarks/data."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

OURS, PEER, NONE = "#3f51b5", "#9e9e9e", "#424242"


def read(file: Path) -> list[dict[str, str]]:
    """Rows of a table, as text."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def numbers(cell: str) -> list[float]:
    """Return every number in a cell, in order: `27.7 (26.0–31.1)` gives 27.7, 26.0 and 31.1."""
    cell = re.sub(r"(?<=\d)–(?=\d)", " ", cell)
    found = re.findall(r"([+-]?\d+(?:\.\d+)?(?:e-?\d+)?)( k\b)?", cell)
    return [float(number) * (1000 if thousand else 1) for number, thousand in found]


def draw_all(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and SVG of every plot."""
    for name, draw in DRAWINGS.items():
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        draw(figure, folder)
        stream = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure.savefig(stream, format="svg", metadata={"Date": None})
        yield name, stream.getvalue()


def speed(figure: Figure, folder: Path) -> None:
    """How many times as fast as the peer each estimator and the simulator are."""
    rows = [(f"tensor, {r['volumes']} (dipy WLS)", *numbers(r["ratio (range)"]))
            for r in read(folder / "dti.csv")]
    rows += [(f"free water, {r['SNR 25'].split(':')[0]} (dipy NLS)",
              *numbers(r["times dipy NLS, WLS"])[:3])
             for r in read(folder / "freewater.csv") if r["times dipy NLS, WLS"]]
    column = "times dipy (range)"
    rows += [(f"simulation, {name} (dipy)", *numbers(r[column])) for name, r in zip(
        ("ODF at hand, l ≤ 8", "ODF at hand, l ≤ 12", "ODF drawn, l ≤ 8", "ODF drawn, l ≤ 12"),
        read(folder / "simulate.csv"), strict=False)]
    axes = figure.subplots()
    names, middle, low, high = zip(*reversed(rows), strict=True)
    middle, low, high = map(list, (middle, low, high))
    axes.barh(names, middle, color=OURS, height=0.6)
    axes.hlines(range(len(names)), low, high, color="black", linewidth=1)
    axes.axvline(1, color=NONE, linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the peer (median and range of pairs)")
    finish(axes)


METHODS = {"harmonize_shresnet": "shresnet", "harmonize_hybrid": "hybrid",
           "harmonize_cyclic": "cyclic", "harmonize_rish": "rish", "harmonize_golkov": "golkov",
           "harmonize_mica": "mica", "harmonize_rish@groups": "rish, unpaired",
           "harmonize_cyclic@groups": "cyclic, unpaired"}
"""Harmonizers in the order of the plots."""


def change(figure: Figure, folder: Path) -> None:
    """By how much each harmonizer changes the error against the noise-free truth."""
    table = {next(iter(r.values())): r for r in read(folder / "harmonization_truth.csv")}
    panels = figure.subplots(1, 3, sharey=True)
    for axes, quantity in zip(panels, ("S/S0", "FA", "MD"), strict=True):
        for offset, tissue, color in ((-0.15, "WM", OURS), (0.15, "GM", PEER)):
            for row, method in enumerate(METHODS):
                _, middle, low, high = numbers(table[method][f"{quantity} {tissue}"])
                axes.plot([low, high], [row + offset] * 2, color=color)
                axes.plot(middle, row + offset, "o", color=color, markersize=4,
                          label=tissue if row == 0 else None)
        axes.axvline(0, color=NONE, linewidth=1)
        axes.set(title=quantity, xlabel="change of NMSE, %", xlim=(-100, 300))
        finish(axes)
    panels[0].set_yticks(range(len(METHODS)), METHODS.values())
    panels[0].invert_yaxis()
    panels[2].legend(frameon=False, loc="upper right")


def structure(figure: Figure, folder: Path) -> None:
    """Variation between sites, and the slope over age that is left."""
    table = {next(iter(r.values())): r for r in read(folder / "harmonization_structure.csv")}
    names = {"none": "none", **METHODS}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label, wanted in (
            (panels[0], "CoV", "coefficient of variation between sites", 0),
            (panels[1], "slope of MD WM over age", "slope of MD in WM over age, as a share", 1)):
        for row, method in enumerate(names):
            middle, low, high = numbers(table[method][column])
            axes.plot([low, high], [row] * 2, color=NONE if method == "none" else OURS)
            axes.plot(middle, row, "o", color=NONE if method == "none" else OURS, markersize=5)
        axes.axvline(wanted, color=PEER, linewidth=1, linestyle="--")
        axes.set(xlabel=label)
        finish(axes)
    panels[0].set_yticks(range(len(names)), names.values())
    panels[0].invert_yaxis()


def bands(figure: Figure, folder: Path) -> None:
    """Coverage of 90 % intervals of scnn2 by dispersion and noise."""
    rows = read(folder / "scnn2_bands.csv")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity in zip(panels, ("d", "f"), strict=True):
        axes.axvspan(0.85, 0.95, color="#e8eaf6")
        axes.axvline(0.9, color=PEER, linewidth=1, linestyle="--")
        for row, cells in enumerate(rows):
            low, high = numbers(cells[f"{quantity}: covered"])
            axes.plot([low, high], [row] * 2, color=OURS, linewidth=4)
        axes.set(title=quantity, xlabel="share of truths within the 90 % interval", xlim=(0.8, 1))
        finish(axes)
    panels[0].set_yticks(range(len(rows)), [r["κ, SNR"] for r in rows])
    panels[0].set_ylabel("κ, SNR")
    panels[0].invert_yaxis()


def noddi(figure: Figure, folder: Path) -> None:
    """Errors of noddi and AMICO."""
    rows = read(folder / "noddi.csv")
    names = ("whole prior,\nSNR 50", "whole prior,\nSNR 30", "AMICO's range,\nSNR 50",
             "AMICO's range,\nSNR 30")
    columns = ("MSE NDI", "MSE ODI", "MSE FISO")
    for axes, column in zip(figure.subplots(1, 3), columns, strict=True):
        for offset, start, color, label in ((-0.2, 0, OURS, "noddi"), (0.2, 1, PEER, "AMICO")):
            axes.barh([k + offset for k in range(4)],
                      [numbers(r[column])[0] for r in rows[start::2]], 0.36,
                      color=color, label=label)
        axes.set(xlabel=column)
        axes.set_yticks(range(4), names if column == "MSE NDI" else [""] * 4)
        axes.invert_yaxis()
        finish(axes)
    axes.legend(frameon=False)


def freewater(figure: Figure, folder: Path) -> None:
    """Errors of the fraction of free water."""
    rows = read(folder / "freewater.csv")
    axes = figure.subplots()
    names = [r["SNR 25"].removesuffix(": network") for r in rows[::2]]
    series = (("network", OURS, [numbers(r["MSE of the fraction"])[0] for r in rows[::2]]),
              ("dipy NLS", PEER, [numbers(r["MSE of the fraction"])[0] for r in rows[1::2]]),
              ("dipy WLS", "#cfcfcf", [numbers(r["MSE of the fraction"])[1] for r in rows[1::2]]))
    for offset, (label, color, values) in zip((-0.27, 0, 0.27), series, strict=True):
        axes.barh([k + offset for k in range(3)], values, 0.25, color=color, label=label)
    axes.set_yticks(range(3), names)
    axes.invert_yaxis()
    axes.set(xlabel="mean square error of the fraction")
    axes.legend(frameon=False)
    finish(axes)


def coverage(figure: Figure, folder: Path) -> None:
    """Coverage of intervals after harmonization, before and after the noise travels with it."""
    rows = read(folder / "coverage_harmonized.csv")
    column, *cells = rows[0]
    cases = {}
    for row in rows:
        name, *state = row[column].replace("harmonize_", "").split(", noise ")
        cases.setdefault(name, {})[state[0] if state else ""] = [
            n for c in cells for n in numbers(row[c])]
    axes = figure.subplots()
    axes.axvspan(0.85, 0.95, color="#e8eaf6")
    colors = {"": NONE, "measured anew": PEER, "travels, intervals widened": OURS}
    for row, states in enumerate(cases.values()):
        for state, values in states.items():
            height = row + (0.15 if state.startswith("travels") else -0.15)
            axes.plot(values, [height] * len(values), "o", color=colors[state], markersize=3.5)
    for state, color in colors.items():
        axes.plot([], [], "o", color=color, label=f"noise {state}" if state else "no harmonization")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set(xlabel="share of truths within 90 % intervals (d and f, WM and GM, 7 and 1 b0)")
    axes.legend(frameon=False, fontsize="small")
    finish(axes)


def pairs(figure: Figure, folder: Path) -> None:
    """Change of error by the share of people scanned at both sites."""
    rows = read(folder / "pairs_truth.csv")
    first, *columns = rows[0]
    axes = figure.subplots()
    shares = [numbers(r[first])[0] for r in rows[1:]]
    colors = [OURS, OURS, PEER, PEER, NONE, NONE]
    for column, color, style in zip(columns, colors, "-:-:-:", strict=True):
        axes.plot(range(len(shares)), [numbers(r[column])[1] for r in rows[1:]], style, marker="o",
                  color=color, markersize=4, label=column)
    axes.set_xticks(range(len(shares)), [f"{s:g} %" for s in shares])
    axes.set(xlabel="share of the eight people who were scanned at both sites",
             ylabel="change of NMSE, %", ylim=(-85, 5))
    axes.axhline(0, color=NONE, linewidth=1)
    axes.legend(frameon=False, ncols=3, fontsize="small")
    finish(axes)


def pretraining(figure: Figure, folder: Path) -> None:
    """Scores of three tasks by start and number of labelled people: means, and range of runs."""
    scores = {first: score for first, score, *_ in
              (r.values() for r in read(folder / "pretraining.csv"))}
    people = (2, 5, 15)
    looks = {"random": (NONE, ":"), "autoencoder": (PEER, "--"), "masked autoencoder": (PEER, "-"),
             "artifact removal": (OURS, "-")}
    panels = figure.subplots(1, 3)
    for axes, task, label in zip(panels, ("tissue", "crossings", "direction"), (
            "tissue: F1", "crossings: accuracy", "direction: MSE of angles"), strict=True):
        for i, (start, (color, style)) in enumerate(looks.items()):
            mean, low, high = zip(*(numbers(scores[f"table, {task}, {n} people: {start}"])[-3:]
                                    for n in people), strict=True)
            x = [k + 0.06 * (i - 1.5) for k in range(len(people))]
            axes.plot(x, mean, style, marker="o", markersize=4, color=color, label=start)
            axes.vlines(x, low, high, color=color, linewidth=1)
        axes.set_xticks(range(len(people)), map(str, people))
        axes.set(title=label, xlabel="labelled people")
        axes.title.set_fontsize(9)
        finish(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False, fontsize="small")


def finish(axes) -> None:
    """Take away the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


DRAWINGS = {"speed": speed, "change": change, "structure": structure, "bands": bands,
            "noddi": noddi, "freewater": freewater, "coverage": coverage, "pairs": pairs,
            "pretraining": pretraining}
"""Plot of the results page → what draws it."""
