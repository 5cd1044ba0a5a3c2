"""Free water: its fraction, its SD and the corrected tensor, against simulated truth and dipy."""

import json
import time
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from bidsapp import kinds, methods
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.methods.estimate_freewater import method as freewater
from bidsapp.methods.estimate_freewater import network
from support import bids_tree
from support import synthetic_head as head
from support.app import qsphere, validate

SNR = 25.0
KINDS = ("mixture", "sparse", "one fibre")


def acquisition(scheme=((0, 6), (1000, 30), (2000, 60))):
    bvals, axes = bids_tree.table(scheme)
    return Acquisition(bvals, axes)


def simulate(kind, acq, n, seed):
    """Clean S/S0 (n, measurement), fraction of free water (n,), FA of the tissue or None.

    mixture: fractions of three fibres, grey matter and water are uniform over their sum. sparse:
    water is uniform on 0–1, each tissue absent half the time. one fibre: water, uniform, and one
    tensor, which is the model of dipy.
    """
    rng = np.random.default_rng(seed)
    share = rng.uniform(size=(n, 5))
    if kind == "mixture":
        share /= share.sum(1, keepdims=True)
    else:
        share[:, :4] *= rng.uniform(size=(n, 4)) < 0.5
        share[share[:, :4].sum(1) == 0, 3] = 1
        if kind == "one fibre":
            share[:, :4] = [1, 0, 0, 0]
        share[:, :4] *= (1 - share[:, 4:]) / share[:, :4].sum(1, keepdims=True)
    axes = rng.standard_normal((n, 3, 3))
    axes /= np.linalg.norm(axes, axis=2, keepdims=True)
    axial, radial = rng.uniform(1.4, 2.0, (n, 3)), rng.uniform(0.15, 0.45, (n, 3))
    b = acq.bvals / 1000
    cosine = np.einsum("vki,ni->vkn", axes, acq.bvecs)
    fibres = np.exp(-b * (radial[..., None] + (axial - radial)[..., None] * cosine**2))
    grey = np.exp(-b * rng.uniform(0.7, 0.9, (n, 1)))
    clean = (np.einsum("vk,vkn->vn", share[:, :3], fibres) + share[:, 3:4] * grey
             + share[:, 4:] * np.exp(-3 * b))
    a, r = axial[:, 0], radial[:, 0]
    fa = (a - r) / np.sqrt(a**2 + 2 * r**2) if kind == "one fibre" else None
    return clean, share[:, 4], fa


def as_dwi(clean, acq, seed, s0=500.0, snr=SNR):
    noise = np.random.default_rng([seed, 1]).standard_normal((2, *clean.shape)) / snr
    signal = (s0 * np.hypot(clean + noise[0], noise[1])).astype(np.float32)
    return Dwi(signal, np.ones((len(clean), 1, 1), bool), np.diag([2.0, 2, 2, 1]), acq, s0 / snr)


def dipy_fit(dwi, fit_method):
    """Fraction, FA and voxels/s of dipy's free-water tensor."""
    from dipy.core.gradients import gradient_table
    from dipy.reconst.fwdti import FreeWaterTensorModel

    table = gradient_table(dwi.acquisition.bvals, bvecs=dwi.acquisition.bvecs)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = FreeWaterTensorModel(table, fit_method=fit_method).fit(dwi.signal.astype(float))
    return fit.f, fit.fa, len(dwi.signal) / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def trained():
    """(method, network, acquisition): trained once at full length for an acquisition at SNR 25."""
    acq, method = acquisition(), methods.get("estimate_freewater")
    model, error = network.train_network(
        freewater.literature_diffusivities(2), acq, np.array([1 / SNR]), False, 0, "cpu",
        methods.get("estimate_freewater").settings("network"))
    return method, model, error, acq


