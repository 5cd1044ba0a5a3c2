"""The brain mask is the one that DIPY's median-Otsu makes."""

import sys

import nibabel as nib
import numpy as np
import pytest
from dipy.data import get_fnames

from bidsapp.anatomy.mask import median_otsu
from support import ROOT, synthetic_head

sys.path.insert(0, str(ROOT / "benchmarks"))
from mask import dice, dipy_mask, mean_b0


def head(rng):
    """(x, y, z) float32: the noisy b0 of the synthetic head, with a ramp of receive bias."""
    image, _ = synthetic_head.signal(synthetic_head.tissues(), [0], np.ones((1, 3)), rng, noise=60)
    return image[..., 0] * np.linspace(0.6, 1.4, image.shape[0], dtype=np.float32)[:, None, None]


def spiked(rng):
    """With a few values that are no signal, as resampling and reconstruction leave them."""
    image = head(rng)
    image.flat[rng.choice(image.size, 20, replace=False)] = 1e7
    image.flat[rng.choice(image.size, 20, replace=False)] = -1e7
    return image


@pytest.mark.parametrize("make", [
    head, spiked, lambda rng: head(rng)[..., 14:16], lambda rng: head(rng)[:, 3:, 6:],
    lambda rng: nib.load(get_fnames(name="S0_10")).get_fdata(dtype=np.float32)[..., 0]],
    ids=["head", "spikes", "slab of two slices", "cut by the field of view", "brain (DIPY's S0)"])
def test_same_mask_as_dipy(make, rng):
    image = make(rng)
    before = image.copy()
    assert dice(median_otsu(image), dipy_mask(image)) >= 0.99
    assert np.array_equal(image, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siemens_xa30", "uih_dti16", "canon_retest", "mdt_multishell",
                                  "nyu_3shell", "dib2019_btensor"])
def test_same_mask_as_dipy_in_real_data(test_data, name):
    image = mean_b0(min(test_data(name).glob("sub-*/**/dwi/*_dwi.nii.gz")))
    assert dice(median_otsu(image), dipy_mask(image)) >= 0.99
