"""Measures of harmonization against values that are known, or computed another way."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import ttest_ind, ttest_rel

from bidsapp.acquisition import Acquisition
from bidsapp.evaluate import agreement
from support import bids_tree

SHAPE = (7, 8, 9)


@pytest.fixture
def mask():
    inside = np.zeros(SHAPE, bool)
    inside[1:6, 1:7, 2:8] = True
    return inside


def test_errors_of_known_size():
    truth = np.array([3.0, -4.0])
    assert agreement.mse(np.array([3.5, -4.5]), truth) == 0.25
    assert agreement.nmse(np.array([3.5, -4.5]), truth) == 0.25 / 12.5
    assert agreement.nmse(np.zeros(2), truth) == 1
    # a sum in float32 would lose the second value
    assert agreement.mse(np.array([4096, 1], np.float32), np.zeros(2, np.float32)) == (
        4096**2 + 1) / 2


def test_tensor_of_one_shell():
    """Noise-free signals of the tensor of bids_tree, S/S0 = exp(−B : D)."""
    bvals, axes = bids_tree.table(((0, 1), (1200, 20)))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    ratio = []
    for axis in (bids_tree.AXIS, turn @ bids_tree.AXIS):
        along = (axes[1:] @ axis) ** 2
        ratio.append(np.exp(-bvals[1:] * (bids_tree.PARALLEL * along
                                          + bids_tree.PERPENDICULAR * (1 - along))))
    found = agreement.shell_maps(np.array(ratio), Acquisition(bvals[1:], axes[1:]))
    np.testing.assert_allclose(found["fa"], bids_tree.FA, rtol=1e-4)
    np.testing.assert_allclose(found["md"], bids_tree.MD, rtol=1e-4)
    wanted = np.array([bids_tree.AXIS, turn @ bids_tree.AXIS])
    assert agreement.angle(found["direction"], wanted).max() < 0.1


def test_angles_are_between_axes():
    a = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    b = np.array([[-1.0, 0, 0], [np.sqrt(0.5), 0, np.sqrt(0.5)], [1, 0, 0]])
    np.testing.assert_allclose(agreement.angle(a, b), [0, 45, 90], atol=1e-5)


def test_ssim_by_its_definition(rng, mask):
    """Window sums written out, of the mask's voxels far from the border of the volume."""
    a, b = rng.normal(1, 1, (2, *(n + 16 for n in SHAPE)))
    inside = np.pad(mask, 8)
    c1, c2 = (0.01 * np.ptp(b[inside]))**2, (0.03 * np.ptp(b[inside]))**2
    a, b = a * inside, b * inside
    steps = np.array(list(product(range(-6, 7), repeat=3)))
    weights = np.exp(-(steps**2).sum(1) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for at in np.argwhere(inside):
        near = tuple((at + steps).T)
        ma, mb = weights @ a[near], weights @ b[near]
        va, vb = weights @ (a[near] - ma)**2, weights @ (b[near] - mb)**2
        ab = weights @ ((a[near] - ma) * (b[near] - mb))
        values.append((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert np.mean(values) < 0.9
    assert agreement.ssim(a, b, inside) == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_of_equals_is_one_and_of_a_shift_as_luminance_says(rng):
    a = rng.uniform(1, 2, SHAPE)
    everywhere = np.ones(SHAPE, bool)
    assert agreement.ssim(a, a, everywhere) == pytest.approx(1, abs=1e-12)
    # structure and contrast of a + 0.5 are those of a: what remains is the means of the window
    mean = gaussian_filter(a, 1.5)
    c1 = (0.01 * np.ptp(a))**2
    assert agreement.ssim(a + 0.5, a, everywhere) == pytest.approx(np.mean(
        (2 * mean * (mean + 0.5) + c1) / (mean**2 + (mean + 0.5)**2 + c1)), abs=1e-9)
    blurred = agreement.ssim(0.5 * (a + a.mean()), a, everywhere)
    assert agreement.ssim(rng.uniform(1, 2, SHAPE), a, everywhere) < blurred < 1


def test_sharpness_of_a_blurred_wave(rng):
    """A Gaussian of SD s leaves exp(−k²s²/2) of a wave of wave number k. Noise of SD σ moves the
    slope by about σ / √(2 Σ|∇t|²), 2e-3 here, and not on average."""
    x = np.arange(64)
    k = 2 * np.pi / 16
    wave = np.broadcast_to(np.sin(k * x)[:, None, None], (64, 20, 21))
    mask = np.ones(wave.shape, bool)
    mask[:12], mask[-12:] = False, False
    blurred = gaussian_filter(wave, 1.2)
    wanted = np.exp(-(k * 1.2)**2 / 2)
    assert agreement.sharpness(blurred, wave, mask) == pytest.approx(wanted, rel=1e-3)
    assert agreement.sharpness(wave, wave, mask) == 1
    noisy = agreement.sharpness(blurred + rng.normal(0, 0.1, wave.shape), wave, mask)
    assert abs(noisy - wanted) < 0.01


TABLE = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9],
                  [6, 2, 4, 7]], float)