@pytest.fixture
def applied(trained, monkeypatch):
    """`apply` with the network that was trained once."""
    method, model, error, _ = trained
    monkeypatch.setattr(network, "train_network", lambda *args: (model, error))
    return lambda dwi: method.apply(dwi, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
def test_error_and_speed_beside_dipy(trained, applied, kind):
    """Lower MSE of the fraction by more than three standard errors, and 100 times faster, once it
    is trained."""
    acq = trained[3]
    clean, truth, _ = simulate(kind, acq, 20_000, 3)
    dwi = as_dwi(clean, acq, 3)
    few = as_dwi(clean[:400], acq, 3)
    b0 = torch.as_tensor(acq.b0)
    start = time.perf_counter()
    with torch.no_grad():
        trained[1](network.normalise(torch.from_numpy(np.array(dwi.signal)), b0)[0])
    speed = len(dwi.signal) / (time.perf_counter() - start)
    square = (applied(dwi).maps["fraction"] - truth) ** 2
    for fit_method in ("WLS", "NLS"):
        found, _, voxels_per_second = dipy_fit(few, fit_method)
        peer = (found - truth[:400]) ** 2
        error = 3 * np.hypot(square.std() / len(square)**0.5, peer.std() / len(peer)**0.5)
        assert square.mean() + error < peer.mean(), fit_method
        assert speed > 100 * voxels_per_second, fit_method


@pytest.mark.slow
def test_sd_is_that_of_the_error(trained):
    """On mixtures from the same law: errors over their SD have SD 1, in every third of the SDs."""
    _, model, error, acq = trained
    clean, truth = network.draw_mixtures(freewater.literature_diffusivities(2), acq, 20_000, 99,
                                         "cpu")
    dwi = as_dwi(clean.numpy(), acq, 4)
    with torch.no_grad():
        found, sd = model(network.normalise(torch.from_numpy(np.array(dwi.signal)),
                                            torch.as_tensor(acq.b0))[0])
    z = ((found - truth) / sd).numpy()
    for part in np.array_split(np.argsort(sd.numpy()), 3):
        assert z[part].std() == pytest.approx(1, abs=0.15)
        assert abs(z[part].mean()) < 0.15
    assert float((found - truth).square().mean().sqrt()) == pytest.approx(error, rel=0.05)


@pytest.mark.slow
def test_corrected_tensor_is_nearer_the_truth(trained, applied):
    acq = trained[3]
    clean, truth, fa = simulate("one fibre", acq, 4000, 5)
    dwi = as_dwi(clean, acq, 5)
    maps = applied(dwi).maps
    plain = methods.get("estimate_dti").apply(dwi, "cpu").maps
    middle = (truth > 0.2) & (truth < 0.7)
    corrected, before = (np.abs(m["fa"] - fa)[middle].mean() for m in (maps, plain))
    assert corrected < before / 3
    left = maps["fraction"] > freewater.MAX_WATER
    assert 0.1 < left.mean() < 0.3
    assert (maps["fa"] > 0.999).mean() < 0.002, "what noise makes impossible is not corrected"
    for name in ("fa", "md"):
        np.testing.assert_allclose(maps[name][left], plain[name][left], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_head_is_its_own_model():
    """CSF is water, tissue is not, and what was measured is said."""
    dwi, labels, _ = head.participant()
    method = methods.get("estimate_freewater", context=kinds.MethodContext(sloppy=True))
    derived = method.apply(dwi, "cpu", 3)
    fraction = derived.maps["fraction"]
    assert derived.parameters["Diffusivities"] == "measured in this run" and not derived.notices
    for b, d in head.CSF.items():
        assert derived.parameters["WaterDiffusivity"][f"b{b}"] == pytest.approx(d, rel=0.03)
    assert np.median(fraction[labels == 2]) > 0.85
    for label in (1, 3, 4):
        assert np.median(fraction[labels == label]) < 0.15
    np.testing.assert_array_equal(method.apply(dwi, "cpu", 3).maps["fraction"], fraction)
    assert np.abs(method.apply(dwi, "cpu", 4).maps["fraction"] - fraction).max() > 1e-3


def test_where_little_else_is_left_the_signal_stays(monkeypatch):
    """A voxel holds nine parts of water and one of grey matter. Whatever fraction a network gives,
    up to MAX_WATER the water is removed, and above it none is."""
    acq = acquisition(((0, 2), (1000, 12), (2000, 16)))
    b = acq.bvals / 1000
    clean = np.tile(0.1 * np.exp(-0.8 * b) + 0.9 * np.exp(-3 * b), (60, 1))
    dwi, md = as_dwi(clean, acq, 1, snr=1000), {}
    for fraction in (0.0, 0.3, freewater.MAX_WATER + 0.01):
        said = torch.full((60,), fraction), torch.full((60,), 0.1)
        monkeypatch.setattr(network, "train_network", lambda *_, said=said: (lambda _: said, 0.0))
        md[fraction] = methods.get("estimate_freewater").apply(dwi, "cpu").maps["md"]
    asis, less, most = md.values()
    assert (most == asis).all() and (less < asis).all()


def test_what_stands_for_the_unknown():
    """No tissue, no noise level, signals that were divided by S0, voxels without signal."""
    acq = acquisition(((0, 2), (1000, 12), (2000, 16)))
    clean, _, _ = simulate("mixture", acq, 60, 1)
    method = methods.get("estimate_freewater", context=kinds.MethodContext(sloppy=True))
    dwi = as_dwi(clean, acq, 1)
    signal = dwi.signal.copy()
    signal[7] = 0
    derived = method.apply(Dwi(signal, dwi.mask, dwi.affine, acq), "cpu")
    assert derived.parameters["NoiseSD"] == "assumed: S0 / 25"
    assert derived.parameters["Diffusivities"] == "literature"
    assert "voxels were found" in derived.notices[0]
    assert derived.counts["freewater_no_estimate"] == 1 and not derived.valid[7]
    assert all(values[7] == 0 for values in derived.maps.values())
    shares = np.column_stack([np.ones((60, 2)), dwi.signal[:, 2:] / dwi.mean_b0[:, None]])
    known = Dwi(shares.astype(np.float32), dwi.mask, dwi.affine, acq, 1 / SNR,
                s0_known=True)
    assert np.isfinite(method.apply(known, "cpu").maps["fraction"]).all()


def test_s0_is_known_to_the_training_where_it_is_said(monkeypatch):
    clean, _, _ = simulate("mixture", acq := acquisition(), 60, 1)
    said = []

    def learn(measured, acquisition, noise, known, *others):
        said.append(known)
        raise Refusal("enough")

    monkeypatch.setattr(network, "train_network", learn)
    ones = replace(as_dwi(clean, acq, 1), signal=np.ones((60, len(acq)), np.float32))
    for known in (True, False):
        with pytest.raises(Refusal, match="enough"):
            methods.get("estimate_freewater").apply(replace(ones, s0_known=known), "cpu")
    assert said == [True, False]


def test_mixtures_hold_pure_tissue_and_pure_water():
    acq = acquisition(((0, 2), (1000, 12), (2000, 16)))
    signal, water = network.draw_mixtures(freewater.literature_diffusivities(2), acq, 15_000, 0,
                                          "cpu")
    assert signal.shape == (15_000, 30) and water.shape == (15_000,)
    assert water.min() < 0.001 and water.max() > 0.999
    some = water[1::2]  # uniform
    assert some.mean() == pytest.approx(0.5, abs=0.02) and some.var() == pytest.approx(1 / 12, 0.05)
    pure = signal[water > 0.995].mean(0).numpy()
    np.testing.assert_allclose(pure, np.exp(-3 * acq.bvals / 1000), atol=0.01)


def test_water_of_a_b0_and_of_shells():
    bvals, axes = bids_tree.table(((0, 1), (30, 1), (1000, 12), (2000, 16)))
    axes[1] = [0.6, 0, 0.8]
    acq = Acquisition(bvals, axes)
    found = freewater.water_attenuation(freewater.literature_diffusivities(2), acq)
    np.testing.assert_allclose(found, np.exp(-3e-3 * acq.bvals), rtol=1e-6)


def test_refuses_what_determines_no_tensor():
    acq = acquisition(((0, 2), (1000, 5)))
    with pytest.raises(Refusal, match="A b0 and a shell of 6 or more"):
        methods.get("estimate_freewater").apply(as_dwi(np.ones((9, 7)), acq, 0), "cpu")


@pytest.mark.slow
def test_end_to_end(tmp_path):
    bids, out = head.write_dataset(tmp_path / "bids"), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "freewater", "--sloppy") == 0
    assert validate(out) == []
    stem = "sub-01_model-freewater_param-"
    found = {p.name.removeprefix(stem).removesuffix("_dwimap.nii.gz")
             for p in out.glob(f"sub-01/dwi/{stem}*.nii.gz")}
    assert found == {"fraction", "fraction_stat-std", "fa", "md"}
    sidecar = json.loads((out / f"sub-01/dwi/{stem}fa_dwimap.json").read_text())
    assert "of the signal as it is" in sidecar["Model"]["Parameters"]["NotCorrected"]
    image = np.asarray(nib.load(out / f"sub-01/dwi/{stem}fraction_dwimap.nii.gz").dataobj)
    assert np.median(image[head.tissues() == 2]) > 0.85
    assert "10.1007/978-3-030-52893-5_8" in (out / "logs/CITATION.md").read_text()
