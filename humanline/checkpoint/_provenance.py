"""Identifies the code that computes results and the files that a config names.

Cached results are stored under a digest of everything they depend on: config, code and files.
"""

import inspect
import os
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torchtune

import humanline
from humanline.torchtune_seam.internals import find_component

# torchtune's sources count because a fork may keep the version number.
_SOURCES = (humanline, torchtune)
_MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model")
_VERSIONS = ("torch", "torchao", "transformers", "tokenizers", "math-verify")


def code_digest(*components: str) -> str:
    """Returns a digest of the sources of humanline and torchtune and of the versions of the packages they call.

    Args:
        components (str): dotpaths from the config. The files that define them count too. Modules that those files
            import do not.
    """
    files = [file for package in _SOURCES for file in sorted(Path(inspect.getfile(package)).parent.rglob("*.py"))]
    files += [path for dotpath in components if (path := _file_of(find_component(dotpath)))]
    total = blake2b(" ".join(f"{name} {installed_version(name)}" for name in _VERSIONS).encode(), digest_size=16)
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def named_files(node: Any) -> list[tuple[str, int, int]]:
    """Returns path, size in bytes and modification time in ns of every file that a part of a config names.

    For a folder, returns them for the model files in it.
    """
    if isinstance(node, Mapping):
        return named_files(list(node.values()))
    if isinstance(node, str):
        path = os.path.expanduser(node)
        inside = sorted(Path(path).iterdir()) if os.path.isdir(path) else []
        files = [file for file in inside if file.suffix in _MODEL_FILES] or [Path(path)]
        stats = [(str(file.resolve()), file.stat()) for file in files if os.path.isfile(file)]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return [each for item in node for each in named_files(item)] if isinstance(node, list | tuple) else []


def _file_of(component: Any) -> Path | None:
    try:
        return Path(inspect.getfile(component))
    except TypeError:  # a built-in or an instance
        return None


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
