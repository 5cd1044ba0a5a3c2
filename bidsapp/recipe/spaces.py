"""Steps that bring finished maps to an output space: find the transform, then resample.

`Register` keeps the transform and the brain mask of a space. `Resample` takes the maps of one
estimator there, so that an estimate that is added later is resampled alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np

from bidsapp.anatomy import t1w
from bidsapp.bids import names, sidecar
from bidsapp.bids.inherit import entities_of
from bidsapp.bids.writer import Transaction, sha256, to_json
from bidsapp.dwi import Dwi, open_image, read_array
from bidsapp.errors import DataError, Refusal
from bidsapp.recipe.steps import Estimate, RunContext, Step, StepReport, voxel_size
from bidsapp.registration import acpc, deformable, resample, template
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import Image, sample
from bidsapp.report import figures
from bidsapp.spaces import ACPC, T1W, Space
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")

LEAST_BRAIN = 0.4
"""Volume of the brain mask of the diffusion images over that of the template, below which the
registration to the template would have to stretch a slab over a whole brain. It applies where the
brain was not found in the T1w image. MNI152 is large: many brains have two thirds of its volume."""


class Register(Step):
    """Find where a space lies in the diffusion images; write the transform and the brain mask.

    Parameters
    ----------
    context : RunContext
        Of the run.
    takes : Step
        The one that gives the measured signal.
    space : Space
        The space.
    """

    def __init__(self, context: RunContext, takes: Step, space: Space) -> None:
        super().__init__(context, takes)
        self.space = space
        self.name = "_".join(["space", *(v if k != "res" else f"res{v}"
                                         for k, v in space.entities.items())])

    @property
    def parameters(self) -> Mapping[str, Any]:
        image, space = self.context.run.t1w, self.space
        return {"space": str(space), "resolution": self.context.options.output_resolution,
                "t1w": sha256(image) if image and image.is_file() else str(image),
                "template": [sha256(f) for f in (space.image, space.mask) if f]}

    @property
    def title(self) -> str:
        return f"output space {self.space}"

    @property
    def required(self) -> bool:
        return self.context.run.entities.get("space") != self.space.name

    def describe(self) -> str:
        image = self._require_t1w()
        way = (f"T1w registered to {self.space.image.name}" if self.space.image else
               "T1w aligned to MNI152, rigid registration" if self.is_aligned else
               "rigid registration")
        return f"maps in the space {self.space}: {image.name}, {way}, {self._resolution}"

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return [paragraph(self.space)]

    @property
    def is_aligned(self) -> bool:
        """Whether the space is ACPC."""
        return self.space.name == ACPC

    @property
    def transform(self) -> PurePosixPath:
        """Path of the transform below OUTPUT_DIR."""
        return self._transform(self.context.run.entities.get("space", "dwi"))

    @property
    def transform_of_t1w(self) -> PurePosixPath:
        """Path of the transform of the T1w image to ACPC, below OUTPUT_DIR."""
        return self._transform(T1W)

    def _transform(self, source: str) -> PurePosixPath:
        space = self.space
        return self.context.path(
            "xfm", ".nii.gz" if space.image else ".txt",
            **{"from": source, "mode": "image",
               "to": "+".join(filter(None, (space.name, space.cohort))),
               **({"res": space.res} if space.res else {})})

    @property
    def mask(self) -> PurePosixPath:
        """Path of the brain mask in the space, below OUTPUT_DIR."""
        return self.context.path("mask", desc="brain", **self.space.entities)

    @property
    def reference(self) -> Path:
        """Path of the image that shows the anatomy: the template, or the T1w image, which in ACPC
        is to be moved by `transform_of_t1w`."""
        return self.space.image or self._require_t1w()

    @property
    def about(self) -> dict[str, Any]:
        """Sidecar keys of every image in the space. No image defines ACPC but those in it."""
        uri, root = self.context.dataset.uri, self.context.dataset.root
        return {"SpatialReference": uri(root / self.mask if self.is_aligned else self.reference),
                "Resolution": self._resolution,
                "Transform": uri(self.context.dataset.root / self.transform)}

    @cached_property
    def size(self) -> float:
        """Edge of the voxels, mm, where the space has no resolution of its own."""
        return self.context.options.output_resolution or min(voxel_size(self.context.run))

    @property
    def _resolution(self) -> str:
        return (f"res-{self.space.res} of {self.space.name}" if self.space.res
                else f"{self.size:.3g} mm isotropic")

    def _require_t1w(self) -> Path:
        """Path of the T1w image. Raises Refusal where the run cannot be brought to the space."""
        run = self.context.run
        if run.entities.get("space") == self.space.name:
            raise Refusal(f"the run is in the space {self.space.name} already, and so are its "
                          "maps.")
        if run.t1w is None:
            raise Refusal(
                f"{run.name} has no T1w image, and without one the diffusion images cannot be "
                f"registered to {self.space} reliably. Add sub-{run.participant}[/ses-…]/anat/"
                "…_T1w.nii.gz, or leave the space out. The maps in the space of the diffusion "
                "images are complete.")
        return run.t1w

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> Stage:
        assert stage
        context, dwi, source = self.context, stage.dwi, self._require_t1w()
        if dwi.acquisition.b0.all() or not dwi.acquisition.b0.any():
            raise Refusal(f"{context.run.name} has {int(dwi.acquisition.b0.sum())} b0 and "
                          f"{int((~dwi.acquisition.b0).sum())} weighted volumes. A registration "
                          "needs both. Leave the space out, or acquire them.")
        log.info("%s: registering to %s", context.run.name, self.space)
        try:
            anatomy, reference = stage.anatomy(), open_image(self.reference)
            to_t1w, shape, affine = self.place(dwi, anatomy)
            points = world_points(shape, affine)
            if self.space.image:
                points = self._from_template(stage, anatomy, points)
        except DataError as error:
            raise Refusal(str(error)) from error
        to_dwi = np.linalg.inv(anatomy.transform)
        points = transform_points(to_dwi @ to_t1w, points)
        inside = sample(dwi.mask.astype(np.float32), dwi.affine, points) > 0.5
        if not inside.any():
            raise Refusal(f"the brain lies outside the field of view of {self.space}. Check the "
                          "headers of the images.")
        mask = context.dataset.uri(context.dataset.root / context.mask)
        grid = like(reference, shape, affine, self.is_aligned)
        transaction.image(self.mask, inside.astype(np.uint8), grid, {
            **_elsewhere(sidecar.mask(context.run, context.dataset, mask)), **self.about,
            "Sources": [mask, self.about["Transform"]]})
        self._write(transaction, self.transform, resample.pack_field(points, affine)
                    if self.space.image else resample.pack_rigid(to_dwi @ to_t1w), (
                        "the diffusion run", *context.run.files, source))
        if self.is_aligned:
            self._write(transaction, self.transform_of_t1w, resample.pack_rigid(to_t1w),
                        ("the T1w image", source))
        report.notices.append(
            f"Maps in the space {self.space} ({self._resolution}): {self.mask.parent}/"
            f"{self.mask.name.replace('_desc-brain_mask.nii.gz', '_…_dwimap.nii.gz')}. The figures "
            "and tables here are of the space of the diffusion images.")
        return stage

    def place(self, dwi: Dwi, anatomy: t1w.Anatomy
              ) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
        """Find where the space lies, as far as that is rigid, and its grid.

        Parameters
        ----------
        dwi : Dwi
            The diffusion series.
        anatomy : t1w.Anatomy
            Its registration to the T1w image.

        Returns
        -------
        to_t1w : (4, 4)
            World of the space → world of the T1w image, mm; the identity but for ACPC.
        shape : (x, y, z)
        affine : (4, 4)
            Voxel indices of the grid to the world of the space, mm.

        Raises
        ------
        Refusal
            The images show too little of the brain.
        """
        to_t1w = self._align(dwi, anatomy) if self.is_aligned else np.eye(4)
        return to_t1w, *self._grid(open_image(self.reference))

    def _grid(self, reference: Any) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape and affine of the images in the space. reference: image that `reference` names."""
        if self.space.res:
            return reference.shape[:3], reference.affine
        if self.is_aligned:
            return resample.output_grid(*acpc.grid(), self.size)
        return resample.output_grid(reference.shape, reference.affine, self.size)

    def _write(self, transaction: Transaction, path: PurePosixPath, content: bytes,
               moved: tuple[Any, ...]) -> None:
        """Write a transform and its sidecar. moved: what it moves, in words, and its files."""
        name, *files = moved
        transaction.bytes(path, content)
        transaction.text(path.with_name(f"{path.name.partition('.')[0]}.json"), to_json({
            "Description": f"ITK transform that brings images of {name} to the space "
                           f"{self.space} (antsApplyTransforms -t)",
            "Sources": list(dict.fromkeys(map(self.context.dataset.uri,
                                              (*files, self.reference))))}))

    def _align(self, dwi: Dwi, anatomy: t1w.Anatomy) -> np.ndarray:
        """Find the rigid transform from ACPC to the world of the T1w image."""
        brain = Image(np.where(t1w.brain_mask(dwi, anatomy), anatomy.image, 0),
                      anatomy.affine)
        fixed = acpc.template()
        self._require_whole(anatomy, brain, fixed)
        return acpc.align(brain, fixed, self.context.options.work_dir)

    def _require_whole(self, anatomy: t1w.Anatomy, brain: Image, whole: Image) -> None:
        """Raise Refusal if the brain may be that of a slab."""
        if anatomy.brain is None and brain.volume < LEAST_BRAIN * whole.volume:
            raise Refusal(
                f"the diffusion images show {brain.volume / 1000:.0f} mL of brain, the template of "
                f"{self.space} has {whole.volume / 1000:.0f} mL: a part cannot be registered to "
                f"the whole. Use --output-spaces {T1W}.")

    def _from_template(self, stage: Stage, anatomy: t1w.Anatomy, points: np.ndarray) -> np.ndarray:
        """Find the world points of the T1w image for those of the template."""
        assert self.space.image and self.space.mask
        values, affine = t1w.read(self.space.image)
        fixed = Image(np.where(t1w.read(self.space.mask)[0] > 0.5, values, 0), affine)
        moving = Image(np.where(t1w.brain_mask(stage.dwi, anatomy), anatomy.image, 0),
                       anatomy.affine)
        self._require_whole(anatomy, moving, fixed)
        place = template.register(fixed, moving, self.context.options.work_dir,
                                  deformable.ITERATIONS)
        return resample.through(points, place, affine)

    def reload(self, stage: Stage | None, facts: Mapping[str, Any]) -> Stage:
        assert stage
        return stage


