"""Output spaces: maps in the space of a T1w image and of a template, against a head whose shape,
pose and fibres are known everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.transform import Rotation

from bidsapp import cli, sh, spaces
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import t1w
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from bidsapp.dwi import Dwi
from bidsapp.errors import UsageError
from bidsapp.recipe.plan import choose, plan
from bidsapp.recipe.spaces import Register
from bidsapp.recipe.steps import RunContext
from bidsapp.registration import deformable, resample
from bidsapp.registration.geometry import world_points
from bidsapp.stage import Stage
from support.app import qsphere

GREY, WHITE, CSF = 1, 2, 3
INTENSITY = np.array([20.0, 600.0, 1000.0, 250.0])  # T1w: air, grey, white, CSF
DIFFUSIVITY = np.array([0.0, 0.8e-3, 0.0, 2.6e-3])
AXIAL, RADIAL = 1.7e-3, 0.3e-3
FIBRE = np.array([0.8, 0.6, 0.0])
TURN, SHIFT = (9.0, -6.0, 12.0), np.array([4.0, -6.0, 5.0])  # head → T1w, degrees and mm
SCALE = np.array([1.06, 0.95, 1.04])  # head → template, with the bend below
TILT = (-7.0, 5.0, -10.0)
FIELD = (150.0, 190.0, 140.0)  # mm


def tissue(points):
    """Tissue at world points of the head: lopsided, so that no other pose looks the same."""
    x, y, z = np.moveaxis(points, -1, 0)
    out = np.where((x / 58) ** 2 + (y / 76) ** 2 + (z / 52) ** 2 < 1, GREY, 0)
    out[(x / 45) ** 2 + ((y + 4) / 60) ** 2 + (z / 38) ** 2 < 1] = WHITE
    out[((x - 38) / 14) ** 2 + ((y - 30) / 22) ** 2 + ((z - 10) / 14) ** 2 < 1] = GREY
    out[((x + 10) / 9) ** 2 + ((y - 8) / 26) ** 2 + ((z + 6) / 12) ** 2 < 1] = CSF
    out[((x - 14) / 7) ** 2 + ((y + 10) / 20) ** 2 + ((z + 2) / 10) ** 2 < 1] = CSF
    return out


def pose():
    """World of the head → world of the T1w image."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = Rotation.from_rotvec(TURN, degrees=True).as_matrix(), SHIFT
    return out


def from_template(points):
    """World of the template → world of the head: turned, scaled, and bent by up to 4 mm."""
    turned = points @ Rotation.from_rotvec(TILT, degrees=True).as_matrix().T / SCALE
    return turned + 4 * np.sin(points[..., [1, 2, 0]] / 40)


