"""The spherical network for neurites and soma on real phantoms with linear and planar b-tensors.

Szczepankiewicz et al. 2019, doi:10.1016/j.dib.2019.104208.
"""

from dataclasses import replace

import numpy as np
import pytest
from dipy.reconst.dti import TensorModel
from scipy.ndimage import binary_erosion

from bidsapp import cli, methods
from bidsapp.bids import btable, find
from bidsapp.dwi import noise_sd
from bidsapp.series import Series


def phantom(test_data, tmp_path, label):
    """The inside of five slices in the middle."""
    options = cli.parse([str(test_data("dib2019_btensor")), str(tmp_path / "out"), "participant",
                         "--participant-label", label])
    (run,) = find.find_runs(options).runs[label]
    series = Series.from_run(run, btable.load_acquisition(run))
    mean = series.mean(series.acquisition.b0)
    mask = binary_erosion(mean > 0.5 * np.percentile(mean, 99), iterations=3)
    mask[:, :, :10] = mask[:, :, 15:] = False
    dwi = series.within(mask)
    return replace(dwi, noise_sd=noise_sd(dwi))


@pytest.mark.slow
def test_water_is_free_and_the_liquid_crystal_is_not(test_data, tmp_path):
    """Water: the diffusivity of dipy's tensor fit, hardly any neurites. Water in the channels of
    a hexagonal phase moves along them alone: mostly sticks, with order. The crystal's linear and
    planar runs are one acquisition, and shells of both shapes are used."""
    water, crystal = (phantom(test_data, tmp_path, label) for label in ("water", "hex"))
    free, sticks = (methods.get("estimate_scnn3").apply(dwi, "cpu") for dwi in (water, crystal))
    low = water.acquisition.bvals < 1000
    fit = TensorModel(water.acquisition[low].to_dipy()).fit(water.signal[:, low])
    assert np.median(free.maps["diffusivity"]) == pytest.approx(1000 * np.median(fit.md), abs=0.15)
    assert np.median(free.maps["neuritefraction"]) < 0.1
    assert np.median(sticks.maps["neuritefraction"]) > 0.6
    ordered, random = (np.median(np.linalg.norm(odf[:, 1:6], axis=1) / odf[:, 0])
                       for odf in (sticks.maps["odf"], free.maps["odf"]))
    assert ordered > 2 * random
    assert sticks.parameters["Shells"] == [700, 1400, 2000, 2000]
