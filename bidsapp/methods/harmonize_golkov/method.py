"""Perceptron between SH coefficients: the baseline of Koppers et al. 2018.

It is the q-space network of Golkov et al. 2016 (doi:10.1109/TMI.2016.2551324).
"""

from __future__ import annotations

from bidsapp.harmonization.paired import PairedHarmonizer


class GolkovHarmonizer(PairedHarmonizer):
    """A perceptron that maps each voxel on its own; fibre directions may change."""

    rish_projection = False
    intended_use = (
        "Baseline for comparison with harmonize_shresnet. Fibre directions may change. Not for "
        "diagnosis.")
