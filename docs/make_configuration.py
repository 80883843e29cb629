"""Writes the tables of docs/configuration.md from the code: from signatures, defaults and docstrings.

python docs/make_configuration.py

Comments in the page say where a table stands and what is in it. A table ends with `<!-- end -->`.

    <!-- settings: KEY KEY -->       top-level keys of a training config
    <!-- component: PATH PATH -->    the arguments of components that share them
    <!-- program: RECIPE -->         top-level keys of a recipe that does not train
"""

import ast
import functools
import inspect
import re
import runpy
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from humanline.config import COMPONENTS, Settings
from humanline.programs import SamplerSettings
from humanline.rollout import SamplingParams
from humanline.torchtune_seam.internals import find_component

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"
TABLE = re.compile(r"(<!-- (settings|component|program): ([^>]+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
GIVEN = ("tokenizer", "params", "optimizer", "num_training_steps")  # arguments that the recipe gives, not the config
REQUIRED = "required"


class Key(NamedTuple):
    """A row of a table."""

    name: str
    type: str
    default: str
    meaning: str


def page(text: str) -> str:
    """The page with its tables as they follow from the code."""
    return TABLE.sub(lambda found: found[1] + _table(found[2], found[3].split()) + found[5], text)


def tables(text: str) -> list[tuple[str, list[str]]]:
    """What each table of the page is of: settings, component or program, and their names."""
    return [(kind, names.split()) for _, kind, names, _, _ in TABLE.findall(text)]


def keys(kind: str, names: list[str]) -> list[Key]:
    """The rows of a table."""
    return {"settings": settings, "component": component, "program": program}[kind](names)


def settings(names: list[str]) -> list[Key]:
    """Fields of ``Settings``; the text under a field is its meaning."""
    known = {field.name: field for field in fields(Settings)}
    (tree,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {
        field.target.id: ast.literal_eval(text.value)
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    return [
        Key(name, _type(known[name].type), _default(known[name].default, MISSING), _markdown(texts.get(name, "")))
        for name in names
    ]


def component(paths: list[str]) -> list[Key]:
    """The arguments of components that share them; one of the docstrings has to say what each means."""
    builders = [find_component(path) for path in paths]
    signature, *others = (
        {
            name: parameter
            for name, parameter in inspect.signature(builder).parameters.items()
            if name not in GIVEN and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        for builder in builders
    )
    if any(list(other.values()) != list(signature.values()) for other in others):
        raise ValueError(f"{', '.join(paths)}: have different arguments; give each a table of its own")
    entries = {name: entry for builder in builders for name, entry in _entries(builder, "Args").items()}
    return [
        Key(
            name,
            _type(parameter.annotation),
            _default(parameter.default, inspect.Parameter.empty),
            _markdown(entries[name][1] if name in entries else ""),
        )
        for name, parameter in signature.items()
    ]


def program(names: list[str]) -> list[Key]:
    """The keys of a recipe that does not train, without components. It and ``SamplerSettings`` explain them."""
    (name,) = names
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    (recipe_class,) = (it for it in recipe.values() if isinstance(it, type) and it.__module__ == recipe["__name__"])
    entries, required, defaults = _entries(recipe_class, "Keys"), [*recipe["REQUIRED"]], recipe["DEFAULTS"]
    if "Sampler" in recipe:
        entries = _entries(SamplingParams, "Args") | _entries(SamplerSettings, "Keys") | entries
        params = {field.name: field.default for field in fields(SamplingParams) if field.default is not MISSING}
        required, defaults = [*SamplerSettings.REQUIRED, *required], params | SamplerSettings.DEFAULTS | defaults
    return [
        Key(key, type_name.replace(" | ", " or ").replace("None", "null"), _default(default, MISSING), _markdown(text))
        for key, default in (dict.fromkeys(required, MISSING) | defaults).items()
        if key not in COMPONENTS
        for type_name, text in [entries.get(key, ("", ""))]
    ]


def _table(kind: str, names: list[str]) -> str:
    rows = keys(kind, names)
    lines = [f"| `{row.name}` | {row.type} | {row.default} | {row.meaning} |" for row in rows]
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])
    if kind != "component":
        return table + "\n"
    heads = [f"**`{path}`**: {_markdown(_docstring(find_component(path)).split(chr(10) * 2)[0])}" for path in names]
    return "\n\n".join([*heads, table if rows else "No arguments."]) + "\n"


def _docstring(of: Callable[..., Any]) -> str:
    return inspect.cleandoc((of.func if isinstance(of, functools.partial) else of).__doc__ or "")


def _entries(of: Callable[..., Any], section: str) -> dict[str, tuple[str, str]]:
    """The type and the text of each name in a section of a docstring."""
    lines = _docstring(of).splitlines()
    if f"{section}:" not in lines:
        return {}
    rest = lines[lines.index(f"{section}:") + 1 :]
    end = next((place for place, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    entries = re.split(r"^(?=\S)", textwrap.dedent("\n".join(rest[:end])), flags=re.MULTILINE)
    found = (re.match(r"([\w*]+) \((.*?)\): (.*)", entry, re.DOTALL) for entry in entries)
    return {each[1]: (each[2], each[3]) for each in found if each}


def _markdown(text: str) -> str:
    """A docstring's text on one line, in Markdown and in YAML's words."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"\bNone\b", "null", text)
    return text[:1].upper() + text[1:]


def _type(annotation: Any) -> str:
    """A type in words, such as: float or null."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in (None, type(None)):
        return "null"
    if origin is Literal:
        return "str"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"list of {_type(parts[0])}"
    return " or ".join(map(_type, parts)) if parts else annotation.__name__


def _default(value: Any, missing: Any) -> str:
    """A default as YAML has it."""
    if value is missing:
        return REQUIRED
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    first, *more = str(value).replace("|", "\\|").splitlines()
    return f"`{first[:40]} ...`" if more else f"`{first}`"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
