"""Hyper-parameters of a method: the tables of its training.toml, and what `--set` changes there.

A hyper-parameter is named by its path in the file, `training.network.blocks`. Two parts may be left
out where a user names one: `training.` at the start, and the number of an entry in a list of tables
(`stages.epochs` are the epochs of every stage, `stages.2.epochs` those of the second).
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bidsapp.errors import UsageError

TRAINING = "training"
"""The table that the group level reads; the participant level reads all others."""

SLOPPY = "sloppy"
ONE = "one"
VARIANTS = (ONE, SLOPPY)
"""Tables that hold other values of the tables beside them: for a network of one acquisition, and
for --sloppy."""

CHOICES = {"architecture": ("spherical", "perceptron", "shresnet", "golkov", "hybrid", "cyclic"),
           "output": ("change", "series"),
           "optimizer": ("adam", "adamw", "sgd"),
           "decay": ("constant", "step", "cosine", "plateau")}
"""Hyper-parameters that are a text, and what they may be, as of `networks.builder`,
`methods.harmonizer` and `training`."""


def read(folder: Path) -> dict[str, Any]:
    """Read the training.toml of a method's folder; empty where there is none."""
    path = folder / "training.toml"
    return tomllib.loads(path.read_text()) if path.is_file() else {}


def select(tables: Mapping[str, Any], name: str, variants: Sequence[str],
           settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give one table as a method uses it.

    Parameters
    ----------
    tables : mapping
        All of a training.toml.
    name : str
        The table.
    variants : sequence of str
        Those of VARIANTS whose values replace the table's own, the last one wins.
    settings : mapping
        Values by path (`resolve`), which win over all variants.

    Returns
    -------
    dict
        A copy of the table with these values.
    """
    table = tables[name]
    for variant in variants:
        table = _merge(table, tables[variant][name])
    known = dict(_leaves(table, f"{name}."))
    for path in known.keys() & settings.keys():
        table = _replace(table, path.split(".")[1:], settings[path])
    return table


def paths(tables: Mapping[str, Any], key: str, sloppy: bool = False) -> list[str]:
    """Find the paths that a key names.

    Parameters
    ----------
    tables : mapping
        All of a training.toml.
    key : str
        A path, or one without `training.` and the numbers of tables in lists.
    sloppy : bool
        Whether the variant for --sloppy holds.

    Returns
    -------
    list of str
        Several where a key names a value of every table of a list; empty if none is named.
    """
    return [path for path in values(tables, sloppy) if key in _spellings(path)]


def values(tables: Mapping[str, Any], sloppy: bool = False) -> dict[str, Any]:
    """List every hyper-parameter by its path; tables and sloppy as of `paths`."""
    variants = [SLOPPY] if sloppy else []
    return {path: value for name in tables if name not in VARIANTS
            for path, value in _leaves(select(tables, name, variants, {}), f"{name}.")}


def resolve(tables: Mapping[str, Any], method: str, key: str, text: str, sloppy: bool = False
            ) -> dict[str, Any]:
    """Read a value that `--set` gives.

    Parameters
    ----------
    tables : mapping
        All of the method's training.toml.
    method : str
        Its name, for messages.
    key, text : str
        The two sides of the equals sign: a key as in `paths`, and a TOML value. A text need
        not be quoted.
    sloppy : bool
        Whether the variant for --sloppy holds.

    Returns
    -------
    dict
        The value by every path that the key names.

    Raises
    ------
    UsageError
        There is no such hyper-parameter (says the nearest), or the value is of another type or
        outside of what it may be.
    """
    known, option = values(tables, sloppy), f"--set {method}.{key}={text}"
    if not known:
        raise UsageError(f"{option}: {method} has no hyper-parameters. Leave the option out.")
    chosen = paths(tables, key, sloppy)
    if not chosen:
        shortest = list(dict.fromkeys(_spellings(path)[-1] for path in known))
        near = difflib.get_close_matches(key.removeprefix(f"{TRAINING}."), shortest, 1, 0.4)
        raise UsageError(f"{option}: {method} has no hyper-parameter {key}. It has "
                         f"{', '.join(shortest)}." + (f" Did you mean {near[0]}?" if near else ""))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    found = {path: _checked(option, known[path], value) for path in chosen}
    choices = CHOICES.get(key.rpartition(".")[2], (value,))
    if value not in choices:
        raise UsageError(f"{option}: one of {', '.join(choices)} is needed.")
    return found


def _checked(option: str, default: Any, value: Any) -> Any:
    """The value, a whole number as a float where the default is one.

    Raises UsageError where it is not of the default's type, or not in the default's range.
    """
    if isinstance(default, list):
        if not isinstance(value, list) or not value:
            raise UsageError(f"{option}: a list is needed, such as {default}.")
        least = min(default) if isinstance(default[0], int | float) else default[0]
        return [_checked(option, least, v) for v in value]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", float: "a number",
                str: "a text"}[type(default)]
        raise UsageError(f"{option}: {kind} is needed, such as {_toml(default)}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        least = min(1 if isinstance(default, int) else 0, default)
        if not math.isfinite(value) or value < least:
            raise UsageError(f"{option}: a finite number of at least {least:g} is needed.")
    return value


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, entry in enumerate(value, 1):
                yield from _leaves(entry, f"{prefix}{key}.{number}.")
        else:
            yield f"{prefix}{key}", value


def _spellings(path: str) -> list[str]:
    """A path as users may write it, the shortest last."""
    whole = [path, path.removeprefix(f"{TRAINING}.")]
    return [*whole, *(re.sub(r"\.\d+\.", ".", p) for p in whole)]


def _replace(table: Any, path: Sequence[str], value: Any) -> Any:
    """A copy with another value at the path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(table, list):
        at = int(first) - 1
        return [*table[:at], _replace(table[at], rest, value), *table[at + 1:]]
    return {**table, first: _replace(table[first], rest, value)}


def _merge(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {**table, **{k: _merge(table[k], v) if isinstance(v, dict) else v
                        for k, v in other.items()}}
