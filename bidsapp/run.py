"""The two analysis levels, `participant` and `group`, from options to outputs."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bidsapp import checkpoint, methods, spaces, training
from bidsapp.bids import btable, find
from bidsapp.bids.writer import Dataset, Transaction, to_json
from bidsapp.blocks import choose_device, memory_limit
from bidsapp.dwi import FIXED_MEMORY, Dwi, Run, open_image, peak_memory
from bidsapp.errors import DataError, UsageError
from bidsapp.evaluate import agreement, biology, crossvalidation, quality
from bidsapp.harmonization import pairs
from bidsapp.harmonization.harmonizer import Harmonizer
from bidsapp.kinds import (
    Cohort,
    Fitted,
    GroupAnalysis,
    MethodContext,
    Trainable,
    TrainingSettings,
)
from bidsapp.options import Options
from bidsapp.recipe import harmonize, plan
from bidsapp.recipe.execute import (
    Invocation,
    conflicting_model,
    mixed_harmonizers,
    process_participant,
    run_record,
    run_records,
    write_page,
)
from bidsapp.recipe.preprocess import CORRECTION_COPIES
from bidsapp.recipe.signals import with_predicted
from bidsapp.recipe.steps import (
    RunContext,
    load_measured,
    load_tissue,
    read_measured,
    voxel_size,
)
from bidsapp.report import boilerplate, distributions, page
from bidsapp.workers import pool, task

log = logging.getLogger("qsphere")

GROUP = PurePosixPath("group")

LABELS = ("participant", "session", "run", "batch")
"""Columns that are read as text, even if their labels look like numbers."""

SCANS_IN_MEMORY = 2
"""Scans that a training holds in memory at a time: those of a pair."""

SHORTHANDS = {"epochs": "stages.epochs", "blocks": "network.blocks"}
"""Training options, and the hyper-parameter that each sets in every trained method that has it."""


def participant(options: Options) -> int:
    """Process every run and write derivatives and a page for each participant.

    Returns
    -------
    int
        Exit code: 0 all done, 1 something failed or a participant does not exist.

    Raises
    ------
    UsageError
        A method or model does not exist, or the input cannot be used (`find.find_runs`).
    """
    chosen = plan.choose(options)
    if options.reports_only and not options.dry_run:
        return regenerate_reports(options)
    inventory = find.find_runs(options)
    if options.dry_run:
        print("pages only" if options.reports_only else dry_run(inventory, chosen, options))
        return 0
    links = input_datasets(options)
    dataset = Dataset(options.output_dir, links)
    dataset.claim()
    dataset.describe(inventory.name, inventory.authors, boilerplate.acknowledge())
    if options.boilerplate_only:
        dataset.write_text("logs/CITATION.md", plan.methods_text(options, chosen))
        return 0
    memory, device = available_memory(options), choose_device(options.device)
    workers, threads = share_cpus(options, inventory, memory, device)
    invocation = Invocation(options, links, f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4()}",
                            device, memory / workers, threads)
    if options.work_dir:
        make_work_dir(options.work_dir)
    done = dict(run_all(invocation, inventory, workers))
    dataset.participants({label: inventory.rows[label] for label in done}, inventory.columns)
    dataset.write_text("logs/CITATION.md", page.methods_text(run_records(dataset)))
    log_unknown_participants(inventory.unknown, options)
    if failed := [label for label, ok in done.items() if not ok]:
        log.error("not everything was done for %s. Their pages say why; after a failure, so do the "
                  "crash files in sub-*/log.", ", ".join(f"sub-{s}" for s in sorted(failed)))
    if mixed := mixed_harmonizers(dataset):
        log.warning("%s", mixed)
    log.info("results: %s", dataset.root)
    return 1 if failed or inventory.unknown else 0


def group(options: Options) -> int:
    """Train methods, and write tables, figures and a page across participants.

    Returns
    -------
    int
        Exit code: 0 all done, 1 a participant does not exist.

    Raises
    ------
    UsageError
        No participant was processed, or a training is not possible.
    """
    trained = trained_methods(options)
    inventory = find.find_runs(options)
    for label, messages in inventory.problems.items():
        for message in messages:
            log.warning("sub-%s: %s", label, message)
    dataset = Dataset(options.output_dir, input_datasets(options))
    statistics, covariates = participant_statistics(dataset, inventory)
    if options.dry_run:
        print(f"{len(statistics)} runs, {len(quality.map_features(statistics.columns))} map "
              "statistics; batches: "
              + ", ".join(f"{b}: {n}" for b, n in statistics["batch"].value_counts().items())
              + f"; trains {', '.join(options.train) or 'nothing'}")
        return 0
    if options.work_dir:
        make_work_dir(options.work_dir)
    rank, devices = training.processes()
    runs = {run.name: run for label in inventory.participants for run in inventory.runs[label]
            if run.name in set(statistics["run"])}
    workers, memory = share_pairs(options, runs.values(), available_memory(options), devices)
    cohort = load_cohort(dataset, options, runs, statistics, covariates, memory)
    settings = training_settings(options, devices, workers)
    if rank:  # of several processes that train together, only the first writes
        for method in trained:
            fit(method, cohort, settings)
        return 0
    dataset.claim()
    dataset.describe(inventory.name, inventory.authors, boilerplate.acknowledge())
    with dataset.lock("group"):
        fitted = train_and_write(dataset, cohort, settings, trained)
        fitted |= load_fitted(dataset, cohort, fitted)
        references = {str(f.model["ReferenceBatch"]) for f in fitted.values()
                      if f.model.get("ReferenceBatch")}
        if cohort.reference_batch is None and len(references) == 1:  # that of earlier trainings
            cohort = replace(cohort, reference_batch=references.pop())
        write_group(dataset, cohort, fitted)
        assert settings.states
        for registration in settings.states.glob(f"{pairs.PREFIX}*"):
            registration.unlink(missing_ok=True)
    log_unknown_participants(inventory.unknown, options)
    log.info("results: %s", dataset.root / "group.html")
    return 1 if inventory.unknown else 0


def trained_methods(options: Options) -> list[Trainable]:
    """Load the methods that --train names, with the hyper-parameters of the options.

    Raises
    ------
    UsageError
        A method does not exist or needs no training, or no method uses an option.
    """
    trained = list({m.name: m for m in map(methods.trainable, options.train)}.values())
    check_training_options(options, trained)
    settings = methods.read_settings([*expand_shorthands(options, trained), *options.set], trained,
                                     training=True, sloppy=options.sloppy)
    context = MethodContext(options.sloppy, options.output_dir / harmonize.MODELS, settings)
    return [methods.trainable(method.name, context) for method in trained]


def check_training_options(options: Options, trained: Sequence[Trainable]) -> None:
    """Raise UsageError for an option that no trained method uses."""
    uses: tuple[tuple[str, int | None, Callable[[Trainable], Any]], ...] = (
        ("folds", options.folds, lambda m: isinstance(m, Harmonizer)),
        *((option, getattr(options, option), lambda m, k=key: m.paths(k))
          for option, key in SHORTHANDS.items()))
    for option, value, used in uses:
        if value and not any(map(used, trained)):
            names = [m.name for m in map(methods.get, methods.names())
                     if isinstance(m, Trainable) and used(m)]
            raise UsageError(f"--{option} {value}: {', '.join(options.train)} does not use "
                             f"it. Leave it out, or train {', '.join(names)}.")


def expand_shorthands(options: Options, trained: Sequence[Trainable]) -> list[str]:
    """Translate --epochs and --blocks to METHOD.KEY=VALUE of each method that has the key."""
    texts = [f"{method.name}.{key}={value}" for option, key in SHORTHANDS.items()
             if (value := getattr(options, option)) for method in trained if method.paths(key)]
    if options.blocks:
        log.warning("--blocks %d is replaced by --set harmonize_shresnet.network.blocks=%d.",
                    options.blocks, options.blocks)
    return texts


def load_cohort(dataset: Dataset, options: Options, runs: Mapping[str, Run],
                statistics: pd.DataFrame, covariates: Sequence[str], memory: float) -> Cohort:
    """Gather what trainings need of the processed runs.

    A signal is read (`load`) and a T1w image is segmented (`tissue`) on demand.

    memory: bytes that a process may use.
    """
    per_scan = FIXED_MEMORY + (memory - FIXED_MEMORY) / SCANS_IN_MEMORY
    return Cohort(
        statistics, tuple(quality.map_features(statistics.columns)), covariates=tuple(covariates),
        reference_batch=options.reference_batch, paired_by=options.paired_by,
        acquisitions={name: read_measured(dataset, run)[1] for name, run in runs.items()},
        voxel_sizes={name: voxel_size(run) for name, run in runs.items()},
        load=partial(load_signal, dataset, runs, per_scan, options.work_dir),
        tissue=partial(load_posteriors, dataset, runs, per_scan, options.work_dir,
                       choose_device(options.device)))


def load_signal(dataset: Dataset, runs: Mapping[str, Run], memory: float, work_dir: Path | None,
                name: str) -> Dwi:
    """Load a run by its name. A function of the module, so that other processes can call it."""
    return load_measured(dataset, runs[name], memory=memory, work_dir=work_dir)


def load_posteriors(dataset: Dataset, runs: Mapping[str, Run], memory: float, work_dir: Path | None,
                    device: str, name: str) -> np.ndarray | None:
    """Compute the tissue probabilities of a run by its name. A function of the module, as well."""
    return load_tissue(dataset, runs[name], device, memory=memory, work_dir=work_dir)


def training_settings(options: Options, devices: tuple[int, int], workers: int
                      ) -> TrainingSettings:
    """Gather the options that all trainings share.

    devices: devices per node and number of nodes (`training.processes`). workers: number of
    processes that register side by side.
    """
    return TrainingSettings(
        max_steps=options.max_steps, folds=options.folds, seed=options.random_seed,
        device=choose_device(options.device), devices=devices, workers=workers,
        init=options.init,
        states=options.work_dir or options.output_dir / "group/log")


def train_and_write(dataset: Dataset, cohort: Cohort, settings: TrainingSettings,
                    trained: Sequence[Trainable]) -> dict[str, Fitted]:
    """Train one method after another; write the results of each as soon as it is trained."""
    assert settings.states
    fitted: dict[str, Fitted] = {}
    for method in trained:
        fitted[method.name] = result = fit(method, cohort, settings)
        for name, weights in result.checkpoints.items():
            # a record per model: a transaction removes the files of its record that it does not
            # write again, and the next training may write models of other names
            with dataset.transaction(PurePosixPath(f"group/log/{name}.json")) as transaction:
                for file, content in checkpoint.pack(weights).items():
                    transaction.bytes(harmonize.MODELS / name / file, content)
            for state in settings.states.glob(f"{name}.*ckpt"):
                state.unlink(missing_ok=True)
        with dataset.transaction(group_record(method.name), table_digest(cohort)) as transaction:
            for name, table in result.tables.items():
                write_table(transaction, name, table)
            if isinstance(method, GroupAnalysis):  # other models are described in their cards
                transaction.text(GROUP / "desc-harmonizer_model.json", to_json(result.model))
            transaction.facts = {"tables": list(result.tables), "model": result.model,
                                 "models": list(result.checkpoints),
                                 "notices": list(result.notices)}
        for name in result.tables:
            log.info("%s: %s", method.name, dataset.root / GROUP / f"{name}.tsv")
    return fitted


def load_fitted(dataset: Dataset, cohort: Cohort, trained: Container[str]
                ) -> dict[str, Fitted]:
    """Read what earlier commands trained, unless it was trained again.

    Tables of a group analysis whose input has changed are removed, with a warning.
    """
    earlier = {}
    for name in methods.names():
        record = dataset.record(path := group_record(name))
        if name in trained or record.get("state") != "complete":
            continue
        if isinstance(methods.get(name), GroupAnalysis) and not dataset.is_complete(
                record, table_digest(cohort)):
            log.warning("%s: its tables are removed, since runs or maps have changed. Train it "
                        "again: --train %s", name, name)
            dataset.discard(path)
            continue
        try:
            earlier[name] = Fitted(
                {table: pd.read_csv(dataset.root / GROUP / f"{table}.tsv", sep="\t",
                                    dtype=dict.fromkeys(LABELS, str))
                 for table in record["tables"]}, record["model"],
                {model: checkpoint.load(dataset.root / harmonize.MODELS / model, name)
                 for model in record["models"]}, record["notices"])
        except (OSError, ValueError, DataError) as error:
            log.warning("%s: an earlier training cannot be read and is left out of the page: %s",
                        name, error)
    return earlier


def group_record(name: str) -> PurePosixPath:
    """Name the record of a method at group level, below OUTPUT_DIR."""
    return GROUP / f"log/{name}.json"


def table_digest(cohort: Cohort) -> str:
    """Hash map statistics, sites and covariates of all runs (SHA-256)."""
    used = cohort.statistics[["run", "batch", *cohort.covariates, *cohort.features]]
    return hashlib.sha256(to_json(used.to_dict("list")).encode()).hexdigest()


def write_table(transaction: Transaction, name: str, table: pd.DataFrame) -> None:
    """Write a table of the group level with its column descriptions."""
    transaction.table(GROUP / f"{name}.tsv", table.to_dict("records"),
                      quality.describe_columns(table.columns))


def write_group(dataset: Dataset, cohort: Cohort, fitted: Mapping[str, Fitted]) -> None:
    """Write the tables across participants, figures and group.html."""
    statistics, features = cohort.statistics, cohort.features
    mixed = mixed_harmonizers(dataset)
    if mixed:
        log.warning("%s", mixed)
    with dataset.transaction(group_record("group")) as transaction:
        write_table(transaction, "desc-image_qc", statistics)
        harmonized = {
            name.removeprefix("desc-").split("_")[0]: table for result in fitted.values()
            for name, table in result.tables.items() if set(features) & set(table)}
        site_agreement = agreement.compare_tables(statistics, features, harmonized,
                                                  cohort.reference_batch)
        effects = biology.judge_in_sample(statistics, features, harmonized)
        for verdict, phrase in biology.CHANGES.items():
            for effect in biology.name_effects(effects, verdict):
                log.warning("more than %.0f %% was %s an effect by harmonization: %s. Do not study "
                            "it in harmonized maps.", 100 * biology.LOSS, phrase, effect)
        for name, table in (("sites_agreement", site_agreement), ("insample_biology", effects)):
            if len(table):
                write_table(transaction, f"desc-{name}", table)
        figures = distributions.of_group(cohort, fitted)
        for figure in figures:
            name = f"desc-{figure.entities['desc']}.svg"
            transaction.bytes(GROUP / "figures" / name, figure.svg)
        transaction.text(PurePosixPath("group.html"), page.group(
            cohort, quality.find_outliers(statistics), site_agreement, effects, figures, fitted,
            chosen=[methods.get(name) for name in fitted], notice=mixed,
            records=run_records(dataset)))


def fit(method: Trainable, cohort: Cohort, settings: TrainingSettings) -> Fitted:
    """Train a method and, where --folds asks for it, cross-validate it (harmonizers only).

    The cards hold the hyper-parameters that `--set` changed.
    """
    fitted = (crossvalidation.fit(method, cohort, settings)
              if settings.folds and isinstance(method, Harmonizer)
              else method.fit(cohort, settings))
    if not method.changed_settings:
        return fitted
    return replace(fitted, checkpoints={
        name: replace(c, card=replace(c.card, training={
            **c.card.training, "settings": method.changed_settings}))
        for name, c in fitted.checkpoints.items()})


def log_unknown_participants(labels: Sequence[str], options: Options) -> None:
    """Report participants of --participant-label that do not exist."""
    for label in labels:
        log.error("sub-%s does not exist in %s. The others were processed. Correct "
                  "--participant-label.", label, options.bids_dir)


def share_cpus(options: Options, inventory: find.Inventory, memory: float, device: str
               ) -> tuple[int, int]:
    """Decide how many participants are processed at a time, and on how many CPUs each.

    Without --omp-nthreads, as many at a time as CPUs and memory allow, for most of the work is
    voxelwise and gains little from several CPUs; on a GPU, one at a time. With it, nprocs divided
    by it, if their memory besides the signals suffices: a signal that exceeds it goes to a file.

    Returns
    -------
    workers : int
        Number of participants at a time.
    threads : int
        CPUs of each.
    """
    participants = len(inventory.participants)
    if options.omp_nthreads:
        threads = options.omp_nthreads
        most = int(memory // FIXED_MEMORY)
    else:
        runs = [run for label in inventory.participants for run in inventory.runs[label]]
        threads = 1
        most = int(memory // max([FIXED_MEMORY, *(memory_of(run, options) for run in runs)]))
        if device != "cpu":
            most = 1
    workers = max(1, min(options.nprocs // threads, participants, most))
    return workers, options.omp_nthreads or max(1, options.nprocs // workers)


def share_pairs(options: Options, runs: Collection[Run], memory: float, devices: tuple[int, int]
                ) -> tuple[int, float]:
    """Decide how many processes register scans side by side, and the memory of each in bytes.

    As many as CPUs and memory allow, beside this process, which waits for them. On a GPU, and where
    several processes train together, each of these registers its own share alone.
    """
    alone = 1, memory / devices[0]
    if choose_device(options.device) != "cpu" or math.prod(devices) > 1:
        return alone
    scan = max(FIXED_MEMORY, *map(memory_of, runs)) - FIXED_MEMORY
    pair = FIXED_MEMORY + SCANS_IN_MEMORY * scan
    workers = min(options.nprocs, int((memory - FIXED_MEMORY) // pair))
    return (workers, (memory - FIXED_MEMORY) / workers) if workers > 1 else alone


def memory_of(run: Run, options: Options | None = None) -> float:
    """Predict the peak memory of a run in bytes from the headers of its images.

    0 where one cannot be read: the process of the participant reports that. options: those of a
    participant level, at which the whole grid may be corrected.
    """
    try:
        shapes = [open_image(part.image).shape for part in run.parts]
        voxels, volumes = math.prod(shapes[0][:3]), sum(shape[3] for shape in shapes)
        corrected = options is not None and bool(options.corrections(run.preprocessed))
        volumes *= CORRECTION_COPIES if corrected else 1
        if options is not None and options.upsample:
            volumes = max(volumes, with_predicted(btable.load_acquisition(run), options))
        return peak_memory(voxels, volumes)
    except (DataError, IndexError):
        return 0.0


def available_memory(options: Options) -> float:
    """Find how many bytes may be used; warn where a process may need more."""
    memory = memory_limit(options.mem_mb)
    if memory < FIXED_MEMORY:
        log.warning("%.1f GB of memory may be used, and up to %.1f GB is needed beside the signal. "
                    "If a process dies, raise --mem-mb.", memory / 1e9, FIXED_MEMORY / 1e9)
    return memory


def make_work_dir(path: Path) -> None:
    """Make the folder of --work-dir; raise UsageError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--work-dir {path}: cannot be made ({error.strerror}). Give a folder "
                         "that you may write to.") from error


