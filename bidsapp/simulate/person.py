"""One person of a phantom: the deformed atlas with individual tissue properties.

A point x of the person lies at s(x + u(x)) in the atlas. s is a scale per axis (s > 1 is a head
smaller than the atlas), and u is a cubic B-spline whose coefficients stay below 0.4 of their
spacing in every component, so that the map is one to one (Choi and Lee 2000,
doi:10.1006/gmod.2000.0531). The tissue follows the constrained two-compartment model
(`forward.two_compartments`; d in µm²/ms, f the neurite fraction) with

    d = d_tissue + offset + slope_d (age − 50) + v(x) + p(a)     (f likewise),

where v varies smoothly within the person, and p smoothly with the point a in the atlas, alike in
all people. f depends on age in white matter, d in white and grey matter. In the white matter of a
lesion f is lower and d higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bidsapp.options import PhantomOptions
from bidsapp.simulate.anatomy import SYSTEMS, Atlas
from bidsapp.simulate.fields import SplineField, stream

PROPERTIES = {"wm": {"d": 1.75, "f": 0.62}, "gm": {"d": 1.35, "f": 0.30}}
"""Mean d (µm²/ms) and f at MEAN_AGE."""

OFFSET_SD = {"d_wm": 0.10, "f_wm": 0.065, "d_gm": 0.14, "f_gm": 0.08, "log_kappa": 0.25}
"""SDs between people, in the unit of each property; κ of white and grey matter share one offset."""

VARIATION_SD = {"d": 0.06, "f": 0.025}
"""SDs of the smooth variation within a person."""

CALLOSAL_F = 0.10
"""Increase of white matter's f where all fibres are callosal: these are the densest."""

KAPPA = {"wm": 24.0, "gm": 2.2}
"""Median Watson concentration of a fibre system in white matter, and of grey matter."""

MIN_STRENGTH = 1e-12
"""Sum of the squared currents below which there are no fibres and the tissue is isotropic."""

SIZE_SD = 0.04
"""SD of the log scale that all axes of a head share; each axis adds its own, of half this SD."""

WARP_SD, WARP_SPACING = 3.0, 40.0
"""SD and coefficient spacing of the warp (mm)."""

INJECTIVE = 0.4
"""Bound of the warp's coefficients relative to their spacing."""

MEAN_AGE = 50.0
"""Age (years) at which tissue has its mean properties."""

LESION_F, LESION_D = -0.30, 0.25
"""Relative changes of f and d at a lesion's centre."""


