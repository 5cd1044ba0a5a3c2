"""Neurite diffusivity, fraction and orientation density by a multilayer perceptron: the baseline.

Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415) compare their spherical network with it. It is
trained, calibrated and applied as `estimate_scnn2` is, for one acquisition, and is not
rotation-equivariant.
"""

from __future__ import annotations

from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.simulate.tissue import TWO_COMPARTMENTS


class PerceptronTwoCompartments(SphericalMethod):
    """d, f and ODF for the acquisition that the group level trained it for."""

    tissue = TWO_COMPARTMENTS
    intended_use = (
        "Baseline for comparison with estimate_scnn2, for the one acquisition under trained_for. "
        "Estimates depend on how the head lies. Not for diagnosis.")
