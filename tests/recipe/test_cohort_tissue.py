"""The group level gets the tissues of each T1w image in the voxels of the signal that it loads."""

import pickle

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli, cli_phantom, run
from bidsapp.anatomy import t1w
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from support.app import image, qsphere

RUN = "sub-01_ses-siteA"
FOLDER = "sub-01/ses-siteA"


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    """A person with one T1w image and one run."""
    folder = tmp_path_factory.mktemp("study") / "bids"
    assert cli_phantom.main([str(folder), "--participants", "1", "--sites", "1", "--voxel-size",
                             "4", "--directions", "12"]) == 0
    return folder


@pytest.fixture(scope="module")
def corrected(bids):
    """OUTPUT_DIR in which the run was corrected, for which it was registered to the T1w image."""
    out = bids.parent / "corrected"
    assert qsphere(bids, out, "participant", "--preprocess", "bias", "--estimate", "dti") == 0
    return out


def cohort(bids, out):
    options = cli.parse([str(bids), str(out), "group"])
    inventory = find.find_runs(options)
    dataset = Dataset(options.output_dir, run.input_datasets(options))
    statistics, covariates = run.participant_statistics(dataset, inventory)
    runs = {r.name: r for r in inventory.runs["01"]}
    return run.load_cohort(dataset, options, runs, statistics, covariates, np.inf)


@pytest.mark.slow
def test_tissues_are_those_of_the_phantom(bids, corrected, monkeypatch):
    """Against the exact shares of the tissues on the grid of the run, which is not registered
    again."""
    align, given = t1w.align, []
    monkeypatch.setattr(t1w, "align", lambda *args: given.append(args[-1]) or align(*args))
    found = pickle.loads(pickle.dumps(cohort(bids, corrected))).tissue(RUN)
    assert len(given) == 1 and given[0].shape == (4, 4)
    dwi = cohort(bids, corrected).load(RUN)
    assert found.shape == (len(dwi.signal), 3) and found.dtype == np.float32
    np.testing.assert_array_less(found.sum(1), 1 + 1e-5)
    truth = f"{bids}/sourcedata/truth/{FOLDER}/dwi/{RUN}"
    exact = np.column_stack([image(f"{truth}_label-{t}_probseg.nii.gz")[dwi.mask]
                             for t in t1w.TISSUES])
    for p, share in zip(found.T, exact.T, strict=True):
        assert np.corrcoef(p, share)[0, 1] > 0.5
        assert np.corrcoef(np.roll(p, 5), share)[0, 1] < 0.2


@pytest.mark.slow
def test_a_t1w_image_that_cannot_be_used_gives_none(bids):
    """It has no contrast; then there is none."""
    out, path = bids.parent / "uncorrected", bids / FOLDER / f"anat/{RUN}_T1w.nii.gz"
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    moved = path.rename(bids.parent / path.name)
    try:
        assert cohort(bids, out).tissue(RUN) is None
        nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), path)
        assert cohort(bids, out).tissue(RUN) is None
    finally:
        moved.rename(path)
