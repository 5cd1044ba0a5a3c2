"""The step that corrects raw images, from files to files, against the phantom's truth."""

import csv
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli_phantom
from bidsapp.anatomy import t1w
from bidsapp.bids import btable
from bidsapp.bids.inherit import read_part
from bidsapp.bids.writer import Dataset
from bidsapp.dwi import ImageFile, Run
from bidsapp.errors import DataError
from bidsapp.options import CORRECTIONS
from bidsapp.recipe.preprocess import load, slice_axis, volume_encodings
from bidsapp.recipe.steps import load_measured, load_run
from support import bids_tree as truth
from support.app import find_runs, image, qsphere, validate
from support.stripes import simulate_stripes

STEM = "sub-01/ses-siteA/{}/sub-01_ses-siteA_{}"
RAW = STEM.format("dwi", "dir-AP_dwi")
TRUTH = "sourcedata/truth/" + STEM


def phantom(folder, *artifacts, t1w=False):
    """Write the raw images of a coarse head; without its T1w image the brain mask is quick."""
    assert cli_phantom.main([str(folder), "--participants", "1", "--sites", "1", "--sloppy",
                             "--snr", "40", "--artifacts", *artifacts]) == 0
    if not t1w:
        shutil.rmtree(folder / "sub-01/ses-siteA/anat")
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return phantom(tmp_path_factory.mktemp("raw") / "bids", "distortion", "motion", "dropout",
                   "skull")


@pytest.fixture(scope="module")
def out(raw):
    folder = raw.parent / "out"
    assert qsphere(raw, folder, "participant", "--preprocess", "auto", "--estimate", "dti") == 0
    return folder


def record(out, step="preprocessed"):
    return json.loads((out / f"sub-01/log/sub-01_ses-siteA_dir-AP_desc-{step}_step.json"
                       ).read_text())


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def error(series, raw):
    """Relative square error of the attenuation in the brain, against the noise-free one."""
    brain = image(raw / f"{TRUTH.format('dwi', 'desc-brain_mask')}.nii.gz") > 0
    b0 = np.loadtxt(raw / f"{RAW}.bval") < 50
    clean, measured = (x[brain] / x[brain][:, b0].mean(1, keepdims=True).clip(1) for x in (
        image(raw / f"{TRUTH.format('dwi', 'desc-clean_dwi')}.nii.gz"), series))
    return np.sum((measured - clean)**2) / np.sum(clean**2)


@pytest.mark.slow
def test_the_corrected_series_is_near_the_truth(raw, out):
    series = image(out / f"{RAW.replace('_dwi', '_desc-preproc_dwi')}.nii.gz")
    before, after = error(image(raw / f"{RAW}.nii.gz"), raw), error(series, raw)
    assert after < before / 3


@pytest.mark.slow
def test_it_says_what_it_did(raw, out):
    about = json.loads((out / f"{RAW.replace('_dwi', '_desc-preproc_dwi')}.json").read_text())
    assert list(about["Corrections"]) == ["denoise", "gibbs", "pair", "motion", "resample", "bias"]
    assert any("fmap/sub-01_ses-siteA_dir-PA_epi.nii.gz" in uri for uri in about["Sources"])
    page = (out / "sub-01.html").read_text()
    for text in ("Corrections", "outlier slices of", "susceptibility field from"):
        assert text in page
    assert "were not corrected" not in page
    citation = (out / "logs/CITATION.md").read_text()
    assert "shrunk optimally in operator norm" in " ".join(citation.split())
    assert validate(out) == []


