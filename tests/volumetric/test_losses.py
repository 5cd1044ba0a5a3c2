"""Losses and scores of the tasks on volumes, against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from bidsapp.methods.estimate_direction import method as direction
from bidsapp.volumetric.estimator import class_loss, class_metrics
from bidsapp.volumetric.scans import Example


def example(target, valid=None):
    """An example of (t, n) targets along a line of n voxels."""
    target = torch.as_tensor(target, dtype=torch.float32)[:, :, None, None]
    known = torch.ones(target.shape[1:], dtype=torch.bool)
    if valid is not None:
        known[:, 0, 0] = torch.tensor(valid)
    empty = torch.zeros(0, *target.shape[1:])
    return Example(empty, empty, None, target, known)


def logits(probabilities):
    return torch.as_tensor(probabilities, dtype=torch.float32).log()[:, :, None, None]


def axes(rng, n=50):
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def dyads(n):
    return (n[:, direction.ROWS] * n[:, direction.COLUMNS]).T


def test_losses_of_classes():
    """Three voxels, the last of which has no label."""
    p = [[0.7, 0.2, 0.5], [0.3, 0.8, 0.5]]
    one = example([[1, 1, 0], [0, 0, 1]], [True, True, False])
    assert float(class_loss("l1", logits(p), one)) == pytest.approx((0.6 + 1.6) / 2)
    assert float(class_loss("cross-entropy", logits(p), one)) == pytest.approx(
        -(math.log(0.7) + math.log(0.2)) / 2)


def test_scores_of_classes():
    """Class 0: two right of three found and two there. Class 1: one right of one found, two there.
    Class 2 is not there."""
    found = np.eye(3)[[0, 0, 0, 1, 2]].T * 0.9 + 0.03
    one = example(np.eye(3)[[0, 0, 1, 1, 2]].T, [True, True, True, True, False])
    scores = class_metrics(logits(found), one)
    assert scores["accuracy"] == pytest.approx(3 / 4)
    assert scores["f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_angles_are_those_of_the_axis_and_come_back(rng):
    n = axes(rng)
    angles = direction.to_angles(torch.tensor(n))
    assert angles.min() >= 0
    assert angles.max() <= 1
    torch.testing.assert_close(angles, direction.to_angles(torch.tensor(-n)))
    np.testing.assert_allclose(direction.to_dyad(angles), dyads(n), atol=1e-12)
    quarter = direction.to_angles(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))
    np.testing.assert_allclose(quarter[0], [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(quarter[1, :2], [0, 0.5], atol=1e-6)


def test_losses_of_directions(rng):
    """Axes that are 30° apart: ‖nnᵀ − mmᵀ‖²_F = 2 sin² 30°."""
    n = np.tile([[0.0, 1.0, 0.0]], (4, 1))
    m = np.tile([[0.5, math.sqrt(0.75), 0.0]], (4, 1))
    one, output = example(dyads(n)), torch.tensor(dyads(m), dtype=torch.float32)[:, :, None, None]
    assert float(direction.direction_loss("axis", output, one)) == pytest.approx(0.5, abs=1e-5)
    scores = direction.direction_metrics(output, one)
    assert scores["degrees"] == pytest.approx(30, abs=0.05)
    # the azimuth differs by 30° of 180°, the polar angle not
    assert scores["mse_angles"] == pytest.approx((1 / 6) ** 2 / 2, abs=1e-5)
    angles = direction.to_angles(torch.tensor(m)).float()[:, :, None, None]
    assert float(direction.direction_loss("angles", angles, one)) == pytest.approx(
        (1 / 6) ** 2 / 2, abs=1e-5)
    exact = torch.tensor(dyads(axes(rng)), dtype=torch.float32)[:, :, None, None]
    assert float(direction.direction_loss("axis", exact, example(exact[:, :, 0, 0]))) == 0
