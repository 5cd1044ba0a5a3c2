"""Networks, protocols and the maps made with them."""

import json
import math
import tomllib
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import checkpoint, kinds, methods, selection, sh
from bidsapp.acquisition import Acquisition
from bidsapp.domain import ShellRange, TrainingDomain
from bidsapp.errors import Refusal, UsageError
from bidsapp.microstructure import learn
from bidsapp.microstructure import maps as estimating
from bidsapp.networks.scnn import Published, SphericalNetwork
from bidsapp.simulate import forward, odf, protocols, tissue
from bidsapp.simulate.likelihood import Likelihood, compute_hint
from support.app import qsphere, validate
from support.spherical_signals import acquisition, coefficients, simulate_voxels, small_recipe

SHELLS = torch.tensor([[[1.0, 1.0, 0.13], [2.2, 1.0, 0.11], [3.0, 1.0, 0.0]]])
"""Two shells; the third is not there."""


def axes(n, seed=0):
    return Rotation.random(n, random_state=seed).as_matrix()[:, :, 0]


def hint_of(x, noise, shells):
    power = torch.tensor([[0.018, 0.009, 0.004, 0.002]])
    return compute_hint(Likelihood(tissue.TWO_COMPARTMENTS, power.to(x), x, noise, shells))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["ours", "deep", "published"])
def test_networks_are_equivariant(kind, dtype):
    """Scalars stay, densities turn: to rounding for a fine grid, to the aliasing of the grid used.

    Random weights; BatchNorm with the statistics of a batch.
    """
    torch.manual_seed(4)
    torch.set_default_dtype(dtype)
    if kind == "published":
        network, limit = Published(3, 2, grid=59), 2e-2
        with torch.no_grad():
            for c in network.convolutions:
                c.weight *= 0.1
    else:
        deep = {"widths": (8, 12, 8), "degrees": (8, 8, 6), "tail": 4, "grid": 71}
        network = SphericalNetwork(2, **(deep if kind == "deep" else {}))
        limit = (1e-3 if kind == "ours" else {torch.float32: 2e-5, torch.float64: 1e-11}[dtype])
    network.eval()
    torch.set_default_dtype(torch.float32)
    noise = torch.tensor([[0.02, 0.01]], dtype=dtype).expand(50, 2)
    told = hint_of(coefficients(50, dtype), noise, SHELLS.to(dtype))

    def run(x):
        with torch.no_grad():
            if kind == "published":
                return network(x)
            return network(x, noise, SHELLS.to(dtype), told)

    one = run(coefficients(50, dtype))
    for r in torch.tensor(Rotation.random(3, random_state=1).as_matrix()):
        other = run(coefficients(50, dtype, r))
        for a, b in ((one.mean, other.mean), (one.log_sd, other.log_sd),
                     (sh.rotate(one.odf, r), other.odf)):
            assert (a - b).square().mean().sqrt() <= limit * a.square().mean().sqrt()


