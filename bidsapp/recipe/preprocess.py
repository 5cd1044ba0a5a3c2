"""The step that corrects the images of a run, and writes them once.

The corrections share one interpolation and one written image, so they are one step of the plan,
with one record, which keeps parameters, numbers and figures of each. Their order is

    phase (complex data) → noise → Gibbs ringing → susceptibility field
    → motion, eddy currents, outlier slices → one interpolation → bias field → brain mask.

A correction that a run does not allow is left out, with a notice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bidsapp.acquisition import Acquisition, PhaseEncoding, read_partial_fourier
from bidsapp.anatomy import t1w
from bidsapp.anatomy.mask import median_otsu, read_mask
from bidsapp.bids import btable, sidecar
from bidsapp.bids.inherit import name_of
from bidsapp.bids.writer import Transaction, sha256
from bidsapp.dwi import Dwi, Run, open_image, read_array
from bidsapp.errors import DataError, Refusal
from bidsapp.evaluate import quality
from bidsapp.options import DENOISERS, Options
from bidsapp.preprocess import bias, denoise, distortion, gibbs, motion, phase
from bidsapp.preprocess.model import Geometry, resample
from bidsapp.recipe.field import FIELD_SOURCES, describe_run, field_sources
from bidsapp.recipe.outputs import write_tables
from bidsapp.recipe.spaces import Register, like
from bidsapp.recipe.steps import (
    MADE_MASK,
    RunContext,
    Step,
    StepReport,
    check_gradients,
    is_real,
    register_t1w,
)
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import sample
from bidsapp.report import boilerplate, corrections
from bidsapp.series import Series
from bidsapp.spaces import Space, parse
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")


class Preprocess(Step):
    """Correct the images of a run as --preprocess says, and write them with all that was found."""

    name = "preprocessed"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self.done: list[str] = []

    @property
    def parameters(self) -> Mapping[str, Any]:
        run, options = self.context.run, self.context.options
        others = [*run.phase, *(image for field_map in run.field_maps
                                for image in (*field_map.images, *field_map.magnitudes))]
        files = [*run.files, *(image.image for image in others), *([run.t1w] if run.t1w else [])]
        return {"entities": run.entities,
                "inputs": [sha256(f) if f.is_file() else str(f) for f in files],
                "metadata": [part.metadata for part in (*run.parts, *others)],
                "corrections": self.context.corrections,
                "fallback_readout": options.fallback_total_readout_time,
                "gradient_check": options.gradient_check,
                "spaces": [(str(space), options.output_resolution)
                           for space in rigid_spaces(options)]}

    @property
    def title(self) -> str:
        return "preprocessing"

    def describe(self) -> str:
        run, fallback = self.context.run, self.context.options.fallback_total_readout_time
        try:
            volume_encodings(run, fallback)
        except DataError as error:
            return f"corrections: would fail: {error}"
        lines = [] if run.preprocessed else describe_run(run, self.context.corrections, fallback)
        return "\n    ".join([f"corrections: {' '.join(self.context.corrections)}", *lines])

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return paragraphs(self.done)

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> None:
        chosen = self.context.corrections
        corrector = Corrector(self.context, report)
        corrector.remove_phase()
        for method in DENOISERS:
            if method in chosen:
                corrector.denoise(method)
        if "gibbs" in chosen:
            corrector.unring()
        if "distortion" in chosen:
            corrector.find_field()
        if "motion" in chosen:
            log.info("%s: search for motion and eddy currents started", corrector.run.name)
            corrector.find_motion()
        corrector.interpolate()
        if "bias" in chosen:
            corrector.remove_bias()
        corrector.find_mask()
        corrector.check_gradients()
        corrector.write(transaction)
        for space in rigid_spaces(self.context.options):
            corrector.write_in_space(transaction, Register(self.context, self, space))
        report.facts |= corrector.facts()
        self.done = [corrector.done.get(name, name) for name in corrector.described()]


class Corrector:
    """Correct the series of one run; hold the series and what the corrections have found so far.

    Parameters
    ----------
    context : RunContext
        The run.
    report : StepReport
        Receives numbers, figures and sentences.
    """

    def __init__(self, context: RunContext, report: StepReport) -> None:
        run = context.run
        self.context, self.run, self.report = context, run, report
        self.acquisition = context.acquisition
        self.affine = np.asarray(context.like.affine, dtype=np.float64)
        self.encodings = volume_encodings(run, context.options.fallback_total_readout_time)
        self.volumes, invalid = load(run, self.acquisition)
        self.signed = np.iscomplexobj(self.volumes)  # so is the real part
        self.magnitude = not self.signed
        report.facts = {"invalid": invalid, "corrections": []}
        self.reference = int(np.argmax(self.acquisition.b0))
        if not self.first_b0().any():
            raise DataError(f"{', '.join(str(p.image) for p in run.parts)}: volume "
                            f"{self.reference} (counted from 0), the first b0, holds no signal. "
                            "Remove it from image, .bval and .bvec, or convert the series again.")
        self.mask = median_otsu(self.first_b0())
        if (angle := disagreement(context.like)) > MAX_DISAGREEMENT:
            self.warn(f"{run.parts[0].image}: the axes of its qform and its sform differ by "
                      f"{angle:.1f}°, and the sform is used. Check which of them holds, since "
                      "field maps, the T1w image and the b-vectors are placed by it.")
        raw = self.dwi()
        self.raw_b0 = np.abs(self.volumes[..., self.acquisition.b0]).mean(axis=-1)
        self.raw_correlations = quality.neighbouring_correlations(raw.signal, self.acquisition)
        report.qc["ndc_raw"] = quality.neighbouring_correlation(raw)
        self.field: distortion.Field | None = None
        self.motion: motion.MotionEstimate | None = None
        self.moved: quality.HeadMotion | None = None
        self.replaced: np.ndarray | None = None
        self.bias: np.ndarray | None = None
        self.anatomy: t1w.Anatomy | None = None
        self.t1w_problem: str | None = None
        self.uninterpolated: list[np.ndarray] = []
        self.sources: list[str] = []
        self.about: dict[str, Any] = {}
        self.done: dict[str, str] = {}  # corrections whose paragraph depends on what was done

    def dwi(self) -> Dwi:
        """Collect the magnitude of the series, as it is now, inside the mask."""
        signal = self.volumes[self.mask]
        return Dwi(np.ascontiguousarray(np.abs(signal) if np.iscomplexobj(signal) else signal),
                   self.mask, self.affine, self.acquisition)

    def first_b0(self) -> np.ndarray:
        """Magnitude of the first b0 volume, in whose place the field is found."""
        return np.abs(self.volumes[..., self.reference])

    def by_volume(self) -> list[np.ndarray]:
        """The volumes of the series, (x, y, z) each."""
        return [*np.moveaxis(self.volumes, -1, 0)]

    def note(self, name: str, text: str, start: float) -> None:
        """Add a correction to the report: its name, a sentence, and its seconds."""
        seconds = round(time.monotonic() - start, 1)
        log.info("%s: %s (%.1f s)", self.run.name, text, seconds)
        self.report.facts["corrections"].append({
            "name": name, "title": TITLES.get(name, name), "text": text, "seconds": seconds})

    def skip(self, reason: str) -> None:
        """Say why a part of a correction is left out."""
        log.info("%s: %s", self.run.name, reason)
        self.report.notices.append(reason)

    def warn(self, reason: str) -> None:
        """Say what is probably wrong, or which error of the images is left in them."""
        log.warning("%s: %s", self.run.name, reason)
        self.report.warnings.append(reason)

    def denoise(self, method: str) -> None:
        """Remove noise in and around the brain by a method of `options.DENOISERS`."""
        from scipy.ndimage import binary_dilation

        start, before = time.monotonic(), self.volumes
        try:
            result = denoise.denoise(
                before, binary_dilation(self.mask, iterations=MARGIN),
                method={"denoise": "pca"}.get(method, method), rician=self.magnitude,
                bvals=self.acquisition.bvals, device=self.context.device)
        except Refusal as refusal:
            self.warn(f"Noise was not removed: {refusal}")
            return
        self.volumes = result.signal
        floor = self.magnitude and result.law != "rician"
        self.magnitude = self.magnitude and not floor
        text = "noise removed" + (
            f" in patches of {' × '.join(map(str, result.patch))} voxels" if result.patch else "")
        residual = np.sqrt(np.mean((before - self.volumes)**2, axis=-1))
        if result.sigma is not None:
            sd = float(np.median(result.sigma[self.mask]))
            variance = float(np.mean(result.sigma[self.mask]**2))
            self.report.qc |= {"preproc_noise_sd": sd, "preproc_noise_removed": float(
                np.mean(residual[self.mask]**2) / variance) if variance else None}
            text += f"; its SD is {sd:.3g} in the brain (median)"
        if method == "denoise":
            self.done[method] = "denoise_magnitude" if floor else "denoise_gaussian"
        self.note(method, text, start)
        shown = int(np.argmax(self.acquisition.bvals))
        self.report.figures += corrections.of_denoising(
            before[..., shown], self.volumes[..., shown], result.sigma, residual, self.mask,
            self.affine)

    def unring(self) -> None:
        """Remove Gibbs ringing in the plane of the slices."""
        start, encoding = time.monotonic(), self.encodings[self.reference]
        try:
            share = read_partial_fourier(self.run.metadata)
        except DataError as error:
            share = float("nan")
            self.warn(f"{self.run.parts[0].image}: {error}")
        result = gibbs.unring(self.volumes, self.in_plane(), partial_fourier=share,
                              phase_axis=encoding.axis if encoding else None,
                              device=self.context.device)
        self.volumes = result.volumes
        if result.notice:
            self.skip(result.notice)
        if result.axes:
            self.done["gibbs"] = "gibbs_both" if len(result.axes) > 1 else "gibbs_across"
            self.note("gibbs", "Gibbs ringing removed along "
                               f"{' and '.join('ijk'[a] for a in result.axes)}", start)

    def remove_phase(self) -> None:
        """Turn complex volumes into real ones, without their background phase."""
        if not np.iscomplexobj(self.volumes):
            return
        start = time.monotonic()
        self.volumes = phase.remove_phase(self.volumes, self.in_plane(),
                                          device=self.context.device).real
        self.sources += [self.context.dataset.uri(image.image) for image in self.run.phase]
        self.note("complex", "background phase of each slice removed; the signal is the real part",
                  start)

    def in_plane(self) -> tuple[int, int]:
        """The two axes in the plane of the slices."""
        first, second = (axis for axis in range(3) if axis != slice_axis(self.run.metadata))
        return first, second

    def find_field(self) -> None:
        """Find the susceptibility field by the most trusted images that serve."""
        encoding = next((e for e in self.encodings if e is None or e.readout is None),
                        self.encodings[self.reference])
        if encoding is None or encoding.readout is None:
            missing = "PhaseEncodingDirection" if encoding is None else "TotalReadoutTime"
            self.warn(f"Distortion was not corrected: the sidecar has no {missing}. Add it"
                      + (", or give --fallback-total-readout-time." if encoding else "."))
            return
        self.report.notices += self.run.notices
        for kind, images, find in field_sources(self.context, encoding, self.register_t1w):
            start = time.monotonic()
            try:
                field, pair = find(self.first_b0(), self.affine, self.mask)
            except DataError as error:
                self.warn(f"{', '.join(map(name_of, images))} cannot give the susceptibility "
                          f"field: {error}")
                continue
            self.field = field
            self.sources += [self.context.dataset.uri(path) for path in images]
            self.report.notices += field.notices
            largest = float(np.abs(field.hz[self.mask]).max())
            self.report.qc["field_max"] = largest
            text = (f"susceptibility field from {', '.join(map(name_of, images))} "
                    f"({FIELD_SOURCES[kind]}): up to {largest:.0f} Hz in the brain")
            if pair:
                self.report.qc |= {"field_correlation_before": field.before,
                                   "field_correlation_after": field.after}
                text += (f"; correlation of the two b0 images {field.before:.3f} before and "
                         f"{field.after:.3f} after")
            self.note(PARAGRAPHS.get(kind, kind), text, start)
            self.report.figures += corrections.of_field(
                field.hz, self.mask, self.affine, field.before, field.after, pair,
                ("this series", "the opposite encoding"))
            return
        self.warn("Distortion was not corrected: no image gives the susceptibility field. Add one "
                  "of opposite phase encoding, a GRE field map or a T1w image.")

    def find_motion(self) -> None:
        """Find motion, eddy currents and outlier slices."""
        from scipy.spatial.transform import Rotation

        start, across = time.monotonic(), slice_axis(self.run.metadata)
        b0 = self.first_b0()
        if b0.shape[across] < MIN_SLICES_MOTION:
            self.warn(f"Motion was not corrected: {b0.shape[across]} slices do not determine "
                      f"movements across them, {MIN_SLICES_MOTION} are needed.")
            return
        if self.field is not None:
            (b0,) = resample([b0], self.still([self.encodings[self.reference]]), b0.shape,
                             self.affine)
        try:
            found = motion.estimate(
                self.by_volume(), self.acquisition, self.encodings, self.affine, median_otsu(b0),
                None if self.field is None else self.field.hz, slice_axis=across,
                device=self.context.device)
        except np.linalg.LinAlgError as error:
            self.warn(f"Motion was not corrected: its estimate diverged ({error}). The cause is "
                      "not known: too little structure, too much noise, or a fault of this "
                      "program. No volume is moved.")
            return
        self.motion = found
        moved = self.head_motion()
        far = np.linalg.norm(moved.translations, axis=1).max()
        turned = np.degrees(Rotation.from_matrix(found.geometry.rotations).magnitude()).max()
        if far > MAX_MOVE or turned > MAX_TURN:
            self.motion = None
            self.warn(f"Motion was not corrected: it was estimated as {far:.0f} mm and "
                      f"{turned:.0f}°, and no more than {MAX_MOVE:.0f} mm and {MAX_TURN:.0f}° is "
                      "credible. The images may hold too little structure or too much noise. No "
                      "volume is moved.")
            return
        if b0.shape[across] < FEW_SLICES:
            self.warn(f"Motion was estimated from {b0.shape[across]} slices, which hardly "
                      "determine rotations: b-vectors may be turned by more than without the "
                      "correction. Look at the motion on the page, and leave motion out of "
                      "--preprocess if it is not credible.")
        self.moved = moved  # once, for the mask and with it the centre change later
        for notice in found.notices:
            self.warn(notice)
        distance = moved.framewise_displacement[1:]
        self.report.qc |= {"fd_mean": float(distance.mean()) if len(distance) else 0.0,
                           "fd_max": float(distance.max()) if len(distance) else 0.0}
        name, what = {0: ("rigid", "motion"), 4: ("motion", "motion and linear eddy currents")}.get(
            found.eddy_terms, ("motion", "motion and eddy currents"))
        if name == "motion":
            self.done[name] = "motion_linear" if found.eddy_terms == 4 else "motion_quadratic"
        self.note(name, f"{what} estimated: framewise displacement "
                  f"{self.report.qc['fd_mean']:.2f} mm on average, "
                  f"{self.report.qc['fd_max']:.2f} mm at most; {found.outliers.sum()} outlier "
                  f"slices of {np.isfinite(found.z).sum()} assessed", start)
        self.report.figures += [
            *corrections.of_motion(moved.translations, moved.rotations,
                                   found.geometry.eddy if found.eddy_terms else None,
                                   moved.framewise_displacement, self.acquisition.b0),
            *corrections.of_carpet(found.z, found.outliers, self.acquisition.bvals)]

    def head_motion(self) -> quality.HeadMotion:
        """Motion about the centre of the brain."""
        assert self.motion
        geometry = self.motion.geometry
        centre = transform_points(self.affine, np.argwhere(self.mask)).mean(axis=0)
        return quality.head_motion(geometry.rotations, geometry.translations, centre)

    def geometry(self) -> Geometry:
        """Return the geometry of the series, in which each volume shows the first b0 volume."""
        return self.motion.geometry if self.motion else self.still(self.encodings)

    def still(self, encodings: Sequence[PhaseEncoding | None]) -> Geometry:
        """Make the geometry of volumes that did not move, in the susceptibility field."""
        return Geometry.static(self.affine, self.volumes.shape[:3], encodings,
                               None if self.field is None else self.field.hz)

    def interpolate(self) -> None:
        """Resample all volumes once, through all transforms; rotate the b-vectors."""
        if self.field is None and self.motion is None:
            return
        start, volumes = time.monotonic(), self.by_volume()
        if self.motion is not None:
            volumes, self.replaced = motion.replace_outliers(volumes, self.motion)
            self.report.qc["n_replaced_slices"] = int(self.replaced.sum())
            self.acquisition = self.motion.acquisition
        if rigid_spaces(self.context.options):
            self.uninterpolated = volumes
        self.volumes = np.empty_like(self.volumes)
        for v, volume in enumerate(resample(volumes, self.geometry(), self.volumes.shape[:3],
                                            self.affine)):
            self.volumes[..., v] = volume if self.signed else np.maximum(volume, 0)
        self.mask = median_otsu(self.mean_b0())
        causes = ["susceptibility"] * (self.field is not None) + ["eddy currents"] * bool(
            self.motion is not None and self.motion.geometry.eddy.any())
        self.note("resample", "all volumes interpolated once, by cubic splines" + (
            f", and multiplied by the Jacobian of the displacement by {' and '.join(causes)}"
            if causes else ""), start)

    def mean_b0(self) -> np.ndarray:
        """Mean of the b0 volumes, (x, y, z)."""
        return self.volumes[..., self.acquisition.b0].mean(axis=-1)

    def remove_bias(self) -> None:
        """Divide by the bias field of the mean b0."""
        start, across = time.monotonic(), slice_axis(self.run.metadata)
        if self.mask.shape[across] < MIN_SLICES:
            self.skip(f"The bias field was not corrected: {self.mask.shape[across]} slices do not "
                      f"show it, {MIN_SLICES} are needed.")
            return
        try:
            field = bias.estimate(self.mean_b0(), self.mask, self.affine)
        except DataError as error:
            self.skip(f"The bias field was not corrected: {error}")
            return
        self.bias = field.values
        self.volumes /= self.bias[..., None]
        self.report.qc |= {"bias_min": field.lowest, "bias_max": field.highest}
        self.note("bias", f"bias field of the mean b0 removed by N4: {field.lowest:.2f} to "
                  f"{field.highest:.2f} in the brain (percentiles 1 and 99)", start)

    def find_mask(self) -> None:
        """Find the brain on the corrected images."""
        run = self.run
        self.mask_source, self.mask_files = MADE_MASK, list[str]()
        self.mask = median_otsu(self.mean_b0())
        if run.t1w and not run.mask:
            start = time.monotonic()
            log.info("%s: registration to %s started", run.name, run.t1w.name)
            try:
                self.anatomy = self.register_t1w()
                self.mask = t1w.mask_from_t1w(self.anatomy, self.mask, self.affine)
                self.mask_source = f"deepbet of {run.t1w.name}"
                self.mask_files = [self.context.dataset.uri(run.t1w)]
                self.note("brain", f"brain mask of {run.t1w.name}, brought to the corrected images",
                          start)
            except DataError as error:
                self.warn(f"The brain mask is made of the mean b0, not of the T1w image: {error}")
        if run.mask:
            self.mask = read_mask(run.mask, self.mask.shape, self.affine)
            self.mask_source = self.context.dataset.uri(run.mask)
            if self.field is not None:
                self.skip(f"{run.mask.name} was given, and is used although distortion was "
                          "corrected since. Check that it still follows the brain.")

    def register_t1w(self) -> t1w.Anatomy:
        """Register the series, as it is now, to the T1w image.

        Raises
        ------
        DataError
            It cannot be registered, or could not before.
        """
        try:
            return register_t1w(self.run, self.dwi(), self.context.device,
                                problem=self.t1w_problem)
        except DataError as error:
            self.t1w_problem = str(error)
            raise

    def check_gradients(self) -> None:
        """Check the b-vectors on the corrected signal; turn them with the head afterwards."""
        checked = check_gradients(
            self.run, self.dwi(), self.context.options.gradient_check,
            corrected=self.run.preprocessed or self.motion is not None)
        self.report.warnings += checked.warnings
        self.report.notices += checked.notices
        self.report.qc |= checked.qc
        self.about.update(checked.about)
        if checked.about:  # the table is wrong in the scanner, before it is turned with the head
            axes = btable.fsl_axes(self.affine)
            table = axes @ checked.table @ axes.T
            acquisition = self.context.acquisition
            acquisition = replace(acquisition, bvecs=acquisition.bvecs @ table.T)
            if self.motion is not None:
                acquisition = acquisition.rotated(
                    np.swapaxes(self.motion.geometry.rotations, 1, 2))
            self.acquisition = acquisition

    def write_in_space(self, transaction: Transaction, register: Register) -> None:
        """Write the corrected images in a rigid output space, by one interpolation.

        Parameters
        ----------
        transaction : Transaction
            Receives the files.
        register : Register
            The step that writes the space's transform and brain mask; not yet done.
        """
        context, start, space = self.context, time.monotonic(), register.space
        if self.run.t1w is None or self.run.entities.get("space") == space.name:
            return  # the step `register` says why
        try:
            self.anatomy = self.anatomy or self.register_t1w()
            to_t1w, shape, affine = register.place(self.dwi(), self.anatomy)
        except (DataError, Refusal) as error:
            self.skip(f"The corrected images are not written in the space {space}: {error}")
            return
        to_dwi = np.linalg.inv(self.anatomy.transform) @ to_t1w
        series = np.stack([*resample(self.uninterpolated or self.by_volume(), self.geometry(),
                                     shape, affine, to_reference=to_dwi)], axis=-1)
        if self.bias is not None and self.uninterpolated:
            points = transform_points(to_dwi, world_points(shape, affine))
            series /= sample(self.bias, self.affine, points, beyond="nearest")[..., None]
        acquisition = self.acquisition.rotated(to_dwi[:3, :3].T)
        about = {**self.sidecar(), **register.about}
        grid = like(open_image(register.reference), shape, affine, register.is_aligned)
        path = context.path("dwi", desc="preproc", **space.entities)
        transaction.image(path, series, grid, {**about, "Description": (
            f"Diffusion series after the corrections that are listed, in the space {space}"),
            "Corrections": self.described()})
        write_tables(transaction, path, acquisition, affine)
        transaction.image(context.path("dwiref", **space.entities), series[
            ..., acquisition.b0].mean(axis=-1), grid, {
                **about, "Description": "Mean of the corrected b0 volumes"})
        log.info("%s: corrected images written in the space %s (%.1f s)", self.run.name, space,
                 time.monotonic() - start)

    def facts(self) -> dict[str, Any]:
        """Entries of the record that later steps read."""
        return {"mask_source": self.mask_source, "about": self.about, "magnitude": self.magnitude,
                "t1w_problem": self.t1w_problem,
                "t1w_transform": self.anatomy.transform.tolist() if self.anatomy else None}

    def sidecar(self) -> dict[str, Any]:
        """Sidecar keys of all images that are written."""
        keys = sidecar.base(self.run, self.context.dataset, "")
        return {**keys, "Sources": [*dict.fromkeys([*keys["Sources"], *self.sources])],
                "SkullStripped": False, **self.about}

    def described(self) -> dict[str, str]:
        """A sentence on each correction, by its name."""
        return {entry["name"]: entry["text"] for entry in self.report.facts["corrections"]}

    def write(self, transaction: Transaction) -> None:
        """Write the corrected images, the brain mask, the field and the confounds."""
        context, run, dataset = self.context, self.run, self.context.dataset
        raw = self.sidecar()
        image = context.path("dwi", desc="preproc")
        transaction.image(image, self.volumes, context.like, {
            **raw, "Description": "Diffusion series after the corrections that are listed",
            "Corrections": self.described()})
        write_tables(transaction, image, self.acquisition, self.affine)
        transaction.image(context.path("dwiref"), self.mean_b0(), context.like,
                          {**raw, "Description": "Mean of the corrected b0 volumes"})
        transaction.image(context.mask, self.mask.astype(np.uint8), context.like,
                          sidecar.mask(run, dataset, self.mask_source, self.mask_files))
        if self.field is not None:
            transaction.image(
                context.path("fieldmap", folder="fmap", desc="preproc"), self.field.hz,
                context.like, {**raw, "Units": "Hz", "Description": "Susceptibility field in the "
                               "place of the first b0 volume"})
        # with the bias field, which raises the correlation of the raw images
        signal = self.volumes[self.mask] * (1 if self.bias is None else self.bias[self.mask, None])
        correlations = quality.neighbouring_correlations(signal, self.acquisition)
        self.report.qc["ndc_preproc"] = float(np.nanmean(correlations)) if np.isfinite(
            correlations).any() else None
        moved = self.moved
        rows, columns = corrections.confounds(
            context.acquisition, self.acquisition,
            correlation_before=self.raw_correlations, correlation_after=correlations,
            **({} if self.motion is None or moved is None else {
                "translations": moved.translations, "rotations": moved.rotations,
                "framewise_displacement": moved.framewise_displacement,
                "eddy": self.motion.geometry.eddy, "replaced": self.replaced}))
        transaction.table(context.path("timeseries", ".tsv", desc="confounds"), rows, columns)
        self.report.figures += [
            *corrections.of_b0(self.raw_b0, self.mean_b0(), self.mask, self.affine),
            *corrections.of_correlation(self.raw_correlations, correlations)]


def paragraphs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Write the sections of the methods text on corrections: (heading, text) each.

    names: keys of `boilerplate.CORRECTIONS`, or names of --preprocess, of which one may stand for
    several.
    """
    several = {"distortion": ("pair", "gre", "t1w", "resample"), "motion": ("motion", "resample")}
    keys = dict.fromkeys(key for name in names for key in several.get(name, (name,)))
    titles = {key: TITLES.get(word, word) for key in keys for word in [key.split("_")[0]]}
    return [(f"Correction: {titles[key]}", boilerplate.CORRECTIONS[key])
            for key in keys]


