"""Draw docs/harmonization.png: one simulated person before and after harmonization.

    python docs/picture.py FOLDER

Five people are simulated at two sites in FOLDER. A harmonizer learns from four of them and is
applied to the fifth, whom it has not seen. The picture shows that person's mean diffusivity, and
its error against the same fit of what the reference site would have measured without noise. What
FOLDER already holds is not made again.
"""

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from dipy.core.gradients import gradient_table
from dipy.reconst.dti import TensorModel
from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "harmonization.png"
SCALE = 1e3
"""mm²/s → µm²/ms."""


def process(folder: Path) -> None:
    """Simulate, process, train and harmonize in `folder`, unless that was done."""
    bids, out = folder / "bids", folder / "out"
    masks = ["--derivatives", f"masks={bids / 'derivatives' / 'masks'}"]
    if not bids.exists():
        run("bidsapp.cli_phantom", bids, "--participants", 5, "--sites", 2, "--random-seed", 0)
    run("bidsapp", bids, out, "participant", "--estimate", "dti", *masks)
    run("bidsapp", bids, out, "group", "--train", "harmonize_hybrid", "--reference-batch", "siteA",
        "--participant-label", "01", "02", "03", "04", "--max-steps", 1000)
    run("bidsapp", bids, out, "participant", "--estimate", "dti", "--participant-label", "05",
        "--harmonize", "harmonize_hybrid", *masks)


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def read(file: Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj, dtype=float)


def reference(folder: Path, mask: np.ndarray) -> np.ndarray:
    """Mean diffusivity (mm²/s) of the noise-free scan of the reference site, b up to 1500 s/mm²."""
    image = next(folder.glob("*_desc-reference_dwi.nii.gz"))
    bvals, bvecs = (np.loadtxt(str(image).replace(".nii.gz", end)) for end in (".bval", ".bvec"))
    used = bvals < 1500
    table = gradient_table(bvals[used], bvecs=bvecs[:, used].T)
    fitted = np.zeros(mask.shape)
    fitted[mask] = TensorModel(table, fit_method="WLS").fit(read(image)[mask][:, used]).md
    return fitted


def draw(folder: Path) -> None:
    """Draw the maps of participant 05 at site B, and print their errors."""
    dwi = folder / "out" / "sub-05" / "ses-siteB" / "dwi"
    name = "sub-05_ses-siteB"
    mask = read(dwi / f"{name}_desc-brain_mask.nii.gz") > 0
    known = folder / "bids/sourcedata/truth/sub-05/ses-siteB/dwi"
    truth = SCALE * reference(known, mask)
    measured, harmonized, error = (
        SCALE * read(dwi / f"{name}_model-tensor_param-md{end}_dwimap.nii.gz")
        for end in ("", "_desc-harmonized", "_stat-std"))
    places = {"brain": mask, **{
        tissue: mask & (read(known / f"{name}_label-{tissue}_probseg.nii.gz") > 0.8)
        for tissue in ("WM", "GM", "CSF")}}
    for place, inside in places.items():
        for what, values in (("measured", measured), ("harmonized", harmonized)):
            difference = (values - truth)[inside]
            print(f"{place}, {what}: "
                  f"NMSE {100 * (difference**2).sum() / (truth[inside]**2).sum():.3f} %, "
                  f"bias {100 * difference.mean() / truth[inside].mean():+.2f} %")

    figure = Figure(figsize=(8, 5.6), layout="constrained", facecolor="white")
    rows = [[("measured at site B", measured), ("harmonized to site A", harmonized),
             ("site A, without noise", truth)],
            [("error as measured", measured - truth), ("error after harmonization",
                                                       harmonized - truth),
             ("standard error as measured", error)]]
    cut = np.s_[:, :, mask.shape[2] // 2]
    box = tuple(slice(k.min(), k.max() + 1) for k in np.nonzero(mask[cut]))
    for axes, (title, values) in zip(figure.subplots(2, 3).flat, rows[0] + rows[1], strict=True):
        shown = np.where(mask, values, np.nan)[cut][box].T
        signed = title.startswith("error")
        low, high, colours = ((-0.2, 0.2, "RdBu_r") if signed else
                              (0, 0.1, "magma") if "standard" in title else (0, 2, "gray"))
        drawn = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, origin="lower")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, shrink=0.75)
    figure.suptitle("Mean diffusivity, µm²/ms", fontsize=11)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    work = Path(sys.argv[1]).resolve()
    process(work)
    draw(work)
