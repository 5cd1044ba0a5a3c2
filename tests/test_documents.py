"""README, docs/ and benchmarks/README.md: links, options, and tables that are their data."""

import csv
import itertools
import re

import pytest

from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("plots/", "methods/", "reference/", "benchmarks/", "contributing.md")
"""Pages that docs/hooks.py writes when the documentation is built; mkdocs checks their links."""


def cells(line):
    """Cells of a row of Markdown, as the CSV has them."""
    plain = line.replace("`", "").replace("**", "").replace("−", "-").strip().strip("|")
    return [c.strip() for c in plain.split("|")]


def tables():
    """(CSV that a table names below itself, its rows) of benchmarks/README.md."""
    blocks = (ROOT / "benchmarks" / "README.md").read_text().split("\n\n")
    for table, below in itertools.pairwise(blocks):
        if table.startswith("|"):
            link = re.fullmatch(r"\[data/(\w+)\.csv\]\(data/\1\.csv\)", below)
            assert link, table.splitlines()[0]
            head, _, *rows = table.splitlines()
            yield link[1], [cells(head), *map(cells, rows)]


def test_readme_is_short_and_has_its_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    picture = ROOT / re.search(r"!\[.+?\]\((.+?)\)", text)[1]
    assert 0 < picture.stat().st_size < 200_000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file = target.split("#")[0]
        if file and "://" not in file and not (page.parent.name == "docs"
                                               and file.startswith(GENERATED)):
            assert (page.parent / file).exists(), target


def test_every_table_of_the_benchmarks_is_its_data():
    seen = {}
    for name, rows in tables():
        with (ROOT / "benchmarks" / "data" / f"{name}.csv").open(newline="") as file:
            assert list(csv.reader(file)) == rows, name
        seen[name] = rows
    assert seen.keys() == {f.stem for f in (ROOT / "benchmarks" / "data").glob("*.csv")}


def test_every_table_is_written_by_a_benchmark():
    """But for those that join runs of harmonization_tables.py, and its own, tested there."""
    programs = "".join(f.read_text() for f in (ROOT / "benchmarks").glob("*.py"))
    joined = {"shells", "unpaired"}
    names = {f.stem for f in (ROOT / "benchmarks" / "data").glob("*.csv")}
    assert {n for n in names - joined if not n.startswith(("harmonization_", "onesite_", "pairs_"))
            } == set(re.findall(r'table\.show\(\s*"(\w+)"', programs))


def test_every_benchmark_has_its_command_in_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    programs = {f.name for f in (ROOT / "benchmarks").glob("*.py")
                if '__name__ == "__main__"' in f.read_text()}
    assert programs <= set(re.findall(r"python benchmarks/(\w+\.py)", text))
