"""Where grey matter, CSF and single fibres are.

Grey matter and CSF come from the posteriors of a T1w image where there is one that fits, else from
the diffusion images alone, by a hidden Markov random field segmentation, the algorithm of FAST
(Zhang et al. 2001, doi:10.1109/42.906424; dipy's). Its images are ratios of signals, so a bias
field cancels: the mean diffusivity parts fluid from tissue, FA then parts white from grey matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bidsapp import tensor
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal

SMOOTHNESS = 0.1
"""β of the Markov random field, as in dipy's tutorial."""

SINGLE_FIBRE_FA = 0.7
"""The paper's threshold."""

CALLOSUM_FA, LEFT_RIGHT = 0.4, 0.8
"""FA and |x| of the principal direction, at least, of the region in which voxels are sought."""

NEAR_MIDLINE, BELOW_CENTRE, DEPTH = 20.0, 20.0, 15.0
"""mm: how far from the mid-sagittal plane, and below the brain's centre, the callosum may lie; how
deep inside the mask it must lie (its noisy rim is as red as anything)."""

PART = 0.2
"""Connected parts of the region that are smaller than this share of the largest are dropped."""

FLUID = 1.5
"""MD of CSF over that of tissue, at least. It is about 4, and less where noise hides the signal."""

MIXED = 0.1
"""The least fluid, as a share, that the mean of the middle class of MD stands for."""

SURE, PURE = 0.8, 0.95
"""Posterior of a voxel, at least: with all its neighbours, or alone where none is left so."""

GREY, WHITE = 1, 2
"""Labels."""

NAMES = {"wm": WHITE, "gm": GREY}
"""Of labels, in tables and metrics."""

MIN_VOXELS = 10
"""Fewer voxels of a kind do not describe a tissue."""


@dataclass(frozen=True)
class Regions:
    """(voxel,) bool each; whether single fibres are from the callosum or from anywhere; what grey
    matter and CSF come from; sentences for the report."""

    gm: np.ndarray
    csf: np.ndarray
    single_fibre: np.ndarray
    callosum: bool
    source: str = "DWI"
    notices: tuple[str, ...] = ()


def regions(dwi: Dwi, device: str) -> Regions:
    """Grey matter, CSF and single-fibre voxels.

    Raises:
        Refusal: fewer than MIN_VOXELS of one of them.
    """
    chosen = tensor.volumes(dwi.acquisition)
    x = tensor.design(dwi.acquisition[chosen].btensors)
    maps = map_voxels(lambda signal: tensor.fit(signal[:, chosen], x), dwi.signal, device)
    usable = (dwi.mean_b0 > 0) & ~maps["failed"]
    fibre, callosum = single_fibres(dwi, maps["fa"] * usable, maps["direction"])
    notices: tuple[str, ...] = ()
    gm, csf, source = *segment(dwi, maps["md"], maps["fa"], usable), "DWI"
    if dwi.tissue is not None:
        if (of_t1w := from_posteriors(dwi, maps["md"], usable)) is not None:
            gm, csf, source = *of_t1w, "T1w"
        else:
            notices = (
                "Tissue comes from the DWI alone: where the T1w image shows CSF, water does not "
                f"diffuse {FLUID:g} times as fast as in its grey matter, or either lacks "
                f"{MIN_VOXELS} voxels. Check that the T1w image is this participant's and covers "
                "the brain.",)
    for name, found, remedy in (
            ("grey matter", gm, "Acquire more of the brain, or check the brain mask."),
            ("CSF", csf, "The slab must cut the ventricles or sulci, and the mask hold them."),
            (f"single-fibre (FA > {SINGLE_FIBRE_FA:g})", fibre,
             "Acquire the corpus callosum, at smaller voxels or higher SNR.")):
        if found.sum() < MIN_VOXELS:
            raise Refusal(f"{int(found.sum())} {name} voxels were found, {MIN_VOXELS} or more are "
                          f"needed to synthesize from this participant. {remedy}")
    return Regions(gm, csf, fibre, callosum, source, notices)


def single_fibres(dwi: Dwi, fa: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, bool]:
    """(voxel,) bool: FA > 0.7 in the corpus callosum, or anywhere where the slab cuts none.

    The callosum is sought as what is red on a colour FA map near the midline: left–right principal
    directions, within 20 mm of the mid-sagittal plane of the mask, deep inside it, not far below
    its centre (where the transverse fibres of the pons are); specks are dropped. Genu and splenium
    may be apart, as in a slab.
    """
    from scipy.ndimage import distance_transform_edt, label

    xyz = np.argwhere(dwi.mask) @ dwi.affine[:3, :3].T
    xyz = xyz - xyz.mean(axis=0)
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0)
    inner = distance_transform_edt(dwi.mask, sampling=size)[dwi.mask] > DEPTH
    red = (inner & (fa > CALLOSUM_FA) & (np.abs(direction[:, 0]) > LEFT_RIGHT)
           & (np.abs(xyz[:, 0]) < NEAR_MIDLINE) & (xyz[:, 2] > -BELOW_CENTRE))
    parts = label(dwi.unmask(red), np.ones((3, 3, 3)))[0][dwi.mask]
    count = np.bincount(parts)
    count[0] = 0
    sharp = fa > SINGLE_FIBRE_FA
    in_callosum = sharp & (parts > 0) & (count >= PART * count.max())[parts]
    return (in_callosum, True) if in_callosum.sum() >= MIN_VOXELS else (sharp & inner, False)


