"""Voxels with known truth, simulated for the benchmarks."""

import numpy as np
from dipy.core.sphere import HemiSphere, disperse_charges
from scipy.special import eval_legendre

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi

DEGREES = np.arange(0, 29, 2)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(80)
LEGENDRE = np.stack([eval_legendre(degree, NODES) for degree in DEGREES])
FREE_WATER_KINDS = ("mixture", "sparse", "one fibre")


def two_shells(rng, n=60, b=(1000, 2200)):
    """Make an acquisition of one b0 and of n directions, the same ones, at each b in s/mm².

    The directions are spread over the half sphere by electrostatic repulsion (dipy).
    """
    xyz = rng.normal(size=(n, 3))
    sphere = HemiSphere(xyz=xyz / np.linalg.norm(xyz, axis=1, keepdims=True))
    g = disperse_charges(sphere, 500)[0].vertices
    return Acquisition(np.r_[0, np.repeat(b, n)], np.r_[np.zeros((1, 3)), np.tile(g, (len(b), 1))])


def spiral_shells(scheme):
    """Make an acquisition of ((b, number of directions), …), in s/mm², b = 0 for b0 volumes.

    The directions lie on golden spirals, turned by 0.4 rad from one shell to the next.
    """
    axes = []
    for shell, (b, n) in enumerate(scheme):
        i = np.arange(n)
        z = 1 - (i + 0.5) / n
        phi = i * np.pi * (3 - np.sqrt(5)) + 0.4 * shell
        r = np.sqrt(1 - z**2)
        axes.append(np.column_stack([r * np.cos(phi), r * np.sin(phi), z]) * (b > 0))
    bvals, counts = zip(*scheme, strict=True)
    return Acquisition(np.repeat(bvals, counts).astype(float), np.vstack(axes))


def simulate_two_compartments(acq, d, f, rng, peaks=3, kappa=(1, 32)):
    """Simulate S/S0 (voxel, n) of the constrained two-compartment model over Watson mixtures.

    d: diffusivity in µm²/ms, f: neurite fraction, both (voxel,). kappa: range of the
    concentrations of its bundles.

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


def add_rician_noise(clean, sd, rng):
    """Return a noisy magnitude of a clean signal; sd: of each channel."""
    return np.hypot(clean + rng.normal(0, sd, clean.shape), rng.normal(0, sd, clean.shape))


def simulate_free_water(kind, acq, n, seed):
    """Simulate clean S/S0 (n, measurement), fraction of free water (n,), FA of the tissue or None.

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


def as_dwi(signal, acq, noise_sd, *, s0_known=False):
    """Make a Dwi of the signal (voxel, n) of voxels in a row; noise_sd: in its units."""
    return Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acq,
               noise_sd, s0_known=s0_known)
