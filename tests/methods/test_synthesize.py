"""Synthesis: what is measured in a participant, what is drawn from it, and what is written."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from bidsapp import kinds, methods
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.options import MODES
from bidsapp.simulate import mixture, protocols
from support import bids_tree
from support import synthetic_head as head
from support.app import content, load_first_run, qsphere, validate

SHELLS = (1000, 2000)
WM = ("wm1", "wm2", "wm3")
TERMS = ("dxx", "dxy", "dxz", "dyy", "dyz", "dzz")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Quality scores of briefly trained networks: they are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        made = kinds.Method.__init__
        patch.setattr(kinds.Method, "__init__", lambda self, context=None: made(
            self, context or kinds.MethodContext(sloppy=True)))
        yield


@pytest.fixture(scope="module")
def made():
    """(dwi, what was made of it in all modes)."""
    dwi, _, _ = head.participant()
    return dwi, methods.get("synthesize").synthesize(dwi, MODES, 7, "cpu")


def noise_free(truth, acquisition, s0):
    """S0 Σ f exp(−b gᵀ D g), from the table alone."""
    total, random = 0, "wm_volume0_d" in truth
    if random:
        d = truth[[f"wm_volume{i}_d" for i in range(len(acquisition))]].to_numpy()
        share = truth[[f"{name}_fraction" for name in WM]].sum(axis=1).to_numpy()
        total = share[:, None] * np.exp(-acquisition.bvals * d)
    for name in ("gm", "csf") if random else (*WM, "gm", "csf"):
        for_shell = {}
        for b in SHELLS:
            d = np.zeros((len(truth), 3, 3))
            if name in WM:
                for term in TERMS:
                    i, j = ("xyz".index(c) for c in term[1:])
                    d[:, i, j] = d[:, j, i] = truth[f"{name}_b{b}_{term}"]
            else:
                d += truth[f"{name}_b{b}_d"].to_numpy()[:, None, None] * np.eye(3)
            for_shell[b] = d
        columns = []
        for b, g in zip(acquisition.bvals, acquisition.bvecs, strict=True):
            d = for_shell[int(b) if b > 50 else SHELLS[0]]
            columns.append(np.exp(-b * np.einsum("i,vij,j->v", g, d, g)))
        total = total + truth[f"{name}_fraction"].to_numpy()[:, None] * np.column_stack(columns)
    return s0 * total


def tensors(truth, b, name="wm1"):
    d = np.zeros((len(truth), 3, 3))
    for term in TERMS:
        i, j = ("xyz".index(c) for c in term[1:])
        d[:, i, j] = d[:, j, i] = truth[f"{name}_b{b}_{term}"]
    return d


def test_regions_are_where_the_tissues_are():
    dwi, labels, _ = head.participant()
    found = tissue.find_regions(dwi, "cpu")
    assert found.callosum
    for name, label, least in (("gm", 1, 0.4), ("csf", 2, 0.15), ("single_fibre", 3, 0.99)):
        chosen = getattr(found, name)
        assert np.all(labels[chosen] == label), name
        assert chosen.sum() > least * (labels == label).sum(), name


def test_diffusivities_are_the_truth():
    """Every callosal voxel keeps its own; the noise floor does not lower CSF in the high shell."""
    dwi, labels, factor = head.participant()
    where = labels == 3
    measured = mixture.measure(dwi, labels == 1, labels == 2, where, "cpu")
    for i, b in enumerate(SHELLS):
        assert measured.gm_mean[i] == pytest.approx(1e3 * head.GM[b], rel=0.005)
        assert measured.csf_mean[i] == pytest.approx(1e3 * head.CSF[b], rel=0.02)
        assert measured.radial[:, i].mean() == pytest.approx(1e3 * head.RADIAL[b], rel=0.01)
        error = measured.axial[:, i] / (1e3 * head.AXIAL[b]) - factor[where]
        assert abs(error.mean()) < 0.003 and error.std() < 0.02


def test_the_floor_that_is_removed_is_that_of_each_shell():
    """Free water on two shells, the noise of one four times the other's, as harmonization may leave
    it: 3 µm²/ms, and 2 where the level of before is taken away from both."""
    rng, gain = np.random.default_rng(0), np.r_[1.0, np.full(60, 0.5), np.full(60, 2.0)]
    axes = protocols.spread(60)
    acq = Acquisition(np.r_[0, np.full(60, 800.0), np.full(60, 1000.0)],
                      np.concatenate([np.zeros((1, 3)), axes, axes]))
    clean = np.exp(-3e-3 * acq.bvals) * np.ones((400, 1))
    noise = 0.05 * gain * rng.standard_normal((2, *clean.shape))
    dwi = Dwi(np.hypot(clean + noise[0], noise[1]).astype(np.float32),
              np.ones((400, 1, 1), bool), np.eye(4), acq, 0.05, noise_gain=gain)
    everywhere = np.ones(400, bool)

    def slowest(scan):
        return mixture.measure(scan, everywhere, everywhere, everywhere, "cpu").csf_mean.min()

    assert slowest(dwi) > 2.9 and slowest(replace(dwi, noise_gain=None)) < 2.3


@pytest.mark.parametrize("b_delta", [1.0, -0.5])
def test_prolate_fit_is_exact_without_noise(rng, b_delta):
    bvecs = bids_tree.directions(15)
    acquisition = Acquisition(np.full(15, 2000.0), bvecs, np.full(15, b_delta))
    axial, radial = rng.uniform(0.8, 2.6, 60), rng.uniform(0.05, 0.7, 60)
    n = rng.normal(size=(60, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    d = (radial[:, None, None] * np.eye(3)
         + (axial - radial)[:, None, None] * n[:, :, None] * n[:, None, :])
    floor = 0.05
    clean = np.exp(-np.einsum("nij,vij->vn", acquisition.btensors / 1000, d))
    seen = torch.as_tensor(np.hypot(clean, floor))
    found = mixture.fit_prolate(seen, acquisition.btensors / 1000,
                                  torch.full((60,), floor, dtype=seen.dtype))
    np.testing.assert_allclose(found[0].numpy(), axial, rtol=1e-4)
    np.testing.assert_allclose(found[1].numpy(), radial, rtol=1e-4, atol=1e-5)


def test_prolate_fit_of_what_is_not_prolate(rng):
    """Isotropic, oblate, empty and rising signals give finite, prolate, bounded tensors."""
    bvecs = bids_tree.directions(20)
    b = Acquisition(np.full(20, 1000.0), bvecs).btensors / 1000
    oblate = np.exp(-np.einsum("nij,ij->n", b, np.diag([1.5, 1.5, 0.2])))
    rows = np.array([np.full(20, 0.4), oblate, np.zeros(20), np.full(20, 1.3),
                     rng.uniform(-0.1, 1, 20)])
    axial, radial = (x.numpy() for x in mixture.fit_prolate(
        torch.as_tensor(rows), b, torch.zeros(5, dtype=torch.float64)))
    assert np.isfinite(axial).all() and (radial >= 0).all()
    assert (axial >= radial).all() and (axial <= 3 + 1e-6).all()
    assert axial[0] == pytest.approx(-np.log(0.4), abs=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_truth_makes_the_signal(made, mode):
    """Rician moments about the signal that the table alone gives: E[S²] = A² + 2σ²."""
    dwi, result = made
    signal, truth = result.signals[mode].astype(float), result.truth[mode]
    assert signal.shape == (len(truth), len(dwi.acquisition)) == (10_000, 54)
    s0, sd = result.parameters["S0"], result.parameters["NoiseSD"]
    assert s0 == pytest.approx(np.median(dwi.mean_b0)) and sd == dwi.noise_sd
    clean = noise_free(truth, dwi.acquisition, s0)
    z = head.standardize(signal, clean, sd)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert z.std() == pytest.approx(1, abs=0.01)
    assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(len(z))


@pytest.mark.parametrize("mode", MODES)
def test_fractions_and_directions(made, mode):
    truth = made[1].truth[mode]
    fractions = truth[[f"{c}_fraction" for c in (*WM, "gm", "csf")]].to_numpy()
    np.testing.assert_allclose(fractions.sum(axis=1), 1, atol=1e-12)
    assert (fractions > 0).all()
    # five uniform numbers over their sum: 0.2 each on average, and alike
    np.testing.assert_allclose(fractions.mean(axis=0), 0.2, atol=0.005)
    assert stats.ks_2samp(fractions[:, 0], fractions[:, 4]).pvalue > 1e-3
    if mode == "random-wm":
        assert not [c for c in truth if "direction" in c or "dxx" in c]
        return
    n = truth[[f"wm2_direction_{c}" for c in "xyz"]].to_numpy()
    np.testing.assert_allclose(np.linalg.norm(n, axis=1), 1, atol=1e-9)
    for k in range(3):  # uniform on the sphere: each component is uniform on (-1, 1)
        assert stats.kstest(n[:, k], "uniform", (-1, 2)).pvalue > 1e-3
    for name in WM:
        n = truth[[f"{name}_direction_{c}" for c in "xyz"]].to_numpy()
        along = np.linalg.eigh(tensors(truth, 1000, name))[1][:, :, 2]
        np.testing.assert_allclose(np.abs((n * along).sum(axis=1)), 1, atol=1e-6)


def test_modes_differ_as_documented(made):
    tables = made[1].truth
    values = {m: np.linalg.eigvalsh(tensors(tables[m], 1000)) for m in MODES[:3]}
    axial = {m: v[:, 2] for m, v in values.items()}
    assert np.ptp(axial["syn"]) < 1e-12
    assert axial["syn"][0] == pytest.approx(head.AXIAL[1000], rel=0.02)
    for mode in ("sample-mean", "sample"):
        assert axial[mode].std() / axial[mode].mean() == pytest.approx(head.SPREAD, rel=0.2)
        np.testing.assert_allclose(values[mode][:, 0], values[mode][:, 1], atol=1e-12)  # prolate
        assert len(np.unique(axial[mode].round(12))) > 300
    for name, law in (("gm", head.GM), ("csf", head.CSF)):
        columns = {m: tables[m][f"{name}_b1000_d"] for m in MODES}
        for mode in ("syn", "sample-mean", "random-wm"):
            assert np.ptp(columns[mode]) == 0
            assert columns[mode][0] == pytest.approx(law[1000], rel=0.03)
        assert columns["sample"].std() > 0
    profile = tables["random-wm"].filter(regex="wm_volume").to_numpy()
    assert stats.kstest(profile[:, 20], "uniform", (0, 3e-3)).pvalue > 1e-3
    between = np.corrcoef(profile.T) - np.eye(54)
    assert np.abs(between).max() < 5 / np.sqrt(len(profile))


def test_a_population_is_one_voxel_in_all_shells(made):
    """The two shells' axial diffusivities go together, as they do in the head."""
    truth = made[1].truth["sample"]
    axial = [np.linalg.eigvalsh(tensors(truth, b))[:, 2] for b in SHELLS]
    assert np.corrcoef(axial)[0, 1] > 0.95
    other = np.linalg.eigvalsh(tensors(truth, 1000, "wm2"))[:, 2]
    assert abs(np.corrcoef(axial[0], other)[0, 1]) < 0.05


