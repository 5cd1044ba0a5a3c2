"""Fixtures shared by all tests."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bids_tree import write_dataset
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch is loaded

# shapes in annotations are checked here, and only here
install_import_hook(["bidsapp.tensor", "bidsapp.sh", "bidsapp.bids.btable",
                     "bidsapp.methods.estimate_smt.method", "bidsapp.simulate.mixture",
                     "bidsapp.preprocess.deconvolution",
                     "bidsapp.simulate.odf", "bidsapp.simulate.forward",
                     "bidsapp.simulate.noise", "bidsapp.networks.spherical",
                     "bidsapp.networks.scnn", "bidsapp.networks.mlp",
                     "bidsapp.networks.shresnet", "bidsapp.preprocess.pairs",
                     "bidsapp.preprocess.template", "bidsapp.evaluate.agreement",
                     "bidsapp.simulate.protocols", "bidsapp.simulate.tissue",
                     "bidsapp.simulate.likelihood",
                     "bidsapp.microstructure.learn",
                     "bidsapp.microstructure.maps",
                     "bidsapp.simulate.anatomy",
                     "bidsapp.simulate.fields",
                     "bidsapp.simulate.person", "bidsapp.simulate.site",
                     "bidsapp.simulate.phantom", "bidsapp.bids.raw"], "beartype.beartype")

ROOT = Path(__file__).parent.parent


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
    """Writes a synthetic dataset: `bids_tree()`, with the arguments of bids_tree.write_dataset."""
    return partial(write_dataset, tmp_path / "bids")
