"""Execute plans: one participant after another, one run after another, step by step.

A step is skipped if its record is complete and has the same fingerprint, and its files are
unchanged; its signal is read back if a later step needs it. A refusal is recorded as well, and so
is not tried again. The record of a run, `sub-01_dwi.json`, gathers the records of its steps; the
page and the group level read it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tomli_w
import torch

from bidsapp import __version__
from bidsapp.bids import names
from bidsapp.bids.writer import Dataset, Transaction, to_json
from bidsapp.dwi import Run
from bidsapp.errors import DataError, Refusal, describe
from bidsapp.evaluate import quality
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.anatomy import write_anatomy
from bidsapp.recipe.plan import Chosen, choose, plan
from bidsapp.recipe.preprocess import Preprocess
from bidsapp.recipe.signals import Harmonize
from bidsapp.recipe.steps import Measure, RunContext, Step, StepReport, lacks
from bidsapp.report import figures, page
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")


@dataclass(frozen=True)
class Invocation:
    """One call of the program: what the process of a participant needs of it.

    Parameters
    ----------
    options : Options
    links : mapping of str to Path
        Folders of the input datasets, by the name in `bids:NAME:…` URIs.
    id : str
        Name of the folder of the log.
    device : str
        cpu, cuda or cuda:N.
    memory : float
        Bytes that the process may use.
    threads : int
        CPUs that the process may use.
    """

    options: Options
    links: Mapping[str, Path]
    id: str
    device: str
    memory: float
    threads: int

    @property
    def dataset(self) -> Dataset:
        """OUTPUT_DIR."""
        return Dataset(self.options.output_dir, self.links)


def process_participant(invocation: Invocation, label: str, runs: list[Run], problems: list[str]
                        ) -> bool:
    """Process the runs of a participant, and write the log and the page.

    Parameters
    ----------
    invocation : Invocation
    label : str
        Participant, without sub-.
    runs : list of Run
    problems : list of str
        Sentences on files of the participant that cannot be used.

    Returns
    -------
    bool
        Whether everything that the user asked for was done.
    """
    torch.set_num_threads(invocation.threads)
    logging.basicConfig(level=logging.DEBUG if invocation.options.verbose else logging.INFO,
                        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    options, dataset = invocation.options, invocation.dataset
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    folder = f"sub-{label}/log/{invocation.id}"
    chosen = choose(options)
    with dataset.lock(f"sub-{label}"):
        status: dict[str, dict[str, Any]] = {}
        for problem in problems:
            log.error("sub-%s: %s", label, problem)
        if problems:
            dataset.write_text(f"{folder}/crash-sub-{label}.txt", "\n".join(problems) + "\n")
        contexts = [RunContext(options, dataset, run, invocation.device, invocation.memory)
                    for run in runs]
        write_anatomy(contexts)
        for run, context in zip(runs, contexts, strict=True):
            status[run.name] = process_run(context, chosen, folder)
            if status[run.name]["status"] == "failed" and options.stop_on_first_crash:
                break
        ok = not problems and all(s["complete"] for s in status.values())
        try:
            dataset.write_text(f"{folder}/options.toml", tomli_w.dumps(options.as_dict()))
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


def process_run(context: RunContext, chosen: Chosen, folder: str) -> dict[str, Any]:
    """Do the steps of a run that are not complete.

    Parameters
    ----------
    context : RunContext
    chosen : Chosen
        The methods that the options name.
    folder : str
        Folder of the log, below OUTPUT_DIR.

    Returns
    -------
    dict
        `status` with its reasons. `done` or `skipped`: `refusals` holds the steps that were left
        out. `refused`: nothing was done, since images of another harmonizer are in the way.
        `failed`: the error, which is recorded and never raised.
    """
    dataset, run, start = context.dataset, context.run, time.monotonic()
    try:
        if conflict := conflicting_model(dataset, run, chosen.models):
            log.error("%s: %s", run.name, conflict)
            return {"status": "refused", "complete": False, "error": f"{run.name}: {conflict}"}
        execution = Execution(context, plan(context, chosen))
        changed = execution.run()
        seconds = round(time.monotonic() - start, 1)
        refusals, complete = execution.summarize(changed, seconds)
        if changed:
            log.info("%s: done in %.1f s", run.name, seconds)
        else:
            log.info("%s: complete and unchanged, skipped", run.name)
        return {"status": "done" if changed else "skipped", "complete": complete,
                "refusals": refusals}
    except Exception as error:  # one run's failure must not stop the others
        message = describe(error)
        log.error("%s: %s", run.name, message, exc_info=context.options.verbose > 1)
        crash = f"{folder}/crash-{run.name}.txt"
        facts = {"name": run.name, "entities": run.entities, "status": "failed",
                 "complete": False, "error": message,
                 "batch": run.batch, "batch_source": run.batch_source,
                 "files": [dataset.uri(f) for f in run.files], "crash": crash}
        try:
            dataset.write_text(crash, "".join(traceback.format_exception(error)))
            dataset.mark(run_record(run), "failed", facts)
        except (OSError, DataError) as disk:
            log.error("%s: the failure could not be recorded either (%s)", run.name, disk)
        return facts


class Execution:
    """The steps of one run, and the signals that they have made so far."""

    def __init__(self, context: RunContext, steps: Sequence[Step]) -> None:
        self.context, self.dataset, self.steps = context, context.dataset, steps
        self._stages: dict[str, Stage] = {}

    def run(self) -> bool:
        """Do the steps that are not complete, in order; return whether there were any."""
        changed = False
        for step in self.steps:
            if self._lacks_signal(step):
                self._log_removal(step)
                self.dataset.discard(step.record)
                continue
            if self._is_complete(step):
                continue
            if not changed:
                log.info("%s: %d file(s), batch %s", self.context.run.name,
                         len(self.context.run.parts), self.context.run.batch)
                # until all steps are done, neither the page nor the group level may use the record
                self.dataset.mark(run_record(self.context.run), "incomplete",
                                  {"name": self.context.run.name})
                changed = True
            self._do(step)
        return changed

    def _is_complete(self, step: Step) -> bool:
        return self.dataset.is_complete(self.dataset.record(step.record), step.fingerprint)

    def _lacks_signal(self, step: Step) -> bool:
        """Whether a step that it needs was refused, or lacks a signal itself."""
        return any("refusal" in self.dataset.record(other.record) or self._lacks_signal(other)
                   for other in step.needs)

    def _log_removal(self, step: Step) -> None:
        """Say that files of an earlier command go, because this one is refused."""
        if images := [name for name in self.dataset.record(step.record).get("outputs", ())
                      if name.endswith(".nii.gz")]:
            log.warning("%s: %d images of an earlier %s are removed, since this command cannot "
                        "make them: %s", self.context.run.name, len(images), step.title,
                        ", ".join(PurePosixPath(name).name for name in images))

    def _do(self, step: Step) -> None:
        report = StepReport()
        with self.dataset.transaction(step.record, step.fingerprint) as transaction:
            about: dict[str, Any] = {
                "name": step.name,
                "takes": {other.name: other.fingerprint for other in step.needs}}
            try:
                taken = self.stage(step.takes) if step.takes else None
                given = step.apply(taken, transaction, report)
                if given:
                    self._stages[step.name] = given
                about["paragraphs"] = step.paragraphs
            except Refusal as refusal:
                log.warning("%s: %s is left out: %s", self.context.run.name, step.title, refusal)
                self._log_removal(step)
                report, about["refusal"] = StepReport(), str(refusal)
            transaction.facts = {
                **about, **report.facts, "qc": report.qc,
                "warnings": list(dict.fromkeys(report.warnings)),
                "notices": list(dict.fromkeys(report.notices)),
                "figures": [draw(transaction, self.context, f) for f in report.figures]}

    def stage(self, step: Step) -> Stage:
        """Return the signal of a step; it is read back if an earlier invocation made it."""
        if step.name not in self._stages:
            self._stages[step.name] = step.reload(
                self.stage(step.takes) if step.takes else None, self.dataset.record(step.record))
        return self._stages[step.name]

    def summarize(self, changed: bool, seconds: float) -> tuple[dict[str, str], bool]:
        """Write the record and the quality table of the run from the records of its steps.

        Steps of earlier invocations that are not in this plan are included, unless the signal that
        they took has changed: then their files are removed.

        Parameters
        ----------
        changed : bool
            Whether a step was done.
        seconds : float
            Duration of the steps.

        Returns
        -------
        refusals : dict of str to str
            Reasons of the steps that were refused, by their titles.
        complete : bool
            Whether none of them was required (`Step.required`).
        """
        context, run, dataset = self.context, self.context.run, self.dataset
        records = {step.name: dataset.record(step.record) for step in self.steps
                   if not self._lacks_signal(step)}
        refusals = {step.title: records[step.name]["refusal"] for step in self.steps
                    if "refusal" in records.get(step.name, ())}
        lacking = {step.title: lacks(next(o for o in step.needs if o.name not in records or
                                          "refusal" in records[o.name]))
                   for step in self.steps if step.desc and step.name not in records}
        if changed:
            for title, reason in lacking.items():
                log.warning("%s: %s is %s", run.name, title, reason)
        refusals |= lacking
        complete = not any(step.required for step in self.steps
                           if "refusal" in records.get(step.name, ()))
        records |= self._earlier(records)
        done = [r for r in records.values() if "refusal" not in r]
        content = {"fingerprints": [r["fingerprint"] for r in records.values()],
                   "batch": [run.batch, run.batch_source], "covariates": run.covariates,
                   **({"lacking": lacking} if lacking else {})}
        mark = hashlib.sha256(to_json(content).encode()).hexdigest()
        if not changed and dataset.is_complete(dataset.record(run_record(run)), mark):
            return refusals, complete
        qc: dict[str, Any] = {}
        for record in done:
            qc |= record["qc"]
            if records.get(Harmonize.name, {}).get("unchanged") and record.get("estimates"):
                # at the reference site the harmonized signal is the measured one
                qc |= {f"harmonized_{key}": value for key, value in record["qc"].items()}
        scores = [r["scores"] for r in done if "scores" in r]
        with dataset.transaction(run_record(run), mark) as transaction:
            transaction.table(context.path("qc", ".tsv", desc="image"), [qc],
                              quality.describe_columns(qc))
            transaction.facts = {
                "name": run.name, "entities": run.entities, "batch": run.batch,
                "batch_source": run.batch_source, "covariates": run.covariates,
                "files": [dataset.uri(f) for f in run.files], "status": "done",
                "seconds": seconds, "all_done": complete,
                "corrections": records.get(Preprocess.name, {}).get("corrections", []),
                **{k: v for k, v in records[Measure.name].items() if k in MEASURED},
                "qc": qc, "refusals": refusals,
                **{key: list(dict.fromkeys(text for r in done for text in r.get(key, ())))
                   for key in ("warnings", "notices")},
                "methods": [*dict.fromkeys(r["method"] for r in done if "method" in r)],
                "paragraphs": [*dict.fromkeys(tuple(p) for r in done for p in r["paragraphs"])],
                "harmonizer": records.get(Harmonize.name, {}).get("harmonizer"),
                "figures": [f for r in done for f in r["figures"]],
                **({"scores": scores[-1]} if scores else {})}
        return refusals, complete

    def _earlier(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Find the valid records of earlier steps that are not in the plan, and remove the others.

        A record is valid if its step was completed, not refused, and the signal that it took is
        unchanged. Files of the others are removed as well.
        """
        valid = {name: r["fingerprint"] for name, r in records.items()}
        pattern = self.context.path("step", ".json", "log", desc="x").as_posix()
        paths = [PurePosixPath(p.relative_to(self.dataset.root)) for p in sorted(
            self.dataset.root.glob(pattern.replace("_desc-x_", "_desc-*_")))]
        planned = {step.record for step in self.steps}
        others = {p: self.dataset.record(p) for p in paths if p not in planned}
        kept: dict[str, dict[str, Any]] = {}
        for _ in others:  # repeated, since a step may take the signal of another one that is kept
            kept = {r["name"]: r for r in others.values() if r.get("state") == "complete"
                    and "refusal" not in r and r["takes"].items() <= valid.items()}
            valid |= {name: r["fingerprint"] for name, r in kept.items()}
        for path, record in others.items():
            if record.get("name") not in kept:
                if record.get("outputs"):
                    log.info("%s: %s is removed, since what it was made from has changed",
                             self.context.run.name, record.get("name", path.name))
                self.dataset.discard(path)
        return kept


