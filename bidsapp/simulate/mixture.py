"""Signals with known truth: mixtures of tissues with the diffusivities of one participant.

Sadegheih et al. 2023 (doi:10.1007/s13218-023-00811-y, WP2); fractions and number of compartments
follow its free-water application (Weninger et al. 2020, doi:10.1371/journal.pone.0239475). A voxel
mixes three fibre populations, grey matter and CSF:

    S_i / S0 = Σ_c f_c exp(−B_i : D_c,s(i))

with one set of tensors D per shell s, so that the signals contain dependence on b (kurtosis).
b is in ms/µm², D in µm²/ms. Modes differ in the diffusivities:

    mode          white matter                              grey matter, CSF
    syn           mean over single-fibre voxels             mean
    sample-mean   a random single-fibre voxel per fibre     mean
    sample        a random single-fibre voxel per fibre     a random voxel of each
    random-wm     no tensor: uniform in every volume        mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from bidsapp import tensor
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal

RANDOM = "random-wm"
"""Mode in which white matter has no tensor but an independent diffusivity in every volume."""

FIBRES = ("wm1", "wm2", "wm3")
COMPARTMENTS = (*FIBRES, "gm", "csf")
"""Names of the compartments, in the order of all arrays."""

MAX_DIFFUSIVITY = 3.0
"""Diffusivity of free water at body temperature (µm²/ms), the upper bound for every tissue. CSF
takes it in high shells where noise hides its signal."""

MIN_DIRECTIONS = 6
"""Minimum number of directions of a shell. A shell with fewer, or of spherical encoding, takes the
fibre tensors of the shell nearest in b."""

STEPS = 40
"""Gauss–Newton steps of `fit_prolate`."""


@dataclass(frozen=True)
class Diffusivities:
    """Diffusivities measured in one participant (µm²/ms), by shell.

    Parameters
    ----------
    axial, radial : (voxel, shell) ndarray
        Axial and radial diffusivity of the single-fibre voxels.
    gm, csf : (voxel, shell) ndarray
        Isotropic diffusivity of grey matter and CSF voxels.
    gm_mean, csf_mean : (shell,) ndarray
        Isotropic diffusivity of the signal pooled over the voxels.
    """

    axial: np.ndarray
    radial: np.ndarray
    gm: np.ndarray
    csf: np.ndarray
    gm_mean: np.ndarray
    csf_mean: np.ndarray


@dataclass(frozen=True)
class Mixtures:
    """Signals and their truth, one row per voxel.

    Parameters
    ----------
    attenuation : (voxel, measurement) ndarray
        S/S0 without noise.
    fractions : (voxel, 5) ndarray
        Signal fractions, in the order of COMPARTMENTS.
    directions : (voxel, 3, 3) ndarray
        Unit vectors of the fibres (population, xyz), world RAS+.
    tensors : (voxel, compartment, shell, 6) ndarray
        Tensors (µm²/ms) of all compartments; in mode RANDOM of grey matter and CSF only.
    profile : (voxel, measurement) ndarray, optional
        Diffusivity of white matter in every volume (µm²/ms), in mode RANDOM only.
    """

    attenuation: np.ndarray
    fractions: np.ndarray
    directions: np.ndarray
    tensors: np.ndarray
    profile: np.ndarray | None = None


def check(acquisition: Acquisition) -> None:
    """Check that an acquisition suffices for the measurement of a participant's tissues.

    Raises
    ------
    Refusal
        There is no b0, or no shell determines a fibre's tensor.
    """
    chosen = acquisition[tensor.volumes(acquisition)]
    rank = np.linalg.matrix_rank(tensor.design(chosen.btensors), tol=1e-3)
    if not acquisition.b0.any() or rank < tensor.TERMS or not any(
            _determines(acquisition, shell) for shell in acquisition.shells):
        shells = ", ".join(f"{len(s)} at b = {s.b:.0f} (b_delta {s.b_delta:.2g})"
                           for s in acquisition.shells) or "none weighted"
        raise Refusal(
            "mixtures of this participant's tissues need a tensor of the single-fibre voxels in "
            f"each shell. This acquisition has {int(acquisition.b0.sum())} b0 volumes and shells: "
            f"{shells}. A b0 and a shell of {MIN_DIRECTIONS} or more directions that do not lie on "
            "one cone are required. Acquire these, or leave the method out.")


def measure(dwi: Dwi, gm: np.ndarray, csf: np.ndarray, fibre: np.ndarray, device: str
            ) -> Diffusivities:
    """Measure the diffusivities of three regions in every shell.

    A shell that does not determine a fibre's tensor takes the fibres of the nearest that does.

    Parameters
    ----------
    dwi : Dwi
        Run of the participant.
    gm, csf, fibre : (voxel,) bool ndarray
        Grey matter, CSF and single-fibre voxels.
    device : str
        Torch device.

    Returns
    -------
    Diffusivities
    """
    acquisition, s0 = dwi.acquisition, dwi.mean_b0
    shells = acquisition.shells
    noise = np.array([dwi.noise_of(s.indices) or 0.0 for s in shells])
    isotropic, pooled = {}, {}
    for name, where in (("gm", gm), ("csf", csf)):
        squares = np.stack([(dwi.signal[where][:, s.indices].astype(float) ** 2).mean(1)
                            for s in shells], 1)
        isotropic[name] = _isotropic(squares, s0[where, None].astype(float) ** 2, shells, noise)
        pooled[name] = _isotropic(squares.mean(0), (s0[where].astype(float) ** 2).mean(), shells,
                                  noise)
    usable = [i for i, shell in enumerate(shells) if _determines(acquisition, shell)]
    fibre_s0 = torch.as_tensor(s0[fibre].astype(float), device=device)
    fits = {}
    for i in usable:
        signal = torch.as_tensor(dwi.signal[fibre][:, shells[i].indices].astype(float),
                                 device=device)
        fits[i] = fit_prolate(signal / fibre_s0[:, None],
                              acquisition.btensors[shells[i].indices] / 1000, noise[i] / fibre_s0)
    nearest = [usable[int(np.argmin([abs(shells[i].b - shell.b) for i in usable]))]
               for shell in shells]
    axial, radial = (torch.stack([fits[i][k] for i in nearest], 1).cpu().numpy() for k in (0, 1))
    return Diffusivities(axial, radial, isotropic["gm"], isotropic["csf"], pooled["gm"],
                         pooled["csf"])


def fit_prolate(attenuation: Float[torch.Tensor, "voxel n"], btensors: Float[np.ndarray, "n 3 3"],
                noise: Float[torch.Tensor, " voxel"]
                ) -> tuple[Float[torch.Tensor, " voxel"], Float[torch.Tensor, " voxel"]]:
    """Fit a prolate tensor to each signal.

    Least squares of S/S0 in D = r I + u uᵀ, which is prolate for every u (axial = r + |u|²). Damped
    Gauss–Newton steps for all voxels at once start from the axisymmetric part of the log-linear
    tensor. The model includes the noise floor, sqrt(A² + σ²) (Gudbjartsson & Patz 1995,
    doi:10.1002/mrm.1910340618).

    Parameters
    ----------
    attenuation : (voxel, n) tensor
        S/S0.
    btensors : (n, 3, 3) ndarray
        b-tensors (ms/µm²).
    noise : (voxel,) tensor
        σ/S0.

    Returns
    -------
    axial, radial : (voxel,) tensor
        Diffusivities (µm²/ms), 0 ≤ radial ≤ axial ≤ 3.
    """
    b = torch.as_tensor(btensors, dtype=attenuation.dtype, device=attenuation.device)
    trace = torch.einsum("nii->n", b)
    # log S/S0 = x · (xx xy xz yy yz zz)
    x = torch.as_tensor(tensor.design(btensors * 1000)[:, :6], dtype=b.dtype, device=b.device)
    d = torch.log(attenuation.clamp(min=1e-3)) @ torch.linalg.pinv(x).T
    full = d[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(1, (3, 3))
    values, vectors = torch.linalg.eigh(full)
    radial = values[:, :2].mean(1).clamp(0.05, 1)
    theta = torch.cat([radial[:, None], vectors[:, :, 2]
                       * (values[:, 2] - radial).clamp(0.05, 2).sqrt()[:, None]], 1)

    def compute_residual(theta):  # and the Jacobian of the prediction
        bu = torch.einsum("nij,vj->vni", b, theta[:, 1:])
        clean = torch.exp(-trace * theta[:, :1] - torch.einsum("vni,vi->vn", bu, theta[:, 1:]))
        magnitude = torch.sqrt(clean**2 + noise[:, None] ** 2)
        slope = torch.cat([trace.expand(len(theta), -1)[..., None], 2 * bu], 2)
        return attenuation - magnitude, -slope * (clean**2 / magnitude)[..., None]

    damping = torch.full_like(radial, 1e-3)
    residual, jacobian = compute_residual(theta)
    for _ in range(STEPS):
        normal = jacobian.mT @ jacobian
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        normal = normal + torch.diag_embed(damping[:, None] * diagonal + 1e-12)
        step = torch.linalg.solve(normal, (jacobian.mT @ residual[..., None])[..., 0])
        moved = _clip_to_bounds(theta + step)
        new_residual, new_jacobian = compute_residual(moved)
        better = (new_residual**2).sum(1) < (residual**2).sum(1)
        theta = torch.where(better[:, None], moved, theta)
        residual = torch.where(better[:, None], new_residual, residual)
        jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
        damping = (damping * torch.where(better, 0.2, 4.0)).clamp(1e-9, 1e9)
    return theta[:, 0] + (theta[:, 1:] ** 2).sum(1), theta[:, 0]


def mix(mode: str, measured: Diffusivities, acquisition: Acquisition, count: int, seed: int,
        device: str) -> Mixtures:
    """Simulate voxels of a mode with random fractions and directions.

    Parameters
    ----------
    mode : str
        One of `syn`, `sample-mean`, `sample` and RANDOM (see the module).
    measured : Diffusivities
    acquisition : Acquisition
    count : int
        Number of voxels.
    seed : int
        Fractions and directions depend on the seed and not on the mode.
    device : str

    Returns
    -------
    Mixtures
    """
    fractions, directions = draw_fractions_and_directions(count, seed)
    return simulate_given(mode, measured, acquisition, fractions, directions, seed, device)


def simulate_given(mode: str, measured: Diffusivities, acquisition: Acquisition,
                   fractions: np.ndarray, directions: np.ndarray, seed: int | Sequence[int],
                   device: str) -> Mixtures:
    """Simulate voxels of a mode with given (voxel, 5) fractions and (voxel, 3, 3) directions."""
    tensors = draw_tensors(mode, measured, directions, seed)
    signal = attenuation(fractions[:, -tensors.shape[1]:], tensors, acquisition, device)
    if mode != RANDOM:
        return Mixtures(signal, fractions, directions, tensors)
    rng = np.random.default_rng([*np.atleast_1d(seed), 3])
    profile = rng.uniform(0, MAX_DIFFUSIVITY, signal.shape)
    white = fractions[:, :len(FIBRES)].sum(1, keepdims=True)
    signal += white * np.exp(-acquisition.bvals / 1000 * profile)
    return Mixtures(signal, fractions, directions, tensors, profile)


def draw(mode: str, measured: Diffusivities, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Draw the parameters of `count` mixtures of a mode, without their signals.

    Returns
    -------
    fractions : (count, 5) ndarray
    directions : (count, 3, 3) ndarray
    tensors : (count, 5, shell, 6) ndarray
        µm²/ms; (count, 2, shell, 6) in mode RANDOM.
    """
    fractions, directions = draw_fractions_and_directions(count, seed)
    return fractions, directions, draw_tensors(mode, measured, directions, seed)


