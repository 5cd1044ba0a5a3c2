"""One folder per published method; this module is the only list of them (a scan of folder names).

A folder holds `method.py` (one subclass of a kind of `bidsapp.kinds`), `outputs.json` (entities,
units, range and description of each output), `training.toml` where something is trained, and
`README.md`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidsapp import hyperparameters
from bidsapp.errors import UsageError
from bidsapp.kinds import Method, MethodContext, Trainable

FOLDER = Path(__file__).parent


def names(kind: str = "") -> list[str]:
    """Folder names of the methods, e.g. all that start with `estimate_`."""
    return sorted(p.parent.name for p in FOLDER.glob(f"{kind}*/method.py"))


def trainable(name: str, context: MethodContext | None = None) -> Trainable:
    """Load a method that `--train` names.

    Raises
    ------
    UsageError
        There is none of this name, or it learns nothing.
    """
    method = get(name, context=context)
    if not isinstance(method, Trainable):
        raise UsageError(f"--train {method.name}: this method needs no training.")
    return method


def read_settings(texts: Sequence[str], used: Sequence[Method], training: bool,
                  sloppy: bool = False) -> dict[str, dict[str, Any]]:
    """Read `--set METHOD.KEY=VALUE …`.

    Parameters
    ----------
    texts : sequence of str
        What stands after the option; of two values for one hyper-parameter the last one holds.
    used : sequence of Method
        The methods of the command.
    training : bool
        Whether the command trains them: then the table `training` may be changed, else all others.
    sloppy : bool
        As of `MethodContext`.

    Returns
    -------
    dict
        As `MethodContext.settings`.

    Raises
    ------
    UsageError
        The method does not exist or is not used, it has no such hyper-parameter, the value is not
        one that it may have, or it is of the other analysis level.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, _, value = text.partition("=")
        name, _, key = target.partition(".")
        try:
            method = get(name)
        except UsageError as error:
            raise UsageError(f"--set {text}: {error}") from error
        values = hyperparameters.resolve(hyperparameters.read(method.folder), method.name, key,
                                         value, sloppy)
        if any((path.split(".")[0] == hyperparameters.TRAINING) != training for path in values):
            raise UsageError(
                f"--set {text}: {key} does not matter in a training. Give the option to the "
                "participant level." if training else
                f"--set {text}: {key} matters in the training of {method.name} alone, and this "
                f"command trains nothing. Give the option to group --train {method.name}.")
        if method.name not in [m.name for m in used]:
            there = ", ".join(m.name for m in used) or "none"
            raise UsageError(f"--set {text}: this command does not use {method.name}; its methods "
                             f"are: {there}. Leave the option out, or ask for the method.")
        settings.setdefault(method.name, {}).update(values)
    return settings


def find(name: str, kind: str = "") -> str:
    """Find the folder of a method.

    Parameters
    ----------
    name : str
        Of the folder (`harmonize_rish`), or what follows its kind (`rish`).
    kind : str
        `estimate`, `harmonize`, …: only methods of this kind; default: of any.

    Returns
    -------
    str
        Name of the folder.

    Raises
    ------
    UsageError
        No method has this name (lists those there are, and the nearest), or several have.
    """
    found = names(f"{kind}_" if kind else "")
    fitting = [n for n in found if n == name] or [n for n in found if n.partition("_")[2] == name]
    if len(fitting) > 1:
        raise UsageError(f"{name} is the short name of {' and '.join(fitting)}. Needed is one of "
                         "them: give its whole name.")
    if not fitting:
        folder = name if not kind or name.startswith(f"{kind}_") else f"{kind}_{name}"
        short = [n.partition("_")[2] or n for n in found] if "_" not in folder else found
        near = difflib.get_close_matches(folder, short, 1, 0.5)
        raise UsageError(
            f"no such method yet: {name}. Available{f' to {kind}' if kind else ''} are: "
            f"{', '.join(found) or 'none'}." + (f" Did you mean {near[0]}?" if near else ""))
    return fitting[0]


def get(name: str, kind: str = "", context: MethodContext | None = None) -> Method:
    """Load a method by the name of its folder or by its short name.

    Parameters
    ----------
    name, kind : str
        As of `find`.
    context : MethodContext, optional
        What the command tells its methods.

    Returns
    -------
    Method

    Raises
    ------
    UsageError
        As of `find`.
    """
    module = importlib.import_module(f"bidsapp.methods.{find(name, kind)}.method")
    (cls,) = [c for c in vars(module).values()
              if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__]
    return cls(context)
