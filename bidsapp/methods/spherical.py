"""What the methods that are a network with its own tissue model share."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.methods import Derived, Estimator, Fitted, Study, Trainable
from bidsapp.microstructure import learn, maps
from bidsapp.preprocess import deconvolution
from bidsapp.simulate.tissue import Tissue


class SphericalMethod(Estimator, Trainable):
    """Parameters and ODF of a tissue model by a network (`bidsapp.microstructure`).

    tissue: the model. intended_use: of the card.
    """

    tissue: ClassVar[Tissue]
    intended_use: ClassVar[str]

    def recipe(self, *variants: str) -> learn.Recipe:
        """How a network is trained: for all protocols, or, with "one", for one acquisition."""
        return learn.read_recipe(self.tissue, self.settings("training", *variants))

    @cached_property
    def weights(self) -> list[Checkpoint]:
        """Networks trained at group level and the one that ships, loaded once."""
        return maps.find_weights(self.name, self.models)

    def select(self, acquisition: Acquisition) -> Checkpoint:
        """Select the weights for a run (`maps.select_weights`)."""
        return maps.select_weights(self.name, self.weights, acquisition,
                                   allow=self.allow_extrapolation)

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where neither a network trained at group level fits the acquisition, nor
        the one that ships: that one needs a b0 and two shells in its range."""
        self.select(acquisition)

    def violations(self, acquisition: Acquisition) -> list[str]:
        return self.select(acquisition).card.trained_for.violations(acquisition)

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        return Derived(*maps.estimate(self.select(dwi.acquisition), self.tissue, dwi, device,
                                      allow=self.allow_extrapolation))

    def fit(self, study: Study) -> Fitted:
        """A network for the one acquisition that all runs of the study share; a share of the
        densities it learns from (`simulate.tissue.MEASURED`) are of their own voxels."""
        table = None
        if self.tissue.watson is None and study.load:
            table = deconvolution.of_study(
                study.load, list(study.acquisitions), voxels=20 if self.sloppy else 2000,
                seed=study.seed, device=study.device)
        name, checkpoint = learn.for_one(
            self.name, self.recipe("one"), study.acquisitions,
            study.statistics["snr_b0"].tolist(), table=table,
            steps=study.max_steps, seed=study.seed, device=study.device, states=study.states,
            intended_use=self.intended_use, init=study.init, devices=study.devices)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": checkpoint.card.metrics}, {name: checkpoint})