@pytest.mark.slow
def test_networks_compile_and_autocast(monkeypatch):
    """One graph without breaks gives the same numbers; bfloat16, those to its 8 bits."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks cannot be traced
    torch.manual_seed(0)
    network = SphericalNetwork(2).eval()
    x, noise = coefficients(20, torch.float32), torch.full((20, 2), 0.02)
    given = x, noise, SHELLS, hint_of(x, noise, SHELLS)
    with torch.no_grad():
        plain = network(*given)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = network(*given)
    for a, b, c in zip(plain, compiled, coarse, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert (a - c).square().mean() < 2e-2**2 * a.square().mean()


def test_published_network_has_the_published_size():
    assert sum(p.numel() for p in Published(2, 2).parameters()) == 78_258


def test_shells_are_a_set():
    """Their order does not matter, nor does a shell that is not there."""
    torch.manual_seed(0)
    network, noise = SphericalNetwork(2).eval(), torch.full((9, 2), 0.02)
    x = coefficients(9, torch.float32)
    order = [2, 1, 0]
    with torch.no_grad():
        told = hint_of(x, noise, SHELLS)
        one = network(x, noise, SHELLS, told)
        for other in (network(x[:, :, order], noise, SHELLS[:, order], told),
                      network(x[:, :, :2], noise, SHELLS[:, :2], told)):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_protocols_do_not_mix():
    """Two protocols side by side give what each gives alone."""
    torch.manual_seed(0)
    network, noise = SphericalNetwork(2).eval(), torch.full((10, 2), 0.02)
    shells = torch.cat([SHELLS, SHELLS * torch.tensor([1.5, 1, 0.9])])
    x = coefficients(10, torch.float32)
    with torch.no_grad():
        told = hint_of(x.double(), noise.double(), shells.double()).float()
        both = network(x, noise, shells, told)
        for i in range(2):
            rows = slice(5 * i, 5 * i + 5)
            own = hint_of(x[:, rows].double(), noise[rows].double(), shells[i:i + 1].double())
            alone = network(x[:, rows], noise[rows], shells[i:i + 1], own.float())
            for a, b in zip(both, alone, strict=True):
                torch.testing.assert_close(a[rows], b, atol=1e-5, rtol=1e-4)


# ---- protocols


def test_simulated_shells_are_those_of_the_forward_model():
    """Signals of a group against `forward.Protocol` (tested there), fits against least squares."""
    acq = acquisition()
    generator = torch.Generator().manual_seed(0)
    densities = tissue.draw_odfs(7, generator, 12).double()
    parts = tissue.TWO_COMPARTMENTS.compartments(
        tissue.TWO_COMPARTMENTS.draw(7, generator).double())
    side = protocols.from_acquisition(acq, acq.shells, 12)
    signals = side.signals(side.coefficients(densities, parts))
    expected = forward.Protocol(acq, 12, densities).signal(densities, parts)
    x = side.fit_signals(signals)
    for i, (shell, degree) in enumerate(zip(acq.shells, (4, 8), strict=True)):
        np.testing.assert_allclose(signals[0, :, i, :len(shell)], expected[:, shell.indices],
                                   atol=1e-12)
        fit = sh.smooth_fit(degree, acq.bvecs[shell.indices])
        size = sh.size(degree)
        np.testing.assert_allclose(x[:size, :, i], fit @ expected[:, shell.indices].numpy().T,
                                   atol=1e-10)
        assert (x[size:, :, i] == 0).all()


def test_uneven_directions_lower_the_degree():
    """60 directions, all within 35° of one axis, do not determine degree 8."""
    g = np.random.default_rng(0).normal(size=(4000, 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    g = g[g[:, 2] > np.cos(np.deg2rad(35))][:60]
    acq = Acquisition(np.r_[0, np.full(60, 1000)], np.r_[np.zeros((1, 3)), g])
    fit = protocols.from_acquisition(acq, acq.shells, 8).fit[0, 0]
    used = int((fit != 0).any(1).sum())
    assert used < 45
    assert np.linalg.cond(sh.basis(sh.l_max_of(used), g)) ** 2 < protocols.MAX_CONDITION


def test_spherical_encoding_has_a_mean_alone():
    """Along every axis it measures the same, so that higher degrees would be noise."""
    acq = acquisition()
    acq = replace(acq, b_delta=np.where(acq.bvals == 1000, 0.0, 1.0))
    used = (protocols.from_acquisition(acq, acq.shells, 8).fit[0] != 0).any(2).sum(1)
    assert int(used[0]) == 1 < int(used[1])


def test_noise_of_fitted_coefficients():
    """Its mean over voxels and SD are those of Rice's law through the fit, within 5 standard
    errors, and the mean b0 has the noise that is told."""
    acq = acquisition(b=(1000,), n=(60,), b0=4)
    n, sigma = 4000, 0.05
    side = protocols.from_acquisition(acq, acq.shells, 8)
    clean = torch.full((1, n, 1, 60), 0.6, dtype=torch.float64)
    x, noise = protocols.measure(side, clean, torch.full((n,), sigma).double(),
                                 torch.Generator().manual_seed(0))
    level = sigma / noise[:, 0]  # the S0 that was divided by
    assert float(level.std()) == pytest.approx(sigma / 2, rel=5 / np.sqrt(2 * n))
    assert float(noise[:, 1].mean() / noise[:, 0].mean()) == pytest.approx(0.5, rel=1e-6)
    mean = x[0, :, 0] * level / math.sqrt(4 * math.pi)
    from bidsapp.simulate.noise import mean as rician_mean
    assert float(mean.mean()) == pytest.approx(float(rician_mean(0.6, sigma)),
                                               abs=5 * sigma / np.sqrt(60 * n))
    assert float(mean.std()) == pytest.approx(sigma / np.sqrt(60), rel=0.06)


def test_drawn_protocols_are_within_their_ranges():
    side = protocols.draw(200, torch.Generator().manual_seed(1), l_max=8)
    there = side.count > 0
    assert set(there.sum(1).tolist()) == {1, 2, 3, 4}
    assert side.b[there].min() >= 0.5
    assert side.b[there].max() <= 5
    assert (side.count[there].min(), side.count.max()) >= (6, 90)
    assert torch.isfinite(side.fit).all()
    assert torch.isinf(side.b0).any()


# ---- densities


def test_table_densities_are_turned_and_mixed():
    """Rows of a table keep their power per degree; the asked-for share comes from it."""
    table = odf.watson(torch.tensor(axes(1)).float(), torch.tensor([9.0]), 8)
    found = tissue.draw_odfs(400, torch.Generator().manual_seed(0), 12, table=table, measured=0.25)

    def power(c):
        return torch.stack([c[:, 1:6].square().sum(1), c[:, 6:15].square().sum(1)], 1)

    same = torch.isclose(power(found), power(table), rtol=1e-3).all(1) & (found[:, 45:] == 0).all(1)
    assert int(same.sum()) == 100
    first = found[same][:, 1:6]
    assert first.std(0).min() > 0.1 * first.abs().max()


def test_priors():
    p = tissue.THREE_COMPARTMENTS.draw(5000, torch.Generator().manual_seed(0))
    d, f, d_sph, f_sph = p.T
    assert (f + f_sph <= 1 + 1e-6).all()
    assert (d_sph <= d.clamp(max=0.5)).all()
    assert float(d.mean()) == pytest.approx(1.5, abs=0.05)


# ---- training, calibration, maps


@pytest.fixture(scope="module")
def trained():
    return learn.train("estimate_scnn2", small_recipe(), seed=3, device="cpu")


@pytest.mark.slow
def test_training_learns_and_calibrates(trained):
    """Better than the prior's variance (0.75, 1/12); 90 % within ± 1.645 SD on held-out voxels,
    3 points being 4 standard errors of both samples and of the bands."""
    m = trained.card.metrics
    assert m["mse_diffusivity"] < 0.4
    assert m["mse_neuritefraction"] < 0.06
    for name in ("diffusivity", "neuritefraction"):
        assert m[f"coverage90_{name}"] == pytest.approx(0.9, abs=0.03)


@pytest.mark.slow
def test_validation_calibration_and_measurement_are_of_different_voxels(monkeypatch):
    """Coverage measured where it was calibrated would be right whatever the network says."""
    used = {}

    def watch(name, batches_of):
        function = getattr(learn, name)

        def watched(*arguments):
            result = function(*arguments)
            used.setdefault(name, batches_of(arguments, result))
            return result
        monkeypatch.setattr(learn, name, watched)

    watch("_held_out", lambda arguments, result: result)  # the first are those of the validation
    for name in ("calibrate", "measure"):
        watch(name, lambda arguments, result: arguments[-1])
    learn.train("estimate_scnn2", replace(small_recipe(2), held_out=1024), seed=3, device="cpu")
    rows = [set(map(tuple, torch.cat([b.parameters for b in used[name]]).tolist()))
            for name in ("calibrate", "measure", "_held_out")]
    assert [len(r) for r in rows] == [8 * 1024, 4 * 1024, 1024]
    assert sum(map(len, rows)) == len(set.union(*rows))


@pytest.mark.slow
def test_training_depends_on_its_seed_alone():
    recipe = replace(small_recipe(20), held_out=1024)
    one, again = (learn.train("estimate_scnn2", recipe, seed=3, device="cpu").tensors
                  for _ in range(2))
    for name, value in one.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_card_round_trip(trained, tmp_path):
    for name, content in checkpoint.pack(trained).items():
        (tmp_path / name).write_bytes(content)
    found = checkpoint.load(tmp_path, "estimate_scnn2")
    dwi = simulate_voxels(acquisition())
    one, other = (estimating.estimate(c, tissue.TWO_COMPARTMENTS, dwi, "cpu")[0]
                  for c in (trained, found))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_densities_are_no_sharper_than_a_fibre():
    """Densities stay as they are, a fibre's own delta function included; what no density can be is
    made smaller, degree by degree, and not turned."""
    known = torch.cat([tissue.draw_odfs(50, torch.Generator().manual_seed(0), 8),
                       sh.evaluate(8, torch.eye(3))])
    torch.testing.assert_close(estimating.limit_degrees(known), known, atol=1e-6, rtol=1e-6)
    wild = 50 * torch.randn(20, 45, generator=torch.Generator().manual_seed(1))
    found = estimating.limit_degrees(wild)
    for l in (2, 4, 6, 8):
        part, was = (v[:, sh.size(l - 2):sh.size(l)] for v in (found, wild))
        most = torch.full((20,), (2 * l + 1) / (4 * math.pi))
        torch.testing.assert_close(part.square().sum(1), most)
        torch.testing.assert_close(torch.cosine_similarity(part, was), torch.ones(20))


def test_strange_signals_and_noise_are_flagged():
    """With the weights that ship. The signal's size wanders from 0.3 to 1.7 with the volume, which
    is plausible only where there is hardly any signal."""
    acq, shipped = acquisition(), selection.bundled_weights("estimate_scnn2")

    def flags(dwi):
        return estimating.estimate(shipped, tissue.TWO_COMPARTMENTS, dwi, "cpu")[0]["flag"]

    assert (flags(simulate_voxels(acq)) == 0).mean() > 0.9
    assert (flags(simulate_voxels(acq, 600, strange=True)) == 1).mean() > 0.85
    assert (flags(simulate_voxels(acq, sigma=0.2)) == 2).mean() > 0.5


def test_says_which_shells_it_left_out_and_that_there_are_more_than_in_training():
    """With the weights that ship, trained with up to four shells of b 500 to 5000; all five shells
    in that range are used."""
    method = methods.get("estimate_scnn2")
    assert not method.apply(simulate_voxels(acquisition(), 5), "cpu").notices
    many = acquisition((700, 1000, 2000, 3000, 4500, 7000), (12, 20, 20, 20, 20, 30))
    derived = method.apply(simulate_voxels(many, 5), "cpu")
    left_out, more = derived.notices
    assert "scnn2: left out 30 × b 7000 s/mm². The network was trained for b = 500–5000" in left_out
    assert "used 5 shells; the network was trained with up to 4" in more
    assert derived.parameters["Shells"] == [700, 1000, 2000, 3000, 4500]
    assert derived.parameters["ShellsLeftOut"] == [7000]
    assert derived.parameters["OutOfDistribution"] == ["5 shells, trained with up to 4"]
    few = method.apply(simulate_voxels(acquisition((300, 1000, 2200), (12, 30, 30)), 5), "cpu")
    assert len(few.notices) == 1 and "left out 12 × b 300" in few.notices[0]


@pytest.mark.parametrize(("acq", "message"), [
    (acquisition(b=(1000,), n=(60,)), "2 or more shells"),
    (acquisition(b0=0), "0 volumes without weighting"),
    (acquisition(b=(1000, 9000)), "b 9000"),
    (acquisition(b=(60, 75)), "not ms/µm²"),
    (acquisition(n=(60, 5)), "6 or more directions")], ids=["one", "b0", "far", "units", "few"])
@pytest.mark.slow
def test_refuses_what_it_was_not_trained_for(trained, acq, message):
    with pytest.raises(Refusal, match=message):
        estimating.estimate(trained, tissue.TWO_COMPARTMENTS, simulate_voxels(acq, 5), "cpu")


@pytest.mark.parametrize(("acq", "found"), [
    (acquisition(b=(1000,), n=(60,)), "60 × b 1000 s/mm²"),
    (acquisition(b=(1000, 9000)), "30 × b 1000, 60 × b 9000 s/mm²"),
    (acquisition(n=(30, 5)), "30 × b 1000, 5 × b 2200 s/mm²")], ids=["one", "far", "few"])
def test_extrapolates_where_that_is_allowed(acq, found):
    """With all shells of the run; sidecar and page say so. Else it is refused, and told how."""
    with pytest.raises(Refusal, match="To continue, give --allow-extrapolation"):
        methods.get("estimate_scnn2").check(acq)
    method = extrapolating()
    method.check(acq)
    derived = method.apply(simulate_voxels(acq, 5), "cpu")
    (outside,) = derived.parameters["OutOfDistribution"]
    assert outside == f"the run has {found}, needed are 2 or more shells of b = 500–5000 s/mm², " \
        "6 or more directions, b_delta 1"
    assert method.violations(acq) == [outside]
    assert derived.parameters["Shells"] == [round(s.b) for s in acq.shells]
    (notice,) = derived.notices
    assert outside in notice and "because of --allow-extrapolation" in notice
    assert all(np.isfinite(m).all() for m in derived.maps.values())


def extrapolating():
    return methods.get("estimate_scnn2", context=kinds.MethodContext(allow_extrapolation=True))


def test_what_is_allowed_leaves_a_run_within_the_training_as_it_is():
    """Shells outside are left out where enough are within, whatever is allowed."""
    method, dwi = methods.get("estimate_scnn2"), simulate_voxels(acquisition((300, 1000, 2200),
                                                                    (12, 30, 30)), 5)
    before = method.apply(dwi, "cpu")
    after = extrapolating().apply(dwi, "cpu")
    assert after.parameters == before.parameters and after.notices == before.notices
    for name, values in before.maps.items():
        np.testing.assert_array_equal(after.maps[name], values)


def test_no_network_goes_where_its_mathematics_end():
    method = extrapolating()
    for acq in (acquisition(b0=0), acquisition()[:2]):
        with pytest.raises(Refusal, match="needed") as refusal:
            method.apply(simulate_voxels(acq, 5), "cpu")
        assert "--allow-extrapolation" not in str(refusal.value)


def test_weights_are_loaded_once_for_all_runs(monkeypatch):
    loaded = []

    def load(folder, name):
        loaded.append(folder)
        return checkpoint.load(folder, name)

    monkeypatch.setattr(selection, "load", load)
    method = methods.get("estimate_scnn2")
    for acq in (acquisition(), acquisition((1000, 2000), (12, 16))):
        method.check(acq)
        method.apply(simulate_voxels(acq, 5), "cpu")
    assert len(loaded) == 1


def test_a_shell_may_lie_at_the_end_of_the_range_but_for_rounding():
    """A mean of 499 s/mm² is the nominal 500."""
    known = selection.bundled_weights("estimate_scnn2").card.trained_for
    run = acquisition(b=(499, 2200))
    assert [round(s.b) for s in known.usable_shells(run)] == [499, 2200]
    assert not known.violations(run)


def test_recipe_of_the_folder():
    folder = methods.get("estimate_scnn2").folder
    table = tomllib.loads((folder / "training.toml").read_text())["training"]
    recipe = methods.get("estimate_scnn2").recipe()
    assert recipe.schedule.steps == table["schedule"]["steps"]
    (shells,) = recipe.trained_for.shells
    assert shells.b == (500, 5000) and recipe.trained_for.shell_count == (1, 4)


def test_recipes_that_cannot_be_drawn_from_are_not_born():
    recipe = small_recipe()
    (shells,) = recipe.trained_for.shells
    for change in ({"snr": None}, {"shell_count": None},
                   {"shells": (shells, replace(shells, b=(700.0, 900.0)))}):
        with pytest.raises(ValueError, match="a recipe"):
            replace(recipe, trained_for=replace(recipe.trained_for, **change))


def test_noddi_is_its_integral():
    """Zhang et al. 2012 written out on a dense grid: sticks weighed by Watson's density, one
    tensor that is the average of the zeppelins, free water."""
    points, weights = sh.quadrature(120)
    acq = acquisition(b=(1000, 2500), n=(12, 20))
    p = tissue.NODDI.draw(6, torch.Generator().manual_seed(2)).double()
    side = protocols.from_acquisition(acq, acq.shells, 16)
    generator = torch.Generator().manual_seed(1)
    s, _ = tissue.NODDI.simulate(side, p, generator, 16)
    axis = odf.random_rotations(6, torch.Generator().manual_seed(1))[:, :, 0].numpy()
    found = side.signals(s)
    for v, (ndi, odi, fiso) in enumerate(p.numpy()):
        kappa = 1 / np.tan(np.pi * odi / 2)
        w = np.exp(kappa * ((points @ axis[v]) ** 2 - 1)) * weights
        w /= w.sum()
        outer = points[:, :, None] * points[:, None, :]
        d = np.einsum("n,nij->ij", w, 1.7 * (1 - ndi) * np.eye(3) + 1.7 * ndi * outer)
        for i, shell in enumerate(acq.shells):
            g, b = acq.bvecs[shell.indices], shell.b / 1000
            sticks = np.exp(-1.7 * b * (g @ points.T) ** 2) @ w
            outside = np.exp(-b * np.einsum("gi,ij,gj->g", g, d, g))
            expected = (1 - fiso) * (ndi * sticks + (1 - ndi) * outside) + fiso * np.exp(-3 * b)
            np.testing.assert_allclose(found[0, v, i, :len(shell)], expected, atol=2e-4)


def test_training_for_one_acquisition():
    """Its card knows the shells; another acquisition is refused, this one is estimated."""
    acq = acquisition(b=(700, 2000), n=(20, 40))
    recipe = replace(small_recipe(20), groups=1, held_out=1024, acquisition=acq,
                     trained_for=TrainingDomain.from_acquisitions([acq], snr=(20.0, 40.0)))
    trained = learn.train("estimate_scnn2", recipe, seed=0, device="cpu")
    assert trained.card.trained_for.shells == (ShellRange((700.0, 700.0), 1.0, (20, 20)),
                                               ShellRange((2000.0, 2000.0), 1.0, (40, 40)))
    maps = estimating.estimate(trained, tissue.TWO_COMPARTMENTS, simulate_voxels(acq, 8), "cpu")[0]
    assert all(np.isfinite(m).all() for m in maps.values())
    with pytest.raises(Refusal, match="needed are 20 × b 700, 40 × b 2000"):
        selection.select_shells(trained.card, acquisition())


# --- trained at group level, used at participant level


@pytest.fixture
def study(bids_tree, tmp_path):
    """Two processed participants and a function that runs the app on them."""
    root, out = bids_tree(), tmp_path / "out"

    def app(level, *argv):
        return qsphere(root, out, level, *argv)

    assert app("participant", "--estimate", "dti") == 0
    return app, out


@pytest.mark.slow
def test_a_network_for_one_acquisition_is_trained_kept_and_used(study):
    app, out = study
    assert app("group", "--train", "estimate_scnn2", "--sloppy", "--max-steps", "40") == 0
    (folder,) = (out / "group/models").iterdir()
    assert folder.name == "estimate_scnn2_b1000n12_b2000n16"
    card = json.loads((folder / "model.json").read_text())
    assert card["training"]["steps"] == 40
    assert [s["directions"] for s in card["trained_for"]["shells"]] == [[12, 12], [16, 16]]
    assert not list(out.rglob("*.ckpt"))  # nothing to go on from
    assert "group/models/estimate_scnn2_b1000n12_b2000n16" in (out / "group.html").read_text()
    assert app("participant", "--estimate", "scnn2", "--participant-label", "01") == 0
    sidecar = json.loads(next(out.glob("sub-01/dwi/*scnn2_param-neuritefraction_dwimap.json"))
                         .read_text())
    assert sidecar["Model"]["Parameters"]["Weights"] == card["sha256"]
    assert not validate(out)


@pytest.mark.slow
def test_extrapolation_on_the_command_line(bids_tree, tmp_path, capsys):
    """The dry run tells it, the sidecar holds it; without the option exit code 1 and the reason."""
    root, out = bids_tree(("01",), scheme=((0, 1), (1000, 12))), tmp_path / "out"
    argv = (root, out, "participant", "--estimate", "scnn2")
    assert qsphere(*argv) == 1
    assert "To continue, give --allow-extrapolation" in capsys.readouterr().err
    assert not list(out.glob("sub-01/dwi/*scnn2*"))
    assert qsphere(*argv, "--allow-extrapolation", "--dry-run") == 0
    outside = "the run has 12 × b 1000 s/mm², needed are 2 or more shells"
    assert f"estimate_scnn2, outside of its training: {outside}" in capsys.readouterr().out
    assert qsphere(*argv, "--allow-extrapolation") == 0
    about = json.loads(next(out.glob("sub-01/dwi/*scnn2_param-diffusivity_dwimap.json")
                            ).read_text())
    assert outside in about["Model"]["Parameters"]["OutOfDistribution"][0]
    assert outside in (out / "sub-01.html").read_text()
    assert not validate(out)


@pytest.mark.slow
def test_other_acquisitions_take_the_weights_that_ship(study, tmp_path):
    app, out = study
    assert app("group", "--train", "estimate_scnn2", "--sloppy", "--max-steps", "2") == 0
    weights = selection.find_weights("estimate_scnn2", out / "group/models")
    own, other = (selection.select_weights("estimate_scnn2", weights, run)
                  for run in (acquisition((1000, 2000), (12, 16)), acquisition()))
    assert own.card.sha256 != other.card.sha256
    assert other.card.sha256 == selection.bundled_weights("estimate_scnn2").card.sha256
    single = acquisition(b=(1000,), n=(60,))  # outside of both: those that ship know more
    assert selection.select_weights("estimate_scnn2", weights, single, allow=True) is other


def test_the_network_for_just_these_directions_is_selected():
    """Several were trained with a tenth more or fewer directions; the exact one is selected."""
    shipped = selection.bundled_weights("estimate_scnn2")
    runs = [acquisition((1000, 2000), (n, 60)) for n in (29, 30, 31)]
    weights = [replace(shipped, card=replace(
        shipped.card, trained_for=TrainingDomain.from_acquisitions([run], snr=(10.0, 20.0))))
        for run in runs]
    for run, own in zip(runs, weights, strict=True):
        assert selection.select_weights("scnn2", [*weights, shipped], run) is own
    far = acquisition((1000, 2000), (40, 60))
    assert selection.select_weights("scnn2", [*weights, shipped], far) is shipped


@pytest.mark.slow
def test_a_training_for_several_acquisitions_is_refused(study):
    two = {"a": acquisition(), "b": acquisition((1000, 2000), (12, 16))}
    recipe = methods.get("estimate_scnn2").recipe("one")
    with pytest.raises(UsageError,
                       match=r"Found: 2 acquisitions \(b1000n30_b2200n60: a; b1000n12_b"):
        learn.train_for_acquisition("estimate_scnn2", recipe, two, [20.0], steps=1, seed=0,
                                    device="cpu", states=None, intended_use="")


def test_a_training_does_not_go_on_from_the_state_of_another(tmp_path, monkeypatch):
    """Another SNR, weight of mean errors or learning rate is another training; more steps are the
    same training."""
    def state(**how):
        known = {"recipe": methods.get("estimate_scnn2").recipe("one"), "snr": [20.0], "steps": 5}
        known |= how
        found = []

        def train(*_, saved, **__):
            found.append(saved.name)
            raise InterruptedError

        monkeypatch.setattr(learn, "train", train)
        with pytest.raises(InterruptedError):
            learn.train_for_acquisition(
                "estimate_scnn2", known["recipe"], {"a": acquisition()}, known["snr"],
                steps=known["steps"], seed=0, device="cpu", states=tmp_path, intended_use="")
        return found[0]

    recipe = methods.get("estimate_scnn2").recipe("one")
    other = replace(recipe, unbiased=0.5)
    faster = replace(recipe, schedule=replace(recipe.schedule, learning_rate=0.5))
    assert state() == state(steps=9)
    assert len({state(), state(snr=[25.0]), state(recipe=other), state(recipe=faster)}) == 4


def test_batches_drawn_together_keep_voxels_with_their_protocols():
    """A shell that a protocol has not holds no signal, and the hint is that of its own shells."""
    recipe = replace(methods.get("estimate_scnn2").recipe(), batch=32, groups=4, pool=3,
                     passes=1)
    simulate = learn.Simulator(recipe)
    batches = simulate.draw_pool(torch.Generator().manual_seed(5))
    assert len(batches) == 3
    for x, noise, shells, found, parameters, density in batches:
        assert x.shape[1] == len(noise) == len(found) == len(parameters) == len(density) == 32
        there = shells[:, None, :, 2].expand(4, 8, -1) > 0
        assert torch.equal(x[0].unflatten(0, (4, 8)) != 0, there)
        likelihood = Likelihood(recipe.tissue, simulate.power.to(x), x, noise, shells)
        torch.testing.assert_close(found, compute_hint(likelihood), atol=1e-2, rtol=1e-2)
    counts = [tuple((b.shells[..., 2] > 0).sum(1).tolist()) for b in batches]
    assert len(set(counts)) > 1, "else nothing could be mixed up"
