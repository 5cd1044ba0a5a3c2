"""One contract, every method that is applied to images."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from dipy.core.sphere import HemiSphere, disperse_charges
from scipy.spatial.transform import Rotation

from bidsapp import blocks, checkpoint, kinds, methods, sh
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.microstructure import maps
from bidsapp.simulate.noise import mean as rician_mean
from bidsapp.volumetric.estimator import VolumeEstimator
from support import travelling_heads, untrained_volumes

ESTIMATORS = methods.names("estimate_")
VOLUMETRIC = [n for n in ESTIMATORS if isinstance(methods.get(n), VolumeEstimator)]
"""Estimators by networks on volumes: what they say of a voxel depends on those around it."""
UNPAIRED = ("harmonize_mica", "harmonize_rish")
"""Harmonizers that learn from any people of two batches; the others (but ComBat, which works on
tables) from people scanned in both."""
DENOISERS = methods.names("denoise_")
PAIRED = sorted(set(methods.names("harmonize_")) - {*UNPAIRED, "harmonize_combat"})

EQUIVARIANT = {"estimate_dti": ("direction",), "estimate_smt": (), "estimate_scnn2": ("odf",),
               "estimate_noddi": ("odf",), "estimate_scnn3": ("odf",)}
"""Methods that claim rotation equivariance, with the maps that turn; the others stay."""

UPSAMPLERS = methods.names("upsample_")
ANY_TARGET = ("upsample_gp", "upsample_sh")
"""Upsamplers that need no training, take any table and claim rotation equivariance."""


def acquisition(b=(1000, 2200), n=24, seed=5):
    xyz = np.random.default_rng(seed).normal(size=(n, 3))
    sphere = HemiSphere(xyz=xyz / np.linalg.norm(xyz, axis=1, keepdims=True))
    g = disperse_charges(sphere, 300)[0].vertices
    return Acquisition(np.r_[0, 0, np.repeat(b, n)],
                       np.r_[np.zeros((2, 3)), np.tile(g, (len(b), 1))])


def brain(acq, rng, rotation=None, sd=4.0, anatomy=None):
    """(7, 8, 9) voxels: random tensors, Rician noise, and some voxels of every awkward kind.
    anatomy: a generator of the tensors alone, for people who are alike."""
    mask = np.zeros((7, 8, 9), bool)
    mask[1:6, 2:7, 1:8] = True
    n = int(mask.sum())
    drawn = rng if anatomy is None else anatomy
    axes = np.linalg.qr(drawn.normal(size=(n, 3, 3)))[0]
    values = drawn.uniform(0.2e-3, 2.2e-3, (n, 1, 3))
    d = axes * values @ axes.transpose(0, 2, 1)
    turn = np.eye(3) if rotation is None else rotation
    signal = 400 * np.exp(-np.einsum("nij,vij->vn", acq.btensors, turn @ d @ turn.T))
    noise = rng.normal(0, sd, (2, *signal.shape))
    signal = np.hypot(signal + noise[0], noise[1])
    signal[3], signal[11, 4], signal[17, :2] = 0, -2, 0
    signal[23] = np.linspace(5, 30, signal.shape[1])  # rises with b
    return Dwi(signal.astype(np.float32), mask, np.diag([2.0, 2.0, 2.0, 1.0]), acq, sd)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of models of the group level, for the methods without bundled weights, and for those
    whose bundled weights are slow."""
    folder = tmp_path_factory.mktemp("models")
    method = methods.get("estimate_mlp2", context=kinds.MethodContext(sloppy=True))
    cohort = kinds.Cohort(pd.DataFrame({"snr_b0": [50.0]}), acquisitions={"one": acquisition()})
    settings = kinds.TrainingSettings(max_steps=20)
    trainings = {**method.fit(cohort, settings).checkpoints, **{
        f"{n}_any": untrained_volumes.checkpoint(n) for n in VOLUMETRIC}}
    for name, trained in trainings.items():
        for file, content in checkpoint.pack(trained).items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file).write_bytes(content)
    return folder


