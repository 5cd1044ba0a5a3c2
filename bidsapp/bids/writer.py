"""Write BIDS derivatives to OUTPUT_DIR; no other module writes them.

Files are written in a staging folder on the same file system and then renamed into place, so that a
killed process leaves complete files only. Files that belong together are a `Transaction`. Its
record (`sub-01/log/NAME.json`) holds its state and, as `outputs`, each file with its SHA-256 or,
until the transaction is complete, with that of the earlier file and that of the new one. It is
written before the first rename, so that a later transaction can tell its earlier files from those
of others, which it does not overwrite.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from filelock import FileLock

from bidsapp import __version__, scratch
from bidsapp.bids.names import BIDSIGNORE
from bidsapp.errors import DataError, UsageError

log = logging.getLogger(__name__)
CODE_URL = "https://github.com/qsphere/qsphere"
STAGING, LOCKS = "logs/.staging", "logs/.locks"
"""Folders of staged files and of locks, below OUTPUT_DIR."""


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Dataset:
    """OUTPUT_DIR as a BIDS derivatives dataset. `claim` must be called before anything is written.

    Parameters
    ----------
    root : Path
        OUTPUT_DIR.
    links : mapping
        Folders of other datasets (raw, preprocessed, …) by the name in `bids:NAME:…` URIs.
    """

    def __init__(self, root: Path, links: Mapping[str, Path]) -> None:
        self.root = root.resolve()
        self.links = {name: path.absolute() for name, path in links.items()}

    def claim(self) -> None:
        """Make the folder, or check that it is a QSphere dataset; sweep its staging folder.

        Only what killed processes staged is removed.

        Raises
        ------
        UsageError
            The folder cannot be written, or holds files of another program.
        """
        marker = self.root / "dataset_description.json"
        try:
            if self.root.is_dir() and not marker.exists() and not (self.root / STAGING).exists():
                others = sorted({p.name for p in self.root.iterdir()} - {"logs"})
                if others:
                    raise UsageError(
                        f"{self.root} is not empty (it holds {', '.join(others[:3])}…) and is "
                        "not a QSphere dataset. Give an empty or new OUTPUT_DIR.")
            if marker.exists() and '"QSphere"' not in marker.read_text(errors="replace"):
                raise UsageError(f"{self.root} holds the dataset of another program (see "
                                 "dataset_description.json). Give another OUTPUT_DIR.")
            for folder in (STAGING, LOCKS):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            probe = self.root / STAGING / f"probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(f"OUTPUT_DIR {self.root} cannot be written ({error.strerror}). Give a "
                             "folder that you may write to and that has free space.") from error
        scratch.sweep(self.root / STAGING)

    def uri(self, path: Path) -> str:
        """Make the URI `bids:NAME:relative/path` of a file in a linked dataset.

        NAME is empty for a file in this dataset. Files elsewhere get a file:// URI.
        """
        absolute = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow annex links
        for name, place in {"": self.root, **self.links}.items():
            for root in (place, place.resolve()):
                if absolute.is_relative_to(root):
                    return f"bids:{name}:{absolute.relative_to(root).as_posix()}"
        return absolute.resolve().as_uri()

    def lock(self, name: str) -> FileLock:
        """Make a lock between the processes and nodes that share this OUTPUT_DIR."""
        return FileLock(self.root / LOCKS / f"{name}.lock")

    def record(self, path: PurePosixPath) -> dict[str, Any]:
        """Read the record of an earlier transaction; {} if there is none that can be read."""
        try:
            record = json.loads((self.root / path).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_complete(self, record: Mapping[str, Any], fingerprint: str) -> bool:
        """Tell whether a record is of a complete transaction whose files are unchanged.

        Parameters
        ----------
        record : mapping
            Record of the transaction.
        fingerprint : str
            Fingerprint that the record must have.
        """
        return (record.get("fingerprint") == fingerprint and record.get("state") == "complete"
                and all((self.root / name).is_file() and sha256(self.root / name) in hashes
                        for name, hashes in record.get("outputs", {}).items()))

    @contextlib.contextmanager
    def transaction(self, record_path: PurePosixPath, fingerprint: str = ""
                    ) -> Iterator[Transaction]:
        """Stage files in the block, and put them in place at its end unless there is an exception.

        Parameters
        ----------
        record_path : PurePosixPath
            Path of its record below OUTPUT_DIR. Files that an earlier record at this path lists are
            replaced or removed.
        fingerprint : str
            Hash of everything that the files depend on.

        Yields
        ------
        Transaction

        Raises
        ------
        DataError
            The disk is full, or a file of another program is in the way (`Transaction.commit`).
        """
        with self._staging() as folder:
            transaction = Transaction(self, folder, record_path, fingerprint)
            yield transaction
            transaction.commit()

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """Make an empty folder on the file system of the output; a full disk is a DataError."""
        try:
            with scratch.folder(self.root / STAGING) as folder:
                yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(f"OUTPUT_DIR {self.root}: {os.strerror(error.errno).lower()}. Free "
                            "some space and run the same command again.") from error

    def mark(self, record_path: PurePosixPath, state: str, facts: Mapping[str, Any]) -> None:
        """Replace a record by a state (`failed` or `incomplete`) and facts, without a fingerprint.

        The files of the earlier transaction are kept, and remain in the record.
        """
        outputs = self.record(record_path).get("outputs", {})
        self.write_text(str(record_path), to_json({"state": state, "outputs": outputs, **facts}))

    def discard(self, record_path: PurePosixPath) -> None:
        """Remove a record, and the files that it lists unless they were changed since."""
        self._remove(self.record(record_path).get("outputs", {}))
        (self.root / record_path).unlink(missing_ok=True)

    def _remove(self, outputs: Mapping[str, Sequence[str]]) -> None:
        for name, hashes in outputs.items():
            if (self.root / name).is_file() and sha256(self.root / name) in hashes:
                (self.root / name).unlink()

    def write_text(self, name: str, text: str) -> None:
        """Write a file that belongs to no transaction, atomically, if its content differs."""
        path = self.root / name
        with self.lock("dataset"):
            with contextlib.suppress(OSError):
                if path.read_text() == text:
                    return
            with self._staging() as folder:
                (folder / path.name).write_text(text)
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / path.name).replace(path)

    def describe(self, name: str, authors: Sequence[str], how_to_acknowledge: str) -> None:
        """Write dataset_description.json, README.md and .bidsignore.

        An existing README.md is kept, and so are Authors, links, other keys and patterns that were
        added by others.

        Parameters
        ----------
        name : str
            Name of the input dataset.
        authors : sequence of str
            Authors of the input dataset.
        how_to_acknowledge : str
            Text of HowToAcknowledge.
        """
        container = os.environ.get("QSPHERE_CONTAINER")
        generator = {"Name": "QSphere", "Version": __version__, "CodeURL": CODE_URL,
                     **({"Container": {"Type": container}} if container else {})}
        with self.lock("description"):
            old = self.record(PurePosixPath("dataset_description.json"))
            links = {**old.get("DatasetLinks", {}),
                     **{n: self._link(p) for n, p in self.links.items()}}
            self.write_text("dataset_description.json", to_json({
                **old, "Name": f"QSphere derivatives of {name}", "BIDSVersion": "1.10.0",
                "DatasetType": "derivative", "GeneratedBy": [generator],
                "Authors": old.get("Authors") or [
                    *(authors or [f"The authors of {name}"]), "The QSphere developers"],
                "SourceDatasets": [{"URL": link} for link in links.values()],
                "DatasetLinks": links, "HowToAcknowledge": how_to_acknowledge}))
            if not (self.root / "README.md").exists():
                self.write_text("README.md", README)
            ignored = self.root / ".bidsignore"
            old_lines = ignored.read_text().splitlines() if ignored.exists() else []
            lines = dict.fromkeys([*old_lines, *BIDSIGNORE])
            self.write_text(".bidsignore", "\n".join(lines) + "\n")

    def participants(self, rows: Mapping[str, Mapping[str, Any]],
                     columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Add or replace rows of participants.tsv, and describe its columns.

        Parameters
        ----------
        rows : mapping
            Cells by column, by label without sub-.
        columns : mapping
            Descriptions of columns; those that are in participants.json already are kept.
        """
        path = self.root / "participants.tsv"
        with self.lock("participants"):
            merged: dict[str, dict[str, str]] = {}
            if path.exists():
                with path.open(newline="") as stream:
                    merged = {r["participant_id"]: {k: v for k, v in r.items() if k}
                              for r in csv.DictReader(stream, delimiter="\t")
                              if r.get("participant_id")}
            for label, row in rows.items():
                merged[f"sub-{label}"] = {"participant_id": f"sub-{label}",
                                          **{k: _cell(v) for k, v in row.items()}}
            self.write_text("participants.tsv", to_tsv([merged[k] for k in sorted(merged)]))
            default = {c: {"Description": f"{c}, as in the input"}
                       for row in merged.values() for c in row if c != "participant_id"}
            self.write_text("participants.json", to_json({
                "Description": "Participants: covariates and batch", **default, **columns,
                **self.record(PurePosixPath("participants.json"))}))

    def _link(self, path: Path) -> str:
        """Link to a dataset, relative if it holds this one, so that both can be moved together."""
        if self.root.is_relative_to(path.resolve()):
            return os.path.relpath(path.resolve(), self.root)
        return path.resolve().as_uri()


