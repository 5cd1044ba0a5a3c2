"""Susceptibility field: error against a simulated truth, agreement of a real pair, and time.

    python benchmarks/distortion.py [--pyhysco PYTHON] [--unpile PYTHON] [--figure PNG]
    python benchmarks/distortion.py --smoothness

The simulated heads (72 × 72 × 39, 3 mm) are formulas: folded tissue, and the dipole fields of air
spheres at the sinus and the ears with a quadratic shim. Each line is sampled at eight points per
voxel, whose signal is moved to where the field puts it and summed per voxel, so that nothing of the
correction is used. Peers run in the Python of their own environments.
"""

import argparse
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import peer
import table
import torch
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import Acquisition, PhaseEncoding
from bidsapp.anatomy import t1w
from bidsapp.anatomy.mask import median_otsu
from bidsapp.dwi import Dwi
from bidsapp.preprocess import distortion

SHAPE, SIZE, READOUT = (72, 72, 39), 3.0, 0.0475
FINE = 8
SPHERES = (((0, 62, -34), 13.0, 110.0), ((46, -12, -38), 9.0, 90.0), ((-46, -12, -38), 9.0, 90.0))
"""Centres and radii (mm) of the air spheres, and the field at their surfaces (Hz)."""

AFFINE = np.diag([-SIZE, SIZE, SIZE, 1.0])
AFFINE[:3, 3] = -AFFINE[:3, :3] @ (np.array(SHAPE) - 1) / 2


def field(x):
    """Field (Hz) at world points (…, 3): dipoles, and a shim."""
    h = 8 + 0.12 * x[..., 0] + 0.15 * x[..., 1] - 25 * (x[..., 2] / 60) ** 2
    for centre, radius, strength in SPHERES:
        d = x - centre
        r = np.sqrt((d**2).sum(-1)).clip(radius)
        h = h + strength / 2 * (radius / r) ** 3 * (3 * (d[..., 2] / r) ** 2 - 1)
    return h


def step(distance, width=1.0):
    return 1 / (1 + np.exp(-(distance / width).clip(-40, 40)))


def tissue(x):
    """b0 signal at world points (…, 3), white matter 1: folded cortex, ventricles and air."""
    a, b, c = x[..., 0], x[..., 1], x[..., 2]
    r = np.sqrt((a / 68) ** 2 + (b / 84) ** 2 + (c / 58) ** 2)
    folds = np.sin(0.24 * a + 1) * np.sin(0.21 * b) + np.sin(0.26 * c) * np.cos(0.23 * a - 0.1 * b)
    brain = step((1 - r) * 65)
    white = step((0.84 - 0.08 * folds - r) * 65)
    sulci = step((r - 0.9 + 0.05 * folds) * 65) * brain
    ventricle = step((1 - np.sqrt(((abs(a) - 12) / 8) ** 2 + (b / 34) ** 2
                                  + ((c - 8) / 12) ** 2)) * 8)
    nuclei = step((1 - np.sqrt(((abs(a) - 24) / 8) ** 2 + ((b - 6) / 18) ** 2
                               + (c / 12) ** 2)) * 8)
    scalp = step((1.16 - r) * 65) * step((r - 1.07) * 65)
    s = brain * (1.35 - 0.35 * white + 1.1 * sulci) + 0.15 * nuclei + 2 * ventricle + 0.4 * scalp
    for centre, radius, _ in SPHERES:
        s = s * step(np.sqrt(((x - centre) ** 2).sum(-1)) - radius)
    return s * (1 + 0.002 * b + 0.001 * c)


