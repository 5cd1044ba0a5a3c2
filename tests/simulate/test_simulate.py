"""Simulated signals against closed forms, matrices integrated over the sphere, and dipy."""

import numpy as np
import pytest
import torch
from dipy.core.sphere import HemiSphere, disperse_charges
from dipy.reconst.qti import qti_signal
from dipy.sims.voxel import multi_tensor, single_tensor, sticks_and_ball
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad
from scipy.spatial.transform import Rotation
from scipy.special import erf, eval_legendre, hyp1f1

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.simulate import forward, odf

# a full-sphere product rule of our own: 160 × 320 points
Z, W = np.polynomial.legendre.leggauss(160)
PHI = np.arange(320) * np.pi / 160
SPHERE = np.stack([np.outer(np.sqrt(1 - Z**2), np.cos(PHI)),
                   np.outer(np.sqrt(1 - Z**2), np.sin(PHI)),
                   np.outer(Z, np.ones(320))], -1).reshape(-1, 3)
AREA = np.repeat(W * np.pi / 160, 320)


def t64(*values):
    return [torch.tensor(np.asarray(v, dtype=np.float64)) for v in values]


def spread(n, rng):
    xyz = rng.normal(size=(n, 3))
    return disperse_charges(HemiSphere(
        xyz=xyz / np.linalg.norm(xyz, axis=1, keepdims=True)), 200)[0].vertices


def table(rng, shells=((1000, 1.0), (2200, 1.0), (1500, -0.5), (800, 0.0), (700, 0.4)), n=12):
    """b0s without a direction, shells of every shape in a random order, b a little uneven."""
    b = np.concatenate([np.zeros(2)] + [b + rng.uniform(-9, 9, n) for b, _ in shells])
    g = np.concatenate([np.zeros((2, 3))] + [spread(n, rng) for _ in shells])
    s = np.concatenate([np.ones(2)] + [np.full(n, s) for _, s in shells])
    order = rng.permutation(len(b))
    return Acquisition(b[order], g[order], s[order])


def axes(n, seed):
    return Rotation.random(n, random_state=seed).as_matrix()[:, :, 0]


def tensor_about(n, axial, radial):
    return radial * np.eye(3) + (axial - radial) * n[..., :, None] * n[..., None, :]


def dense(acq, density, parts):
    """Σ f ∫ ODF(n) exp(−B:D(n)) dn with B and D as matrices, per measurement; b in ms/µm²."""
    total = 0
    for f, axial, radial in parts:
        d = tensor_about(SPHERE, axial, radial).reshape(-1, 9)
        total = total + f * np.exp(-acq.btensors.reshape(-1, 9) / 1000 @ d.T) @ (AREA * density)
    return total


# ---- orientation densities


@pytest.mark.parametrize("kappa", [-128, -20, 0, 1, 16, 128])
def test_watson_is_its_density(kappa):
    """Normalised by 4π 1F1(½; 3/2; κ), projected onto dipy's basis on a dense grid."""
    (mu,) = axes(1, 5)
    log_norm = np.log(4 * np.pi) + kappa + np.log(hyp1f1(1, 1.5, -kappa))
    expected = np.exp(kappa * (SPHERE @ mu) ** 2 - log_norm)
    m, k, g = t64(mu, kappa, SPHERE)
    np.testing.assert_allclose(odf.watson_density(g, m, k), expected, rtol=1e-9)
    np.testing.assert_allclose(odf.watson(m, k, 12), (AREA * expected) @ sh.basis(12, SPHERE),
                               atol=1e-10)


@pytest.mark.parametrize("kappa", [(0, 0), (30, 0), (40, 25), (64, 64), (128, 10), (-20, -5)])
def test_bingham_is_its_density(kappa):
    frame = Rotation.random(random_state=2).as_matrix()[:2]
    total = 2 * dblquad(lambda z, phi: np.exp(kappa[0] * ((1 - z * z) * np.cos(phi) ** 2 - 1)
                                              + kappa[1] * (1 - z * z) * np.sin(phi) ** 2),
                        0, np.pi, -1, 1)[0]
    expected = np.exp((SPHERE @ frame.T) ** 2 @ kappa - kappa[0]) / total
    f, k, g = t64(frame, kappa, SPHERE)
    np.testing.assert_allclose(odf.bingham_density(g, f, k), expected, rtol=1e-6)
    np.testing.assert_allclose(odf.bingham(f, k, 10), (AREA * expected) @ sh.basis(10, SPHERE),
                               atol=1e-7)


