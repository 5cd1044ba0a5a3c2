"""Segmentation of grey matter, white matter, CSF and single-fibre voxels.

`find_regions` selects voxels of pure tissue, whose signals are then measured. `labels` labels all
voxels of grey and white matter. Both use the posteriors of a T1w image if there is one;
`find_regions` only if MD agrees with them. Otherwise tissue comes from the diffusion images alone,
by a hidden Markov random field segmentation (the algorithm of FAST, Zhang et al. 2001,
doi:10.1109/42.906424, implemented by dipy). Its inputs are computed from ratios of signals, so that
a bias field cancels: mean diffusivity separates fluid from tissue, and FA separates white from grey
matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bidsapp import tensor
from bidsapp.blocks import map_voxels
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal

SMOOTHNESS = 0.1
"""β of the Markov random field, as in dipy's tutorial."""

SINGLE_FIBRE_FA = 0.7
"""FA above which a voxel counts as a single fibre: the threshold of the paper that
`methods/synthesize` implements."""

CALLOSUM_FA, LEFT_RIGHT = 0.4, 0.8
"""Smallest FA and smallest |x| of the principal direction in the region of the corpus callosum."""

NEAR_MIDLINE, BELOW_CENTRE, DEPTH = 20.0, 20.0, 15.0
"""Position of the corpus callosum, in mm: largest distance from the mid-sagittal plane, largest
distance below the brain's centre, and smallest depth inside the mask. The depth excludes the noisy
rim of the mask, whose principal directions are often left–right, too."""

PART = 0.2
"""Smallest size of a connected part of the region, as a share of the largest part."""

FLUID = 1.5
"""Smallest ratio of the MD of CSF to that of tissue. It is about 4, and lower if noise hides the
signal."""

MIXED = 0.1
"""Smallest share of fluid in the middle class of MD, by its mean between those of tissue and fluid.
With less, the class counts as tissue."""

SURE, PURE = 0.8, 0.95
"""Smallest posteriors of a tissue's voxels: SURE for a voxel and all its neighbours; PURE for a
voxel alone, if too few voxels have such neighbours."""

GREY, WHITE = 1, 2
"""Labels of grey and white matter."""

NAMES = {"wm": WHITE, "gm": GREY}
"""Names of the labels in tables and metrics."""

MIN_VOXELS = 10
"""Smallest number of voxels from which a tissue is measured."""


@dataclass(frozen=True)
class Regions:
    """Voxels of grey matter, CSF and single fibres.

    Parameters
    ----------
    gm, csf, single_fibre : (voxel,) bool
        The voxels.
    callosum : bool
        Whether the single fibres are from the corpus callosum; otherwise they are from anywhere
        deeper than DEPTH inside the mask.
    source : str
        Origin of grey matter and CSF: `DWI` or `T1w`.
    notices : tuple of str
        Sentences for the report.
    """

    gm: np.ndarray
    csf: np.ndarray
    single_fibre: np.ndarray
    callosum: bool
    source: str = "DWI"
    notices: tuple[str, ...] = ()


def tensor_maps(dwi: Dwi, device: str) -> Mapping[str, np.ndarray]:
    """Fit the tensor (`tensor.fit`) to the measurements that `tensor.volumes` selects.

    Returns
    -------
    mapping
        fa, md, direction, failed, … by voxel.
    """
    chosen = tensor.volumes(dwi.acquisition)
    x = tensor.design(dwi.acquisition[chosen].btensors)
    return map_voxels(lambda signal: tensor.fit(signal[:, chosen], x), dwi.signal, device)


def find_regions(dwi: Dwi, device: str) -> Regions:
    """Find the voxels of grey matter, CSF and single fibres.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series, with tissue probabilities if there is a T1w image.
    device : str
        Device of the tensor fit.

    Returns
    -------
    Regions

    Raises
    ------
    Refusal
        There are fewer than MIN_VOXELS voxels of one of the three.
    """
    maps = tensor_maps(dwi, device)
    usable = (dwi.mean_b0 > 0) & ~maps["failed"]
    fibre, callosum = single_fibres(dwi, maps["fa"] * usable, maps["direction"])
    notices: tuple[str, ...] = ()
    gm, csf, source = *segment(dwi, maps["md"], maps["fa"], usable), "DWI"
    if dwi.tissue is not None:
        if (of_t1w := from_posteriors(dwi, maps["md"], usable)) is not None:
            gm, csf, source = *of_t1w, "T1w"
        else:
            notices = (
                "Tissue comes from the DWI alone. In the CSF of the T1w image, MD is not "
                f"{FLUID:g} times that of its grey matter, or one of the two has fewer than "
                f"{MIN_VOXELS} voxels. Check that the T1w image is this participant's and covers "
                "the brain.",)
    for name, voxels, remedy in (
            ("grey matter", gm, "Acquire more of the brain, or check the brain mask."),
            ("CSF", csf, "The slab and the mask must include ventricles or sulci."),
            (f"single-fibre (FA > {SINGLE_FIBRE_FA:g})", fibre,
             "Acquire the corpus callosum, at smaller voxels or higher SNR.")):
        if voxels.sum() < MIN_VOXELS:
            raise Refusal(f"{int(voxels.sum())} {name} voxels were found, {MIN_VOXELS} or more are "
                          f"needed to synthesize from this participant. {remedy}")
    return Regions(gm, csf, fibre, callosum, source, notices)


