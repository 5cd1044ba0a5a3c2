"""The multi-site phantom: anatomy, people, sites, scans, the dataset and its truth."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bidsapp import cli_phantom, sh, tensor
from bidsapp.bids import btable
from bidsapp.bids.new_dataset import new_dataset
from bidsapp.dwi import Part
from bidsapp.errors import UsageError
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit
from bidsapp.simulate import fields, person, site
from bidsapp.simulate import phantom as ph
from support import ROOT
from support.app import qsphere

sys.path.insert(0, str(ROOT / "benchmarks"))
from phantom import features, people_and_sites, site_auc

SLOPPY = PhantomOptions(Path("unused"), sloppy=True)
EXACT = replace(SLOPPY, effects=0.0, snr=float("inf"), person_sd=0.0, lesions=0.0)


@pytest.fixture(scope="module")
def atlas():
    return load_atlas(SLOPPY.step)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six people at three sites, tiny."""
    out = tmp_path_factory.mktemp("phantom") / "out"
    assert cli_phantom.main([str(out), "--sloppy", "--participants", "6", "--sites", "3",
                             "--lesions", "0.5"]) == 0
    return out


def one_scan(options, atlas, site_index=0, label="01", age=50.0, lesion=False, pose=None,
             shells=None, directions=None, tissue=(0.0,) * 5):
    sites = site.draw_sites(options)
    who = person.draw_person(options, atlas, label, age, "F", lesion, tissue)
    table = site.gradient_table(shells or options.shells,
                                directions or sites[site_index].directions)
    pose = ph.draw_pose(options, label, sites[site_index].name) if pose is None else pose
    return ph.simulate_scan(who, sites[site_index], sites[0], table, atlas, options, pose)


def region(scan, tissue=0, least=0.8):
    return scan.mask & (scan.tissue[tissue] > least)


def turned(degrees, axis, shift=(0, 0, 0)):
    from scipy.spatial.transform import Rotation

    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.array(axis, float)).as_matrix()
    pose[:3, 3] = shift
    return pose


def tensors(scan, image=None):
    signal = (scan.signal if image is None else image)[:, scan.mask].T.astype(float)
    chosen = tensor.volumes(scan.acquisition)
    return tensor.fit(torch.as_tensor(signal[:, chosen]),
                      tensor.design(scan.acquisition[chosen].btensors))


def principal(odf):
    """(n, 3) axis of the largest second moment of (coefficient, n) ODFs, by dense sampling."""
    points, weights = sh.quadrature(10)
    values = odf.T @ sh.basis(ph.L_MAX, points).T * weights
    moments = np.einsum("vp,pi,pj->vij", values, points, points)
    return np.linalg.eigh(moments)[1][..., -1]


# --- anatomy and people


def test_tissues_are_shares_and_where_they_should_be(atlas):
    assert atlas.tissue.min() >= 0
    assert atlas.tissue.sum(0).max() <= 1 + 1e-5
    # MNI coordinates: body of the callosum, lateral ventricle, precentral cortex, outside
    points = np.array([[0, -5, 26], [-8, 5, 18.0], [-40, -12, 58], [0, 0, 110]])
    wm, gm, csf = atlas.sample(atlas.tissue, points)
    assert wm[0] > 0.5
    assert csf[1] > 0.5
    assert gm[2] > 0.3
    assert wm[3] == gm[3] == csf[3] == 0


@pytest.mark.parametrize("point,axis,system", [
    ((0, -5, 26), 0, "callosal"), ((0, 24, 8), 0, "callosal"), ((0, -34, 16), 0, "callosal"),
    ((-24, -18, 12), 2, "projection"), ((24, -18, 12), 2, "projection"),
    ((-6, -32, -40), 2, "projection"), ((-34, -30, 28), 1, "association"),
    ((34, -30, 28), 1, "association")])
def test_fibres_run_as_anatomy_says(atlas, point, axis, system):
    """Known bundles: the system runs along its axis, within 45°."""
    flow = atlas.sample(atlas.flow, np.array([point], float))[person.SYSTEMS.index(system), :, 0]
    assert abs(flow[axis]) / np.linalg.norm(flow) > np.cos(np.pi / 4)