MEASURED = ("n_voxels", "n_volumes", "mask_source", "voxel_size", "shells", "n_b0")
"""Entries of the record of the step `measured` that the record of the run repeats."""


def mixed_harmonizers(dataset: Dataset) -> str:
    """Say which runs of OUTPUT_DIR have different harmonizers; empty if all have the same."""
    runs: dict[str, list[str]] = {}
    for record in run_records(dataset):
        if harmonizer := record.get("harmonizer"):
            runs.setdefault(harmonizer, []).append(record["name"])
    if len(runs) < 2:
        return ""
    text = "; ".join(f"{len(names)} run(s) by {harmonizer} ({', '.join(names[:3])}"
                     f"{', …' if len(names) > 3 else ''})" for harmonizer, names in runs.items())
    return (f"Harmonized signals and maps in {dataset.root} are of different harmonizers: {text}. "
            "They must not be compared with each other. Give each harmonizer an OUTPUT_DIR of its "
            "own, and --harmonize the folder of its model.")


def run_records(dataset: Dataset, label: str = "*") -> list[dict[str, Any]]:
    """Read the records of the runs of a participant, or of all participants in OUTPUT_DIR."""
    return [{"name": p.name.removesuffix("_dwi.json"),
             **dataset.record(PurePosixPath(p.relative_to(dataset.root)))}
            for p in sorted(dataset.root.glob(f"sub-{label}/log/sub-*_dwi.json"))]


