"""Finding participants, runs and masks in a dataset, and messages when they are missing."""

import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from bidsapp.bids import btable, sidecar
from bidsapp.bids.find import repeats
from bidsapp.bids.writer import Dataset
from bidsapp.errors import DataError, UsageError
from support import bids_tree as truth
from support.app import find_runs, run_names

SHAPE = (7, 8, 9)


@pytest.fixture
def tree(bids_tree):
    def write(*args, **options):
        return bids_tree(*args, **{"shape": SHAPE, **options})
    return write


def json_file(path, content):
    path.write_text(json.dumps(content))
    return path


# participants, sessions, filters

def test_all_participants_in_order(tree):
    result = find_runs(tree(("10", "2", "a1")))
    assert result.participants == ["2", "10", "a1"]
    assert (result.unknown, result.name) == ([], "Synthetic heads")
    assert all(result.problems[p] == [] and len(result.runs[p]) == 1 for p in result.participants)


def test_labels_with_and_without_prefix(tree):
    bids = tree(("01", "02", "03"), ("a", "b"))
    result = find_runs(bids, "--participant-label", "sub-01", "03", "99",
                       "--session-label", "ses-b")
    assert run_names(result) == ["sub-01_ses-b", "sub-03_ses-b"]
    assert result.unknown == ["99"]


def test_labels_are_whole_names(tree):
    assert run_names(find_runs(tree(("1", "10", "100")), "--participant-label", "1")) == ["sub-1"]


@pytest.mark.parametrize("query,want", [
    ({"acquisition": "x"}, ["sub-01_acq-x_dir-AP"]),
    ({"acq": "x"}, ["sub-01_acq-x_dir-AP"]),
    ({"acquisition": None}, ["sub-01_dir-AP", "sub-01_dir-PA"]),
    ({"acquisition": "*"}, ["sub-01_acq-x_dir-AP"]),
    ({"acquisition": "<Query.ANY: 2>"}, ["sub-01_acq-x_dir-AP"]),
    ({"direction": ["AP", "PA"], "acquisition": "Query.NONE"}, ["sub-01_dir-AP", "sub-01_dir-PA"]),
    ({"echo": None, "direction": "PA"}, ["sub-01_dir-PA"]),
])
def test_filters(tree, tmp_path, query, want):
    bids = tree(("01",), runs={"dir-AP": {}, "dir-PA": {}, "acq-x_dir-AP": {"shape": (6, 7, 8)}})
    path = json_file(tmp_path / "filter.json", {"dwi": query, "t1w": {"run": 1}})
    assert run_names(find_runs(bids, "--bids-filter-file", path)) == want


def test_filter_of_an_absent_entity_finds_nothing(tree, tmp_path):
    path = json_file(tmp_path / "filter.json", {"dwi": {"acquisition": "x"}})
    with pytest.raises(UsageError, match=r"no dMRI found.*filter"):
        find_runs(tree(), "--bids-filter-file", path)


def test_unknown_filter_keys_are_told(tree, tmp_path, caplog):
    path = json_file(tmp_path / "filter.json", {"dwi": {"colour": "red"}})
    assert len(run_names(find_runs(tree(), "--bids-filter-file", path))) == 2
    assert "'colour' is not an entity" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"dwi": 3}'])
def test_broken_filter(tree, tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UsageError, match=r"f\.json"):
        find_runs(tree(), "--bids-filter-file", tmp_path / "f.json")


# what is one run

A, B = ((0, 1), (1000, 12)), ((0, 1), (2000, 16))


