"""One person of a phantom: the atlas deformed, with tissue properties of their own.

Points x of the person lie at s(x + u(x)) in the atlas, with a scale s per axis and u a cubic
B-spline whose coefficients stay below 0.4 of their spacing in every component, so that the map is
one to one (Choi and Lee 2000, doi:10.1006/gmod.2000.0531). Tissue is the constrained
two-compartment model (`forward.two_compartments`; d in µm²/ms, f the neurite fraction) with

    d = d_tissue + offset + slope_d (age − 50) + what varies smoothly in space     (f likewise),

slopes in white matter for f, in white and grey matter for d. In a lesion f is lower and d higher.
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
OFFSET_SD = {"d_wm": 0.10, "f_wm": 0.065, "d_gm": 0.14, "f_gm": 0.08, "log_kappa": 0.25}
"""Between people; log κ of white and grey matter alike."""

VARIATION_SD = {"d": 0.06, "f": 0.025}
CALLOSAL_F = 0.10
"""Added to f in proportion to the callosal share: the densest of the large bundles."""

KAPPA = {"wm": 24.0, "gm": 2.2}
"""Watson concentration of a fibre system within a voxel."""

LEAST_STRENGTH = 1e-12
"""Where the currents' squares add up to less, there are no fibres: tissue is isotropic."""

SIZE_SD = 0.04
WARP_SD = 3.0
WARP_SPACING = 40.0
INJECTIVE = 0.4
MEAN_AGE = 50.0
LESION_F = -0.30
LESION_D = 0.25
"""Changes relative to the tissue around, at a lesion's centre."""


@dataclass(frozen=True, eq=False)
class Person:
    """label; age (years); sex; scale (3,); warp and variation: fields; offset by property;
    lesion: centre (mm, in the person) and radius (mm), or None."""

    label: str
    age: float
    sex: str
    scale: np.ndarray
    warp: SplineField
    variation: SplineField
    offset: dict[str, float]
    lesion: tuple[np.ndarray, float] | None

    def to_atlas(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        return self.scale * (points + self.warp.at(points).T)


@dataclass(frozen=True, eq=False)
class TissueMaps:
    """What is at n points of a person.

    share: (3, n) of WM, GM, CSF. d, f: (2, n) of WM and GM. axes: (4, n, 3) unit axes of the fibre
    systems and of GM, in the frame of the points. weight: (3, n) of the systems, adding up to 1,
    or 0 where no current runs. t1: (n,) 0–1. lesion: (n,) 0–1. kappa: Watson's, by tissue.
    """

    share: np.ndarray
    d: np.ndarray
    f: np.ndarray
    axes: np.ndarray
    weight: np.ndarray
    t1: np.ndarray
    lesion: np.ndarray
    kappa: dict[str, float]


def draw(options: PhantomOptions, atlas: Atlas, label: str, age: float, sex: str, lesion: bool,
         tissue: Sequence[float] = (0.0,) * len(OFFSET_SD)) -> Person:
    """A person of this age and sex, whose tissue stands so many SDs from the mean in each of
    OFFSET_SD; shape, local variation and the lesion's place from the seed and the label."""
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
              points: Float[np.ndarray, "n 3"], place: Float[np.ndarray, "n 3"],
              jacobian: Float[np.ndarray, "n 3 3"]) -> TissueMaps:
    """Args: points: in the person. place: the same in the atlas. jacobian: ∂place/∂y at each, in
    the frame y in which axes are wanted. pattern: how d and f vary in everyone's space."""
    share = atlas.sample(atlas.tissue, place)
    flow = atlas.sample(atlas.flow, place)
    strength = np.linalg.norm(flow, axis=1) ** 2
    total = strength.sum(0)
    weight = np.where(total > LEAST_STRENGTH, strength / np.maximum(total, LEAST_STRENGTH), 0)
    vectors = np.concatenate([flow, atlas.sample(atlas.outward, place)[None]]).transpose(0, 2, 1)
    axes = np.linalg.solve(jacobian, vectors[..., None])[..., 0]
    length = np.linalg.norm(axes, axis=-1, keepdims=True)
    axes = np.where(length > 1e-9, axes / np.maximum(length, 1e-9), [0, 0, 1.0])
    lesion = np.zeros(len(points), np.float32)
    if person.lesion:
        centre, radius = person.lesion
        distance = np.linalg.norm(points - centre, axis=1) / radius
        lesion = (1 / (1 + np.exp(12 * (distance - 1)))).astype(np.float32)
    vary = person.variation.at(points) + pattern.at(place)
    years = person.age - MEAN_AGE
    d = np.stack([PROPERTIES[t]["d"] + person.offset[f"d_{t}"] + options.age_slope_d * years
                  + vary[0] for t in PROPERTIES])
    f = np.stack([PROPERTIES[t]["f"] + person.offset[f"f_{t}"] + vary[1] for t in PROPERTIES])
    f[0] += options.age_slope_f * years + CALLOSAL_F * weight[SYSTEMS.index("callosal")]
    f[0] *= 1 + LESION_F * lesion
    d[0] *= 1 + LESION_D * lesion
    return TissueMaps(share, np.clip(d, 0.3, 2.9), np.clip(f, 0.02, 0.95), axes, weight,
                  atlas.sample(atlas.t1, place), lesion,
                  {t: k * math.exp(person.offset["log_kappa"]) for t, k in KAPPA.items()})