def participant_statistics(dataset: Dataset, inventory: find.Inventory
                           ) -> tuple[pd.DataFrame, list[str]]:
    """Gather one row per processed run, and the names of the covariates.

    Columns are participant, session, run, batch (the site), the covariates, quality measures and
    map statistics. Sites and covariates are read from BIDS_DIR, not from the records, for they may
    have been corrected since.

    Raises
    ------
    UsageError
        No run was processed.
    """
    done: list[tuple[Run, dict[str, Any]]] = []
    for run in (run for label in inventory.participants for run in inventory.runs[label]):
        record = dataset.record(run_record(run))
        if record.get("state") != "complete":
            log.warning("%s: not processed, or failed; it is left out of the group", run.name)
            continue
        done.append((run, record["qc"]))
    if not done:
        raise UsageError(f"{dataset.root} holds no finished run of these participants. Run the "
                         "participant level first.")
    covariates = dict.fromkeys(c for run, _ in done for c in run.covariates)
    measured = {c for _, qc in done for c in qc}
    if clashes := [c for c in covariates if c in measured]:
        log.warning("participants.tsv: %s left out, since the group table has measures of these "
                    "names. Rename the columns to use them as covariates.", ", ".join(clashes))
    rows = [{"participant": run.participant, "session": run.session or "n/a", "run": run.name,
             "batch": run.batch,
             **{c: v for c, v in run.covariates.items() if c not in measured}, **qc}
            for run, qc in done]
    return pd.DataFrame(rows), [c for c in covariates if c not in measured]


