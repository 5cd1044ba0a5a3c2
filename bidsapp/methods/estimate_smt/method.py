"""Spherical mean technique: neurite diffusivity and fraction from powder averages.

Kaden et al. 2016 (doi:10.1016/j.neuroimage.2016.06.002): sticks of diffusivity d and fraction f
in coaxial zeppelins of axial diffusivity d and radial (1 − f) d. The mean over directions

    S̄(b) / S0 = f p(d, 0) + (1 − f) p(d, (1 − f) d)

does not depend on the arrangement of the fibres. For an axially symmetric b-tensor of trace b and
shape b_Δ (Eriksson et al. 2015, doi:10.1063/1.4913502), with ℓ axial and r radial diffusivity,

    p(ℓ, r) = exp(−b [(1 − b_Δ)(ℓ + 2r)/3 + b_Δ r]) h(b b_Δ (ℓ − r)),   h(α) = ∫₀¹ exp(−α x²) dx.

Internal units: b in ms/µm², d in µm²/ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import dawsn, erf, i0e, i1e

from bidsapp import sh
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Derived, Estimator

MAX_DIFFUSIVITY = 3.0
"""Upper bound of d (µm²/ms). The prior is that of the paper: d ~ U(0, 3), f ~ U(0, 1)."""

MIN_DIRECTIONS = 6
"""Minimum number of directions for a mean over directions of a linear or planar shell."""

FRACTIONS, NODES, WINDOW = 64, 6, 4.0
"""Number of values of f; number of nodes in d for each; half width of the nodes in posterior SDs of
d."""

TABLE, INVERSE = 1024, 512
"""Number of intervals of the table of the signal as a function of d, and of the inverse table, from
which d starts."""

ASSUMED_SNR = 20.0
"""S0 over the noise SD assumed if the noise could not be measured."""

PER_SIGMA, MAX_SIGMA = 32, 32
"""Entries per noise SD, and range in noise SDs, of the table of the Rician excess."""

SMOOTHING = 0.25
"""Maximum number of SH coefficients per direction in the fit of a shell (`average_weights`)."""

LAPLACE_BELTRAMI = 0.006
"""Weight of the penalty l²(l + 1)² in the fit that smooths a shell (`average_weights`)."""

BLOCK = 256
"""Voxels per block, so that their likelihoods fit in the cache."""


def h(alpha: np.ndarray | np.floating) -> np.ndarray:
    """Compute h(α) = ∫₀¹ exp(−α x²) dx.

    It is computed by erf for α > 0, by Dawson's integral for α < 0 and by a series near 0.

    >>> float(h(np.float64(0)))
    1.0
    """
    root = np.sqrt(np.maximum(np.abs(alpha), 1e-6))
    positive = np.sqrt(np.pi) / 2 * erf(root) / root
    negative = np.exp(np.maximum(-alpha, 0)) * dawsn(root) / root if (alpha < 0).any() else 0
    series = 1 - alpha / 3 + alpha**2 / 10
    return np.where(np.abs(alpha) < 1e-4, series, np.where(alpha > 0, positive, negative))


def h_slope(alpha: np.ndarray | np.floating, value: np.ndarray) -> np.ndarray:
    """Compute h'(α) = (exp(−α) − h)/(2α) from h, by a series near 0."""
    small = np.abs(alpha) < 1e-2
    safe = np.where(small, 1, alpha)
    series = -1 / 3 + alpha / 5 - alpha**2 / 14 + alpha**3 / 54
    return np.where(small, series, (np.exp(-alpha) - value) / (2 * safe))


def powder_mean(d, f, b, b_delta):
    """Compute S̄/S0 of the model and its derivatives.

    Parameters
    ----------
    d, f, b, b_delta : ndarray
        Diffusivity (µm²/ms), fraction (0–1), b-value (ms/µm²) and shape of the b-tensor, which
        broadcast.

    Returns
    -------
    mean, by_d, by_f : ndarray
        S̄/S0 and its derivatives with respect to d and f.
    """
    total, by_d, by_f = 0.0, 0.0, 0.0
    axial_rate, radial_rate = b * (1 - b_delta) / 3, b * (2 * (1 - b_delta) / 3 + b_delta)
    # fraction, its derivative by f, radial diffusivity, its derivatives by d and by f
    sticks, zeppelins = (f, 1, 0 * d, 0, 0), (1 - f, -1, (1 - f) * d, 1 - f, -d)
    for share, share_by_f, radial, radial_by_d, radial_by_f in (sticks, zeppelins):
        alpha = b * b_delta * (d - radial)
        value = h(alpha)
        slope = b * b_delta * h_slope(alpha, value)
        decay = np.exp(-axial_rate * d - radial_rate * radial)
        by_axial, by_radial = slope - axial_rate * value, -slope - radial_rate * value
        total = total + share * decay * value
        by_d = by_d + share * decay * (by_axial + radial_by_d * by_radial)
        by_f = by_f + decay * (share_by_f * value + share * radial_by_f * by_radial)
    return total, by_d, by_f


