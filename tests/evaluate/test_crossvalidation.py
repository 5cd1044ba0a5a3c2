"""Cross-validation of harmonizers, on heads scanned at two sites: the site's factors are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bidsapp import methods, sh, tensor
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import pack
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.evaluate import biology, crossvalidation
from bidsapp.harmonization import pairs
from bidsapp.registration import rigid
from support.travelling_heads import AXES, BVALS, NOISE, PEOPLE, head, sloppy_method, study

MANY = ("01", "02", "03", "04", "05", "06")


def counting(monkeypatch, module, name):
    """Calls of a function from now on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or function(*a, **k))
    return calls


def maps(signal, bvals, axes):
    """S/S0, FA and MD, by least squares of log S/S0."""
    acquisition = Acquisition(np.r_[0, bvals], np.r_[axes[:1], axes])
    # S0 = 1 is known: a row of it that outweighs all others
    weight = np.r_[1e6, np.ones(len(bvals))]
    x = tensor.design(acquisition.btensors) * weight[:, None]
    log = np.log(np.concatenate([np.ones((len(signal), 1)), signal], 1)) * weight
    d = np.linalg.lstsq(x, log.T, rcond=None)[0][[0, 1, 2, 1, 3, 4, 2, 4, 5]]
    e = np.linalg.eigvalsh(d.T.reshape(-1, 3, 3))
    md = e.mean(1)
    fa = np.sqrt(1.5 * np.square(e - md[:, None]).sum(1) / np.square(e).sum(1))
    return {"signal": signal, "fa": fa, "md": md}


def series(dwi, registration, l_max, shell=slice(3, None)):
    """S/S0 of a scan's series along its directions, on the target's grid."""
    c = pairs.resample(dwi, l_max, registration)[-1, 1:-1, 1:-1, 1:-1][registration.overlap]
    return c @ sh.basis(l_max, AXES[shell]).T


@pytest.mark.slow
def test_errors_are_those_of_their_formulae():
    """Errors of intensity warping, learned from the others and applied to 02, equal those by numpy
    and the tensor fit that the app uses."""
    method, (known, settings) = sloppy_method("harmonize_mica"), study(sites="ABC", folds=3)
    fitted = crossvalidation.fit(method, known, settings)
    (table, _), (model,) = fitted.tables.values(), fitted.checkpoints.values()
    assert list(fitted.tables) == ["desc-mica_folds", "desc-mica_biology"]
    assert list(table) == ["batch", "fold", "participant", "shell", "tissue", "measure", *(
        f"{k}_{when}" for k in ("nmse", "bias", "mean", "contrast") for when in (
            "before", "after"))]
    assert len(table) == 2 * 3 * 2 * 3, "batches, people, tissues, measures"
    assert model.card.training["participants"].keys() == set("ABC")
    for batch in "BC":
        own = table[(table["batch"] == batch) & (table["measure"] == "fa")
                    & (table["tissue"] == "wm")]
        for when in ("nmse_before", "nmse_after"):
            assert model.card.metrics[f"{when}_fa_wm_b1000_{batch}"] == pytest.approx(
                own[when].mean(), rel=1e-12)
    rest = known.statistics[known.statistics["participant"] != "02"]
    (model,) = method._fit(
        replace(known, statistics=rest), settings).checkpoints.values()
    source, target = head("02", "B"), head("02", "A")
    made = replace(source, signal=method.harmonize(source, model, "B", "cpu").signal)
    registration = pairs.register(source, target, deformable=False)
    fit = sh.smooth_fit(4, AXES[3:], 0.006)
    truth = (target.signal[:, 3:] / target.signal[:, :3].mean(1, keepdims=True))[
        registration.overlap[target.mask]] @ fit.T @ sh.basis(4, AXES[3:]).T
    before, after, truth = (maps(s, BVALS[3:], AXES[3:]) for s in (
        series(source, registration, 4), series(made, registration, 4), truth))
    labels = registration.labels[registration.overlap]
    rows = table[(table["participant"] == "02") & (table["batch"] == "B")]
    assert len(rows) == 6
    for row in rows.to_dict("records"):
        kept, measure = labels == tissue.NAMES[row["tissue"]], row["measure"]
        for when, found in (("nmse_before", before), ("nmse_after", after)):
            error = np.square(found[measure][kept] - truth[measure][kept]).sum()
            assert row[when] == pytest.approx(
                error / np.square(truth[measure][kept]).sum(), rel=1e-3), (row, when)
            bias = (found[measure][kept] - truth[measure][kept]).mean()
            bias *= 1e-3 if measure == "md" else 1  # mm²/s
            assert row[when.replace("nmse", "bias")] == pytest.approx(bias, rel=1e-2), (row, when)


