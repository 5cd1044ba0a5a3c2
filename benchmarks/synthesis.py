"""Quality of synthetic signals: the autoencoder's errors on measured signals, mode by mode.

    python benchmarks/synthesis.py DATASET [DATASET ...] [--threads 2] [--seed 0]

Of each BIDS dataset the first participant's first run is used. Errors are those of the report:
S/S0, FA, MD and main direction (FA > 0.2 as measured) of one tensor through all volumes, of all
voxels of the mask that have signal at b = 0. The published ones are of other participants.
"""

import argparse
import time
import warnings
from pathlib import Path

import table
import torch

from bidsapp import methods
from bidsapp.bids.find import find_runs
from bidsapp.cli import parse
from bidsapp.dwi import Dwi
from bidsapp.options import MODES
from bidsapp.recipe.steps import load_run

PUBLISHED = (
    ("published, 2.4 mm: multi-tensor modes", "0.014", "0.0075", "–"),
    ("published, 2.4 mm: random-wm", "–", "0.17", "42.4"),
    ("published, 1.25 mm: multi-tensor modes", "0.037", "0.0104", "–"),
    ("published, 1.25 mm: random-wm", "–", "0.22", "42.7"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    table.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = []
    for folder in options.datasets:
        dwi = load_first_run(folder.resolve())
        shells = ", ".join(f"{len(s)} at b = {s.b:.0f}" for s in dwi.acquisition.shells)
        start = time.perf_counter()
        made = methods.get("synthesize").synthesize(dwi, MODES, options.seed, "cpu")
        print(f"{folder.name}: {shells}; {len(dwi.signal)} voxels; "
              f"{time.perf_counter() - start:.1f} s\n"
              f"{'':<40}{'S/S0':>16}{'FA':>16}{'MD, µm²/ms':>18}{'direction, °':>16}")
        for name, score in made.scores.items():
            pairs = [f"{score[f'{k}_error'] * unit:.4f} ± {score[f'{k}_error_sd'] * unit:.4f}"
                     for k, unit in (("signal", 1), ("fa", 1), ("md", 1e3))]
            angle = f"{score['direction_error']:.1f} ± {score['direction_error_sd']:.1f}"
            print(f"{name:<40}{pairs[0]:>16}{pairs[1]:>16}{pairs[2]:>18}{angle:>16}")
            label = "noise alone" if name == "noise" else name
            rows.append([f"{folder.name} ({shells}): {label}" if name == MODES[0] else label,
                         f"{score['signal_error']:.3f}", f"{score['fa_error']:.3g}",
                         f"{1e3 * score['md_error']:.3f}", f"{score['direction_error']:.1f}"])
        for name, signal, fa, angle in PUBLISHED:
            print(f"{name:<40}{signal:>16}{fa:>16}{'–':>18}{angle:>16}")
    rows += [[name, signal, fa, "", angle] for name, signal, fa, angle in PUBLISHED]
    table.show("synthesis", rows, options.csv)


def load_first_run(folder: Path) -> Dwi:
    """Load the signal of the first run of the first participant of a dataset."""
    inventory = find_runs(parse([str(folder), str(folder.parent / "out"), "participant"]))
    return load_run(inventory.runs[inventory.participants[0]][0])[0]


if __name__ == "__main__":
    main()
