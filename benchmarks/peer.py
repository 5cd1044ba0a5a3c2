"""Runs a script in the Python of another environment, for peers whose licence is not ours."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np


def run(python: Path, script: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that `script` saves to sys.argv[2], given those that it loads from sys.argv[1]."""
    with tempfile.TemporaryDirectory() as folder:
        given, left = f"{folder}/in.npz", f"{folder}/out.npz"
        np.savez(given, **arrays)
        subprocess.run([python, "-W", "ignore", "-c", script, given, left], check=True,
                       stdout=subprocess.DEVNULL)
        with np.load(left) as found:
            return dict(found)
