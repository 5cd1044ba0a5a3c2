"""Fixtures shared by all tests."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

from support import ROOT
from support.bids_tree import write_dataset

# as the program does, before torch is loaded; MKL reads its variable once, so that results would
# otherwise depend on which test of a process runs first
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# shapes in annotations are checked here, and only here
install_import_hook([".".join(file.relative_to(ROOT).with_suffix("").parts)
                     for file in sorted(ROOT.glob("bidsapp/**/*.py"))
                     if "from jaxtyping import" in file.read_text()],
                    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Give each process one thread, also of libraries that read this when they are loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup():
    """Undo what an earlier test set: which tests share a process must not matter."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Put the files with the most slow tests first, so that no process is left alone with them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.fixture(scope="session")
def test_data():
    """Path of one real dataset by folder name; skips where the data are not at hand."""
    folder = Path(os.environ.get("QSPHERE_TEST_DATA", ROOT / "../shared/data")).resolve()

    def find(name: str) -> Path:
        if not (folder / name).is_dir():
            pytest.skip(f"no {name} in {folder}; QSPHERE_TEST_DATA names another folder")
        return folder / name

    return find


@pytest.fixture
def bids_tree(tmp_path):
    """Write a synthetic dataset: `bids_tree()`, with the arguments of `write_dataset`."""
    return partial(write_dataset, tmp_path / "bids")
