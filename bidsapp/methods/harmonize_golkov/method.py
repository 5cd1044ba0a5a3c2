"""The q-space perceptron of Golkov et al. 2016 (doi:10.1109/TMI.2016.2551324) from SH coefficients
to SH coefficients: the baseline of Koppers et al. 2018."""

from __future__ import annotations

from bidsapp.harmonization.paired import PairedHarmonizer


class GolkovHarmonizer(PairedHarmonizer):
    """Each voxel by itself; directions are not kept."""

    rish_projection = False
    intended_use = (
        "Baseline for comparison with harmonize_shresnet. Fibre directions may change. Not for "
        "diagnosis.")
