"""Write the BIDS dataset of a multi-site phantom; `simulate.phantom` simulates each scan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

from bidsapp import __version__
from bidsapp.acquisition import PhaseEncoding
from bidsapp.bids import names
from bidsapp.bids.new_dataset import NewDataset, new_dataset
from bidsapp.bids.writer import CODE_URL
from bidsapp.blocks import one_thread
from bidsapp.options import ARTIFACT_OPTIONS, DESIGNS, PhantomOptions
from bidsapp.simulate import anatomy
from bidsapp.simulate.anatomy import TISSUES, Atlas
from bidsapp.simulate.artifacts import ECHO_SPACING, PARTIAL_FOURIER, RawScan, simulate_raw
from bidsapp.simulate.fields import stream
from bidsapp.simulate.person import (
    LESION_D,
    LESION_F,
    MEAN_AGE,
    OFFSET_SD,
    Person,
    draw_person,
)
from bidsapp.simulate.phantom import L_MAX, Scan, draw_pose, simulate_scan
from bidsapp.simulate.site import Site, draw_sites, gradient_table

log = logging.getLogger("qsphere")
MAKER = "qsphere-phantom"
"""Name of the program in dataset descriptions."""

LABELS = dict(zip(TISSUES, ("WM", "GM", "CSF"), strict=True))
"""BIDS label of each tissue."""

MASKS, TISSUE = (PurePosixPath("derivatives", n) for n in ("masks", "tissue"))
"""Folders of brain masks and tissue maps."""

TRUTH = PurePosixPath("sourcedata", "truth")
"""Folder of the truth of each scan. It is not below derivatives/, where `bids-validator -r` would
check it: version 3.0.2 reads no .bidsignore there, without which it rejects names like *_dwimap."""


@dataclass(frozen=True)
class Participant:
    """Participant of the phantom and the sites of their scans.

    Parameters
    ----------
    label : str
    age : float
        Years.
    sex : str
        F or M.
    lesion : bool
        Whether there is a lesion.
    sites : tuple of int
        Indices of the sites.
    tissue : tuple of float
        Offsets of the tissue properties (z-scores), in the order of `person.OFFSET_SD`.
    """

    label: str
    age: float
    sex: str
    lesion: bool
    sites: tuple[int, ...]
    tissue: tuple[float, ...]


def phantom(options: PhantomOptions) -> int:
    """Simulate a phantom and write its dataset.

    Parameters
    ----------
    options : PhantomOptions

    Returns
    -------
    int
        Exit code.

    Raises
    ------
    UsageError
        The folder cannot be used.
    """
    with new_dataset(options.output_dir, MAKER) as tree, one_thread():
        atlas = load_atlas(options.step)
        sites = draw_sites(options)
        people = recruit(options)
        describe(tree, options, people, sites)
        write_sites(tree, options, sites)
        # one thread compresses and writes a scan while the next is simulated
        with ThreadPoolExecutor(1) as writer, tqdm(
                total=sum(len(p.sites) for p in people), desc="scans", disable=None) as bar:
            previous = None
            for scan in simulate_scans(options, people, sites, atlas,
                                       simulate_raw if options.artifacts else simulate_scan):
                if previous:
                    previous.result()
                previous = writer.submit(write_scan, tree, options, *scan)
                bar.update()
            if previous:
                previous.result()
    log.info("phantom: %s", options.output_dir)
    return 0


@lru_cache(1)
def load_atlas(step: float) -> Atlas:
    """Build the atlas with voxels of `step` mm from the MNI152 maps in nilearn's wheel.

    No download is necessary.
    """
    from nilearn.datasets import (
        load_mni152_gm_template,
        load_mni152_template,
        load_mni152_wm_template,
    )

    images = [f(resolution=1) for f in (load_mni152_template, load_mni152_gm_template,
                                        load_mni152_wm_template)]
    t1, gm, wm = (i.get_fdata(dtype=np.float32) for i in images)
    return anatomy.build(t1, gm, wm, images[0].affine, step)


def recruit(options: PhantomOptions) -> list[Participant]:
    """Draw the participants of a phantom and assign them to sites.

    Ages are spread evenly over the range. Each tissue property takes the quantiles of a normal
    distribution, and the properties are uncorrelated, so that a few participants vary as much as
    many.

    Parameters
    ----------
    options : PhantomOptions

    Returns
    -------
    list of Participant
    """
    rng = stream(options.random_seed, "people", options.design)
    n, k, (low, high) = options.participants, options.sites, options.ages
    sites: list[tuple[int, ...]]

    def spread(count: int) -> np.ndarray:
        return low + (high - low) * (np.arange(count) + rng.uniform(size=count)) / count

    if options.design == "matched":  # in each group of k, age and sex are alike and sites differ
        group = np.arange(n) // k
        ages = rng.permutation(spread(group[-1] + 1))[group] + rng.uniform(-1, 1, n)
        sexes, sites = group % 2, [(i % k,) for i in range(n)]
    elif options.design == "confounded":
        ages, sexes, sites = spread(n), np.arange(n) % 2, [(i * k // n,) for i in range(n)]
    else:
        ages, sexes = rng.permutation(spread(n)), np.arange(n) % 2
        sites = [tuple(range(k))] * n
    lesion = np.isin(np.arange(n), rng.permutation(n)[:round(options.lesions * n)])
    tissue = np.stack([norm.ppf((rng.permutation(n) + 0.5) / n) for _ in OFFSET_SD], 1)
    tissue /= np.maximum(tissue.std(0), 1e-9) if n > 1 else 1
    if n > tissue.shape[1]:  # uncorrelated, so that no property masks another by chance
        tissue = np.linalg.qr(tissue)[0] * np.sqrt(n)
    width = max(2, len(str(n)))
    return [Participant(f"{i + 1:0{width}}", round(float(np.clip(ages[i], low, high)), 1),
                        "FM"[sexes[i]], bool(lesion[i]), sites[i], tuple(tissue[i].tolist()))
            for i in range(n)]


def simulate_scans(options: PhantomOptions, people: list[Participant], sites: list[Site],
                   atlas: Atlas, simulate: Callable[..., Any] = simulate_scan
                   ) -> Iterator[tuple[Participant, Person, Site, Any]]:
    """Simulate all scans, participant by participant.

    Parameters
    ----------
    options : PhantomOptions
    people : list of Participant
    sites : list of Site
        The first is the reference site.
    atlas : Atlas
    simulate : function
        `simulate_scan`, or `simulate_raw` for raw images with artifacts.

    Yields
    ------
    participant : Participant
    person : Person
        Anatomy and tissue of the participant.
    site : Site
    scan : Scan or RawScan
        What `simulate` returns.
    """
    tables = {n: gradient_table(options.shells, n) for n in sorted({s.directions for s in sites})}
    for participant in people:
        person = draw_person(options, atlas, participant.label, participant.age, participant.sex,
                             participant.lesion, participant.tissue)
        for site in (sites[i] for i in participant.sites):
            pose = draw_pose(options, participant.label, site.name)
            yield participant, person, site, simulate(
                person, site, sites[0], tables[site.directions], atlas, options, pose)


def describe(tree: NewDataset, options: PhantomOptions, people: list[Participant], sites: list[Site]
             ) -> None:
    """Write dataset descriptions, README, .bidsignore, and tables of participants and sessions."""
    generator = {"Name": MAKER, "Version": __version__, "CodeURL": CODE_URL}
    title = "QSphere multi-site diffusion MRI phantom"
    common = {"BIDSVersion": "1.10.0", "License": "CC0", "Authors": AUTHORS,
              "GeneratedBy": [generator]}
    tree.json("dataset_description.json", {"Name": title, "DatasetType": "raw", **common})
    folders = {TRUTH: "truth"} if options.artifacts else {
        MASKS: "brain masks", TISSUE: "tissue maps", TRUTH: "truth"}
    readme = README + (README_ARTIFACTS if options.artifacts else "")
    for folder, content in folders.items():
        tree.json(folder / "dataset_description.json", {
            "Name": f"{title}: {content}", "DatasetType": "derivative", **common,
            "DatasetLinks": {"raw": "../.."}, "SourceDatasets": [{"URL": "../.."}]})
        tree.text(folder / "README.md", readme)
        tree.text(folder / ".bidsignore", "\n".join(names.BIDSIGNORE) + "\n")
    tree.text("README.md", readme)
    travelling = options.design == "travelling"
    tree.table("participants.tsv", [{
        "participant_id": f"sub-{p.label}", "age": p.age, "sex": p.sex,
        **({} if travelling else {"site": sites[p.sites[0]].name})} for p in people], {
            "age": {"Description": "Age", "Units": "year"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
            **({} if travelling else {"site": SITE})})
    for p in people if travelling else ():
        tree.table(f"sub-{p.label}/sub-{p.label}_sessions.tsv", [
            {"session_id": f"ses-{sites[i].name}", "site": sites[i].name} for i in p.sites],
            {"site": SITE})


def write_sites(tree: NewDataset, options: PhantomOptions, sites: list[Site]) -> None:
    """Write the properties of all sites, the slopes of tissue over age, and the options."""
    unused = () if options.artifacts else ARTIFACT_OPTIONS
    settings = {k: v for k, v in asdict(options).items() if k not in ("output_dir", *unused)}
    tree.json(TRUTH / "desc-sites_truth.json", {
        "Reference": sites[0].name, "Design": DESIGNS[options.design],
        "Sites": {s.name: {f.name: getattr(s, f.name) for f in fields(s) if f.name != "fields"}
                  for s in sites},
        "AgeSlope": {"neuritefraction_wm": options.age_slope_f,
                     "diffusivity_wm": options.age_slope_d, "diffusivity_gm": options.age_slope_d,
                     "MeanAge": MEAN_AGE, "Units": "1/year; um^2/ms/year"},
        "Options": settings})


def write_raw(tree: NewDataset, options: PhantomOptions, entities: dict[str, str], site: Site,
              scan: Scan) -> tuple[PurePosixPath, PurePosixPath]:
    """Write the raw DWI and T1w of a scan, and return their paths."""
    affine = scan.grid.affine
    dwi = names.output_path(entities, "dwi", ".nii.gz")
    tree.image(dwi, _stored(scan.signal, options), affine,
               {**_epi(site), "PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05},
               site.repetition_time)
    tree.gradients(dwi, scan.acquisition, affine)
    return dwi, _write_t1(tree, options, entities, site, scan.t1, scan.fine.affine)


def write_artifacts(tree: NewDataset, options: PhantomOptions, entities: dict[str, str], site: Site,
                    raw: RawScan) -> tuple[PurePosixPath, PurePosixPath]:
    """Write the raw images of a scan with artifacts, and return the paths of DWI and T1w."""
    affine, repetition = raw.scan.grid.affine, site.repetition_time
    pair = bool(len(raw.reverse))

    def epi(encoding: PhaseEncoding, **more: Any) -> dict[str, Any]:
        zeros = {"PartialFourier": PARTIAL_FOURIER, "PartialFourierDirection": "PHASE"}
        return {**_epi(site), "PhaseEncodingDirection": encoding.direction,
                "TotalReadoutTime": encoding.readout, "EffectiveEchoSpacing": ECHO_SPACING,
                **(zeros if options.has("partial-fourier") else {}), **more}

    series = {**entities, "dir": "AP"} if pair else entities
    fields = {"B0FieldIdentifier": "pepolar", "B0FieldSource": ["pepolar", "gre"]} if pair else {}
    dwi = names.output_path(series, "dwi", ".nii.gz")
    images = [dwi]
    if raw.phase is not None:
        dwi, phase = (names.output_path(series, "dwi", ".nii.gz", part=p) for p in ("mag", "phase"))
        images = [dwi, phase]
        tree.image(phase, raw.phase, affine, epi(raw.encoding, Units="rad", **fields), repetition)
        tree.gradients(phase, raw.scan.acquisition, affine)
    tree.image(dwi, _stored(raw.magnitude, options), affine, epi(raw.encoding, **fields),
               repetition)
    tree.gradients(dwi, raw.scan.acquisition, affine)
    if pair:
        intended = {"IntendedFor": [f"bids::{path}" for path in images]}
        tree.image(names.output_path({**entities, "dir": "PA"}, "epi", ".nii.gz", "fmap"),
                   _stored(raw.reverse, options), affine,
                   epi(raw.reverse_encoding, B0FieldIdentifier="pepolar", **intended), repetition)
        assert raw.phasediff is not None  # there is one with every pair
        gre = {**_scanner(site), "RepetitionTime": 0.5, "FlipAngle": 60,
               "B0FieldIdentifier": "gre", **intended}
        times = {f"EchoTime{i + 1}": t for i, t in enumerate(raw.echo_times)}
        integers = np.rint(raw.phasediff * (4096 / np.pi)).clip(-4096, 4095).astype(np.int16)
        tree.image(names.output_path(entities, "phasediff", ".nii.gz", "fmap"), integers, affine,
                   {**gre, **times})
        for i, (image, time) in enumerate(zip(raw.gre, raw.echo_times, strict=True)):
            tree.image(names.output_path(entities, f"magnitude{i + 1}", ".nii.gz", "fmap"),
                       _stored(image, options), affine, {**gre, "EchoTime": time})
    return dwi, _write_t1(tree, options, entities, site, raw.t1, raw.scan.fine.affine)


def write_artifact_truth(tree: NewDataset, entities: dict[str, str], site: Site, raw: RawScan,
                         sidecar: Callable[..., dict[str, Any]]) -> None:
    """Write what the artifacts of a scan are, and the signal without them."""
    affine, n = raw.scan.grid.affine, len(raw.magnitude)
    clean = TRUTH / names.output_path(entities, "dwi", ".nii.gz", desc="clean")
    tree.image(clean, raw.clean, affine, sidecar(
        "Signal of this site without noise and artifacts, with the head at rest; its b-vectors are "
        "in the frame of the head"), site.repetition_time)
    tree.gradients(clean, raw.felt, affine)
    if len(raw.reverse):
        tree.image(TRUTH / names.output_path(entities, "truth", ".nii.gz", desc="field"), raw.field,
                   affine, sidecar("Susceptibility field of the head at rest", Units="Hz"))
    volumes = [{"image": "dwi" if v < n else "epi", "volume": v if v < n else v - n}
               for v in range(len(raw.eddy))]

    def table(description: str, rows: list[dict[str, Any]], columns: dict[str, Any]) -> None:
        path = TRUTH / names.output_path(entities, "truth", ".tsv", desc=description)
        tree.table(path, rows, {**VOLUME, **columns})

    table("motion", [{**volume, **dict(zip(MOTION, (*t, *r.ravel()), strict=True))}
                     for volume, r, t in zip(volumes, raw.rotations, raw.translations,
                                             strict=True)], MOTION)
    table("eddy", [{**volume, **dict(zip(EDDY, e, strict=True))}
                   for volume, e in zip(volumes, raw.eddy, strict=True)], EDDY)
    if raw.lost.any():
        table("outliers", [{**volumes[v], "slice": k, "lost": raw.lost[v, k]}
                           for v, k in np.argwhere(raw.lost)], OUTLIERS)


def _scanner(site: Site) -> dict[str, Any]:
    """Sidecar of all images of a site."""
    return {"Manufacturer": "QSphere", "ManufacturersModelName": f"Phantom {site.name}",
            "DeviceSerialNumber": site.name, "InstitutionName": site.name,
            "MagneticFieldStrength": 3.0, "SoftwareVersions": __version__}


def _epi(site: Site) -> dict[str, Any]:
    """Sidecar of a site's EPIs."""
    return {**_scanner(site), "EchoTime": round(site.echo_time / 1000, 6),
            "RepetitionTime": round(site.repetition_time, 6)}


