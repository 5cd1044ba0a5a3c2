"""Effects of age, sex and contrast after harmonization, against known ones: analytic effects,
smoothing that must be noticed, noise removal that must not."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.evaluate import biology, crossvalidation
from bidsapp.evaluate.biology import Ratio
from bidsapp.harmonization import pairs
from bidsapp.kinds import Harmonized
from support.travelling_heads import AFFINE, AXES, BVALS, head, sloppy_method, study

AGES = np.linspace(20, 80, 12)


@pytest.mark.parametrize("ages", [AGES, np.array([20.0, 40, 60, 80])])
def test_intervals_of_a_ratio_cover(rng, ages):
    """A slope of 0.02 of which 0.7 is left, residuals that correlate by 0.8: 95 % of intervals hold
    0.7 (those without ends do), with a standard error of 0.5 % for 2000 samples; of few people,
    too, whose residuals are smaller here so that intervals have ends."""
    inside = ends = 0
    covariance = np.array([[0.04, 0.032], [0.032, 0.04]]) * (1 if len(ages) > 4 else 0.02)
    for _ in range(2000):
        noise = rng.multivariate_normal([0, 0], covariance, len(ages))
        before, after = 0.02 * ages + noise[:, 0], 0.014 * ages + noise[:, 1]
        found = biology.ratio_of_effects(before, after, ages)
        ends += np.isfinite(found.low)
        inside += not np.isfinite(found.low) or found.low <= 0.7 <= found.high
    assert ends > 1900
    assert abs(inside / 2000 - 0.95) < 0.02


def test_ratio_of_exact_effects(rng):
    """On a line nothing is uncertain; slopes are those of numpy; without a slope nothing is told;
    a mean's ratio is within its interval, which shrinks where people agree."""
    found = biology.ratio_of_effects(1 + 0.5 * AGES, 3 - 0.1 * AGES, AGES)
    assert found == pytest.approx((0.5, -0.1, -0.2, -0.2, -0.2))
    values = rng.normal(size=(2, 12))
    found = biology.ratio_of_effects(*values, AGES)
    assert found[:2] == pytest.approx([np.polyfit(AGES, v, 1)[0] for v in values])
    flat = rng.normal(size=12)
    flat -= np.polyval(np.polyfit(AGES, flat, 1), AGES)
    assert not np.isfinite(biology.ratio_of_effects(flat, flat + 1, AGES).low)
    mean = biology.ratio_of_effects(10 + values[0], 8 + values[0])
    assert mean.low < mean.ratio < mean.high
    assert mean.ratio == pytest.approx((8 + values[0].mean()) / (10 + values[0].mean()))
    assert mean.high - mean.low < 0.1


@pytest.mark.parametrize("ratio,reference,expected", [
    ((1, 0.97, 0.97, 0.91, 1.02), np.nan, biology.KEPT),
    ((1, 0.7, 0.7, 0.55, 0.85), np.nan, biology.LOST),
    ((1, -0.5, -0.5, -0.7, -0.2), np.nan, biology.LOST),
    ((1, 0.7, 0.7, 0.5, 0.95), np.nan, biology.LOST),
    ((1, 0.7, 0.7, 0.4, 1.1), np.nan, biology.OPEN),
    ((1, 0.95, 0.95, 0.85, 0.99), np.nan, biology.OPEN),
    ((1, 0.7, 0.7, np.nan, np.nan), np.nan, biology.OPEN),
    ((1, 0.7, 0.7, 0.55, 0.85), 0.75, biology.REFERENCE),
    ((1, 0.7, 0.7, 0.55, 0.85), 0.95, biology.LOST),
    ((1, 0.7, 0.7, 0.55, 0.85), -0.1, biology.LOST),
    ((1, 1.2, 1.2, 1.05, 1.4), np.nan, biology.GROWN),
    ((1, 1.2, 1.2, 1.05, 1.4), 1.15, biology.REFERENCE),
    ((1, 1.2, 1.2, 1.05, 1.4), 1.0, biology.GROWN),
    ((1, 1.2, 1.2, 0.95, 1.5), np.nan, biology.KEPT),
    ((1, 1.05, 1.05, 1.01, 1.1), np.nan, biology.KEPT)])
def test_verdicts(ratio, reference, expected):
    assert biology.verdict(Ratio(*ratio), reference) == expected