"""Shrout & Fleiss 1979, table 2: six targets, four judges."""


def test_icc_of_the_published_table():
    """ICC(3,1) = 0.71 and ICC(2,1) = 0.29 in the paper; the intervals of McGraw & Wong as the R
    packages psych and irr print them for this table."""
    consistency, absolute = agreement.icc_consistency(TABLE), agreement.icc_agreement(TABLE)
    assert consistency == pytest.approx((0.71, 0.342, 0.946), abs=0.005)
    assert absolute == pytest.approx((0.29, 0.019, 0.761), abs=0.005)
    assert agreement.icc(TABLE) == consistency.value
    shifted = TABLE + [0, 10, 20, 30]
    assert agreement.icc_consistency(shifted) == pytest.approx(consistency)
    assert agreement.icc_agreement(shifted).value < 0.1
    same = np.repeat(TABLE[:, :1], 3, axis=1)
    assert agreement.icc_consistency(same) == agreement.icc_agreement(same) == (1, 1, 1)


@pytest.mark.parametrize("estimate,truth", [
    (agreement.icc_consistency, 0.8), (agreement.icc_agreement, 4 / 5.5)])
def test_intervals_of_icc_cover(rng, estimate, truth):
    """Variances of 4 between people, 1 of noise and 0.5 between sites, of which there are six:
    95 % of the intervals hold the truth, with a standard error of 0.7 % for 1000 tables."""
    inside = 0
    for _ in range(1000):
        values = (2 * rng.standard_normal((12, 1)) + np.sqrt(0.5) * rng.standard_normal((1, 6))
                  + rng.standard_normal((12, 6)))
        found = estimate(values)
        assert found.low < found.value < found.high
        inside += found.low <= truth <= found.high
    assert abs(inside / 1000 - 0.95) < 0.025


def test_differences_between_sites():
    """Those of the same people equal scipy's paired t test, those of different people its Welch
    test, and those to the mean of three sites a calculation by hand."""
    one, other = TABLE[:, 0], TABLE[:, 1]
    for found, interval in (
            (agreement.paired_difference(TABLE[:, :2], np.array([1.0, -1])),
             ttest_rel(one, other).confidence_interval(0.95)),
            (agreement.unpaired_difference([one, other[:4]], np.array([1.0, -1])),
             ttest_ind(one, other[:4], equal_var=False).confidence_interval(0.95))):
        assert found[1:] == pytest.approx(tuple(interval), rel=1e-9)
    third = np.array([2 / 3, -1 / 3, -1 / 3])
    assert agreement.paired_difference(TABLE[:, :3], third).value == pytest.approx(
        one.mean() - TABLE[:, :3].mean())
    groups = [one, other, TABLE[:4, 2]]
    assert agreement.unpaired_difference(groups, third).value == pytest.approx(
        one.mean() - np.mean([g.mean() for g in groups]))
    assert agreement.unpaired_difference([np.ones(3), np.zeros(4)], np.array([1.0, -1])) == (
        1, 1, 1)


def test_icc_of_simulated_people(rng):
    """σ_p² / (σ_p² + σ_e²) = 0.8."""
    values = 2 * rng.standard_normal((4000, 1)) + rng.standard_normal((4000, 3))
    assert agreement.icc(values) == pytest.approx(0.8, abs=0.015)


def test_variation():
    assert agreement.variation(np.array([[9.0, 11.0], [20.0, 20.0]])) == pytest.approx(
        np.sqrt(2) / 10 / 2)