@pytest.mark.slow
def test_b_vectors_turn_with_the_head(raw, out):
    rows = table(raw / f"{TRUTH.format('dwi', 'desc-motion_truth')}.tsv")
    rows = [row for row in rows if row["image"] == "dwi"]
    rotations = np.array([[[float(row[f"rot_{a}{b}"]) for b in "xyz"] for a in "xyz"]
                          for row in rows])
    confounds = table(out / f"{STEM.format('dwi', 'dir-AP_desc-confounds_timeseries')}.tsv")
    weighted = [float(row["bval"]) > 50 for row in confounds]
    given, turned = (np.array([[float(row[f"{name}grad_{a}"]) for a in "xyz"]
                               for row in confounds])[weighted] for name in ("original_", ""))
    felt = np.einsum("vji,vj->vi", rotations[weighted], given)

    def angle(a, b):
        return np.degrees(np.arccos(np.clip(np.sum(a * b, axis=1), -1, 1)))

    assert np.sqrt(np.mean(angle(turned, felt)**2)) < 0.5 * np.sqrt(np.mean(angle(given, felt)**2))


@pytest.mark.slow
def test_what_follows_uses_the_corrected_images(raw, out):
    (run,) = find_runs(raw).runs["01"]
    dwi = load_measured(Dataset(out, {"raw": raw}), run)
    series = image(out / f"{RAW.replace('_dwi', '_desc-preproc_dwi')}.nii.gz")
    np.testing.assert_array_equal(dwi.signal, series[dwi.mask])
    fa = json.loads((out / STEM.format(
        "dwi", "dir-AP_model-tensor_param-fa_dwimap.json")).read_text())
    assert any(uri.endswith("_desc-preproc_dwi.nii.gz") for uri in fa["Sources"])


@pytest.mark.slow
def test_another_estimate_corrects_nothing_again(raw, out, capsys):
    image = out / f"{RAW.replace('_dwi', '_dwiref')}.nii.gz"
    before = record(out)["fingerprint"], image.stat().st_mtime_ns
    assert qsphere(raw, out, "participant", "--preprocess", "auto", "--estimate", "smt") == 0
    assert before == (record(out)["fingerprint"], image.stat().st_mtime_ns)
    assert "noise removed" not in capsys.readouterr().err


