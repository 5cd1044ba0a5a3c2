"""What the methods that are a network with its own tissue model share."""

from __future__ import annotations

from typing import ClassVar

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import UsageError
from bidsapp.methods import Cohort, Derived, Estimator, Fitted, Trainable, TrainingSettings
from bidsapp.microstructure import learn, maps
from bidsapp.preprocess import deconvolution
from bidsapp.simulate.tissue import Tissue

FROM_RUNS = ("training.trained_for.", "training.groups", "training.network.shells")
"""Hyper-parameters, by how their paths start, that a training for one acquisition does not read."""


class SphericalMethod(Estimator, Trainable):
    """Parameters and ODF of a tissue model by a network (`bidsapp.microstructure`).

    tissue: the model. intended_use: of the card.
    """

    tissue: ClassVar[Tissue]
    intended_use: ClassVar[str]

    def recipe(self, *variants: str) -> learn.Recipe:
        """How a network is trained: for all protocols, or, with "one", for one acquisition."""
        return learn.read_recipe(self.tissue, self.settings("training", *variants))

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where neither a network trained at group level fits the acquisition, nor
        the one that ships: that one needs a b0 and two shells in its range."""
        maps.fitting(self.name, acquisition, self.context.models)

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        checkpoint = maps.fitting(self.name, dwi.acquisition, self.context.models)
        return Derived(*maps.estimate(checkpoint, self.tissue, dwi, device))

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """A network for the one acquisition that all runs of the cohort share; a share of the
        densities it learns from (`simulate.tissue.MEASURED`) are of their own voxels."""
        if given := [path for path in self.changed_settings if path.startswith(FROM_RUNS)]:
            raise UsageError(f"--set {self.name}.{given[0]}: a training at group level takes it "
                             "from the runs. Leave the option out.")
        table = None
        if self.tissue.watson is None and cohort.load:
            table = deconvolution.of_study(
                cohort.load, list(cohort.acquisitions), voxels=20 if self.context.sloppy else 2000,
                seed=settings.seed, device=settings.device)
        name, checkpoint = learn.for_one(
            self.name, self.recipe("one"), cohort.acquisitions,
            cohort.statistics["snr_b0"].tolist(), table=table, steps=settings.max_steps,
            seed=settings.seed, device=settings.device, states=settings.states,
            intended_use=self.intended_use, init=settings.init, devices=settings.devices)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": checkpoint.card.metrics}, {name: checkpoint})
