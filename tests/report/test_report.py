"""Figures show the right thing the right way round; pages are whole, safe and open offline."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import ClassVar
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement, biology
from bidsapp.kinds import Cohort, Derived, Fitted
from bidsapp.report import canvas, distributions, figures, glyphs, page
from support.tensor_method import OUTPUTS, Tensor

SVG = "{http://www.w3.org/2000/svg}"


def make_dwi(rng, shape=(9, 8, 7), affine=None, bvals=None, mask=None):
    bvals = np.r_[np.zeros(2), np.full(8, 1000.0), np.full(7, 2000.0)] if bvals is None else bvals
    bvecs = rng.standard_normal((len(bvals), 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    if mask is None:
        mask = np.ones(shape, bool)
    signal = 900 * np.exp(-1e-3 * bvals) + rng.normal(0, 20, (int(mask.sum()), len(bvals)))
    affine = np.diag([2.0, 2.5, 4.0, 1.0]) if affine is None else affine
    return Dwi(signal.astype(np.float32), mask, affine, Acquisition(bvals, bvecs), noise_sd=20.0)


def make_derived(rng, dwi):
    n = len(dwi.signal)
    direction = np.zeros((n, 3), np.float32)
    direction[:, 0] = 1
    return Derived({"fa": rng.uniform(0, 1.1, n).astype(np.float32),
                    "md": np.full(n, 1e-3, np.float32),
                    "fa_std": rng.uniform(0, 0.1, n).astype(np.float32),
                    "s0": np.full(n, 900, np.float32), "direction": direction})


def all_figures(rng, dwi):
    mean = dwi.unmask(dwi.mean_b0)
    return figures.of_signal(dwi, mean) + figures.of_maps(Tensor(), make_derived(rng, dwi), dwi)


def images(svg):
    """The pictures in an SVG as RGB arrays, the largest first."""
    found = re.findall(rb"base64,([A-Za-z0-9+/=\s]+)", svg)
    arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(f))).convert("RGB")) for f in found]
    return sorted(arrays, key=lambda a: -a.size)


AFFINES = {
    "RAS": np.diag([2.0, 2, 2, 1]), "LAS": np.diag([-2.0, 2, 2, 1]),
    "RPI": np.diag([2.0, -2, -2, 1]),
    "sagittal": np.array([[0, 0, 2.0, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]),
    "oblique": np.array([[1.9, 0.4, 0, 0], [-0.4, 1.9, 0.3, 0], [0, -0.3, 2, 0], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(("axis", "display"), [(0, "x"), (1, "y"), (2, "z")])
def test_tiles_are_in_world_orientation(rng, name, axis, display):
    """A half space along each world axis appears right (x, y) or at the top (z) of its tiles."""
    affine = AFFINES[name].copy()
    shape = (9, 10, 11)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    world = np.stack(np.indices(shape), -1) @ affine[:3, :3].T + affine[:3, 3]
    drawn = canvas.Canvas(make_dwi(rng, shape, affine))
    volume = drawn.canonical((world[..., axis] > 0).astype(float))
    for across in {0, 1, 2} - {axis}:
        tile = drawn.tile(volume, across, volume.shape[across] // 2)
        horizontal, _ = (a for a in range(3) if a != across)
        low, high = np.array_split(tile, 2, axis=1 if axis == horizontal else 0)
        assert high.mean() > 0.7 > 0.3 > low.mean(), display


@pytest.mark.parametrize("name", AFFINES)
def test_place_finds_the_slice_again(rng, name):
    shape = (5, 6, 7)
    drawn = canvas.Canvas(make_dwi(rng, shape, AFFINES[name]))
    volume = np.zeros(shape)
    volume[:, :, 5] = 1
    axis, position = drawn.place(2, 5)
    assert np.take(drawn.canonical(volume), position, axis).all()


def test_mosaic_keeps_the_order_of_slices(rng):
    drawn = canvas.Canvas(make_dwi(rng, (20, 21, 9)))
    view = drawn.views[0]
    assert view.axis == 2 and view.positions == tuple(range(9))
    volume = np.broadcast_to(np.arange(9.0), (20, 21, 9))
    mosaic = drawn.mosaic(volume, view)
    assert mosaic.shape == (2 * 23, 7 * 22)  # a frame of one pixel around each
    assert mosaic[-10, 10] == 0 and mosaic[-10, 32] == 1 and mosaic[10, 10] == 7


def test_large_slices_are_thinned(rng):
    drawn = canvas.Canvas(make_dwi(rng, (250, 30, 3), bvals=np.array([0.0, 1000])))
    assert max(drawn.mosaic(drawn.mask, drawn.views[0]).shape) <= 3 * (canvas.TILE + 2)


def test_voxels_keep_their_shape(rng):
    dwi = make_dwi(rng, (10, 10, 6), np.diag([1.0, 3.0, 2.0, 1]))
    drawn = canvas.Canvas(dwi)
    assert drawn.views[0].zooms == (1, 3)
    svg = canvas.svg(canvas.mosaics(drawn, np.full((10, 10, 6, 3), 90, np.uint8), "t"))
    (mosaic, *_) = ElementTree.fromstring(svg).iter(f"{SVG}image")
    matrix = re.search(r"matrix\(([^)]*)\)|scale\(([^)]*)\)", mosaic.get("transform"))
    scales = [float(v) for v in re.split(r"[ ,]+", matrix[1] or matrix[2])]
    across, up = (scales[0], scales[3]) if matrix[1] else scales[:2]
    assert abs(up / across) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("shape", [
    (7, 8, 9), (40, 44, 1), (40, 44, 2), (1, 30, 31), (30, 3, 31), (2, 2, 2), (1, 1, 1)])
def test_any_shape_can_be_drawn(rng, shape):
    for figure in all_figures(rng, make_dwi(rng, shape)):
        ElementTree.fromstring(figure.svg)
        assert figure.title and figure.caption and figure.section


@pytest.mark.parametrize("bvals", [
    np.array([0.0, 1000]), np.full(7, 1000.0), np.r_[0.0, np.repeat(np.arange(1, 10) * 500.0, 2)]])
def test_any_acquisition_can_be_drawn(rng, bvals):
    dwi = replace(make_dwi(rng, bvals=bvals), noise_sd=None)
    assert len(figures.of_signal(dwi, np.ones(dwi.mask.shape))) == 4
    spherical = replace(dwi.acquisition, b_delta=np.zeros(len(bvals)))
    figures.of_signal(replace(dwi, acquisition=spherical), np.zeros(dwi.mask.shape))


def test_same_input_same_bytes_and_no_global_state(rng):
    dwi = make_dwi(rng)
    derived = make_derived(rng, dwi)
    before = dict(mpl.rcParams)
    one, two = (figures.of_maps(Tensor(), derived, dwi) + figures.of_signal(
        dwi, dwi.unmask(dwi.mean_b0)) for _ in range(2))
    assert [f.svg for f in one] == [f.svg for f in two]
    assert dict(mpl.rcParams) == before
    assert not any(b"<dc:date>" in f.svg for f in one)


def test_maps_to_report_and_their_names(rng):
    dwi = make_dwi(rng)
    drawn = figures.of_maps(Tensor(), make_derived(rng, dwi), dwi)
    assert [dict(f.entities) for f in drawn] == [
        {"model": "tensor", "param": "direction"}, {"model": "tensor", "param": "fa"},
        {"model": "tensor", "param": "md"}, {"model": "tensor", "param": "fa", "stat": "std"}]
    fa, md = drawn[1], drawn[2]
    assert fa.title == "Fractional anisotropy" and "outside the shown range" in fa.caption
    assert md.title == "Mean diffusivity" and "mm²/s" in md.caption
    assert "10⁻³ mm²/s" in md.svg.decode()


def test_a_direction_along_x_is_red(rng):
    dwi = make_dwi(rng)
    derived = make_derived(rng, dwi)
    full = replace(derived, maps={**derived.maps, "fa": np.ones(len(dwi.signal), np.float32)})
    (mosaic, *_) = images(figures.of_maps(Tensor(), full, dwi)[0].svg)
    colours = {tuple(c) for c in mosaic.reshape(-1, 3)}
    assert colours == {(0, 0, 0), (255, 0, 0)}


def test_colours_of_values():
    values = np.array([0, 0.5, 1, 2, -1, np.nan, 1]).reshape(7, 1, 1)
    mask = np.ones((7, 1, 1), bool)
    mask[6] = False
    grey = canvas.coloured(values, (0, 1), "gray", mask)[:, 0, 0, 0]
    assert list(grey[[0, 2, 3, 4, 5, 6]]) == [0, 255, 255, 0, 128, 0]
    assert abs(int(grey[1]) - 127) <= 2


def test_the_palette_loses_nothing(rng):
    """An embedded picture equals the original, with few colours and with many."""
    dwi = make_dwi(rng, (40, 40, 5))
    drawn = canvas.Canvas(dwi)
    for most in (8, 256):
        colours = rng.integers(0, most, (40, 40, 5, 3)).astype(np.uint8)
        (mosaic, *_) = images(canvas.svg(canvas.mosaics(drawn, colours, "t")))
        view = drawn.views[0]
        assert np.array_equal(mosaic[::-1], drawn.mosaic(colours, view)) or np.array_equal(
            mosaic, drawn.mosaic(colours, view))


def test_a_suspected_slice_is_shown(rng):
    bvals = np.r_[0.0, np.full(20, 1000.0)]
    dwi = make_dwi(rng, (12, 12, 8), bvals=bvals)
    clean = figures.of_signal(dwi, dwi.unmask(dwi.mean_b0))[-1]
    assert "No slice looks corrupted" in clean.caption
    signal = dwi.signal.copy()
    signal[np.nonzero(dwi.mask)[2] == 4, 9] *= 0.5
    drawn = figures.of_signal(replace(dwi, signal=signal), dwi.unmask(dwi.mean_b0))[-1]
    assert "1 slice(s) in 1 volume(s)" in drawn.caption
    assert "slice 4, vol. 9" in drawn.svg.decode()


def towards(axes, sharpness=20.0):
    """(voxel, 45) functions ∝ exp(κ (n·μ)²) up to degree 8, 1 along their axis μ."""
    axes, (points, weights) = np.atleast_2d(axes).astype(float), sh.quadrature(60)
    odf = (np.exp(sharpness * ((axes @ points.T)**2 - 1)) * weights) @ sh.basis(8, points)
    return (odf / (odf * sh.basis(8, axes)).sum(1, keepdims=True)).astype(np.float32)


def long_axis(pixels):
    """Angle in degrees, modulo 180, of the longest axis of a set of pixels; row 0 at the bottom."""
    y, x = np.nonzero(pixels)
    _, vectors = np.linalg.eigh(np.cov(x, y))
    return np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1])) % 180


@pytest.mark.parametrize("name", [*AFFINES, "anisotropic"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_glyphs_point_from_voxel_to_voxel(rng, name, axis):
    """A fibre that runs from one voxel through another is drawn along the line between them."""
    affine = (AFFINES["oblique"] @ np.diag([1, -1.5, 2.5, 1])  # of unequal voxels, one axis flipped
              if name == "anisotropic" else AFFINES[name])
    shape = (9, 10, 11)
    dwi = make_dwi(rng, shape, affine)
    drawn = canvas.Canvas(dwi)
    across, up = (a for a in range(3) if a != axis)
    image_axes = {int(drawn.orientation[i, 0]): i for i in range(3)}
    for step in ((2, 1), (1, -2), (0, 1), (1, 0)):
        ends = np.full((2, 3), 4)
        ends[1, image_axes[across]] += step[0]
        ends[1, image_axes[up]] += step[1]
        fibre = affine[:3, :3] @ (ends[1] - ends[0])
        fibre /= np.linalg.norm(fibre)
        rows = np.full(shape, -1)
        rows[tuple(ends[0])] = 0
        marks = np.zeros(shape)
        marks[tuple(ends[0])], marks[tuple(ends[1])] = 1, 2
        position = np.argwhere(drawn.canonical(marks) == 1)[0]
        tile = drawn.tile(drawn.canonical(marks), axis, position[axis], crop=False)
        (one, two) = (np.argwhere(tile == k)[0] for k in (1, 2))
        line = (two - one) * (drawn.zooms[up], drawn.zooms[across])
        box = [slice(int(p), int(p) + 1) for p in position]
        picture = glyphs.painted(drawn, towards(fibre), drawn.canonical(rows), np.zeros((
            *drawn.mask.shape, 3), np.uint8), glyphs.Cut(axis, tuple(box)))
        expected = np.degrees(np.arctan2(*line)) % 180
        found = long_axis(picture.any(-1))
        assert min(abs(found - expected), 180 - abs(found - expected)) < 3
        y, x = np.indices(picture.shape[:2]) - (np.array(picture.shape[:2])[:, None, None] - 1) / 2
        tip = np.argmax(picture.any(-1) * np.hypot(y, x))
        np.testing.assert_allclose(picture.reshape(-1, 3)[tip] / 255, np.abs(fibre), atol=0.12)


def test_glyphs_are_surfaces_seen_from_outside():
    """A bundle along the line of sight is round, its axis' colour in the middle. A flat density is
    a ball of that radius, whose visible points are known. A tilted bundle's lobe that comes
    towards the viewer hides more of the other than the other of it."""
    flat = np.eye(1, 45, dtype=np.float32) * 0.5 * np.sqrt(4 * np.pi)
    odf = np.concatenate([towards([0, 0, 1]), flat, towards(np.array([1, 0, 2]) / np.sqrt(5))])
    colours, inside = glyphs.surfaces(odf, np.eye(3), (41, 41))
    y, x = np.indices((41, 41)) - 20.0
    rho = np.hypot(y, x) / 20.5
    np.testing.assert_array_equal(inside[1], rho <= 0.5)
    depth = 20.5 * np.sqrt(np.maximum(0.25 - rho**2, 0))
    ball = np.stack([np.abs(x), np.abs(y), depth], -1) / 10.25
    off = np.abs(colours[1] / 255 - ball)[rho < 0.45]
    assert off.max() < 1.5 * np.pi / glyphs.TILTS / np.sqrt(1 - 0.9**2)
    assert colours[0, 20, 20, 2] > 250 and colours[0, 20, 20, :2].max() < 30
    np.testing.assert_array_equal(inside[0], inside[0].T)
    np.testing.assert_array_equal(inside[2], inside[2][:, ::-1])  # its outline is symmetric,
    assert (colours[2, 20, 21:25, 2] > colours[2, 20, 16:20, 2][::-1]).all()  # what is seen is not


def test_two_bundles_make_two_lobes():
    odf = towards([[1, 0, 0], [0, 1, 0]]).sum(0, keepdims=True)
    colours, inside = glyphs.surfaces(odf, np.eye(3), (41, 41))
    y, x = np.indices((41, 41)) - 20.0
    far = inside[0] & (np.hypot(y, x) > 12)
    assert np.abs(np.sin(2 * np.arctan2(y, x)))[far].max() < 0.6
    for row, column, expected in ((20, 36, 0), (36, 20, 1), (20, 4, 0), (4, 20, 1)):
        assert inside[0, row, column] and colours[0, row, column].argmax() == expected


def test_the_window_holds_most_and_has_a_square_side():
    amount = np.zeros((60, 50, 4))
    amount[40:44, 5:9, 2] = 1
    cut = glyphs.densest(amount, 2, (1.0, 1.0, 3.0))
    assert amount[cut.box].sum() == amount.sum() and cut.box[2] == slice(2, 3)
    assert [s.stop - s.start for s in cut.box] == [32, 32, 1]
    assert [s.stop - s.start for s in glyphs.densest(amount, 1, (1.0, 1.0, 10.0)).box] == [32, 1, 3]
    assert glyphs.densest(amount[:3, :2], 2, (1.0, 1.0, 1.0)).box[:2] == (slice(0, 3), slice(0, 2))


class Spherical(Tensor):
    OUTPUTS: ClassVar[dict] = {**OUTPUTS, "maps": {
        "fa": OUTPUTS["maps"]["fa"],
        "odf": {"entities": {"param": "odf"}, "Description": "Density; its integral is 1",
                "Units": "1/sr", "range": [None, None], "report": True, "background": "fa"}}}


@pytest.mark.parametrize("shape", [(20, 20, 2), (9, 8, 7), (1, 10, 11), (1, 1, 1)])
def test_glyph_figure(rng, shape):
    """Flagged voxels and those without estimate have no glyph; the scale starts at 0."""
    dwi = make_dwi(rng, shape, bvals=np.array([0.0, 1000]))
    n = len(dwi.signal)
    odf = 3 * np.repeat(towards([1, 0, 0]), n, 0)
    maps = {"fa": np.full(n, 0.5, np.float32), "odf": odf}
    (_, drawn) = figures.of_maps(Spherical(), Derived(maps), dwi)
    ElementTree.fromstring(drawn.svg)
    assert drawn.entities == {"model": "tensor", "param": "odf"} and drawn.title == "Density"
    assert "half a voxel is 1.5 1/sr" in drawn.caption  # of 3 · 0.5
    titles = re.findall(r"(Axial|Coronal|Sagittal), [xyz] = -?\d+ mm", drawn.svg.decode())
    assert titles == {(20, 20, 2): ["Axial"], (1, 10, 11): ["Sagittal"]}.get(
        shape, ["Axial", "Coronal"])

    def coloured(derived):
        shown = figures.of_maps(Spherical(), derived, dwi)[1]
        return (np.ptp(images(shown.svg)[0].astype(int), axis=2) > 60).sum(), shown.caption

    every, _ = coloured(Derived(maps))
    flagged = Spherical.OUTPUTS["maps"] | {"flag": {**OUTPUTS["maps"]["s0"]}}
    outputs = {**Spherical.OUTPUTS, "maps": flagged}
    sure = (rng.random(n) < 0.5) & (np.arange(n) > 0)
    valid, caption = coloured(Derived(maps, valid=sure))
    assert f"{1 - sure.mean():.2%} of the voxels" in caption
    assert every > 0 and valid <= 0.8 * every
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spherical, "OUTPUTS", outputs)
        flags, _ = coloured(Derived({**maps, "flag": 1.0 - sure}))
    assert flags == valid
    nothing, _ = coloured(Derived(maps, valid=np.zeros(n, bool)))
    assert nothing == 0


@pytest.mark.parametrize("name", methods.names("estimate_"))
def test_every_figure_has_its_own_title(rng, name):
    maps = methods.get(name).outputs["maps"]
    titles = [figures.short(e["Description"]) for e in maps.values() if e["report"]]
    assert len(set(titles)) == len(titles) and all(len(t) > 3 for t in titles)


def test_labels_are_counted(rng):
    dwi = make_dwi(rng, (5, 4, 5), bvals=np.array([0.0, 1000]))
    flag = {"entities": {"param": "flag"}, "Description": "Flag: 0 good; 1 bad; 2 worse",
            "Units": "label", "range": [0, 2], "report": True}
    values = np.repeat([0.0, 1, 2], (70, 20, 10)).astype(np.float32)
    with mpl.rc_context(canvas.STYLE):
        drawn = figures._map(canvas.Canvas(dwi), values, flag, "dwimap", {}, "")
    assert drawn.title == "Flag" and "1: 20.00%, 2: 10.00%" in drawn.caption
    assert "Median" not in drawn.caption and ">0.5<" not in drawn.svg.decode()


@pytest.mark.parametrize("name", methods.names("estimate_"))
def test_what_glyphs_stand_on_is_there(name):
    maps = methods.get(name).outputs["maps"]
    for key, entry in maps.items():
        drawn = entry["report"] and entry["Units"] == "1/sr"
        assert drawn == (key == "odf") == ("background" in entry)
        assert not drawn or maps[entry["background"]]["range"] == [0, 1]


class Page(HTMLParser):
    """Contents of a page: ids, targets of links, sources of pictures, tags, text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.pictures, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known["href"]] if "href" in known else []
        self.pictures += [known] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)


