"""Diffusion signals of Gaussian compartments, for any b-table of axially symmetric b-tensors.

A compartment holds a signal fraction f and an axially symmetric diffusion tensor D(n) with axial
and radial diffusivities along a fibre axis n that is distributed as the ODF w. With B of axis g,
trace b and shape b_Δ = s (`bidsapp.acquisition`),

    B : D(n) = b [ (1 − s) (axial + 2 radial)/3 + s radial + s (axial − radial) (g·n)² ]
    K(g·n) = Σ_i f_i exp(−B : D_i(n)),        S(g) = ∫ w(n) K(g·n) dn,   ∫ w dn = 1

(Kerkelä et al. 2024, doi:10.3389/fnimg.2024.1349415, eq. 7–9; Westin et al. 2016). By the theorem
of Funk and Hecke the integral is a product degree by degree. With w = Σ w_lm Y_lm,

    S_lm = k_l w_lm,     k_l = 2π ∫ K(t) P_l(t) dt over −1 ≤ t ≤ 1 = √(4π/(2l+1)) K_l0,

where K_l0 = ∫ K(e_z·n) Y_l0(n) dn is the kernel's zonal coefficient. This follows from
K = Σ (2l+1)/(4π) k_l P_l and P_l(g·n) = 4π/(2l+1) Σ_m Y_lm(g) Y_lm(n). At b = 0, k_0 = 4π Σ f_i and
S = Σ f_i. (The 2π that the paper's eq. 6 has in addition is the length of the circle about n in its
integral over SO(3).)

The k_l are computed by a Gauss–Legendre rule of 48 points (24 by symmetry). In float64 they are
within 1e-11 of the integral for b |s (axial − radial)| ≤ 60 and l ≤ 16, so the l_max of the ODF is
the only approximation. At b = 2200 s/mm² the error for sticks of d = 2 in a Watson bundle of κ = 16
is 1.8e-3 of S0 with l ≤ 8 and 1.3e-5 with l ≤ 12; for d = 3 and κ = 32 it is 1.3e-2 and 4.2e-4.
b-values are in s/mm², diffusivities in µm²/ms; fractions are of the signal at b = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.simulate.odf import half_rule
from bidsapp.tensor import design

NODES = 24
"""Gauss–Legendre nodes of the kernel in 0 < t < 1."""


class Compartment(NamedTuple):
    """Signal fraction and axially symmetric diffusion tensor.

    Attributes
    ----------
    fraction : (voxel,) tensor
    axial, radial : (voxel,) or (voxel, shell) tensor
        Diffusivities (µm²/ms). With (voxel, shell) the tensor differs between the shells of the
        acquisition, in the order of `Acquisition.shells`.
    """

    fraction: torch.Tensor
    axial: torch.Tensor
    radial: torch.Tensor


def stick(fraction: torch.Tensor, diffusivity: torch.Tensor) -> Compartment:
    """Create a stick, a model of neurites: no diffusion across the axis."""
    return Compartment(fraction, diffusivity, torch.zeros_like(diffusivity))


def ball(fraction: torch.Tensor, diffusivity: torch.Tensor) -> Compartment:
    """Create an isotropic compartment: free water, or a soma (sphere) with a given apparent
    diffusivity."""
    return Compartment(fraction, diffusivity, diffusivity)


zeppelin = Compartment
"""Create an axially symmetric tensor from fraction, axial and radial diffusivity."""


def two_compartments(diffusivity: torch.Tensor, fraction: torch.Tensor) -> list[Compartment]:
    """Create the constrained two-compartment model (Kaden et al. 2016,
    doi:10.1016/j.neuroimage.2016.06.002).

    A stick of diffusivity d and fraction f, and a zeppelin of axial diffusivity d and radial
    diffusivity (1 − f) d.
    """
    return [stick(fraction, diffusivity),
            zeppelin(1 - fraction, diffusivity, (1 - fraction) * diffusivity)]


def three_compartments(diffusivity: torch.Tensor, fraction: torch.Tensor,
                       sphere_diffusivity: torch.Tensor, sphere_fraction: torch.Tensor
                       ) -> list[Compartment]:
    """Create the constrained three-compartment model (Gyori et al. 2021,
    doi:10.1016/j.neuroimage.2021.118303).

    A stick (d, f), a sphere (d_sph, f_sph) and a zeppelin of fraction r = 1 − f − f_sph with axial
    diffusivity d r^(½ f_sph / (f_sph + f)) and radial d r^((½ f_sph + f) / (f_sph + f)). The
    sphere's signal is Gaussian: exp(−b d_sph) for every b_Δ. With f_sph = 0 this is the
    two-compartment model, with f = f_sph = 0 free water.

    The priors are f ~ U(0, 1), f_sph ~ U(0, 1 − f), d ~ U(0, 3), d_sph ~ U(0, min(d, 0.5)).
    Kerkelä et al. print max(d, 0.5), which lets a sphere diffuse faster than the free water in it;
    their stated reason (a sphere of 25 µm) implies min.
    """
    outside = 1 - fraction - sphere_fraction
    inside = fraction + sphere_fraction
    share = sphere_fraction / torch.where(inside > 0, inside, 1) / 2
    return [stick(fraction, diffusivity), ball(sphere_fraction, sphere_diffusivity),
            zeppelin(outside, diffusivity * outside**share, diffusivity * outside ** (1 - share))]


Encodings = Float[np.ndarray, " encoding"] | Float[torch.Tensor, "voxel encoding"]


def kernel(compartments: Sequence[Compartment], b: Encodings, b_delta: Encodings, l_max: int,
           nodes: int = NODES) -> Float[torch.Tensor, "voxel encoding _"]:
    """Compute the Legendre moments k_l of the kernel of a fibre (see the module).

    Parameters
    ----------
    compartments : sequence of Compartment
        Diffusivities of shape (voxel,) or (voxel, encoding).
    b, b_delta : (encoding,) or (voxel, encoding)
        b-value (s/mm²) and shape of the b-tensor.
    l_max : int
    nodes : int
        Gauss–Legendre nodes.

    Returns
    -------
    (voxel, encoding, degree) tensor
        k_l for l = 0, 2, … l_max.
    """
    like = compartments[0].axial
    t, moments = half_rule(l_max, nodes, like)
    trace, s = torch.as_tensor(b).to(like) / 1000, torch.as_tensor(b_delta).to(like)
    values = like.new_zeros(())
    for fraction, *diffusivities in compartments:
        axial, radial = (d[:, None] if d.ndim == 1 else d for d in diffusivities)
        level = trace * ((1 - s) / 3 * (axial + 2 * radial) + s * radial)
        slope = trace * s * (axial - radial)
        decay = torch.exp(-level[..., None] - slope[..., None] * t**2)
        values = values + fraction[:, None, None] * decay
    return values @ moments


def convolve(odf: Float[torch.Tensor, "voxel size"],
             k: Float[torch.Tensor, "voxel encoding degree"]
             ) -> Float[torch.Tensor, "voxel encoding size"]:
    """Compute the coefficients S_lm = k_l w_lm of the signal of every encoding."""
    return sh.per_coefficient(k) * odf[:, None]


class Protocol:
    """Simulator of the volumes of one acquisition (`protocols.Protocols`: that of fitted shells).

    It holds the distinct (b, b_delta) pairs of the table, the rows of each, and the SH basis along
    their axes. Nothing is rounded: each volume of a shell is simulated with its own b.

    Parameters
    ----------
    acquisition : Acquisition
    l_max : int
        Even degree of the ODFs.
    like : tensor
        Tensor whose dtype and device are used.
    """

    def __init__(self, acquisition: Acquisition, l_max: int, like: torch.Tensor) -> None:
        pairs, member = np.unique(np.stack([acquisition.bvals, acquisition.b_delta], 1), axis=0,
                                  return_inverse=True)
        # b0 volumes and spherical tensors have no axis; any unit vector serves
        axes = np.where(np.linalg.norm(acquisition.bvecs, axis=1, keepdims=True) > 0.5,
                        acquisition.bvecs, [0, 0, 1])
        shell = np.zeros(len(acquisition), int)  # b0 volumes use the tensors of the first shell
        for i, group in enumerate(acquisition.shells):
            shell[group.indices] = i
        self.acquisition, self.l_max = acquisition, l_max
        self.b, self.b_delta = pairs.T.copy()
        rows = [np.flatnonzero(member == i) for i in range(len(pairs))]
        self.basis = [like.new_tensor(sh.basis(l_max, axes[r]).T) for r in rows]
        self.shell = torch.as_tensor([shell[r[0]] for r in rows], device=like.device)
        self.volume_shell = torch.as_tensor(shell, device=like.device)
        self.order = torch.as_tensor(np.argsort(np.concatenate(rows)), device=like.device)
        self.design = like.new_tensor(design(acquisition.btensors)[:, :6].T)

    def coefficients(self, odf: Float[torch.Tensor, "voxel size"],
                     compartments: Sequence[Compartment]
                     ) -> Float[torch.Tensor, "voxel shell size"]:
        """Compute the signal's coefficients on each shell of the acquisition, at the shell's mean
        b."""
        shells = self.acquisition.shells
        b, s = (np.array([getattr(shell, name) for shell in shells]) for name in ("b", "b_delta"))
        return convolve(odf, kernel(compartments, b, s, self.l_max))

    def signal(self, odf: Float[torch.Tensor, "voxel size"], compartments: Sequence[Compartment]
               ) -> Float[torch.Tensor, "voxel n"]:
        """Compute S/S0 of every measurement, in the order of the acquisition."""
        compartments = [
            Compartment(c.fraction, *(d if d.ndim == 1 else d[:, self.shell] for d in c[1:]))
            for c in compartments]
        s = convolve(odf, kernel(compartments, self.b, self.b_delta, self.l_max))
        parts = [s[:, i] @ basis for i, basis in enumerate(self.basis)]
        return torch.cat(parts, 1).index_select(1, self.order)

    def tensors(self, fraction: Float[torch.Tensor, "voxel part"],
                tensor: Float[torch.Tensor, "voxel part *shell 3 3"]
                ) -> Float[torch.Tensor, "voxel n"]:
        """Compute the signal Σ_i f_i exp(−B : D_i) of tensors, without an ODF and its truncation.

        Parameters
        ----------
        fraction : (voxel, part) tensor
        tensor : (voxel, part, 3, 3) or (voxel, part, shell, 3, 3) tensor
            Symmetric (µm²/ms); with the axis `shell` they differ between shells.

        Returns
        -------
        (voxel, measurement) tensor
        """
        d = torch.stack([tensor[..., i, j] for i in range(3) for j in range(i, 3)], -1)
        if d.ndim == 3:
            exponent = d @ self.design
        else:
            exponent = (d[:, :, self.volume_shell] * self.design.T).sum(-1)
        return (fraction[:, None] @ torch.exp(exponent))[:, 0]