def test_degree_of_the_series_follows_the_directions():
    """12 directions carry degree 2; five, or a sphere's, a mean and no tensor."""
    for count, b_delta, l_max in ((15, 1, 4), (12, 1, 2), (5, 1, 0), (12, 0, 0)):
        kept = slice(0, 3 + count)
        table = Acquisition(BVALS[kept], AXES[kept], np.where(BVALS[kept] > 0, b_delta, 1.0))
        source, target = (Dwi(d.signal[:, kept], d.mask, d.affine, table)
                          for d in (head("01", "B"), head("01", "A")))
        where = target.mask
        registration = pairs.Registration(where, np.where(where, tissue.WHITE, 0).astype(np.int8),
                          np.argwhere(where).T.astype(np.float32),
                          np.broadcast_to(np.eye(3, dtype=np.float32), (int(where.sum()), 3, 3)))
        rows = pd.DataFrame(crossvalidation.sum_squares(source, target, target, registration))
        white = rows[rows["tissue"] == "wm"].set_index("measure")
        assert set(white.index) == ({"signal", "fa", "md"} if l_max else {"signal"})
        basis = sh.basis(l_max, AXES[3:3 + count])
        own, truth = (d.signal[:, 3:] / d.mean_b0[:, None]
                      @ (basis @ sh.smooth_fit(l_max, AXES[3:3 + count], 0.006)).T
                      for d in (source, target))
        assert white["scale"]["signal"] == pytest.approx(np.square(truth).sum(), rel=1e-5)
        assert white["nmse_before"]["signal"] == pytest.approx(
            np.square(own - truth).sum(), rel=1e-3)
        assert white["bias_before"]["signal"] == pytest.approx((own - truth).sum(), rel=1e-3)
        assert white["mean_after"]["signal"] == pytest.approx(truth.sum(), rel=1e-3)
        assert white["voxels"]["signal"] == truth.size
        assert white["nmse_after"]["signal"] < 1e-6 * white["scale"]["signal"]


@pytest.mark.slow
def test_linear_rish_brings_those_near_whom_it_has_not_seen():
    """The site scales every degree, as the method assumes. With three people left in each batch."""
    fitted = crossvalidation.fit(sloppy_method("harmonize_rish"), *study(MANY, folds=2))
    (table, _), (model,) = fitted.tables.values(), fitted.checkpoints.values()
    assert list(fitted.tables) == ["desc-rish_folds", "desc-rish_biology"]
    assert table.groupby("participant")["fold"].nunique().to_dict() == dict.fromkeys(MANY, 1)
    assert table.groupby("fold")["participant"].nunique().to_dict() == {1: 3, 2: 3}
    signal = table[table["measure"] == "signal"]
    assert (signal["nmse_after"] < signal["nmse_before"] / 2).all()
    white = signal[signal["tissue"] == "wm"]["nmse_after"].mean()
    assert model.card.metrics["nmse_after_signal_wm_b1000"] == pytest.approx(white, rel=1e-12)
    assert all(len(p) == 6 for p in model.card.training["participants"].values())


@pytest.mark.slow
def test_a_fold_knows_nothing_of_those_it_is_tested_on():
    """Other scans of 03 change every model but that of the fold in which 03 is tested: the
    distribution that intensities are warped to, the scale of the loss and the network's weights."""
    method, models, tables = sloppy_method("harmonize_hybrid"), [], []
    fit = method._fit

    def recorded(known, settings):
        fitted = fit(known, settings)
        models[-1].append((set(known.statistics["participant"]), fitted.checkpoints))
        return fitted

    method._fit = recorded
    for noise in (NOISE, 4 * NOISE):
        models.append([])
        fitted = crossvalidation.fit(method, *study(
            folds=3, max_steps=3, load=lambda run, noise=noise: head(
                run[:2], run[2], noise if run[:2] == "03" else NOISE)))
        tables.append(fitted.tables["desc-hybrid_folds"])
    table = tables[0]
    assert sorted(table["participant"].unique()) == list(PEOPLE)
    assert (table.groupby("participant")["fold"].nunique() == 1).all()
    assert len(table) == 3 * 2 * 3, "people, tissues, measures"
    assert [len(people) for people, _ in models[0]] == [3, 2, 2, 2], "all, then the folds"
    (own,) = set(table["fold"][table["participant"] == "03"])
    for number, ((people, one), (_, other)) in enumerate(zip(*models, strict=True)):
        (one,), (other,) = one.values(), other.values()
        tested = table["participant"][table["fold"] == number]
        assert not people & set(tested)
        assert "quantiles" in one.tensors and len(one.tensors) > 2
        for name, weights in one.tensors.items():
            assert bool((weights == other.tensors[name]).all()) == (number == own), (number, name)