def test_the_dry_run_lists_corrections(raw, tmp_path, capsys):
    assert qsphere(raw, tmp_path / "out", "participant", "--preprocess", "auto", "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"corrections: {' '.join(CORRECTIONS)}\n" in text
    assert "sub-01_ses-siteA_dir-PA_epi: opposite phase encoding, by B0FieldSource" in text


@pytest.mark.parametrize(("missing", "remedy"), [
    ("PhaseEncodingDirection", "has no PhaseEncodingDirection"),
    ("TotalReadoutTime", "--fallback-total-readout-time")])
def test_distortion_needs_the_encoding(missing, remedy, raw, tmp_path):
    bids = shutil.copytree(raw, tmp_path / "bids")
    sidecar = bids / f"{RAW}.json"
    about = json.loads(sidecar.read_text())
    del about[missing]
    sidecar.write_text(json.dumps(about))
    folder = tmp_path / "out"
    assert qsphere(bids, folder, "participant", "--preprocess", "distortion", "--estimate",
                   "dti") == 0
    assert any("Distortion was not corrected" in n and remedy in n
               for n in record(folder)["warnings"])
    if missing == "TotalReadoutTime":
        assert qsphere(bids, folder, "participant", "--preprocess", "distortion", "--estimate",
                       "dti", "--fallback-total-readout-time", "0.0252") == 0
        assert [c["name"] for c in record(folder)["corrections"]] == ["pair", "resample"]


def test_gre_serves_where_there_is_no_opposite_image(raw, tmp_path):
    bids = shutil.copytree(raw, tmp_path / "bids")
    for path in bids.glob("sub-01/ses-siteA/fmap/*_epi.*"):
        path.unlink()
    folder = tmp_path / "out"
    assert qsphere(bids, folder, "participant", "--preprocess", "distortion", "--estimate",
                   "dti") == 0
    assert [c["name"] for c in record(folder)["corrections"]] == ["gre", "resample"]
    field = image(folder / STEM.format("fmap", "dir-AP_desc-preproc_fieldmap.nii.gz"))
    real = image(bids / f"{TRUTH.format('dwi', 'desc-field_truth')}.nii.gz")
    brain = image(bids / f"{TRUTH.format('dwi', 'desc-brain_mask')}.nii.gz") > 0
    assert np.sqrt(np.mean((field - real)[brain]**2)) < 0.5 * np.sqrt(np.mean(real[brain]**2))


def test_complex_images_lose_their_phase_and_floor(tmp_path):
    bids, folder = phantom(tmp_path / "bids", "complex"), tmp_path / "out"
    assert qsphere(bids, folder, "participant", "--preprocess", "denoise", "--estimate",
                   "dti") == 0
    (found,) = folder.glob("sub-01/log/*_desc-preprocessed_step.json")
    facts = json.loads(found.read_text())
    assert [c["name"] for c in facts["corrections"]] == ["complex", "denoise"]
    assert facts["magnitude"] is False
    assert "floor of the magnitudes" not in (folder / "logs/CITATION.md").read_text()
    assert "From magnitude" not in (folder / "logs/CITATION.md").read_text()
    (series,) = folder.glob("sub-01/**/*_desc-preproc_dwi.nii.gz")
    assert image(series).min() < 0


def flipped(folder, rng, name):
    """Write fibres whose .bvec has its first row negated; return the right vectors, too."""
    bids = truth.write_dataset(folder / "bids", ("01",))
    right = simulate_stripes(rng, matrix=truth.affine())
    stem = bids / f"sub-01/dwi/sub-01{name}_dwi"
    series = nib.Nifti1Image(right.unmask(right.signal), right.affine)
    series.header.set_xyzt_units("mm", "sec")
    for path in (bids / "sub-01/dwi").iterdir():
        path.rename(path.with_name(path.name.replace("sub-01", f"sub-01{name}")))
    nib.save(series, f"{stem}.nii.gz")
    np.savetxt(f"{stem}.bval", right.acquisition.bvals[None], fmt="%g")
    vectors = truth.fsl(right.acquisition.bvecs, right.affine).T
    np.savetxt(f"{stem}.bvec", vectors * [[-1], [1], [1]], fmt="%.9f")
    return bids, vectors


@pytest.mark.parametrize("steps", ["none", "bias"])
def test_flipped_vectors_are_fixed_when_asked(steps, tmp_path, rng, capsys):
    bids, vectors = flipped(tmp_path, rng, "")
    out = tmp_path / "out"
    argv = (bids, out, "participant", "--preprocess", steps, "--estimate", "dti")
    assert qsphere(*argv) == 0  # motion was not corrected
    assert "probably wrong" in capsys.readouterr().err
    assert qsphere(*argv, "--gradient-check", "fix") == 0
    fa = json.loads((out / "sub-01/dwi/sub-01_model-tensor_param-fa_dwimap.json").read_text())
    assert fa["GradientTableCorrection"] == "the first row negated"
    (run,) = find_runs(bids).runs["01"]
    dwi = load_measured(Dataset(out, {"raw": bids}), run)
    fixed = truth.fsl(dwi.acquisition.bvecs, dwi.affine).T
    weighted = ~dwi.acquisition.b0
    np.testing.assert_allclose(np.abs((fixed * vectors).sum(0))[weighted], 1, atol=1e-6)
    if steps == "bias":
        written = np.loadtxt(out / "sub-01/dwi/sub-01_desc-preproc_dwi.bvec")
        np.testing.assert_allclose(np.abs((written * vectors).sum(0))[weighted], 1, atol=1e-6)


@pytest.mark.parametrize("steps", ["none", "bias"])
def test_a_check_that_cannot_tell_says_so(steps, tmp_path, rng, monkeypatch, capsys):
    monkeypatch.setattr("bidsapp.evaluate.gradients.GAIN", 2.0)
    bids, _ = flipped(tmp_path, rng, "")
    out = tmp_path / "out"
    assert qsphere(bids, out, "participant", "--preprocess", steps, "--estimate", "dti",
                   "--gradient-check", "fix") == 0
    assert "cannot tell whether rows of the .bvec" in capsys.readouterr().err
    assert "cannot tell whether rows of the .bvec" in (out / "sub-01.html").read_text()
    fa = json.loads((out / "sub-01/dwi/sub-01_model-tensor_param-fa_dwimap.json").read_text())
    assert "GradientTableCorrection" not in fa


def test_flipped_vectors_of_corrected_images_stop_the_run(tmp_path, rng, capsys):
    bids, _ = flipped(tmp_path, rng, "_desc-preproc")
    (bids / "dataset_description.json").write_text(json.dumps(
        {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}))
    out = tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 1
    assert "--gradient-check fix" in capsys.readouterr().err
    assert not list(out.glob("sub-01/dwi/*"))


@pytest.mark.slow
def test_merged_runs_are_one_corrected_series(raw, tmp_path):
    """A second run of the opposite encoding, made of the b0 images of that encoding."""
    bids = shutil.copytree(raw, tmp_path / "bids")
    reverse = bids / STEM.format("fmap", "dir-PA_epi")
    opposite = bids / STEM.format("dwi", "dir-PA_dwi")
    about = json.loads((bids / f"{RAW}.json").read_text())
    about["PhaseEncodingDirection"] = json.loads(
        reverse.with_suffix(".json").read_text())["PhaseEncodingDirection"]
    opposite.with_suffix(".json").write_text(json.dumps(about))
    b0s = nib.load(f"{reverse}.nii.gz")
    data = np.asarray(b0s.dataobj, np.float32)
    nib.save(nib.Nifti1Image(np.concatenate([data, data[..., :1] / 2], axis=-1), b0s.affine),
             f"{opposite}.nii.gz")
    np.savetxt(f"{opposite}.bval", [[0] * data.shape[-1] + [1000]], fmt="%g")
    np.savetxt(f"{opposite}.bvec", [[0.0] * data.shape[-1] + [v] for v in (0, 0, 1)], fmt="%g")
    shutil.rmtree(bids / "sub-01/ses-siteA/fmap")
    folder = tmp_path / "out"
    assert qsphere(bids, folder, "participant", "--preprocess", "motion", "distortion",
                   "--estimate", "dti", "--merge-distortion-groups") == 0
    series = image(folder / STEM.format("dwi", "desc-preproc_dwi.nii.gz"))
    b0 = np.loadtxt(folder / STEM.format("dwi", "desc-preproc_dwi.bval")) < 50
    n = len(np.loadtxt(bids / f"{RAW}.bval"))
    assert series.shape[-1] == n + data.shape[-1] + 1
    brain = image(raw / f"{TRUTH.format('dwi', 'desc-brain_mask')}.nii.gz") > 0
    first, second = (series[..., part][..., b0[part]].mean(-1)[brain]
                     for part in (slice(0, n), slice(n, None)))
    assert np.corrcoef(first, second)[0, 1] > 0.9


def test_a_merged_run_whose_first_part_has_no_b0(raw, tmp_path):
    """The first b0 has the encoding of the second part, so that a b0 of the first one opposes."""
    bids = shutil.copytree(raw, tmp_path / "bids")
    first, second = (bids / STEM.format("dwi", f"dir-{way}_dwi") for way in ("AP", "PA"))
    epi = bids / STEM.format("fmap", "dir-PA_epi")
    series, b0 = nib.load(f"{first}.nii.gz"), np.loadtxt(f"{first}.bval") < 50
    data, opposite = np.asarray(series.dataobj), np.asarray(nib.load(f"{epi}.nii.gz").dataobj)
    tables = np.loadtxt(f"{first}.bval")[None], np.loadtxt(f"{first}.bvec")
    sidecars = [json.loads(path.with_name(f"{path.name}.json").read_text())
                for path in (first, epi)]
    shutil.rmtree(bids / "sub-01/ses-siteA/fmap")
    epi.parent.mkdir()
    for path, volumes, about in (
            (first, data[..., ~b0], sidecars[0]),
            (second, np.concatenate([opposite[..., :1], data[..., ~b0][..., :1]], -1), {
                **sidecars[0], "PhaseEncodingDirection": sidecars[1]["PhaseEncodingDirection"]}),
            (bids / STEM.format("fmap", "dir-AP_epi"), data[..., b0][..., :1], sidecars[0])):
        nib.save(nib.Nifti1Image(volumes, series.affine), f"{path}.nii.gz")
        path.with_name(f"{path.name}.json").write_text(json.dumps(about))
    for values, extension in zip(tables, ("bval", "bvec"), strict=True):
        np.savetxt(f"{first}.{extension}", values[:, ~b0], fmt="%g")
        np.savetxt(f"{second}.{extension}", np.c_[values[:, b0][:, :1] * 0,
                                                  values[:, ~b0][:, :1]], fmt="%g")
    folder = tmp_path / "out"
    assert qsphere(bids, folder, "participant", "--preprocess", "distortion", "--estimate", "dti",
                   "--merge-distortion-groups") == 0
    field = image(folder / STEM.format("fmap", "desc-preproc_fieldmap.nii.gz"))
    real = image(bids / f"{TRUTH.format('dwi', 'desc-field_truth')}.nii.gz")
    brain = image(bids / f"{TRUTH.format('dwi', 'desc-brain_mask')}.nii.gz") > 0
    assert np.sqrt(np.mean((field - real)[brain]**2)) < 0.5 * np.sqrt(np.mean(real[brain]**2))


@pytest.mark.parametrize(("sidecar", "axis"), [
    ({}, 2), ({"SliceEncodingDirection": "i-"}, 0), ({"SliceEncodingDirection": "x"}, 2)])
def test_the_axis_of_the_slices(sidecar, axis):
    assert slice_axis(sidecar) == axis


def test_every_volume_has_the_encoding_of_its_part(bids_tree):
    other = {**truth.SIDECAR, "PhaseEncodingDirection": "j"}
    del other["TotalReadoutTime"]
    bids = bids_tree(("01",), runs={"dir-AP": {}, "dir-PA": {"sidecar": other}})
    (run,) = find_runs(bids, "--merge-distortion-groups").runs["01"]
    encodings = volume_encodings(run, 0.04)
    half = len(encodings) // 2
    assert [(e.direction, e.readout) for e in (encodings[0], encodings[half - 1], encodings[half],
                                               encodings[-1])] == [
        ("j-", 0.05), ("j-", 0.05), ("j", 0.04), ("j", 0.04)]


SHAPE = (7, 8, 9)


@pytest.fixture
def parts(tmp_path):
    """A run of two files of 14 and 18 volumes."""
    read = []
    for k, scheme in enumerate((((0, 2), (1000, 12)), ((0, 2), (2000, 16)))):
        path = tmp_path / f"sub-01_run-{k + 1}"
        truth.write_run(path, scheme=scheme, shape=SHAPE, seed=k)
        read.append(read_part(path.with_name(f"{path.name}_dwi.nii.gz"), tmp_path))
    return Run({"sub": "01"}, tuple(read))


def with_phase(run, units="rad", volumes=(14, 18), name="phase"):
    """Random phases, or imaginary parts, beside the parts; and what they are."""
    phases = np.random.default_rng(3).uniform(-np.pi, np.pi, (*SHAPE, 32)).astype(np.float32)
    files = []
    for part, values in zip(run.parts, np.split(phases, [14], -1), strict=True):
        path = part.image.with_name(part.image.name.replace("_dwi", f"_part-{name}_dwi"))
        nib.save(nib.Nifti1Image(values[..., :volumes[len(files)]], truth.affine()), path)
        files.append(ImageFile(path, {"Units": units} if units else {}))
    return replace(run, phase=tuple(files)), phases


def data_of(run):
    return np.concatenate([np.asarray(nib.load(p.image).dataobj) for p in run.parts], -1)


def test_magnitudes_and_phases_become_complex(parts):
    run, phases = with_phase(parts)
    acquisition = btable.load_acquisition(run)
    volumes, _ = load(run, acquisition)
    magnitude, _ = load(parts, acquisition)
    assert volumes.dtype == np.complex64
    np.testing.assert_allclose(volumes, magnitude * np.exp(1j * phases), rtol=1e-4, atol=1e-2)
    levels = [magnitude[..., part][..., acquisition.b0[part]].mean()
              for part in (slice(0, 14), slice(14, None))]
    np.testing.assert_allclose(*levels, rtol=1e-4)  # parts are scaled to one b0
    np.testing.assert_array_equal(magnitude[..., :14], data_of(parts)[..., :14])


def test_real_and_imaginary_parts_become_complex(parts):
    run, imaginary = with_phase(parts, units=None, name="imag")
    run = replace(run, entities={"sub": "01", "part": "real"})
    volumes, _ = load(run, btable.load_acquisition(run))
    np.testing.assert_array_equal(volumes[..., :14].imag, imaginary[..., :14])
    np.testing.assert_array_equal(volumes[..., :14].real, data_of(parts)[..., :14])


@pytest.mark.parametrize(("units", "scale", "volumes", "message"), [
    ("arbitrary", 100, (14, 18), "Known are radians"), (None, 100, (14, 18), "Known are radians"),
    ("rad", 1, (14, 17), "has another shape")])
def test_phases_that_do_not_serve(parts, units, scale, volumes, message):
    run, _ = with_phase(parts, units, volumes)
    for file in run.phase:
        phases = nib.load(file.image)
        nib.save(nib.Nifti1Image(np.asarray(phases.dataobj) * scale, phases.affine), file.image)
    with pytest.raises(DataError, match=f"run-1_part-phase_dwi.nii.gz: .*{message}"):
        load(run, btable.load_acquisition(run))


def test_real_parts_are_not_measured_uncorrected(parts):
    with pytest.raises(DataError, match="real part of complex images"):
        load_run(replace(parts, entities={"sub": "01", "part": "real"}))


def test_a_slab_is_corrected_as_far_as_it_allows(tmp_path):
    """Two slices determine neither movements across them nor the bias field."""
    bids = truth.write_dataset(tmp_path / "bids", ("01",), shape=(18, 20, 2))
    out = tmp_path / "out"
    assert qsphere(bids, out, "participant", "--preprocess", "auto", "--estimate", "dti") == 0
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    assert [c["name"] for c in facts["corrections"]] == ["denoise", "gibbs"]
    assert sum("2 slices" in text for text in facts["notices"] + facts["warnings"]) == 2
    assert image(out / "sub-01/dwi/sub-01_desc-preproc_dwi.nii.gz").min() >= 0


@pytest.mark.parametrize("count,words", [
    (5, "Motion was not corrected: 5 slices"), (7, "Motion was estimated from 7 slices"),
    (8, None)])
def test_few_slices_are_told(count, words, tmp_path):
    bids, out = truth.write_dataset(tmp_path / "bids", ("01",)), tmp_path / "out"
    path = bids / "sub-01/dwi/sub-01_dwi.nii.gz"
    series = nib.load(path)
    nib.save(series.slicer[:, :, 2:2 + count], path)
    assert qsphere(bids, out, "participant", "--preprocess", "motion", "--estimate", "dti") == 0
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    told = [w for w in facts["warnings"] if "slices" in w]
    assert [w.startswith(words) for w in told] == [True] if words else told == []


def test_a_t1w_image_that_failed_is_not_registered_again(tmp_path, monkeypatch):
    """Neither for the field, nor for the brain mask, nor for the tissues."""
    bids, out = truth.write_dataset(tmp_path / "bids", ("01",)), tmp_path / "out"
    (bids / "sub-01/anat").mkdir()
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.float32), np.eye(4)),
             bids / "sub-01/anat/sub-01_T1w.nii.gz")
    calls = []

    def align(*args):
        calls.append(args)
        raise DataError("shows someone else.")

    monkeypatch.setattr(t1w, "align", align)
    assert qsphere(bids, out, "participant", "--preprocess", "distortion", "--estimate",
                   "freewater") == 0
    assert len(calls) == 1
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    assert sum("shows someone else" in warning for warning in facts["warnings"]) == 2
    assert any("Distortion was not corrected" in warning for warning in facts["warnings"])


