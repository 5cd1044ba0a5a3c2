"""The tensor fit against closed forms, dipy and Monte Carlo."""

import nibabel as nib
import numpy as np
import pytest
import torch
from dipy.reconst.dti import TensorModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from bidsapp import tensor
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.evaluate.change import compare_signals
from bidsapp.methods import get

UPPER = np.triu_indices(3)


def acquisition(rng, n=30, b=1000.0, n_b0=2, b_delta=None):
    g = rng.normal(size=(n, 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    return Acquisition(np.r_[np.zeros(n_b0), np.broadcast_to(b, n)], np.r_[np.zeros((n_b0, 3)), g],
                       None if b_delta is None else np.r_[np.ones(n_b0), b_delta])


def tensors(n, rng, low=0.2e-3, high=2.5e-3):
    """Random (n, 3, 3) in mm²/s, their eigenvalues (descending) and first eigenvectors."""
    axes = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    values = -np.sort(-rng.uniform(low, high, (n, 3)), axis=1)
    return np.einsum("vij,vj,vkj->vik", axes, values, axes), values, axes[:, :, 0]


def signals(acq, d, s0=1.0):
    return s0 * np.exp(-np.einsum("nij,vij->vn", acq.btensors, d))


def fa_of(values):
    a, b, c = values.T
    return np.sqrt(((a - b)**2 + (b - c)**2 + (c - a)**2) / 2 / (values**2).sum(1))


def fit(signal, acq, **options):
    found = tensor.fit(torch.as_tensor(signal), tensor.design(acq.btensors), **options)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_recovers_noise_free_tensors(rng, dtype, tolerance, weighted):
    """Linear, planar and spherical b-tensors together."""
    acq = acquisition(rng, 39, rng.uniform(300, 2000, 39), 3,
                      np.repeat([1.0, -0.5, 0.0], 13))
    d, values, axes = tensors(200, rng)
    found = fit(signals(acq, d, 870.0).astype(dtype), acq, weighted=weighted)
    expected = {"fa": fa_of(values), "md": values.mean(1), "ad": values[:, 0],
                "rd": values[:, 1:].mean(1), "s0": np.full(200, 870.0)}
    for name, truth in expected.items():
        scale = 1 if name == "fa" else truth
        np.testing.assert_allclose(found[name] / scale, truth / scale, atol=tolerance)
    distinct = values[:, 0] - values[:, 1] > 1e-4
    cosine = np.abs((found["direction"] * axes).sum(1))[distinct]
    np.testing.assert_allclose(cosine, 1, atol=max(tolerance, 1e-9))
    assert not found["failed"].any()


@settings(deadline=None, max_examples=50)
@given(values=st.tuples(*[st.floats(0.05, 3)] * 3), seed=st.integers(0, 99),
       equal=st.sampled_from([(), (0, 1), (1, 2), (0, 1, 2)]))
def test_eigenvalues_and_direction_solve_the_eigenproblem(values, seed, equal):
    """Also where two or three eigenvalues coincide; truth from LAPACK."""
    values = np.array(values)
    values[list(equal)] = values[list(equal)].mean() if equal else 0
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    d = axes * values @ axes.T
    found, direction = tensor._eigen(torch.tensor(d[UPPER])[:, None])
    np.testing.assert_allclose(found[:, 0], np.linalg.eigvalsh(d)[::-1], atol=1e-7)
    v = direction[:, 0].numpy()
    assert np.linalg.norm(v) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(d @ v, found[0, 0].item() * v, atol=1e-5)


def test_gradients(rng):
    """Every output, with and without a measurement that is left out."""
    acq = acquisition(rng, 12)
    d, _, _ = tensors(3, rng)
    signal = signals(acq, d, 5.0) * rng.uniform(0.9, 1.1, (3, 14))
    x = tensor.design(acq.btensors)
    names = ("fa", "md", "ad", "rd", "direction", "s0", "sigma", "fa_std", "md_std")
    # diffusivities scaled to order 1, so that gradcheck's tolerances mean something
    scale = {"md": 1e3, "ad": 1e3, "rd": 1e3, "md_std": 1e3}
    for holes in (None, 5):
        if holes:
            signal[1, holes] = -1.0
        inputs = torch.tensor(signal, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda s: tuple(tensor.fit(s, x)[k] * scale.get(k, 1) for k in names), (inputs,),
            atol=1e-6, rtol=1e-4)


def test_gradient_is_finite_for_an_isotropic_tensor(rng):
    acq = acquisition(rng, 12)
    signal = torch.tensor(signals(acq, 1e-3 * np.eye(3)[None]), requires_grad=True)
    tensor.fit(signal, tensor.design(acq.btensors))["md"].sum().backward()
    assert torch.isfinite(signal.grad).all()


@pytest.mark.parametrize("method", ["WLS", "OLS"])
def test_equals_dipy_on_noisy_signals(rng, method):
    acq = acquisition(rng, 40, np.repeat([1000.0, 2500.0], 20))
    d, _, _ = tensors(500, rng)
    signal = np.hypot(signals(acq, d, 300.0) + rng.normal(0, 10, (500, 42)),
                      rng.normal(0, 10, (500, 42))).astype(np.float32)
    peer = TensorModel(acq.to_dipy(), fit_method=method, return_S0_hat=True).fit(signal)
    found = fit(signal, acq, weighted=method == "WLS")
    np.testing.assert_allclose(found["fa"], peer.fa, atol=1e-5)
    np.testing.assert_allclose(found["md"], peer.md, rtol=1e-4)
    np.testing.assert_allclose(found["ad"], peer.ad, rtol=1e-4)
    np.testing.assert_allclose(found["s0"], peer.S0_hat, rtol=1e-4)


@pytest.mark.parametrize("direction", ["AP", "PA"])
def test_equals_dipy_on_siemens_xa30(test_data, direction):
    """99 % of the voxels with positive signals only: FA within 1e-4, MD within 1e-4 relative."""
    stem = test_data("siemens_xa30") / f"sub-01/dwi/sub-01_dir-{direction}_dwi"
    image = nib.load(f"{stem}.nii.gz")
    acq = Acquisition(np.loadtxt(f"{stem}.bval"), np.loadtxt(f"{stem}.bvec").T)
    signal = np.asarray(image.dataobj, dtype=np.float32).reshape(-1, len(acq))
    signal = signal[(signal > 0).all(1) & (signal[:, acq.b0].mean(1) > 100)]
    peer = TensorModel(acq.to_dipy(), fit_method="WLS").fit(signal)
    found = fit(signal, acq)
    close = (np.abs(found["fa"] - peer.fa) < 1e-4) & (
        np.abs(found["md"] - peer.md) < 1e-4 * peer.md)
    assert len(signal) > 20_000
    assert close.mean() >= 0.99


def test_standard_errors_are_those_of_repeated_measurements(rng):
    """20 000 noisy repetitions of five tensors: SD of FA and MD, and σ, within 4 %."""
    acq = acquisition(rng, 60, np.repeat([1000.0, 1500.0], 30), 4)
    axes = np.linalg.qr(rng.normal(size=(5, 3, 3)))[0]
    values = np.array([[1.7, 0.4, 0.3], [1.2, 0.8, 0.5], [1.0, 0.9, 0.3], [2.2, 1.2, 0.9],
                       [1.3, 0.7, 0.7]]) * 1e-3
    d = np.einsum("vij,vj,vkj->vik", axes, values, axes)
    for truth in d:
        clean = signals(acq, truth[None], 100.0)
        noisy = clean + rng.normal(0, 1.5, (20_000, len(acq)))
        found = fit(noisy, acq)
        for name in ("fa", "md"):
            told = np.sqrt((found[f"{name}_std"]**2).mean())
            assert told == pytest.approx(found[name].std(), rel=0.04)
        assert np.sqrt((found["sigma"]**2).mean()) == pytest.approx(1.5, rel=0.04)


def test_noise_is_unbiased_with_few_measurements(rng):
    """Nine leave two degrees of freedom; one more would make σ² a third too small. The standard
    error of its mean over 20 000 repetitions is 0.7 %."""
    acq = acquisition(rng, 8, n_b0=1)
    clean = signals(acq, np.diag([1.2e-3, 0.8e-3, 0.6e-3])[None], 100.0)
    found = fit(clean + rng.normal(0, 0.5, (20_000, len(acq))), acq)
    assert (found["sigma"]**2).mean() == pytest.approx(0.25, rel=0.04)


def test_measurements_that_are_not_positive_do_not_count(rng):
    acq = acquisition(rng, 20)
    d, _, _ = tensors(4, rng)
    signal = signals(acq, d, 50.0) * rng.uniform(0.95, 1.05, (4, 22))
    bad = signal.copy()
    bad[0, 3], bad[1, 7], bad[2, 9] = 0, -4, np.nan
    found = fit(bad, acq)
    for voxel, hole in ((0, 3), (1, 7), (2, 9)):
        keep = np.arange(22) != hole
        alone = fit(signal[voxel:voxel + 1, keep], acq[keep])
        for name in ("fa", "md", "s0", "sigma", "fa_std", "md_std"):
            np.testing.assert_allclose(found[name][voxel], alone[name][0], rtol=1e-8)


def test_handled_voxels_are_flagged(rng):
    """Singular, negative eigenvalue, and FA of 1: 0 or dipy's smallest eigenvalue, and counted."""
    acq = acquisition(rng, 20)
    d = np.stack([np.diag([1e-3, 0.5e-3, 0.4e-3]), np.diag([1.5e-3, 0.5e-3, -0.2e-3]),
                  np.diag([2e-3, -1e-4, -2e-4])])
    signal = np.concatenate([signals(acq, d, 20.0), np.zeros((1, 22)), signals(acq, d[:1], 20.0)])
    signal[4, 6:] = 0  # six measurements are left
    found = fit(signal, acq)
    np.testing.assert_array_equal(found["failed"], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found["clamped"], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(found["saturated"], [0, 0, 1, 0, 0])
    for name in ("fa", "md", "s0", "direction", "sigma", "fa_std"):
        assert (found[name][3:] == 0).all()
    peer = TensorModel(acq.to_dipy(), fit_method="WLS").fit(signal[:3])
    np.testing.assert_allclose(found["rd"][:3], peer.rd, rtol=1e-6)


@pytest.mark.parametrize(("n", "b", "n_b0"), [(5, 1000.0, 1), (30, 1000.0, 0), (6, 1000.0, 0)])
def test_dti_refuses_what_does_not_determine_a_tensor(rng, n, b, n_b0):
    with pytest.raises(Refusal, match="7 unknowns, but this acquisition determines"):
        get("estimate_dti").check(acquisition(rng, n, b, n_b0))


def test_dti_refuses_directions_on_one_cone():
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    g = np.stack([0.6 * np.cos(angle), 0.6 * np.sin(angle), np.full(20, 0.8)], 1)
    with pytest.raises(Refusal, match="cone"):
        get("estimate_dti").check(
            Acquisition(np.r_[0, np.full(20, 1e3)], np.r_[np.zeros((1, 3)), g]))


def test_dti_counts(rng):
    acq = acquisition(rng, 20)
    d, _, _ = tensors(9, rng)
    signal = signals(acq, d, 500.0)
    signal[2], signal[4, 5] = 0, -1
    dwi = Dwi(signal.astype(np.float32), np.ones((3, 3, 1), bool), np.eye(4), acq)
    derived = get("estimate_dti").apply(dwi, "cpu")
    assert derived.counts["dti_no_fit"] == 1
    assert derived.counts["dti_nonpositive_signal"] == 2


def multishell(rng, *shells, n_b0=3):
    """Acquisition of (b, directions) or (b, directions, jitter) each."""
    bvals = [np.zeros(n_b0), *(b + rng.uniform(-1, 1, n) * (jitter[0] if jitter else 0)
                               for b, n, *jitter in shells)]
    g = rng.normal(size=(sum(map(len, bvals)), 3))
    return Acquisition(np.concatenate(bvals), g / np.linalg.norm(g, axis=1, keepdims=True))


@pytest.mark.parametrize(("shells", "b_max", "highest"), [
    ([(700, 12), (1500, 30), (3000, 30)], 1500, 1500),
    ([(1000, 30), (1550, 30, 40), (3000, 30)], 1500, 1600),  # nominal 1500: the whole shell
    ([(1000, 30), (1700, 30)], 1500, 1000),
    ([(2000, 30), (3000, 30)], 1500, 2000),
    ([(500, 3), (2000, 30), (3000, 30)], 1500, 2000),
    ([(1000, 30), (3000, 30)], 3000, 3000),
    ([(200, 6), (2000, 60)], 1500, 2000),  # 200 alone: an FA that is mostly noise
    ([(200, 30), (700, 12), (3000, 30)], 1500, 700),
    ([(500, 6), (3000, 64)], 1500, 3000),
    ([(1000, 6), (3000, 64)], 1500, 1000),
    ([(400, 20)], 1500, 400),
    ([(1000, 5)], 1500, 1000)])
def test_volumes_of_a_tensor(rng, shells, b_max, highest):
    acq = multishell(rng, *shells)
    chosen = tensor.volumes(acq, float(b_max))
    np.testing.assert_array_equal(chosen, np.flatnonzero(acq.bvals <= highest))


def test_volumes_without_shells(rng):
    """b-values that pass into one another count one by one; without b0 two of them are needed."""
    b = np.linspace(300, 4000, 80)
    acq = Acquisition(b, multishell(rng, (1, 80), n_b0=0).bvecs)
    assert len(acq.shells) == 1
    np.testing.assert_array_equal(tensor.volumes(acq), np.flatnonzero(b <= 1575))
    acq = multishell(rng, (1000, 30), (2500, 30), (4000, 30), n_b0=0)
    np.testing.assert_array_equal(tensor.volumes(acq), np.arange(60))


def low_shells(acq, most=1500):
    """Select the volumes that dipy fits, up to a b-value, without the rule of this program."""
    return np.flatnonzero(acq.bvals < 1.05 * most)


def dti(signal, acq):
    dwi = Dwi(np.asarray(signal, np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acq)
    return get("estimate_dti").apply(dwi, "cpu")


def test_dti_is_dipys_up_to_b_1500_on_simulated_shells(rng):
    """White matter of two compartments, and CSF, b up to 6000, Rician noise: a tensor through all
    shells makes both MDs much too low."""
    acq = multishell(rng, (700, 20), (1500, 30), (3000, 40), (6000, 60))
    turn = np.linalg.qr(rng.normal(size=(400, 3, 3)))[0]
    fast, slow = (np.einsum("vij,j,vkj->vik", turn, np.array(e) * 1e-3, turn)
                  for e in ([1.9, 0.5, 0.5], [0.9, 0.05, 0.05]))
    white = 0.7 * signals(acq, fast, 300.0) + 0.3 * signals(acq, slow, 300.0)
    clean = np.concatenate([white, np.broadcast_to(
        signals(acq, 3e-3 * np.eye(3)[None], 900.0), (400, len(acq)))])
    noisy = np.hypot(clean + rng.normal(0, 15, clean.shape), rng.normal(0, 15, clean.shape))
    found = dti(noisy, acq)
    part, signal = low_shells(acq), noisy.astype(np.float32)
    peer = TensorModel(acq[part].to_dipy(), fit_method="WLS").fit(signal[:, part])
    np.testing.assert_allclose(found.maps["fa"], peer.fa, atol=2e-5)
    np.testing.assert_allclose(found.maps["md"], peer.md, rtol=2e-4)
    every = TensorModel(acq.to_dipy(), fit_method="WLS").fit(signal)
    wm, csf = np.median(found.maps["md"].reshape(2, 400), axis=1)
    assert wm > 1.3 * np.median(every.md[:400]) and wm == pytest.approx(0.7e-3, rel=0.05)
    assert csf > 2 * np.median(every.md[400:]) and csf == pytest.approx(2.95e-3, rel=0.05)
    assert found.counts["dti_shells"] == "700 1500"
    assert found.parameters["Shells"] == [700, 1500]
    (notice,) = found.notices
    assert "fitted to 20 × b 700, 30 × b 1500" in notice
    assert "Left out: 40 × b 3000, 60 × b 6000 s/mm²" in notice


@pytest.mark.parametrize("parts", [
    ["mdt_multishell/sub-01/dwi/sub-01_acq-b1kb2k"],
    [f"nyu_3shell/sub-D3/dwi/sub-D3_acq-{a}" for a in ("b1000", "b250b2000")]],
    ids=lambda parts: parts[0].split("/")[0])
def test_dti_is_dipys_up_to_b_1500_on_real_shells(test_data, parts):
    """Voxels with positive signals: FA within 1e-4, MD within 1e-4 relative, in 99 % of them."""
    stems = [test_data(p.split("/")[0]) / p.split("/", 1)[1] for p in parts]
    acq = concatenate([Acquisition(np.loadtxt(f"{s}_dwi.bval"), np.loadtxt(f"{s}_dwi.bvec").T)
                       for s in stems])
    signal = np.concatenate([np.asarray(nib.load(f"{s}_dwi.nii.gz").dataobj, np.float32)
                             for s in stems], axis=-1).reshape(-1, len(acq))
    s0 = signal[:, acq.b0].mean(1)
    signal = signal[(signal > 0).all(1) & (s0 > 0.3 * np.percentile(s0, 95))]
    part = low_shells(acq)
    assert acq.bvals[part].max() < 1100 and acq.bvals.max() > 1900
    found = dti(signal, acq)
    peer = TensorModel(acq[part].to_dipy(), fit_method="WLS").fit(signal[:, part])
    close = (np.abs(found.maps["fa"] - peer.fa) < 1e-4) & (
        np.abs(found.maps["md"] - peer.md) < 1e-4 * peer.md)
    assert len(signal) > 5000 and close.mean() >= 0.99
    every = TensorModel(acq.to_dipy(), fit_method="WLS").fit(signal)
    assert np.median(found.maps["md"]) > 1.05 * np.median(every.md)


def test_dti_says_that_it_takes_a_high_shell(rng):
    acq = multishell(rng, (2000, 30), (3000, 30))
    d, _, _ = tensors(4, rng)
    (notice,) = dti(signals(acq, d, 500.0), acq).notices
    assert "fitted to 30 × b 2000 s/mm². Left out: 30 × b 3000 s/mm²." in notice
    assert "b = 1500 s/mm² do not determine a tensor well" in notice
    acq = multishell(rng, (1000, 30))
    assert not dti(signals(acq, d, 500.0), acq).notices


def test_figures_of_a_page_show_one_tensor(rng):
    """The comparison of a run before and after harmonization uses the shells that dti uses,
    although a tensor through all shells differs."""
    assert get("estimate_dti").settings("fit")["b_max"] == tensor.B_MAX
    acq = multishell(rng, (1000, 30), (3000, 30))
    slow, fast = tensors(50, rng, high=0.6e-3)[0], tensors(50, rng, low=1e-3)[0]
    dwi = Dwi((150 * (signals(acq, slow) + signals(acq, fast))).astype(np.float32),
              np.ones((50, 1, 1), bool), np.eye(4), acq)
    found, every = get("estimate_dti").apply(dwi, "cpu").maps, fit(dwi.signal.copy(), acq)
    for name, (before, _) in compare_signals(dwi, dwi, "cpu").maps.items():
        np.testing.assert_array_equal(found[name], before)
        assert (np.abs(every[name] - before) > 0.05 * before).mean() > 0.5


def test_fa_and_md_of_attenuations_are_those_of_the_tensor(rng):
    acq = acquisition(rng, n_b0=0)
    d, values, _ = tensors(200, rng)
    matrix = torch.from_numpy(tensor.attenuation_fit(acq.btensors))
    fa, md = tensor.fa_and_md(torch.from_numpy(signals(acq, d)), matrix)
    np.testing.assert_allclose(fa, fa_of(values), atol=1e-5)
    np.testing.assert_allclose(md, 1e3 * values.mean(1), rtol=1e-9)


@pytest.mark.parametrize("ratio", [np.full(30, np.exp(-0.8)), np.ones(30), np.zeros(30),
                                   np.full(30, -0.2)], ids=["isotropic", "no decay", "0", "< 0"])
def test_fa_and_md_of_attenuations_can_be_learned_from(rng, ratio):
    """Gradients are finite even at the singularities of roots and logarithms."""
    matrix = torch.from_numpy(tensor.attenuation_fit(acquisition(rng, n_b0=0).btensors))
    signal = torch.tensor(ratio, requires_grad=True)
    sum(tensor.fa_and_md(signal, matrix)).backward()
    assert torch.isfinite(signal.grad).all()


def test_gradients_of_fa_and_md_of_attenuations(rng):
    acq = acquisition(rng, n_b0=0)
    matrix = torch.from_numpy(tensor.attenuation_fit(acq.btensors))
    signal = torch.from_numpy(signals(acq, tensors(5, rng)[0])).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: tensor.fa_and_md(s, matrix), signal)


def test_tiny_weighting_by_imaging_gradients_determines_no_tensor():
    """Eight volumes of b 5 and 10 s/mm² along eight axes are b0: the shell at 3000 is fitted."""
    axes = Rotation.random(8, random_state=0).as_matrix()[:, :, 0]
    shell = Rotation.random(30, random_state=1).as_matrix()[:, :, 0]
    acq = Acquisition(np.r_[np.tile([5.0, 10.0], 4), np.full(30, 3000.0)], np.r_[axes, shell])
    assert list(tensor.volumes(acq)) == list(range(38))