@dataclass(frozen=True)
class Protocol:
    """Shells whose averages over directions are fitted.

    Parameters
    ----------
    b, b_delta : (k,) ndarray
        b-value (ms/µm²) and shape of the b-tensor.
    noise : (k,) ndarray
        SD of each average relative to that of one measurement.
    noise_s0 : float
        SD of the mean b0 relative to that of one measurement; 0 if S0 is known.
    """

    b: np.ndarray
    b_delta: np.ndarray
    noise: np.ndarray
    noise_s0: float

    def predict(self, d: np.ndarray, f: np.ndarray):
        """Compute S̄/S0 (…, k) and its derivatives with respect to d and f, for parameters (…,)."""
        return powder_mean(d[..., None], f[..., None], self.b, self.b_delta)


class Posterior:
    """Posterior mean and SD of d and f under a flat prior, with S0 marginalised.

    The data are z = S̄/(mean b0) and λ = σ/(mean b0); p is the model's S̄/S0, and n and n0 are
    `noise` and `noise_s0` of the protocol. With Gaussian noise and a flat prior on S0, z is normal
    around p(d, f) with covariance λ² [diag(n²) + n0² p pᵀ]. With r = (z − p)/(λ n) and q = n0 p/n,
    the Sherman–Morrison formula gives

        −2 log L = |r|² − (r·q)²/(1 + |q|²) + log(1 + |q|²).

    The likelihood is a thin curved ridge: for a given f, d is well determined. Therefore d is
    integrated for each f by Gauss–Legendre nodes around its optimum, and f by the midpoint rule. p
    is interpolated linearly in a table over d for each f.

    Parameters
    ----------
    protocol : Protocol
    device : str
    """

    def __init__(self, protocol: Protocol, device: str) -> None:
        def tensor(values):
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        f = (np.arange(FRACTIONS) + 0.5) / FRACTIONS
        d = np.linspace(0, MAX_DIFFUSIVITY, TABLE + 1)
        p = protocol.predict(*np.meshgrid(d, f))[0]
        self.table = tensor(np.concatenate([p[:, :-1], np.diff(p, axis=1)], 2)).flatten(0, 1).T
        self.table = self.table.contiguous()
        # Σ p/n decreases with d; its inverse gives the d from which the optimum is sought
        total = (p / protocol.noise).sum(2)
        self.step = float(total.max()) / INVERSE
        totals = np.arange(INVERSE + 1) * self.step
        self.inverse = tensor(np.array([np.interp(totals, row[::-1], d[::-1])
                                        for row in total])).flatten()
        self.f = tensor(f)
        self.noise = tensor(protocol.noise)[:, None, None]
        self.ratio = tensor(protocol.noise_s0 / protocol.noise)[:, None, None]
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        self.nodes, self.log_weights = tensor(nodes), tensor(np.log(weights))
        self.row = torch.arange(FRACTIONS, device=device)

    def predict(self, d: Float[torch.Tensor, "voxel f *node"]) -> tuple[
            Float[torch.Tensor, "k voxel f *node"], Float[torch.Tensor, "k voxel f *node"]]:
        """Interpolate p and ∂p/∂d, (k, voxel, f, …), at d (voxel, f, …)."""
        position = d * (TABLE / MAX_DIFFUSIVITY)
        index = position.long().clamp_(max=TABLE - 1)
        row = self.row.view(-1, *[1] * (d.ndim - 2)) * TABLE
        entries = self.table.index_select(1, (index + row).flatten()).view(-1, *d.shape)
        p, change = entries.chunk(2)
        return torch.addcmul(p, position - index, change), change * (TABLE / MAX_DIFFUSIVITY)

    def __call__(self, z: Float[torch.Tensor, "voxel k"], noise: Float[torch.Tensor, " voxel"]
                 ) -> dict[str, Float[torch.Tensor, "voxel 2"]]:
        """Compute the posterior of each voxel.

        Parameters
        ----------
        z : (voxel, k) tensor
            S̄ over the mean b0.
        noise : (voxel,) tensor
            λ, the noise SD over the mean b0.

        Returns
        -------
        dict
            `mean` and `std` of d and f, and `start`, the d and f of the highest likelihood among
            the nodes; all (voxel, 2).
        """
        level = noise[:, None] * self.noise
        z = z.T[:, :, None]
        index = ((z / self.noise).sum(0) / self.step).round().clamp(0, INVERSE).long()
        d = self.inverse[index + self.row * (INVERSE + 1)]
        for _ in range(2):  # Gauss–Newton along d
            p, slope = self.predict(d)
            slope, residual, q = slope / level, (z - p) / level, self.ratio * p
            across = (slope * q).sum(0) / (1 + (q * q).sum(0))
            curvature = (slope * slope).sum(0) - across * (slope * q).sum(0) + 1e-12
            gradient = (slope * residual).sum(0) - across * (residual * q).sum(0)
            d = (d + gradient / curvature).clamp(0, MAX_DIFFUSIVITY)
        width = WINDOW * curvature.rsqrt()
        low, high = (d - width).clamp(min=0), (d + width).clamp(max=MAX_DIFFUSIVITY)
        half = (high - low) / 2
        d = (low + half)[..., None] + half[..., None] * self.nodes
        p, _ = self.predict(d)
        residual, q = (z[..., None] - p) / level[..., None], self.ratio[..., None] * p
        one = 1 + (q * q).sum(0)
        misfit = (residual * residual).sum(0) - (residual * q).sum(0) ** 2 / one
        best = misfit.flatten(1).argmin(1)
        log_l = -0.5 * (misfit + one.log()) + self.log_weights + half.log()[..., None]
        weight = log_l.flatten(1).softmax(1)
        d, f = d.flatten(1), self.f.repeat_interleave(NODES).expand(len(d), -1)
        means, deviations, start = [], [], []
        for values in (d, f):
            mean = (weight * values).sum(1)
            means.append(mean)
            deviations.append((weight * (values - mean[:, None]) ** 2).sum(1).sqrt())
            start.append(values.gather(1, best[:, None])[:, 0])
        return {"mean": torch.stack(means, 1), "std": torch.stack(deviations, 1),
                "start": torch.stack(start, 1)}