def check(text):
    """The page is self-contained, its links lead somewhere, its pictures say what they are."""
    seen = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert not re.search(r"@import|url\(", style)
    assert len(set(seen.ids)) == len(seen.ids)
    assert {h[1:] for h in seen.links if h.startswith("#")} <= set(seen.ids)
    assert all(re.match(r"#|https://doi\.org/10\.|sub-\w+\.html$", h) for h in seen.links)
    assert all(p["src"].startswith("data:image/svg+xml,") and p["alt"] for p in seen.pictures)
    return seen


def record(name="sub-01_dir-AP", **more):
    return {
        "state": "complete", "status": "done", "outputs": {}, "name": name, "seconds": 5.1,
        "entities": {"sub": "01", "dir": "AP"}, "batch": "Siemens Prisma",
        "batch_source": "sidecar", "covariates": {"age": 31}, "files": ["bids:raw:sub-01/x.nii.gz"],
        "n_voxels": 5000, "n_volumes": 21, "mask_source": "median-Otsu of the mean b0",
        "voxel_size": [3.0, 3.0, 2.5], "n_b0": 1, "qc": {"snr_b0": 33.123456, "ndc": None},
        "shells": [{"b": 2500.4, "b_delta": 1.0, "n_directions": 20},
                   {"b": 1000, "b_delta": -0.5, "n_directions": 6}],
        "refusals": {}, "notices": [], "methods": [], "figures": [], **more}


