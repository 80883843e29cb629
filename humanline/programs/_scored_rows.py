from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from tqdm import tqdm

from humanline.checkpoint import code_digest, named_files
from humanline.programs._partial_file import PartialFile
from humanline.rollout import Prompt, Reward, checked_scores

log = utils.get_logger("INFO")


def score_sources(reward: DictConfig) -> list[Any]:
    """What scores depend on besides the responses: the reward's settings, its code, and the files that it names.

    Args:
        reward (DictConfig): the config's ``reward``.
    """
    settings = OmegaConf.to_container(reward, resolve=True)
    return [settings, named_files(settings), code_digest(reward._component_)]


def scored_rows(
    reward: Reward, prompts: Sequence[Prompt], rows: Sequence[dict[str, Any]], partial: PartialFile, batch_size: int
) -> list[dict[str, Any]]:
    """Samples with their scores, of which those that an earlier run has left are not scored again.

    Args:
        reward (Reward): scores them.
        prompts (Sequence[Prompt]): the prompts.
        rows (Sequence[dict[str, Any]]): for each, its line with the responses in ``all_generated_responses``.
        partial (PartialFile): where lines are written as they are scored; it is open.
        batch_size (int): prompts scored at a time, and written.

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
