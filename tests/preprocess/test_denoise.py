"""Denoising by shrunk local components: noise level, shrinkage, floor, slabs and peers."""

import numpy as np
import pytest
from scipy import integrate

from bidsapp.errors import Refusal
from bidsapp.preprocess import denoise as module
from bidsapp.preprocess.denoise import choose_patch, denoise, marchenko_pastur_median
from bidsapp.simulate.noise import mean as rician_mean


def low_rank(rng, shape=(14, 12, 9), n=40, rank=3):
    """(x, y, z, n) positive signal: smooth maps times profiles over the volumes."""
    axes = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    maps = np.stack([np.cos(k * axes[0] + k * k * axes[1] - axes[2]) for k in range(1, rank + 1)],
                    -1)
    profiles = rng.uniform(-0.3, 0.3, (rank, n))
    return 2 + maps @ profiles


def ramp(shape, low=0.05, high=0.15):
    """(x, y, z) noise level that grows along x."""
    return np.broadcast_to(np.linspace(low, high, shape[0])[:, None, None], shape)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.8, 1.0])
def test_marchenko_pastur_median(beta):
    median = marchenko_pastur_median(np.array([beta]))[0]
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    below, _ = integrate.quad(lambda x: np.sqrt((high - x) * (x - low)) / (2 * np.pi * beta * x),
                              low, median)
    assert below == pytest.approx(0.5, abs=2e-3)


def test_noise_alone_leaves_the_mean(rng):
    sigma = 0.3
    volumes = (5 + sigma * rng.normal(size=(12, 12, 8, 40))).astype(np.float32)
    out = denoise(volumes, rician=False)
    assert out.patch == (5, 3, 3) and out.law == "gaussian"
    assert out.sigma.mean() == pytest.approx(sigma, rel=0.02)
    # the largest singular value of noise exceeds the edge with probability 0.17 (Tracy and Widom)
    assert out.rank.mean() < 0.2
    assert np.square(out.signal - 5).mean() < 2 * sigma**2 / np.prod(out.patch)


@pytest.mark.parametrize("law", ["real", "complex", "magnitude"])
def test_noise_level_and_error(rng, law):
    clean = low_rank(rng)
    sigma = ramp(clean.shape[:3])
    e = rng.normal(size=(2, *clean.shape)) * sigma[..., None]
    noisy = {"real": clean + e[0], "complex": (clean + e[0] + 1j * e[1]) * np.exp(1j),
             "magnitude": np.abs(clean + e[0] + 1j * e[1])}[law]
    noisy = noisy.astype(np.complex64 if law == "complex" else np.float32)
    truth = clean * np.exp(1j) if law == "complex" else clean
    before = noisy.copy()
    out = denoise(noisy, rician=law == "magnitude")
    np.testing.assert_array_equal(noisy, before)
    assert out.signal.dtype == noisy.dtype and out.sigma.dtype == np.float32
    inner = slice(4, -4)  # the patches of outer voxels lie to one side of them
    np.testing.assert_allclose(out.sigma.mean((1, 2))[inner], sigma[inner, 0, 0], rtol=0.05)
    assert out.sigma.mean() == pytest.approx(sigma.mean(), rel=0.03)

    def error(x):
        return np.square(np.abs(x - truth)).mean()

    assert error(out.signal) < 0.2 * error(noisy)


def test_shrinkage_is_that_of_an_oracle(rng):
    """One who knows the signal X would scale each component u vᵀ by ⟨u vᵀ, X⟩."""
    voxels, n, patches, rank = 343, 80, 16, 3
    truth = np.zeros((patches, voxels, n))
    for x in truth:
        u = np.linalg.qr(rng.normal(size=(voxels, rank)))[0]
        x += (u * [60.0, 45.0, 32.0]) @ np.linalg.qr(rng.normal(size=(n, rank)))[0].T
    truth -= truth.mean(1, keepdims=True)  # the mean of each volume is no component
    noisy = truth + rng.normal(size=truth.shape)
    out = denoise(noisy.reshape(patches * 7, 7, 7, n).astype(np.float32), patch=(7, 7, 7), stride=7,
                  loss="frobenius", rician=False)
    estimate = out.signal.reshape(patches, voxels, n)
    assert out.rank.mean() == pytest.approx(rank, abs=0.2)
    assert out.sigma.mean() == pytest.approx(1, rel=0.01)
    left, size, right = np.linalg.svd(estimate - estimate.mean(1, keepdims=True),
                                      full_matrices=False)
    oracle = np.einsum("pvk,pvn,pkn->pk", left[..., :rank], truth, right[:, :rank])
    standard_error = np.std(size[:, :rank] - oracle, axis=0) / np.sqrt(patches)
    assert (np.abs((size[:, :rank] - oracle).mean(0)) < 3 * standard_error).all()
    left, size, right = np.linalg.svd(noisy - noisy.mean(1, keepdims=True), full_matrices=False)
    best = (left[..., :rank] * oracle[:, None]) @ right[:, :rank]
    hard = (left[..., :rank] * size[:, None, :rank]) @ right[:, :rank]
    error = [np.square(x - truth).sum() for x in (estimate - estimate.mean(1, keepdims=True), best,
                                                  hard)]
    assert error[0] < 1.02 * error[1] and error[2] > 1.1 * error[0]
    out = denoise(noisy.reshape(patches * 7, 7, 7, n).astype(np.float32), patch=(7, 7, 7), stride=7,
                  rician=False)  # restores the singular values of the signal
    estimate = out.signal.reshape(patches, voxels, n)
    sizes, true = (np.linalg.svd(x - x.mean(1, keepdims=True), compute_uv=False)[:, :rank].mean(0)
                   for x in (estimate, truth))
    np.testing.assert_allclose(sizes, true, rtol=0.015)


