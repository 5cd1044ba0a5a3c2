"""Generate the Boutiques descriptors of the command line from its parser.

    python tools/descriptors.py [FOLDER]

qsphere-participant.json and qsphere-group.json contain all options of their level.
qsphere-bids.json is the minimal descriptor that `bosh validate --bids` prescribes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bidsapp import __version__, cli
from bidsapp.options import invalid_options

FOLDER = Path(__file__).parent.parent / "descriptors"
CREATED = {"output_dir", "work_dir", "bids_database_dir"}
"""Options whose paths need not exist, so that Boutiques must not require them."""


def descriptors() -> dict[str, dict[str, Any]]:
    """Create all descriptors, by file name."""
    return {"qsphere-participant.json": full("participant"), "qsphere-group.json": full("group"),
            "qsphere-bids.json": minimal()}


def full(level: str) -> dict[str, Any]:
    """Create the descriptor of all options of an analysis level."""
    invalid = invalid_options(level)
    groups = [(g.title, [a for a in g._group_actions if described(a) and a.dest not in invalid])
              for g in cli.parser()._action_groups]
    actions = [a for _, members in groups for a in members if a.dest != "analysis_level"]
    positional = [value_key(a) for a in actions if not a.option_strings]
    optional = [value_key(a) for a in actions if a.option_strings]
    return {
        **head(f"QSphere, {level} level", " ".join(["qsphere", *positional, level, *optional])),
        "inputs": [as_input(a) for a in actions],
        "groups": [{"id": title.replace(" ", "_"), "name": title,
                    "members": [a.dest for a in members]}
                   for title, members in groups
                   if title and any(a.option_strings for a in members)],
        "output-files": [output_folder()],
    }


def minimal() -> dict[str, Any]:
    """Create the minimal descriptor: both levels, with labels only.

    As prescribed, OUTPUT_DIR occurs twice, as a string and as a folder.
    """
    actions = {a.dest: a for a in cli.parser()._actions}
    labels = [actions["participant_label"], actions["session_label"]]
    folder = {**as_input(actions["output_dir"]), "optional": True}
    command = " ".join(["mkdir -p [OUTPUT_DIR]; qsphere [BIDS_DIR] [OUTPUT_DIR] [ANALYSIS_LEVEL]",
                        *map(value_key, labels)])
    return {
        **head("QSphere", command),
        "inputs": [as_input(actions["bids_dir"]), folder,
                   {**folder, "id": "participants_dir", "type": "File",
                    "name": "OUTPUT_DIR of the participant level"},
                   as_input(actions["analysis_level"]), *map(as_input, labels)],
        "groups": [{"id": "either_folder", "name": "OUTPUT_DIR", "mutually-exclusive": True,
                    "one-is-required": True, "members": ["output_dir", "participants_dir"]}],
        "output-files": [output_folder()],
    }


def head(name: str, command: str) -> dict[str, Any]:
    """Create the fields that all descriptors have in common."""
    return {
        "schema-version": "0.5",
        "name": name,
        "description": str(cli.parser().description),
        "tool-version": __version__,
        "author": "The QSphere developers",
        "url": "https://github.com/qsphere/qsphere",
        "command-line": command,
        "container-image": {"type": "docker", "image": f"qsphere:{__version__}"},
        "error-codes": [
            {"code": 1, "description": "Some participant failed; the others are finished."},
            {"code": 2, "description": "Bad arguments, or input that cannot be used at all."}],
        "tags": {"domain": ["neuroinformatics", "mri", "diffusion"]},
    }


def output_folder() -> dict[str, Any]:
    return {"id": "results", "name": "Derivatives dataset", "path-template": "[OUTPUT_DIR]",
            "description": "BIDS derivatives and HTML reports", "optional": False}


def described(action: argparse.Action) -> bool:
    """Tell whether an option belongs in a descriptor; --help and --version do not."""
    return not isinstance(action, argparse._HelpAction | argparse._VersionAction)


def value_key(action: argparse.Action) -> str:
    return f"[{action.dest.upper()}]"


def as_input(action: argparse.Action) -> dict[str, Any]:
    """Describe an argument as a Boutiques input."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    description: dict[str, Any] = {
        "id": action.dest,
        "name": action.dest.replace("_", " ") if action.option_strings else metavar,
        "description": action.help,
        "type": boutiques_type(action),
        "value-key": value_key(action),
        "optional": bool(action.option_strings),
    }
    if action.option_strings:
        description["command-line-flag"] = next(
            o for o in action.option_strings if o.startswith("--"))
    if action.nargs == "+":
        description["list"] = True
    if action.type is int:
        description["integer"] = True
    if action.choices:
        description["value-choices"] = list(action.choices)
    return description


def boutiques_type(action: argparse.Action) -> str:
    """Select the Boutiques type of an argument."""
    if action.nargs == 0:
        return "Flag"
    if action.type in (int, float):
        return "Number"
    return "File" if action.type is Path and action.dest not in CREATED else "String"


def to_text(descriptor: dict[str, Any]) -> str:
    return json.dumps(descriptor, indent=2, ensure_ascii=False) + "\n"


def main(arguments: Iterable[str]) -> None:
    folder = Path(next(iter(arguments), FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    for name, descriptor in descriptors().items():
        (folder / name).write_text(to_text(descriptor))
        print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
