"""Temporary folders go with the process that made them, at the latest with the next one."""

import subprocess
import sys

from bidsapp import scratch

KILLED = """
import os, signal, sys
from pathlib import Path
from bidsapp import scratch
with scratch.temporary(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_is_removed_with_its_lock(tmp_path):
    with scratch.temporary(tmp_path) as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path
    assert not [*tmp_path.iterdir()]


def test_the_next_process_sweeps_what_a_killed_one_left_and_nothing_else(tmp_path):
    (tmp_path / "tmp-of-someone").mkdir()
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    (left,) = tmp_path.glob("qsphere-*/file")
    with scratch.temporary(tmp_path) as mine, scratch.temporary(tmp_path) as other:
        assert not left.exists()
        assert mine.is_dir() and other.is_dir(), "the owner of the first lives"
    assert [p.name for p in tmp_path.iterdir()] == ["tmp-of-someone"]