TITLES = {"pair": "distortion, by opposite phase encoding", "gre": "distortion, by a GRE field map",
          "rigid": "motion",
          "t1w": "distortion, by the T1w image", "resample": "interpolation",
          "complex": "phase", "gibbs": "Gibbs ringing", "denoise": "noise", "bias": "bias field"}
"""Headings of corrections, where they differ from their key in `boilerplate.CORRECTIONS`."""

def load(run: Run, acquisition: Acquisition) -> tuple[np.ndarray, int]:
    """Read the volumes of a run, complex if it has phase images or imaginary parts.

    Parts with b0 volumes are scaled so that the mean of these equals that of the first such part.

    Returns
    -------
    volumes : (x, y, z, n) float32 or complex64
    invalid : int
        Number of values that were not finite and became 0.

    Raises
    ------
    DataError
        A file is damaged, or the phase is in unknown units.
    """
    volumes, invalid = Series.from_run(run, acquisition).load()
    if run.phase:
        volumes = _make_complex(volumes, run)
    ends = np.cumsum([open_image(part.image).shape[3] for part in run.parts])
    reference = 0.0
    for part in map(slice, [0, *ends[:-1]], ends):
        if acquisition.b0[part].any():
            level = float(np.abs(volumes[..., part][..., acquisition.b0[part]]).mean())
            reference = reference or level
            if level:
                volumes[..., part] *= np.float32(reference / level)
    return volumes, invalid


