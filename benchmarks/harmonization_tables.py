"""Tables of what `harmonization.py` has measured so far, with intervals and tests over sites.

    python benchmarks/harmonization_tables.py DIR [--figure FILE.svg] [--csv FOLDER]

The unit of every interval and test is the site. A value is first averaged over the people of a
site; mean and 95 % interval are Student's over these means, and p is the exact sign-flip test: the
share, among all choices of signs of the sites' values, of those whose mean is as far from 0. With
six sites it is at least 0.031. A change is the mean over sites of log(after / before), given in
percent; "before" is `none` in the same people. After an interval, ° says that p is above 0.05, and
▲ that the error rose. The slope over age is that of the people of all sites, with a mean of each
site's own, relative to the slope of the same people's truth; its interval is the jackknife's over
sites.

ICC(3,1) (which does not see a shift that is the same for everybody), CoV, AUC and slopes are of
mean FA and MD in WM and GM: harmonized scans beside those of the same people at the reference; ICC
and CoV are means over these four.

ComBat works on these means. It is fitted in each fold to the people who are not tested, at both
sites, with their age, and then applied to the scans of those who are tested.
"""

import argparse
import itertools
import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import table
from scipy import stats
from travelling import TISSUES

from bidsapp.evaluate import agreement
from bidsapp.methods.harmonize_combat.equations import estimate

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
BEFORE = "none"
COMBAT = "harmonize_combat"
LEAST = 3
"""People at a site, below which ComBat is not fitted."""

REFERENCES = "rescan", "rescan truth", "truth"
RECOMMENDED = "harmonize_rish", "harmonize_cyclic", "harmonize_hybrid", "harmonize_shresnet"
"""Harmonizers of which the tables say where they do not lower an error."""

PUBLISHED = {("SHResNet, published (Koppers et al. 2018), real data", "scan"): {
    ("NMSE signal", "WM"): -35, ("NMSE signal", "GM"): -29, ("NMSE fa", "WM"): -18,
    ("NMSE fa", "GM"): -9, ("NMSE md", "WM"): -40, ("NMSE md", "GM"): -28}}
"""Changes in percent, by method and what they are against. They stand below our columns of the
same measure, tissue and reference, and nowhere else."""

NMSE = "NMSE, % (change, %)", "NMSE, % (change, % [95 % interval])"
"""Heads of the error tables of one site and of several sites."""

BIAS = "bias of the mean over a tissue, %, and (root mean square error of a person's mean, %)"
NAMES = {"signal": "S/S0", "fa": "FA", "md": "MD", "ndi": "NDI", "odi": "ODI"}
ORDER = [*NAMES, *TISSUES]
TICKS = -100, -50, 0, 50, 100, 1000, 10_000


def read(folder):
    """The rows of all sites, folds and methods that are there."""
    files = sorted(folder.glob("site*/fold*.csv"))
    if not files:
        raise SystemExit(f"{folder} holds no rows of harmonization.py.")
    rows = pd.concat([pd.read_csv(f, dtype={"participant": str}) for f in files])
    rows["tissue"] = rows["tissue"].fillna("")
    return rows


