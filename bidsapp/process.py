"""One participant: load each run, apply the methods, write derivatives, figures and the page."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tomli_w
import torch

from bidsapp import __version__, harmonize, methods
from bidsapp.acquisition import Acquisition
from bidsapp.bids import btable, names, sidecar
from bidsapp.bids.derivatives import Output
from bidsapp.bids.writer import Batch, Dataset, sha256, to_json
from bidsapp.checkpoint import CARD
from bidsapp.dwi import Dwi, Run, load, noise_sd, open_image, read_mean
from bidsapp.errors import DataError, Refusal, describe
from bidsapp.evaluate import change, gradients, plausibility, quality
from bidsapp.mask import given, median_otsu
from bidsapp.methods import Method
from bidsapp.microstructure.maps import WEIGHTS
from bidsapp.options import Options
from bidsapp.preprocess import anatomy
from bidsapp.report import comparison, figures, page

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
        if problems:
            dataset.write_text(f"{folder}/crash-sub-{label}.txt", "\n".join(problems) + "\n")
        for run in runs:
            status[run.name] = one_run(job, dataset, run, folder)
            if status[run.name]["status"] == "failed" and job.options.stop_on_first_crash:
                break
        ok = not problems and all(done(s, job.options) for s in status.values())
        try:
            dataset.write_text(f"{folder}/options.toml", tomli_w.dumps(job.options.as_dict()))
            dataset.write_text(f"{folder}/status.json", to_json({
                "participant": label, "status": "done" if ok else "failed",
                "version": __version__, "started": started,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "problems": problems, "runs": status}))
            write_page(dataset, label, problems + [s["error"] for s in status.values()
                                                   if s["status"] == "refused"])
        except Exception as error:  # one participant's failure must not stop the others
            log.error("sub-%s: its log and page could not be written: %s", label, describe(error))
            return False
    return ok


def one_run(job: Job, dataset: Dataset, run: Run, folder: str) -> dict[str, Any]:
    """Process one run unless it is complete and unchanged; an error is noted, never raised."""
    path = names.output(run.entities, "dwi", ".json", "log")
    start = time.monotonic()
    try:
        mark = fingerprint(run, job.options)
        if dataset.is_complete(record := dataset.record(path), mark):
            log.info("%s: complete and unchanged, skipped", run.name)
            return {"status": "skipped", "refusals": record.get("refusals", {})}
        if conflict := conflicting_model(dataset, run, harmonize.find(job.options)):
            log.error("%s: %s", run.name, conflict)
            return {"status": "refused", "error": f"{run.name}: {conflict}"}
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
        shown = describe(error)
        log.error("%s: %s", run.name, shown, exc_info=job.options.verbose > 1)
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


def done(status: Mapping[str, Any], options: Options) -> bool:
    """Tell whether a run is what the user asked for.

    An estimate of the default set that the acquisition does not support may be left out; a
    harmonization, and a method that was asked for by its name, may not.
    """
    named = [m.name for m in chosen_methods(options)] if options.estimate else ["synthesize"]
    return status["status"] not in ("failed", "refused") and not any(
        name.startswith("harmonize_") or name.removeprefix("harmonized_") in named
        for name in status.get("refusals", ()))


def conflicting_model(dataset: Dataset, run: Run, models: Sequence[harmonize.Model]) -> str | None:
    """Say by which other model the harmonized images were made that a run would replace.

    Parameters
    ----------
    dataset : Dataset
        OUTPUT_DIR.
    run : Run
        With the images of an earlier harmonization there, or without.
    models : sequence of harmonize.Model
        Those that --harmonize names. Images made by one of the same Id, trained again or not, or
        of the same weights may be replaced; so may the unchanged signal of a reference batch that
        all models share.

    Returns
    -------
    str or None
        What was found, what is needed and what to do; None if nothing is in the way.
    """
    image = dataset.root / names.output(run.entities, "dwi", ".nii.gz", desc="harmonized")
    about = dataset.record(names.output(run.entities, "dwi", ".json", desc="harmonized"))
    earlier = about.get("HarmonizationModel")
    cards = [m.checkpoint.card for m in models]
    if (not models or not earlier or not image.is_file()
            or earlier["Id"] in [m.id for m in models]
            or earlier["SHA256"] in [card.sha256 for card in cards]
            or (about.get("Unchanged") and all(run.batch == c.reference_batch for c in cards))):
        return None
    return (f"{image} was made by the model {earlier['Id']} (SHA-256 {earlier['SHA256'][:16]}…), "
            f"and --harmonize names {', '.join(m.id for m in models)}, whose images would have the "
            "same names. Needed is one model per OUTPUT_DIR. Give another OUTPUT_DIR (and the "
            "model's folder to --harmonize), or remove the earlier image. Nothing was changed.")


@dataclass
class Findings:
    """What is told of a run beside its images, as it is found."""

    qc: dict[str, Any]
    drawn: list[figures.Figure]
    refusals: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)

    def refuse(self, run: Run, name: str, refusal: Refusal) -> None:
        self.refusals[name] = str(refusal)
        log.warning("%s: %s is left out: %s", run.name, name, refusal)


def process(job: Job, dataset: Dataset, run: Run, batch: Batch) -> None:
    """mask → load → harmonize → check → apply → write → figures, for one run."""
    dwi, mean_b0 = dwi_of(run, memory=job.memory, work_dir=job.options.work_dir)
    acquisition, mask = dwi.acquisition, dwi.mask
    mask_source = dataset.uri(run.mask) if run.mask else "median-Otsu (dipy) of the mean b0"
    like = open_image(run.parts[0].image)

    mask_path = names.output(run.entities, "mask", ".nii.gz", desc="brain")
    batch.image(mask_path, mask.astype("uint8"), like, sidecar.mask(run, dataset, mask_source))
    doubts, coherence = doubt(run, dwi, mean_b0)
    findings = Findings(quality.quality(dwi) | coherence, figures.of_signal(dwi, mean_b0),
                        notices=doubts)
    chosen = chosen_methods(job.options)
    if any(method.wants_tissue and not refused(method, acquisition) for method in chosen):
        dwi, told = tissue_of(run, dwi, job.options.work_dir)
        log.info("%s: %s", run.name, told)
        findings.notices.append(told)
    output = Output(batch, run, dwi, like, mask_path, job.options.random_seed, job.device)
    harmonized = travel(job, output, findings)
    for method in chosen:
        measured = apply(job, method, output, findings)
        if measured is None or not harmonized or not method.name.startswith("estimate_"):
            continue
        # of the reference batch the signal is the same, and so is all that is made of it
        after = measured if harmonized.dwi is dwi else apply(job, method, harmonized, findings)
        findings.qc |= {f"harmonized_{key}": value for key, value in (after or {}).items()}
    qc = findings.qc
    batch.table(names.output(run.entities, "qc", ".tsv", desc="image"), [qc], quality.columns(qc))
    batch.facts |= {
        "n_voxels": int(mask.sum()), "n_volumes": len(acquisition), "mask_source": mask_source,
        "voxel_size": [float(z) for z in like.header.get_zooms()[:3]],
        "shells": [{"b": s.b, "b_delta": s.b_delta, "n_directions": len(s)}
                   for s in acquisition.shells],
        "n_b0": int(acquisition.b0.sum()), "qc": qc, "refusals": findings.refusals,
        "notices": list(dict.fromkeys(findings.notices)), "methods": findings.methods,
        "figures": [draw(batch, run, figure) for figure in findings.drawn]}
    if findings.scores:
        batch.facts["scores"] = findings.scores


def travel(job: Job, output: Output, findings: Findings) -> Output | None:
    """The harmonized signal, written and compared, and where maps made of it go; None where that
    is not asked for, or refused."""
    models, run, dwi = harmonize.find(job.options), output.run, output.dwi
    if not models:
        return None
    try:
        result = harmonize.apply(models, dwi, run, allow=job.options.allow_extrapolation,
                                 device=job.device)
    except Refusal as refusal:
        findings.refuse(run, models[0].method.name, refusal)
        return None
    log.info("%s: %s", run.name, result.notices[0])
    compared = change.change(dwi, result.dwi, job.device)
    findings.qc |= {**result.counts, **change.statistics(compared, result.dwi)}
    findings.notices += result.notices
    findings.methods.append(result.model.method.name)
    if result.changed:
        findings.drawn += comparison.of_change(compared, dwi)
    return output.harmonized(result)


def apply(job: Job, method: Method, output: Output, findings: Findings) -> dict[str, Any] | None:
    """What a method makes of one signal, written; its counts and statistics, which belong to the
    measured signal unless `output` has a desc. None where it refuses."""
    run, dwi = output.run, output.dwi
    try:
        method.check(dwi.acquisition)
        log.info("%s: %s on %d voxels", run.name, method.name, len(dwi.signal))
        derived = method.run(dwi, job.options, job.device)
        if output.no_intervals:
            derived = derived.without_intervals(output.no_intervals)
        elif output.widening > 1:
            derived = derived.widened(output.widening, method.ranges)
    except Refusal as refusal:
        findings.refuse(run, "_".join(filter(None, (output.desc, method.name))), refusal)
        return None
    output.write(method, derived)
    told = {**derived.counts, **quality.statistics(method, derived)}
    findings.notices += derived.notices
    if not output.desc:
        findings.qc |= told
        findings.methods.append(method.name)
        findings.drawn += figures.of_maps(method, derived, dwi)
    if derived.synthetic:
        findings.scores = {"columns": method.outputs["scores"], "rows": derived.synthetic.scores}
    return told


def dwi_of(run: Run, *, memory: float = math.inf, work_dir: Path | None = None
           ) -> tuple[Dwi, np.ndarray]:
    """A run within its mask, the one beside it or else one of its b0, with its noise; and the mean
    b0 image."""
    acquisition = btable.acquisition_of(run)
    mean_b0, affine = read_mean(run, acquisition.b0)
    try:
        mask = given(run.mask, mean_b0.shape, affine) if run.mask else median_otsu(mean_b0)
    except DataError as error:
        raise DataError(f"{run.mask or run.parts[0].image}: {error}") from error
    dwi = load(run, mask, acquisition, memory=memory, work_dir=work_dir)
    return replace(dwi, noise_sd=noise_sd(dwi)), mean_b0


def doubt(run: Run, dwi: Dwi, mean_b0: np.ndarray) -> tuple[list[str], dict[str, float | None]]:
    """Sentences on what is probably wrong with signal or tables, logged, and QC of the b-vectors.

    Raises DataError where the signal cannot be right.
    """
    try:
        doubts = plausibility.check(dwi, mean_b0)
    except DataError as error:
        raise DataError(f"{', '.join(str(p.image) for p in run.parts)}: {error}") from error
    found = gradients.coherence(dwi, btable.fsl_axes(dwi.affine))
    if found and found.better:
        doubts.append(gradients.notice(found))
    for sentence in doubts:
        log.warning("%s: %s", run.name, sentence)
    return doubts, {"fibre_coherence": found.given if found else None,
                    "fibre_coherence_best": found.best if found else None}


def refused(method: Method, acquisition: Acquisition) -> bool:
    try:
        method.check(acquisition)
    except Refusal:
        return True
    return False


def tissue_of(run: Run, dwi: Dwi, work_dir: Path | None) -> tuple[Dwi, str]:
    """The Dwi with tissue from the run's T1w image where that can be had, and a sentence on it."""
    if run.t1w is None:
        return dwi, "No T1w image was found: tissue comes from the DWI alone."
    try:
        tissue = anatomy.posteriors(dwi, run.t1w, run.probsegs, work_dir)
    except DataError as error:
        return dwi, f"The T1w image is not used, tissue comes from the DWI alone: {error}"
    return replace(dwi, tissue=tissue), f"Tissue was sought in {run.t1w.name}."


