"""Simulate a two-site phantom with known truth, process it and harmonize it.

    python tools/demo.py [FOLDER]

The phantom has four people, each scanned at two sites that differ as real sites do. The demo
estimates maps and writes a report of every scan, harmonizes the maps by ComBat, trains a small
harmonizer of the signal across the sites, and applies it to one participant.
"""

import shutil
import subprocess
import sys
from pathlib import Path

STEPS = 200
"""Training steps of each stage, which take about a minute."""

PHANTOM = ("--participants", "4", "--sites", "2", "--voxel-size", "4", "--directions", "20")


def run(module: str, *arguments: object) -> int:
    program = {"bidsapp": "qsphere", "bidsapp.cli_phantom": "qsphere-phantom"}[module]
    argv = list(map(str, arguments))
    print("$", program, *argv, flush=True)
    return subprocess.run([sys.executable, "-m", module, *argv], check=False).returncode


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
            or run("bidsapp", bids, out, "participant", "--derivatives",
                   f"masks={bids / 'derivatives' / 'masks'}")
            or run("bidsapp", bids, out, "group", "--train", "harmonize_combat",
                   "harmonize_shresnet", "--reference-batch", "siteA", "--max-steps", STEPS)
            or run("bidsapp", bids, out, "participant", "--derivatives",
                   f"masks={bids / 'derivatives' / 'masks'}", "--harmonize", "shresnet",
                   "--participant-label", "01"))
    if code == 0:
        print("\nmaps:", *sorted(out.glob("sub-*/ses-*/dwi")), sep="\n  ")
        print("\ntruth:", bids / "sourcedata" / "truth", sep="\n  ")
        print("\nreports:", *sorted(out.glob("sub-*.html")), out / "group.html", sep="\n  ")
    return code


if __name__ == "__main__":
    sys.exit(main())
