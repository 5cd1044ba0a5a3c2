"""Checkpoints come back as they were, or not at all."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from bidsapp.checkpoint import Card, Checkpoint, load, pack
from bidsapp.domain import ShellRange, TrainingDomain
from bidsapp.errors import DataError
from bidsapp.networks.builder import build_network
from bidsapp.selection import bundled_weights

DOMAIN = TrainingDomain((ShellRange((1000.0, 1000.0), 1.0, (30, 32)),), (1, 2), sites=("A", "B"),
                        covariates={"age": (20.0, 60.0), "sex": ("F",)})
CARD = Card(method="estimate_test", network={"widths": [3, 2]}, trained_for=DOMAIN,
            training={"steps": 5}, intended_use="Tests.", seed=4, versions={"torch": "2"},
            constants={"scale": 0.1}, metrics={"mse": 1e-3}, reference_batch="A")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    for name, content in pack(Checkpoint(network.state_dict(), CARD)).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path, network


def test_comes_back_as_it_was(saved):
    folder, network = saved
    found = load(folder, "estimate_test")
    assert replace(found.card, sha256="") == CARD and len(found.card.sha256) == 64
    other = found.into(nn.Linear(3, 2))
    assert not other.training
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert json.loads((folder / "model.json").read_text())["intended_use"] == "Tests."


def test_another_network_is_refused(saved):
    found = load(saved[0], "estimate_test")
    with pytest.raises(DataError, match="do not fit its network"):
        found.into(nn.Linear(2, 2))
    with pytest.raises(DataError, match="do not fit its network"):
        found.into(nn.Sequential(nn.Linear(3, 2)))


def test_another_method_is_refused(saved):
    with pytest.raises(DataError, match="weights of estimate_test; those of estimate_other"):
        load(saved[0], "estimate_other")


def test_a_changed_byte_is_noticed(saved):
    path = saved[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        load(saved[0], "estimate_test")


@pytest.mark.parametrize("change", [
    {"constants": {"scale": 0.2}}, {"reference_batch": "C"},
    {"trained_for": {**asdict(DOMAIN), "sites": ["A"]}}, {"seed": 5}, {"metrics": {"mse": 0.2}},
    {"warnings": ["none"]}, {"sha256": "0" * 64}, {"sha256": ""},
], ids=lambda change: next(iter(change)))
def test_a_changed_card_is_noticed(saved, change):
    path = saved[0] / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"SHA-256.*train both again"):
        load(saved[0], "estimate_test")


def test_a_card_may_be_written_in_another_layout(saved):
    path = saved[0] / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert load(saved[0]).card.constants == CARD.constants


@pytest.mark.parametrize("change", [
    {"network": [3, 2]}, {"constants": None}, {"seed": "4"}, {"method": None}, {"warnings": (1,)},
    {"trained_for": {"b": [0, 9000]}}, {"reference_batch": 3}, {"versions": "2"},
    {"method": "harmonize_test", "reference_batch": None},
    {"method": "harmonize_test", "trained_for": replace(DOMAIN, sites=())},
], ids=lambda change: "-".join(change))
def test_cards_of_the_wrong_form_are_not_born(saved, change):
    with pytest.raises(ValueError):
        replace(CARD, **change)
    path = saved[0] / "model.json"
    change = {k: asdict(v) if isinstance(v, TrainingDomain) else v for k, v in change.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="no checkpoint that can be read"):
        load(saved[0])


@pytest.mark.parametrize("change", ["missing", "broken", "unknown", "lacking"])
def test_a_card_that_is_not_whole_is_refused(saved, change):
    path = saved[0] / "model.json"
    told = asdict(CARD)
    if change == "missing":
        path.unlink()
    else:
        path.write_text({"broken": "{", "unknown": json.dumps(told | {"colour": "red"}),
                         "lacking": json.dumps({"method": "estimate_test"})}[change])
    with pytest.raises(DataError, match="holds no checkpoint that can be read"):
        load(saved[0], "estimate_test")


def test_numbers_that_are_not_finite_do_not_enter_a_card():
    with pytest.raises(ValueError, match="JSON"):
        pack(Checkpoint({}, replace(CARD, metrics={"mse": float("nan")})))


def test_a_part_starts_another_network():
    """The encoder of the weights that ship, in a network with other parameters: bit for bit."""
    trained = bundled_weights("estimate_scnn2")
    assert {name.partition(".")[0] for name in trained.tensors} == {"encoder", "head"}
    network = build_network(trained.card.network, parameters=5)
    before = {k: v.clone() for k, v in network.head.state_dict().items()}
    trained.part("encoder").into(network.encoder)
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, trained.tensors[f"encoder.{name}"])
    assert all(torch.equal(v, before[k]) for k, v in network.head.state_dict().items())
    with pytest.raises(DataError, match="do not fit its network"):
        trained.part("decoder").into(network.encoder)
    with pytest.raises(DataError, match="do not fit its network"):
        trained.part("head").into(network.head)
