"""Fibre orientation densities of real voxels, to simulate from.

Constrained spherical deconvolution (Tournier et al. 2007, doi:10.1016/j.neuroimage.2007.02.016;
dipy's) of the shell that has the most directions, with the tensor of the single-fibre voxels as the
response, as the densities that `simulate.tissue.draw_odfs` takes as a table.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp import sh, tensor
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal

L_MAX = 8
LEAST = 45
"""Directions of a shell, at least: as many as coefficients of degree 8."""


def densities(dwi: Dwi, single_fibre: Bool[np.ndarray, " voxel"], where: Bool[np.ndarray, " voxel"]
              ) -> Float[torch.Tensor, "row 45"]:
    """One row of coefficients (basis of `bidsapp.sh`, ∫ = 1) for each voxel of `where` in which the
    deconvolution leaves a density; they are non-negative up to dipy's tolerance.

    single_fibre: voxels whose mean tensor, sorted by its eigenvalues, is the response.

    Raises:
        Refusal: no b0, no linear shell of LEAST directions, or no voxel of either kind.
    """
    from dipy.core.sphere import Sphere
    from dipy.reconst.csdeconv import ConstrainedSphericalDeconvModel

    acquisition = dwi.acquisition
    shells = [s for s in acquisition.shells if s.b_delta > 0.95]
    shell = max(shells, key=lambda s: (len(s), s.b), default=None)
    usable = where & (dwi.mean_b0 > 0)
    if shell is None or len(shell) < LEAST or not (
            acquisition.b0.any() and single_fibre.any() and usable.any()):
        raise Refusal(
            f"deconvolution found {int(acquisition.b0.sum())} volumes without weighting, "
            f"{len(shell) if shell else 0} directions in the largest shell, "
            f"{int(single_fibre.sum())} single-fibre voxels and {int(usable.sum())} to deconvolve. "
            f"Needed are a b0, {LEAST} directions in one shell, and voxels of both kinds.")
    volumes = np.sort(np.r_[np.flatnonzero(acquisition.b0), shell.indices])
    part = acquisition[volumes]
    fit = tensor.fit(torch.from_numpy(dwi.signal[single_fibre][:, volumes].copy()),
                     tensor.design(part.btensors))
    axial, radial, s0 = (float(fit[k].median()) for k in ("ad", "rd", "s0"))
    points, weights = sh.quadrature(2 * L_MAX)
    with warnings.catch_warnings():  # dipy deconvolves in its old basis and says so
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        model = ConstrainedSphericalDeconvModel(
            part.to_dipy(), (np.array([axial, radial, radial]), s0), sh_order_max=L_MAX)
        # sampled and projected below, so that no convention of the basis matters
        values = model.fit(dwi.signal[usable][:, volumes].astype(float)).odf(Sphere(xyz=points))
    found = torch.from_numpy(values @ (weights[:, None] * sh.basis(L_MAX, points)))
    total = found[:, :1] * np.sqrt(4 * np.pi)
    kept = (total[:, 0] > 1e-3) & found.isfinite().all(1)
    return (found[kept] / total[kept]).float()
