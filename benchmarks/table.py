"""Print a benchmark's table as README.md shows it, and write it as data: `--csv FILE`."""

import csv
import statistics
from pathlib import Path

DATA = Path(__file__).parent / "data"


def add_option(parser):
    parser.add_argument("--csv", type=Path, metavar="FILE",
                        help="write the table to this file, too, with the columns of data/*.csv")


def columns(name):
    """Names of the columns of data/NAME.csv."""
    with (DATA / f"{name}.csv").open(newline="") as file:
        return next(csv.reader(file))


def show(name, rows, path=None, first=None, others=None):
    """Print a table in Markdown, and write it as CSV.

    Parameters
    ----------
    name : str
        The columns are those of data/NAME.csv.
    rows : list of list of str
    path : Path, optional
        The file to write.
    first : str, optional
        Name of the first column, where it says what a run was given.
    others : list of str, optional
        Names of the other columns, where they depend on what a run was given.

    Raises
    ------
    ValueError
        A row has another number of cells.
    """
    known = columns(name)
    head = [first or known[0], *(others or known[1:])]
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"{name}: a row of {len(wrong[0])} cells under {len(head)} columns")
    print_and_write(head, rows, path)


def print_and_write(head, rows, path=None):
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line) + " |")
    if path:
        write(path, head, rows)


def write(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def count(n):
    """20000 as 20 000, 2000 as it is."""
    return f"{n:,}".replace(",", " ") if n >= 10_000 else str(n)


def threads(n):
    return "one thread" if n == 1 else f"{n} threads"


def rate(per_second):
    """41100 as 41.1 k."""
    k = per_second / 1000
    return f"{per_second:.0f}" if k < 1 else f"{k:.0f} k" if k >= 100 else f"{k:.3g} k"


def milli(value):
    """0.00495 as 4.95e-3."""
    return f"{1000 * value:.3g}e-3"


def spread(values, form=".0f"):
    """Median, least and greatest: 28 (26–31)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def interval(values, form=".2f", between="–"):
    """Least and greatest, one number where they look alike: 0.46–0.49."""
    ends = dict.fromkeys(f"{v:{form}}" for v in (min(values), max(values)))
    return between.join(ends)
