"""b-tables: FSL's convention for any affine, encodings, and what is refused."""

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from dipy.align.imaffine import (
    AffineRegistration,
    MutualInformationMetric,
    transform_centers_of_mass,
)
from dipy.align.transforms import RigidTransform3D
from dipy.core.gradients import gradient_table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat
from scipy.ndimage import binary_erosion, map_coordinates

from bidsapp.acquisition import Acquisition
from bidsapp.anatomy.mask import median_otsu
from bidsapp.bids import btable
from bidsapp.bids.inherit import read_part
from bidsapp.dwi import Run
from bidsapp.errors import DataError
from support import bids_tree as truth

AFFINES = {
    "axial, det < 0": truth.affine(),
    "axial, det > 0": truth.affine(det=1),
    "oblique, det < 0": truth.affine(turn=(20, -15, 10)),
    "oblique, det > 0": truth.affine(turn=(-25, 12, 40), det=1),
    "sagittal, det < 0": truth.affine(order=(1, 2, 0)),
    "sagittal, det > 0": truth.affine(order=(1, 2, 0), det=1),
    "coronal oblique, det > 0": truth.affine(order=(0, 2, 1), turn=(5, 0, 30), det=1),
}


@pytest.fixture
def part(tmp_path):
    """Writes one small file with its tables and reads what belongs to it."""
    def write(**options):
        image = truth.write_run(tmp_path / "sub-01/dwi/sub-01",
                                **{"shape": (7, 8, 9), **options})
        return read_part(image, tmp_path)
    return write


def rewritten(part, extension, text):
    """The part after one of its tables was replaced."""
    path = part.image.with_name(part.image.name.replace(".nii.gz", extension))
    path.write_text(text)
    return read_part(part.image, part.image.parents[2])


def lines(table):
    return "\n".join(" ".join(f"{v:.9g}" for v in np.atleast_1d(row)) for row in table)


def principal(image, acquisition):
    """(x, y, z, 3) principal direction and FA of a log-linear tensor fit."""
    data = np.maximum(np.asarray(image.dataobj, float), 1)
    x, y, z = acquisition.bvecs.T
    b = acquisition.bvals
    design = np.column_stack([-b * x * x, -b * y * y, -b * z * z, -2 * b * x * y,
                              -2 * b * x * z, -2 * b * y * z, np.ones_like(b)])
    d = np.log(data) @ np.linalg.pinv(design).T
    tensor = d[..., [[0, 3, 4], [3, 1, 5], [4, 5, 2]]]
    values, vectors = np.linalg.eigh(tensor)
    spread = values - values.mean(-1, keepdims=True)
    fa = np.sqrt(1.5 * (spread**2).sum(-1) / np.maximum((values**2).sum(-1), 1e-30))
    return vectors[..., -1], np.where(values[..., 0] > 0, fa, 0)


@pytest.mark.parametrize("matrix", AFFINES.values(), ids=AFFINES)
def test_known_direction_in_the_world(part, matrix):
    """The tables are FSL's by definition; the tensor was simulated along a world axis."""
    made = part(matrix=matrix)
    acquisition = btable.load_acquisition(Run({"sub": "01"}, (made,)))
    assert np.allclose(acquisition.bvecs, truth.table()[1], atol=1e-6)
    direction, _ = principal(nib.load(made.image), acquisition)
    cosine = np.abs(direction[truth.head((7, 8, 9))] @ truth.AXIS)
    assert np.degrees(np.arccos(np.median(cosine))) < 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_storage_order_does_not_matter(part, axis):
    """The same voxels stored backwards along an axis: FSL's x is flipped when x is, or when the
    sign of the determinant changes; the world directions stay."""
    made = part(matrix=truth.affine(turn=(20, -15, 10)))
    before = btable.read_acquisition(made)
    image = nib.load(made.image)
    flip = np.eye(4)
    flip[axis, axis], flip[axis, 3] = -1, image.shape[axis] - 1
    nib.save(nib.Nifti1Image(np.flip(np.asarray(image.dataobj), axis), image.affine @ flip),
             made.image)
    vectors = np.loadtxt(made.bvec)
    vectors[axis] *= -1  # the image axis now points the other way
    vectors[0] *= -1  # the determinant changed sign
    after = btable.read_acquisition(rewritten(made, ".bvec", lines(vectors)))
    assert np.allclose(after.bvecs, before.bvecs, atol=1e-6)