class Resample(Step):
    """Bring the maps of an estimator to a space.

    Parameters
    ----------
    context : RunContext
        Of the run.
    takes : Register
        The step that found the transform.
    estimate : Estimate
        The step that made the maps.
    """

    takes: Register

    def __init__(self, context: RunContext, takes: Register, estimate: Estimate) -> None:
        super().__init__(context, takes)
        self.takes, self.estimate = takes, estimate
        self.name = f"{takes.name}_{estimate.name}"

    @property
    def needs(self) -> list[Step]:
        return [self.takes, self.estimate]

    @property
    def required(self) -> bool:
        return self.estimate.required

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"estimate": self.estimate.fingerprint}

    @property
    def title(self) -> str:
        return f"{self.estimate.name} in the space {self.takes.space}"

    def describe(self) -> str:
        return f"  {self.title}"

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return []

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> None:
        context, space = self.context, self.takes.space
        root = context.dataset.root
        grid = open_image(root / self.takes.mask)
        inside = read_array(grid) > 0
        points = resample.read_points(root / self.takes.transform, grid.shape, grid.affine)
        mask = read_array(open_image(root / context.mask)) > 0
        images = [PurePosixPath(name) for name in context.dataset.record(
            self.estimate.record)["outputs"]
                  if name.endswith(tuple(f"_{suffix}.nii.gz" for suffix in names.MAPS))]
        log.info("%s: %s, %d images", context.run.name, self.title, len(images))
        rotations = np.empty(0)
        for path in images:
            image = open_image(root / path)
            values = read_array(image)[mask]
            values = values.reshape(len(values), -1)
            about = context.dataset.record(path.with_name(
                f"{path.name.removesuffix('.nii.gz')}.json"))
            kind = about.get("OrientationEncoding", {}).get("Type")
            if kind and not len(rotations):
                rotations = deformable.rotations(points, grid.affine, inside)
            if kind == "unit3vector":
                way = "linear, of n nᵀ, rotated with the head"
                new = resample.directions(values, mask, image.affine, points[inside],
                                          rotations)
            elif kind == "sh":
                way = "linear, of the coefficients, rotated with the head"
                new = resample.densities(values, mask, image.affine, points[inside],
                                          rotations)
            elif kind:
                report.notices.append(f"{path.name} is not written in the space {space}: it holds "
                                      f"directions ({kind}) that would have to be rotated.")
                continue
            else:
                nearest = about.get("Units") == "label"
                way = "nearest voxel" if nearest else "linear"
                new = resample.scalars(values, mask, image.affine, points[inside],
                                       order=0 if nearest else 1)
            whole = np.zeros((*inside.shape, new.shape[1]), image.get_data_dtype())
            whole[inside] = new
            whole = whole if image.ndim > 3 else whole[..., 0]
            suffix = path.name.removesuffix(".nii.gz").rpartition("_")[2]
            entities = {**{k: v for k, v in entities_of(path.name).items() if k != "res"},
                        **space.entities}
            uri = context.dataset.uri(root / path)
            transaction.image(
                context.path(suffix, **entities), whole, grid,
                {**_elsewhere(about), **self.takes.about, "Interpolation": way,
                 "Sources": [uri, self.takes.about["Transform"]]})
            if path.name.endswith("_model-tensor_param-fa_dwimap.nii.gz"):
                report.figures.append(self._figure(whole, inside, grid.affine))

    def _figure(self, fa: np.ndarray, inside: np.ndarray, affine: np.ndarray) -> figures.Figure:
        """Draw the reference of the space with the outline of FA."""
        values, reference_affine = t1w.read(self.takes.reference)
        points = world_points(inside.shape, affine)
        if self.takes.is_aligned:
            points = resample.read_points(
                self.context.dataset.root / self.takes.transform_of_t1w, inside.shape, affine)
        shown = sample(values, reference_affine, points)
        canvas = SimpleNamespace(mask=inside, affine=affine)
        return figures.of_space(canvas, shown, fa, str(self.takes.space),
                                {**self.takes.space.entities, "desc": "fa"})


