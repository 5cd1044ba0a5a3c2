"""Tissues that an estimator finds: names, types and numbers of their files, in every space."""

import csv
import json
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli, kinds, methods
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from bidsapp.evaluate import quality
from bidsapp.recipe import spaces
from bidsapp.recipe.plan import choose, plan
from bidsapp.recipe.steps import RunContext, StepReport, load_run, outputs
from bidsapp.registration import resample
from bidsapp.stage import Stage
from support import tensor_method
from support.app import image, qsphere, validate

TISSUES = ("GM", "WM", "CSF")  # 1, 2, 3 in BIDS


class Thirds(tensor_method.Tensor):
    """Slices of the image are grey matter, white matter and CSF by turns."""

    OUTPUTS: ClassVar[dict] = {
        "model": {**tensor_method.OUTPUTS["model"], "name": "thirds"},
        "maps": {
            "label": {"suffix": "dseg", "entities": {}, "Description": "Tissue: 1 GM; 2 WM; 3 CSF",
                      "Units": "label", "range": [0, 3], "report": True},
            **{t.lower(): {"suffix": "probseg", "entities": {"label": t}, "Units": "unitless",
                           "Description": f"Probability of {t}", "range": [0, 1],
                           "report": t == "WM"} for t in TISSUES},
            "count": {"entities": {"param": "count"}, "Description": "Number of fibres",
                      "Units": "label", "range": [0, 3], "report": False}}}

    @property
    def name(self):
        return "estimate_thirds"

    def apply(self, dwi, device, seed=0):
        k = np.argwhere(dwi.mask)[:, 2] % 3
        p = (0.1 + 0.7 * np.eye(3)[k]).astype(np.float32)
        return kinds.Derived({
            "label": (k + 1).astype(np.float32), "count": k.astype(np.float32),
            **{t.lower(): p[:, i].copy() for i, t in enumerate(TISSUES)}})


