"""The perceptron beside the spherical network, and weights that a training starts from."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import checkpoint, kinds, methods, selection, sh, training
from bidsapp.domain import TrainingDomain
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.microstructure import learn
from bidsapp.microstructure import maps as estimating
from bidsapp.networks.mlp import Perceptron, mlp
from bidsapp.simulate import tissue
from support import ROOT
from support.app import qsphere, validate
from support.spherical_signals import acquisition, coefficients, simulate_voxels, small_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import scnn_training

ACQUISITION = acquisition(b=(700, 2000), n=(20, 40))
HIDDEN = [512, 512, 512]


def keep(trained, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in checkpoint.pack(trained).items():
        (folder / name).write_bytes(content)
    return folder


def counted(network):
    return sum(p.numel() for p in network.parameters())


def test_hidden_layers_have_the_published_size():
    """614 447 parameters with 120 signals and 47 outputs (Kerkelä et al. 2024, section 2.7)."""
    assert counted(mlp([120, *HIDDEN, 47], norm=torch.nn.BatchNorm1d)) == 614_447
    ours = Perceptron(2, shells=2)
    assert counted(ours) == 614_447 + (92 - 120) * 512 + (48 - 47) * 513
    x = coefficients(9, torch.float32)[:, :, :2]
    found = ours(x, torch.full((9, 2), 0.02), torch.zeros(1, 2, 3), torch.zeros(9, 5))
    assert [len(v.T) for v in found] == [2, 2, 45]


def of_perceptron(steps=400):
    recipe = methods.get("estimate_mlp2").recipe("one")
    return replace(
        recipe, batch=256, held_out=2048, network={**recipe.network, "widths": [64, 64]},
        schedule=training.Schedule(steps, 5e-3, validate_every=50, decay="cosine"),
        acquisition=ACQUISITION,
        trained_for=TrainingDomain.from_acquisitions([ACQUISITION], snr=(20.0, 80.0)))


@pytest.fixture(scope="module")
def trained():
    return learn.train("estimate_mlp2", of_perceptron(), seed=3, device="cpu")


def test_learns_d_f_and_density(trained):
    """Better than the prior's variance, 0.75 and 1/12, and than no density at all."""
    found = trained.card.metrics
    assert found["mse_diffusivity"] < 0.3
    assert found["mse_neuritefraction"] < 0.05
    nothing = learn.density_power(of_perceptron(), None).mean(0)
    per_degree = nothing.new_tensor([5.0, 9.0, 13.0, 17.0])
    assert found["mse_density"] < 0.8 * float((nothing * per_degree).sum()) / (4 * np.pi)
    for name in ("diffusivity", "neuritefraction"):
        assert found[f"coverage90_{name}"] == pytest.approx(0.9, abs=0.03)


def test_its_card_says_which_network_it_is(trained, tmp_path):
    found = checkpoint.load(keep(trained, tmp_path), "estimate_mlp2")
    dwi = simulate_voxels(ACQUISITION)
    one, other = (estimating.estimate(c, tissue.TWO_COMPARTMENTS, dwi, "cpu")[0]
                  for c in (trained, found))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    strange = replace(found, card=replace(found.card, network={"architecture": "transformer"}))
    with pytest.raises(DataError, match=r"transformer.*known are spherical, perceptron"):
        estimating.estimate(strange, tissue.TWO_COMPARTMENTS, dwi, "cpu")


def test_extrapolates_to_as_many_shells_as_it_takes(trained, tmp_path):
    """A perceptron has an input for every shell: others may stand there, but no more or fewer."""
    keep(trained, tmp_path / "estimate_mlp2_one")
    method = methods.get("estimate_mlp2", context=kinds.MethodContext(models=tmp_path))
    near, more = acquisition(b=(900, 2500), n=(20, 40)), acquisition((700, 2000, 3000), (20,) * 3)
    with pytest.raises(Refusal, match=r"needed are 20 × b 700, 40 × b 2000.*--allow-extrapolation"):
        method.check(near)
    method = methods.get("estimate_mlp2", context=kinds.MethodContext(
        models=tmp_path, allow_extrapolation=True))
    found = method.apply(simulate_voxels(near, 5), "cpu")
    assert "20 × b 900" in found.parameters["OutOfDistribution"][0]
    found = method.apply(simulate_voxels(ACQUISITION, 5), "cpu")
    assert "OutOfDistribution" not in found.parameters
    with pytest.raises(Refusal, match="needed are 20 × b 700") as refusal:
        method.check(more)
    assert "--allow-extrapolation" not in str(refusal.value)


