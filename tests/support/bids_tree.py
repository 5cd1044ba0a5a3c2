"""Small synthetic BIDS datasets: one tensor in a head-like ellipsoid, Rician noise, unequal grids.

The signal is S = S0 exp(−B : D) with D = λ∥ n nᵀ + λ⊥ (I − n nᵀ) along the world axis AXIS, so FA,
MD and the principal direction are known. The .bvec is written by FSL's definition for grids
without shear (components along the image axes, x negated when det > 0), not by the package's code.
"""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (18, 20, 22)
AXIS = np.array([2.0, 1.0, 3.0]) / np.sqrt(14)
PARALLEL, PERPENDICULAR = 1.7e-3, 0.4e-3  # mm²/s
MD = (PARALLEL + 2 * PERPENDICULAR) / 3
FA = (PARALLEL - PERPENDICULAR) / np.sqrt(PARALLEL**2 + 2 * PERPENDICULAR**2)
S0, NOISE = 1000.0, 15.0
SCHEME = ((0, 2), (1000, 12), (2000, 16))
SIDECAR = {
    "Manufacturer": "Maker", "ManufacturersModelName": "Model", "DeviceSerialNumber": "1",
    "SoftwareVersions": "A1", "EchoTime": 0.08, "PhaseEncodingDirection": "j-",
    "TotalReadoutTime": 0.05, "MagneticFieldStrength": 3,
}


def affine(voxel=(3.0, 3.2, 3.5), turn=(0.0, 0.0, 0.0), det=-1, order=(0, 1, 2)):
    """(4, 4): image axes `order` of the world (x, y, z), turned by degrees, of det's sign."""
    x, y, z = np.radians(turn)
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    rotation = (np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
                @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
                @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]))
    axes = rotation @ np.eye(3)[:, list(order)]
    if np.sign(np.linalg.det(axes)) != det:
        axes[:, 0] *= -1
    out = np.eye(4)
    out[:3, :3] = axes * voxel
    out[:3, 3] = (-20, 11, 7)
    return out


def directions(n, turn=0.0):
    """(n, 3) unit vectors spread over the half sphere (golden spiral), turned about z."""
    i = np.arange(n)
    z = 1 - (i + 0.5) / n
    phi = i * np.pi * (3 - np.sqrt(5)) + turn
    r = np.sqrt(1 - z**2)
    return np.column_stack([r * np.cos(phi), r * np.sin(phi), z])


def table(scheme=SCHEME):
    """bvals (n,) and world axes (n, 3) of ((b, how many), …); b0 volumes have a zero vector."""
    bvals = np.repeat([b for b, _ in scheme], [n for _, n in scheme]).astype(float)
    axes = np.vstack([directions(n, 0.4 * i) if b >= 50 else np.zeros((n, 3))
                      for i, (b, n) in enumerate(scheme)])
    return bvals, axes


def head(shape=SHAPE):
    """(x, y, z) bool ellipsoid that fills most of the grid."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return sum(g**2 for g in grid) < 0.8**2


def signal(rng, bvals, axes, b_delta=1.0, shape=SHAPE, noise=NOISE):
    """(x, y, z, n) float32: the tensor's signal with Rician noise inside `head`, noise outside."""
    along = PARALLEL * (axes @ AXIS)**2 + PERPENDICULAR * (1 - (axes @ AXIS)**2)
    exponent = bvals * ((1 - b_delta) * MD + b_delta * along)
    clean = S0 * head(shape)[..., None] * np.exp(-exponent)
    noisy = np.hypot(clean + noise * rng.standard_normal(clean.shape),
                     noise * rng.standard_normal(clean.shape))
    return noisy.astype(np.float32)


def fsl(axes, matrix):
    """(n, 3) FSL b-vectors of world axes, for an affine without shear."""
    image_axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    vectors = axes @ image_axes
    if np.linalg.det(matrix[:3, :3]) > 0:
        vectors[:, 0] *= -1
    return vectors


def write_run(stem, *, scheme=SCHEME, matrix=None, shape=SHAPE, sidecar=None, b_delta=None, seed=0):
    """STEM_dwi.{nii.gz,bval,bvec,json[,bshape]}; b_delta: one number for all weighted volumes."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    matrix = affine() if matrix is None else matrix
    bvals, axes = table(scheme)
    shapes = np.where(bvals < 50, 1.0, 1.0 if b_delta is None else b_delta)
    data = signal(np.random.default_rng(seed), bvals, axes, shapes, shape)
    image = nib.Nifti1Image(data, matrix)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, f"{stem}_dwi.nii.gz")
    np.savetxt(f"{stem}_dwi.bval", bvals[None], fmt="%g")
    np.savetxt(f"{stem}_dwi.bvec", fsl(axes, matrix).T, fmt="%.9f")
    Path(f"{stem}_dwi.json").write_text(json.dumps(SIDECAR if sidecar is None else sidecar))
    if b_delta is not None:
        np.savetxt(f"{stem}_dwi.bshape", shapes[None], fmt="%g")
    return Path(f"{stem}_dwi.nii.gz")


def damage_header(path, **fields):
    """Fields of a NIfTI header overwritten in the file, as nibabel would not."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)))


def write_dataset(root, participants=("01", "02"), sessions=(None,), runs=("",), rows=None,
                  **options):
    """A dataset with one file per participant, session and run; returns its root.

    runs: the entities between session and suffix, e.g. ("dir-AP", "dir-PA"), or a mapping from
    them to `write_run`'s options. rows: columns of participants.tsv by participant, age and sex if
    none are given. options: for every `write_run`.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "Synthetic heads", "BIDSVersion": "1.10.0"}))
    (root / "README").write_text("Synthetic dMRI with one known tensor; made for tests of QSphere.")
    series = runs if isinstance(runs, dict) else {name: {} for name in runs}
    seed = 0
    for label in participants:
        for session in sessions:
            for name, own in series.items():
                seed += 1
                parts = [f"sub-{label}", f"ses-{session}" if session else "", name]
                folder = root.joinpath(*[p for p in parts[:2] if p], "dwi")
                write_run(folder / "_".join(p for p in parts if p),
                          **{"seed": seed, **options, **own})
    if rows is None:
        rows = {p: {"age": 30 + i, "sex": "FM"[i % 2]} for i, p in enumerate(participants)}
    write_participants(root, rows)
    return root


def write_participants(root, rows):
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["\t".join(["participant_id", *columns])]
    lines += ["\t".join([f"sub-{p}", *(str(row.get(c, "n/a")) for c in columns)])
              for p, row in rows.items()]
    (Path(root) / "participants.tsv").write_text("\n".join(lines) + "\n")