def grid(size, field=FIELD):
    """Shape and affine about the origin; x runs to the left."""
    shape = tuple(int(np.ceil(f / s)) for f, s in zip(field, size, strict=True))
    affine = np.diag([-size[0], size[1], size[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return shape, affine


def save(path, data, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    nib.save(image, path)


def write_head(root, labels=("01",), t1w=True):
    """A dataset of this head: b 0, 1000 and 2000, and a T1w image in another pose."""
    rng = np.random.default_rng(1)
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "Head", "BIDSVersion": "1.10.0"}')
    (root / "README").write_text("A head with known tissue and fibres; made for tests of QSphere.")
    shape, affine = grid((4.0, 4.0, 4.5))
    label = tissue(world_points(shape, affine))
    i = np.arange(12)
    z = 1 - (i + 0.5) / 12
    r = np.sqrt(1 - z**2)
    axes = np.column_stack([r * np.cos(2.4 * i), r * np.sin(2.4 * i), z])
    g = np.concatenate([np.zeros((3, 3)), axes, axes[:, [1, 2, 0]]])
    b = np.repeat([0.0, 1000.0, 2000.0], [3, 12, 12])
    along = RADIAL + (AXIAL - RADIAL) * (g @ FIBRE) ** 2
    d = np.where(label[..., None] == WHITE, along, DIFFUSIVITY[label][..., None])
    signal = 1000 * (label > 0)[..., None] * np.exp(-b * d)
    noisy = np.hypot(signal + 10 * rng.standard_normal(signal.shape),
                     10 * rng.standard_normal(signal.shape)).astype(np.float32)
    for name in labels:
        stem = root / f"sub-{name}/dwi/sub-{name}_dwi"
        save(Path(f"{stem}.nii.gz"), noisy, affine)
        np.savetxt(f"{stem}.bval", b[None], fmt="%g")
        # components along the image axes; the affine has a negative determinant
        np.savetxt(f"{stem}.bvec", (g * [-1, 1, 1]).T, fmt="%.9f")
        Path(f"{stem}.json").write_text(json.dumps({"EchoTime": 0.08,
                                                    "PhaseEncodingDirection": "j"}))
        if t1w:
            shape, affine = grid((2.5, 2.4, 2.6), np.add(FIELD, 30))
            points = world_points(shape, affine) @ np.linalg.inv(pose())[:3, :3].T \
                + np.linalg.inv(pose())[:3, 3]
            image = INTENSITY[tissue(points)] + 25 * rng.standard_normal(shape)
            save(root / f"sub-{name}/anat/sub-{name}_T1w.nii.gz",
                 np.abs(image).astype(np.float32), affine)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A TEMPLATEFLOW_HOME with one template and the stub of another, for the whole process:
    niworkflows reads its names when it is imported."""
    folder = tmp_path_factory.mktemp("templateflow")
    shape, affine = grid((3.0, 3.0, 3.0), np.add(FIELD, 20))
    label = tissue(from_template(world_points(shape, affine)))
    stem = folder / "tpl-Bent/tpl-Bent_res-02"
    save(Path(f"{stem}_T1w.nii.gz"), INTENSITY[label].astype(np.float32), affine)
    save(Path(f"{stem}_desc-brain_mask.nii.gz"), (label > 0).astype(np.uint8), affine)
    for name in ("T1w", "desc-brain_mask"):
        path = folder / f"tpl-Stub/tpl-Stub_res-01_{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def work(home, tmp_path_factory):
    """(bids, out, what was logged by each of three commands): maps, then T1w, then all."""
    folder = tmp_path_factory.mktemp("spaces")
    bids, out, logs = write_head(folder / "bids"), folder / "out", []
    for more in ((), ("--output-spaces", "T1w"),
                 ("smt", "scnn2", "--output-spaces", "T1w", "acpc", "Bent:res-2")):
        before = {p: p.stat().st_mtime_ns for p in out.glob("sub-01/dwi/*_dwimap.nii.gz")}
        assert qsphere(bids, out, "participant", "--estimate", "dti", *more) == 0
        logs.append([p.name for p in out.glob("sub-01/dwi/*_dwimap.nii.gz")
                     if p.stat().st_mtime_ns != before.get(p)])
    return bids, out, logs


def read(out, name):
    return nib.load(out / f"sub-01/dwi/sub-01_{name}.nii.gz")


def check_maps(out, entities, to_head, turn, similar, degrees):
    """Tissues lie where they do in the head, diffusivities are theirs, and fibres are turned."""
    fa = read(out, f"{entities}_model-tensor_param-fa_dwimap")
    inside = np.asarray(read(out, f"{entities}_desc-brain_mask").dataobj) > 0
    label = tissue(to_head(world_points(fa.shape, fa.affine)))
    values = np.asarray(fa.dataobj)
    white = (values > 0.4) & inside
    overlap = 2 * (white & (label == WHITE)).sum() / (white.sum() + (label == WHITE).sum())
    assert overlap > similar
    brain = 2 * (inside & (label > 0)).sum() / (inside.sum() + (label > 0).sum())
    assert brain > similar
    assert np.all(values[~inside] == 0)
    deep = binary_erosion(label == WHITE, iterations=2) & inside
    assert deep.sum() > 500
    md = np.asarray(read(out, f"{entities}_model-tensor_param-md_dwimap").dataobj)
    assert np.median(md[deep]) == pytest.approx((AXIAL + 2 * RADIAL) / 3, rel=0.05)
    n = np.asarray(read(out, f"{entities}_model-tensor_param-direction_dwimap").dataobj)[deep]
    np.testing.assert_allclose(np.linalg.norm(n, axis=1), 1, atol=1e-4)
    angle = np.degrees(np.arccos(np.abs(n @ turn).clip(0, 1)))
    assert np.median(angle) < degrees
    unturned = np.degrees(np.arccos(np.abs(turn @ FIBRE)))
    assert unturned > 2.5 * degrees  # else this would show nothing


@pytest.mark.slow
def test_maps_in_the_space_of_the_t1w_image(work):
    back = np.linalg.inv(pose())
    check_maps(work[1], "space-T1w", lambda p: p @ back[:3, :3].T + back[:3, 3],
               pose()[:3, :3] @ FIBRE, 0.93, 3)


@pytest.mark.slow
def test_maps_in_the_space_of_a_template(work):
    """The truth of the fibres' turn is the rotation alone: the bend adds a few degrees to it."""
    turn = Rotation.from_rotvec(TILT, degrees=True).as_matrix().T @ FIBRE
    check_maps(work[1], "space-Bent_res-2", from_template, turn, 0.9, 5)
    there = nib.load(next(spaces.home().glob("tpl-Bent/*_T1w.nii.gz")))
    fa = read(work[1], "space-Bent_res-2_model-tensor_param-fa_dwimap")
    assert fa.shape == there.shape
    np.testing.assert_allclose(fa.affine, there.affine, atol=1e-5)


@pytest.mark.slow
def test_the_transform_is_the_truth_and_itk_reads_it(work):
    ants = pytest.importorskip("ants")
    path = work[1] / "sub-01/dwi/sub-01_from-dwi_to-T1w_mode-image_xfm.txt"
    found = ants.read_transform(str(path))
    flip = np.array([-1.0, -1.0, 1.0])
    corners = np.array([[40, 0, 0], [-40, 50, 10], [0, -60, 30], [10, 20, -35.0]])
    there = corners @ pose()[:3, :3].T + pose()[:3, 3]
    seen = np.array([found.apply_to_point(list(flip * p)) for p in there]) * flip
    assert np.linalg.norm(seen - corners, axis=1).max() < 1.5


@pytest.mark.slow
def test_acpc_is_the_space_of_the_t1w_image_moved(work):
    """One rigid transform on top of another; the head is where the two files say."""
    xfm = {name: matrix(work[1] / f"sub-01/dwi/sub-01_from-{name}_mode-image_xfm.txt")
           for name in ("dwi_to-T1w", "T1w_to-ACPC", "dwi_to-ACPC")}
    turn = xfm["T1w_to-ACPC"][:3, :3]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)
    both = xfm["dwi_to-T1w"] @ xfm["T1w_to-ACPC"]
    np.testing.assert_allclose(both, xfm["dwi_to-ACPC"], atol=2e-3)
    fa = read(work[1], "space-ACPC_model-tensor_param-fa_dwimap")
    values = np.asarray(fa.dataobj)
    points = world_points(fa.shape, fa.affine) @ both[:3, :3].T + both[:3, 3]
    white = tissue(points) == WHITE
    assert 2 * ((values > 0.4) & white).sum() / ((values > 0.4).sum() + white.sum()) > 0.93
    np.testing.assert_allclose(fa.affine[:3, :3], 4 * np.eye(3))
    about = json.loads((work[1] / "sub-01/dwi/sub-01_space-ACPC_model-tensor_param-fa_dwimap.json")
                       .read_text())
    assert about["Resolution"] == "4 mm isotropic"
    assert "MNI152" in (work[1] / "logs/CITATION.md").read_text()


def matrix(path):
    """Matrix of an ITK file, by ITK: world RAS+ to world RAS+."""
    ants = pytest.importorskip("ants")
    move, flip = ants.read_transform(str(path)), np.array([-1.0, -1.0, 1.0])
    columns = [np.array(move.apply_to_point(list(flip * p))) * flip
               for p in np.vstack([np.eye(3), np.zeros(3)])]
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = np.column_stack(columns[:3]) - columns[3][:, None], columns[3]
    return out


def test_itk_reads_a_rigid_transform_as_it_was(tmp_path):
    """To a few micrometres, at the edge of a head."""
    move = pose()
    move[:3, 3] = 123.456789, -98.7654321, 12.3456789
    path = tmp_path / "xfm.txt"
    path.write_bytes(resample.pack_rigid(move))
    corner = np.array([90.0, -110, 80, 1])
    np.testing.assert_allclose(matrix(path) @ corner, move @ corner, atol=2e-3)
    shape, affine = grid((40.0, 50.0, 60.0))
    points = world_points(shape, affine)
    np.testing.assert_allclose(resample.read_points(path, shape, affine),
                               points @ move[:3, :3].T + move[:3, 3], atol=2e-3)


def test_acpc_is_a_space_in_any_case(home):
    found = [space.name for space in spaces.parse(("T1w", "dwi", "acpc", "ACPC:", "Bent:res-2"))]
    assert sorted(found) == ["ACPC", "Bent", "T1w"]
    assert [str(space) for space in spaces.parse(("dwi", "acpc"))] == ["ACPC"]


def test_ants_does_the_same_with_the_field(rng, tmp_path):
    """A bent transform, read by ITK: the same image as ours."""
    ants = pytest.importorskip("ants")
    shape, affine = grid((5.0, 4.0, 6.0), (90, 80, 90))
    values = gaussian_filter(rng.standard_normal(shape), 1.5).astype(np.float32)
    new_shape, new = grid((3.0, 5.0, 4.0), (40, 40, 40))
    points = from_template(world_points(new_shape, new))
    save(tmp_path / "old.nii.gz", values, affine)
    save(tmp_path / "new.nii.gz", np.zeros(new_shape, np.float32), new)
    (tmp_path / "xfm.nii.gz").write_bytes(resample.pack_field(points, new))
    theirs = ants.apply_transforms(
        *(ants.image_read(str(tmp_path / f"{name}.nii.gz")) for name in ("new", "old")),
        [str(tmp_path / "xfm.nii.gz")]).numpy()
    read_back = resample.read_points(tmp_path / "xfm.nii.gz", new_shape, new)
    np.testing.assert_allclose(read_back, points, atol=1e-5)
    ours = resample.scalars(values.reshape(-1, 1), np.ones(shape, bool), affine,
                            read_back.reshape(-1, 3))
    np.testing.assert_allclose(ours[:, 0].reshape(new_shape), theirs, atol=1e-5)
    assert np.ptp(theirs) > 0.1


@pytest.mark.slow
def test_a_space_and_an_estimate_that_are_added_are_done_alone(work):
    first, second, third = work[2]
    assert first and second and all("space-T1w" in name for name in second)
    assert {n.replace("space-T1w_", "") for n in second} == set(first)
    added = ("model-smt", "model-scnn2", "space-Bent", "space-ACPC")
    assert all(any(part in name for part in added) for name in third)
    assert any("space-T1w_model-smt" in n for n in third)


@pytest.mark.slow
def test_what_was_resampled_goes_with_its_map(work, tmp_path):
    """Another setting of an estimator, without the space: the resampled maps would be wrong."""
    bids, out, _ = work
    subprocess.run(["cp", "-r", out, tmp_path / "out"], check=True)
    assert qsphere(bids, tmp_path / "out", "participant", "--estimate", "dti", "--set",
                   "estimate_dti.fit.b_max=2500") == 0
    left = [p.name for p in (tmp_path / "out").glob("sub-01/dwi/*space-*_dwimap.nii.gz")]
    assert left and not any("model-tensor" in name for name in left)


@pytest.mark.slow
def test_sidecars_texts_and_page(work):
    out = work[1]
    about = json.loads((out / "sub-01/dwi/sub-01_space-Bent_res-2_model-tensor_param-fa_dwimap"
                              ".json").read_text())
    assert about["SpatialReference"] == "bids:templateflow:tpl-Bent/tpl-Bent_res-02_T1w.nii.gz"
    assert about["Sources"] == [
        "bids::sub-01/dwi/sub-01_model-tensor_param-fa_dwimap.nii.gz", about["Transform"]]
    assert about["Interpolation"] == "linear" and "PhaseEncodingDirection" not in about
    assert about["Resolution"] == "res-2 of Bent"
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert links["templateflow"] == spaces.home().as_uri()
    text = (out / "logs/CITATION.md").read_text()
    assert "TemplateFlow" in text and "interpolated once" in text and "Ciric" in text
    page = (out / "sub-01.html").read_text()
    assert (out / "sub-01/dwi/sub-01_from-dwi_to-Bent_mode-image_res-2_xfm.nii.gz").is_file()
    assert "FA in the space T1w" in page and "sub-01_space-Bent_res-2_…_dwimap.nii.gz" in page


@pytest.mark.slow
def test_the_validator_has_nothing_to_say(work):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([validator, str(work[1]), "-r", "--format", "json"],
                          capture_output=True, text=True, check=False)
    assert [i for i in json.loads(done.stdout)["issues"]["issues"]
            if i.get("severity", "error") in ("error", "warning")] == []


@pytest.mark.slow
def test_without_a_t1w_image_the_space_alone_is_refused(home, tmp_path, capsys):
    bids, out = write_head(tmp_path / "bids", t1w=False), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti", "--output-spaces", "T1w")
    assert qsphere(*argv, "--dry-run") == 0
    assert "refused: sub-01 has no T1w image" in capsys.readouterr().out
    assert qsphere(*argv) == 1
    assert read(out, "model-tensor_param-fa_dwimap")
    assert not list(out.glob("sub-01/dwi/*space*"))
    assert "sub-01 has no T1w image" in (out / "sub-01.html").read_text()
    assert qsphere(*argv[:-2]) == 0


@pytest.mark.slow
def test_the_dry_run_tells_the_spaces(work, capsys):
    assert qsphere(*work[:2], "participant", "--estimate", "dti", "--output-spaces", "T1w", "Bent",
                   "--output-resolution", "2.5", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "maps in the space T1w: sub-01_T1w.nii.gz, rigid registration, 2.5 mm" in told
    assert "registered to tpl-Bent_res-02_T1w.nii.gz" in told
    assert "estimate_dti in the space Bent" in told


@pytest.mark.parametrize("name,words", [
    ("T1W", r"no such space.*Did you mean T1w\?"),
    ("Bend", r"Did you mean Bent\?.*templateflow\.api"),
    ("acpc:res-2", r"no such space.*Did you mean ACPC\?"),
    ("T1w:res-2", "Modifiers are not allowed"),
    ("Bent:res-1", r"lists no T1w image.*There is res-2"),
    ("Bent:res-2mm", "--output-resolution MM"),
    ("Bent:size-2", "size is not known"),
    ("Stub", r"tpl-Stub_res-01_T1w\.nii\.gz or its brain mask.*nothing is downloaded.*"
             r"get\('Stub', suffix=\['T1w', 'mask'\].*resolution=1\)"),
])
def test_what_is_no_space_is_refused_at_once(home, tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        cli.parse([str(tmp_path / "in"), str(tmp_path / "out"), "participant", "--output-spaces",
                   name])


@pytest.mark.parametrize("argv", [("--output-resolution", "2"), ("--output-spaces", "dwi",
                                  "--output-resolution", "2"),
                                  ("--output-spaces", "T1w", "--output-resolution", "-1")])
def test_a_resolution_needs_a_space(home, tmp_path, argv):
    with pytest.raises(UsageError, match="--output-resolution"):
        cli.parse([str(tmp_path / "in"), str(tmp_path / "out"), "participant", *argv])


@pytest.mark.slow
def test_an_empty_cache_stays_empty(tmp_path):
    """TemplateFlow would write thousands of empty files there; the names are known all the same."""
    folder = tmp_path / "cache"
    folder.mkdir()
    code = ("from bidsapp import spaces\ntry:\n    spaces.parse(('MNI152NLin2009cAsym',))\n"
            "except spaces.UsageError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True,
                          text=True, check=True,
                          env={"TEMPLATEFLOW_HOME": str(folder), "PATH": "", "PYTHONPATH":
                               str(Path(cli.__file__).parent.parent)})
    assert f"TEMPLATEFLOW_HOME={folder} python -c" in done.stdout
    assert list(folder.iterdir()) == []


def test_a_slab_is_not_stretched_over_a_template(home, tmp_path):
    """The diffusion images show too small a part of the brain."""
    (space,) = spaces.parse(("Bent:res-2",))
    shape, affine = grid((4.0, 4.0, 4.0))
    mask = tissue(world_points(shape, affine)) > 0
    mask[:, :, 12:] = False
    step = Register(RunContext(cli.parse(["in", str(tmp_path), "participant"]),
                               Dataset(tmp_path, {}), None, "cpu", 0), None, space)
    stage = Stage(Dwi(np.ones((mask.sum(), 1), np.float32), mask, affine,
                      Acquisition(np.zeros(1), np.zeros((1, 3)))))
    anatomy = t1w.Anatomy(np.ones(shape, np.float32), affine, np.eye(4))
    with pytest.raises(Exception, match="a part cannot be registered to the whole"):
        step._from_template(stage, anatomy, np.zeros((2, 3)))


def test_values_beside_the_mask_and_missing_ones_do_not_bleed_in():
    mask = np.zeros((6, 4, 4), bool)
    mask[:3] = True
    values = np.full((mask.sum(), 1), 2.0)
    values[np.argwhere(mask)[:, 0] == 0] = np.nan
    points = np.array([[2.4, 1, 1], [1.5, 2, 2], [0.6, 2, 2], [0.4, 2, 2]])
    seen = resample.scalars(values, mask, np.eye(4), points)[:, 0]
    np.testing.assert_array_equal(seen, [2, 2, 2, np.nan])
    labels = (np.argwhere(mask)[:, :1] * 3).astype(np.uint8)
    np.testing.assert_array_equal(
        resample.scalars(labels, mask, np.eye(4), points, 0)[:, 0], [6, 6, 3, 0])


def test_directions_and_densities_turn_alike(rng):
    """A density whose peak is along n turns to where n does, and means of ±n do not cancel."""
    turn = Rotation.from_rotvec([20, -35, 50], degrees=True).as_matrix()
    n = np.array([0.6, 0.0, 0.8])
    mask = np.ones((4, 4, 4), bool)
    sign = rng.choice([-1.0, 1.0], (64, 1))
    points = rng.uniform(0, 3, (20, 3))
    turns = np.tile(turn, (20, 1, 1))
    found = resample.directions(sign * n, mask, np.eye(4), points, turns)
    np.testing.assert_allclose(np.abs(found @ (turn @ n)), 1, atol=1e-12)
    peak = np.tile(sh.basis(6, n[None])[0], (64, 1))
    turned = resample.densities(peak, mask, np.eye(4), points, turns)
    np.testing.assert_allclose(turned, np.tile(sh.basis(6, (turn @ n)[None])[0], (20, 1)),
                               atol=1e-9)


def test_turns_are_those_of_the_head():
    """On a grid that shows the head in a pose, directions rotate as the pose does."""
    shape, affine = grid((3.0, 4.0, 5.0), (30, 30, 30))
    back = np.linalg.inv(pose())
    points = world_points(shape, affine) @ back[:3, :3].T + back[:3, 3]
    inside = np.zeros(shape, bool)
    inside[2, 3, 1:4] = True
    np.testing.assert_allclose(deformable.rotations(points, affine, inside),
                               np.broadcast_to(pose()[:3, :3], (3, 3, 3)), atol=1e-10)


@pytest.mark.parametrize("size,count", [(2.0, (30, 40, 50)), (1.5, (40, 54, 67))])
def test_a_grid_of_another_size_covers_the_same_field(size, count):
    affine = np.array([[-2.0, 0, 0, 10], [0, 0, 2.0, -4], [0, 2.0, 0, 3], [0, 0, 0, 1]])
    shape, new = resample.output_grid((30, 40, 50), affine, size)
    assert shape == count
    np.testing.assert_allclose(np.linalg.norm(new[:3, :3], axis=0), size)
    np.testing.assert_allclose(new @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1])


@pytest.mark.slow
def test_labels_and_densities_in_the_space_of_the_t1w_image(work):
    """A label stays one of the labels; the peak of a density turns with the head."""
    flag = np.asarray(read(work[1], "space-T1w_model-scnn2_param-flag_dwimap").dataobj)
    assert set(np.unique(flag)) <= {0, 1, 2}
    odf = read(work[1], "space-T1w_model-scnn2_param-odf_dwimap")
    back = np.linalg.inv(pose())
    label = tissue(world_points(odf.shape[:3], odf.affine) @ back[:3, :3].T + back[:3, 3])
    deep = binary_erosion(label == WHITE, iterations=3)
    points, _ = sh.half_grid(59)
    peaks = points[(np.asarray(odf.dataobj)[deep] @ sh.basis(8, points).T).argmax(1)]
    angle = np.degrees(np.arccos(np.abs(peaks @ pose()[:3, :3] @ FIBRE).clip(0, 1)))
    unturned = np.degrees(np.arccos(np.abs(pose()[:3, :3] @ FIBRE @ FIBRE)))
    assert np.median(angle) < 4 < unturned - 4


def test_what_steps_depend_on(home, tmp_path):
    """Size of the voxels, T1w image, sidecar, and settings of an estimator: each is in the
    fingerprints of the steps that use it, and in no other."""
    bids = write_head(tmp_path / "bids")

    def fingerprints(*argv):
        options = cli.parse([str(bids), str(tmp_path / "out"), "participant", "--preprocess",
                             "none", "--estimate", "dti", "freewater", "--output-spaces", "T1w",
                             *argv])
        (run,) = find.find_runs(options).runs["01"]
        context = RunContext(options, Dataset(tmp_path / "out", {"raw": bids}), run, "cpu", np.inf)
        return {step.name: step.fingerprint for step in plan(context, choose(options))}

    def changed(before, after):
        return {name for name in before if before[name] != after[name]}

    plain = fingerprints()
    space = {name for name in plain if name.startswith("space")}
    assert space == {"space_T1w", "space_T1w_estimate_dti", "space_T1w_estimate_freewater"}
    assert changed(plain, fingerprints("--output-resolution", "3")) == space
    assert changed(plain, fingerprints("--set", "estimate_dti.fit.b_max=2500")) == {
        "estimate_dti", "space_T1w_estimate_dti"}
    image = bids / "sub-01/anat/sub-01_T1w.nii.gz"
    t1w = nib.load(image)
    nib.save(nib.Nifti1Image(np.asarray(t1w.dataobj)[::-1] + 1, t1w.affine), image)
    assert changed(plain, replaced := fingerprints()) == space | {"estimate_freewater"}
    (bids / "sub-01/dwi/sub-01_dwi.json").write_text('{"EchoTime": 0.1}')
    assert changed(replaced, fingerprints()) == set(plain)


@pytest.mark.slow
def test_corrected_images_are_registered_to_the_t1w_once(home, tmp_path, monkeypatch):
    """The corrected series and the maps of a space lie where one registration puts them."""
    given = []
    align = t1w.align

    def spy(*args):
        given.append(args[-1])
        return align(*args)

    monkeypatch.setattr(t1w, "align", spy)
    bids, out = write_head(tmp_path / "bids"), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--preprocess", "bias", "--estimate", "dti",
                   "--output-spaces", "T1w") == 0
    assert len(given) == 2 and given[0] is None and given[1] is not None
    series, mask, fa = (nib.load(out / f"sub-01/dwi/sub-01_space-T1w_{name}.nii.gz") for name in (
        "desc-preproc_dwi", "desc-brain_mask", "model-tensor_param-fa_dwimap"))
    assert series.shape[:3] == mask.shape == fa.shape
    np.testing.assert_array_equal(series.affine, fa.affine)