@pytest.mark.slow
def test_modes_share_layout_and_seeds_matter(made):
    dwi, result = made
    columns = ["wm1_fraction", "csf_fraction", "wm3_direction_y"]
    for mode in MODES:
        shared = [c for c in columns if c in result.truth[mode]]
        assert len(shared) == (2 if mode == "random-wm" else 3)
        pd.testing.assert_frame_equal(result.truth[mode][shared], result.truth["syn"][shared])
    synth = methods.get("synthesize")
    again, other = (synth.synthesize(dwi, ["sample"], seed, "cpu") for seed in (7, 8))
    np.testing.assert_array_equal(again.signals["sample"], result.signals["sample"])
    pd.testing.assert_frame_equal(again.truth["sample"], result.truth["sample"])
    assert np.abs(other.signals["sample"] - again.signals["sample"]).mean() > 10


def test_leaves_its_input_unchanged():
    dwi, _, _ = head.participant()
    before = dwi.signal.copy()
    methods.get("synthesize").synthesize(dwi, ["syn"], 0, "cpu")
    np.testing.assert_array_equal(dwi.signal, before)


def test_every_column_is_described(made):
    _, result = made
    for mode in MODES:
        assert list(result.columns[mode]) == list(result.truth[mode].columns)
        assert all({"Description", "Units"} <= set(c) for c in result.columns[mode].values())


