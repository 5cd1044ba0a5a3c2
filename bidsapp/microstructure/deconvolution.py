"""Fibre orientation densities of real voxels, to simulate from.

Constrained spherical deconvolution of all linear shells into white matter, grey matter and CSF
(Jeurissen et al. 2014, doi:10.1016/j.neuroimage.2014.07.061; dipy's), with
tensors of the three tissues in each shell as responses.
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
LEAST = 45
"""Directions of a shell, at least: as many as coefficients of degree 8."""

RUNS = 20
"""Of a study, at most."""

WHITE = 0.2
"""Share of white matter in a voxel's signal, at least: below it there is no density to speak of."""


def densities(dwi: Dwi, single_fibre: Bool[np.ndarray, " voxel"], gm: Bool[np.ndarray, " voxel"],
              csf: Bool[np.ndarray, " voxel"], where: Bool[np.ndarray, " voxel"]
              ) -> Float[torch.Tensor, "row 45"]:
    """One row of coefficients (basis of `bidsapp.sh`, ∫ = 1) for each voxel of `where` that is
    white matter for a share of WHITE or more; non-negative up to the solver's tolerance.

    single_fibre, gm, csf: voxels of which the responses are made.

    Raises:
        Refusal: no b0, fewer than two linear shells, none of LEAST directions, or no voxel of a
            kind.
    """
    from dipy.core.gradients import gradient_table
    from dipy.core.sphere import Sphere
    from dipy.reconst.mcsd import MultiShellDeconvModel, response_from_mask_msmt

    acquisition = dwi.acquisition
    shells = [s for s in acquisition.shells if s.b_delta > 0.95]
    usable = where & (dwi.mean_b0 > 0)
    kinds = {"single-fibre": single_fibre, "grey matter": gm, "CSF": csf, "usable": usable}
    if not acquisition.b0.any() or len(shells) < 2 or max(map(len, shells)) < LEAST or not all(
            v.any() for v in kinds.values()):
        raise Refusal(
            f"deconvolution found {int(acquisition.b0.sum())} volumes without weighting, linear "
            f"shells of {[len(s) for s in shells]} directions, and voxels: "
            f"{', '.join(f'{k} {int(v.sum())}' for k, v in kinds.items())}. Needed are a b0, two "
            f"shells, {LEAST} directions in one of them, and voxels of every kind.")
    volumes = np.sort(np.concatenate(
        [np.flatnonzero(acquisition.b0), *(s.indices for s in shells)]))
    part = acquisition[volumes]
    table = gradient_table(_of_shells(part), bvecs=part.bvecs)
    signal = dwi.signal[:, volumes].astype(float)
    response = response_from_mask_msmt(
        table, signal[:, None, None], *(v[:, None, None] for v in (single_fibre, gm, csf)))
    points, weights = sh.quadrature(2 * L_MAX)
    with warnings.catch_warnings():  # dipy deconvolves in its old basis and says so
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        model = MultiShellDeconvModel(table, np.array(response), sh_order_max=L_MAX)
        fit = model.fit(signal[usable])
        # sampled and projected below, so that no convention of the basis matters
        values = fit.odf(Sphere(xyz=points))
    found = torch.from_numpy(values @ (weights[:, None] * sh.basis(L_MAX, points)))
    share = fit.volume_fractions / np.maximum(fit.volume_fractions.sum(1, keepdims=True), 1e-9)
    kept = torch.from_numpy(share[:, 2] >= WHITE) & found.isfinite().all(1)
    total = found[kept, :1] * np.sqrt(4 * np.pi)
    return (found[kept] / total).float()


def of_study(load: Callable[[str], Dwi], runs: Sequence[str], *, voxels: int, seed: int,
             device: str) -> Float[torch.Tensor, "row 45"] | None:
    """Densities of up to `voxels` voxels in all, drawn at random from the masks of up to RUNS runs
    drawn at random; None where no run can be deconvolved."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.array(runs))[:RUNS]
    found = []
    for run in track(list(chosen), "measured densities: run"):
        dwi = load(str(run))
        where = np.zeros(len(dwi.signal), bool)
        where[rng.permutation(len(where))[:max(1, voxels // len(chosen))]] = True
        try:
            at = tissue.find_regions(dwi, device)
            found.append(densities(dwi, at.single_fibre, at.gm, at.csf, where))
        except Refusal as refusal:
            log.warning("%s: gives no densities to learn from: %s", run, refusal)
    return torch.cat(found) if found else None


def _of_shells(acquisition: Acquisition) -> Float[np.ndarray, " volume"]:
    """b-values as dipy parts them into shells: each the mean of its shell."""
    b = np.zeros(len(acquisition.bvals))
    for shell in acquisition.shells:
        b[shell.indices] = round(shell.b)
    return b
