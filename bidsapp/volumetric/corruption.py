"""Corrupt S/S0 for pretraining: a network learns to restore it, without labels.

There are three kinds: artifacts of scanner and head, which the network removes; nothing, so that
the network is an autoencoder; and cubes of voxels set to 0, which it fills (masked autoencoder: He
et al. 2022, doi:10.1109/CVPR52688.2022.01553).

Eddy currents distort each measurement in its own way. With the isocentre at the centre of the grid,
y along the phase-encoding axis and u, w along the two others (mm), a point appears at

    y' = s y + a u + c w + t    (Andersson, in: Diffusion MRI, 2nd edition, 2014, chapter 4),

with the stretch s, the shears a, c and the shift t. Signal is conserved, so that S is divided by
dy'/dy = s. Eddy currents do not distort S0; S/S0 is therefore divided by s, too.

The other artifacts are those of TorchIO (Pérez-García et al. 2021, doi:10.1016/j.cmpb.2021.106236).
Motion, ghosts and bias field are the same in all measurements of a volume; noise is independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from bidsapp.errors import UsageError
from bidsapp.training import seeded

KINDS = ("artifacts", "none", "mask")

ARTIFACTS = ("motion", "ghosting", "bias", "noise")
"""Artifacts of TorchIO; `artifacts` gives each volume one of them, with equal probability."""

GHOSTS = 2
"""Ghosts in the field of view, at equal distances, the image itself being one of them; the other
parameters are TorchIO's defaults."""

STRETCH = 0.1
"""Largest |s − 1|: the stretch is from 0.9 to 1.1."""

SHEAR = STRETCH
"""Largest shear. An eddy field is, to first order, a constant and a gradient along each axis; the
gradients across the phase-encoding axis, which shear, have the range of that along it, which
stretches. At the brain's edge, a shear moves by as much as a stretch of the same size."""

SHIFT = STRETCH * 85.0
"""Largest shift (mm): as much as the stretch moves the edge of the brain, 85 mm (half the length of
a brain) from the isocentre."""


@dataclass(frozen=True)
class Corruption:
    """Random corruption of the volumes of S/S0 that a network is pretrained on.

    Parameters
    ----------
    kind : str
        `artifacts`: eddy-current distortion of each measurement, then motion, ghosting, a bias
        field or noise. `none`: nothing. `mask`: a share of all cubes of voxels is set to 0.
    voxel : float
        Voxel size of the isotropic grid (mm), which motion and shift are relative to.
    phase_axis : int
        Phase-encoding axis: 0, 1 or 2 of the grid.
    edge : int
        Edge of the cubes (voxels).
    share : float
        Share of masked cubes, between 0 and 1.

    Raises
    ------
    UsageError
        A value is outside of these.
    """

    kind: str
    voxel: float
    phase_axis: int = 1
    edge: int = 4
    share: float = 0.6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"the corruption is {self.kind!r}. It must be one of "
                             f"{', '.join(KINDS)}.")
        if not 0 < self.voxel < math.inf or self.phase_axis not in (0, 1, 2):
            raise UsageError(f"the corruption has voxel {self.voxel} and phase_axis "
                             f"{self.phase_axis}. The voxel size must be positive (mm), the axis "
                             "0, 1 or 2.")
        if self.edge < 1 or not 0 < self.share < 1:
            raise UsageError(f"the corruption masks a share of {self.share} in cubes of "
                             f"{self.edge} voxels. The share must be between 0 and 1, the edge at "
                             "least 1.")

    def __call__(self, ratio: Float[torch.Tensor, "measurement x y z"], generator: torch.Generator
                 ) -> tuple[Float[torch.Tensor, "measurement x y z"], Bool[torch.Tensor, "x y z"]]:
        """Corrupt the volumes of a run or of a crop of it.

        Eddy currents come first: noise and ghosts arise in the distorted image, and interpolation
        would blur the noise. The magnitude is taken last, as a scanner does.

        Parameters
        ----------
        ratio : (measurement, x, y, z) tensor
            S/S0, from 0 to 1. It is not changed.
        generator : torch.Generator
            Determines the corruption; torch's global generator is left as it is.

        Returns
        -------
        corrupted : (measurement, x, y, z) tensor
            Corrupted S/S0, clipped at 1.
        counted : (x, y, z) bool tensor
            Voxels whose error is the loss: the masked ones with `mask`, otherwise all.

        Raises
        ------
        UsageError
            The volume has too few cubes for a masked and a visible one.
        """
        grid = tuple(ratio.shape[1:])
        everywhere = torch.ones(grid, dtype=torch.bool, device=ratio.device)
        if self.kind == "none":
            return ratio.clone(), everywhere
        if self.kind == "mask":
            masked = draw_cubes(grid, self.edge, self.share, generator).to(ratio.device)
            return ratio.masked_fill(masked, 0), masked
        draws = 2 * torch.rand(len(ratio), 4, generator=generator, device=generator.device) - 1
        stretch, *shears, shift = draws.to(ratio).unbind(1)
        distorted = distort(ratio, self.phase_axis, stretch=1 + STRETCH * stretch,
                            shear=SHEAR * torch.stack(shears, 1),
                            shift=SHIFT / self.voxel * shift)
        number, seed = (int(torch.randint(n, (), generator=generator, device=generator.device))
                        for n in (len(ARTIFACTS), 2**62))
        corrupted = add_artifact(distorted, ARTIFACTS[number], self.voxel, seed)
        return corrupted.abs().clamp(max=1), everywhere  # a ghost, or noise, may be negative


