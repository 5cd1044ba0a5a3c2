"""Linear RISH on heads whose site effect is exactly what it assumes: degrees scaled by known maps.

All people have the head of `synthetic_head` at half its resolution and diffusivities of their own;
at site B the degrees of S/S0 are scaled, by factors that differ from back to front.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.transform import Rotation

from bidsapp import kinds, methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import pack
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.harmonization import harmonizer
from bidsapp.options import PhantomOptions
from bidsapp.phantom import recruit
from bidsapp.registration import template
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import Image, sample
from support import bids_tree, synthetic_head

SCALE = {0: 0.92, 2: 0.8, 4: 1.2}
SLOPE = 0.003  # per mm, from back to front
NOISE = 0.004
ZOOMS = 2 * np.array(synthetic_head.ZOOMS)
AFFINE = np.diag([*ZOOMS, 1.0])
AFFINE[:3, 3] = -60, -70, -50
BVALS, AXES = bids_tree.table(((0, 3), (1000, 30)))
LABELS = synthetic_head.tissues()[::2, ::2, ::2]
MASK = LABELS > 0
WHITE = (LABELS == 4)[MASK]
CORE = binary_erosion(LABELS == 4)[MASK]
MOVE = np.eye(4)
MOVE[:3, :3] = Rotation.from_euler("xyz", [6, -5, 8], degrees=True).as_matrix()
MOVE[:3, 3] = 8.0, -5.0, 4.0
BASIS = sh.basis(4, AXES[3:])


def factors():
    """(voxel, coefficient) by which site B multiplies."""
    y = (np.argwhere(MASK) @ AFFINE[:3, :3].T)[:, 1]
    return np.array([SCALE[l] for l in sh.degrees(4)]) * (1 + SLOPE * (y - y.mean()))[:, None]


def head(person, site, noise=NOISE, pose=None):
    """A scan; with `pose`, of the head elsewhere in the scanner."""
    clean, _ = synthetic_head.signal(LABELS, BVALS, AXES, np.random.default_rng(person), noise=0)
    weighted = clean[MASK][:, 3:] / synthetic_head.S0
    # only what degree 4 can hold, lest truth and fit differ by the degrees above
    c = weighted @ np.linalg.pinv(BASIS).T
    if site == "B":
        c = c * factors()
    values = np.concatenate([np.ones((len(c), 3)), c @ BASIS.T], 1)
    values += noise * np.random.default_rng([person, ord(site)]).standard_normal(values.shape)
    acquisition = Acquisition(BVALS, AXES)
    if pose is not None:
        acquisition = acquisition.rotated(pose[:3, :3])
    return Dwi((800 * values).astype(np.float32), MASK, AFFINE if pose is None else pose @ AFFINE,
               acquisition)


def study(rows=None, load=None, covariates=(), reference_batch="A"):
    """rows: (participant, batch, …covariates)."""
    rows = rows or [(i, b) for i in range(3) for b in "AB"]
    table = pd.DataFrame(rows, columns=["participant", "batch", *covariates])
    table["run"] = [f"{p}{b}" for p, b in zip(table["participant"], table["batch"], strict=True)]
    table["snr_b0"] = 200.0
    known = Acquisition(BVALS, AXES)
    return kinds.Cohort(
        table, (), covariates, reference_batch, dict.fromkeys(table["run"], known),
        load or (lambda run: head(int(run[:-1]), run[-1])),
        voxel_sizes={r: tuple(ZOOMS) for r in table["run"]})


@cache
def trained():
    method = methods.get("harmonize_rish")
    (checkpoint,) = method.fit(study(), kinds.TrainingSettings()).checkpoints.values()
    return method, checkpoint


def coefficients(signal):
    return (signal[:, 3:] / signal[:, :3].mean(1, keepdims=True)) @ np.linalg.pinv(BASIS).T


@pytest.mark.slow
def test_scales_are_those_of_the_site():
    """The same people at both sites: what remains is noise and registration. In white matter, where
    every degree has a signal; elsewhere degrees above 0 are noise, whose ratio is 1. The core is a
    voxel away from other tissue, where none can leak in."""
    _, checkpoint = trained()
    maps = checkpoint.tensors["shell-1000"].numpy()
    affine = np.array(checkpoint.card.constants["affine"])
    points = transform_points(AFFINE, np.argwhere(MASK))
    wanted = 1 / factors()[:, [0, 1, 6]]
    for i in range(3):
        found = sample(maps[i], affine, points)
        ratio = found / wanted[:, i]
        assert abs(np.median(ratio[WHITE]) - 1) < 0.01, i
        # registered to half a voxel, or better
        assert np.median(np.abs(ratio[CORE] - 1)) < SLOPE * ZOOMS[1] / 2, i
        assert np.corrcoef(found[CORE], wanted[CORE, i])[0, 1] > 0.9, i
    # one number for all places would be further off
    assert np.abs(wanted[CORE, 0] / np.median(wanted[CORE, 0]) - 1).mean() > 2 * SLOPE * ZOOMS[1]


@pytest.mark.parametrize("pose", [None, MOVE], ids=["in place", "moved"])
@pytest.mark.slow
def test_new_person_becomes_the_reference(pose):
    """Somebody not in the training, where the others lay and elsewhere, turned, in the scanner."""
    method, checkpoint = trained()
    truth = coefficients(head(20, "A", noise=0).signal)
    dwi = head(20, "B", pose=pose)
    made = method.harmonize(dwi, checkpoint, "B", "cpu")
    before, after = (np.square(s @ np.linalg.pinv(BASIS).T - truth)[WHITE] for s in (
        dwi.signal[:, 3:] / 800, made.signal[:, 3:] / 800))
    for l in (0, 2, 4):
        where = sh.degrees(4) == l
        assert after[:, where].mean() < 0.35 * before[:, where].mean(), l
    np.testing.assert_array_equal(made.signal[:, :3], dwi.signal[:, :3])
    assert made.parameters["TemplateCorrelation"] > 0.8 and not made.notices
    assert made.counts == {"rish_unchanged": 0, "rish_clipped_values": 0}


@pytest.mark.slow
def test_shape_of_every_degree_stays():
    """Degrees are scaled by one number: coefficients within each are parallel to the input's."""
    method, checkpoint = trained()
    dwi = head(20, "B")
    fit = sh.smooth_fit(4, AXES[3:], 1e-5)
    own = (dwi.signal[:, 3:] / dwi.mean_b0[:, None]) @ fit.T
    new = coefficients(method.harmonize(dwi, checkpoint, "B", "cpu").signal)
    for l in (2, 4):
        a, b = own[:, sh.degrees(4) == l], new[:, sh.degrees(4) == l]
        size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        clear = size > 1e-6
        assert clear.sum() > 500
        assert ((a * b).sum(1) / np.maximum(size, 1e-12))[clear].min() > 1 - 1e-5


