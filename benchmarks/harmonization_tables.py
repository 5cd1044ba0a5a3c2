"""Tables and the figure of `harmonization.py`."""

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon
from travelling import PLAIN, TISSUES

from bidsapp import methods
from bidsapp.evaluate import agreement

TICKS = -100, -50, 0, 50, 100, 1000, 10_000


def between_sites(found):
    """ICC, CoV, AUC and age by method. found: rows of everybody."""
    means = found[found["measure"].str.startswith("mean ")].assign(
        feature=lambda t: t["shell"] + " " + t["tissue"] + " " + t["measure"].str[5:])
    home = {truth: means[(means["method"] == name) & (means["against"] == "found")].pivot(
        index="participant", columns="feature", values="value")
        for truth, name in ((False, "home"), (True, "home truth"))}
    rows, ways = [], {}
    for name in dict.fromkeys(means["method"]):
        if not name.startswith("home"):
            own = means[(means["method"] == name) & (means["against"] == "found")].pivot(
                index="participant", columns="feature", values="value")
            if own.index.equals(home[False].index):
                ways[name] = home[name == "noise"], own
    if "none" in ways and len(home[False]) >= 3:
        ways["harmonize_combat"] = combat(*ways["none"])
    truth = means[(means["method"] == "none") & (means["against"] == "truth")].pivot(
        index="participant", columns="feature", values="value")
    ages = means.groupby("participant")["age"].first()
    for name, (there, here) in ways.items():
        table = np.stack([there, here], 1)
        people = np.repeat(np.arange(len(table)), 2)
        measures = {
            "ICC": np.mean([agreement.icc(f) for f in np.moveaxis(table, 2, 0)]),
            "CoV": np.mean([agreement.variation(f) for f in np.moveaxis(table, 2, 0)]),
            "AUC": agreement.site_auc(table.reshape(len(people), -1),
                                      np.tile(["A", "B"], len(table)), people)["B"]}
        for feature in (f for f in here if f.endswith("WM md")):
            measures[f"age {feature.split()[0]}"] = agreement.slope(
                ages.to_numpy(), here[feature].to_numpy()) / agreement.slope(
                ages.to_numpy(), truth[feature].to_numpy())
        rows += [{"method": name, "measure": k, "value": float(v)} for k, v in measures.items()]
    return pd.DataFrame(rows, columns=["method", "measure", "value"])


def combat(there, here):
    """Region means of everybody after ComBat."""
    features = tuple(here)
    table = pd.concat([part.reset_index().assign(batch=batch)
                       for batch, part in (("A", there), ("B", here))])
    study = methods.Study(table, features, reference_batch="A")
    found = methods.get("harmonize_combat").fit(study).tables["desc-combat_dwimap"]
    return tuple(found[found["batch"] == b].set_index("participant").loc[there.index, [*features]]
                 for b in ("A", "B"))


def text(found, against):
    """Markdown: for each shell and target the errors, their change, and p of Wilcoxon's signed
    ranks; then what else is."""
    found = found.assign(value=found["value"].astype(float))
    order = [m for m in dict.fromkeys(found["method"]) if not m.startswith("home")]
    errors = found[found["measure"].str.startswith("NMSE") & found["method"].isin(order)]
    lines = []
    for (shell, target), part in errors.groupby(["shell", "against"], sort=False):
        columns = list(dict.fromkeys(zip(part["measure"], part["tissue"], strict=True)))
        names = [f"{m[5:]} {t}" for m, t in columns]
        wide = part.pivot(index=["method", "participant"], columns=["measure", "tissue"],
                          values="value")[columns]
        own = {m: wide.loc[m] for m in order if m in wide.index}
        lines += [f"\n{shell}, against the {target}: NMSE, % (change, %)\n",
                  *table(["method", *names])]
        for method, values in own.items():
            before = own["none"].loc[values.index].mean()
            lines.append(row([method, *(f"{100 * v:.3g} ({100 * v / b - 100:+.0f})" for v, b in zip(
                values.mean(), before, strict=True))]))
        whole = {m: v for m, v in own.items() if m != "noise" and len(v) == len(own["none"])}
        ranks = [agreement.better_than_second({m: v[c].to_numpy() for m, v in whole.items()})
                 for c in columns]
        lines.append(row(["best, second, p", *(f"{a}, {b}, {p:.2g}" for a, b, p in ranks)]))
        for method, other in ((m, o) for o in against for m in own if m not in {*PLAIN, o}):
            if other in own:
                both = own[method].index.intersection(own[other].index)
                difference = (own[method].loc[both] - own[other].loc[both]).to_numpy()
                lines.append(row([f"p, {method} and {other}", *(
                    f"{wilcoxon(d).pvalue:.2g}" if d.any() else "" for d in difference.T)]))
    across = between_sites(found).set_index(["method", "measure"])["value"]
    mean = found.groupby(["shell", "method", "measure", "against"])["value"].mean()
    seconds = found.groupby("method")[["train", "apply"]].mean()
    for shell in (s for s in dict.fromkeys(found["shell"]) if s != "all"):
        alone, sites = ["ssim", "sharpness", "direction", "turn", "lesion"], ["ICC", "CoV", "AUC"]
        lines += [f"\n{shell}\n", *table(["method", *alone, *sites, "age", "train, s", "apply, s"])]
        for method in [*order, "harmonize_combat"]:
            cells = [*(mean.get((shell, method, m, "truth")) for m in alone),
                     *(across.get((method, m)) for m in [*sites, f"age {shell}"]),
                     *(seconds[k].get(method) for k in ("train", "apply"))]
            lines.append(row([method, *map(shown, cells)]))
    return "\n".join(lines) + "\n"


def table(head):
    return row(head), row(["---"] * len(head))


def row(cells):
    return "| " + " | ".join(cells) + " |"


def shown(value):
    return "" if value is None or value != value else f"{value:.3g}"


def figure(found, path):
    """NMSE relative to none: a panel for each shell and target, a group of points for each map."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    part = found[found["measure"].str.startswith("NMSE")]
    key = ["shell", "against", "measure", "tissue", "participant"]
    table = part.pivot(index=key, columns="method", values="value")
    change = 100 * table.div(table["none"], axis=0) - 100
    shells = [s for s in dict.fromkeys(found["shell"]) if s != "all"]
    names = [m for m in dict.fromkeys(found["method"])
             if m not in ("none", "noise") and not m.startswith("home")]
    page, axes = plt.subplots(len(shells), 2, figsize=(11, 3.5 * len(shells) + 0.5), squeeze=False,
                              sharey="row", layout="constrained")
    for line, shell in zip(axes, shells, strict=True):
        for panel, against in zip(line, ("scan", "truth"), strict=True):
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
