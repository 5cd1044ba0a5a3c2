"""Bad input: a message with file and remedy, the others finished, nothing half-written."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from support import bids_tree as truth
from support.app import content, image, qsphere, validate
from support.stripes import simulate_stripes

STEM = "sub-01/dwi/sub-01_dwi"


def rewrite(bids, change, dtype=None):
    """The image of sub-01 with `change(data)` for its data."""
    path = bids / f"{STEM}.nii.gz"
    old = nib.load(path)
    new = nib.Nifti1Image(change(np.asarray(old.dataobj).copy()), old.affine, dtype=dtype)
    new.header.set_xyzt_units("mm", "sec")
    nib.save(new, path)


def edit_table(bids, extension, change):
    path = bids / f"{STEM}{extension}"
    np.savetxt(path, np.atleast_2d(change(np.loadtxt(path))), fmt="%.9g")


def scaled(factor, volume):
    def change(vectors):
        vectors[:, volume] *= factor
        return vectors
    return change


def volume_of_nan(data):
    data[..., 5] = np.nan
    return data


def constant_volume(data):
    data[..., 7] = 0
    return data


def not_fetched(bids):
    path = bids / f"{STEM}.nii.gz"
    path.unlink()
    path.symlink_to("../../.git/annex/objects/x")


def flip_a_bit(bids):
    path = bids / f"{STEM}.nii.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def wrapped(data):
    """Brightest in the middle, as ventricles are: what exceeds 32 767 wraps round."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in truth.SHAPE), indexing="ij")
    bright = data * (15 + 40 * np.exp(-8 * (x**2 + y**2 + z**2)))[..., None]
    return bright.astype(np.int64).astype(np.int16)


def in_sidecar(text):
    """Key and value added to the sidecar of sub-01, as text."""
    def damage(bids):
        path = bids / f"{STEM}.json"
        path.write_text(f"{path.read_text().rstrip()[:-1]}, {text}}}")
    return damage


DAMAGE = {
    "NaN in the sform": (lambda b: truth.damage_header(b / f"{STEM}.nii.gz", srow_x=np.nan),
                         ".nii.gz", "Convert"),
    "nested sidecar": (in_sidecar(f'"ProtocolName": {"[" * 2000}{"]" * 2000}'), ".json",
                       "orrect"),
    "δ of 10⁴⁰⁰": (in_sidecar(f'"DiffusionPulse_delta_s": 1{"0" * 400}'), ".json", "too large"),
    "flipped bit": (flip_a_bit, ".nii.gz", "again"),
    "longer than its header says": (
        lambda b: (b / f"{STEM}.nii.gz").write_bytes(
            (b / f"{STEM}.nii.gz").read_bytes() + gzip.compress(b"more")), ".nii.gz", "again"),
    "complex": (lambda b: rewrite(b, lambda d: d.astype(np.complex64)), ".nii.gz", "part-mag"),
    "b times 10⁴": (lambda b: edit_table(b, ".bval", lambda v: 1e4 * v), ".bval", "s/mm²"),
    "b in ms/µm²": (lambda b: edit_table(b, ".bval", lambda v: v / 1e3), ".bval", "by 1000"),
    "constant": (lambda b: rewrite(b, lambda d: np.full_like(d, 700)), ".nii.gz", "shows nothing"),
    "constant volume": (lambda b: rewrite(b, constant_volume), ".nii.gz", "Remove them"),
    "negative": (lambda b: rewrite(b, np.negative), ".nii.gz", "Check the image"),
    "wrapped": (lambda b: rewrite(b, wrapped), ".nii.gz", "unsigned 16-bit"),
    "other order": (lambda b: rewrite(b, lambda d: d[..., ::-1]), ".nii.gz", "same order"),
    "no bval": (lambda b: (b / f"{STEM}.bval").unlink(), ".bval", "beside it"),
    "no bvec": (lambda b: (b / f"{STEM}.bvec").unlink(), ".bvec", "beside it"),
    "short bval": (lambda b: edit_table(b, ".bval", lambda v: v[:-1]), ".bval", "xport"),
    "short bvec": (lambda b: edit_table(b, ".bvec", lambda v: v[:, :-1]), ".bvec", "xport"),
    "short image": (lambda b: rewrite(b, lambda d: d[..., :-2]), ".nii.gz", "xport"),
    "text in bval": (lambda b: (b / f"{STEM}.bval").write_text("a b c"), ".bval", "number"),
    "zero vector": (lambda b: edit_table(b, ".bvec", scaled(0, 4)), ".bvec", "direction"),
    "long vector": (lambda b: edit_table(b, ".bvec", scaled(1.5, 4)), ".bvec", "normalise"),
    "volume of NaN": (lambda b: rewrite(b, volume_of_nan), ".nii.gz", "Remove"),
    "truncated": (lambda b: os.truncate(b / f"{STEM}.nii.gz", 20_000), ".nii.gz", "again"),
    "zero bytes": (lambda b: os.truncate(b / f"{STEM}.nii.gz", 0), ".nii.gz", "again"),
    "3-D": (lambda b: rewrite(b, lambda d: d[..., 0]), ".nii.gz", "whole series"),
    "all zero": (lambda b: rewrite(b, np.zeros_like), ".nii.gz", "give a mask"),
    "broken sidecar": (lambda b: (b / f"{STEM}.json").write_text("{"), ".json", "orrect"),
    "only b0": (lambda b: edit_table(b, ".bval", np.zeros_like), ".bval", "weighted"),
    "no b0": (lambda b: edit_table(b, ".bval", lambda v: np.maximum(v, 700)), ".bval", "b0"),
    "not fetched": (not_fetched, ".nii.gz", "datalad get"),
}