def test_neighbours_share_a_face_and_a_label():
    labels = np.array([[[1, 1, 0], [2, 1, 0]], [[1, 0, 3], [2, 2, 3]]])
    inside = labels != 3
    inside[0, 1, 2] = False
    row = np.full(labels.shape, -1)
    row[inside] = np.arange(inside.sum())
    wanted = {(row[a], row[b]) for a, b in [
        ((0, 0, 0), (0, 0, 1)), ((0, 0, 1), (0, 1, 1)), ((0, 0, 0), (1, 0, 0)),
        ((0, 1, 0), (1, 1, 0)), ((1, 1, 0), (1, 1, 1))]}
    assert {tuple(p) for p in biology.neighbours(inside, labels).T.tolist()} == wanted


def wave_rows(change):
    """`squares` of FA of a scan and of what is changed of it, over white matter whose anisotropy
    is a wave of eight voxels' length; noise of its own in the scan and in the reference's."""
    rng, shape = np.random.default_rng(4), (24, 24, 8)
    mask = np.ones(shape, bool)
    x, y, _ = np.indices(shape)
    radial = 0.5e-3 + 0.15e-3 * (np.sin(2 * np.pi * x / 8) + np.sin(2 * np.pi * y / 8))
    along = AXES[:, 0] ** 2
    clean = np.exp(-BVALS * (radial[mask][:, None] * (1 - along) + 1.6e-3 * along))
    dwis = [Dwi((clean + sd * rng.standard_normal(clean.shape)).astype(np.float32), mask,
                AFFINE, Acquisition(BVALS, AXES)) for sd in (0.02, 0.02, 0)]
    source, target, truth = dwis
    registration = pairs.Registration(
        mask, np.full(shape, 2, np.int8), np.argwhere(mask).T.astype(np.float32),
        np.broadcast_to(np.eye(3, dtype=np.float32), (int(mask.sum()), 3, 3)))
    made = change(source, truth)
    rows = pd.DataFrame(crossvalidation.sum_squares(source, made, target, registration))
    rows = rows[(rows["tissue"] == "wm") & (rows["measure"] != "signal")].set_index("measure")
    return rows["contrast_after"] / rows["contrast_before"]


def smoothed(dwi, sd):
    values = [gaussian_filter(dwi.unmask(column), sd)[dwi.mask] for column in dwi.signal.T]
    return Dwi(np.stack(values, 1), dwi.mask, dwi.affine, dwi.acquisition)


def test_smoothing_loses_contrast_and_denoising_does_not():
    """A Gaussian of SD 0.64 voxels (1.5 full width) leaves exp(−k²s²/2) = 0.88 of the wave's steps
    in signal, and about as much of the maps'; a perfect denoiser leaves all."""
    assert (wave_rows(lambda source, truth: source) == 1).all()
    np.testing.assert_allclose(wave_rows(lambda source, truth: truth), 1, atol=0.03)
    blurred = wave_rows(lambda source, truth: smoothed(source, 0.64))
    wanted = np.exp(-(2 * np.pi / 8 * 0.64) ** 2 / 2)
    np.testing.assert_allclose(blurred, wanted, atol=0.03)


def aged(age, left=1.0):
    """Diffusivities relative to those at 50, `left` of whose slope over age is left."""
    return 1 + 0.006 * left * (age - 50)