@pytest.mark.parametrize("runs,want", [
    ({"run-1": {"scheme": A}, "run-2": {"scheme": A}}, ["sub-01_run-1", "sub-01_run-2"]),
    ({"acq-a": {"scheme": A}, "acq-b": {"scheme": B}}, ["sub-01"]),
    ({"acq-a_run-1": {"scheme": A}, "acq-a_run-2": {"scheme": A}, "acq-b_run-1": {"scheme": B},
      "acq-b_run-2": {"scheme": B}}, ["sub-01_run-1", "sub-01_run-2"]),
    ({"run-1": {"scheme": A}, "run-2": {"scheme": A, "b_delta": -0.5}}, ["sub-01"]),
    ({"run-1": {"scheme": A}, "run-2": {"scheme": ((0, 3),)}}, ["sub-01"]),
    ({"acq-a": {"scheme": A}, "acq-b": {"scheme": B, "shape": (7, 8, 10)}},
     ["sub-01_acq-a", "sub-01_acq-b"]),
    ({"acq-a": {"scheme": A}, "acq-b": {"scheme": B, "matrix": truth.affine(turn=(0.2, 0, 0))}},
     ["sub-01_acq-a", "sub-01_acq-b"]),
    ({"dir-AP": {"scheme": A}, "dir-PA": {"scheme": B}}, ["sub-01_dir-AP", "sub-01_dir-PA"]),
    ({"acq-a": {"scheme": A}, "acq-b": {"scheme": B, "sidecar": {**truth.SIDECAR, "EchoTime": .1}}},
     ["sub-01_acq-a", "sub-01_acq-b"]),
    ({"acq-a": {"scheme": A},
      "acq-b": {"scheme": B, "sidecar": {**truth.SIDECAR, "PhaseEncodingDirection": "j"}}},
     ["sub-01_acq-a", "sub-01_acq-b"]),
    ({"acq-AP": {"scheme": A, "sidecar": {}}, "acq-PA": {"scheme": B, "sidecar": {}}},
     ["sub-01_acq-AP", "sub-01_acq-PA"]),
    ({"rec-a": {"scheme": A}, "rec-b": {"scheme": B}}, ["sub-01_rec-a", "sub-01_rec-b"]),
], ids=["repeated", "two shells", "two shells twice", "two shapes", "b0 apart", "other grid",
        "other affine", "other direction", "other echo time", "other phase encoding",
        "phase encoding unknown", "other reconstruction"])
def test_one_acquisition_split_in_runs(tree, runs, want):
    assert run_names(find_runs(tree(("01",), runs=runs))) == want


def test_joined_run_holds_all_volumes_in_order(tree):
    result = find_runs(tree(("01",), runs={"acq-a": {"scheme": A}, "acq-b": {"scheme": B}}))
    (run,) = result.runs["01"]
    acquisition = btable.load_acquisition(run)
    assert [round(s.b) for s in acquisition.shells] == [1000, 2000]
    assert np.flatnonzero(acquisition.b0).tolist() == [0, 13]


def test_sessions_are_never_joined(tree):
    assert run_names(find_runs(tree(("01",), ("a", "b")))) == ["sub-01_ses-a", "sub-01_ses-b"]


def test_repeats_is_blind_to_sign_and_order():
    bvals, axes = truth.table(((0, 1), (1000, 30)))
    one = btable.Acquisition(bvals, axes)
    order = np.random.default_rng(3).permutation(31)
    assert repeats(one, btable.Acquisition(bvals, -axes)[order])
    assert not repeats(one, btable.Acquisition(bvals * 1.5, axes))
    assert not repeats(one, btable.Acquisition(bvals, axes, np.where(bvals > 0, -0.5, 1)))


def test_b0_series_of_the_other_direction_is_left_out(tree, caplog):
    caplog.set_level("INFO")
    bids = tree(("01",), runs={"dir-AP": {}, "dir-PA": {"scheme": ((0, 3),)}})
    result = find_runs(bids)
    assert run_names(result) == ["sub-01_dir-AP"] and result.problems["01"] == []
    assert "sub-01_dir-PA_dwi.nii.gz: left out, since it has only b0 volumes" in caplog.text


def test_lone_b0_series_fails_with_a_message(tree):
    (run,) = find_runs(tree(("01",), scheme=((0, 3),))).runs["01"]
    with pytest.raises(DataError, match=r"sub-01_dwi\.bval: all 3 b-values are 0"):
        btable.load_acquisition(run)


