from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from humanline.data import Record, SourceName
from humanline.rollout import Prompt, read_prompts

__all__ = ["read_samples"]


def read_samples(source: SourceName, **options: Any) -> tuple[list[Prompt], list[list[str]]]:
    """Reads prompts with their sampled responses, as ``recipes/humanline_sample.py`` writes them.

    Rows with a single response in ``output``, such as AlpacaEval's model outputs or HALOs' samples, are read too; the
    responses to the same prompt form one list.

    Args:
        source (SourceName): a source as in :func:`~humanline.rollout.read_prompts`, whose rows have a prompt and
            ``all_generated_responses``.
        **options (Any): options of :func:`~humanline.rollout.read_prompts`.

    Returns:
        The prompts in the order of the file, and the responses to each.

    Raises:
        ConfigError: if the file does not exist or has an unsupported type.
        DataError: if a line cannot be used; the message names it.
    """
    prompts = read_prompts(source, key="samples", **options)
    if not any(prompt.fields.get("all_generated_responses") is not None for prompt in prompts):
        prompts = _joined(prompts)
    return prompts, [_responses(prompt.where, prompt.fields) for prompt in prompts]


def _responses(where: str, fields: Mapping[str, Any]) -> list[str]:
    answers = Record(where, fields, {}).answers("all_generated_responses")
    return [answer["content"] for answer in answers]


def _joined(prompts: list[Prompt]) -> list[Prompt]:
    """Joins rows with one ``output`` each to a row for each prompt."""
    joined: dict[str, Prompt] = {}
    for prompt in prompts:
        output = prompt.fields.get("output")
        if output is None:
            return prompts
        key = repr((prompt.messages, prompt.tools))
        first = joined.setdefault(key, replace(prompt, fields={"all_generated_responses": []}))
        said = first.fields["all_generated_responses"]
        said.append(output)
        if len(said) == 1:
            own = {name: value for name, value in prompt.fields.items() if name != "output"}
            joined[key] = replace(first, fields={**own, **first.fields})
    return list(joined.values())