def least_squares(z: Float[np.ndarray, "voxel k"], protocol: Protocol,
                  start: Float[np.ndarray, "voxel 2"],
                  steps: int = 500) -> Float[np.ndarray, "voxel 2"]:
    """Fit d, f and S0 by least squares: minimise Σ (z − S0 p(d, f))²/n² + (1 − S0)²/n0².

    S0 is eliminated (variable projection). Damped Gauss–Newton steps are clipped to 0 ≤ d ≤ 3 and
    0 ≤ f ≤ 1; a parameter at its bound is fixed while the gradient points outwards. A voxel has
    converged when its step is below 1e-6 of the range.

    Parameters
    ----------
    z : (voxel, k) ndarray
        S̄ over the mean b0.
    protocol : Protocol
    start : (voxel, 2) ndarray
        Initial d and f.
    steps : int
        Maximum number of steps.

    Returns
    -------
    (voxel, 2) ndarray
        d (µm²/ms) and f.
    """
    top = np.array([MAX_DIFFUSIVITY, 1.0])
    theta = np.clip(start.astype(float), 0, top)
    active = np.arange(len(z))
    damping = np.full(len(z), 1e-3)
    residual, jacobian = _linearise(z, protocol, theta)
    for _ in range(steps):
        current = theta[active]
        gradient = np.einsum("vkp,vk->vp", jacobian, residual)
        normal = np.einsum("vkp,vkq->vpq", jacobian, jacobian)
        at_bound = ((current <= 0) & (gradient < 0)) | ((current >= top) & (gradient > 0))
        gradient[at_bound] = 0
        diagonal = np.einsum("vpp->vp", normal) * (1 + damping[active, None]) + 1e-12
        across = np.where(at_bound.any(1), 0, normal[:, 0, 1])
        determinant = diagonal[:, 0] * diagonal[:, 1] - across**2
        step = np.stack([diagonal[:, 1] * gradient[:, 0] - across * gradient[:, 1],
                         diagonal[:, 0] * gradient[:, 1] - across * gradient[:, 0]],
                        1) / determinant[:, None]
        moved = np.clip(current + step, 0, top)
        new_residual, new_jacobian = _linearise(z[active], protocol, moved)
        better = (new_residual**2).sum(1) < (residual**2).sum(1)
        theta[active[better]] = moved[better]
        damping[active] *= np.where(better, 0.2, 4)
        residual[better], jacobian[better] = new_residual[better], new_jacobian[better]
        moving = (np.abs(moved - current) > 1e-6 * top).any(1)
        active, residual, jacobian = active[moving], residual[moving], jacobian[moving]
        if not len(active):
            break
    return theta