def test_people_of_every_batch_are_dealt_evenly():
    """01 to 04 were in B, 05 to 08 in C: half of each in a fold."""
    whole, settings = study((*MANY, "07", "08"), "ABC", folds=2)
    table = whole.statistics
    left = (table["batch"] == "A") | ((table["batch"] == "B") == (table["participant"] < "05"))
    known = replace(whole, statistics=table[left])
    found = pairs.pair_runs(known.statistics, "A")
    parts = crossvalidation.split_folds(sloppy_method("harmonize_golkov"), known, settings, found)
    assert sorted(p for part in parts for p in part) == [*MANY, "07", "08"]
    assert [sum(p < "05" for p in part) for part in parts] == [2, 2]
    again = crossvalidation.split_folds(sloppy_method("harmonize_mica"), known, settings, found)
    assert again == parts, "the same for every method"


@pytest.mark.slow
def test_pairs_are_registered_once(tmp_path, monkeypatch):
    """By folds, by a second fit from the same states, and by another method; and with no other
    result. A file that breaks off is no registration."""
    calls = [counting(monkeypatch, *where) for where in ((pairs, "displacement"),
                                                         (rigid, "align"))]
    warping = methods.get("harmonize_mica")
    known = study(folds=3, states=tmp_path / "states", max_steps=2)
    first = crossvalidation.fit(warping, *known).tables["desc-mica_folds"]
    assert [len(c) for c in calls] == [3, 3]
    kept = sorted((tmp_path / "states").iterdir())
    assert len(kept) == 3 and all(p.name.startswith(pairs.PREFIX) for p in kept)
    second = crossvalidation.fit(methods.get("harmonize_mica"), *known).tables["desc-mica_folds"]
    recipe = {**sloppy_method("harmonize_golkov").settings("training"), "deformable": True}
    network = methods.get("harmonize_golkov")
    network.settings = lambda table: recipe
    made = crossvalidation.fit(network, *known)
    assert [len(c) for c in calls] == [3, 3]
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    kept[1].write_bytes(kept[1].read_bytes()[:1000])
    third = crossvalidation.fit(warping, *known).tables["desc-mica_folds"]
    assert [len(c) for c in calls] == [4, 4]
    pd.testing.assert_frame_equal(first, third, check_exact=True)
    # not kept, and learned from the same
    (one,), (other,) = (f.checkpoints.values() for f in (made, network._fit(
        *study(max_steps=2))))
    assert [len(c) for c in calls] == [7, 7]
    for name, weights in one.tensors.items():
        assert (other.tensors[name] == weights).all(), name


def test_another_scan_is_another_registration(tmp_path, monkeypatch):
    """Noise, masks, b-tables and how it is done all count."""
    calls = counting(monkeypatch, pairs, "_register")
    source, target = head("01", "B"), head("01", "A")

    def register(source=source, target=target, **how):
        return pairs.register(source, target, work_dir=tmp_path, **{
            "deformable": False, "rigid": np.eye(4), **how})

    first = register()
    again = register(replace(source, signal=np.asfortranarray(source.signal).copy("K")))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert getattr(again, name).dtype == value.dtype, name
    fewer = np.ones(len(BVALS), bool)
    fewer[5] = False
    table = Acquisition(np.where(BVALS > 0, 990.0, 0.0), AXES)
    shift = np.eye(4)
    shift[0, 3] = 1e-9
    count = len(calls)
    for number, more in enumerate((
            {"source": head("01", "B", 2 * NOISE)}, {"target": head("02", "A")},
            {"source": replace(source, acquisition=table)}, {"rigid": shift},
            {"target": Dwi(target.signal[:, fewer], target.mask, target.affine,
                           target.acquisition[fewer])}), 1):
        register(**more)
        assert len(calls) == count + number, more.keys()


