"""The two recipes: one participant at a time, and across participants. Read from top to bottom."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pandas as pd
import tomli_w
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bidsapp import __version__, methods
from bidsapp.bids import btable, find, names, sidecar
from bidsapp.bids.writer import Batch, Dataset, sha256, to_json
from bidsapp.blocks import choose_device, memory_limit
from bidsapp.dwi import (
    FIXED_MEMORY,
    Dwi,
    Run,
    load,
    noise_sd,
    open_image,
    peak_memory,
    read_mean,
)
from bidsapp.errors import DataError, QSphereError, Refusal, UsageError
from bidsapp.evaluate import quality
from bidsapp.mask import given, median_otsu
from bidsapp.methods import Derived, Method
from bidsapp.report import boilerplate, figures, page

if TYPE_CHECKING:
    from bidsapp.cli import Options

log = logging.getLogger("qsphere")
DEFAULT_ESTIMATES = ("dti", "smt", "scnn2")


@dataclass(frozen=True)
class Job:
    """What one participant's process needs to know beside its runs."""

    options: Options
    links: Mapping[str, Path]
    invocation: str
    device: str
    memory: float

    @property
    def dataset(self) -> Dataset:
        return Dataset(self.options.output_dir, self.links)


def participant(options: Options) -> int:
    """Find runs, process each, write derivatives and a page per participant. Returns exit code."""
    chosen = chosen_methods(options)
    if options.reports_only:
        return pages_again(options)
    found = find.find(options)
    if options.dry_run:
        print(plan(found, chosen, options))
        return 0
    links = {"raw": options.bids_dir, **dict(options.derivatives)}
    dataset = Dataset(options.output_dir, links)
    dataset.claim()
    dataset.describe(found.name, found.authors, boilerplate.acknowledge())
    dataset.write_text("logs/CITATION.md", boilerplate.markdown(chosen))
    if options.boilerplate_only:
        return 0
    memory = memory_limit(options.mem_mb)
    if memory < FIXED_MEMORY:
        log.warning("%.1f GB of memory is little: up to %.1f GB is needed beside the signal.",
                    memory / 1e9, FIXED_MEMORY / 1e9)
    workers = max(1, min(options.nprocs // options.omp_nthreads, len(found.participants),
                         int(memory // FIXED_MEMORY)))
    job = Job(options, links, f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4()}",
              choose_device(options.device), memory / workers)
    failed = [label for label, ok in run_all(job, found, workers) if not ok]
    dataset.participants(found.rows, found.columns)
    for label in found.unknown:
        log.error("sub-%s does not exist in %s; the others were processed.", label,
                  options.bids_dir)
    if failed:
        log.error("failed: %s; their pages and crash files say why.",
                  ", ".join(f"sub-{label}" for label in sorted(failed)))
    log.info("results: %s", dataset.root)
    return 1 if failed or found.unknown else 0


def group(options: Options) -> int:
    """Table, distributions and outliers over what participants left; trains what is asked for."""
    trained = [methods.get(name) for name in options.train]
    found = find.find(options)
    dataset = Dataset(options.output_dir, {"raw": options.bids_dir, **dict(options.derivatives)})
    statistics, covariates = participant_statistics(dataset, found)
    features = tuple(quality.map_features(statistics.columns))
    if options.dry_run:
        print(f"{len(statistics)} runs, {len(features)} map statistics; batches: "
              + ", ".join(f"{b}: {n}" for b, n in statistics["batch"].value_counts().items())
              + f"; trains {', '.join(options.train) or 'nothing'}")
        return 0
    study = methods.Study(statistics, features, tuple(covariates), options.reference_batch)
    dataset.claim()
    dataset.describe(found.name, found.authors, boilerplate.acknowledge())
    with dataset.lock("group"), dataset.batch(PurePosixPath("group/log/group.json")) as batch:
        folder = PurePosixPath("group")
        batch.table(folder / "desc-image_qc.tsv", statistics.to_dict("records"),
                    quality.columns(statistics.columns))
        fitted = {m.name: m.fit(study) for m in trained}
        for result in fitted.values():
            for name, table in result.tables.items():
                batch.table(folder / f"{name}.tsv", table.to_dict("records"),
                            quality.columns(table.columns))
            batch.text(folder / "desc-harmonizer_model.json", to_json(result.model))
        drawn = figures.of_group(study, fitted)
        for figure in drawn:
            batch.bytes(folder / "figures" / f"desc-{figure.entities['desc']}.svg", figure.svg)
        batch.text(PurePosixPath("group.html"), page.group(
            study, quality.outliers(statistics), drawn, fitted, chosen=trained))
    log.info("results: %s", dataset.root / "group.html")
    return 0


def participant_statistics(dataset: Dataset, found: find.Found) -> tuple[pd.DataFrame, list[str]]:
    """One row per processed run: who, batch and covariates (as BIDS_DIR says now), QC and maps."""
    rows: list[dict[str, Any]] = []
    covariates: dict[str, Any] = {}
    for run in (run for label in found.participants for run in found.runs[label]):
        record = dataset.record(names.output(run.entities, "dwi", ".json", "log"))
        if record.get("state") != "complete":
            log.warning("%s: not processed (or failed), so it is not in the group", run.name)
            continue
        covariates |= run.covariates
        rows.append({"participant": run.participant, "session": run.session or "n/a",
                     "run": run.name, "batch": run.batch, **run.covariates, **record["qc"]})
    if not rows:
        raise UsageError(f"{dataset.root} holds no finished run of these participants. Run the "
                         "participant level first.")
    return pd.DataFrame(rows), list(covariates)


def run_all(job: Job, found: find.Found, workers: int) -> Iterator[tuple[str, bool]]:
    """(label, succeeded) of each participant, `workers` of them at a time."""
    todo = found.participants
    with logging_redirect_tqdm(), tqdm(total=len(todo), desc="participants", disable=None) as bar:
        if workers == 1:
            for label in todo:
                ok = one_participant(job, label, found.runs[label], found.problems[label])
                bar.update()
                yield label, ok
                if not ok and job.options.stop_on_first_crash:
                    return
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            futures = {pool.submit(one_participant, job, label, found.runs[label],
                                   found.problems[label]): label for label in todo}
            for future in as_completed(futures):
                bar.update()
                label, ok = futures[future], not future.exception() and future.result()
                if future.exception():
                    log.error("sub-%s: its process died (%s); too little memory is the usual "
                              "cause: fewer at a time with --omp-nthreads, or --mem-mb.", label,
                              future.exception())
                yield label, ok
                if not ok and job.options.stop_on_first_crash:
                    pool.shutdown(cancel_futures=True)
                    return


def one_participant(job: Job, label: str, runs: list[Run], problems: list[str]) -> bool:
    """Process a participant's runs, note what happened, write the page. True if all succeeded."""
    torch.set_num_threads(job.options.omp_nthreads)
    logging.basicConfig(level=logging.DEBUG if job.options.verbose else logging.INFO,
                        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    dataset, started = job.dataset, time.strftime("%Y-%m-%dT%H:%M:%S%z")
    folder = f"sub-{label}/log/{job.invocation}"
    with dataset.lock(f"sub-{label}"):
        status: dict[str, dict[str, Any]] = {}
        for problem in problems:
            log.error("sub-%s: %s", label, problem)
        for run in runs:
            status[run.name] = one_run(job, dataset, run, folder)
            if status[run.name]["status"] == "failed" and job.options.stop_on_first_crash:
                break
        ok = not problems and all(s["status"] != "failed" for s in status.values())
        try:
            dataset.write_text(f"{folder}/options.toml", tomli_w.dumps(job.options.as_dict()))
            dataset.write_text(f"{folder}/status.json", to_json({
                "participant": label, "status": "done" if ok else "failed",
                "version": __version__, "started": started,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "problems": problems, "runs": status}))
            write_page(dataset, label, problems)
        except (OSError, DataError) as error:
            log.error("sub-%s: its log and page could not be written: %s", label, error)
            return False
    return ok


def one_run(job: Job, dataset: Dataset, run: Run, folder: str) -> dict[str, Any]:
    """Process one run unless it is complete and unchanged; an error is noted, never raised."""
    path = names.output(run.entities, "dwi", ".json", "log")
    start = time.monotonic()
    try:
        mark = fingerprint(run, job.options)
        if dataset.is_complete(dataset.record(path), mark):
            log.info("%s: complete and unchanged, skipped", run.name)
            return {"status": "skipped"}
        log.info("%s: %d file(s), batch %s", run.name, len(run.parts), run.batch)
        with dataset.batch(path, mark) as batch:
            batch.facts = {"name": run.name, "entities": run.entities, "batch": run.batch,
                           "batch_source": run.batch_source, "covariates": run.covariates,
                           "files": [dataset.uri(f) for f in run.files]}
            process(job, dataset, run, batch)
            batch.facts |= {"status": "done", "seconds": round(time.monotonic() - start, 1)}
        log.info("%s: done in %.1f s", run.name, time.monotonic() - start)
        return {"status": "done", "refusals": batch.facts["refusals"]}
    except Exception as error:  # one run's failure must not stop the others
        foreseen = isinstance(error, QSphereError)
        shown = str(error) if foreseen else f"{type(error).__name__}: {error}"
        log.error("%s: %s", run.name, shown, exc_info=job.options.verbose > 1 and not foreseen)
        crash = f"{folder}/crash-{run.name}.txt"
        facts = {"name": run.name, "entities": run.entities, "status": "failed", "error": shown,
                 "batch": run.batch, "batch_source": run.batch_source,
                 "files": [dataset.uri(f) for f in run.files], "crash": crash}
        try:
            dataset.write_text(crash, "".join(traceback.format_exception(error)))
            dataset.fail(path, facts)
        except (OSError, DataError) as disk:
            log.error("%s: the failure could not be recorded either (%s)", run.name, disk)
        return facts


def process(job: Job, dataset: Dataset, run: Run, batch: Batch) -> None:
    """mask → load → check → apply → write → figures, for one run."""
    acquisition = btable.acquisition_of(run)
    mean_b0, affine = read_mean(run, acquisition.b0)
    mask = given(run.mask, mean_b0.shape, affine) if run.mask else median_otsu(mean_b0)
    mask_source = dataset.uri(run.mask) if run.mask else "median-Otsu (dipy) of the mean b0"
    dwi = load(run, mask, acquisition, memory=job.memory, work_dir=job.options.work_dir)
    dwi = replace(dwi, noise_sd=noise_sd(dwi))
    like = open_image(run.parts[0].image)

    mask_path = names.output(run.entities, "mask", ".nii.gz", desc="brain")
    batch.image(mask_path, mask.astype("uint8"), like, sidecar.mask(run, dataset, mask_source))
    qc: dict[str, Any] = dict(quality.quality(dwi))
    refusals: dict[str, str] = {}
    drawn = figures.of_signal(dwi, mean_b0)
    for method in chosen_methods(job.options):
        try:
            method.check(acquisition)
        except Refusal as refusal:
            refusals[method.name] = str(refusal)
            log.warning("%s: %s is left out: %s", run.name, method.name, refusal)
            continue
        log.info("%s: %s on %d voxels", run.name, method.name, len(dwi.signal))
        derived = method.apply(dwi, job.device)
        write_maps(job, dataset, run, batch, method, derived, dwi, like, mask_path)
        qc |= {**derived.counts, **quality.statistics(method, derived)}
        drawn += figures.of_maps(method, derived, dwi)
    batch.table(names.output(run.entities, "qc", ".tsv", desc="image"), [qc], quality.columns(qc))
    batch.facts |= {
        "n_voxels": int(mask.sum()), "n_volumes": len(acquisition), "mask_source": mask_source,
        "voxel_size": [float(z) for z in like.header.get_zooms()[:3]],
        "shells": [{"b": s.b, "b_delta": s.b_delta, "n_directions": len(s)}
                   for s in acquisition.shells],
        "n_b0": int(acquisition.b0.sum()), "qc": qc, "refusals": refusals, "notices": [],
        "methods": [m.name for m in chosen_methods(job.options) if m.name not in refusals],
        "figures": [draw(batch, run, figure) for figure in drawn]}


def write_maps(job: Job, dataset: Dataset, run: Run, batch: Batch, method: Method,
               derived: Derived, dwi: Dwi, like: Any, mask_path: PurePosixPath) -> None:
    """Every map of a method on the image grid, with its sidecar."""
    outputs = method.outputs
    for key, values in derived.maps.items():
        output = outputs["maps"][key]
        path = names.output(run.entities, "dwimap", ".nii.gz", model=outputs["model"]["name"],
                            **output["entities"])
        batch.image(path, dwi.unmask(values), like, sidecar.derived(
            run, dataset, model=outputs["model"], output=output, parameters=derived.parameters,
            mask_uri=dataset.uri(dataset.root / mask_path), seed=job.options.random_seed,
            device=job.device))


def draw(batch: Batch, run: Run, figure: figures.Figure) -> dict[str, str]:
    """Stage a figure; what the page needs to know of it."""
    path = names.output(run.entities, figure.suffix, ".svg", "figures", **figure.entities)
    batch.bytes(path, figure.svg)
    return {"file": str(path), "title": figure.title, "caption": figure.caption,
            "section": figure.section}


def write_page(dataset: Dataset, label: str, problems: list[str]) -> None:
    """sub-LABEL.html from the records and figures in the output tree."""
    records = [json.loads(p.read_text())
               for p in sorted((dataset.root / f"sub-{label}/log").glob("sub-*_dwi.json"))]
    with dataset.batch(PurePosixPath(f"sub-{label}/log/page.json")) as batch:
        batch.facts = {"problems": problems}
        batch.text(PurePosixPath(f"sub-{label}.html"),
                   page.participant(label, records, problems, dataset.root))


def pages_again(options: Options) -> int:
    """--reports-only: every page from what earlier runs left in OUTPUT_DIR."""
    dataset = Dataset(options.output_dir, {})
    labels = [p.parent.name.removeprefix("sub-") for p in sorted(dataset.root.glob("sub-*/log"))]
    wanted = [s for s in labels if s in options.participant_label or not options.participant_label]
    if not wanted:
        raise UsageError(f"--reports-only: {dataset.root} holds no processed participant"
                         f"{' of that label' if labels else ''}. Run without --reports-only first.")
    dataset.claim()
    for label in wanted:
        with dataset.lock(f"sub-{label}"):
            earlier = dataset.record(PurePosixPath(f"sub-{label}/log/page.json"))
            write_page(dataset, label, earlier.get("problems", []))
    return 0


def chosen_methods(options: Options) -> list[Method]:
    """The methods that the options ask for, in the order in which they are applied.

    Raises:
        UsageError: a name that no folder under methods/ has.
    """
    for kind in ("harmonize", "upsample"):
        if name := getattr(options, kind):
            methods.get(Path(name).name, kind)
    if options.synthesize:
        methods.get("synthesize")
    if options.estimate:
        return [methods.get(name, "estimate") for name in options.estimate]
    there = methods.names("estimate_")
    return [methods.get(n, "estimate") for n in DEFAULT_ESTIMATES if f"estimate_{n}" in there]


def fingerprint(run: Run, options: Options) -> str:
    """SHA-256 over all that results depend on: inputs' bytes, sidecars, options, version."""
    what = {"version": __version__, "entities": run.entities, "batch": run.batch,
            "inputs": [sha256(f) for f in run.files], "covariates": run.covariates,
            "metadata": [p.metadata for p in run.parts],
            "methods": [m.name for m in chosen_methods(options)],
            "options": [options.random_seed, options.allow_extrapolation, options.sloppy]}
    return hashlib.sha256(to_json(what).encode()).hexdigest()


def plan(found: find.Found, chosen: list[Method], options: Options) -> str:
    """What would run, on what, with predicted memory: the text of --dry-run."""
    lines = []
    for label in found.participants:
        lines += [f"sub-{label}: {problem}" for problem in found.problems[label]]
        for run in found.runs[label]:
            try:
                acquisition = btable.acquisition_of(run)
                shape = open_image(run.parts[0].image).shape
            except QSphereError as error:
                lines.append(f"{run.name}: would fail: {error}")
                continue
            table = ", ".join(f"{len(s)} × b{s.b:.0f}" for s in acquisition.shells)
            voxels = shape[0] * shape[1] * shape[2]
            most = peak_memory(voxels, len(acquisition)) / 1e9
            lines.append(f"{run.name}: {'x'.join(map(str, shape[:3]))} voxels, "
                         f"{acquisition.b0.sum()} × b0, {table}; batch {run.batch}; "
                         f"at most {most:.1f} GB")
            for method in chosen:
                try:
                    method.check(acquisition)
                    lines.append(f"  {method.name}")
                except Refusal as refusal:
                    lines.append(f"  {method.name}: refused: {refusal}")
    return "\n".join(lines)