def test_page_of_a_good_run(rng, tmp_path):
    folder = tmp_path / "sub-01/figures"
    folder.mkdir(parents=True)
    drawn = all_figures(rng, make_dwi(rng))
    entries = []
    for i, figure in enumerate(drawn):
        (folder / f"{i}.svg").write_bytes(figure.svg)
        entries.append({"file": f"sub-01/figures/{i}.svg", "title": figure.title,
                        "caption": figure.caption, "section": figure.section})
    text = page.participant("01", [record(figures=entries)], [], tmp_path)
    seen = check(text)
    assert len(seen.pictures) == len(drawn)
    for words in ("20 × 2500, 6 × 1000 (planar)", "3 × 3 × 2.5 mm", "Siemens Prisma", "median-Otsu",
                  "33.12", "n/a", "bids:raw:sub-01/x.nii.gz", "5000 voxels"):
        assert words in seen.text
    assert "could be processed" not in seen.text
    from urllib.parse import unquote
    assert unquote(seen.pictures[0]["src"].split(",", 1)[1]).encode() == drawn[0].svg


def test_page_of_refusals_failures_and_interruption(tmp_path):
    log = tmp_path / "sub-01/log"
    for name, started in (("20250101-000000_a", "yesterday"), ("20250102-000000_b", "today")):
        (log / name).mkdir(parents=True)
        (log / name / "status.json").write_text(f'{{"started": "{started}", "version": "9"}}')
        (log / name / "options.toml").write_text(f'estimate = ["dti"] # {started}')
    records = [
        record(refusals={"estimate_smt": "one shell was found, two are needed."}),
        {"state": "failed", "outputs": {}, "name": "sub-01_dir-PA", "error": "sub-01.bval: missing",
         "batch": "x", "batch_source": "y", "files": [], "entities": {}, "status": "failed",
         "crash": "sub-01/log/a/crash-sub-01_dir-PA.txt"},
        {"state": "incomplete", "outputs": {}, "name": "sub-01_dir-LR"}]
    records.append({**records[0], "name": "sub-01_dir-IS"})
    seen = check(page.participant("01", records, ["sub-01_dir-RL: no .bvec"], tmp_path))
    assert seen.text.count("two are needed") == 1
    assert "for sub-01_dir-AP, sub-01_dir-IS: one shell" in seen.text
    for words in ("Not everything could be processed", "sub-01.bval: missing", "no .bvec",
                  "sub-01/log/a/crash-sub-01_dir-PA.txt", "two are needed", "interrupted",
                  "Left out, and why", "# today", "Started today"):
        assert words in seen.text
    assert "# yesterday" not in seen.text
    assert seen.text.index("sub-01.bval") < seen.text.index("Summary Run")  # failures come first