def test_systems_cross_in_the_centrum_semiovale_and_not_in_the_callosum(atlas):
    points = np.array([[0, -5, 26], [-26, -16, 32], [26, -16, 32.0]])
    strength = np.linalg.norm(atlas.sample(atlas.flow, points), axis=1) ** 2
    share = strength / strength.sum(0)
    assert share[0, 0] > 0.95
    assert share[:, 1:].max(0).max() < 0.9


@pytest.mark.parametrize("label", ["01", "02", "03"])
def test_the_warp_is_one_to_one(atlas, label):
    """Its coefficients keep to the bound, and its Jacobian to positive determinants."""
    scan = one_scan(replace(EXACT, person_sd=1.5), atlas, label=label)
    assert scan.jacobian > 0.05
    who = person.draw_person(replace(SLOPPY, person_sd=1.5), atlas, label, 50.0, "F", False)
    assert np.abs(who.warp.coefficients).max() <= 0.4 * who.warp.spacing


def test_spline_fields_have_the_sd_asked_for_and_do_not_depend_on_the_grid(rng):
    field = fields.SplineField.draw(rng, np.array([1.0, 2.0]), 12.0)
    points = rng.uniform(-100, 100, (20000, 3))
    values = field.at(points)
    np.testing.assert_allclose(values.std(1), [1, 2], rtol=0.05)
    np.testing.assert_array_equal(field.at(points[:50]), values[:, :50])


def test_the_age_slope_is_in_the_truth(atlas):
    """Same person at 30 and 70: d of all tissue and f of white matter change by slope × 40 years;
    a voxel's f in proportion to the share of its tissue that is white matter."""
    options = replace(EXACT, age_slope_f=-0.002, age_slope_d=0.004)
    young, old = (one_scan(options, atlas, age=a, pose=np.eye(4)) for a in (30.0, 70.0))
    wm, gm, _ = young.tissue
    solid = young.mask & (wm + gm > 0.05)
    change = {k: (old.truth[k] - young.truth[k])[solid] for k in ("neuritefraction", "diffusivity")}
    np.testing.assert_allclose(change["diffusivity"], 0.16, atol=1e-3)
    share = wm[solid] / (wm + gm)[solid]
    np.testing.assert_allclose(change["neuritefraction"], -0.08 * share, atol=1e-3)


def test_a_lesion_changes_what_it_should_where_it_should(atlas):
    sick, well = (one_scan(EXACT, atlas, lesion=yes, pose=np.eye(4)) for yes in (True, False))
    wm = region(well, 0, 0.9)
    core = sick.lesion & wm
    assert core.sum() > 3 and not well.lesion.any()
    ratio = sick.truth["neuritefraction"] / np.maximum(well.truth["neuritefraction"], 1e-6)
    assert ratio[core].min() == pytest.approx(1 + person.LESION_F, abs=0.05)
    assert (sick.truth["md"] / np.maximum(well.truth["md"], 1e-9))[core].max() > 1.4
    assert (np.abs(ratio - 1) < 1e-4)[wm].mean() > 0.9


# --- what a scan measures


