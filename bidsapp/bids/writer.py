"""The one writer of derivatives.

Files are first made in a staging folder on the same file system, then renamed into place, so a
killed process leaves whole files or none. What belongs together is a `Transaction`: its record
(`sub-01/log/NAME.json`) lists every file with its SHA-256 before the first rename, so that a later
run knows its own files from anyone else's, and refuses to overwrite the latter.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Dataset:
    """OUTPUT_DIR as a BIDS derivatives dataset; `claim` it before anything is written.

    root: OUTPUT_DIR. links: dataset name → folder, for `bids:NAME:…` URIs (raw, preprocessed, …).
    """

    def __init__(self, root: Path, links: Mapping[str, Path]) -> None:
        self.root = root.resolve()
        self.links = {name: path.absolute() for name, path in links.items()}

    def claim(self) -> None:
        """Make the folder, or make sure that it is ours; sweep up after processes that died.

        Raises:
            UsageError: it cannot be written, or holds something that is not QSphere's.
        """
        marker = self.root / "dataset_description.json"
        try:
            if self.root.is_dir() and not marker.exists() and not (self.root / STAGING).exists():
                strangers = sorted({p.name for p in self.root.iterdir()} - {"logs"})
                if strangers:
                    raise UsageError(
                        f"{self.root} is not empty (it holds {', '.join(strangers[:3])}…) and is "
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
        """`bids:NAME:relative/path` of a file in this dataset or one of the linked ones."""
        absolute = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow annex links
        for name, place in {"": self.root, **self.links}.items():
            for root in (place, place.resolve()):
                if absolute.is_relative_to(root):
                    return f"bids:{name}:{absolute.relative_to(root).as_posix()}"
        return absolute.resolve().as_uri()

    def lock(self, name: str) -> FileLock:
        """A lock between processes (and nodes) that share this OUTPUT_DIR."""
        return FileLock(self.root / LOCKS / f"{name}.lock")

    def record(self, path: PurePosixPath) -> dict[str, Any]:
        """The record of an earlier transaction, or {} where there is none that can be read."""
        try:
            record = json.loads((self.root / path).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_complete(self, record: Mapping[str, Any], fingerprint: str) -> bool:
        """Whether a transaction with this fingerprint was finished and its files are as it left
        them."""
        return (record.get("fingerprint") == fingerprint and record.get("state") == "complete"
                and all((self.root / name).is_file() and sha256(self.root / name) in hashes
                        for name, hashes in record.get("outputs", {}).items()))

    @contextlib.contextmanager
    def transaction(self, record_path: PurePosixPath, fingerprint: str = ""
                    ) -> Iterator[Transaction]:
        """Stage files, then put all in place at the end of the block; none after an exception.

        Raises:
            DataError: the disk is full; a file in the way is not ours (see `Transaction.commit`).
        """
        with self._staging() as folder:
            transaction = Transaction(self, folder, record_path, fingerprint)
            yield transaction
            transaction.commit()

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """An empty folder on the output's file system.

        Raises:
            DataError: the disk is full.
        """
        try:
            with scratch.folder(self.root / STAGING) as folder:
                yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(f"OUTPUT_DIR {self.root}: {os.strerror(error.errno).lower()}. Free "
                            "some space and run the same command again.") from error

    def mark(self, record_path: PurePosixPath, state: str, facts: Mapping[str, Any]) -> None:
        """Set the state of a record (`failed`, `incomplete`) and replace its facts.

        Files of an earlier transaction stay, and stay known.
        """
        outputs = self.record(record_path).get("outputs", {})
        self.write_text(str(record_path), to_json({"state": state, "outputs": outputs, **facts}))

    def discard(self, record_path: PurePosixPath) -> None:
        """Remove a record and those of its files that are as the transaction left them."""
        self._remove(self.record(record_path).get("outputs", {}))
        (self.root / record_path).unlink(missing_ok=True)

    def _remove(self, outputs: Mapping[str, Sequence[str]]) -> None:
        for name, hashes in outputs.items():
            if (self.root / name).is_file() and sha256(self.root / name) in hashes:
                (self.root / name).unlink()

    def write_text(self, name: str, text: str) -> None:
        """One of the dataset's own shared files, replaced atomically where it differs."""
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
        """dataset_description.json, README.md and .bidsignore, for derivatives of `name`.

        What someone has added to them stays.
        """
        container = os.environ.get("QSPHERE_CONTAINER")
        by = {"Name": "QSphere", "Version": __version__, "CodeURL": CODE_URL,
              **({"Container": {"Type": container}} if container else {})}
        with self.lock("description"):
            old = self.record(PurePosixPath("dataset_description.json"))
            links = {**old.get("DatasetLinks", {}),
                     **{n: self._link(p) for n, p in self.links.items()}}
            self.write_text("dataset_description.json", to_json({
                **old, "Name": f"QSphere derivatives of {name}", "BIDSVersion": "1.10.0",
                "DatasetType": "derivative", "GeneratedBy": [by],
                "Authors": old.get("Authors") or [
                    *(authors or [f"The authors of {name}"]), "The QSphere developers"],
                "SourceDatasets": [{"URL": link} for link in links.values()],
                "DatasetLinks": links, "HowToAcknowledge": how_to_acknowledge}))
            if not (self.root / "README.md").exists():
                self.write_text("README.md", README)
            ignored = self.root / ".bidsignore"
            there = ignored.read_text().splitlines() if ignored.exists() else []
            self.write_text(".bidsignore", "\n".join(dict.fromkeys([*there, *BIDSIGNORE])) + "\n")

    def participants(self, rows: Mapping[str, Mapping[str, Any]],
                     columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Merge rows (by label without sub-) into participants.tsv; describe the columns."""
        path = self.root / "participants.tsv"
        with self.lock("participants"):
            known: dict[str, dict[str, str]] = {}
            if path.exists():
                with path.open(newline="") as stream:
                    known = {r["participant_id"]: {k: v for k, v in r.items() if k}
                             for r in csv.DictReader(stream, delimiter="\t")
                             if r.get("participant_id")}
            for label, row in rows.items():
                known[f"sub-{label}"] = {"participant_id": f"sub-{label}",
                                         **{k: _cell(v) for k, v in row.items()}}
            self.write_text("participants.tsv", to_tsv([known[k] for k in sorted(known)]))
            carried = {c: {"Description": f"{c}, as in the input"}
                       for row in known.values() for c in row if c != "participant_id"}
            self.write_text("participants.json", to_json({
                "Description": "Participants: covariates and batch", **carried, **columns,
                **self.record(PurePosixPath("participants.json"))}))

    def _link(self, path: Path) -> str:
        """Relative where one dataset holds the other, so that both can be moved together."""
        if self.root.is_relative_to(path.resolve()):
            return os.path.relpath(path.resolve(), self.root)
        return path.resolve().as_uri()


def is_page(path: Path) -> bool:
    """Whether a file says that it is a page made by QSphere, as one does whose record was lost."""
    with path.open("rb") as stream:
        return b'<meta name="generator" content="QSphere ' in stream.read(500)


class Transaction:
    """Files that appear together. Made by `Dataset.transaction`; paths are relative to
    OUTPUT_DIR."""

    def __init__(self, dataset: Dataset, folder: Path, record_path: PurePosixPath,
                 fingerprint: str) -> None:
        self.dataset, self.folder, self.record_path = dataset, folder, record_path
        self.fingerprint = fingerprint
        self.facts: dict[str, Any] = {}
        self.staged: dict[PurePosixPath, Path] = {}

    def image(self, path: PurePosixPath, data: np.ndarray, like: Any,
              sidecar: Mapping[str, Any]) -> None:
        """A NIfTI image on the grid of `like`, and its sidecar JSON."""
        image = nib.Nifti1Image(data, like.affine)
        for kind in ("qform", "sform"):
            matrix, code = getattr(like, f"get_{kind}")(coded=True)
            if matrix is not None:
                getattr(image, f"set_{kind}")(matrix, int(code))
        image.header.set_xyzt_units("mm", "sec" if data.ndim > 3 else "unknown")
        nib.save(image, self._stage(path))
        self.text(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), to_json(sidecar))

    def text(self, path: PurePosixPath, text: str) -> None:
        self._stage(path).write_text(text)

    def bytes(self, path: PurePosixPath, content: bytes) -> None:
        self._stage(path).write_bytes(content)

    def table(self, path: PurePosixPath, rows: Iterable[Mapping[Any, Any]],
              columns: Mapping[str, Any]) -> None:
        """A TSV and the sidecar JSON that describes its columns."""
        self.text(path, to_tsv(rows))
        self.text(path.with_suffix(".json"), to_json(columns))

    def _stage(self, path: PurePosixPath) -> Path:
        if path in self.staged:
            raise ValueError(f"{path} is written twice")
        extension = path.name.partition(".")[2]
        self.staged[path] = staged = self.folder / f"{len(self.staged)}.{extension}"
        return staged

    def commit(self) -> None:
        """Put the files in place; remove those that the earlier transaction left and this one has
        not.

        Raises:
            DataError: a file in the way was not written by QSphere, or was changed since.
        """
        root = self.dataset.root
        known = self.dataset.record(self.record_path).get("outputs", {})
        new = {str(p): sha256(s) for p, s in self.staged.items()}
        for name in new:
            if ((root / name).exists() and sha256(root / name) not in (*known.get(name, ()),
                                                                       new[name])
                    and not (name not in known and is_page(root / name))):
                raise DataError(f"{root / name} exists and was not written by QSphere, or was "
                                "changed since. Move it away, or give another OUTPUT_DIR.")
        both = {n: [*known.get(n, ()), *([new[n]] if n in new else [])] for n in {**known, **new}}
        self._write_record("incomplete", both)
        for path, staged in self.staged.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(root / path)
        self.dataset._remove({name: known[name] for name in known.keys() - new.keys()})
        self._write_record("complete", {n: [h] for n, h in new.items()})

    def _write_record(self, state: str, outputs: Mapping[str, Any]) -> None:
        path = self.dataset.root / self.record_path
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.folder / ".record"
        staged.write_text(to_json({"state": state, "fingerprint": self.fingerprint,
                                   "outputs": outputs, **self.facts}))
        staged.replace(path)


def to_json(value: Any) -> str:
    def plain(v: Any) -> Any:
        if isinstance(v, np.ndarray | np.generic):
            return v.tolist()
        if isinstance(v, Mapping):
            return dict(v)
        return str(v)

    return json.dumps(value, indent=2, ensure_ascii=False, default=plain) + "\n"


def to_tsv(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Rows as BIDS TSV; the union of their keys in order of appearance, n/a where missing."""
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

- `sub-*/[ses-*/]dwi/*_model-*_param-*_dwimap.nii.gz`: maps; the JSON beside each says what it is,
  its units, and what it was made from. `_stat-std` is the uncertainty of the map of that name.
- `*_desc-harmonized_dwi.nii.gz`: the signal as the reference site would have measured it;
  `*_desc-harmonized_dwimap.nii.gz`: maps made from it, beside those of the measured signal.
- `*_desc-synth*_dwi.nii.gz`: synthetic signals, one voxel after another; `*_desc-synth*_truth.tsv`
  beside each holds what every voxel was made from, in the same order. `*_desc-synth_qc.tsv`: how
  well each mode stands for the participant.
- `*_desc-brain_mask.nii.gz`: where maps were computed. `*_desc-image_qc.tsv`: one row of quality
  measures and map statistics per run.
- `sub-*/log/`: what ran, with which options, and crash files where something failed.
- `logs/CITATION.md`: the methods text, with references.
"""