@pytest.mark.slow
def test_no_callosum_takes_other_single_fibres_and_says_so():
    dwi, labels, _ = head.participant(callosum=False)
    found = tissue.find_regions(dwi, "cpu")
    assert not found.callosum and np.all(labels[found.single_fibre] == 4)
    result = methods.get("synthesize").synthesize(dwi, ["syn"], 0, "cpu")
    assert result.parameters["SingleFibreRegion"] == "brain"
    assert "corpus callosum" in result.notices[0]


def test_single_shell_is_used_and_said():
    dwi, _, _ = head.participant(scheme=((0, 2), (1000, 30)))
    result = methods.get("synthesize").synthesize(dwi, ["sample"], 0, "cpu")
    assert "single shell" in result.notices[0]
    assert result.truth["sample"].shape == (10_000, 5 + 9 + 3 * 6 + 2)


def test_a_poor_shell_borrows_the_nearest():
    """Four directions at b = 2000 determine no tensor; isotropic tissue has its own there."""
    dwi, labels, _ = head.participant(scheme=((0, 4), (1000, 30), (2000, 4)))
    measured = mixture.measure(dwi, labels == 1, labels == 2, labels == 3, "cpu")
    np.testing.assert_array_equal(measured.axial[:, 0], measured.axial[:, 1])
    assert measured.gm_mean[1] == pytest.approx(1e3 * head.GM[2000], rel=0.01)