def is_page(path: Path) -> bool:
    """Tell whether a file is a report page of QSphere, by its HTML and not by a record."""
    with path.open("rb") as stream:
        return b'<meta name="generator" content="QSphere ' in stream.read(500)


class Transaction:
    """Files that are put in place together, made by `Dataset.transaction`.

    Paths are below OUTPUT_DIR. `facts` is what the record holds besides its state, fingerprint and
    outputs; `staged` is where each file is before `commit`.
    """

    def __init__(self, dataset: Dataset, folder: Path, record_path: PurePosixPath,
                 fingerprint: str) -> None:
        self.dataset, self.folder, self.record_path = dataset, folder, record_path
        self.fingerprint = fingerprint
        self.facts: dict[str, Any] = {}
        self.staged: dict[PurePosixPath, Path] = {}

    def image(self, path: PurePosixPath, data: np.ndarray, like: Any,
              sidecar: Mapping[str, Any]) -> None:
        """Stage a NIfTI image on the grid of the image `like`, and its sidecar."""
        image = nib.Nifti1Image(data, like.affine)
        for form in ("qform", "sform"):
            matrix, code = getattr(like, f"get_{form}")(coded=True)
            if matrix is not None:
                getattr(image, f"set_{form}")(matrix, int(code))
        image.header.set_xyzt_units("mm", "sec" if data.ndim > 3 else "unknown")
        nib.save(image, self._stage(path))
        self.text(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), to_json(sidecar))

    def text(self, path: PurePosixPath, text: str) -> None:
        """Stage a text file."""
        self._stage(path).write_text(text)

    def bytes(self, path: PurePosixPath, content: bytes) -> None:
        """Stage a binary file."""
        self._stage(path).write_bytes(content)

    def table(self, path: PurePosixPath, rows: Iterable[Mapping[Any, Any]],
              columns: Mapping[str, Any]) -> None:
        """Stage a TSV, and the JSON that describes its columns."""
        self.text(path, to_tsv(rows))
        self.text(path.with_suffix(".json"), to_json(columns))

    def _stage(self, path: PurePosixPath) -> Path:
        if path in self.staged:
            raise ValueError(f"{path} is written twice")
        extension = path.name.partition(".")[2]
        self.staged[path] = staged = self.folder / f"{len(self.staged)}.{extension}"
        return staged

    def commit(self) -> None:
        """Put the files in place, and remove those that only the earlier record lists.

        A file that another record in the same folder lists is taken over, and that record becomes
        incomplete, so that its step is done again. Pages of QSphere are overwritten even if no
        record lists them.

        Raises
        ------
        DataError
            A file in the way was not written by QSphere, or was changed since.
        """
        root = self.dataset.root
        old = self.dataset.record(self.record_path).get("outputs", {})
        new = {str(p): sha256(s) for p, s in self.staged.items()}
        taken = {name for name in new if name not in old and (root / name).exists()}
        others = self._records_of(taken) if taken else {}
        for name in new:
            if name in taken and any(sha256(root / name) in r["outputs"].get(name, ())
                                     for r in others.values()):
                continue
            if ((root / name).exists() and sha256(root / name) not in (*old.get(name, ()),
                                                                       new[name])
                    and not (name not in old and is_page(root / name))):
                raise DataError(f"{root / name} exists and was not written by QSphere, or was "
                                "changed since. Move it away, or give another OUTPUT_DIR.")
        listed = {n: [*old.get(n, ()), *(h for r in others.values() if n in taken
                                         for h in r["outputs"].get(n, ()))]
                  for n in {**old, **new}}
        both = {n: [*h, *([new[n]] if n in new else [])] for n, h in listed.items()}
        self._write_record("incomplete", both)  # at any time some record lists each file
        for path, record in others.items():
            self.dataset.write_text(str(path), to_json({
                **record, "state": "incomplete",
                "outputs": {n: h for n, h in record["outputs"].items() if n not in taken}}))
        for path, staged in self.staged.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(root / path)
        self.dataset._remove({name: old[name] for name in old.keys() - new.keys()})
        self._write_record("complete", {n: [h] for n, h in new.items()})

    def _records_of(self, files: Collection[str]) -> dict[PurePosixPath, dict[str, Any]]:
        """Find the other records in the folder of this one that list some of these files."""
        folder = self.record_path.parent
        paths = [folder / p.name for p in sorted((self.dataset.root / folder).glob("*.json"))]
        records = {p: self.dataset.record(p) for p in paths if p != self.record_path}
        return {p: r for p, r in records.items() if set(files) & set(r.get("outputs", ()))}

    def _write_record(self, state: str, outputs: Mapping[str, Any]) -> None:
        path = self.dataset.root / self.record_path
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.folder / ".record"
        staged.write_text(to_json({"state": state, "fingerprint": self.fingerprint,
                                   "outputs": outputs, **self.facts}))
        staged.replace(path)


