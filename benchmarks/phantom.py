"""The multi-site phantom: time, size of the site effects, how well sites are told apart.

    python benchmarks/phantom.py [--sloppy] [--sites K] [--participants N] [--random-seed S]

Effects are measured without noise, between each site's and the reference's signal of the same scan
(same grid, pose and b-table): mean over voxels of |difference| / reference, WM and GM being voxels
with a share of at least 0.8 and 0.6. FA and MD are of a tensor fitted up to b 1500.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bidsapp import tensor
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, phantom, recruit, scans
from bidsapp.simulate import site

REGIONS = {"WM": (0, 0.8), "GM": (1, 0.6)}


def tensor_maps(signal, acquisition):
    """FA and MD of (voxel, measurement) signal."""
    chosen = tensor.volumes(acquisition)
    fitted = tensor.fit(torch.as_tensor(signal[:, chosen].astype(np.float64)),
                        tensor.design(acquisition[chosen].btensors))
    return {k: fitted[k].numpy() for k in ("fa", "md")}


def maps_of(image, scan):
    """What is compared, by name: (voxel,) within the mask."""
    signal = image[:, scan.mask].T
    b0 = signal[:, scan.acquisition.b0].mean(1)
    maps = tensor_maps(signal, scan.acquisition)
    for shell in scan.acquisition.shells:
        maps[f"S/S0 b{shell.b:.0f}"] = signal[:, shell.indices].mean(1) / b0
    return maps


def features(options):
    """Per scan: participant, site, regional means of raw maps; and mean effects by region."""
    atlas, sites = load_atlas(options.step), site.draw(options)
    rows, effects = [], {}
    for who, _, where, scan in scans(options, recruit(options), sites, atlas):
        mine, wanted = maps_of(scan.signal, scan), maps_of(scan.reference, scan)
        row = []
        for region, (tissue, least) in REGIONS.items():
            inside = scan.tissue[tissue][scan.mask] > least
            inside &= ~scan.lesion[scan.mask]
            for name, values in mine.items():
                row += [np.median(values[inside]), values[inside].std()]
                if where.name != sites[0].name:
                    ratio = np.abs(values - wanted[name])[inside] / wanted[name][inside]
                    effects.setdefault((region, name), []).append(ratio.mean())
        noise = scan.signal[:, ~scan.mask]
        row += [noise.std() / max(noise.mean(), 1e-9) if noise.any() else 0.0]
        rows.append((who.label, where.name, row))
    people, names, values = zip(*rows, strict=True)
    return np.array(people), np.array(names), np.array(values), effects


def site_auc(people, names, values):
    """Lowest one-against-the-rest area under the ROC curve, leaving one participant out in turn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000))
    score = cross_val_predict(model, values, names, groups=people, cv=LeaveOneGroupOut(),
                              method="predict_proba")
    return min(roc_auc_score(names == name, score[:, i])
               for i, name in enumerate(np.unique(names)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sloppy", action="store_true")
    parser.add_argument("--no-writing", action="store_true", help="skip the timed whole run")
    for name, value in (("participants", 6), ("sites", 3), ("random-seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args())
    if not given.pop("no_writing"):
        with tempfile.TemporaryDirectory() as folder:
            start, used = time.perf_counter(), os.times()
            phantom(PhantomOptions(Path(folder) / "out", sloppy=given["sloppy"]))
            now = os.times()
            print(f"4 people x 2 sites: {time.perf_counter() - start:.0f} s, "
                  f"CPU {now.user + now.system - used.user - used.system:.0f} s, "
                  f"load {os.getloadavg()[0]:.1f}", flush=True)
    options = PhantomOptions(Path("unused"), **given)
    *_, values, effects = features(replace(options, snr=float("inf")))
    for (region, name), found in effects.items():
        print(f"site effect without noise, {region} {name}: mean {np.mean(found):.1%} "
              f"(scans {np.min(found):.1%} to {np.max(found):.1%})")
    people, names, values, _ = features(options)
    print(f"site AUC from raw maps: {site_auc(people, names, values):.3f} (lowest, one vs rest)")
    people, names, values, _ = features(replace(options, effects=0))
    print(f"the same without effects: {site_auc(people, names, values):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
