"""Diffusion tensor by weighted least squares, with standard errors (see `bidsapp.tensor`)."""

from __future__ import annotations

import numpy as np
import torch

from bidsapp import tensor
from bidsapp.acquisition import Acquisition, describe_shells
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Derived, Estimator


class Tensor(Estimator):
    """Estimator of FA, MD, AD, RD, principal direction, S0, residual SD, and standard errors of FA
    and MD."""

    def volumes(self, acquisition: Acquisition) -> np.ndarray:
        """Select the volumes to which the tensor is fitted (`tensor.volumes`)."""
        return tensor.volumes(acquisition, self.settings("fit")["b_max"])

    def check(self, acquisition: Acquisition) -> None:
        """Raise Refusal if the b-tensors do not determine six tensor entries and S0."""
        rank = tensor.rank(acquisition[self.volumes(acquisition)].btensors)
        if rank < tensor.TERMS:
            shells = ", ".join(f"{len(s)} at b = {s.b:.0f} (b_delta {s.b_delta:.2g})"
                               for s in acquisition.shells) or "none weighted"
            raise Refusal(
                f"the tensor and S0 have {tensor.TERMS} unknowns, but this acquisition determines "
                f"{rank}: {int(acquisition.b0.sum())} b0 volumes, {shells}. Required are 6 or more "
                "different directions that do not lie on one cone, and a b0 or a second b-value. "
                "Acquire these, or leave dti out of --estimate.")

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        self.check(dwi.acquisition)
        chosen, b_max = self.volumes(dwi.acquisition), self.settings("fit")["b_max"]
        used = dwi.acquisition[chosen]
        x = tensor.design(used.btensors)

        def fit(signal: torch.Tensor) -> dict[str, torch.Tensor]:
            part = signal if len(chosen) == signal.shape[1] else signal[:, chosen]
            return {**tensor.fit(part, x), "nonpositive": (part <= 0).any(dim=1)}

        maps = map_voxels(fit, dwi.signal, device)
        failed, clamped, saturated, nonpositive = (
            maps.pop(k) for k in ("failed", "clamped", "saturated", "nonpositive"))
        counts: dict[str, int | str] = {
            "dti_no_fit": int(failed.sum()), "dti_negative_eigenvalue": int(clamped.sum()),
            "dti_saturated_fa": int(saturated.sum()),
            "dti_nonpositive_signal": int(nonpositive.sum()),
            "dti_shells": " ".join(f"{s.b:.0f}" for s in used.shells)}
        parameters = {"FitMethod": "wls", "Iterations": 1, "MaximumB": b_max,
                      "Shells": [round(s.b) for s in used.shells], "Volumes": len(chosen)}
        return Derived(maps, counts, parameters, ~failed, _notices(dwi.acquisition, chosen, b_max))


def _notices(acquisition: Acquisition, chosen: np.ndarray, b_max: float) -> list[str]:
    """Describe the shells of the fit, unless all shells were used and none exceeds b_max."""
    others = np.setdiff1d(np.flatnonzero(~acquisition.b0), chosen)
    rest = acquisition[others].shells if len(others) else ()
    fitted = acquisition[chosen].shells
    text = f"Diffusion tensor: fitted to {describe_shells(fitted)} s/mm²."
    text += f" Left out: {describe_shells(rest)} s/mm²." if rest else ""
    if max(s.b for s in fitted) > (1 + tensor.B_TOLERANCE) * b_max:
        return [f"{text} Shells up to b = {b_max:.0f} s/mm² do not determine a tensor well, so "
                "the next higher shell was used. Kurtosis then lowers MD."]
    return [f"{text} Above b = {b_max:.0f} s/mm² kurtosis lowers MD."] if rest else []
