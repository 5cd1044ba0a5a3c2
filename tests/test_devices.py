"""Every network, step and training on another device, beside the CPU.

The environment variable QSPHERE_TEST_DEVICE names the device (cuda, cuda:1; with cpu the file tests
itself). Without it everything here is skipped. `make gpu` runs it.

Networks and methods are listed by their registries, so that a new one is tested here, too. What is
random is drawn on the CPU for both devices (`SameDraws`), as the generators of two devices differ.
Then two devices differ by rounding alone. The tolerances below are relative to the greatest value
of what is compared. float32 rounds by 6e-8; TF32, which would round by 5e-4, stays off.
"""

import inspect
import os
from dataclasses import fields
from functools import cache
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bidsapp import blocks, checkpoint, domain, kinds, methods, sh, tensor, training, upsample
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.dwi import Dwi
from bidsapp.evaluate import agreement, change
from bidsapp.microstructure import learn
from bidsapp.microstructure.estimator import SphericalMethod
from bidsapp.networks import builder, scnn
from bidsapp.options import MODES
from bidsapp.simulate.likelihood import needs_search
from bidsapp.volumetric import scans
from support import bids_tree, synthetic_head

DEVICE = os.environ.get("QSPHERE_TEST_DEVICE", "")
pytestmark = [
    pytest.mark.skipif(not DEVICE, reason="QSPHERE_TEST_DEVICE names no device, as cuda"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default")]  # drivers warn, too

ONCE = 2e-5
"""One pass, forward or backward: sums of up to 10⁴ float32 terms in another order (6e-6 if their
errors add up like a random walk), and a few layers of them."""

FITTED = 2e-4
"""An estimate, whose least squares or posterior amplify rounding; that of `test_methods`."""

TRAINED = 2e-3
"""After a few steps. Adam divides a gradient by its size, so that rounding decides which way a
weight goes whose gradient is about 0; it matters little for what the network says."""

ESTIMATED = 2e-2
"""An estimate by networks trained one by one: it amplifies what they differ in."""

SHARE = 0.99
"""Share of voxels that must be so near: where a threshold or a search decides, rounding may."""

STEPS = 3
PEOPLE, SITES = ("01", "02", "03"), "AB"
BVALS, AXES = bids_tree.table(((0, 3), (1000, 20), (2000, 20)))
ZOOM = np.array(synthetic_head.ZOOMS) * 2
TRAINABLE = [n for n in methods.names() if isinstance(methods.get(n), kinds.Trainable)
             and not isinstance(methods.get(n), kinds.GroupAnalysis)]


class SameDraws(TorchFunctionMode):
    """Inside, random numbers come from the CPU, and from there to the device that wants them."""

    def __init__(self):
        super().__init__()
        self.twins = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.rand, torch.randn, torch.randint, torch.randperm):
            device = kwargs.pop("device", "cpu")
            if kwargs.get("generator") is not None:
                kwargs["generator"] = self.twin(kwargs["generator"])
            return function(*args, **kwargs).to(device)
        if function in (torch.rand_like, torch.randn_like):
            return function(torch.empty(args[0].shape, dtype=args[0].dtype)).to(args[0].device)
        if function is nn.functional.dropout and kwargs["training"]:
            kept = torch.rand(args[0].shape) >= kwargs["p"]
            return args[0] * kept.to(args[0].device) / (1 - kwargs["p"])
        return function(*args, **kwargs)

    def twin(self, generator):
        """A generator of the CPU that was seeded alike and goes on with it."""
        if generator.device.type == "cpu":
            return generator
        _, twin = self.twins.setdefault(id(generator), (
            generator, torch.Generator().manual_seed(generator.initial_seed())))
        return twin


def array(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def near(found, wanted, tolerance, share=1.0, name="", least=1e-12):
    """At least a share of the rows within the tolerance, and all finite.
    least: that what is compared is taken to be great at least."""
    found, wanted = array(found), array(wanted)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, name
    assert np.isfinite(found).all() and np.isfinite(wanted).all(), name
    found, wanted = (v.reshape(len(v), -1) if v.size > 1 else v.ravel() for v in (found, wanted))
    if not wanted.size:
        return
    if name == "direction":  # its sign is free
        found = found * np.sign((found * wanted).sum(1, keepdims=True))
    away = np.abs(found.astype(float) - wanted) / max(np.abs(wanted).max(), least)
    rows = away.max(-1) if away.ndim > 1 else away
    assert (rows <= tolerance).mean() >= share, (name, np.quantile(rows, [0.5, 0.9, share]))


def near_gradients(found, wanted, tolerance):
    """Those that are 0 but for rounding, as of a bias before a normalisation, are so, too."""
    least = 0.01 * max(np.abs(array(v)).max() for v in wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        near(a, b, tolerance, name=f"gradient {i}", least=least)


def fitted_like(found, wanted, tolerance):
    """Maps by name; standard errors are slopes, which rounding moves ten times as much."""
    for name, values in wanted.items():
        near(found[name], values, tolerance * (10 if name.endswith("_std") else 1), SHARE, name)


def compute(function, turn):
    """Call a function of a device on the CPU (turn 0) and on the other device (turn 1)."""
    with SameDraws():
        return function(("cpu", DEVICE)[turn])


def both(function):
    return [compute(function, turn) for turn in (0, 1)]


@pytest.fixture(autouse=True)
def exact(request):
    """No TF32, before and after; on a GPU, its memory was used where the test says so."""
    def exact_products():
        return (torch.get_float32_matmul_precision() == "highest"
                and not torch.backends.cuda.matmul.allow_tf32)

    torch.backends.cudnn.allow_tf32 = False
    cuda = DEVICE.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.max_memory_allocated(DEVICE)
    assert exact_products()
    yield
    assert exact_products()
    if cuda and "uses_device" in request.fixturenames:
        assert torch.cuda.max_memory_allocated(DEVICE) > before


@pytest.fixture
def uses_device():
    """The test must not pass where all is computed on the CPU."""


def test_draws_are_the_same():
    def draws(device):
        generator = torch.Generator(device).manual_seed(5)
        torch.manual_seed(3)
        return [torch.rand(4, generator=generator, device=device),
                torch.randint(9, (4,), generator=generator, device=device),
                torch.randn_like(torch.zeros(3, device=device)),
                nn.Dropout(0.5)(torch.ones(20, device=device))]

    one, other = both(draws)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(one, other, strict=True))
    assert all(b.device.type == torch.device(DEVICE).type for b in other)
    assert 0 < (one[-1] == 0).sum() < 20


# --- networks


def inputs(network, generator):
    """Random inputs as the annotations of `forward` describe them; a new name needs a size here."""
    size = {"voxel": 24, "group": 3, "shell": 2, "direction": 20, "hint": scnn.hint_size(3),
            "image": 3, "channel": 4, "*grid": (9, 10),
            "coef": sh.size(getattr(network, "l_max", 0) or inspect.signature(
                type(network)).parameters.get("l_max", inspect.Parameter(
                    "l_max", inspect.Parameter.KEYWORD_ONLY, default=8)).default)}
    wanted = get_type_hints(type(network).forward)
    wanted.pop("return")
    return [torch.rand([int(n) for d in hint.dim_str.split() for n in np.ravel(size.get(d, d))],
                       generator=generator) + 0.1 for hint in wanted.values()]


@pytest.mark.usefixtures("uses_device")
@pytest.mark.parametrize("name", [n for n in builder.ARCHITECTURES
                                  if n not in ("upsampling", "volumetric")])
def test_network(name):
    """Forward and backward, in training and in evaluation. No weight is 0, as some are at the
    start: else no gradient would reach the layers before them. (The inputs of `upsampling` are
    rows of neighbourhoods; upsample_scnn applies it below. Those of `volumetric` are lists: see
    the trainings of its tasks.)"""
    arguments = {"parameters": 3, "shells": 2, "inputs": 4, "outputs": 2}
    known = inspect.signature(builder.ARCHITECTURES[name]).parameters
    generator = torch.Generator().manual_seed(7)
    with training.seeded(7):
        network = builder.build_network({"architecture": name, **{
            k: v for k, v in arguments.items() if k in known}})
        for weight in network.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    x = inputs(network, generator)
    start = {k: v.clone() for k, v in network.state_dict().items()}

    def passes(device):
        network.load_state_dict(start)
        network.to(device)
        outputs, gradients = [], []
        for train in (True, False):
            network.train(train).zero_grad()
            torch.manual_seed(11)
            given = [v.clone().to(device).requires_grad_() for v in x]
            out = network(*given)
            out = [out] if torch.is_tensor(out) else list(out)
            assert all(v.device.type == torch.device(device).type for v in out)
            torch.autograd.backward(out, [torch.linspace(-1, 1, v.numel()).view_as(v).to(device)
                                          for v in out])
            outputs += out
            gradients += [v.grad for v in [*given, *network.parameters()] if v.grad is not None]
        return [[array(v).copy() for v in values] for values in (outputs, gradients)]

    (wanted, slopes), (found, other_slopes) = both(passes)
    assert all(v.any() for v in wanted) and any(v.any() for v in slopes)
    for a, b in zip(found, wanted, strict=True):
        near(a, b, ONCE)
    near_gradients(other_slopes, slopes, 5 * ONCE)


# --- functions on tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spherical_harmonics(dtype, rng):
    axes = rng.normal(size=(50, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    c, rotation = rng.normal(size=(50, 45)), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)

    def results(device):
        a, k, r = (torch.tensor(v, dtype=dtype, device=device) for v in (axes, c, rotation))
        rish = sh.rish(k)
        return [sh.evaluate(8, a), sh.rotate(k, r), rish, sh.rish_gain(k, rish.flip(0)),
                sh.with_rish(k, rish.flip(0)), sh.per_coefficient(rish)]

    for wanted, found in zip(*both(results), strict=True):
        assert found.device.type == torch.device(DEVICE).type
        near(found, wanted, ONCE if dtype == torch.float32 else 1e-12)


def test_tensor_fit():
    """With holes, too, which take another path."""
    dwi = head("01", "A")
    signal = dwi.signal.copy()
    signal[3], signal[7, 4] = 0, -2
    x = tensor.design(dwi.acquisition.btensors)

    def fits(device):
        given = torch.from_numpy(signal).to(device)
        ratio = (given / 800).clamp(0.01, 2).requires_grad_()
        fa, md = tensor.fa_and_md(ratio, torch.tensor(
            tensor.attenuation_fit(dwi.acquisition.btensors), dtype=torch.float32, device=device))
        (slope,) = torch.autograd.grad((fa + md).sum(), ratio)
        return {**tensor.fit(given, x), "of fa": fa, "of md": md, "slope": slope}

    wanted, found = both(fits)
    assert wanted["failed"].any() and not wanted["failed"].all()
    fitted_like(found, wanted, FITTED)


# --- blocks


def test_blocks_and_slabs(rng):
    signal = rng.normal(size=(1000, 7)).astype(np.float32)
    image = rng.integers(-99, 100, (11, 6, 7)).astype(np.float32)

    def function(x):
        assert x.device.type == torch.device(DEVICE).type and torch.is_inference_mode_enabled()
        return {"twice": 2 * x, "first": x[:, 0] > 0}

    for block in (3, 128, None):
        found = blocks.map_voxels(function, signal, DEVICE, block)
        np.testing.assert_array_equal(found["twice"], 2 * signal)
        np.testing.assert_array_equal(found["first"], signal[:, 0] > 0)

    def neighbours(part):
        padded = nn.functional.pad(part, (0, 0, 0, 0, 2, 2))
        return {"sum": sum(padded[i:i + len(part)] for i in range(5))}

    whole = neighbours(torch.from_numpy(image))["sum"].numpy()
    for slab in (1, 4, None):
        np.testing.assert_array_equal(
            blocks.map_volume(neighbours, [image], 2, DEVICE, slab)["sum"], whole)


@pytest.fixture
def scarce():
    """take(n): allocates n MiB of a device that has 256 to give; a CPU is made to seem so."""
    if not DEVICE.startswith("cuda"):
        def take(n):
            if n > 256:
                raise torch.OutOfMemoryError
        yield take
        return
    torch.cuda.empty_cache()
    index = torch.device(DEVICE).index or 0
    reserved = torch.cuda.memory_reserved(index)
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + 2**28 + 2**24) / total, index)
    yield lambda n: torch.empty(n * 2**20, dtype=torch.uint8, device=DEVICE)
    torch.cuda.set_per_process_memory_fraction(1.0, index)
    torch.cuda.empty_cache()


def test_blocks_are_halved_when_memory_is_out(rng, scarce, caplog):
    signal = rng.normal(size=(1000, 7)).astype(np.float32)

    def hungry(x):
        scarce(len(x))
        return {"same": x}

    with blocks.one_thread():
        found = blocks.map_voxels(hungry, signal, DEVICE, 1000)["same"]
    np.testing.assert_array_equal(found, signal)
    assert "halved to 500" in caplog.text and "halved to 250" in caplog.text
    with blocks.one_thread():
        found = blocks.map_volume(lambda part: hungry(part[:, 0, 0].repeat(50)) and {"same": part},
                                  [np.ones((20, 2, 2), np.float32)], 1, DEVICE, 20)["same"]
    assert found.all() and "halved to 2 planes" in caplog.text


# --- methods, on heads of known tissue


@cache
def head(person, site):
    """A head with tissue of the person's own; at site B the signal falls off less steeply."""
    labels = synthetic_head.tissues()[::2, ::2, ::2]
    clean, _ = synthetic_head.signal(labels, BVALS, AXES, np.random.default_rng(int(person)),
                                     noise=0)
    mask = labels > 0
    ratio = (clean[mask] / synthetic_head.S0) ** (0.9 if site == "B" else 1)
    rng = np.random.default_rng([int(person), ord(site)])
    noise = 0.01 * rng.standard_normal((2, *ratio.shape))
    affine = np.diag([*ZOOM, 1.0])
    affine[:3, 3] = -60, -70, -50
    return Dwi((800 * np.hypot(ratio + noise[0], noise[1])).astype(np.float32), mask, affine,
               Acquisition(BVALS, AXES), 8.0)


def probabilities(run):
    """Probabilities of grey matter, white matter and CSF: those of the head, whoever it is."""
    labels = synthetic_head.tissues()[::2, ::2, ::2]
    column = np.array([0, 0, 2, 1, 1])  # of the labels of synthetic_head
    return np.eye(3, dtype=np.float32)[column[labels[labels > 0]]]


def one_shell(dwi):
    """The b0 volumes and the shell of b 1000."""
    return dwi.select_shell(dwi.acquisition.shells[0])


def cohort(select=lambda dwi: dwi):
    rows = [(p, s, f"{p}{s}", 100.0) for p in PEOPLE for s in SITES]
    table = pd.DataFrame(rows, columns=["participant", "batch", "run", "snr_b0"])
    return kinds.Cohort(
        table, reference_batch="A", load=lambda run: select(head(run[:2], run[2])),
        acquisitions={run: select(head(run[:2], run[2])).acquisition for run in table["run"]},
        voxel_sizes=dict.fromkeys(table["run"], tuple(ZOOM)), tissue=probabilities)


@cache
def fitted(name, turn, states):
    """(method, the checkpoint of a brief training); states: a folder that keeps registrations."""
    method = methods.get(name, context=kinds.MethodContext(sloppy=True))
    people = cohort(one_shell) if isinstance(method, kinds.Upsampler) else cohort()
    made = compute(lambda device: method.fit(people, kinds.TrainingSettings(
        max_steps=STEPS, seed=1, device=device, states=states)), turn)
    for state in states.glob("*.ckpt"):  # the next device must not go on from them
        state.unlink()
    (model,) = made.checkpoints.values()
    return method, model


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


def apply(method, model, device, folder):
    """(voxel, …) arrays by name. model: what was trained; None for a method as it ships."""
    dwi = head("07", "B")
    if isinstance(method, kinds.SiteHarmonizer):
        return {"signal": method.harmonize(dwi, model, "B", device).signal}
    if model:
        for file, content in checkpoint.pack(model).items():
            place = folder / f"{method.name}_trained" / file
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
    method = methods.get(method.name, context=kinds.MethodContext(
        sloppy=True, models=folder if model else None))
    if isinstance(method, kinds.Synthesizer):
        made = method.synthesize(dwi, MODES, 3, device, voxels=500, image=True)
        # noise of the score is drawn in a thread, where the draws are not the same
        return {**made.signals, **{f"image {k}": v.signal for k, v in made.images.items()},
                **{f"score {k}": np.array([*v.values()], np.float32)
                   for k, v in made.scores.items() if k != "noise"}}
    if isinstance(method, kinds.Denoiser):
        return {"signal": method.denoise(dwi, device).signal}
    if isinstance(method, kinds.Upsampler):
        if not method.any_table:  # it takes the inputs of its training
            inputs = np.abs(np.array(model.card.constants["inputs"]) @ AXES[BVALS == 1000].T)
            dwi = one_shell(dwi).select_volumes(np.r_[:3, 3 + inputs.argmax(1)])
        target = method.target(dwi.acquisition) or Acquisition(
            np.full(9, 1000.0), upsample.spread(AXES[BVALS == 1000], 9))
        made = method.predict(dwi, target, device)
        return {"signal": made.signal} | ({} if made.sd is None else {"signal_std": made.sd})
    if isinstance(method, kinds.Estimator):
        return method.apply(dwi, device).maps
    # a pretraining: what its network says of a volume
    network = model.into(builder.build_network(model.card.network)).to(device)
    scan = scans.prepare(scans.Labelled(dwi), scans.Channels(
        **model.card.constants["channels"]), folder, "volume")
    example = scans.cut_middle(scan, 16).to(device)
    with torch.no_grad():
        return {"signal": array(network([example.ratio], [example.table])[0])}


def test_every_method_is_applied_or_works_on_tables():
    """A new kind of method needs a way to be applied here."""
    known = (kinds.SiteHarmonizer, kinds.Synthesizer, kinds.Estimator, kinds.Denoiser,
             kinds.Upsampler, kinds.GroupAnalysis)
    assert all(isinstance(methods.get(n), known) for n in methods.names()
               if not n.startswith("pretrain_"))


@pytest.mark.parametrize("name", TRAINABLE)
def test_training(name, states, tmp_path):
    """The same minibatches on both devices give the same losses, and networks that say the same."""
    (method, wanted), (_, found) = (fitted(name, turn, states) for turn in (0, 1))
    assert found.tensors.keys() == wanted.tensors.keys()
    for key in ("validation", "steps"):
        if key in wanted.card.training:
            near(np.array(found.card.training[key], float),
                 np.array(wanted.card.training[key], float), TRAINED, name=key)
    # hints that a search in single precision finds are not the same, so neither is what is learned
    tolerance = ESTIMATED * (15 if isinstance(method, SphericalMethod)
                             and needs_search(method.tissue) else 1)
    assert found.card.metrics.keys() == wanted.card.metrics.keys()
    for key, value in wanted.card.metrics.items():
        if key.startswith(("mse_", "coverage90_")):  # biases are small differences
            near(found.card.metrics[key], value, tolerance, name=key)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    maps, others = (apply(method, m, "cpu", tmp_path / folder)
                    for m, folder in ((wanted, "one"), (found, "other")))
    fitted_like(others, maps, tolerance)


@pytest.mark.parametrize("name", [
    n for n in methods.names() if not isinstance(methods.get(n), kinds.GroupAnalysis)])
def test_application(name, states, tmp_path):
    """One model on both devices; a method that ships with weights, or needs none, as it ships."""
    method = methods.get(name)
    model = None
    if isinstance(method, kinds.SiteHarmonizer) or name.startswith("pretrain_") or (
            name in TRAINABLE and not (learn.bundled_weights(name))):
        method, model = fitted(name, 0, states)
    wanted, found = both(lambda device: apply(method, model, device, tmp_path))
    # what is trained for the run itself differs as a training does, and for longer
    own = name in ("estimate_freewater", "synthesize")
    fitted_like(found, wanted, ESTIMATED if own else FITTED)


@pytest.mark.usefixtures("uses_device")
@pytest.mark.parametrize("name", [n for n in TRAINABLE
                                  if isinstance(methods.get(n), SphericalMethod)])
def test_training_step_for_all_protocols(name):
    """Simulation, loss and gradient by the recipe of weights that ship."""
    recipe = methods.get(name).recipe()
    more = {"shells": 2} if "shells" in recipe.network else {}
    protocol = {} if not more else {"acquisition": Acquisition(BVALS, AXES)}
    recipe = learn.Recipe(**{f.name: getattr(recipe, f.name) for f in fields(recipe)} | protocol
                          | {"network": {**recipe.network, **more}})
    with training.seeded(2):
        network = learn.build(recipe.tissue, recipe.network)
    simulate = learn.Simulator(recipe)

    def draw(device):
        return simulate(64, 1 if more else 8, torch.Generator(device).manual_seed(4))

    drawn, other = both(draw)
    names = "x", "noise", "shells", "hint", "parameters", "density"
    for name, wanted, found in zip(names, drawn, other, strict=True):
        assert found.device.type == torch.device(DEVICE).type
        # a search in single precision may end elsewhere, as it does between blocks on a CPU
        if name != "hint" or not needs_search(recipe.tissue):
            near(found, wanted, TRAINED, SHARE, name)

    def step(device):
        network.to(device).train().zero_grad()
        batch = [v.to(device) for v in drawn]
        value = learn.compute_loss(recipe, network(*batch[:4]), batch[4], batch[5], batch[1])
        value.backward()
        return array(value).copy(), [array(p.grad).copy() for p in network.parameters()]

    (wanted, slopes), (found, other_slopes) = both(step)
    near(found, wanted, FITTED)
    near_gradients(other_slopes, slopes, TRAINED)


def test_comparisons_and_tissue():
    """The steps that are no methods but compute on the device."""
    before, after = head("01", "B"), head("01", "A")
    shell = before.acquisition.shells[0]
    ratio = before.signal[:, shell.indices] / 800

    def results(device):
        found = change.compare_signals(before, after, device)
        regions = tissue.find_regions(before, device)
        return {**{f"change {k}": np.stack(v, 1) for k, v in found.maps.items()},
                **agreement.shell_maps(ratio, before.acquisition[shell.indices], device),
                **{k: getattr(regions, k).astype(np.float32) for k in ("gm", "csf")}}

    wanted, found = both(results)
    fitted_like(found, wanted, FITTED)


# --- trainings and weights between devices


def trained(device, steps, saved=None):
    """(network, history) of a training on patches whose centre is to be halved."""
    with training.seeded(3):
        network = builder.build_network({"architecture": "golkov", "hidden": 16})

    def draw(generator):
        return [(torch.randn(64, 27, 15, generator=generator, device=generator.device),)
                for _ in range(3)]

    def loss(model, batch):
        return (model(batch[0]) - batch[0][:, 13] / 2).square().mean()

    schedule = training.Schedule(steps, 1e-3, validate_every=4)
    with SameDraws():
        return network, training.train(network, draw, loss, schedule, seed=5, device=device,
                                       saved=saved)


@pytest.mark.parametrize("devices", [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
def test_training_goes_on_on_another_device(devices, tmp_path):
    """From its state, in the middle of what was drawn: as if it had not been interrupted."""
    network, wanted = trained("cpu", 12)
    for device, steps in zip(devices, (8, 12), strict=True):
        again, found = trained(device, steps, tmp_path / "state.ckpt")
    assert [row["step"] for row in found] == [4, 8, 12]
    for a, b in zip(wanted, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=TRAINED)
    x = torch.randn(50, 27, 15, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        near(again.to("cpu")(x), network(x), TRAINED)


def test_weights_travel_between_devices(tmp_path):
    """Written from the device and read again they are the same numbers, there and on a CPU."""
    card = checkpoint.Card(
        method="estimate_any", network={"architecture": "hybrid", "hidden": 8},
        trained_for=domain.TrainingDomain.of_acquisitions([Acquisition(BVALS, AXES)]),
        training={}, intended_use="", seed=0, versions={})
    with training.seeded(4):
        network = builder.build_network(card.network)
    nn.init.normal_(network.layers[-1].weight)
    network.to(DEVICE)
    made = checkpoint.Checkpoint(network.state_dict(), card)
    for file, content in checkpoint.pack(made).items():
        (tmp_path / file).write_bytes(content)
    again = checkpoint.load(tmp_path)
    assert all(torch.equal(v, made.tensors[k].cpu()) for k, v in again.tensors.items())
    x = torch.randn(50, 27, 15, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        there = again.into(builder.build_network(card.network).to(DEVICE))(x.to(DEVICE))
        assert torch.equal(there, network(x.to(DEVICE)))
        near(again.into(builder.build_network(card.network))(x), there, ONCE)
