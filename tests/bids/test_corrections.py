"""Data that correct a raw run: phase encodings, field maps and phase images, and their rules."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli
from bidsapp.acquisition import PhaseEncoding
from bidsapp.bids.find import find_runs
from bidsapp.dwi import FieldMap, ImageFile
from bidsapp.errors import DataError
from support import bids_tree as truth

SHAPE = (7, 8, 9)
AP = truth.SIDECAR
PA = {**truth.SIDECAR, "PhaseEncodingDirection": "j"}
GRE = {"EchoTime1": 0.00492, "EchoTime2": 0.00738}
BOTH = {"dir-AP": {}, "dir-PA": {"sidecar": PA}}


@pytest.fixture
def tree(bids_tree):
    def write(runs=None, **options):
        return bids_tree(("01",), runs=runs or {"dir-AP": {}}, shape=SHAPE, **options)
    return write


def runs_of(bids, *argv):
    found = find_runs(cli.parse([str(bids), str(bids.parent / "out"), "participant",
                                 *map(str, argv)]))
    assert found.problems == {"01": []}
    return {run.name: run for run in found.runs["01"]}


def run_of(bids, name="sub-01_dir-AP"):
    return runs_of(bids)[name]


def fmap(bids, name, sidecar=None, matrix=None, session=""):
    """An image of zeros in fmap, and its sidecar."""
    path = bids / "sub-01" / session / "fmap" / f"{name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16),
                             truth.affine() if matrix is None else matrix), path)
    edit(path, sidecar or {})
    return path


def gre(bids, sidecar=GRE, stem="sub-01", suffix="phasediff"):
    fmap(bids, f"{stem}_magnitude1")
    return fmap(bids, f"{stem}_{suffix}", sidecar)


def edit(image, sidecar):
    path = image.with_name(image.name.removesuffix(".nii.gz") + ".json")
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}),
                                **sidecar}))
    return path


def dwi(bids, name="sub-01_dir-AP"):
    return bids / f"sub-01/dwi/{name}_dwi.nii.gz"


def summary(run):
    """(kind, names, rule) of each field map."""
    return [(f.kind, [i.image.name.removesuffix(".nii.gz") for i in f.images], f.rule)
            for f in run.field_maps]


# phase encoding

@pytest.mark.parametrize("direction,want", [
    ("i", (0, 1)), ("j", (1, 1)), ("k", (2, 1)), ("i-", (0, -1)), ("j-", (1, -1)), ("k-", (2, -1))])
def test_phase_encoding_of_a_sidecar(direction, want):
    made = PhaseEncoding.from_sidecar({"PhaseEncodingDirection": direction,
                                       "TotalReadoutTime": 0.05})
    assert (made.axis, made.sign, made.readout, made.direction) == (*want, 0.05, direction)


def test_phase_encodings_that_are_opposite():
    ap, pa, lr = (PhaseEncoding.from_sidecar({"PhaseEncodingDirection": d})
                  for d in ("j-", "j", "i"))
    assert ap.opposes(pa) and pa.opposes(ap) and ap.readout is None
    assert not (ap.opposes(ap) or ap.opposes(lr) or ap.opposes(None))
    assert PhaseEncoding.from_sidecar({"TotalReadoutTime": 0.05}) is None


@pytest.mark.parametrize("key,value", [
    *(("PhaseEncodingDirection", v) for v in ("AP", "y-", "j+", "", 1, ["j"], {})),
    *(("TotalReadoutTime", v) for v in (
        0, -0.05, 47.5, "0.05", True, [0.05], float("nan"), float("inf"), 10**400))])
def test_phase_encodings_that_are_none(key, value):
    with pytest.raises(DataError, match=rf"{key} is .* needed.*Correct"):
        PhaseEncoding.from_sidecar({**AP, key: value})


@pytest.mark.parametrize("axis,sign", [(3, 1), (-1, 1), (1, 0), (1, 2)])
def test_axes_and_signs_that_do_not_exist(axis, sign):
    with pytest.raises(DataError, match="axis must be 0, 1 or 2, and the sign 1 or -1"):
        PhaseEncoding(axis, sign)


@pytest.mark.parametrize("sidecar", [{**AP, "PhaseEncodingDirection": "AP"},
                                     {**AP, "TotalReadoutTime": 47}, {}])
def test_a_run_without_phase_encoding_is_a_run(tree, sidecar):
    run = run_of(tree({"dir-AP": {"sidecar": sidecar}}))
    assert run.phase_encoding is None and run.field_maps == ()
    assert any("Distortion cannot be corrected" in n for n in run.notices)


@pytest.mark.parametrize("share", ["6/8", 0, 1.5, True, [0.75]])
def test_a_partial_fourier_that_is_none_is_told(tree, share):
    run = run_of(tree({"dir-AP": {"sidecar": {**AP, "PartialFourier": share}}}))
    assert any("PartialFourier is" in n and "is left as it is" in n for n in run.notices)


# field maps

@pytest.mark.parametrize("kind,sidecars,magnitudes,message", [
    ("phasediff", [GRE], 0, "no magnitude"),
    ("phasediff", [{"EchoTime1": 0.004}], 1, "Two are needed"),
    ("phasediff", [{"EchoTime1": 0.007, "EchoTime2": 0.004}], 1, "Two are needed"),
    ("phasediff", [{"EchoTime1": "0.004", "EchoTime2": 0.007}], 1, "Two are needed"),
    ("phases", [{"EchoTime": 0.004}], 1, "other echo is missing"),
    ("phases", [{"EchoTime": 0.007}, {"EchoTime": 0.004}], 1, "Two are needed"),
    ("fieldmap", [{"Units": "ppm"}], 1, "Units are 'ppm'"),
    ("fieldmap", [{}], 1, "Units are 'None'"),
    ("opposite", [{}], 0, "PhaseEncodingDirection is missing"),
    ("opposite", [{"PhaseEncodingDirection": "AP"}], 0, "PhaseEncodingDirection is 'AP'")])
def test_field_maps_that_cannot_be_computed(kind, sidecars, magnitudes, message):
    images = tuple(ImageFile(Path(f"sub-01_{i}.nii.gz"), s) for i, s in enumerate(sidecars))
    with pytest.raises(DataError, match=rf"sub-01_0.nii.gz: .*{message}"):
        FieldMap(kind, images, images[:1] * magnitudes)


def test_opposite_dwis_of_a_session(tree):
    runs = runs_of(tree(BOTH))
    assert summary(runs["sub-01_dir-AP"]) == [("opposite", ["sub-01_dir-PA_dwi"], "session")]
    assert summary(runs["sub-01_dir-PA"]) == [("opposite", ["sub-01_dir-AP_dwi"], "session")]
    assert runs["sub-01_dir-AP"].phase_encoding == PhaseEncoding(1, -1, 0.05)
    assert any("No sidecar assigns" in n for n in runs["sub-01_dir-AP"].notices)


def test_a_lone_b0_and_what_a_filter_leaves_out_correct_too(tree, tmp_path):
    bids = tree({**BOTH, "dir-PA_run-2": {"sidecar": PA, "scheme": ((0, 2),)}})
    (query := tmp_path / "filter.json").write_text('{"dwi": {"direction": "AP"}}')
    (run,) = runs_of(bids, "--bids-filter-file", query).values()
    assert summary(run) == [
        ("opposite", [f"sub-01_dir-PA{r}_dwi"], "session") for r in ("", "_run-2")]


def test_the_phase_of_an_opposite_dwi_is_no_field_map(tree):
    bids = tree({"dir-AP": {}, "dir-PA_part-mag": {"sidecar": PA}})
    phase(bids, "dir-PA_part-mag")
    assert [names for _, names, _ in summary(run_of(bids))] == [["sub-01_dir-PA_part-mag_dwi"]]


def test_those_of_the_same_protocol_come_first(tree):
    run = run_of(tree({"acq-b_dir-AP": {}, "acq-a_dir-PA": {"sidecar": PA},
                       "acq-b_dir-PA": {"sidecar": PA}}), "sub-01_acq-b_dir-AP")
    assert [names for _, names, _ in summary(run)] == [
        ["sub-01_acq-b_dir-PA_dwi"], ["sub-01_acq-a_dir-PA_dwi"]]


def test_of_another_session_nothing_is_taken(bids_tree):
    bids = bids_tree(("01",), ("a", "b"), {"dir-AP": {}}, shape=SHAPE)
    fmap(bids, "sub-01_ses-b_dir-PA_epi", PA, session="ses-b")
    runs = runs_of(bids)
    assert summary(runs["sub-01_ses-a_dir-AP"]) == []
    assert summary(runs["sub-01_ses-b_dir-AP"]) == [
        ("opposite", ["sub-01_ses-b_dir-PA_epi"], "session")]


def test_the_same_axis_of_the_image_may_be_another_of_the_head(tree):
    """A sagittal series beside an axial one: both encode along j, and not along one line."""
    bids = tree()
    fmap(bids, "sub-01_dir-PA_epi", PA, truth.affine(order=(1, 2, 0)))
    assert summary(run_of(bids)) == []
    fmap(bids, "sub-01_dir-PA_epi", PA, truth.affine(turn=(5, 0, 0)))
    assert len(summary(run_of(bids))) == 1


def test_kinds_in_order_of_trust(tree):
    bids = tree()
    gre(bids, {"Units": "Hz"}, "sub-01_acq-direct", "fieldmap")
    fmap(bids, "sub-01_acq-direct_magnitude")
    gre(bids)
    gre(bids, {"EchoTime": 0.004}, "sub-01_acq-two", "phase1")
    fmap(bids, "sub-01_acq-two_phase2", {"EchoTime": 0.006})
    fmap(bids, "sub-01_dir-AP_epi", AP)
    fmap(bids, "sub-01_dir-PA_epi", PA)
    run = run_of(bids)
    assert summary(run) == [
        ("opposite", ["sub-01_dir-PA_epi"], "session"),
        ("phasediff", ["sub-01_phasediff"], "session"),
        ("phases", ["sub-01_acq-two_phase1", "sub-01_acq-two_phase2"], "session"),
        ("fieldmap", ["sub-01_acq-direct_fieldmap"], "session")]
    assert [len(f.magnitudes) for f in run.field_maps] == [0, 1, 1, 2]


@pytest.mark.parametrize("intended", [
    "bids::sub-01/dwi/sub-01_dir-AP_dwi.nii.gz", "dwi/sub-01_dir-AP_dwi.nii.gz",
    "sub-01/dwi/sub-01_dir-AP_dwi.nii.gz", ["dwi/none.nii.gz", "dwi/sub-01_dir-AP_dwi.nii.gz"]])
def test_forms_of_intended_for(tree, intended):
    bids = tree({**BOTH, "acq-x_dir-AP": {"shape": (7, 8, 10)}})
    gre(bids, {**GRE, "IntendedFor": intended})
    runs = runs_of(bids)
    assert summary(runs["sub-01_dir-AP"]) == [("phasediff", ["sub-01_phasediff"], "IntendedFor")]
    assert not any("No sidecar assigns" in n for n in runs["sub-01_dir-AP"].notices)
    assert summary(runs["sub-01_acq-x_dir-AP"]) == [("opposite", ["sub-01_dir-PA_dwi"], "session")]


@pytest.mark.parametrize("intended", [
    "x" * 5000, "a\0b", "bids:other:sub-01/dwi/sub-01_dir-AP_dwi.nii.gz", 3, {"a": 1},
    [["dwi/sub-01_dir-AP_dwi.nii.gz"]], None])
def test_what_intended_for_does_not_say(tree, intended):
    bids = tree()
    gre(bids, {**GRE, "IntendedFor": intended})
    assert summary(run_of(bids)) == [("phasediff", ["sub-01_phasediff"], "session")]


def test_an_intended_for_of_files_that_do_not_exist_is_told(tree):
    bids = tree()
    gre(bids, {**GRE, "IntendedFor": "ses-gone/dwi/sub-01_ses-gone_dwi.nii.gz"})
    run = run_of(bids)
    assert summary(run) == [("phasediff", ["sub-01_phasediff"], "session")]
    assert any("sub-01_phasediff: IntendedFor names no file" in n for n in run.notices)


def test_b0_field_source_comes_before_intended_for(tree):
    bids = tree()
    gre(bids, {**GRE, "IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"})
    for way, sidecar in (("AP", AP), ("PA", PA)):
        fmap(bids, f"sub-01_dir-{way}_epi", {**sidecar, "B0FieldIdentifier": ["x", "pepolar"]})
    edit(dwi(bids), {"B0FieldSource": "pepolar"})
    assert summary(run_of(bids)) == [
        ("opposite", ["sub-01_dir-PA_epi"], "B0FieldSource")]


def test_a_run_may_be_part_of_its_own_field_map(tree):
    bids = tree(BOTH)
    gre(bids)
    for name in ("sub-01_dir-AP", "sub-01_dir-PA"):
        edit(dwi(bids, name), {"B0FieldIdentifier": "pair", "B0FieldSource": ["pair"]})
    assert summary(run_of(bids)) == [("opposite", ["sub-01_dir-PA_dwi"], "B0FieldSource")]


@pytest.mark.parametrize("sidecar,notice", [
    ({"B0FieldSource": "gone"}, "B0FieldSource names gone"),
    ({"B0FieldSource": "same"}, "B0FieldSource assigns sub-01_dir-AP_epi (encoded along j-) to "
                                "the run, which is encoded along j-. An image that is encoded "
                                "along j on the same axis")])
def test_a_source_that_does_not_serve_leaves_the_other_rules(tree, sidecar, notice):
    bids = tree()
    gre(bids, {**GRE, "IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"})
    fmap(bids, "sub-01_dir-AP_epi", {**AP, "B0FieldIdentifier": "same"})
    edit(dwi(bids), sidecar)
    run = run_of(bids)
    assert summary(run) == [("phasediff", ["sub-01_phasediff"], "IntendedFor")]
    assert any(notice in n for n in run.notices)


def test_a_pair_along_another_axis_than_the_run(tree):
    bids = tree({"dir-LR": {"sidecar": {**AP, "PhaseEncodingDirection": "i",
                                        "B0FieldSource": "pair"}}})
    for way, sidecar in (("AP", AP), ("PA", PA)):
        fmap(bids, f"sub-01_dir-{way}_epi", {**sidecar, "B0FieldIdentifier": "pair"})
    run = run_of(bids, "sub-01_dir-LR")
    assert summary(run) == []
    assert any("sub-01_dir-PA_epi (encoded along j) to the run, which is encoded along i. An image "
               "that is encoded along i-" in n for n in run.notices)


def test_merged_runs_whose_identifier_names_themselves_alone(tree):
    """The parts have opposite encodings, but only one of them has a b0."""
    pair = {"B0FieldIdentifier": "pair", "B0FieldSource": "pair"}
    bids = tree({"dir-AP": {"scheme": ((1000, 12),), "sidecar": {**AP, **pair}},
                 "dir-PA": {"sidecar": {**PA, **pair}}})
    (merged,) = runs_of(bids, "--merge-distortion-groups").values()
    assert summary(merged) == []


def test_nothing_corrects(tree):
    run = run_of(tree())
    assert run.field_maps == () and any("No field map was found" in n for n in run.notices)


# broken files

@pytest.mark.parametrize("text", ["{", "[]", "", "[" * 5000 + "]" * 5000, '{"EchoTime1": 1}', None])
def test_a_broken_field_map_costs_itself_alone(tree, text):
    bids = tree()
    path = edit(gre(bids), {})
    fmap(bids, "sub-01_dir-PA_epi", PA)
    path.write_text(text) if text is not None else path.unlink()
    run = run_of(bids)
    assert summary(run) == [("opposite", ["sub-01_dir-PA_epi"], "session")]
    assert any("A field map is not used" in n and "sub-01_phasediff" in n for n in run.notices)


@pytest.mark.parametrize("content", [None, b"not an image"])
def test_an_opposite_image_that_cannot_be_opened(tree, content):
    bids = tree()
    path = fmap(bids, "sub-01_dir-PA_epi", PA)
    path.unlink()
    path.write_bytes(content) if content else path.symlink_to("nowhere")
    run = run_of(bids)
    assert run.field_maps == ()
    assert any("A field map is not used" in n and path.name in n for n in run.notices)


# merged runs

def test_runs_of_opposite_encodings_are_merged_when_asked(tree):
    bids = tree({**BOTH, "dir-LR": {"sidecar": {**PA, "PhaseEncodingDirection": "i"}}})
    assert list(runs_of(bids)) == ["sub-01_dir-AP", "sub-01_dir-LR", "sub-01_dir-PA"]
    runs = runs_of(bids, "--merge-distortion-groups")
    assert list(runs) == ["sub-01", "sub-01_dir-LR"]
    merged = runs["sub-01"]
    assert [part.metadata["PhaseEncodingDirection"] for part in merged.parts] == ["j-", "j"]
    (field_map,) = merged.field_maps
    assert (field_map.kind, field_map.rule) == ("opposite", "run")
    assert [image.image for image in field_map.images] == [dwi(bids, "sub-01_dir-PA")]


def test_a_merged_run_is_corrected_in_the_place_of_its_first_b0(tree):
    bids = tree({"dir-AP": {"scheme": ((1000, 12),)}, "dir-PA": {"sidecar": PA}})
    fmap(bids, "sub-01_dir-AP_epi", AP)
    (merged,) = runs_of(bids, "--merge-distortion-groups").values()
    assert [part.metadata["PhaseEncodingDirection"] for part in merged.parts] == ["j-", "j"]
    assert merged.phase_encoding == PhaseEncoding(1, 1, 0.05)
    assert summary(merged) == [("opposite", ["sub-01_dir-AP_epi"], "session")]


def test_runs_on_other_grids_are_not_merged(tree):
    bids = tree({"dir-AP": {}, "dir-PA": {"sidecar": PA, "matrix": truth.affine(turn=(5, 0, 0))}})
    assert len(runs_of(bids, "--merge-distortion-groups")) == 2


# phase images

def phase(bids, mag="dir-AP_part-mag"):
    path = dwi(bids, f"sub-01_{mag}")
    beside = path.with_name(path.name.replace("part-mag_", "").replace("_dwi", "_part-phase_dwi"))
    shutil.copy(path, beside)
    edit(beside, {"Units": "rad"})
    return beside


@pytest.mark.parametrize("name", ["dir-AP_part-mag", "dir-AP"])
def test_phase_beside_magnitude(tree, name):
    bids = tree({name: {}})
    assert run_of(bids, f"sub-01_{name}").phase == ()
    path = phase(bids, name)
    (found,) = run_of(bids, f"sub-01_{name}").phase
    assert (found.image, found.metadata["Units"]) == (path, "rad")


def test_phase_of_some_parts_or_broken_is_not_used(tree):
    bids = tree({"run-1_part-mag": {"scheme": ((0, 1), (1000, 12))},
                 "run-2_part-mag": {"scheme": ((0, 1), (2000, 16))}})
    beside = phase(bids, "run-1_part-mag")
    run = run_of(bids, "sub-01_part-mag")
    assert run.phase == () and any("1 of the 2 files" in n for n in run.notices)
    edit(beside, {}).write_text("{")
    run = run_of(bids, "sub-01_part-mag")
    assert run.phase == () and any("phase is not used" in n for n in run.notices)


# what the dry run says

def test_the_dry_run_says_what_corrects(tree, capsys):
    bids = tree({"dir-AP_part-mag": {}})
    phase(bids)
    edit(dwi(bids, "sub-01_dir-AP_part-mag"), {"B0FieldSource": "a"})
    fmap(bids, "sub-01_dir-PA_epi", {**PA, "B0FieldIdentifier": "a"})
    gre(bids, {**GRE, "B0FieldIdentifier": "a"})
    (bids / "sub-01/anat").mkdir()
    shutil.copy(dwi(bids, "sub-01_dir-AP_part-mag"), bids / "sub-01/anat/sub-01_T1w.nii.gz")
    assert cli.main([str(bids), str(bids.parent / "out"), "participant", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for line in ("phase encoding j-, readout 50 ms",
                 "field map sub-01_dir-PA_epi: opposite phase encoding, by B0FieldSource",
                 "field map sub-01_phasediff with sub-01_magnitude1: phase difference of two "
                 "echoes, by B0FieldSource",
                 "phase sub-01_dir-AP_part-phase_dwi: complex data",
                 "T1w sub-01_T1w: of the same session"):
        assert f"    {line}\n" in text


def dry_run(bids, capsys, *argv):
    assert cli.main([str(bids), str(bids.parent / "out"), "participant", "--dry-run", *argv]) == 0
    return capsys.readouterr().out


def test_the_dry_run_says_what_follows_from_the_sidecar(tree, capsys):
    bids = tree({"dir-AP": {"sidecar": {"PhaseEncodingDirection": "j-"}}})
    text = dry_run(bids, capsys)
    assert "phase encoding j-, TotalReadoutTime unknown: distortion and eddy currents" in text
    text = dry_run(bids, capsys, "--fallback-total-readout-time", "0.04")
    assert "phase encoding j-, readout 40 ms, by --fallback-total-readout-time\n" in text
    (bids / "sub-01/anat").mkdir()
    shutil.copy(dwi(bids), bids / "sub-01/anat/sub-01_T1w.nii.gz")
    text = dry_run(bids, capsys)
    assert "of the same session; the field comes from it, since no field map does\n" in text
    edit(dwi(bids), {"PhaseEncodingDirection": "AP"})
    assert "_dwi.nii.gz: PhaseEncodingDirection is 'AP'" in dry_run(bids, capsys).partition(
        "corrections: would fail: ")[2]


def test_the_dry_run_of_preprocessed_data_is_silent_on_corrections(tree, capsys):
    bids = tree({"dir-AP_desc-preproc": {}, "dir-PA_desc-preproc": {"sidecar": PA}})
    (bids / "dataset_description.json").write_text(json.dumps(
        {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}))
    assert cli.main([str(bids), str(bids.parent / "out"), "participant", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "sub-01_dir-AP: " in text and "correct" not in text and "field map" not in text
