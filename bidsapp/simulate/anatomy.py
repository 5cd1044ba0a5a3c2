"""Atlas of a phantom: tissues and a continuous fibre field with crossings.

The atlas' white matter is treated as an electrical conductor of conductivity σ, everything else as
nearly an insulator. Fibres follow the steady current: ∇·(σ ∇u) = 0 with u fixed at two ends. Each
fibre system has one current σ ∇u:

    callosal     from the left cortex to the right: all of it crosses in the corpus callosum
    projection   from the lower brainstem to the upper cortex: peduncles, capsule, corona radiata
    association  from the occipital to the frontal cortex, beside the midline

A current is continuous and ends only in grey matter. Its strength measures how much of a system
passes a point, so the systems' shares of a voxel and their crossings follow from the anatomy. The
atlas stores vectors along the currents whose squared length is the weight of a system. Vectors,
unlike axes, have a sign and can be interpolated. Laplace's equation in tissue: Jones et al. 2000,
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
"""Conductivity outside of white matter, relative to that of white matter."""

SHARPNESS = 1.5
"""Exponent that makes the tissue shares of the average brain as distinct as those of one brain."""

MIN_SHARE = 0.03
"""Tissue shares below this are set to 0."""

STRENGTH = {"callosal": 1.0, "projection": 0.8, "association": 0.6}
"""Length of each system's vector where its current equals its mean in white matter. The weight of
the system is the square, divided by the sum over systems (`person.tissue_at`)."""

FLOW_STEP = 3.0
"""Voxel size of the grid on which currents are computed (mm); they vary little over it."""

FLOW_SD = 3.0
"""SD of the Gaussian (mm) that smooths currents along the staircase of voxels at tissue borders."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Tissues and fibre systems on a regular grid, axes along world RAS+ (mm, MNI152).

    Parameters
    ----------
    tissue : (3, x, y, z) ndarray
        Shares of TISSUES, 0–1, whose sum is at most 1.
    t1 : (x, y, z) ndarray
        T1-weighted intensity, 0–1.
    flow : (system, 3, x, y, z) ndarray
        Vector along the current of each of SYSTEMS; its squared length is the system's weight.
    outward : (3, x, y, z) ndarray
        Direction from white to grey matter, of any length: minus the gradient of the WM share.
    origin : (3,) ndarray
        Centre of the first voxel (mm).
    step : float
        Voxel size (mm).
    """

    tissue: np.ndarray
    t1: np.ndarray
    flow: np.ndarray
    outward: np.ndarray
    origin: np.ndarray
    step: float

    def sample(self, field: np.ndarray, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Interpolate a field at world points.

        Parameters
        ----------
        field : (…, x, y, z) ndarray
        points : (n, 3) ndarray
            World coordinates (mm).

        Returns
        -------
        (…, n) ndarray
            Trilinear values, 0 outside of the grid.
        """
        index = (points - self.origin).T / self.step
        flat = field.reshape(-1, *field.shape[-3:])
        values = [ndimage.map_coordinates(f, index, order=1, output=np.float32) for f in flat]
        return np.stack(values).reshape(*field.shape[:-3], len(points))


def build(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray, affine: np.ndarray, step: float) -> Atlas:
    """Build the atlas from the maps of an average brain.

    Parameters
    ----------
    t1, gm, wm : (x, y, z) ndarray
        T1-weighted image, and probabilities of grey and white matter, 0–1; the rest of the brain
        is CSF.
    affine : (4, 4) ndarray
        Affine of these maps: axes along RAS+, isotropic voxels.
    step : float
        Voxel size of the atlas (mm).

    Returns
    -------
    Atlas
    """
    size, origin = affine[0, 0], affine[:3, 3]
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(t1 > 0.05, iterations=2))
    maps = np.stack([wm, gm, np.where(brain, np.clip(1 - gm - wm, 0, 1), 0), t1])
    maps[:3] = _sharpen(maps[:3])
    fine = _resample(maps, size, step)
    fine[:3] *= fine[:3] > MIN_SHARE
    coarse = _resample(maps[:3], size, max(step, FLOW_STEP))
    flow = _compute_flows(coarse, origin, max(step, FLOW_STEP))
    index = np.indices(fine.shape[1:]) * (step / max(step, FLOW_STEP))
    flow = np.stack([[ndimage.map_coordinates(f, index, order=1, mode="nearest") for f in system]
                     for system in flow])
    outward = -np.stack(np.gradient(ndimage.gaussian_filter(fine[0], 4 / step)))
    return Atlas(fine[:3], fine[3], flow, outward, origin, step)


def _sharpen(tissue: np.ndarray) -> np.ndarray:
    """Sharpen probabilities over many people to shares of one brain, whose tissues overlap less."""
    power = tissue**SHARPNESS
    return power * np.minimum(tissue.sum(0), 1) / np.maximum(power.sum(0), 1e-6)


