"""Neurites, soma and orientation density by a spherical network, from tensor-valued encoding.

Kerkelä et al. 2024 (doi:10.3389/fnimg.2024.1349415) with the constrained three-compartment model
of Gyori et al. 2021 (doi:10.1016/j.neuroimage.2021.118303). Here one network serves every
acquisition in its range, and gives a posterior SD (`bidsapp.microstructure`).
"""

from __future__ import annotations

import tomllib

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.methods import Derived, Method
from bidsapp.microstructure import learn, maps
from bidsapp.simulate.tissue import THREE_COMPARTMENTS


class ThreeCompartments(Method):
    """d, f, d_sph, f_sph and ODF with the weights that ship."""

    tissue = THREE_COMPARTMENTS
    intended_use = (
        "Neurite and soma diffusivities and signal fractions and orientation density of brain "
        "tissue from shells of linear, planar or spherical encoding within the ranges under "
        "trained_for. Not for diagnosis.")

    def recipe(self) -> learn.Recipe:
        """How the weights are trained."""
        return learn.read_recipe(
            self.tissue, tomllib.loads((self.folder / "training.toml").read_text()))

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal without a b0 or two shells within what the network was trained for."""
        maps.check(acquisition, maps.shipped(self.name).card.trained_for,
                             self.name)

    def apply(self, dwi: Dwi, device: str) -> Derived:
        return Derived(*maps.estimate(
            maps.shipped(self.name), self.tissue, dwi, device))
