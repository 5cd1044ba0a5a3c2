"""The command line: labels, config file, refusals, and what importing it costs."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from bidsapp import __version__, cli
from bidsapp.errors import UsageError
from bidsapp.options import Options


def parse(*argv):
    return cli.parse(["/in", "/out", "participant", *argv])


def test_labels_with_and_without_prefix():
    options = parse("--participant_label", "sub-01", "02", "--session-id", "ses-a", "b")
    assert options.participant_label == ("01", "02")
    assert options.session_label == ("a", "b")


def test_every_argument_is_an_option():
    known = {f.name for f in fields(Options)}
    actions = {a.dest for a in cli.parser()._actions} - {"help", "version"}
    assert actions == known


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        parse().device = "cpu"


def test_derivatives_are_named():
    assert parse("-d", "qsiprep=/q", "/data/hcp").derivatives == (
        ("qsiprep", Path("/q")), ("hcp", Path("/data/hcp")))


@pytest.mark.parametrize("text,mb", [("4000", 4000), ("4GB", 4000), ("4G", 4000), ("512MB", 512)])
def test_memory_units(text, mb):
    assert parse("--mem", text).mem_mb == mb


def test_threads_default_to_all_of_nprocs():
    assert parse("--nprocs", "3").omp_nthreads is None
    assert parse().nprocs == len(os.sched_getaffinity(0))


def test_config_file_lies_below_the_command_line(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text('device = "cpu"\nrandom_seed = 7\nestimate = ["dti"]\ndry_run = true\n'
                    '[derivatives]\nq = "/q"\n')
    options = parse("--config-file", str(path), "--random-seed", "8")
    assert (options.device, options.random_seed, options.estimate, options.dry_run) == (
        "cpu", 8, ("dti",), True)
    assert options.derivatives == (("q", Path("/q")),)


@pytest.mark.parametrize("text,message", [
    ("nonsense = 1", "no option is called 'nonsense'"), ("a = [", "cannot be read as TOML"),
    ('dry-run = "yes"', "true, false or a number is needed"),
    ('derivatives = ["a=/x"]', "a table is needed")])
def test_config_file_refused(tmp_path, text, message):
    path = tmp_path / "options.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse("--config-file", str(path))


@pytest.mark.parametrize("bids,out,message", [
    ("d", "d", "OUTPUT_DIR is BIDS_DIR"),
    ("d", "d/out", "only derivatives/"),
    ("d/bids", "d", "lies inside OUTPUT_DIR"),
])
def test_output_that_would_mix_with_input(tmp_path, bids, out, message, capsys):
    assert cli.main([str(tmp_path / bids), str(tmp_path / out), "participant"]) == 2
    assert message in capsys.readouterr().err


def test_output_in_derivatives_is_accepted(tmp_path):
    cli.parse([str(tmp_path), str(tmp_path / "derivatives/qsphere"), "participant"])


def test_numbers_below_one(capsys):
    assert cli.main(["/in", "/out", "participant", "--nprocs", "0"]) == 2
    assert "at least 1 is needed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "0"])
def test_device_that_is_none(name, capsys):
    assert cli.main(["/in", "/out", "participant", "--device", name]) == 2
    assert "auto, cpu, cuda or cuda:N is needed" in capsys.readouterr().err


@pytest.mark.parametrize("trees", [["a/x", "b/x"], ["raw=a"], ["x=a", "x=b"]])
def test_names_of_derivatives_that_clash(trees, capsys):
    assert cli.main(["/in", "/out", "participant", "-d", *trees]) == 2
    assert "Give each a name of its own" in capsys.readouterr().err


def test_path_of_a_derivative_may_hold_an_equals_sign():
    assert parse("-d", "qsi=/a=1/b").derivatives == (("qsi", Path("/a=1/b")),)
    assert parse("-d", "/a=1/b").derivatives == (("b", Path("/a=1/b")),)


@pytest.mark.parametrize("argv", [
    ["participant", "--train", "harmonize_combat"], ["participant", "--folds", "3"],
    ["group", "--harmonize", "x"], ["group", "--estimate", "dti"], ["group", "--reports-only"]])
def test_option_of_the_other_level(argv, capsys):
    assert cli.main(["/in", "/out", *argv]) == 2
    assert "does not belong to the" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--harmonize", "shrek"], ["--upsample", "nett"],
                                  ["--estimate", "dtti"]])
def test_method_that_does_not_exist(tmp_path, argv, capsys):
    (tmp_path / "in").mkdir()
    code = cli.main([str(tmp_path / "in"), str(tmp_path / "out"), "participant", *argv])
    assert code == 2
    message = capsys.readouterr().err
    assert "no such" in message and "vailable" in message


def test_nearest_method_is_suggested(tmp_path, capsys):
    cli.main([str(tmp_path / "in"), str(tmp_path / "out"), "participant", "--estimate", "dtti"])
    assert "Did you mean estimate_dti?" in capsys.readouterr().err


def test_memory_that_ran_out_is_no_defect(capsys):
    def work():
        raise MemoryError

    assert cli.guarded("qsphere", work, lambda: 0) == 1
    told = capsys.readouterr().err
    assert told.startswith("qsphere: memory ran out. Process fewer") and "unexpected" not in told


def test_help_imports_nothing_heavy():
    code = ("import sys, bidsapp.cli; bidsapp.cli.parser().format_help(); "
            "print([m for m in ('torch', 'bids', 'nibabel', 'dipy', 'pandas', 'numpy') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_and_program_are_the_same():
    done = subprocess.run([sys.executable, "-m", "bidsapp", "--version"], capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip() == f"QSphere {__version__}"