def test_spherical_encoding_borrows_too():
    bvals = np.r_[0, 0, np.full(20, 1000), np.full(5, 1500)].astype(float)
    axes = np.vstack([np.zeros((2, 3)), bids_tree.directions(20), np.zeros((5, 3))])
    acquisition = Acquisition(bvals, axes, np.r_[np.ones(22), np.zeros(5)])
    methods.get("synthesize").check(acquisition)
    tensor = np.tile([1.7, 0, 0, 0.3, 0, 0.3], (1, 5, 2, 1))
    fractions = np.array([[1.0, 0, 0, 0, 0]])
    signal = mixture.attenuation(fractions, tensor, acquisition, "cpu")[0]
    np.testing.assert_allclose(signal[:2], 1)
    np.testing.assert_allclose(signal[22:], np.exp(-1.5 * (1.7 + 0.6) / 3), rtol=1e-12)


@pytest.mark.parametrize("scheme", [((0, 2), (1000, 5)), ((1000, 30),), ((0, 4),)])
def test_refuses_what_determines_no_tensor(scheme):
    bvals, axes = bids_tree.table(scheme)
    with pytest.raises(Refusal, match="A b0 and a shell of 6 or more"):
        methods.get("synthesize").check(Acquisition(bvals, axes))


@pytest.mark.parametrize("label,name", [(1, "grey matter"), (2, "CSF")])
def test_refuses_a_slab_that_lacks_a_tissue(label, name):
    dwi, labels, _ = head.participant()
    keep = labels == 3 if label == 1 else labels != label
    mask = dwi.unmask(keep)
    part = replace(dwi, signal=dwi.signal[keep], mask=mask)
    with pytest.raises(Refusal, match=f"[0-9] {name} voxels were found, 10 or more are needed"):
        methods.get("synthesize").synthesize(part, ["syn"], 0, "cpu")


def test_refuses_too_few_single_fibres():
    dwi, labels, _ = head.participant()
    keep = labels < 3
    part = replace(dwi, signal=dwi.signal[keep], mask=dwi.unmask(keep))
    with pytest.raises(Refusal, match=r"single-fibre \(FA > 0.7\) voxels were found"):
        methods.get("synthesize").synthesize(part, ["syn"], 0, "cpu")


