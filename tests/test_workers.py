"""Workers end with their parent, however it ends, and nothing half-written stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bidsapp.workers import TERMINATED, spread

PROGRAM = """
import signal, sys, time
from pathlib import Path
from bidsapp import scratch
from bidsapp.cli import guarded
from bidsapp.workers import pool, task

# a shell makes what it starts in the background ignore this one
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(folder):
    with scratch.folder(Path(folder)) as own:
        (own / "half-written").touch()
        time.sleep(600)

def main():
    if sys.argv[2] == "alone":
        work(sys.argv[1])
    with pool(2) as executor:
        for future in [executor.submit(task, work, sys.argv[1]) for _ in range(4)]:
            future.result()
    return 0

if __name__ == "__main__":
    sys.exit(guarded("program", main, lambda: 0))
"""


def children(pid):
    """Processes with this parent, none that are dead but not yet waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.fixture
def start(tmp_path):
    """Starts the program, in a session of its own; returns it and the folder that it writes to."""
    program, folder = tmp_path / "program.py", tmp_path / "staging"
    program.write_text(PROGRAM)
    folder.mkdir()
    return lambda how: (subprocess.Popen([sys.executable, program, folder, how], text=True,
                                         stderr=subprocess.PIPE, start_new_session=True), folder)


def test_sigterm_sweeps(start):
    process, folder = start("alone")
    wait_for(lambda: [*folder.glob("*/half-written")])
    process.terminate()
    told = process.communicate(timeout=30)[1]
    assert process.returncode == TERMINATED == 143
    assert not [*folder.iterdir()]
    assert told == "program: terminated. Run the same command again to continue.\n"


def test_calls_are_spread_over_processes_of_one_thread():
    before = dict(os.environ)
    with spread(1) as each:
        assert [*each(os.getpid, [()])] == [os.getpid()]
    with spread(2) as each:
        assert [*each(pow, [(2, k) for k in range(9)])] == [2**k for k in range(9)]
        assert os.getpid() not in each(os.getpid, [()] * 4)
        assert {*each(os.getenv, [("OMP_NUM_THREADS",)] * 4)} == {"1"}
        assert {*each(torch.get_num_threads, [()] * 4)} == {1}
        with pytest.raises(ZeroDivisionError):
            [*each(divmod, [(1, 1), (1, 0)])]
    with pytest.raises(MemoryError, match=r"a process .* died"), spread(2) as each:
        [*each(os._exit, [(1,)])]
    assert dict(os.environ) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed in /proc")
@pytest.mark.parametrize("how,code", [(signal.SIGKILL, -signal.SIGKILL),
                                      (signal.SIGTERM, TERMINATED), (signal.SIGINT, 130)])
def test_workers_end_with_their_parent(start, how, code):
    parent, folder = start("workers")
    workers = []
    try:
        wait_for(lambda: len([*folder.glob("*/half-written")]) == 2)
        workers = children(parent.pid)
        assert len(workers) >= 2
        parent.send_signal(how)
        assert parent.wait(30) == code
        wait_for(lambda: not any(map(runs, workers)), 10)
        assert not [*folder.iterdir()]
    finally:
        for pid in filter(runs, [*workers, parent.pid]):
            os.kill(pid, signal.SIGKILL)
        parent.wait()
        parent.stderr.close()
