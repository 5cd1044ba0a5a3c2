"""The multi-site phantom: time, size of the site effects beside the differences between people, how
well sites are told apart, how far a tensor fit is from the truth.

    python benchmarks/phantom.py [--sloppy] [--sites K] [--participants N] [--random-seeds S ...]

Site effects are between each site's and the reference's signal of the same scan (same grid, pose
and b-table): mean over voxels of |difference| / reference, in the voxels of which WM, or GM, is the
largest part (what a segmentation calls so), without lesions; first without noise, then of the maps
that each site's own noise leads to on average (over DRAWS draws, in VOXELS voxels per region).
Beside them stand, without noise and relative to the mean: the SD over people of a region's mean
(averaged over sites) and, per site, by how much it shifts that mean from the reference, on average
over people. FA and MD are of a tensor fitted up to b 1500.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import table
import torch

from bidsapp import tensor
from bidsapp.evaluate.agreement import site_auc
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, phantom, recruit, simulate_scans
from bidsapp.simulate import phantom as phantom_model
from bidsapp.simulate import site

DRAWS, VOXELS = 32, 3000
REGIONS = {"WM": 0, "GM": 1}


def tensor_maps(signal, acquisition):
    """FA and MD of (voxel, measurement) signal."""
    chosen = tensor.volumes(acquisition)
    fitted = tensor.fit(torch.as_tensor(signal[:, chosen].astype(np.float64)),
                        tensor.design(acquisition[chosen].btensors))
    return {k: fitted[k].numpy() for k in ("fa", "md", "s0", "sigma")}


def maps_of(signal, acquisition):
    """Compute the compared quantities of a signal, (voxel, measurement), by name."""
    b0 = signal[:, acquisition.b0].mean(1)
    maps = tensor_maps(signal, acquisition)
    maps["residual"] = maps.pop("sigma") / maps.pop("s0")
    for shell in acquisition.shells:
        maps[f"S/S0 b{shell.b:.0f}"] = signal[:, shell.indices].mean(1) / b0
    return maps


def with_noise(image, inside, scan, where, rng):
    """Maps of (voxel,) chosen voxels, averaged over draws of the site's noise."""
    sigma = phantom_model.UNIT * where.sigma(scan.grid.points).reshape(scan.grid.shape)[inside]
    total = {}
    for _ in range(DRAWS):
        drawn = phantom_model.add_noise(image[:, inside], sigma, where, rng)
        for name, values in maps_of(drawn.T, scan.acquisition).items():
            total[name] = total.get(name, 0) + values / DRAWS
    return total


