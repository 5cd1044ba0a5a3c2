"""Cyclic network (Sadegheih et al. 2023, doi:10.1007/s13218-023-00811-y, WP1).

It learns from participants of either site. Participants scanned at both sites help, but are not
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bidsapp import sh
from bidsapp.harmonization import harmonizer as shared
from bidsapp.harmonization import pairs
from bidsapp.harmonization.paired import Objective, PairedHarmonizer, draw_voxels
from bidsapp.harmonization.patches import (
    BLOCK,
    MEASURES,
    PatchDataset,
    PatchMinibatch,
    signal_error,
    weighted_loss,
)
from bidsapp.kinds import Cohort
from bidsapp.networks.builder import build_network
from bidsapp.networks.cyclic import Cycle, Generator

RECOMMENDED_PARTICIPANTS = 32
"""Recommended number of participants per site if nobody was scanned at both sites."""


class CyclicMinibatch(NamedTuple):
    """Patches (voxel, 27, coefficient) of either site, and aligned pairs if there are any."""

    source: torch.Tensor
    reference: torch.Tensor
    pairs: PatchMinibatch | None


class CyclicHarmonizer(PairedHarmonizer):
    """Two generators, one each way, with critics; any share of participants has paired scans."""

    min_pairs = 0
    learns_from = "participants at either site, some of them at both"
    intended_use = (
        "Maps the diffusion signal of one site to that of the reference site, for acquisitions "
        "and participants like those under trained_for. Without participants scanned at both "
        "sites, it takes every difference between the sites for one of scanners: the groups must "
        "be matched in age, sex and disease. Not for diagnosis.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """Check the cohort; warn of differences between the groups, and of small sites without
        pairs."""
        batches = shared.runs_by_site(self, cohort)
        reference, *sources = batches
        warnings = [*super().preflight(cohort), *shared.group_differences(self, cohort, batches)]
        for batch in sources:
            small = shared.small_sites({b: batches[b] for b in (reference, batch)},
                                       RECOMMENDED_PARTICIPANTS)
            if small and not _paired(self.scans(cohort, batch, reference)):
                warnings.append(
                    f"{small}, and nobody was scanned at {batch} and at {reference}. Chance "
                    "differences between such small groups are taken for differences of scanners. "
                    "Harmonize with harmonize_rish, add participants "
                    f"({RECOMMENDED_PARTICIPANTS} at each site lowered every error in "
                    "simulations), or scan one or more at both sites.")
        return warnings

    def _recipe(self, scans: Sequence[pairs.Pair]) -> dict[str, Any]:
        """Give the generator fine gains (`networks.cyclic`) if pairs can train them."""
        recipe = super()._recipe(scans)
        return {**recipe, "network": {**recipe["network"], "fine": _paired(scans)}}

    def scans(self, cohort: Cohort, batch: str, reference: str) -> list[pairs.Pair]:
        """List every scan, paired with itself, and the pairs of participants scanned at both sites.
        """
        return [*pairs.unpaired(cohort.statistics, batch, reference),
                *super().scans(cohort, batch, reference)]

    def objective(self, network: nn.Module, samples: PatchDataset, voxels: Sequence[torch.Tensor],
                  recipe: Mapping[str, Any], device: str, fresh: bool) -> Objective:
        """Create the objective: Σ_k w_k L_k of `networks.cyclic`, and for pairs the square errors
        of signal, FA and MD (`patches.weighted_loss`)."""
        both, source, reference = voxels
        assert isinstance(network, Generator)
        if fresh:
            network.scale.copy_(_scale(samples, [source, reference], device))
        weight = recipe["loss"]
        back = build_network({**recipe["network"], "fine": False})
        assert isinstance(back, Generator)
        cycle = Cycle(network, back, critic=recipe["critic"])
        difference = weighted_loss(dict.fromkeys(MEASURES, weight["pairs"]), samples, both,
                                   recipe["validation"], device) if len(both) else signal_error

        def draw(size: int, generator: torch.Generator) -> CyclicMinibatch:
            x, y = (samples(draw_voxels(v, size, generator), generator.device).patches
                    for v in (source, reference))
            pairs_of_both = (samples(draw_voxels(both, size, generator), generator.device)
                             if len(both) else None)
            return CyclicMinibatch(x, y, pairs_of_both)

        def loss(model: nn.Module, minibatch: CyclicMinibatch) -> torch.Tensor:
            losses = model(minibatch.source, minibatch.reference)
            total = sum(weight[k] * v for k, v in losses.items())
            if pair := minibatch.pairs:
                total = total + difference(network(pair.patches), pair).mean()
            return total

        return Objective(cycle, draw, loss, difference)


def _paired(scans: Sequence[pairs.Pair]) -> bool:
    """Check whether a participant was scanned at both sites."""
    return any(p.kind == pairs.BOTH for p in scans)


def _scale(samples: PatchDataset, voxels: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """Compute the root mean square of each degree, (degree,), with equal weights of the sites."""
    total = torch.zeros(sh.size(samples.l_max), dtype=torch.float64)
    for site_voxels in voxels:
        some = site_voxels[::max(1, len(site_voxels) // (20 * BLOCK))]
        total += torch.cat([b.centre.double().square().cpu()
                            for b in samples.blocks(some, device)]).mean(0) / len(voxels)
    by_degree = [total[sh.size(l - 2) if l else 0:sh.size(l)].mean().sqrt()
                 for l in range(0, samples.l_max + 1, 2)]
    return torch.stack(by_degree).float()
