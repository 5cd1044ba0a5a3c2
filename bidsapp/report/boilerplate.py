"""The methods text and its references, read from outputs.json and README.md of the methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bidsapp import __version__
from bidsapp.kinds import Method

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
    "10.1038/s41592-022-01681-2": "Ciric et al. 2022, TemplateFlow",
    "10.1016/S0031-3203(98)00091-0": "Studholme et al. 1999, normalised mutual information",
    "10.1016/j.media.2007.06.004": "Avants et al. 2008, SyN",
    "10.1109/42.963816": "Alexander et al. 2001, reorientation by finite strain",
}
"""DOI → what it is, of what some paragraphs cite beside the methods."""


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
