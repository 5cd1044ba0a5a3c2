"""Gibbs ringing: equal to dipy, closer to the truth, and partial Fourier left alone."""

import numpy as np
import pytest
from dipy.denoise.gibbs import gibbs_removal

from bidsapp.preprocess.gibbs import PARTIAL, unring


def truncated(fine, size, share=1.0):
    """(u, v) complex image of `size` voxels, from the central k-space of a fine square image;
    `share` of the lines along v were sampled, the others are zero."""
    k = np.fft.fftshift(np.fft.fft2(fine))
    parts = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(fine.shape, size, strict=True)]
    k = k[tuple(parts)].copy()
    k[:, :size[1] - round(share * size[1])] = 0
    return np.fft.ifft2(np.fft.ifftshift(k)) * np.prod(size) / fine.size


def ellipses(size, factor=8):
    u, v = np.meshgrid(*(np.linspace(-1, 1, factor * n) for n in size), indexing="ij")
    return (1.0 * ((u / 0.8) ** 2 + (v / 0.7) ** 2 < 1) + 0.5 * ((u / 0.3) ** 2 + v**2 < 0.2)
            - 0.6 * ((np.abs(u + 0.2) < 0.1) & (np.abs(v) < 0.3)))


@pytest.mark.parametrize("size", [(32, 32), (40, 33), (33, 40), (35, 35)])
def test_equals_dipy(rng, size):
    fine = ellipses(size)
    clean = np.stack([truncated(fine * c, size) for c in (1, 0.4, 0.1)], -1)
    noise = rng.normal(size=(2, *size, 2, 3))
    volumes = np.abs(clean[:, :, None] + 0.02 * (noise[0] + 1j * noise[1]))
    peer = gibbs_removal(volumes.copy(), slice_axis=2, inplace=False)
    assert np.abs(peer - volumes).max() > 0.1
    np.testing.assert_allclose(unring(volumes).volumes, peer, atol=1e-9)
    single = unring(volumes.astype(np.float32)).volumes
    assert single.dtype == np.float32
    difference = np.abs(single - peer) / peer.max()
    # in float32 some voxels choose among shifts of equal variation in another way
    assert (difference < 1e-3).mean() > 0.999 and difference.max() < 5e-3


def test_slices_of_any_axis(rng):
    volumes = np.abs(rng.normal(size=(20, 24, 3))).astype(np.float32)
    before = volumes.copy()
    straight = unring(volumes, (0, 1))
    turned = unring(volumes.transpose(2, 0, 1), (1, 2))
    assert (straight.axes, straight.notice) == ((0, 1), None)
    np.testing.assert_array_equal(turned.volumes, straight.volumes.transpose(2, 0, 1))
    np.testing.assert_array_equal(volumes, before)
    damaged, empty = volumes.copy(), volumes.copy()
    damaged[3, 4, 1], empty[3, 4, 1] = np.nan, 0
    np.testing.assert_array_equal(unring(damaged).volumes, unring(empty).volumes)


def test_ringing_decreases_towards_the_truth():
    size, factor = (48, 48), 8
    fine = ellipses(size, factor)
    image = truncated(fine, size).real
    average = np.mean([np.roll(fine, (s, s), (0, 1)) for s in (3, 4)], 0)
    truth = average.reshape(48, factor, 48, factor).mean((1, 3))
    flat = np.all([np.roll(truth, (i, j), (0, 1)) == truth
                   for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)], 0)
    assert flat.sum() > 500
    unrung = unring(image[..., None]).volumes[..., 0]

    def error(x):
        return np.square(x - truth)[flat].mean()

    assert error(unrung) < error(image) / 3


def test_signed_and_complex_images():
    image = truncated(ellipses((40, 40)), (40, 40)).real[..., None] + 2
    lower = unring(image - 5).volumes
    np.testing.assert_allclose(lower, unring(image).volumes - 5, atol=1e-3)
    both = image - 5 + 1j * (2 * image - 9)
    out = unring(both).volumes
    np.testing.assert_allclose(out.real, lower, atol=1e-9)
    np.testing.assert_allclose(out.imag, unring(2 * image - 9).volumes, atol=1e-9)
    assert unring(both.astype(np.complex64)).volumes.dtype == np.complex64


def test_partial_fourier_leaves_the_phase_encoding():
    along_v = np.repeat(truncated(ellipses((40, 40)), (40, 40), 0.75)[20:21], 40, 0)
    volume = np.abs(along_v)[..., None].astype(np.float32)
    full = unring(volume, partial_fourier=PARTIAL)
    assert full.notice is None and np.abs(full.volumes - volume).max() > 0.01
    partial = unring(volume, partial_fourier=0.75, phase_axis=1)
    assert partial.axes == (0,) and "PartialFourier is 0.75" in partial.notice
    np.testing.assert_allclose(partial.volumes, volume, atol=1e-5)
    unreadable = unring(volume, partial_fourier=float("nan"), phase_axis=1)
    assert unreadable.axes == (0,) and "cannot be read" in unreadable.notice
    np.testing.assert_array_equal(unreadable.volumes, partial.volumes)
    unknown = unring(volume, partial_fourier=0.75)
    assert unknown.axes == () and "PhaseEncodingDirection" in unknown.notice
    np.testing.assert_array_equal(unknown.volumes, volume)
    across = unring(volume.transpose(1, 0, 2), partial_fourier=0.75, phase_axis=1)
    np.testing.assert_allclose(across.volumes[:, 20, 0], unring(volume).volumes[20, :, 0],
                               atol=1e-3)