def interval(values):
    """Mean of the sites' values and the ends of its 95 % interval, NaN where there is one site."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return (values.mean() if n else np.nan), np.nan, np.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return values.mean(), values.mean() - half, values.mean() + half


def sign_flip(values):
    """p, two-sided and exact, of the mean of the sites' values being as far from 0, if each had
    either sign with the same probability."""
    values = np.asarray(values, float)
    sums = np.abs(np.array(list(product((-1, 1), repeat=len(values)))) @ values)
    return float((sums >= abs(values.sum()) - 1e-9 * np.abs(values).sum()).mean())


def log_change(after, before):
    """log(after / before) of the mean errors of each site, of the people who have both.

    after, before : Series over (site, participant)
    """
    both = pd.DataFrame({"after": after, "before": before}).dropna().groupby("site").mean()
    return np.log(both["after"] / both["before"])


def slope_ratio(values, truth, ages):
    """Slope of values over age relative to that of the truth, each site with its own mean, and the
    95 % interval of the jackknife over sites. All are Series over (site, participant)."""
    both = pd.DataFrame({"values": values, "truth": truth, "age": ages}).dropna()
    both -= both.groupby("site").transform("mean")
    products = both[["values", "truth"]].mul(both["age"], axis=0).groupby("site").sum()
    total, n = products.sum(), len(products)
    ratio = total["values"] / total["truth"]
    if n < 2:
        return ratio, np.nan, np.nan
    left_out = total - products
    pseudo = n * ratio - (n - 1) * left_out["values"] / left_out["truth"]
    _, low, high = interval(pseudo)
    return ratio, low + ratio - pseudo.mean(), high + ratio - pseudo.mean()


def region_means(rows):
    """Mean FA and MD by (method, against, site, participant), a column for each shell, tissue and
    map: "b1200 WM fa"."""
    means = rows[rows["measure"].str.startswith("mean ")]
    feature = means["shell"] + " " + means["tissue"] + " " + means["measure"].str[5:]
    return means.assign(feature=feature).pivot(
        index=["method", "against", "site", "participant"], columns="feature",
        values="value")


def combat(before, reference, people):
    """Means of FA and MD of each tested person after ComBat, which has not seen them.

    before, reference : means at the site and at the reference, over (site, participant)
    people : fold and age, over the same
    """
    found = []
    for (name, fold), tested in people.groupby(["site", "fold"]):
        others = people[(people.index.get_level_values("site") == name) & (people["fold"] != fold)]
        if len(others) < LEAST:
            continue
        found.append(combat_unseen(before.loc[others.index], reference.loc[others.index],
                                   others["age"], before.loc[tested.index], tested["age"]))
    return pd.concat(found) if found else before.iloc[:0]


def combat_unseen(before, reference, ages, unseen, unseen_ages):
    """Fit ComBat to the rows of `before` and `reference`, of the same people, and remove the effect
    from those of `unseen`, which are of the site of `before`."""
    effects = estimate(pd.concat([reference, before]).to_numpy(), np.tile(ages, 2)[:, None],
                       np.repeat([0, 1], len(ages)), reference=0)
    found = effects.remove(unseen.to_numpy(), unseen_ages.to_numpy(float)[:, None],
                           np.ones(len(unseen), int))
    return pd.DataFrame(found, unseen.index, unseen.columns)


def between_sites(here, there):
    """ICC(3,1), CoV and AUC of each site, of harmonized scans and of those at the reference.

    here, there : DataFrames over (site, participant), a column for each feature
    """
    found = []
    for name, own in here.groupby("site"):
        values = np.stack([there.loc[own.index], own], 1)
        people = np.repeat(np.arange(len(values)), 2)
        features = np.moveaxis(values, 2, 0)
        auc = agreement.site_auc(values.reshape(len(people), -1),
                                 np.tile(["A", "B"], len(values)), people)["B"]
        found.append({"site": name, "ICC(3,1)": np.mean([agreement.icc(f) for f in features]),
                      "CoV": np.mean([agreement.variation(f) for f in features]), "AUC": auc})
    return pd.DataFrame(found).set_index("site")


class Results:
    """Markdown tables of the measurements of each method.

    order: methods, as rows of tables. errors: by (method, site, participant), a column for each
    (shell, against, measure, tissue). means: of `region_means`, ComBat's included.
    """

    def __init__(self, rows):
        self.rows = rows
        self.order = [m for m in dict.fromkeys(rows["method"]) if m not in REFERENCES]
        self.order = sorted(self.order, key=lambda m: (m.startswith("harmonize_"), m != BEFORE))
        self.order += [m for m in ("rescan", "truth") if m in set(rows["method"])]
        errors = rows[rows["measure"].str.startswith("NMSE")]
        self.errors = errors.pivot(index=["method", "site", "participant"],
                                   columns=["shell", "against", "measure", "tissue"],
                                   values="value")
        self.errors = self.errors[sorted(self.errors, key=lambda c: (
            c[0] == "all", ORDER.index(c[2][5:]), ORDER.index(c[3])))]
        self.means = region_means(rows)
        people = rows.groupby(["site", "participant"])[["fold", "age"]].first()
        self.ages = people["age"]
        self.sites = list(dict.fromkeys(rows["site"]))
        if {BEFORE, "rescan"} <= set(self.order):
            made = combat(self.means.loc[BEFORE, "found"], self.means.loc["rescan", "found"],
                          people)
            self.means = pd.concat([self.means, *(
                pd.concat({(COMBAT, k): v}, names=["method", "against"]) for k, v in (
                    ("found", made), *((k, self.means.loc[BEFORE, k].loc[made.index])
                                       for k in ("truth", "scan"))))])
        self.means = self.means.sort_index()

    def features(self, shell):
        return sorted((f for f in self.means if f.startswith(f"{shell} ")),
                      key=lambda f: [ORDER.index(w) for w in reversed(f.split()[1:])])

    def named(self, method, values):
        """The name of a method, with the number of sites where they are not all."""
        found = values.index.get_level_values("site").nunique()
        return f"`{method}`" * method.startswith("harmonize_") or method, (
            f" ({found} of {len(self.sites)} sites)" if found < len(self.sites) else "")

    def error_table(self, shell, against):
        """Errors and their changes; what recommended harmonizers do not lower, as sentences."""
        part = self.errors[shell][against].dropna(how="all").dropna(axis=1, how="all")
        lines = [f"\n{shell}, against the {against}\n",
                 *head([NMSE[len(self.sites) > 1],
                        *(f"{NAMES[m[5:]]} {t}" for m, t in part.columns)])]
        raised = {}
        for method in (m for m in self.order if m in part.index and (m, against) != (
                "truth", "truth")):
            own, cells = part.loc[method], []
            for column in part.columns:
                mean = 100 * own[column].groupby("site").mean().mean()
                change = log_change(own[column], part.loc[BEFORE][column])
                cells.append(f"{mean:.3g}" + (f" ({shown_change(change)})"
                                              if method != BEFORE else ""))
                if method.partition("@")[0] in RECOMMENDED and marked(change):
                    raised.setdefault(method, []).append(
                        f"{NAMES[column[0][5:]]} {column[1]} ({shown_change(change)})")
            lines.append(row(["".join(self.named(method, own)), *cells]))
        for (name, of), changes in PUBLISHED.items():
            if of == against:
                lines.append(row([name, *(f"({changes[c]:+d})".replace("-", "−")
                                          if c in changes else "" for c in part.columns)]))
        if any(m.partition("@")[0] in RECOMMENDED for m in part.index.unique(0)):
            lines.append("\nRecommended harmonizers " + (
                "do not lower, or are not shown to lower:\n\n" + "\n".join(
                    f"- `{name}`: {', '.join(own)}" for name, own in raised.items())
                if raised else "lower every error."))
        return lines

    def mean_table(self, shell, against):
        """Bias of mean FA and MD, and the error of a person's mean."""
        features = self.features(shell)
        names = [f"{NAMES[f.split()[2]]} {f.split()[1]}" for f in features]
        lines = [f"\n{shell}, against the {against}\n", *head([BIAS, *names])]
        for method in (m for m in [*self.order, COMBAT] if m in self.means.index):
            own = self.means.loc[method]
            if (method == "truth" and against == "truth") or against not in own.index:
                continue
            off = 100 * (own.loc["found"] / own.loc[against] - 1)
            cells = []
            for feature in features:
                sites = off[feature].groupby("site")
                squares = np.sqrt(np.square(off[feature]).groupby("site").mean())
                cells.append(f"{shown_interval(interval(sites.mean()), '+.1f')} "
                             f"({squares.mean():.1f})")
            lines.append(row(["".join(self.named(method, own.loc["found"])), *cells]))
        return lines

    def other_table(self, shell):
        """Image quality, separability of sites, biology, and time."""
        alone = ["ssim", "sharpness", "direction", "turn", "lesion"]
        across, slopes = ["ICC(3,1)", "CoV", "AUC"], ["WM md", "GM md", "WM fa"]
        lines = [f"\n{shell}\n", *head(["method", *alone, *across, *(
            f"slope of {NAMES[s[3:]]} {s[:2]} over age" for s in slopes),
            "train, s of CPU", "apply, s of CPU"])]
        part = self.rows[self.rows["shell"] == shell]
        values = part[part["measure"].isin(alone)].groupby(["method", "measure", "site"])[
            "value"].mean()
        seconds = part.groupby("method")[["train", "apply"]].mean()
        features = self.features(shell)
        for method in (m for m in [*self.order, COMBAT] if m in self.means.index):
            cells = [shown_interval(interval(values[method, m]), ".3g")
                     if (method, m) in values.index else "" for m in alone]
            own, target = self.means.loc[method, "found"], self.means.loc[method, "truth"]
            beside = "rescan truth" if method == "truth" else "rescan"
            if method == "rescan" or beside not in self.means.index:
                cells += [""] * len(across)
            else:
                sites = between_sites(own[features], self.means.loc[beside, "found"][features])
                cells += [shown_interval(interval(sites[m]), ".3g") for m in across]
            cells += [shown_interval(slope_ratio(own[f"{shell} {s}"], target[f"{shell} {s}"],
                                                 self.ages), ".2f") for s in slopes]
            cells += [f"{seconds[k][method]:.3g}" if method in seconds.index else ""
                      for k in ("train", "apply")]
            lines.append(row(["".join(self.named(method, own)), *cells]))
        return lines

    def tables(self):
        """Lines of every table, with those around it, by the name of its file."""
        found = {}
        for shell, against in self.errors.columns.droplevel([2, 3]).unique():
            found[f"{shell}_{against}"] = self.error_table(shell, against)
            if shell != "all":
                found[f"{shell}_{against}_bias"] = self.mean_table(shell, against)
        for shell in self.errors.columns.unique(0):
            if shell != "all":
                found[f"{shell}_structure"] = self.other_table(shell)
        return found


