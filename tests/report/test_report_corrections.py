"""Figures of corrections show the right thing for any run, and confounds say what they are."""

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from bidsapp.acquisition import Acquisition
from bidsapp.bids.writer import to_tsv
from bidsapp.report import corrections, page

AFFINE = np.diag([2.0, 2.5, 3.0, 1.0])
SVG = "{http://www.w3.org/2000/svg}"


def images(svg):
    """Pictures in an SVG as RGB arrays, in order."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB"))
            for found in re.findall(rb"base64,([A-Za-z0-9+/=\s]+)", svg)]


def volumes(rng, shape, n):
    return rng.uniform(1, 100, (n, *shape))


def all_figures(rng, shape=(14, 15, 8), n=9, mask=None, z=None):
    mask = np.ones(shape, bool) if mask is None else mask
    before, after, sigma, rms, one, two = volumes(rng, shape, 6)
    bvals = np.r_[0.0, np.full(n - 1, 1000.0)]
    correlation = np.where(bvals > 0, 0.9, np.nan)
    z = rng.standard_normal((shape[2], n)) if z is None else z
    return [
        *corrections.of_denoising(before, after, sigma, rms, mask, AFFINE),
        *corrections.of_field(sigma - 50, mask, AFFINE, 0.7, 0.99, (before, after, one, two)),
        *corrections.of_b0(before, after, mask, AFFINE, edge=before > 50),
        *corrections.of_motion(rng.normal(size=(n, 3)), rng.normal(size=(n, 3)),
                               rng.normal(size=(n, 10)), np.r_[np.nan, np.ones(n - 1)], bvals < 50),
        *corrections.of_carpet(z, z < -2, bvals),
        *corrections.of_correlation(correlation, correlation + 0.01)]


def test_figures_are_whole_and_reproducible(rng):
    """SVGs parse, each has its own file name, two runs are equal, no global state is left."""
    before = dict(mpl.rcParams)
    state = rng.bit_generator.state
    drawn = all_figures(rng)
    rng.bit_generator.state = state
    assert [f.svg for f in drawn] == [f.svg for f in all_figures(rng)]
    assert dict(mpl.rcParams) == before
    names = {(f.suffix, *f.entities.items()) for f in drawn}
    assert len(names) == len(drawn) == 7
    for figure in drawn:
        ElementTree.fromstring(figure.svg)
        assert figure.title and figure.caption.endswith(".") and figure.section == "Corrections"
        assert not re.search(r"\bnan\b", figure.caption)


@pytest.mark.parametrize(("shape", "n", "empty"), [
    ((12, 13, 1), 2, False), ((1, 13, 12), 2, True), ((2, 2, 2), 2, False), ((1, 1, 1), 1, True)])
def test_degenerate_runs_can_be_drawn(rng, shape, n, empty):
    """One slice, one voxel, one or two volumes, an empty mask, no slice assessed."""
    mask = np.zeros(shape, bool) if empty else None
    drawn = all_figures(rng, shape, n, mask, np.full((shape[2], n), np.nan))
    for figure in drawn:
        ElementTree.fromstring(figure.svg)
        assert not re.search(r"\bnan\b", figure.caption)
    assert "No slice was assessed" in drawn[-2].caption


def test_nothing_but_nan_can_be_drawn(rng):
    shape = (6, 7, 3)
    nan, mask = np.full(shape, np.nan), np.ones(shape, bool)
    series = np.full((4, 3), np.nan)
    for figure in [*corrections.of_denoising(nan, nan, nan, nan, mask, AFFINE),
                   *corrections.of_field(nan, mask, AFFINE), *corrections.of_b0(nan, nan, mask,
                                                                                AFFINE),
                   *corrections.of_motion(series, series, None, series[:, 0], np.zeros(4, bool)),
                   *corrections.of_correlation(series[:, 0], series[:, 0])]:
        ElementTree.fromstring(figure.svg)
        assert not re.search(r"\bnan\b", figure.caption)


def test_arguments_are_not_modified(rng):
    shape = (8, 9, 4)
    arrays = volumes(rng, shape, 4)
    kept = arrays.copy()
    mask = np.ones(shape, bool)
    corrections.of_denoising(*arrays, mask, AFFINE)
    (_, pair) = corrections.of_field(arrays[0], mask, AFFINE, np.nan, np.nan, arrays, ("AP", "PA"))
    assert "correlation" not in pair.caption and "PA, corrected" in pair.svg.decode()
    corrections.of_b0(*arrays[:2], mask, AFFINE)
    np.testing.assert_array_equal(arrays, kept)


def test_a_residual_with_anatomy_is_told_from_noise(rng):
    """The caption's correlation is near 0 for white noise, and near 1 for a share of the signal."""
    shape = (24, 25, 12)
    before, sigma, mask = rng.uniform(50, 100, shape), np.full(shape, 5.0), np.ones(shape, bool)
    found = []
    for rms in (rng.normal(5, 0.1, shape), 0.1 * before):
        (figure,) = corrections.of_denoising(before, before, sigma, rms, mask, AFFINE)
        found.append(float(re.search(r"correlates ([+-]\d\.\d\d)", figure.caption)[1]))
        assert "Median noise SD 5." in figure.caption
    assert abs(found[0]) < 4 / np.sqrt(before.size) and found[1] == 1