def to_json(value: Any) -> str:
    """Format a value as JSON."""
    def plain(v: Any) -> Any:
        if isinstance(v, np.ndarray | np.generic):
            return v.tolist()
        if isinstance(v, Mapping):
            return dict(v)
        return str(v)

    return json.dumps(value, indent=2, ensure_ascii=False, default=plain) + "\n"


def to_tsv(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Format rows as a BIDS TSV.

    Its columns are all keys of the rows in order of appearance; missing cells are n/a.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    out = io.StringIO()
    table = csv.writer(out, delimiter="\t", lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row.get(c)) for c in columns] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


README = """# QSphere derivatives

Diffusion MRI derivatives in BIDS, made by QSphere. Open `sub-*.html` (and `group.html`) first.

- `*_desc-preproc_dwi.nii.gz`: the corrected series; `*_desc-confounds_timeseries.tsv`: its motion
  and eddy currents; `fmap/*_fieldmap.nii.gz`: the susceptibility field, Hz.
- `*_desc-upsampled_dwi.nii.gz`, `*_desc-denoised_dwi.nii.gz`: with more directions, less noise.
- `sub-*/[ses-*/]dwi/*_model-*_param-*_dwimap.nii.gz`: maps; the JSON beside each says what it is,
  its units, and what it was made from. `_stat-std` is the uncertainty of the map of that name.
- `sub-*/[ses-*/]dwi/*_dseg.nii.gz`: tissues by the labels of BIDS (1 grey matter, 2 white matter,
  3 CSF); `*_label-*_probseg.nii.gz`: the probability of each.
- `*_desc-harmonized_dwi.nii.gz`: the signal as the reference site would have measured it;
  `*_desc-harmonized_dwimap.nii.gz`: maps made from it, beside those of the measured signal.
- `*_space-*_{dwimap,dseg,probseg}.nii.gz`: maps on the grid of the T1w image or of a template, by
  one interpolation; `*_xfm.*`: the transform.
- `*_desc-synth*_dwi.nii.gz`: synthetic signals, one voxel after another; `*_desc-synth*_truth.tsv`
  beside each holds what every voxel was made from, in the same order. `*_desc-synth_qc.tsv`: how
  well each mode stands for the participant.
- `*_desc-brain_mask.nii.gz`: where maps were computed. `*_desc-image_qc.tsv`: one row of quality
  measures and map statistics per run.
- `sub-*/log/`: what ran, with which options, and crash files where something failed.
- `logs/CITATION.md`: the methods text, with references.
"""
