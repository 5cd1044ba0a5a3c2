"""Tissue from a T1w image: where it is found, brought to the diffusion images, and what of it is
believed; whole synthetic images."""

import json
import shutil
import tempfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from bidsapp import methods
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import t1w, tissue
from bidsapp.bids import btable, find
from bidsapp.cli import parse
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, UsageError
from bidsapp.registration import rigid
from bidsapp.simulate import mixture, unmix
from support import bids_tree
from support import synthetic_head as head
from support.app import qsphere, validate

INTENSITY = np.array([20.0, 600.0, 250.0, 1000.0, 1000.0])  # air, grey, CSF, callosum, white
TURN, SHIFT = np.array([6.0, -4.0, 5.0]), np.array([5.0, -7.0, 4.0])  # degrees about axes, mm
SHAPE, ZOOMS = (66, 82, 60), (2.3, 2.1, 2.2)


def pose():
    """World of the diffusion images → world of the T1w image."""
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec(TURN, degrees=True).as_matrix()
    centre = head.affine() @ [*(np.array(head.SHAPE) - 1) / 2, 1]
    out[:3, 3] = centre[:3] + SHIFT - out[:3, :3] @ centre[:3]
    return out


def write_t1w(path, rng, bias=0.4, slices=slice(None)):
    """The head as a T1w image: moved, with a bias field and noise."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(ZOOMS)
    affine[:3, 3] = (pose() @ head.affine() @ [*(np.array(head.SHAPE) - 1) / 2, 1])[:3] \
        - np.array(ZOOMS) * (np.array(SHAPE) - 1) / 2 + (3, -2, 4)
    index = np.indices(SHAPE).reshape(3, -1)
    to = np.linalg.inv(pose() @ head.affine()) @ affine
    at = np.rint(to[:3, :3] @ index + to[:3, 3:]).astype(int)
    inside = np.all((at >= 0) & (at < np.array(head.SHAPE)[:, None]), axis=0)
    label = np.zeros(len(inside), int)
    label[inside] = head.tissues()[tuple(at[:, inside])]
    u = np.indices(SHAPE) / np.reshape(SHAPE, (3, 1, 1, 1)) - 0.5
    image = INTENSITY[label].reshape(SHAPE) * np.exp(bias * (u[0] + 2 * u[1] ** 2 - u[2]))
    image = np.hypot(image + 25 * rng.standard_normal(SHAPE), 25 * rng.standard_normal(SHAPE))
    affine[:3, 3] += affine[:3, 2] * (slices.start or 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image[:, :, slices].astype(np.float32), affine), path)
    return path


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """(Dwi with tissue, labels (voxel,), T1w path)."""
    path = write_t1w(tmp_path_factory.mktemp("t1w") / "sub-01_T1w.nii.gz",
                     np.random.default_rng(5))
    dwi, labels, _ = head.participant()
    return replace(dwi, tissue=t1w.posteriors(dwi, path)), labels, path


@pytest.mark.slow
def test_the_move_is_found(scanned):
    dwi, _, path = scanned
    found = rigid.align(dwi, *t1w.read(path))
    turn = Rotation.from_matrix(found[:3, :3] @ pose()[:3, :3].T).magnitude()
    assert np.degrees(turn) < 1
    points = np.c_[np.argwhere(dwi.mask), np.ones(len(dwi.signal))] @ dwi.affine.T
    error = np.linalg.norm((points @ (found - pose()).T)[:, :3], axis=1)
    assert error.max() < 1.5 and error.mean() < 0.8


@pytest.mark.slow
def test_tissues_are_where_they_are(scanned):
    dwi, labels, _ = scanned
    assert dwi.tissue.min() >= 0 and dwi.tissue.sum(axis=1).max() <= 1 + 1e-6
    for column, label in enumerate((1, 4, 2)):  # dark rim voxels, mixed with air, pass for CSF
        inner = binary_erosion(dwi.unmask(labels == label))[dwi.mask]
        assert np.mean(dwi.tissue[inner].argmax(axis=1) == column) > 0.95, label
    found = tissue.find_regions(dwi, "cpu")
    assert found.source == "T1w" and not found.notices
    for name, label in (("gm", 1), ("csf", 2)):
        chosen = getattr(found, name)
        assert np.all(labels[chosen] == label)
        assert chosen.sum() > 0.15 * (labels == label).sum()


@pytest.mark.slow
def test_same_bytes_again_and_nothing_left(scanned, tmp_path):
    dwi, _, path = scanned
    work, before = tmp_path / "work", tempfile.gettempdir()
    work.mkdir()
    again = t1w.posteriors(replace(dwi, tissue=None), path, work_dir=work)
    np.testing.assert_array_equal(again, dwi.tissue)
    assert list(work.iterdir()) == [] and tempfile.gettempdir() == before


@pytest.mark.slow
def test_given_probabilities_take_the_place_of_atropos(scanned, tmp_path):
    dwi, _, path = scanned
    image = nib.load(path)
    third = np.arange(3) * 0.2 + 0.1
    maps = []
    for label, value in zip(t1w.TISSUES, third, strict=True):
        maps.append(tmp_path / f"sub-01_label-{label}_probseg.nii.gz")
        values = np.full(image.shape, value, np.float32)
        values[0, 0, 0] = 0
        nib.save(nib.Nifti1Image(values, image.affine), maps[-1])
    found = t1w.posteriors(dwi, path, maps)
    np.testing.assert_allclose(np.median(found, axis=0), third, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["truncated", "damaged", "flat", "part", "link", "series"])
def test_what_cannot_be_used_is_said(scanned, tmp_path, what):
    dwi, _, path = scanned
    bad = tmp_path / "sub-01_T1w.nii.gz"
    if what == "truncated":
        bad.write_bytes(path.read_bytes()[:20_000])
    elif what == "damaged":
        bad.write_bytes(path.read_bytes() + b"x")
    elif what == "flat":
        nib.save(nib.Nifti1Image(np.ones((7, 8, 9), np.float32), np.eye(4)), bad)
    elif what == "series":
        nib.save(nib.Nifti1Image(np.random.default_rng(0).random((7, 8, 9, 2)), np.eye(4)), bad)
    elif what == "part":
        write_t1w(bad, np.random.default_rng(5), slices=slice(40, 60))
    else:
        bad.symlink_to(tmp_path / "annexed")
    expected = {"truncated": "is damaged or truncated", "damaged": "is damaged",
                "flat": "not a volume with contrast", "series": "not a volume with contrast",
                "part": "covers only", "link": "link to a missing file"}[what]
    with pytest.raises(DataError, match=expected):
        t1w.posteriors(dwi, bad)


@pytest.mark.slow
def test_what_diffusion_contradicts_is_not_believed(scanned):
    dwi, labels, _ = scanned
    wrong = replace(dwi, tissue=np.ascontiguousarray(dwi.tissue[:, [2, 1, 0]]))
    found = tissue.find_regions(wrong, "cpu")
    assert found.source == "DWI" and "T1w image" in found.notices[0]
    alone = tissue.find_regions(replace(dwi, tissue=None), "cpu")
    np.testing.assert_array_equal(found.gm, alone.gm)
    assert np.all(labels[found.csf] == 2)


@pytest.mark.parametrize("values", [np.zeros((3, 3), np.float32), "sum", "double"])
def test_a_dwi_refuses_what_are_no_probabilities(values):
    dwi, _, _ = head.participant()
    if isinstance(values, str):
        size = (len(dwi.signal), 3)
        values = np.full(size, 0.5, np.float32) if values == "sum" else np.zeros(size)
    with pytest.raises(ValueError, match="tissue must be"):
        replace(dwi, tissue=values)


def runs(root, *more):
    found = find.find_runs(parse([str(root), str(root.parent / "out"), "participant", *more]))
    return {run.name: run for label in found.participants for run in found.runs[label]}


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_the_t1w_of_the_session_else_of_the_participant(bids_tree):
    root = bids_tree(("01", "02"), sessions=("a", "b"))
    touch(root, *(f"sub-01/ses-b/anat/sub-01_ses-b_{name}T1w.nii.gz" for name in
                  ("run-2_", "run-10_", "ce-gad_", "part-phase_")),
          "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz")
    found = {name: run.t1w and run.t1w.name for name, run in runs(root).items()}
    assert found == {"sub-01_ses-a": "sub-01_ses-b_run-2_T1w.nii.gz",
                     "sub-01_ses-b": "sub-01_ses-b_run-2_T1w.nii.gz",
                     "sub-02_ses-a": None, "sub-02_ses-b": None}
    touch(root, "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz")
    assert runs(root)["sub-01_ses-a"].t1w.name == "sub-01_ses-a_T1w.nii.gz"


def test_preprocessed_t1w_with_its_tissues(bids_tree, tmp_path):
    root, other = bids_tree(("01",)), tmp_path / "fmriprep"
    touch(root, "sub-01/anat/sub-01_T1w.nii.gz")
    stem = "sub-01/anat/sub-01_"
    touch(other, f"{stem}desc-preproc_T1w.nii.gz",
          f"{stem}space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz",
          *(f"{stem}{space}label-{t}_probseg.nii.gz" for t in ("CSF", "GM", "WM")
            for space in ("", "space-MNI152NLin6Asym_")))
    bids_tree_run = other / "sub-01/dwi/sub-01_desc-preproc"
    bids_tree_run.parent.mkdir()
    for source in (root / "sub-01/dwi").iterdir():
        shutil.copy(source, f"{bids_tree_run}_dwi{''.join(source.suffixes)}")
    run = runs(root, "-d", f"fmriprep={other}")["sub-01"]
    assert run.t1w == other / f"{stem}desc-preproc_T1w.nii.gz"
    assert [p.name for p in run.probsegs] == [f"sub-01_label-{t}_probseg.nii.gz"
                                              for t in t1w.TISSUES]
    (other / f"{stem}label-GM_probseg.nii.gz").unlink()
    assert runs(root, "-d", f"fmriprep={other}")["sub-01"].probsegs == ()


def test_unmixing_finds_what_was_mixed(rng):
    """Two fibres 60–90° apart with CSF, without noise: directions within 10°, fractions within
    0.12."""
    dwi, labels, _ = head.participant(scheme=((0, 4), (1000, 30), (2000, 60)))
    measured = mixture.measure(dwi, labels == 1, labels == 2, labels == 3, "cpu")
    n = rng.standard_normal((200, 3, 3))
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    apart = np.degrees(np.arccos(np.abs((n[:, 0] * n[:, 1]).sum(1))))
    n = n[apart > 60]
    fractions = np.tile([0.5, 0.35, 0, 0, 0.15], (len(n), 1))
    made = mixture.simulate_given("syn", measured, dwi.acquisition, fractions, n, 0, "cpu")
    mask = np.ones((len(n), 1, 1), bool)
    clean = Dwi((1000 * made.attenuation).astype(np.float32), mask, np.eye(4), dwi.acquisition)
    found, axes = unmix.unmix(clean, measured, "cpu")
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    for k in (0, 1):
        error = np.degrees(np.arccos(np.abs((axes[:, k] * n[:, k]).sum(1)).clip(0, 1)))
        assert np.median(error) < 4 and np.quantile(error, 0.95) < 10
    assert np.abs(found - fractions).mean(axis=0).max() < 0.12
    known = replace(clean, tissue=np.tile(np.float32([0.2, 0.3, 0.4]), (len(n), 1)))
    parts, _ = unmix.unmix(known, measured, "cpu")
    assert np.all(parts[:, 3] >= 0.2 - 1e-6) and np.all(parts[:, 4] >= 0.4 - 1e-6)
    assert np.all(parts[:, :3].sum(axis=1) >= 0.3 - 1e-6)


@pytest.mark.parametrize("option", [("--synthesize-image",), ("--synthesize-voxels", "9")])
def test_flags_belong_to_synthesis(tmp_path, option):
    with pytest.raises(UsageError, match="belongs to --synthesize"):
        parse([str(tmp_path / "in"), str(tmp_path / "out"), "participant", *option])


def page_and_status(out):
    return (out / "sub-01.html").read_text()


@pytest.mark.slow
def test_no_t1w_is_said(tmp_path, capsys):
    bids, out = head.write_dataset(tmp_path / "bids"), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti", "--sloppy", "--synthesize", "syn",
            "--synthesize-voxels", "20")
    assert qsphere(*argv, "--dry-run") == 0
    assert "tissue from the DWI alone, no T1w" in capsys.readouterr().out
    assert qsphere(*argv) == 0
    assert "No T1w image was found" in page_and_status(out)
    link = bids / "sub-01/anat/sub-01_T1w.nii.gz"
    link.parent.mkdir()
    link.symlink_to("nowhere")
    assert qsphere(*argv) == 0
    assert "The T1w image is not used" in page_and_status(out)
    assert qsphere(bids, tmp_path / "dti", "participant", "--estimate", "dti") == 0
    assert "T1w" not in "".join(json.loads(
        (tmp_path / "dti/sub-01/log/sub-01_dwi.json").read_text())["notices"])


@pytest.mark.slow
def test_whole_image_end_to_end(tmp_path):
    """Anatomy from a T1w image; the maps of the truth alone make the image, up to its noise."""
    bids, out = head.write_dataset(tmp_path / "bids"), tmp_path / "out"
    write_t1w(bids / "sub-01/anat/sub-01_T1w.nii.gz", np.random.default_rng(5))
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--sloppy", "--synthesize",
                   "sample", "random-wm", "--synthesize-voxels", "50", "--synthesize-image") == 0
    assert validate(out) == []
    assert "Tissue was segmented in sub-01_T1w.nii.gz" in page_and_status(out)
    stem = out / "sub-01/dwi/sub-01"
    assert nib.load(f"{stem}_desc-synthsample_dwi.nii.gz").shape[0] == 50
    mask = np.asarray(nib.load(f"{stem}_desc-brain_mask.nii.gz").dataobj) > 0
    b0 = np.asarray(nib.load(bids / "sub-01/dwi/sub-01_dwi.nii.gz").dataobj)[mask][:, :4].mean(1)
    bvals, axes = bids_tree.table(head.SCHEME)
    for mode in ("sample", "randomwm"):
        image = nib.load(f"{stem}_desc-synth{mode}image_dwi.nii.gz")
        assert image.shape == (*head.SHAPE, 54)
        about = json.loads((stem.parent / f"sub-01_desc-synth{mode}image_dwi.json").read_text())
        assert about["SynthesizedVolumes"] == list(range(54))
        assert about["Model"]["Parameters"]["TissueSource"] == "T1w"
        assert any(uri.endswith("anat/sub-01_T1w.nii.gz") for uri in about["Sources"])
        np.testing.assert_allclose(
            np.loadtxt(f"{stem}_desc-synth{mode}image_dwi.bvec"),
            np.loadtxt(bids / "sub-01/dwi/sub-01_dwi.bvec"), atol=1e-7)
        truth = {}
        for uri in about["Truth"]:
            path = out / uri.removeprefix("bids::")
            names = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
            values = np.asarray(nib.load(path).dataobj)[mask].astype(float)
            kind = path.name.split("param-")[1].split("_")[0]
            truth[kind] = dict(zip(names["Volumes"], values.T, strict=True))
        clean = np.zeros((len(b0), 54))
        for i, (b, g) in enumerate(zip(bvals, axes, strict=True)):
            shell = f"b{b if b else 1000:.0f}"
            for name in ("wm1", "wm2", "wm3", "gm", "csf"):
                d = truth["diffusivity"]
                if name in ("gm", "csf"):
                    d = d[f"{name}_{shell}"]
                elif mode == "randomwm":
                    d = d[f"wm_volume{i}"]
                else:
                    along = sum(truth["direction"][f"{name}_{x}"] * g[k]
                                for k, x in enumerate("xyz")) ** 2
                    d = (d[f"{name}_radial_{shell}"] * (1 - along)
                         + d[f"{name}_axial_{shell}"] * along)
                clean[:, i] += truth["fraction"][name] * np.exp(-b * d)
        signal = np.asarray(image.dataobj)[mask].astype(float)
        z = head.standardize(signal, b0[:, None] * clean,
                         about["Model"]["Parameters"]["NoiseSD"])
        assert abs(z.mean()) < 5 / np.sqrt(z.size) and z.std() == pytest.approx(1, abs=0.02)
    labels = head.tissues()[mask]
    dwi = Dwi(np.asarray(nib.load(f"{stem}_desc-synthsampleimage_dwi.nii.gz").dataobj,
                         dtype=np.float32)[mask], mask, head.affine(), Acquisition(bvals, axes))
    fa = methods.get("estimate_dti").apply(dwi, "cpu").maps["fa"]
    inner = {k: binary_erosion(head.tissues() == k)[mask] for k in (1, 2, 3, 4)}
    assert all(np.median(fa[inner[white]]) > 3 * np.median(fa[inner[grey]])
               for white in (3, 4) for grey in (1, 2)), labels.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siemens_xa30", "uih_dti16"])
def test_real_t1w(test_data, name):
    """CSF by the T1w image diffuses 1.5 times as fast as its grey matter or faster, white matter
    is more anisotropic than grey: true of no image that lies wrong."""
    from bidsapp import tensor
    from bidsapp.anatomy.mask import median_otsu
    from bidsapp.blocks import map_voxels
    from bidsapp.series import Series

    run = next(iter(runs(test_data(name)).values()))
    acquisition = btable.load_acquisition(run)
    series = Series.from_run(run, acquisition)
    dwi = series.within(median_otsu(series.mean(acquisition.b0)))
    p = t1w.posteriors(dwi, run.t1w)
    chosen = tensor.volumes(acquisition)
    x = tensor.design(acquisition[chosen].btensors)
    maps = map_voxels(lambda signal: tensor.fit(signal[:, chosen], x), dwi.signal, "cpu")
    fa, md = maps["fa"], maps["md"]
    sure = [p[:, k] > 0.9 for k in range(3)]
    assert np.median(md[sure[2]]) > 1.5 * np.median(md[sure[0]])
    assert np.median(fa[sure[1]]) > 2 * np.median(fa[sure[0]])
    assert 0.25 < p[:, 0].mean() < 0.5 and 0.25 < p[:, 1].mean() < 0.5
    assert tissue.find_regions(replace(dwi, tissue=p), "cpu").source == "T1w"