def from_posteriors(dwi: Dwi, md: np.ndarray, usable: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray] | None:
    """(voxel,) bool of grey matter and of CSF by the T1w image, None where MD contradicts it.

    Posteriors are means over the voxel, so that a high one is an erosion by half a voxel. Distorted
    images and a mask's rim leave some of one tissue under the other: voxels of fluid that diffuse
    as tissue are dropped, and the reverse.
    """
    assert dwi.tissue is not None
    gm, csf = (_eroded(dwi, usable & (p > SURE), usable & (p > PURE)) for p in dwi.tissue.T[[0, 2]])
    if min(gm.sum(), csf.sum()) < MIN_VOXELS:
        return None
    bound = FLUID * np.median(md[gm])
    if np.median(md[csf]) < bound:
        return None
    gm, csf = gm & (md < bound), csf & (md > bound)
    return (gm, csf) if min(gm.sum(), csf.sum()) >= MIN_VOXELS else None


def segment(dwi: Dwi, md: np.ndarray, fa: np.ndarray, usable: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    """(voxel,) bool of grey matter and of CSF, as `classes`, eroded by one voxel.

    The faces of the image do not erode, so that thin slabs keep their tissue; a class of which
    erosion leaves too little stays as it is.
    """
    grey, _, fluid = classes(dwi, md, fa, usable)
    return _eroded(dwi, grey, grey), _eroded(dwi, fluid, fluid)


def labels(dwi: Dwi, md: np.ndarray, fa: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(voxel,) int8, GREY, WHITE or 0 for anything else: the likelier of the two where posteriors
    of a T1w image make them likelier than not together, else as `classes`."""
    if dwi.tissue is not None:
        grey, white, _ = dwi.tissue.T
        solid = usable & (grey + white > 0.5)
        grey, white = solid & (grey >= white), solid & (grey < white)
    else:
        grey, white, _ = classes(dwi, md, fa, usable)
    return (GREY * grey + WHITE * white).astype(np.int8)


def classes(dwi: Dwi, md: np.ndarray, fa: np.ndarray, usable: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(voxel,) bool of grey matter, white matter and CSF.

    CSF is the highest of three classes of MD (tissue, mixed, fluid), grey matter the lower of two
    classes of FA within tissue. Where hardly a voxel is mixed the middle class is the upper part
    of tissue, and counted to it; where the highest is not clearly fluid there is no CSF. Mixed
    voxels are none of the three.
    """
    md = np.clip(md / 3e-3, 0, 1)
    fluid = _classes(dwi, md, usable, 3)
    if not fluid.any():
        fluid = _classes(dwi, md, usable, 2)
        fluid[fluid == 2] = 3
    level = [md[fluid == k].mean() if (fluid == k).any() else np.inf for k in (1, 2, 3)]
    csf = (fluid == 3) & (level[2] > FLUID * level[0])
    mixed = (fluid == 2) & (level[1] > level[0] + MIXED * (level[2] - level[0]))
    solid = _classes(dwi, fa, (fluid > 0) & ~csf & ~mixed, 2)
    return solid == 1, solid == 2, csf


def _classes(dwi: Dwi, values: np.ndarray, inside: np.ndarray, count: int) -> np.ndarray:
    """(voxel,) class 1 … count in ascending order of `values` (0–1), 0 where not inside.

    The classes start evenly over 0–1, or where one stays empty so, over what `values` span; where
    one stays empty even then, all do.
    """
    from dipy.segment.tissue import TissueClassifierHMRF

    if inside.sum() < MIN_VOXELS:
        return np.zeros(len(values))
    low, high = np.quantile(values[inside], (0.02, 0.98))
    span = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    # not 0: dipy would add unseeded noise there
    image = 1e-3 + 1e-4 * np.random.default_rng(0).standard_normal(dwi.mask.shape)
    for scaled in (0.1 + 0.9 * values, 1 / count + (1 - 1 / count) * span):
        image[dwi.mask] = np.where(inside, scaled, 1e-3)
        with np.errstate(invalid="ignore", divide="ignore"):  # of classes that are empty
            _, found, _ = TissueClassifierHMRF(verbose=False).classify(image, count, SMOOTHNESS)
        classes = np.where(inside, found[dwi.mask], 0)
        if set(range(1, count + 1)) <= set(np.unique(classes).tolist()):
            return classes
    return np.zeros(len(values))


def _eroded(dwi: Dwi, inside: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """`inside` without its outermost voxels, or `otherwise` where that leaves too few."""
    from scipy.ndimage import binary_erosion

    core = binary_erosion(dwi.unmask(inside), border_value=1)[dwi.mask]
    return core if core.sum() >= MIN_VOXELS else otherwise
