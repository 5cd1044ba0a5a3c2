"""`--set METHOD.KEY=VALUE`: what it may name, what it may say, and whom it reaches."""

import json
import re
import tomllib

import pandas as pd
import pytest

from bidsapp import cli, hyperparameters, kinds, methods, run, training
from bidsapp.errors import UsageError
from bidsapp.harmonization import harmonizer
from bidsapp.methods.estimate_direction import method as estimate_direction
from bidsapp.methods.upsample_unet import method as upsample_unet
from bidsapp.networks import autoencoder, builder
from bidsapp.recipe.plan import choose
from bidsapp.volumetric import corruption, estimator, learn
from support.app import qsphere

SHRESNET = "harmonize_shresnet"


def given(method, *texts, sloppy=False, training=True):
    """Read the hyper-parameters that `--set` changes of one method."""
    return methods.read_settings([f"{method}.{text}" for text in texts], [methods.get(method)],
                                 training, sloppy).get(method)


def with_settings(method, *texts, **how):
    return methods.get(method, context=kinds.MethodContext(
        settings={method: given(method, *texts, **how)}))


@pytest.mark.parametrize("text,expected", [
    ("network.blocks=4", {"training.network.blocks": 4}),
    ("training.network.blocks=4", {"training.network.blocks": 4}),
    ("epoch=5_000", {"training.epoch": 5000}),
    ("held_out=0.5", {"training.held_out": 0.5}),
    ("held_out=1", {"training.held_out": 1.0}),
    ("deformable=false", {"training.deformable": False}),
    ("output=series", {"training.output": "series"}),
    ('output="series"', {"training.output": "series"}),
    ("stages.2.epochs=3", {"training.stages.2.epochs": 3}),
    ("stages.epochs=3", {"training.stages.1.epochs": 3, "training.stages.2.epochs": 3}),
    ("stages.decay=cosine", {"training.stages.2.decay": "cosine"})])
def test_values_are_those_of_toml(text, expected):
    found = given(SHRESNET, text)
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize("method,text,message", [
    (SHRESNET, "network.block=4", r"no hyper-parameter network\.block\. .*Did you mean "
                                  r"network\.blocks\?"),
    (SHRESNET, "stages.3.epochs=4", r"no hyper-parameter stages\.3\.epochs"),
    (SHRESNET, "network=4", "no hyper-parameter network"),
    (SHRESNET, "network.blocks=two", "a whole number is needed, such as 2"),
    (SHRESNET, "network.blocks=2.5", "a whole number is needed"),
    (SHRESNET, "network.blocks=true", "a whole number is needed"),
    (SHRESNET, "network.blocks=0", "at least 1 is needed"),
    (SHRESNET, "held_out=nan", "finite number of at least 0"),
    (SHRESNET, "held_out=-0.1", "finite number of at least 0"),
    (SHRESNET, "deformable=0", "true or false is needed, such as true"),
    (SHRESNET, "output=4", "a text is needed, such as change"),
    (SHRESNET, "output=serie", "one of change, series is needed"),
    (SHRESNET, "stages.2.decay=cosin", "one of constant, step, cosine, plateau is needed"),
    ("harmonize_cyclic", "stages.betas=0.5", "a list is needed"),
    ("harmonize_cyclic", "stages.betas=[]", "a list is needed"),
    ("harmonize_cyclic", 'stages.betas=["a"]', "a number is needed"),
    ("harmonize_mica", "l_max=4", "harmonize_mica has no hyper-parameters")])
def test_values_that_are_refused(method, text, message):
    with pytest.raises(UsageError, match=message):
        given(method, text)


