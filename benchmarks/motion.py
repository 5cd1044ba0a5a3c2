"""Motion and eddy currents: errors against the truth of an analytic head, beside doing nothing and
beside DIPY's `motion_correction`.

    python benchmarks/motion.py [--snr 15 30] [--seeds 0] [--no-dipy]
    python benchmarks/motion.py --tables [--seeds 2]     # short tables, moving and still

The head has folded cortex, ventricles, bundles, skull and scalp, all functions of the position in
mm, so that a volume is computed at displaced points without interpolation. Head motion is a random
walk with two jumps, up to 3 mm and 3° in each component; eddy currents are linear in the gradient
and quadratic in the position, with a random part; in 1 of 100 slices of weighted volumes half of
the signal is lost; noise is Rician with an SD of the b0 signal of white matter divided by the SNR.
Errors are those of the position of each voxel of the brain in each volume. A slice counts as
found or false if it has 250 voxels of the brain or more.

The program gets the true brain mask, while DIPY registers the whole head. All seeds share one head,
on which the constants of the program were tuned (with seeds 0 and 1).
"""

import argparse
import time
import warnings

import numpy as np
import table
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import Acquisition, PhaseEncoding
from bidsapp.evaluate.quality import head_motion
from bidsapp.preprocess import motion

SHAPE, VOXEL = (52, 60, 44), 3.0
BRAIN = np.array([58.0, 70.0, 50.0])  # semi-axes, mm
ENCODING = PhaseEncoding(1, -1, 0.05)
SCHEME = ((0, 6), (1000, 16), (2000, 20), (3000, 28))
MIN_VOXELS = 250
CONE = 0.35 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)


