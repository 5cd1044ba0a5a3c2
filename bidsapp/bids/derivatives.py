"""What a method makes of a run, as files: maps, synthetic signals and images with their truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from bidsapp.bids import btable, names, sidecar
from bidsapp.bids.writer import Batch
from bidsapp.dwi import Dwi, Run
from bidsapp.harmonize import Result
from bidsapp.methods import Derived, Method, Synthetic, SyntheticImage


@dataclass(frozen=True)
class Output:
    """Where the files of one run go (batch), and what their sidecars share.

    like: the run's image, whose grid they have. mask: the brain mask in the batch. desc: label of
    all maps made from a signal other than the measured one; sources: URIs of that signal; about:
    metadata added to each sidecar of such maps; no_intervals, widening: see `harmonize.Result`.
    """

    batch: Batch
    run: Run
    dwi: Dwi
    like: Any
    mask: PurePosixPath
    seed: int
    device: str
    desc: str = ""
    sources: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    no_intervals: str = ""
    widening: float = 1.0

    def write(self, method: Method, derived: Derived) -> None:
        """Everything in `derived`, each image with its sidecar."""
        for key, values in derived.maps.items():
            self._map(method, method.outputs["maps"][key], values, derived.parameters)
        if derived.synthetic is not None:
            for mode in derived.synthetic.signals:
                self._signals(method, mode, derived.synthetic)
            for mode, image in derived.synthetic.images.items():
                self._image(method, mode, image, derived.synthetic)
            self._scores(method, derived.synthetic)

    def harmonized(self, result: Result) -> Output:
        """Write the harmonized signal with its b-table. Returns where the maps made of it go."""
        method = result.model.method
        entry = dict(method.outputs["signal"])
        if not result.changed:
            entry["Description"] = ("Signal as measured, within the mask: the run is of the "
                                    "reference batch")
        out = replace(self, dwi=result.dwi, desc="harmonized", about=result.about,
                      no_intervals=result.no_intervals, widening=result.widening)
        about = out._about(method, entry, result.parameters)
        out._dwi(out.dwi.unmask(result.dwi.signal), out.desc, about)
        return replace(out, sources=(self._uri(self._path("dwi", desc=out.desc)),))

    def _map(self, method: Method, entry: Mapping[str, Any], values: np.ndarray,
             parameters: Mapping[str, Any], **more: Any) -> PurePosixPath:
        model = method.outputs["model"]
        own = {"desc": self.desc} if self.desc else {}
        path = self._path("dwimap", model=model["name"],
                          **{**entry["entities"], **own, **more.pop("entities", {})})
        self.batch.image(path, self.dwi.unmask(values), self.like,
                         {**self._about(method, entry, parameters), **more})
        return path

    def _signals(self, method: Method, mode: str, made: Synthetic) -> None:
        """An image of voxels × 1 × 1 × volumes and a table of the truth.

        The affine is the run's, so that the .bvec is too; positions mean nothing.
        """
        desc = f"synth{mode.replace('-', '')}"
        truth = names.output(self.run.entities, "truth", ".tsv", desc=desc)
        about = self._about(method, method.outputs["signal"], {"Mode": mode, **made.parameters})
        self._dwi(made.signals[mode][:, None, None], desc,
                  self._synthetic({k: v for k, v in about.items() if k not in sidecar.SPATIAL},
                                  self._uri(truth)))
        self.batch.table(truth, made.truth[mode].to_dict("records"), made.columns[mode])

    def _image(self, method: Method, mode: str, image: SyntheticImage, made: Synthetic) -> None:
        """An image on the run's grid, and maps of the truth."""
        desc = f"synth{mode.replace('-', '')}image"
        parameters = {"Mode": mode, **made.parameters, **image.parameters}
        truth = [self._map(method, method.outputs["truth"][key], values, parameters,
                           entities={"desc": desc}, Volumes=list(image.volumes[key]))
                 for key, values in image.truth.items()]
        self._dwi(self.dwi.unmask(image.signal), desc,
                  self._synthetic(self._about(method, method.outputs["image"], parameters),
                                  [self._uri(path) for path in truth]))

    def _scores(self, method: Method, made: Synthetic) -> None:
        outputs = method.outputs
        self.batch.table(names.output(self.run.entities, "qc", ".tsv", desc="synth"),
                         [{"mode": mode, **values} for mode, values in made.scores.items()],
                         {"mode": {"Description": outputs["mode"]}, **outputs["scores"]})

    def _synthetic(self, about: Mapping[str, Any], truth: Any) -> dict[str, Any]:
        """Keys that mark all volumes as computed, and say where their truth is."""
        return {**about, "SynthesizedVolumes": list(range(len(self.dwi.acquisition))),
                "Truth": truth}

    def _dwi(self, data: np.ndarray, desc: str, about: Mapping[str, Any]) -> None:
        """Volumes in the run's b-table."""
        acquisition, affine = self.dwi.acquisition, self.like.affine
        self.batch.image(self._path("dwi", desc=desc), data, self.like, about)
        tables = {".bval": btable.text(acquisition.bvals[None]),
                  ".bvec": btable.text(btable.to_fsl(acquisition, affine))}
        if (acquisition.b_delta < 1).any():
            tables[".btens"] = btable.btens_text(acquisition, affine)
        for extension, text in tables.items():
            self.batch.text(names.output(self.run.entities, "dwi", extension, desc=desc), text)

    def _about(self, method: Method, entry: Mapping[str, Any], parameters: Mapping[str, Any]
               ) -> dict[str, Any]:
        anatomy = self.run.anatomy if method.wants_tissue and self.dwi.tissue is not None else ()
        return {**sidecar.derived(
            self.run, self.batch.dataset, model=method.outputs["model"], output=entry,
            parameters=parameters, more_sources=[*self.sources, self._uri(self.mask), *map(
                self.batch.dataset.uri, anatomy)], seed=self.seed, device=self.device),
            **self.about}

    def _path(self, suffix: str, **entities: str) -> PurePosixPath:
        return names.output(self.run.entities, suffix, ".nii.gz", **entities)

    def _uri(self, path: PurePosixPath) -> str:
        return self.batch.dataset.uri(self.batch.dataset.root / path)
