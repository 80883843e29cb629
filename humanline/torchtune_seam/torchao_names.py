"""Lets torchtune 0.6.1, its last release, import with torchao 0.16 and later.

torchtune needs a module and three names that torchao has moved or dropped. The NF4 module is imported from its new
place. torchtune imports the three names, but only its quantizers use them: each becomes a stand-in that raises on use.

An import hook does this just before torchtune is imported. So a program that imports humanline first, as every recipe
does, works with either torchao. Nothing here imports torch earlier.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

_NF4 = ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
_DROPPED = {
    "torchao.dtypes": ("TensorCoreTiledLayout",),
    "torchao.quantization": ("int4_weight_only", "int8_dynamic_activation_int4_weight"),
}


class _TorchtuneFinder:
    """An import hook that finds no module. It completes torchao when torchtune is about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchtune":
            sys.meta_path.remove(self)
            complete_torchao()
        return None


def complete_torchao() -> None:
    """Adds to torchao the missing names that torchtune 0.6.1 imports. A torchao that has them is not changed.

    Raises:
        ImportError: if this torchao does not import with this torch. torchtune would say that torchao is missing.
    """
    old, new = _NF4
    if importlib.util.find_spec("torchao") is None:
        return
    try:
        importlib.import_module("torchao")
    except (ImportError, AttributeError) as error:
        torchao, torch = metadata.version("torchao"), metadata.version("torch")
        raise ImportError(
            f"torchao {torchao} does not import with torch {torch}: {error}. Install another torchao: torch 2.8 and "
            'torch 2.9 need 0.17 or earlier (pip install "torchao<0.18")'
        ) from error
    try:
        if importlib.util.find_spec(old) is None:
            sys.modules[old] = importlib.import_module(new)
        for module_name, names in _DROPPED.items():
            module = importlib.import_module(module_name)
            for name in names:
                if not hasattr(module, name):
                    setattr(module, name, _stand_in(module_name, name))
    except ImportError:  # another layout of torchao: torchtune's own error names the failing import
        return


def _stand_in(module: str, name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"{module}.{name} is not in this torchao; torchtune's quantizers need torchao 0.15 or earlier"
        )

    return type(name, (), {"__init__": refuse, "__module__": module})


if "torchtune" not in sys.modules:
    sys.meta_path.insert(0, _TorchtuneFinder())
