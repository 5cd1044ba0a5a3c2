"""Neurite density, dispersion and free water (NODDI) by a spherical network.

Zhang et al. 2012 (doi:10.1016/j.neuroimage.2012.03.072), estimated as Kerkelä et al. 2024
(doi:10.3389/fnimg.2024.1349415) estimate theirs: a rotation-equivariant network trained on
simulated signals (`bidsapp.microstructure`).
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import NODDI


class Noddi(SphericalMethod):
    """NDI, ODI, FISO and the ODF with the weights that ship."""

    tissue = NODDI
    intended_use = (
        "Neurite density index, orientation dispersion index and free water fraction of brain "
        "tissue in vivo from multi-shell linear encoding within the ranges under trained_for. "
        "Diffusivities are fixed (1.7 and 3.0 µm²/ms). Not for diagnosis.")
