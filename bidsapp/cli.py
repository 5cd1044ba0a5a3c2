"""The command line of qsphere: argv → one frozen Options.

This module imports neither torch nor pybids, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tomllib
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from bidsapp import __version__
from bidsapp.errors import QSphereError, UsageError, describe
from bidsapp.options import Options, flag
from bidsapp.workers import TERMINATED, sigterm_exits


def parser() -> argparse.ArgumentParser:
    """Make the parser of qsphere."""
    return generate("qsphere", Options,
                    "Makes diffusion MRI from many scanners comparable and useful (BIDS-App).")


def generate(program: str, options: type, description: str) -> argparse.ArgumentParser:
    """Make a parser from the fields of a dataclass.

    Parameters
    ----------
    program : str
        Name of the program.
    options : type
        A dataclass whose fields are declared by `options.option` and `options.positional`.
    description : str
        What the program does.

    Returns
    -------
    ArgumentParser
        Its namespace holds only the options that were given.
    """
    p = argparse.ArgumentParser(program, allow_abbrev=False, description=description,
                                argument_default=argparse.SUPPRESS)
    p.add_argument("--version", action="version", version=f"QSphere {__version__}")
    types = typing.get_type_hints(options)
    group: Any = p
    for item in fields(options):
        if item.default is MISSING:
            p.add_argument(item.name, **_argument(item, types[item.name]))
            continue
        if "group" in item.metadata:
            group = p.add_argument_group(item.metadata["group"])
        names = sorted([flag(item.name), *item.metadata.get("aliases", ())],
                       key=lambda name: name.startswith("--"))
        group.add_argument(*names, **_argument(item, types[item.name]))
    return p


def _argument(item: Field[Any], annotation: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field and its type."""
    metadata, text, default = item.metadata, item.metadata["help"], item.default
    keywords = {k: metadata[k] for k in ("metavar", "choices", "action") if k in metadata}
    if annotation is bool or keywords.get("action") == "count":
        return {"help": text, "action": "store_true", **keywords}
    several = typing.get_origin(annotation) is tuple
    inner = next((t for t in typing.get_args(annotation) if t not in (NoneType, Ellipsis)),
                 annotation)
    if default is not MISSING and default not in (None, ()) and "default" not in text:
        text += "; default: " + (" ".join(f"{v:g}" for v in default) if several else str(default))
    if several:
        items = typing.get_args(annotation)
        keywords["nargs"] = "+" if Ellipsis in items else len(items)
    if inner in (int, float):
        keywords.setdefault("metavar", "N")
    if read := metadata.get("read", inner if inner is not str else None):
        keywords["type"] = read
    return {"help": text, **keywords}


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line, and the --config-file that it may name.

    Parameters
    ----------
    argv : sequence of str, optional
        Default: the arguments of the process.

    Raises
    ------
    UsageError
        An option is unknown, invalid at the analysis level or out of range.
    SystemExit
        argparse ends the program: --help, --version, or a value of the wrong type.
    """
    given = vars(parser().parse_args(argv))
    if "config_file" in given:
        given = {**_config(given["config_file"]), **given}
    cpus = len(os.sched_getaffinity(0))
    given.setdefault("nprocs", cpus)
    return Options(**as_fields(given))


def as_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists of a namespace into tuples, which a frozen dataclass holds."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _config(path: Path) -> dict[str, Any]:
    """Read the options of a TOML file as if they were given on the command line.

    Positional arguments are ignored, so that the options.toml of a log can be given again.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config-file {path}: cannot be read as TOML ({error}).") from error
    options = {s: a for a in parser()._actions for s in a.option_strings}
    positional = {f.name for f in fields(Options) if f.default is MISSING}
    argv: list[str] = []
    for key, value in table.items():
        if key in positional:
            continue
        name = flag(key)
        if name not in options or key == "config_file":
            raise UsageError(f"--config-file {path}: no option is called {key!r}; see --help.")
        if options[name].nargs == 0:
            if not isinstance(value, bool | int):
                raise UsageError(f"--config-file {path}: {key} = {value!r}; true, false or a "
                                 "number is needed.")
            argv += [name] * int(value)
        elif key == "derivatives":
            if not isinstance(value, dict):
                raise UsageError(f"--config-file {path}: {key} = {value!r}; a table is "
                                 'needed: { NAME = "PATH" }.')
            argv += [name, *(f"{n}={p}" for n, p in value.items())]
        else:
            argv += [name, *map(str, value if isinstance(value, list) else [value])]
    read = vars(parser().parse_args(["in", "out", "participant", *argv]))
    return {k: v for k, v in read.items() if k not in positional}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns
    -------
    int
        Exit code: 0 all done; 1 a participant failed or does not exist, or a defect of the program;
        2 arguments or input cannot be used; 130 interrupted.
    """
    verbose = 0

    def work() -> int:
        nonlocal verbose
        options = parse(argv)
        verbose = options.verbose
        log_to_stderr(verbose)
        os.environ.setdefault("OMP_NUM_THREADS", str(options.omp_nthreads or options.nprocs))

        from bidsapp import run

        return (run.participant if options.analysis_level == "participant" else run.group)(options)

    return guarded("qsphere", work, lambda: verbose)


def log_to_stderr(verbose: int) -> None:
    """Send log messages to standard error; with `verbose`, also those for debugging."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, stream=sys.stderr, force=True,
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("matplotlib", "fontTools", "filelock", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guarded(program: str, work: Callable[[], int], verbose: Callable[[], int]) -> int:
    """Call `work` and return its exit code; print an error in one line, or with its traceback.

    Parameters
    ----------
    program : str
        Name of the program, with which messages begin.
    work : callable
        Returns the exit code.
    verbose : callable
        Returns the number of -v; tracebacks are printed above 1.
    """
    # threads that spin while they wait take busy cores from those that work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # without it a product of two vectors depends on where in memory they lie, which differs from
    # run to run
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    try:
        with sigterm_exits():
            return work()
    except QSphereError as error:
        if verbose() > 1:
            traceback.print_exc()
        print(f"{program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:  # a defect: one line, and the traceback only on request
        if verbose() > 1:
            raise
        message = (describe(error) if isinstance(error, MemoryError) else
                   f"unexpected {describe(error)}. Run again with -vv for the traceback, and "
                   "please report it.")
        print(f"{program}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code == TERMINATED:
            print(f"{program}: terminated. Run the same command again to continue.",
                  file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
