"""Masks, and the signal inside them: every way in which an image can be odd or broken."""

import gzip
import tracemalloc
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from bidsapp.anatomy import mask as masks
from bidsapp.bids import btable
from bidsapp.bids.inherit import read_part
from bidsapp.dwi import Run, open_image, peak_memory
from bidsapp.errors import DataError
from bidsapp.series import Series
from support import bids_tree as truth

SHAPE = (7, 8, 9)
HEAD = truth.head(SHAPE)


@pytest.fixture
def run(tmp_path):
    """Writes a run of one file or, given several sets of options, of several."""
    def write(*parts):
        made = []
        for i, options in enumerate(parts or ({},)):
            image = truth.write_run(tmp_path / f"sub-01/dwi/sub-01_run-{i + 1}",
                                    **{"shape": SHAPE, "seed": i, **options})
            made.append(read_part(image, tmp_path))
        return Run({"sub": "01"}, tuple(made))
    return write


def data_of(run, part=0):
    return np.asarray(nib.load(run.parts[part].image).dataobj)


def rewrite(run, data, part=0, slope=None):
    path = run.parts[part].image
    image = nib.Nifti1Image(data, nib.load(path).affine)
    if slope:
        image.header.set_slope_inter(*slope)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def series_of(run, **options):
    return Series.from_run(run, btable.load_acquisition(run), **options)


def loaded(run, mask=HEAD, **options):
    return series_of(run).within(mask, **options)


# the signal

def test_rows_are_the_voxels_of_the_mask(run):
    made = run()
    dwi = loaded(made)
    assert dwi.signal.dtype == np.float32 and dwi.signal.shape == (HEAD.sum(), 30)
    assert np.array_equal(dwi.signal, data_of(made)[HEAD])
    assert np.array_equal(dwi.unmask(dwi.signal)[HEAD], data_of(made)[HEAD])
    assert not dwi.unmask(dwi.signal)[~HEAD].any() and dwi.invalid == 0


def test_slabs_on_disk_give_the_same_signal(run, tmp_path):
    made = run()
    assert np.array_equal(loaded(made, memory=1, work_dir=tmp_path).signal, loaded(made).signal)
    assert not list(tmp_path.glob("tmp*")), "nothing is left"


def test_memory_limit_moves_the_signal_to_disk(run, tmp_path):
    """The signal is in this process's memory where the limit allows it, and only there."""
    made = run({"shape": (30, 31, 32)})
    head, peaks = truth.head((30, 31, 32)), {}
    for limit in (np.inf, 1):
        tracemalloc.start()
        dwi = loaded(made, head, memory=limit, work_dir=tmp_path)
        peaks[limit] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1] < 0.4 * dwi.signal.nbytes < dwi.signal.nbytes < peaks[np.inf]


def test_integers_with_scaling(run):
    made = run()
    stored = np.random.default_rng(1).integers(-300, 4000, (*SHAPE, 30)).astype(np.int16)
    path = made.parts[0].image
    rewrite(made, stored)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:120] = np.array([0.25, -10], "<f4").tobytes()  # scl_slope, scl_inter of NIfTI-1
    path.write_bytes(gzip.compress(bytes(raw)))
    assert np.allclose(loaded(made).signal, stored[HEAD] * 0.25 - 10)


def test_uncompressed_and_big_endian(run):
    made = run()
    data = data_of(made)
    path = made.parts[0].image
    nib.save(nib.Nifti1Image(data.astype(">f4"), truth.affine(),
                             nib.Nifti1Header(endianness=">")), path)
    assert np.array_equal(loaded(made).signal, data[HEAD])


def test_negative_values_are_kept(run):
    made = run()
    rewrite(made, -data_of(made))
    assert (loaded(made).signal < 0).all()


def test_some_nan_and_inf_are_counted(run):
    made = run()
    data = data_of(made).copy()
    inside = tuple(np.argwhere(HEAD)[5])
    data[(*inside, 3)], data[(*inside, 4)], data[0, 0, 0, 5] = np.nan, -np.inf, np.nan
    rewrite(made, data)
    dwi = loaded(made)
    assert dwi.invalid == 2, "the one outside the mask does not count"
    assert dwi.signal[5, 3] == dwi.signal[5, 4] == 0 and np.isfinite(dwi.signal).all()


def test_volume_of_nan(run):
    made = run()
    data = data_of(made).copy()
    data[..., 7] = np.nan
    rewrite(made, data)
    with pytest.raises(DataError, match=r"dwi.nii.gz: volume 7 holds no finite value.*Remove it"):
        loaded(made)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_gzip(run, kept):
    made = run()
    path = made.parts[0].image
    path.write_bytes(path.read_bytes()[:int(kept * path.stat().st_size)])
    message = rf"{path}: is damaged or truncated before volume \d+ of 30.*again"
    with pytest.raises(DataError, match=message):
        loaded(made)


def test_truncated_inside_an_intact_gzip(run):
    made = run()
    path = made.parts[0].image
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:len(whole) // 2]))
    with pytest.raises(DataError, match=r"truncated before volume 1[45] of 30"):
        loaded(made)


