"""Gaussian process over b-tensors: its algebra, and predictions of signals from equations."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.special import eval_legendre

from bidsapp.acquisition import Acquisition
from bidsapp.gp import GaussianProcess, Hyperparameters

TABLE = Hyperparameters(mean=0.8, direction=0.15, second=0.1, fourth=0.03, noise=0.01, angle=0.6,
                        mean_log_b=1.5, direction_log_b=0.8, shape=0.9, saturation=700.0)


def unit(rng, n):
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def tensor_signals(rng, acquisition, voxels, noise):
    """Signals of random axially symmetric tensors, S0 between 0.5 and 1.5; with and without noise.
    """
    axes, s0 = unit(rng, voxels), rng.uniform(0.5, 1.5, voxels)
    parallel, perpendicular = rng.uniform(1e-3, 2e-3, voxels), rng.uniform(0.2e-3, 0.8e-3, voxels)
    d = (perpendicular[:, None, None] * np.eye(3)
         + (parallel - perpendicular)[:, None, None] * axes[:, :, None] * axes[:, None])
    clean = s0[:, None] * np.exp(-np.einsum("nij,vij->vn", acquisition.btensors, d))
    return clean, clean + noise * rng.standard_normal(clean.shape)


def multishell(rng, counts):
    bvals = np.repeat([b for b, _ in counts], [n for _, n in counts]).astype(float)
    return Acquisition(bvals, unit(rng, len(bvals)))


def test_leave_one_out_is_prediction_from_the_others(rng):
    acquisition = multishell(rng, [(0, 2), (1000, 8), (2500, 9)])
    process = GaussianProcess(acquisition, rng.uniform(0.5, 1, 19), TABLE)
    weights, sd = process.leave_one_out()
    for i in range(19):
        expected = process.predict(acquisition[[i]], np.arange(19) != i)
        np.testing.assert_allclose(weights[i], expected.weights[0], atol=1e-9)
        np.testing.assert_allclose(sd[i], expected.sd[0], rtol=1e-6)


def test_covariance_is_positive(rng):
    """It is so for any b-tensors, also with the widest angle."""
    acquisition = Acquisition(rng.uniform(0, 6000, 150), unit(rng, 150), rng.uniform(-0.5, 1, 150))
    for angle in (0.4, 1.6, np.pi):
        process = GaussianProcess(acquisition, np.ones(150),
                                  TABLE._replace(angle=angle, noise=1e-12))
        assert np.linalg.eigvalsh(process._measured()).min() > -1e-9


@pytest.mark.parametrize("name,degree", [("second", 2), ("fourth", 4)])
def test_smooth_terms_are_legendre_polynomials(rng, name, degree):
    acquisition = Acquisition(np.full(30, 2000.0), unit(rng, 30))
    without, more = (GaussianProcess(acquisition, np.ones(30), TABLE._replace(**{name: value}))
                     ._signal(acquisition, acquisition) for value in (0.0, 0.5))
    difference = (more - without) / (more - without)[0, 0]
    cosines = (acquisition.bvecs @ acquisition.bvecs.T).clip(-1, 1)
    np.testing.assert_allclose(difference, eval_legendre(degree, cosines), atol=1e-6)


def test_signal_of_a_tensor_is_predicted(rng):
    """The error is near the noise, and far below that of the shell's mean."""
    acquisition = multishell(rng, [(0, 3), (1000, 30), (2500, 45)])
    clean, noisy = tensor_signals(rng, acquisition, 4000, 0.03)
    weights, sd = GaussianProcess.fit(noisy, acquisition).leave_one_out()
    error = np.sqrt(np.mean((noisy @ weights.T - clean)**2, axis=0))
    for shell in acquisition.shells:
        others = (noisy[:, shell.indices].sum(1, keepdims=True) - noisy[:, shell.indices]) \
            / (len(shell) - 1)
        of_mean = np.sqrt(np.mean((others - clean[:, shell.indices])**2, axis=0))
        assert np.median(error[shell.indices]) < 0.03
        assert np.median(error[shell.indices]) < 0.5 * np.median(of_mean)
    # the SD that it predicts is the one of its residuals
    observed = np.sqrt(np.mean((noisy @ weights.T - noisy)**2, axis=0))
    np.testing.assert_allclose(np.median(observed / sd), 1, atol=0.15)


