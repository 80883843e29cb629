from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from humanline.checkpoint import code_digest, named_files
from humanline.config import date_is_open, dated_component, today
from humanline.errors import DataError
from humanline.programs._partial_file import PartialFile
from humanline.progress import Progress
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


class Scorer:
    """Scores samples with a config's reward. It checks at once that the reward can score the prompts.

    Args:
        cfg (DictConfig): the whole config, of which ``reward`` is read.
        prompts (Sequence[Prompt]): the prompts.

    Attributes:
        reward (Reward): the reward.

    Raises:
        ConfigError: if the reward cannot be built.
        DataError: if the reward cannot score a prompt; the message names it.
    """

    def __init__(self, cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
        self.cfg, self.prompts = cfg, prompts
        self.reward: Reward = dated_component(cfg, "reward", today())
        self.reward(prompts, [[] for _ in prompts])
        self._made_of = score_sources(cfg.reward)

    def partial(self, output: str | Path, rows: Sequence[dict[str, Any]]) -> PartialFile:
        """Returns the file that keeps the scored rows of an interrupted run.

        If the reward depends on the date, and an earlier run began the file on another day, the reward is rebuilt with
        that day.

        Args:
            output (str | Path): the path of the program's output.
            rows (Sequence[dict[str, Any]]): the samples that :meth:`score` will get.
        """
        date = getattr(self.reward, "date", None) if date_is_open(self.cfg, "reward") else None
        partial = PartialFile(output, [self._made_of, rows], date)
        if partial.date is not None and partial.date != date:
            del self.reward  # the memory of one reward model must be enough
            self.reward = dated_component(self.cfg, "reward", partial.date)
        return partial

    def score(self, rows: Sequence[dict[str, Any]], partial: PartialFile, batch_size: int) -> list[dict[str, Any]]:
        """Scores samples, except those that an earlier run has scored.

        Args:
            rows (Sequence[dict[str, Any]]): for each prompt its line, with the responses in
                ``all_generated_responses``.
            partial (PartialFile): the open file of :meth:`partial`, to which scored rows are written.
            batch_size (int): prompts that are scored, and then written, at a time.

        Returns:
            list[dict[str, Any]]: the rows with the scores in ``all_rm_scores``.
        """
        scored = list(partial.rows)
        if scored:
            log.info(f"{len(scored):,} of {len(rows):,} prompts are scored already, in {partial.path}")
        with Progress(total=len(rows), initial=len(scored), desc="scoring", unit="prompt") as bar:
            while len(scored) < len(rows):
                part = slice(len(scored), len(scored) + batch_size)
                responses = [row["all_generated_responses"] for row in rows[part]]
                scores = checked_scores(self.reward, self.prompts[part], responses)
                new = [row | {"all_rm_scores": each} for row, each in zip(rows[part], scores, strict=True)]
                partial.add(new)
                scored += new
                bar.update(len(new))
        return scored
