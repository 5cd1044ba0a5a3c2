"""ComBat: removes a known batch effect, keeps a known slope, refuses what it cannot carry."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import hadamard

from bidsapp import methods
from bidsapp.errors import Refusal, UsageError
from bidsapp.kinds import Cohort, TrainingSettings
from support import combat_package

FEATURES = tuple(f"f{i}" for i in range(12))
SLOPE = -0.02


@pytest.fixture
def table(rng):
    """200 people, two batches, 12 features with an age slope, an offset and a scale in batch B."""
    n = 200
    age = rng.uniform(20, 80, n)
    batch = np.repeat(["A", "B"], n // 2)
    offset = np.where(batch == "B", 1.5, 0)[:, None]
    scale = np.where(batch == "B", 1.6, 1)[:, None]
    values = 10 + SLOPE * age[:, None] + offset + scale * rng.normal(0, 0.3, (n, 12))
    return pd.DataFrame({"participant": [f"{i:03}" for i in range(n)], "batch": batch, "age": age,
                         **dict(zip(FEATURES, values.T, strict=True))})


def fit(table, **more):
    return methods.get("harmonize_combat").fit(Cohort(table, FEATURES, ("age",), **more),
                                               TrainingSettings())


def batch_effect(table):
    """Mean over features of |batch coefficient| / residual SD in y ~ 1 + batch + age."""
    x = np.stack([np.ones(len(table)), table["batch"] == "B", table["age"]], axis=1).astype(float)
    y = table[list(FEATURES)].to_numpy()
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    return np.mean(np.abs(beta[1]) / (y - x @ beta).std(axis=0))


def test_batch_effect_goes_and_age_stays(table):
    result = fit(table).tables["desc-combat_dwimap"]
    assert batch_effect(table) > 1
    assert batch_effect(result) < 0.1
    slopes = np.polyfit(result["age"], result[list(FEATURES)], 1)[0]
    standard_error = 0.3 * 1.6 / np.sqrt(len(table)) / table["age"].std()
    assert np.abs(slopes - SLOPE).max() < 4 * standard_error


def test_reference_batch_is_left_as_it_is(table):
    fitted = fit(table, reference_batch="A")
    result = fitted.tables["desc-combat_dwimap"]
    assert fitted.model["Batches"] == {"A": 100, "B": 100}
    assert not any(fitted.model["Gamma"]["A"]) and all(fitted.model["Gamma"]["B"])
    a = table["batch"] == "A"
    np.testing.assert_allclose(result.loc[a.to_numpy(), list(FEATURES)],
                               table.loc[a, list(FEATURES)], rtol=1e-6)


@pytest.fixture
def three(table, rng):
    """Three batches of 100, 73 and 27 people, the last shifted too; ages and sexes at random."""
    table = table.assign(age=table["age"].round(), sex=rng.permutation(np.repeat(["F", "M"], 100)))
    table.loc[173:, "batch"] = "C"
    table.loc[173:, FEATURES[:7]] += 0.5
    return table


@pytest.mark.parametrize("names", [(), ("age",), ("age", "sex")])
@pytest.mark.parametrize("reference", [None, "B"])
def test_the_equations_are_those_of_the_package(three, names, reference):
    """With neuroCombat's own stopping rule, the difference stays within what that lets open."""
    features, names = list(FEATURES), list(names)
    fitted = methods.get("harmonize_combat").fit(
        Cohort(three, FEATURES, tuple(names), reference), TrainingSettings())
    found = fitted.tables["desc-combat_dwimap"][features]
    wanted, estimates = combat_package.harmonize(
        three[features], three[["batch", *names]], reference)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    for ours, theirs in (("Gamma", "gamma.star"), ("Delta", "delta.star")):
        np.testing.assert_allclose([fitted.model[ours][b] for b in "ABC"], estimates[theirs],
                                   rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(fitted.model["Sigma"], np.sqrt(estimates["var.pooled"][:, 0]))
    wanted, _ = combat_package.harmonize(
        three[features], three[["batch", *names]], reference, tolerance=1e-4)
    assert (np.abs(found - wanted) / three[features].std()).to_numpy().max() < 1e-3


@pytest.mark.parametrize("reference", [None, "B"])
def test_the_model_harmonizes_new_participants(three, reference):
    """By the formula of the README, from what the JSON file holds."""
    fitted = methods.get("harmonize_combat").fit(
        Cohort(three, FEATURES, ("age", "sex"), reference), TrainingSettings())
    m, person = fitted.model, three.iloc[180]
    expected = (np.array(m["Alpha"]) + person["age"] * np.array(m["Beta"]["age"])
                + (person["sex"] == "M") * np.array(m["Beta"]["sex_M"]))
    z = (person[m["Features"]].to_numpy(float) - expected) / m["Sigma"]
    found = expected + m["Sigma"] * (z - m["Gamma"]["C"]) / np.sqrt(m["Delta"]["C"])
    np.testing.assert_allclose(
        found, fitted.tables["desc-combat_dwimap"].loc[180, m["Features"]].to_numpy(float))


def follows_from_age(table):
    return 3 + 0.1 * table["age"]


def constant_in_a_batch(table):
    return table["f1"].where(table["batch"] == "A", 0.25)


@pytest.mark.parametrize("value", [lambda t: 1.0, lambda t: 0.0, constant_in_a_batch,
                                   follows_from_age])
@pytest.mark.parametrize("reference", [None, "A"])
def test_a_constant_feature_alone_is_left_out(table, value, reference, caplog):
    spoilt = table.assign(f1=value(table))
    with caplog.at_level(logging.WARNING, "qsphere"):
        fitted = fit(spoilt, reference_batch=reference)
    (notice,) = fitted.notices
    assert notice.startswith("ComBat left out f1: ") and notice in caplog.text
    others = tuple(f for f in FEATURES if f != "f1")
    assert fitted.model["Features"] == list(others)
    method = methods.get("harmonize_combat")
    alone = method.fit(Cohort(spoilt, others, ("age",), reference), TrainingSettings())
    assert not alone.notices
    pd.testing.assert_frame_equal(fitted.tables["desc-combat_dwimap"],
                                  alone.tables["desc-combat_dwimap"])
    folds = method.cross_validate(Cohort(spoilt, FEATURES, ("age",), reference), halves(table))
    pd.testing.assert_frame_equal(folds, method.cross_validate(
        Cohort(spoilt, others, ("age",), reference), halves(table)))
    assert "f1" not in folds and np.isfinite(folds[list(others)]).to_numpy().all()


def test_features_with_the_same_effects_are_carried(table):
    """Nothing is left to learn of their spread: they are shrunk to themselves, not to NaN."""
    cohort = Cohort(table.assign(f1=table["f0"]), ("f0", "f1"))
    fitted = methods.get("harmonize_combat").fit(cohort, TrainingSettings())
    found = fitted.tables["desc-combat_dwimap"]
    assert np.isfinite(found[["f0", "f1"]]).to_numpy().all()
    assert batch_effect(table.assign(**dict.fromkeys(FEATURES, found["f0"]))) < 0.1


def test_runs_of_one_batch_are_averaged(table):
    twice = pd.concat([table, table])
    pd.testing.assert_frame_equal(fit(twice).tables["desc-combat_dwimap"],
                                  fit(table).tables["desc-combat_dwimap"])


def test_table_is_not_modified(table):
    before = table.copy()
    fit(table)
    pd.testing.assert_frame_equal(table, before)


def confounded(table):
    return table.assign(age=np.where(table["batch"] == "A", 30, 60) + table["age"] / 100)


def with_hole(table):
    return table.assign(f3=table["f3"].where(table["participant"] != "007"))


def few(table):
    return pd.concat([table[table["batch"] == "A"], table[table["batch"] == "B"][:2]])


@pytest.mark.parametrize("spoil,message", [
    (lambda t: t[t["batch"] == "A"], "at least two sites; found one"),
    (few, "at least 3 participants at every site; found A: 100, B: 2"),
    (with_hole, "f3 of sub-007 are NaN"),
    (confounded, "age is confounded with the site"),
    (lambda t: t.assign(**dict.fromkeys(FEATURES[1:], 1.0)),
     "1 that vary.*.f1, for example.*Needed are two"),
])
def test_refusals(table, spoil, message):
    with pytest.raises(UsageError, match=message):
        fit(spoil(table))


def together(table):
    """Two covariates, each fine alone, whose sum is the batch."""
    noise = np.random.default_rng(3).normal(size=len(table))
    return table.assign(a=noise, b=(table["batch"] == "B") - noise)


def nearly_together(table):
    noise = np.random.default_rng(4).normal(0, 0.05, len(table))
    return together(table).assign(b=lambda t: t["b"] + noise)


def small(table):
    """Eight people with four covariates that neither the batch nor each other explains."""
    orthogonal = hadamard(8)[:, [1, 2, 3, 5]]
    return table.iloc[[0, 1, 2, 3, 196, 197, 198, 199]].assign(
        **dict(zip("abcd", orthogonal.T, strict=True)))


@pytest.mark.parametrize("spoil,names,message", [
    (together, ("a", "b"), "b is determined by the site and the covariates before it .a."),
    (nearly_together, ("a", "b"), "a, b together are confounded with the site"),
    (lambda t: t.assign(months=12 * t["age"]), ("age", "months"), "months is determined by"),
    (small, ("a", "b", "c", "d"), "are too many for 8 rows"),
])
def test_covariates_that_cannot_be_told_apart(table, spoil, names, message):
    with pytest.raises(UsageError, match=message):
        methods.get("harmonize_combat").fit(Cohort(spoil(table), FEATURES[5:], names),
                                            TrainingSettings())


def test_text_that_differs_for_everyone_is_no_covariate(table):
    dated = table.assign(acq_time=[f"2020-01-01T00:{i // 60:02}:{i % 60:02}" for i in range(200)])
    method = methods.get("harmonize_combat")
    result = method.fit(Cohort(dated, FEATURES, ("age", "acq_time")), TrainingSettings())
    assert result.model["Covariates"] == ["age"]
    pd.testing.assert_frame_equal(result.tables["desc-combat_dwimap"],
                                  fit(table).tables["desc-combat_dwimap"])


def test_categorical_covariate_confounded(table):
    table = table.assign(sex=np.where(table["batch"] == "A", "F", "M"))
    with pytest.raises(UsageError, match="sex is confounded"):
        methods.get("harmonize_combat").fit(Cohort(table, FEATURES, ("sex",)), TrainingSettings())


def test_misspelt_reference_is_corrected(table):
    table = table.assign(batch=table["batch"].map({"A": "Oslo", "B": "Bergen"}))
    with pytest.raises(UsageError, match="Did you mean Oslo"):
        fit(table, reference_batch="Olso")


def test_no_features(table):
    with pytest.raises(UsageError, match="no map statistics"):
        methods.get("harmonize_combat").fit(Cohort(table), TrainingSettings())


def test_images_are_refused():
    from bidsapp.acquisition import Acquisition

    with pytest.raises(Refusal, match="group --train harmonize_combat"):
        methods.get("harmonize_combat").check(Acquisition(np.zeros(1), np.zeros((1, 3))))


def halves(table):
    people = table["participant"].unique()
    return [people[::2], people[1::2]]


@pytest.mark.parametrize("reference", [None, "A"])
def test_cross_validation_applies_what_others_teach(table, rng, reference):
    """The batch goes and the slope stays of those not learned from; a person's own values do not
    change what is learned. Applied to those learned from, it is what `fit` makes of them."""
    table = table.assign(sex=rng.permutation(np.repeat(["F", "M"], 100)))
    cohort = Cohort(table, FEATURES, ("age", "sex"), reference)
    method, features = methods.get("harmonize_combat"), list(FEATURES)
    found = method.cross_validate(cohort, halves(table))
    assert list(found["participant"]) == list(table["participant"])
    assert batch_effect(found) < 0.3 < 1 < batch_effect(table)
    slopes = np.polyfit(found["age"], found[features], 1)[0]
    assert np.abs(slopes - SLOPE).max() < 5 * 0.3 * 1.6 / np.sqrt(200) / table["age"].std()
    other = table.copy()
    other.loc[0, features] += 5
    again = method.cross_validate(Cohort(other, FEATURES, ("age", "sex"), reference), halves(table))
    taught = again["participant"].isin(halves(table)[0]) & (again.index != 0)
    pd.testing.assert_frame_equal(again[taught], found[taught])
    if reference:
        home = (table["batch"] == reference).to_numpy()
        np.testing.assert_allclose(found.loc[home, features], table.loc[home, features])
    twins = pd.concat([table, table.assign(participant="twin" + table["participant"])])
    twin = method.cross_validate(Cohort(twins, FEATURES, ("age", "sex"), reference), [
        table["participant"].unique(), ("twin" + table["participant"]).unique()])
    own = method.fit(cohort, TrainingSettings()).tables["desc-combat_dwimap"]
    np.testing.assert_allclose(
        twin[~twin["participant"].str.startswith("twin")][features], own[features], rtol=1e-12)


def test_cross_validation_without_a_batch_is_refused(table):
    table = pd.concat([table, table[:3].assign(batch="C", participant=["c0", "c1", "c2"])])
    with pytest.raises(UsageError, match="no participant of site C is left to learn from"):
        methods.get("harmonize_combat").cross_validate(
            Cohort(table, FEATURES, ("age",)), [["c0", "c1", "c2"]])
    with pytest.raises(UsageError, match="found A: 100, B: 100, C: 2"):
        methods.get("harmonize_combat").cross_validate(Cohort(table, FEATURES), [["c0"]])