def test_an_empty_first_b0_is_named(tmp_path, capsys):
    bids = truth.write_dataset(tmp_path / "bids", ("01",))
    path = bids / "sub-01/dwi/sub-01_dwi.nii.gz"
    series = nib.load(path)
    data = np.asarray(series.dataobj).copy()
    data[..., 0] = 0
    nib.save(nib.Nifti1Image(data, None, series.header), path)
    assert qsphere(bids, tmp_path / "out", "participant", "--preprocess", "denoise") == 1
    assert "volume 0 (counted from 0), the first b0, holds no signal" in capsys.readouterr().err


def test_a_qform_that_contradicts_the_sform_is_told(tmp_path):
    bids, out = truth.write_dataset(tmp_path / "bids", ("01",)), tmp_path / "out"
    path = bids / "sub-01/dwi/sub-01_dwi.nii.gz"
    series = nib.load(path)
    series.header.set_qform(truth.affine(turn=(0, 0, 5)), 1)
    nib.save(nib.Nifti1Image(np.asarray(series.dataobj), None, series.header), path)
    assert qsphere(bids, out, "participant", "--preprocess", "gibbs", "--estimate", "dti") == 0
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    assert any("its qform and its sform differ by 5.0°" in w for w in facts["warnings"])


def test_a_partial_fourier_that_is_no_number_leaves_the_phase_encoding(tmp_path):
    bids = truth.write_dataset(tmp_path / "bids", ("01",), sidecar={
        **truth.SIDECAR, "PartialFourier": "6/8"})
    out = tmp_path / "out"
    assert qsphere(bids, out, "participant", "--preprocess", "gibbs", "--estimate", "dti") == 0
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    assert [c["text"] for c in facts["corrections"]] == ["Gibbs ringing removed along i"]
    assert any("PartialFourier is '6/8'" in warning for warning in facts["warnings"])
    assert any("PartialFourier cannot be read" in notice for notice in facts["notices"])
    sidecar = json.loads((out / "sub-01/dwi/sub-01_desc-preproc_dwi.json").read_text())
    assert "PartialFourier" not in sidecar
    methods = (out / "logs/CITATION.md").read_text()
    assert "along the axis that is not phase-encoded" in methods and "only if" not in methods


