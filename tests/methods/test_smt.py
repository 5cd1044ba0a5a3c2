"""The spherical mean technique against integrals, a numerical minimiser and a simulator that
shares nothing with the estimator: Funk–Hecke on Watson mixtures of the two-compartment model."""

import numpy as np
import pytest
import torch
from dipy.core.sphere import HemiSphere, disperse_charges
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import eval_legendre

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.methods import get
from bidsapp.methods.estimate_smt.method import (
    PER_SIGMA,
    Posterior,
    Protocol,
    average_weights,
    h,
    h_slope,
    least_squares,
    powder_mean,
    rician_excess,
    subtract_rician_excess,
)

DEGREES = np.arange(0, 29, 2)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(80)
LEGENDRE = np.stack([eval_legendre(degree, NODES) for degree in DEGREES])


def directions(n, rng):
    """n directions spread over the half sphere by electrostatic repulsion (dipy)."""
    xyz = rng.normal(size=(n, 3))
    sphere = HemiSphere(xyz=xyz / np.linalg.norm(xyz, axis=1, keepdims=True))
    return disperse_charges(sphere, 500)[0].vertices


def acquisition(rng, *, n=60, b=(1000, 2200), b_delta=None, n_b0=1):
    g = directions(n, rng)
    return Acquisition(
        np.r_[np.zeros(n_b0), np.repeat(b, n)], np.r_[np.zeros((n_b0, 3)), np.tile(g, (len(b), 1))],
        None if b_delta is None else np.r_[np.ones(n_b0), np.repeat(b_delta, n)])


def simulate(acq, d, f, rng, peaks=3, kappa=(1, 32)):
    """S/S0 (voxel, n) of the constrained two-compartment model over Watson-mixture ODFs.

    Kernel and Watson density are zonal: Σ_l (2l+1)/2 k_l w_l P_l(g·μ), each coefficient an
    integral of its function with P_l, by Gauss–Legendre quadrature (Funk–Hecke).
    """
    signal = np.ones((len(d), len(acq)))
    mu = rng.normal(size=(len(d), peaks, 3))
    mu /= np.linalg.norm(mu, axis=2, keepdims=True)
    share = rng.dirichlet(np.ones(peaks), len(d))
    k = np.exp(rng.uniform(*np.log(kappa), (len(d), peaks, 1)))
    watson = np.exp(k * (NODES**2 - 1)) * WEIGHTS
    watson = (watson / watson.sum(2, keepdims=True)) @ LEGENDRE.T
    for shell in acq.shells:
        b, s = shell.b / 1000, shell.b_delta
        kernel = np.zeros((len(d), len(NODES)))
        for part, radial in ((f, 0 * d), (1 - f, (1 - f) * d)):  # exp(−B:D), B and D coaxial forms
            along = b * ((1 - s) / 3 * (d + 2 * radial) + s * radial)
            kernel += part[:, None] * np.exp(
                -along[:, None] - (b * s * (d - radial))[:, None] * NODES**2)
        kernel = (kernel * WEIGHTS) @ LEGENDRE.T
        coefficients = np.einsum("vp,vpl,vl,l->vpl", share, watson, kernel, (2 * DEGREES + 1) / 2)
        cosine = np.einsum("gx,vpx->vpg", acq.bvecs[shell.indices], mu)
        signal[:, shell.indices] = sum(
            (eval_legendre(degree, cosine) * coefficients[:, :, i, None]).sum(1)
            for i, degree in enumerate(DEGREES))
    return signal


def rician(clean, sd, rng):
    return np.hypot(clean + rng.normal(0, sd, clean.shape), rng.normal(0, sd, clean.shape))


def as_dwi(signal, acq, noise_sd, *, s0_known=False):
    return Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acq,
               noise_sd, s0_known=s0_known)