def _resample(maps: np.ndarray, size: float, step: float) -> np.ndarray:
    """Resample (k, x, y, z) maps from `size` to `step` mm, smoothed against aliasing."""
    shape = np.ceil((np.array(maps.shape[1:]) - 1) * size / step).astype(int) + 1
    index = np.indices(tuple(shape)) * (step / size)
    smooth = 0.35 * step / size if step > size else 0
    return np.stack([ndimage.map_coordinates(ndimage.gaussian_filter(m, smooth), index, order=1)
                     for m in maps.astype(np.float32)])


def _compute_flows(tissue: np.ndarray, origin: np.ndarray, step: float) -> np.ndarray:
    """Compute `Atlas.flow` on the grid of `tissue`; borders are in mm of MNI152."""
    x, y, z = origin[:, None, None, None] + step * np.indices(tissue.shape[1:])
    wm, gm = tissue[0], tissue[1]
    brain = tissue.sum(0) > 0.5
    cerebrum = z > np.maximum(-25 - 0.2 * (y + 20), -45)  # above brainstem and cerebellum
    # without the cerebellum below the occipital lobe
    cerebrum &= ~((z < 0) & (y < -40) & (z < -10 - 0.25 * (y + 40)) & (np.abs(x) < 60))
    cortex = brain & (gm > 0.5) & cerebrum & ~_deep_grey(x, y, z)
    ends = {  # source, sink and region of each current
        "callosal": (cortex & (x < -25), cortex & (x > 25),
                     brain & cerebrum & ((np.abs(x) > 20) | (z > 0))),
        "projection": (brain & (z < -55) & (np.abs(x) < 14) & (y > -45) & (y < -20),
                       cortex & (z > 25), brain & _outside_cerebellum(x, y, z)),
        "association": (cortex & (y < -75), cortex & (y > 35),
                        brain & cerebrum & (np.abs(x) > 14)),
    }
    flows = []
    for name in SYSTEMS:
        source, sink, inside = ends[name]
        sigma = np.where(inside, LEAK + wm.astype(float) ** 2, 0)
        u = _solve_potential(sigma, source & inside, sink & inside)
        flow = np.stack([_current(u, sigma, axis) / step for axis in range(3)])
        flow = np.stack([ndimage.gaussian_filter(f, FLOW_SD / step) for f in flow])
        strength = np.linalg.norm(flow, axis=0)
        level = strength[wm > 0.5].mean()
        # |flow|² is proportional to the current
        flows.append(STRENGTH[name] * flow / np.sqrt(level * np.maximum(strength, 1e-4 * level)))
    return np.stack(flows).astype(np.float32)


def _deep_grey(x, y, z):
    """Select the thalamus and basal ganglia, whose grey matter is not an end of any system."""
    return ((np.abs(x) / 36) ** 2 + ((y + 2) / 36) ** 2 + ((z - 4) / 22) ** 2) < 1


def _outside_cerebellum(x, y, z):
    """Select the cerebrum and the brainstem."""
    stem = (np.abs(x) < 20) & (y > -42) & (y < -5)
    return (z > -8) | stem


def _solve_potential(sigma: np.ndarray, source: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """Solve ∇·(σ ∇u) = 0 where σ > 0, with u = 0 at the source, u = 1 at the sink, and no current
    through the boundary.

    Seven-point finite volumes with the harmonic mean of σ at the faces, by conjugate gradients.
    """
    free = (sigma > 0) & ~source & ~sink
    number = np.full(sigma.shape, -1)  # row of each free voxel in the matrix
    number[free] = np.arange(free.sum())
    n = int(free.sum())
    rows, columns, values = [], [], []
    diagonal, right = np.zeros(n), np.zeros(n)
    for axis in range(3):
        low, high = (np.take(np.arange(sigma.size).reshape(sigma.shape), r, axis).ravel()
                     for r in (range(sigma.shape[axis] - 1), range(1, sigma.shape[axis])))
        a, b = sigma.ravel()[low], sigma.ravel()[high]
        face = 2 * a * b / np.maximum(a + b, 1e-12)
        for cells, neighbours in ((low, high), (high, low)):
            i, j = number.ravel()[cells], number.ravel()[neighbours]
            coupled = (i >= 0) & (face > 0)
            diagonal += np.bincount(i[coupled], face[coupled], n)
            right += np.bincount(i[coupled], (face * sink.ravel()[neighbours])[coupled], n)
            inner = coupled & (j >= 0)
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


def _current(u: np.ndarray, sigma: np.ndarray, axis: int) -> np.ndarray:
    """Compute σ ∂u/∂axis at voxel centres: the mean of the currents through the two faces."""
    a, b = (np.take(sigma, r, axis) for r in (range(u.shape[axis] - 1), range(1, u.shape[axis])))
    current = 2 * a * b / np.maximum(a + b, 1e-12) * np.diff(u, axis=axis)
    pad = [(0, 0)] * 3
    pad[axis] = (1, 1)
    padded = np.pad(current, pad)
    return (np.take(padded, range(u.shape[axis]), axis)
            + np.take(padded, range(1, u.shape[axis] + 1), axis)) / 2
