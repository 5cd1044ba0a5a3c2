"""Pretraining of an encoder of volumes by the removal of artifacts (Weninger et al. 2022).

Weninger, Ecke, et al. 2022, "Diffusion MRI specific pretraining by self-supervision on an auxiliary
dataset". Without artifacts it is an autoencoder, with masked cubes a masked autoencoder.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from bidsapp.acquisition import Acquisition
from bidsapp.errors import Refusal
from bidsapp.kinds import Cohort, Fitted, Trainable, TrainingSettings
from bidsapp.volumetric import learn, scans
from bidsapp.volumetric.corruption import Corruption

log = logging.getLogger("qsphere")


class ArtifactRemoval(Trainable):
    """Training of an encoder that other networks start from with --init."""

    intended_use = (
        "Start of the training of a network on volumes of diffusion signals (`--init`), such as "
        "estimate_tissue, estimate_crossings or estimate_direction. Its own outputs, signals "
        "without artifacts, are not meant for use.")

    def check(self, acquisition: Acquisition) -> None:
        raise Refusal(f"{self.name} trains the start of other networks, and is not applied to "
                      f"images. Use `group --train {self.name}`, then `group --train "
                      "estimate_tissue --init OUTPUT_DIR/group/models/…`.")

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train the encoder on the runs of the cohort, without labels."""
        table = self.settings("training")
        recipe = learn.read_recipe(table)
        assert cohort.load
        load = cohort.load
        start = learn.choose_start(self, settings.init)
        channels = learn.choose_channels(recipe, cohort, start)

        def loss(output: torch.Tensor, example: scans.Example) -> torch.Tensor:
            return (output - example.clean)[:, example.valid].square().mean()

        def measure(output: torch.Tensor, example: scans.Example) -> dict[str, Any]:
            before = (example.ratio - example.clean)[:, example.valid].square().mean()
            return {"mse": float(loss(output, example)), "mse_before": float(before)}

        task = learn.Task(lambda run: scans.Labelled(load(run)),
                          len(channels.directions) or None, loss, measure, Corruption(
                              table["corruption"], channels.voxel, table["phase_axis"]))
        name, checkpoint = learn.fit(self, task, cohort, settings,
                                     intended_use=self.intended_use, start=start)
        metrics = checkpoint.card.metrics
        if 0 < metrics["mse_before"] < metrics["mse"]:
            warning = (f"the validation's mean square error is {metrics['mse']:.3g} after the "
                       f"network, {metrics['mse_before']:.3g} before it: it has not learned yet. "
                       "Train it for longer, or on more runs.")
            log.warning("--train %s: %s", self.name, warning)
            checkpoint = replace(checkpoint, card=replace(checkpoint.card, warnings=(
                *checkpoint.card.warnings, warning)))
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "Metrics": dict(metrics),
                           "Use": "trainings of other networks start from them (--init)",
                           "MetricsOf": "the middle of the held-out runs"}, {name: checkpoint})