def test_dti_of_noise_free_scans_is_the_truth(atlas):
    """Ordinary least squares of log S at b and 2b, extrapolated to b = 0 as 2 T(b) − T(2b).

    log S(b) = log S0 − b m₁ + b² V/2 + R(b), R(b) = −∫₀ᵇ (b − t)²/2 κ₃(t) dt, where κ₃(t) is the
    third cumulant of the diffusivities weighted by exp(−t D). As the fit is linear, m₁ becomes the
    tensor, V cancels, and what is left is the fit at b of 2 R(b) − R(2b)/2, whose integrand keeps
    its sign: it is at most b³ max|κ₃|/3 in each measurement, and |κ₃| ≤ w³/(6√3) for diffusivities
    in an interval of width w, here 0 to 3 µm²/ms. (The ODF's truncation at degree 8 leaves moments
    of D up to the fourth as they are.) To this come roundings of float32 in S; 64 of them are
    allowed one after another. FA is √(3/2) sin of the angle between the tensor and the isotropic.
    """
    b = 0.06  # ms/µm²
    scans = [one_scan(EXACT, atlas, shells=(1000 * k * b,), directions=30, pose=np.eye(4))
             for k in (1, 2)]
    mask, weighted = scans[0].mask, ~scans[0].acquisition.b0
    designs = [tensor.design(s.acquisition.btensors) for s in scans]
    np.testing.assert_allclose(designs[1][:, :6], 2 * designs[0][:, :6])
    logs = [np.log(s.signal[:, mask].astype(float)) for s in scans]
    inverse = [np.linalg.pinv(x)[:6] for x in designs]
    d = 2 * inverse[0] @ logs[0] - inverse[1] @ logs[1]
    for x, own, log in zip(designs, inverse, logs, strict=True):
        md = tensor.fit(torch.as_tensor(np.exp(log.T)), x, weighted=False)["md"].numpy()
        np.testing.assert_allclose(md * 1000, (own @ log)[[0, 3, 5]].mean(0), rtol=1e-9)

    rest = b**3 * 3**3 / (6 * np.sqrt(3)) / 3
    left = np.where(weighted, rest, 0) + 2.5 * 64 * 2.0**-24  # bound of each log S, as of T(b)
    md_bound = np.abs(inverse[0][[0, 3, 5]].mean(0)) @ left
    assert md_bound < 4e-3
    truth = {k: scans[0].truth[k][mask] for k in ("fa", "md")}
    assert np.abs(d[[0, 3, 5]].mean(0) - 1000 * truth["md"]).max() < md_bound

    full = d[[0, 1, 2, 1, 3, 4, 2, 4, 5]].T.reshape(-1, 3, 3)
    size = np.linalg.norm(full, axis=(1, 2))
    deviation = full - d[[0, 3, 5]].mean(0)[:, None, None] * np.eye(3)
    fa = np.sqrt(1.5) * np.linalg.norm(deviation, axis=(1, 2)) / size
    twice = np.sqrt([1, 2, 2, 1, 2, 1])[:, None]  # entries off the diagonal count twice
    d_bound = np.linalg.norm(twice * inverse[0], 2) * np.linalg.norm(left)
    fa_bound = np.sqrt(1.5) * np.arcsin(d_bound / size)
    assert np.median(fa_bound) < 0.015
    assert (np.abs(fa - truth["fa"]) / fa_bound).max() < 1


@pytest.mark.slow
def test_truth_is_realistic():
    """FA and MD (µm²/ms) at full size, as in the literature for adults at 3 T."""
    options = replace(EXACT, sloppy=False)
    scan = one_scan(options, load_atlas(options.step), pose=np.eye(4))
    fa, md = scan.truth["fa"], scan.truth["md"] * 1000
    wm, gm, csf = (region(scan, i, t) for i, t in ((0, 0.9), (1, 0.9), (2, 0.95)))
    assert 0.4 < np.median(fa[wm]) < 0.7
    assert 0.05 < np.median(fa[gm]) < 0.2
    assert 0.6 < np.median(md[wm]) < 0.85
    assert 0.75 < np.median(md[gm]) < 1.05
    assert np.median(md[csf]) == pytest.approx(3, rel=0.05)
    middle = np.rint(np.linalg.inv(scan.grid.affine) @ [0, -34, 16, 1])[:3].astype(int)
    splenium = tuple(slice(i - 2, i + 3) for i in middle)
    assert fa[splenium].max() > 0.7


