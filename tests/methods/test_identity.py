"""Harmonizers of the signal where both sites are the same: none has a bias of its own.

A method that learns from pairs gets networks that change nothing, any other learns from the very
scan that it is then applied to, at either site. Noise-free signals of sticks in zeppelins must keep
FA and MD, whatever the dispersion of the fibres.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
from torch import nn

from bidsapp import kinds, methods, sh
from bidsapp.checkpoint import Checkpoint
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement
from bidsapp.harmonization.harmonizer import Harmonizer
from bidsapp.harmonization.paired import PairedHarmonizer
from bidsapp.networks import builder
from bidsapp.networks.shresnet import CENTRE
from bidsapp.simulate import site
from support import travelling_heads

NAMES = [n for n in methods.names("harmonize_")
         if isinstance(methods.get(n), kinds.SiteHarmonizer)]
SHAPE = (8, 9, 12)


def test_every_harmonizer_of_the_signal_is_here():
    assert {"harmonize_rish", "harmonize_mica", "harmonize_shresnet"} <= set(NAMES)
    assert all(isinstance(methods.get(n), Harmonizer) for n in NAMES)


@cache
def bundles(directions):
    """One fibre or two that cross at 90°, κ 1–128, d 0.5–2.5 µm²/ms, f 0.2–0.9, every axis; with
    two b = 0 volumes and three shells."""
    table = site.gradient_table((1000.0, 2000.0, 3000.0), directions)
    points, weights = sh.quadrature(120)
    rng = np.random.default_rng(5)
    b, cosine = table.bvals[:, None] / 1000, (table.bvecs @ points.T) ** 2
    rows = []
    cases = list(product((1, 4, 8, 16, 32, 64, 128), (1, 2), (0.5, 1.2, 1.8, 2.5), (0.2, 0.5, 0.9)))
    for i in range(np.prod(SHAPE)):
        kappa, fibres, d, f = cases[i % len(cases)]
        axes = np.linalg.qr(rng.standard_normal((3, 3)))[0][:fibres]
        density = np.exp(kappa * ((axes @ points.T) ** 2 - 1)) * weights
        density = (density / density.sum(1, keepdims=True)).mean(0)
        radial = (1 - f) * d
        rows.append((f * np.exp(-b * d * cosine) + (1 - f) * np.exp(
            -b * (radial + (d - radial) * cosine))) @ density)
    return Dwi((1000 * np.array(rows)).astype(np.float32), np.ones(SHAPE, bool),
               np.diag([3.0, 3, 3, 1]), table)


class Same(nn.Module):
    """A network that changes nothing."""

    def forward(self, x):
        return x[:, CENTRE]


class Mean(nn.Module):
    """A network that looks at all neighbours alike."""

    def forward(self, x):
        return x.mean(1)


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    for name, network in (("same", Same), ("mean", Mean)):
        monkeypatch.setitem(builder.ARCHITECTURES, name, network)


@cache
def paired(name):
    """The method, and its model of scans that are the same at both sites."""
    method = travelling_heads.sloppy_method(name)
    study = travelling_heads.study(travelling_heads.PEOPLE[:2], max_steps=1,
                              load=lambda run: travelling_heads.head(run[:2], "A"))
    (model,) = method.fit(*study).checkpoints.values()
    return method, built_as(model, "same")


def built_as(model, architecture):
    """The model with another network, which has no weights."""
    return Checkpoint({k: v for k, v in model.tensors.items() if not k.startswith("shell")},
                      replace(model.card, network={"architecture": architecture}))


def identity(name, dwi):
    """The method, and its model of two sites that are the same."""
    method = travelling_heads.sloppy_method(name)
    if isinstance(method, PairedHarmonizer):
        return paired(name)
    table = pd.DataFrame([(f"{p}{s}", s, f"{p}{s}", 50.0) for p in range(3) for s in "AB"],
                         columns=["participant", "batch", "run", "snr_b0"])
    cohort = kinds.Cohort(
        table, reference_batch="A", acquisitions=dict.fromkeys(table["run"], dwi.acquisition),
        load=lambda _: dwi)
    (model,) = method.fit(cohort, kinds.TrainingSettings()).checkpoints.values()
    return method, model


@pytest.mark.parametrize("directions", [30, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_identity_has_no_bias(name, directions):
    dwi = bundles(directions)
    method, model = identity(name, dwi)
    made = method.harmonize(dwi, model, "B", "cpu").signal
    for shell in dwi.acquisition.shells:
        own = dwi.acquisition[shell.indices]
        before, after = (agreement.shell_maps(s[:, shell.indices] / 1000, own)
                         for s in (dwi.signal, made))
        for key in ("fa", "md"):
            change = np.abs(after[key] / before[key] - 1).max()
            assert change < 0.01, (shell.b, key, change)


def test_edges_of_the_mask_see_their_nearest_voxel():
    """A uniform signal stays uniform at the edge of the mask, which patches cross."""
    dwi = bundles(30)
    same = np.tile(dwi.signal[:1], (len(dwi.signal), 1))
    method, model = paired("harmonize_golkov")
    dwi = Dwi(same, dwi.mask, dwi.affine, dwi.acquisition)
    made = method.harmonize(dwi, built_as(model, "mean"), "B", "cpu").signal
    np.testing.assert_allclose(made, same, rtol=1e-4, atol=0.01)


def test_the_published_variant_is_there():
    """A series in the signal's place: its own fit leaves nothing, and FA moves."""
    dwi = bundles(30)
    method, model = paired("harmonize_golkov")
    constants = {**model.card.constants, "output": "series"}
    made = method.harmonize(dwi, replace(model, card=replace(model.card, constants=constants)),
                            "B", "cpu")
    shell = dwi.acquisition.shells[-1]
    basis = sh.basis(4, dwi.acquisition.bvecs[shell.indices])
    values = made.signal[:, shell.indices]
    values = values[values.min(axis=1) > 0]  # of which nothing was clipped
    np.testing.assert_allclose(values @ (basis @ np.linalg.pinv(basis)).T, values, atol=0.1)
    own = dwi.acquisition[shell.indices]
    before, after = (agreement.shell_maps(s[:, shell.indices] / 1000, own)["fa"]
                     for s in (dwi.signal, made.signal))
    assert np.abs(after / before - 1).max() > 0.1
    assert "correlated" in made.no_intervals and made.parameters["Output"] == "series"
