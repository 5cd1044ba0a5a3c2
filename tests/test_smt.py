"""The spherical mean technique against numerical integration, a numerical minimiser and a simulator
that shares nothing with the estimator: Funk–Hecke on Watson mixtures of the two-compartment model."""

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
    Posterior,
    Protocol,
    average_weights,
    h,
    h_slope,
    least_squares,
    powder_mean,
    rician_excess,
    unbiased,
)

DEGREES = np.arange(0, 29, 2)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(80)
LEGENDRE = np.stack([eval_legendre(l, NODES) for l in DEGREES])


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
            (eval_legendre(l, cosine) * coefficients[:, :, i, None]).sum(1)
            for i, l in enumerate(DEGREES))
    return signal


def rician(clean, sd, rng):
    return np.hypot(clean + rng.normal(0, sd, clean.shape), rng.normal(0, sd, clean.shape))


def as_dwi(signal, acq, noise_sd):
    return Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acq,
               noise_sd)


@pytest.fixture(scope="module")
def simulation():
    """20 000 voxels, SNR 50, one noise-free b0, 60 directions at b = 1 and 2.2 ms/µm²."""
    rng = np.random.default_rng(7)
    acq = acquisition(rng)
    d, f = rng.uniform(0, 3, 20_000), rng.uniform(0, 1, 20_000)
    signal = simulate(acq, d, f, rng)
    signal[:, 1:] = rician(signal[:, 1:], 0.02, rng)
    return as_dwi(signal, acq, 0.02), d, f
