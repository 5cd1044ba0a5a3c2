"""Neurite density, dispersion and free water (NODDI) by a spherical network.

Zhang et al. 2012 (doi:10.1016/j.neuroimage.2012.03.072), estimated as Kerkelä et al. 2024
(doi:10.3389/fnimg.2024.1349415) estimate theirs: a rotation-equivariant network trained on
simulated signals in place of a fit (`bidsapp.microstructure`).
"""

from __future__ import annotations

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.methods import Derived, Fitted, Method, Study
from bidsapp.microstructure import learn, maps
from bidsapp.simulate.tissue import NODDI


class Noddi(Method):
    """NDI, ODI, FISO and the ODF with the weights that ship."""

    tissue = NODDI
    intended_use = (
        "Neurite density index, orientation dispersion index and free water fraction of brain "
        "tissue in vivo from multi-shell linear encoding within the ranges under trained_for. "
        "Diffusivities are fixed (1.7 and 3.0 µm²/ms). Not for diagnosis.")

    def recipe(self, *variants: str) -> learn.Recipe:
        """How a network is trained: for all protocols, or, with "one", for one acquisition."""
        return learn.read_recipe(self.tissue, self.settings("training", *variants))

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where neither a network trained at group level fits the acquisition, nor
        the one that ships: that one needs a b0 and two shells in its range."""
        maps.fitting(self.name, acquisition, self.models)

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        checkpoint = maps.fitting(self.name, dwi.acquisition, self.models)
        return Derived(*maps.estimate(checkpoint, self.tissue, dwi, device))

    def fit(self, study: Study) -> Fitted:
        """A network for the one acquisition that all runs of the study share."""
        name, checkpoint = learn.for_one(
            self.name, self.recipe("one"), study.acquisitions,
            study.statistics["snr_b0"].tolist(),
            steps=study.max_steps, seed=study.seed, device=study.device, states=study.states,
            intended_use=self.intended_use)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": checkpoint.card.metrics}, {name: checkpoint})
