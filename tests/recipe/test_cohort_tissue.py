"""The group level gets the tissues of each T1w image in the voxels of the signal that it loads."""

import pickle

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli, cli_phantom, run
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from support.app import image, qsphere

STEM = "sub-01/ses-siteA/{}/sub-01_ses-siteA"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(bids, out): a person with one T1w image and two sessions, measured as they are."""
    folder = tmp_path_factory.mktemp("study")
    bids, out = folder / "bids", folder / "out"
    assert cli_phantom.main([str(bids), "--participants", "1", "--sites", "2", "--voxel-size", "4",
                             "--directions", "12"]) == 0
    (bids / "sub-01/ses-siteB/anat/sub-01_ses-siteB_T1w.nii.gz").unlink()
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    return bids, out


def cohort(bids, out):
    options = cli.parse([str(bids), str(out), "group"])
    inventory = find.find_runs(options)
    dataset = Dataset(options.output_dir, run.input_datasets(options))
    statistics, covariates = run.participant_statistics(dataset, inventory)
    runs = {r.name: r for r in inventory.runs["01"]}
    return run.load_cohort(dataset, options, runs, statistics, covariates, np.inf)


@pytest.mark.slow
def test_tissues_are_those_of_the_phantom(study):
    """Against the exact shares of the tissues on the grid of the run."""
    bids, out = study
    found = pickle.loads(pickle.dumps(cohort(bids, out))).tissue("sub-01_ses-siteA")
    dwi = cohort(bids, out).load("sub-01_ses-siteA")
    assert found.shape == (len(dwi.signal), 3) and found.dtype == np.float32
    truth = f"{bids}/sourcedata/truth/{STEM.format('dwi')}"
    exact = np.column_stack([image(f"{truth}_label-{t}_probseg.nii.gz")[dwi.mask]
                             for t in ("GM", "WM", "CSF")])
    np.testing.assert_array_less(found.sum(1), 1 + 1e-5)
    for p, share in zip(found.T, exact.T, strict=True):
        assert np.corrcoef(p, share)[0, 1] > 0.5
        assert np.corrcoef(np.roll(p, 5), share)[0, 1] < 0.2


@pytest.mark.slow
def test_a_run_without_t1w_has_none(study):
    """Nor has one whose image has no contrast."""
    bids, out = study
    path = bids / f"{STEM.format('anat')}_T1w.nii.gz"
    moved = path.rename(bids.parent / path.name)
    try:
        assert cohort(bids, out).tissue("sub-01_ses-siteB") is None
        nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), path)
        assert cohort(bids, out).tissue("sub-01_ses-siteA") is None  # no contrast
    finally:
        moved.rename(path)