def test_bingham_with_one_concentration_is_watson():
    frames, kappa = t64(Rotation.random(7, random_state=4).as_matrix()[:, :2],
                        np.linspace(1, 64, 7))
    np.testing.assert_allclose(
        odf.bingham(frames, torch.stack([kappa, 0 * kappa], 1), 8),
        odf.watson(frames[:, 0], kappa, 8), atol=1e-10)


def test_mixtures_are_normalised_sums(rng):
    mu, kappa, share = t64(axes(14, 1).reshape(7, 2, 3), rng.uniform(1, 32, (7, 2)),
                           rng.uniform(0.1, 3, (7, 2)))
    mixed = odf.mixture(share, odf.watson(mu, kappa, 10))
    np.testing.assert_allclose(AREA @ sh.basis(10, SPHERE) @ mixed.numpy().T, 1, atol=1e-12)
    parts = odf.watson_density(torch.tensor(SPHERE), mu, kappa)
    summed = (share[..., None] * parts).sum(1) / share.sum(1, keepdim=True)
    np.testing.assert_allclose(mixed, (summed.numpy() * AREA) @ sh.basis(10, SPHERE), atol=1e-10)


def test_crossing_axes_have_their_angle(rng):
    first = np.concatenate([axes(9, 6), np.eye(3), -np.eye(3)])
    angle, azimuth = rng.uniform(0, np.pi / 2, 15), rng.uniform(0, 2 * np.pi, 15)
    second = odf.crossing(*t64(first, angle, azimuth)).numpy()
    np.testing.assert_allclose((first * second).sum(1), np.cos(angle), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), 1, atol=1e-12)
    turned = odf.crossing(*t64(first, angle, azimuth + 0.7)).numpy()
    flat = [v - np.cos(angle)[:, None] * first for v in (second, turned)]
    np.testing.assert_allclose((flat[0] * flat[1]).sum(1), np.cos(0.7) * np.sin(angle) ** 2,
                               atol=1e-12)


def test_random_rotations_are_uniform():
    """Orthogonal, proper; the mean of R is 0 and that of R_ij² is ⅓ within 4 standard errors."""
    n = 40_000
    r = odf.random_rotations(n, torch.Generator().manual_seed(2))
    np.testing.assert_allclose(r @ r.mT, np.broadcast_to(np.eye(3), (n, 3, 3)), atol=1e-14)
    assert (torch.linalg.det(r) > 0).all()
    assert r.mean(0).abs().max() < 4 * (1 / 3 / n) ** 0.5
    assert ((r**2).mean(0) - 1 / 3).abs().max() < 4 * (4 / 45 / n) ** 0.5


# ---- kernels


@settings(deadline=None, max_examples=60)
@given(b=st.floats(0, 12000), s=st.sampled_from([1.0, 0.5, 0.0, -0.01, -0.5]),
       axial=st.floats(0, 3.2), radial=st.floats(0, 3.2))
def test_kernel_is_its_integral(b, s, axial, radial):
    """Adaptive integration of B:D written out as matrices."""
    def k(t):
        g = np.array([np.sqrt(1 - t * t), 0, t])
        btensor = b / 1000 * ((1 - s) / 3 * np.eye(3) + s * np.outer(g, g))
        return np.exp(-np.sum(btensor * np.diag([radial, radial, axial])))

    part = forward.zeppelin(*t64([1.0], [axial], [radial]))
    found = forward.kernel([part], np.array([b]), np.array([s]), 16)[0, 0].numpy()
    for i in (0, 1, 4, 8):
        expected = quad(lambda t, i=i: 4 * np.pi * k(t) * eval_legendre(2 * i, t), 0, 1,
                        epsabs=1e-12, epsrel=1e-12)[0]
        assert found[i] == pytest.approx(expected, abs=2e-10)


def test_powder_average_is_the_closed_form_of_the_spherical_mean(rng):
    """Kerkelä et al. 2024, eq. 10, whatever the ODF."""
    d, f, b = rng.uniform(0.3, 3, 50), rng.uniform(0.05, 0.95, 50), 2.2
    k = forward.kernel(forward.two_compartments(*t64(d, f)), np.array([2200.0]), np.ones(1), 0)
    bd = np.sqrt(b * d)
    expected = (f * np.sqrt(np.pi) * erf(bd) / (2 * bd)
                + (1 - f) * np.exp(-b * (1 - f) * d) * np.sqrt(np.pi) * erf(bd * np.sqrt(f))
                / (2 * bd * np.sqrt(f)))
    np.testing.assert_allclose(k[:, 0, 0] / (4 * np.pi), expected, rtol=1e-12)


