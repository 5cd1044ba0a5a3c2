"""Neurite diffusivity, fraction and orientation density by a spherical network.

Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415): a rotation-equivariant network, trained on
simulated signals of the constrained two-compartment model (Kaden et al. 2016,
doi:10.1016/j.neuroimage.2016.06.002). Unlike in the paper, the network starts from a
likelihood-based posterior mean, serves every acquisition in its range, and returns posterior SDs
(`bidsapp.microstructure`).
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import TWO_COMPARTMENTS


class TwoCompartments(SphericalMethod):
    """Estimator of d, f and ODF, with bundled weights."""

    tissue = TWO_COMPARTMENTS
    intended_use = (
        "Neurite diffusivity, neurite fraction and orientation density of brain tissue from "
        "multi-shell linear encoding within the ranges under trained_for. The model has one "
        "diffusivity, the tortuosity constraint and no free water. Not for diagnosis.")
