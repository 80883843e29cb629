"""The house's rules, which docs/architecture.md states: one direction of dependence, and what is private stays so."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "humanline"
FILES = sorted(PACKAGE.rglob("*.py"))  # the first is its __init__.py
PROGRAMS = sorted((ROOT / "recipes").glob("humanline_*.py"))

# From the top floor to the lowest: a room imports rooms below its own.
FLOORS = (
    {"_cli"},
    {"planning", "report"},
    {"training", "programs"},
    {"checkpoint"},
    {"optim", "launch"},
    {"config"},
    {"rewards"},
    {"reference", "rollout"},
    {"models"},
    {"data"},
    {"losses"},
    {"perception"},
    {"distributed", "errors", "torchtune_seam", "tools", "_seeds", "_home", "_noise", "_garbage", "_torchrun"},
)


def floor(room: str) -> int:
    (found,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return found


def imports(path) -> list[str]:
    """Modules that a file imports, and the names that it imports from them, as dotted paths."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    modules += [node.module or "" for node in froms]
    return modules + [f"{node.module}.{name.name}" for node in froms for name in node.names]


def room_of(path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES[1:], ids=lambda path: path.name)
def test_a_room_imports_only_rooms_below_it(path):
    own = room_of(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "humanline" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir() and parts[1] != own:
            assert floor(own) < floor(parts[1]), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda path: path.name)
def test_a_module_with_an_underscore_is_imported_in_its_own_package_alone(path):
    package = path.parent.relative_to(ROOT).parts
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "humanline":
            private = next((place for place, name in enumerate(parts) if re.match(r"_[a-z]", name)), len(parts))
            assert private == len(parts) or tuple(parts[:private]) == package[:private], f"{path.name}: {module}"


ATTRIBUTES = {
    "_attention_call",
    "_wandb",
    "_writer",
    "_checkpoint_dir",
    "_checkpoint_paths",
    "_weight_map",
    "_model_type",
    "_output_dir",
}


def names_private_to_torchtune(path) -> set[str]:
    """Private modules and names of torchtune, and of its objects, in a file's imports, expressions and strings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    dotted = {*imports(path), *map(ast.unparse, attributes), *(word for text in strings for word in text.split())}
    private = {name for name in dotted if name.startswith("torchtune") and re.search(r"\._[a-z]", name)}
    return private | {node.attr for node in attributes if node.attr in ATTRIBUTES}


def test_torchtunes_private_names_are_used_in_the_seam_alone():
    for path in (*FILES, *PROGRAMS):
        if path.parent.name != "torchtune_seam":
            assert names_private_to_torchtune(path) == set(), path
    elsewhere = {"_weight_map", "_wandb", "_writer"}
    assert names_private_to_torchtune(PACKAGE / "torchtune_seam" / "internals.py") >= ATTRIBUTES - elsewhere


def test_no_file_holds_two_things():
    longest = max((len(path.read_text().splitlines()), path.name) for path in FILES)
    assert longest <= (400, "~")
    assert max((len(path.read_text().splitlines()), path.name) for path in PROGRAMS) < (201, "")


def attributes_set(function: ast.FunctionDef) -> set[str]:
    """Attributes of ``self`` that a method assigns."""
    stores = (
        node for node in ast.walk(function) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    )
    return {node.attr for node in stores if isinstance(node.value, ast.Name) and node.value.id == "self"}


def calls(function: ast.FunctionDef) -> set[str]:
    """Methods of ``self`` that a method calls."""
    funcs = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {func.attr for func in funcs if isinstance(func, ast.Attribute) and ast.unparse(func.value) == "self"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_object_is_complete_when_it_is_constructed(path):
    """A method may change an attribute, but only a constructor, or a context on entering, adds one."""
    for found in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
        methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
        names = (node for node in found.body if isinstance(node, ast.Assign | ast.AnnAssign))
        known = {name.id for node in names for name in ast.walk(node) if isinstance(name, ast.Name)}
        building = {name for name in ("__init__", "__post_init__", "__enter__") if name in methods}
        while more := {name for each in building for name in calls(methods[each]) if name in methods} - building:
            building |= more
        known |= {name for each in building for name in attributes_set(methods[each])}
        late = {name for each in methods.values() for name in attributes_set(each)} - known
        assert not late, f"{found.name} is half made: {late}"