def test_turns_not_with_the_head(trained):
    """A rotation changes the estimates by more than 1e-2, those of a spherical network by 1e-3."""
    network = trained.into(estimating.build(tissue.TWO_COMPARTMENTS, trained.card.network))
    noise, turn = torch.tensor([[0.02, 0.0]]).expand(50, 2), Rotation.random(1, random_state=2)

    def run(**how):
        with torch.no_grad():
            return network(coefficients(50, torch.float32, **how)[:, :, :2], noise,
                           torch.zeros(1, 2, 3), torch.zeros(50, 5))

    one, other = run(), run(rotation=torch.tensor(turn.as_matrix()[0]))
    assert (one.mean - other.mean).square().mean().sqrt() > 0.01


@pytest.mark.slow
def test_without_a_training_it_refuses_and_says_how(bids_tree, tmp_path):
    """Group level trains, participant level then uses it; the tree is valid BIDS."""
    root, out = bids_tree(), tmp_path / "out"
    with pytest.raises(Refusal, match=r"found no weights.*Train it.*--train estimate_mlp2"):
        methods.get("mlp2", "estimate").check(ACQUISITION)
    assert qsphere(root, out, "participant", "--estimate", "dti") == 0
    assert qsphere(root, out, "group", "--train", "estimate_mlp2", "--sloppy", "--max-steps",
                   "20") == 0
    card = json.loads((out / "group/models/estimate_mlp2_b1000n12_b2000n16/model.json").read_text())
    assert card["network"] == {"architecture": "perceptron", "shells": 2, "widths": HIDDEN}
    assert card["training"]["start"] == "random"
    assert qsphere(root, out, "participant", "--estimate", "mlp2", "--participant-label",
                   "01") == 0
    sidecar = json.loads(next(out.glob("sub-01/dwi/*mlp2_param-diffusivity_dwimap.json"))
                         .read_text())
    assert sidecar["Model"]["Parameters"]["Weights"] == card["sha256"]
    assert not validate(out)


# --- weights that a training starts from


def near(recipe, steps=2):
    """A training that hardly moves."""
    return replace(recipe, groups=1, held_out=1024, acquisition=ACQUISITION,
                   trained_for=TrainingDomain.from_acquisitions([ACQUISITION], snr=(20.0, 80.0)),
                   schedule=training.Schedule(
        steps, 1e-6, validate_every=1))


@pytest.fixture(scope="module")
def first():
    """A small spherical network, and the power of densities its hints were made with."""
    found = learn.train("estimate_scnn2", small_recipe(20), seed=3, device="cpu")
    return replace(found, card=replace(found.card, sha256="first", constants={
        **found.card.constants, "density_power": [[0.03, 0.02, 0.01, 0.005]]}))


@pytest.mark.slow
def test_a_training_starts_from_given_weights(first):
    """Weights stay within what two steps of Adam at 1e-6 move; hints are those of the start."""
    again = learn.train("estimate_scnn2", near(small_recipe()), seed=8, device="cpu", start=first)
    for name, value in first.tensors.items():
        torch.testing.assert_close(again.tensors[name], value, atol=1e-5, rtol=0)
    assert again.card.constants["density_power"] == [pytest.approx([0.03, 0.02, 0.01, 0.005])]
    assert again.card.training["start"] == "first"


@pytest.mark.slow
def test_weights_from_before_there_were_cases_are_refused(first, tmp_path):
    """Their card holds one power by degree."""
    old = replace(first, card=replace(first.card, constants={
        **first.card.constants, "density_power": [0.03, 0.02, 0.01, 0.005]}))
    told = r"shape \(4,\)\. The shape \(case, degree\) is required.*train again"
    with pytest.raises(UsageError, match="--init: weights of estimate_scnn2.*" + told):
        learn.initial_weights("estimate_scnn2", small_recipe(), keep(old, tmp_path / "old"))
    with pytest.raises(DataError, match=told):
        estimating.read_density_power(old.card)


@pytest.mark.slow
def test_a_resumed_training_does_not_start_again(first, tmp_path):
    """A training continues from its kept state, whatever weights it would start from."""
    state = tmp_path / "state.ckpt"
    recipe = replace(near(small_recipe(), 4), schedule=training.Schedule(4, 1e-2, validate_every=2))
    whole = learn.train("estimate_scnn2", recipe, seed=8, device="cpu", start=first, saved=state)
    again = learn.train("estimate_scnn2", recipe, seed=8, device="cpu", start=first, saved=state)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(again.tensors[name], value, atol=0, rtol=0)
        if name.endswith("weight"):
            assert not torch.allclose(value, first.tensors[name], atol=1e-4)


