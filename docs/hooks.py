"""Write the pages of the documentation that are made of other files when MkDocs builds it.

A page per method (its README.md, outputs.json and training.toml), a page per module of the package
for its docstrings, all options as the two parsers know them, benchmarks/README.md with its data,
the plots that are drawn from these data, and the files of the project itself.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import plots  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402

KINDS = {"estimate": "Estimators", "harmonize": "Harmonizers"}


def on_config(config):
    """Complete the navigation with the generated pages."""
    groups = {}
    for folder in method_folders():
        kind = KINDS.get(folder.name.split("_")[0], "Others")
        groups.setdefault(kind, []).append(f"methods/{folder.name}.md")
    config.nav += [
        {"Methods": ["methods/index.md", *({k: v} for k, v in groups.items())]},
        {"Python reference": ["reference/index.md", *reference()]},
        {"Project": [{"Contributing": "contributing.md"}, {"Changes": "changes.md"}]}]
    return config


def reference() -> list[dict]:
    """Navigation of the modules: those of a package stand in a group of its name."""
    groups, alone = {}, []
    for page, name in modules():
        package, *rest = name.split(".")[1:] or ["bidsapp"]
        if rest or (ROOT / "bidsapp" / package).is_dir():
            title = ".".join(rest) if rest else f"{package} (package)"
            groups.setdefault(package, []).append({title: page})
        else:
            alone.append({package: page})
    return [*alone, *({k: v} for k, v in groups.items())]


def on_files(files, config):
    """Add the generated pages, plots and data."""
    for path, content in pages():
        if (written := files.get_file_from_path(path)) is not None:
            files.remove(written)
        files.append(File.generated(config, path, content=content))
    return files


def on_post_page(output, page, config):
    """Refuse a page that would load a script, a style, a font or an image from the network."""
    outside = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?"
                         r"((?:https?:)?//[^\"' >]+)", output)
    if outside:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(outside)}; pages work offline.")
    return output


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Path below docs/ and content of every generated file."""
    yield "contributing.md", (ROOT / "CONTRIBUTING.md").read_text()
    yield "changes.md", (ROOT / "CHANGES.md").read_text()
    yield "benchmarks/tables.md", (ROOT / "benchmarks" / "README.md").read_text()
    for file in sorted((ROOT / "benchmarks" / "data").glob("*.csv")):
        yield f"benchmarks/data/{file.name}", file.read_bytes()
    for name, drawing in plots.draw_all(ROOT / "benchmarks" / "data"):
        yield f"plots/{name}.svg", drawing
    yield "options.md", (ROOT / "docs" / "options.md").read_text() + options()
    yield "methods/index.md", method_index()
    for folder in method_folders():
        yield f"methods/{folder.name}.md", method_page(folder)
    yield "reference/index.md", module_index()
    for page, module in modules():
        yield page, f"---\ntitle: {module}\n---\n\n::: {module}\n"


def method_folders() -> list[Path]:
    """Folders of methods, in the order of their names."""
    return sorted(f.parent for f in (ROOT / "bidsapp" / "methods").glob("*/outputs.json"))


def method_index() -> str:
    """One row per method: name, model, number of maps."""
    rows = []
    for folder in method_folders():
        outputs = json.loads((folder / "outputs.json").read_text())
        model = outputs["model"]
        text = f"[`{folder.name}`]({folder.name}.md) | {model['Description']}"
        rows.append(f"| {text} | [paper]({model['URL']}) |")
    return ("# Methods\n\nA method is a folder of the package. Its page is made of the README, the "
            "list of outputs and the training settings in that folder.\n\n"
            "| method | model | source |\n|---|---|---|\n" + "\n".join(rows) + "\n")


def method_page(folder: Path) -> str:
    """The README of a method, a table of its outputs and its training settings."""
    outputs = json.loads((folder / "outputs.json").read_text())
    readme = (folder / "README.md").read_text().rstrip()
    # a list that follows a line of text is none for Python-Markdown
    parts = [re.sub(r"(?m)^(?!- |\d\. |\s)(.+)\n(?=- |1\. )", r"\1\n\n", readme)]
    if "signal" in outputs:
        parts.append(f"## Signal\n\n{outputs['signal']['Description']}.")
    if outputs.get("maps"):
        rows = [f"| `{file_name(folder.name, m)}` | {m['Description']} | {m['Units']} "
                f"| {limits(m['range'])} |" for m in outputs["maps"].values()]
        parts.append("## Maps\n\n| file | map | unit | range |\n|---|---|---|---|\n"
                     + "\n".join(rows))
    settings = folder / "training.toml"
    if settings.exists():
        parts.append("## Training settings\n\n`training.toml` of the method:\n\n"
                     f"```toml\n{settings.read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def file_name(method: str, entry: dict) -> str:
    """Name of a map's file, after the entities of the run."""
    from bidsapp import methods

    suffix, entities = methods.get(method).name_map(entry)
    parts = [f"{key}-{value}_" for key, value in entities.items()]
    return f"…_{''.join(parts)}{suffix}.nii.gz"


def limits(bounds: list) -> str:
    """A range as text; an open side is left out."""
    low, high = bounds
    if low is None and high is None:
        return ""
    return f"≥ {low:g}" if high is None else f"{low:g} to {high:g}"


def modules() -> list[tuple[str, str]]:
    """Page and dotted name of every module that documents something public."""
    found = []
    for file in sorted((ROOT / "bidsapp").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__" or not ast.get_docstring(ast.parse(file.read_text())):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((f"reference/{name}.md", name))
    return found


def module_index() -> str:
    """One row per module: name and the first sentence of its docstring."""
    rows = []
    for page, name in modules():
        file = ROOT / name.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        first = ast.get_docstring(ast.parse(file.read_text())).split("\n\n")[0]
        rows.append(f"| [`{name}`]({Path(page).name}) | {' '.join(first.split())} |")
    return ("# Python reference\n\nThe command line is the interface that stays the same between "
            "versions. The modules below are documented for those who change the program or take "
            "parts of it. Each page is made of the docstrings.\n\n"
            "| module | subject |\n|---|---|\n" + "\n".join(rows) + "\n")


def options() -> str:
    """All options of both programs, as their parsers describe them."""
    from bidsapp import cli, cli_phantom

    parts = []
    for program, module in (("qsphere", cli), ("qsphere-phantom", cli_phantom)):
        parts.append(f"## All options of `{program}`")
        for group in module.parser()._action_groups:
            rows = [f"| `{spelling(a)}` | {cell(a.help)} |" for a in group._group_actions
                    if a.help and a.help != "==SUPPRESS=="]
            if rows:
                title = (group.title or "").capitalize()
                parts.append(f"### {program}: {title}\n\n| option | meaning |\n|---|---|\n"
                             + "\n".join(rows))
    return "\n" + "\n\n".join(parts) + "\n"


def spelling(action) -> str:
    """An option with its value, in its first spelling, and its short form where there is one."""
    if not action.option_strings:
        return action.metavar or action.dest
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    more = " …" if action.nargs in ("+", "*") else ""
    return f"{', '.join(action.option_strings[:2])} {value}{more}".strip()


def cell(text: str) -> str:
    """Text for a cell of a table: argparse's %% and Markdown's | and < taken as they are."""
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
