"""Acquisitions as networks take them: shells with directions, an SH fit of each, and noise.

Several protocols are stacked, one per group of voxels, and padded to the same number of shells and
directions, so that a minibatch may contain many protocols. One acquisition is a stack of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int

from bidsapp import sh
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.simulate import forward, odf

L_FIT = 8
"""Highest degree of the SH fit of a shell; a shell of few directions has a lower one."""

REDUNDANCY = 1.3
"""Minimum number of directions per coefficient of a fit; 6 directions suffice for degree 2."""

MAX_CONDITION = 30.0
"""Highest condition number of a fit. The degree is lowered until an uneven shell meets it."""

ISOTROPIC = 0.05
"""|b_delta| below which a shell counts as spherical encoding, without directions."""


@dataclass(frozen=True)
class Protocols:
    """Stack of protocols, padded with zeros.

    Parameters
    ----------
    b, b_delta : (group, shell) tensor
        b-value (ms/µm²) and shape of the b-tensor.
    count : (group, shell) tensor
        Number of directions; 0 if there is no shell.
    b0 : (group,) tensor
        Number of volumes whose mean is S0; inf if S0 is known.
    basis : (group, shell, direction, coefficient) tensor
        SH functions along the directions; 0 if there is no direction.
    fit : (group, shell, size(8), direction) tensor
        Least-squares matrix from signals to coefficients; rows of degrees that the shell does not
        determine are 0.
    """

    b: Float[torch.Tensor, "group shell"]
    b_delta: Float[torch.Tensor, "group shell"]
    count: Float[torch.Tensor, "group shell"]
    b0: Float[torch.Tensor, " group"]
    basis: Float[torch.Tensor, "group shell direction _"]
    fit: Float[torch.Tensor, "group shell 45 direction"]

    def to(self, like: torch.Tensor) -> Protocols:
        """Convert to the dtype and device of `like`."""
        return Protocols(*(getattr(self, f.name).to(like) for f in fields(self)))

    @property
    def shells(self) -> Float[torch.Tensor, "group shell 3"]:
        """Input of a network: b, b_delta, and 1/√count, which is 0 if there is no shell."""
        noise = torch.where(self.count > 0, self.count.clamp(min=1).rsqrt(), 0)
        return torch.stack([self.b, self.b_delta, noise], -1)

    def coefficients(self, odfs: Float[torch.Tensor, "voxel size"],
                     compartments: Sequence[forward.Compartment]
                     ) -> Float[torch.Tensor, "voxel shell size"]:
        """Compute noise-free coefficients of S/S0 on every shell, voxels group by group."""
        per_group = len(odfs) // len(self.b)
        b, s = (x.repeat_interleave(per_group, 0) for x in (1000 * self.b, self.b_delta))
        return forward.convolve(odfs, forward.kernel(compartments, b, s,
                                                     sh.l_max_of(odfs.shape[1])))

    def signals(self, coefficients: Float[torch.Tensor, "voxel shell size"]
                ) -> Float[torch.Tensor, "group voxels shell direction"]:
        """Evaluate S/S0 along the directions of each group."""
        s = coefficients.unflatten(0, (len(self.b), -1)).transpose(1, 2)
        return (s @ self.basis.mT).transpose(1, 2)

    def fit_signals(self, signals: Float[torch.Tensor, "group voxels shell direction"]
               ) -> Float[torch.Tensor, "coef voxel shell"]:
        """Fit SH coefficients to signals; the coefficient axis comes first, as in spherical
        layers."""
        coefficients = torch.einsum("gskd,gvsd->kgvs", self.fit, signals)
        return coefficients.flatten(1, 2)


def measure(protocols: Protocols, signals: Float[torch.Tensor, "group voxels shell direction"],
            noise: Float[torch.Tensor, " voxel"], generator: torch.Generator
            ) -> tuple[Float[torch.Tensor, "coef voxel shell"], Float[torch.Tensor, "voxel 2"]]:
    """Simulate a measurement: add Rician noise, normalise by the mean b0 and fit every shell.

    Parameters
    ----------
    protocols : Protocols
    signals : (group, voxels, shell, direction) tensor
        Noise-free S/S0.
    noise : (voxel,) tensor
        σ over the true S0.
    generator : torch.Generator

    Returns
    -------
    x : (coefficient, voxel, shell) tensor
        Coefficients of the noisy magnitudes over the mean b0.
    noise : (voxel, 2) tensor
        σ of one measurement and of the mean b0, both over the mean b0.
    """
    def normal(like):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    sigma = noise.view(len(protocols.b), -1, 1, 1)
    noisy = torch.hypot(signals + sigma * normal(signals), sigma * normal(signals))
    s0_noise = sigma * protocols.b0.rsqrt().view(-1, 1, 1, 1)
    # the Rician excess of the mean b0 to first order, σ²/2S0, unless S0 is known
    excess = torch.where(s0_noise > 0, sigma**2 / 2, 0)
    s0 = 1 + excess + s0_noise * normal(s0_noise)
    return protocols.fit_signals(noisy / s0), torch.cat([sigma / s0, s0_noise / s0], -1).flatten(
        0, 1)[:, 0]


def from_acquisition(acquisition: Acquisition, shells: Sequence[Shell], l_max: int, *,
                     s0_known: bool = False) -> Protocols:
    """Create the protocol of one acquisition: a stack of one group.

    Parameters
    ----------
    acquisition : Acquisition
    shells : sequence of Shell
        Shells to use.
    l_max : int
        Highest degree of the basis, 8 or more.
    s0_known : bool
        Whether S0 is known without noise.

    Returns
    -------
    Protocols
    """
    directions = torch.zeros(len(shells), max(len(s) for s in shells), 3, dtype=torch.float64)
    for i, shell in enumerate(shells):
        axes = torch.from_numpy(acquisition.bvecs[shell.indices])
        # spherical tensors have no axis; any unit vector serves
        directions[i, :len(shell)] = torch.where(axes.norm(dim=1, keepdim=True) > 0.5, axes,
                                                 axes.new_tensor([0, 0, 1]))
    count = torch.tensor([[len(s) for s in shells]])
    b, b_delta = (torch.tensor([[getattr(s, k) for s in shells]], dtype=torch.float64)
                  for k in ("b", "b_delta"))
    b0 = torch.tensor([math.inf if s0_known else acquisition.b0.sum()], dtype=torch.float64)
    return build(b / 1000, b_delta, count, b0, directions[None], l_max)


def build(b: torch.Tensor, b_delta: torch.Tensor, count: Int[torch.Tensor, "group shell"],
          b0: torch.Tensor, directions: Float[torch.Tensor, "group shell direction 3"],
          l_max: int, *, even: bool = False) -> Protocols:
    """Build protocols and the SH fits of their shells.

    Parameters
    ----------
    b, b_delta : (group, shell) tensor
        b-value (ms/µm²) and shape of the b-tensor.
    count : (group, shell) tensor
        Number of directions.
    b0 : (group,) tensor
        Number of b0 volumes; inf if S0 is known.
    directions : (group, shell, direction, 3) tensor
        Unit vectors, padded with zeros.
    l_max : int
        Highest degree of the basis, 8 or more.
    even : bool
        Whether directions are spread evenly, so that the condition of the fits need not be tested.

    Returns
    -------
    Protocols
    """
    present = torch.arange(directions.shape[2], device=count.device) < count[..., None]
    basis = sh.evaluate(l_max, directions) * present[..., None]
    l = torch.from_numpy(sh.degrees(L_FIT)).to(count.device)
    highest = torch.zeros_like(count)
    for degree in range(2, L_FIT + 1, 2):
        enough = count >= (6 if degree == 2 else REDUNDANCY * sh.size(degree))
        highest = torch.where(enough, degree, highest)
    highest = torch.where(b_delta.abs() < ISOTROPIC, 0, highest)
    low = basis[..., :len(l)]
    volumes = count.clamp(min=1)[..., None, None]
    while True:
        used = ((l <= highest[..., None]) & (count > 0)[..., None]).to(low.dtype)
        design = low * used[..., None, :]
        normal = design.mT @ design * (4 * math.pi / volumes) + torch.diag_embed(1 - used)
        if even:
            break
        values = torch.linalg.eigvalsh(normal)
        ill_conditioned = (values[..., 0] * MAX_CONDITION < values[..., -1]) & (highest > 0)
        if not ill_conditioned.any():
            break
        highest = torch.where(ill_conditioned, highest - 2, highest)
    fit = torch.cholesky_solve(design.mT, torch.linalg.cholesky(normal)) * (4 * math.pi / volumes)
    return Protocols(b, b_delta, count.to(b.dtype), b0, basis, fit)


@lru_cache
def spread(n: int, steps: int = 60) -> np.ndarray:
    """Spread n axes evenly by electrostatic repulsion of axes and antipodes, from a spiral.

    Jones et al. 1999, doi:10.1002/(SICI)1522-2594(199909)42:3<515::AID-MRM14>3.0.CO;2-Q.

    Parameters
    ----------
    n : int
    steps : int
        Steps of the repulsion.

    Returns
    -------
    (n, 3) ndarray
        Unit vectors.
    """
    z = (np.arange(n) + 0.5) / n
    phi = np.arange(n) * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - z**2)
    x = np.stack([r * np.cos(phi), r * np.sin(phi), z], 1)
    for i in range(steps):
        # 1/|x − y|³ of axes, from the cosine: |x − y|² = 2 − 2c
        c = np.clip(x @ x.T, -1 + 1e-9, 1 - 1e-9) * (1 - np.eye(n))
        near, far = (2 - 2 * c) ** -1.5, (2 + 2 * c) ** -1.5
        weight = (far - near) * (1 - np.eye(n))
        force = weight @ x
        force -= (force * x).sum(1, keepdims=True) * x
        move = force / max(np.linalg.norm(force, axis=1).max(), 1e-12)
        x = x + 0.3 / n**0.5 * (1 - i / steps) * move
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def draw(groups: int, generator: torch.Generator, *, l_max: int, shells: tuple[int, int] = (1, 4),
         b: tuple[float, float] = (0.5, 5.0), directions: tuple[int, int] = (6, 90),
         b_delta: Sequence[float] = (1.0,), b0: tuple[int, int] = (1, 16), s0_known: float = 0.1,
         single: float = 0.25, uneven: float = 0.0) -> Protocols:
    """Draw random protocols.

    Directions are spread evenly, but for a share of shells, and each shell is rotated at random.

    Parameters
    ----------
    groups : int
        Number of protocols.
    generator : torch.Generator
    l_max : int
        Highest degree of the basis.
    shells : (int, int)
        Range of the number of shells.
    b : (float, float)
        Range of b (ms/µm²), uniform in √b. Shells of one shape differ by 15 % or more.
    directions : (int, int)
        Range of the number of directions, uniform in its square root.
    b_delta : sequence of float
        Shapes of b-tensors. Every protocol may use the first; each of the others is available in
        half of the protocols.
    b0 : (int, int)
        Range of the number of b0 volumes.
    s0_known : float
        Share of protocols whose S0 is known.
    single : float
        Frequency of a single shell, relative to that of each other number.
    uneven : float
        Share of shells with uneven directions: each is displaced by normal numbers whose SD is up
        to 1.5 times the mean distance between neighbours.

    Returns
    -------
    Protocols
    """
    rng = np.random.default_rng(
        int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    max_shells = shells[1]
    share = np.where(np.arange(shells[0], max_shells + 1) < 2, single, 1.0)
    share /= share.sum()
    count = np.zeros((groups, max_shells), int)
    values, shapes = np.ones((groups, max_shells)), np.ones((groups, max_shells))
    xyz = np.zeros((groups, max_shells, directions[1], 3))
    rotations = odf.random_rotations(groups * max_shells, generator).cpu().numpy().reshape(
        groups, max_shells, 3, 3)
    for g in range(groups):
        k = rng.choice(np.arange(shells[0], max_shells + 1), p=share)
        available = [b_delta[0], *(x for x in b_delta[1:] if rng.random() < 0.5)]
        while True:
            b_value = np.sort(rng.uniform(b[0] ** 0.5, b[1] ** 0.5, k) ** 2)
            shape = rng.choice(available, k)
            if all((b_value[shape == x][1:] > 1.15 * b_value[shape == x][:-1]).all()
                   for x in b_delta):
                break
        values[g, :k], shapes[g, :k] = b_value, shape
        for s in range(k):
            n = round(rng.uniform(directions[0]**0.5, directions[1]**0.5) ** 2)
            count[g, s] = n
            xyz[g, s, :n] = spread(n) @ rotations[g, s].T
            if uneven and rng.random() < uneven:
                # n axes share half a sphere, 2π/n each
                moved = xyz[g, s, :n] + rng.uniform(0, 1.5 * (2 * np.pi / n)**0.5) * rng.normal(
                    size=(n, 3))
                xyz[g, s, :n] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    b0_count = np.where(rng.random(groups) < s0_known, np.inf,
                        rng.integers(b0[0], b0[1] + 1, groups))

    def put(array):
        array = array if array.dtype == int else array.astype(np.float32)
        return torch.as_tensor(array, device=generator.device)

    return build(put(values), put(shapes), put(count), put(b0_count), put(xyz), l_max,
                 even=not uneven)