@dataclass(frozen=True, eq=False)
class Person:
    """Anatomy and tissue properties of a person.

    Parameters
    ----------
    label : str
    age : float
        Years.
    sex : str
        F or M.
    scale : (3,) ndarray
        Scale s of each axis, from the person to the atlas.
    warp : SplineField
        Displacement u (mm).
    variation : SplineField
        Smooth variation of d and f.
    offset : dict
        Difference from the mean of each property of OFFSET_SD, in its unit.
    lesion : (centre, radius) or None
        Both in mm; the centre is in coordinates of the person.
    """

    label: str
    age: float
    sex: str
    scale: np.ndarray
    warp: SplineField
    variation: SplineField
    offset: dict[str, float]
    lesion: tuple[np.ndarray, float] | None

    def to_atlas(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Map points of the person to the atlas (mm)."""
        return self.scale * (points + self.warp.at(points).T)


@dataclass(frozen=True, eq=False)
class TissueMaps:
    """Tissue at n points of a person.

    Parameters
    ----------
    share : (3, n) ndarray
        Shares of WM, GM, CSF.
    d, f : (2, n) ndarray
        Diffusivity (µm²/ms) and neurite fraction of WM and GM.
    axes : (4, n, 3) ndarray
        Unit axes of the fibre systems and of GM, in the frame in which they were requested.
    weight : (3, n) ndarray
        Weights of the fibre systems; their sum is 1, or 0 where there is no current.
    t1, lesion : (n,) ndarray
        T1-weighted intensity and share of the lesion, 0–1.
    kappa : dict
        Watson concentration of WM and GM.
    """

    share: np.ndarray
    d: np.ndarray
    f: np.ndarray
    axes: np.ndarray
    weight: np.ndarray
    t1: np.ndarray
    lesion: np.ndarray
    kappa: dict[str, float]


def draw_person(options: PhantomOptions, atlas: Atlas, label: str, age: float, sex: str,
                lesion: bool, tissue: Sequence[float] = (0.0,) * len(OFFSET_SD)) -> Person:
    """Draw a person.

    Parameters
    ----------
    options : PhantomOptions
    atlas : Atlas
    label : str
        Label, which together with the seed determines shape, local variation and lesion.
    age : float
        Years.
    sex : str
    lesion : bool
        Whether there is a lesion.
    tissue : sequence of float
        Offsets from the mean (z-scores), in the order of OFFSET_SD.

    Returns
    -------
    Person
    """
    rng = stream(options.random_seed, "person", label)
    sd = options.person_sd
    scale = np.exp(sd * SIZE_SD * (rng.standard_normal() + 0.5 * rng.standard_normal(3)))
    offset = {name: sd * size * float(z)
              for (name, size), z in zip(OFFSET_SD.items(), tissue, strict=True)}
    warp = SplineField.draw(rng, np.full(3, sd * WARP_SD), WARP_SPACING,
                            limit=INJECTIVE * WARP_SPACING)
    variation = SplineField.draw(rng, sd * np.array([VARIATION_SD["d"], VARIATION_SD["f"]]), 30.0)
    person = Person(label, age, sex, scale, warp, variation, offset, None)
    if not lesion:
        return person
    radius = rng.uniform(9, 13)
    points = rng.uniform((-50, -70, 10), (50, 40, 45), (4000, 3))
    wm = atlas.sample(atlas.tissue[0], person.to_atlas(points))
    wm[np.abs(points[:, 0]) < 15] = 0
    centre = points[int(np.argmax(wm > 0.9))]
    return Person(label, age, sex, scale, warp, variation, offset, (centre, radius))


def tissue_at(person: Person, atlas: Atlas, options: PhantomOptions, pattern: SplineField,
              points: Float[np.ndarray, "n 3"], atlas_points: Float[np.ndarray, "n 3"],
              jacobian: Float[np.ndarray, "n 3 3"]) -> TissueMaps:
    """Compute the tissue at points of a person.

    Parameters
    ----------
    person : Person
    atlas : Atlas
    options : PhantomOptions
    pattern : SplineField
        Variation p of d and f within the atlas, alike in all people.
    points : (n, 3) ndarray
        Points in coordinates of the person (mm).
    atlas_points : (n, 3) ndarray
        The same points in the atlas (mm).
    jacobian : (n, 3, 3) ndarray
        ∂atlas_points/∂y at each point, with y the frame in which axes are returned.

    Returns
    -------
    TissueMaps
    """
    share = atlas.sample(atlas.tissue, atlas_points)
    flow = atlas.sample(atlas.flow, atlas_points)
    strength = np.linalg.norm(flow, axis=1) ** 2
    total = strength.sum(0)
    weight = np.where(total > MIN_STRENGTH, strength / np.maximum(total, MIN_STRENGTH), 0)
    vectors = np.concatenate([flow, atlas.sample(atlas.outward, atlas_points)[None]])
    vectors = vectors.transpose(0, 2, 1)
    axes = np.linalg.solve(jacobian, vectors[..., None])[..., 0]
    length = np.linalg.norm(axes, axis=-1, keepdims=True)
    axes = np.where(length > 1e-9, axes / np.maximum(length, 1e-9), [0, 0, 1.0])
    lesion = np.zeros(len(points), np.float32)
    if person.lesion:
        centre, radius = person.lesion
        distance = np.linalg.norm(points - centre, axis=1) / radius
        lesion = (1 / (1 + np.exp(12 * (distance - 1)))).astype(np.float32)
    vary = person.variation.at(points) + pattern.at(atlas_points)
    years = person.age - MEAN_AGE
    d = np.stack([PROPERTIES[t]["d"] + person.offset[f"d_{t}"] + options.age_slope_d * years
                  + vary[0] for t in PROPERTIES])
    f = np.stack([PROPERTIES[t]["f"] + person.offset[f"f_{t}"] + vary[1] for t in PROPERTIES])
    f[0] += options.age_slope_f * years + CALLOSAL_F * weight[SYSTEMS.index("callosal")]
    f[0] *= 1 + LESION_F * lesion
    d[0] *= 1 + LESION_D * lesion
    return TissueMaps(share, np.clip(d, 0.3, 2.9), np.clip(f, 0.02, 0.95), axes, weight,
                  atlas.sample(atlas.t1, atlas_points), lesion,
                  {t: k * math.exp(person.offset["log_kappa"]) for t, k in KAPPA.items()})