def test_signal_without_noise_stays(rng):
    clean = low_rank(rng).astype(np.float32)
    np.testing.assert_allclose(denoise(clean).signal, clean, atol=1e-4)
    empty = np.zeros((6, 6, 4, 10), np.float32)
    np.testing.assert_array_equal(denoise(empty).signal, empty)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.2, 1.0])
def test_floor_is_removed(rng, signal):
    """Magnitudes of constant signals come near them; the floor is √(π/2) σ at 0."""
    sigma, shape = 0.1, (10, 10, 10, 60)
    e = sigma * rng.normal(size=(2, *shape))
    noisy = np.abs(signal + e[0] + 1j * e[1]).astype(np.float32)
    kept, removed = denoise(noisy, rician=False), denoise(noisy)
    floor = float(rician_mean(signal, sigma))
    assert kept.signal.mean() == pytest.approx(floor, rel=0.01)
    assert removed.sigma.mean() == pytest.approx(sigma, rel=0.06)
    assert (removed.signal > 0).all()
    assert abs(removed.signal.mean() - signal) < max(0.4 * (floor - signal), 0.002)


def test_slabs_join_to_the_whole(rng, monkeypatch):
    noisy = (low_rank(rng, (23, 7, 6), n=20) + 0.1 * rng.normal(size=(23, 7, 6, 20))
             ).astype(np.float32)
    mask = np.zeros(noisy.shape[:3], bool)
    mask[2:20, 1:6, 1:5] = True
    monkeypatch.setattr(module, "SLABS", 100)
    whole = denoise(noisy, mask)
    monkeypatch.setattr(module, "SLABS", 1)
    monkeypatch.setattr(module, "CHUNK", 1)
    slabs = denoise(noisy, mask)
    for name in ("signal", "sigma", "rank"):
        np.testing.assert_allclose(getattr(slabs, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_outside_of_the_mask_nothing_changes(rng):
    noisy = np.abs(rng.normal(size=(12, 10, 8, 12))).astype(np.float32)
    noisy[6, 5, 4, 3] = np.nan
    mask = np.zeros(noisy.shape[:3], bool)
    mask[5:8, 4:7, 3:6] = True
    out = denoise(noisy, mask)
    np.testing.assert_array_equal(out.signal[~mask], noisy[~mask])
    assert np.isfinite(out.signal[mask]).all() and (out.signal[mask] != noisy[mask]).all()
    assert (out.sigma[mask] > 0).all() and (out.sigma[~mask] == 0).all()


def test_voxels_that_the_scanner_set_to_zero(rng):
    clean = low_rank(rng, (20, 12, 8), n=30)
    noisy = (clean + 0.1 * rng.normal(size=clean.shape)).astype(np.float32)
    noisy[:7] = 0
    for rician in (True, False):
        out = denoise(noisy, rician=rician)
        assert np.isfinite(out.signal).all() and np.isfinite(out.sigma).all()
        np.testing.assert_allclose(out.signal[:7], 0, atol=0.03)
        inner, edge = (np.square(out.signal - clean)[part].mean() for part in (
            slice(11, 20), slice(7, 11)))
        assert inner < 0.2 * 0.1**2 and edge < 0.6 * 0.1**2


def test_patch_has_as_many_voxels_as_volumes():
    for shape in ((96, 96, 60, 7), (96, 96, 60, 100), (96, 96, 4, 100), (20, 20, 1, 64),
                  (90, 90, 60, 300)):
        patch = choose_patch(shape)
        assert np.prod(patch) >= shape[3] and all(
            p <= s for p, s in zip(patch, shape, strict=False)), (shape, patch)
    assert choose_patch((2, 3, 1, 500)) == (2, 3, 1)


def test_one_slice_and_fewer_voxels_than_volumes(rng):
    clean = low_rank(rng, (8, 7, 1), n=80)
    noisy = (clean + 0.1 * rng.normal(size=clean.shape)).astype(np.float32)
    out = denoise(noisy, rician=False)
    assert np.prod(out.patch) < 80
    assert np.square(out.signal - clean).mean() < 0.5 * np.square(noisy - clean).mean()
    planes = denoise(np.repeat(noisy, 4, 2), patch=(5, 5, 1), rician=False)
    assert (planes.sigma > 0).all()  # however long the stride, no plane is left out


def test_methods_of_dipy(rng):
    clean = low_rank(rng, n=20)
    sigma = 0.1
    e = sigma * rng.normal(size=(2, *clean.shape))
    noisy = np.abs(clean + e[0] + 1j * e[1]).astype(np.float32)
    mask = np.zeros(clean.shape[:3], bool)
    mask[2:-2, 2:-2, 2:-2] = True
    bvals = np.r_[0, np.full(19, 1000.0)]
    for method in ("mppca", "patch2self"):
        out = denoise(noisy, mask, method=method, bvals=bvals)
        assert out.signal.dtype == np.float32
        assert np.square(out.signal - clean)[mask].mean() < 0.7 * np.square(noisy - clean)[
            mask].mean()
        np.testing.assert_array_equal(out.signal[~mask], noisy[~mask])
        assert out.law == ("gaussian" if method == "mppca" else "rician")
        if method == "mppca":
            assert out.sigma[mask].mean() == pytest.approx(sigma, rel=0.1)


def test_what_cannot_be_denoised():
    volumes = np.ones((5, 5, 5, 3), np.float32)
    with pytest.raises(Refusal, match="one volume"):
        denoise(volumes[..., :1])
    for method in ("mppca", "patch2self"):
        with pytest.raises(Refusal, match="takes magnitudes"):
            denoise(volumes.astype(np.complex64), method=method, bvals=np.zeros(3))
    with pytest.raises(ValueError, match="one of"):
        denoise(volumes, method="unknown")