def affine():
    out = np.diag([-VOXEL, VOXEL, VOXEL, 1.0])
    out[:3, 3] = -out[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return out


def grid():
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return index @ affine()[:3, :3].T + affine()[:3, 3]


def step(x, width=1.2):
    """0 to 1 over about 2 mm."""
    return 0.5 + 0.5 * np.tanh(x / width)


def head(points):
    """Signal sources of points: list of (S0, mean diffusivities, axis or None)."""
    x, y, z = np.moveaxis(points, -1, 0)
    unit = points / BRAIN
    rho = np.linalg.norm(unit, axis=-1)
    size = BRAIN.mean()
    azimuth, height = np.arctan2(unit[..., 1], unit[..., 0]), unit[..., 2]
    folds = 0.05 * np.sin(11 * azimuth + 3 * np.sin(4 * height)) * np.cos(9 * height + azimuth)
    brain = step((1 - rho) * size)
    pia = step((0.93 + folds - rho) * size)
    white = step((0.80 + 1.2 * folds - rho) * size)
    ventricle = step(6 - np.hypot(np.hypot((np.abs(x) - 12) / 1.0, (y + 5) / 3.5), (z - 6) / 1.4))
    nuclei = step(9 - np.hypot(np.hypot((np.abs(x) - 24) / 1.0, (y - 6) / 1.5), (z + 8) / 1.2))
    white, grey = white * (1 - ventricle) * (1 - nuclei), (pia - white * pia) + nuclei * white
    white, grey = white * pia, grey.clip(0) * (1 - ventricle)
    csf = (brain - white - grey).clip(0)
    scalp = step((rho - 1.13) * size) * step((1.22 - rho) * size)
    texture = 1 + 0.05 * np.sin(x / 7) * np.sin(y / 8 + 1) * np.cos(z / 6)
    # bundles: callosal, projection and association fibres, which cross and turn
    a, b = 0.5 + 0.5 * np.tanh((np.abs(x) - 18) / 6), 0.5 + 0.5 * np.tanh((np.abs(x) - 38) / 6)
    shares = np.stack([1.1 - a, a * (1.1 - b), 0.25 + b]) \
        * (1 + 0.5 * np.sin(np.stack([y, z, x]) / 9 + np.stack([z, x, y]) / 13))
    shares = white * texture * shares / shares.sum(0)
    bend = 0.5 * np.stack([np.sin(y / 11 + z / 17), np.sin(z / 12 + x / 19),
                           np.sin(x / 10 + y / 15)], -1)
    sources = [(share, (1.9e-3, 0.35e-3), normalize(direction + bend)) for share, direction in
               zip(shares, np.eye(3), strict=True)]
    return [*sources, (1.25 * grey * texture, (0.95e-3, 0.75e-3), sources[1][2]),
            (2.6 * csf, (3.0e-3, 3.0e-3), None), (0.6 * scalp, (0.3e-3, 0.3e-3), None)]


def normalize(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def brain_mask():
    return np.linalg.norm(grid() / BRAIN, axis=-1) < 1


def signal(points, b, n):
    """Signal at points of the head with b in s/mm² along n. Half of the white matter is in sticks,
    and its axes are dispersed over a cone."""
    total = 0.0
    for s0, (parallel, perpendicular), axis in head(points):
        if axis is None or b == 0:
            total = total + s0 * np.exp(-b * parallel)
        elif parallel < 1e-3:
            total = total + s0 * np.exp(
                -b * (perpendicular + (parallel - perpendicular) * (axis @ n)**2))
        else:
            for offset in CONE:
                along = (normalize(axis + offset) @ n)**2
                total = total + s0 / (2 * len(CONE)) * (
                    np.exp(-b * (perpendicular + (parallel - perpendicular) * along))
                    + np.exp(-b * parallel * along))
    return total


def directions(n, rng):
    """(n, 3) unit vectors over the whole sphere, by repulsion of ± pairs, with random signs."""
    v = rng.standard_normal((n, 3))
    for _ in range(200):
        v = normalize(v)
        force = np.zeros_like(v)
        for s in (1, -1):
            d = v[:, None] - s * v
            r = np.linalg.norm(d, axis=-1, keepdims=True)
            force += np.sum(d / np.maximum(r, 1e-3)**3 * (r > 1e-6), axis=1)
        v += 0.1 * force / n
    return normalize(v) * rng.choice([-1, 1], (n, 1))


def interleave(scheme, rng):
    """b0 volumes evenly spaced, the others in random order."""
    weighted = [(b, v) for b, n in scheme if b for v in directions(n, rng)]
    rng.shuffle(weighted := [np.r_[b, v] for b, v in weighted])
    n_b0 = dict(scheme).get(0, 0)
    total = len(weighted) + n_b0
    at = set(np.linspace(0, total - total // max(n_b0, 1), n_b0).astype(int).tolist())
    rows = iter(weighted)
    rows = np.array([np.zeros(4) if i in at else next(rows) for i in range(total)])
    return Acquisition(rows[:, 0], rows[:, 1:])


def random_motion(n, rng, size=3.0):
    """(n, 3, 3) and (n, 3): a random walk with two jumps, from the identity, up to `size`."""
    walk = np.cumsum(rng.standard_normal((n, 6)), axis=0)
    for jump in rng.integers(n // 5, n, 2):
        walk[jump:] += 4 * rng.standard_normal(6)
    walk += 0.7 * rng.standard_normal((n, 6))
    walk -= walk[0]
    walk *= size / np.abs(walk).max(0)
    return Rotation.from_rotvec(walk[:, :3], degrees=True).as_matrix(), walk[:, 3:]


def polynomial(y):
    x, y, z = np.moveaxis(y / 100, -1, 0)
    return np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], -1)


def random_eddy(acquisition, rng):
    """(n, 10) Hz: linear in the gradient, with a random part of a tenth."""
    size = np.array([10.0] + [16] * 3 + [14] * 6)
    gradient = np.sqrt(acquisition.bvals / 2000)[:, None] * acquisition.bvecs
    field = gradient @ (size * rng.standard_normal((3, 10)))
    return field + 0.1 * size * rng.standard_normal(field.shape) * ~acquisition.b0[:, None]


class Phantom:
    """A series and its truth."""

    def __init__(self, snr, seed=0, scheme=SCHEME, motion_size=3.0, eddy_size=1.0, dropout=0.01):
        rng = np.random.default_rng(seed)
        self.acquisition = interleave(scheme, rng)
        n = len(self.acquisition)
        self.rotation, self.translation = random_motion(n, rng, motion_size)
        self.eddy = eddy_size * random_eddy(self.acquisition, rng)
        self.shift = ENCODING.sign * ENCODING.readout * affine()[:3, ENCODING.axis]
        self.lost = (rng.random((SHAPE[2], n)) < dropout) & ~self.acquisition.b0
        points = grid()
        self.volumes = []
        for v in range(n):
            x, determinant = self.inverse(v, points)
            clean = signal(x, self.acquisition.bvals[v],
                           self.rotation[v].T @ self.acquisition.bvecs[v]) / determinant
            clean *= np.where(self.lost[:, v], 0.5, 1)
            noise = rng.standard_normal((2, *SHAPE)) / snr
            self.volumes.append(np.hypot(clean + noise[0], noise[1]).astype(np.float32))

    def forward(self, v, x):
        y = x @ self.rotation[v].T + self.translation[v]
        return y + (polynomial(y) @ self.eddy[v])[..., None] * self.shift

    def inverse(self, v, target):
        """The points that a volume shows, and the determinant there."""
        y = target
        for _ in range(12):
            y = target - (polynomial(y) @ self.eddy[v])[..., None] * self.shift
        size = np.linalg.norm(self.shift)
        h = 1e-3 * self.shift / size
        slope = (polynomial(y + h) - polynomial(y - h)) @ self.eddy[v] / 2e-3
        return (y - self.translation[v]) @ self.rotation[v], 1 + size * slope


def errors(phantom, forward, rotations):
    """RMS displacement (mm) and rotation error (degrees, mean and largest) of some forward map."""
    x = grid()[brain_mask()]
    n = len(phantom.acquisition)
    squares = [np.mean(np.sum((forward(v, x) - phantom.forward(v, x))**2, -1)) for v in range(n)]
    angles = Rotation.from_matrix(
        rotations @ np.swapaxes(phantom.rotation, 1, 2)).magnitude() * 180 / np.pi
    return np.sqrt(np.mean(squares)), angles.mean(), angles.max(), np.sqrt(squares)


def of_ours(phantom):
    start = time.process_time()
    estimated = motion.estimate(phantom.volumes, phantom.acquisition,
                                [ENCODING] * len(phantom.volumes), affine(), brain_mask())
    seconds = time.process_time() - start
    geometry = estimated.geometry

    def forward(v, x):
        return geometry.coordinates(v, x)[0] @ affine()[:3, :3].T + affine()[:3, 3]

    counted = brain_mask().sum((0, 1)) >= MIN_VOXELS
    lost, found = phantom.lost[counted], estimated.outliers[counted]
    return (*errors(phantom, forward, geometry.rotations), seconds,
            (found & lost).sum(), lost.sum(), (found & ~lost).sum(), (~lost).sum(), estimated)


def of_dipy(phantom):
    from dipy.align import motion_correction
    from dipy.core.gradients import gradient_table

    a = phantom.acquisition
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, moves = motion_correction(
            np.stack(phantom.volumes, -1), gradient_table(a.bvals, bvecs=a.bvecs, b0_threshold=50),
            affine=affine(), b0_ref=0)
    seconds = time.process_time() - start
    rotations = []
    for v in range(len(a)):
        u, _, vt = np.linalg.svd(moves[:3, :3, v])
        rotations.append(u @ vt)
    return (*errors(phantom, lambda v, x: x @ moves[:3, :3, v].T + moves[:3, 3, v],
                    np.array(rotations)), seconds)


TABLES = {"1 b0, 12 × b 1000": ((0, 1), (1000, 12)), "1 b0, 20 × b 2500": ((0, 1), (2500, 20)),
          "4 b0, 30 × b 1000": ((0, 4), (1000, 30))}


def displacement_steps(rotations, translations):
    """Mean framewise displacement about the centre of the head, mm."""
    return np.nanmean(head_motion(rotations, translations, np.zeros(3)).framewise_displacement)


def short_tables(snr, seeds):
    """Rows on short tables: a head that moves in eddy currents, and one at rest without them."""
    for seed in seeds:
        for name, scheme in TABLES.items():
            for state, size in (("moving", 1.0), ("still", 0.0)):
                phantom = Phantom(snr, seed, scheme, 3.0 * size, size)
                *ours, estimated = of_ours(phantom)
                yield [f"{name}, seed {seed}", state, *(f"{x:.2f}" for x in (
                    *ours[:3], displacement_steps(phantom.rotation, phantom.translation),
                    displacement_steps(estimated.geometry.rotations,
                                       estimated.geometry.translations))),
                    f"{ours[5]} of {ours[6]}", str(ours[7])]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--snr", type=float, nargs="+", default=[15, 30])
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--no-dipy", action="store_true", help="leave the peer out")
    p.add_argument("--tables", action="store_true", help="short b-tables, at SNR 20")
    table.add_option(p)
    args = p.parse_args()
    if args.tables:
        table.show("motion_tables", [*short_tables(20, args.seeds)], args.csv)
        return
    rows = []
    for snr in args.snr:
        for seed in args.seeds:
            phantom = Phantom(snr, seed)
            name = f"SNR {snr:g}, seed {seed}"
            n = len(phantom.acquisition)
            nothing = errors(phantom, lambda v, x: x, np.tile(np.eye(3), (n, 1, 1)))
            rows.append([name, "nothing", f"{nothing[0]:.2f}", f"{nothing[1]:.2f}",
                         f"{nothing[2]:.2f}", "", "", ""])
            if not args.no_dipy:
                peer = of_dipy(phantom)
                rows.append([name, "DIPY", f"{peer[0]:.2f}", f"{peer[1]:.2f}", f"{peer[2]:.2f}",
                             f"{peer[4]:.0f}", "", ""])
            ours = of_ours(phantom)
            rows.append([name, "ours", f"{ours[0]:.2f}", f"{ours[1]:.2f}", f"{ours[2]:.2f}",
                         f"{ours[4]:.0f}", f"{ours[5]} of {ours[6]}", f"{ours[7]} of {ours[8]}"])
    table.show("motion", rows, args.csv)


if __name__ == "__main__":
    main()
