"""Rules of the repository as a whole; the direction of imports is import-linter's (pyproject)."""

import ast
import contextlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bidsapp import __version__, methods
from bidsapp.anatomy import t1w
from bidsapp.bids import names
from support import ROOT

TESTS = ROOT / "tests"
HEAVY = {"torch", "bids", "numpy", "nibabel", "dipy", "pandas", "scipy", "matplotlib"}


def tracked():
    """Files that a clone holds, as text."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT,
                           capture_output=True, text=True, check=False).stdout.split("\0")
    if not any(names):
        pytest.skip("not a git checkout")
    return {n: (ROOT / n).read_bytes().decode(errors="replace")
            for n in names if n and (ROOT / n).is_file()}


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["in", "in", "participant"]])
def test_answers_at_once(argv):
    """Help, version and a refused argument come without the libraries that take seconds."""
    code = ("import sys\nfrom bidsapp.cli import main\ntry:\n    main(sys.argv[1:])\n"
            "except SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True,
                          cwd=ROOT, check=True)
    assert not HEAVY & set(done.stderr.splitlines()[-1].split())
    assert done.stdout or "OUTPUT_DIR is BIDS_DIR" in done.stderr


def imported_modules(file):
    """Names of the modules that a file imports, those inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def test_no_test_is_imported():
    """Test modules share tests/support only, and benchmarks share nothing with tests."""
    tests = {f.stem for f in TESTS.rglob("test_*.py")} | {"conftest"}
    for file in TESTS.rglob("*.py"):
        parts = {part for name in imported_modules(file) for part in name.split(".")}
        assert not parts & (tests | {"tests"}), file
    for file in (ROOT / "benchmarks").glob("*.py"):
        parts = {part for name in imported_modules(file) for part in name.split(".")}
        assert not parts & (tests | {"tests", "support"}), file
        assert '/ "tests"' not in file.read_text(), file


def test_tests_mirror_the_package():
    """Each folder of tests is one of the package; no two files of tests have the same name."""
    folders = {f.parent.relative_to(TESTS) for f in TESTS.rglob("*.py")}
    assert len(folders) > 10
    for folder in folders - {Path("support")}:
        assert (ROOT / "bidsapp" / folder).is_dir(), folder
    names = [f.name for f in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names)) > 60


def test_every_method_folder_is_complete():
    folders = [p for p in methods.FOLDER.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert sorted(p.name for p in folders) == methods.names()
    for folder in folders:
        method = methods.get(folder.name)
        assert {"model", "maps"} <= method.outputs.keys(), folder.name
        for key, output in method.outputs["maps"].items():
            assert {"entities", "Description", "Units", "range"} <= output.keys(), (folder, key)
            suffix, entities = method.name_map(output)
            assert suffix in names.MAPS, (folder, key)
            assert (suffix == "probseg") == (entities.get("label") in t1w.TISSUES), (folder, key)
            assert suffix != "dseg" or output["Units"] == "label", (folder, key)
        assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")


def test_the_commands_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        text = (ROOT / name).read_text()
        wanted = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
        assert wanted and wanted <= targets, name


def test_the_options_of_the_documents_exist():
    from bidsapp import cli, cli_phantom

    known = {s for module in (cli, cli_phantom) for a in module.parser()._actions
             for s in a.option_strings}
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `--"))
    named = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", rows))
    assert len(named) > 20 and named <= known


@pytest.mark.parametrize("name,pattern", [
    ("CITATION.cff", r"^version: (.+)$"),
    ("CHANGES.md", r"^## ([0-9.]+)"),
    ("Dockerfile", r'image\.version="(.+?)"'),
    ("Singularity.def", r"image\.version (.+)$"),
])
def test_one_version(name, pattern):
    found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    assert found and found[1] == __version__


def test_containers_set_the_same_environment():
    """Both containers set the same environment, but for folders that belong to the user."""
    docker = set(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=", (ROOT / "Dockerfile").read_text(),
                            re.MULTILINE))
    singularity = set(re.findall(r"^    export ([A-Z_]+)=", (ROOT / "Singularity.def").read_text(),
                                 re.MULTILINE))
    assert {"PATH", "QSPHERE_CONTAINER"} <= docker
    assert docker - singularity <= {"HOME", "LOGNAME", "TEMPLATEFLOW_HOME"} | {
        "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_ROOT_USER_ACTION"}


def test_every_dependency_is_pinned():
    """The dependencies, and what these require in turn as far as it is installed."""
    def normal(text):
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower()

    pins = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
            if re.fullmatch(r"[\w.-]+==[\w.!]+", line)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {normal(d) for d in project["dependencies"] + extras["test"] + extras["lint"]
              + extras["docs"]}
    missing, queue, done = set(), [(name, "") for name in wanted], set()
    while queue:
        name, extra = queue.pop()
        missing |= {name} - pins
        with contextlib.suppress(metadata.PackageNotFoundError):
            for r in map(Requirement, metadata.requires(name) or []):
                if not r.marker or r.marker.evaluate({"extra": extra}):
                    new = {(normal(r.name), e) for e in ["", *r.extras]} - done
                    done |= new
                    queue.extend(new)
    assert missing <= {"setuptools"}  # torch names it; the images leave it out
    assert "torchvision" not in pins  # it brings a CUDA build of torch


def test_nothing_names_one_machine():
    """No absolute path of a developer's machine, no registry's address."""
    word = re.compile(r"(?<![\w.])/(?:work|root|opt/q|home/\w+|Users/\w+)/|"
                      r"(?:pypi|pythonhosted|download\.pytorch|debian)\.org")
    found = {n: m[0] for n, text in tracked().items()
             if n != "tests/test_architecture.py" and (m := word.search(text))}
    assert found == {}