def distort(image: Float[torch.Tensor, "measurement x y z"], phase_axis: int, *,
            stretch: Float[torch.Tensor, " measurement"],
            shear: Float[torch.Tensor, "measurement 2"], shift: Float[torch.Tensor, " measurement"]
            ) -> Float[torch.Tensor, "measurement x y z"]:
    """Distort each volume along the phase-encoding axis, as eddy currents do.

    The voxel at y' shows f(y) / s with y = (y' − a u − c w − t) / s, by linear interpolation.
    Beyond the grid, f is that of the nearest voxel of the line: 0 around a brain, and no black
    edge in a crop of one.

    Parameters
    ----------
    image : (measurement, x, y, z) tensor
        On an isotropic grid.
    phase_axis : int
        Phase-encoding axis: 0, 1 or 2 of the grid.
    stretch : (measurement,) tensor
        s.
    shear : (measurement, 2) tensor
        a and c; u and w are the two other axes in their order.
    shift : (measurement,) tensor
        t (voxels).

    Returns
    -------
    (measurement, x, y, z) tensor
    """
    lines = image.movedim(1 + phase_axis, -1)
    u, w, y = (torch.arange(n).to(image) - (n - 1) / 2 for n in lines.shape[1:])
    a, c = shear[:, :, None, None].unbind(1)
    offset = a * u[:, None] + c * w + shift[:, None, None]
    last = len(y) - 1
    source = (y - offset[..., None]) / stretch[:, None, None, None] + last / 2
    source = source.clamp(0, last)
    lower = source.long()
    upper = (lower + 1).clamp(max=last)
    values = torch.lerp(lines.gather(-1, lower), lines.gather(-1, upper), source - lower)
    return (values / stretch[:, None, None, None]).movedim(-1, 1 + phase_axis)


def add_artifact(image: Float[torch.Tensor, "measurement x y z"], name: str, voxel: float, seed: int
                 ) -> Float[torch.Tensor, "measurement x y z"]:
    """Add an artifact with TorchIO, on the CPU.

    Parameters
    ----------
    image : (measurement, x, y, z) tensor
    name : str
        One of ARTIFACTS: `motion` (two movements of up to 10° about the centre of the grid and
        10 mm, during the acquisition of k-space), `ghosting` (along any axis), `bias` (the
        exponential of a polynomial of degree 3) or `noise` (Gaussian, of an SD up to 0.25).
    voxel : float
        Voxel size of the isotropic grid (mm).
    seed : int
        Seed of the random parameters and of the noise.

    Returns
    -------
    (measurement, x, y, z) tensor
        With its sign, on the device of the image.
    """
    import torchio

    transform = {"motion": torchio.RandomMotion(), "bias": torchio.RandomBiasField(),
                 "ghosting": torchio.RandomGhosting(num_ghosts=(GHOSTS, GHOSTS)),
                 "noise": torchio.RandomNoise()}[name]
    affine = torch.diag(torch.tensor([voxel, voxel, voxel, 1.0]))
    # TorchIO 1.2 rotates about the origin of the world, which is therefore the centre of the grid
    affine[:3, 3] = -voxel * (torch.tensor(image.shape[1:]) - 1) / 2
    scan = torchio.ScalarImage(tensor=image.cpu(), affine=affine)
    with seeded(seed):  # TorchIO draws from torch's global generator
        return transform(scan).data.to(image)


def draw_cubes(shape: Sequence[int], edge: int, share: float, generator: torch.Generator
               ) -> Bool[torch.Tensor, "x y z"]:
    """Draw the cubes of a grid that are masked.

    Parameters
    ----------
    shape : sequence of int
        (x, y, z) of the grid. Its last cubes are cut where it is no multiple of the edge.
    edge : int
        Edge of the cubes (voxels).
    share : float
        Share of cubes that are drawn, rounded to a number of cubes.
    generator : torch.Generator

    Returns
    -------
    (x, y, z) bool tensor
        True in the cubes, on the device of the generator.

    Raises
    ------
    UsageError
        No cube is drawn, or all are.
    """
    cubes = [math.ceil(n / edge) for n in shape]
    count = round(share * math.prod(cubes))
    if not 0 < count < math.prod(cubes):
        raise UsageError(f"a volume of {' × '.join(map(str, shape))} voxels has "
                         f"{math.prod(cubes)} cube(s) of {edge} voxels, and a share of {share} "
                         f"masks {count} of them. At least one must be masked and one visible. "
                         "Use larger crops or smaller cubes.")
    order = torch.randperm(math.prod(cubes), generator=generator, device=generator.device)
    masked = (order < count).reshape(cubes)
    for axis in range(3):
        masked = masked.repeat_interleave(edge, axis)
    return masked[tuple(slice(n) for n in shape)]