@pytest.mark.slow
def test_which_weights_a_training_starts_from(first, tmp_path):
    folder = keep(first, tmp_path / "first")
    own = methods.get("estimate_scnn2").recipe("one")
    shipped = selection.bundled_weights("estimate_scnn2")
    assert learn.initial_weights("estimate_scnn2", own, None).card.sha256 == shipped.card.sha256
    assert learn.initial_weights("estimate_scnn2", small_recipe(), None) is None  # of another shape
    assert learn.initial_weights("estimate_mlp2", of_perceptron(), None) is None  # none ship
    given = learn.initial_weights("estimate_scnn2", small_recipe(), folder)
    assert given.card.constants == first.card.constants
    with pytest.raises(UsageError, match="do not fit its network"):
        learn.initial_weights("estimate_scnn2", own, folder)
    with pytest.raises(UsageError, match="estimate_scnn2; those of estimate_noddi are needed"):
        learn.initial_weights("estimate_noddi", own, folder)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        learn.initial_weights("estimate_scnn2", own, tmp_path / "nothing")


@pytest.mark.slow
def test_init_on_the_command_line(bids_tree, tmp_path, capfd):
    root, out = bids_tree(), tmp_path / "out"
    assert qsphere(root, out, "participant", "--estimate", "dti") == 0
    train = ("group", "--sloppy", "--max-steps", "2")
    assert qsphere(root, out, *train, "--init", selection.WEIGHTS / "estimate_scnn2") == 2
    assert "Give a METHOD with --train" in capfd.readouterr().err
    assert qsphere(root, out, *train, "--train", "estimate_scnn2", "--init", tmp_path / "no") == 2
    assert "holds no checkpoint" in capfd.readouterr().err
    assert qsphere(root, out, *train, "--train", "estimate_scnn2", "--init",
                   selection.WEIGHTS / "estimate_scnn2") == 0
    card = json.loads(next(out.glob("group/models/*/model.json")).read_text())
    assert card["training"]["start"] == selection.bundled_weights("estimate_scnn2").card.sha256


# --- benchmarks/scnn_training.py


def test_published_loss_is_the_mean_over_all_values():
    """3072 values of equal weight of each ODF, here as an integral, and two scalars."""
    torch.manual_seed(0)
    found = scnn_training.Estimate(torch.randn(5, 2), torch.zeros(5, 2), torch.randn(5, 153))
    truth, odf = torch.randn(5, 2), torch.randn(5, 45)
    points, weights = sh.quadrature(32)
    values = (found.odf.numpy() @ sh.basis(16, points).T
              - odf.numpy() @ sh.basis(8, points).T) ** 2
    total = 3072 * (values @ weights) / (4 * np.pi) + ((found.mean - truth) ** 2).sum(1).numpy()
    assert float(scnn_training.published_loss(found, truth, odf)) == pytest.approx(
        total.mean() / 3074, rel=1e-5)


def test_networks_are_trained_on_the_same_samples():
    seen = []
    for name in ("published", "spherical", "mlp"):
        options = scnn_training.options_of(["--network", name])
        simulate = learn.Simulator(scnn_training.recipe_of(options))
        seen.append(simulate(32, 1, torch.Generator().manual_seed(4)))
    for other in seen[1:]:
        for a, b in zip(seen[0][:3], other[:3], strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert float(seen[0].noise[:, 0].min()) == pytest.approx(1 / 50)


@pytest.mark.slow
def test_benchmark_runs_on_tables(tmp_path):
    """The published network at its start, against a table of one density, and smt beside it."""
    table = tmp_path / "one.npy"
    np.save(table, np.eye(1, 45, dtype=np.float32) / np.sqrt(4 * np.pi))
    found = scnn_training.main(["--network", "published", "--steps", "2", "--batch", "16",
                                "--grid", "29", "--table", str(table), "--test-table", str(table),
                                "--test-voxels", "600", "--state", str(tmp_path / "s.ckpt")])
    assert set(found) == {"Watson mixtures", "single bundles", "one"}
    for rows in found.values():
        assert all(np.isfinite(v) for row in rows.values() for v in row.values())
        assert rows["smt posterior mean"]["d"] < 0.02 < rows["network"]["d"]
        assert rows["smt posterior mean"]["f"] < rows["smt least squares"]["f"]
