"""Simulated people scanned at several sites, and how a scan compares with what the reference site
measures of the same head: what the benchmarks of harmonizers stand on (`harmonization.py`)."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_dilation, gaussian_filter

from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement
from bidsapp.phantom import load_atlas, recruit, simulate_scans
from bidsapp.simulate import phantom, site

TISSUES = {"WM": 0, "GM": 1}
BLUR = 1.5
"""Voxels, full width at half maximum, of the smoothing that is no harmonization."""

AROUND = 3
"""Voxels about a lesion that it is compared with."""

FIBRES = 0.4
FEW = 4
"""One in so many voxels serves for NDI and ODI."""


@dataclass(frozen=True)
class PhantomScan:
    """A participant's scan at a site, and what the reference site would have measured instead.

    dwi: the scan as measured. truth: (voxel, measurement) signal of the reference site without
    noise, on the same grid, in the same pose. noisy: the same with the noise of one scan there.
    tissue: (voxel,) index of the largest share (0 WM, 1 GM, 2 CSF). lesion, around: (voxel,) bool,
    white matter inside a lesion and next to it.
    """

    dwi: Dwi
    truth: np.ndarray
    noisy: np.ndarray
    tissue: np.ndarray
    lesion: np.ndarray
    around: np.ndarray

    def save(self, path):
        dwi = self.dwi
        np.savez(path, signal=dwi.signal, mask=dwi.mask, affine=dwi.affine,
                 bvals=dwi.acquisition.bvals, bvecs=dwi.acquisition.bvecs, noise_sd=dwi.noise_sd,
                 **{k: getattr(self, k) for k in ARRAYS})

    @classmethod
    def load(cls, path):
        with np.load(path) as arrays:
            dwi = Dwi(arrays["signal"], arrays["mask"], arrays["affine"],
                      Acquisition(arrays["bvals"], arrays["bvecs"]),
                      noise_sd=float(arrays["noise_sd"]))
            return cls(dwi, **{k: arrays[k] for k in ARRAYS})


ARRAYS = "truth", "noisy", "tissue", "lesion", "around"


def mask_scan(scan, where, reference, seed):
    """The `PhantomScan` of a simulated scan at the site `where`."""
    rows = scan.mask
    truth = np.moveaxis(scan.reference, 0, -1)[rows]
    rng = torch.Generator().manual_seed(seed)
    sigma = np.full(truth.shape, phantom.UNIT / reference.snr, np.float32)
    noisy = phantom.add_noise(truth, sigma, reference, rng)
    tissue = scan.tissue[:, rows].argmax(0)
    around = (binary_dilation(scan.lesion, iterations=AROUND) & ~scan.lesion)[rows] & (tissue == 0)
    dwi = Dwi(np.ascontiguousarray(np.moveaxis(scan.signal, 0, -1)[rows], np.float32), rows,
              scan.grid.affine, scan.acquisition, noise_sd=phantom.UNIT / where.snr)
    return PhantomScan(dwi, truth, noisy, tissue, scan.lesion[rows] & (tissue == 0), around)


def ratio(signal, acquisition):
    """S/S0 of every measurement."""
    s0 = np.maximum(signal[:, acquisition.b0].mean(1, keepdims=True), 1)
    return (signal / s0).astype(np.float32)


def denoised(dwi):
    from dipy.denoise.localpca import mppca

    with np.errstate(invalid="ignore"):  # it divides 0 by 0 outside of the mask
        image = mppca(dwi.unmask(dwi.signal), mask=dwi.mask)
    return np.maximum(image[dwi.mask], 0).astype(np.float32)


def smoothed(dwi):
    sd = BLUR / 2.3548
    weight = gaussian_filter(dwi.mask.astype(np.float32), sd)[dwi.mask]
    return np.stack([gaussian_filter(dwi.unmask(column), sd)[dwi.mask] / weight
                     for column in dwi.signal.T], 1)


def fitted(dwi, l_max=4):
    """The SH series of every shell instead of its signal."""
    signal = dwi.signal.copy("K")
    for shell in dwi.acquisition.shells:
        basis = sh.basis(l_max, dwi.acquisition.bvecs[shell.indices])
        signal[:, shell.indices] = dwi.signal[:, shell.indices] @ (
            basis @ np.linalg.pinv(basis)).T
    return signal


PLAIN = {"none": lambda dwi: dwi.signal, "SH fit": fitted, "MPPCA": denoised,
         "smoothing": smoothed}


def neurites(signal, dwi, noise_sd):
    """ndi and odi of every FEW-th voxel, and which those are."""
    mask = np.zeros_like(dwi.mask)
    mask[tuple(np.argwhere(dwi.mask)[::FEW].T)] = True
    few = Dwi(signal[::FEW], mask, dwi.affine, dwi.acquisition, noise_sd=noise_sd)
    return methods.get("estimate_noddi").apply(few, "cpu").maps


def compare(found, scan):
    """Compare a signal with what the reference site measures of the same head.

    Returns a list of rows with shell, measure, against, tissue and value. A mean of FA or MD is
    `against` "found", or that of the "truth" or the "scan".
    """
    dwi, rows = scan.dwi, []
    acquisition = dwi.acquisition
    signals = {"found": found, "truth": scan.truth, "scan": scan.noisy}
    values = {k: ratio(v, acquisition) for k, v in signals.items()}

    def add(shell, measure, value, against="truth", tissue=""):
        rows.append({"shell": shell, "measure": measure, "against": against, "tissue": tissue,
                     "value": value})

    for shell in acquisition.shells:
        at, name = shell.indices, f"b{shell.b:.0f}"
        maps = {k: {"signal": v[:, at], **agreement.shell_maps(v[:, at], acquisition[at])}
                for k, v in values.items()}
        for tissue, label in TISSUES.items():
            where = scan.tissue == label
            for key in ("signal", "fa", "md"):
                for against in ("scan", "truth"):
                    pair = maps["found"][key][where], maps[against][key][where]
                    add(name, f"NMSE {key}", agreement.nmse(*pair), against, tissue)
                    add(name, f"MSE {key}", agreement.mse(*pair), against, tissue)
                if key != "signal":
                    for k in signals:
                        add(name, f"mean {key}", float(maps[k][key][where].mean()), k, tissue)
        volumes = [tuple(dwi.unmask(maps[k]["signal"][:, i]) for k in ("found", "truth"))
                   for i in range(len(at))]
        for measure in (agreement.ssim, agreement.sharpness):
            add(name, measure.__name__, np.mean([measure(*v, dwi.mask) for v in volumes]))
        fibres = (maps["truth"]["fa"] > FIBRES) & (scan.tissue == 0)
        measured = agreement.shell_maps(ratio(dwi.signal, acquisition)[fibres][:, at],
                                        acquisition[at])["direction"]
        mine = maps["found"]["direction"][fibres]
        add(name, "direction", np.median(agreement.angle(
            mine, maps["truth"]["direction"][fibres])))
        add(name, "turn", np.median(agreement.angle(mine, measured)))
        if min(scan.lesion.sum(), scan.around.sum()) > 0:
            mine, wanted = (agreement.contrast(maps[k]["md"], scan.lesion, scan.around)
                            for k in ("found", "truth"))
            add(name, "lesion", mine / wanted)
    if len(acquisition.shells) > 1:
        noise = {"found": dwi.noise_sd, "truth": 1e-3 * phantom.UNIT, "scan": dwi.noise_sd}
        maps = {k: neurites(v, dwi, noise[k]) for k, v in signals.items()}
        for tissue, label in TISSUES.items():
            where = scan.tissue[::FEW] == label
            for key in ("ndi", "odi"):
                for against in ("scan", "truth"):
                    add("all", f"NMSE {key}", agreement.nmse(
                        maps["found"][key][where], maps[against][key][where]), against, tissue)
    return rows


def simulate(options, sites=None, people=None):
    """Scan people at sites.

    Parameters
    ----------
    options : PhantomOptions
    sites, people : those of `site.draw_sites` and `recruit`, unless given; the first site is the
        reference

    Returns
    -------
    names of the sites, people, and a dict from (label of the participant, site) to PhantomScan
    """
    sites, people = sites or site.draw_sites(options), people or recruit(options)
    scanned = {}
    for i, (who, _, where, scan) in enumerate(simulate_scans(options, people, sites,
                                                             load_atlas(options.step))):
        scanned[who.label, where.name] = mask_scan(scan, where, sites[0],
                                                   1000 * options.random_seed + i)
    return [s.name for s in sites], people, scanned