def _write_t1(tree: NewDataset, options: PhantomOptions, entities: dict[str, str], site: Site,
              image: np.ndarray, affine: np.ndarray) -> PurePosixPath:
    t1w = names.output_path(entities, "T1w", ".nii.gz", "anat")
    tree.image(t1w, _stored(image, options), affine, {
        **_scanner(site), "EchoTime": 0.003, "RepetitionTime": 2.3, "FlipAngle": 9})
    return t1w


def write_scan(tree: NewDataset, options: PhantomOptions, participant: Participant, person: Person,
               site: Site, simulated: Scan | RawScan) -> None:
    """Write the raw images, derivatives and truth of one scan.

    With artifacts, masks and tissue maps are part of the truth.
    """
    entities = {"sub": participant.label}
    if options.design == "travelling":
        entities["ses"] = site.name
    raw = simulated if isinstance(simulated, RawScan) else None
    scan = simulated.scan if isinstance(simulated, RawScan) else simulated
    affine, fine = scan.grid.affine, scan.fine.affine
    dwi, t1w = (write_artifacts(tree, options, entities, site, raw) if raw
                else write_raw(tree, options, entities, site, scan))
    masks, maps = (TRUTH, TRUTH) if raw else (MASKS, TISSUE)

    def sidecar(source: PurePosixPath, description: str, **extra: Any) -> dict[str, Any]:
        uri = f"bids:raw:{source}"
        return {"Description": description, "Sources": [uri], "SpatialReference": uri,
                "SkullStripped": True, **extra}

    tree.image(masks / names.output_path(entities, "mask", ".nii.gz", desc="brain"),
               scan.mask.astype(np.uint8), affine, sidecar(dwi, "Brain mask", Type="Brain"))
    brain = (scan.t1_tissue.sum(0) > 0.5).astype(np.uint8)
    tree.image(masks / names.output_path(entities, "mask", ".nii.gz", "anat", desc="brain"), brain,
               fine, sidecar(t1w, "Brain mask", Type="Brain"))
    for i, tissue in enumerate(TISSUES):
        label = LABELS[tissue]
        description = f"Share of {label} in a voxel, exact"
        tree.image(maps / names.output_path(entities, "probseg", ".nii.gz", "anat", label=label),
                   scan.t1_tissue[i], fine, sidecar(t1w, description))
        tree.image(TRUTH / names.output_path(entities, "probseg", ".nii.gz", label=label),
                   scan.tissue[i], affine,
                   sidecar(dwi, f"{description}, with the reference's point spread"))
    tree.image(maps / names.output_path(entities, "dseg", ".nii.gz", "anat"),
               ((scan.t1_tissue.argmax(0) + 1) * brain).astype(np.uint8), fine,
               sidecar(t1w, "Tissue of the largest share: 1 WM, 2 GM, 3 CSF"))
    if person.lesion:
        tree.image(TRUTH / names.output_path(entities, "mask", ".nii.gz", label="lesion"),
                   scan.lesion.astype(np.uint8), affine, sidecar(dwi, "Lesion", Type="Lesion"))
    for name, values in scan.truth.items():
        model, description, units = MAPS[name]
        orientation = ODF_KEYS if values.ndim > 3 else {}
        tree.image(TRUTH / names.output_path(entities, "dwimap", ".nii.gz", model=model, param=name,
                                        desc="truth"),
                   values, affine, sidecar(dwi, description, Units=units, **orientation))
    reference = TRUTH / names.output_path(entities, "dwi", ".nii.gz", desc="reference")
    tree.image(reference, scan.reference, affine, sidecar(
        dwi, "What the reference site measures without noise, on this scan's grid, in this pose, "
             "with this table"), site.repetition_time)
    tree.gradients(reference, scan.acquisition, affine)
    if raw:
        write_artifact_truth(tree, entities, site, raw, partial(sidecar, dwi))
    tree.json(TRUTH / names.output_path(entities, "truth", ".json"), {
        "Site": site.name, "Pose": scan.pose, "PoseDescription":
            "4x4, from the person's coordinates to the scanner's (world RAS+, mm)",
        "SmallestJacobian": scan.jacobian, "Age": participant.age, "Sex": participant.sex,
        "Offsets": person.offset, "Scale": person.scale,
        "Lesion": {"Centre": person.lesion[0], "Radius": person.lesion[1],
                   "Change": {"f": LESION_F, "d": LESION_D}}
        if person.lesion else None})


