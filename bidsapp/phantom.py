"""The recipe of a multi-site phantom: draw sites and people, scan, write. Read top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

from bidsapp import __version__
from bidsapp.bids import names
from bidsapp.bids.raw import Tree, new_dataset
from bidsapp.bids.writer import CODE_URL
from bidsapp.blocks import one_thread
from bidsapp.options import DESIGNS, PhantomOptions
from bidsapp.simulate import anatomy, person, site
from bidsapp.simulate.anatomy import TISSUES, Atlas
from bidsapp.simulate.fields import stream
from bidsapp.simulate.person import Person
from bidsapp.simulate.phantom import L_MAX, Scan, draw_pose, scan
from bidsapp.simulate.site import Site

log = logging.getLogger("qsphere")
MAKER = "qsphere-phantom"
LABELS = dict(zip(TISSUES, ("WM", "GM", "CSF"), strict=True))
MASKS, TISSUE = (PurePosixPath("derivatives", n) for n in ("masks", "tissue"))
TRUTH = PurePosixPath("sourcedata", "truth")
"""What the raw data were made from. Not below derivatives/: `bids-validator -r` 3.0.2 skips every
hidden file below the root, and with it the .bidsignore that names like *_dwimap need."""


@dataclass(frozen=True)
class Participant:
    """Who is scanned where: label, age (years), sex, whether with a lesion, indices of sites, and
    where their tissue stands among people (`person.OFFSET_SD`, in SDs)."""

    label: str
    age: float
    sex: str
    lesion: bool
    sites: tuple[int, ...]
    tissue: tuple[float, ...]


def phantom(options: PhantomOptions) -> int:
    """Writes the dataset. Returns the exit code.

    Raises:
        UsageError: the folder cannot be used.
    """
    with new_dataset(options.output_dir, MAKER) as tree, one_thread():
        atlas = load_atlas(options.step)
        sites = site.draw(options)
        people = recruit(options)
        describe(tree, options, people, sites)
        write_sites(tree, options, sites)
        # one thread compresses and writes a scan while the next is simulated
        with ThreadPoolExecutor(1) as writer, tqdm(
                total=sum(len(p.sites) for p in people), desc="scans", disable=None) as bar:
            before = None
            for who, someone, where, made in scans(options, people, sites, atlas):
                if before:
                    before.result()
                before = writer.submit(write_scan, tree, options, who, someone, where, made)
                bar.update()
            if before:
                before.result()
    log.info("phantom: %s", options.output_dir)
    return 0


@lru_cache(1)
def load_atlas(step: float) -> Atlas:
    """From the MNI152 maps in nilearn's wheel; nothing is fetched."""
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
    """Ages spread evenly over the range and tissue over the quantiles of a normal distribution,
    uncorrelated, so that few people differ as many do; both sexes; lesions in the share
    asked for."""
    rng = stream(options.random_seed, "people", options.design)
    n, k, (low, high) = options.participants, options.sites, options.ages

    where: list[tuple[int, ...]]

    def spread(count: int) -> np.ndarray:
        return low + (high - low) * (np.arange(count) + rng.uniform(size=count)) / count

    if options.design == "matched":  # one of each group of like people per site
        group = np.arange(n) // k
        ages = rng.permutation(spread(group[-1] + 1))[group] + rng.uniform(-1, 1, n)
        sexes, where = group % 2, [(i % k,) for i in range(n)]
    elif options.design == "confounded":
        ages, sexes, where = spread(n), np.arange(n) % 2, [(i * k // n,) for i in range(n)]
    else:
        ages, sexes = rng.permutation(spread(n)), np.arange(n) % 2
        where = [tuple(range(k))] * n
    lesion = np.isin(np.arange(n), rng.permutation(n)[:round(options.lesions * n)])
    tissue = np.stack([norm.ppf((rng.permutation(n) + 0.5) / n) for _ in person.OFFSET_SD], 1)
    tissue /= np.maximum(tissue.std(0), 1e-9) if n > 1 else 1
    if n > tissue.shape[1]:  # uncorrelated, lest chance cancels one property by another
        tissue = np.linalg.qr(tissue)[0] * np.sqrt(n)
    width = max(2, len(str(n)))
    return [Participant(f"{i + 1:0{width}}", round(float(np.clip(ages[i], low, high)), 1),
                        "FM"[sexes[i]], bool(lesion[i]), where[i], tuple(tissue[i].tolist()))
            for i in range(n)]


def scans(options: PhantomOptions, people: list[Participant], sites: list[Site], atlas: Atlas
          ) -> Iterator[tuple[Participant, Person, Site, Scan]]:
    tables = {n: site.table(options.shells, n) for n in sorted({s.directions for s in sites})}
    for who in people:
        someone = person.draw(options, atlas, who.label, who.age, who.sex, who.lesion,
                              who.tissue)
        for where in (sites[i] for i in who.sites):
            pose = draw_pose(options, who.label, where.name)
            yield who, someone, where, scan(someone, where, sites[0], tables[where.directions],
                                            atlas, options, pose)


def describe(tree: Tree, options: PhantomOptions, people: list[Participant], sites: list[Site]
             ) -> None:
    """Dataset descriptions, README, participants and sessions."""
    by = {"Name": MAKER, "Version": __version__, "CodeURL": CODE_URL}
    title = "QSphere multi-site diffusion MRI phantom"
    common = {"BIDSVersion": "1.10.0", "License": "CC0", "Authors": AUTHORS,
              "GeneratedBy": [by]}
    tree.json("dataset_description.json", {"Name": title, "DatasetType": "raw", **common})
    for folder, what in ((MASKS, "brain masks"), (TISSUE, "tissue maps"), (TRUTH, "truth")):
        tree.json(folder / "dataset_description.json", {
            "Name": f"{title}: {what}", "DatasetType": "derivative", **common,
            "DatasetLinks": {"raw": "../.."}, "SourceDatasets": [{"URL": "../.."}]})
        tree.text(folder / "README.md", README)
        tree.text(folder / ".bidsignore", "\n".join(names.BIDSIGNORE) + "\n")
    tree.text("README.md", README)
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


def write_sites(tree: Tree, options: PhantomOptions, sites: list[Site]) -> None:
    """Every parameter that was drawn or chosen."""
    plain = {k: v for k, v in asdict(options).items() if k != "output_dir"}
    tree.json(TRUTH / "desc-sites_truth.json", {
        "Reference": sites[0].name, "Design": DESIGNS[options.design],
        "Sites": {s.name: {f.name: getattr(s, f.name) for f in fields(s) if f.name != "fields"}
                  for s in sites},
        "AgeSlope": {"neuritefraction_wm": options.age_slope_f,
                     "diffusivity_wm": options.age_slope_d, "diffusivity_gm": options.age_slope_d,
                     "MeanAge": person.MEAN_AGE,
                     "Units": "1/year; um^2/ms/year"},
        "Options": plain})


def write_scan(tree: Tree, options: PhantomOptions, who: Participant, someone: Person,
               where: Site, made: Scan) -> None:
    """Raw T1w and DWI, and the derivatives of one scan."""
    entities = {"sub": who.label}
    if options.design == "travelling":
        entities["ses"] = where.name
    affine, fine = made.grid.affine, made.fine.affine
    scanner = {
        "Manufacturer": "QSphere", "ManufacturersModelName": f"Phantom {where.name}",
        "DeviceSerialNumber": where.name, "InstitutionName": where.name,
        "MagneticFieldStrength": 3.0, "SoftwareVersions": __version__}
    dwi = names.output_path(entities, "dwi", ".nii.gz")
    tree.image(dwi, _stored(made.signal, options), affine, {
        **scanner, "EchoTime": round(where.echo_time / 1000, 6),
        "RepetitionTime": round(where.repetition_time, 6), "PhaseEncodingDirection": "j-",
        "TotalReadoutTime": 0.05}, where.repetition_time)
    tree.gradients(dwi, made.acquisition, affine)
    t1w = names.output_path(entities, "T1w", ".nii.gz", "anat")
    tree.image(t1w, _stored(made.t1, options), fine, {
        **scanner, "EchoTime": 0.003, "RepetitionTime": 2.3, "FlipAngle": 9})

    def keys(source: PurePosixPath, text: str, **more: Any) -> dict[str, Any]:
        uri = f"bids:raw:{source}"
        return {"Description": text, "Sources": [uri], "SpatialReference": uri,
                "SkullStripped": True, **more}

    tree.image(MASKS / names.output_path(entities, "mask", ".nii.gz", desc="brain"),
               made.mask.astype(np.uint8), affine, keys(dwi, "Brain mask", Type="Brain"))
    brain = (made.t1_tissue.sum(0) > 0.5).astype(np.uint8)
    tree.image(MASKS / names.output_path(entities, "mask", ".nii.gz", "anat", desc="brain"), brain,
               fine, keys(t1w, "Brain mask", Type="Brain"))
    for i, tissue in enumerate(TISSUES):
        label = LABELS[tissue]
        text = f"Share of {label} in a voxel, exact"
        tree.image(TISSUE / names.output_path(entities, "probseg", ".nii.gz", "anat", label=label),
                   made.t1_tissue[i], fine, keys(t1w, text))
        tree.image(TRUTH / names.output_path(entities, "probseg", ".nii.gz", label=label),
                   made.tissue[i], affine, keys(dwi, f"{text}, with the reference's point spread"))
    tree.image(TISSUE / names.output_path(entities, "dseg", ".nii.gz", "anat"),
               ((made.t1_tissue.argmax(0) + 1) * brain).astype(np.uint8), fine,
               keys(t1w, "Tissue of the largest share: 1 WM, 2 GM, 3 CSF"))
    if someone.lesion:
        tree.image(TRUTH / names.output_path(entities, "mask", ".nii.gz", label="lesion"),
                   made.lesion.astype(np.uint8), affine, keys(dwi, "Lesion", Type="Lesion"))
    for name, values in made.truth.items():
        model, text, units = MAPS[name]
        orientation = ODF_KEYS if values.ndim > 3 else {}
        tree.image(TRUTH / names.output_path(entities, "dwimap", ".nii.gz", model=model, param=name,
                                        desc="truth"),
                   values, affine, keys(dwi, text, Units=units, **orientation))
    reference = TRUTH / names.output_path(entities, "dwi", ".nii.gz", desc="reference")
    tree.image(reference, made.reference, affine, keys(
        dwi, "What the reference site measures without noise, on this scan's grid, in this pose, "
             "with this table"), where.repetition_time)
    tree.gradients(reference, made.acquisition, affine)
    tree.json(TRUTH / names.output_path(entities, "truth", ".json"), {
        "Site": where.name, "Pose": made.pose, "PoseDescription":
            "4x4, from the person's coordinates to the scanner's (world RAS+, mm)",
        "SmallestJacobian": made.jacobian, "Age": who.age, "Sex": who.sex,
        "Offsets": someone.offset, "Scale": someone.scale,
        "Lesion": {"Centre": someone.lesion[0], "Radius": someone.lesion[1],
                   "Change": {"f": person.LESION_F, "d": person.LESION_D}}
        if someone.lesion else None})


def _stored(values: np.ndarray, options: PhantomOptions) -> np.ndarray:
    """Integers, as scanners store them, but where there is no noise to hide the rounding."""
    if not np.isfinite(options.snr):
        return values
    return np.clip(np.rint(values), 0, 32767).astype(np.int16)


AUTHORS = ["The QSphere developers", "The authors of the MNI152 average (Fonov et al. 2011)"]
SITE = {"Description": "Site (scanner)"}
MAPS = {
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

README = """# A multi-site diffusion MRI phantom

Simulated by `qsphere-phantom`: people who differ in anatomy, age and tissue, scanned at sites that
differ in what real sites differ in. No real person's data, but for the average brain (MNI152) that
all anatomies are deformed from.

- `sub-*/[ses-*/]`: T1w and DWI, as measured. `participants.tsv` (and `sub-*/sub-*_sessions.tsv`)
  say age, sex and site.
- `derivatives/masks`: brain masks. `derivatives/tissue`: tissue shares on the grid of the T1w.
- `sourcedata/truth`: what is true of each scan, on its own grid: the two-compartment model's d, f
  and ODF, noise-free FA and MD, tissue shares, lesions; `desc-reference_dwi`, what the reference
  site would have measured without noise; `desc-sites_truth.json`, every site's parameters;
  `*_truth.json`, pose and person.

FA and MD are of the mean diffusion tensor, the limit of b to 0. A tensor fitted at b = 1000 s/mm2
differs from it without any noise, because log S is not linear in b; compare such fits with the same
fit of `desc-reference_dwi`.
"""
