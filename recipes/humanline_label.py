"""Scores sampled responses.

The input is the output of `humanline_sample`: JSON Lines with a prompt and its responses in `all_generated_responses`.
The output is the same lines with `all_rm_scores`, a dataset for `humanline.data.scored_groups`. Any reward works: a
rule, a reward model or a judge; see `humanline.rewards`. Not supported: more than one device (split the samples file,
and start one process per device).

    tune run humanline_label --config humanline/gsm8k_label samples=samples.jsonl
    tune run recipes/humanline_label --config configs/gsm8k_label.yaml samples=samples.jsonl output=scored.jsonl

Lines are written as they are scored, to a file beside the output. It gets the output's name once it is complete. If an
interrupted run is started again, it resumes with the missing lines; with another reward or other samples it starts from
the beginning. A reward model whose chat template reads the date keeps the day on which the file was begun.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

from humanline.programs import (
    READING,
    Scorer,
    check_keys,
    check_one_process,
    common_end,
    parse,
    reading,
    warn_of_replaced,
    whole_number,
    with_json_fields,
)
from humanline.rewards import read_samples
from omegaconf import DictConfig
from torchtune.utils import get_logger

REQUIRED = ("samples", "output", "reward")
DEFAULTS: dict[str, Any] = {"batch_size": 16, **READING, "output_dir": None, "device": None}

log = get_logger("INFO")


class HumanlineLabelRecipe:
    """Scores samples.

    Args:
        cfg (DictConfig): the whole config.

    Keys:
        samples (str | list): a file, a glob, a list, a folder, or a hub dataset of prompts with their responses in
            ``all_generated_responses``, or with one response in ``output``, such as AlpacaEval's model outputs.
        output (str): the file that is written: the same lines with ``all_rm_scores``.
        batch_size (int): prompts that are scored, and written, at a time.
        split (str): the split of a dataset; of any source also a slice, such as ``train[:100]``.
        name (str | None): the config of a dataset.
        data_files (str | list | dict | None): the files of a dataset to read; None reads all.
        revision (str | None): commit, tag or branch of a hub dataset; None for the newest.
        column_map (dict | None): the source's name for each field that it calls otherwise.
        output_dir (str | None): a folder for ``output`` to refer to.
        device (str | None): a device for ``reward.device`` to refer to.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or invalid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_keys(cfg, REQUIRED, DEFAULTS)
        self.batch_size = whole_number(cfg, "batch_size", default=DEFAULTS["batch_size"], least=1)
        self.output = Path(cfg.output).expanduser()

    def setup(self, cfg: DictConfig) -> None:
        """Reads the samples and builds the reward, so that an invalid line or reward is reported at once."""
        found, _ = read_samples(cfg.samples, **reading(cfg))
        warn_of_replaced("samples", found, ["all_rm_scores"])
        self.prompts = with_json_fields(found)
        self.rows = [dict(prompt.fields) for prompt in self.prompts]
        self.scorer = Scorer(cfg, self.prompts)
        self.partial = self.scorer.partial(self.output, self.rows)

    def label(self) -> list[dict[str, Any]]:
        """Scores the lines that have no scores yet, and returns all lines with scores."""
        with self.partial as partial:
            rows = self.scorer.score(self.rows, partial, self.batch_size)
            os.replace(partial.path, self.output)
        return rows

    def report(self, rows: list[dict[str, Any]]) -> None:
        scores = [row["all_rm_scores"] for row in rows]
        flat = [score for group in scores for score in group]
        equal = sum(len(set(group)) == 1 for group in scores)
        log.info(
            f"Wrote {self.output}: {len(flat):,} responses to {len(scores):,} prompts, mean score "
            f"{math.fsum(flat) / len(flat):.4g}; {equal:,} prompts with all scores equal"
        )

    def cleanup(self) -> None:
        """Does nothing; torchtune's recipes end with this call."""


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Scores sampled responses. An error in config or data ends it with one line."""
    with common_end(Path(__file__).name):
        check_one_process()
        recipe = HumanlineLabelRecipe(cfg)
        recipe.setup(cfg)
        recipe.report(recipe.label())
        recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
