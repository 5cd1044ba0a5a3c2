"""Scanner effects of a site: b-value, echo time, point spread, gain, coil profile and noise.

The first site is the reference: all its properties are nominal, and its noise is Rician (one coil).
Each of the others differs from it by ± U(0.75, 1.25) times the size of the effect, property by
property, with signs balanced over sites. A difference is therefore close to the size of its option
and never zero. Gain, repetition time and SNR differ in their logarithm. Coil profile, bias field
and nonlinearity are random fields, of which the effect is the SD. Only sites B, D, … have several
coils.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import erf

from bidsapp.acquisition import Acquisition
from bidsapp.options import PhantomOptions
from bidsapp.simulate.fields import SplineField, stream

FWHM = 2.5
"""FWHM (mm) of the Gaussian of the reference site's point spread (`spread_matrix`)."""

FIELD_SPACING = 90.0
"""Spacing of the coefficients (mm) of coil, bias and gradient fields, smooth over a head."""

WEIGHTED_PER_B0 = 10
"""Number of weighted volumes per b0 volume."""


@dataclass(frozen=True, eq=False)
class Site:
    """Properties of a site's scanner.

    Parameters
    ----------
    name : str
    b_scale : float
        Actual over nominal b.
    nonlinearity : float
        SD over the head of the relative change of b by gradient nonlinearity.
    echo_time, repetition_time : float
        ms and s.
    fwhm : float
        FWHM of the Gaussian of the point spread (mm).
    gain : float
        Factor of all intensities.
    coil : float
        SD of the log of the coil profile. Images are corrected for it, so that the noise is
        inversely proportional to it and the signal is unchanged.
    bias : float
        SD of the log of the bias field that remains in the image.
    snr : float
        SNR of a b = 0 image of pure white matter.
    coils : int
        Number of coils: 1 gives Rician noise, more give non-central χ noise.
    directions : int
        Number per shell.
    voxel : float
        Voxel size (mm).
    fields : SplineField
        Fields of coil profile, bias and nonlinearity, in this order, with SD 1; in scanner
        coordinates.
    """

    name: str
    b_scale: float
    nonlinearity: float
    echo_time: float
    repetition_time: float
    fwhm: float
    gain: float
    coil: float
    bias: float
    snr: float
    coils: int
    directions: int
    voxel: float
    fields: SplineField

    def level(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Compute the (n,) factor of the signal: gain and bias field."""
        return self.gain * np.exp(self.bias * self._field(1, points))

    def sigma(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Compute the (n,) noise SD of one real channel, in the unit of signals times `level`."""
        return self.level(points) * np.exp(-self.coil * self._field(0, points)) / self.snr

    def b_factor(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Compute the (n,) actual over nominal b at points."""
        return self.b_scale * (1 + np.clip(self.nonlinearity * self._field(2, points), -.5, .5))

    def _field(self, i: int, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        return self.fields.at(points, slice(i, i + 1))[0]


def draw_sites(options: PhantomOptions) -> list[Site]:
    """Draw the sites siteA, siteB, … of a phantom; the first is the reference."""
    sites = []
    levels = {name: _levels(options, name) for name in (
        "gain", "psf", "echo_time", "repetition_time", "miscalibration", "snr",
        "directions", "voxel", "coil", "bias", "nonlinearity")}
    for i in range(options.sites):
        factor = {name: float(level[i]) * options.effects for name, level in levels.items()}
        fields = SplineField.draw(stream(options.random_seed, "site", i), np.ones(3),
                                  FIELD_SPACING)
        coils = options.effect_coils if i % 2 and options.effects else 1
        sites.append(Site(
            name=site_name(i), b_scale=1 + factor["miscalibration"] * options.effect_miscalibration,
            nonlinearity=abs(factor["nonlinearity"]) * options.effect_nonlinearity,
            echo_time=options.echo_time + factor["echo_time"] * options.effect_echo_time,
            repetition_time=options.repetition_time * float(np.exp(
                factor["repetition_time"] * options.effect_repetition_time)),
            fwhm=max(0.0, FWHM + factor["psf"] * options.effect_psf),
            gain=float(np.exp(factor["gain"] * options.effect_gain)),
            coil=abs(factor["coil"]) * options.effect_coil,
            bias=abs(factor["bias"]) * options.effect_bias,
            snr=options.snr * float(np.exp(factor["snr"] * options.effect_snr)), coils=coils,
            directions=max(6, round(options.per_shell + factor["directions"]
                                    * options.effect_directions)),
            voxel=max(0.5, options.voxel + factor["voxel"] * options.effect_voxel), fields=fields))
    return sites


def site_name(i: int) -> str:
    """Name site i: siteA … siteZ, siteAA, siteAB, …

    >>> site_name(0), site_name(26)
    ('siteA', 'siteAA')
    """
    before = site_name(i // 26 - 1) if i >= 26 else "site"
    return before + chr(ord("A") + i % 26)


def _levels(options: PhantomOptions, name: str) -> np.ndarray:
    """Draw (sites,) factors of an effect: 0 for the reference, ± U(0.75, 1.25) for the others."""
    rng = stream(options.random_seed, "effect", name)
    others = options.sites - 1
    signs = rng.permutation(np.resize(rng.permutation([-1, 1]), others))
    return np.append(0, signs * rng.uniform(0.75, 1.25, others))


def gradient_table(shells: tuple[float, ...], directions: int) -> Acquisition:
    """Create the gradient table of a site.

    Directions of a shell start at random and repel each other and their antipodes (dipy). b0
    volumes are interspersed. The table depends on the arguments alone, not on the phantom's seed.

    Parameters
    ----------
    shells : tuple of float
        b-values (s/mm²).
    directions : int
        Number per shell.

    Returns
    -------
    Acquisition
    """
    from dipy.core.sphere import HemiSphere, disperse_charges

    rng = np.random.default_rng([directions, len(shells)])
    bvals, bvecs = [], []
    for b in shells:
        start = rng.standard_normal((directions, 3))
        start /= np.linalg.norm(start, axis=1, keepdims=True)
        repelled, _ = disperse_charges(HemiSphere(xyz=start), iters=1000)
        bvecs += list(repelled.vertices)
        bvals += [float(b)] * directions
    n = max(2, round(len(bvals) / WEIGHTED_PER_B0))
    order = rng.permutation(len(bvals))  # drift or an early stop affects all shells
    positions = np.linspace(0, len(bvals), n, endpoint=False).astype(int)
    return Acquisition(np.insert(np.array(bvals)[order], positions, 0.0),
                       np.insert(np.array(bvecs)[order], positions, 0, axis=0))


def spread_matrix(centres: Float[np.ndarray, " m"], voxel: float, fine: Float[np.ndarray, " n"],
                  step: float, fwhm: float) -> Float[np.ndarray, "m n"]:
    """Compute the weights of fine cells in voxels along one axis: the point spread function.

    It is a box of the voxel's width convolved with a Gaussian. A weight is its integral over a
    cell.
    The three-dimensional point spread is the product of those of the axes.

    Parameters
    ----------
    centres : (m,) ndarray
        Voxel centres (mm).
    voxel : float
        Voxel size (mm).
    fine : (n,) ndarray
        Centres of the fine cells (mm), ascending.
    step : float
        Width of the fine cells (mm).
    fwhm : float
        FWHM of the Gaussian (mm).

    Returns
    -------
    (m, n) ndarray
        Rows add up to 1, so that constants are preserved.
    """
    edges = np.append(fine - step / 2, fine[-1] + step / 2)
    t = (edges[None] - centres[:, None])
    sd = fwhm / np.sqrt(8 * np.log(2))
    total = (_ramp(t + voxel / 2, sd) - _ramp(t - voxel / 2, sd)) / voxel
    weights = np.diff(total, axis=1)
    return weights / weights.sum(1, keepdims=True)


def _ramp(t: np.ndarray, sd: float) -> np.ndarray:
    """Integrate Φ(s/sd) over s up to t, with the normal distribution function Φ."""
    if sd < 1e-6:
        return np.maximum(t, 0)
    z = t / sd
    return t * (1 + erf(z / np.sqrt(2))) / 2 + sd * np.exp(-z**2 / 2) / np.sqrt(2 * np.pi)
