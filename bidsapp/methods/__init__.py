"""The published methods, one folder each; the list of methods is the list of folders.

A folder holds `method.py` (one subclass of a kind of `bidsapp.kinds`), `outputs.json` (entities,
units, range and description of each output), `README.md`, and `training.toml` if the method is
trained.
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
    """List the folder names of the methods, or those that start with a kind such as
    `estimate_`."""
    return sorted(p.parent.name for p in FOLDER.glob(f"{kind}*/method.py"))


def trainable(name: str, context: MethodContext | None = None) -> Trainable:
    """Load a method that `--train` names, by its full or short name.

    Raises
    ------
    UsageError
        No method has this name, or the method needs no training.
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
        Values of the option; the last value of a hyper-parameter holds.
    used : sequence of Method
        The methods of the command.
    training : bool
        Whether the command trains them. If so, only the table `training` may be changed; if not,
        only the other tables.
    sloppy : bool
        As in `MethodContext`.

    Returns
    -------
    dict
        Values by path (`hyperparameters.resolve`), by the method's name, for
        `MethodContext.settings`.

    Raises
    ------
    UsageError
        The method does not exist or is not used, it has no such hyper-parameter, the value is
        invalid, or the hyper-parameter belongs to the other analysis level.
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
                f"--set {text}: {key} has no effect on a training. Give the option to the "
                "participant level." if training else
                f"--set {text}: {key} affects only the training of {method.name}, and this "
                f"command does not train it. Give the option to group --train {method.name}.")
        if method.name not in [m.name for m in used]:
            names_used = ", ".join(m.name for m in used) or "none"
            raise UsageError(f"--set {text}: this command does not use {method.name}; its methods "
                             f"are: {names_used}. Leave the option out, or add the method.")
        settings.setdefault(method.name, {}).update(values)
    return settings


def find(name: str, kind: str = "") -> str:
    """Find the name of a method's folder.

    Parameters
    ----------
    name : str
        Name of the folder (`harmonize_rish`), or the part after its kind (`rish`).
    kind : str
        `estimate`, `harmonize`, …: only methods of this kind; default: all kinds.

    Returns
    -------
    str
        Name of the folder.

    Raises
    ------
    UsageError
        No method has this name, or several have.
    """
    available = names(f"{kind}_" if kind else "")
    matches = ([n for n in available if n == name]
               or [n for n in available if n.partition("_")[2] == name])
    if len(matches) > 1:
        raise UsageError(f"{name} is the short name of {' and '.join(matches)}. Give the full "
                         "name of one of them.")
    if not matches:
        # the kind is common to all, so that it says nothing of the similarity
        short = {n.partition("_")[2] or n: n for n in available}
        if not kind:
            short = {n: n for n in (available if "_" in name else short)}
        given = name.removeprefix(f"{kind}_") if kind else name
        similar = [short[m] for m in difflib.get_close_matches(given, short, 1, 0.5)]
        raise UsageError(
            f"no such method: {name}. Available{f' to {kind}' if kind else ''} are: "
            f"{', '.join(available) or 'none'}."
            + (f" Did you mean {similar[0]}?" if similar else ""))
    return matches[0]


def get(name: str, kind: str = "", context: MethodContext | None = None) -> Method:
    """Load a method by the name of its folder or by its short name.

    Parameters
    ----------
    name, kind : str
        Arguments of `find`.
    context : MethodContext, optional
        Settings of the command.

    Returns
    -------
    Method

    Raises
    ------
    UsageError
        No method has this name, or several have.
    """
    module = importlib.import_module(f"bidsapp.methods.{find(name, kind)}.method")
    (cls,) = [c for c in vars(module).values()
              if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__]
    return cls(context)