def _make_complex(volumes: np.ndarray, run: Run) -> np.ndarray:
    """Combine magnitudes with phases, or real with imaginary parts."""
    others = [read_array(open_image(image.image), np.float32) for image in run.phase]
    if [other.shape for other in others] != [open_image(p.image).shape for p in run.parts]:
        raise DataError(f"{run.phase[0].image}: has another shape than the image it belongs to. "
                        "Convert both again, or remove it.")
    if is_real(run):
        return phase.from_parts(volumes, np.nan_to_num(np.concatenate(others, axis=-1)))
    try:
        angles = [phase.to_radians(other, image.metadata.get("Units"))
                  for other, image in zip(others, run.phase, strict=True)]
    except DataError as error:
        raise DataError(f"{run.phase[0].image}: {error}") from error
    return phase.from_polar(volumes, np.nan_to_num(np.concatenate(angles, axis=-1)))


MAX_DISAGREEMENT = 1.0
"""Largest angle between the axes of qform and sform that is not told, in degrees."""

MIN_SLICES = 5
"""Fewest slices of which the bias field is corrected."""

MIN_SLICES_MOTION, FEW_SLICES = 6, 8
"""Fewest slices of which motion is corrected, and number of slices below which it is uncertain. On
two simulated heads (slices of 4 mm) the mean error of the rotation was 2.1° and 1.4° with 5 slices,
1.2° and 0.4° with 6, 0.8° and 0.5° with 8; 1.1° and 1.0° with nothing done."""