def test_phase_and_imaginary_parts_are_no_runs_of_their_own(tree):
    bids = tree(("01",), runs=("acq-a_part-mag", "acq-a_part-phase", "acq-a_part-real",
                               "acq-a_part-imag", "acq-b_part-real", "acq-b_part-imag"))
    runs = find_runs(bids).runs["01"]
    assert [run.name for run in runs] == ["sub-01_acq-a_part-mag", "sub-01_acq-b_part-real"]
    assert [p.image.name for run in runs for p in run.phase] == [
        "sub-01_acq-a_part-phase_dwi.nii.gz", "sub-01_acq-b_part-imag_dwi.nii.gz"]


def test_real_split_and_real_angled_runs(test_data):
    nyu = find_runs(test_data("nyu_3shell"))
    assert run_names(nyu) == ["sub-D3"]
    shells = btable.load_acquisition(nyu.runs["D3"][0]).shells
    assert [(round(s.b), len(s)) for s in shells] == [(250, 4), (1000, 20), (2000, 60)]
    canon = find_runs(test_data("canon_retest"))
    assert len(run_names(canon)) == 11 and all(len(run.parts) == 1 for run in canon.runs["01"])
    assert len({run.batch for run in canon.runs["01"]}) == 2, "two software versions"
    hexagonal, water = (r for p in ("hex", "water")
                        for r in find_runs(test_data("dib2019_btensor")).runs[p])
    assert len(hexagonal.parts) == 3 and len(water.parts) == 1
    assert {s.b_delta for s in btable.load_acquisition(hexagonal).shells} == {1, -0.5}


# sidecars and tables by inheritance

def test_inheritance(tree):
    bids = tree(("01",), ("a",), ("dir-AP",))
    folder = bids / "sub-01/ses-a/dwi"
    stem = "sub-01_ses-a_dir-AP_dwi"
    shutil.move(folder / f"{stem}.bval", bids / "dwi.bval")
    shutil.move(folder / f"{stem}.bvec", bids / "sub-01/sub-01_dir-AP_dwi.bvec")
    (bids / "sub-01/sub-01_dir-PA_dwi.bvec").write_text("of another direction")
    json_file(bids / "dwi.json", {"EchoTime": 1, "Manufacturer": "Far", "Far": True})
    json_file(bids / "sub-01/sub-01_dir-AP_dwi.json", {"EchoTime": 2, "Manufacturer": "Near"})
    json_file(bids / "bold.json", {"EchoTime": 9})
    json_file(folder / f"{stem}.json", {"EchoTime": 3})
    (run,) = find_runs(bids).runs["01"]
    assert run.metadata == {"EchoTime": 3, "Manufacturer": "Near", "Far": True}
    assert run.parts[0].bval == bids / "dwi.bval"
    assert run.parts[0].bvec == bids / "sub-01/sub-01_dir-AP_dwi.bvec"
    assert len(btable.load_acquisition(run)) == 30


# damage stays with its participant, and with its file

def broken_link(path):
    path.unlink()
    path.symlink_to("../.git/annex/objects/missing")


