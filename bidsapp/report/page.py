"""HTML pages: one per participant and one per group, each a single file that opens offline.

Figures are embedded as data URIs, so their ids cannot clash; everything else from the data is
escaped by the template engine.
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
    """The page of a participant.

    records: what `recipe.execute` recorded of each run, those that failed too. problems: what
    could not even be made a run. root: OUTPUT_DIR, where figures and the latest options and status
    lie.
    """
    runs = [_run(record, root) for record in records]
    log = _latest(root / f"sub-{label}/log")
    status = _json(log / "status.json") if log else {}
    used = _methods(name for record in records for name in record.get("methods", ()))
    return _templates().get_template("participant.html").render(
        title=f"sub-{label}", label=label, runs=runs, problems=problems,
        failed=[r for r in runs if r["state"] != "complete"],
        refused=_refused(runs), status=status,
        options=_text(log / "options.toml") if log else "",
        log=log.relative_to(root) if log else "", **_common(_texts(records), used))


def group(cohort: Cohort, outliers: pd.DataFrame, between: pd.DataFrame, effects: pd.DataFrame,
          drawn: Sequence[Figure], fitted: Mapping[str, Fitted], *,
          chosen: Sequence[Method], notice: str = "",
          records: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a group: batches, distributions, outliers, agreement between sites (`between`),
    what harmonization left of people's differences (`effects`), what was trained."""
    table = cohort.statistics
    batches = [{"name": name, "participants": members["participant"].nunique(),
                "runs": len(members)} for name, members in table.groupby("batch", sort=True)]
    estimates = _methods(name for name in methods.names("estimate_") if any(
        c.startswith(f"{name.removeprefix('estimate_')}_") for c in cohort.features))
    units = quality.columns(table.columns)
    statistics = [
        {"name": feature.removesuffix("_mean"), "units": units[feature]["Units"], "cells": [
            f"{_number(float(v.mean()))} ± {_number(float(v.std()))}"
            for _, v in table.groupby("batch", sort=True)[feature]]}
        for feature in (*cohort.features, *quality.harmonized(table, cohort.features))]
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
                  "effects": _of_folds(result),
                  "notices": result.notices,
                  "metrics": _metrics(result.model.get("Metrics", {}))}
                 for name, result in fitted.items()],
        **_common([*_texts(records), *map(boilerplate.of_method, chosen)],
                  [*estimates, *chosen]))


def _between(found: pd.DataFrame, reference: str) -> dict[str, Any] | None:
    """A row for each map and kind of data, with a cell for each statistic; and how well each site
    can be told."""
    if not len(found):
        return None
    maps, batches = found[found["statistic"] != "auc"], []
    rows = []
    for (of, data), own in maps.groupby(["of", "data"], sort=False):
        cells = {(row["statistic"], row["batch"]): row for row in own.to_dict("records")}
        differences = {batch: (_interval(row), statistic == "unpaired_difference")
                       for (statistic, batch), row in cells.items() if "difference" in statistic}
        batches += [batch for batch in differences if batch not in batches]
        rows.append({"name": str(of).removesuffix("_mean"), "data": data,
                     "people": own["people"].max(), "differences": differences,
                     **{name: next((_interval(row) for (statistic, _), row in cells.items()
                                    if statistic == name), "")
                        for name in ("icc_consistency", "icc_agreement", "cov")}})
    sites = [{"batch": batch, "cells": ", ".join(
        f"{row['data']} {_interval(row)}" for row in own.to_dict("records"))}
        for batch, own in found[found["statistic"] == "auc"].groupby("batch", sort=False)]
    return {"rows": rows, "batches": batches, "reference": reference, "sites": sites}


