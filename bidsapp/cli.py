"""argv → one frozen Options. Imports neither torch nor pybids, so that --help is immediate."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bidsapp import __version__
from bidsapp.errors import QSphereError, UsageError, describe
from bidsapp.options import MODES, Options
from bidsapp.workers import TERMINATED, sigterm_exits

POSITIONAL = ("bids_dir", "output_dir", "analysis_level")


def _label(prefix: str):
    def strip(text: str) -> str:
        return text.removeprefix(f"{prefix}-")

    strip.__name__ = f"{prefix} label"
    return strip


def _named_path(text: str) -> tuple[str, Path]:
    if named := re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", text):
        return named[1], Path(named[2])
    return Path(text).resolve().name, Path(text)


def megabytes(text: str) -> int:
    """MB; a unit of GB or G is understood, as in the neighbouring apps."""
    number = text.upper().removesuffix("B")
    return int(float(number[:-1]) * 1000) if number.endswith("G") else int(number.rstrip("M"))


def parser() -> argparse.ArgumentParser:
    """The command line. Defaults are None where an option's own default stands in Options."""
    p = argparse.ArgumentParser(
        "qsphere", allow_abbrev=False,
        description="Makes diffusion MRI from many scanners comparable and useful (BIDS-App).",
        argument_default=argparse.SUPPRESS)
    p.add_argument("bids_dir", type=Path, metavar="BIDS_DIR",
                   help="root folder of a BIDS dataset")
    p.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR",
                   help="where the derivatives dataset is written")
    p.add_argument("analysis_level", choices=("participant", "group"),
                   help="participant: one person at a time; group: across participants and sites")
    p.add_argument("--version", action="version", version=f"QSphere {__version__}")

    g = p.add_argument_group("which data")
    g.add_argument("--participant-label", "--participant_label", nargs="+", type=_label("sub"),
                   metavar="LABEL", help="participants, with or without sub-; default: all")
    g.add_argument("--session-label", "--session_label", "--session-id", nargs="+",
                   type=_label("ses"), metavar="LABEL",
                   help="sessions, with or without ses-; default: all")
    g.add_argument("--bids-filter-file", type=Path, metavar="JSON",
                   help='pybids filters, e.g. {"dwi": {"acquisition": "x"}}')
    g.add_argument("--bids-database-dir", type=Path, metavar="DIR",
                   help="keep the pybids index here and use it again")
    g.add_argument("--skip-bids-validation", "--skip_bids_validation", action="store_true",
                   help="index files whose names are not valid BIDS, too")
    g.add_argument("-d", "--derivatives", nargs="+", type=_named_path, metavar="NAME=PATH",
                   help="inputs preprocessed elsewhere: desc-preproc_dwi trees such as QSIPrep's, "
                        "HCP-YA or UK Biobank layouts, or masks")
    g.add_argument("--batch-file", type=Path, metavar="TSV",
                   help="table of participant_id, (session_id,) and the site of each")
    g.add_argument("--batch-column", metavar="NAME",
                   help="column of --batch-file or participants.tsv that holds the site")

    g = p.add_argument_group("what is done to each participant")
    g.add_argument("--estimate", nargs="+", metavar="NAME",
                   help="microstructure methods; default: dti smt scnn2, those that exist, where "
                        "the acquisition allows")
    g.add_argument("--harmonize", metavar="MODEL",
                   help="a trained harmonizer: its folder, its name under OUTPUT_DIR/group/models, "
                        "or a method, of whose models there the one for the run's site is taken")
    g.add_argument("--upsample", metavar="MODEL",
                   help="path or name of a trained network that fills in gradient directions")
    g.add_argument("--synthesize", nargs="+", choices=MODES, metavar="MODE",
                   help=f"synthetic signals with known truth: {' '.join(MODES)}")
    g.add_argument("--synthesize-voxels", type=int, metavar="N",
                   help="synthetic signals of each mode; default: 10000")
    g.add_argument("--synthesize-image", action="store_true",
                   help="of each mode a whole image, too, in the participant's own anatomy")
    g.add_argument("--allow-extrapolation", action="store_true",
                   help="use a model outside what it was trained for; noted in every sidecar")

    g = p.add_argument_group("what the group level trains")
    g.add_argument("--train", nargs="+", metavar="METHOD",
                   help="methods by name, e.g. harmonize_mica or mica")
    g.add_argument("--reference-batch", metavar="NAME", help="the site that others are mapped to")
    g.add_argument("--folds", type=int, metavar="K",
                   help="train K times more, each time without a Kth of the people scanned at both "
                        "sites, to measure harmonizers on those; default: no cross-validation")
    g.add_argument("--epochs", type=int, metavar="N", help="instead of the method's own")
    g.add_argument("--blocks", type=int, metavar="N",
                   help="residual blocks of harmonize_shresnet; default: 2")
    g.add_argument("--max-steps", type=int, metavar="N",
                   help="optimiser steps of each stage, at most; an interrupted training "
                   "goes on to this number from where it was")
    g.add_argument("--init", type=Path, metavar="CHECKPOINT",
                   help="folder of weights to start from; default: those that ship, "
                   "where they fit")
    g.add_argument("--paired-by", choices=("participant", "session"),
                   help="pairs for harmonizers: scans of a person at two sites (default), "
                   "or those of one session alone")

    g = p.add_argument_group("resources")
    g.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    g.add_argument("--nprocs", "--nthreads", "--n-cpus", type=int, metavar="N",
                   help="most CPUs used at a time; default: all")
    g.add_argument("--omp-nthreads", type=int, metavar="N",
                   help="CPUs per participant; nprocs / omp-nthreads participants run at a time; "
                        "default: nprocs")
    g.add_argument("--mem-mb", "--mem", type=megabytes, metavar="MB",
                   help="memory limit, at both levels: signals that exceed it go through a file "
                   "in the work folder; default: all there is")
    g.add_argument("-w", "--work-dir", type=Path, metavar="DIR",
                   help="for signals that do not fit in memory; default: a temporary folder")
    g.add_argument("--random-seed", type=int, metavar="N", help="default: 0")

    g = p.add_argument_group("other")
    g.add_argument("--dry-run", action="store_true",
                   help="print what would run, on what, with predicted memory; write nothing")
    g.add_argument("--reports-only", action="store_true",
                   help="make the pages again from what earlier runs left")
    g.add_argument("--boilerplate-only", "--boilerplate_only", action="store_true",
                   help="write only the methods text with its references")
    g.add_argument("--stop-on-first-crash", action="store_true",
                   help="do not go on with other participants after a failure")
    g.add_argument("--sloppy", action="store_true", help="small and quick training, for tests")
    g.add_argument("--config-file", type=Path, metavar="TOML",
                   help="options by their long names; the command line wins over it")
    g.add_argument("-v", "--verbose", action="count",
                   help="more messages; -vv: tracebacks too")
    g.add_argument("--notrack", action="store_true",
                   help="accepted for compatibility: nothing is ever tracked")
    return p