@pytest.mark.parametrize("damage,message", [
    (lambda p: broken_link(p("nii.gz")), "link to a missing file.*datalad get"),
    (lambda p: broken_link(p("json")), "link to a missing file.*datalad get"),
    (lambda p: broken_link(p("bvec")), "link to a missing file.*datalad get"),
    (lambda p: p("json").write_text("{"), "cannot be read as JSON.*Correct"),
    (lambda p: p("json").write_text("[]"), "holds a list"),
    (lambda p: p("json").write_text("[" * 2000 + "]" * 2000), "nested more than 100 deep. Correct"),
    (lambda p: p("json").write_text('{"a": ' + "[" * 400 + "]" * 400 + "}"), "nested more than"),
    (lambda p: p("json").write_text(f'{{"a": 1{"0" * 400}}}'), "number 100000000000… of 401 char"),
    (lambda p: p("json").write_text(f'{{"a": {"1" * 5000}}}'), "of 5000 characters is too large"),
    (lambda p: p("json").write_text('{"a": [-1e400]}'), "the number -1e400… .* is too large"),
    (lambda p: p("json").write_text(r'{"a": "\ud800"}'), "cannot be read as JSON.*Correct"),
    (lambda p: p("bval").unlink(), "no .bval file belongs to it. Add"),
    (lambda p: p("bvec").unlink(), "no .bvec file belongs to it. Add"),
    (lambda p: p("nii").write_bytes(b""), "is beside it. Remove one"),
], ids=["image", "sidecar", "bvec", "broken json", "json list", "nested json",
        "less nested json", "integer of 401 digits", "integer of 5000 digits", "1e400",
        "half a character", "no bval", "no bvec", "twin"])
@pytest.mark.parametrize("cached", [False, True])
def test_damage_of_one_file(tree, tmp_path, damage, message, cached):
    bids = tree(("01", "02"), runs=("dir-AP", "dir-PA"))
    damage(lambda extension: bids / f"sub-01/dwi/sub-01_dir-AP_dwi.{extension}")
    result = find_runs(bids, *(["--bids-database-dir", tmp_path / "db"] if cached else []))
    assert result.participants == ["01", "02"]
    assert "sub-01_dir-PA" in run_names(result), "the other run goes on"
    assert run_names(result)[-2:] == ["sub-02_dir-AP", "sub-02_dir-PA"]
    assert result.problems["02"] == [] and len(result.problems["01"]) == 1
    (text,) = result.problems["01"]
    assert str(bids / "sub-01/dwi/sub-01_dir-AP_dwi") in text
    assert re.search(message, text)


@pytest.mark.parametrize("damage", [
    lambda image: image.write_bytes(b""),
    lambda image: image.write_bytes(image.read_bytes()[:200]),
    lambda image: nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), truth.affine()), image),
], ids=["zero bytes", "truncated header", "3-D"])
def test_unreadable_image_is_told_when_its_run_is_loaded(tree, damage):
    bids = tree(("01",), runs=("run-1", "run-2"))
    image = bids / "sub-01/dwi/sub-01_run-1_dwi.nii.gz"
    damage(image)
    first, second = find_runs(bids).runs["01"]
    with pytest.raises(DataError, match=str(image)):
        btable.load_acquisition(first)
    assert len(btable.load_acquisition(second)) == 30


def test_damaged_participant_that_was_not_asked_for(tree):
    bids = tree()
    (bids / "sub-01/dwi/sub-01_dwi.json").write_text("{")
    result = find_runs(bids, "--participant-label", "02")
    assert result.participants == ["02"] and result.problems == {"02": []}


def test_asked_participant_without_dwi(tree):
    bids = tree(("01", "02"))
    shutil.rmtree(bids / "sub-01/dwi")
    result = find_runs(bids, "--participant-label", "01", "02")
    assert "sub-01: no DWI found. Looked for" in result.problems["01"][0]
    assert find_runs(bids).participants == ["02"], "nobody asked for the other"


@pytest.mark.parametrize("prepare,argv,message", [
    (lambda b: None, ["--participant-label", "98", "99"], "no participant sub-98, sub-99 exists"),
    (lambda b: [shutil.rmtree(p) for p in b.glob("sub-*/dwi")], [], "no dMRI found.*_dwi.nii"),
    (lambda b: None, ["--session-label", "z"], "no dMRI found.*in ses-z"),
    (lambda b: shutil.rmtree(b / "sub-01/dwi"), ["--participant-label", "01"], "no dMRI.*sub-01"),
    (lambda b: (b / "dataset_description.json").unlink(), [], "holds no dataset_description"),
    (lambda b: (b / "dataset_description.json").write_text("{"), [], "cannot be read as JSON"),
    (lambda b: (b / "dataset_description.json").write_text("{}"), [], "Name.*skip-bids"),
    (shutil.rmtree, [], "is not a folder that exists"),
    (lambda b: None, ["--derivatives", "x=/nowhere"], "x=/nowhere: is not a folder"),
])
def test_input_that_cannot_be_used(tree, prepare, argv, message):
    bids = tree()
    prepare(bids)
    with pytest.raises(UsageError, match=message):
        find_runs(bids, *argv)


