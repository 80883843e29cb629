"""The settings that all builders of datasets share."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter
from typing import Any

from humanline.data._column_map import check_column_map
from humanline.data._group import TokenBudget
from humanline.data._read import DataFiles
from humanline.errors import ConfigError

__all__ = ["DatasetOptions", "with_options"]


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Settings of a builder; :func:`~humanline.data.preference_groups` says what each means."""

    split: str = "train"
    name: str | None = None
    data_files: DataFiles | None = None
    revision: str | None = None
    streaming: bool = False
    format: str | None = None
    column_map: Mapping[str, str | None] | None = None
    system_prompt: str | None = None
    on_bad_row: str = "drop"
    max_tokens: int = 1250
    max_prompt_tokens: int | None = 625

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("drop", "stop"):
            raise ConfigError(f"on_bad_row: expected drop or stop, got {self.on_bad_row!r}")
        if not isinstance(self.system_prompt, str | None):
            raise ConfigError(f"system_prompt: expected a text or null, got {self.system_prompt!r}")
        check_column_map(self.column_map)

    @property
    def budget(self) -> TokenBudget:
        """The most tokens of a group."""
        return TokenBudget(max_tokens=self.max_tokens, max_prompt_tokens=self.max_prompt_tokens)


def with_options(build: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a builder ``(tokenizer, source, options)`` the options as keyword arguments of its own."""

    @wraps(build)
    def builder(tokenizer: Any, source: Any, **options: Any) -> Any:
        return build(tokenizer, source, DatasetOptions(**options))

    own = [*inspect.signature(build).parameters.values()][:2]
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(DatasetOptions)
    ]
    builder.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return builder