def test_zonal_coefficient_of_the_docstring():
    """k_l = √(4π/(2l+1)) K_l0 with dipy's Y_l0 about z."""
    part = forward.zeppelin(*t64([1.0], [1.9], [0.4]))
    k = forward.kernel([part], np.array([3000.0]), np.ones(1), 6)[0, 0].numpy()
    values = np.exp(-3 * (0.4 + 1.5 * SPHERE[:, 2] ** 2))
    l = np.arange(0, 7, 2)
    zonal = (AREA * values) @ sh.basis(6, SPHERE)[:, l * (l + 1) // 2]
    np.testing.assert_allclose(k, np.sqrt(4 * np.pi / (2 * l + 1)) * zonal, atol=1e-12)


# ---- signals


CASES = {
    "stick": lambda d, f: [(1, d, 0)],
    "ball": lambda d, f: [(1, d, d)],
    "zeppelin": lambda d, f: [(1, d, f * d)],
    "oblate": lambda d, f: [(1, f * d, d)],
    "two": lambda d, f: [(f, d, 0), (1 - f, d, (1 - f) * d)],
    "bundle and water": lambda d, f: [(f, d, 0.3), (1 - f, 3, 3)],
}


@pytest.mark.parametrize("name", CASES)
def test_signal_is_the_dense_integral(rng, name):
    acq, (mu,) = table(rng), axes(1, 8)
    density = np.exp(9 * ((SPHERE @ mu) ** 2 - 1))
    density /= AREA @ density
    parts = CASES[name](2.1, 0.6)
    m, k = t64(mu[None], [9.0])
    found = forward.Protocol(acq, 16, k).signal(
        odf.watson(m, k, 16), [forward.Compartment(*t64([f], [a], [r])) for f, a, r in parts])
    np.testing.assert_allclose(found[0], dense(acq, density, parts), atol=2e-7)


@pytest.mark.parametrize(("d", "kappa", "l_max", "error"), [
    (2, 16, 8, 1.8e-3), (2, 16, 12, 1.3e-5), (3, 32, 8, 1.3e-2), (3, 32, 12, 4.2e-4)])
def test_error_of_truncation_is_the_stated_one(d, kappa, l_max, error):
    acq = Acquisition(np.full(33, 2200.0), sh.quadrature(10)[0])
    mu, k, one = t64(acq.bvecs[:1], [float(kappa)], [1.0])  # the greatest error is along the axis
    density = np.exp(kappa * ((SPHERE @ acq.bvecs[0]) ** 2 - 1))
    found = forward.Protocol(acq, l_max, one).signal(odf.watson(mu, k, l_max),
                                                     [forward.stick(one, d * one)])[0].numpy()
    wrong = np.abs(found - dense(acq, density / (AREA @ density), [(1, d, 0)])).max()
    assert 0.9 * error < wrong < error


def test_two_and_three_compartments_are_those_of_the_papers(rng):
    d, f, ds, fs = 2.1, 0.5, 0.4, 0.2
    bundle = forward.two_compartments(*t64([d], [f]))
    assert [[float(v) for v in c] for c in bundle] == [[f, d, 0], [1 - f, d, (1 - f) * d]]
    three = forward.three_compartments(*t64([d], [f], [ds], [fs]))
    e = 1 - f - fs
    np.testing.assert_allclose(
        [[float(v) for v in c] for c in three],
        [[f, d, 0], [fs, ds, ds], [e, d * e ** (fs / 2 / 0.7), d * e ** ((fs / 2 + f) / 0.7)]],
        rtol=1e-14)
    acq, (mu,) = table(rng), axes(1, 8)
    density = np.exp(9 * ((SPHERE @ mu) ** 2 - 1))
    density /= AREA @ density
    m, k = t64(mu[None], [9.0])
    found = forward.Protocol(acq, 16, k).signal(odf.watson(m, k, 16), three)
    parts = [[float(v) for v in c] for c in three]
    np.testing.assert_allclose(found[0], dense(acq, density, parts), atol=2e-7)


def test_limits_of_the_three_compartments():
    d, f, zero = t64([2.0, 1.1], [0.4, 0.7], [0.0, 0.0])
    two = forward.two_compartments(d, f)
    three = forward.three_compartments(d, f, 0.3 + zero, zero)
    np.testing.assert_allclose(torch.stack(three[2]), torch.stack(two[1]), rtol=1e-14)
    water = forward.three_compartments(d, zero, 0.3 + zero, zero)[2]
    np.testing.assert_allclose(torch.stack(water[1:]), torch.stack([d, d]))
    isotropic = forward.three_compartments(d, zero, 0.3 + zero, 0.36 + zero)[2]
    np.testing.assert_allclose(torch.stack(isotropic[1:]), 0.8 * torch.stack([d, d]))


def test_spherical_encoding_sees_mean_diffusivities_only(rng):
    """Σ f exp(−b (axial + 2 radial)/3), for every ODF and direction."""
    acq = table(rng, ((500, 0.0), (1500, 0.0), (4000, 0.0)))
    d, f, kappa, mu = t64(rng.uniform(0.5, 3, 9), rng.uniform(0, 1, 9), rng.uniform(1, 64, 9),
                          axes(9, 3))
    found = forward.Protocol(acq, 8, d).signal(odf.watson(mu, kappa, 8),
                                               forward.two_compartments(d, f))
    b, d, f = acq.bvals / 1000, d.numpy()[:, None], f.numpy()[:, None]
    expected = f * np.exp(-b * d / 3) + (1 - f) * np.exp(-b * d * (1 + 2 * (1 - f)) / 3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_multi_tensor_of_dipy(rng):
    """Two crossing tensors, as tensors and as a band-limited pair of delta functions."""
    acq = table(rng, ((1000, 1.0), (2000, 1.0)), n=30)
    (n1, n2), evals = axes(2, 9), np.array([[1.7, 0.3, 0.3], [1.4, 0.5, 0.5]])
    angles = [(np.rad2deg(np.arccos(n[2])), np.rad2deg(np.arctan2(n[1], n[0]))) for n in (n1, n2)]
    theirs, _ = multi_tensor(acq.to_dipy(), evals * 1e-3, S0=1.0, angles=angles,
                             fractions=[70, 30], snr=None)
    tensors = np.stack([tensor_about(n, e[0], e[1]) for n, e in zip((n1, n2), evals, strict=True)])
    share, d = t64([[0.7, 0.3]], tensors[None])
    protocol = forward.Protocol(acq, 20, share)
    np.testing.assert_allclose(protocol.tensors(share, d)[0], theirs, atol=1e-9)
    signal = sum(
        protocol.signal(sh.evaluate(20, *t64(n[None])),
                        [forward.zeppelin(*t64([part], [e[0]], [e[1]]))])
        for n, e, part in zip((n1, n2), evals, (0.7, 0.3), strict=True))
    np.testing.assert_allclose(signal[0], theirs, atol=1e-9)


def test_sticks_and_ball_of_dipy(rng):
    acq = table(rng, ((1000, 1.0), (3000, 1.0)), n=30)
    angles = [(20, 40), (80, 110)]
    theirs, sticks = sticks_and_ball(acq.to_dipy(), d=0.0017, S0=1.0, angles=angles,
                                     fractions=[35, 40], snr=None)
    share, d = t64([[0.35, 0.4, 0.25]], [[*tensor_about(sticks, 1.7, 0), 1.7 * np.eye(3)]])
    found = forward.Protocol(acq, 2, d).tensors(share, d)[0]
    np.testing.assert_allclose(found[1:], theirs[1:], atol=1e-12)  # dipy leaves out the first


def test_b_tensors_of_dipy(rng):
    """single_tensor and qti_signal know b-tensors: one tensor with an ODF that is a point."""
    acq = table(rng)
    frame = Rotation.random(random_state=1).as_matrix()
    evals = np.array([2.0, 0.9, 0.4])
    share, d = t64([[1.0]], (frame * evals @ frame.T)[None, None])
    found = forward.Protocol(acq, 2, d).tensors(share, d)[0]
    theirs = single_tensor(acq.to_dipy(), evals=evals / 1000, evecs=frame, snr=None)
    np.testing.assert_allclose(found, theirs, atol=1e-9)
    theirs = qti_signal(acq.to_dipy(), d[0].numpy() / 1000, np.zeros((1, 6, 6)))
    np.testing.assert_allclose(found, theirs.ravel(), atol=1e-9)
    zonal = tensor_about(frame[:, 0], 2.0, 0.5)
    point = sh.evaluate(20, *t64(frame[None, :, 0]))
    part = forward.zeppelin(*t64([1.0], [2.0], [0.5]))
    np.testing.assert_allclose(
        forward.Protocol(acq, 20, d).signal(point, [part])[0],
        np.exp(-np.einsum("nij,ij->n", acq.btensors / 1000, zonal)), atol=1e-8)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_rotating_odf_and_table_leaves_the_signal(rng, dtype, error):
    acq, turn = table(rng), Rotation.random(random_state=11).as_matrix()
    d, f, weights = (torch.tensor(v, dtype=dtype) for v in (
        rng.uniform(0.5, 3, 9), rng.uniform(0, 1, 9), rng.normal(size=(9, 45)) * 0.1 + 0.28))
    compartments = forward.two_compartments(d, f)
    before = forward.Protocol(acq, 8, d).signal(weights, compartments)
    rotated = sh.rotate(weights, torch.tensor(turn))
    after = forward.Protocol(acq.rotated(turn), 8, d).signal(rotated, compartments)
    assert before.dtype == after.dtype == dtype
    np.testing.assert_allclose(after, before, atol=error)
    shells = [forward.Protocol(a, 8, d).coefficients(w, compartments)
              for a, w in ((acq.rotated(turn), rotated), (acq, weights))]
    np.testing.assert_allclose(shells[0], sh.rotate(shells[1].flatten(0, 1),
                                                    torch.tensor(turn)).reshape(shells[0].shape),
                               atol=error)


def test_coefficients_are_those_of_the_shells(rng):
    """Shells of one b each: the coefficients, sampled, are the signal."""
    acq = table(rng)
    flat = Acquisition(np.round(acq.bvals, -2), acq.bvecs, acq.b_delta)
    d, f, kappa, mu = t64(rng.uniform(0.5, 3, 7), rng.uniform(0, 1, 7), rng.uniform(1, 9, 7),
                          axes(7, 3))
    protocol, weights = forward.Protocol(flat, 8, d), odf.watson(mu, kappa, 8)
    signal = protocol.signal(weights, forward.two_compartments(d, f)).numpy()
    shells = protocol.coefficients(weights, forward.two_compartments(d, f)).numpy()
    assert shells.shape == (7, 5, 45)
    for i, shell in enumerate(flat.shells):
        np.testing.assert_allclose(shells[:, i] @ sh.basis(8, flat.bvecs[shell.indices]).T,
                                   signal[:, shell.indices], atol=1e-12)
    np.testing.assert_allclose(signal[:, flat.b0], 1, atol=1e-12)


def test_each_shell_may_have_its_own_tensor(rng):
    acq = table(rng)
    axial, radial = rng.uniform(1, 2, (7, 5)), rng.uniform(0, 1, (7, 5))
    n, one, a, r = t64(axes(7, 3), np.ones(7), axial, radial)
    protocol = forward.Protocol(acq, 16, one)
    matrices = torch.tensor(tensor_about(n.numpy()[:, None], axial[..., None, None],
                                         radial[..., None, None]))
    found = protocol.tensors(one[:, None], matrices[:, None])
    convolved = protocol.signal(sh.evaluate(16, n), [forward.zeppelin(one, a, r)])
    for i, shell in enumerate(acq.shells):
        expected = np.exp(-np.einsum("nij,vij->vn", acq.btensors[shell.indices] / 1000,
                                     matrices[:, i].numpy()))
        np.testing.assert_allclose(found[:, shell.indices], expected, atol=1e-12)
        np.testing.assert_allclose(convolved[:, shell.indices], expected, atol=2e-6)
    np.testing.assert_allclose(found[:, acq.b0], 1)
    same = r[:, :1].expand(7, 5)  # one diffusivity per voxel beside one per shell
    np.testing.assert_array_equal(
        protocol.signal(sh.evaluate(16, n), [forward.zeppelin(one, a, r[:, 0])]),
        protocol.signal(sh.evaluate(16, n), [forward.zeppelin(one, a, same)]))


def test_signals_are_differentiable(rng):
    acq = table(rng, n=3)
    leaves = [v.requires_grad_() for v in t64([1.7, 0.8], [0.6, 0.3], axes(2, 1), [4.0, 9.0])]

    def signal(d, f, mu, kappa):
        return forward.Protocol(acq, 4, d).signal(odf.watson(mu, kappa, 4),
                                                  forward.two_compartments(d, f))

    assert torch.autograd.gradcheck(signal, leaves)
    edge = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    parts = forward.three_compartments(torch.ones_like(edge), edge, edge, edge)
    sum(v.sum() for part in parts for v in part).backward()
    assert torch.isfinite(edge.grad).all()
