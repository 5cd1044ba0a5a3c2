"""A small BIDS dataset from the real crops in dipy's wheel, processed as a stranger would.

    python tools/demo.py [FOLDER]

sub-01 is one shell (64 directions, b 1000), so that `smt` is refused and says why; sub-02 is a
q-space grid with several b-values. The crops lie inside the brain, so their masks are given.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from dipy.data import get_fnames

CROPS = {"01": ("small_64D", 1), "02": ("small_101D", 2)}


def write_dataset(bids: Path) -> None:
    """Raw DWI of two participants, and masks as a derivatives dataset."""
    masks = bids / "derivatives" / "masks"
    for label, (crop, seconds) in CROPS.items():
        stem = f"sub-{label}/dwi/sub-{label}"
        image, bval, bvec = get_fnames(name=crop)
        (bids / stem).parent.mkdir(parents=True)
        (masks / stem).parent.mkdir(parents=True)
        source = nib.load(image)
        signal = np.asarray(source.dataobj)
        dwi = nib.Nifti1Image(signal, source.affine)
        dwi.header.set_xyzt_units("mm", "sec")
        dwi.header.set_zooms((*source.header.get_zooms()[:3], seconds))
        nib.save(dwi, bids / f"{stem}_dwi.nii.gz")
        np.savetxt(bids / f"{stem}_dwi.bval", np.loadtxt(bval)[None], fmt="%g")
        bvecs = np.nan_to_num(np.loadtxt(bvec))
        np.savetxt(bids / f"{stem}_dwi.bvec",
                   bvecs if len(bvecs) == 3 else bvecs.T, fmt="%.6f")
        (bids / f"{stem}_dwi.json").write_text(json.dumps(
            {"RepetitionTime": seconds, "PhaseEncodingDirection": "j"}))
        nib.save(nib.Nifti1Image((signal[..., 0] > 0).astype("uint8"), source.affine),
                 masks / f"{stem}_desc-brain_mask.nii.gz")
    description = {"Name": "Real crops from dipy's wheel", "BIDSVersion": "1.10.0"}
    (bids / "dataset_description.json").write_text(json.dumps(
        {**description, "DatasetType": "raw", "License": "BSD-3-Clause"}))
    (masks / "dataset_description.json").write_text(json.dumps(
        {**description, "DatasetType": "derivative", "GeneratedBy": [{"Name": "demo"}]}))
    (bids / "README").write_text("Crops of two real brains, from the dipy package.\n")
    (bids / "participants.tsv").write_text(
        "participant_id\tsite\nsub-01\tA\nsub-02\tB\n")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").resolve()
    bids, out = folder / "bids", folder / "out"
    mark = folder / ".qsphere-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        print(f"{folder} is not empty and no earlier demo; give another folder.", file=sys.stderr)
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()
    write_dataset(bids)
    command = [sys.executable, "-m", "bidsapp", str(bids), str(out), "participant",
               "--derivatives", f"masks={bids / 'derivatives' / 'masks'}"]
    print("$ qsphere", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        print("\nmaps:", *sorted(out.glob("sub-*/dwi/*_dwimap.nii.gz")), sep="\n  ")
        print("\nreports:", *sorted(out.glob("sub-*.html")), sep="\n  ")
    return code


if __name__ == "__main__":
    sys.exit(main())
