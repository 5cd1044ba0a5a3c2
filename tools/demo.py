"""A two-site phantom with known truth, processed and harmonized as a stranger would.

    python tools/demo.py [FOLDER]

Four people, each scanned at two sites that differ as real ones do; maps and a report of every scan;
ComBat of the maps, and a small harmonizer of the signal, trained across the sites; its application.
"""

import shutil
import subprocess
import sys
from pathlib import Path

STEPS = 200
"""Of each stage of a training: a minute's worth."""

PHANTOM = ("--participants", "4", "--sites", "2", "--voxel-size", "4", "--directions", "20")


def run(module: str, *arguments: object) -> int:
    name = {"bidsapp": "qsphere", "bidsapp.cli_phantom": "qsphere-phantom"}[module]
    words = list(map(str, arguments))
    print("$", name, *words, flush=True)
    return subprocess.run([sys.executable, "-m", module, *words], check=False).returncode


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