def test_warnings_are_told_apart_from_notices(tmp_path):
    """In the summary, before the notices, and in words, not by colour alone."""
    text = page.participant("01", [record(warnings=["b-vectors flipped."], notices=["Tissue."])],
                            [], tmp_path)
    seen = check(text)
    assert "done , 1 warning" in seen.text or "done, 1 warning" in seen.text
    assert "Warning. b-vectors flipped." in seen.text and "Warning. Tissue." not in seen.text
    assert seen.text.index("b-vectors flipped.") < seen.text.index("Tissue.")


def test_page_of_nothing_but_problems(tmp_path):
    seen = check(page.participant("01", [], ["no dMRI at all"], tmp_path))
    assert "no dMRI at all" in seen.text and "No diffusion run" in seen.text


def test_missing_figure_and_unknown_method_do_not_stop_the_page(tmp_path):
    entry = {"file": "sub-01/figures/gone.svg", "title": "T", "caption": "C", "section": "S"}
    seen = check(page.participant(
        "01", [record(figures=[entry], methods=["estimate_gone"])], [], tmp_path))
    assert "gone.svg is missing" in seen.text


def test_what_comes_from_data_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    text = page.participant("01", [record(
        name=evil, batch=evil, covariates={evil: evil}, files=[evil], refusals={evil: evil},
        qc={evil: 1.0}, figures=[{"file": evil, "title": evil, "caption": evil, "section": evil}]),
        {"state": "failed", "name": evil, "error": evil, "crash": evil}], [evil], tmp_path)
    assert "<script" not in text
    check(text)