def parse(argv: Sequence[str] | None = None) -> Options:
    """Command line (and --config-file beneath it) as Options.

    Raises:
        UsageError: an option is unknown, misplaced or out of range. SystemExit: argparse's own.
    """
    given = vars(parser().parse_args(argv))
    if "config_file" in given:
        given = {**_config(given["config_file"]), **given}
    cpus = len(os.sched_getaffinity(0))
    given.setdefault("nprocs", cpus)
    given.setdefault("omp_nthreads", given["nprocs"])
    names = {f.name for f in fields(Options)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                              for k, v in given.items() if k in names}
    return Options(**values)


def _config(path: Path) -> dict[str, Any]:
    """The options of a TOML file, each read as if it stood on the command line."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config-file {path}: cannot be read as TOML ({error}).") from error
    options = {s: a for a in parser()._actions for s in a.option_strings}
    argv: list[str] = []
    for key, value in table.items():
        if key in POSITIONAL:
            continue
        flag = "--" + key.replace("_", "-")
        if flag not in options or key == "config_file":
            raise UsageError(f"--config-file {path}: no option is called {key!r}; see --help.")
        if options[flag].nargs == 0:
            if not isinstance(value, bool | int):
                raise UsageError(f"--config-file {path}: {key} = {value!r}; needed is true, false "
                                 "or a number.")
            argv += [flag] * int(value)
        elif key == "derivatives":
            if not isinstance(value, dict):
                raise UsageError(f"--config-file {path}: {key} = {value!r}; needed is a table, "
                                 '{ NAME = "PATH" }.')
            argv += [flag, *(f"{n}={p}" for n, p in value.items())]
        else:
            argv += [flag, *map(str, value if isinstance(value, list) else [value])]
    read = vars(parser().parse_args(["in", "out", "participant", *argv]))
    return {k: v for k, v in read.items()
            if k not in POSITIONAL}


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0 all done, 1 some participant failed, 2 unusable arguments or input."""
    verbose = 0

    def work() -> int:
        nonlocal verbose
        options = parse(argv)
        verbose = options.verbose
        log_to_stderr(verbose)
        os.environ.setdefault("OMP_NUM_THREADS", str(options.omp_nthreads))

        from bidsapp import run

        return (run.participant if options.analysis_level == "participant" else run.group)(options)

    return guarded("qsphere", work, lambda: verbose)


def log_to_stderr(verbose: int) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, stream=sys.stderr, force=True,
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("matplotlib", "fontTools", "filelock", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guarded(program: str, work: Callable[[], int], verbose: Callable[[], int]) -> int:
    """The exit code of `work`; errors told in one line, with a traceback where verbose() > 1."""
    # threads that spin while they wait take busy cores from those that work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with sigterm_exits():
            return work()
    except QSphereError as error:
        if verbose() > 1:
            traceback.print_exc()
        print(f"{program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:  # a defect: told in one line, and in full only when asked for
        if verbose() > 1:
            raise
        shown = (describe(error) if isinstance(error, MemoryError) else
                 f"unexpected {describe(error)}. Run again with -vv for the traceback, and please "
                 "report it.")
        print(f"{program}: {shown}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code == TERMINATED:
            print(f"{program}: terminated; run the same command again to go on.", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
