"""Spherical-harmonic residual network (Koppers et al. 2018, arXiv:1808.01595)."""

from __future__ import annotations

from bidsapp.harmonization.paired import PairedHarmonizer


class SHResNetHarmonizer(PairedHarmonizer):
    """3×3×3 patches of coefficients, residual blocks by degree, RISH projection."""

    rish_projection = True
    intended_use = (
        "Maps the diffusion signal of one batch to that of the reference batch, for acquisitions "
        "and people like those under trained_for. What the training has not seen, as lesions, may "
        "change in size of signal, not in direction. Not for diagnosis.")
