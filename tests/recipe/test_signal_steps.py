"""Denoise and upsample in the app: what the signal of one step is for the next one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bidsapp import cli, methods
from bidsapp.acquisition import Acquisition
from bidsapp.bids.btable import load_acquisition
from bidsapp.bids.writer import Dataset
from bidsapp.dwi import Dwi, noise_sd, peak_memory
from bidsapp.errors import Refusal
from bidsapp.kinds import Denoised
from bidsapp.methods.denoise_spherical.method import SphericalDenoiser
from bidsapp.recipe import signals
from bidsapp.recipe.plan import choose, plan
from bidsapp.recipe.steps import RunContext, StepReport, load_run
from bidsapp.run import memory_of
from bidsapp.stage import Stage
from support import bids_tree as truth
from support.app import find_runs, image, qsphere, validate

SHAPE = (9, 10, 8)


@pytest.fixture
def quick(monkeypatch):
    """A denoiser that shrinks each shell towards its mean, so that errors correlate."""
    def denoise(self, dwi, device, seed=0):
        signal = dwi.signal.copy()
        for shell in dwi.acquisition.shells:
            part = dwi.signal[:, shell.indices]
            signal[:, shell.indices] = part.mean(1, keepdims=True) + 0.5 * (
                part - part.mean(1, keepdims=True))
        return Denoised(signal, magnitude=False, parameters={"Weights": "abc"},
                        warnings=["SNR is 2, and 5–60 in the training."])

    monkeypatch.setattr(SphericalDenoiser, "denoise", denoise)


def dataset(folder, scheme=truth.SCHEME):
    return truth.write_dataset(folder / "bids", ("01",), scheme=scheme, shape=SHAPE)


def sidecar(out, name):
    return json.loads((out / f"sub-01/dwi/sub-01_{name}.json").read_text())


def record(out):
    return json.loads(next((out / "sub-01/log").glob("sub-01_dwi.json")).read_text())


def columns(out):
    return (out / "sub-01/dwi/sub-01_desc-image_qc.tsv").read_text().split("\n")[0].split("\t")


def dwi_of(signal, out, run):
    mask = image(out / "sub-01/dwi/sub-01_desc-brain_mask.nii.gz") > 0
    return Dwi(signal[mask].astype(np.float32), mask, np.eye(4), load_acquisition(run))


def test_measured_volumes_are_predicted_with_sd_and_a_round_trip(tmp_path, capsys):
    bids, out = dataset(tmp_path), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--upsample", "sh",
                   "--target-directions", "18") == 0
    assert "upsample_sh: round trip 1 of 10" in capsys.readouterr().err
    about, sd = sidecar(out, "desc-upsampled_dwi"), sidecar(
        out, "model-sh_stat-std_desc-upsampled_dwimap")
    assert about["SynthesizedVolumes"] == sd["Volumes"] == list(range(30, 38))
    assert "SynthesizedVolumes" not in sd  # the file has 8 volumes
    assert "sub-01_desc-upsampled_dwi.nii.gz" in sd["Description"]
    assert about["Description"].startswith("Volumes of the measured signal, unchanged inside")
    assert "roundtrip_rmse" in columns(out) and not record(out)["warnings"]
    assert not validate(out)


def test_predictions_from_a_denoised_signal_come_without_sd_and_round_trip(
        tmp_path, quick):
    bids, out = dataset(tmp_path), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti", "--denoise", "spherical", "--upsample",
            "sh", "--target-directions", "18")
    assert qsphere(*argv) == 0
    files = {p.name for p in (out / "sub-01/dwi").glob("*.nii.gz")}
    assert "sub-01_desc-upsampled_dwi.nii.gz" in files
    # neither predictions nor maps of the changed signals have intervals, those of the measured do
    assert {f for f in files if "stat-std" in f} and not {
        f for f in files if "stat-std" in f and ("denoised" in f or "upsampled" in f)}
    assert "roundtrip_rmse" not in columns(out)
    about = sidecar(out, "desc-upsampled_dwi")
    assert about["Description"].startswith("Volumes of the denoised signal, unchanged")
    assert about["Denoiser"] == {"Name": "denoise_spherical", "Weights": "abc"}
    facts = record(out)
    assert any("predicted from the denoised signal" in w for w in facts["warnings"])
    assert any(n.startswith("No round trip: each volume of the denoised") for n in facts["notices"])
    assert any("follow the 30 of the denoised signal" in n for n in facts["notices"])


def test_the_noise_of_a_denoised_signal_is_measured_anew(tmp_path, quick, capsys):
    bids, out = dataset(tmp_path), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--denoise", "spherical") == 0
    # what the method warns of is on the page and in the log
    assert "SNR is 2, and 5–60 in the training." in record(out)["warnings"]
    assert "SNR is 2, and 5–60" in capsys.readouterr().err
    steps = {name: json.loads((out / f"sub-01/log/sub-01_desc-{name}_step.json").read_text())
             for name in ("measured", "denoised")}
    (run,) = find_runs(bids).runs["01"]
    signal = image(out / "sub-01/dwi/sub-01_desc-denoised_dwi.nii.gz")
    dwi = dwi_of(signal, out, run)
    assert steps["denoised"]["noise_sd"] == pytest.approx(noise_sd(dwi), rel=1e-4)
    assert steps["denoised"]["noise_sd"] < 0.8 * steps["measured"]["noise_sd"]
    assert steps["denoised"]["magnitude"] is False


def test_an_upsampler_whose_denoiser_is_refused_says_so(tmp_path, capsys):
    bids, out = dataset(tmp_path, ((0, 2), (1000, 5), (2000, 5))), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti", "--upsample", "gp",
            "--target-directions", "12")
    assert qsphere(*argv) == 0
    assert "desc-upsampled_dwi" in " ".join(p.name for p in (out / "sub-01/dwi").iterdir())
    assert qsphere(*argv, "--denoise", "spherical", "--dry-run") == 0
    said = "upsample_gp: left out, since denoise_spherical was"
    assert said in capsys.readouterr().out
    assert qsphere(*argv, "--denoise", "spherical") == 1
    logged = capsys.readouterr().err
    assert said.replace(": left", " is left") in logged
    assert "images of an earlier upsample_gp are removed" in logged
    assert set(record(out)["refusals"]) == {"denoise_spherical", "upsample_gp"}
    assert "since denoise_spherical was" in (out / "sub-01.html").read_text()


def test_two_denoisers_warn(tmp_path, capsys):
    bids = dataset(tmp_path)
    argv = (bids, tmp_path / "out", "participant", "--estimate", "dti", "--denoise", "spherical",
            "--dry-run")
    assert qsphere(*argv) == 0
    assert "denoise, too" not in capsys.readouterr().out
    assert qsphere(*argv, "--preprocess", "denoise") == 0
    assert "denoise_spherical; the corrections denoise, too" in capsys.readouterr().out


def test_the_dry_run_sees_what_the_run_refuses(tmp_path, capsys):
    bids, table = dataset(tmp_path), tmp_path / "t.b"
    rows = np.column_stack([truth.directions(8), np.full(8, 3000)])
    np.savetxt(table, rows)

    def dry(name, *more):
        assert qsphere(bids, tmp_path / "out", "participant", "--estimate", "dti", "--upsample",
                       name, "--target-bvecs", table, "--dry-run", *more) == 0
        return capsys.readouterr().out

    assert "upsample_sh: refused: upsample_sh cannot predict b = 3000" in dry("sh")
    assert "refused" in dry("sh", "--allow-extrapolation")
    refused = dry("gp")
    assert "upsample_gp does not serve this run: b = 3000 s/mm² is predicted, and b = 1000 to " \
        "2000 s/mm² was measured. Choose other targets" in refused
    assert "not trained" not in refused and "Train" not in refused


def test_targets_of_another_shape_are_refused_before_the_prediction():
    table = Acquisition([0.0, *[1000.0] * 12], np.vstack([np.zeros((1, 3)), truth.directions(12)]))
    planar = Acquisition([1000.0] * 3, truth.directions(3), [-0.5] * 3)
    for name in ("upsample_scnn", "upsample_sh"):
        with pytest.raises(Refusal, match=r"b_delta|linear"):
            methods.get(name).check_target(table, planar)
        methods.get(name).check_target(table, replace(planar, b_delta=np.ones(3)))


def test_predicted_volumes_are_in_the_memory(tmp_path):
    bids = dataset(tmp_path)
    (run,) = find_runs(bids).runs["01"]
    voxels, table = np.prod(SHAPE), tmp_path / "t.bvec"
    np.savetxt(table, truth.directions(40).T)

    def need(*more):
        return memory_of(run, cli.parse([str(bids), "/out", "participant", "--preprocess", "none",
                                         *map(str, more)]))

    assert need() == peak_memory(voxels, 30)
    for more, new in (((), 180 - 28), (("--target-directions", 20), 12),
                      (("--target-bvecs", table), 80)):
        assert need("--upsample", "sh", *more) == peak_memory(voxels, 30 + 2 * new)
    assert nib.load(run.parts[0].image).shape == (*SHAPE, 30)
    assert signals.count_predicted(load_acquisition(run), cli.parse(["/in", "/out", "participant"]
                                                                    )) == 0


def test_a_signal_that_the_corrections_denoised_is_not_denoised_unwarned(tmp_path, quick):
    bids, out = dataset(tmp_path), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--preprocess", "denoise",
                   "--denoise", "spherical") == 0
    assert any("second denoiser" in w for w in record(out)["warnings"])


def test_sds_of_predictions_are_widened_by_the_error_of_the_harmonizer(tmp_path, monkeypatch):
    bids = dataset(tmp_path)
    options = cli.parse([str(bids), str(tmp_path / "out"), "participant", "--preprocess", "none",
                         "--upsample", "sh", "--target-directions", "18"])
    (run,) = find_runs(bids).runs["01"]
    context = RunContext(options, Dataset(tmp_path / "out", {"raw": bids}), run, "cpu", np.inf)
    step = next(s for s in plan(context, choose(options)) if s.name == "upsampled")
    sds = []
    monkeypatch.setattr("bidsapp.recipe.signals.outputs", lambda *_: SimpleNamespace(
        write_signal=lambda *_: None, write_sd=lambda _, sd, *__: sds.append(sd)))
    dwi = load_run(run)[0]
    for stage in (Stage(dwi), Stage(dwi, desc="harmonized", widening=1.5),
                  Stage(dwi, desc="harmonized", no_intervals="nobody knows its error")):
        step.apply(stage, None, report := StepReport())
        assert any(n.startswith("No round trip") for n in report.notices) == bool(stage.desc)
    np.testing.assert_allclose(sds[1], 1.5 * sds[0], rtol=1e-6)
    assert len(sds) == 2 and any("nobody knows its error" in n for n in report.notices)
