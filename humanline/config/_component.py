"""Finds, checks and builds the components that a config names by ``_component_``. Every error is one line."""

import ast
import importlib
import inspect
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import Parameter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from humanline.config._missing_package import missing_package
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.reference import Strategy
from humanline.rollout import EngineSettings
from humanline.torchtune_seam.internals import find_component

_KINDS: dict[str, type] = {"reference": Strategy, "engine": EngineSettings}


def is_given(cfg: DictConfig, key: str) -> bool:
    """Returns whether a config has a component under a key. ``key=null`` sets its ``_component_`` to null."""
    node = cfg.get(key)
    return node is not None and not (OmegaConf.is_dict(node) and node.get("_component_", "") is None)


def listed(cfg: DictConfig, key: str) -> list[tuple[DictConfig, str]]:
    """Returns config and key of each component under a key that may have a list of them, as ``metric_logger`` may."""
    node = cfg.get(key)
    if not OmegaConf.is_list(node):
        return [(cfg, key)]
    return [(DictConfig({name: node[i]}, parent=cfg), name) for i in range(len(node)) for name in [f"{key}[{i}]"]]


def component(cfg: DictConfig, key: str, *args: Any, **kwargs: Any) -> Any:
    """Builds the component of a config key. Returns None if the key is absent or null.

    Raises:
        ConfigError: if the component is not found, needs a missing package, or does not accept its arguments.
    """
    if not is_given(cfg, key):
        return None
    check_component(cfg, key, *args, **kwargs)
    path = cfg[key]["_component_"]
    try:
        built = config.instantiate(cfg[key], *args, **kwargs)
    except (ConfigError, DataError) as error:
        argument = str(error).partition(":")[0]
        if argument.isidentifier() and accepts(cfg, key, argument, given=len(args)):
            error.args = (f"{key}.{error}",)  # of dataset or of dataset_val, for instance
        raise
    except TrainingError:
        raise
    except ImportError as error:
        reason = missing_package(error) or _said(error)
        raise ConfigError(f"{key}._component_: {path} cannot be used: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {_said(error)}; correct its arguments") from error
    except Exception as error:
        # Packages raise their own error types: a logger without its API key, for instance. Other built-in errors need
        # a traceback.
        if type(error).__module__ == "builtins" and not isinstance(
            error, TypeError | AssertionError | OSError | RuntimeError
        ):
            raise
        raise ConfigError(f"{key}: {path} cannot be built: {type(error).__name__}: {_said(error)}") from error
    if not isinstance(built, kind := _KINDS.get(key, object)):
        where = f"{kind.__module__.partition('._')[0]}.{kind.__name__}"
        raise ConfigError(
            f"{key}._component_: {path} builds {type(built).__name__}, expected a subclass of {where}; derive your "
            "class from it"
        )
    return built


def check_component(cfg: DictConfig, key: str, *args: Any, **kwargs: Any) -> None:
    """Finds the component of a config key and compares its arguments with its signature, without building it.

    Args:
        cfg (DictConfig): the whole config.
        key (str): the component's key. If it is absent or null, nothing is checked.
        *args (Any): the component's positional arguments. Only their number is checked.
        **kwargs (Any): keyword arguments in addition to those of the config.

    Raises:
        ConfigError: if the component is not found or does not accept its arguments.
    """
    if not is_given(cfg, key):
        return
    node = cfg[key]
    if not OmegaConf.is_dict(node) or "_component_" not in node:
        raise ConfigError(f"{key}._component_: missing; set it to the dotted path of a class or function")
    path = node["_component_"]
    built_by = _found(key, path)
    _check_imports(key, path, built_by)
    try:
        signature = inspect.signature(built_by)
    except ValueError:  # some compiled functions have no signature
        return
    given = {str(name): value for name, value in node.items() if name != "_component_"}
    kinds = {name: each.kind for name, each in signature.parameters.items()}
    named = [name for name, kind in kinds.items() if kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    for name in () if Parameter.VAR_KEYWORD in kinds.values() else given:
        if name not in named:
            raise ConfigError(
                f"{key}.{name}: {path} has no such argument{suggestion(name, named)} (expected one of "
                f"{', '.join(named[len(args) :])})"
            )
    try:
        signature.bind(*args, **given | kwargs)
    except TypeError as error:
        missing = str(error).partition("missing a required argument: ")[2].strip("'")
        if missing:
            raise ConfigError(f"{key}.{missing}: missing; {path} requires this argument; add it") from error
        raise ConfigError(f"{key}: {path} does not accept these arguments: {error}") from error


def _check_imports(key: str, path: str, built_by: Callable[..., Any]) -> None:
    """Imports what a class imports in its ``__init__``, as loggers do, to report a missing package early."""
    try:
        source = inspect.getsource(built_by.__init__) if isinstance(built_by, type) else ""  # type: ignore[misc]
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):  # no source to read
        return
    tries = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
    optional = {
        id(node)
        for block in tries
        if not any(isinstance(part, ast.Raise) for handler in block.handlers for part in ast.walk(handler))
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                if (package := missing_package(error)) is not None:
                    raise ConfigError(f"{key}._component_: {path} cannot be used: {package}") from error


def accepts(cfg: DictConfig, key: str, argument: str, given: int = 0) -> bool:
    """Returns whether the component of a config key has an argument of this name, after the first ``given`` ones."""
    try:
        parameters = inspect.signature(_found(key, cfg[key]["_component_"])).parameters
    except ValueError:
        return False
    return argument in [*parameters][given:]


def _found(key: str, path: Any) -> Callable[..., Any]:
    """Returns the class or function at a dotted path."""
    where = f"{key}._component_"
    if not isinstance(path, str) or not all(path.split(".")):
        raise ConfigError(f"{where}: expected a dotted path, such as torch.optim.AdamW, got {path!r}")
    if os.getcwd() not in sys.path:  # a component may be in the working directory, as with torchtune
        sys.path.append(os.getcwd())
    try:
        found = find_component(path)
    except Exception as error:  # a module can raise anything on import
        raise ConfigError(f"{where}: cannot load {path!r}: {_why_not_found(path, error)}") from error
    if not callable(found):
        raise ConfigError(f"{where}: expected a class or function, got the {type(found).__name__} {path}")
    return found


def _why_not_found(path: str, error: Exception) -> str:
    cause: BaseException = error
    while isinstance(cause.__cause__, Exception):  # torchtune wraps the original error
        cause = cause.__cause__
    module, _, name = path.rpartition(".")
    if isinstance(cause, ModuleNotFoundError) and cause.name == path.partition(".")[0]:
        package = missing_package(cause)
        return f"no module {cause.name}; correct the name, or run in the folder that contains it, or: {package}"
    if isinstance(cause, ModuleNotFoundError) and (package := missing_package(cause)) is not None:
        return package
    if isinstance(cause, ModuleNotFoundError | AttributeError) and (names := _names_in(module)):
        return f"{module} has no {name}{suggestion(name, names)}"
    frame = traceback.extract_tb(cause.__traceback__)[-1]
    return f"{type(cause).__name__}: {_said(cause)} ({frame.filename} line {frame.lineno})"


def _names_in(module: str) -> list[str]:
    try:
        return dir(find_component(module))
    except Exception:  # the module's own name is wrong
        return []


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message that suggests the nearest known name; empty if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())
