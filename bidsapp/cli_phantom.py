"""argv of qsphere-phantom → PhantomOptions. Imports nothing heavy, so that --help is immediate."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from bidsapp import __version__
from bidsapp.cli import guarded, log_to_stderr
from bidsapp.options import DESIGNS, PhantomOptions

GROUPS = {"participants": "who is scanned where", "shells": "protocol",
          "ages": "differences between people", "effects": "differences between sites"}
"""By the first option of each."""


def parser() -> argparse.ArgumentParser:
    """One option per field of PhantomOptions, with its own text and default."""
    p = argparse.ArgumentParser(
        "qsphere-phantom", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Writes a multi-site diffusion MRI dataset (BIDS) with known truth.")
    p.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR",
                   help="a new or empty folder, or an earlier phantom, which is replaced")
    p.add_argument("--version", action="version", version=f"QSphere {__version__}")
    types = typing.get_type_hints(PhantomOptions)
    group = p.add_argument_group("options")
    for option in fields(PhantomOptions):
        if option.default is MISSING:
            continue
        if option.name in GROUPS:
            group = p.add_argument_group(GROUPS[option.name])
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        kind = types[option.name]
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text)
            continue
        several = typing.get_origin(kind) is tuple
        inner = [t for t in typing.get_args(kind) if t not in (type(None), Ellipsis)] or [kind]
        default = option.default
        if default is not None:
            shown = " ".join(f"{v:g}" for v in default) if several else default
            text += f"; default: {shown}"
        count = ("+" if Ellipsis in typing.get_args(kind) else len(inner)) if several else None
        group.add_argument(flag, type=inner[0], nargs=count, help=text,
                           choices=tuple(DESIGNS) if option.name == "design" else None,
                           metavar=None if option.name == "design" else "N")
    p.add_argument("-v", "--verbose", action="count", default=0,
                   help="more messages; -vv: tracebacks too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0 done, 1 a defect, 2 unusable arguments or folder."""
    given = vars(parser().parse_args(argv))
    verbose = given.pop("verbose")

    def work() -> int:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                                  for k, v in given.items()}
        options = PhantomOptions(**values)
        log_to_stderr(verbose)
        from bidsapp import phantom

        return phantom.phantom(options)

    return guarded("qsphere-phantom", work, lambda: verbose)


if __name__ == "__main__":
    sys.exit(main())