def world(shape, affine, axis=1, fine=1):
    """World points of the voxels, with `fine` points per voxel along an axis."""
    index = [np.arange(n, dtype=float) for n in shape]
    index[axis] = (np.arange(shape[axis] * fine) + 0.5) / fine - 0.5
    return np.stack(np.meshgrid(*index, indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


def acquire(shape, affine, encoding, move=None):
    """EPI of the head, its signal moved along the phase axis and summed per voxel."""
    axis = encoding.axis
    x = world(shape, affine, axis, FINE)
    if move is not None:
        back = np.linalg.inv(move)
        x = x @ back[:3, :3].T + back[:3, 3]
    n = shape[axis]
    at = ((np.arange(n * FINE) + 0.5) / FINE - 0.5).reshape([-1 if a == axis else 1
                                                            for a in range(3)])
    to = np.moveaxis(at + encoding.sign * encoding.readout * field(x), axis, -1).reshape(-1, n
                                                                                        * FINE)
    mass = np.moveaxis(tissue(x), axis, -1).reshape(to.shape) / FINE
    # a point of signal is a box of its own width, shared by the two voxels that it touches
    low = np.floor(to + 0.5 - 0.5 / FINE).astype(int)
    over = ((to + 0.5 + 0.5 / FINE - (low + 1)) * FINE).clip(0, 1)
    out = np.zeros((len(to), n + 2))
    line = np.arange(len(to))[:, None]
    for cell, part in ((low, mass * (1 - over)), (low + 1, mass * over)):
        np.add.at(out, (line, (cell + 1).clip(0, n + 1)), part)
    rest = [m for a, m in enumerate(shape) if a != axis]
    return np.moveaxis(out[:, 1:-1].reshape(*rest, n), -1, axis)


def noisy(image, snr, rng):
    sd = 1 / snr
    return np.hypot(image + rng.normal(0, sd, image.shape), rng.normal(0, sd, image.shape))


def moved(degrees, mm):
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    move[:3, 3] = mm
    return move


PYHYSCO = """
import re, subprocess, sys, tempfile, time
from pathlib import Path
import nibabel as nib, numpy as np
given = np.load(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    for name in ("first", "second"):
        nib.save(nib.Nifti1Image(given[name].astype(np.float32), given["affine"]),
                 f"{folder}/{name}.nii.gz")
    done = subprocess.run([Path(sys.executable).parent / "pyhysco", "--output_dir", f"{folder}/",
                           f"{folder}/first.nii.gz", f"{folder}/second.nii.gz", "2"],
                          check=True, capture_output=True, text=True)
    faces = nib.load(f"{folder}/-EstFieldMap.nii.gz").get_fdata()  # mm at the faces of the voxels
    minutes, rest = re.search(r"total runtime:\\s*(\\d+) min ([\\d.]+) sec", done.stdout).groups()
size = np.linalg.norm(given["affine"][:3, 1])
np.savez(sys.argv[2], hz=(faces[:, 1:] + faces[:, :-1]) / 2 / size / float(given["readout"]),
         seconds=60 * int(minutes) + float(rest))
"""

UNPILE = """
import resource, subprocess, sys, tempfile
from pathlib import Path
import nibabel as nib, numpy as np
given = np.load(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    for name in ("first", "second", "mask"):
        nib.save(nib.Nifti1Image(given[name].astype(np.float32), given["affine"]),
                 f"{folder}/{name}.nii.gz")
    subprocess.run([Path(sys.executable).parent / "unpile", "fit", "--epi",
                    f"{folder}/first.nii.gz", "--reverse-epi", f"{folder}/second.nii.gz", "--mask",
                    f"{folder}/mask.nii.gz", "--out", f"{folder}/out", "--total-readout-time",
                    str(float(given["readout"])), "--pe-dir", "j", "--blip-gain", "--threads", "1"],
                   check=True, capture_output=True)
    hz = nib.load(next(Path(folder, "out").glob("field_hz.nii*"))).get_fdata()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
np.savez(sys.argv[2], hz=hz.reshape(hz.shape[:3]), seconds=usage.ru_utime + usage.ru_stime)
"""


def ours(first, second, affine, encodings, mask):
    del mask
    start = time.process_time()
    result = distortion.field_from_pair(first, second, affine, *encodings)
    return result.hz, result.move, time.process_time() - start


def of_peer(python, script):
    def method(first, second, affine, encodings, mask):
        done = peer.run(python, script, first=first, second=second, affine=affine, mask=mask,
                        readout=np.array(encodings[0].readout))
        return done["hz"].astype(np.float32), np.eye(4), float(done["seconds"])
    return method


def nothing(first, second, affine, encodings, mask):
    return np.zeros(first.shape, np.float32), np.eye(4), None


def row(case, name, method, pair, affine, encodings, mask, truth=None, brain=None):
    hz, move, seconds = method(*pair, affine, encodings, mask)
    restored = [distortion.undistort(image, hz, affine, encoding, m)
                for image, encoding, m in zip(pair, encodings, (None, move), strict=True)]
    slope = np.gradient(encodings[0].readout * hz, axis=encodings[0].axis)[mask]
    errors, nmse = "", ""
    if truth is not None:
        error = encodings[0].readout * (hz - truth[0])[brain]
        errors = f"{np.sqrt((error**2).mean()):.3f} ({np.median(abs(error)):.3f})"
        missed = ((restored[0] - truth[1])[brain] ** 2).sum() / (truth[1][brain] ** 2).sum()
        nmse = f"{100 * missed:.2f}"
    return [case, name, errors, f"{np.corrcoef(*(i[mask] for i in restored))[0, 1]:.4f}", nmse,
            f"{slope.std():.3f}", f"{1 - abs(slope).max():.2f}",
            "" if seconds is None else f"{seconds:.1f}"], hz, restored


def simulated(methods, rng):
    encodings = PhaseEncoding(1, 1, READOUT), PhaseEncoding(1, -1, READOUT)
    points = world(SHAPE, AFFINE)
    truth = field(points), tissue(points)
    r = np.sqrt(sum((points[..., k] / n) ** 2 for k, n in enumerate((68, 84, 58))))
    brain = (r < 1) & (truth[1] > 0.5)
    steep = np.gradient(READOUT * truth[0], axis=1)[brain]
    shift = READOUT * truth[0][brain]
    print(f"simulated: displacement {np.sqrt((shift**2).mean()):.2f} voxels RMS in the brain, at "
          f"most {abs(shift).max():.1f}; SD of its slope {steep.std():.3f}, min 1 + slope "
          f"{1 - abs(steep).max():.2f}")
    first = acquire(SHAPE, AFFINE, encodings[0])
    for name, move in (("simulated", None), ("simulated, 2° and 2.5 mm between",
                                             moved((2, -1.5, 2), (1.5, 0, -2)))):
        second = acquire(SHAPE, AFFINE, encodings[1], move)
        pair = noisy(first, 30, rng), noisy(second, 30, rng)
        for label, method in methods.items():
            if move is None or not label.startswith("unpile"):
                yield row(name, label, method, pair, AFFINE, encodings, brain, truth, brain)[0]


def smoothness(rng):
    """Error of the displacement (voxels, RMS) by α and SNR."""
    encodings = PhaseEncoding(1, 1, READOUT), PhaseEncoding(1, -1, READOUT)
    points = world(SHAPE, AFFINE)
    truth, signal = field(points), tissue(points)
    r = np.sqrt(sum((points[..., k] / n) ** 2 for k, n in enumerate((68, 84, 58))))
    brain = (r < 1) & (signal > 0.5)
    clean = [acquire(SHAPE, AFFINE, e) for e in encodings]
    pairs = {snr: [noisy(i, snr, rng) for i in clean] for snr in (10, 20, 40)}
    for alpha in (0.005, 0.02, 0.05, 0.1, 0.3, 1.0):
        cells = []
        for pair in pairs.values():
            hz = distortion.field_from_pair(*pair, AFFINE, *encodings, smoothness=alpha).hz
            cells.append(f"{READOUT * np.sqrt(((hz - truth)[brain]**2).mean()):.3f}")
        yield [f"{alpha:g}", *cells]


def mean_b0(stem):
    image = nib.load(f"{stem}_dwi.nii.gz")
    b0 = np.loadtxt(f"{stem}_dwi.bval") < 50
    return np.asarray(image.dataobj, np.float32)[..., b0].mean(-1), image.affine


CANON = "canon_retest/sub-01/ses-{0}/dwi/sub-01_ses-{0}_acq-ortho_dir-"
REAL = (("siemens_xa30", "siemens_xa30/sub-01/dwi/sub-01_dir-", 0.0475693),
        ("uih_dti16", "uih_dti16/sub-02/dwi/sub-02_acq-ortho_dir-", 0.021),
        ("canon_retest v60d1", CANON.format("v60d1"), 0.03),
        ("canon_retest v61", CANON.format("v61"), 0.03))
"""Pairs (PA, AP) and readout times; canon_retest states none, so that its Hz have no meaning."""


def real(methods, folder, figure):
    for name, stem, readout in REAL:
        (first, affine), (second, _) = (mean_b0(folder / (stem + d)) for d in ("PA", "AP"))
        encodings = PhaseEncoding(1, 1, readout), PhaseEncoding(1, -1, readout)
        given = (first, second), affine, encodings, median_otsu((first + second) / 2)
        if name != "siemens_xa30":
            for label in ("nothing", "ours"):
                yield row(name, label, methods[label], *given)[0]
            continue
        maps = {"GRE map": of_map, "T1w": of_t1w}
        others = {label: partial(single, function(folder, *given))
                  for label, function in maps.items()}
        fields = {}
        for label, method in (methods | others).items():
            cells, fields[label], restored = row(name, label, method, *given)
            yield cells
            if figure and label == "ours":
                draw(figure, given[0], restored, fields[label])
        for a, b in combinations([f for f in fields if f != "nothing"], 2):
            compare(f"{a} and {b}", fields[a][given[-1]] - fields[b][given[-1]],
                    np.corrcoef(fields[a][given[-1]], fields[b][given[-1]])[0, 1])
        compare("nothing and ours", fields["ours"][given[-1]], np.nan)


def compare(name, difference, correlation):
    middle = np.median(difference)
    whole, rest = (np.sqrt((d**2).mean()) for d in (difference, difference - middle))
    print(f"fields of {name}: r = {correlation:.3f}, {whole:.1f} Hz RMS, {rest:.1f} Hz without the "
          f"median {middle:+.1f} Hz")


def single(function, *_):
    """A method of `row` for a field of one image."""
    start = time.process_time()
    hz = function().hz
    return hz, np.eye(4), time.process_time() - start


def of_map(folder, pair, affine, encodings, mask):
    del mask
    stem = folder / "siemens_xa30/sub-01/fmap/sub-01_"
    phase, magnitude = (nib.load(f"{stem}{n}.nii.gz") for n in ("phasediff", "magnitude2"))
    images = [np.asarray(i.dataobj, np.float32) for i in (phase, magnitude)]
    return lambda: distortion.field_from_gre(
        "phasediff", images[:1], images[1], phase.affine, pair[0], affine, encodings[0],
        echo_times=(0.01, 0.01246))


def of_t1w(folder, pair, affine, encodings, mask):
    del mask
    stem = folder / "siemens_xa30/sub-01/dwi/sub-01_dir-PA_dwi"
    acquisition = Acquisition(np.loadtxt(f"{stem}.bval"), np.loadtxt(f"{stem}.bvec").T)
    brain = median_otsu(pair[0])
    signal = np.asarray(nib.load(f"{stem}.nii.gz").dataobj, np.float32)[brain]
    anatomy = t1w.register(Dwi(signal, brain, affine, acquisition),
                           folder / "siemens_xa30/sub-01/anat/sub-01_T1w.nii.gz")
    return lambda: distortion.field_from_t1w(
        pair[0], affine, encodings[0], np.where(anatomy.brain, anatomy.image, 0),
        np.linalg.inv(anatomy.transform) @ anatomy.affine, brain)


def draw(path, pair, restored, hz):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 5, figsize=(15, 9))
    top = np.percentile(pair[0], 99.5)
    for line, cut in zip(axes, (np.s_[:, :, 10], np.s_[:, :, 20], np.s_[36]), strict=True):
        for axis, image, title in zip(line, (*pair, *restored, hz), (
                "PA", "AP", "PA corrected", "AP corrected", "field, Hz"), strict=True):
            scale = ({"cmap": "RdBu_r", "vmin": -80, "vmax": 80} if title == "field, Hz" else
                     {"cmap": "gray", "vmin": 0, "vmax": top})
            axis.imshow(image[cut].T, origin="lower", **scale)
            axis.set(title=title, xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pyhysco", type=Path, help="Python of an environment with PyHySCO")
    parser.add_argument("--unpile", type=Path, help="Python of an environment with unpile")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--figure", type=Path, help="PNG of the pair of siemens_xa30")
    parser.add_argument("--smoothness", action="store_true", help="errors by α instead")
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if options.smoothness:
        table.show("distortion_smoothness", list(smoothness(rng)), options.csv)
        return
    methods = {"nothing": nothing, "ours": ours}
    for name, python, script in (("PyHySCO 0.0.4", options.pyhysco, PYHYSCO),
                                 ("unpile 0.2.0", options.unpile, UNPILE)):
        if python:
            methods[name] = of_peer(python, script)
    rows = list(simulated(methods, rng))
    if options.data.is_dir():
        rows += real(methods, options.data, options.figure)
    table.show("distortion", rows, options.csv)


if __name__ == "__main__":
    main()
