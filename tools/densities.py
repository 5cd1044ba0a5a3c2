"""Densities of fibres in measured voxels, for train_weights.py --densities.

    python tools/densities.py BIDS_DIR OUT.npy [--slices FROM TO]

Multi-tissue deconvolution (`bidsapp.microstructure.deconvolution`) of the first participant's first
run, in its mask and in slices FROM to TO, TO left out: others then serve as a test. OUT holds
(row, 45) coefficients. 30 ms per voxel.
"""

import argparse
from pathlib import Path

import numpy as np

from bidsapp.anatomy import tissue
from bidsapp.bids import find
from bidsapp.cli import parse
from bidsapp.microstructure.deconvolution import densities
from bidsapp.recipe.steps import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slices", type=int, nargs=2, default=(0, None))
    options = parser.parse_args()
    folder = options.bids_dir.resolve()
    found = find.find_runs(parse([str(folder), str(folder.parent / "out"), "participant"]))
    dwi, _ = load_run(found.runs[found.participants[0]][0])
    regions = tissue.find_regions(dwi, "cpu")
    z = np.argwhere(dwi.mask)[:, 2]
    low, high = options.slices
    wanted = (z >= low) & (z < (dwi.mask.shape[2] if high is None else high))
    rows = densities(dwi, regions.single_fibre, regions.gm, regions.csf, wanted)
    np.save(options.out, rows.numpy())
    print(f"{len(rows)} densities of {int(wanted.sum())} voxels")


if __name__ == "__main__":
    main()
