"""Base class of the methods that estimate a tissue model by a spherical network or a perceptron."""

from __future__ import annotations

from typing import ClassVar

from bidsapp.dwi import Dwi
from bidsapp.errors import UsageError
from bidsapp.kinds import Cohort, Derived, Fitted, TrainingSettings
from bidsapp.microstructure import deconvolution, learn, maps
from bidsapp.selection import NetworkEstimator
from bidsapp.simulate.tissue import TissueModel

FROM_RUNS = ("training.trained_for.", "training.groups", "training.network.shells")
"""Prefixes of hyper-parameters that a training for one acquisition derives from the runs."""


class SphericalMethod(NetworkEstimator):
    """Estimator of the parameters and ODF of a tissue model (`bidsapp.microstructure`).

    Attributes
    ----------
    tissue : TissueModel
        Tissue model, set by each method.
    intended_use : str
        Text of the model card, set by each method.
    """

    tissue: ClassVar[TissueModel]
    intended_use: ClassVar[str]

    def recipe(self, *variants: str) -> learn.Recipe:
        """Read the recipe of a training for all protocols or, with the variant "one", for one
        acquisition."""
        return learn.read_recipe(self.tissue, self.settings("training", *variants))

    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        return Derived(*maps.estimate(self.select(dwi.acquisition), self.tissue, dwi, device,
                                      allow=self.context.allow_extrapolation))

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a network for the acquisition that all runs of the cohort share.

        A share `simulate.tissue.MEASURED` of the training densities is deconvolved from the runs,
        unless the tissue model prescribes Watson densities or no run can be deconvolved.
        """
        if changed := [path for path in self.changed_settings if path.startswith(FROM_RUNS)]:
            raise UsageError(f"--set {self.name}.{changed[0]}: a training at group level takes it "
                             "from the runs. Leave the option out.")
        table = None
        if self.tissue.watson is None and cohort.load:
            table = deconvolution.deconvolve_study(
                cohort.load, list(cohort.acquisitions), voxels=20 if self.context.sloppy else 2000,
                seed=settings.seed, device=settings.device)
        name, checkpoint = learn.train_for_acquisition(
            self.name, self.recipe("one"), cohort.acquisitions,
            cohort.statistics["snr_b0"].tolist(), table=table, steps=settings.max_steps,
            seed=settings.seed, device=settings.device, states=settings.states,
            intended_use=self.intended_use, init=settings.init, devices=settings.devices)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": checkpoint.card.metrics}, {name: checkpoint})
