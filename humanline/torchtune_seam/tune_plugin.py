"""Makes torchtune's `tune` know the humanline recipes and configs.

`tune_plugin.pth`, installed as `humanline_tune.pth` at the root of site-packages, imports this module when Python
starts as `tune`, and humanline in the processes that `tune run` starts; no other program is touched. An import hook
then waits for torchtune's registry, which `tune ls`, `cp`, `cat` and `run` read, and extends it:

- every `recipes/humanline_*.py` goes in under its file name. One with `_distributed` in its name accepts torchrun
  options, any other refuses them.
- every `configs/NAME.yaml` goes in as `humanline/NAME`, under the recipes that its first line names:
  `# recipe: humanline_dpo_distributed`, or several, separated by commas.
- for `tune run`, so does a recipe given by its path, with or without `.py`: the very file the user named runs, if its
  name begins with `humanline_` or it imports humanline, as a copy under another name does. Its source is parsed for
  that, and not run. A copy accepts torchrun options unless its class says `sharded = False`. Left to itself torchtune
  imports `recipes/NAME` as a module, and finds the package `recipes` that it put into site-packages.
- the processes that `tune run` starts import humanline first, so that torchtune imports there too with a newer torchao
  than it knows (`torchao_names.py`).
- with a humanline recipe, torchrun gives its processes ten minutes to stop, for a step and the checkpoint of a large
  model, instead of 30 seconds. Over several nodes its c10d rendezvous has a new store at every start: in the one that
  it keeps by default, a node that comes back finds nobody.
- torchrun's traceback of itself, where its processes fail, gives way to a line for each that could not say why.

`tune validate` takes nothing but paths, so a config's name on its command line is replaced by its path.

A name already taken stays what it is, for instance that of a recipe which a fork of torchtune registers itself. Nothing
here imports torch, and nothing that goes wrong here stops `tune`.
"""

import ast
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

from humanline._home import HOME
from humanline._torchrun import say_in_a_line

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    """Import hook that finds torchtune's registry, gives it the loader below, and steps aside."""

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
    """Loads the registry as it is, then extends it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        try:
            _extend(module, sys.argv)
        except Exception as error:  # a fork may have changed anything there, and its own recipes must still run
            print(f"humanline: tune goes on without the humanline recipes: {error!r}", file=sys.stderr)


def _extend(registry: ModuleType, argv: list[str]) -> None:
    """Registers the installed recipes and configs, and what the command line `argv` names in its own way."""
    command, arguments = "".join(argv[1:2]), argv[2:]
    configs = {f"humanline/{path.stem}": path for path in sorted((HOME / "configs").glob("*.yaml"))}
    recipes = {path.stem: path for path in sorted((HOME / "recipes").glob("humanline_*.py"))}
    if command == "run":
        os.environ["HUMANLINE_TUNE_RUN"] = "1"
        recipes = {name: path for name in arguments if (path := _local_recipe(name))} | recipes
        if not recipes.keys().isdisjoint(arguments):
            sys.excepthook = say_in_a_line
            # For what stands beside it, as Python does for a script; torchtune does not.
            sys.path += [str(path.parent) for name, path in recipes.items() if name in arguments]
            os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
            if any(argument.startswith("--nnodes") for argument in arguments):
                os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    elif command == "validate":
        argv[2:] = [str(configs[name]) if name in configs and not os.path.exists(name) else name for name in arguments]

    users = {name: _recipes_of(path) for name, path in configs.items()}
    taken = {recipe.name for recipe in registry.get_all_recipes()}
    registry._ALL_RECIPES += [  # type: ignore[attr-defined]
        registry.Recipe(
            name=name,
            file_path=str(path),  # torchtune joins this to a root of its own, over which an absolute path wins
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


def _recipes_of(config: Path) -> list[str]:
    """The recipes that a config's first line says it is for."""
    with config.open(encoding="utf-8") as file:
        _, _, names = file.readline().partition("# recipe:")
    return names.replace(",", " ").split()


def _local_recipe(argument: str) -> Path | None:
    """The humanline recipe file that a command-line argument is the path of, if it is one."""
    path = Path(argument if argument.endswith(".py") else f"{argument}.py").absolute()
    try:
        is_ours = path.is_file() and (path.name.startswith("humanline_") or _imports_humanline(path))
    except (OSError, ValueError):  # no path, as a long override, or a file that may not be read
        return None
    return path if is_ours else None


def _imports_humanline(path: Path) -> bool:
    source = path.read_bytes()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # then Python is to say so, of this file
        return b"humanline" in source
    imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return any(module.partition(".")[0] == "humanline" for module in imported)


def _is_distributed(path: Path) -> bool:
    """Whether a recipe may run on several ranks: by a name that says so, as ours do, by the source of any other."""
    says = any(word in path.stem for word in ("_distributed", "_single_device"))
    if path.name.startswith("humanline_") and (says or path.parent == HOME / "recipes"):
        return "_distributed" in path.stem
    try:
        nodes = ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return True
    return not any(_says_one_device(node) for node in nodes)


def _says_one_device(node: ast.AST) -> bool:
    """Whether a statement is `sharded = False`, by which a recipe's class says that it is for one device."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    names = node.targets if isinstance(node, ast.Assign) else [node.target]
    is_false = isinstance(node.value, ast.Constant) and node.value.value is False
    return is_false and any(isinstance(name, ast.Name) and name.id == "sharded" for name in names)


sys.meta_path.insert(0, _RegistryFinder())
