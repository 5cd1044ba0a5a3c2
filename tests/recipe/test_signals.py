"""The measurements that an upsampler adds: by number, by table, by its training."""

from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bidsapp import cli, methods, upsample
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.bids import btable
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.recipe.signals import choose_target, summarize_round_trip
from bidsapp.report.upsampling import of_directions, of_round_trip

AFFINE = np.array([[-2.0, 0, 0, 40], [0, 0, 2.5, -30], [0, 2, 0, -20], [0, 0, 0, 1]])
"""Radiological and with swapped axes, so that image and world axes differ."""

ANY = SimpleNamespace(
    name="upsample_any", target=lambda acquisition: None,
    shells=lambda acquisition: [s for s in acquisition.shells if abs(s.b_delta) > 0.1])


def shell(b, count, b_delta=1.0):
    return Acquisition(np.full(count, b), upsample.spread(np.zeros((0, 3)), count),
                       np.full(count, b_delta))


TABLE = concatenate([Acquisition([0.0], [[0, 0, 0]]), shell(1000, 12), shell(2000, 20)])


def options(*more):
    return cli.parse(["/in", "/out", "participant", "--upsample", "any", *map(str, more)])


def angles(a, b):
    return np.degrees(np.arccos(np.abs(a @ b.T).clip(0, 1)))


def test_each_shell_is_filled_up_and_stays_spread():
    target, notices = choose_target(ANY, TABLE, AFFINE, options("--target-directions", 30))
    assert [(s.b, len(s)) for s in target.shells] == [(1000, 18), (2000, 10)] and not notices
    for b in (1000, 2000):
        whole = np.concatenate([t.bvecs[t.bvals == b] for t in (TABLE, target)])
        apart = angles(whole, whole) + 180 * np.eye(30)
        assert apart.min() > 12  # an even spread of 30 has 22°, independent new ones about 1°
    assert len(choose_target(ANY, TABLE, AFFINE, options())[0]) == 2 * 90 - 32
    with pytest.raises(Refusal, match=r"12 directions per shell are asked for.*larger number"):
        choose_target(ANY, TABLE, AFFINE, options("--target-directions", 12))


def test_a_shell_without_directions_gets_none_and_a_planar_one_keeps_its_shape():
    mixed = concatenate([TABLE, shell(1000, 8, -0.5), shell(1000, 6, 0.0)])
    target, _ = choose_target(ANY, mixed, AFFINE, options("--target-directions", 12))
    assert [(s.b, s.b_delta, len(s)) for s in target.shells] == [(1000, -0.5, 4)]


@pytest.mark.parametrize("name", ["upsample_sh", "upsample_scnn"])
def test_a_shell_that_the_method_cannot_use_is_left_as_it_is(name):
    few = concatenate([TABLE, shell(200, 3)])
    target, notices = choose_target(methods.get(name), few, AFFINE,
                                    options("--target-directions", 24))
    assert [(s.b, len(s)) for s in target.shells] == [(1000, 12), (2000, 4)]
    assert "3 × b 200" in notices[0]


def test_directions_of_a_model_are_the_only_ones_that_it_adds():
    fixed = SimpleNamespace(name="upsample_fixed", target=lambda acquisition: TABLE[1:4],
                            shells=lambda acquisition: [])
    assert choose_target(fixed, TABLE, AFFINE, options())[0] == TABLE[1:4]
    with pytest.raises(Refusal, match="3 directions that it was trained for"):
        choose_target(fixed, TABLE, AFFINE, options("--target-directions", 30))


def test_a_table_is_read_in_the_frame_of_its_image(tmp_path):
    """The same world direction: along x of the run's image, of another image, and of MRtrix."""
    world = np.array([[0.6, 0.8, 0], [0, 0.6, -0.8]])
    bvec = tmp_path / "new.bvec"

    def wanted(table, *files):
        return choose_target(ANY, TABLE, AFFINE, options("--target-bvecs", table))[0]

    bvec.write_text(btable.text(btable.to_fsl(Acquisition([1000.0, 1000], world), AFFINE)))
    of_run = wanted(bvec)
    assert [(s.b, len(s)) for s in of_run.shells] == [(1000, 2), (2000, 2)]
    np.testing.assert_allclose(of_run.bvecs[:2], world, atol=1e-7)
    other = np.diag([3.0, 3, 3, 1])
    bvec.write_text(btable.text(btable.to_fsl(Acquisition([1000.0, 1000], world), other)))
    assert np.abs(wanted(bvec).bvecs[:2] - world).max() > 0.5  # the run's axes are others
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2), np.float32), other), tmp_path / "new.nii.gz")
    np.testing.assert_allclose(wanted(bvec).bvecs[:2], world, atol=1e-7)
    (tmp_path / "new.bval").write_text("1000 0\n")
    assert len(wanted(bvec)) == 1
    (tmp_path / "new.b").write_text("# x y z b\n0.6 0.8 0 1500\n0 0.6 -0.8 0\n")
    of_mrtrix = wanted(tmp_path / "new.b")
    np.testing.assert_allclose(of_mrtrix.bvecs, world[:1], atol=1e-7)
    assert of_mrtrix.bvals == 1500