MAX_MOVE, MAX_TURN = 40.0, 30.0
"""Displacement of the brain's centre (mm) and rotation (degrees) within a series above which their
estimate is wrong."""

CORRECTION_COPIES = 3
"""Memory of the corrections over that of the signal of all voxels (`peak_memory`)."""

MARGIN = 4
"""Voxels around the brain in which noise is removed, too."""

PARAGRAPHS = {"opposite": "pair", "phasediff": "gre", "phases": "gre", "fieldmap": "gre"}
"""Key of `boilerplate.CORRECTIONS` for each source of the field, where it has another name."""


def rigid_spaces(options: Options) -> list[Space]:
    """List the output spaces in which the corrected images are written: those without a template,
    since in others b-vectors differ from voxel to voxel."""
    return [space for space in parse(options.output_spaces) if space.image is None]


def volume_encodings(run: Run, fallback: float | None) -> tuple[PhaseEncoding | None, ...]:
    """Read the phase encoding of each volume of a raw run; an unknown readout is the fallback's.

    Raises
    ------
    DataError
        A sidecar holds an invalid phase encoding.
    """
    encodings: list[PhaseEncoding | None] = []
    for part in run.parts:
        try:
            encoding = PhaseEncoding.from_sidecar(part.metadata)
        except DataError as error:
            raise DataError(f"{part.image}: {error}") from error
        if encoding and encoding.readout is None:
            encoding = replace(encoding, readout=fallback)
        encodings += [encoding] * open_image(part.image).shape[3]
    return tuple(encodings)


def disagreement(image: Any) -> float:
    """Find the largest angle between the voxel axes of an image by its qform and by its sform, in
    degrees; 0 if it has only one of them."""
    matrices = image.get_qform(coded=True)[0], image.get_sform(coded=True)[0]
    if any(matrix is None for matrix in matrices):
        return 0.0
    one, other = (m[:3, :3] / np.linalg.norm(m[:3, :3], axis=0) for m in matrices)
    return float(np.degrees(np.arccos(np.clip((one * other).sum(axis=0), -1, 1))).max())


def slice_axis(metadata: Mapping[str, Any]) -> int:
    """Find the voxel axis across the slices: SliceEncodingDirection, else the third."""
    direction = str(metadata.get("SliceEncodingDirection") or "k")[0]
    return "ijk".index(direction) if direction in "ijk" else 2
