"""The denoised signal in the app: its noise, its maps and its files."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bidsapp import cli, methods, upsample
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi, noise_sd
from bidsapp.kinds import Denoised
from bidsapp.recipe import steps
from bidsapp.recipe.signals import Denoise
from bidsapp.recipe.steps import Estimate, StepReport
from bidsapp.stage import Stage
from support.app import image, qsphere
from support.crossing_tensors import simulate

AXES = upsample.spread(np.zeros((0, 3)), 24)
TABLE = Acquisition(np.repeat([0.0, 1000, 2000], [3, 24, 24]), np.r_[np.zeros((3, 3)), AXES, AXES])


@pytest.fixture
def denoised(rng, monkeypatch):
    """The stage of a signal of which 0.4 of the noise is left, the stage before, and its report."""
    noisy, clean = simulate(rng, TABLE, 3000, 0.05)
    mask = np.ones((15, 20, 10), bool)
    dwi = Dwi(noisy.astype(np.float32), mask, np.eye(4), TABLE, magnitude=False)
    before = Stage(replace(dwi, noise_sd=noise_sd(dwi)))
    method = SimpleNamespace(
        name="denoise_most", check=lambda _: None, violations=lambda _: [],
        outputs={"signal": {}, "model": {"name": "most"}},
        denoise=lambda dwi, *_: Denoised((clean + 0.4 * (noisy - clean)).astype(np.float32)))
    monkeypatch.setattr("bidsapp.recipe.signals.outputs", lambda *args: SimpleNamespace(
        write_signal=lambda *_: args[2]))
    step, report = Denoise(context(), None, method), StepReport()
    return step.apply(before, None, report), before, report


def context():
    return SimpleNamespace(run=SimpleNamespace(name="sub-01", anatomy=()), device="cpu",
                           options=cli.parse(["/in", "/out", "participant"]))


def test_noise_of_a_denoised_signal_is_not_that_of_the_measured_one(denoised):
    """The noise that is left is independent, so that its level can be measured; a level that is
    unknown is none."""
    after, before, _ = denoised
    assert before.dwi.noise_sd == pytest.approx(0.05, rel=0.03)
    assert after.desc == "denoised"
    assert after.dwi.noise_sd is None or after.dwi.noise_sd == pytest.approx(0.02, rel=0.03)


def test_maps_of_a_denoised_signal_have_no_intervals(denoised, monkeypatch):
    """estimate_dti gives standard errors for the measured signal, and none for the denoised one,
    whose page says so."""
    after, before, report = denoised
    made = []
    monkeypatch.setattr(steps, "outputs", lambda *_: SimpleNamespace(
        write=lambda _, derived: made.append(derived)))
    for stage in (before, after):
        taken = SimpleNamespace(desc=stage.desc, name=stage.desc)
        Estimate(context(), taken, methods.get("estimate_dti")).apply(
            stage, None, StepReport())
    measured, denoised_maps = (derived.maps for derived in made)
    intervals = {key for key in measured if key.endswith("_std")}
    assert intervals and set(denoised_maps) == set(measured) - intervals
    assert any("intervals" in notice for notice in report.notices)


@pytest.mark.slow
def test_denoise_on_the_command_line(bids_tree, tmp_path):
    """The denoised signal, with weights and noise in its sidecar, and its maps without intervals
    beside the measured ones with them."""
    root, out = bids_tree(("01",), shape=(10, 11, 9)), tmp_path / "out"
    assert qsphere(root, out, "participant", "--denoise", "spherical", "--estimate", "dti") == 0
    folder = out / "sub-01/dwi"
    about = json.loads((folder / "sub-01_desc-denoised_dwi.json").read_text())
    parameters = about["Model"]["Parameters"]
    assert parameters["Layer"] == "zonal" and len(parameters["Weights"]) == 64
    signal = image(folder / "sub-01_desc-denoised_dwi.nii.gz")
    raw = image(root / "sub-01/dwi/sub-01_dwi.nii.gz")
    mask = image(folder / "sub-01_desc-brain_mask.nii.gz") > 0
    assert signal.shape == raw.shape and not signal[~mask].any()
    np.testing.assert_array_equal(signal[mask][:, :2], raw[mask][:, :2])  # b0
    assert (signal[mask][:, 2:] != raw[mask][:, 2:]).any(0).all()
    names = {p.name for p in folder.glob("*param-*_dwimap.nii.gz")}
    denoised = {n.replace("_desc-denoised", "") for n in names if "denoised" in n}
    measured = {n for n in names if "denoised" not in n}
    intervals = {n for n in measured if "stat-std" in n}
    assert intervals and denoised == measured - intervals
