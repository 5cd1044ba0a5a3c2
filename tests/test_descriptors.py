"""Boutiques descriptors: the same as the parser says, valid, and their command lines parse."""

import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from bidsapp import cli
from bidsapp.options import Options
from support import ROOT

BOSH = Path(sys.executable).parent / "bosh"
LEVELS = ("participant", "group")

spec = importlib.util.spec_from_file_location("descriptors", ROOT / "tools/descriptors.py")
descriptors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(descriptors)


def bosh(*arguments):
    done = subprocess.run([BOSH, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def simulated(name, values, folder):
    """The command line that Boutiques would run."""
    invocation = folder / "invocation.json"
    invocation.write_text(json.dumps(values))
    out = bosh("exec", "simulate", ROOT / "descriptors" / name, "-i", invocation)
    return out.partition("Generated Command:\n")[2].strip()


def everything(level):
    """An invocation that sets every input, and the Options that it means."""
    values, expected = {}, {"analysis_level": level}
    for given in descriptors.full(level)["inputs"]:
        name, choices = given["id"], given.get("value-choices")
        text = choices[0] if choices else f"/a folder/{name}" if given["type"] == "File" else name
        value = {"Flag": True, "Number": 3}.get(given["type"], text)
        value = "auto=/q 1" if name == "derivatives" else "2GB" if name == "mem_mb" else value
        values[name] = [value] if given.get("list") else value
        expected[name] = {"derivatives": (("auto", Path("/q 1")),), "mem_mb": 2000, "verbose": 1,
                          }.get(name, (value,) if given.get("list") else value)
    return values, expected


def test_files_are_what_the_parser_says():
    found = {p.name: p.read_text() for p in (ROOT / "descriptors").glob("*.json")}
    assert found == {name: descriptors.to_text(d) for name, d in descriptors.descriptors().items()}


def test_the_levels_together_hold_every_option():
    ids = {i["id"] for level in LEVELS for i in descriptors.full(level)["inputs"]}
    assert ids | {"analysis_level"} == {f.name for f in fields(Options)}


@pytest.mark.parametrize("name", sorted(descriptors.descriptors()))
def test_valid(name):
    flags = ["--bids"] if name == "qsphere-bids.json" else []
    assert bosh("validate", *flags, ROOT / "descriptors" / name).strip().endswith("OK")


@pytest.mark.parametrize("level", LEVELS)
def test_simulated_command_sets_every_option(level, tmp_path):
    values, expected = everything(level)
    program, *argv = shlex.split(simulated(f"qsphere-{level}.json", values, tmp_path))
    assert program == "qsphere"
    got = vars(cli.parser().parse_args(argv))
    plain = {k: tuple(v) if isinstance(v, list) else str(v) if isinstance(v, Path) else v
             for k, v in got.items()}
    assert plain == expected


@pytest.mark.slow
@pytest.mark.parametrize("name,choice", [
    ("qsphere-participant.json", {"dry_run": True}),
    ("qsphere-bids.json", {"analysis_level": "participant"}),
])
def test_simulated_command_runs(name, choice, bids_tree, tmp_path):
    """As a shell runs it; for once `qsphere` stands for the package under test."""
    bids, out = bids_tree(), tmp_path / "a folder" / "out"
    line = simulated(name, {"bids_dir": str(bids), "output_dir": str(out),
                            "participant_label": ["02"], **choice}, tmp_path)
    qsphere = f'qsphere() {{ "{sys.executable}" -m bidsapp "$@"; }}'
    done = subprocess.run(["sh", "-c", f"{qsphere}; {line}"], capture_output=True, text=True,
                          cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    if "dry_run" in choice:
        assert "sub-02:" in done.stdout and "sub-01:" not in done.stdout
        assert not out.exists()
    else:
        assert [p.name for p in out.glob("sub-*.html")] == ["sub-02.html"]
