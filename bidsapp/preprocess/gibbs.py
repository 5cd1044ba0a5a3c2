"""Removal of Gibbs ringing by sub-voxel shifts (Kellner et al. 2016, doi:10.1002/mrm.26054).

Truncated k-space shows an edge as a sinc, whose oscillation vanishes if it is sampled at its zeros.
Along a line x of N voxels with the Fourier series c_k,

    x(n + s) = 1/N Σ_k c_k exp(2πi k (n + s) / N),    s = 0.02, 0.04, … 0.98

and each voxel takes the shift to its right, s ≤ 0.9, and the one to its left, s − 1 ≥ −0.9, whose
total variation over K = 3 neighbours on the smoother side is smallest,

    TV(n) = min( Σ_{j=0}^{K−1} |x(n+j) − x(n+j+1)|,  Σ_{j=0}^{K−1} |x(n−j) − x(n−j−1)| ).

The value at the voxel's centre is interpolated linearly between the two. x(n + s − 1) is x(n + s)
one voxel on, so that 49 shifts serve both sides. Images corrected along either axis, I_0 and I_1,
are joined in Fourier space, each where it is ringing least along the other axis,

    I = F⁻¹( (1 + cos k_1) F(I_0) + (1 + cos k_0) F(I_1) ) / (2 + cos k_0 + cos k_1).

This is the algorithm of dipy's `gibbs_removal` (Neto Henriques 2018), with its shifts, neighbours
and samples of k, for many slices at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped

from bidsapp.blocks import map_volume

PARTIAL = 0.8
"""Smallest share of k-space along the phase encoding with which ringing along it is removed. The
ringing of 6/8 and less has another period: on simulated edges the correction along both axes left
53e-5 and along the other axis alone 51e-5 of the energy (77e-5 without, 16e-5 with full k-space);
with 7/8 they left 20e-5 and 38e-5."""

SHIFTS, LARGEST = 49, 45
"""Shifts of 0.02 to 0.98 voxels, and those of them that a voxel may take to either side: 0.02 to
0.9."""

NEIGHBOURS = 3
"""Differences that are summed to the total variation on one side of a voxel."""

LINES = 64
"""Lines that are shifted at a time."""


class Unrung(NamedTuple):
    """Volumes without ringing.

    Attributes
    ----------
    volumes : (x, y, z, …)
        Corrected volumes, of the type of the input.
    axes : tuple of int
        Axes along which ringing was removed.
    notice : str or None
        What was left, and why.
    """

    volumes: np.ndarray
    axes: tuple[int, ...]
    notice: str | None


def unring(volumes: Shaped[np.ndarray, "x y z *n"], axes: tuple[int, ...] = (0, 1), *,
           partial_fourier: float | None = None, phase_axis: int | None = None,
           device: str = "cpu") -> Unrung:
    """Remove Gibbs ringing in the planes of slices.

    Parameters
    ----------
    volumes : (x, y, z) or (x, y, z, n), float32 or complex64
        Magnitudes, or signed or complex images. The parts of a complex image are corrected
        separately. NaN and Inf count as 0.
    axes : (2,) int
        The two axes in the plane of a slice, 0, 1 or 2.
    partial_fourier : float, optional
        Share of k-space that was sampled along the phase encoding (PartialFourier of the sidecar);
        None if the sidecar has none, which counts as 1; NaN if it has one that cannot be read.
    phase_axis : int, optional
        Axis of the phase encoding, which is one of `axes`.
    device : str
        Device of the computation.

    Returns
    -------
    Unrung
        With `partial_fourier` NaN or below PARTIAL only the axis across the phase encoding is
        corrected, or none if `phase_axis` is unknown, and a notice says so.
    """
    notice, corrected = None, axes
    if partial_fourier is not None and not partial_fourier >= PARTIAL:
        corrected = tuple(a for a in axes if phase_axis not in (None, a))
        notice = ((f"PartialFourier is {partial_fourier:g}. Ringing along the phase encoding then "
                   "has another period than its correction assumes and was left as it is"
                   if partial_fourier == partial_fourier else
                   "PartialFourier cannot be read. Ringing along the phase encoding was left as it "
                   "is, since it may have another period than its correction assumes")
                  + ("." if corrected else
                     "; without PhaseEncodingDirection this holds for both axes."))
    if not corrected:
        return Unrung(volumes.copy(), (), notice)
    rest = next(a for a in (0, 1, 2) if a not in axes)
    slices = np.moveaxis(volumes, (rest, *axes), (0, volumes.ndim - 2, volumes.ndim - 1))
    along = [axes.index(a) for a in corrected]
    out = map_volume(lambda s: {"slices": _unring(torch.nan_to_num(s, 0.0, 0.0, 0.0), along)},
                     [slices], 0, device, slab=1)["slices"]
    return Unrung(np.moveaxis(out, (0, -2, -1), (rest, *axes)), corrected, notice)


def _unring(images: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """Correct images (…, u, v) along their axes 0 (u), 1 (v) or both."""
    if images.is_complex():
        return torch.complex(_unring(images.real, axes), _unring(images.imag, axes))
    signed = bool((images < 0).any())
    along = [_unring_lines(images.transpose(-1, -2), signed).transpose(-1, -2) if 0 in axes
             else images, _unring_lines(images, signed) if 1 in axes else images]
    weight = _weights(*images.shape[-2:]).to(images)
    difference = torch.fft.ifft2(weight * torch.fft.fft2(along[0] - along[1]))
    return along[1] + difference.real if signed else (along[1] + difference).abs()


def _weights(u: int, v: int) -> Float[torch.Tensor, "u v"]:
    """Weight of the image corrected along u, in the order of fft2. Where both cosines are −1 it is
    ½."""
    rise = [1 + torch.cos(torch.linspace(-torch.pi, torch.pi, n, dtype=torch.float64))
            for n in (u, v)]
    for r in rise:
        r[[0, -1]] = 0
    total = rise[0][:, None] + rise[1]
    weight = torch.where(total > 0, rise[1] / total.clamp(min=1e-12), 0.5)
    return torch.fft.ifftshift(weight)


def _unring_lines(lines: Float[torch.Tensor, "*batch n"], signed: bool
                  ) -> Float[torch.Tensor, "*batch n"]:
    """Correct along the last axis."""
    flat = lines.reshape(-1, lines.shape[-1])
    return torch.cat([_unring_block(part, signed) for part in flat.split(LINES)]
                     ).reshape(lines.shape)


def _unring_block(x: Float[torch.Tensor, "line n"], signed: bool) -> Float[torch.Tensor, "line n"]:
    n = x.shape[-1]
    s = torch.arange(1, SHIFTS + 1, dtype=torch.float64, device=x.device) / (SHIFTS + 1)
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=x.device)
    turn = torch.polar(torch.ones(()).to(s), 2 * torch.pi / n * s[:, None] * k)[:, None]
    c = torch.fft.rfft(x)
    shifted = torch.fft.irfft(c * turn.to(c.dtype), n)
    if not signed and n % 2 == 0:
        # the highest frequency has no partner, so that its shift has an imaginary part
        imaginary = c[:, -1:].real / n * torch.sin(torch.pi * s).to(x)[:, None, None]
        shifted = torch.addcmul(imaginary.square(), shifted, shifted).sqrt_()
    elif not signed:
        shifted = shifted.abs_()
    variation, least = _variation(shifted), _variation(x)
    right, x_right, s_right = _smoothest(variation[:LARGEST], shifted[:LARGEST], s[:LARGEST].to(x))
    left, x_left, s_left = (v.roll(1, -1) for v in _smoothest(
        variation[-LARGEST:], shifted[-LARGEST:], 1 - s[-LARGEST:].to(x)))
    s_right, x_right = (torch.where(right < least, a, b) for a, b in ((s_right, 0), (x_right, x)))
    s_left, x_left = (torch.where(left < least, a, b) for a, b in ((s_left, 0), (x_left, x)))
    total = s_right + s_left
    return torch.where(total > 0, x_left + (x_right - x_left) * s_left / total.clamp(min=1e-6), x)


def _smoothest(variation: Float[torch.Tensor, "shift line n"],
               shifted: Float[torch.Tensor, "shift line n"], s: Float[torch.Tensor, " shift"]
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest variation, value there and shift, (line, n) each."""
    smallest = variation.amin(0)
    index = torch.arange(len(s), device=s.device, dtype=s.dtype)[:, None, None]
    # the smallest index of the smallest value, without argmin, which takes ten times as long
    step = torch.add(index, variation - smallest, alpha=1e30).amin(0).long()
    return smallest, shifted.gather(0, step[None])[0], s[step]


def _variation(x: Float[torch.Tensor, "*batch n"]) -> Float[torch.Tensor, "*batch n"]:
    """Total variation on the smoother side of each voxel; lines are periodic."""
    n = x.shape[-1]
    padded = torch.cat([x[..., -NEIGHBOURS:], x, x[..., :NEIGHBOURS]], -1)
    step = (padded[..., 1:] - padded[..., :-1]).abs()
    total = step[..., :-2] + step[..., 1:-1] + step[..., 2:]
    return torch.minimum(total[..., :n], total[..., NEIGHBOURS:])