def draw_fractions_and_directions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw fractions (count, 5), five uniform numbers divided by their sum, and directions
    (count, 3, 3), uniform on the sphere."""
    rng = np.random.default_rng([seed, 0])
    fractions = rng.uniform(size=(count, len(COMPARTMENTS)))
    fractions /= fractions.sum(1, keepdims=True)
    directions = rng.standard_normal((count, len(FIBRES), 3))
    return fractions, directions / np.linalg.norm(directions, axis=2, keepdims=True)


def draw_tensors(mode: str, measured: Diffusivities, directions: np.ndarray,
                 seed: int | Sequence[int]) -> np.ndarray:
    """Draw the tensors (voxel, compartment, shell, xx xy xz yy yz zz) of a mode (µm²/ms).

    Compartments are all five, in mode RANDOM grey matter and CSF only.
    """
    count = len(directions)
    rng = np.random.default_rng([*np.atleast_1d(seed), 2])
    shape = (count, len(measured.gm_mean))
    parts = []
    if mode != RANDOM:
        pick = rng.integers(len(measured.axial), size=(count, len(FIBRES)))
        axial, radial = (np.broadcast_to(x.mean(0), (*pick.shape, shape[1])) if mode == "syn"
                         else x[pick] for x in (measured.axial, measured.radial))
        outer = directions[..., :, None] * directions[..., None, :]
        parts.append(radial[..., None, None] * np.eye(3)
                     + (axial - radial)[..., None, None] * outer[:, :, None])
    for mean, voxels in ((measured.gm_mean, measured.gm), (measured.csf_mean, measured.csf)):
        diffusivity = voxels[rng.integers(len(voxels), size=count)] if mode == "sample" else mean
        parts.append(np.broadcast_to(diffusivity, shape)[:, None, :, None, None] * np.eye(3))
    tensors = np.concatenate(parts, 1)
    return tensors[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]


def attenuation(fractions: np.ndarray, tensors: np.ndarray, acquisition: Acquisition, device: str
                ) -> np.ndarray:
    """Compute S/S0 of mixtures; a b0 volume uses the tensors of the lowest shell.

    Parameters
    ----------
    fractions : (voxel, compartment) ndarray
    tensors : (voxel, compartment, shell, 6) ndarray
        Diffusion tensors (µm²/ms).
    acquisition : Acquisition
    device : str

    Returns
    -------
    (voxel, measurement) ndarray
    """
    x = torch.as_tensor(tensor.design(acquisition.btensors)[:, :6], device=device)
    share = torch.as_tensor(fractions, device=device)
    d = torch.as_tensor(tensors, device=device)
    out = torch.empty(len(share), len(x), dtype=x.dtype, device=device)
    for i, shell in enumerate(acquisition.shells):
        volumes = torch.as_tensor(
            np.r_[shell.indices, np.flatnonzero(acquisition.b0 & (i == 0))], device=device)
        out[:, volumes] = torch.einsum("vc,vcn->vn", share, torch.exp(d[:, :, i] @ x[volumes].T))
    return out.cpu().numpy()


def _determines(acquisition: Acquisition, shell: Shell) -> bool:
    """Tell whether a shell alone, with S0 given, determines the six entries of a tensor."""
    if len(shell) < MIN_DIRECTIONS or abs(shell.b_delta) < 0.05:
        return False
    x = tensor.design(acquisition.btensors[shell.indices])[:, :6]
    values = np.linalg.svd(x / np.linalg.norm(x, axis=0).clip(1e-12), compute_uv=False)
    return bool(values[-1] > 0.01)


def _isotropic(squares: np.ndarray, s0_squared: np.ndarray | np.floating,
               shells: Sequence[Shell], noise: Float[np.ndarray, " shell"]) -> np.ndarray:
    """Compute isotropic diffusivities (µm²/ms) in each shell (last axis) from the mean of S².

    E[S²] = A² + 2σ² under Rician noise, so the noise floor, which CSF reaches in high shells, does
    not count as signal.
    """
    b = np.array([shell.b for shell in shells]) / 1000
    clean = np.maximum(squares - 2 * noise**2, 1e-12 * s0_squared)
    return np.clip(-np.log(clean / s0_squared) / (2 * b), 0, MAX_DIFFUSIVITY)


def _clip_to_bounds(theta: torch.Tensor) -> torch.Tensor:
    """Clip (r, u) to 0 ≤ r and r + |u|² ≤ MAX_DIFFUSIVITY."""
    radial = theta[:, :1].clamp(0, MAX_DIFFUSIVITY)
    length = theta[:, 1:].norm(dim=1, keepdim=True).clamp(min=1e-12)
    largest = (MAX_DIFFUSIVITY - radial).sqrt()
    return torch.cat([radial, theta[:, 1:] * (length.clamp(max=largest) / length)], 1)