@pytest.fixture(scope="module")
def simulation():
    """20 000 voxels, SNR 50, one noise-free b0, 60 directions at b = 1 and 2.2 ms/µm²."""
    rng = np.random.default_rng(7)
    acq = acquisition(rng)
    d, f = rng.uniform(0, 3, 20_000), rng.uniform(0, 1, 20_000)
    signal = simulate(acq, d, f, rng)
    signal[:, 1:] = rician(signal[:, 1:], 0.02, rng)
    return as_dwi(signal, acq, 0.02, s0_known=True), d, f


@given(alpha=st.floats(-15, 40))
def test_h_is_its_integral(alpha):
    x, w = (NODES + 1) / 2, WEIGHTS / 2
    expected = w @ np.exp(-alpha * x**2)
    value = h(np.array([alpha]))
    assert value[0] == pytest.approx(expected, rel=1e-10)
    assert h_slope(np.array([alpha]), value)[0] == pytest.approx(
        -(w @ (x**2 * np.exp(-alpha * x**2))), rel=2e-7)


@settings(deadline=None)
@given(d=st.floats(0.01, 3), f=st.floats(0.01, 0.99), b=st.floats(0.1, 6),
       s=st.sampled_from([1.0, 0.6, 0.02, 0.0, -0.02, -0.5]))
def test_powder_mean_is_the_integral_over_directions(d, f, b, s):
    """B:D written out as matrices, averaged over the polar angle between their axes."""
    def mean(d, f):
        total = 0
        for share, radial in ((f, 0.0), (1 - f, (1 - f) * d)):
            tensor = np.diag([radial, radial, d])
            n = np.stack([np.sqrt(1 - NODES**2), 0 * NODES, NODES], 1)
            btensor = b * ((1 - s) / 3 * np.eye(3) + s * n[:, :, None] * n[:, None, :])
            total += share * WEIGHTS / 2 @ np.exp(-np.einsum("nij,ij->n", btensor, tensor))
        return total

    value, by_d, by_f = powder_mean(d, f, np.array(b), np.array(s))
    assert value == pytest.approx(mean(d, f), rel=1e-9)
    assert by_d == pytest.approx((mean(d + 1e-5, f) - mean(d - 1e-5, f)) / 2e-5, abs=2e-6)
    assert by_f == pytest.approx((mean(d, f + 1e-5) - mean(d, f - 1e-5)) / 2e-5, abs=2e-6)


@pytest.mark.parametrize("noise_s0", [0.0, 0.3])
def test_least_squares_equals_a_dense_minimiser(rng, noise_s0):
    """A 301 × 201 grid, then L-BFGS-B from its three best cells, on the cost as written."""
    protocol = Protocol(np.array([0.7, 1.5, 3.0]), np.array([1.0, 1.0, -0.5]),
                        np.array([0.2, 0.15, 0.25]), noise_s0)
    d, f = rng.uniform(0.3, 2.8, 15), rng.uniform(0, 1, 15)
    z = powder_mean(d[:, None], f[:, None], protocol.b, protocol.b_delta)[0]
    z = z + rng.normal(size=z.shape) * 0.04 * protocol.noise
    start = Posterior(protocol, "cpu")(torch.tensor(z, dtype=torch.float32),
                                       torch.full((15,), 0.04))["start"].numpy()
    ours = least_squares(z, protocol, start)

    def cost(theta, row):
        p = powder_mean(theta[0], theta[1], protocol.b[:, None], protocol.b_delta[:, None])[0]
        p = p.reshape(len(protocol.b), -1)
        w0, w = 1 / max(noise_s0, 1e-9) ** 2, 1 / protocol.noise[:, None] ** 2
        s0 = (w0 + (w * row[:, None] * p).sum(0)) / (w0 + (w * p * p).sum(0))
        return ((w * (row[:, None] - s0 * p) ** 2).sum(0)
                + (w0 * (1 - s0) ** 2 if noise_s0 else 0))

    grid = np.stack(np.meshgrid(np.linspace(0, 3, 301), np.linspace(0, 1, 201)), 0).reshape(2, -1)
    for row, found in zip(z, ours, strict=True):
        values = cost(grid, row)
        fits = [minimize(lambda t, row=row: float(cost(t[:, None], row)[0]) * 1e4, grid[:, i],
                         method="L-BFGS-B", bounds=((0, 3), (0, 1)),
                         options={"ftol": 1e-15, "gtol": 1e-9})
                for i in np.argsort(values)[:3]]
        best = min(fits, key=lambda fit: fit.fun)
        np.testing.assert_allclose(found, best.x, atol=1e-3)