@pytest.mark.parametrize("text", [
    '{"Name": "x", "BIDSV', "[]", "[" * 2000, "null", '\ufeff{"Name": "x"}'],
    ids=["truncated", "list", "nested", "null", "byte order mark"])
def test_broken_description_of_a_derivative(tree, tmp_path, text):
    bids, other = tree(("01",)), tmp_path / "other"
    mask = other / "sub-01/dwi/sub-01_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    mask.touch()
    about = other / "dataset_description.json"
    about.write_text(text)
    with pytest.raises(UsageError, match=f"{about}: .*(Correct it|needed|byte order mark)"):
        find_runs(bids, "--derivatives", f"other={other}")


@pytest.mark.parametrize("authors,read", [('"Jane"', []), ("5", []),
                                          ('["Jane", 5]', ["Jane", "5"])])
def test_authors_that_are_no_list_of_text(tree, authors, read):
    bids = tree(("01",))
    (bids / "dataset_description.json").write_text(
        f'{{"Name": "x", "BIDSVersion": "1.10.0", "Authors": {authors}}}')
    assert find_runs(bids).authors == read


def test_nan_in_a_sidecar_counts_as_unknown(tree):
    bids = tree(("01",))
    (bids / "sub-01/dwi/sub-01_dwi.json").write_text('{"EchoTime": NaN, "FlipAngle": -Infinity}')
    (run,) = find_runs(bids).runs["01"]
    assert run.metadata == {"EchoTime": None, "FlipAngle": None}
    assert sidecar.base(run, Dataset(bids.parent / "out", {}), "x").keys().isdisjoint(run.metadata)


def test_names_outside_bids(tree):
    bids = tree(("01",))
    for path in (bids / "sub-01/dwi").iterdir():
        path.rename(path.with_name(path.name.replace("sub-01_", "sub-01_vol-3_")))
    with pytest.raises(UsageError, match="valid BIDS name"):
        find_runs(bids)
    assert "is not a BIDS name" in find_runs(bids, "--skip-bids-validation").problems["01"][0]


def test_dataset_without_description_when_validation_is_skipped(tree):
    bids = tree(("01",))
    (bids / "dataset_description.json").unlink()
    result = find_runs(bids, "--skip-bids-validation")
    assert run_names(result) == ["sub-01"] and result.name == "bids"


# the cached index

def test_cached_index_sees_changes(tree, tmp_path):
    bids = tree(("01", "02"))
    argv = ["--bids-database-dir", tmp_path / "db"]
    assert run_names(find_runs(bids, *argv, "--participant-label", "01")) == ["sub-01"]
    (database,) = (tmp_path / "db").iterdir()
    made = (database / "layout_index.sqlite").stat().st_mtime_ns
    assert run_names(find_runs(bids, *argv)) == ["sub-01", "sub-02"], "it holds all participants"
    assert (database / "layout_index.sqlite").stat().st_mtime_ns == made, "it was used"
    truth.write_run(bids / "sub-03/dwi/sub-03", shape=SHAPE)
    assert run_names(find_runs(bids, *argv)) == ["sub-01", "sub-02", "sub-03"]
    assert len(list((tmp_path / "db").iterdir())) == 2, "nothing unfinished is left"


def test_database_folder_that_is_a_file(tree, tmp_path):
    (tmp_path / "db").write_text("")
    with pytest.raises(UsageError, match="--bids-database-dir"):
        find_runs(tree(), "--bids-database-dir", tmp_path / "db")