def run_all(invocation: Invocation, inventory: find.Inventory, workers: int
            ) -> Iterator[tuple[str, bool]]:
    """Process participants, `workers` of them at a time; yield label and success of each."""
    todo = inventory.participants
    with logging_redirect_tqdm(), tqdm(total=len(todo), desc="participants", disable=None) as bar:
        finished = itertools.count(1)  # a bar that is not shown does not count

        def advance() -> None:
            bar.update()
            log.info("%d of %d participants processed", next(finished), len(todo))

        if workers == 1:
            for label in todo:
                ok = process_participant(invocation, label, inventory.runs[label],
                                         inventory.problems[label])
                advance()
                yield label, ok
                if not ok and invocation.options.stop_on_first_crash:
                    return
            return
        with pool(workers, invocation.threads) as executor:
            futures = {executor.submit(task, process_participant, invocation, label,
                                       inventory.runs[label], inventory.problems[label]): label
                       for label in todo}
            for future in as_completed(futures):
                advance()
                if future.cancelled():
                    continue
                label, ok = futures[future], not future.exception() and future.result()
                if future.exception():
                    log.error("sub-%s: its process died (%s). Too little memory is the usual "
                              "cause: process fewer at a time (--omp-nthreads), or set --mem-mb.",
                              label, future.exception())
                yield label, ok
                if not ok and invocation.options.stop_on_first_crash:
                    for other in futures:
                        other.cancel()


