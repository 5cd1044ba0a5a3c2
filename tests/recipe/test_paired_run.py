"""A travelling phantom on its whole way: processed, a network of pairs trained, applied."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bidsapp import cli_phantom
from bidsapp.evaluate import crossvalidation
from bidsapp.harmonization import pairs
from support.app import content, image, qsphere, validate

MODEL = "harmonize_shresnet_siteB-to-siteA"
TRAIN = ("group", "--train", "harmonize_shresnet", "--reference-batch", "siteA", "--sloppy",
         "--max-steps", "20", "--folds", "3")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(bids, out) of three people scanned at two sites, processed."""
    folder = tmp_path_factory.mktemp("travelling")
    bids, out = folder / "bids", folder / "out"
    assert cli_phantom.main([str(bids), "--participants", "3", "--sloppy", "--shells", "1000"]) == 0
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    return bids, out


@pytest.fixture(scope="module")
def harmonized(study):
    """The same after a training, and --harmonize; a first training is interrupted."""
    bids, out = study
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossvalidation, "_means", interrupt)
        assert qsphere(bids, out, *TRAIN) == 130
    assert not (out / "group/models").exists() and not (out / "group.html").exists()
    assert len(list(out.glob(f"group/log/{MODEL}.b1000.*.ckpt"))) == 4, "of all, and three folds"
    assert len(list(out.glob(f"group/log/{pairs.PREFIX}*.npz"))) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_register", interrupt)  # is not done again
        assert qsphere(bids, out, *TRAIN) == 0
    assert not list(out.glob("group/log/*.ckpt")) + list(out.glob(f"group/log/{pairs.PREFIX}*"))
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--harmonize", "shresnet") == 0
    return bids, out


def interrupt(*_):
    raise KeyboardInterrupt


def scan(out, site, what):
    return f"{out}/sub-01/ses-{site}/dwi/sub-01_ses-{site}_{what}"


def test_signal_of_the_other_site_is_harmonized(harmonized):
    bids, out = harmonized
    mask = image(scan(out, "siteB", "desc-brain_mask.nii.gz")) > 0
    before = image(bids / "sub-01/ses-siteB/dwi/sub-01_ses-siteB_dwi.nii.gz")[mask]
    after = image(scan(out, "siteB", "desc-harmonized_dwi.nii.gz"))[mask]
    b0 = np.loadtxt(scan(out, "siteB", "desc-harmonized_dwi.bval")) < 50
    np.testing.assert_array_equal(after[:, b0], before[:, b0])
    assert np.isfinite(after).all() and (after[:, ~b0] != before[:, ~b0]).mean() > 0.99


def test_directions_are_kept(harmonized):
    """The report's own measure, in single-fibre voxels: below the degree that issue 5 asks for."""
    table = pd.read_csv(scan(harmonized[1], "siteB", "desc-image_qc.tsv"), sep="\t").iloc[0]
    assert table["harmonization_voxels"] >= 10
    assert table["harmonization_angle"] < 1


def test_reference_batch_passes_through(harmonized):
    bids, out = harmonized
    mask = image(scan(out, "siteA", "desc-brain_mask.nii.gz")) > 0
    np.testing.assert_array_equal(
        image(scan(out, "siteA", "desc-harmonized_dwi.nii.gz"))[mask],
        image(bids / "sub-01/ses-siteA/dwi/sub-01_ses-siteA_dwi.nii.gz")[mask])
    about = json.loads(Path(scan(out, "siteA", "desc-harmonized_dwi.json")).read_text())
    assert about["Unchanged"] is True


def test_pages_tell_of_it(harmonized):
    _, out = harmonized
    assert re.search(f"Maps siteB to siteA: <code>participant --harmonize {MODEL}</code>",
                     (out / "group.html").read_text())
    assert f"Harmonized from siteB to siteA by {MODEL}" in (out / "sub-01.html").read_text()
    assert validate(out) == []


def test_cross_validation_is_told(harmonized):
    _, out = harmonized
    table = pd.read_csv(out / "group/desc-shresnet_folds.tsv", sep="\t", dtype={"participant": str})
    assert sorted(table["participant"].unique()) == ["01", "02", "03"]
    assert set(table["fold"]) == {1, 2, 3} and set(table["batch"]) == {"siteB"}
    described = json.loads((out / "group/desc-shresnet_folds.json").read_text())
    assert set(described) == set(table.columns)
    card = json.loads((out / f"group/models/{MODEL}/model.json").read_text())
    own = table[(table["measure"] == "fa") & (table["tissue"] == "wm")]
    assert card["metrics"]["nmse_after_fa_wm_b1000"] == pytest.approx(
        own["nmse_after"].mean(), rel=1e-5), "the table has six digits"
    page = (out / "group.html").read_text()
    assert "<h4>Cross-validation</h4>" in page and "<th>Fold 3</th>" in page
    assert not (out / "group/desc-harmonizer_model.json").exists()


def test_cross_validation_of_a_method_without_training(harmonized, tmp_path):
    """Intensity warping, measured on the same people before, to what is left of digits."""
    bids, out = harmonized
    shutil.copytree(out, own := tmp_path / "out")
    assert qsphere(bids, own, "group", "--train", "harmonize_mica", "--reference-batch", "siteA",
                   "--sloppy", "--folds", "3") == 0
    keys = ["participant", "shell", "tissue", "measure"]
    mica, network = (pd.read_csv(p / f"group/desc-{name}_folds.tsv", sep="\t").set_index(keys)
                     for p, name in ((own, "mica"), (out, "shresnet")))
    pd.testing.assert_frame_equal(mica[["fold", "nmse_before"]], network[["fold", "nmse_before"]])
    assert (mica["nmse_after"] != mica["nmse_before"]).all()
    assert "nmse_after_md_gm_b1000" in json.loads(
        (own / "group/models/harmonize_mica_tositeA/model.json").read_text())["metrics"]
    assert "<h4>Cross-validation</h4>" in (own / "group.html").read_text()
    assert validate(own) == []


@pytest.mark.parametrize("argv,message", [
    (("--train", "harmonize_combat", "--folds", "3"), "harmonize_combat does not use it"),
    (("--train", "harmonize_rish", "--folds", "3"), "of one fold, sub-0"),
    (("--folds", "3"), "Give a METHOD with --train"), (("--folds", "1"), "at least 2")])
def test_folds_of_what_has_none(study, capsys, argv, message):
    assert qsphere(*study, "group", *argv, "--reference-batch", "siteA") == 2
    assert message in capsys.readouterr().err


def test_two_processes_train_and_one_writes(study, tmp_path):
    """As torchrun starts them; srun tells the same by other names."""
    bids, out = study[0], tmp_path / "out"
    shutil.copytree(study[1], out)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "bidsapp", bids, out, "group", "--train", "harmonize_golkov", "--reference-batch",
         "siteA", "--participant-label", "01", "02", "--sloppy", "--max-steps", "5", "--device",
         "cpu"],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("INFO results: ") == 1
    model = out / "group/models/harmonize_golkov_siteB-to-siteA"
    assert json.loads((model / "model.json").read_text())["training"]["steps"] == [[5]]
    assert not list(out.glob("group/log/*.ckpt")) and (out / "group.html").is_file()


def test_misspelt_reference_is_refused(study, tmp_path, capsys):
    bids, out = study
    before = content(out / "group")
    assert qsphere(bids, out, "group", "--train", "harmonize_shresnet", "--reference-batch",
                   "B", "--sloppy") == 2
    assert "found siteA: 3, siteB: 3. Did you mean siteB?" in capsys.readouterr().err
    assert content(out / "group") == before