def test_texts_are_those_that_the_program_knows():
    known = {"architecture": tuple(builder.ARCHITECTURES), "networks": upsample_unet.NETWORKS,
             "output": harmonizer.OUTPUTS, "input": (learn.ANY, learn.TABLE),
             "start": (learn.BUNDLED, learn.RANDOM),
             "corruption": corruption.KINDS,
             "loss": estimator.LOSSES, "target": (estimate_direction.AXIS,
                                                  estimate_direction.ANGLES),
             "optimizer": tuple(training.OPTIMIZERS), "decay": training.DECAYS,
             "layer": autoencoder.LAYERS, "nonlinearity": tuple(autoencoder.NONLINEARITIES),
             "space": autoencoder.SPACES}
    assert known == hyperparameters.CHOICES
    for name in methods.names():
        for path, value in hyperparameters.values(
                hyperparameters.read(methods.get(name).folder)).items():
            if isinstance(value, str):
                assert value in hyperparameters.CHOICES[path.rpartition(".")[2]], (name, path)


def test_negative_numbers_where_there_are_some():
    assert given("estimate_scnn3", "trained_for.shells.3.b_delta=-0.4") == {
        "training.trained_for.shells.3.b_delta": -0.4}
    with pytest.raises(UsageError, match=r"at least -0\.5 is needed"):
        given("estimate_scnn3", "trained_for.shells.3.b_delta=-0.6")


def test_settings_win_over_variants():
    """The file says 2 stages, of 5 and 100 epochs; --sloppy says one, of 10."""
    plain, changed = methods.get(SHRESNET), with_settings(SHRESNET, "stages.epochs=3")
    assert [s["epochs"] for s in plain.settings("training")["stages"]] == [5, 100]
    assert [s["epochs"] for s in changed.settings("training")["stages"]] == [3, 3]
    brief = methods.get(SHRESNET, context=kinds.MethodContext(
        sloppy=True, settings={SHRESNET: given(SHRESNET, "stages.epochs=3", sloppy=True)}))
    (stage,) = brief.settings("training")["stages"]
    assert stage["epochs"] == 3 and brief.settings("training")["deformable"] is False
    with pytest.raises(UsageError, match=r"no hyper-parameter stages\.2\.epochs"):
        given(SHRESNET, "stages.2.epochs=3", sloppy=True)
    one = with_settings("estimate_scnn2", "schedule.learning_rate=0.5")
    assert one.settings("training", "one")["schedule"]["learning_rate"] == 0.5
    assert hyperparameters.read(plain.folder)["training"]["stages"][0]["epochs"] == 5


def test_the_last_of_two_values_holds():
    assert given(SHRESNET, "network.blocks=4", "network.blocks=5") == {
        "training.network.blocks": 5}


@pytest.mark.parametrize("argv,message", [
    (["--set", "dti.fit.b_maxx=2000"], r"no hyper-parameter fit\.b_maxx.* Did you mean fit\.b_max"),
    (["--set", "dtti.fit.b_max=2000"], "Did you mean dti"),
    (["--set", "freewater.network.batch=64"], r"does not use estimate_freewater; its methods are: "
                                              r"estimate_dti, estimate_smt, estimate_scnn2\."),
    (["--set", "scnn2.network.hidden=64"], "group --train estimate_scnn2"),
    (["--set", "shresnet.network.blocks=4"], "group --train harmonize_shresnet"),
    (["--set", "dti.fit.b_max"], "METHOD.KEY=VALUE is needed"),
    (["--set", "fit=2000"], "METHOD.KEY=VALUE is needed")])
def test_refused_at_participant_level(tmp_path, bids_tree, capsys, argv, message):
    assert qsphere(bids_tree(), tmp_path / "out", "participant", *argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv,message", [
    (["--train", "shresnet", "--set", "shresnet.network.block=4"], "Did you mean network.blocks?"),
    (["--train", "rish", "--set", "shresnet.network.blocks=4"], "does not use harmonize_shresnet"),
    (["--set", "shresnet.network.blocks=4"], "its methods are: none"),
    (["--train", "rish", "--set", "dti.fit.b_max=2000"], "option to the participant level"),
    (["--train", "combat", "--set", "combat.x=4"], "has no hyper-parameters")])
def test_refused_at_group_level(tmp_path, bids_tree, capsys, argv, message):
    assert qsphere(bids_tree(), tmp_path / "out", "group", *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["groups=2", "trained_for.snr=[1, 2]", "network.shells=3"])