def like(reference: Any, shape: tuple[int, ...], affine: np.ndarray, aligned: bool = False) -> Any:
    """Make an empty image on a grid, in the frame (NIfTI code) of another image unless aligned."""
    import nibabel as nib

    image = nib.Nifti1Image(np.empty(shape, np.uint8), affine)
    code = 2 if aligned else int(
        reference.get_sform(coded=True)[1] or reference.get_qform(coded=True)[1] or 2)
    image.set_qform(affine, code)
    image.set_sform(affine, code)
    return image


def _elsewhere(about: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the entries of a sidecar that hold on the grid of the diffusion images only."""
    return {k: v for k, v in about.items() if k not in sidecar.SPATIAL}


def paragraph(space: Space) -> tuple[str, str]:
    """Write the section of the methods text on a space: heading and text."""
    text = ("The attenuation of the diffusion signal was registered rigidly to the participant's "
            "T1w image by normalised mutual information (doi:10.1016/S0031-3203(98)00091-0), after "
            "brain extraction (deepbet, doi:10.1016/j.compbiomed.2024.108845) and correction of "
            "its bias field (N4, doi:10.1109/TMI.2010.2046908). ")
    if space.name == ACPC:
        text += ("The T1w image of the brain was registered to the template MNI152 (nonlinear "
                 "symmetric, 2009a) by an affine transform (mutual information), whose rotation "
                 "and image of MNI's origin make the rigid transform to the space ACPC. The "
                 "transforms were composed. ")
    if space.image:
        text += ("The T1w image, inside the brain mask, was registered to "
                 f"the template {space} of TemplateFlow (doi:10.1038/s41592-022-01681-2) by an "
                 "affine transform (mutual information) and SyN (local cross-correlation; "
                 "doi:10.1016/j.media.2007.06.004). The transforms were composed. ")
    return f"Output space: {space}", text + (
        "Finished maps were interpolated once, linearly, from the grid of the diffusion images to "
        "that of the space; labels took the value of the nearest voxel. Directions and densities "
        "of orientations were rotated with the head, by the rotation of the polar decomposition of "
        "the transform's Jacobian (doi:10.1109/42.963816).")