def test_b0_is_predicted_from_b0(rng):
    acquisition = multishell(rng, [(0, 6), (1000, 20)])
    clean, noisy = tensor_signals(rng, acquisition, 3000, 0.02)
    weights, _ = GaussianProcess.fit(noisy, acquisition).leave_one_out()
    error = np.sqrt(np.mean((noisy @ weights.T - clean)[:, :6]**2, axis=0))
    assert error.max() < 1.3 * 0.02 / np.sqrt(5)


def test_fit_predicts_as_the_truth_does(rng):
    """Signals are drawn from a process; the error of prediction is within 2 % of the least one."""
    acquisition = multishell(rng, [(700, 30), (1500, 30), (3000, 30)])
    truth = GaussianProcess(acquisition, np.ones(90), TABLE)
    covariance = truth._measured()
    signal = rng.standard_normal((20_000, 90)) @ np.linalg.cholesky(covariance).T
    weights, sd = GaussianProcess.fit(signal, acquisition).leave_one_out()
    rest = np.eye(90) - weights
    error = np.sqrt(np.diag(rest @ covariance @ rest.T))
    least = truth.leave_one_out().sd
    assert (error < 1.02 * least).all()
    np.testing.assert_allclose(sd, error, rtol=0.1)


def test_tables_without_shells_and_new_measurements(rng):
    """A DSI-like table: b is the squared radius on a grid. Measurements between its points are
    predicted with less than half of the error of the nearest one."""
    grid = np.array(list(np.ndindex(7, 7, 7))) - 3
    grid = grid[(np.sum(grid**2, 1) <= 9) & (grid[:, 2] >= 0)]
    radius = np.maximum(np.linalg.norm(grid, axis=1, keepdims=True), 1e-9)
    table = Acquisition(np.sum(grid**2, 1) * 300.0, grid / radius)
    new = Acquisition(rng.uniform(400, 2500, 25), unit(rng, 25))
    both = Acquisition(np.r_[table.bvals, new.bvals], np.vstack([table.bvecs, new.bvecs]))
    clean, noisy = tensor_signals(rng, both, 4000, 0.02)
    n = len(table)
    weights, sd = GaussianProcess.fit(noisy[:, :n], table).predict(new)
    error = noisy[:, :n] @ weights.T - clean[:, n:]
    q, q_new = (np.sqrt(a.bvals)[:, None] * a.bvecs for a in (table, new))
    distance = np.minimum(*(np.linalg.norm(q_new[:, None] - s * q, axis=-1) for s in (1, -1)))
    of_nearest = clean[:, distance.argmin(1)] - clean[:, n:]
    assert np.sqrt(np.mean(error**2)) < 0.5 * np.sqrt(np.mean(of_nearest**2))
    assert np.median(sd) == pytest.approx(np.sqrt(np.mean(error**2) + 0.02**2), rel=0.3)


def test_tensor_valued_encoding(rng):
    """Spherical encoding ignores the axis; planar and linear encoding predict each other."""
    acquisition = Acquisition(np.full(60, 1500.0), unit(rng, 60), np.repeat([1, 0, -0.5], 20))
    process = GaussianProcess(acquisition, np.ones(60), TABLE)
    turned = acquisition.rotated(Rotation.random(random_state=1).as_matrix())
    spherical = np.arange(20, 40)
    np.testing.assert_allclose(process.predict(acquisition[spherical]).weights,
                               process.predict(turned[spherical]).weights, atol=1e-12)
    clean, noisy = tensor_signals(rng, acquisition, 4000, 0.02)
    weights, _ = GaussianProcess.fit(noisy, acquisition).leave_one_out()
    error = np.sqrt(np.mean((noisy @ weights.T - clean)**2, axis=0)).reshape(3, 20).mean(1)
    between_voxels = np.std(clean, axis=0).reshape(3, 20).mean(1)
    assert (error < 0.25 * between_voxels).all()
    alone = GaussianProcess.fit(noisy[:, :20], acquisition[:20]).leave_one_out().weights
    error_alone = np.sqrt(np.mean((noisy[:, :20] @ alone.T - clean[:, :20])**2))
    assert error[0] < error_alone


def test_does_not_depend_on_the_frame(rng):
    acquisition = multishell(rng, [(1000, 12), (2000, 12)])
    _, noisy = tensor_signals(rng, acquisition, 500, 0.02)
    turned = acquisition.rotated(Rotation.random(random_state=2).as_matrix())
    flipped = Acquisition(acquisition.bvals, -acquisition.bvecs)
    expected = GaussianProcess.fit(noisy, acquisition).leave_one_out().weights
    for other in (turned, flipped):
        np.testing.assert_allclose(GaussianProcess.fit(noisy, other).leave_one_out().weights,
                                   expected, atol=1e-4)
