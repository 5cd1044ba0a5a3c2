"""The brain mask beside DIPY's median-Otsu: overlap (Dice) and time, for every run of datasets.

    python benchmarks/mask.py BIDS_DIR [BIDS_DIR ...] [--overlays FOLDER]

Both masks are of the mean b0, the largest component, with holes filled slice by slice. Times are
the processor seconds of the shorter of two calls, one after the other in one process.
"""

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import table
from dipy.segment.mask import clean_cc_mask
from dipy.segment.mask import median_otsu as dipy_median_otsu
from scipy.ndimage import binary_fill_holes

from bidsapp.anatomy.mask import RADIUS, median_otsu


def dipy_mask(mean_b0):
    """(x, y, z) bool: the mask as DIPY makes it."""
    _, mask = dipy_median_otsu(mean_b0, median_radius=RADIUS, numpass=1)
    mask = clean_cc_mask(mask) if mask.any() else mask
    return np.stack([binary_fill_holes(k) for k in np.moveaxis(mask, 2, 0)], axis=2).astype(bool)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def mean_b0(path):
    """(x, y, z) float32: mean of the volumes below 50 s/mm², NaN and infinite values as 0."""
    bvals = np.loadtxt(path.with_name(path.name.replace(".nii.gz", ".bval"))).ravel()
    signal = np.asarray(nib.load(path).dataobj, np.float32)[..., bvals < 50]
    return np.where(np.isfinite(signal), signal, 0).mean(axis=-1)


def timed(function, image):
    """Call a function twice: its result, and the processor seconds of the faster of two calls."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        mask = function(image)
        seconds.append(time.process_time() - start)
    return mask, min(seconds)


def overlay(path, image, masks):
    """Slices of an image with the outline of each mask, by colour."""
    from matplotlib.figure import Figure

    slices = np.unique(np.linspace(0, image.shape[2] - 1, 8).astype(int))
    figure = Figure(figsize=(2 * len(slices), 2.2), layout="tight")
    for k, axes in zip(slices, figure.subplots(1, len(slices), squeeze=False)[0], strict=True):
        axes.imshow(image[..., k].T, origin="lower", cmap="gray", vmax=np.percentile(image, 99.5))
        axes.set_axis_off()
        for width, (colour, mask) in zip((2, 0.8), masks.items(), strict=True):
            if mask[..., k].any() and not mask[..., k].all():
                axes.contour(mask[..., k].T, [0.5], colors=colour, linewidths=width)
    figure.savefig(path, dpi=80)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("bids_dir", type=Path, nargs="+")
    p.add_argument("--overlays", type=Path, help="folder for a PNG per run: DIPY's mask in cyan")
    table.add_option(p)
    args = p.parse_args()
    median_otsu(np.pad(np.ones((9, 9, 9), np.float32), 9))  # imports
    rows = []
    for root in args.bids_dir:
        grids, dices, olds, news = [], [], [], []
        for path in sorted(root.glob("sub-*/**/dwi/*_dwi.nii.gz")):
            image, run = mean_b0(path), path.name.removesuffix("_dwi.nii.gz")
            (theirs, old), (ours, new) = timed(dipy_mask, image), timed(median_otsu, image)
            grids.append("×".join(map(str, image.shape)))
            dices.append(dice(theirs, ours))
            olds.append(old)
            news.append(new)
            print(f"{root.name} {run}, {grids[-1]}: Dice {dices[-1]:.4f}; DIPY {old:.2f} s, "
                  f"mask.py {new:.2f} s, {old / new:.1f} times", flush=True)
            if args.overlays:
                overlay(args.overlays / f"{root.name}_{run}.png", image,
                        {"cyan": theirs, "red": ours})
        if grids:
            ratios = [a / b for a, b in zip(olds, news, strict=True)]
            rows.append([root.name, str(len(grids)), ", ".join(dict.fromkeys(grids)),
                         f"{min(dices):.4f}", table.interval(olds), table.interval(news),
                         table.interval(ratios, ".1f")])
    table.show("mask", rows, args.csv)


if __name__ == "__main__":
    main()
