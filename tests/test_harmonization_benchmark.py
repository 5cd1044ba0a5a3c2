"""benchmarks/harmonization.py and its tables: sites as the unit, people apart, work kept."""

import csv
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from support import ROOT, combat_package

sys.path.insert(0, str(ROOT / "benchmarks"))
import harmonization
import harmonization_tables as tables
import table

from bidsapp.registration import template
from bidsapp.registration.image import Image

DESIGN = ["--sites", "2", "--participants", "6", "--voxel-size", "8", "--directions", "12",
          "--methods", "harmonize_mica", "harmonize_mica@groups"]


def over_people(values, sites="BCDEFG"):
    """A Series over (site, participant) of an array (site, participant)."""
    return pd.DataFrame(values, index=pd.Index(list(sites[:len(values)]), name="site"),
                        columns=pd.Index(range(np.shape(values)[1]), name="participant")).stack()


# --- statistics


@pytest.mark.parametrize("values,p", [
    ([1, 2, 3, 4, 5, 6], 2 / 64),
    ([-1, -2, -3, -4, -5, -6], 2 / 64),
    ([1, 1, 1, 1, 1, -1], 14 / 64),  # |sum| is 6 in 2 and 4 in 12 of the 64 choices
    ([1, -1], 1.0), ([3], 1.0)])
def test_sign_flips_are_counted(values, p):
    assert tables.sign_flip(values) == p


def test_interval_is_students():
    values = np.random.default_rng(0).normal(1, 2, 6)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert tables.interval(values) == pytest.approx((values.mean(), *wanted))
    assert np.isnan(tables.interval([3.0])[1:]).all()


def test_every_site_counts_alike_in_the_same_people():
    """A site of large errors weighs no more than another, and a person without a harmonized scan is
    not in what it is compared with."""
    before = over_people([[1.0, 3.0], [100.0, 300.0]])
    after = over_people([[0.5, 1.5], [200.0, np.nan]]).dropna()
    assert np.exp(tables.log_change(after, before)).tolist() == pytest.approx([0.5, 2.0])


def test_slope_is_within_sites():
    """Sites of older people and other means do not tilt the slope; its interval is that of the
    sites' slopes where all weigh alike."""
    rng = np.random.default_rng(1)
    ages = np.array([[20.0, 40, 60, 80]] * 5) + 10 * np.arange(5)[:, None]
    truth = 0.002 * ages + 0.1 * rng.standard_normal((5, 1))
    share = np.array([0.6, 0.7, 0.9, 0.8, 0.5])
    found = share[:, None] * truth + rng.standard_normal((5, 1))
    assert tables.slope_ratio(*map(over_people, (found, truth, ages))) == pytest.approx(
        tables.interval(share))
    assert tables.slope_ratio(*(over_people(v[:1]) for v in (found, truth, ages)))[0] \
        == pytest.approx(0.6)


# --- ComBat


@pytest.fixture
def regions():
    """(means at the site, at the reference, fold and age) of two sites."""
    rng = np.random.default_rng(2)
    ages = rng.uniform(20, 80, (2, 8)).round()  # neuroCombat holds them in float32
    there = np.stack([1 + 0.01 * ages, 2 - 0.005 * ages], -1) + 0.05 * rng.standard_normal(
        (2, 8, 2))
    here = 1.1 * there + [0.2, -0.1] + 0.02 * rng.standard_normal((2, 8, 2))
    people = pd.DataFrame({"age": over_people(ages), "fold": over_people([[0, 1] * 4] * 2)})
    return *(pd.DataFrame({k: over_people(v[..., i]) for i, k in enumerate("ab")})
             for v in (here, there)), people


def test_combat_is_that_of_the_package(regions):
    """Applied to those it was fitted to, it gives what neuroCombat gives for them."""
    here, there, people = (part.loc[["B"]] for part in regions)
    found = tables.combat_unseen(here, there, people["age"], here, people["age"])
    wanted, _ = combat_package.harmonize(
        pd.concat([there, here]), pd.DataFrame({"batch": ["A"] * 8 + ["B"] * 8,
                                                "age": np.tile(people["age"], 2)}), "A")
    np.testing.assert_allclose(found, wanted[8:], atol=1e-9)


def test_combat_has_not_seen_whom_it_is_applied_to(regions):
    here, there, people = regions
    found = tables.combat(here, there, people)
    assert found.index.sort_values().equals(here.index.sort_values())
    assert (found - there).abs().to_numpy().mean() < 0.3 * (here - there).abs().to_numpy().mean()
    tested = people["fold"] == 0
    there, here = there.copy(), here.copy()
    there[tested] += 10
    here.loc[("B", 0)] += 1
    again = tables.combat(here, there, people)
    same = again.loc[tested[tested].index.drop(("B", 0))]
    pd.testing.assert_frame_equal(same, found.loc[same.index])