def shown_change(change):
    """Percent, with interval and mark, of log changes of sites."""
    ends = (100 * np.expm1(v) for v in interval(change))
    return shown_interval(ends, "+.0f") + marked(change)


def marked(change):
    if sign_flip(change) > SIGNIFICANT:
        return "°"
    return "▲" if change.mean() > 0 else ""


def shown_interval(ends, form):
    mean, low, high = ends
    if mean != mean:
        return ""
    text = f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low == low else "")
    return text.replace("-", "−")


def head(cells):
    return row(cells), row(["---"] * len(cells))


def row(cells):
    return "| " + " | ".join(cells) + " |"


def site_table(folder):
    """Print the parameters drawn for each site."""
    drawn = [json.loads(p.read_text()) for p in sorted(folder.glob("site*/site.json"))]
    keys = [k for k in drawn[0] if k not in ("name", "directions", "voxel")]
    return ["Site A is the reference.\n", *head(["site", *keys]),
            *(row([d["name"], *(f"{d[k]:.3g}" for k in keys)]) for d in drawn)]


def draw_figure(results, path):
    """Change of NMSE: a panel for each shell and target, a dot for each site."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    shells = [s for s in results.errors.columns.unique(0) if s != "all"]
    names = [m for m in results.order if m not in (BEFORE, *REFERENCES)]
    groups = list(product(("NMSE signal", "NMSE fa", "NMSE md"), TISSUES))
    page, axes = plt.subplots(len(shells), 2, figsize=(11, 3.5 * len(shells) + 0.5), squeeze=False,
                              sharey="row", layout="constrained")
    for line, shell in zip(axes, shells, strict=True):
        for panel, against in zip(line, ("scan", "truth"), strict=True):
            part = results.errors[shell][against]
            for (i, name), (j, group) in product(enumerate(names), enumerate(groups)):
                change = log_change(part.loc[name][group], part.loc[BEFORE][group])
                y = 100 * np.expm1(change)
                x = j + (i - (len(names) - 1) / 2) * 0.8 / len(names)
                panel.plot(np.full(len(y), x), y, ".", color=f"C{i}",
                           label=None if j else name, ms=4)
                panel.plot([x], [100 * np.expm1(change.mean())], "_", color=f"C{i}", ms=10)
            panel.axhline(0, color="0.6", lw=0.8)
            panel.set_xticks(range(len(groups)), [f"{NAMES[m[5:]]} {t}" for m, t in groups])
            panel.set_title(f"{shell}, against the {against}")
            panel.set_yscale("symlog", linthresh=100)
            panel.set_yticks(TICKS, [f"{t:g}" for t in TICKS])
            panel.set_ylim(bottom=-100)
    page.supylabel("change of NMSE, %")
    page.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    plt.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--figure", type=Path, help="write the changes of every site as SVG")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="write every table as CSV")
    arguments = parser.parse_args(argv)
    results = Results(read(arguments.folder))
    tables = {"sites": site_table(arguments.folder), **results.tables()}
    text = "\n".join(itertools.chain(*tables.values())) + "\n"
    (arguments.folder / "table.md").write_text(text)
    if arguments.figure:
        draw_figure(results, arguments.figure)
    if arguments.csv:
        arguments.csv.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            table.write(arguments.csv / f"{name}.csv", *cells(lines))
    print(text)


def cells(lines):
    """Names of the columns, and rows, of a table in Markdown among other lines."""
    first, _, *rows = ([cell.strip() for cell in line.replace("`", "").replace("−", "-").strip("|")
                        .split("|")] for line in lines if line.startswith("| "))
    return first, rows


if __name__ == "__main__":
    main()