def _effects(found: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of `biology`, as text."""
    return [{"bad": row["verdict"] in biology.CHANGES, "name": biology.describe(row),
             "people": row["people"], "verdict": row["verdict"], "ratio": biology.format_ratio(row),
             "values": [_number(row[k]) for k in ("before", "after", "reference")]}
            for row in found.to_dict("records")]


def _of_folds(result: Fitted) -> dict[str, Any] | None:
    """What a cross-validation left of people's differences."""
    return next(({"table": name, "rows": _effects(table)} for name, table in result.tables.items()
                 if "verdict" in table), None)


def _interval(row: Mapping[Any, Any]) -> str:
    """A value with the ends of its interval, if it has any, to three digits."""
    value, low, high = (f"{float(row[k]):.3g}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if low != "nan" else value


def _metrics(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row for each metric, with a cell for each model; of a method with one model, one."""
    models = {k: v for k, v in found.items() if isinstance(v, Mapping)} or {"Value": found}
    names = list(dict.fromkeys(name for own in models.values() for name in own))
    rows = [{"name": name, "cells": [_number(own.get(name)) for own in models.values()]}
            for name in names]
    return {"models": list(models), "rows": rows} if rows else None


def _folds(result: Fitted) -> dict[str, Any] | None:
    """A cross-validation: for each batch, shell, tissue and measure the mean NMSE before and after
    in every fold and over participants, and the mean bias."""
    for name, table in result.tables.items():
        if "fold" not in table:
            continue
        rows, pair = [], ["nmse_before", "nmse_after"]
        for key, own in table.groupby(["batch", "shell", "tissue", "measure"], sort=False):
            cells = [" → ".join(map(_number, row)) for row in own.groupby("fold")[pair].mean()
                     .itertuples(index=False)]
            before, after = own[pair].mean()
            bias = own[["bias_before", "bias_after"]].mean()
            rows.append({"key": key, "cells": cells, "mean": f"{_number(before)} → "
                         f"{_number(after)}", "change": f"{100 * (after / before - 1):+.0f} %",
                         "bias": " → ".join(f"{b:+.2g}" for b in bias), "worse": after > before,
                         "better": f"{int((own[pair[1]] < own[pair[0]]).sum())} of {len(own)}"})
        return {"table": name, "rows": rows, "folds": sorted(table["fold"].unique().tolist())}
    return None


def _run(record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A record as the template needs it, whatever it lacks."""
    figures = []
    for entry in record.get("figures", ()):
        path = root / entry["file"]
        figures.append({**entry, "uri": _uri(path.read_bytes()) if path.is_file() else None})
    qc = record.get("qc", {})
    described = quality.columns(qc)
    state = record.get("state", "incomplete")
    size = record.get("voxel_size")
    return {
        **record, "state": state, "id": record.get("name", "run"), "refusals":
        record.get("refusals", {}), "notices": record.get("notices", []),
        "size": " × ".join(f"{s:.3g}" for s in size) + " mm" if size else "",
        "shells": [{**s, "shape": _shape(s["b_delta"])} for s in record.get("shells", ())],
        "sections": _sections(figures),
        "qc": [{"name": k, "value": _number(v), **described[k]} for k, v in qc.items()],
        "scores": _scores(record.get("scores", {})),
        "covariates": dict(record.get("covariates", {}))}


def _scores(scores: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Per mode one row for each measure: its mean error, SD, and what noise alone makes of it."""
    columns, rows = scores.get("columns", {}), scores.get("rows", {})
    measures = [name for name in columns if f"{name}_sd" in columns]
    noise = rows.get("noise", {})
    return {mode: [{**columns[name], "name": name.removesuffix("_error").replace("_", " "),
                    "mean": _number(values.get(name)), "sd": _number(values.get(f"{name}_sd")),
                    "noise": _number(noise.get(name))} for name in measures]
            for mode, values in rows.items() if mode != "noise"}


def _refused(runs: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Runs by the method that left them out and its reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for refusal in run["refusals"].items():
            found.setdefault(refusal, []).append(run["id"])
    return found


def _sections(figures: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for figure in figures:
        sections.setdefault(figure["section"], []).append(figure)
    return sections


def _texts(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Paragraphs of the methods text that runs were recorded with, each once."""
    return list(dict.fromkeys(tuple(p) for record in records
                              for p in record.get("paragraphs", ())))


def _common(paragraphs: Sequence[tuple[str, str]], used: Sequence[Method]) -> dict[str, Any]:
    return {
        "style": _text(HERE / "style.css"), "version": __version__,
        "paragraphs": paragraphs, "references": boilerplate.references(used, paragraphs),
        "versions": {"QSphere": __version__, "Python": platform.python_version(),
                     **{p: _version(p) for p in PACKAGES}}}


def _methods(names: Iterable[str]) -> list[Method]:
    """Each named method once; one that is no longer there is left out."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(methods.get(name))
        except UsageError:
            continue
    return found


def _latest(folder: Path) -> Path | None:
    """The folder of the latest invocation: their names begin with the time."""
    found = sorted(p for p in folder.glob("*/") if (p / "status.json").is_file())
    return found[-1] if found else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _uri(svg: bytes) -> str:
    """A data URI; percent-encoded, because the pictures inside are base64 already."""
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
    """The text, escaped, its DOIs as links."""
    from markupsafe import Markup, escape

    out, at = Markup(), 0
    for match in boilerplate.DOI.finditer(text):
        doi = match[1].rstrip(".")
        shown = match[0].removesuffix(match[1]) + doi
        out += escape(text[at:match.start()])
        out += Markup('<a href="https://doi.org/{}" rel="noopener">{}</a>').format(doi, shown)
        at = match.start() + len(shown)
    return out + escape(text[at:])