def effects(options):
    """|difference| / reference of each scan at another site, by (kind, region, map); means of FA
    and MD, by (region, map) and (participant, site); and the reference's FA and MD by a fit
    without noise relative to the truth, mean and mean of |difference|, by (region, map)."""
    atlas, sites = load_atlas(options.step), site.draw_sites(options)
    clean = replace(options, snr=float("inf"))
    found, means, bias, rng = {}, {}, {}, torch.Generator().manual_seed(0)
    for who, _, where, scan in simulate_scans(clean, recruit(options), site.draw_sites(clean),
                                              atlas):
        noisy = next(s for s in sites if s.name == where.name)
        for region, tissue in REGIONS.items():
            inside = (scan.tissue.argmax(0) == tissue) & scan.mask & ~scan.lesion
            mine, wanted = (maps_of(image[:, inside].T, scan.acquisition)
                            for image in (scan.signal, scan.reference))
            for name in ("fa", "md"):
                means.setdefault((region, name), {})[who.label, where.name] = mine[name].mean()
                error = wanted[name] / scan.truth[name][inside] - 1
                bias.setdefault((region, name), []).append((error.mean(), np.abs(error).mean()))
            if noisy is sites[0]:
                continue
            some = np.zeros_like(inside)
            some.reshape(-1)[np.flatnonzero(inside)[::max(1, inside.sum() // VOXELS)]] = True
            averages = [with_noise(image, some, scan, at, rng) for image, at in (
                (scan.signal, noisy), (scan.reference, sites[0]))]
            for name in mine:
                if name == "residual":  # nothing without noise to compare with
                    continue
                for kind, (a, b) in (("without noise", (mine, wanted)),
                                     ("with its noise", averages)):
                    ratio = np.mean(np.abs(a[name] - b[name]) / b[name])
                    found.setdefault((kind, region, name), []).append(ratio)
    return found, means, bias


def people_and_sites(means):
    """SD over people (mean over sites) and |mean shift| of each site from the first, relative to
    the mean, of values by (participant, site)."""
    people, sites = (sorted(set(names)) for names in zip(*means, strict=True))
    values = np.array([[means[p, s] for s in sites] for p in people]) / np.mean([*means.values()])
    return values.std(0, ddof=1).mean(), np.abs((values[:, 1:] - values[:, :1]).mean(0))


def features(options):
    """Participant, site and, of each scan, quartiles and SD over a region of raw maps (also of the
    tensor fit's residual relative to S0)."""
    atlas, sites = load_atlas(options.step), site.draw_sites(options)
    rows = []
    for who, _, where, scan in simulate_scans(options, recruit(options), sites, atlas):
        row = []
        for tissue in REGIONS.values():
            inside = (scan.tissue.argmax(0) == tissue) & scan.mask & ~scan.lesion
            for values in maps_of(scan.signal[:, inside].T, scan.acquisition).values():
                row += [*np.percentile(values, (25, 50, 75)), values.std()]
        rows.append((who.label, where.name, row))
    return tuple(map(np.array, zip(*rows, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sloppy", action="store_true")
    parser.add_argument("--no-writing", action="store_true", help="skip the timed whole run")
    for name, value in (("participants", 6), ("sites", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0])
    table.add_option(parser)
    given = vars(parser.parse_args())
    seeds, path = given.pop("random_seeds"), given.pop("csv")
    if not given.pop("no_writing"):
        with tempfile.TemporaryDirectory() as folder:
            start, used = time.perf_counter(), os.times()
            phantom(PhantomOptions(Path(folder) / "out", sloppy=given["sloppy"]))
            now = os.times()
            print(f"4 people x 2 sites: {time.perf_counter() - start:.0f} s, "
                  f"CPU {now.user + now.system - used.user - used.system:.0f} s, "
                  f"load {os.getloadavg()[0]:.1f}", flush=True)
    columns = [report(PhantomOptions(Path("unused"), random_seed=seed, **given))
               for seed in seeds]
    table.show("phantom", [[label, *(c[label] for c in columns)] for label in columns[0]], path,
               first=f"{given['participants']} people, {given['sites']} sites",
               others=[f"seed {seed}" for seed in seeds])
    return 0


def report(options):
    """Print all that is measured; return the cells of the table by their rows' labels."""
    print(f"seed {options.random_seed}, {options.participants} people, {options.sites} sites, "
          f"{options.voxel:g} mm", flush=True)
    found, means, bias = effects(options)
    for (kind, region, name), ratios in found.items():
        print(f"site effect {kind}, {region} {name}: mean {np.mean(ratios):.1%} "
              f"(scans {np.min(ratios):.1%} to {np.max(ratios):.1%})")
    for (region, name), values in means.items():
        sd, shifts = people_and_sites(values)
        print(f"{region} mean {name}: SD of people {sd:.1%}, shift of sites "
              f"{', '.join(f'{s:.1%}' for s in shifts)}; SD/largest {sd / shifts.max():.2f}")
    for (region, name), errors in bias.items():
        mean, size = np.mean(errors, 0)
        print(f"{region} {name} fitted without noise against the limit b to 0: {mean:+.1%} "
              f"(mean of |difference| {size:.1%})", flush=True)
    lowest = []
    for text, scale in (("", 1), (" without effects", 0)):
        people, names, values = features(replace(options, effects=scale))
        auc = np.array([*site_auc(values, names, people).values()])
        print(f"site AUC{text}: {auc.mean():.3f} (each against the rest: "
              f"{', '.join(f'{a:.3f}' for a in auc)})", flush=True)
        lowest.append(f"{auc.min():.3f}")

    def effect(kind, name):
        return " / ".join(f"{100 * np.mean(found[kind, region, name]):.1f}"
                          for region in REGIONS) + " %"

    cells = {"site effect on FA with each site's noise, WM / GM (published: below 5 % / 10–15 %)":
             effect("with its noise", "fa"),
             "the same without noise": effect("without noise", "fa"),
             "site effect on MD with noise, WM / GM": effect("with its noise", "md")}
    for (region, name), values in means.items():
        sd, shifts = people_and_sites(values)
        label = f"{name.upper()} in {region}"
        cells[label + ": SD of people; shifts of the sites" * (label == "FA in WM")] = (
            f"{100 * sd:.1f}; {', '.join(f'{100 * s:.1f}' for s in shifts)} %")
    cells["lowest of the sites' AUC from raw maps; without effects"] = "; ".join(lowest)
    for name, label in (
            ("fa", "fit at b = 1000 without noise against the truth: FA in WM / GM"),
            ("md", "the same, MD in WM / GM")):
        cells[label] = " / ".join(f"{100 * np.mean(bias[region, name], 0)[0]:+.0f}"
                                  for region in REGIONS) + " %"
    return cells


if __name__ == "__main__":
    sys.exit(main())
