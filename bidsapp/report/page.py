"""HTML pages: one per participant and one for the group, each a single file that opens offline.

Figures are embedded as data URIs, so that ids inside the SVGs cannot clash; all other text from the
data is escaped by the template engine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bidsapp import __version__, methods
from bidsapp.errors import UsageError
from bidsapp.evaluate import biology, quality
from bidsapp.kinds import Cohort, Fitted, Method
from bidsapp.report import boilerplate

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

    from bidsapp.report.figures import Figure

HERE = Path(__file__).parent
PACKAGES = ("torch", "numpy", "scipy", "dipy", "nibabel", "pybids", "matplotlib")


def participant(label: str, records: Sequence[Mapping[str, Any]], problems: Sequence[str],
                root: Path) -> str:
    """Make the page of a participant.

    Parameters
    ----------
    label : str
        Participant, without sub-.
    records : sequence of mapping
        Records of the runs (`recipe.execute.run_records`), also of those that failed.
    problems : sequence of str
        Sentences on files that could not become a run.
    root : Path
        OUTPUT_DIR, which holds the figures and the options and status of the latest invocation.

    Returns
    -------
    str
        HTML.
    """
    runs = [_run(record, root) for record in records]
    log = _latest(root / f"sub-{label}/log")
    status = _json(log / "status.json") if log else {}
    used = _methods(name for record in records for name in record.get("methods", ()))
    return _templates().get_template("participant.html").render(
        title=f"sub-{label}", label=label, runs=runs, problems=problems,
        failed=[r for r in runs if r["state"] != "complete"],
        refused=_refused(runs), status=status,
        options=_read(log / "options.toml") if log else "",
        log=log.relative_to(root) if log else "", **_common(_paragraphs(records), used))


def group(cohort: Cohort, outliers: pd.DataFrame, between: pd.DataFrame, effects: pd.DataFrame,
          drawn: Sequence[Figure], fitted: Mapping[str, Fitted], *,
          chosen: Sequence[Method], notice: str = "",
          records: Sequence[Mapping[str, Any]] = ()) -> str:
    """Make the page of the group.

    Parameters
    ----------
    cohort : Cohort
        All runs, with their map statistics.
    outliers : DataFrame
        `quality.find_outliers` of the statistics.
    between : DataFrame
        Agreement between sites (`agreement.compare_tables`).
    effects : DataFrame
        Effects of covariates before and after harmonization (`biology.judge_in_sample`).
    drawn : sequence of Figure
        Figures of the group (`distributions.of_group`).
    fitted : mapping of str to Fitted
        Results of the trained methods, by name.
    chosen : sequence of Method
        The trained methods, for the methods text.
    notice : str
        Warning about the whole group.
    records : sequence of mapping
        Records of the runs, whose methods texts the page repeats.

    Returns
    -------
    str
        HTML.
    """
    table = cohort.statistics
    batches = [{"name": name, "participants": members["participant"].nunique(),
                "runs": len(members)} for name, members in table.groupby("batch", sort=True)]
    estimates = _methods(name for name in methods.names("estimate_") if any(
        c.startswith(f"{name.removeprefix('estimate_')}_") for c in cohort.features))
    units = quality.describe_columns(table.columns)
    statistics = [
        {"name": feature.removesuffix("_mean"), "units": units[feature]["Units"], "cells": [
            f"{_number(float(v.mean()))} ± {_number(float(v.std()))}"
            for _, v in table.groupby("batch", sort=True)[feature]]}
        for feature in (*cohort.features, *quality.harmonized_columns(table, cohort.features))]
    return _templates().get_template("group.html").render(
        title="Group", notice=notice, batches=batches, statistics=statistics, n_runs=len(table),
        min_runs=quality.MIN_RUNS, threshold=quality.OUTLIER, covariates=cohort.covariates,
        reference=cohort.reference_batch, outliers=outliers.to_dict("records"),
        features=cohort.features, between=_between(between, cohort.reference_batch or "the mean"),
        effects=_effects(effects), loss=biology.LOSS,
        changes={what: biology.name_effects(effects, kind)
                 for kind, what in biology.CHANGES.items()},
        sections=_sections([{"title": f.title, "caption": f.caption, "section": f.section,
                             "uri": _uri(f.svg)} for f in drawn]),
        trained=[{"name": name, "model": result.model, "tables": list(result.tables),
                  "harmonizes": "ReferenceBatch" in result.model and bool(result.checkpoints),
                  "weights": list(result.checkpoints), "folds": _folds(result),
                  "effects": _fold_effects(result),
                  "notices": result.notices,
                  "metrics": _metrics(result.model.get("Metrics", {}))}
                 for name, result in fitted.items()],
        **_common([*_paragraphs(records), *map(boilerplate.of_method, chosen)],
                  [*estimates, *chosen]))


def _between(table: pd.DataFrame, reference: str) -> dict[str, Any] | None:
    """Arrange agreement between sites: a row for each map and kind of data, a cell for each
    statistic; and how well a classifier separates each site (AUC). None for an empty table."""
    if not len(table):
        return None
    maps, batches = table[table["statistic"] != "auc"], []
    rows = []
    for (of, data), selected in maps.groupby(["of", "data"], sort=False):
        cells = {(row["statistic"], row["batch"]): row for row in selected.to_dict("records")}
        differences = {batch: (_interval(row), statistic == "unpaired_difference")
                       for (statistic, batch), row in cells.items() if "difference" in statistic}
        batches += [batch for batch in differences if batch not in batches]
        rows.append({"name": str(of).removesuffix("_mean"), "data": data,
                     "people": selected["people"].max(), "differences": differences,
                     **{name: next((_interval(row) for (statistic, _), row in cells.items()
                                    if statistic == name), "")
                        for name in ("icc_consistency", "icc_agreement", "cov")}})
    sites = [{"batch": batch, "cells": ", ".join(
        f"{row['data']} {_interval(row)}" for row in selected.to_dict("records"))}
        for batch, selected in table[table["statistic"] == "auc"].groupby("batch", sort=False)]
    return {"rows": rows, "batches": batches, "reference": reference, "sites": sites}


def _effects(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Format covariate effects, which are rows of a table of `biology`."""
    return [{"bad": row["verdict"] in biology.CHANGES, "name": biology.describe(row),
             "people": row["people"], "verdict": row["verdict"], "ratio": biology.format_ratio(row),
             "values": [_number(row[k]) for k in ("before", "after", "reference")]}
            for row in table.to_dict("records")]


