"""Quality numbers against signals whose truth is known by construction."""

import itertools
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from bidsapp import cli, methods, upsample
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy.mask import median_otsu, read_mask
from bidsapp.bids import btable, find
from bidsapp.dwi import Dwi, noise_sd
from bidsapp.evaluate import quality
from bidsapp.kinds import Derived, Estimator
from bidsapp.series import Series

SHAPE = (9, 8, 7)
SD = 5.0


class Halves(Estimator):
    """A scalar map with a hole, its uncertainty, and a direction."""

    OUTPUTS: ClassVar[dict] = {
        "model": {"name": "halves", "Description": "Halves (Doe et al. 2020)",
                  "URL": "https://doi.org/10.1000/halves"},
        "maps": {"half": {"entities": {"param": "half"}, "Description": "Half", "Units": "mm^2/s"},
                 "half_std": {"entities": {"param": "half", "stat": "std"}, "Description": "SD",
                              "Units": "mm^2/s"},
                 "direction": {"entities": {"param": "direction"}, "Description": "Direction",
                               "Units": "unitless"}}}

    @property
    def name(self):
        return "estimate_halves"

    @property
    def outputs(self):
        return self.OUTPUTS

    def check(self, acquisition):
        """Applies to everything."""

    def apply(self, dwi, device, seed=0):
        raise NotImplementedError


def directions(rng, n):
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.fixture
def dwi(rng):
    """Three b0, 24 × b1000, 20 × b2500 of one tensor per voxel, Gaussian noise of SD 5."""
    bvals = np.r_[np.zeros(3), np.full(24, 1000.0), np.full(20, 2500.0)]
    acquisition = Acquisition(bvals, np.vstack([np.zeros((3, 3)), directions(rng, 44)]))
    mask = np.ones(SHAPE, bool)
    mask[0] = False
    n = int(mask.sum())
    axis = directions(rng, n)
    cosine = axis @ acquisition.bvecs.T
    signal = 800 * np.exp(-bvals * (0.5e-3 + 0.6e-3 * cosine**2))
    signal += SD * rng.standard_normal(signal.shape)
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    return Dwi(signal.astype(np.float32), mask, affine, acquisition, noise_sd=SD, invalid=4)


def changed(dwi, volume, k, factor):
    """The same with slice k of a volume (k None: all slices) multiplied by factor."""
    signal = dwi.signal.copy()
    rows = slice(None) if k is None else np.nonzero(dwi.mask)[2] == k
    signal[rows, volume] *= factor
    return replace(dwi, signal=signal)


def test_counts_and_levels(dwi):
    signal = dwi.signal.copy()
    signal[:3, 5] = -1
    qc = quality.measure_quality(replace(dwi, signal=signal))
    assert qc["n_voxels"] == 8 * 8 * 7
    assert qc["mask_volume"] == pytest.approx(8 * 8 * 7 * 15 / 1000)
    assert (qc["n_volumes"], qc["n_b0"], qc["n_shells"]) == (47, 3, 2)
    assert (qc["n_invalid"], qc["n_negative"]) == (4, 3)
    assert qc["snr_b0"] == pytest.approx(800 / SD, rel=0.01)
    powder = np.mean(np.exp(-1 * (0.5 + 0.6 * np.linspace(-1, 1, 2001) ** 2)))  # over the sphere
    assert qc["b1000_signal"] == pytest.approx(800 * powder, rel=0.03)
    assert qc["b1000_snr"] == pytest.approx(qc["b1000_signal"] / SD)
    assert qc["n_dropout_slices"] == qc["n_dropout_volumes"] == 0


def test_noise_level_is_unbiased_with_few_directions(rng):
    """12 directions leave six degrees of freedom. The median of χ²/6 is 0.89: taken for the mean,
    it would make the level 6 % too low. One standard error of 20 000 voxels is 0.3 %."""
    acquisition = Acquisition(np.r_[0, np.full(12, 1000.0)],
                              np.vstack([np.zeros((1, 3)), directions(rng, 12)]))
    signal = (800 + SD * rng.standard_normal((20_000, 13))).astype(np.float32)
    dwi = Dwi(signal, np.ones((20, 25, 40), bool), np.eye(4), acquisition)
    assert noise_sd(dwi) == pytest.approx(SD, rel=0.015)


@pytest.mark.parametrize("n,b0,highest", [(6, 1, None), (7, 1, None), (6, 4, 1.02), (7, 9, 1.02),
                                          (8, 1, 2.0), (20, 1, 1.05)])
