"""Training domains refuse bad state, and list how a run lies outside of them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from bidsapp.acquisition import Acquisition
from bidsapp.domain import ShellRange, TrainingDomain
from bidsapp.errors import Refusal

LINEAR = ShellRange((500.0, 5000.0), 1.0, (6, 90))
SPHERICAL = ShellRange((500.0, 5000.0), 0.0, (6, 90))
ANY = TrainingDomain((LINEAR,), (1, 16), shell_count=(2, 4), snr=(10.0, 100.0))
"""Make the domain of a network for all protocols."""

ONE = TrainingDomain((ShellRange((1000.0, 1000.0), 1.0, (12, 14)),
                      ShellRange((1950.0, 2050.0), 1.0, (16, 16))), (1, 2),
                     voxel_size=((2.0, 2.0), (2.0, 2.5), (3.0, 3.0)), sites=("B", "C"),
                     covariates={"age": (20, 60), "sex": ("F",)}, snr=(10.0, 20.0))
"""Make the domain of a harmonizer."""


def run(*shells, b0=1, b_delta=1.0):
    """b0 volumes, then shells of (b, directions)."""
    b, n = zip(*shells, strict=True) if shells else ((), ())
    count = sum(n)
    directions = np.random.default_rng(0).normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Acquisition(np.r_[np.zeros(b0), np.repeat(b, n)], np.r_[np.zeros((b0, 3)), directions],
                       np.r_[np.ones(b0), np.full(count, b_delta)])


@pytest.mark.parametrize("change", [
    {"shells": ()}, {"b0": (2, 1)}, {"b0": 1}, {"b0": (0.5, 1)}, {"shell_count": (0, 2)},
    {"shell_count": (3, 2)}, {"snr": (10.0, float("inf"))}, {"snr": ("10", "20")},
    {"voxel_size": ((2.0, 2.0),)}, {"sites": (1,)}, {"covariates": {"age": ()}},
    {"covariates": {"age": (60.0, 20.0)}}, {"covariates": {"sex": ("F", 1)}},
    {"shells": ({"b": [0.5, 5.0], "directions": [6, 90]},)},
], ids=lambda change: "-".join(f"{k}{v}" for k, v in change.items())[:30])
def test_domains_of_the_wrong_form_are_not_born(change):
    with pytest.raises((ValueError, TypeError)):
        replace(ANY, **change)


@pytest.mark.parametrize("change", [
    {"b": (5000.0, 500.0)}, {"b": (-1.0, 5.0)}, {"b": 1000.0}, {"b": (float("nan"), 1.0)},
    {"b_delta": 2.0}, {"directions": (0, 3)}, {"directions": (6.5, 9)}, {"directions": (6,)}])
def test_ranges_of_the_wrong_form_are_not_born(change):
    with pytest.raises(ValueError):
        replace(LINEAR, **change)


@pytest.mark.parametrize("domain", [ANY, ONE])
def test_comes_back_from_json_as_it_was(domain):
    assert TrainingDomain(**json.loads(json.dumps(asdict(domain)))) == domain


@pytest.mark.parametrize("acquisition,message", [
    (run((1000, 30), (2200, 60)), ""),
    (run((500, 6), (5000, 91)), ""),
    (run((495, 6), (5050, 6)), ""),
    (run((494, 6), (2200, 60)), "6 × b 494, 60 × b 2200 s/mm², needed are 2 or more shells"),
    (run((1000, 30), (5051, 6)), "needed are 2 or more shells of b = 500–5000 s/mm², 6 or more"),
    (run((1000, 5), (2200, 60)), "needed are 2 or more shells"),
    (run((1000, 60)), "60 × b 1000 s/mm², needed are 2 or more shells"),
    (run((1000, 30), (2200, 60), b_delta=0.5), "b_delta 0.5"),
    (run((1000, 30), (2200, 60), b0=0), "the run has 0 volumes without weighting, needed is a b0"),
    (run((300, 6), (1000, 30), (2200, 60), (9000, 60)), ""),
    (run(*((b, 6) for b in (700, 1000, 2000, 3000, 4000))), ""),
])
def test_ranges_of_shells(acquisition, message):
    found = ANY.violations(acquisition)
    assert len(found) == bool(message) and message in "".join(found)


def test_spherical_encoding_needs_no_directions():
    domain = replace(ANY, shells=(LINEAR, SPHERICAL))
    assert not domain.violations(run((1000, 1), (2200, 3), b_delta=0.0))
    assert ANY.violations(run((1000, 1), (2200, 3), b_delta=0.0))
    assert domain.describe_ranges() == "b = 500–5000 s/mm², 6 or more directions, b_delta 1, 0"


@pytest.mark.parametrize("acquisition,message", [
    (run((1000, 12), (2000, 16)), ""),
    (run((951, 11), (2150, 15)), ""),
    (run((949, 12), (2000, 16)), "12 × b 949, 16 × b 2000 s/mm², needed are 12–14 × b 1000, 16 × "),
    (run((1000, 12), (2154, 16)), "needed are"),
    (run((1000, 12)), "needed are"),
    (run((1000, 12), (2000, 16), (3000, 16)), "needed are"),
    (run((1000, 12), (2000, 16), b_delta=0.0), "(b_delta 0)"),
    (run((1000, 10), (2000, 16)), "10 directions at b = 1000 s/mm², 12–14 were seen in training"),
    (run((1000, 15), (2000, 16)), ""),
    (run((1000, 16), (2000, 16)), "16 directions"),
])
def test_just_these_shells(acquisition, message):
    found = ONE.violations(acquisition)
    assert len(found) == bool(message) and message in "".join(found)


def test_voxels_and_sites():
    acquisition = run((1000, 12), (2000, 16))
    assert not ONE.violations(acquisition, np.array([3.1, 2.0, 2.6]), "C")
    assert not ONE.violations(acquisition, (2.9, 1.95, 2.0))
    assert len(ONE.violations(acquisition, (2.9, 1.85, 2.0))) == 1
    (voxel,) = ONE.violations(acquisition, (3.0, 2.0, 2.7), "B")
    assert voxel == "the voxel is 2 × 2.7 × 3 mm, seen in training were 2 × 2–2.5 × 3 mm"
    (site,) = ONE.violations(acquisition, (3, 2, 2), "D")
    assert site == "the batch is D, known are B, C"
    assert not ANY.violations(acquisition, (9, 9, 9), "D")


def test_unusual_people_are_warned_of():
    assert ONE.warnings(15.0, {"age": 40, "sex": "F", "hand": "left"}) == []
    assert ONE.warnings(None, {"age": float("nan")}) == []
    assert ONE.warnings(float("nan"), {"age": 61, "sex": "M"}) == [
        "age is 61, and 20–60 in the training.", "sex is M, and F in the training."]
    assert ONE.warnings(9.0, {}) == ["SNR is 9, and 10–20 in the training."]


def test_nearest_shells_have_the_same_shape():
    domain = replace(ANY, shells=(replace(LINEAR, b=(1000.0, 1000.0)),
                                  replace(SPHERICAL, b=(1500.0, 1500.0)),
                                  replace(LINEAR, b=(3000.0, 3000.0))))
    assert domain.nearest_shells(run((1400, 6), (2100, 6))) == [0, 2]
    with pytest.raises(Refusal, match=r"b_delta -0\.5 at b = 1400"):
        domain.nearest_shells(run((1400, 6), b_delta=-0.5))


def test_acquisitions_give_the_ranges_of_their_shells():
    domain = TrainingDomain.from_acquisitions(
        [run((1000, 12), (2000, 16), b0=2), run((1010, 11), (1990, 16), b0=5)], sites=("B",))
    assert domain.shells == (ShellRange((1000.0, 1010.0), 1.0, (11, 12)),
                             ShellRange((1990.0, 2000.0), 1.0, (16, 16)))
    assert domain.b0 == (2, 5) and domain.shell_count is None and domain.sites == ("B",)
    assert [s.name for s in domain.shells] == ["b1005", "b1995"]
    assert [s.part for s in domain.shells] == ["shell-1005", "shell-1995"]
    assert replace(SPHERICAL, b=(1500.0, 1500.0)).name == "b1500d0"
