"""Complex series: phase in radians, complex numbers, and real signals without the phase of shots.

Background (coils, off-resonance) and motion during the diffusion gradients turn the phase of each
slice of each volume, one shot. Along the slice both are smooth, and what volumes share needs not
be:

    z_v(x) = S_v(x) exp(i φ(x) + i ψ_v(x)) + noise,

with S real. With L a low-pass filter of the slice (a Hann window over k-space, 0 from WIDTH cycles
per voxel on; the slice is padded with zeros), the two are estimated in turns, from φ = 0,

    ψ_v = arg L[z_v exp(−iφ)],     φ = arg Σ_v z_v exp(−iψ_v),

and the real part of z_v exp(−iφ − iψ_v) has Gaussian noise around S_v. In contrast to a magnitude
it has no noise floor, other than by the noise that φ and ψ follow: the narrower the window, the
less. Remove the phase before denoising, and denoise the real part: half of the noise is then gone
with the imaginary part, and the phases of shots do not raise the rank of patches. On the phantom
(SNR 5 to 20) the squared error of the signal was 5 to 6 % higher with the complex series denoised
after its phase was removed, and 2.5 to 2.7 times as high with it denoised before.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Complex, Float, Shaped

from bidsapp.blocks import map_volume
from bidsapp.errors import DataError

WIDTH = 0.12
"""Spatial frequency (cycles per voxel) from which on the filter passes nothing."""

ROUNDS = 3
"""Estimates of the phases."""

SCALES = ((-math.pi, math.pi, 0.0, 1.0), (0.0, 2 * math.pi, 0.0, 1.0),
          (0.0, 4096.0, -math.pi, math.pi / 2048), (-4096.0, 4096.0, 0.0, math.pi / 4096),
          (-2048.0, 2048.0, 0.0, math.pi / 2048),
          (-1000 * math.pi, 1000 * math.pi, 0.0, 1e-3))
"""Known scales: lowest and highest value, and offset and factor to radians. They are radians, the
integers of Siemens, 12 bits with a sign, and the milliradians of Philips and GE."""

NAMES = ("radians", "radians from 0", "0 to 4095", "-4096 to 4095", "-2048 to 2047", "milliradians")
"""Names of SCALES."""

UNITS = {"rad": 1.0, "radian": 1.0, "radians": 1.0, "mrad": 1e-3, "milliradian": 1e-3,
         "milliradians": 1e-3}
"""Factors to radians of the `Units` of a sidecar."""

SCALE_TOLERANCE, SCALE_FILLED, SCALE_POSSIBLE = 0.02, 0.9, 0.1
"""Share of a scale by which an image may exceed or miss its ends; share of it that an image must
reach at one end; and share from which on a larger scale is possible, too."""

MAX_MASKED = 0.1
"""Share of voxels of the value 0 from which on an image counts as masked. Noise in the air of an
image that is not masked reaches both ends of its scale; a masked one need not, so that values that
fill one scale may be those of a part of a larger one."""


def to_radians(phase: Shaped[np.ndarray, "x y z *n"], units: str | None = None
               ) -> Float[np.ndarray, "x y z *n"]:
    """Convert a phase image to radians.

    Without units, the scale is the one whose two ends the values reach: an image that is not
    masked, or one whose lowest and highest value are those of the scale to 1. Other images have the
    only one of SCALES in which they lie and whose end they reach on one side. A masked image of a
    scale that is not one of SCALES can be taken for one of them.

    Parameters
    ----------
    phase : (x, y, z, …)
        All volumes of a series, with the scale of their header applied.
    units : str, optional
        `Units` of the sidecar. `rad` and `mrad` are taken as they say; any other is ignored.

    Returns
    -------
    (x, y, z, …) float32

    Raises
    ------
    DataError
        The values fill none of the scales, or may be those of several; or those of the given
        units exceed 2π.
    """
    finite = phase[np.isfinite(phase)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = f"the phase image has values from {low:.4g} to {high:.4g}"
    if (factor := UNITS.get(str(units).lower())) is not None:
        if max(-low, high) * factor > 2 * math.pi * (1 + SCALE_TOLERANCE):
            raise DataError(f'{values}, but its sidecar says "Units": "{units}". Remove Units if '
                            "the values are those of the scanner, or convert the image to radians.")
        return np.asarray(phase, np.float32) * np.float32(factor)
    masked = finite.size > 0 and np.mean(finite == 0) > MAX_MASKED
    possible, known = [], False
    for name, scale in zip(NAMES, SCALES, strict=True):
        lowest, highest = scale[:2]
        margin = SCALE_TOLERANCE * (highest - lowest)
        reach = max(-low if lowest else low, high) / highest
        if (lowest - margin > low or high > highest + margin or (low < -margin) != (lowest < 0)
                or reach < SCALE_POSSIBLE):
            continue
        # the ends of ±4096 and ±2048 are one value less on the right
        exact = highest > 100 and abs(low - lowest) <= 1 and abs(high - highest) <= 1.5
        if exact or (not masked and low <= lowest + margin and high >= highest - margin):
            possible, known = [(name, scale)], True
            break
        possible.append((name, scale))
        known |= reach >= SCALE_FILLED
    if not known:
        raise DataError(f"{values}. Known are radians, 0 to 4095, -4096 to 4095, -2048 to 2047 and "
                        'milliradians. Convert it to radians, and write "Units": "rad" in its '
                        "sidecar; or remove it.")
    if len(possible) > 1:
        names = " or ".join(name for name, _ in possible)
        raise DataError(f"{values}, so that its scale may be {names}: it is masked, or has no "
                        'noise around the head. Write "Units": "mrad" in its sidecar if these are '
                        'milliradians; otherwise convert it to radians and write "Units": "rad".')
    _, (_, _, offset, factor) = possible[0]
    return np.asarray(phase, np.float32) * np.float32(factor) + np.float32(offset)


def from_polar(magnitude: Float[np.ndarray, "*shape"], phase: Float[np.ndarray, "*shape"]
               ) -> Complex[np.ndarray, "*shape"]:
    """Combine magnitude and phase (radian) to complex64."""
    out = np.empty(magnitude.shape, np.complex64)
    out.real, out.imag = magnitude * np.cos(phase), magnitude * np.sin(phase)
    return out


def from_parts(real: Float[np.ndarray, "*shape"], imaginary: Float[np.ndarray, "*shape"]
               ) -> Complex[np.ndarray, "*shape"]:
    """Combine real and imaginary part to complex64."""
    out = np.empty(real.shape, np.complex64)
    out.real, out.imag = real, imaginary
    return out


def remove_phase(volumes: Complex[np.ndarray, "x y z n"], axes: tuple[int, int] = (0, 1), *,
                 width: float = WIDTH, device: str = "cpu") -> Complex[np.ndarray, "x y z n"]:
    """Remove the phase of the background and of each shot.

    Parameters
    ----------
    volumes : (x, y, z, n) complex64
        Complex series, before any interpolation. NaN and Inf count as 0.
    axes : (2,) int
        The two axes in the plane of a slice.
    width : float
        Spatial frequency (cycles per voxel) from which on the filter passes nothing.
    device : str
        Device of the computation.

    Returns
    -------
    (x, y, z, n) complex64
        The series with signal in its real part; the imaginary part is noise and what the filter
        missed.
    """
    rest = next(axis for axis in (0, 1, 2) if axis not in axes)
    slices = np.moveaxis(volumes, (rest, 3, *axes), (0, 1, 2, 3))
    out = map_volume(lambda z: {"slices": torch.stack([
        _unwind(torch.nan_to_num(s, 0.0, 0.0, 0.0), width) for s in z])}, [slices], 0, device,
        slab=1)["slices"]
    return np.ascontiguousarray(np.moveaxis(out, (0, 1, 2, 3), (rest, 3, *axes)))


def _unwind(slices: Complex[torch.Tensor, "n u v"], width: float
            ) -> Complex[torch.Tensor, "n u v"]:
    """Remove the phases from one slice of all volumes."""
    shared = torch.ones_like(slices[:1])
    for _ in range(ROUNDS):
        shot = _unit(_low_pass(slices * shared.conj(), width))
        shared = _unit((slices * shot.conj()).sum(0, keepdim=True))
    shot = _unit(_low_pass(slices * shared.conj(), width))
    return slices * (shared * shot).conj()


def _unit(z: torch.Tensor) -> torch.Tensor:
    """exp(i arg z), 1 for 0."""
    return torch.polar(torch.ones_like(z.real), z.angle())


def _low_pass(slices: Complex[torch.Tensor, "*batch u v"], width: float
              ) -> Complex[torch.Tensor, "*batch u v"]:
    """Filter slices by a Hann window in k-space, with zeros beyond their edges."""
    size = [n + math.ceil(2 / width) for n in slices.shape[-2:]]  # the kernel's two main lobes
    u, v = (torch.where(f < width, 0.5 + 0.5 * torch.cos(torch.pi * f / width), 0)
            for f in (torch.fft.fftfreq(n, device=slices.device).abs() for n in size))
    filtered = torch.fft.ifft2(torch.fft.fft2(slices, s=size) * (u[:, None] * v))
    return filtered[..., :slices.shape[-2], :slices.shape[-1]]
