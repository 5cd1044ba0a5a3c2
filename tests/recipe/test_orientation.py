"""Coefficients mean what their sidecars say: evaluated so, by dipy, their peak is the fibre."""

import json

import nibabel as nib
import numpy as np
import pytest
from dipy.core.geometry import cart2sphere
from dipy.reconst import shm

from bidsapp import methods, phantom, sh
from support import bids_tree as truth
from support.app import qsphere

BASES = {"descoteaux": shm.real_sh_descoteaux, "tournier": shm.real_sh_tournier}


def peak(coefficients, encoding, affine):
    """World direction of the maximum of (n,) coefficients, by nothing but the sidecar's keys."""
    assert encoding["Type"] == "sh" and encoding["AntipodalSymmetry"]
    degree = encoding["SphericalHarmonicDegree"]
    assert len(coefficients) == (degree + 1) * (degree + 2) // 2
    points = truth.directions(20_000)
    _, theta, phi = cart2sphere(*points.T)
    basis, m, l = BASES[encoding["SphericalHarmonicBasis"]](
        degree, theta, phi, legacy=encoding["SphericalHarmonicLegacy"])
    assert encoding["SphericalHarmonicOrder"] == "l = 0, 2, 4, ..., and m = -l, ..., l for each l"
    assert list(zip(l, m, strict=True)) == [(i, j) for i in range(0, degree + 1, 2)
                                            for j in range(-i, i + 1)]
    if encoding["SphericalHarmonicNormalization"] == "orthonormal":
        assert np.allclose(basis.T @ basis * 4 * np.pi / len(points), np.eye(len(l)), atol=0.01)
    found = points[np.argmax(basis @ coefficients)]
    axes = {"xyz": np.eye(3),
            "ijk": affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)}
    return axes[encoding["Reference"]] @ found


def degrees(a, b):
    return np.degrees(np.arccos(min(1, abs(a @ b))))


ENCODED = {f"{name}_{key}": entry["OrientationEncoding"] for name in methods.names("estimate_")
           for key, entry in methods.get(name).outputs["maps"].items()
           if entry.get("OrientationEncoding", {}).get("Type") == "sh"}


@pytest.mark.parametrize("name", [*ENCODED, "phantom"])
def test_sidecars_name_the_basis_of_this_program(name):
    """A fibre in the world, as `bidsapp.sh` writes it, on a grid whose axes are not the world's."""
    encoding = ENCODED.get(name) or phantom.ODF_KEYS["OrientationEncoding"]
    fibre = np.array([0.48, -0.6, 0.64])
    assert degrees(peak(sh.basis(8, fibre[None])[0], encoding,
                        truth.affine(turn=(10, 20, 30))), fibre) < 1


def test_every_network_writes_such_coefficients():
    assert {name.split("_")[1] for name in ENCODED} == {"scnn2", "scnn3", "noddi", "mlp2"}


def test_written_densities_point_along_the_fibre(tmp_path):
    """From an image on an angled grid to its maps: one tensor along AXIS in the world."""
    bids = truth.write_dataset(tmp_path / "bids", ("01",), shape=(9, 10, 11),
                               matrix=truth.affine(turn=(12, -20, 35), det=1))
    assert qsphere(bids, tmp_path / "out", "participant", "--estimate", "scnn2") == 0
    path, = tmp_path.glob("out/sub-01/dwi/*model-scnn2_param-odf_dwimap.nii.gz")
    encoding = json.loads(path.with_suffix("").with_suffix(".json").read_text())[
        "OrientationEncoding"]
    image = nib.load(path)
    mean = np.moveaxis(image.get_fdata(), encoding["EncodingAxis"], -1)[4, 5, 5]
    assert degrees(peak(mean, encoding, image.affine), truth.AXIS) < 4