def test_what_a_training_takes_from_the_runs_is_refused(text):
    method = with_settings("estimate_mlp2", text)
    with pytest.raises(UsageError, match=f"{text.partition('=')[0]}.*takes it from the runs"):
        method.fit(kinds.Cohort(pd.DataFrame({"snr_b0": [50.0]})), kinds.TrainingSettings())


def test_options_that_it_replaces(caplog):
    """--epochs for every method that has stages, --blocks for shresnet, which says what to write;
    --set wins over both."""
    def trained(*argv):
        options = cli.parse(["/in", "/out", "group", *argv, "--train", "shresnet", "hybrid",
                             "rish"])
        return {m.name: m.changed_settings for m in run.trained_methods(options)}

    assert trained() == {SHRESNET: {}, "harmonize_hybrid": {}, "harmonize_rish": {}}
    assert not caplog.records
    epochs = {"training.stages.1.epochs": 7, "training.stages.2.epochs": 7}
    assert trained("--epochs", "7", "--blocks", "3") == {
        SHRESNET: {**epochs, "training.network.blocks": 3}, "harmonize_hybrid": epochs,
        "harmonize_rish": {}}
    assert caplog.messages == [
        "--blocks 3 is replaced by --set harmonize_shresnet.network.blocks=3."]
    assert trained("--blocks", "3", "--set", "shresnet.network.blocks=5")[SHRESNET] == {
        "training.network.blocks": 5}


def test_settings_of_a_configuration_file(tmp_path):
    """options.toml of a log may be given again."""
    options = cli.parse(["/in", "/out", "participant", "--set", "dti.fit.b_max=900",
                         "--estimate", "dti", "--set", "dti.fit.b_max=1000"])
    assert options.set == ("dti.fit.b_max=900", "dti.fit.b_max=1000")
    path = tmp_path / "options.toml"
    path.write_text('set = ["dti.fit.b_max=900"]\n')
    (method,) = choose(cli.parse(["/in", "/out", "participant", "--estimate", "dti",
                                  "--config-file", str(path)])).methods
    assert method.settings("fit") == {"b_max": 900.0}


@pytest.mark.slow
def test_a_setting_is_computed_again_and_stands_beside_the_map(tmp_path, bids_tree, capsys):
    """b_max below the second shell of the tree; the other estimate is left alone."""
    bids, out = bids_tree(), tmp_path / "out"
    argv = (bids, out, "participant", "--participant-label", "01", "--estimate", "dti", "smt")
    fa = out / "sub-01/dwi/sub-01_model-tensor_param-fa_dwimap"

    def parameters():
        return json.loads(fa.with_suffix(".json").read_text())["Model"]["Parameters"]

    assert qsphere(*argv) == 0
    assert "Settings" not in parameters() and parameters()["MaximumB"] == 1500
    before = fa.with_suffix(".nii.gz").read_bytes()
    capsys.readouterr()
    changed = (*argv, "--set", "dti.fit.b_max=2500")
    assert qsphere(*changed, "--dry-run") == 0
    assert "estimate_dti; fit.b_max = 2500.0" in capsys.readouterr().out
    assert qsphere(*changed) == 0
    log = capsys.readouterr().err
    assert "estimate_dti on" in log and "estimate_smt on" not in log
    assert "differ from the method's own: fit.b_max = 2500.0." in (
        out / "logs/CITATION.md").read_text()
    assert parameters()["Settings"] == {"fit.b_max": 2500.0} and parameters()["MaximumB"] == 2500
    assert fa.with_suffix(".nii.gz").read_bytes() != before
    options = [tomllib.loads(p.read_text()) for p in (out / "sub-01/log").glob("*/options.toml")]
    assert ["dti.fit.b_max=2500"] in [o.get("set") for o in options]
    assert qsphere(*changed) == 0
    assert "complete and unchanged" in capsys.readouterr().err
    assert qsphere(*argv) == 0
    assert fa.with_suffix(".nii.gz").read_bytes() == before