def single_fibres(dwi: Dwi, fa: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, bool]:
    """Find voxels of FA > 0.7 in the corpus callosum or, if the slab does not show it, anywhere
    deep inside the mask.

    The corpus callosum is the red region of a colour FA map near the midline. Its principal
    directions are left–right, and it lies within 20 mm of the mid-sagittal plane of the mask, deep
    inside the mask, and not far below its centre, where the transverse fibres of the pons are.
    Parts that are small beside the largest are dropped. Genu and splenium may be separate, as in a
    slab. The faces of the image do not limit the depth.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series.
    fa : (voxel,)
        FA; 0 excludes a voxel.
    direction : (voxel, 3)
        Principal directions, world RAS+.

    Returns
    -------
    single_fibre : (voxel,) bool
        The voxels.
    callosum : bool
        Whether they are from the corpus callosum.
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
    """Find grey matter and CSF by the posteriors of a T1w image.

    Posteriors are means over a voxel, so that a high threshold erodes a tissue by half a voxel.
    Distortion and the rim of the mask mislabel some voxels: CSF voxels with the MD of tissue are
    dropped, and grey matter voxels with that of fluid.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series, with tissue probabilities.
    md : (voxel,)
        Mean diffusivity.
    usable : (voxel,) bool
        Voxels with a tensor.

    Returns
    -------
    pair of (voxel,) bool, or None
        Grey matter and CSF; None if MD contradicts the T1w image, or one of the two has fewer
        than MIN_VOXELS voxels.
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
    """Find grey matter and CSF by `classes`, eroded by one voxel.

    The faces of the image do not erode, so that thin slabs keep their tissue. A class is not eroded
    if too few of its voxels would remain.

    Returns
    -------
    pair of (voxel,) bool
        Grey matter and CSF.
    """
    grey, _, fluid = classes(dwi, md, fa, usable)
    return _eroded(dwi, grey, grey), _eroded(dwi, fluid, fluid)


def labels(dwi: Dwi, md: np.ndarray, fa: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Label grey and white matter.

    With posteriors of a T1w image, a voxel gets the more probable of the two labels if their sum is
    above 0.5. Otherwise labels are those of `classes`.

    Returns
    -------
    (voxel,) int8
        GREY, WHITE, or 0 for anything else.
    """
    if dwi.tissue is not None:
        grey, white, _ = dwi.tissue.T
        solid = usable & (grey + white > 0.5)
        grey, white = solid & (grey >= white), solid & (grey < white)
    else:
        grey, white, _ = classes(dwi, md, fa, usable)
    return (GREY * grey + WHITE * white).astype(np.int8)


def classes(dwi: Dwi, md: np.ndarray, fa: np.ndarray, usable: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segment grey matter, white matter and CSF from MD and FA.

    CSF is the highest of three classes of MD (tissue, mixed, fluid). Grey matter is the lower of
    two classes of FA within tissue. If the middle class has hardly more MD than tissue (MIXED), it
    is the upper part of tissue and counts as tissue. If three classes cannot be separated, there
    are two, tissue and fluid. If the highest class is not clearly fluid (FLUID), there is no CSF.
    Mixed voxels belong to none of the three.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series.
    md, fa : (voxel,)
        Mean diffusivity (mm²/s) and FA.
    usable : (voxel,) bool
        Voxels with a tensor.

    Returns
    -------
    three of (voxel,) bool
        Grey matter, white matter and CSF.
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
    """(voxel,) class 1 … count in ascending order of `values` (0–1); 0 for voxels not inside.

    The classes start evenly over 0–1 or, if one of them then stays empty, over the range of
    `values`. If one is still empty, all are.
    """
    from dipy.segment.tissue import TissueClassifierHMRF

    if inside.sum() < MIN_VOXELS:
        return np.zeros(len(values))
    low, high = np.quantile(values[inside], (0.02, 0.98))
    span = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    # dipy would add noise without a seed to a background of 0
    image = 1e-3 + 1e-4 * np.random.default_rng(0).standard_normal(dwi.mask.shape)
    for scaled in (0.1 + 0.9 * values, 1 / count + (1 - 1 / count) * span):
        image[dwi.mask] = np.where(inside, scaled, 1e-3)
        with np.errstate(invalid="ignore", divide="ignore"):  # empty classes
            _, segmented, _ = TissueClassifierHMRF(verbose=False).classify(image, count, SMOOTHNESS)
        classes = np.where(inside, segmented[dwi.mask], 0)
        if set(range(1, count + 1)) <= set(np.unique(classes).tolist()):
            return classes
    return np.zeros(len(values))


def _eroded(dwi: Dwi, inside: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """`inside` without its outermost voxels, or `otherwise` if too few remain."""
    from scipy.ndimage import binary_erosion

    core = binary_erosion(dwi.unmask(inside), border_value=1)[dwi.mask]
    return core if core.sum() >= MIN_VOXELS else otherwise
