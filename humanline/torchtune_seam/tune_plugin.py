"""Adds the humanline recipes and configs to torchtune's command `tune`.

`tune_plugin.pth` is installed as `humanline_tune.pth` at the root of site-packages. It imports this module when Python
starts as `tune`, and humanline in the processes that `tune run` starts. Other programs are not affected. An import hook
then waits for torchtune's registry, which `tune ls`, `cp`, `cat` and `run` read, and extends it:

- Every `recipes/humanline_*.py` is registered under its file name. Recipes with `_distributed` in the name accept
  torchrun options, others do not.
- Every `configs/NAME.yaml` is registered as `humanline/NAME`, under the recipes that its first line names:
  `# recipe: humanline_dpo_distributed`, or several, separated by commas.
- For `tune run`, a recipe given by its path, with or without `.py`, is registered under that path, and that very file
  runs. Its name must begin with `humanline_`, or it must import humanline, like a copy under another name. Its source
  is parsed for this, not run. A copy accepts torchrun options unless its class has `sharded = False`. Without this,
  torchtune would import `recipes/NAME` as a module and find the package `recipes` that it installs in site-packages.
- The processes that `tune run` starts import humanline first, so that torchtune imports there with a newer torchao
  (`torchao_names.py`).
- With a humanline recipe, torchrun gives its processes ten minutes to stop instead of 30 seconds: a step and the
  checkpoint of a large model need the time. On several nodes, its c10d rendezvous opens a new store at every start,
  because a node that comes back finds no other node in the default store.
- If processes fail, torchrun prints one line for each that did not print its own error, instead of a traceback.

`tune validate` accepts only paths, so the plug-in replaces a config's name on its command line by the path.

A name that is already registered is kept, for example that of a recipe in a fork of torchtune. This module does not
import torch, and an error in it does not stop `tune`.
"""

import ast
import difflib
import os
import sys
from collections.abc import Collection, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from humanline._garbage import spare_imports
from humanline._home import HOME
from humanline._torchrun import say_in_a_line

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    """An import hook that gives torchtune's registry the loader below and then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _RegistryLoader(spec.loader.name, spec.loader.path)
        return spec


class _RegistryLoader(SourceFileLoader):
    """Loads the registry and then extends it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        spare_imports()  # torchtune's, which are done when its command reads the registry
        try:
            _extend(module, sys.argv)
        except Exception as error:  # a fork may have changed the registry, and its own recipes must still run
            print(f"humanline: tune continues without the humanline recipes: {error!r}", file=sys.stderr)


def _extend(registry: ModuleType, argv: list[str]) -> None:
    """Registers the installed recipes and configs, and the recipes that the command line `argv` gives by path."""
    command, arguments = "".join(argv[1:2]), argv[2:]
    configs = {f"humanline/{path.stem}": path for path in sorted((HOME / "configs").glob("*.yaml"))}
    recipes = {path.stem: path for path in sorted((HOME / "recipes").glob("humanline_*.py"))}
    if command == "run":
        os.environ["HUMANLINE_TUNE_RUN"] = "1"
        recipes = {name: path for name in arguments if (path := _local_recipe(name))} | recipes
        if not recipes.keys().isdisjoint(arguments):
            sys.excepthook = say_in_a_line
            # A recipe can import files beside it, as a script can; torchtune does not add this path.
            sys.path += [str(path.parent) for name, path in recipes.items() if name in arguments]
            os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
            if any(argument.startswith("--nnodes") for argument in arguments):
                os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    elif command == "validate":
        argv[2:] = [str(configs[name]) if name in configs and not os.path.exists(name) else name for name in arguments]

    users = {name: _recipes_of(path) for name, path in configs.items()}
    taken = {recipe.name for recipe in registry.get_all_recipes()}
    if command == "run":
        _refuse_misspelt(arguments, taken | recipes.keys())
    registry._ALL_RECIPES += [  # type: ignore[attr-defined]
        registry.Recipe(
            name=name,
            file_path=str(path),  # torchtune joins this to its own root, and an absolute path replaces the root
            configs=[
                registry.Config(name=config, file_path=str(configs[config]))
                for config in configs
                if name in users[config]
            ],
            supports_distributed=_is_distributed(path),
        )
        for name, path in recipes.items()
        if name not in taken
    ]


def _refuse_misspelt(arguments: list[str], known: Collection[str]) -> None:
    """Exits if the recipe, which stands before `--config`, is named like one of ours but is none.

    torchtune would say that its recipes directory is no package.
    """
    recipe = arguments[arguments.index("--config") - 1] if "--config" in arguments[1:] else ""
    name = Path(recipe).name.removesuffix(".py")
    if not name.startswith("humanline_") or recipe in known or "." in name or find_spec(name) is not None:
        return  # torchtune also runs modules
    near = difflib.get_close_matches(Path(recipe).stem, known, n=1, cutoff=0.8)
    by_path = [str(Path(recipe).with_name(name)) for name in near if Path(recipe).with_name(f"{name}.py").is_file()]
    remedy = f"did you mean {(by_path or near)[0]}?" if near else "tune ls lists the recipes"
    sys.exit(f"tune run: recipe {recipe} not found (working directory {os.getcwd()}); {remedy}")


def _recipes_of(config: Path) -> list[str]:
    """Returns the recipes that a config's first line names."""
    with config.open(encoding="utf-8") as file:
        _, _, names = file.readline().partition("# recipe:")
    return names.replace(",", " ").split()


def _local_recipe(argument: str) -> Path | None:
    """Returns the humanline recipe file whose path a command-line argument is; None if it is no such path."""
    path = Path(argument if argument.endswith(".py") else f"{argument}.py").absolute()
    try:
        is_ours = path.is_file() and (path.name.startswith("humanline_") or _imports_humanline(path))
    except (OSError, ValueError):  # not a path, for example a long override, or an unreadable file
        return None
    return path if is_ours else None


def _imports_humanline(path: Path) -> bool:
    source = path.read_bytes()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # let Python report the error in this file
        return b"humanline" in source
    imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return any(module.partition(".")[0] == "humanline" for module in imported)


def _is_distributed(path: Path) -> bool:
    """Returns whether a recipe may run on several ranks, by its name if it is ours, else by its source."""
    says = any(word in path.stem for word in ("_distributed", "_single_device"))
    if path.name.startswith("humanline_") and (says or path.parent == HOME / "recipes"):
        return "_distributed" in path.stem or b"start_on_every_device" in path.read_bytes()
    try:
        nodes = ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return True
    return not any(_says_one_device(node) for node in nodes)


def _says_one_device(node: ast.AST) -> bool:
    """Returns whether a statement is `sharded = False`, which marks a recipe's class as one for one device."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    names = node.targets if isinstance(node, ast.Assign) else [node.target]
    is_false = isinstance(node.value, ast.Constant) and node.value.value is False
    return is_false and any(isinstance(name, ast.Name) and name.id == "sharded" for name in names)


sys.meta_path.insert(0, _RegistryFinder())