def test_the_head_turns_and_the_table_does_not(atlas):
    """A quarter turn about z takes a grid of cubes to itself: maps and axes turn with the head."""
    a = one_scan(EXACT, atlas, pose=np.eye(4))
    b = one_scan(EXACT, atlas, pose=turned(90, (0, 0, 1)))
    assert a.acquisition == b.acquisition
    # world points of voxels of a, turned, are voxel indices of b
    index = np.argwhere(region(a, 0, 0.9))
    world = index @ a.grid.affine[:3, :3].T + a.grid.affine[:3, 3]
    there = np.stack([-world[:, 1], world[:, 0], world[:, 2]], 1)
    back = np.linalg.inv(b.grid.affine)
    target = there @ back[:3, :3].T + back[:3, 3]
    from scipy.ndimage import map_coordinates

    md = [map_coordinates(b.truth[k], target.T, order=1) for k in ("md", "fa")]
    here = [a.truth[k][tuple(index.T)] for k in ("md", "fa")]
    assert np.median(np.abs(md[0] / here[0] - 1)) < 0.03
    nearest = tuple(np.rint(target).astype(int).T)
    solid = b.mask[nearest] & (here[1] > 0.6)
    before = principal(a.truth["odf"][:, *index[solid].T])
    after = principal(b.truth["odf"][:, *(n[solid] for n in nearest)])
    expected = before @ turned(90, (0, 0, 1))[:3, :3].T
    angle = np.degrees(np.arccos(np.clip(np.abs((after * expected).sum(1)), 0, 1)))
    unturned = np.degrees(np.arccos(np.clip(np.abs((after * before).sum(1)), 0, 1)))
    assert np.median(angle) < 8 < 40 < np.median(unturned)
    # and the tensor of the signal, by the table, points where the ODF does
    direction = tensors(b)["direction"].numpy()
    measured = np.zeros((*b.mask.shape, 3))
    measured[b.mask] = direction
    cosine = np.abs((measured[nearest][solid] * after).sum(1))
    assert np.degrees(np.arccos(np.clip(np.median(cosine), 0, 1))) < 3


def test_recorded_poses_say_where_the_head_is(atlas):
    """The centre of mass of CSF, white and grey matter moves by the recorded pose."""
    shift = turned(0, (0, 0, 1), (4, -5, 3))
    still, moved = (one_scan(EXACT, atlas, pose=p) for p in (np.eye(4), shift))

    def centre(scan):
        weight = scan.tissue.sum(0)
        index = np.indices(weight.shape).reshape(3, -1)
        mean = (index * weight.reshape(-1)).sum(1) / weight.sum()
        return scan.grid.affine[:3, :3] @ mean + scan.grid.affine[:3, 3]

    np.testing.assert_allclose(centre(moved) - centre(still), [4, -5, 3], atol=0.1)


# --- sites


def test_without_effects_sites_are_the_same(atlas):
    options = replace(SLOPPY, effects=0.0, snr=float("inf"))
    a, b = (one_scan(options, atlas, i, pose=np.eye(4)) for i in (0, 1))
    np.testing.assert_array_equal(a.signal, b.signal)
    np.testing.assert_array_equal(a.signal, a.reference)
    assert a.acquisition == b.acquisition


EFFECTS = {"gain": 0.3, "coil": 0.3, "bias": 0.1, "snr": 0.2, "coils": 4, "psf": 1.2,
           "echo_time": 15.0, "repetition_time": 0.6, "miscalibration": 0.03, "nonlinearity": 0.03,
           "directions": 3, "voxel": 0.7}
OWN = {"gain": {"gain"}, "coil": {"coil"}, "bias": {"bias"}, "snr": {"snr"}, "coils": {"coils"},
       "psf": {"fwhm"}, "echo_time": {"echo_time"},
       "repetition_time": {"repetition_time"}, "miscalibration": {"b_scale"},
       "nonlinearity": {"nonlinearity"}, "directions": {"directions"}, "voxel": {"voxel"}}


def only(name, **more):
    sizes = {n: 1 if n == "coils" else 0 for n in EFFECTS} | {name: EFFECTS[name]}
    return replace(SLOPPY, **{f"effect_{n}": size for n, size in sizes.items()}, **more)


@pytest.mark.parametrize("name", EFFECTS)
def test_each_effect_changes_its_own_parameter(name):
    """± 0.75 to 1.25 times its size at every site but the reference, and nothing else."""
    sites = site.draw_sites(only(name, sites=5))
    first = {k: v for k, v in vars(sites[0]).items() if k not in ("fields", "name")}
    for i, other in enumerate(sites[1:], 1):
        changed = {k for k, v in first.items() if getattr(other, k) != v}
        assert changed == (OWN[name] if name != "coils" or i % 2 else set())
    spread = {"gain": lambda s: np.log(s.gain), "psf": lambda s: s.fwhm - site.FWHM,
              "echo_time": lambda s: s.echo_time - 80, "miscalibration": lambda s: s.b_scale - 1}
    if name in spread:
        sizes = np.array([spread[name](s) for s in sites[1:]]) / EFFECTS[name]
        assert np.all((np.abs(sizes) >= 0.75) & (np.abs(sizes) <= 1.25))
        assert np.sign(sizes).sum() == 0  # balanced