@pytest.mark.parametrize("limit", ["MAX_MOVE", "MAX_TURN"])
def test_an_incredible_motion_is_not_applied(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"bidsapp.recipe.preprocess.{limit}", -1.0)
    bids, out = truth.write_dataset(tmp_path / "bids", ("01",)), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--preprocess", "motion", "--estimate", "dti") == 0
    facts = json.loads((out / "sub-01/log/sub-01_desc-preprocessed_step.json").read_text())
    assert facts["corrections"] == []
    assert any("is credible" in warning for warning in facts["warnings"])
    np.testing.assert_array_equal(image(out / "sub-01/dwi/sub-01_desc-preproc_dwi.nii.gz"),
                                  image(bids / "sub-01/dwi/sub-01_dwi.nii.gz"))


@pytest.mark.slow
def test_corrections_may_be_left_out_and_added_again(bids_tree, tmp_path):
    """The brain mask belongs to another step each time; what stays is of the last command."""
    bids, out = bids_tree(("01",)), tmp_path / "out"
    corrected = out / "sub-01/dwi/sub-01_desc-preproc_dwi.nii.gz"
    for steps, there in (("none", False), ("gibbs", True), ("none", False), ("gibbs", True)):
        assert qsphere(bids, out, "participant", "--preprocess", steps, "--estimate", "dti") == 0
        assert corrected.exists() == there
        assert (out / "sub-01/dwi/sub-01_desc-brain_mask.nii.gz").exists()