def powered(dwi, exponent):
    """S/S0 to a power: the tensor times that number, FA as it was."""
    s0 = dwi.mean_b0[:, None]
    ratio = np.maximum(dwi.signal / s0, 0.01)
    return replace(dwi, signal=np.where(BVALS < 50, dwi.signal, s0 * ratio ** exponent).astype(
        np.float32))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Ten people between 20 and 80 whose MD rises by 0.6 % a year, at two sites that differ in
    noise alone; and the age of whoever was measured so."""
    labels = [f"{i:02d}" for i in range(10)]
    ages = dict(zip(labels, np.linspace(20, 80, 10), strict=True))
    whose = {}

    def load(run):
        dwi = powered(head(run[:2], "A" if run[2] == "A" else "C"), aged(ages[run[:2]]))
        whose[float(dwi.signal.sum())] = ages[run[:2]]
        return dwi

    known, settings = study(labels, load=load, folds=2, states=tmp_path_factory.mktemp("states"))
    table = known.statistics.assign(age=known.statistics["participant"].map(ages), sex=[
        "FM"[int(p) % 2] for p in known.statistics["participant"]])
    return (replace(known, statistics=table, covariates=("age", "sex")), settings), whose


def guarded(known, monkeypatch, change):
    """Rows of the guard, and the card, where people are harmonized by a function of their scan."""
    method = sloppy_method("harmonize_mica")
    def again(dwi):
        return change(dwi).signal

    monkeypatch.setattr(method, "harmonize", lambda dwi, *_: Harmonized(
        again(dwi), again, no_intervals="a test"))
    fitted = crossvalidation.fit(method, *known)
    rows = fitted.tables["desc-mica_biology"].set_index(["effect", "measure", "tissue"])
    (model,) = fitted.checkpoints.values()
    return rows, model.card, fitted.notices


@pytest.mark.slow
def test_a_slope_that_is_lost_is_told_everywhere(people, monkeypatch):
    """0.7 of the slope of MD over age are left. Between the sexes there is no difference of which
    anything could be told."""
    known, whose = people

    def shrink(dwi):
        age = whose[float(dwi.signal.sum())]
        return powered(dwi, aged(age, 0.7) / aged(age))

    rows, card, notices = guarded(known, monkeypatch, shrink)
    for tissue in ("wm", "gm"):
        row = rows.loc[("age", "md", tissue)]
        assert row["ratio"] == pytest.approx(0.7, abs=0.03) and row["verdict"] == biology.LOST
        assert row["low"] < row["ratio"] < row["high"] < 0.8
        assert row["reference"] == pytest.approx(row["before"], rel=0.05)
        assert rows.loc[("sex", "md", tissue), "verdict"] == biology.OPEN
    assert card.metrics["kept_age_md_wm_b1000"][0] == pytest.approx(0.7, abs=0.03)
    (warning,) = [w for w in card.warnings if "was lost" in w]
    assert "slope over age of MD in white matter, b1000, B (ratio 0.7" in warning
    assert any(warning in notice for notice in notices)


@pytest.mark.slow
def test_what_is_unchanged_is_kept_and_smoothing_is_noticed(people, monkeypatch):
    known, _ = people
    rows, card, _ = guarded(known, monkeypatch, lambda dwi: dwi)
    np.testing.assert_allclose(rows["ratio"], 1)
    assert set(rows["verdict"]) <= {biology.KEPT, biology.OPEN}
    for kept in (("age", "md", "wm"), ("age", "md", "gm"), ("contrast", "fa", "wm")):
        assert rows.loc[kept, "verdict"] == biology.KEPT
    assert card.warnings == ()
    rows, card, _ = guarded(known, monkeypatch, lambda dwi: smoothed(dwi, 0.64))
    row = rows.loc[("contrast", "fa", "wm")]
    assert row["verdict"] == biology.LOST and row["ratio"] < 0.9
    assert any("local contrast of FA in white matter" in w for w in card.warnings)


def test_tables_of_people_who_may_have_taught(rng):
    """The harmonized column of 40 people keeps half of the slope of MD. The reference site, whose
    values are unchanged, has no row, and without age or sex there is no row at all."""
    age = rng.uniform(20, 80, 40)
    batch = np.repeat(["A", "B"], 20)
    md = 8e-4 + 2e-6 * age + rng.normal(0, 1e-5, 40)
    table = pd.DataFrame({
        "participant": [f"{i}" for i in range(40)], "batch": batch, "age": age, "dti_md_mean": md,
        "harmonized_dti_md_mean": np.where(batch == "A", md, md - 1e-6 * age)})
    combat = table[["participant", "batch", "dti_md_mean"]]
    found = biology.judge_in_sample(table, ["dti_md_mean"], {"combat": combat})
    (row,) = found.to_dict("records")
    assert (row["data"], row["batch"], row["effect"]) == ("harmonized", "B", "age")
    assert row["ratio"] == pytest.approx(0.5, abs=0.05) and row["verdict"] == biology.LOST
    (told,) = biology.name_effects(found, biology.LOST)
    assert told.startswith("slope over age of dti_md in the brain, B, harmonized (ratio 0.")
    other = combat.assign(dti_md_mean=combat["dti_md_mean"] * 1.01)
    found = biology.judge_in_sample(table, ["dti_md_mean"], {"combat": other})
    assert list(found["data"] + found["batch"]) == ["harmonizedB", "combatA", "combatB"]
    assert set(found["verdict"][1:]) == {biology.KEPT}
    # a second run of everyone that was not harmonized, at twice the diffusivity, counts nowhere
    again = table.assign(dti_md_mean=2 * md, harmonized_dti_md_mean=np.nan)
    twice = biology.judge_in_sample(pd.concat([table, again]), ["dti_md_mean"], {})
    assert twice["ratio"].iloc[0] == pytest.approx(row["ratio"])
    assert biology.judge_in_sample(table.drop(columns="age"), ["dti_md_mean"], {}).empty