@pytest.mark.parametrize("name,same", [
    ("gain", "ratio"), ("bias", "ratio"), ("coil", "signal"), ("snr", "signal"),
    ("coils", "signal"), ("miscalibration", "b0"), ("nonlinearity", "b0"),
    ("psf", "mean"), ("echo_time", "none"), ("repetition_time", "none")])
def test_each_effect_changes_what_it_should_and_nothing_else(atlas, name, same):
    """Without noise: the ratio to b = 0, the whole signal, b = 0, or the total signal stays."""
    options = only(name, snr=float("inf"))
    scan = one_scan(options, atlas, 1)
    mine, wanted = scan.signal[:, scan.mask], scan.reference[:, scan.mask]
    b0 = scan.acquisition.b0
    if same == "signal":
        np.testing.assert_array_equal(mine, wanted)
        return
    assert np.abs(mine / wanted - 1).mean() > 0.003
    if same == "ratio":
        np.testing.assert_allclose(mine / mine[b0].mean(0), wanted / wanted[b0].mean(0), rtol=1e-3)
    if same == "b0":
        np.testing.assert_allclose(mine[b0], wanted[b0], rtol=1e-5)
        assert np.abs(mine[~b0] / wanted[~b0] - 1).mean() > 0.005
    if same == "mean":  # nothing is lost, only spread
        np.testing.assert_allclose(scan.signal.sum((1, 2, 3)), scan.reference.sum((1, 2, 3)),
                                   rtol=1e-3)


def test_miscalibrated_b_is_another_b(atlas):
    """A site whose b is too high by a factor measures as the reference does at that b."""
    options = only("miscalibration", snr=float("inf"))
    factor = site.draw_sites(options)[1].b_scale
    assert abs(factor - 1) > 0.02
    pose = np.eye(4)
    a = one_scan(options, atlas, 1, pose=pose, shells=(1000.0,))
    b = one_scan(options, atlas, 0, pose=pose, shells=(1000.0 * factor,))
    np.testing.assert_allclose(a.signal, b.signal, atol=1e-3 * ph.UNIT * 3)
    assert np.abs(a.signal - a.reference)[:, a.mask].max() > 5e-3 * ph.UNIT


def test_noise_follows_coil_law_and_level(atlas):
    """In air the magnitude of n coils has the mean square 2 n σ²."""
    for options, n in ((only("coils"), 4), (only("gain"), 1)):
        scan, own = one_scan(options, atlas, 1), site.draw_sites(options)[1]
        air = scan.reference.max(0) < 1e-3
        assert air.sum() > 1000
        sigma = ph.UNIT * own.gain / own.snr
        square = (scan.signal[:, air] ** 2).mean()
        assert square == pytest.approx(2 * n * sigma**2, rel=0.02)


def test_point_spread_keeps_constants_and_has_its_width(rng):
    fine = np.arange(-60, 60, 0.5)
    centres = np.arange(-30, 31, 3.0)
    for fwhm in (0.0, 1.5, 3.0):
        weights = site.spread_matrix(centres, 3.0, fine, 0.5, fwhm)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
        np.testing.assert_allclose(weights @ fine, centres, atol=1e-9)
        variance = (weights * (fine - centres[:, None]) ** 2).sum(1)
        # Gaussian, box of 3 mm; the cells of 0.5 mm add their own width
        expected = fwhm**2 / (8 * np.log(2)) + 9 / 12
        np.testing.assert_allclose(variance, expected, atol=0.5**2 / 6)


def test_directions_repel_each_other():
    table = site.gradient_table((1000.0, 2000.0), 12)
    for shell in table.shells:
        n = table.bvecs[shell.indices]
        cosine = np.abs(n @ n.T) - np.eye(len(n))
        # twelve antipodal directions at their best stand 31.7° apart at least
        assert np.degrees(np.arccos(cosine.max())) > 26
    assert table.b0.sum() >= 2 and table.b0[0]


