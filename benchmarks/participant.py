"""A whole participant run beside the time that reading its input and writing its outputs takes.

    python benchmarks/participant.py BIDS_DIR [--participant-label 01] [--repeats 5]

The floor reads every input volume with nibabel, in order, and writes every output image again. The
run is timed without imports and without drawing figures and pages, which are given apart, as is
the median-Otsu mask, which is made where no mask is given. Peak memory is that of a fresh process,
beside its bound: twice the masked float32 signal and 1.5 GB.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import table

from bidsapp import cli
from bidsapp.dwi import peak_memory
from bidsapp.recipe import execute, steps
from bidsapp.report import figures


def floor(bids: Path, out: Path, scratch: Path) -> float:
    """Seconds to read the input images of all runs and to write their output images."""
    records = [json.loads(p.read_text()) for p in out.glob("sub-*/log/sub-*_dwi.json")]
    inputs = [bids / uri.removeprefix("bids:raw:") for r in records for uri in r["files"]
              if uri.endswith((".nii", ".nii.gz"))]
    steps_done = [json.loads(p.read_text()) for p in out.glob("sub-*/log/sub-*_step.json")]
    outputs = [nib.load(out / name) for r in steps_done for name in r["outputs"]
               if name.endswith(".nii.gz")]
    images = [nib.Nifti1Image(np.asarray(i.dataobj), i.affine) for i in outputs]
    start = time.perf_counter()
    for path in inputs:
        image = nib.load(path, keep_file_open=True)
        for i in range(image.shape[-1]):
            np.asarray(image.dataobj[..., i], np.float32)
    for i, image in enumerate(images):
        nib.save(image, scratch / f"{i}.nii.gz")
    return time.perf_counter() - start


class Timed:
    """Adds up the seconds spent in some functions."""

    def __init__(self, *places: tuple[object, str]) -> None:
        self.seconds = 0.0
        for module, name in places:
            setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("bids_dir", type=Path)
    p.add_argument("--participant-label", default=None)
    p.add_argument("--repeats", type=int, default=5)
    table.add_option(p)
    args = p.parse_args()
    bids = args.bids_dir.resolve()
    only = ["--participant-label", args.participant_label] if args.participant_label else []
    report = Timed((figures, "of_signal"), (figures, "of_maps"), (execute, "draw"),
                   (execute, "write_page"))
    mask = Timed((steps, "median_otsu"))
    ratios, bare, runs, floors, reports, masks = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats + 1):
            out = Path(folder, f"out{i}")
            report.seconds = mask.seconds = 0.0
            start = time.perf_counter()
            code = cli.main([str(bids), str(out), "participant", *only])
            whole = time.perf_counter() - start
            if code:
                sys.exit(f"the run ended with {code}")
            if i == 0:  # imports and first calls
                continue
            floors.append(floor(bids, out, Path(folder)))
            reports.append(report.seconds)
            masks.append(mask.seconds)
            runs.append(whole - report.seconds)
            ratios.append(runs[-1] / floors[-1])
            bare.append((runs[-1] - mask.seconds) / floors[-1])
        records = [json.loads(q.read_text()) for q in out.glob("sub-*/log/sub-*_dwi.json")]
        subprocess.run([sys.executable, "-m", "bidsapp", str(bids), str(Path(folder, "fresh")),
                        "participant", *only], check=True, capture_output=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    bound = max(peak_memory(r["n_voxels"], r["n_volumes"]) for r in records)
    middle = statistics.median
    print(f"read and write  {middle(floors):6.2f} s\n"
          f"run             {middle(runs):6.2f} s   ratio {middle(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})\n"
          f"  without mask  {middle(runs) - middle(masks):6.2f} s   ratio {middle(bare):.2f} "
          f"({min(bare):.2f} to {max(bare):.2f})\n"
          f"report          {middle(reports):6.2f} s\n"
          f"peak memory     {peak / 1e9:6.2f} GB  bound {bound / 1e9:.2f} GB")
    shapes = dict.fromkeys("×".join(map(str, nib.load(
        bids / uri.removeprefix("bids:raw:")).shape)) for r in records for uri in r["files"]
        if uri.endswith((".nii", ".nii.gz")))
    table.show("participant", [[
        f"{len(records)} runs of {', '.join(shapes)}", f"{middle(floors):.2f} s",
        f"{middle(runs):.2f} s, ratio {table.spread(ratios, '.2f')}",
        f"ratio {table.spread(bare, '.2f')}", f"{peak / 1e9:.2f} GB ({bound / 1e9:.2f})"]],
        args.csv)


if __name__ == "__main__":
    main()
