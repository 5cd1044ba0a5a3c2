"""Runs on the grid of a network: signal, table and labels of crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bidsapp.errors import Refusal
from bidsapp.volumetric import scans
from bidsapp.volumetric.corruption import Corruption
from support import bids_tree, ellipsoid


def test_a_crop_holds_the_signal_and_target_of_its_voxels(dwi, scan):
    chosen = np.array([1, 5, 20])
    crop = (slice(3, 9), slice(2, 12), slice(0, 7))
    example = scans.cut(scan, crop, chosen)
    ratio = torch.tensor(dwi.signal[:, 2:][:, chosen])
    want = scan.grid.volumes(ratio)[(slice(None), *crop)]
    torch.testing.assert_close(example.ratio, want, atol=1e-3, rtol=0)  # kept in float16
    assert torch.equal(example.clean, example.ratio)
    assert torch.equal(example.valid, scan.grid.mask[crop])
    assert example.table.shell.tolist() == [0, 0, 1]


def test_the_table_of_a_network_is_selected_or_interpolated(dwi, tmp_path):
    axes = dwi.acquisition.bvecs[14:]  # of the second shell
    order = np.random.default_rng(1).permutation(20)
    channels = scans.Channels(6.0, (-axes[order]).tolist(), 2000.0)
    selected = scans.prepare(scans.Labelled(dwi), channels, tmp_path, "selected")
    assert selected.acquisition is None
    want = selected.grid.volumes(torch.tensor(dwi.signal[:, 14:][:, order]))
    np.testing.assert_allclose(selected.ratio, want, atol=1e-3)
    weighted = dwi.acquisition[2:]
    other = replace(channels, directions=bids_tree.directions(30, turn=1.1).tolist())
    matrix, degree = other.interpolate(weighted, selected.grid)
    assert (matrix.shape, degree) == ((32, 30), 4)
    assert not matrix[:12].any()  # the shell of b 1000


def test_a_crop_of_the_middle_is_in_the_middle(scan):
    crop = scans.cut_middle(scan, 8)
    x, y, z = (slice((n - 8) // 2, (n - 8) // 2 + 8) for n in scan.grid.shape)
    assert torch.equal(crop.target, scan.target[:, x, y, z])
    torch.testing.assert_close(crop.ratio, torch.tensor(scan.ratio[:, x, y, z]).float())
    whole = scans.cut_middle(scan, 64)
    assert torch.equal(whole.target, scan.target)


def test_a_label_is_valid_where_most_of_the_voxel_has_one(tmp_path):
    dwi = ellipsoid.dwi_on(np.diag([2.0, 2, 2, 1]), (24, 24, 24))
    known = np.argwhere(dwi.mask)[:, 0] < 12  # the plane x = 11 is known, x = 12 is not
    one = scans.prepare(scans.Labelled(dwi, np.ones((len(known), 1), np.float32), known),
                        scans.Channels(6.0), tmp_path, "run")
    weight = one.grid.volumes(torch.from_numpy(known[:, None].astype(np.float32)))[0]
    assert ((weight > 0) & (weight < 0.5)).any()
    assert torch.equal(one.valid, weight > 0.5)
    torch.testing.assert_close(one.target[0][one.valid], torch.ones(int(one.valid.sum())))


def test_corruption_reaches_the_input_alone(scan):
    crop = (slice(0, 16),) * 3
    masked = scans.cut(scan, crop, None, Corruption("mask", 6.0), torch.Generator().manual_seed(1))
    clean = scans.cut(scan, crop)
    assert torch.equal(masked.clean, clean.clean)
    assert not masked.ratio[:, masked.valid].any()
    assert torch.equal(masked.ratio[:, ~masked.valid], clean.ratio[:, ~masked.valid])
    assert 0 < masked.valid.sum() < clean.valid.sum()
    noisy = scans.cut(scan, crop, None, Corruption("artifacts", 6.0),
                      torch.Generator().manual_seed(1))
    assert not noisy.ratio[:, ~scan.grid.mask[crop]].any()
    assert (noisy.ratio != clean.ratio).any()


def test_labels_of_nothing_are_refused(dwi, tmp_path):
    nothing = scans.Labelled(dwi, np.zeros((len(dwi.signal), 1), np.float32),
                             np.zeros(len(dwi.signal), bool))
    with pytest.raises(Refusal, match="no voxel has a label"):
        scans.prepare(nothing, scans.Channels(6.0), tmp_path, "nothing")
