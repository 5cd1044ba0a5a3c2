"""The figure of predicted volumes shows what it names."""

import numpy as np

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.report import canvas, upsampling


def test_a_predicted_volume_is_beside_the_measured_one_of_the_nearest_direction(rng, monkeypatch):
    """Ten directions along a quarter circle, in steps of 10°, on two shells. The
    target is 3° beyond the seventh of the higher shell, on the other side of the
    sphere."""
    angle = np.radians(10 * np.arange(10))
    circle = np.column_stack([np.cos(angle), np.sin(angle), 0 * angle])
    table = Acquisition(np.r_[0, np.full(10, 1000.0), np.full(10, 2000.0)],
                        np.r_[np.zeros((1, 3)), circle, circle])
    turn = np.radians(63)
    target = Acquisition([1000.0, 2000.0], [[0, 0, 1], [-np.cos(turn), -np.sin(turn), 0]])
    mask = np.ones((6, 5, 4), bool)
    dwi = Dwi(rng.uniform(100, 900, (mask.sum(), 21)).astype(np.float32), mask, np.diag(
        [2.0, 2, 2, 1]), table)
    signal, sd = (rng.uniform(10, 90, (mask.sum(), 2)).astype(np.float32) for _ in range(2))
    drawn = []
    monkeypatch.setattr(upsampling, "draw_strips", lambda *args: drawn.extend(args[2])
                        or canvas.draw_strips(*args))
    upsampling.of_prediction(signal, sd, target, dwi)
    measured, predicted, uncertain = drawn
    assert "volume 17, b 2000" in measured.title and "3° away" in predicted.title
    for strip, values in ((measured, dwi.signal[:, 17]), (predicted, signal[:, 1]),
                          (uncertain, sd[:, 1])):
        green = strip.colours[mask][:, 1]  # rises with the value in grey and in viridis
        assert np.corrcoef(green, values)[0, 1] > 0.85