def make_study(rng, n=6):
    table = pd.DataFrame({
        "participant": [f"{i:02d}" for i in range(2 * n)], "session": "n/a",
        "run": [f"sub-{i:02d}" for i in range(2 * n)], "batch": ["Site A"] * n + ["Site <B>"] * n,
        "age": rng.uniform(20, 60, 2 * n), "dti_fa_mean": rng.normal(0.4, 0.02, 2 * n),
        "dti_md_mean": rng.normal(8e-4, 2e-5, 2 * n)})
    return Cohort(table, ("dti_fa_mean", "dti_md_mean"), ("age",), "Site A")


def test_group_page(rng):
    study = make_study(rng)
    after = study.statistics[["participant", "batch", "dti_fa_mean"]].copy()
    fitted = {"harmonize_combat": Fitted({"desc-combat_dwimap": after}, {
        "Model": {"Description": "ComBat"}, "Covariates": ["age"], "ReferenceBatch": "Site A"})}
    drawn = distributions.of_group(study, fitted)
    assert [f.entities["desc"] for f in drawn] == ["distributions", "combat"]
    assert [f.svg for f in drawn] == [f.svg for f in distributions.of_group(study, fitted)]
    outliers = pd.DataFrame([{"run": "sub-03", "batch": "Site A", "measure": "snr_b0", "z": -4.2,
                              "value": 1.0, "median": 2.0, "why": "1 lies below"}])
    chosen = [methods.get("harmonize_combat")]
    between = agreement.compare_tables(study.statistics, list(study.features), {"combat": after},
                                 "Site A")
    effects = biology.judge_in_sample(study.statistics, list(study.features), {})
    seen = check(page.group(study, outliers, between, effects, drawn, fitted, chosen=chosen))
    assert "AUC: Site A: measured" in seen.text or "AUC: Site <B>: measured" in seen.text
    difference = between[(between["data"] == "combat") & (between["of"] == "dti_fa_mean")].iloc[0]
    assert difference["statistic"] == "unpaired_difference"
    assert "Site <B> minus Site A" in seen.text
    low, high = (f"{difference[end]:.3g}" for end in ("low", "high"))
    assert f"{difference['value']:.3g} ({low} to {high}), different participants" in seen.text
    assert "in sample" not in seen.text, "nothing was harmonized"
    assert "sub-03.html" in seen.links
    for words in ("Site <B> 6 6", "12 run(s)", "covariates: age", "-4.2", "1 lies below",
                  "group/desc-combat_dwimap.tsv", "Johnson et al. 2007"):
        assert words in seen.text
    none = check(page.group(study, outliers[:0], between[:0], effects, [], {}, chosen=[]))
    assert "None." in none.text