@pytest.mark.slow
def test_end_to_end(tmp_path):
    bids, out = head.write_dataset(tmp_path / "bids"), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti", "--sloppy", "--synthesize", "syn",
            "random-wm")
    assert qsphere(*argv) == 0
    assert validate(out) == []
    stem = out / "sub-01/dwi/sub-01_desc-synthrandomwm"
    image = nib.load(f"{stem}_dwi.nii.gz")
    assert image.shape == (10_000, 1, 1, 54)
    sidecar = json.loads(stem.with_name(f"{stem.name}_dwi.json").read_text())
    assert sidecar["SynthesizedVolumes"] == list(range(54)) and sidecar["RandomSeed"] == 0
    assert sidecar["Model"]["Parameters"]["Mode"] == "random-wm"
    assert sidecar["EchoTime"] == 0.08 and "EffectiveEchoSpacing" not in sidecar
    assert (out / sidecar["Truth"].removeprefix("bids::")).is_file()
    bvals, axes = bids_tree.table(head.SCHEME)
    np.testing.assert_array_equal(np.loadtxt(f"{stem}_dwi.bval"), bvals)
    np.testing.assert_allclose(np.loadtxt(f"{stem}_dwi.bvec"),
                               np.loadtxt(bids / "sub-01/dwi/sub-01_dwi.bvec"), atol=1e-7)
    # what a user reads makes the signal, in world axes
    for mode in ("syn", "randomwm"):
        stem = out / f"sub-01/dwi/sub-01_desc-synth{mode}"
        truth = pd.read_csv(f"{stem}_truth.tsv", sep="\t")
        signal = np.asarray(nib.load(f"{stem}_dwi.nii.gz").dataobj)[:, 0, 0].astype(float)
        facts = sidecar["Model"]["Parameters"]
        z = head.standardize(signal, noise_free(truth, Acquisition(bvals, axes), facts["S0"]),
                         facts["NoiseSD"])
        assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(len(z))
        assert z.std() == pytest.approx(1, abs=0.01)
    label = np.asarray(nib.load(
        out / "sub-01/dwi/sub-01_model-synth_param-tissue_dwimap.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, 1, 2, 3}
    page = (out / "sub-01.html").read_text()
    assert "synthesize" in page and "10.1007/s13218-023-00811-y" in page
    before = content(out)
    assert qsphere(*argv) == 0
    assert qsphere(bids, tmp_path / "other", *argv[2:]) == 0
    assert before == content(out)
    same = [n for n in before if "synth" in n and n.endswith((".nii.gz", ".tsv"))]
    assert len(same) == 6
    assert [n for n in same if before[n] != content(tmp_path / "other")[n]] == []
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    assert list(out.rglob("*synth*")), "what is not asked for again stays"


@pytest.mark.slow
def test_planar_encoding_end_to_end(tmp_path):
    bids, out = head.write_dataset(tmp_path / "bids", b_delta=-0.5), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--sloppy",
                   "--synthesize", "syn") == 0
    assert validate(out) == []
    stem = out / "sub-01/dwi/sub-01_desc-synthsyn"
    bvals, axes = bids_tree.table(head.SCHEME)
    trace = np.loadtxt(f"{stem}_dwi.btens")[:, [0, 4, 8]].sum(axis=1)
    np.testing.assert_allclose(trace, bvals, rtol=1e-4)
    facts = json.loads(stem.with_name(f"{stem.name}_dwi.json").read_text())["Model"]["Parameters"]
    axial, radial = (facts[f"SingleFibre{k}Diffusivity"]["b1000m50"] for k in ("Axial", "Radial"))
    assert axial == pytest.approx(head.AXIAL[1000], rel=0.03)
    assert radial == pytest.approx(head.RADIAL[1000], rel=0.03)
    truth = pd.read_csv(f"{stem}_truth.tsv", sep="\t")
    signal = np.asarray(nib.load(f"{stem}_dwi.nii.gz").dataobj)[:, 0, 0].astype(float)
    i = 10  # one volume of b = 1000: b : D = b/2 (tr D − gᵀ D g)
    clean = truth["gm_fraction"] * np.exp(-1000 * truth["gm_b1000m50_d"])
    clean += truth["csf_fraction"] * np.exp(-1000 * truth["csf_b1000m50_d"])
    for name in WM:
        d = tensors(truth, "1000m50", name)
        along = np.einsum("i,vij,j->v", axes[i], d, axes[i])
        clean += truth[f"{name}_fraction"] * np.exp(-500 * (np.trace(d, axis1=1, axis2=2) - along))
    z = head.standardize(signal[:, i], facts["S0"] * clean.to_numpy(), facts["NoiseSD"])
    assert abs(z.mean()) < 5 / np.sqrt(len(z))


@pytest.mark.slow
def test_head_of_one_tensor_is_refused_and_the_rest_goes_on(bids_tree, tmp_path):
    assert qsphere(bids_tree(("01",)), tmp_path / "out", "participant", "--estimate", "dti",
                   "--synthesize", "syn") == 1
    (status,) = tmp_path.glob("out/sub-01/log/*/status.json")
    assert "voxels were found" in json.loads(
        status.read_text())["runs"]["sub-01"]["refusals"]["synthesize"]
    assert list(tmp_path.glob("out/sub-01/dwi/*model-tensor*"))
    assert not list(tmp_path.glob("out/sub-01/dwi/*synth*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdt_multishell", "siemens_xa30"])
def test_real_participants(test_data, name):
    """Diffusivities of living tissue: callosal 1.4–2.2 along and below 0.5 across, grey matter
    0.5–0.9 µm²/ms, CSF above grey matter, each falling with b."""
    dwi = load_first_run(test_data(name))
    synth = methods.get("synthesize")
    found = tissue.find_regions(dwi, "cpu")
    assert found.callosum
    measured = mixture.measure(dwi, found.gm, found.csf, found.single_fibre, "cpu")
    assert np.all((measured.axial.mean(0) > 1.4) & (measured.axial.mean(0) < 2.2))
    assert np.all((measured.radial.mean(0) > 0.1) & (measured.radial.mean(0) < 0.5))
    assert np.all((measured.gm_mean > 0.5) & (measured.gm_mean < 0.9))
    assert np.all(measured.csf_mean > 2 * measured.gm_mean)
    for values in (measured.axial.mean(0), measured.gm_mean, measured.csf_mean):
        assert np.all(np.diff(values) < 0)
    result = synth.synthesize(dwi, MODES, 0, "cpu")
    for signal in result.signals.values():
        assert np.isfinite(signal).all() and signal.shape[1] == len(dwi.acquisition)