def test_noise_that_was_not_estimated_is_not_drawn(rng):
    """Without a noise map, or where it is 0, there is no ratio to it."""
    before, rms = rng.uniform(50, 100, (12, 13, 8)), np.full((12, 13, 8), 4.0)
    mask = np.ones(before.shape, bool)
    for sigma in (None, np.zeros(before.shape)):
        (figure,) = corrections.of_denoising(before, before, sigma, rms, mask, AFFINE)
        assert "noise SD" not in figure.svg.decode() and "RMS of 4" in figure.caption
    half = np.where(np.arange(12)[:, None, None] < 6, 8.0, 0.0) + np.zeros(before.shape)
    (figure,) = corrections.of_denoising(before, before, half, rms, mask, AFFINE)
    assert "Median noise SD 8. " in figure.caption and "RMS of 0.5 noise SD" in figure.caption


def test_the_sign_of_the_field_is_its_colour():
    """Positive is red, negative blue, 0 white, and both ends are equally far from 0."""
    hz = np.zeros((6, 6, 1))
    hz[0], hz[-1] = 40, -20
    figure = corrections.of_field(hz, np.ones(hz.shape, bool), AFFINE)[0]
    mosaic = images(figure.svg)[0].astype(int)
    top, bottom = mosaic[3, 1], mosaic[3, -2]  # the frame of a slice is black
    assert top[0] - top[2] > 60 and bottom[2] - bottom[0] > 60
    assert mosaic[3, 3].min() > 240
    assert "±40 Hz" in figure.caption


def test_the_two_b0s_change_places(rng):
    """Before lies above after. Each moves by exactly the distance between the two, and back; both
    stay where they are in print and for readers who want no motion."""
    shape = (14, 15, 8)
    before, after = volumes(rng, shape, 2)
    (figure,) = corrections.of_b0(before, after, np.ones(shape, bool), AFFINE)
    root = ElementTree.fromstring(figure.svg)
    groups = {g.get("id"): g for g in root.iter(f"{SVG}g") if g.get("id")}

    def height(name):
        transform = groups[name].find(f".//{SVG}image").get("transform")
        return float(re.findall(r"-?\d+\.?\d*", transform)[5])

    distances = {height(f"after-{k}") - height(f"before-{k}") for k in (0, 1)}
    text = figure.svg.decode()
    moves = dict(re.findall(r"@keyframes (\w+)-moves \{ 50% \{ transform: translate\(0, (\S+)px\)",
                            text))
    assert min(distances) > 50
    assert all(float(moves["before"]) == pytest.approx(d, abs=2e-3) for d in distances)
    assert float(moves["after"]) == -float(moves["before"])
    assert re.search(r"@media print, \(prefers-reduced-motion: reduce\) \{ \* \{ animation: none",
                     text)
    for name in ("before", "after"):
        assert name in "".join(groups[f"{name}-label"].itertext())
        assert f'[id^="{name}-"] {{ animation: {name}-moves' in text


def test_replaced_slices_are_framed(rng):
    z = rng.standard_normal((10, 12))
    outliers = np.zeros(z.shape, bool)
    outliers[3, 5] = outliers[4, 5] = outliers[7, 9] = True
    figure, clean = (corrections.of_carpet(z, o, np.full(12, 1000.0))[0]
                     for o in (outliers, np.zeros_like(outliers)))
    assert "3 of 120 slices, in 2 volumes, are outliers" in figure.caption
    assert "None of 120 slices" in clean.caption
    frames = [len(re.findall("stroke: #000000; stroke-width: 0.8", f.svg.decode()))
              for f in (figure, clean)]
    assert frames[0] - frames[1] == 3