@pytest.fixture(params=ESTIMATORS)
def method(request, models):
    # the contract holds for networks of any quality
    return methods.get(request.param, context=kinds.MethodContext(sloppy=True, models=models))


def close(name, a, b):
    """Equal to float32 rounding of the fit, relative to the size of the map."""
    scale = max(float(np.abs(a).max()), 1e-12)
    np.testing.assert_allclose(b / scale, a / scale, atol=2e-4, err_msg=name)


def test_there_are_estimators():
    assert {"estimate_dti", "estimate_smt"} <= set(ESTIMATORS)


def test_refuses_a_missing_shell(method, rng):
    dwi = brain(acquisition(b=(1000,), n=5), rng)
    with pytest.raises(Refusal, match=r"[Nn]eeded|[Rr]equired"):
        method.check(dwi.acquisition)
    with pytest.raises(Refusal):
        method.apply(dwi, "cpu")


def test_leaves_its_input_unchanged(method, rng):
    dwi = brain(acquisition(), rng)
    before = dwi.signal.copy()
    method.apply(dwi, "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    with pytest.raises(ValueError, match="read-only"):
        dwi.signal[0, 0] = 1


def test_is_finite_complete_and_in_range(method, rng):
    dwi = brain(acquisition(), rng)
    derived, outputs = method.apply(dwi, "cpu"), method.outputs
    assert set(derived.maps) == set(outputs["maps"])
    assert {"name", "Description", "URL"} <= set(outputs["model"])
    json.dumps([dict(derived.counts), dict(derived.parameters)])
    assert all(isinstance(v, str) or (isinstance(v, int) and v >= 0)
               for v in derived.counts.values())
    stems = [(o.get("suffix"), *sorted(o["entities"].items())) for o in outputs["maps"].values()]
    assert len(set(stems)) == len(stems)
    for name, values in derived.maps.items():
        output = outputs["maps"][name]
        assert {"entities", "Description", "Units", "range", "report"} <= set(output)
        assert values.dtype == np.float32
        assert len(values) == len(dwi.signal)
        assert np.isfinite(values).all()
        low, high = output["range"]
        assert low is None or values.min() >= low
        assert high is None or values.max() <= np.float32(high)
        if values.ndim > 1:
            assert output["OrientationEncoding"]["EncodingAxis"] == 3
        assert (output["entities"].get("stat") == "std") == ("Uncertainty" in output)


def test_is_independent_of_voxel_order(method, rng):
    if method.name in VOLUMETRIC:
        pytest.skip("takes the voxels around each")
    dwi = brain(acquisition(), rng)
    order = rng.permutation(len(dwi.signal))
    shuffled = Dwi(dwi.signal[order], dwi.mask, dwi.affine, dwi.acquisition, dwi.noise_sd)
    one, other = method.apply(dwi, "cpu"), method.apply(shuffled, "cpu")
    assert one.counts == other.counts
    for name, values in one.maps.items():
        close(name, values[order], other.maps[name])


def test_is_independent_of_block_size(method, rng, monkeypatch):
    """Voxels without holes share a quicker path; small blocks of them take it."""
    if method.name in VOLUMETRIC:
        pytest.skip("its blocks are those of a grid: see test_apply")
    dwi = brain(acquisition(), rng)
    whole = method.apply(dwi, "cpu").maps
    own = __import__(type(method).__module__, fromlist=["map_voxels"])
    module = own if hasattr(own, "map_voxels") else maps
    monkeypatch.setattr(module, "map_voxels", lambda function, signal, device, block=0:
                        blocks.map_voxels(function, signal, device, 5))
    for name, values in method.apply(dwi, "cpu").maps.items():
        close(name, whole[name], values)


def test_turns_with_the_head(method):
    """The same noise on a turned head and turned gradients: scalars equal, directions turned."""
    if method.name not in EQUIVARIANT:
        pytest.skip("claims no equivariance")
    turn = Rotation.from_euler("zyx", [40, -25, 70], degrees=True).as_matrix()
    acq = acquisition()
    one = method.apply(brain(acq, np.random.default_rng(3)), "cpu").maps
    other = method.apply(brain(acq.rotated(turn), np.random.default_rng(3), turn), "cpu").maps
    # where noise is beyond a network's range, rounding may decide where its search ends
    sane = one["flag"] < 2 if "flag" in one else slice(None)
    for name, values in one.items():
        if name == "odf":
            expected = sh.rotate(torch.from_numpy(values), torch.from_numpy(turn)).numpy()
            close(name, expected[sane], other[name][sane])
        elif name in EQUIVARIANT[method.name]:
            sharp = (one["fa"] > 0.1) & (one["fa"] < 0.99)
            cosine = np.abs(((values @ turn.T) * other[name]).sum(1))[sharp]
            assert np.quantile(cosine, 0.01) > 0.9999
        else:
            # the SD of a signal that looks like none of the training is rounded coarsely, too
            rows = one["flag"] == 0 if "flag" in one and name.endswith("_std") else sane
            close(name, values[rows], other[name][rows])


@pytest.fixture(params=DENOISERS)
def denoiser(request):
    return methods.get(request.param)


def test_denoiser_leaves_its_input_unchanged(denoiser, rng):
    dwi = brain(acquisition(), rng)
    before = dwi.signal.copy()
    result = denoiser.denoise(dwi, "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    assert result.signal.shape == before.shape and result.signal.dtype == np.float32
    assert np.isfinite(result.signal).all() and not np.shares_memory(result.signal, dwi.signal)
    json.dumps([dict(result.counts), dict(result.parameters)])
    assert all(isinstance(v, int) and v >= 0 for v in result.counts.values())
    assert {"Description", "Units"} <= set(denoiser.outputs["signal"])


def test_denoiser_is_independent_of_voxel_order_and_units(denoiser, rng):
    dwi = brain(acquisition(), rng)
    one = denoiser.denoise(dwi, "cpu").signal
    order = rng.permutation(len(dwi.signal))
    shuffled = Dwi(8 * dwi.signal[order], dwi.mask, dwi.affine, dwi.acquisition, 8 * dwi.noise_sd)
    close("signal", one[order], denoiser.denoise(shuffled, "cpu").signal / 8)


def test_denoiser_is_independent_of_block_size(denoiser, rng, monkeypatch):
    dwi = brain(acquisition(), rng)
    whole = denoiser.denoise(dwi, "cpu").signal
    module = __import__(type(denoiser).__module__, fromlist=["map_voxels"])
    monkeypatch.setattr(module, "map_voxels", lambda function, signal, device, block=0:
                        blocks.map_voxels(function, signal, device, 5))
    close("signal", whole, denoiser.denoise(dwi, "cpu").signal)


def test_denoiser_refuses_what_it_does_not_support(denoiser, rng):
    for dwi in (brain(acquisition(n=3), rng), brain(acquisition()[2:], rng)):
        with pytest.raises(Refusal, match=r"needed|required"):
            denoiser.check(dwi.acquisition)
        with pytest.raises(Refusal):
            denoiser.denoise(dwi, "cpu")
    assert not denoiser.violations(acquisition())


def test_unknown_names_say_what_there_is():
    with pytest.raises(UsageError, match=r"(?s)estimate_dti.*Did you mean estimate_dti\?"):
        methods.get("dtii", "estimate")
    with pytest.raises(UsageError, match=r"Available to estimate are: estimate_.*estimate_dti"):
        methods.get("qbi", "estimate")
    with pytest.raises(UsageError, match="Available to correct are: none"):
        methods.get("anything", "correct")
    assert methods.get("dti", "estimate").name == methods.get("estimate_dti").name


def test_combat_is_for_tables(rng):
    combat = methods.get("harmonize_combat")
    dwi = brain(acquisition(), rng)
    with pytest.raises(Refusal, match="tables"):
        combat.check(dwi.acquisition)


@cache
def taught(name):
    """By pairs, which must show tissue: a brief training with the heads of `travelling_heads`."""
    found = travelling_heads.sloppy_method(name)
    study = travelling_heads.study(travelling_heads.PEOPLE[:2], max_steps=3)
    return found, *found.fit(*study).checkpoints.values()


@cache
def taught_by_groups(name):
    acq, rng = acquisition(), np.random.default_rng(20)
    runs = {f"sub-{i}": person(rng) for i in range(6)}
    table = pd.DataFrame({"participant": list("012345"), "run": list(runs),
                          "batch": list("AAABBB"), "snr_b0": 100.0})
    cohort = kinds.Cohort(
        table, reference_batch="A", acquisitions=dict.fromkeys(runs, acq),
        load=lambda name: bent(runs[name]) if name > "sub-2" else runs[name])
    found = methods.get(name, context=kinds.MethodContext(sloppy=True))
    (made,) = found.fit(cohort, kinds.TrainingSettings()).checkpoints.values()
    return found, made


@pytest.fixture(params=[*UNPAIRED, *PAIRED])
def harmonizer(request):
    """(method, checkpoint) that maps batch B, with more diffusion, to A."""
    return (taught if request.param in PAIRED else taught_by_groups)(request.param)


def person(rng, sd=4.0):
    return brain(acquisition(), rng, sd=sd, anatomy=np.random.default_rng(9))


def bent(dwi):
    signal = dwi.signal.copy()
    s0 = dwi.mean_b0[:, None]
    there = s0[:, 0] > 0
    signal[there, 2:] = (s0 * np.clip(dwi.signal[:, 2:] / np.maximum(s0, 1), 0, None) ** 1.3)[there]
    return Dwi(signal, dwi.mask, dwi.affine, dwi.acquisition, dwi.noise_sd)


def test_harmonizer_leaves_its_input_unchanged(harmonizer, rng):
    method, model = harmonizer
    dwi = person(rng)
    before, tensors = dwi.signal.copy(), {k: v.clone() for k, v in model.tensors.items()}
    made = method.harmonize(dwi, model, "B", "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    assert all(torch.equal(v, tensors[k]) for k, v in model.tensors.items())
    assert made.signal.shape == before.shape and made.signal.dtype == np.float32
    assert np.isfinite(made.signal).all() and not np.shares_memory(made.signal, dwi.signal)
    json.dumps([dict(made.counts), dict(made.parameters)])
    assert all(isinstance(v, int) and v >= 0 for v in made.counts.values())
    assert {"Description", "Units"} <= set(method.outputs["signal"])


def test_harmonizer_is_independent_of_voxel_order(harmonizer, rng):
    """The result does not depend on the order of the image's axes, only on neighbourhood."""
    method, model = harmonizer
    dwi = person(rng)
    order = np.arange(dwi.mask.size).reshape(dwi.mask.shape)[::-1].transpose(2, 0, 1)
    mask = dwi.mask[::-1].transpose(2, 0, 1)
    row = np.cumsum(dwi.mask.ravel()) - 1
    turned = np.eye(4)
    turned[:3, :3] = dwi.affine[:3, :3] @ np.diag([-1, 1, 1])[:, [2, 0, 1]]
    turned[:3, 3] = dwi.affine[:3, :3] @ [dwi.mask.shape[0] - 1, 0, 0]
    other = Dwi(dwi.signal[row[order[mask]]], mask, turned, dwi.acquisition, dwi.noise_sd)
    one = method.harmonize(dwi, model, "B", "cpu").signal
    close("signal", one[row[order[mask]]], method.harmonize(other, model, "B", "cpu").signal)


def test_harmonizer_goes_the_right_way(harmonizer, rng):
    method, model = harmonizer
    if method.name in PAIRED:
        pytest.skip("what pairs teach is measured in test_paired")
    dwi = person(rng, sd=0.5)
    before = bent(dwi).signal - dwi.signal
    after = method.harmonize(bent(dwi), model, "B", "cpu").signal - dwi.signal
    assert np.square(after).mean() < 0.5 * np.square(before).mean()


def test_harmonizer_refuses_what_it_cannot_carry(harmonizer, rng):
    method, model = harmonizer
    dwi = person(rng)
    without = Dwi(dwi.signal[:, 2:], dwi.mask, dwi.affine, dwi.acquisition[2:])
    with pytest.raises(Refusal, match="Needed"):
        method.harmonize(without, model, "B", "cpu")


def test_card_of_a_harmonizer_makes_the_round_trip(harmonizer, rng, tmp_path):
    method, model = harmonizer
    for file, content in checkpoint.pack(model).items():
        (tmp_path / file).write_bytes(content)
    again = checkpoint.load(tmp_path, method.name)
    card = again.card
    assert (card.reference_batch, card.batches) == ("A", ("B",))
    assert card.trained_for == model.card.trained_for and card.trained_for.snr
    assert set(card.training["participants"]) == {"A", "B"}
    assert json.loads(json.dumps(card.metrics)) == dict(model.card.metrics)
    dwi = person(rng)
    np.testing.assert_array_equal(method.harmonize(dwi, again, "B", "cpu").signal,
                                  method.harmonize(dwi, model, "B", "cpu").signal)


@pytest.fixture(params=ANY_TARGET)
def upsampler(request):
    return methods.get(request.param)


def targets(b=(1000, 2200), n=7, seed=8):
    """New directions on the shells of `acquisition`."""
    return acquisition(b, n, seed)[2:]


def test_there_are_upsamplers():
    assert set(ANY_TARGET) <= set(UPSAMPLERS)
    for name in UPSAMPLERS:
        found = methods.get(name)
        assert isinstance(found, kinds.Upsampler)
        assert {"Description", "Units"} <= set(found.outputs["signal"])
        assert found.outputs["maps"] == {}


def test_upsampler_refuses_what_it_cannot_carry(upsampler, rng):
    acq = acquisition(b=(1000,), n=5)
    with pytest.raises(Refusal, match="needed"):
        upsampler.check(acq)
    with pytest.raises(Refusal, match="needed"):
        upsampler.predict(brain(acq, rng), targets(b=(1000,)), "cpu")
    upsampler.check(acquisition())
    spherical = Acquisition(acq.bvals[[0] * 2 + [2] * 20], acq.bvecs[[0] * 2 + [2] * 20],
                            np.zeros(22))
    with pytest.raises(Refusal, match="needed"):
        upsampler.check(spherical)


def test_upsampler_leaves_its_input_unchanged(upsampler, rng):
    dwi, target = brain(acquisition(), rng), targets()
    before, table = dwi.signal.copy(), target.bvecs.copy()
    made = upsampler.predict(dwi, target, "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    np.testing.assert_array_equal(target.bvecs, table)
    for values in (made.signal, made.sd):
        assert values.shape == (len(dwi.signal), len(target)) and values.dtype == np.float32
        assert np.isfinite(values).all() and values.min() >= 0
    json.dumps([dict(made.counts), dict(made.parameters), list(made.notices)])


def test_upsampler_gives_no_negative_magnitude_and_keeps_signs_of_real_signals(upsampler, rng):
    dwi = brain(acquisition(), rng)
    dwi = replace(dwi, signal=dwi.signal - 200, magnitude=False)
    assert upsampler.predict(dwi, targets(), "cpu").signal.min() < 0


def test_upsampler_is_independent_of_voxel_order(upsampler, rng):
    dwi, target = brain(acquisition(), rng), targets()
    order = rng.permutation(len(dwi.signal))
    shuffled = Dwi(dwi.signal[order], dwi.mask, dwi.affine, dwi.acquisition, dwi.noise_sd)
    one, other = (upsampler.predict(d, target, "cpu") for d in (dwi, shuffled))
    close("signal", one.signal[order], other.signal)
    close("sd", one.sd[order], other.sd)


def test_upsampler_is_independent_of_block_size(upsampler, rng, monkeypatch):
    dwi, target = brain(acquisition(), rng), targets()
    whole = upsampler.predict(dwi, target, "cpu")
    own = __import__(type(upsampler).__module__, fromlist=["map_voxels"])
    monkeypatch.setattr(own, "map_voxels", lambda function, signal, device, block=0:
                        blocks.map_voxels(function, signal, device, 5))
    made = upsampler.predict(dwi, target, "cpu")
    close("signal", whole.signal, made.signal)
    close("sd", whole.sd, made.sd)


def test_upsampler_is_independent_of_the_order_of_volumes_and_targets(upsampler, rng):
    dwi, target = brain(acquisition(), rng), targets()
    order, back = rng.permutation(len(dwi.acquisition)), rng.permutation(len(target))
    shuffled = Dwi(np.ascontiguousarray(dwi.signal[:, order]), dwi.mask, dwi.affine,
                   dwi.acquisition[order], dwi.noise_sd)
    one = upsampler.predict(dwi, target, "cpu")
    other = upsampler.predict(shuffled, target[back], "cpu")
    close("signal", one.signal[:, back], other.signal)
    close("sd", one.sd[:, back], other.sd)


def test_upsampler_turns_with_the_head(upsampler):
    """A turned head, measured and predicted along turned directions, has the same signal."""
    turn = Rotation.from_euler("zyx", [40, -25, 70], degrees=True).as_matrix()
    acq, target = acquisition(), targets()
    one = upsampler.predict(brain(acq, np.random.default_rng(3)), target, "cpu")
    other = upsampler.predict(brain(acq.rotated(turn), np.random.default_rng(3), turn),
                              target.rotated(turn), "cpu")
    close("signal", one.signal, other.signal)
    close("sd", one.sd, other.sd)
    # the sign of a direction is none of its business
    flipped = upsampler.predict(brain(acq, np.random.default_rng(3)),
                                Acquisition(target.bvals, -target.bvecs), "cpu")
    close("signal", one.signal, flipped.signal)


def test_upsampler_predicts_a_direction_near_its_truth(upsampler):
    """The error is below the noise of a measurement and far below the anisotropy; the SD agrees."""
    acq, target, sd = acquisition(n=30), targets(), 8.0
    both = concatenate([acq, target])
    clean = brain(both, np.random.default_rng(4), sd=0).signal
    noisy = brain(acq, np.random.default_rng(4), sd=sd)
    made = upsampler.predict(noisy, target, "cpu")
    tissue = np.setdiff1d(np.arange(len(clean)), (3, 11, 17, 23))
    truth = rician_mean(clean[tissue, len(acq):].astype(float), sd)
    error = made.signal[tissue] - truth
    for shell in target.shells:
        columns = shell.indices
        anisotropy = truth[:, columns].std(1)
        assert np.sqrt(np.mean(error[:, columns]**2)) < sd
        assert np.sqrt(np.mean(error[:, columns]**2)) < 0.3 * np.sqrt(np.mean(anisotropy**2))
        ratio = np.mean(error[:, columns]**2) / np.mean(made.sd[tissue][:, columns]**2)
        assert 0.5 < ratio < 2


@pytest.mark.parametrize("name", [n for n in ESTIMATORS
                                  if not isinstance(methods.get(n), kinds.Trainable)])
def test_estimators_need_no_training(name):
    with pytest.raises(UsageError, match="needs no training"):
        methods.trainable(name)