def test_anisotropy_is_not_taken_for_noise(rng, n, b0, highest):
    """Tensors of one axis at SNR 40. A shell of fewer than 8 directions says nothing of the noise:
    b0 volumes do, or it is unknown. Degree 2, of 8 directions, leaves a part of degree 4."""
    axes = upsample.spread(np.zeros((0, 3)), n)
    acquisition = Acquisition(np.r_[np.zeros(b0), np.full(n, 1000.0)],
                              np.vstack([np.zeros((b0, 3)), axes]))
    bundle = rng.standard_normal((4000, 3))
    bundle /= np.linalg.norm(bundle, axis=1, keepdims=True)
    signal = 40 * SD * np.exp(-acquisition.bvals * (
        0.4e-3 + 1.3e-3 * (bundle @ acquisition.bvecs.T)**2))
    signal += SD * rng.standard_normal(signal.shape)
    level = noise_sd(Dwi(signal.astype(np.float32), np.ones((20, 20, 10), bool), np.eye(4),
                         acquisition))
    if highest is None:
        assert level is None
    else:
        assert 0.97 < level / SD < highest


def test_unknown_noise_gives_no_snr(dwi):
    qc = quality.measure_quality(replace(dwi, noise_sd=None))
    assert qc["snr_b0"] is None and qc["b1000_snr"] is None and qc["b1000_signal"] > 0


def test_ndc_pairs_nearest_axes(rng):
    n = np.array([[1, 0, 0], [-1, 0.01, 0], [0, 0, 1], [0, 0.02, -1]], float)
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    acquisition = Acquisition(np.full(4, 1000.0), n)
    a, b = rng.standard_normal((2, 504))
    signal = np.stack([a, 2 * a + 1, b, -b], axis=1).astype(np.float32)
    dwi = Dwi(signal, np.ones(SHAPE, bool), np.eye(4), acquisition)
    # 0 and 1 are one axis and correlate with 1; 2 and 3 are one axis and correlate with -1
    assert quality.neighbouring_correlation(dwi) == pytest.approx(0, abs=1e-6)
    assert quality.neighbouring_correlation(
        replace(dwi, signal=signal[:, :2].copy(), acquisition=acquisition[:2])) == pytest.approx(1)
    one = replace(dwi, signal=signal[:, :1].copy(), acquisition=acquisition[:1])
    assert quality.neighbouring_correlation(one) is None


def test_neighbouring_correlation_of_each_volume(rng):
    """Volume 3 is nearest to 1, volume 1 to 2; b0 has none, and a constant volume none either."""
    n = np.array([[0, 0, 0], [1, 0, 0], [1, 0.1, 0], [1, -0.2, 0], [0, 0, 1]], float)
    n[1:] /= np.linalg.norm(n[1:], axis=1, keepdims=True)
    acquisition = Acquisition(np.array([0, 1000, 1000, 1000, 2000.0]), n)
    signal = rng.standard_normal((300, 5)).astype(np.float32)
    expected = np.corrcoef(signal.T)
    found = quality.neighbouring_correlations(signal, acquisition)
    np.testing.assert_allclose(found[1:4], expected[[1, 2, 3], [2, 1, 1]], atol=1e-6)
    assert np.isnan(found[0]) and np.isfinite(found[4])
    signal[:, 2] = 7
    found = quality.neighbouring_correlations(signal, acquisition)
    np.testing.assert_array_equal(np.isnan(found), [True, True, True, False, False])
    assert np.isnan(quality.neighbouring_correlations(signal[:, :2], acquisition[:2])).all()


def test_head_motion_is_that_of_the_centre():
    """A turn about the centre does not displace it, wherever the origin of the world lies."""
    centre = np.array([10.0, -20, 30])
    turn = np.radians(3)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0],
                        [0, 0, 1]])
    rotations = np.stack([np.eye(3), about_z, about_z])
    shift = np.array([[0, 0, 0], [0, 0, 0], [0.5, -0.25, 0]])
    motion = quality.head_motion(rotations, centre - rotations @ centre + shift, centre)
    np.testing.assert_allclose(motion.translations, shift, atol=1e-12)
    np.testing.assert_allclose(motion.rotations, [[0, 0, 0], [0, 0, 3], [0, 0, 3]], atol=1e-9)
    np.testing.assert_allclose(motion.framewise_displacement, [np.nan, 50 * turn, 0.75])


def test_angles_turn_about_x_first():
    """R = Rz(γ) Ry(β) Rx(α), with each factor written out."""
    a, b, g = np.radians([4, -7, 11])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_y = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    about_z = [[np.cos(g), -np.sin(g), 0], [np.sin(g), np.cos(g), 0], [0, 0, 1]]
    rotation = np.array(about_z) @ about_y @ about_x
    motion = quality.head_motion(rotation[None], np.zeros((1, 3)), np.zeros(3))
    np.testing.assert_allclose(motion.rotations, [[4, -7, 11]])
    assert np.isnan(motion.framewise_displacement).all()