def _linearise(z: np.ndarray, protocol: Protocol, theta: np.ndarray):
    """Compute residuals (voxel, k + 1) at the best S0, and their negative derivatives
    (voxel, k + 1, 2)."""
    p, *slopes = protocol.predict(theta[:, 0], theta[:, 1])
    q = np.column_stack([np.ones(len(z)), protocol.noise_s0 * p / protocol.noise])
    u = q / np.linalg.norm(q, axis=1, keepdims=True)
    r = np.column_stack([np.zeros(len(z)), (z - p) / protocol.noise])
    s0 = 1 + protocol.noise_s0 * (r * q).sum(1, keepdims=True) / (q * q).sum(1, keepdims=True)
    columns = [np.column_stack([np.zeros(len(z)), s0 * slope / protocol.noise])
               for slope in slopes]
    flat = [a - (a * u).sum(1, keepdims=True) * u for a in (r, *columns)]
    return flat[0], np.stack(flat[1:], axis=2)


def rician_excess(spread: float) -> np.ndarray:
    """Tabulate the Rician excess E[M] − A of a magnitude M with true amplitude A.

    E[M] = σ √(π/2) [(1 + 2t) I0(t) + 2t I1(t)] exp(−t), t = A²/4σ² (Koay & Basser 2006,
    doi:10.1016/j.jmr.2006.01.016). Near the noise floor the excess is so curved that its value at
    an estimate m of E[M] would be biased. It is therefore averaged over A ≥ 0 with the weight
    N(m; E[M], spread² Var M), Var M = 2 + A² − E[M]².

    Parameters
    ----------
    spread : float
        SD of m relative to that of M.

    Returns
    -------
    (entry,) ndarray
        Expected excess, in units of σ, at m = 0, 1/PER_SIGMA, … MAX_SIGMA.
    """
    amplitude = np.linspace(0, 33, 1651)
    t = amplitude**2 / 4
    mean = np.sqrt(np.pi / 2) * ((1 + 2 * t) * i0e(t) + 2 * t * i1e(t))
    m = np.arange(MAX_SIGMA * PER_SIGMA + 1) / PER_SIGMA
    sd = max(spread, 0.02) * np.sqrt(2 + amplitude**2 - mean**2)
    square = ((m[:, None] - mean) / sd) ** 2 / 2 + np.log(sd)
    weight = np.exp(square.min(1, keepdims=True) - square)
    return weight @ (mean - amplitude) / weight.sum(1)


def subtract_rician_excess(signal: Float[torch.Tensor, "voxel n"],
                           smooth: Float[torch.Tensor, "n n"], sigma: float,
                           table: Float[torch.Tensor, " entry"]
                           ) -> Float[torch.Tensor, "voxel n"]:
    """Subtract the Rician excess from magnitudes.

    The excess is evaluated at smoothed magnitudes. Subtracting it, instead of inverting each
    magnitude, keeps the noise additive, so that the mean over directions is unbiased down to the
    noise floor.

    Parameters
    ----------
    signal : (voxel, n) tensor
        Magnitudes.
    smooth : (n, n) tensor
        Smoothing matrix, by which magnitudes are multiplied to estimate their expectations.
    sigma : float
        Noise SD.
    table : (entry,) tensor
        Result of `rician_excess`.

    Returns
    -------
    (voxel, n) tensor
    """
    position = ((signal @ smooth) * (PER_SIGMA / sigma)).clamp(0, len(table) - 1.01)
    index = position.long()
    low = table[index]
    excess = torch.lerp(low, table[index + 1], position - index)
    return signal - sigma * excess