@pytest.mark.parametrize("noise_s0", [0.0, 0.3])
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_posterior_equals_brute_force(rng, noise_s0, sigma):
    """Every (d, f) cell and every S0 of a dense grid, weighted with the density as written."""
    protocol = Protocol(np.array([1.0, 2.2]), np.ones(2), np.array([0.13, 0.18]), noise_s0)
    d, f = rng.uniform(0.2, 2.8, 6), rng.uniform(0.1, 0.9, 6)
    z = powder_mean(d[:, None], f[:, None], protocol.b, protocol.b_delta)[0]
    z = z + rng.normal(size=z.shape) * sigma * protocol.noise
    found = Posterior(protocol, "cpu")(
        torch.tensor(z, dtype=torch.float32), torch.full((6,), sigma))
    dd, ff = (np.arange(1500) + 0.5) / 500, (np.arange(200) + 0.5) / 200
    p = powder_mean(dd[:, None, None], ff[:, None], protocol.b, protocol.b_delta)[0]
    s0s = 1 + (np.linspace(-5, 5, 41) * sigma * noise_s0 if noise_s0 else np.zeros(1))
    for i, row in enumerate(z):
        density = 0
        for s0 in s0s:
            misfit = (((row - s0 * p) / (sigma * protocol.noise)) ** 2).sum(-1)
            misfit += ((1 - s0) / (sigma * noise_s0)) ** 2 if noise_s0 else 0
            density = density + np.exp(-misfit / 2)
        density /= density.sum()
        for k, values in enumerate((dd[:, None], ff[None])):
            mean = (density * values).sum()
            sd = np.sqrt((density * (values - mean) ** 2).sum())
            assert abs(float(found["mean"][i, k]) - mean) < 0.03 * sd + 1e-3
            assert abs(float(found["std"][i, k]) - sd) < 0.03 * sd + 1e-3


def test_rician_excess_is_that_of_drawn_magnitudes(rng):
    """The excess is E[M] − A, where the expectation is known exactly; Monte Carlo, 4 SE."""
    table = rician_excess(0.0)
    for amplitude in (0.5, 1.0, 2.0, 5.0):
        m = np.hypot(amplitude + rng.normal(size=400_000), rng.normal(size=400_000))
        assert np.interp(m.mean() * PER_SIGMA, np.arange(len(table)), table) == pytest.approx(
            m.mean() - amplitude, abs=0.02)