def test_group_page_tells_what_is_doubtful(rng):
    model = {"Model": {"Description": "Warp"}, "Batches": ["B"], "ReferenceBatch": "A"}
    fitted = Fitted({}, model, {"harmonize_mica_toA": None}, ["A has <3> participants."])
    study = make_study(rng)
    between = agreement.compare_tables(study.statistics, list(study.features), {})
    effects = biology.judge_in_sample(study.statistics, list(study.features), {})
    seen = check(page.group(study, pd.DataFrame(), between, effects, [],
                            {"harmonize_mica": fitted}, chosen=[]))
    assert "A has <3> participants." in seen.text


def effect(ratio, low, high, **more):
    found = biology.Ratio(2e-6, ratio * 2e-6, ratio, low, high)
    return {"effect": "age", "people": 8, **found._asdict(), "reference": 2e-6,
            "verdict": biology.verdict(found, 2e-6), "batch": "B", **more}


def test_group_page_tells_what_is_left_of_peoples_differences(rng):
    """Lost effects are red and in a warning above; undecided ones have their interval, or say that
    it has no ends. Errors that rose are red, too."""
    study = make_study(rng)
    inside = {"shell": "b1000", "tissue": "wm"}
    found = pd.DataFrame([effect(0.71, 0.6, 0.82, measure="md", **inside),
                          effect(0.9, 0.3, 1.6, measure="fa", **inside),
                          effect(1.3, 1.1, 1.5, measure="fa", **inside),
                          effect(0.9, np.nan, np.nan, measure="fa", **inside)])
    folds = pd.DataFrame([{
        "batch": "B", "fold": k, "participant": str(k), "measure": m, **inside, "nmse_before": 0.2,
        "nmse_after": 0.1 if m == "fa" else 0.3, "bias_before": -0.02, "bias_after": 0.01}
        for k in (1, 2) for m in ("fa", "md")])
    model = {"Model": {"Description": "Warp"}, "Batches": ["B"], "ReferenceBatch": "A"}
    fitted = Fitted({"desc-mica_folds": folds, "desc-mica_biology": found}, model,
                    {"harmonize_mica_toA": None}, ["age is lost"])
    tables = pd.DataFrame([effect(0.5, 0.4, 0.6, measure="dti_md_mean", data="combat")])
    text = page.group(study, pd.DataFrame(), agreement.compare_tables(study.statistics, [], {}),
                      tables, [], {"harmonize_mica": fitted}, chosen=[])
    seen = check(text)
    for words in ("slope over age of MD in white matter, b1000, B 8 2e-06 1.42e-06 2e-06 lost "
                  "(ratio 0.71, 95 % interval 0.60 to 0.82)",
                  "cannot be told (ratio 0.9, 95 % interval 0.30 to 1.60)",
                  "cannot be told (ratio 0.9, 95 % interval without ends)", "-0.02 → +0.01",
                  "More than 10 % was lost from: slope over age of dti_md in the brain, B, combat",
                  "slope over age of dti_md in the brain, B, combat 8 2e-06 1e-06 lost"):
        assert words in seen.text
    assert text.count('<span class="bad">lost') == 2
    assert text.count('<span class="bad">exaggerated') == 1 and '<span class="bad">+50 %' in text
    assert '<span class="bad">-50 %' not in text


@pytest.mark.parametrize("batches", [1, 3, 30])
def test_group_of_any_size(rng, batches):
    table = pd.DataFrame({"batch": [f"A very long name of a scanner {i}" for i in range(batches)],
                          "f_mean": rng.normal(size=batches)})
    table.loc[0, "f_mean"] = np.nan
    for figure in distributions.of_group(Cohort(table, ("f_mean",)), {}):
        ElementTree.fromstring(figure.svg)
    assert distributions.of_group(Cohort(table), {}) == []


@pytest.mark.parametrize("site,shown", [
    ("Prisma $1.5T_$", "Prisma $1.5T_$"), (r"$\frac{$", r"$\frac{$"), ("a <b> & {c} %s", None),
    ("bell\x07", "bell\ufffd")])
def test_any_name_of_a_site_can_be_drawn(rng, site, shown):
    """As text: neither as mathematics nor as markup."""
    table = pd.DataFrame({"batch": [site, "other"] * 3, "f_mean": rng.normal(size=6)})
    (figure,) = distributions.of_group(Cohort(table, ("f_mean",)), {})
    texts = [e.text for e in ElementTree.fromstring(figure.svg).iter() if e.text]
    assert (shown or site) in texts
