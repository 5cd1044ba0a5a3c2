"""Neurite density, dispersion and free water (NODDI) by a spherical network.

The model of Zhang et al. 2012 (doi:10.1016/j.neuroimage.2012.03.072), estimated like the models of
Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415): by a rotation-equivariant network trained on
simulated signals (`bidsapp.microstructure`).
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import NODDI


class Noddi(SphericalMethod):
    """Estimator of NDI, ODI, FISO and the ODF, with bundled weights."""

    tissue = NODDI
    intended_use = (
        "Neurite density index, orientation dispersion index and free water fraction of brain "
        "tissue in vivo from multi-shell linear encoding within the ranges under trained_for. "
        "Diffusivities are fixed (1.7 and 3.0 µm²/ms). Not for diagnosis.")