def test_corrupt_gzip(run):
    made = run()
    path = made.parts[0].image
    rewrite(made, data_of(made).astype(np.int16))  # Huffman-coded, so that damage breaks the code
    data = bytearray(path.read_bytes())
    data[5000:9000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged or truncated before volume"):
        loaded(made)


def loads(made):
    """Whether a run of one file is loaded without a word."""
    try:
        loaded(made)
    except DataError as error:
        assert str(made.parts[0].image) in str(error) and "again" in str(error)
        return False
    return True


def test_no_flipped_bit_passes(run):
    """Without the checksum at the end of the stream 7 of 8 would. Bytes 3 to 9 of gzip's header
    (time, system, flags) say nothing about the data."""
    made = run()
    path = made.parts[0].image
    good = path.read_bytes()
    assert loads(made)
    for bit in np.random.default_rng(3).choice(np.arange(80, 8 * len(good)), 40, replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert not loads(made), bit


def tamper(path, change):
    """Decompressed bytes changed and compressed again, so that the checksum is right."""
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


@pytest.mark.parametrize("change,message", [
    (lambda p: p.write_bytes(p.read_bytes() + b"garbage"), "is damaged"),
    (lambda p: p.write_bytes(p.read_bytes()[:-4] + b"\x01\0\0\0"), "is damaged"),
    (lambda p: p.write_bytes(p.read_bytes()[:-8]), "is damaged"),
    (lambda p: tamper(p, lambda d: d + bytes(4)), "longer than its header says"),
    (lambda p: tamper(p, lambda d: d[:-4]), "is damaged or truncated before volume 29"),
], ids=["garbage", "length", "no trailer", "surplus", "lacking"])
def test_the_end_of_a_compressed_file(run, change, message):
    made = run()
    path = made.parts[0].image
    change(path)
    with pytest.raises(DataError, match=f"{path}: .*{message}.*again"):
        loaded(made)


def test_a_stream_of_several_members_is_one(run):
    """As pigz and bgzip write it; zeros behind it are padding (RFC 1952)."""
    made = run()
    path, whole = made.parts[0].image, data_of(made)[HEAD]
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:9000]) + gzip.compress(raw[9000:]) + bytes(512))
    assert np.array_equal(loaded(made).signal, whole)


@pytest.mark.parametrize("change,message", [
    (lambda d: d + b"x", "longer than its header says"),
    (lambda d: d[:-1], "is damaged or truncated"),
])
def test_the_end_of_an_uncompressed_file(run, change, message):
    made = run()
    raw = gzip.decompress(made.parts[0].image.read_bytes())
    plain = made.parts[0].image.with_suffix("")
    part = replace(made.parts[0], image=plain)
    plain.write_bytes(raw)
    assert np.array_equal(loaded(replace(made, parts=(part,))).signal, data_of(made)[HEAD])
    plain.write_bytes(change(raw))
    with pytest.raises(DataError, match=f"{plain}: .*{message}.*again"):
        loaded(replace(made, parts=(part,)))


