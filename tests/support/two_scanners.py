"""Six people of two scanners that differ in gain and contrast, as a dataset."""

import nibabel as nib
import numpy as np

LABELS = [f"{i:02}" for i in range(1, 7)]
ROWS = {p: {"age": 20 + 7 * i, "sex": "FM"[i // 2 % 2], "site": "AB"[i % 2]}
        for i, p in enumerate(LABELS)}


def simulate_other_scanner(bids, label):
    """Change a participant's image to that of a scanner with another gain and contrast.

    S/S0 goes through a monotone function, which intensity warping can undo.
    """
    path = bids / f"sub-{label}/dwi/sub-{label}_dwi.nii.gz"
    measured = nib.load(path)
    data = np.asarray(measured.dataobj)
    s0 = data[..., :2].mean(axis=3, keepdims=True)
    bent = 3 * s0 * (data / s0) ** 1.3
    bent[..., :2] = 3 * data[..., :2]
    nib.save(nib.Nifti1Image(bent.astype(np.float32), measured.affine, measured.header), path)
