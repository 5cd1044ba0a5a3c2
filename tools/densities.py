"""Estimate fibre orientation densities of measured voxels, for train_weights.py --densities.

    python tools/densities.py BIDS_DIR OUT.npy [--slices FROM TO]

Multi-tissue deconvolution (`bidsapp.microstructure.deconvolution`) of the first run of the first
participant, within its mask. --slices limits it to the slices FROM to TO − 1, so that other slices
can serve as a test. OUT holds (row, 45) coefficients. A voxel takes 30 ms.
"""

import argparse
from pathlib import Path

import numpy as np

from bidsapp.anatomy import tissue
from bidsapp.bids import find
from bidsapp.cli import parse
from bidsapp.microstructure.deconvolution import deconvolve
from bidsapp.recipe.steps import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slices", type=int, nargs=2, default=(0, None))
    options = parser.parse_args()
    folder = options.bids_dir.resolve()
    inventory = find.find_runs(parse([str(folder), str(folder.parent / "out"), "participant"]))
    dwi, _ = load_run(inventory.runs[inventory.participants[0]][0])
    regions = tissue.find_regions(dwi, "cpu")
    z = np.argwhere(dwi.mask)[:, 2]
    first, end = options.slices
    selected = (z >= first) & (z < (dwi.mask.shape[2] if end is None else end))
    rows = deconvolve(dwi, regions.single_fibre, regions.gm, regions.csf, selected)
    np.save(options.out, rows.numpy())
    print(f"{len(rows)} densities of {int(selected.sum())} voxels")


if __name__ == "__main__":
    main()