def test_what_was_measured_is_not_predicted(tmp_path):
    table = tmp_path / "new.b"
    rows = [[*-TABLE.bvecs[3], 1010], [*TABLE.bvecs[3], 2000], [*TABLE.bvecs[3], 3000]]
    np.savetxt(table, rows)
    target, notices = choose_target(ANY, TABLE, AFFINE, options("--target-bvecs", table))
    assert target.bvals.tolist() == [2000, 3000] and "1 of 3 measurements" in notices[0]
    np.savetxt(table, rows[:1])
    with pytest.raises(Refusal, match="other directions is needed"):
        choose_target(ANY, TABLE, AFFINE, options("--target-bvecs", table))


def test_repeats_and_antipodes_count_once(tmp_path):
    """Among the targets of a table, and among the measured directions that are filled up."""
    table = tmp_path / "new.b"
    axes = upsample.spread(TABLE.bvecs[1:], 4)
    np.savetxt(table, np.column_stack([np.vstack([axes, -axes, axes[:2]]), np.full(10, 1000)]))
    target, notices = choose_target(ANY, TABLE, AFFINE, options("--target-bvecs", table))
    np.testing.assert_allclose(target.bvecs, axes)
    assert notices == ["6 of 10 measurements in new.b repeat another one or its antipode, and are "
                       "not predicted again."]
    twice = concatenate([TABLE[:13], replace(TABLE[1:13], bvecs=-TABLE.bvecs[1:13]), TABLE[1:13]])
    assert len(choose_target(ANY, twice, AFFINE, options("--target-directions", 30))[0]) == 18


def test_a_table_without_b_values_names_the_shells_that_get_none(tmp_path):
    few = concatenate([TABLE, shell(200, 3)])
    table = tmp_path / "new.bvec"
    np.savetxt(table, upsample.spread(TABLE.bvecs[1:], 4).T)
    target, notices = choose_target(methods.get("upsample_sh"), few, AFFINE,
                                    options("--target-bvecs", table))
    assert {s.b for s in target.shells} == {1000, 2000} and "3 × b 200" in notices[0]


@pytest.mark.parametrize(("name", "text", "match"), [
    ("t.bvec", "1 0\n0 0\n0 0.5\n", "vector 1 has length 0.5.*add the .bval"),
    ("t.b", "1 0 0\n0 1 0\n", "rows of 4 numbers"),
    ("t.b", "1 1 0 1000\n", r"t\.b: the b-vector of volume 0 has length 1\.41"),
    ("t.bvec", "a b\n", "not a finite number")])
def test_a_broken_table_says_what_it_needs(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        btable.read_target(tmp_path / name, AFFINE)
    with pytest.raises(DataError, match=r"does not exist\. Correct the path"):
        btable.read_target(tmp_path / "none.bvec", AFFINE)


def test_tables_of_other_lengths_are_refused(tmp_path):
    (tmp_path / "t.bvec").write_text("1 0\n0 1\n0 0\n")
    (tmp_path / "t.bval").write_text("1000\n")
    with pytest.raises(DataError, match=r"2 vectors and t\.bval 1 b-values"):
        btable.read_target(tmp_path / "t.bvec", AFFINE)


@pytest.mark.parametrize(("more", "match"), [
    (["--target-directions", "0", "--upsample", "sh"], "at least 1"),
    (["--target-directions", "1001", "--upsample", "sh"], "at most 1000 are allowed"),
    (["--target-directions", "60"], "belongs to --upsample"),
    (["--upsample", "sh", "--target-directions", "60", "--target-bvecs", "x.bvec"],
     "Give one of them")])
def test_options_of_the_target_are_checked(more, match):
    with pytest.raises(UsageError, match=match):
        cli.parse(["/in", "/out", "participant", *more])


def test_a_round_trip_is_summarised_in_units_of_the_noise():
    trip = pd.DataFrame({"rmse": [2.0, 4, 9], "correlation": [0.9, 0.8, 0.1],
                         "coverage": [np.nan] * 3})
    assert summarize_round_trip(trip, 2.0) == {
        "roundtrip_rmse": 2.0, "roundtrip_correlation": 0.8, "roundtrip_coverage": None}
    assert summarize_round_trip(trip, None)["roundtrip_rmse"] is None


def test_vectors_of_length_zero_are_b0_volumes(tmp_path):
    """As in the table of every scanner, also without its .bval."""
    (tmp_path / "t.bvec").write_text("0 1 0\n0 0 1\n0 0 0\n")
    bvecs, bvals = btable.read_target(tmp_path / "t.bvec", np.eye(4))
    assert bvals is None and np.abs(bvecs).tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(("name", "kind", "meant"), [
    ("foo", "upsample", ""), ("sh", "denoise", ""), ("scn", "upsample", "upsample_scnn"),
    ("upsample_gpp", "upsample", "upsample_gp")])
def test_only_similar_methods_are_suggested(name, kind, meant):
    with pytest.raises(UsageError) as refused:
        methods.find(name, kind)
    assert str(refused.value).endswith(f"Did you mean {meant}?" if meant else ".")


def test_figures_show_new_directions_beside_the_given_ones():
    """Also targets of a b that was not measured; the RMSE is in units of the noise."""
    target = concatenate([shell(1000, 20)[12:], shell(3000, 5)])
    drawn = of_directions(TABLE, target)
    assert "12 given, 8 predicted" in drawn.svg.decode() and "0 given, 5" in drawn.svg.decode()
    trip = pd.DataFrame({"volume": [1, 2], "b": 1000.0, "b_delta": 1.0, "rmse": [20.0, 30.0],
                         "correlation": 0.9, "coverage": 0.9})
    assert "units of the noise" in of_round_trip(trip, 20.0).svg.decode()
