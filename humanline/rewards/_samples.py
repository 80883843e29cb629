from pathlib import Path

from humanline.data import Record
from humanline.errors import ConfigError
from humanline.rollout import Prompt, read_prompts

__all__ = ["read_samples"]

_TABLES = (".jsonl", ".json", ".parquet")


def read_samples(path: str) -> tuple[list[Prompt], list[list[str]]]:
    """Reads prompts with their sampled responses, as ``recipes/humanline_sample.py`` writes them.

    Args:
        path (str): a .jsonl, .json or .parquet file of objects with ``prompt`` and ``all_generated_responses``.

    Returns:
        The prompts in the order of the file, and the responses to each.

    Raises:
        ConfigError: if the file does not exist or has an unsupported type.
        DataError: if a line cannot be used; the message names it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"samples: file '{path}' not found (working directory {Path.cwd()}); correct the path")
    if file.suffix not in _TABLES:
        raise ConfigError(f"samples: '{path}' has an unsupported type; convert it to one of {', '.join(_TABLES)}")
    prompts = read_prompts(path)
    return prompts, [Record(p.where, p.fields, {}).texts("all_generated_responses") for p in prompts]
