"""The anatomy that a phantom's people share: tissues, and a continuous fibre field with crossings.

Fibres follow the steady current in the atlas' white matter taken as a conductor σ (nearly an
insulator elsewhere): ∇·(σ ∇u) = 0 with u fixed at two ends, one current σ ∇u per fibre system:

    callosal     from the left cortex to the right: all of it crosses in the corpus callosum
    projection   from the lower brainstem to the upper cortex: peduncles, capsule, corona radiata
    association  from the occipital to the frontal cortex, beside the midline

A current is continuous, ends only in grey matter, and its strength says how much of a system runs
through a place; so the systems' shares of a voxel, and where they cross, follow from the anatomy.
Being signed, the fields may be interpolated. Laplace's equation in tissue: Jones et al. 2000,
doi:10.1002/1097-0193(200009)11:1<12::AID-HBM20>3.0.CO;2-K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg

SYSTEMS = ("callosal", "projection", "association")
TISSUES = ("wm", "gm", "csf")
LEAK = 1e-3
"""Conductivity of what is no white matter, beside 1."""

SHARPNESS = 1.5
LEAST = 0.03
"""Smaller shares of a tissue are none."""

STRENGTH = {"callosal": 1.0, "projection": 0.8, "association": 0.6}
"""Of each system, where its current has the mean strength in white matter."""

FLOW_STEP = 3.0
"""mm: of the grid of the currents; they are smooth beside it."""

FLOW_SD = 3.0
"""mm: smoothing of the currents, which a grid of cubes makes uneven at the borders of tissue."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Tissues and fibre systems on a regular grid, axes along world RAS+ (mm, MNI152).

    tissue: (3, x, y, z) shares of TISSUES, 0–1, adding up to at most 1. t1: (x, y, z), 0–1.
    flow: (3, 3, x, y, z) current of each of SYSTEMS. outward: (3, x, y, z) direction in which
    white matter gives way to grey. origin: (3,) mm of the first voxel's centre. step: mm.
    """

    tissue: np.ndarray
    t1: np.ndarray
    flow: np.ndarray
    outward: np.ndarray
    origin: np.ndarray
    step: float

    def sample(self, field: np.ndarray, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """(…, n) values of a (…, x, y, z) field at world points, trilinear, 0 outside."""
        index = (points - self.origin).T / self.step
        flat = field.reshape(-1, *field.shape[-3:])
        values = [ndimage.map_coordinates(f, index, order=1, output=np.float32) for f in flat]
        return np.stack(values).reshape(*field.shape[:-3], len(points))


def build(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray, affine: np.ndarray, step: float) -> Atlas:
    """The atlas at `step` mm from T1w, GM and WM maps (x, y, z) of 0–1 with a diagonal, positive
    affine of one voxel size. What is brain and neither GM nor WM is CSF."""
    size, origin = affine[0, 0], affine[:3, 3]
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(t1 > 0.05, iterations=2))
    maps = np.stack([wm, gm, np.where(brain, np.clip(1 - gm - wm, 0, 1), 0), t1])
    maps[:3] = _sharp(maps[:3])
    fine = _thinned(maps, size, step)
    fine[:3] *= fine[:3] > LEAST
    coarse = _thinned(maps[:3], size, max(step, FLOW_STEP))
    flow = _flows(coarse, origin, max(step, FLOW_STEP))
    index = np.indices(fine.shape[1:]) * (step / max(step, FLOW_STEP))
    flow = np.stack([[ndimage.map_coordinates(f, index, order=1, mode="nearest") for f in system]
                     for system in flow])
    outward = -np.stack(np.gradient(ndimage.gaussian_filter(fine[0], 4 / step)))
    return Atlas(fine[:3], fine[3], flow, outward, origin, step)


def _sharp(tissue: np.ndarray) -> np.ndarray:
    """Probabilities over many people → shares as in one: those of an average brain overlap more
    than tissues do."""
    power = tissue**SHARPNESS
    return power * np.minimum(tissue.sum(0), 1) / np.maximum(power.sum(0), 1e-6)


def _thinned(maps: np.ndarray, size: float, step: float) -> np.ndarray:
    """(k, x, y, z) maps of `size` mm at `step` mm, smoothed against aliasing."""
    shape = np.ceil((np.array(maps.shape[1:]) - 1) * size / step).astype(int) + 1
    index = np.indices(tuple(shape)) * (step / size)
    smooth = 0.35 * step / size if step > size else 0
    return np.stack([ndimage.map_coordinates(ndimage.gaussian_filter(m, smooth), index, order=1)
                     for m in maps.astype(np.float32)])


def _flows(tissue: np.ndarray, origin: np.ndarray, step: float) -> np.ndarray:
    x, y, z = origin[:, None, None, None] + step * np.indices(tissue.shape[1:])
    wm, gm = tissue[0], tissue[1]
    brain = tissue.sum(0) > 0.5
    cerebrum = z > np.maximum(-25 - 0.2 * (y + 20), -45)  # above brainstem and cerebellum
    cerebrum &= ~((z < 0) & (y < -40) & (z < -10 - 0.25 * (y + 40)) & (np.abs(x) < 60))
    cortex = brain & (gm > 0.5) & cerebrum & ~_deep(x, y, z)
    ends = {
        "callosal": (cortex & (x < -25), cortex & (x > 25),
                     brain & cerebrum & ((np.abs(x) > 20) | (z > 0))),
        "projection": (brain & (z < -55) & (np.abs(x) < 14) & (y > -45) & (y < -20),
                       cortex & (z > 25), brain & _above_stem(x, y, z)),
        "association": (cortex & (y < -75), cortex & (y > 35),
                        brain & cerebrum & (np.abs(x) > 14)),
    }
    flows = []
    for name in SYSTEMS:
        source, sink, inside = ends[name]
        sigma = np.where(inside, LEAK + wm.astype(float) ** 2, 0)
        u = _potential(sigma, source & inside, sink & inside)
        flow = np.stack([_gradient(u, sigma, axis) / step for axis in range(3)])
        flow = np.stack([ndimage.gaussian_filter(f, FLOW_SD / step) for f in flow])
        strength = np.linalg.norm(flow, axis=0)
        level = strength[wm > 0.5].mean()
        # the root tames the crowding of current in narrows, which fibres share by packing
        flows.append(STRENGTH[name] * flow / np.sqrt(level * np.maximum(strength, 1e-4 * level)))
    return np.stack(flows).astype(np.float32)


def _deep(x, y, z):
    """Thalamus and basal ganglia, which no system of cortical ends ends in."""
    return ((np.abs(x) / 36) ** 2 + ((y + 2) / 36) ** 2 + ((z - 4) / 22) ** 2) < 1


def _above_stem(x, y, z):
    """The cerebrum, and the brainstem without the cerebellum."""
    stem = (np.abs(x) < 20) & (y > -42) & (y < -5)
    return (z > -8) | stem


def _potential(sigma: np.ndarray, source: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """u with ∇·(σ ∇u) = 0 where σ > 0, 0 at the source and 1 at the sink; no current leaves.

    Seven-point finite volumes with the harmonic mean of σ at the faces, by conjugate gradients.
    """
    free = (sigma > 0) & ~source & ~sink
    number = np.full(sigma.shape, -1)
    number[free] = np.arange(free.sum())
    n = int(free.sum())
    rows, columns, values = [], [], []
    diagonal, right = np.zeros(n), np.zeros(n)
    for axis in range(3):
        low, high = (np.take(np.arange(sigma.size).reshape(sigma.shape), r, axis).ravel()
                     for r in (range(sigma.shape[axis] - 1), range(1, sigma.shape[axis])))
        a, b = sigma.ravel()[low], sigma.ravel()[high]
        face = 2 * a * b / np.maximum(a + b, 1e-12)
        for here, there in ((low, high), (high, low)):
            i, j = number.ravel()[here], number.ravel()[there]
            known = (i >= 0) & (face > 0)
            diagonal += np.bincount(i[known], face[known], n)
            right += np.bincount(i[known], (face * sink.ravel()[there])[known], n)
            inner = known & (j >= 0)
            rows.append(i[inner])
            columns.append(j[inner])
            values.append(-face[inner])
    matrix = sparse.csr_matrix((np.concatenate([*values, diagonal]), (
        np.concatenate([*rows, np.arange(n)]), np.concatenate([*columns, np.arange(n)]))), (n, n))
    scale = sparse.diags(1 / np.maximum(diagonal, 1e-12))
    solution, _ = cg(matrix, right, x0=np.full(n, 0.5), rtol=1e-4, maxiter=2000, M=scale)
    u = np.where(sink, 1.0, 0.0)
    u[free] = solution
    return u


def _gradient(u: np.ndarray, sigma: np.ndarray, axis: int) -> np.ndarray:
    """σ ∂u/∂axis at voxel centres: the mean of the currents through the two faces."""
    a, b = (np.take(sigma, r, axis) for r in (range(u.shape[axis] - 1), range(1, u.shape[axis])))
    current = 2 * a * b / np.maximum(a + b, 1e-12) * np.diff(u, axis=axis)
    pad = [(0, 0)] * 3
    pad[axis] = (1, 1)
    padded = np.pad(current, pad)
    return (np.take(padded, range(u.shape[axis]), axis)
            + np.take(padded, range(1, u.shape[axis] + 1), axis)) / 2
