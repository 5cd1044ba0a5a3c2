"""Simulate a two-site phantom with known truth, process it and harmonize it.

    python tools/demo.py [FOLDER]

The phantom has six people, each scanned at two sites that differ as real sites do, and its images
are raw: distorted, moved, with eddy currents and lost slices. The demo corrects them, estimates
maps and writes a report of every scan, harmonizes the maps by ComBat, trains a harmonizer of the
signal, cross-validated over the people, and applies it to two of them. Last it predicts more
directions for one person.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

PHANTOM = ("--participants", "6", "--sites", "2", "--voxel-size", "5", "--directions", "20",
           "--lesions", "0", "--artifacts", "distortion", "motion", "eddy", "dropout", "skull")
"""Coarse, so that there is time for enough people to learn from and to test."""

MEASURES = {"signal": "signal", "fa": "FA", "md": "MD"}


def run(module: str, *arguments: object) -> int:
    program = {"bidsapp": "qsphere", "bidsapp.cli_phantom": "qsphere-phantom"}[module]
    argv = list(map(str, arguments))
    print("$", program, *argv, flush=True)
    return subprocess.run([sys.executable, "-m", module, *argv], check=False).returncode


def describe_harmonization(group: Path) -> str:
    """Say how the error of people not learned from changed, and what the model warns of."""
    table = pd.read_csv(group / "desc-rish_folds.tsv", sep="\t")
    means = table.groupby("measure")[["nmse_before", "nmse_after"]].mean() * 100
    (card,) = group.glob("models/harmonize_rish_*/model.json")
    return "; ".join(["harmonization, mean square error in people not learned from: " + ", ".join(
        f"{name} {means.nmse_before[key]:.2f} → {means.nmse_after[key]:.2f} %"
        for key, name in MEASURES.items()), *json.loads(card.read_text())["warnings"]])


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").resolve()
    bids, out = folder / "bids", folder / "out"
    marker = folder / ".qsphere-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        print(f"{folder} is not empty and was not written by this demo. Name another folder.",
              file=sys.stderr)
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    code = (run("bidsapp.cli_phantom", bids, *PHANTOM)
            or run("bidsapp", bids, out, "participant")
            or run("bidsapp", bids, out, "group", "--train", "harmonize_combat",
                   "harmonize_rish", "--reference-batch", "siteA", "--folds", 2)
            or run("bidsapp", bids, out, "participant", "--harmonize", "rish",
                   "--participant-label", "01", "02")
            or run("bidsapp", bids, out, "participant", "--estimate", "dti", "--upsample", "scnn",
                   "--target-directions", 40, "--participant-label", "03"))
    if code == 0:
        print("\nmaps:", *sorted(out.glob("sub-*/ses-*/dwi")), sep="\n  ")
        print("\ntruth:", bids / "sourcedata" / "truth", sep="\n  ")
        print("\nreports:", *sorted(out.glob("sub-*.html")), out / "group.html", sep="\n  ")
        print("\n" + describe_harmonization(out / "group"))
    return code


if __name__ == "__main__":
    sys.exit(main())