QUICK = ("truncated", "no bvec", "text in bval", "NaN in the sform")
"""Damage of the image, its tables and its header; each kind is also tested where it is read."""


@pytest.mark.parametrize("name", [name if name in QUICK else
                                  pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE])
def test_one_bad_participant(name, bids_tree, tmp_path, capsys):
    bids, out = bids_tree(), tmp_path / "out"
    damage, file, remedy = DAMAGE[name]
    damage(bids)
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 1
    text = capsys.readouterr().err
    told = [line for line in text.splitlines() if " ERROR " in line]
    assert any("sub-01" in t and file in t and remedy in t for t in told), told
    assert "Traceback" not in text
    assert not list(out.glob("sub-01/dwi/*")), "nothing of the failed run is left"
    assert (out / "sub-02/dwi/sub-02_model-tensor_param-fa_dwimap.nii.gz").exists()
    (status,) = out.glob("sub-01/log/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"
    (crash,) = out.glob("sub-01/log/*/crash-*.txt")
    assert remedy in crash.read_text()
    page = (out / "sub-01.html").read_text()
    assert remedy in page and page.rstrip().endswith("</html>")
    assert validate(out) == []


@pytest.mark.slow
def test_flipped_vectors_are_flagged(tmp_path, rng, capsys):
    """Maps are made, and log, page and QC say what is wrong and how to mend it."""
    bids, out = truth.write_dataset(tmp_path / "bids", ("01",)), tmp_path / "out"
    right = simulate_stripes(rng, matrix=truth.affine())
    image = nib.Nifti1Image(right.unmask(right.signal), right.affine)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, bids / f"{STEM}.nii.gz")
    np.savetxt(bids / f"{STEM}.bval", right.acquisition.bvals[None], fmt="%g")
    vectors = truth.fsl(right.acquisition.bvecs, right.affine).T
    for sign, alarm in ((1, False), (-1, True)):
        np.savetxt(bids / f"{STEM}.bvec", vectors * [[sign], [1], [1]], fmt="%.9f")
        assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
        told = "b-vectors are probably wrong. With the " in capsys.readouterr().err
        record = json.loads((out / "sub-01/log/sub-01_dwi.json").read_text())
        qc = record["qc"]
        assert told == alarm and (qc["fibre_coherence_best"] > qc["fibre_coherence"]) == alarm
        assert any("correct the .bvec" in n for n in record["warnings"]) == alarm
        assert ("row negated in the .bvec" in (out / "sub-01.html").read_text()) == alarm
    described = json.loads((out / "sub-01/dwi/sub-01_desc-image_qc.json").read_text())
    assert described["fibre_coherence"]["Units"] == "1"


def test_failed_then_mended(bids_tree, tmp_path):
    bids, out = bids_tree(("01",)), tmp_path / "out"
    good = (bids / f"{STEM}.bvec").read_bytes()
    edit_table(bids, ".bvec", scaled(0, 4))
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 1
    (crash,) = out.glob("sub-01/log/*/crash-sub-01.txt")
    assert "Traceback" in crash.read_text()
    (bids / f"{STEM}.bvec").write_bytes(good)
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    assert list(out.glob("sub-01/dwi/*param-fa_dwimap.nii.gz"))


def test_failure_keeps_what_an_earlier_run_made(bids_tree, tmp_path):
    bids, out = bids_tree(("01",)), tmp_path / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    before = {n: d for n, d in content(out).items() if "/dwi/" in n}
    edit_table(bids, ".bvec", scaled(0, 4))
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 1
    assert {n: d for n, d in content(out).items() if "/dwi/" in n} == before