def test_sites_that_can_and_cannot_be_told(rng):
    """Two normal distributions d SDs apart: AUC Φ(d/√2), 0.921 for d = 2, and 0.5 for d = 0, with
    an SD of 0.03 at most for 200 scans of each (√((2n + 1)/(12 n²)))."""
    people, sites = np.repeat(np.arange(200), 2), np.tile(["A", "B"], 200)
    features = rng.standard_normal((400, 1))
    features[sites == "B"] += 2
    found = agreement.site_auc(features, sites, people)
    assert set(found) == {"A", "B"} and found["A"] == pytest.approx(found["B"])
    assert found["B"] == pytest.approx(0.921, abs=0.04)
    assert abs(agreement.site_auc(rng.standard_normal((400, 2)), sites, people)["B"] - 0.5) < 0.1


def test_slope_and_contrast():
    ages = np.array([20.0, 40, 70])
    assert agreement.slope(ages, 1 + ages / 100) == pytest.approx(0.01)
    # of points off the line, by the normal equations
    values = np.array([1.0, 3, 2])
    centred = ages - ages.mean()
    assert agreement.slope(ages, values) == pytest.approx(centred @ values / (centred @ centred))
    lesion = np.array([True, True, False, False, False])
    around = np.array([False, False, True, True, False])
    assert agreement.contrast(np.array([6, 8, 10, 10, 99.0]), lesion, around) == pytest.approx(-0.3)


def test_sites_before_and_after(rng):
    """Four people at two sites, of which B adds 2; harmonized, it does not. A fifth was at A alone,
    and a sixth has no harmonized maps."""
    people = rng.normal(10, 1, 6)
    rows = [{"participant": str(i), "batch": b, "fa": people[i] + 2 * (b == "B"),
             "harmonized_fa": people[i] if i < 5 else np.nan}
            for i in range(6) for b in "AB" if (i, b) != (4, "B")]
    rows.append(rows[0])  # a second run, which is averaged
    found = agreement.compare_tables(pd.DataFrame(rows), ["fa"], {}, "A")
    of = found.set_index(["data", "statistic"])
    same = "measured, of the runs harmonized"
    assert list(of["people"].loc["measured"]) == [5, 5, 5, 5, 6, 6]
    assert list(of["people"].loc[same]) == list(of["people"].loc["harmonized"]) == [
        4, 4, 4, 4, 5, 5]
    assert list(of["batch"].loc["measured"]) == ["n/a"] * 3 + ["B", "A", "B"]
    assert of.loc[(same, "cov"), "value"] == pytest.approx(
        np.mean(np.sqrt(2) / (people[:4] + 1)))
    assert of.loc[("harmonized", "cov"), "value"] == 0
    for kind in ("measured", same, "harmonized"):
        assert of.loc[(kind, "icc_consistency"), "value"] == pytest.approx(1), "blind to a shift"
    assert of.loc[("measured", "icc_agreement"), "value"] < 0.7
    assert of.loc[("harmonized", "icc_agreement"), "value"] == pytest.approx(1)
    assert tuple(of.loc[("measured", "paired_difference"), ["value", "low", "high"]]
                 ) == pytest.approx((2, 2, 2))
    assert of.loc[("harmonized", "paired_difference"), "value"] == 0
    auc = found[(found["statistic"] == "auc") & (found["batch"] == "B")].set_index("data")["value"]
    assert auc["measured"] > auc["harmonized"]
    few = pd.DataFrame(rows[:4])
    assert agreement.compare_tables(few, ["fa"], {}).empty
    assert agreement.compare_tables(pd.DataFrame(rows).assign(batch="A"), ["fa"], {}).empty


def test_sites_of_different_people(rng):
    """Nobody was at two of three sites: no ICC; Welch's interval of each site to the reference,
    or to the mean of all, which for B holds the true 2 less (0 + 2 + 0) / 3."""
    table = pd.DataFrame([
        {"participant": f"{b}{i}", "batch": b, "fa": rng.normal(2 * (b == "B"), 0.1)}
        for b in "ABC" for i in range(20)])
    found = {k: agreement.compare_tables(table, ["fa"], {}, k).set_index(["statistic", "batch"])
             for k in ("A", None)}
    assert set(found["A"].index) == {("unpaired_difference", b) for b in "BC"} | {
        ("auc", b) for b in "ABC"}
    b, mean = found["A"].loc[("unpaired_difference", "B")], found[None].loc[
        ("unpaired_difference", "B")]
    assert b["low"] < 2 < b["high"] < b["low"] + 0.2 and b["people"] == 40
    assert mean["low"] < 4 / 3 < mean["high"] and mean["people"] == 60
    assert len(found[None].loc["unpaired_difference"]) == 3
