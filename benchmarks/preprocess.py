"""The chain of corrections on a phantom with artifacts: the error after each, against the truth.

    python benchmarks/preprocess.py [--snr 15 30] [--voxel-size 3] [--seed 0]

`qsphere-phantom --artifacts` writes raw images of one participant with susceptibility distortion,
motion to 3 mm and 3°, quadratic eddy currents, dropout, Gibbs ringing and a skull, and `qsphere`
corrects them with one more step at a time. Errors are over the true brain mask, against the
noise-free signal without artifacts (`desc-clean_dwi`), after division by the mean b0:

- signal: Σ (S/S0 − truth)² / Σ truth² of the weighted volumes;
- FA, MD: root mean square error of the tensor (b ≤ 1500 s/mm²), MD in 1e-3 mm²/s;
- V1: median angle of the principal direction where the true FA is above 0.3;
- NDC: neighbouring DWI correlation.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import table
import torch

from bidsapp import tensor
from bidsapp.acquisition import Acquisition
from bidsapp.bids import btable
from bidsapp.dwi import Part
from bidsapp.evaluate import quality

STEPS = ("denoise", "gibbs", "distortion", "motion", "bias")
ARTIFACTS = ("distortion", "motion", "eddy", "dropout", "gibbs", "skull")


def run(module, *argv):
    subprocess.run([sys.executable, "-m", module, *map(str, argv)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read(image):
    """Signal (x, y, z, n) and acquisition of an image with its tables."""
    stem = str(image).removesuffix(".nii.gz")
    acquisition = btable.read_acquisition(Part(image, Path(f"{stem}.bval"), Path(f"{stem}.bvec")))
    return np.asarray(nib.load(image).dataobj, np.float32), acquisition


def attenuation(signal, acquisition, mask):
    """(voxel, n) signal over mean b0, and the voxels where that is not too small."""
    inside = signal[mask].astype(np.float64)
    b0 = inside[:, acquisition.b0].mean(axis=1)
    return inside / np.maximum(b0, 1e-3 * b0.max())[:, None]


def fit(attenuated, acquisition: Acquisition):
    selected = np.flatnonzero(acquisition.bvals <= 1500)
    x = tensor.design(acquisition.btensors)[selected]
    values = torch.from_numpy(np.clip(attenuated[:, selected], 1e-4, None).astype(np.float32))
    fitted = tensor.fit(values, x)
    return {k: fitted[k].numpy() for k in ("fa", "md", "direction")}


def errors(image, truth, mask):
    signal, acquisition = read(image)
    clean, felt = truth
    s, t = attenuation(signal, acquisition, mask), attenuation(clean, felt, mask)
    weighted = ~felt.b0
    ours, theirs = fit(s, acquisition), fit(t, felt)
    cosine = np.abs(np.sum(ours["direction"] * theirs["direction"], axis=1)).clip(0, 1)
    white = theirs["fa"] > 0.3
    correlations = quality.neighbouring_correlations(signal[mask], acquisition)
    return [np.sum((s - t)[:, weighted]**2) / np.sum(t[:, weighted]**2),
            np.sqrt(np.mean((ours["fa"] - theirs["fa"])**2)),
            1e3 * np.sqrt(np.mean((ours["md"] - theirs["md"])**2)),
            np.degrees(np.median(np.arccos(cosine[white]))), np.nanmean(correlations)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snr", type=float, nargs="+", default=[15.0, 30.0])
    parser.add_argument("--voxel-size", type=float, default=3.0)
    parser.add_argument("--directions", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    table.add_option(parser)
    args = parser.parse_args()
    rows = []
    for snr in args.snr:
        with tempfile.TemporaryDirectory() as folder:
            bids = Path(folder, "bids")
            run("bidsapp.cli_phantom", bids, "--participants", 1, "--sites", 1, "--snr", snr,
                "--voxel-size", args.voxel_size, "--directions", args.directions, "--shells",
                1000, 3000, "--random-seed", args.seed, "--artifacts", *ARTIFACTS)
            (raw,) = bids.glob("sub-*/**/dwi/*_dwi.nii.gz")
            (clean,) = bids.glob("sourcedata/truth/**/*desc-clean_dwi.nii.gz")
            (brain,) = bids.glob("sourcedata/truth/**/dwi/*desc-brain_mask.nii.gz")
            mask, truth = np.asarray(nib.load(brain).dataobj) > 0, read(clean)
            for k in range(len(STEPS) + 1):
                image = raw
                if k:
                    out = Path(folder, f"out{k}")
                    run("bidsapp", bids, out, "participant", "--preprocess", *STEPS[:k],
                        "--estimate", "dti")
                    (image,) = out.glob("sub-*/**/*_desc-preproc_dwi.nii.gz")
                values = errors(image, truth, mask)
                rows.append([f"{snr:g}", "none" if not k else f"+ {STEPS[k - 1]}",
                             *(f"{v:.3g}" for v in values)])
                print(rows[-1], file=sys.stderr, flush=True)
    table.show("preprocess", rows, args.csv)


if __name__ == "__main__":
    main()
