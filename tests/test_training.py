"""The optimisation loop: it learns, repeats itself, resumes, stops, and says what is wrong."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from bidsapp.errors import DataError, UsageError
from bidsapp.progress import track
from bidsapp.training import Schedule, processes, seeded, train

TRUTH = torch.tensor([[1.0], [-2.0], [0.5]])


def linear(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 1))


def four(generator):
    x = torch.randn(4, 32, 3, generator=generator, device=generator.device)
    return list(zip(x, x @ TRUTH, strict=True))


def squared(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def error(model):
    return float(((model[1].weight.T - TRUTH) ** 2).sum())


def learn(schedule, model=None, **more):
    model = model or linear()
    return model, train(model, four, squared, schedule, seed=3, device="cpu", **more)


def test_finds_the_solution_of_a_linear_problem():
    """Without dropout the loss has one minimum, where it is 0."""
    with seeded(0):
        model = nn.Linear(3, 1)
    rows = train(model, four, squared, Schedule(400, 0.05, decay="cosine", validate_every=100),
                 seed=0, device="cpu")
    torch.testing.assert_close(model.weight.T.detach(), TRUTH, atol=1e-3, rtol=0)
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert rows[-1]["loss"] < 1e-5 * rows[0]["loss"]
    assert rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-12) and not model.training


def untimed(row):
    return {k: v for k, v in row.items() if k != "seconds"}


@pytest.mark.parametrize("decay", ["constant", "step", "cosine", "plateau"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, decay, optimizer):
    schedule = Schedule(30, 0.02, optimizer, decay, validate_every=5, patience=100)
    whole, rows = learn(schedule, validate=error)

    class Stop(Exception):
        pass

    seen = []

    def stop(model):
        seen.append(1)
        if len(seen) == 4:
            raise Stop
        return error(model)

    with pytest.raises(Stop):
        learn(schedule, validate=stop, saved=tmp_path / "state.ckpt")
    again, more = learn(schedule, linear(99), validate=error, saved=tmp_path / "state.ckpt")
    seconds = [row.pop("seconds") for row in more]
    assert all(a < b for a, b in pairwise(seconds))  # goes on where it was
    assert more == [untimed(row) for row in rows] and len(rows) == 6
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["state.ckpt"]
    last = learn(schedule, linear(5), validate=error, saved=tmp_path / "state.ckpt")[1]
    assert [untimed(row) for row in last] == more


def test_another_training_is_not_resumed(tmp_path):
    saved = tmp_path / "state.ckpt"
    learn(Schedule(4, 0.02), saved=saved)
    before = saved.read_bytes()
    with pytest.raises(UsageError, match=r"another training.*'learning_rate': \(0.02, 0.03\)"):
        learn(Schedule(4, 0.03), saved=saved)
    with pytest.raises(UsageError, match=r"another training.*'seed': \(3, 4\)"):
        train(linear(), four, squared, Schedule(4, 0.02), seed=4, device="cpu", saved=saved)
    assert saved.read_bytes() == before
    saved.write_bytes(before[:50])
    with pytest.raises(UsageError, match="cannot be read as the state of a training"):
        learn(Schedule(4, 0.02), saved=saved)


@pytest.mark.parametrize("decay", ["constant", "step", "cosine"])
@pytest.mark.parametrize("steps", [10, 14, 20, 40])
def test_an_interrupted_training_goes_on_to_another_number_of_steps(tmp_path, caplog, decay, steps):
    """From the step of the state on the learning rate is that of a training of this length; the
    losses of the rows are means over the steps since the row before. A state beyond that many steps
    is taken as it is."""
    saved = tmp_path / "state.ckpt"
    before = Schedule(20, 0.02, decay=decay, validate_every=8)
    rows = learn(before, saved=saved)[1]  # validated at 8, 16 and 20
    asked = Schedule(steps, 0.02, decay=decay, validate_every=8)
    whole = learn(asked)[1]
    calls = []

    def counted(model, batch):
        calls.append(squared(model, batch))
        return calls[-1]

    with caplog.at_level("INFO", "qsphere"):
        model = linear(1)
        more = train(model, four, counted, asked, seed=3, device="cpu", saved=saved)
    if steps <= 20:
        assert more == rows and not calls
        assert (f"holds 20 steps, {steps} were asked for" in caplog.text) and saved.exists()
        return
    assert f"resumed at step 20 of {steps} (before: of 20) from {saved}" in caplog.text
    assert [row["step"] for row in more] == [8, 16, 20, 24, 32, 40] and len(calls) == 20
    rates = {row["step"]: row["learning_rate"] for row in whole}
    assert [row["learning_rate"] for row in more[3:]] == pytest.approx(
        [rates[step] for step in (24, 32, 40)], abs=1e-9)
    losses = [float(value.detach()) for value in calls]
    assert [row["loss"] for row in more[3:]] == pytest.approx(
        [sum(part) / len(part) for part in (losses[:4], losses[4:12], losses[12:])])
    assert len(learn(asked, saved=saved)[1]) == 6, "the state is that of the new length"


def test_fewer_steps_than_asked_before_end_an_interrupted_training(tmp_path):
    """Interrupted at step 10 of 30; 15 are asked for."""
    class Stop(Exception):
        pass

    def stop(model, batch):
        if len(seen) == 12:
            raise Stop
        seen.append(1)
        return squared(model, batch)

    seen, saved = [], tmp_path / "state.ckpt"
    with pytest.raises(Stop):
        train(linear(), four, stop, Schedule(30, 0.02, decay="cosine", validate_every=5),
              seed=3, device="cpu", saved=saved)
    rows = learn(Schedule(15, 0.02, decay="cosine", validate_every=5), saved=saved)[1]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-12)


def test_says_how_far_it_is_where_no_terminal_shows(monkeypatch, caplog):
    """A line a minute; each step, where a minute is no time."""
    monkeypatch.setattr("bidsapp.training.LOG_EVERY", 0.0)
    with caplog.at_level("INFO", "qsphere"):
        learn(Schedule(6, 0.02, validate_every=3, patience=9), validate=error, name="a network")
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "a network: training for 6 steps at most"
    assert [line.split(",")[0] for line in lines[1:]] == [
        f"a network: step {k} of 6" for k in range(1, 7)]
    assert re.search(r"step 2 of 6, loss \d\S*, about \d+ s left", lines[2])
    assert re.search(r"step 5 of 6, .*, validation \d\S* at step 3 \(best \d\S*\), about", lines[5])
    caplog.clear()
    monkeypatch.setattr("bidsapp.training.LOG_EVERY", 60.0)
    with caplog.at_level("INFO", "qsphere"):
        learn(Schedule(6, 0.02))
    assert len(caplog.records) == 1


def test_steps_of_other_work_are_told(monkeypatch, caplog):
    clock = iter([0.0, 0.0, 120.0, 260.0])
    monkeypatch.setattr("bidsapp.progress.time.monotonic", lambda: next(clock))
    with caplog.at_level("INFO", "qsphere"):
        assert list(track([7, 8, 9], "rish: registering")) == [7, 8, 9]
    assert [r.getMessage() for r in caplog.records] == [
        "rish: registering 1 of 3", "rish: registering 2 of 3, about 4 min left",
        "rish: registering 3 of 3, about 2 min left"]


def test_stops_early_and_keeps_the_best():
    scores = iter([5.0, 3.0, 4.0, 6.0, 1.0])
    kept = []

    def validate(model):
        kept.append(model[1].weight.detach().clone())
        return next(scores)

    model, rows = learn(Schedule(100, 0.02, validate_every=10, patience=2), validate=validate)
    assert [row["validation"] for row in rows] == [5.0, 3.0, 4.0, 6.0]
    torch.testing.assert_close(model[1].weight, kept[1], rtol=0, atol=0)


def test_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    learn(Schedule(3, 0.02))
    torch.testing.assert_close(torch.randn(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("decay,rates", [("step", [1, 0.1, 0.01, 0.01]),
                                         ("constant", [1, 1, 1, 1]),
                                         ("cosine", [0.853553, 0.5, 0.146447, 0])])
def test_learning_rate_falls_as_said(decay, rates):
    """The rate of the step that follows each validation."""
    _, rows = learn(Schedule(8, 1e-3, decay=decay, validate_every=2))
    assert [row["learning_rate"] * 1e3 for row in rows] == pytest.approx(rates, abs=1e-5)


def test_learning_rate_falls_at_a_plateau():
    """Two validations without progress: × 0.9 from the next step on."""
    scores = iter([5.0, 3.0, 4.0, 6.0, 4.0, 4.0, 4.0])
    _, rows = learn(Schedule(7, 1e-3, decay="plateau", factor=0.9, plateau=2, validate_every=1),
                    validate=lambda model: next(scores))
    rates = [1, 1, 1, 1, 0.9, 0.9, 0.81]
    assert [row["learning_rate"] * 1e3 for row in rows] == pytest.approx(rates)


def test_a_state_from_before_a_field_existed_is_taken_up(tmp_path):
    saved = tmp_path / "state.ckpt"
    whole, _ = learn(Schedule(4, 0.02), saved=saved)
    state = torch.load(saved, weights_only=True)
    del state["of"]["schedule"]["plateau"]
    torch.save(state, saved)
    again, _ = learn(Schedule(4, 0.02), linear(7), saved=saved)
    torch.testing.assert_close(again[1].weight, whole[1].weight, rtol=0, atol=0)


def test_gradient_is_clipped():
    """Steps of SGD are at most the learning rate times the norm, before momentum adds up."""
    model = linear()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    learn(Schedule(1, 0.1, "sgd", clip=0.01), model)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm() == pytest.approx(0.001, rel=1e-4)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"the loss is nan at step 2\. Lower the learning rate"):
        train(linear(), four, lambda m, b: squared(m, b) * torch.nan,
              Schedule(10, 0.1, validate_every=2), seed=0, device="cpu",
              saved=tmp_path / "state.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"steps": 0}, {"optimizer": "magic"}, {"decay": "linear"},
                                 {"learning_rate": 0}, {"patience": 0, "validate_every": 0},
                                 {"factor": 1.0}, {"plateau": 0}])
def test_a_schedule_refuses_bad_values(bad):
    with pytest.raises(UsageError, match="schedule"):
        Schedule(**{"steps": 10, "learning_rate": 0.1} | bad)


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from bidsapp.training import Schedule, seeded, train
def batch(generator):
    x = torch.randn(8, 3, generator=generator)
    return [(x, x.sum(1, keepdim=True))]
with seeded(0):
    model = nn.Linear(3, 1)
rows = train(model, batch, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(),
             Schedule(200, 0.05, decay="cosine"), seed=0, device="cpu", devices=(2, 1))
(Path(sys.argv[1]) / os.environ["RANK"]).write_text(repr(model.weight.flatten().tolist()))
"""


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    """Started by torchrun; gradients are averaged, so both end with the same weights."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", script, tmp_path], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert found[0] == found[1] == pytest.approx([1, 1, 1], abs=1e-3)


def test_processes_are_those_of_srun_or_torchrun(monkeypatch):
    def under(**env):
        for name in [k for k in os.environ if k.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return processes()

    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}
    assert under() == (0, (1, 1))
    assert under(SLURM_PROCID="0", SLURM_NTASKS="4") == (0, (1, 1))  # a batch script
    assert under(**step, SLURM_NTASKS_PER_NODE="2") == (3, (2, 2))
    with pytest.raises(UsageError, match="srun --nodes 2 --ntasks-per-node 2"):
        under(**step)
    assert under(TORCHELASTIC_RUN_ID="x", RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2") == (
        1, (2, 2))