def test_correlation_counts_volumes_that_rose():
    before = np.array([np.nan, 0.5, 0.6, 0.7])
    after = np.array([np.nan, 0.6, 0.8, 0.65])
    (figure,) = corrections.of_correlation(before, after)
    assert "Mean 0.6 before and 0.6833 after; it rose in 2 of 3 volumes" in figure.caption
    assert "fall is 0.05, in volume 3" in figure.caption


def table(n=4):
    bvecs = np.tile([[0.0, 0, 1]], (n, 1))
    original = Acquisition(np.r_[0.0, np.full(n - 1, 1000.0)], bvecs)
    turn = np.radians(30)
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)],
                         [0, np.sin(turn), np.cos(turn)]])
    return original, original.rotated(rotation)


def test_confounds_have_the_names_and_units_of_others():
    """fMRIPrep's and QSIPrep's names; mm and radians; one row per volume."""
    original, rotated = table()
    replaced = np.zeros((6, 4), bool)
    replaced[2:5, 3] = True
    rows, columns = corrections.confounds(
        original, rotated, translations=np.arange(12.0).reshape(4, 3),
        rotations=np.full((4, 3), 180.0), framewise_displacement=np.array([np.nan, 1, 2, 3]),
        eddy=np.arange(40.0).reshape(4, 10), replaced=replaced,
        correlation_before=np.array([np.nan, 0.5, 0.5, 0.5]),
        correlation_after=np.array([np.nan, 0.6, 0.6, 0.6]))
    assert len(rows) == 4 and all(list(row) == list(columns) for row in rows)
    assert list(columns)[:7] == ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z",
                                 "framewise_displacement"]
    assert {"bval", "grad_x", "grad_y", "grad_z", "original_grad_x"} <= columns.keys()
    assert all(c["Description"] and c["Units"] and "{" not in c["Description"]
               for c in columns.values())
    assert columns["rot_x"]["Units"] == "rad" and rows[2]["rot_y"] == pytest.approx(np.pi)
    assert columns["trans_x"]["Units"] == "mm" and rows[3]["trans_y"] == 10
    assert rows[1]["eddy_constant"] == 10 and rows[1]["eddy_yz"] == 19
    assert [row["n_replaced_slices"] for row in rows] == [0, 0, 0, 3]
    assert rows[1]["original_grad_z"] == 1 and rows[1]["grad_y"] == pytest.approx(-0.5)
    text = to_tsv(rows).splitlines()
    cells = dict(zip(text[0].split("\t"), text[1].split("\t"), strict=True))
    assert cells["framewise_displacement"] == "n/a" and cells["n_replaced_slices"] == "0"


def test_confounds_of_what_was_not_corrected_are_left_out():
    rows, columns = corrections.confounds(*table(2))
    assert set(columns) == {"bval", *(f"{o}grad_{a}" for o in ("", "original_") for a in "xyz")}
    assert len(rows) == 2


def test_the_page_lists_the_corrections_before_the_signal(tmp_path):
    """A table of what was done, then its figures, then the other sections."""
    (tmp_path / "f.svg").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    record = {"state": "complete", "name": "sub-01_dwi", "qc": {"fd_mean": 0.21}, "figures": [
        {"file": "f.svg", "title": t, "caption": "c.", "section": s}
        for t, s in (("Mean b0", "Signal"), ("Head motion", corrections.SECTION))],
        "corrections": [{"name": "denoise", "text": "PCA of 5×5×5 patches & <shrinkage>.",
                         "title": "noise", "seconds": 3.14159}]}
    text = page.participant("01", [record], [], tmp_path)
    body = text[text.index('id="run-1"'):]
    order = [body.index(words) for words in (
        ">Corrections</h3>", "PCA of 5×5×5 patches &amp; &lt;shrinkage&gt;.", "3.1\u00a0s",
        "<b>Head motion.</b>", ">Signal</h3>", "<b>Mean b0.</b>")]
    assert order == sorted(order)
    assert body.count(">Corrections</h3>") == 1 and "Framewise displacement" in body
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    bare = page.participant("01", [{**record, "figures": [], "corrections": []}], [], tmp_path)
    assert "Corrections</h3>" not in bare