def _fold_effects(result: Fitted) -> dict[str, Any] | None:
    """Find the table of covariate effects of a cross-validation, and format its rows."""
    return next(({"table": name, "rows": _effects(table)} for name, table in result.tables.items()
                 if "verdict" in table), None)


def _interval(row: Mapping[Any, Any]) -> str:
    """Format a value and, if it has one, its interval, to three digits."""
    value, low, high = (f"{float(row[k]):.3g}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if low != "nan" else value


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arrange metrics: a row for each metric, a cell for each model."""
    models = {k: v for k, v in metrics.items() if isinstance(v, Mapping)} or {"Value": metrics}
    names = list(dict.fromkeys(name for values in models.values() for name in values))
    rows = [{"name": name, "cells": [_number(values.get(name)) for values in models.values()]}
            for name in names]
    return {"models": list(models), "rows": rows} if rows else None


def _folds(result: Fitted) -> dict[str, Any] | None:
    """Arrange a cross-validation: for each site, shell, tissue and measure the mean NMSE before and
    after in every fold and over participants, and the mean bias."""
    for name, table in result.tables.items():
        if "fold" not in table:
            continue
        rows, pair = [], ["nmse_before", "nmse_after"]
        for key, selected in table.groupby(["batch", "shell", "tissue", "measure"], sort=False):
            means = selected.groupby("fold")[pair].mean()
            cells = [" → ".join(map(_number, row)) for row in means.itertuples(index=False)]
            before, after = selected[pair].mean()
            bias = selected[["bias_before", "bias_after"]].mean()
            rows.append({"key": key, "cells": cells, "mean": f"{_number(before)} → "
                         f"{_number(after)}", "change": f"{100 * (after / before - 1):+.0f} %",
                         "bias": " → ".join(f"{b:+.2g}" for b in bias), "worse": after > before,
                         "better": f"{int((selected[pair[1]] < selected[pair[0]]).sum())} of "
                                   f"{len(selected)}"})
        return {"table": name, "rows": rows, "folds": sorted(table["fold"].unique().tolist())}
    return None


def _run(record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Arrange a record for the template, with defaults for entries that it lacks."""
    figures = []
    for entry in record.get("figures", ()):
        path = root / entry["file"]
        figures.append({**entry, "uri": _uri(path.read_bytes()) if path.is_file() else None})
    qc = record.get("qc", {})
    described = quality.describe_columns(qc)
    state = record.get("state", "incomplete")
    size = record.get("voxel_size")
    sections = _sections(figures)
    return {
        **record, "state": state, "id": record.get("name", "run"), "refusals":
        record.get("refusals", {}), "notices": record.get("notices", []),
        "warnings": record.get("warnings", []),
        "size": " × ".join(f"{s:.3g}" for s in size) + " mm" if size else "",
        "shells": [{**s, "shape": _shape(s["b_delta"])} for s in record.get("shells", ())],
        "corrections": [{**c, "time": f"{c['seconds']:.1f}\u00a0s"}
                        for c in record.get("corrections", ())],
        "pictures_of_corrections": sections.pop("Corrections", []), "sections": sections,
        "qc": [{"name": k, "value": _number(v), **described[k]} for k, v in qc.items()],
        "scores": _scores(record.get("scores", {})),
        "covariates": dict(record.get("covariates", {}))}


def _scores(scores: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Arrange scores of synthetic signals: per mode a row for each measure with its mean error, SD
    and the error of noise alone."""
    columns, rows = scores.get("columns", {}), scores.get("rows", {})
    measures = [name for name in columns if f"{name}_sd" in columns]
    noise = rows.get("noise", {})
    return {mode: [{**columns[name], "name": name.removesuffix("_error").replace("_", " "),
                    "mean": _number(values.get(name)), "sd": _number(values.get(f"{name}_sd")),
                    "noise": _number(noise.get(name))} for name in measures]
            for mode, values in rows.items() if mode != "noise"}


def _refused(runs: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """List the runs that each method refused, by method and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for refusal in run["refusals"].items():
            groups.setdefault(refusal, []).append(run["id"])
    return groups


def _sections(figures: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group figures by the heading under which they stand."""
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for figure in figures:
        sections.setdefault(figure["section"], []).append(figure)
    return sections


def _paragraphs(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Gather the paragraphs of the methods text from the records of runs, each once."""
    return list(dict.fromkeys(tuple(p) for record in records
                              for p in record.get("paragraphs", ())))


def methods_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Write the methods text of what was done in runs, with references, from their records."""
    used = _methods(name for record in records for name in record.get("methods", ()))
    return boilerplate.markdown(_paragraphs(records), used)


def _common(paragraphs: Sequence[tuple[str, str]], used: Sequence[Method]) -> dict[str, Any]:
    """Gather the variables of the template that all pages share."""
    return {
        "style": _read(HERE / "style.css"), "version": __version__,
        "paragraphs": paragraphs, "references": boilerplate.references(used, paragraphs),
        "versions": {"QSphere": __version__, "Python": platform.python_version(),
                     **{p: _version(p) for p in PACKAGES}}}


def _methods(names: Iterable[str]) -> list[Method]:
    """Load each named method once; names without a method, as in old records, are left out."""
    loaded = []
    for name in dict.fromkeys(names):
        try:
            loaded.append(methods.get(name))
        except UsageError:
            continue
    return loaded


def _latest(folder: Path) -> Path | None:
    """Find the log folder of the latest invocation; the names begin with the time."""
    folders = sorted(p for p in folder.glob("*/") if (p / "status.json").is_file())
    return folders[-1] if folders else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError):
        return {}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _uri(svg: bytes) -> str:
    """Make a data URI, percent-encoded, since the pictures inside are base64 already."""
    return "data:image/svg+xml," + quote(svg, safe=" !$'()*+,-./:;=?@[]_~")


def _shape(b_delta: float) -> str:
    named = {1.0: "linear", 0.0: "spherical", -0.5: "planar"}
    return next((n for b, n in named.items() if abs(b - b_delta) < 0.03), f"b_Δ = {b_delta:.2f}")


def _number(value: Any) -> str:
    if value is None or value != value:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    templates.filters["cite"] = _cite
    return templates


def _cite(text: str) -> str:
    """Escape a text and turn its DOIs into links."""
    from markupsafe import Markup, escape

    out, at = Markup(), 0
    for match in boilerplate.DOI.finditer(text):
        doi = match[1].rstrip(".")
        shown = match[0].removesuffix(match[1]) + doi
        out += escape(text[at:match.start()])
        out += Markup('<a href="https://doi.org/{}" rel="noopener">{}</a>').format(doi, shown)
        at = match.start() + len(shown)
    return out + escape(text[at:])
