"""The list of tools/mutants.py fits the code as it is; the mutants themselves run in no test."""

import re
import sys

import pytest

from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from mutants import MUTANTS, find_tests


def test_there_are_many():
    assert len(set(MUTANTS)) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.error)
def test_a_mutant_has_its_place_and_its_tests(mutant):
    text = (ROOT / "bidsapp" / mutant.file).read_text()
    assert text.count(mutant.text) == 1
    changed = text.replace(mutant.text, mutant.replacement)
    assert changed != text
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
    names = re.findall(r"test_\w+\.py", mutant.tests)
    assert names and all(len(find_tests(name, ROOT)) == 1 for name in names)
