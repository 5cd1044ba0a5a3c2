"""The methods text and its references, read from outputs.json and README.md of the methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bidsapp import __version__
from bidsapp.kinds import Method
from bidsapp.preprocess.gibbs import PARTIAL

DOI = re.compile(r"\b(?:doi:\s*|https?://(?:dx\.)?doi\.org/)"
                 r"(10\.\d{4,9}/(?:[^\s;,()\[\]{}<>\"]|\([^\s()]*\))+)", re.I)

REFERENCES = {
    "10.1038/sdata.2016.44": "Gorgolewski et al. 2016, the brain imaging data structure",
    "10.1371/journal.pcbi.1005209": "Gorgolewski et al. 2017, BIDS Apps",
    "10.21105/joss.01294": "Yarkoni et al. 2019, PyBIDS",
    "10.3389/fninf.2014.00008": "Garyfallidis et al. 2014, DIPY",
    "10.1109/TSMC.1979.4310076": "Otsu 1979, threshold selection",
    "10.7717/peerj.453": "van der Walt et al. 2014, scikit-image",
    "10.1002/mrm.21277": "Descoteaux et al. 2007, spherical harmonics of the diffusion signal",
    "10.1016/j.neuroimage.2019.116131": "Yeh et al. 2019, neighbouring DWI correlation",
}
"""References by DOI that hold for every run. Methods bring their own."""

CITED = {
    "10.1016/j.mri.2019.05.008": "Schilling et al. 2019, synthesized b0 for distortion correction",
    "10.1038/s41592-022-01681-2": "Ciric et al. 2022, TemplateFlow",
    "10.1016/S0031-3203(98)00091-0": "Studholme et al. 1999, normalised mutual information",
    "10.1016/j.media.2007.06.004": "Avants et al. 2008, SyN",
    "10.1109/42.963816": "Alexander et al. 2001, reorientation by finite strain",
    "10.1109/TIT.2017.2653801": "Gavish & Donoho 2017, optimal shrinkage of singular values",
    "10.1002/mrm.1910340618": "Gudbjartsson & Patz 1995, Rician noise",
    "10.1016/j.jmr.2006.01.016": "Koay & Basser 2006, correction of magnitudes",
    "10.1016/j.neuroimage.2016.08.016": "Veraart et al. 2016, denoising by MP-PCA",
    "10.48550/arXiv.2011.01355": "Fadnavis et al. 2020, Patch2Self",
    "10.1002/mrm.26054": "Kellner et al. 2016, Gibbs ringing",
    "10.1002/mrm.1910340111": "Jezzard & Balaban 1995, distortion by field variations",
    "10.1088/0031-9155/57/18/5715": "Ruthotto et al. 2012, diffeomorphic susceptibility correction",
    "10.3389/fnins.2024.1406821": "Julian & Ruthotto 2024, PyHySCO",
    "10.1117/12.611415": "Abdul-Rahman et al. 2005, three-dimensional phase unwrapping",
    "10.1016/j.neuroimage.2015.07.067": "Andersson & Sotiropoulos 2015, Gaussian processes of the "
                                        "diffusion signal",
    "10.1016/j.neuroimage.2015.10.019": "Andersson & Sotiropoulos 2016, correction of "
                                        "off-resonance and movement",
    "10.1016/j.neuroimage.2016.06.058": "Andersson et al. 2016, detection and replacement of "
                                        "outliers",
    "10.1016/j.neuroimage.2011.10.018": "Power et al. 2012, framewise displacement",
    "10.1109/TMI.2010.2046908": "Tustison et al. 2010, N4",
    "10.1016/j.compbiomed.2024.108845": "Fisch et al. 2024, deepbet",
    "10.1016/j.neuroimage.2015.07.074": "Eichner et al. 2015, real-valued diffusion MRI",
}
"""DOI → what it is, of what some paragraphs cite beside the methods."""

_MOTION = (
    "fitted by Gauss–Newton to a prediction from the other volumes by a Gaussian process over "
    "b-tensors (doi:10.1016/j.neuroimage.2015.07.067). Slices with signal dropout were replaced by "
    "that prediction (after doi:10.1016/j.neuroimage.2016.06.058) and are listed. The "
    "susceptibility field, where it was corrected, moved with the head, and b-vectors were rotated "
    "with it. Framewise displacement is that of Power et al. "
    "(doi:10.1016/j.neuroimage.2011.10.018), at the centre of the brain.")

_PCA = (
    "Noise was removed by local principal component analysis: in patches of voxels, the mean "
    "of each volume was removed, and the singular values of the matrix of voxels by volumes "
    "were shrunk optimally in operator norm (doi:10.1109/TIT.2017.2653801), with the "
    "noise level estimated from the same patch; each voxel is the weighted mean of all patches "
    "that hold it.")

_GIBBS = ("Gibbs ringing was removed by local sub-voxel shifts (doi:10.1002/mrm.26054) in the "
          "planes of the slices")

_EDDY = (
    "Head motion and eddy currents were corrected together. Each volume has six parameters of "
    "rigid movement and a field that is a {} polynomial of the position in the scanner "
    "(doi:10.1016/j.neuroimage.2015.10.019){}; both were " + _MOTION)

CORRECTIONS = {
    "complex": (
        "Magnitude and phase were combined to complex images. The phase of each slice of each "
        "volume, one shot, was estimated from the low-pass filtered image and removed, and the "
        "real part was kept (after Eichner et al. 2015, doi:10.1016/j.neuroimage.2015.07.074): "
        "its noise is Gaussian, without a noise floor."),
    "denoise": _PCA + (
        " From magnitude images the noise floor (doi:10.1002/mrm.1910340618) was removed too, and "
        "their noise level was corrected (doi:10.1016/j.jmr.2006.01.016)."),
    "denoise_magnitude": _PCA + (
        " The noise floor of the magnitudes (doi:10.1002/mrm.1910340618) was removed too, and "
        "their noise level was corrected (doi:10.1016/j.jmr.2006.01.016)."),
    "denoise_gaussian": _PCA,
    "mppca": (
        "Noise was removed by principal component analysis with thresholds from the "
        "Marchenko–Pastur law (MP-PCA, doi:10.1016/j.neuroimage.2016.08.016) as implemented in "
        "DIPY (doi:10.3389/fninf.2014.00008)."),
    "patch2self": (
        "Noise was removed by Patch2Self (doi:10.48550/arXiv.2011.01355), which predicts each "
        "volume from all others, as implemented in DIPY (doi:10.3389/fninf.2014.00008)."),
    "gibbs": _GIBBS + (
        "; along the phase encoding only if the sidecar does not say that less than "
        f"{PARTIAL:.0%} of k-space were sampled."),
    "gibbs_both": _GIBBS + ", along both axes.",
    "gibbs_across": _GIBBS + ", along the axis that is not phase-encoded.",
    "pair": (
        "The susceptibility field was estimated from b = 0 images of opposite phase encoding: "
        "the displacement along the phase encoding that makes the two equal after correction, "
        "their intensity included, with a penalty on its gradient and a barrier against folding, "
        "by Gauss–Newton from coarse to fine (after doi:10.1088/0031-9155/57/18/5715 and "
        "doi:10.3389/fnins.2024.1406821). The rigid movement between the two was estimated "
        "together with it."),
    "gre": (
        "The susceptibility field was measured with a gradient-echo field map "
        "(doi:10.1002/mrm.1910340111): its phase was unwrapped (doi:10.1117/12.611415, as "
        "implemented in scikit-image, doi:10.7717/peerj.453), divided by 2π times the difference "
        "of the echo times, and registered to the b = 0 image."),
    "t1w": (
        "No field was measured. An undistorted b = 0 image was predicted from the T1-weighted "
        "image, and took the place of one of opposite phase encoding (after Schilling et al. 2019, "
        "doi:10.1016/j.mri.2019.05.008); this is less exact than a measured field."),
    "motion": _EDDY.format(
        "quadratic", ", a linear one if there are fewer than 12 weighted volumes"),
    "motion_quadratic": _EDDY.format("quadratic", ""),
    "motion_linear": _EDDY.format("linear", ""),
    "rigid": (
        "Head motion was corrected; eddy currents were not. Each volume has six parameters of "
        "rigid movement, " + _MOTION),
    "resample": (
        "All displacements were joined, so that every volume was interpolated once (cubic "
        "B-splines), and its intensity was multiplied by the local change of volume by those "
        "displacements along the phase encoding that were corrected."),
    "bias": (
        "The bias field was estimated in the mean b = 0 image by N4 "
        "(doi:10.1109/TMI.2010.2046908, ANTs), and all volumes were divided by it."),
    "brain": (
        "The brain was segmented in the T1-weighted image by deepbet "
        "(doi:10.1016/j.compbiomed.2024.108845)."),
}
"""Paragraph of the methods text for each correction. Where it has a condition, those with a further
word in their key say what was done."""


def acknowledge() -> str:
    """Write the sentence for HowToAcknowledge of dataset_description.json."""
    return (f"Please cite QSphere {__version__} and the papers listed in logs/CITATION.md, which "
            "names those behind every method that was used.")


def of_method(method: Method) -> tuple[str, str]:
    """Write the section of a method: heading and text, read from its folder."""
    return f"Method: {method.short}", _method(method)


def references(chosen: Sequence[Method], paragraphs: Sequence[tuple[str, str]] = ()
               ) -> list[tuple[str, str]]:
    """List references, each once: (description, https://doi.org/…).

    They are REFERENCES, those of CITED that a paragraph names, and those of the chosen methods: the
    DOIs in the first paragraph of the README of each, and its URL.
    """
    texts = " ".join(text for _, text in paragraphs)
    descriptions = REFERENCES | {doi: text for doi, text in CITED.items() if doi in texts}
    for method in chosen:
        readme, url = _readme(method), str(method.outputs["model"].get("URL", ""))
        for text in (_first_paragraph(readme), url):
            for match in DOI.finditer(text):
                doi = match.group(1).rstrip(".")
                descriptions.setdefault(doi, _authors(text[:match.start()])
                                        or f"{method.short}: {_clause(method.outputs['model'])}")
    return [(what, f"https://doi.org/{doi}") for doi, what in descriptions.items()]


def markdown(paragraphs: Sequence[tuple[str, str]], chosen: Sequence[Method]) -> str:
    """Write the methods text with its references, to be pasted into a paper and shortened.

    Parameters
    ----------
    paragraphs : sequence of (heading, text)
    chosen : sequence of Method
        Methods whose references are listed.
    """
    parts = ["# Methods", "_Written by QSphere to be copied as it is; it is in the public domain "
             "(CC0)._"]
    parts += [f"## {heading}\n\n{text}" for heading, text in paragraphs]
    parts.append("## References\n\n" + "\n".join(
        f"{k}. {what}. <{url}>" for k, (what, url) in enumerate(references(chosen, paragraphs), 1)))
    return "\n\n".join(parts) + "\n"


def _method(method: Method) -> str:
    model = method.outputs["model"]
    maps = list(dict.fromkeys(map(_clause, method.outputs.get("maps", {}).values())))
    text = f"{model['Description'].rstrip('.')} ({model['URL']})."
    if summary := _first_paragraph(_readme(method)):
        text += f" {summary}"
    if maps:
        text += f" Maps: {'; '.join(maps)}."
    if changed := method.changed_settings:
        text += (" Hyper-parameters that differ from the method's own: "
                 f"{'; '.join(f'{path} = {value}' for path, value in changed.items())}.")
    return text


def _clause(entry: Mapping[str, Any]) -> str:
    """Take the first clause of a Description."""
    return re.split(r"[;:,]| \(|\. ", entry["Description"])[0].rstrip(".")


def _readme(method: Method) -> str:
    path = method.folder / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _first_paragraph(readme: str) -> str:
    """Take the first block of text that is no heading, on one line, without emphasis."""
    blocks = (b.strip() for b in readme.split("\n\n"))
    first = next((b for b in blocks if b and not b.startswith("#")), "")
    return re.sub(r"\*\*|`", "", " ".join(first.split()))


def _authors(before: str) -> str:
    """Find `Johnson et al. 2007` at the end of the text before a DOI; empty if it is not there."""
    name = r"[A-ZÀ-Þ][\w’'-]+(?: et al\.?)?(?:,? (?:and|&) )?"
    match = re.search(rf"((?:{name})+,? \(?\d{{4}})[,;:.\s(]*$", before)
    return match.group(1).replace("(", "") if match else ""
