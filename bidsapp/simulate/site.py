"""What a site's scanner does to the signal: b, echo time, point spread, gain, coil and noise.

The first site is the reference: nominal in everything, Rician noise of one coil. Every other site
differs in each property by ± U(0.75, 1.25) times the effect's size, signs balanced over sites, so
that a difference is as large as its option says and never by chance zero.
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
"""mm, of the reference's point spread beyond the averaging over a voxel."""

FIELD_SPACING = 90.0
"""mm: coil profiles, bias and gradient fields vary over the size of a head."""

B0_SHARE = 10
"""One volume without weighting in this many."""


@dataclass(frozen=True, eq=False)
class Site:
    """name; b_scale: actual over nominal b; nonlinearity: its relative change over the head (SD);
    echo_time: ms; repetition_time: s; fwhm: mm; gain; coil: SD of the log of the coil's profile,
    which the noise follows inversely; bias: SD of the log of what is left of it in the image; snr:
    of a b = 0 image of pure white matter at the reference's gain; coils: 1 Rician, else
    non-central χ; directions: per shell; voxel: mm; fields: of coil, bias, nonlinearity, unit
    SD, in scanner coordinates."""

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
        """(n,) factor of the signal: gain and bias field."""
        return self.gain * np.exp(self.bias * self._field(1, points))

    def sigma(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """(n,) SD of the noise of one channel, as a multiple of a signal of 1 before `level`."""
        return self.level(points) * np.exp(-self.coil * self._field(0, points)) / self.snr

    def b_factor(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """(n,) actual over nominal b: at a point, b times this is diffusivity times this."""
        return self.b_scale * (1 + np.clip(self.nonlinearity * self._field(2, points), -.5, .5))

    def _field(self, i: int, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        return self.fields.at(points, slice(i, i + 1))[0]


def draw(options: PhantomOptions) -> list[Site]:
    """siteA, siteB, …; the first is the reference."""
    sites = []
    levels = {name: _levels(options, name) for name in (
        "gain", "psf", "echo_time", "repetition_time", "miscalibration", "snr",
        "directions", "voxel", "coil", "bias", "nonlinearity")}
    for i in range(options.sites):
        at = {name: float(level[i]) * options.effects for name, level in levels.items()}
        fields = SplineField.draw(stream(options.random_seed, "site", i), np.ones(3),
                                  FIELD_SPACING)
        many = options.effect_coils if i % 2 and options.effects else 1
        sites.append(Site(
            name=site_name(i), b_scale=1 + at["miscalibration"] * options.effect_miscalibration,
            nonlinearity=abs(at["nonlinearity"]) * options.effect_nonlinearity,
            echo_time=options.echo_time + at["echo_time"] * options.effect_echo_time,
            repetition_time=options.repetition_time * float(np.exp(
                at["repetition_time"] * options.effect_repetition_time)),
            fwhm=max(0.0, FWHM + at["psf"] * options.effect_psf),
            gain=float(np.exp(at["gain"] * options.effect_gain)),
            coil=abs(at["coil"]) * options.effect_coil, bias=abs(at["bias"]) * options.effect_bias,
            snr=options.snr * float(np.exp(at["snr"] * options.effect_snr)), coils=many,
            directions=max(6, round(options.per_shell + at["directions"]
                                    * options.effect_directions)),
            voxel=max(0.5, options.voxel + at["voxel"] * options.effect_voxel), fields=fields))
    return sites


def site_name(i: int) -> str:
    """siteA … siteZ, siteAA, siteAB, …"""
    before = site_name(i // 26 - 1) if i >= 26 else "site"
    return before + chr(ord("A") + i % 26)


def _levels(options: PhantomOptions, name: str) -> np.ndarray:
    """(sites,) multiples of an effect's size: 0 for the reference, ± U(0.75, 1.25) for others."""
    rng = stream(options.random_seed, "effect", name)
    others = options.sites - 1
    signs = rng.permutation(np.resize(rng.permutation([-1, 1]), others))
    return np.append(0, signs * rng.uniform(0.75, 1.25, others))


def table(shells: tuple[float, ...], directions: int) -> Acquisition:
    """b = 0 spread among shells of directions that repel each other (dipy; antipodal), each
    shell's turned at random: the same for every site with that number of directions."""
    from dipy.core.sphere import HemiSphere, disperse_charges

    rng = np.random.default_rng([directions, len(shells)])
    bvals, bvecs = [], []
    for b in shells:
        start = rng.standard_normal((directions, 3))
        start /= np.linalg.norm(start, axis=1, keepdims=True)
        spread, _ = disperse_charges(HemiSphere(xyz=start), iters=1000)
        bvecs += list(spread.vertices)
        bvals += [float(b)] * directions
    n = max(2, round(len(bvals) / B0_SHARE))
    order = rng.permutation(len(bvals))  # so that scanner drift, or a cut, harms no shell alone
    where = np.linspace(0, len(bvals), n, endpoint=False).astype(int)
    return Acquisition(np.insert(np.array(bvals)[order], where, 0.0),
                       np.insert(np.array(bvecs)[order], where, 0, axis=0))


def spread_matrix(centres: Float[np.ndarray, " m"], voxel: float, fine: Float[np.ndarray, " n"],
                  step: float, fwhm: float) -> Float[np.ndarray, "m n"]:
    """Weights of fine cells of width `step` in voxels of width `voxel`, along one axis: the
    integral over each cell of a box of the voxel's width convolved with a Gaussian. Rows add up to
    1, so that constants are kept; the three-dimensional point spread is the product of the axes'.
    """
    edges = np.append(fine - step / 2, fine[-1] + step / 2)
    t = (edges[None] - centres[:, None])
    sd = fwhm / np.sqrt(8 * np.log(2))
    total = (_ramp(t + voxel / 2, sd) - _ramp(t - voxel / 2, sd)) / voxel
    weights = np.diff(total, axis=1)
    return weights / weights.sum(1, keepdims=True)


def _ramp(t: np.ndarray, sd: float) -> np.ndarray:
    """∫ Φ(s/sd) ds up to t, Φ the normal distribution function."""
    if sd < 1e-6:
        return np.maximum(t, 0)
    z = t / sd
    return t * (1 + erf(z / np.sqrt(2))) / 2 + sd * np.exp(-z**2 / 2) / np.sqrt(2 * np.pi)