# data preprocessed elsewhere

def mask_file(path, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(truth.head(shape).astype(np.uint8), truth.affine()), path)
    return path


def fsl_layout(folder, image, mask):
    written = truth.write_run(folder / "x", shape=SHAPE)
    written.rename(folder / image)
    (folder / "x_dwi.bval").rename(folder / "bvals")
    (folder / "x_dwi.bvec").rename(folder / "bvecs")
    (folder / "x_dwi.json").unlink()
    return mask_file(folder / mask)


@pytest.fixture
def qsiprep(tmp_path):
    root = tmp_path / "qsiprep"
    stem = root / "sub-01/ses-a/dwi/sub-01_ses-a_space-ACPC_desc-preproc"
    truth.write_run(stem, shape=SHAPE)
    mask_file(stem.with_name("sub-01_ses-a_space-ACPC_desc-brain_mask.nii.gz"))
    mask_file(stem.with_name("sub-01_ses-a_space-ACPC_label-WM_mask.nii.gz"))
    json_file(root / "dataset_description.json",
              {"Name": "QSIPrep", "BIDSVersion": "1.10.0", "DatasetType": "derivative",
               "GeneratedBy": [{"Name": "QSIPrep"}]})
    return root


def test_preprocessed_runs_replace_raw_ones_of_their_session(tree, qsiprep, caplog):
    caplog.set_level("INFO")
    result = find_runs(tree(("01", "02"), ("a", "b")), "-d", f"qsiprep={qsiprep}")
    assert run_names(result) == ["sub-01_ses-a_space-ACPC", "sub-01_ses-b", "sub-02_ses-a",
                             "sub-02_ses-b"]
    run = result.runs["01"][0]
    assert run.dataset == ("qsiprep", qsiprep)
    assert run.mask.name == "sub-01_ses-a_space-ACPC_desc-brain_mask.nii.gz"
    assert result.runs["01"][1].mask is None
    assert "1 raw files are left out, since qsiprep" in caplog.text


def test_scanner_of_preprocessed_runs_is_that_of_the_raw_ones(tree, qsiprep):
    json_file(qsiprep / "sub-01/ses-a/dwi/sub-01_ses-a_space-ACPC_desc-preproc_dwi.json", {})
    bids = tree(("01", "02"), ("a",))
    ready, raw = (run for p in ("01", "02")
                  for run in find_runs(bids, "-d", f"qsiprep={qsiprep}").runs[p])
    assert ready.dataset[0] == "qsiprep" and ready.batch == raw.batch != "unknown"
    (bids / "sub-01/ses-a/dwi/sub-01_ses-a_dwi.json").write_text("{")
    result = find_runs(bids, "-d", f"qsiprep={qsiprep}")
    assert result.runs["01"][0].batch == "unknown" and result.problems["01"] == []


def test_damaged_preprocessed_run_is_not_replaced_by_raw_data(tree, qsiprep):
    bids = tree(("01",), ("a",))
    (qsiprep / "sub-01/ses-a/dwi/sub-01_ses-a_space-ACPC_desc-preproc_dwi.bval").unlink()
    result = find_runs(bids, "-d", f"qsiprep={qsiprep}")
    assert run_names(result) == [] and "no .bval file" in result.problems["01"][0]


def test_derivative_as_bids_dir(qsiprep):
    (run,) = find_runs(qsiprep).runs["01"]
    assert run.name == "sub-01_ses-a_space-ACPC" and run.mask is not None
    assert len(btable.load_acquisition(run)) == 30