def run_record(run: Run) -> PurePosixPath:
    """Name the record of a run, below OUTPUT_DIR."""
    return names.output_path(run.entities, "dwi", ".json", "log")


def conflicting_model(dataset: Dataset, run: Run, models: Sequence[harmonize.Model]) -> str | None:
    """Say which other model made the harmonized images that a run would replace.

    Parameters
    ----------
    dataset : Dataset
        OUTPUT_DIR.
    run : Run
        It may have been harmonized into OUTPUT_DIR before.
    models : sequence of harmonize.Model
        Those that --harmonize names. Earlier images may be replaced if one of these models has the
        same Id (even if it was trained again) or the same weights. So may an unchanged signal if
        all of these models have the site of the run as their reference.

    Returns
    -------
    str or None
        What was found, what is needed and what to do; None if there is no conflict.
    """
    image = dataset.root / names.output_path(run.entities, "dwi", ".nii.gz", desc="harmonized")
    about = dataset.record(names.output_path(run.entities, "dwi", ".json", desc="harmonized"))
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


def draw(transaction: Transaction, context: RunContext, figure: figures.Figure) -> dict[str, str]:
    """Write a figure, and return its entry in the record, for the page."""
    path = context.path(figure.suffix, ".svg", "figures", **figure.entities)
    transaction.bytes(path, figure.svg)
    return {"file": str(path), "title": figure.title, "caption": figure.caption,
            "section": figure.section}


def write_page(dataset: Dataset, label: str, problems: list[str]) -> None:
    """Write sub-LABEL.html from the records and figures in OUTPUT_DIR."""
    records = run_records(dataset, label)
    with dataset.transaction(PurePosixPath(f"sub-{label}/log/page.json")) as transaction:
        transaction.facts = {"problems": problems}
        transaction.text(PurePosixPath(f"sub-{label}.html"),
                         page.participant(label, records, problems, dataset.root))
