"""Cyclic network (Sadegheih et al. 2023, doi:10.1007/s13218-023-00811-y, WP1): people scanned in
both batches help, and are not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bidsapp import sh, training
from bidsapp.harmonization import harmonizer as shared
from bidsapp.harmonization import pairs
from bidsapp.harmonization.paired import Objective, PairedHarmonizer, draw_voxels
from bidsapp.harmonization.patches import BLOCK, MEASURES, PatchDataset, signal_error, weighted_loss
from bidsapp.kinds import Cohort
from bidsapp.networks.builder import build_network
from bidsapp.networks.cyclic import Cycle, Generator
from bidsapp.networks.shresnet import CENTRE

WANTED = 32
"""Participants of every batch, where nobody is in both."""


class CyclicHarmonizer(PairedHarmonizer):
    """Generators both ways with critics, from any share of people scanned in both batches."""

    min_pairs = 0
    learns_from = "both batches, and of people in both where there are any"
    intended_use = (
        "Maps the diffusion signal of one batch to that of the reference batch, for acquisitions "
        "and people like those under trained_for. Without people in both batches it takes every "
        "difference between the batches for one of scanners: they must be alike in age, sex and "
        "disease. Not for diagnosis.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """As of `PairedHarmonizer`, without need of pairs; of `harmonizer.group_differences`; and
        where there are few people and no pair."""
        batches = shared.runs_by_site(self, cohort)
        reference, *targets = batches
        told = [*super().preflight(cohort), *shared.group_differences(self, cohort, batches)]
        for batch in targets:
            few = shared.small_sites({b: batches[b] for b in (reference, batch)}, WANTED)
            if few and not _paired(self.scans(cohort, batch, reference)):
                told.append(
                    f"{few}, and nobody was scanned in {batch} and in {reference}. What so few "
                    "people differ in by chance is taken for the scanners'. Harmonize with "
                    f"harmonize_rish, add people ({WANTED} in each batch lowered every error of "
                    "simulated ones), or scan one or more in both.")
        return told

    def _recipe(self, found: Sequence[pairs.Pair]) -> dict[str, Any]:
        """Generators have fine gains where pairs teach them."""
        recipe = super()._recipe(found)
        return {**recipe, "network": {**recipe["network"], "fine": _paired(found)}}

    def scans(self, cohort: Cohort, batch: str, reference: str) -> list[pairs.Pair]:
        return [*pairs.unpaired(cohort.statistics, batch, reference),
                *super().scans(cohort, batch, reference)]

    def objective(self, network: nn.Module, samples: PatchDataset, mine: Sequence[torch.Tensor],
                recipe: Mapping[str, Any], device: str, fresh: bool) -> Objective:
        """The loss is Σ_k w_k L_k of `networks.cyclic`, and of pairs the square errors of signal,
        FA and MD (`patches.weighted_loss`)."""
        both, source, reference = mine
        assert isinstance(network, Generator)
        if fresh:
            network.scale.copy_(_scale(samples, [source, reference], device))
        weight = recipe["loss"]
        back = build_network({**recipe["network"], "fine": False})
        assert isinstance(back, Generator)
        cycle = Cycle(network, back, critic=recipe["critic"])
        difference = weighted_loss(dict.fromkeys(MEASURES, weight["pairs"]), samples, both,
                                   recipe["validation"], device) if len(both) else signal_error

        def draw(size: int, generator: torch.Generator) -> training.Minibatch:
            x, y = (samples(draw_voxels(v, size, generator), generator.device)[0]
                    for v in (source, reference))
            return (x, y, *(samples(draw_voxels(both, size, generator), generator.device)
                            if len(both) else ()))

        def loss(model: nn.Module, batch: training.Minibatch) -> torch.Tensor:
            x, y, *pair = batch
            total = sum(weight[k] * v for k, v in model(x, y).items())
            if pair:
                total = total + difference(network(pair[0]), tuple(pair)).mean()
            return total

        return Objective(cycle, draw, loss, difference)


def _paired(scans: Sequence[pairs.Pair]) -> bool:
    return any(p.kind == pairs.BOTH for p in scans)


def _scale(samples: PatchDataset, voxels: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """(degree,) root mean square of the coefficients of both batches, each with the same weight."""
    total = torch.zeros(sh.size(samples.l_max), dtype=torch.float64)
    for own in voxels:
        few = own[::max(1, len(own) // (20 * BLOCK))]
        total += torch.cat([b[0][:, CENTRE].double().square().cpu()
                            for b in samples.blocks(few, device)]).mean(0) / len(voxels)
    degrees = [total[sh.size(l - 2) if l else 0:sh.size(l)].mean().sqrt()
               for l in range(0, samples.l_max + 1, 2)]
    return torch.stack(degrees).float()