def test_directional_average_is_exact_up_to_its_degree(rng):
    """Uneven directions, a signal of degree 2: the arithmetic mean is wrong, ours is not."""
    g = rng.normal([0, 0, 1.0], size=(60, 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    acq = Acquisition(np.full(60, 1000.0), g)
    values = 0.3 + 0.5 * g[:, 0] ** 2 + 0.2 * g[:, 1] * g[:, 2]
    weights, smooth = average_weights(acq, acq.shells[0])
    assert weights @ values == pytest.approx(0.3 + 0.5 / 3, abs=1e-10)
    assert abs(values.mean() - 0.3 - 0.5 / 3) > 0.01
    np.testing.assert_allclose(smooth @ np.ones(60), 1, atol=1e-10)


@pytest.mark.parametrize(("peaks", "kappa"), [(3, (1, 32)), (1, (16, 32))])
def test_rician_correction_removes_the_bias_of_the_powder_average(rng, peaks, kappa):
    """Against the mean of the noise-free signals, near the floor, in units of its own SD."""
    acq = acquisition(rng)
    clean = simulate(acq, np.full(3000, 2.7), np.full(3000, 0.3), rng, peaks, kappa)
    shell = acq.shells[1]
    weights, smooth = average_weights(acq, shell)
    noisy = rician(clean, 0.02, rng)[:, shell.indices]
    table = rician_excess(np.linalg.norm(smooth) / 60**0.5)
    better = subtract_rician_excess(
        *(torch.tensor(a, dtype=torch.float32) for a in (noisy, smooth)), 0.02,
        torch.tensor(table, dtype=torch.float32)).numpy() @ weights
    truth, sd = clean[:, shell.indices] @ weights, 0.02 * np.linalg.norm(weights)
    before, after = (noisy @ weights - truth).mean(), (better - truth).mean()
    assert before > 0.5 * sd
    assert abs(after) < before / 4


@pytest.mark.slow
def test_posterior_mean_on_the_published_simulation(simulation):
    dwi, d, f = simulation
    maps = get("estimate_smt").apply(dwi, "cpu").maps
    error = {"diffusivity": maps["diffusivity"] - d, "neuritefraction": maps["neuritefraction"] - f}
    assert np.mean(error["diffusivity"] ** 2) <= 5.8e-3
    assert np.mean(error["neuritefraction"] ** 2) <= 9.7e-3
    for name, values in error.items():  # the posterior SD tells the error there is
        assert np.mean(values**2) / np.mean(maps[f"{name}_std"] ** 2) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("b_delta", [(1, 1, -0.5), (1, 0, 0)])
def test_recovers_truth_from_clean_b_tensors(rng, b_delta):
    acq = acquisition(rng, b=(700, 1400, 2100), b_delta=b_delta, n_b0=3)
    d, f = rng.uniform(0.8, 2.5, 200), rng.uniform(0.3, 0.9, 200)
    maps = get("estimate_smt").apply(as_dwi(simulate(acq, d, f, rng), acq, 1e-4), "cpu").maps
    np.testing.assert_allclose(maps["diffusivity_mode"], d, atol=0.01)
    np.testing.assert_allclose(maps["neuritefraction_mode"], f, atol=0.01)


@pytest.mark.parametrize(("b", "n", "n_b0"), [((1000,), 60, 1), ((1000, 2000), 60, 0),
                                              ((1000, 2000), 5, 1)])
def test_refuses_what_cannot_carry_it(rng, b, n, n_b0):
    with pytest.raises(Refusal, match="A b0 and two shells"):
        get("estimate_smt").check(acquisition(rng, n=n, b=b, n_b0=n_b0))


def test_voxels_without_signal_are_zero_and_counted(rng):
    acq = acquisition(rng, n_b0=2)
    signal = 700 * simulate(acq, np.full(9, 1.7), np.full(9, 0.5), rng)
    signal[2], signal[5, :2] = 0, -3
    derived = get("estimate_smt").apply(as_dwi(signal, acq, 10.0), "cpu")
    assert derived.counts["smt_no_b0_signal"] == 2
    for values in derived.maps.values():
        assert (values[[2, 5]] == 0).all()
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["estimate_smt", "estimate_scnn2"])
def test_that_s0_is_known_is_said_and_not_guessed(rng, name):
    """b0 volumes of ones may be measured ones, divided by themselves: S0 has noise then, and the
    estimates are less certain."""
    acq = acquisition(rng)
    signal = simulate(acq, np.full(20, 1.7), np.full(20, 0.5), rng)
    said, unsaid = (get(name).apply(as_dwi(signal, acq, 0.05, s0_known=known), "cpu").maps
                    for known in (True, False))
    assert (said["diffusivity_std"] < 0.99 * unsaid["diffusivity_std"]).all()


def test_unknown_noise_is_said(rng):
    acq = acquisition(rng)
    signal = simulate(acq, np.full(7, 1.7), np.full(7, 0.5), rng)
    derived = get("estimate_smt").apply(as_dwi(signal, acq, None), "cpu")
    assert "assumed" in derived.parameters["NoiseSD"]
    np.testing.assert_allclose(derived.maps["diffusivity_mode"], 1.7, atol=0.02)
