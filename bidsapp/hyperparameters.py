"""Hyper-parameters of a method: the tables of its training.toml, and the values of `--set`.

The name of a hyper-parameter is its path in the file, such as `training.network.blocks`. Users may
leave out `training.` at the start, and the number of a table in a list of tables: `stages.epochs`
are the epochs of all stages, `stages.2.epochs` those of the second.
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
"""Table that the group level reads; the participant level reads all others but VARIANTS."""

SLOPPY = "sloppy"
ONE = "one"
VARIANTS = (ONE, SLOPPY)
"""Tables of tables that replace values of the tables of the same name: `one.training` for a network
of a single acquisition, `sloppy.training` for --sloppy."""

CHOICES = {"architecture": ("spherical", "perceptron", "shresnet", "golkov", "hybrid", "cyclic",
                            "unet", "autoencoder", "upsampling", "volumetric"),
           "networks": ("joint", "single"),
           "layer": ("zonal", "local", "signal", "connected"),
           "nonlinearity": ("relu", "sigmoid", "tanh"),
           "input": ("any", "table"), "start": ("bundled", "random"),
           "corruption": ("artifacts", "none", "mask"), "loss": ("cross-entropy", "l1"),
           "target": ("axis", "angles"),
           "space": ("signal", "coefficient"),
           "output": ("change", "series"),
           "optimizer": ("adam", "adamw", "sgd"),
           "decay": ("constant", "step", "cosine", "plateau")}
"""Hyper-parameters that are texts, with their allowed values: those of `networks.builder`,
`methods.upsample_unet`, `networks.autoencoder`, `harmonization.harmonizer`, `training`,
`volumetric` and `methods.estimate_direction`."""


def read(folder: Path) -> dict[str, Any]:
    """Read the training.toml in the folder of a method; empty if there is none."""
    path = folder / "training.toml"
    return tomllib.loads(path.read_text()) if path.is_file() else {}


def select(tables: Mapping[str, Any], name: str, variants: Sequence[str],
           settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select a table, with the values of variants and settings.

    Parameters
    ----------
    tables : mapping
        All tables of a training.toml.
    name : str
        Name of the table.
    variants : sequence of str
        Those of VARIANTS whose values replace those of the table; the last one takes precedence.
    settings : mapping
        Values by path (`resolve`), which take precedence over variants.

    Returns
    -------
    dict
        A copy of the table with these values.
    """
    table = tables[name]
    for variant in variants:
        table = _merge(table, tables[variant][name])
    defaults = dict(_leaves(table, f"{name}."))
    for path in defaults.keys() & settings.keys():
        table = _replace(table, path.split(".")[1:], settings[path])
    return table


def paths(tables: Mapping[str, Any], key: str, sloppy: bool = False) -> list[str]:
    """Find the paths of the hyper-parameters that a key names.

    Parameters
    ----------
    tables : mapping
        All tables of a training.toml.
    key : str
        A path, with or without `training.` and the numbers of tables in lists.
    sloppy : bool
        Whether the variant for --sloppy is used.

    Returns
    -------
    list of str
        The paths: several if the key names a value of all tables of a list, none if it is unknown.
    """
    return [path for path in values(tables, sloppy) if key in _spellings(path)]


def values(tables: Mapping[str, Any], sloppy: bool = False) -> dict[str, Any]:
    """List the values of all hyper-parameters by path, as in training.toml (arguments: `paths`)."""
    variants = [SLOPPY] if sloppy else []
    return {path: value for name in tables if name not in VARIANTS
            for path, value in _leaves(select(tables, name, variants, {}), f"{name}.")}


def resolve(tables: Mapping[str, Any], method: str, key: str, text: str, sloppy: bool = False
            ) -> dict[str, Any]:
    """Parse a value of `--set`.

    Parameters
    ----------
    tables : mapping
        All tables of the method's training.toml.
    method : str
        Name of the method, for messages.
    key, text : str
        The two sides of the equals sign: a key as in `paths`, and a TOML value. A text need not be
        quoted.
    sloppy : bool
        Whether the variant for --sloppy is used.

    Returns
    -------
    dict
        The value, once for each path that the key names, by path.

    Raises
    ------
    UsageError
        There is no such hyper-parameter (the message suggests the most similar one), or the value
        is of another type or not allowed.
    """
    defaults, option = values(tables, sloppy), f"--set {method}.{key}={text}"
    if not defaults:
        raise UsageError(f"{option}: {method} has no hyper-parameters. Leave the option out.")
    chosen = paths(tables, key, sloppy)
    if not chosen:
        shortest = list(dict.fromkeys(_spellings(path)[-1] for path in defaults))
        near = difflib.get_close_matches(key.removeprefix(f"{TRAINING}."), shortest, 1, 0.4)
        raise UsageError(f"{option}: {method} has no hyper-parameter {key}. It has "
                         f"{', '.join(shortest)}." + (f" Did you mean {near[0]}?" if near else ""))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    checked = {path: _check(option, defaults[path], value) for path in chosen}
    choices = CHOICES.get(key.rpartition(".")[2], (value,))
    if value not in choices:
        raise UsageError(f"{option}: one of {', '.join(choices)} is needed.")
    return checked


def _check(option: str, default: Any, value: Any) -> Any:
    """Check the type of a value, which is that of its default, and its size; convert int to float.

    An int must be at least 1 and a float at least 0, or the default if that is smaller.
    """
    if isinstance(default, list):
        if not isinstance(value, list) or not value:
            raise UsageError(f"{option}: a list is needed, such as {default}.")
        smallest = min(default) if isinstance(default[0], int | float) else default[0]
        return [_check(option, smallest, v) for v in value]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        needed = {bool: "true or false", int: "a whole number", float: "a number",
                  str: "a text"}[type(default)]
        raise UsageError(f"{option}: {needed} is needed, such as {_toml(default)}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        smallest = min(1 if isinstance(default, int) else 0, default)
        if not math.isfinite(value) or value < smallest:
            raise UsageError(f"{option}: a finite number of at least {smallest:g} is needed.")
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
    """The forms of a path that users may write, the shortest last."""
    whole = [path, path.removeprefix(f"{TRAINING}.")]
    return [*whole, *(re.sub(r"\.\d+\.", ".", p) for p in whole)]


def _replace(table: Any, path: Sequence[str], value: Any) -> Any:
    """Copy a table with another value at the path."""
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