def test_memory_that_ran_out_has_words(bids_tree, tmp_path, monkeypatch, capsys):
    """Python's MemoryError has none."""
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr("bidsapp.series.read_volume", exhausted)
    assert qsphere(bids_tree(("01",)), tmp_path / "out", "participant", "--estimate", "dti") == 1
    assert "sub-01: memory ran out. Process fewer participants" in capsys.readouterr().err


@pytest.mark.slow
def test_record_of_another_session_that_was_cut_off(bids_tree, tmp_path):
    bids, out = bids_tree(("01",), ("a", "b")), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti")
    assert qsphere(*argv) == 0
    before = content(out)
    for record, size in (("sub-01_ses-b_dwi", 100), ("page", 20)):
        os.truncate(out / f"sub-01/log/{record}.json", size)
    assert qsphere(*argv, "--session-label", "a") == 0
    page = (out / "sub-01.html").read_text()
    assert "sub-01_ses-b" in page and page.rstrip().endswith("</html>")
    assert qsphere(*argv) == 0
    assert content(out) == before


@pytest.mark.slow
def test_results_that_were_removed_are_made_again(bids_tree, tmp_path, capsys):
    """Although their page is left, whose record went with them; the page of someone else stays."""
    bids, out = bids_tree(), tmp_path / "out"
    argv = (bids, out, "participant", "--estimate", "dti")
    assert qsphere(*argv) == 0
    before = content(out)
    shutil.rmtree(out / "sub-02")
    truth.write_run(bids / "sub-02/dwi/sub-02", seed=99)
    (out / "sub-01.html").unlink()
    (out / "sub-01.html").write_text("<html><title>my notes</title></html>")
    shutil.rmtree(out / "sub-01/log")
    assert qsphere(*argv) == 1
    assert content(out).keys() == before.keys()
    assert f"{out / 'sub-01.html'} exists and was not written by QSphere" in \
        capsys.readouterr().err
    assert "my notes" in (out / "sub-01.html").read_text()
    (status,) = out.glob("sub-02/log/*/status.json")
    assert status.parent.name in (out / "sub-02.html").read_text()


def test_stop_on_first_crash(bids_tree, tmp_path):
    bids, out = bids_tree(), tmp_path / "out"
    os.truncate(bids / f"{STEM}.nii.gz", 0)
    assert qsphere(bids, out, "participant", "--stop-on-first-crash") == 1
    assert not (out / "sub-02").exists()


@pytest.mark.slow
def test_stop_on_first_crash_with_several_at_a_time(bids_tree, tmp_path):
    """Participants that are being processed are finished and listed; the others are not begun."""
    labels = [f"{i:02}" for i in range(1, 9)]
    bids, out = bids_tree(labels), tmp_path / "out"
    os.truncate(bids / f"{STEM}.nii.gz", 0)
    done = subprocess.run([sys.executable, "-m", "bidsapp", bids, out, "participant",
                           "--preprocess", "none", "--estimate", "dti", "--nprocs", "2",
                           "--omp-nthreads", "1", "--stop-on-first-crash"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 1 and "not everything was done for sub-01." in done.stderr
    ran = {p.name for p in out.glob("sub-*/")}
    listed = {line.split("\t")[0] for line in
              (out / "participants.tsv").read_text().splitlines()[1:]}
    assert listed == ran and 1 <= len(ran) < len(labels)


def test_empty_mask(bids_tree, tmp_path, capsys):
    bids = bids_tree()
    mask = tmp_path / "masks/sub-01/dwi/sub-01_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros(truth.SHAPE, np.uint8), truth.affine()), mask)
    assert qsphere(bids, tmp_path / "out", "participant", "--estimate", "dti",
                   "--derivatives", f"masks={tmp_path / 'masks'}") == 1
    assert f"{mask}: the mask is empty" in capsys.readouterr().err
    assert list(tmp_path.glob("out/sub-02/dwi/*param-fa_dwimap.nii.gz"))


def maps(out):
    return {p.name: image(p) for p in out.glob("sub-01/dwi/*.nii.gz")}


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda b: edit_table(b, ".bvec", np.transpose),
    lambda b: edit_table(b, ".bval", lambda v: np.transpose(v[None])),
], ids=["bvec of N×3", "bval in a column"])
def test_tables_that_mean_the_same(change, bids_tree, tmp_path):
    bids = bids_tree(("01",))
    assert qsphere(bids, tmp_path / "a", "participant", "--estimate", "dti") == 0
    change(bids)
    assert qsphere(bids, tmp_path / "b", "participant", "--estimate", "dti") == 0
    first, second = maps(tmp_path / "a"), maps(tmp_path / "b")
    assert all(np.allclose(first[n], second[n], rtol=1e-4, atol=1e-5) for n in first)