@pytest.mark.slow
def test_card():
    method = methods.get("harmonize_rish")
    fitted = method.fit(study(), kinds.TrainingSettings())
    (name,) = fitted.checkpoints
    card = fitted.checkpoints[name].card
    assert name == "harmonize_rish_B-to-A"
    assert (card.reference_batch, card.batches) == ("A", ("B",))
    assert card.trained_for.voxel_size == ((6.8, 6.8), (7.0, 7.0), (7.2, 7.2))
    assert {b: len(p) for b, p in card.training["participants"].items()} == {"A": 3, "B": 3}
    assert card.metrics["template_correlation"] > 0.8
    assert abs(card.metrics["scale_b1000_l0"] * SCALE[0] - 1) < 0.03
    assert card.metrics["bounded_b1000_l0"] == 0
    assert not fitted.notices
    assert pack(fitted.checkpoints[name]) == pack(trained()[1]), "the same training, the same bytes"


@pytest.mark.parametrize("rows,doubts", [
    ([(i, b) for i in range(3) for b in "AB"], []),
    ([(i, b) for i in range(4) for b in "AB" if (i, b) != (3, "B")],
     ["A has 4 participants, B has 3 participants. Mean RISH is stable from 16"]),
    ([(i, "AB"[i % 2]) for i in range(6)],
     ["A has 3 participants, B has 3 participants. Mean RISH is stable from 16"])])
def test_few_people_are_told_unless_they_are_the_same(rows, doubts):
    told = methods.get("harmonize_rish").preflight(study(rows))
    assert [sentence[:len(doubt)] for sentence, doubt in zip(told, doubts, strict=True)] == doubts


@pytest.mark.slow
def test_several_batches_share_a_template():
    rows = [(i, "ABC"[i % 3]) for i in range(9)]
    fitted = methods.get("harmonize_rish").fit(study(rows, load=lambda run: head(
        int(run[:-1]), "B" if run[-1] == "B" else "A")), kinds.TrainingSettings())
    b, c = (fitted.checkpoints[f"harmonize_rish_{x}-to-A"] for x in "BC")
    assert (b.tensors["template"] == c.tensors["template"]).all()
    assert abs(c.card.metrics["scale_b1000_l0"] - 1) < 0.03 < abs(
        b.card.metrics["scale_b1000_l0"] - 1)