@pytest.mark.parametrize("folder,image,mask,name", [
    ("100307/T1w/Diffusion", "data.nii.gz", "nodif_brain_mask.nii.gz", "sub-100307"),
    ("100307_V2/T1w/Diffusion", "data.nii.gz", "nodif_brain_mask.nii.gz", "sub-100307_ses-V2"),
    ("1000012/dMRI/dMRI", "data_ud.nii.gz", "nodif_brain_mask_ud.nii.gz", "sub-1000012"),
    ("1000012_20250_2_0/dMRI/dMRI", "data_ud.nii.gz", "nodif_brain_mask_ud.nii.gz",
     "sub-1000012_ses-2"),
])
def test_fsl_layouts(tmp_path, folder, image, mask, name):
    bids, root = tmp_path / "bids", tmp_path / "other"
    bids.mkdir()
    json_file(bids / "dataset_description.json", {"Name": "Empty", "BIDSVersion": "1.10.0"})
    mask_path = fsl_layout(root / folder, image, mask)
    result = find_runs(bids, "--derivatives", f"other={root}")
    assert run_names(result) == [name]
    (run,) = result.runs[name[4:].split("_")[0]]
    assert run.mask == mask_path and len(btable.load_acquisition(run)) == 30
    with pytest.raises(UsageError, match=r"looks like.*--derivatives"):
        find_runs(root)


@pytest.mark.parametrize("name", ["sub-01_mask.nii.gz", "sub-01/dwi/sub-01_desc-brain_mask.nii.gz",
                                  "sub-01/sub-01_dir-AP_mask.nii.gz"])
def test_masks_from_a_folder_of_masks(tree, tmp_path, name):
    path = mask_file(tmp_path / "masks" / name)
    result = find_runs(tree(("01", "02"), runs=("dir-AP",)), "-d", f"masks={tmp_path / 'masks'}")
    assert result.runs["01"][0].mask == path
    assert result.runs["02"][0].mask is None


def test_the_most_specific_mask_wins(tree, tmp_path):
    mask_file(tmp_path / "masks/sub-01_mask.nii.gz")
    mask_file(tmp_path / "masks/sub-01_dir-PA_mask.nii.gz")
    bids = tree(("01",), runs=("dir-AP", "dir-PA"))
    ap, pa = find_runs(bids, "-d", tmp_path / "masks").runs["01"]
    assert (ap.mask.name, pa.mask.name) == ("sub-01_mask.nii.gz", "sub-01_dir-PA_mask.nii.gz")


def test_real_mask(test_data):
    root = test_data("mdt_multishell")
    (run,) = find_runs(root, "-d", root / "derivatives/mask").runs["01"]
    assert run.mask.name == "sub-01_acq-b1kb2k_mask.nii.gz"


def test_folder_without_anything_known(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"Supported are.*QSIPrep.*HCP-YA.*UK Biobank"):
        find_runs(tree(), "-d", tmp_path / "empty")


def test_derivative_that_holds_nothing_is_refused(bids_tree, tmp_path):
    bids = bids_tree()
    (tmp_path / "other/sub-01/anat").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no preprocessed DWI and no masks"):
        find_runs(bids, "-d", tmp_path / "other")


@pytest.mark.slow
def test_two_processes_make_one_index(bids_tree, tmp_path):
    """Both find the same, whoever is first."""
    bids = bids_tree()
    code = ("import sys; from pathlib import Path\n"
            "from bidsapp.bids.index import build_index, find_files\n"
            "layout = build_index(Path(sys.argv[1]), participants=(), validate=True, "
            "database_dir=Path(sys.argv[2]))\nprint(len(find_files(layout, 'dwi', {})))")
    running = [subprocess.Popen([sys.executable, "-c", code, str(bids), str(tmp_path / "db")],
                                stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [p.communicate()[0].strip() for p in running] == ["2"] * 4
    assert [p.returncode for p in running] == [0] * 4


@pytest.mark.parametrize("query,message", [
    ({"session": {"a": 1}}, "a label, a list of labels"),
    ({"acquisition": "(", "regex_search": True}, "not a regular expression"),
])
def test_filters_that_mean_nothing(tree, tmp_path, query, message):
    path = json_file(tmp_path / "filter.json", {"dwi": query})
    with pytest.raises(UsageError, match=message):
        find_runs(tree(), "--bids-filter-file", path)
