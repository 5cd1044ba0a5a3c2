"""Neurites, soma and orientation density by a spherical network, from tensor-valued encoding.

Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415) with the constrained three-compartment model
of Gyori et al. 2021 (doi:10.1016/j.neuroimage.2021.118303). Unlike in the paper, one network serves
every acquisition in its range, and returns posterior SDs (`bidsapp.microstructure`).
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import THREE_COMPARTMENTS


class ThreeCompartments(SphericalMethod):
    """Estimator of d, f, d_sph, f_sph and ODF, with bundled weights."""

    tissue = THREE_COMPARTMENTS
    intended_use = (
        "Neurite and soma diffusivities and signal fractions and orientation density of brain "
        "tissue from shells of linear, planar or spherical encoding within the ranges under "
        "trained_for. Not for diagnosis.")
