from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from tqdm import tqdm

from humanline.checkpoint import code_digest, named_files
from humanline.errors import DataError
from humanline.programs._partial_file import PartialFile
from humanline.rollout import Prompt, Reward, checked_scores

log = utils.get_logger("INFO")


def check_facts(prompt: Prompt, count: int) -> None:
    """Checks that a line of samples has one length and one finish reason for each response, or none for all.

    Args:
        prompt (Prompt): the line.
        count (int): the number of its responses.

    Raises:
        DataError: if ``response_lengths`` or ``finish_reasons`` is anything else.
    """
    for key, kind in (("response_lengths", int), ("finish_reasons", str)):
        values = prompt.fields.get(key)
        if values is not None and (not isinstance(values, list) or [type(v) for v in values] != [kind] * count):
            raise DataError(
                f"{prompt.where}: field '{key}': expected one {kind.__name__} for each of the {count} responses; "
                "correct it, or remove it"
            )


def score_sources(reward: DictConfig) -> list[Any]:
    """Returns what scores depend on, besides the responses: the reward's settings, code, and the files that it names.

    Args:
        reward (DictConfig): the config's ``reward``.
    """
    settings = OmegaConf.to_container(reward, resolve=True)
    return [settings, named_files(settings), code_digest(reward._component_)]


def scored_rows(
    reward: Reward, prompts: Sequence[Prompt], rows: Sequence[dict[str, Any]], partial: PartialFile, batch_size: int
) -> list[dict[str, Any]]:
    """Scores samples, except those that an earlier run has scored.

    Args:
        reward (Reward): scores the responses.
        prompts (Sequence[Prompt]): the prompts.
        rows (Sequence[dict[str, Any]]): for each prompt its line, with the responses in ``all_generated_responses``.
        partial (PartialFile): the open file to which scored rows are written.
        batch_size (int): prompts that are scored, and then written, at a time.

    Returns:
        list[dict[str, Any]]: the rows with the scores in ``all_rm_scores``.
    """
    scored = list(partial.rows)
    if scored:
        log.info(f"{len(scored):,} of {len(rows):,} prompts are scored already, in {partial.path}")
    with tqdm(total=len(rows), initial=len(scored), desc="scoring", unit="prompt", dynamic_ncols=True) as bar:
        while len(scored) < len(rows):
            part = slice(len(scored), len(scored) + batch_size)
            responses = [row["all_generated_responses"] for row in rows[part]]
            scores = checked_scores(reward, prompts[part], responses)
            new = [row | {"all_rm_scores": each} for row, each in zip(rows[part], scores, strict=True)]
            partial.add(new)
            scored += new
            bar.update(len(new))
    return scored