def regenerate_reports(options: Options) -> int:
    """Write every page again from the records in OUTPUT_DIR (--reports-only)."""
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
    unknown = [label for label in options.participant_label if label not in labels]
    for label in unknown:
        log.error("sub-%s was not processed into %s and has no page.", label, dataset.root)
    return 1 if unknown else 0


def input_datasets(options: Options) -> dict[str, Path]:
    """Map the names of the input datasets in `bids:NAME:…` URIs to their folders."""
    templates = any(space.image for space in spaces.parse(options.output_spaces))
    return {"raw": options.bids_dir, **({"templateflow": spaces.home()} if templates else {}),
            **dict(options.derivatives)}


def dry_run(inventory: find.Inventory, chosen: plan.Chosen, options: Options) -> str:
    """Describe the steps of every run and its predicted memory (--dry-run)."""
    dataset, lines = Dataset(options.output_dir, input_datasets(options)), []
    for label in inventory.participants:
        lines += [f"sub-{label}: {problem}" for problem in inventory.problems[label]]
        for run in inventory.runs[label]:
            context = RunContext(options, dataset, run, "cpu", 0)
            if conflict := conflicting_model(dataset, run, chosen.models):
                lines.append(f"{run.name}: refused: {conflict}")
            else:
                lines += plan.describe(context, chosen)
    return "\n".join(lines)