@pytest.fixture
def thirds(monkeypatch, tmp_path):
    """The method is one of those that options name and tables describe."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method/README.md").write_text("# estimate_thirds\n\nSlices by turns.\n")
    get, names = methods.get, methods.names
    monkeypatch.setattr(methods, "get", lambda name, *args, **more: (
        Thirds(tmp_path / "method") if name in ("thirds", "estimate_thirds")
        else get(name, *args, **more)))
    monkeypatch.setattr(methods, "names", lambda kind="": sorted(
        [*names(kind), *(["estimate_thirds"] if kind in ("", "estimate_") else [])]))
    cached = quality._map_columns, quality._short_names
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def study(thirds, bids_tree, tmp_path):
    """(bids, out) with the maps of a run whose T1w image is its first b0."""
    bids, out = bids_tree(("01",)), tmp_path / "out"
    first = nib.load(bids / "sub-01/dwi/sub-01_dwi.nii.gz").slicer[..., 0]
    (bids / "sub-01/anat").mkdir()
    nib.save(first, bids / "sub-01/anat/sub-01_T1w.nii.gz")
    assert qsphere(bids, out, "participant", "--estimate", "thirds") == 0
    return bids, out


def context(bids, out, *more):
    options = cli.parse([str(bids), str(out), "participant", "--preprocess", "none",
                         "--estimate", "thirds", *more])
    (run,) = find.find_runs(options).runs["01"]
    return RunContext(options, Dataset(out, {"raw": bids}), run, "cpu", np.inf)


def sidecar(path):
    return json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())


def test_names_types_and_sidecars(study):
    """Segmentations have no model in their names; labels are integers, and the labels of BIDS."""
    folder = study[1] / "sub-01/dwi"
    assert sorted(p.name for p in folder.glob("*.nii.gz")) == [
        "sub-01_desc-brain_mask.nii.gz", "sub-01_dseg.nii.gz",
        *(f"sub-01_label-{t}_probseg.nii.gz" for t in sorted(TISSUES)),
        "sub-01_model-thirds_param-count_dwimap.nii.gz"]
    mask = image(folder / "sub-01_desc-brain_mask.nii.gz") > 0
    label = nib.load(folder / "sub-01_dseg.nii.gz")
    assert label.get_data_dtype() == np.uint8
    where = np.argwhere(mask)[:, 2] % 3
    np.testing.assert_array_equal(np.asarray(label.dataobj)[mask], where + 1)
    assert not np.asarray(label.dataobj)[~mask].any()
    for i, t in enumerate(TISSUES):
        path = folder / f"sub-01_label-{t}_probseg.nii.gz"
        np.testing.assert_allclose(image(path)[mask], np.where(where == i, 0.8, 0.1), atol=1e-6)
        about = sidecar(path)
        assert about["Description"] == f"Probability of {t}" and about["SkullStripped"]
        assert not {"suffix", "range", "report"} & set(about)
        assert "bids::sub-01/dwi/sub-01_desc-brain_mask.nii.gz" in about["Sources"]
    assert validate(study[1]) == []


def test_tables_and_figures(study):
    """Probabilities have statistics, labels have none; both can be drawn, and pages are made again
    from the records."""
    bids, out = study
    with (out / "sub-01/dwi/sub-01_desc-image_qc.tsv").open() as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert float(row["thirds_wm_mean"]) == pytest.approx(0.1 + 0.7 / 3, abs=0.03)
    assert not [column for column in row if column.startswith(("thirds_label", "thirds_count"))]
    columns = json.loads((out / "sub-01/dwi/sub-01_desc-image_qc.json").read_text())
    assert columns["thirds_wm_mean"]["Description"].endswith("Probability of WM")
    assert {"thirds_gm_mean", "thirds_wm_mean", "thirds_csf_mean"} == {
        c for c in quality.map_features(row) if c.startswith("thirds")}
    drawn = {p.name for p in (out / "sub-01/figures").glob("*seg.svg")}
    assert drawn == {"sub-01_dseg.svg", "sub-01_label-WM_probseg.svg"}
    page = (out / "sub-01.html").read_text()
    assert "Probability of WM" in page and "1: 3" in page  # a third of the voxels
    (out / "sub-01.html").unlink()
    assert qsphere(bids, out, "participant", "--reports-only") == 0
    assert (out / "sub-01.html").read_text() == page
    assert qsphere(bids, out, "group") == 0
    assert "thirds_wm_mean" in (out / "group/desc-image_qc.tsv").read_text().splitlines()[0]


def test_a_signal_of_another_step_has_its_own(study):
    """The same names with the `desc` of the signal."""
    run = context(*study)
    dwi = load_run(run.run)[0]
    with run.dataset.transaction(run.path("step", ".json", "log", desc="x")) as transaction:
        outputs(run, transaction, Stage(dwi, desc="harmonized")).write(
            Thirds(), Thirds().apply(dwi, "cpu"))
    assert {p.name for p in (study[1] / "sub-01/dwi").glob("*_desc-harmonized_*.nii.gz")} == {
        "sub-01_desc-harmonized_dseg.nii.gz",
        *(f"sub-01_label-{t}_desc-harmonized_probseg.nii.gz" for t in TISSUES),
        "sub-01_model-thirds_param-count_desc-harmonized_dwimap.nii.gz"}
    assert validate(study[1]) == []


def test_other_spaces(study):
    """On a grid half a slice further: a label is that of a voxel, a probability a mean of two."""
    out = study[1]
    run = context(*study, "--output-spaces", "T1w")
    steps = plan(run, choose(run.options))
    register = next(s for s in steps if isinstance(s, spaces.Register))
    step = next(s for s in steps if isinstance(s, spaces.Resample))
    inside = image(out / run.mask) > 0
    shift = np.eye(4)
    shift[:3, 3] = 0.5 * run.like.affine[:3, 2]
    with run.dataset.transaction(register.record) as transaction:
        transaction.image(register.mask, inside.astype(np.uint8), run.like, {
            "Description": "Brain", "Type": "Brain", **register.about, "Sources": ["bids::x"]})
        transaction.bytes(register.transform, resample.pack_rigid(shift))
    with run.dataset.transaction(step.record) as transaction:
        step.apply(None, transaction, StepReport())
    folder = out / "sub-01/dwi"
    assert len(list(folder.glob("*_space-T1w_*.nii.gz"))) == 6
    k = np.argwhere(inside)[:, 2]
    deep = np.roll(inside, -1, 2)[inside] & (k + 1 < inside.shape[2])
    label = nib.load(folder / "sub-01_space-T1w_dseg.nii.gz")
    assert label.get_data_dtype() == np.uint8
    values = np.asarray(label.dataobj)[inside][deep]
    assert np.all((values == k[deep] % 3 + 1) | (values == (k[deep] + 1) % 3 + 1))
    for i, t in enumerate(TISSUES):
        path = folder / f"sub-01_space-T1w_label-{t}_probseg.nii.gz"
        either = (k[deep] % 3 == i) | ((k[deep] + 1) % 3 == i)
        np.testing.assert_allclose(image(path)[inside][deep], np.where(either, 0.45, 0.1),
                                   atol=1e-3)
        assert sidecar(path)["Interpolation"] == "linear"
    assert sidecar(folder / "sub-01_space-T1w_dseg.nii.gz")["Interpolation"] == "nearest voxel"
    assert validate(out) == []