# --- people against sites


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_people_differ_by_more_than_a_site_effect(atlas, seed):
    """SD over people of a regional mean against its mean change from the reference to any site, FA
    and MD, WM and GM: more than a fifth above."""
    options = replace(SLOPPY, snr=float("inf"), sites=3, participants=6, random_seed=seed)
    people, values = recruit(options), {}
    for who in people:
        for i in range(3):
            scan = one_scan(options, atlas, i, label=who.label, age=who.age,
                            tissue=who.tissue)
            maps = tensors(scan)
            for tissue, name in enumerate(("wm", "gm")):
                inside = region(scan, tissue, 0.7)[scan.mask]
                for key in ("fa", "md"):
                    mean = maps[key].numpy()[inside].mean()
                    values.setdefault((name, key), {})[who.label, i] = mean
    for key, found in values.items():
        between_people, shifts = people_and_sites(found)
        assert between_people > 1.2 * shifts.max(), (key, between_people, shifts)


@pytest.mark.slow
def test_a_classifier_knows_the_site_and_only_by_its_effects():
    """Six people, three sites; leaving one person out in turn. Without effects, chance: 0.5, whose
    standard error over 18 scans is 0.14 (Hanley and McNeil 1982)."""
    def aucs(**changes):
        people, sites, values = features(replace(SLOPPY, participants=6, sites=3, **changes))
        return np.array([*site_auc(values, sites, people).values()])

    assert aucs().min() >= 0.95
    assert abs(aucs(effects=0.0).mean() - 0.5) < 2 * 0.14


# --- the dataset


def validate(folder):
    return subprocess.run(["bids-validator-deno", str(folder), "--ignoreWarnings"],
                          capture_output=True, text=True, check=False)


@pytest.mark.parametrize("part", [".", "derivatives/masks", "derivatives/tissue",
                                  "sourcedata/truth"])
def test_the_validator_accepts_it(dataset, part):
    done = validate(dataset / part)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout


def test_files_say_what_was_simulated(dataset):
    stem = "sub-02/ses-siteB/dwi/sub-02_ses-siteB"
    image = nib.load(dataset / f"{stem}_dwi.nii.gz")
    sites = json.loads((dataset / "sourcedata/truth/desc-sites_truth.json").read_text())
    own = sites["Sites"]["siteB"]
    assert image.get_data_dtype() == np.int16
    assert image.header.get_zooms()[:3] == pytest.approx((6, 6, 6))
    sidecar = json.loads((dataset / f"{stem}_dwi.json").read_text())
    assert sidecar["EchoTime"] * 1000 == pytest.approx(own["echo_time"], abs=1e-3)
    paths = [dataset / f"{stem}_dwi{e}" for e in (".nii.gz", ".bval", ".bvec")]
    table = btable.read_acquisition(Part(*paths))
    expected = site.gradient_table((1000.0, 2000.0), own["directions"])
    np.testing.assert_allclose(table.bvecs[~table.b0], expected.bvecs[~expected.b0], atol=1e-6)
    reference = nib.load(dataset / f"sourcedata/truth/{stem}_desc-reference_dwi.nii.gz")
    assert reference.shape == image.shape
    np.testing.assert_allclose(reference.affine, image.affine)
    mask = nib.load(dataset / f"derivatives/masks/{stem}_desc-brain_mask.nii.gz")
    fa = nib.load(dataset / f"sourcedata/truth/{stem}_model-tensor_param-fa_desc-truth_dwimap"
                            ".nii.gz").get_fdata()
    np.testing.assert_array_equal(fa > 0, np.asarray(mask.dataobj) > 0)


def test_qsphere_finds_sites_and_masks(dataset, tmp_path):
    """The app itself: batches are the sites, the given masks are used, DTI runs."""
    out = tmp_path / "out"
    assert qsphere(dataset, out, "participant", "--participant-label", "01", "--session-label",
                   "siteA", "siteB", "--estimate", "dti", "--derivatives",
                   f"masks={dataset / 'derivatives/masks'}") == 0
    assert "siteA,siteB" in (out / "participants.tsv").read_text()
    stem = "sub-01/ses-siteB/dwi/sub-01_ses-siteB"
    mine = nib.load(out / f"{stem}_desc-brain_mask.nii.gz").get_fdata()
    given = nib.load(dataset / f"derivatives/masks/{stem}_desc-brain_mask.nii.gz").get_fdata()
    np.testing.assert_array_equal(mine, given)


