"""Neurite diffusivity, fraction and orientation density by a multilayer perceptron, a baseline.

Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415) compare their spherical network with such a
perceptron. It is trained for one acquisition, calibrated and applied like `estimate_scnn2`, and is
not rotation-equivariant.
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import TWO_COMPARTMENTS


class PerceptronTwoCompartments(SphericalMethod):
    """Estimator of d, f and ODF, for the acquisition of its training at group level."""

    tissue = TWO_COMPARTMENTS
    intended_use = (
        "Baseline for comparison with estimate_scnn2, for the one acquisition under trained_for. "
        "Estimates depend on how the head lies. Not for diagnosis.")