@pytest.mark.parametrize(("volume", "k", "loss"), [(10, 3, 0.3), (30, 0, 0.2), (46, 6, 0.6)])
def test_dropout_is_found_and_nothing_else(dwi, volume, k, loss):
    found = quality.slice_signal(changed(dwi, volume, k, 1 - loss))
    assert found.suspects == [(k, volume)]
    assert found.change[k, volume] == pytest.approx(-loss, abs=0.05)


def test_dropout_of_every_other_slice(dwi):
    bad = dwi
    for k in (0, 2, 4):
        bad = changed(bad, 12, k, 0.5)
    assert sorted(quality.slice_signal(bad).suspects) == [(0, 12), (2, 12), (4, 12)]
    qc = quality.measure_quality(bad)
    assert (qc["n_dropout_slices"], qc["n_dropout_volumes"]) == (3, 1)


def test_slice_without_any_signal(dwi):
    assert quality.slice_signal(changed(dwi, 20, 2, 0)).suspects == [(2, 20)]


def test_change_of_a_whole_volume_is_no_dropout(dwi):
    assert quality.slice_signal(changed(dwi, 12, None, 0.8)).suspects == []


def test_anisotropy_is_no_dropout(rng):
    """All fibres of a slice parallel: a model without directions would see losses of half."""
    n = directions(rng, 30)
    acquisition = Acquisition(np.r_[0.0, np.full(30, 2000.0)], np.vstack([np.zeros(3), n]))
    mask = np.ones(SHAPE, bool)
    cosine = np.repeat([[1, 0, 0]], mask.sum(), 0) @ acquisition.bvecs.T
    cosine[np.nonzero(mask)[2] != 3] = 0.577
    signal = 500 * np.exp(-acquisition.bvals * (0.3e-3 + 0.4e-3 * cosine**2))
    signal += 5 * rng.standard_normal(signal.shape)
    assert np.ptp(np.log(signal[np.nonzero(mask)[2] == 3][:, 1:].mean(0))) > 0.5
    dwi = Dwi(signal.astype(np.float32), mask, np.eye(4), acquisition)
    assert quality.slice_signal(dwi).suspects == []
    assert quality.slice_signal(changed(dwi, 7, 3, 0.6)).suspects == [(3, 7)]


@pytest.mark.parametrize("out_of_plane", [0, 1e-6, 1e-3], ids=["plane", "rounded", "thick"])
@pytest.mark.parametrize("span", [np.pi, 0], ids=["coplanar", "one axis"])
def test_directions_in_a_plane(rng, dwi, span, out_of_plane):
    """The basis is singular, or all but; what is found is what it was: one slice."""
    angle = np.linspace(0, span, 24, endpoint=False)
    plane = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    plane += out_of_plane * rng.standard_normal(plane.shape)
    plane /= np.linalg.norm(plane, axis=1, keepdims=True)
    acquisition = Acquisition(np.r_[np.zeros(3), np.full(24, 1000.0)],
                              np.vstack([np.zeros((3, 3)), plane]))
    axis = directions(rng, len(dwi.signal))
    signal = 800 * np.exp(-acquisition.bvals * (
        0.5e-3 + 0.6e-3 * (axis @ acquisition.bvecs.T)**2)) + SD * rng.standard_normal(
            (len(axis), 27))
    flat = replace(dwi, signal=signal.astype(np.float32), acquisition=acquisition)
    assert noise_sd(flat) == pytest.approx(SD, rel=0.05)
    assert quality.slice_signal(flat).suspects == []
    assert quality.slice_signal(changed(flat, 9, 3, 0.6)).suspects == [(3, 9)]


def test_two_slices(dwi):
    mask = np.zeros(SHAPE, bool)
    mask[1:, :, 2:4] = True
    rows = mask[dwi.mask]
    thin = replace(dwi, signal=dwi.signal[rows].copy(), mask=mask)
    assert quality.slice_signal(thin).suspects == []
    assert quality.slice_signal(changed(thin, 12, 2, 0.6)).suspects == [(2, 12)]


def test_small_shells_are_not_assessed(dwi):
    some = dwi.acquisition.bvals < 1500
    some[8:27] = False
    few = replace(dwi, signal=dwi.signal[:, some].copy(), acquisition=dwi.acquisition[some])
    assert not np.isfinite(quality.slice_signal(few).z).any()


def test_statistics_skip_what_is_not_finite_or_not_scalar():
    values = np.arange(10, dtype=np.float32)
    values[0] = np.nan
    derived = Derived({"half": values, "half_std": np.full(10, np.nan, np.float32),
                       "direction": np.ones((10, 3), np.float32)})
    found = quality.summarize_maps(Halves(), derived)
    assert found == {
        "halves_half_mean": 5, "halves_half_sd": pytest.approx(np.arange(1, 10).std()),
        "halves_half_median": 5, "halves_half_std_mean": None, "halves_half_std_sd": None,
        "halves_half_std_median": None}