def _stored(values: np.ndarray, options: PhantomOptions) -> np.ndarray:
    """Round an image to integers, as scanners do; keep a noise-free one, where rounding would
    show."""
    if not np.isfinite(options.snr):
        return values
    return np.clip(np.rint(values), 0, 32767).astype(np.int16)


# texts of the dataset
AUTHORS = ["The QSphere developers", "The authors of the MNI152 average (Fonov et al. 2011)"]
SITE = {"Description": "Site (scanner)"}
MAPS = {  # name in Scan.truth: (BIDS model, description, units)
    "diffusivity": ("smt", "Diffusivity d of the two-compartment model, mean over white and grey "
                    "matter", "um^2/ms"),
    "neuritefraction": ("smt", "Neurite fraction f of the two-compartment model, mean over white "
                        "and grey matter, at the reference's echo time", "1"),
    "odf": ("smt", "Fibre orientation density, mean over white and grey matter weighted by their "
            "signal", "1/sr"),
    "fa": ("tensor", "FA of the mean diffusion tensor: the limit of b to 0, without noise; "
           "a fit at finite b differs", "1"),
    "md": ("tensor", "MD of the mean diffusion tensor: the limit of b to 0, without noise; "
           "a fit at finite b differs", "mm^2/s"),
}
ODF_KEYS = {"OrientationEncoding": {
    "Type": "sh", "Reference": "xyz", "EncodingAxis": 3, "AntipodalSymmetry": True,
    "SphericalHarmonicBasis": "descoteaux", "SphericalHarmonicLegacy": False,
    "SphericalHarmonicNormalization": "orthonormal",
    "SphericalHarmonicOrder": "l = 0, 2, 4, ..., and m = -l, ..., l for each l",
    "SphericalHarmonicDegree": L_MAX}}

