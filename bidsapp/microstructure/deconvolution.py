"""Fibre orientation densities of measured voxels, for the simulation of training data.

Constrained spherical deconvolution of all linear shells into white matter, grey matter and CSF
(Jeurissen et al. 2014, doi:10.1016/j.neuroimage.2014.07.061; dipy's implementation), with a tensor
per tissue and shell as responses.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.progress import track

log = logging.getLogger(__name__)

L_MAX = 8
"""Highest degree of the densities."""

MIN_DIRECTIONS = 45
"""Minimum number of directions of one shell: the number of coefficients of degree 8."""

MAX_RUNS = 20
"""Maximum number of runs of a study that are deconvolved."""

MIN_WHITE = 0.2
"""Minimum volume fraction of white matter in a voxel; below it the density is not reliable."""


def deconvolve(dwi: Dwi, single_fibre: Bool[np.ndarray, " voxel"], gm: Bool[np.ndarray, " voxel"],
               csf: Bool[np.ndarray, " voxel"], where: Bool[np.ndarray, " voxel"]
              ) -> Float[torch.Tensor, "row 45"]:
    """Estimate the densities of the voxels that contain white matter.

    Parameters
    ----------
    dwi : Dwi
    single_fibre, gm, csf : (voxel,) bool ndarray
        Voxels from which the responses are estimated.
    where : (voxel,) bool ndarray
        Voxels to deconvolve.

    Returns
    -------
    (row, 45) tensor
        Coefficients (basis of `bidsapp.sh`, ∫ = 1) of the voxels of `where` with signal at b = 0
        and a volume fraction of white matter of MIN_WHITE or more; there may be none. Densities
        are non-negative up to the solver's tolerance.

    Raises
    ------
    Refusal
        There is no b0, there are fewer than two linear shells or none of MIN_DIRECTIONS directions,
        or a tissue or `where` has no voxels.
    """
    from dipy.core.gradients import gradient_table
    from dipy.core.sphere import Sphere
    from dipy.reconst.mcsd import MultiShellDeconvModel, response_from_mask_msmt

    acquisition = dwi.acquisition
    shells = [s for s in acquisition.shells if s.b_delta > 0.95]
    usable = where & (dwi.mean_b0 > 0)
    voxels = {"single-fibre": single_fibre, "grey matter": gm, "CSF": csf, "usable": usable}
    if not (acquisition.b0.any() and len(shells) >= 2
            and max(map(len, shells)) >= MIN_DIRECTIONS
            and all(v.any() for v in voxels.values())):
        raise Refusal(
            f"deconvolution found {int(acquisition.b0.sum())} b0 volumes, linear shells of "
            f"{[len(s) for s in shells]} directions, and voxels: "
            f"{', '.join(f'{k} {int(v.sum())}' for k, v in voxels.items())}. A b0, two linear "
            f"shells, {MIN_DIRECTIONS} directions in one of them, and voxels of each tissue are "
            "required.")
    volumes = np.sort(np.concatenate(
        [np.flatnonzero(acquisition.b0), *(s.indices for s in shells)]))
    part = acquisition[volumes]
    table = gradient_table(_shell_means(part), bvecs=part.bvecs)
    signal = dwi.signal[:, volumes].astype(float)
    response = response_from_mask_msmt(
        table, signal[:, None, None], *(v[:, None, None] for v in (single_fibre, gm, csf)))
    points, weights = sh.quadrature(2 * L_MAX)
    with warnings.catch_warnings():  # dipy warns that it deconvolves in its old basis
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        model = MultiShellDeconvModel(table, np.array(response), sh_order_max=L_MAX)
        fit = model.fit(signal[usable])
        # sampled and projected below, so that no convention of the basis matters
        values = fit.odf(Sphere(xyz=points))
    odfs = torch.from_numpy(values @ (weights[:, None] * sh.basis(L_MAX, points)))
    share = fit.volume_fractions / np.maximum(fit.volume_fractions.sum(1, keepdims=True), 1e-9)
    # dipy's order is CSF, grey matter, white matter
    valid = torch.from_numpy(share[:, 2] >= MIN_WHITE) & odfs.isfinite().all(1)
    integral = odfs[valid, :1] * np.sqrt(4 * np.pi)
    return (odfs[valid] / integral).float()


def deconvolve_study(load: Callable[[str], Dwi], runs: Sequence[str], *, voxels: int, seed: int,
                     device: str) -> Float[torch.Tensor, "row 45"] | None:
    """Deconvolve random voxels of random runs of a study.

    Parameters
    ----------
    load : callable
        Function from a run's name to its Dwi.
    runs : sequence of str
        Runs, of which up to MAX_RUNS are drawn.
    voxels : int
        Maximum number of voxels of all runs together, drawn from the whole brain. Those without
        white matter are left out afterwards.
    seed : int
    device : str

    Returns
    -------
    (row, 45) tensor or None
        Coefficients as `deconvolve` returns them; None if there are none.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.array(runs))[:MAX_RUNS]
    rows = []
    for run in track(list(chosen), "measured densities: run"):
        dwi = load(str(run))
        where = np.zeros(len(dwi.signal), bool)
        where[rng.permutation(len(where))[:max(1, voxels // len(chosen))]] = True
        try:
            regions = tissue.find_regions(dwi, device)
            rows.append(deconvolve(dwi, regions.single_fibre, regions.gm, regions.csf, where))
        except Refusal as refusal:
            log.warning("%s: no densities could be estimated for the training: %s", run, refusal)
    densities = torch.cat([torch.zeros(0, sh.size(L_MAX)), *rows])
    return densities if len(densities) else None


def _shell_means(acquisition: Acquisition) -> Float[np.ndarray, " volume"]:
    """Replace each b-value by the mean of its shell, from which dipy recognises shells."""
    b = np.zeros(len(acquisition.bvals))
    for shell in acquisition.shells:
        b[shell.indices] = round(shell.b)
    return b