@pytest.mark.parametrize("name,people,folds,message", [
    ("shresnet", PEOPLE, 4, "--folds 4: 3 participants were scanned at B and at A.* up to 3 folds"),
    ("shresnet", PEOPLE[:2], 2,
     "--folds 2: without .* sub-0[12], .* needs at least 2 participants"),
    ("shresnet", PEOPLE, 2, "without .* of one fold, sub-0., sub-0., .* needs at least 2 .*"
                            " More folds, up to 3, hold fewer"),
    ("mica", PEOPLE, 2, "needs at least 2 participants at every site; found A: 1, B: 1"),
    ("rish", PEOPLE, 3, "needs at least 3 participants at every site; found A: 2, B: 2")])
def test_folds_that_leave_nobody_are_refused(name, people, folds, message):
    """Before anything is read."""
    def load(run):
        raise AssertionError(run)

    with pytest.raises(UsageError, match=message):
        crossvalidation.fit(sloppy_method(f"harmonize_{name}"),
                            *study(people, folds=folds, load=load))


@pytest.mark.parametrize("name", ["mica", "rish"])
def test_groups_of_unlike_people_have_no_folds(name):
    whole, settings = study(MANY, folds=2)
    table = whole.statistics
    alone = table[(table["batch"] == "A") == (table["participant"] < "04")]
    with pytest.raises(UsageError, match="--folds 2: 0 participants were scanned at B and at A"):
        crossvalidation.fit(sloppy_method(f"harmonize_{name}"), replace(whole, statistics=alone),
                            settings)


@pytest.mark.slow
def test_weights_that_know_the_people_are_refused(tmp_path):
    method = sloppy_method("harmonize_golkov")
    (model,) = method.fit(*study(PEOPLE[:2], max_steps=2)).checkpoints.values()
    for file, content in pack(model).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=r"have learned from sub-01, sub-02\. The test needs"):
        crossvalidation.fit(method, *study(folds=3, init=tmp_path))
    with pytest.raises(UsageError, match="harmonize_shresnet are needed"):
        crossvalidation.fit(sloppy_method("harmonize_shresnet"), *study(folds=3, init=tmp_path))
    others = study(("04", "05", "06"), folds=3, max_steps=2, init=tmp_path)
    assert crossvalidation.fit(method, *others).tables


def test_scans_that_are_not_harmonized_are_named(monkeypatch):
    method = sloppy_method("harmonize_mica")

    def refuse(*_):
        raise Refusal("no signal above 0 was found.")

    monkeypatch.setattr(method, "harmonize", refuse)
    with pytest.raises(UsageError, match=r"--folds 3: 0.B cannot be harmonized\. no signal"):
        crossvalidation.fit(method, *study(folds=3))


@pytest.mark.slow
def test_two_scans_of_a_person_are_one_row(monkeypatch):
    """The same scan twice has the errors of one; it is harmonized once for each."""
    known, settings = study(folds=3)
    one, _ = crossvalidation.fit(sloppy_method("harmonize_mica"), known, settings).tables.values()
    table = known.statistics
    twice = table[table["batch"] == "B"].assign(run=lambda t: t["run"] + "2")
    method = sloppy_method("harmonize_mica")
    calls = counting(monkeypatch, method, "harmonize")
    rows = pd.concat([table, twice], ignore_index=True)
    both, _ = crossvalidation.fit(method, replace(
        known, statistics=rows, acquisitions=dict.fromkeys(
            rows["run"], known.acquisitions["01A"])), settings).tables.values()
    assert len(calls) == 6
    pd.testing.assert_frame_equal(both, one, rtol=1e-6)


def test_models_that_make_it_worse_say_so():
    """A bias of FA that grows by 2 % of its mean is told, one by 0.5 % is not; and errors that
    rise, whatever the tissue."""
    def doubts(bias_after, nmse_after):
        return crossvalidation.describe_deterioration(pd.DataFrame([{
            "batch": "B", "shell": "b1000", "tissue": "wm", "measure": measure, "fold": 1,
            "participant": "01", "nmse_before": 0.1, "nmse_after": nmse_after,
            "bias_before": 0.001, "bias_after": bias_after, "mean_before": 0.401,
            "mean_after": 0.4 + bias_after} for measure in ("signal", "fa")]), biology.judge_folds(
                pd.DataFrame(columns=crossvalidation.ROW), pd.DataFrame()))

    assert doubts(-0.003, 0.05) == []
    (bias,) = doubts(-0.009, 0.05)
    assert ("the mean bias in held-out participants grew for 1 of 1 measures, most for FA in "
            "white matter, b1000, B (from +0.001 to -0.009). Do not use this model.") in bias
    (error,) = doubts(0.0, 0.11)
    assert ("error in held-out participants grew for 2 of 2 measures, most for signal in white "
            "matter, b1000, B (+10 %); FA") in error
