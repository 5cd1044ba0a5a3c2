"""Diffusion tensor by weighted least squares, with standard errors (see `bidsapp.tensor`)."""

from __future__ import annotations

import numpy as np

from bidsapp import tensor
from bidsapp.acquisition import Acquisition
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.methods import Derived, Method

INDEPENDENT = 0.01
"""The design's columns, scaled to unit length, need singular values above this."""


class Tensor(Method):
    """FA, MD, AD, RD, principal direction, S0, residual SD; standard errors of FA and MD."""

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where the b-tensors do not determine six tensor entries and S0."""
        x = tensor.design(acquisition.btensors)
        length = np.linalg.norm(x, axis=0)
        values = np.linalg.svd(x / np.where(length > 0, length, 1), compute_uv=False)
        if (rank := int((values > INDEPENDENT).sum())) < tensor.TERMS:
            shells = ", ".join(f"{len(s)} at b = {s.b:.0f} (b_delta {s.b_delta:.2g})"
                               for s in acquisition.shells) or "none weighted"
            raise Refusal(
                f"the tensor has 7 unknowns, this acquisition determines {rank}: "
                f"{int(acquisition.b0.sum())} volumes without weighting, {shells}. Needed are 6 or "
                "more directions that differ and do not lie on one cone, and a b0 or a second "
                "b-value. Acquire these, or leave dti out of --estimate.")

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        self.check(dwi.acquisition)
        x = tensor.design(dwi.acquisition.btensors)
        maps = map_voxels(lambda signal: tensor.fit(signal, x), dwi.signal, device)
        failed, clamped, saturated = (maps.pop(k) for k in ("failed", "clamped", "saturated"))
        counts = {"dti_no_fit": int(failed.sum()), "dti_negative_eigenvalue": int(clamped.sum()),
                  "dti_saturated_fa": int(saturated.sum()),
                  "dti_nonpositive_signal": int((dwi.signal <= 0).any(axis=1).sum())}
        return Derived(maps, counts, {"FitMethod": "wls", "Iterations": 1}, ~failed)
