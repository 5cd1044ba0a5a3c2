"""The quality score: zero for a perfect reproduction, known for known errors, far worse for
random-wm."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from bidsapp import kinds, methods
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.methods.synthesize import score
from bidsapp.networks.mlp import mlp
from bidsapp.options import MODES
from support import bids_tree
from support import synthetic_head as head
from support.app import load_first_run, qsphere, validate

ERRORS = ("signal_error", "fa_error", "md_error", "direction_error")


@pytest.fixture(scope="module")
def dwi():
    return head.participant()[0]


@pytest.mark.parametrize("n,expected", [
    (90, [90, 45, 22, 45, 90]), (20, [20, 10, 7, 10, 20]), (8, [8, 7, 7, 7, 8]),
    (6, [6, 6, 6, 6, 6]), (288, [288, 144, 72, 144, 288])])
def test_width_follows_the_directions(n, expected):
    assert score.layer_widths(n) == expected
    network = score.Autoencoder(torch.zeros(n), torch.ones(()), 0.1)
    assert [p.shape[0] for p in network.layers.parameters() if p.ndim == 2] == expected[1:]
    assert network(torch.rand(3, n)).shape == (3, n)


def test_mlp_is_what_it_says():
    network = mlp([5, 4, 3, 2], torch.nn.Tanh, torch.nn.BatchNorm1d)
    assert [type(layer).__name__ for layer in network] == [
        "Linear", "BatchNorm1d", "Tanh", "Linear", "BatchNorm1d", "Tanh", "Linear"]


def test_identity_has_no_error(dwi):
    found = score.compare(dwi, lambda signal, s0: signal, "cpu")
    assert all(found[k] == 0 for k in ERRORS if k != "direction_error")
    assert found["direction_error"] < 0.05  # float32 arccos near 1
    assert found["n_voxels"] == len(dwi.signal) > found["n_fibre_voxels"] > 100


def test_errors_are_those_that_were_made(dwi):
    """Without noise, a signal to the power of 1.1 is that of 1.1 times the tensor: MD rises by a
    tenth, FA and direction stay. One that is 0.01 too high has that error, and no SD."""
    d = bids_tree.PERPENDICULAR * np.eye(3) + (
        bids_tree.PARALLEL - bids_tree.PERPENDICULAR) * np.outer(bids_tree.AXIS, bids_tree.AXIS)
    clean = 700 * np.exp(-np.einsum("nij,ij->n", dwi.acquisition.btensors, d))
    one = Dwi(clean[None].astype(np.float32), np.ones((1, 1, 1), bool), np.eye(4), dwi.acquisition)
    found = score.compare(one, lambda signal, s0: signal**1.1, "cpu")
    assert found["md_error"] == pytest.approx(0.1 * bids_tree.MD, rel=1e-3)
    assert found["fa_error"] < 1e-4 and found["direction_error"] < 0.1
    found = score.compare(dwi, lambda signal, s0: signal + 0.01, "cpu")
    assert found["signal_error"] == pytest.approx(0.01, rel=1e-4)
    assert found["signal_error_sd"] < 1e-4


def test_noise_is_that_of_the_run(dwi):
    """The SD of Rician noise at high signal; MAE is √(2/π) of it."""
    sd = dwi.noise_sd / np.median(dwi.mean_b0)
    found = score.compare(dwi, score.noise_model(dwi.noise_sd, 0, "cpu"), "cpu")
    assert found["signal_error"] == pytest.approx(np.sqrt(2 / np.pi) * sd, rel=0.1)
    assert 0 < found["fa_error"] < 0.1


def test_noise_is_that_of_each_voxel():
    """A tenth of S0 makes the noise of S/S0 ten times as large."""
    signal = torch.full((2, 20_000), 0.8)
    noisy = score.noise_model(10.0, 0, "cpu")(signal, torch.tensor([100.0, 1000.0]))
    assert (noisy - signal).std(1).tolist() == pytest.approx([0.1, 0.01], rel=0.05)


@pytest.mark.slow
def test_modes_are_told_apart(dwi):
    """Random white matter is far worse than the others. The signal is left as it was."""
    before = dwi.signal.copy()
    made = methods.get("synthesize").synthesize(dwi, MODES, 3, "cpu")
    assert set(made.scores) == {*MODES, "noise"}
    worst = {k: max(made.scores[m][k] for m in MODES[:3]) for k in ERRORS}
    assert made.scores["random-wm"]["fa_error"] > 5 * worst["fa_error"]
    assert made.scores["random-wm"]["direction_error"] > 2 * worst["direction_error"]
    assert made.scores["random-wm"]["signal_error"] > 1.5 * worst["signal_error"]
    np.testing.assert_array_equal(dwi.signal, before)


@pytest.mark.slow
def test_seeds_matter_and_every_number_is_described(dwi):
    quick = methods.get("synthesize", context=kinds.MethodContext(sloppy=True))
    one, again, other = (quick.synthesize(dwi, ["sample"], seed, "cpu").scores
                         for seed in (3, 3, 4))
    assert one == again != other
    described = methods.get("synthesize").outputs["scores"]
    assert set(described) == set(one["sample"])


def test_voxels_without_signal_are_left_out(dwi):
    signal = dwi.signal.copy()
    signal[:50] = 0
    empty = Dwi(signal, dwi.mask, dwi.affine, dwi.acquisition, dwi.noise_sd)
    found = score.compare(empty, lambda signal, s0: signal + 0.02, "cpu")
    assert found["n_voxels"] == len(signal) - 50
    assert found["signal_error"] == pytest.approx(0.02, rel=1e-3)


def test_no_fibres_have_no_direction_error(dwi):
    """Isotropic everywhere: not a number, which tables write as n/a."""
    signal = np.repeat(dwi.mean_b0[:, None], dwi.signal.shape[1], 1)
    signal = signal * np.exp(-1e-3 * dwi.acquisition.bvals)
    flat = Dwi(signal.astype(np.float32), dwi.mask, dwi.affine, dwi.acquisition, 1.0)
    found = score.compare(flat, lambda signal, s0: signal, "cpu")
    assert found["n_fibre_voxels"] == 0 and np.isnan(found["direction_error"])


def test_what_cannot_be_a_model_has_no_score(dwi):
    part = Dwi(dwi.signal[:400], _first(dwi.mask, 400), dwi.affine, dwi.acquisition, 12.0)
    with pytest.raises(Refusal, match="voxels were found"):
        methods.get("synthesize").synthesize(part, ["syn"], 0, "cpu")


def _first(mask, count):
    keep = np.zeros(mask.shape, bool)
    keep[tuple(np.argwhere(mask)[:count].T)] = True
    return keep


@pytest.mark.slow
def test_table_and_page(tmp_path):
    bids, out = head.write_dataset(tmp_path / "bids"), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--sloppy", "--synthesize",
                   "sample", "random-wm") == 0
    assert validate(out) == []
    path = out / "sub-01/dwi/sub-01_desc-synth_qc"
    table = pd.read_csv(f"{path}.tsv", sep="\t").set_index("mode")
    assert list(table.index) == ["sample", "random-wm", "noise"]
    described = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert set(described) == {"mode", *table.columns}
    page = (out / "sub-01.html").read_text()
    assert "Quality of the synthetic signals" in page
    for mode in ("sample", "random-wm"):
        assert f"<caption>{mode}</caption>" in page
        assert f"<td>{table.loc[mode, 'direction_error']:.4g}</td>" in page
    assert "<caption>noise</caption>" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name,most", [("mdt_multishell", 0.0104), ("siemens_xa30", 0.04)])
def test_real_participants(test_data, name, most):
    """The published finding: random-wm is far worse; the others reach the published FA error where
    90 directions were measured (20 at b = 2500 do not)."""
    dwi = load_first_run(test_data(name))
    scores = methods.get("synthesize").synthesize(dwi, MODES, 0, "cpu").scores
    for mode in MODES[:3]:
        assert scores[mode]["fa_error"] < most
        assert scores["random-wm"]["fa_error"] > 3 * scores[mode]["fa_error"]
        assert scores["random-wm"]["direction_error"] > 2.5 * scores[mode]["direction_error"]