def test_integers_with_scaling(bids_tree, tmp_path):
    bids = bids_tree(("01",))
    assert qsphere(bids, tmp_path / "a", "participant", "--estimate", "dti") == 0
    rewrite(bids, lambda d: d, dtype=np.int16)
    slope = nib.load(bids / f"{STEM}.nii.gz").dataobj.slope
    assert slope != 1
    assert qsphere(bids, tmp_path / "b", "participant", "--estimate", "dti") == 0
    first, second = maps(tmp_path / "a"), maps(tmp_path / "b")
    fa = "sub-01_model-tensor_param-fa_dwimap.nii.gz"
    assert np.allclose(first[fa], second[fa], atol=1e-3)


@pytest.mark.slow
def test_some_nan_and_negative_values_are_counted(bids_tree, tmp_path):
    def change(data):
        data[7, 8, 9, 3] = np.nan
        data[6, 8, 9, 3] = np.inf
        data[7, 7, 9, 4] = -20
        return data

    bids = bids_tree(("01",))
    rewrite(bids, change)
    assert qsphere(bids, tmp_path / "out", "participant") == 0
    record = json.loads((tmp_path / "out/sub-01/log/sub-01_dwi.json").read_text())
    assert 2 in [v for k, v in record["qc"].items() if "invalid" in k or "nan" in k.lower()]
    assert 1 in [v for k, v in record["qc"].items() if "negative" in k]
    assert all(np.isfinite(values).all() for values in maps(tmp_path / "out").values())


def test_work_dir_that_cannot_be_made(bids_tree, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert qsphere(bids_tree(), tmp_path / "out", "participant", "-w", tmp_path / "file/x") == 2
    assert "--work-dir" in capsys.readouterr().err


def test_unknown_participant_beside_a_known_one(bids_tree, tmp_path, capsys):
    bids = bids_tree()
    assert qsphere(bids, tmp_path / "out", "participant", "--participant-label", "02", "99",
                   "--estimate", "dti") == 1
    assert "sub-99 does not exist" in capsys.readouterr().err
    assert list(tmp_path.glob("out/sub-02/dwi/*param-fa_dwimap.nii.gz"))
    assert not (tmp_path / "out/sub-99").exists()


@pytest.mark.parametrize("damage,argv,message", [
    (lambda b: None, ["--participant-label", "99"], "sub-99"),
    (lambda b: [shutil.rmtree(p) for p in b.glob("sub-*/dwi")], [], "dwi"),
    (lambda b: (b / "dataset_description.json").unlink(), [], "dataset_description.json"),
    (shutil.rmtree, [], "not a folder that exists"),
], ids=["nobody", "no dMRI", "no BIDS", "no folder"])
def test_input_that_cannot_be_used(damage, argv, message, bids_tree, tmp_path, capsys):
    bids = bids_tree()
    damage(bids)
    assert qsphere(bids, tmp_path / "out", "participant", *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FULL_DISK = """
mount -t tmpfs -o size={size} tmpfs {folder} || exit 99
{python} -m bidsapp {bids} {folder}/out participant --estimate dti --nprocs 1
code=$?
for image in $(find {folder}/out -name '*.nii.gz' -not -path '*/.staging/*'); do
    gzip -t $image && test -s ${{image%.nii.gz}}.json || echo $image
done
exit $code
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["30k", "120k", "300k"])
def test_disk_full(size, bids_tree, tmp_path):
    """On a small tmpfs, in a mount namespace of its own."""
    bids = bids_tree(("01",))
    (tmp_path / "small").mkdir()
    script = FULL_DISK.format(size=size, folder=tmp_path / "small", bids=bids,
                              python=sys.executable)
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    done = subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True,
                          check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace can be made here: {done.stderr.strip()}")
    assert done.returncode in (1, 2), done.stderr
    assert "no space left on device. Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "", "every image that is visible is whole, with its sidecar"


def test_truncated_but_readable_header(bids_tree, tmp_path, capsys):
    """Cut inside the pixel data of an intact gzip stream."""
    bids = bids_tree(("01",))
    path = bids / f"{STEM}.nii.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    assert qsphere(bids, tmp_path / "out", "participant") == 1
    assert str(path) in (text := capsys.readouterr().err) and "again" in text
