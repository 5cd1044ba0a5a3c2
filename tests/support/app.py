"""The app as tests call it, what it finds in a dataset, and what it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from bidsapp import cli
from bidsapp.bids import find
from bidsapp.recipe.steps import load_run


def qsphere(*argv):
    """Run the command line in this process, with one worker; return its exit code.

    Raw images are measured as they are, unless `argv` says --preprocess.
    """
    argv = [*map(str, argv)]
    if "participant" in argv and "--preprocess" not in argv:
        argv += ["--preprocess", "none"]
    return cli.main([*argv, "--nprocs", "1"])


def find_runs(bids, *argv):
    """Find the participants and runs of a dataset, as the participant level with `argv` does."""
    return find.find_runs(cli.parse([str(bids), str(bids.parent / "out"), "participant",
                                     *map(str, argv)]))


def run_names(inventory):
    """List the names of the runs that were found, participant by participant."""
    return [run.name for label in inventory.participants for run in inventory.runs[label]]


def load_first_run(bids):
    """Load the signal of the first run of a dataset, inside its mask."""
    inventory = find_runs(bids)
    return load_run(inventory.runs[inventory.participants[0]][0])[0]


def content(root, *, logs=False):
    """Read the bytes of every visible file, by name.

    Folders called log and pages, which say when something ran, are left out unless `logs`.
    """
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*"))
            if p.is_file() and (logs or not ({"log", "logs"} & set(p.parts)
                                             or p.suffix == ".html"))}


def image(path):
    """Read the array of an image."""
    return np.asarray(nib.load(path).dataobj)


def validate(root):
    """List the errors and warnings of the BIDS validator."""
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([validator, str(root), "-r", "--format", "json"],
                          capture_output=True, text=True, check=False)
    return [i for i in json.loads(done.stdout)["issues"]["issues"]
            if i.get("severity", "error") in ("error", "warning")]