# --- tables


def rows_of(errors):
    """Rows as of a run, with an error of every measure by (method, site) and six sites."""
    found = []
    for method, values in errors.items():
        for (name, value), who in ((pair, w) for pair in zip("BCDEFG", values, strict=True)
                                   for w in "12"):
            base = {"site": f"site{name}", "fold": int(who) - 1, "method": method,
                    "participant": who, "age": 30.0 * int(who), "train": 1.0, "apply": 1.0,
                    "shell": "b1200"}
            for against, tissue, key in ((a, t, k) for a in ("truth", "scan") for t in ("WM", "GM")
                                         for k in ("signal", "fa", "md")):
                found.append({**base, "measure": f"NMSE {key}", "against": against,
                              "tissue": tissue, "value": value})
            found += [{**base, "measure": f"mean {key}", "against": against, "tissue": tissue,
                       "value": 1.0 + 0.1 * int(who) + value * (against == "found")}
                      for against in ("found", "truth", "scan") for tissue in ("WM", "GM")
                      for key in ("fa", "md")]
    return pd.DataFrame(found)


def test_tables_mark_what_is_not_lowered():
    """Lowered at all six sites: no mark; at five: °; raised at all: ▲. Recommended methods with a
    mark are named below the table; published changes stand against the scan alone."""
    results = tables.Results(rows_of({
        "none": [0.1] * 6, "harmonize_rish": [0.04, 0.05, 0.06, 0.05, 0.04, 0.06],
        "harmonize_hybrid": [0.11, *[0.05] * 5], "harmonize_golkov": [0.2] * 6}))
    lines = results.error_table("b1200", "scan")
    table = [line.split(" | ") for line in lines if "|" in line]
    cells = {first.strip("| `"): second for first, second, *_ in table}
    assert cells["none"] == "10"
    assert cells["harmonize_rish"] == "5 (−51 [−59, −40])"
    assert cells["harmonize_hybrid"].endswith("]°)")
    assert cells["harmonize_golkov"] == "20 (+100 [+100, +100]▲)"
    assert "- `harmonize_hybrid`: S/S0 WM (" in lines[-1]
    assert "rish" not in lines[-1] and "golkov" not in lines[-1]
    assert [c for c in cells if "published" in c]
    assert not [line for line in results.error_table("b1200", "truth") if "published" in line]
    bias = [line for line in results.mean_table("b1200", "truth") if "golkov" in line]
    # 0.2 above means of 1.1 and 1.2
    assert bias[0].split(" | ")[1] == "+17.4 [+17.4, +17.4] (17.4)"


@pytest.mark.parametrize("sites", ["BCDEFG", "B"])
def test_tables_are_written_as_data(tmp_path, sites, capsys):
    """With the columns of benchmarks/data; of one site they have no intervals."""
    rows = rows_of({"none": [0.1] * 6, "harmonize_rish": [0.05] * 6, "rescan": [0.01] * 6})
    for name in sites:
        (place := tmp_path / f"site{name}").mkdir()
        rows[rows["site"] == place.name].to_csv(place / "fold0_none.csv", index=False)
        (place / "site.json").write_text(json.dumps(
            {k: 1 for k in table.columns("harmonization_sites") if k != "site"}
            | {"name": place.name}))
    tables.main([str(tmp_path), "--csv", str(tmp_path / "csv")])
    assert "| none |" in capsys.readouterr().out
    names = {"sites": "sites", "b1200_scan": "scan", "b1200_truth": "truth",
             "b1200_scan_bias": "scan_bias", "b1200_truth_bias": "truth_bias",
             "b1200_structure": "structure"}
    assert {p.stem for p in (tmp_path / "csv").iterdir()} == names.keys()
    for name, of in names.items():
        with (tmp_path / "csv" / f"{name}.csv").open(newline="") as file:
            head, *cells = csv.reader(file)
        wanted = table.columns("pairs_scan" if sites == "B" and of in ("scan", "truth")
                               else f"harmonization_{of}")
        assert head == wanted and {len(row) for row in cells} == {len(head)}
    assert cells[1][0] == "harmonize_rish" and len(cells) >= 3


def test_a_row_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 cells under 4 columns"):
        table.show("dti", [["21 volumes", "1 k"]], tmp_path / "dti.csv")
    assert not (tmp_path / "dti.csv").exists()


# --- registrations


