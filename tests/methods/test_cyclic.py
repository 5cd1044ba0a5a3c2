"""The cyclic harmonizer, on heads whose right answer is known in every voxel."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bidsapp import kinds, methods, sh
from bidsapp.checkpoint import pack
from bidsapp.errors import UsageError
from bidsapp.evaluate import agreement, crossvalidation
from bidsapp.harmonization import pairs, patches
from bidsapp.methods.harmonize_cyclic.method import CyclicMinibatch
from bidsapp.networks import cyclic
from bidsapp.networks.builder import build_network
from bidsapp.networks.cyclic import Cycle, Generator, GradientReversal, invariants
from bidsapp.simulate import odf
from support.travelling_heads import ZOOMS, head

B0 = 3


def neighbourhoods(rng, count=40):
    return torch.from_numpy(rng.standard_normal((count, 27, 15)).astype(np.float32))


def lively(seed=0, fine=True):
    """A generator that does something."""
    torch.manual_seed(seed)
    generator = Generator(hidden=16, fine=fine)
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.5)
    generator.scale.copy_(torch.tensor([2.0, 0.5, 0.2]))
    return generator


@pytest.mark.parametrize("fine", [True, False])
def test_a_generator_turns_with_its_input(rng, fine):
    x = neighbourhoods(rng)
    turn = odf.random_rotations(1, torch.Generator().manual_seed(3))[0].float()
    generator = lively(fine=fine)
    for way in (generator.patch, generator):
        torch.testing.assert_close(way(sh.rotate(x, turn)), sh.rotate(way(x), turn),
                                   atol=2e-5, rtol=1e-5)
    assert (generator.patch(x) - x).abs().mean() > 1e-3
    assert ((generator(x) - generator.patch(x)[:, 13]).abs().mean() > 1e-3) == fine


def test_a_generator_starts_as_the_identity(rng):
    x = neighbourhoods(rng)
    torch.testing.assert_close(Generator()(x), x[:, 13])


def test_coarse_gains_go_by_means_and_are_the_same_for_all_voxels(rng):
    x, generator = neighbourhoods(rng), lively()
    gain = generator.patch(x) / x
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain), atol=1e-5, rtol=1e-4)
    others = x[:, torch.randperm(27)]
    torch.testing.assert_close(generator.patch(others) / others, gain, atol=1e-5, rtol=1e-4)


def test_fine_gains_are_taught_by_pairs_alone(rng):
    cycle = Cycle(lively(1), lively(2), critic=8)
    sum(cycle(neighbourhoods(rng), neighbourhoods(rng)).values()).backward()
    assert all(p.grad is None for p in cycle.to_b.fine.parameters())
    cycle.to_b(neighbourhoods(rng)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in cycle.to_b.parameters())


def test_invariants_are_those_of_the_formula(rng):
    x, scale = neighbourhoods(rng, 1), torch.tensor([2.0, 0.5, 0.2])
    found = invariants(x, scale)[0]
    for voxel in (0, 13):
        c = x[0, voxel]
        expected = [c[0] / 2, (c[1:6].square().sum() / 5).sqrt() / 0.5,
                    (c[6:].square().sum() / 9).sqrt() / 0.2]
        torch.testing.assert_close(found[voxel::27], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_critics_and_generators_pull_apart(rng, monkeypatch):
    """The critic's own gradient is that of the loss, the generator's its negative."""
    x, y = neighbourhoods(rng), 2 * neighbourhoods(rng)
    monkeypatch.setattr(cyclic, "CRITIC_NOISE", 0.0)
    cycle = Cycle(lively(1), lively(2), critic=8)
    cycle(x, y)["adversarial"].backward()
    turned = cycle.to_b.coarse[0].weight.grad.clone(), cycle.real_b[0].weight.grad.clone()
    cycle.zero_grad()
    scale = cycle.to_b.scale
    made = cycle.real_b(invariants(cycle.to_b.patch(x), scale))
    (made - cycle.real_b(invariants(y, scale))).mean().backward()
    torch.testing.assert_close(turned[0], -cycle.to_b.coarse[0].weight.grad)
    torch.testing.assert_close(turned[1], cycle.real_b[0].weight.grad)
    assert GradientReversal.apply(x) is not x and torch.equal(GradientReversal.apply(x), x)


def test_losses_vanish_for_the_identity(rng):
    """Two new generators: nothing is lost on the way there and back, and |∂C| is that of C."""
    x, y = neighbourhoods(rng), neighbourhoods(rng)
    cycle = Cycle(Generator(), Generator(), critic=8)
    found = cycle(x, y)
    assert found["cycle"] == found["identity"] == 0
    linear = torch.nn.Linear(81, 1)
    torch.nn.init.constant_(linear.weight, 3 / 9)  # |∂C| = 3/9 · √81
    cycle.real_a = cycle.real_b = linear
    assert float(cycle(x, y)["slope"].detach()) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-5)


def study(scans, **more):
    """(Cohort, TrainingSettings); scans: PERSON + SITE; more: of the settings."""
    acquisition = head("01", "A").acquisition
    table = pd.DataFrame([(r[:2], r[2], r, 30.0) for r in scans],
                         columns=["participant", "batch", "run", "snr_b0"])
    return kinds.Cohort(table, reference_batch="A",
                          acquisitions=dict.fromkeys(scans, acquisition),
                          load=lambda run: head(run[:2], run[2]),
                          voxel_sizes=dict.fromkeys(scans, tuple(ZOOMS))), (
        kinds.TrainingSettings(seed=1, **more))


def brief(epochs):
    method = methods.get("harmonize_cyclic")
    recipe = method.settings("training")
    recipe |= {"deformable": False, "epoch": 5000,
               "stages": [{**recipe["stages"][0], "epochs": epochs}]}
    method.settings = lambda table: recipe
    return method


def error(method, model):
    """Mean square error of S/S0 of a new person, before and after, against the noise-free scan at
    the reference."""
    scan, truth = head("07", "B"), head("07", "A", noise=0)
    made = method.harmonize(scan, model, "B", "cpu")
    return [float(np.square((s - truth.signal)[:, B0:] / 800).mean())
            for s in (scan.signal, made.signal)]


@pytest.mark.slow
def test_unlike_people_teach_and_pairs_teach_more():
    """Nobody was in both sites; then one of three was. The site's factors are those of
    `travelling_heads`."""
    alone = brief(32)
    (model,) = alone.fit(*study(["01A", "02A", "03A", "04B", "05B", "06B"])).checkpoints.values()
    before, after = error(alone, model)
    assert after < 0.5 * before
    assert model.card.training["pairs"] == 0 and model.card.training["scans"] == 6
    assert model.card.training["held_out"] == 0 and not model.card.metrics
    assert model.card.network["fine"] is False
    (told,) = alone.preflight(study(["01A", "02A", "03A", "04B", "05B", "06B"])[0])
    assert told.startswith("A has 3 participants, B has 3 participants, and nobody was scanned at")
    helped = brief(10)
    (model,) = helped.fit(*study(["01A", "02A", "03A", "01B", "05B", "06B"])).checkpoints.values()
    assert error(helped, model)[1] < after
    scan, made = head("07", "B"), helped.harmonize(head("07", "B"), model, "B", "cpu")
    shell = scan.acquisition[np.arange(B0, len(scan.acquisition))]
    old, new, wanted = (agreement.shell_maps(s[:, B0:] / 800, shell) for s in (
        scan.signal, made.signal, head("07", "A", noise=0).signal))
    for key in ("fa", "md"):
        assert agreement.mse(new[key], wanted[key]) < 0.1 * agreement.mse(old[key], wanted[key])
    single = old["fa"] > 0.5
    assert single.sum() > 100
    assert np.median(agreement.angle(old["direction"], new["direction"])[single]) < 1
    assert not helped.preflight(study(["01A", "02A", "03A", "01B", "05B", "06B"])[0])
    assert model.card.training["pairs"] == 1 and model.card.network["fine"] is True


@pytest.mark.slow
def test_people_in_both_batches_validate(tmp_path):
    """Half of them at most, and the card tells their errors; a second training is the same."""
    method = brief(1)
    known, settings = study(["01A", "02A", "01B", "02B"], max_steps=4)
    (model,) = method.fit(known, settings).checkpoints.values()
    assert model.card.training["held_out"] == 1 and model.card.training["pairs"] == 2
    assert {f"mse_{w}_{t}_b1000" for w in ("before", "after") for t in ("wm", "gm")} <= set(
        model.card.metrics)
    settings = replace(settings, states=tmp_path / "states")
    (again,) = method.fit(known, settings).checkpoints.values()
    assert pack(again)["model.safetensors"] == pack(model)["model.safetensors"]


def test_loss_of_pairs_holds_fa_and_md_in_units_of_what_there_is(tmp_path):
    """An unchanged signal has an error of three times the weight, since each measure counts 1."""
    method, (known, settings) = brief(1), study(["01A", "01B"])
    recipe = method.settings("training")
    found = method.scans(known, "B", "A")
    travellers = patches.PairedScans(method, known, settings, found, [30], 4, False, tmp_path,
                                    series=True)
    own = travellers.samples[0]
    mine = [own.select(travellers.indices({"01"}, kind)) for kind in pairs.KINDS]
    learner = method.objective(build_network({**recipe["network"], "fine": True}), own, mine,
                             {**recipe, "validation": 10**6}, "cpu", True)
    batch = own(mine[pairs.BOTH], "cpu")
    x, y = (own(v[:8], "cpu").patches for v in mine[1:])
    losses = []
    for pair in (None, batch):
        torch.manual_seed(0)  # of the noise on what critics see
        losses.append(float(learner.loss(learner.model, CyclicMinibatch(x, y, pair)).detach()))
    assert losses[1] - losses[0] == pytest.approx(3 * recipe["loss"]["pairs"], rel=1e-4)
    assert float(learner.score(batch.centre, batch).mean()) == pytest.approx(
        3 * recipe["loss"]["pairs"], rel=1e-4)


def test_folds_need_people_in_both_batches():
    with pytest.raises(UsageError, match="--folds 2: 0 participants were scanned at B and at A"):
        crossvalidation.fit(brief(1), *study(["01A", "02A", "03B", "04B"], folds=2))


def test_a_scan_alone_is_on_its_own_grid_and_axes():
    """Stored with axes flipped, it is brought to the world's, its coefficients as they are."""
    scan = head("01", "B")
    table = pd.DataFrame([("01", "B", "x")], columns=["participant", "batch", "run"])
    (pair,) = pairs.unpaired(table, "B", "A")
    assert pair == pairs.Pair("01", "x", "x", pairs.SOURCE)
    found = pairs.align(scan, scan, l_max=4, deformable=False, rigid=np.eye(4))
    values, _ = pairs.coefficients(scan, 4)
    inside = found.image[0][1:-1, 1:-1, 1:-1][found.overlap]
    np.testing.assert_allclose(inside, values[0], atol=2e-5)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = scan.mask.shape[0] - 1
    mirrored = replace(scan, mask=scan.mask[::-1].copy(), affine=scan.affine @ flip,
                       signal=scan.unmask(scan.signal)[::-1][scan.mask[::-1]])
    again = pairs.align(mirrored, mirrored, l_max=4, deformable=False, rigid=np.eye(4))
    np.testing.assert_allclose(again.image, found.image, atol=2e-5)


def test_bad_scans_are_named():
    known, settings = study(["01A", "02A", "03B", "04B"])

    def load(run):
        scan = head(run[:2], run[2])
        if run != "03B":
            return scan
        signal = scan.signal.copy()
        signal[::5] = np.nan
        return replace(scan, signal=signal)

    with pytest.raises(UsageError, match="of 03B are NaN or infinite"):
        brief(1).fit(replace(known, load=load), settings)


def test_unlike_groups_are_refused():
    known, settings = study(["01A", "02A", "03A", "04B", "05B", "06B"])
    table = known.statistics.assign(age=[21.0, 24.0, 22.0, 61.0, 66.0, 64.0])
    with pytest.raises(UsageError, match=r"age differs between A.* the site explains 99%"):
        brief(1).fit(replace(known, statistics=table, covariates=("age",)), settings)


def test_one_person_is_no_batch():
    with pytest.raises(UsageError, match="B"):
        brief(1).fit(*study(["01A", "02A", "03B"]))