@pytest.mark.parametrize("dtype,what", [
    (np.complex64, r"complex numbers \(complex64\).*part-mag"),
    (np.complex128, r"complex numbers \(complex128\)"),
    (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
])
def test_what_is_not_one_number_per_voxel(run, dtype, what):
    made = run()
    rewrite(made, np.zeros((*SHAPE, 30), dtype))
    with pytest.raises(DataError, match=f"{made.parts[0].image}: holds {what}"):
        btable.load_acquisition(made)


@pytest.mark.parametrize("content", [b"", b"not an image", gzip.compress(b"x" * 400)],
                         ids=["zero bytes", "text", "no header"])
def test_no_image(run, content):
    made = run()
    path = made.parts[0].image
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: cannot be read as NIfTI.*again"):
        open_image(path)


@pytest.mark.parametrize("fields,message", [
    ({"srow_x": np.nan}, "not finite"), ({"srow_z": np.inf}, "not finite"),
    ({"srow_x": 0}, "affine cannot be inverted"), ({"pixdim": np.nan}, "not finite"),
    ({"qform_code": 1, "quatern_b": np.nan}, "not finite"),
    ({"qform_code": 1, "quatern_b": 3}, "qform cannot be read"),
], ids=str)
def test_header_that_does_not_say_where_voxels_lie(run, fields, message):
    path = run().parts[0].image
    truth.damage_header(path, **fields)
    with pytest.raises(DataError, match=f"{path}: its .*{message}.* Convert the file again"):
        open_image(path)


def test_three_and_five_dimensions(run):
    made = run()
    acquisition = btable.load_acquisition(made)
    for data, n in ((data_of(made)[..., 0], 3), (data_of(made)[..., None, :], 5)):
        rewrite(made, data)
        with pytest.raises(DataError, match=f"has {n} dimensions, a DWI needs 4"):
            Series.from_run(made, acquisition)


def test_parts_are_joined_and_levelled(run):
    """The second file has half the receiver gain: its b0 says so."""
    made = run({"scheme": ((0, 2), (1000, 12))}, {"scheme": ((0, 2), (2000, 16))})
    rewrite(made, data_of(made, 1) / 2, part=1)
    dwi = loaded(made)
    assert dwi.signal.shape[1] == 32
    b0 = dwi.signal[:, dwi.acquisition.b0]
    assert np.isclose(b0[:, :2].mean(), b0[:, 2:].mean(), rtol=1e-4)
    assert np.array_equal(dwi.signal[:, :14], data_of(made)[HEAD])


def test_mean_of_the_b0_of_all_parts(run):
    made = run({"scheme": ((0, 2), (1000, 12))}, {"scheme": ((0, 1), (2000, 16))})
    series = series_of(made)
    mean, affine = series.mean(series.acquisition.b0), series.affine
    want = np.concatenate([data_of(made)[..., :2], data_of(made, 1)[..., :1]], -1).mean(-1)
    assert np.allclose(mean, want, rtol=1e-5) and np.allclose(affine, truth.affine())


def test_memory_is_bounded_by_the_mask(run):
    shape, few = (40, 41, 42), np.zeros((40, 41, 42), bool)
    few[10:14, 10:14, 10:14] = True
    made = run({"shape": shape})
    volume = 4 * few.size
    tracemalloc.start()
    dwi = loaded(made, few)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * dwi.signal.nbytes + 4 * volume, "30 volumes are never held at once"


@pytest.mark.parametrize("share,in_file", [(0.99, True), (1.01, False)])
def test_a_signal_beyond_the_limit_is_not_held_in_memory(run, tmp_path, share, in_file):
    """By the measured peak of what is allocated, a file's pages not counted."""
    every = np.ones((40, 41, 42), bool)
    made = run({"shape": every.shape})
    nbytes = 4 * every.size * 30
    tracemalloc.start()
    dwi = loaded(made, every, memory=share * peak_memory(every.size, 30), work_dir=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dwi.signal.nbytes == nbytes
    assert peak < nbytes / 2 if in_file else peak > nbytes


# the mask

def mask_file(tmp_path, data, matrix=None):
    path = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(data, truth.affine() if matrix is None else matrix), path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("more", [(), (1,)], ids=["3-D", "4-D of one volume"])
def test_given_mask(tmp_path, dtype, more):
    path = mask_file(tmp_path, HEAD.reshape(SHAPE + more).astype(dtype))
    assert np.array_equal(masks.read_mask(path, SHAPE, truth.affine()), HEAD)


def test_given_mask_with_nan_background(tmp_path):
    path = mask_file(tmp_path, np.where(HEAD, 1, np.nan).astype(np.float32))
    assert np.array_equal(masks.read_mask(path, SHAPE, truth.affine()), HEAD)


@pytest.mark.parametrize("data,matrix,message", [
    (np.zeros(SHAPE, np.uint8), None, "mask is empty"),
    (np.ones((7, 8, 10), np.uint8), None, r"the shape \(7, 8, 10\).*Resample"),
    (np.ones(SHAPE, np.uint8), truth.affine(voxel=(3, 3, 3)), "affine differs from that.*Resample"),
    (np.ones((*SHAPE, 2), np.uint8), None, r"\(7, 8, 9, 2\), but the DWI"),
])
def test_masks_that_do_not_serve(tmp_path, data, matrix, message):
    path = mask_file(tmp_path, data, matrix)
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        masks.read_mask(path, SHAPE, truth.affine())


def test_truncated_mask(tmp_path):
    shape = (40, 41, 42)
    path = mask_file(tmp_path, np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=f"{path}: is damaged or truncated.*again"):
        masks.read_mask(path, shape, truth.affine())


def test_damaged_mask(tmp_path):
    shape = (40, 41, 42)
    path = mask_file(tmp_path, np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(DataError, match=f"{path}: is damaged.*again"):
        masks.read_mask(path, shape, truth.affine())


def test_median_otsu_finds_the_head():
    head = truth.head((40, 42, 44))
    mean = np.random.default_rng(0).rayleigh(15, head.shape) + 1000 * head
    found = masks.median_otsu(mean.astype(np.float32))
    overlap = 2 * (found & head).sum() / (found.sum() + head.sum())
    assert found.dtype == bool and overlap > 0.95


def test_nothing_to_mask():
    with pytest.raises(DataError, match="no value above 0"):
        masks.median_otsu(np.zeros(SHAPE, np.float32))


def test_empty_mask_is_refused(run):
    with pytest.raises(DataError, match="mask is empty"):
        loaded(run(), np.zeros(SHAPE, bool))


def test_holes_are_filled_in_slabs_too():
    """A dark centre that goes through both slices is inside the brain, the air around is not."""
    x, y = np.ogrid[-32:32, -32:32]
    r = np.hypot(x, y)
    mean = np.where(r < 24, 900.0, 20.0)
    mean[r < 7] = 20
    mask = masks.median_otsu(np.stack([mean, mean], axis=2))
    assert mask[32, 32].all() and mask[32, 44].all()
    assert not mask[0].any() and mask.sum() < 2 * (r < 26).sum()