def draw(batch: Batch, run: Run, figure: figures.Figure) -> dict[str, str]:
    """Stage a figure; what the page needs to know of it."""
    path = names.output(run.entities, figure.suffix, ".svg", "figures", **figure.entities)
    batch.bytes(path, figure.svg)
    return {"file": str(path), "title": figure.title, "caption": figure.caption,
            "section": figure.section}


def write_page(dataset: Dataset, label: str, problems: list[str]) -> None:
    """sub-LABEL.html from the records and figures in the output tree."""
    records = [{"name": p.name.removesuffix("_dwi.json"),
                **dataset.record(PurePosixPath(p.relative_to(dataset.root)))}
               for p in sorted((dataset.root / f"sub-{label}/log").glob("sub-*_dwi.json"))]
    with dataset.batch(PurePosixPath(f"sub-{label}/log/page.json")) as batch:
        batch.facts = {"problems": problems}
        batch.text(PurePosixPath(f"sub-{label}.html"),
                   page.participant(label, records, problems, dataset.root))


def chosen_methods(options: Options) -> list[Method]:
    """The methods that the options ask for, in the order in which they are applied.

    Raises:
        UsageError: a name that no folder under methods/ has.
    """
    if options.upsample:
        raise methods.get(Path(options.upsample).name, "upsample").group_only()
    there = methods.names("estimate_")
    estimates = options.estimate or [n for n in DEFAULT_ESTIMATES if f"estimate_{n}" in there]
    chosen = [*(methods.get(name, "estimate") for name in dict.fromkeys(estimates)),
              *([methods.get("synthesize")] if options.synthesize else [])]
    for method in chosen:
        method.sloppy, method.models = options.sloppy, options.output_dir / harmonize.MODELS
    return chosen


def fingerprint(run: Run, options: Options) -> str:
    """SHA-256 over all that results depend on: inputs' bytes, sidecars, options, version."""
    chosen = chosen_methods(options)
    wanted = run.anatomy if any(m.wants_tissue for m in chosen) else ()
    what = {"version": __version__, "entities": run.entities, "batch": run.batch,
            "inputs": [sha256(f) for f in run.files], "covariates": run.covariates,
            "metadata": [p.metadata for p in run.parts],
            "anatomy": [sha256(f) if f.is_file() else str(f) for f in wanted],
            "methods": [m.name for m in chosen],
            "weights": [sha256(f) for m in chosen if (f := WEIGHTS / m.name / CARD).is_file()],
            "models": [sha256(f) for f in sorted(
                (options.output_dir / harmonize.MODELS).glob("*/*.json"))],
            "harmonize": [sha256(f / CARD) for f in harmonize.folders(options)],
            "synthesis": [options.synthesize, options.synthesize_voxels, options.synthesize_image],
            "options": [options.random_seed, options.allow_extrapolation, options.sloppy]}
    return hashlib.sha256(to_json(what).encode()).hexdigest()
