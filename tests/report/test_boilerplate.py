"""The methods text says what was done, from each method's own folder, with its references."""

import inspect
import re

import pytest

from bidsapp import methods
from bidsapp.preprocess import denoise
from bidsapp.recipe.steps import PREPARATION
from bidsapp.report import boilerplate
from support.tensor_method import Tensor


def test_methods_text_comes_from_the_folder(tmp_path):
    (tmp_path / "README.md").write_text(
        "# estimate_tensor\n\nThe **tensor** of Basser et al. 1994,\ndoi:10.1016/S0006-"
        "3495(94)80775-1. Fitted as Doe & Roe 2020 (doi:10.1000/xyz.1).\n\n"
        "**Limits.** Not copied.\n")
    method = Tensor(tmp_path)
    text = boilerplate.markdown([boilerplate.of_method(method)], [method])
    assert "Doe et al. 2020) (https://doi.org/10.1000/tensor). The tensor of Basser" in text
    assert "Not copied" not in text
    assert "Maps: Fractional anisotropy; Mean diffusivity;" in text
    found = {url: what for what, url in boilerplate.references([method])}
    assert found["https://doi.org/10.1000/xyz.1"] == "Doe & Roe 2020"
    assert found["https://doi.org/10.1016/S0006-3495(94)80775-1"] == "Basser et al. 1994"
    assert "https://doi.org/10.1000/tensor" in found
    assert len(found) == len(boilerplate.references([method]))


@pytest.mark.parametrize("name", methods.names())
def test_every_method_brings_text_and_reference(name):
    method = methods.get(name)
    cited = {url for _, url in boilerplate.references([method])}
    everything = {url for _, url in boilerplate.references([])}
    assert cited - everything or method.outputs["model"]["URL"] in everything
    text = boilerplate.markdown([boilerplate.of_method(method)], [method])
    assert method.outputs["model"]["URL"] in text


def test_what_the_text_cites_is_in_the_references():
    cited = set(boilerplate.DOI.findall(" ".join(t for _, t in PREPARATION)))
    listed = {url.removeprefix("https://doi.org/") for _, url in boilerplate.references([])}
    assert {c.rstrip(".") for c in cited} == listed


def test_acknowledgement_is_one_sentence():
    assert re.fullmatch(r"[^\n]*CITATION\.md[^\n]*\.", boilerplate.acknowledge())


def test_what_the_corrections_cite_is_in_the_references():
    """Each paragraph's DOIs are listed when it was written, and only then."""
    always = {url for _, url in boilerplate.references([])}
    cited_somewhere = set()
    for name, text in boilerplate.CORRECTIONS.items():
        cited = {f"https://doi.org/{doi.rstrip('.')}" for doi in boilerplate.DOI.findall(text)}
        listed = {url for _, url in boilerplate.references([], [("Corrections", text)])}
        assert listed == always | cited, name
        cited_somewhere |= cited
        assert text.endswith(".") and len(text) > 80
    assert len(cited_somewhere - always) > 12


def test_the_paragraph_on_noise_names_the_loss_that_is_used():
    loss = inspect.signature(denoise.denoise).parameters["loss"].default
    names = {"operator": "optimally in operator norm", "frobenius": "mean square error"}
    assert [name for name, words in names.items()
            if words in boilerplate.CORRECTIONS["denoise"]] == [loss]


def test_paragraphs_on_what_was_done_have_no_conditions():
    done = {key: text for key, text in boilerplate.CORRECTIONS.items() if "_" in key}
    assert {key.split("_")[0] for key in done} == {"denoise", "gibbs", "motion"}
    assert not [key for key, text in done.items() if " if " in text or "From magnitude" in text]
    assert "floor" not in done["denoise_gaussian"] and "floor" in done["denoise_magnitude"]
