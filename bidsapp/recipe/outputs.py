"""Write the results of steps as files with sidecars: signals, maps, synthetic data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from bidsapp.acquisition import Acquisition
from bidsapp.bids import btable, names, sidecar
from bidsapp.bids.writer import Transaction
from bidsapp.dwi import Run
from bidsapp.kinds import Derived, Method, Synthetic, SyntheticImage
from bidsapp.stage import Stage


@dataclass(frozen=True)
class Outputs:
    """Writer of what is computed from one signal.

    Parameters
    ----------
    transaction : Transaction
        Receives the files.
    run : Run
    stage : Stage
        The signal from which everything is computed.
    like : nibabel image
        Image of the run, on whose grid all images are written.
    mask : PurePosixPath
        Brain mask, below OUTPUT_DIR.
    seed : int
    device : str
        For the sidecars.
    """

    transaction: Transaction
    run: Run
    stage: Stage
    like: Any
    mask: PurePosixPath
    seed: int
    device: str

    def write(self, method: Method, derived: Derived) -> None:
        """Write the maps and synthetic data of a method, each image with its sidecar."""
        for key, values in derived.maps.items():
            self._map(method, method.outputs["maps"][key], values, derived.parameters)
        if derived.synthetic is not None:
            for mode in derived.synthetic.signals:
                self._signals(method, mode, derived.synthetic)
            for mode, image in derived.synthetic.images.items():
                self._image(method, mode, image, derived.synthetic)
            self._scores(method, derived.synthetic)

    def write_signal(self, method: Method, entry: Mapping[str, Any],
                     parameters: Mapping[str, Any]) -> Stage:
        """Write the signal of the stage with its gradient table.

        Parameters
        ----------
        method : Method
            The method that made the signal.
        entry : mapping
            Description and units of the signal, from the method's outputs.json.
        parameters : mapping
            Model.Parameters of the sidecar.

        Returns
        -------
        Stage
            The same signal, with the written image as its source.
        """
        dwi = self.stage.dwi
        about = self._about(method, entry, parameters)
        self._dwi(dwi.unmask(dwi.signal), self.stage.desc, about)
        return replace(self.stage, sources=(self._uri(self._path("dwi", desc=self.stage.desc)),))

    def write_sd(self, method: Method, sd: np.ndarray, volumes: Sequence[int],
                 parameters: Mapping[str, Any]) -> None:
        """Write the SD of predicted volumes.

        sd: (voxel, m) float32. volumes: which volumes of the signal they belong to.
        """
        image = self._path("dwi", desc=self.stage.desc).name
        about = {k: v for k, v in self.stage.about.items() if k != "SynthesizedVolumes"}
        replace(self, stage=replace(self.stage, about=about))._map(
            method, {"entities": {"stat": "std"}, "Description": "SD of the error of the "
                     "predicted volumes, without the noise of a measurement. `Volumes` are the "
                     f"indices of these volumes in {image}, from 0",
                     "Units": method.outputs["signal"]["Units"]}, sd, parameters,
            Volumes=list(volumes))

    def _map(self, method: Method, entry: Mapping[str, Any], values: np.ndarray,
             parameters: Mapping[str, Any], **more: Any) -> PurePosixPath:
        suffix, entities = method.name_map(entry)
        if suffix == "dseg":
            values = values.astype(np.uint8)
        own = {"desc": self.stage.desc} if self.stage.desc else {}
        path = self._path(suffix, **{**entities, **own, **more.pop("entities", {})})
        self.transaction.image(path, self.stage.dwi.unmask(values), self.like,
                         {**self._about(method, entry, parameters), **more})
        return path

    def _signals(self, method: Method, mode: str, made: Synthetic) -> None:
        """Write synthetic signals as voxels × 1 × 1 × volumes, and a table of their ground truth.

        Positions have no meaning. The affine is that of the run, since b-vectors in a .bvec are
        relative to the axes of the image.
        """
        desc = f"synth{mode.replace('-', '')}"
        truth = names.output_path(self.run.entities, "truth", ".tsv", desc=desc)
        about = self._about(method, method.outputs["signal"], {"Mode": mode, **made.parameters})
        self._dwi(made.signals[mode][:, None, None], desc,
                  self._synthetic({k: v for k, v in about.items() if k not in sidecar.SPATIAL},
                                  self._uri(truth)))
        self.transaction.table(truth, made.truth[mode].to_dict("records"), made.columns[mode])

    def _image(self, method: Method, mode: str, image: SyntheticImage, made: Synthetic) -> None:
        """Write a synthetic image on the grid of the run, and maps of its ground truth."""
        desc = f"synth{mode.replace('-', '')}image"
        parameters = {"Mode": mode, **made.parameters, **image.parameters}
        truth = [self._map(method, method.outputs["truth"][key], values, parameters,
                           entities={"desc": desc}, Volumes=list(image.volumes[key]))
                 for key, values in image.truth.items()]
        self._dwi(self.stage.dwi.unmask(image.signal), desc,
                  self._synthetic(self._about(method, method.outputs["image"], parameters),
                                  [self._uri(path) for path in truth]))

    def _scores(self, method: Method, made: Synthetic) -> None:
        outputs = method.outputs
        self.transaction.table(names.output_path(self.run.entities, "qc", ".tsv", desc="synth"),
                         [{"mode": mode, **values} for mode, values in made.scores.items()],
                         {"mode": {"Description": outputs["mode"]}, **outputs["scores"]})

    def _synthetic(self, about: Mapping[str, Any], truth: Any) -> dict[str, Any]:
        """Add the sidecar keys that mark all volumes as synthetic and name their ground truth."""
        return {**about, "SynthesizedVolumes": list(range(len(self.stage.dwi.acquisition))),
                "Truth": truth}

    def _dwi(self, data: np.ndarray, desc: str, about: Mapping[str, Any]) -> None:
        """Write volumes with the gradient table of the stage."""
        path = self._path("dwi", desc=desc)
        self.transaction.image(path, data, self.like, about)
        write_tables(self.transaction, path, self.stage.dwi.acquisition, self.like.affine)

    def _about(self, method: Method, entry: Mapping[str, Any], parameters: Mapping[str, Any]
               ) -> dict[str, Any]:
        anatomy = self.run.anatomy if self.stage.dwi.tissue is not None else ()
        return {**sidecar.derived(
            self.run, self.transaction.dataset, model=method.outputs["model"], output=entry,
            parameters=parameters, more_sources=[*self.stage.sources, self._uri(self.mask), *map(
                self.transaction.dataset.uri, anatomy)], seed=self.seed, device=self.device),
            **self.stage.about}

    def _path(self, suffix: str, **entities: str) -> PurePosixPath:
        return names.output_path(self.run.entities, suffix, ".nii.gz", **entities)

    def _uri(self, path: PurePosixPath) -> str:
        return self.transaction.dataset.uri(self.transaction.dataset.root / path)


def write_tables(transaction: Transaction, image: PurePosixPath, acquisition: Acquisition,
                 affine: np.ndarray) -> None:
    """Write the gradient table of an image beside it: .bval, .bvec, and .btens unless all b-tensors
    are linear.

    Parameters
    ----------
    transaction : Transaction
        Receives the files.
    image : PurePosixPath
        The image, below OUTPUT_DIR.
    acquisition : Acquisition
        Its measurements.
    affine : (4, 4)
        Its affine.
    """
    tables = {".bval": btable.text(acquisition.bvals[None]),
              ".bvec": btable.text(btable.to_fsl(acquisition, affine))}
    if (acquisition.b_delta < 1).any():
        tables[".btens"] = btable.btens_text(acquisition, affine)
    for extension, text in tables.items():
        transaction.text(image.with_name(image.name.removesuffix(".nii.gz") + extension), text)