VOLUME = {"image": {"Description": "Image: the DWI, or the EPI of the opposite phase encoding"},
          "volume": {"Description": "Number of its volume, from 0"}}
MOTION = {**{f"trans_{i}": {"Description": f"t_{i} of y = R x + t, from a point x of the head at "
                            "rest to y, both world RAS+", "Units": "mm"} for i in "xyz"},
          **{f"rot_{i}{j}": {"Description": f"R_{i}{j} of y = R x + t"}
             for i in "xyz" for j in "xyz"}}
EDDY = {name: {"Description": f"Coefficient of {name} of the eddy-current field, with x, y, z in "
               "units of 100 mm from the centre of the grid, world RAS+", "Units": "Hz"}
        for name in ("1", "x", "y", "z", "xx", "yy", "zz", "xy", "xz", "yz")}
OUTLIERS = {"slice": {"Description": "Slice that lost signal, from 0, along the third axis"},
            "lost": {"Description": "Share of the signal that is lost"}}

README = """# A multi-site diffusion MRI phantom

Simulated by `qsphere-phantom`: people who differ in anatomy, age and tissue, scanned at sites that
differ as real sites do. The dataset contains no data of real people, except for the average brain
(MNI152) from which all anatomies are deformed.

- `sub-*/[ses-*/]`: measured T1w and DWI. `participants.tsv` (and `sub-*/sub-*_sessions.tsv`) list
  age, sex and site.
- `derivatives/masks`: brain masks. `derivatives/tissue`: tissue shares on the grid of the T1w.
- `sourcedata/truth`: the truth of each scan on its grid: d, f and ODF of the two-compartment model,
  noise-free FA and MD, tissue shares, lesions; `desc-reference_dwi`, the noise-free signal of the
  reference site; `desc-sites_truth.json`, the parameters of all sites; `*_truth.json`, pose and
  person.

FA and MD are those of the mean diffusion tensor, the limit of b to 0. A tensor fitted at
b = 1000 s/mm2 differs from it even without noise, because log S is not linear in b. Compare such
fits with the same fit of `desc-reference_dwi`.
"""

README_ARTIFACTS = """
## Artifacts

The raw images have artifacts, and no masks. `sourcedata/truth` contains masks and tissue maps;
`desc-clean_dwi`, the signal of the same site without noise and artifacts and with the head at rest,
with the b-vectors in the frame of the head;
`desc-field_truth` (Hz); `desc-motion_truth.tsv`, `desc-eddy_truth.tsv` and
`desc-outliers_truth.tsv`. A point x of the head at rest is in volume v at R x + t, and appears
there displaced by T (h(x) + e(R x + t)) voxels along the phase-encoding direction, with the total
readout time T, the susceptibility field h and the eddy-current field e.
"""