def digest(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_same_seed_same_bytes_and_an_earlier_phantom_is_replaced(tmp_path):
    argv = ["--sloppy", "--participants", "1", "--sites", "1", "--directions", "6"]
    for name in ("a", "b"):
        assert cli_phantom.main([str(tmp_path / name), *argv]) == 0
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "b")
    (tmp_path / "b/derivatives/qsphere").mkdir()
    (tmp_path / "b/derivatives/qsphere/result").touch()
    assert cli_phantom.main([str(tmp_path / "b"), *argv, "--random-seed", "1",
                             "--design", "matched"]) == 0
    second = digest(tmp_path / "b")
    assert "derivatives/qsphere/result" in second
    assert not (tmp_path / "b/sub-01/ses-siteA").exists()
    assert (tmp_path / "b/sub-01/dwi").is_dir()
    name = "sourcedata/truth/desc-sites_truth.json"
    assert second[name] != first[name]


def test_record_that_was_cut_off_does_not_stop_the_next_phantom(tmp_path):
    for text in ("first", "second"):
        with new_dataset(tmp_path, "maker") as tree:
            tree.text("sub-01/file", text)
        (tmp_path / ".maker.json").write_text("[")
    assert (tmp_path / "sub-01/file").read_text() == "second"


def test_designs():
    base = replace(SLOPPY, participants=12, sites=3)
    everyone = recruit(base)
    assert all(p.sites == (0, 1, 2) for p in everyone)
    ages = {}
    for design in ("matched", "confounded"):
        people = recruit(replace(base, design=design))
        assert all(len(p.sites) == 1 for p in people)
        ages[design] = np.array([[p.age for p in people if p.sites == (i,)] for i in range(3)])
        assert ages[design].shape == (3, 4)
    matched = np.sort(ages["matched"], axis=1)
    assert np.ptp(matched, axis=0).max() <= 2.1
    assert np.ptp(matched, axis=1).min() > 20
    assert np.all(np.diff(ages["confounded"].ravel()) > 0)
    assert sum(p.lesion for p in everyone) == 3


@pytest.mark.slow
@pytest.mark.parametrize("design", ["matched", "confounded"])
def test_unpaired_designs_name_the_site_of_each_person(tmp_path, design):
    assert cli_phantom.main([str(tmp_path), "--sloppy", "--participants", "2", "--directions", "6",
                             "--design", design]) == 0
    rows = (tmp_path / "participants.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["participant_id", "age", "sex", "site"]
    assert [r.split("\t")[-1] for r in rows[1:]] == ["siteA", "siteB"]
    assert validate(tmp_path).returncode == 0


@pytest.mark.parametrize("argv,text", [
    (["--participants", "0"], "at least 1"),
    (["--sites", "0"], "at least 1"),
    (["--design", "matched", "--participants", "1"], "one person per site"),
    (["--shells", "20"], "b-values from 50"),
    (["--shells", "1000", "1000"], "each b-value once"),
    (["--snr", "0"], "more than 0"), (["--snr", "nan"], "more than 0"),
    (["--voxel-size", "0.2"], "1.5 to 12 mm"),
    (["--effect-psf", "-1"], "0 or more"),
    (["--effect-gain", "inf"], "finite"),
    (["--directions", "3"], "at least 6"),
    (["--lesions", "1.5"], "from 0 to 1"),
    (["--ages", "70", "30"], "youngest and the oldest"),
])
def test_options_that_make_no_sense_are_refused(tmp_path, capsys, argv, text):
    assert cli_phantom.main([str(tmp_path / "out"), *argv]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_someone_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert cli_phantom.main([str(tmp_path), "--sloppy"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_help_comes_at_once_with_every_default(capsys):
    code = ("import sys\nfrom bidsapp.cli_phantom import main\ntry:\n    main(['--help'])\n"
            "except SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=True)
    assert not {"torch", "numpy", "scipy", "nilearn"} & set(done.stderr.split())
    assert "--effect-psf" in done.stdout and "default: 1000 2000" in done.stdout


def test_options_can_be_made_without_the_parser():
    with pytest.raises(UsageError, match="--design"):
        PhantomOptions(Path("x"), design="crossed")