OLD = [(i, "AB"[i % 2], 30.0 + i + 30 * (i % 2), "FM"[i // 2 % 2]) for i in range(8)]
SOME = [(i, "AB"[i % 2], 30.0 + 5 * i + 12 * (i % 2), "FM"[i // 2 % 2]) for i in range(8)]
EVEN = [(i, "AB"[i % 2], 30.0 + 5 * (i // 2), "FM"[i // 2 % 2]) for i in range(8)]


def test_groups_that_differ_are_told_or_refused():
    """With two groups of n whose means differ by d, of variance v within, the batch explains
    d²/4 / (d²/4 + v) of the whole variance."""
    method = methods.get("harmonize_rish")

    def told(rows):
        table = study(rows, covariates=("age", "sex"))
        return harmonizer.group_differences(method, table, harmonizer.runs_by_site(method, table))

    assert told(EVEN) == []
    (text,) = told(SOME)
    ages = np.array([r[2] for r in SOME]).reshape(-1, 2).T
    gap = (ages[1].mean() - ages[0].mean())**2 / 4
    share = gap / (gap + ages.var(axis=1).mean())
    assert f"the site explains {share:.0%} of its variance" in text
    assert f"A ({ages[0].mean():.3g} ± {ages[0].std(ddof=1):.2g}, 4 participants)" in text
    with pytest.raises(UsageError, match=r"age differs between A \(33 .* explains 9\d% of its "):
        told(OLD)
    with pytest.raises(UsageError, match=r"sex differs between A \(4 F\) and B \(4 M\)"):
        told([(*r[:3], "FM"[r[0] % 2]) for r in EVEN])
    # the same people in both batches are alike, whatever their ages
    assert told([(r[0], b, *r[2:]) for r in OLD for b in "AB"]) == []


def broken(run):
    dwi = head(int(run[:-1]), run[-1])
    if run != "2B":
        return dwi
    signal = dwi.signal.copy()
    signal[:, 7] = np.nan
    return Dwi(signal, dwi.mask, AFFINE, dwi.acquisition)


def dark(run):
    dwi = head(int(run[:-1]), run[-1])
    return Dwi(np.zeros_like(dwi.signal), dwi.mask, AFFINE, dwi.acquisition) if run == "2B" else dwi


BAD = [
    ({"rows": [(0, "A"), (1, "B")]}, "at least 3 participants at every site; found A: 1, B: 1"),
    ({"rows": [(i, "AB"[i % 2]) for i in range(5)]}, "found A: 3, B: 2. Add participants to B"),
    ({"rows": OLD, "covariates": ("age", "sex")}, "age differs between A"),
    ({"reference_batch": "a"}, "no such site; found A: 3, B: 3"),
    ({"load": broken}, r"values of 2B are NaN or infinite \(3\.0%"),
    ({"load": dark}, "no voxel of 2B has an FA above 0")]


@pytest.mark.parametrize("options,message", BAD, ids=[m[:20] for _, m in BAD])
def test_studies_that_cannot_carry_it_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        methods.get("harmonize_rish").fit(study(**options), kinds.TrainingSettings())


@pytest.mark.slow
def test_refuses_what_it_cannot_harmonize():
    method, checkpoint = trained()
    dwi = head(1, "B")
    with pytest.raises(Refusal, match=r"7 × b 1000\. Needed are 8 or more directions"):
        method.check(Acquisition(BVALS[:10], AXES[:10]))
    with pytest.raises(Refusal, match="Needed are a b0"):
        method.check(Acquisition(BVALS[3:], AXES[3:]))
    with pytest.raises(Refusal, match="no voxel with b0 signal"):
        method.harmonize(Dwi(np.zeros_like(dwi.signal), MASK, AFFINE, dwi.acquisition), checkpoint,
                         "B", "cpu")
    with pytest.raises(Refusal, match=r"b_delta -0\.5"):
        method.harmonize(Dwi(dwi.signal, MASK, AFFINE, Acquisition(
            BVALS, AXES, np.where(BVALS > 0, -0.5, 1.0))), checkpoint, "B", "cpu")


@pytest.mark.slow
def test_voxels_that_cannot_be_scaled_stay():
    method, checkpoint = trained()
    dwi = head(20, "B")
    signal = dwi.signal.copy()
    signal[5, :3], signal[6, 9] = 0, np.nan
    made = method.harmonize(Dwi(signal, MASK, AFFINE, dwi.acquisition), checkpoint, "B", "cpu")
    np.testing.assert_array_equal(made.signal[5:7], signal[5:7])
    assert made.counts["rish_unchanged"] == 2
    assert np.isfinite(np.delete(made.signal, 6, 0)).all()


@pytest.mark.slow
def test_scan_unlike_the_template_is_told():
    method, checkpoint = trained()
    dwi = head(20, "B")
    shuffled = dwi.signal[np.random.default_rng(1).permutation(len(dwi.signal))]
    (text,) = method.harmonize(Dwi(shuffled, MASK, AFFINE, dwi.acquisition), checkpoint, "B",
                               "cpu").notices
    assert "correlation of FA with the template of harmonize_rish is only" in text


@pytest.fixture(scope="module")
def blob():
    """A smooth random image within a ball, (30, 34, 28), and its copy moved and stretched."""
    values = gaussian_filter(np.random.default_rng(3).random((30, 34, 28)), 2.5)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in values.shape], indexing="ij")
    values = (values - values.min()) / np.ptp(values) * (sum(a**2 for a in axes) < 0.7)
    affine = np.diag([-3.0, 3.1, 3.2, 1.0])
    affine[:3, 3] = 40, -50, -45
    image = Image(values.astype(np.float32), affine)
    pose = MOVE.copy()
    pose[:3, :3] = MOVE[:3, :3] @ np.diag([1.05, 0.95, 1.02])
    place = transform_points(np.linalg.inv(pose), world_points(values.shape, affine))
    return image, Image(image.at(place).astype(np.float32), affine), pose


def test_place_of_a_moved_and_stretched_image(blob):
    image, other, pose = blob
    wanted = transform_points(pose, world_points(image.values.shape, image.affine))
    inside = image.values > 0
    apart = np.linalg.norm(wanted - world_points(image.values.shape, image.affine), axis=-1)[inside]
    error = np.linalg.norm(template.register(image, other) - wanted, axis=-1)[inside]
    assert np.median(apart) > 6
    assert np.median(error) < 1 and np.quantile(error, 0.95) < 2, np.quantile(error, (0.5, 0.95))


@pytest.mark.slow
def test_place_repeats_itself_whatever_the_order_of_the_axes(blob):
    image, other, _ = blob
    place = template.register(image, other)
    np.testing.assert_array_equal(template.register(image, other), place)
    # new index (k, i, j) ← old (i, n − 1 − j, k)
    values = image.values[:, ::-1].transpose(2, 0, 1)
    order = np.zeros((4, 4))
    order[0, 1] = order[2, 0] = order[3, 3] = 1
    order[1, 2], order[1, 3] = -1, image.values.shape[1] - 1
    other_way = template.register(Image(values, image.affine @ order), other)
    np.testing.assert_allclose(other_way, place[:, ::-1].transpose(2, 0, 1, 3), atol=1e-6)


def test_registrations_to_a_template_are_told(monkeypatch, caplog):
    monkeypatch.setattr(template, "register", lambda fixed, moving, work_dir: world_points(
        fixed.values.shape, fixed.affine))
    with caplog.at_level("INFO", "qsphere"):
        template.build([Image(np.ones((4, 4, 4)), np.eye(4))] * 3)
    told = [r.getMessage().split(",")[:2] for r in caplog.records]
    assert [",".join(line) for line in told] == [
        f"template, round {r} of 2: registering {k} of 3" for r in (1, 2) for k in (1, 2, 3)]


@pytest.mark.slow
def test_template_is_the_mean_of_the_people(blob):
    """Copies of an image in different poses give a template as sharp as each, and found in each."""
    image, other, _ = blob
    mean, places = template.build([image, other, image])
    alike = [np.corrcoef(i.at(p).ravel(), mean.values.ravel())[0, 1]
             for i, p in zip((image, other, image), places, strict=True)]
    assert min(alike) > 0.95
    assert abs(mean.values.max() / image.values.max() - 1) < 0.15


@pytest.mark.slow
def test_template_is_the_same_by_two_processes(blob, monkeypatch):
    image, other, _ = blob
    mean, places = template.build([image, other])

    def registers(*_):
        raise AssertionError("the other processes were to register")

    monkeypatch.setattr(template.affine_registration, "register", registers)
    same, same_places = template.build([image, other], workers=2)
    np.testing.assert_array_equal(same.values, mean.values)
    np.testing.assert_array_equal(same_places, places)


@pytest.mark.parametrize("design", ["matched", "confounded"])
def test_designs_of_the_phantom(design):
    """People of like ages at both sites pass in silence; those of one site older are refused."""
    people = recruit(PhantomOptions(Path(), participants=12, design=design))
    rows = [(int(p.label), "AB"[p.sites[0]], p.age, p.sex) for p in people]
    table = study(rows, covariates=("age", "sex"))
    method = methods.get("harmonize_rish")
    batches = harmonizer.runs_by_site(method, table)
    if design == "matched":
        assert harmonizer.group_differences(method, table, batches) == []
    else:
        with pytest.raises(UsageError, match=r"age differs .* explains [678]\d% of its variance"):
            harmonizer.group_differences(method, table, batches)
