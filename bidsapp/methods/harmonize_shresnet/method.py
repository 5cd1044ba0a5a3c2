"""Spherical-harmonic residual network (Koppers et al. 2018, arXiv:1808.01595)."""

from __future__ import annotations

from bidsapp.harmonization.paired import PairedHarmonizer


class SHResNetHarmonizer(PairedHarmonizer):
    """Residual blocks by degree on 3×3×3 patches of coefficients, with RISH projection."""

    rish_projection = True
    intended_use = (
        "Maps the diffusion signal of one site to that of the reference site, for acquisitions "
        "and participants like those under trained_for. Tissue that was absent from the training, "
        "such as lesions, may change in signal but not in fibre direction. Not for diagnosis.")