def average_weights(acquisition: Acquisition, shell: Shell
                    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
    """Compute the weights of the mean over the sphere, and a smoothing matrix, of a shell.

    The mean is the degree-0 coefficient of a least-squares SH fit, exact for any set of directions
    up to its degree (Afzali et al. 2021, doi:10.1038/s41598-021-93558-1). The smoothing is that
    fit with Laplace–Beltrami regularisation (Descoteaux et al. 2007, doi:10.1002/mrm.21277).

    Parameters
    ----------
    acquisition : Acquisition
    shell : Shell

    Returns
    -------
    weights : (n,) ndarray
    smoothing : (n, n) ndarray
    """
    oriented = abs(shell.b_delta) > 0.05
    degree = sh.degree_for(SMOOTHING * len(shell)) if oriented else 0
    basis = sh.basis(degree, acquisition.bvecs[shell.indices])
    degrees = np.concatenate([np.full(2 * k + 1, k) for k in range(0, degree + 1, 2)])
    penalty = LAPLACE_BELTRAMI * np.diag(degrees**2 * (degrees + 1.0) ** 2)
    return (np.linalg.pinv(basis)[0] / np.sqrt(4 * np.pi),
            basis @ np.linalg.solve(basis.T @ basis + penalty, basis.T))


class SphericalMean(Estimator):
    """Estimator of neurite diffusivity and fraction: posterior means, SDs and least squares."""

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if there is no b0, or fewer than two shells of six directions."""
        if len(_usable_shells(acquisition)) < 2 or not acquisition.b0.any():
            shells = ", ".join(f"{len(s)} at b = {s.b:.0f} (b_delta {s.b_delta:.2g})"
                               for s in acquisition.shells) or "none weighted"
            raise Refusal(
                "the spherical mean technique has two unknowns and S0. This acquisition has "
                f"{int(acquisition.b0.sum())} b0 volumes and shells: {shells}. A b0 and two shells "
                f"of {MIN_DIRECTIONS} or more directions are required. Acquire a second shell "
                "(e.g. b = 1000 and 2200 s/mm²), or leave smt out of --estimate.")

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        acquisition = dwi.acquisition
        self.check(acquisition)
        shells = _usable_shells(acquisition)
        b0 = np.flatnonzero(acquisition.b0)
        # volumes, averaging weights and smoothing matrix of the b0 and of each shell
        averaging = [(b0, np.full(len(b0), 1 / len(b0)), np.full((len(b0),) * 2, 1 / len(b0))),
                     *((shell.indices, *average_weights(acquisition, shell)) for shell in shells)]
        noise = np.array([np.linalg.norm(weights) * dwi.gain(index)
                          for index, weights, _ in averaging])
        protocol = Protocol(np.array([shell.b for shell in shells]) / 1000,
                            np.array([shell.b_delta for shell in shells]), noise[1:],
                            0.0 if dwi.s0_known else noise[0])
        sigmas = [dwi.noise_of(index) for index, *_ in averaging]
        on_device = [(torch.as_tensor(index, device=device), *(
            torch.as_tensor(a, dtype=torch.float32, device=device) for a in (
                weights, smooth, rician_excess(np.linalg.norm(smooth) / len(index) ** 0.5))))
            for index, weights, smooth in averaging]
        posterior = Posterior(protocol, device)

        def estimate(signal: torch.Tensor) -> dict[str, torch.Tensor]:
            averages = []
            for sigma, (index, weights, smooth, table) in zip(sigmas, on_device, strict=True):
                part = signal[:, index]
                if sigma and dwi.magnitude:
                    part = subtract_rician_excess(part, smooth, sigma, table)
                averages.append(part @ weights)
            usable = averages[0] > 0
            s0 = torch.where(usable, averages[0], 1)
            z = torch.stack(averages[1:], 1) / s0[:, None]
            noise = dwi.noise_sd / s0 if dwi.noise_sd else torch.full_like(s0, 1 / ASSUMED_SNR)
            return posterior(z, noise) | {"z": z, "usable": usable}

        estimates = map_voxels(estimate, dwi.signal, device, BLOCK)
        usable = estimates["usable"]
        modes = np.zeros((len(usable), 2))
        modes[usable] = least_squares(estimates["z"][usable], protocol, estimates["start"][usable])
        maps = {}
        for i, name in enumerate(("diffusivity", "neuritefraction")):
            for key, values in ((name, estimates["mean"]), (f"{name}_std", estimates["std"]),
                                (f"{name}_mode", modes)):
                maps[key] = np.where(usable, values[:, i], 0).astype(np.float32)
        return Derived(maps, {"smt_no_b0_signal": int((~usable).sum())}, {
            "Prior": "diffusivity uniform on 0–3 µm²/ms, neurite fraction uniform on 0–1",
            "NoiseSD": (dwi.noise_of(np.concatenate([s.indices for s in shells]))
                        if dwi.noise_sd else f"assumed: S0 / {ASSUMED_SNR:.0f}"),
            "RicianBias": ("none (real-valued signal)" if not dwi.magnitude else "corrected"
                           if dwi.noise_sd else "not corrected (noise unknown)"),
            "Shells": [round(shell.b) for shell in shells]}, usable)


def _usable_shells(acquisition: Acquisition) -> list[Shell]:
    """Select the shells that have a mean over directions."""
    return [shell for shell in acquisition.shells
            if abs(shell.b_delta) <= 0.05 or len(shell) >= MIN_DIRECTIONS]
