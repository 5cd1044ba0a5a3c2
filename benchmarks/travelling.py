"""People at two sites, and how a scan of theirs compares with what the other site measures: what
benchmarks of harmonizers stand on (`harmonization.py`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_dilation, gaussian_filter

from bidsapp import methods, sh
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement
from bidsapp.options import PhantomOptions
from bidsapp.phantom import load_atlas, recruit, scans
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
class One:
    """A person at a site: what was measured, the truth on the same grid without noise and with the
    reference's, and where tissues and a lesion are (voxel,)."""

    dwi: Dwi
    truth: np.ndarray
    noisy: np.ndarray
    tissue: np.ndarray
    lesion: np.ndarray
    around: np.ndarray


def one(scan, where, reference, seed):
    rows = scan.mask
    wanted = np.moveaxis(scan.reference, 0, -1)[rows]
    rng = torch.Generator().manual_seed(seed)
    sigma = np.full(wanted.shape, phantom.UNIT / reference.snr, np.float32)
    noisy = phantom.noisy(wanted, sigma, reference, rng)
    tissue = scan.tissue[:, rows].argmax(0)
    around = (binary_dilation(scan.lesion, iterations=AROUND) & ~scan.lesion)[rows] & (tissue == 0)
    dwi = Dwi(np.ascontiguousarray(np.moveaxis(scan.signal, 0, -1)[rows], np.float32), rows,
              scan.grid.affine, scan.acquisition, noise_sd=phantom.UNIT / where.snr)
    return One(dwi, wanted, noisy, tissue, scan.lesion[rows] & (tissue == 0), around)


def ratio(signal, acquisition):
    """S/S0 of every measurement."""
    s0 = np.maximum(signal[:, acquisition.b0].mean(1, keepdims=True), 1)
    return (signal / s0).astype(np.float32)


def denoised(dwi):
    from dipy.denoise.localpca import mppca

    return np.maximum(mppca(dwi.unmask(dwi.signal), mask=dwi.mask)[dwi.mask], 0).astype(np.float32)


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


def compared(found, person):
    """Rows of shell, measure, against, tissue, value."""
    dwi, rows = person.dwi, []
    acquisition = dwi.acquisition
    signals = {"found": found, "truth": person.truth, "scan": person.noisy}
    values = {k: ratio(v, acquisition) for k, v in signals.items()}

    def add(shell, measure, value, against="truth", tissue=""):
        rows.append({"shell": shell, "measure": measure, "against": against, "tissue": tissue,
                     "value": value})

    for shell in acquisition.shells:
        at, name = shell.indices, f"b{shell.b:.0f}"
        maps = {k: {"signal": v[:, at], **agreement.shell_maps(v[:, at], acquisition[at])}
                for k, v in values.items()}
        for tissue, label in TISSUES.items():
            where = person.tissue == label
            for key in ("signal", "fa", "md"):
                for against in ("scan", "truth"):
                    pair = maps["found"][key][where], maps[against][key][where]
                    add(name, f"NMSE {key}", agreement.nmse(*pair), against, tissue)
                    add(name, f"MSE {key}", agreement.mse(*pair), against, tissue)
                if key != "signal":
                    for k in ("found", "truth"):
                        add(name, f"mean {key}", float(maps[k][key][where].mean()), k, tissue)
        volumes = [tuple(dwi.unmask(maps[k]["signal"][:, i]) for k in ("found", "truth"))
                   for i in range(len(at))]
        for measure in (agreement.ssim, agreement.sharpness):
            add(name, measure.__name__, np.mean([measure(*v, dwi.mask) for v in volumes]))
        fibres = (maps["truth"]["fa"] > FIBRES) & (person.tissue == 0)
        measured = agreement.shell_maps(ratio(dwi.signal, acquisition)[fibres][:, at],
                                        acquisition[at])["direction"]
        mine = maps["found"]["direction"][fibres]
        add(name, "direction", np.median(agreement.angle(
            mine, maps["truth"]["direction"][fibres])))
        add(name, "turn", np.median(agreement.angle(mine, measured)))
        if min(person.lesion.sum(), person.around.sum()) > 0:
            mine, wanted = (agreement.contrast(maps[k]["md"], person.lesion, person.around)
                            for k in ("found", "truth"))
            add(name, "lesion", mine / wanted)
    if len(acquisition.shells) > 1:
        noise = {"found": dwi.noise_sd, "truth": 1e-3 * phantom.UNIT, "scan": dwi.noise_sd}
        maps = {k: neurites(v, dwi, noise[k]) for k, v in signals.items()}
        for tissue, label in TISSUES.items():
            where = person.tissue[::FEW] == label
            for key in ("ndi", "odi"):
                for against in ("scan", "truth"):
                    add("all", f"NMSE {key}", agreement.nmse(
                        maps["found"][key][where], maps[against][key][where]), against, tissue)
    return rows


def simulate(arguments):
    options = PhantomOptions(
        Path(), participants=arguments.participants, shells=tuple(arguments.shells),
        directions=arguments.directions, voxel_size=arguments.voxel_size, effect_directions=0,
        random_seed=arguments.random_seed)
    sites, people = site.draw(options), recruit(options)
    made = {}
    for i, (who, _, where, scan) in enumerate(scans(options, people, sites,
                                                    load_atlas(options.step))):
        made[who.label, where.name] = one(scan, where, sites[0], 1000 * arguments.random_seed + i)
    return [s.name for s in sites], people, made
