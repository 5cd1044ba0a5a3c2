"""Artifacts of the phantom's raw images: each against the equation that defines it."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bidsapp import cli_phantom
from bidsapp.bids import btable
from bidsapp.dwi import Part
from bidsapp.errors import UsageError
from bidsapp.options import ARTIFACTS, PhantomOptions
from bidsapp.phantom import load_atlas
from bidsapp.simulate import artifacts, person, site
from bidsapp.simulate import phantom as ph
from bidsapp.simulate.fields import SplineField

EXACT = PhantomOptions(Path("unused"), sloppy=True, effects=0.0, snr=float("inf"),
                       shells=(1000.0,), directions=6)


@pytest.fixture(scope="module")
def atlas():
    return load_atlas(EXACT.step)


@pytest.fixture(scope="module")
def simulate(atlas):
    """Function that simulates the raw scan of one person with artifacts, once for each choice."""
    scans = {}

    def simulate(*names, **options):
        key = names, *options.items()
        if key not in scans:
            changed = replace(EXACT, artifacts=names, **options)
            scans[key] = artifacts.simulate_raw(*subject(atlas, changed), atlas, changed, POSE)
        return scans[key]

    return simulate


POSE = np.eye(4)


def subject(atlas, options):
    """Person, site, reference and table."""
    reference, *_ = site.draw_sites(options)
    someone = person.draw_person(options, atlas, "01", 50.0, "F", False)
    return someone, reference, reference, site.gradient_table(options.shells, reference.directions)


def scanner(atlas, options, field=None):
    """A scanner with the person, whose field is replaced if another is given."""
    someone, reference, *_ = subject(atlas, options)
    head = ph.place_head(someone, atlas, options, POSE)
    grid = ph.Grid.over(ph.BOX, reference.voxel)
    if field is None:
        field = artifacts.susceptibility_field(someone, atlas, options, POSE)
    return artifacts.Scanner(head, grid, reference, field, options, "01")


def relative_difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- the parts


def test_transport_keeps_the_mass_of_every_line_also_where_it_folds(rng):
    mass = rng.uniform(size=(5, 4, 20)) * (rng.uniform(size=(5, 4, 20)) > 0.3)
    edges = 10 + np.arange(21) + 3 * rng.standard_normal((5, 4, 21))
    assert (np.diff(edges) < 0).any()
    out = artifacts.transport(mass, edges, 45)
    np.testing.assert_allclose(out.sum(-1), mass.sum(-1), rtol=1e-9)
    assert out.min() > -1e-9


def test_transport_puts_a_cell_between_its_edges():
    """A cell of mass 2 from 1.5 to 3.5: half in bin 2, a quarter in each neighbour."""
    mass = np.array([[0, 2.0, 0]])
    for edges in ([0, 1.5, 3.5, 9], [0, 3.5, 1.5, 9]):
        np.testing.assert_allclose(artifacts.transport(mass, np.array([edges], float), 6),
                                   [[0, 0.5, 1, 0.5, 0, 0]], atol=1e-9)


def test_what_is_moved_out_of_the_image_is_lost():
    out = artifacts.transport(np.ones((1, 4)), np.arange(5.0)[None] - 1.25, 4)
    np.testing.assert_allclose(out, [[1, 1, 0.75, 0]], atol=1e-9)


def test_a_step_edge_overshoots_as_gibbs_found():
    """∫ sin(t)/t from 0 to π, over π, less ½: 8.95 % of the jump, whatever the resolution."""
    cells = (np.arange(6400) + 0.5) / 100
    centres = np.arange(64.0) + 0.5
    for shift in (0, 0.25, 0.5):
        matrix = artifacts.fourier_matrix(centres, 1.0, cells, 0.01, 0.0)
        image = matrix @ ((cells > 20 + shift) & (cells < 44 + shift))
        # between the voxels too: the image as a Fourier series
        k = np.fft.fftfreq(64)
        dense = np.arange(0, 64, 0.05)
        coefficients = np.fft.fft(image) * np.exp(-2j * np.pi * k * centres[0]) / 64
        coefficients[32] = 0  # its phase is ambiguous
        series = (np.exp(2j * np.pi * np.outer(dense, k)) @ coefficients).real
        assert series.max() - 1 == pytest.approx(0.0895, abs=0.006)
        assert -series.min() == pytest.approx(0.0895, abs=0.006)


def test_fourier_matrix_of_narrow_objects_is_the_dirichlet_kernel():
    centres, n = np.arange(9.0), 9
    matrix = artifacts.fourier_matrix(centres, 1.0, np.array([2.3]), 1e-3, 0.0)[:, 0]
    t = np.pi * (centres - 2.3)
    np.testing.assert_allclose(matrix, 1e-3 * np.sin(t) / (n * np.sin(t / n)), rtol=1e-4)


def test_the_dipole_field_of_a_sphere():
    """Outside of a sphere of radius a: χ/3 (a/r)³ (3 cos² θ − 1) (Jackson, 5.10)."""
    axis = np.arange(-40, 41)
    z = axis * np.ones((81, 81, 1))
    r = np.sqrt((axis**2)[:, None, None] + (axis**2)[:, None] + axis**2)
    a = 8
    field = artifacts.dipole_field(np.clip(a - r + 0.5, 0, 1))
    shell = (r > 10) & (r < 20)
    expected = (a / r[shell])**3 / 3 * (3 * (z[shell] / r[shell])**2 - 1)
    assert np.corrcoef(field[shell], expected)[0, 1] > 0.999
    assert relative_difference(field[shell], expected) < 0.05


def test_zeros_of_partial_fourier(rng):
    images = rng.standard_normal((2, 3, 16, 4)) + 1j * rng.standard_normal((2, 3, 16, 4))
    before, after = (np.fft.fftshift(np.fft.fft(a, axis=2), 2)
                     for a in (images, artifacts.zero_fill(images)))
    np.testing.assert_allclose(after[:, :, :4], 0, atol=1e-12)  # a quarter of 16 lines
    np.testing.assert_allclose(after[:, :, 4:], before[:, :, 4:])


# --- motion and distortion


def test_without_artifacts_the_image_is_that_of_the_scan(simulate):
    """Options have to name an artifact; here it has no size."""
    raw = simulate("motion", motion_mm=0.0, motion_degrees=0.0)
    np.testing.assert_allclose(raw.magnitude, raw.scan.signal, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(raw.clean, raw.scan.signal, rtol=1e-4, atol=1e-2)
    assert len(raw.reverse) == 0 and raw.phase is None and raw.phasediff is None


def test_a_moved_head_is_the_scan_of_a_head_in_that_pose(atlas, simulate):
    """The phantom computes that scan from its anatomy; its cells of 4 mm set the limit."""
    raw = simulate("motion")
    move = np.eye(4)
    angles = np.linalg.norm(Rotation.from_matrix(raw.rotations).as_rotvec(degrees=True), axis=1)
    assert angles.max() == pytest.approx(3)
    assert np.linalg.norm(raw.translations, axis=1).max() == pytest.approx(3)
    v = int(angles.argmax())
    move[:3, :3], move[:3, 3] = raw.rotations[v], raw.translations[v]
    moved = ph.simulate_scan(*subject(atlas, EXACT), atlas, EXACT, move @ POSE)
    assert relative_difference(raw.clean[v], moved.signal[v]) > 0.1
    assert relative_difference(raw.magnitude[v], moved.signal[v]) < 0.02


def test_the_first_volume_is_at_rest_and_the_clean_table_is_that_of_the_head(simulate):
    raw = simulate("motion")
    np.testing.assert_array_equal(raw.rotations[0], np.eye(3))
    np.testing.assert_array_equal(raw.translations[0], 0)
    nominal = raw.scan.acquisition
    for felt, g, r in zip(raw.felt.bvecs, nominal.bvecs, raw.rotations, strict=True):
        np.testing.assert_allclose(r @ felt, g, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_point_lands_where_the_model_says(atlas, sign):
    """φ = R x + t + p T s (h(x) + e(R x + t)), with a field that is steep and known."""
    options = replace(EXACT, artifacts=("distortion", "motion", "eddy"))
    lattice = np.zeros((1, 81, 81, 81), np.float32)
    lattice += 40 + 0.8 * artifacts.FIELD_STEP * np.arange(-40, 41)[:, None]  # 0.8 Hz/mm along y
    device = scanner(atlas, options, SplineField(lattice, artifacts.FIELD_STEP))
    r = Rotation.from_rotvec([2, -1, 3], degrees=True).as_matrix()
    t, eddy = np.array([1.0, -2.0, 1.5]), np.array([8.0, 20, -15, 10, 30, -20, 10, 25, 5, -10])
    shift = sign * 0.0252 * 6
    points = device.head.points
    for target in ([20.0, 15, 30], [-30, -60, 10]):
        chosen = int(np.linalg.norm(points - target, axis=1).argmin())
        x = points[chosen]
        y = r @ x + t
        basis = [1, *(u := (y - device.centre) / 100), *u**2, u[0] * u[1], u[0] * u[2], u[1] * u[2]]
        expected = y + [0, shift * (40 + 0.8 * x[1] + eddy @ basis), 0]
        # a smooth spot, so that interpolation does not matter
        spot = np.exp(-np.sum((points - x)**2, 1) / (2 * 8.0**2)).astype(np.float32)
        image = device.show(spot, 0.0, r, t, shift, eddy)
        weights = image.reshape(-1) / image.sum()
        np.testing.assert_allclose(weights @ device.grid.points, expected, atol=0.03)
        still = device.show(spot, 0.0, np.eye(3), np.zeros(3), 0.0, np.zeros(10))
        assert image.sum() == pytest.approx(still.sum(), rel=2e-3)


def test_intensity_follows_the_jacobian(atlas):
    """Inside of a uniform head, I(φ(x)) (1 + T s ∂h) = S(x)."""
    options = replace(EXACT, artifacts=("distortion",))
    slope = 1.5  # Hz/mm
    lattice = np.zeros((1, 81, 81, 81), np.float32)
    lattice += slope * artifacts.FIELD_STEP * np.arange(-40, 41)[:, None]
    device = scanner(atlas, options, SplineField(lattice, artifacts.FIELD_STEP))
    ones = np.ones(len(device.head.points), np.float32)
    centre = tuple(n // 2 for n in device.grid.shape)
    assert device.grid.points.reshape(*device.grid.shape, 3)[centre] == pytest.approx(0, abs=20)
    for sign in (1, -1):
        shift = sign * 0.0252 * 6
        image = device.show(ones, 0.0, np.eye(3), np.zeros(3), shift, np.zeros(10))
        assert image[centre] == pytest.approx(1 / (1 + shift * slope), rel=1e-3)


def test_opposite_encodings_shift_oppositely(simulate):
    """The centres of mass of lines along y move by the same distance to either side.

    Lines are left out where more than 0.05 % of the signal leaves the image: 100 mm from the
    centre, this is 0.05 mm.
    """
    raw = simulate("distortion")
    y = raw.scan.grid.axes[1][:, None]
    images = raw.magnitude[0], raw.reverse[0], raw.clean[0]
    ap, pa, rest = ((i * y).sum(1) / i.sum(1).clip(1) for i in images)
    sums = np.stack([i.sum(1) for i in images])
    lines = (sums[2] > 0.2 * sums[2].max()) & (np.ptp(sums, axis=0) < 5e-4 * sums[2])
    assert lines.sum() > 400
    assert np.abs(ap - rest)[lines].max() > 2
    np.testing.assert_allclose((ap + pa)[lines] / 2, rest[lines], atol=0.05)
    # the direction j- moves signal in a positive field to lower y; the field at the centre of a
    # voxel of 6 mm differs from that of its signal at the border of the head, so that this is rough
    field = (raw.field * images[2]).sum(1) / images[2].sum(1).clip(1)
    expected = -raw.encoding.readout * raw.scan.grid.size * field
    assert relative_difference((ap - rest)[lines], expected[lines]) < 0.05
    for i in images:
        assert i.sum() == pytest.approx(images[2].sum(), rel=1e-3)
    assert (raw.encoding.direction, raw.reverse_encoding.direction) == ("j-", "j")


def test_the_field_folds_no_brain_by_default(simulate):
    raw = simulate("distortion")
    displacement = raw.encoding.readout * raw.field  # voxels
    slope = np.gradient(displacement, axis=1)[raw.scan.mask]
    assert np.abs(displacement[raw.scan.mask]).max() * raw.scan.grid.size > 10  # mm
    assert 0.3 < np.abs(slope).max() < 1
    twice = simulate("distortion", field_scale=2.0)
    np.testing.assert_allclose(twice.field, 2 * raw.field, rtol=1e-3, atol=1e-3)


def test_phase_difference_over_time_is_the_field(simulate):
    raw = simulate("distortion")
    duration = raw.echo_times[1] - raw.echo_times[0]
    hertz = raw.phasediff / (2 * np.pi * duration)
    inside = ndimage.binary_erosion(raw.scan.mask) & (np.abs(raw.field) < 100)
    error = (hertz - raw.field)[inside]
    assert raw.field[inside].std() > 5
    assert np.sqrt(np.mean(error**2)) < 1


# --- eddy currents, lost slices, ringing, phase and noise


def test_eddy_currents_are_linear_in_the_gradient(simulate):
    raw = simulate("eddy")
    table = raw.scan.acquisition
    gradients = np.sqrt(table.bvals / 1000)[:, None] * table.bvecs
    np.testing.assert_allclose(raw.eddy, gradients @ raw.gradient_response)
    assert np.abs(raw.eddy[table.b0]).max() == 0 < np.abs(raw.eddy[~table.b0]).min()
    assert relative_difference(raw.magnitude[table.b0], raw.clean[table.b0]) < 1e-5
    assert relative_difference(raw.magnitude[~table.b0], raw.clean[~table.b0]) > 0.03


def test_lost_slices_are_those_of_the_table(simulate):
    raw = simulate("dropout", dropout=0.1)
    table, inside = raw.scan.acquisition, raw.scan.mask.any((0, 1))
    ratio = raw.magnitude.sum((1, 2)) / raw.clean.sum((1, 2)).clip(1)
    np.testing.assert_allclose((1 - ratio)[:, inside], raw.lost[:, inside], atol=1e-4)
    lost = raw.lost[~table.b0][:, inside]
    n = lost.size
    assert abs((lost > 0).mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / n)
    assert lost[lost > 0].min() >= 0.5 and raw.lost.max() <= 1
    assert raw.lost[table.b0].max() == raw.lost[:, ~inside].max() == 0


def test_truncated_images_ring_in_the_plane(simulate):
    """Signal outside of the head, where the phantom without ringing has none."""
    raw = simulate("gibbs")
    far = ~ndimage.binary_dilation(raw.clean[0] > 0.02 * raw.clean[0].max(), iterations=2)
    assert raw.clean[0][far].max() < 0.01
    assert raw.magnitude[0][far].std() > 1
    profiles = [image.max((0, 1)) for image in (raw.clean[0], raw.magnitude[0])]
    empty = profiles[0] < 0.01
    assert empty.any() and profiles[1][empty].max() < 0.02  # not from slice to slice


def test_partial_fourier_blurs_along_the_phase_axis(simulate):
    raw = simulate("partial-fourier")
    k = np.abs(np.fft.fftshift(np.fft.fft(raw.magnitude[0], axis=1), 1)).sum((0, 2))
    full = np.abs(np.fft.fftshift(np.fft.fft(raw.clean[0], axis=1), 1)).sum((0, 2))
    n = len(k)
    assert (k / full)[:3].max() < 0.75
    assert (k / full)[n // 2] == pytest.approx(1, abs=0.02)


def test_complex_images_have_a_phase_of_each_shot(simulate):
    raw = simulate("complex")
    np.testing.assert_allclose(raw.magnitude, raw.clean, rtol=1e-4, atol=1e-2)
    table = raw.scan.acquisition
    first, second = np.flatnonzero(table.b0)[:2]
    strong = raw.scan.mask
    still = np.exp(1j * (raw.phase[first] - raw.phase[second]))
    np.testing.assert_allclose(still[strong], 1, atol=1e-3)
    # relative to a b0, the phase of a slice is a plane
    weighted = np.flatnonzero(~table.b0)[0]
    change = np.exp(1j * (raw.phase[weighted] - raw.phase[first]))
    z = raw.scan.grid.shape[2] // 2
    for axis in (0, 1):
        pair = [np.take(a, range(s, a.shape[axis] - 1 + s), axis) for s in (0, 1)
                for a in (change[..., z],)]
        inside = np.logical_and(*[np.take(strong[..., z], range(s, strong.shape[axis] - 1 + s),
                                          axis) for s in (0, 1)])
        step = np.angle(pair[1] * pair[0].conj())[inside]
        assert np.ptp(step) < 1e-3 < abs(step.mean())
    means = np.angle([change[..., k][strong[..., k]].mean() for k in range(z - 3, z + 3)])
    assert np.ptp(means) > 0.5  # the shots differ


@pytest.mark.parametrize("names", [("dropout",), ("partial-fourier",), ("complex",),
                                   ("complex", "partial-fourier")])
def test_noise_has_the_level_of_the_site(simulate, names):
    """In air, the mean square of the magnitude is 2 σ² for one coil."""
    raw = simulate(*names, snr=10.0)
    air = ~ndimage.binary_dilation(raw.clean[0] > 1, iterations=5)
    second = np.mean(np.square(raw.magnitude[:, air], dtype=float))
    assert second == pytest.approx(2 * np.mean(raw.sigma[air]**2, dtype=float), rel=0.03)
    assert raw.sigma.mean() == pytest.approx(100)


def test_noise_of_several_coils(atlas):
    options = replace(EXACT, artifacts=("dropout",), effects=1.0, snr=10.0, sites=2)
    sites = site.draw_sites(options)
    someone, _, _, table = subject(atlas, options)
    raw = artifacts.simulate_raw(someone, sites[1], sites[0], table, atlas, options, POSE)
    air = ~ndimage.binary_dilation(raw.clean[0] > 1, iterations=5)
    second = np.mean(np.square(raw.magnitude[:, air], dtype=float))
    assert sites[1].coils == 4
    assert second == pytest.approx(8 * np.mean(np.square(raw.sigma[air], dtype=float)), rel=0.03)


def test_the_scalp_surrounds_the_brain(simulate):
    raw, bare = simulate("skull"), simulate("motion", motion_mm=0.0, motion_degrees=0.0)
    added = raw.magnitude[0] - bare.magnitude[0]
    assert np.abs(added[ndimage.binary_erosion(raw.scan.mask, iterations=2)]).max() < 1
    assert added.max() > 300
    brain = raw.scan.t1_tissue.sum(0) > 0.5
    assert (raw.t1 - bare.t1)[~brain].max() > 800
    np.testing.assert_allclose(raw.t1[brain], bare.t1[brain], rtol=0.3, atol=1)
    weighted = ~raw.scan.acquisition.b0
    outside = (raw.magnitude - bare.magnitude)[weighted].mean(0)
    assert outside.max() / added.max() == pytest.approx(np.exp(-artifacts.SCALP_D), rel=0.05)


# --- the dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / "out"
    assert cli_phantom.main([str(out), "--sloppy", "--participants", "1", "--sites", "1",
                             "--shells", "1000", "--directions", "6", "--artifacts", "all"]) == 0
    return out


@pytest.mark.parametrize("part", [".", "sourcedata/truth"])
def test_the_validator_accepts_raw_data(dataset, part):
    done = subprocess.run(["bids-validator-deno", str(dataset / part), "--ignoreWarnings"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout


def test_raw_data_say_how_to_correct_them(dataset):
    """As the app reads them: the opposite encoding, the GRE and the phase belong to the DWI."""
    from bidsapp.cli import main

    stem = "sub-01/ses-siteA/{}/sub-01_ses-siteA"
    dwi = dataset / (stem.format("dwi") + "_dir-AP_part-mag_dwi.nii.gz")
    sidecar = json.loads(dwi.with_name(dwi.name.replace(".nii.gz", ".json")).read_text())
    epi = json.loads((dataset / (stem.format("fmap") + "_dir-PA_epi.json")).read_text())
    assert sidecar["PhaseEncodingDirection"] == "j-" and epi["PhaseEncodingDirection"] == "j"
    assert sidecar["PartialFourier"] == 0.75
    n = nib.load(dwi).shape[1]
    assert sidecar["TotalReadoutTime"] == pytest.approx(sidecar["EffectiveEchoSpacing"] * (n - 1))
    assert not (dataset / "derivatives").exists()
    phase = nib.load(str(dwi).replace("part-mag", "part-phase"))
    assert np.abs(phase.get_fdata()).max() <= np.pi + 1e-6
    assert main([str(dataset), str(dataset.parent / "derived"), "participant", "--dry-run"]) == 0


def test_the_truth_is_beside_the_raw_data(dataset):
    truth = dataset / "sourcedata/truth/sub-01/ses-siteA/dwi"
    rows = {name: np.genfromtxt(truth / f"sub-01_ses-siteA_desc-{name}_truth.tsv", names=True,
                                dtype=None, encoding=None)
            for name in ("motion", "eddy", "outliers")}
    image = nib.load(truth / "sub-01_ses-siteA_desc-clean_dwi.nii.gz")
    n = image.shape[3] + artifacts.REVERSE
    assert len(rows["motion"]) == len(rows["eddy"]) == n
    assert rows["motion"]["image"][-1] == "epi"
    r = np.array([[rows["motion"][f"rot_{i}{j}"] for j in "xyz"] for i in "xyz"])
    np.testing.assert_allclose(np.einsum("ijv,kjv->vik", r, r), np.tile(np.eye(3), (n, 1, 1)),
                               atol=1e-4)
    tables = [btable.read_acquisition(Part(*(f.parent / f"{f.name}{e}" for e in
                                             (".nii.gz", ".bval", ".bvec"))))
              for f in (truth / "sub-01_ses-siteA_desc-clean_dwi",
                        dataset / "sub-01/ses-siteA/dwi/sub-01_ses-siteA_dir-AP_part-mag_dwi")]
    for v in np.flatnonzero(~tables[0].b0):  # b-vectors of the truth are in the frame of the head
        np.testing.assert_allclose(r[..., v] @ tables[0].bvecs[v], tables[1].bvecs[v], atol=1e-4)
    names = {f.name for f in truth.glob("*.nii.gz")}
    assert {f"sub-01_ses-siteA_{n}.nii.gz" for n in ("desc-brain_mask", "desc-field_truth",
                                                     "desc-reference_dwi")} <= names


def test_artifacts_that_make_no_sense_are_refused(tmp_path, capsys):
    for argv, text in ((["--dropout", "2"], "share from 0 to 1"), (["--motion-mm", "-1"], "0 or"),
                       (["--motion-degrees", "90"], "at most 20"), (["--eddy-hz", "-3"], "0 or")):
        assert cli_phantom.main([str(tmp_path / "out"), *argv]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(UsageError, match="skull"):
        replace(EXACT, artifacts=("scull",))
    assert all(replace(EXACT, artifacts=("all",)).has(name) for name in ARTIFACTS)
    assert not EXACT.has("motion")
