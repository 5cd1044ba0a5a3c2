"""The volumes of a run on their grid; what `within` makes of odd and broken files is in
test_mask_load."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from bidsapp.bids import btable
from bidsapp.bids.inherit import read_part
from bidsapp.dwi import Run
from bidsapp.errors import DataError
from bidsapp.series import Series
from support import bids_tree as truth

SHAPE = (7, 8, 9)
HEAD = truth.head(SHAPE)


@pytest.fixture
def run(tmp_path):
    """A run of two files of 14 and 18 volumes."""
    parts = []
    for i, b in enumerate((1000, 2000)):
        image = truth.write_run(tmp_path / f"sub-01/dwi/sub-01_run-{i + 1}", shape=SHAPE, seed=i,
                                scheme=((0, 2), (b, 12 + 4 * i)))
        parts.append(read_part(image, tmp_path))
    return Run({"sub": "01"}, tuple(parts))


def series_of(run):
    return Series.from_run(run, btable.load_acquisition(run))


def data_of(run):
    return np.concatenate([np.asarray(nib.load(p.image).dataobj) for p in run.parts], -1)


def test_volumes_of_all_parts_in_order(run):
    series, data = series_of(run), data_of(run)
    assert (len(series), series.shape) == (32, SHAPE)
    np.testing.assert_array_equal(series.affine, nib.load(run.parts[0].image).affine)
    volumes = list(series)
    np.testing.assert_array_equal(np.stack(volumes, -1), data)
    assert volumes[0].dtype == np.float32


def test_in_order_a_compressed_file_is_read_once(run, monkeypatch):
    """Going back starts the stream again."""
    rewound = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind",
                        lambda reader: (rewound.append(1), rewind(reader))[1])
    series = series_of(run)
    for _ in series:
        pass
    assert not rewound
    next(iter(series))
    assert rewound


def test_iterating_meets_damage_at_the_end(run):
    """The checksum of gzip stands behind the last value."""
    path = run.parts[1].image
    series = series_of(run)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: is damaged"):
        list(series)


def test_mean_needs_a_volume(run):
    series = series_of(run)
    np.testing.assert_allclose(series.mean(np.arange(32) > 12), data_of(run)[..., 13:].mean(-1),
                               rtol=1e-5)
    with pytest.raises(DataError, match="no volume to average"):
        series.mean(np.zeros(32, bool))
    data = data_of(run)
    data[2, 3, 4, 1], data[3, 3, 4, 30] = np.nan, np.inf  # count as 0
    image = nib.Nifti1Image(data, truth.affine())
    np.testing.assert_allclose(
        Series((image,), series.acquisition).mean(np.ones(32, bool)),
        np.nan_to_num(data, posinf=0).mean(-1), rtol=1e-5)


def test_all_volumes_on_the_whole_grid(run):
    data = data_of(run)
    data[2, 3, 4, 1], data[3, 3, 4, 30] = np.nan, np.inf
    series = Series((nib.Nifti1Image(data, truth.affine()),), btable.load_acquisition(run))
    volumes, invalid = series.load()
    assert (volumes.dtype, invalid) == (np.float32, 2)
    assert volumes[..., 3].flags.c_contiguous
    np.testing.assert_array_equal(volumes, np.nan_to_num(data, posinf=0))
    data[..., 5] = np.nan
    series = Series((nib.Nifti1Image(data, truth.affine()),), series.acquisition)
    with pytest.raises(DataError, match="volume 5 holds no finite value"):
        series.load()


def test_images_and_measurements_must_belong_together(run):
    acquisition = btable.load_acquisition(run)
    with pytest.raises(DataError, match="32 volumes, but 31 measurements"):
        Series.from_run(run, acquisition[:31])
    other = nib.Nifti1Image(np.zeros((7, 8, 10, 18), np.float32), truth.affine())
    with pytest.raises(DataError, match="7 × 8 × 10, but the series has 7 × 8 × 9"):
        Series((nib.load(run.parts[0].image), other), acquisition)


def test_a_series_may_be_in_memory(run):
    """As a step leaves it that changes images."""
    acquisition = btable.load_acquisition(run)
    made = Series((nib.Nifti1Image(data_of(run), truth.affine()),), acquisition)
    for one, other in zip(made, series_of(run), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(made.within(HEAD).signal, data_of(run)[HEAD])