def test_registrations_with_a_template_are_kept(tmp_path):
    images = [Image(np.full((2, 2, 2), k, np.float32), np.eye(4)) for k in range(3)]
    calls = []

    def register(fixed, moving, work_dir=None):
        calls.append((fixed, moving))
        return np.full((2, 2, 2, 3), len(calls), float)

    with mock.patch.object(template, "register", register), \
            harmonization.keep_registrations(tmp_path):
        first = [template.register(images[0], images[k]) for k in (1, 2)]
        again = [template.register(images[0], images[k]) for k in (1, 2)]
    np.testing.assert_array_equal(first, again)
    assert len(calls) == 2 and not list(tmp_path.glob("*.part"))


# --- the whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sites")
    harmonization.main(["--out", str(out), *DESIGN, "--only-sites", "siteC"])
    assert not (out / "siteB").exists()
    harmonization.main(["--out", str(out), *DESIGN])
    return out


@pytest.mark.slow
def test_what_is_there_is_not_done_again(folder):
    rows = tables.read(folder)
    with mock.patch.object(harmonization, "Site", side_effect=AssertionError):
        harmonization.main(["--out", str(folder), *DESIGN])
    lost = folder / "siteB" / "fold1_harmonize_mica.csv"
    before = pd.read_csv(lost)
    lost.unlink()
    with mock.patch.object(harmonization, "simulate", side_effect=AssertionError), \
            mock.patch.object(harmonization, "pack", side_effect=AssertionError):
        harmonization.main(["--out", str(folder), *DESIGN])
    pd.testing.assert_frame_equal(pd.read_csv(lost).drop(columns="apply"),
                                  before.drop(columns="apply"))
    assert len(tables.read(folder)) == len(rows)
    with pytest.raises(SystemExit):
        harmonization.main(["--out", str(folder), *DESIGN, "--random-seed", "0"])


@pytest.mark.slow
def test_people_are_apart(folder):
    """Between sites, folds, and the groups of an unpaired training."""
    arguments = harmonization.parser().parse_args(["--out", str(folder), *DESIGN])
    arguments.shells = tuple(arguments.shells)
    sites = [harmonization.Site(arguments, number) for number in range(2)]
    one, other = (next(iter(s.scans.values())).dwi.signal for s in sites)
    assert one.shape != other.shape or not np.allclose(one, other)
    for own in sites:
        assert len(own.travelling) == 6 and len(own.others) == 3
        assert {*own.tested(0), *own.tested(1)} == {*own.travelling}
        for fold in range(2):
            tested = {*own.tested(fold)}
            _, table, _ = harmonization.variant("harmonize_mica", own, tested)
            assert {*table["participant"]} == {*own.travelling} - tested
            _, unpaired, _ = harmonization.variant("harmonize_mica@groups", own, tested)
            groups = {b: {*rows["participant"]} for b, rows in unpaired.groupby("batch")}
            assert groups == {own.name: {*own.travelling} - tested, "siteA": {*own.others}}
            ages = [[own.ages[p] for p in people] for people in groups.values()]
            assert abs(np.mean(ages[0]) - np.mean(ages[1])) < 60 / 6


@pytest.mark.slow
def test_tables_of_a_run(folder, capsys):
    tables.main([str(folder), "--figure", str(folder / "sites.svg")])
    text = capsys.readouterr().out
    assert text == (folder / "table.md").read_text() + "\n" and "nan" not in text
    for name in ("none", "MPPCA", "smoothing", "`harmonize_mica`", "`harmonize_mica@groups`",
                 "`harmonize_combat`", "rescan", "siteB", "siteC"):
        assert f"\n| {name} |" in text
    assert "<svg" in (folder / "sites.svg").read_text()


def test_slope_over_age_is_of_ageing():
    """No tissue property is correlated with age, and people's mean stays as it was drawn."""
    options = harmonization.PhantomOptions(Path(), participants=8)
    before = harmonization.recruit(options)
    after = harmonization.uncorrelated_with_age(before)
    ages, drawn, tissue = (np.array([getattr(p, k) for p in people]) for people, k in (
        (before, "age"), (before, "tissue"), (after, "tissue")))
    assert np.abs(np.corrcoef(ages, drawn.T)[0, 1:]).max() > 0.1
    assert np.abs(np.corrcoef(ages, tissue.T)[0, 1:]).max() < 1e-12
    np.testing.assert_allclose(tissue.mean(0), drawn.mean(0), atol=1e-12)


def test_site_of_development_is_in_no_table():
    arguments = harmonization.parser().parse_args(["--out", "unused"])
    seeds = {arguments.random_seed + number for number in range(arguments.sites)}
    assert arguments.sites >= 6 and 0 not in seeds
    drawn = harmonization.site.draw_sites(harmonization.phantom_options(arguments, 0, 2))[1]
    for where in harmonization.site.draw_sites(
            harmonization.phantom_options(arguments, arguments.random_seed, 7))[1:]:
        assert where.echo_time != drawn.echo_time
