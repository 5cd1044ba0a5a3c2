"""The command line of qsphere-phantom: argv → PhantomOptions.

This module imports nothing heavy, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bidsapp.cli import as_fields, generate, guarded, log_to_stderr
from bidsapp.options import PhantomOptions


def parser() -> argparse.ArgumentParser:
    """Make the parser of qsphere-phantom from the fields of PhantomOptions."""
    p = generate("qsphere-phantom", PhantomOptions,
                 "Write a multi-site diffusion MRI dataset (BIDS) with known truth.")
    p.add_argument("-v", "--verbose", action="count", default=0,
                   help="print more messages; -vv: also tracebacks")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns
    -------
    int
        Exit code: 0 for success, 1 for a defect of the program, 2 for invalid arguments or an
        unusable folder.
    """
    arguments = vars(parser().parse_args(argv))
    verbose = arguments.pop("verbose")

    def work() -> int:
        options = PhantomOptions(**as_fields(arguments))
        log_to_stderr(verbose)
        from bidsapp import phantom

        return phantom.phantom(options)

    return guarded("qsphere-phantom", work, lambda: verbose)


if __name__ == "__main__":
    sys.exit(main())