@given(st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_to_fsl_inverts_to_world(seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.standard_normal((3, 3)))[0] * rng.uniform(0.5, 5, 3)
    affine[:3, :3] @= np.eye(3) + np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1)  # shear
    vectors = rng.standard_normal((9, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    acquisition = Acquisition(np.full(9, 1000.0), vectors)
    stored = btable.to_fsl(acquisition, affine)
    assert stored.shape == (3, 9)
    assert np.allclose(btable.to_world(stored.T, affine), vectors, atol=1e-12)
    assert np.allclose(stored.T @ stored, vectors @ vectors.T, atol=1e-12), "angles are kept"


def registered(static, moving):
    """(4, 4) rigid motion from the world of one b0 image to that of the other (dipy)."""
    search = AffineRegistration(metric=MutualInformationMetric(nbins=32), level_iters=[500, 200],
                                sigmas=[2.0, 0.0], factors=[4, 2], verbosity=0)
    images = [np.asarray(image.dataobj[..., 0], float) for image in (static, moving)]
    start = transform_centers_of_mass(images[0], static.affine, images[1], moving.affine)
    return search.optimize(*images, RigidTransform3D(), None, static_grid2world=static.affine,
                           moving_grid2world=moving.affine, starting_affine=start.affine).affine


@pytest.mark.slow
@pytest.mark.parametrize("session", ["v60d1", "v61"])
def test_directions_agree_between_angled_runs(test_data, session):
    """One head, grids turned by 20° or more: at the same place of the brain (rigidly registered b0
    images) the axes of white matter agree in the world; they do not when the tables are taken as
    they stand, or without the flip. Stored with det > 0, so that the flip is used.

    A flip of x commutes with a turn about x (sag20), so those runs cannot show its omission.
    """
    root = test_data("canon_retest")
    files = sorted(root.glob(f"sub-01/ses-{session}/dwi/*dir-PA_dwi.nii.gz"))
    images = {p: nib.as_closest_canonical(nib.load(p)) for p in files}
    first = next(p for p in files if "acq-ortho" in p.name)
    brain = binary_erosion(median_otsu(np.asarray(images[first].dataobj[..., 0], float)),
                           iterations=3)

    def tables(path):
        ours, affine = btable.read_acquisition(read_part(path, root)), images[path].affine
        assert np.linalg.det(affine) > 0
        stored = truth.fsl(ours.bvecs, affine)
        return {name: Acquisition(ours.bvals, vectors) for name, vectors in (
            ("ours", btable.to_world(stored, affine)), ("as they stand", stored),
            ("flip omitted", btable.to_world(stored * [-1, 1, 1], affine)))}

    for path in set(files) - {first}:
        motion = registered(images[first], images[path])
        to = np.linalg.inv(images[path].affine) @ motion @ images[first].affine
        angle = {}
        for name, acquisition in tables(first).items():
            d1, fa1 = principal(images[first], acquisition)
            d2, fa2 = principal(images[path], tables(path)[name])
            white = np.argwhere((fa1 > 0.5) & (fa1 < 0.95) & brain)
            at = (to @ np.c_[white, np.ones(len(white))].T)[:3]
            there = np.stack([map_coordinates(d2[..., k], at, order=0) for k in range(3)])
            both = map_coordinates(fa2, at, order=0) > 0.5
            assert both.sum() > 1000
            cosine = np.abs((motion[:3, :3] @ d1[tuple(white.T)].T * there).sum(0))[both]
            angle[name] = np.degrees(np.arccos(np.median(cosine)))
        assert angle["ours"] < (8 if session == "v61" else 20), (path.name, angle)
        assert angle["ours"] < 0.6 * angle["as they stand"], (path.name, angle)
        if "sag20" not in path.name:
            assert angle["ours"] < 0.5 * angle["flip omitted"], (path.name, angle)


def test_transposed_and_column_tables(part):
    made = part()
    want = btable.read_acquisition(made)
    columns = np.loadtxt(made.bvec).T
    assert columns.shape == (30, 3)
    turned = btable.read_acquisition(rewritten(made, ".bvec", lines(columns)))
    assert np.allclose(turned.bvecs, want.bvecs, atol=1e-7)
    column = lines(np.loadtxt(made.bval))
    assert np.array_equal(btable.read_acquisition(rewritten(made, ".bval", column)).bvals,
                          want.bvals)


REFUSED = {
    "short bval": (".bval", lambda t: t[:-1], "{n} volumes.*equal"),
    "short bvec": (".bvec", lambda t: t[:, :-1], "{n} volumes.*equal"),
    "two rows": (".bvec", lambda t: t[:2], "3 rows"),
    "negative": (".bval", lambda t: t - 5, "b-value -5 of volume 0.*Correct it"),
    "zero vector": (".bvec", lambda t: t * (np.arange(t.shape[1]) != 5), "volume 5.*direction"),
    "long vector": (".bvec", lambda t: t * 1.1, "length 1.1.*normalise"),
    "only b0": (".bval", lambda t: np.minimum(t, 40), "only b0.*--bids-filter-file"),
    "all zero": (".bval", lambda t: 0 * t, "Give the table"),
    "no b0": (".bval", lambda t: np.maximum(t, 50), "no b0.*smallest is 50"),
    "ms/µm²": (".bval", lambda t: t / 1000, "multiply the table by 1000"),
    "s/m²": (".bval", lambda t: 1e6 * t, "above 100,000.*divide values in s/m²"),
    "times 10⁴": (".bval", lambda t: 1e4 * t, "above 100,000.*are needed in s/mm²"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tables_name_file_and_remedy(part, name):
    extension, change, message = REFUSED[name]
    made = part()
    table = np.loadtxt(made.bvec if extension == ".bvec" else made.bval)
    broken = rewritten(made, extension, lines(np.atleast_2d(change(table))))
    with pytest.raises(DataError, match=message.format(n=30)) as caught:
        btable.load_acquisition(Run({"sub": "01"}, (broken,)))
    assert f"{made.image.name.removesuffix('.nii.gz')}{extension}" in str(caught.value)
    assert str(made.image.parent) in str(caught.value)


@pytest.mark.parametrize("extension,text,message", [
    (".bval", "0 1000 abc", "'abc'.*not a finite number"),
    (".bval", "0 1000 nan", "'nan'.*not a finite number"),
    (".bval", "  \n", "is empty"),
    (".bvec", "1 0 0\n0 1\n0 0 1", "rows of 2 or 3 numbers"),
])
def test_unreadable_tables(part, extension, text, message):
    broken = rewritten(part(), extension, text)
    with pytest.raises(DataError, match=f"{re.escape(extension)}.*{message}"):
        btable.read_acquisition(broken)


def test_b_below_50_serves_as_b0(part):
    made = part()
    table = np.maximum(np.loadtxt(made.bval), 45)
    run = Run({"sub": "01"}, (rewritten(made, ".bval", lines(table[None])),))
    assert btable.load_acquisition(run).b0.sum() == 2


def test_three_dimensions_and_singular_affine(part):
    made = part()
    image = nib.load(made.image)
    data = image.get_fdata(dtype=np.float32)
    nib.save(nib.Nifti1Image(data[..., 0], image.affine), made.image)
    with pytest.raises(DataError, match=r"has 3 dimensions.*whole series"):
        btable.read_acquisition(made)
    flat = nib.Nifti1Image(data, None)
    flat.header.set_sform(np.diag([3, 3, 0, 1]), 1)
    flat.header.set_qform(None, 0)
    nib.save(flat, made.image)
    with pytest.raises(DataError, match="affine cannot be inverted"):
        btable.read_acquisition(made)


def test_times_are_read(part):
    acquisition = btable.read_acquisition(part(sidecar={"EchoTime": 0.09, "SmallDelta": 0.012}))
    assert (acquisition.echo_time, acquisition.small_delta, acquisition.big_delta) == \
        (0.09, 0.012, None)


@pytest.mark.parametrize("kind,b_delta", [("LTE", 1), ("PTE", -0.5), ("STE", 0)])
@pytest.mark.parametrize("frame", ["bvec", "world"])
@pytest.mark.parametrize("columns", [6, 9])
def test_tensors_of_dipy(part, kind, b_delta, frame, columns):
    """.btens of dipy's own b-tensors; scaled to ms/µm² where the frame is the world's."""
    matrix = truth.affine(turn=(-25, 12, 40), det=1)
    made = part(matrix=matrix)
    bvals, axes = truth.table()
    stored = axes if frame == "world" else truth.fsl(axes, matrix)
    tensors = gradient_table(bvals, bvecs=stored, btens=kind).btens
    assert np.allclose(np.trace(tensors, axis1=1, axis2=2), bvals)
    comments = "# frame: world\n# units: ms/um2\n" if frame == "world" else ""
    flat = (tensors / (1000 if frame == "world" else 1)).reshape(-1, 9)
    flat = flat[:, [0, 1, 2, 4, 5, 8]] if columns == 6 else flat
    acquisition = btable.read_acquisition(rewritten(made, ".btens", comments + lines(flat)))
    weighted = ~acquisition.b0
    assert np.allclose(acquisition.b_delta[weighted], b_delta, atol=1e-6)
    if kind != "STE":
        cosines = np.abs((acquisition.bvecs * axes).sum(1))[weighted]
        assert np.allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("b_delta", [1, 0.4, -0.2, -0.5])
def test_written_tensors_are_read_back(part, b_delta):
    made = part(matrix=truth.affine(turn=(20, -15, 10), det=1))
    bvals, axes = truth.table()
    shapes = np.where(bvals < 50, 1.0, b_delta)
    ours = Acquisition(bvals, axes, shapes)
    text = btable.btens_text(ours, nib.load(made.image).affine)
    back = btable.read_acquisition(rewritten(made, ".btens", text))
    assert np.allclose(back.btensors, ours.btensors, atol=0.02)
    assert np.allclose(back.b_delta, ours.b_delta, atol=1e-4)


@pytest.mark.parametrize("extension", [".bshape", ".tsv"])
def test_shapes_per_volume(part, extension):
    made = part()
    shapes = np.where(np.loadtxt(made.bval) > 1500, -0.5, 1)
    text = lines(shapes[None]) if extension == ".bshape" else \
        "volume\tb_delta\n" + "".join(f"{i}\t{s}\n" for i, s in enumerate(shapes))
    acquisition = btable.read_acquisition(rewritten(made, extension, text))
    assert [(round(s.b), s.b_delta, len(s)) for s in acquisition.shells] == \
        [(1000, 1, 12), (2000, -0.5, 16)]


@pytest.mark.parametrize("extension,text,message", [
    (".bshape", "1 1 1", "3 values of b_delta for 30 volumes"),
    (".bshape", "linear " * 30, "'linear'"),
    (".bshape", "2 " * 30, r"lies outside \[-0.5, 1\]"),
    (".tsv", "volume\tshape\n1\tlinear\n", "no column b_delta"),
    (".tsv", "b_delta\n" + "unknown\n" * 30, "b_delta nan"),
    (".tsv", "a\tb\n1\t2\t3\t4\n1\n\"", "cannot be read as a table"),
    (".btens", "1 2 3\n" * 30, "one line of 9"),
    (".btens", "1 0 0 0 1 0 0 0 1\n" * 29, "29 lines"),
    (".btens", "0 0 0 0 0 0 0 0 0\n" * 30, "trace 0 s/mm².*1000"),
    (".btens", "# frame: scanner\n" + "0 0 0 0 0 0 0 0 0\n" * 30, "frame scanner"),
    (".btens", "1000 0 0 0 500 0 0 0 0\n" * 30, "not axially symmetric"),
    (".btens", "1000 9 0 0 0 0 0 400 0\n" * 30, "not symmetric"),
    (".btens", "2000 0 0 0 -500 0 0 0 -500\n" * 30, "negative eigenvalue"),
])
def test_unknown_encoding_is_an_error(part, extension, text, message):
    broken = rewritten(part(), extension, text)
    with pytest.raises(DataError, match=message) as caught:
        btable.read_acquisition(broken)
    assert extension in str(caught.value)


def test_two_encodings_are_an_error(part):
    made = rewritten(part(), ".bshape", "1 " * 30)
    with pytest.raises(DataError, match="Keep one"):
        rewritten(made, ".btens", "")


@pytest.mark.parametrize("name,series", [("LTE_run-4", 11), ("PTE_run-1", 3), ("PTE_run-2", 6)])
def test_real_tensors_are_those_of_the_sequence(test_data, tmp_path, name, series):
    """b-tensors of .bshape and .bvec against the sequence's own, and these read from a .btens."""
    root = test_data("dib2019_btensor")
    table = loadmat(root / "HEX_FWF_MERGED_xps.mat", simplify_cells=True)["xps"]
    scale = 1e6 * np.array([1, 1, 1, np.sqrt(2), np.sqrt(2), np.sqrt(2)])  # s/m², Mandel
    xx, yy, zz, xy, xz, yz = (table["bt"][table["s_ind"] == series] / scale).T
    theirs = np.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], axis=1).reshape(-1, 3, 3)
    made = read_part(root / f"sub-hex/dwi/sub-hex_acq-{name}_dwi.nii.gz", root)
    axes = nib.load(made.image).affine[:3, :3] / np.linalg.norm(
        nib.load(made.image).affine[:3, :3], axis=0)
    assert np.linalg.det(axes) < 0, "no flip: the tables are relative to the image axes"
    ours = btable.read_acquisition(made)
    assert np.allclose(axes.T @ ours.btensors @ axes, theirs, atol=2)
    path = tmp_path / "x_dwi.btens"
    path.write_text("# units: s/m2\n" + lines(1e6 * theirs.reshape(-1, 9)))
    given = btable.read_acquisition(replace(made, encoding=path))
    assert np.allclose(given.btensors, ours.btensors, atol=2)
    weighted = ~given.b0
    assert np.allclose(given.b_delta[weighted], ours.b_delta[weighted], atol=1e-3)
