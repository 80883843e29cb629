from dataclasses import replace
from typing import Any

from torchtune.utils import get_logger

from humanline.data import BadRow, Record, SourceName, Tally
from humanline.rollout import Prompt, read_prompts

__all__ = ["read_samples"]

log = get_logger("INFO")


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
        DataError: if more than a tenth of the lines cannot be used; the message names the first of each reason.
    """
    found = _joined(read_prompts(source, key="samples", **options))
    tally = Tally(str(source))
    samples = []
    for _, prompt in tally.counted((prompt.where, prompt) for prompt in found):
        try:
            answers = Record(prompt.where, prompt.fields, {}).answers("all_generated_responses")
        except BadRow as error:
            tally.add(error)
        else:
            samples.append((prompt, [answer["content"] for answer in answers]))
    tally.check("drop")
    for note in tally.notes():
        log.warning(f"samples: {note}")
    return [prompt for prompt, _ in samples], [responses for _, responses in samples]


def _joined(prompts: list[Prompt]) -> list[Prompt]:
    """Joins rows with one ``output`` each to a row for each prompt."""
    joined: dict[str, Prompt] = {}
    for prompt in prompts:
        output = prompt.fields.get("output")
        if output is None or prompt.fields.get("all_generated_responses") is not None:
            joined[prompt.where] = prompt
            continue
        key = repr((prompt.messages, prompt.tools))
        own = {name: value for name, value in prompt.fields.items() if name != "output"}
        first = joined.setdefault(key, replace(prompt, fields={**own, "all_generated_responses": []}))
        first.fields["all_generated_responses"].append(output)
    return list(joined.values())