def test_statistics_leave_out_voxels_without_an_estimate():
    values = np.arange(10, dtype=np.float32)
    found = quality.summarize_maps(Halves(), Derived({"half": values}, valid=values > 5))
    assert found["halves_half_mean"] == 7.5


def test_every_key_is_described(dwi):
    planar = replace(dwi.acquisition, b_delta=np.where(dwi.acquisition.bvals > 2000, -0.5, 1))
    keys = [*quality.measure_quality(dwi),
            *quality.measure_quality(replace(dwi, acquisition=planar)),
            "participant", "session", "run", "batch", "age"]
    described = quality.describe_columns(keys)
    assert set(described) == set(keys)
    assert all(d["Description"] and d["Units"] for d in described.values())
    assert "2500" in described["b2500_planar_signal"]["Description"]
    assert "planar" in described["b2500_planar_signal"]["Description"]


def test_map_features_are_the_means_of_maps():
    all_outputs = {n.removeprefix("estimate_"): methods.get(n).outputs
                   for n in methods.names("estimate_")}
    short, key = next((n, k) for n, o in all_outputs.items() for k in o["maps"]
                      if f"{k}_std" in o["maps"])
    outputs = all_outputs[short]
    columns = ["age", "noise_sd", "b1000_signal", "other_mean", f"{short}_{key}_mean",
               f"{short}_{key}_sd", f"{short}_{key}_median", f"{short}_{key}_std_mean"]
    assert quality.map_features(columns) == [f"{short}_{key}_mean"]
    entry = quality.describe_columns(columns)[f"{short}_{key}_mean"]
    assert entry["Units"] == outputs["maps"][key]["Units"]
    assert outputs["maps"][key]["Description"] in entry["Description"]


def study_table(rng, n):
    return pd.DataFrame({
        "participant": [f"{i:02d}" for i in range(2 * n)], "run": [f"sub-{i:02d}" for i in
        range(2 * n)], "batch": ["A"] * n + ["B"] * n, "age": rng.uniform(20, 60, 2 * n),
        "snr_b0": np.r_[rng.normal(30, 1, n), rng.normal(60, 1, n)], "n_dropout_slices": 0})


def test_outliers_are_sought_within_batches(rng):
    table = study_table(rng, 10)
    table["age"] = table["age"].where(table.index != 2, 500)
    table.loc[3, "snr_b0"] = 60.0  # usual in batch B, not in A
    table.loc[15, "n_dropout_slices"] = 9
    found = quality.find_outliers(table)
    assert set(zip(found["run"], found["measure"], strict=True)) == {
        ("sub-03", "snr_b0"), ("sub-15", "n_dropout_slices")}
    row = found[found["measure"] == "snr_b0"].iloc[0]
    assert row["z"] > quality.OUTLIER and "10 runs of A" in row["why"] and "above" in row["why"]


def test_outliers_of_small_batches_use_all_runs(rng):
    table = study_table(rng, 3)
    table["snr_b0"] = [30.0, 30.5, 29.5, 30.2, 29.9, 90.0]
    found = quality.find_outliers(table)
    assert list(found["run"]) == ["sub-05"] and "all 6 runs" in found["why"][0]
    assert quality.find_outliers(table[:4]).empty


def test_outliers_take_missing_values(rng):
    table = study_table(rng, 10)
    table["snr_b0"] = table["snr_b0"].astype(object)
    table.loc[0, "snr_b0"] = None
    table["ndc"] = None
    assert quality.find_outliers(table).empty


def real(run):
    series = Series.from_run(run, btable.load_acquisition(run))
    mean = series.mean(series.acquisition.b0)
    mask = read_mask(run.mask, series.shape, series.affine) if run.mask else median_otsu(mean)
    dwi = series.within(mask)
    return replace(dwi, noise_sd=noise_sd(dwi))


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "most"), [
    ("siemens_xa30", 1), ("uih_dti16", 0), ("mdt_multishell", 0), ("nyu_3shell", 0),
    ("dib2019_btensor", 0), ("canon_retest", 7)])
def test_real_data_has_few_suspected_slices(test_data, folder, most):
    """The datasets have 1560 and 5280 slices; those of canon_retest hold visible voids."""
    options = cli.parse([str(test_data(folder)), "unused", "participant"])
    there = find.find_runs(options).runs.values()
    found = [quality.slice_signal(real(run)) for run in itertools.chain(*there)]
    assert found and sum(len(f.suspects) for f in found) <= most
