"""Scores the responses that were sampled to the prompts of a file.

What `humanline_sample` writes goes in, JSON Lines with a prompt and its responses in `all_generated_responses`; the
same lines come out with `all_rm_scores`, a dataset for `humanline.data.scored_groups`. Any reward does, by rule, by a
reward model or by a judge: see `humanline.rewards`. What it leaves out on purpose: more than one device (split the
samples file, and start one process on each).

    tune run humanline_label --config humanline/gsm8k_label samples=samples.jsonl
    tune run recipes/humanline_label --config configs/gsm8k_label.yaml samples=samples.jsonl output=scored.jsonl

Lines are written as they are scored, to a file beside the output that gets its name when it is whole. A run that was
cut short goes on with the lines it lacks when it is started again; with another reward or other samples it starts anew.
"""

import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from omegaconf import DictConfig, OmegaConf
from torchtune import config, utils
from tqdm import tqdm

from humanline.errors import ConfigError, DataError
from humanline.rewards import read_samples
from humanline.rollout import checked_scores
from humanline.training import check_keys, component, hide_known_warnings

REQUIRED = ("samples", "output", "reward")
OPTIONAL = ("batch_size", "output_dir", "device")  # the last two for other keys to refer to

log = utils.get_logger("INFO")


class HumanlineLabelRecipe:
    """Samples in, scored groups out.

    Args:
        cfg (DictConfig): the whole config.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_keys(cfg, REQUIRED, OPTIONAL)
        self.batch_size = cfg.get("batch_size", 16)
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size!r} is not a whole number of at least 1")
        self.output = Path(cfg.output).expanduser()

    def setup(self, cfg: DictConfig) -> None:
        """Reads the samples and builds the reward: what is wrong with a line or with the reward shows at once."""
        self.prompts, self.responses = read_samples(cfg.samples)
        self.reward = component(cfg, "reward")
        self.reward(self.prompts, [[] for _ in self.prompts])  # with nothing to score, it checks the prompts
        self.partial = self.output.with_name(f"{self.output.name}.{fingerprint(cfg)}.partial")

    def label(self) -> list[list[float]]:
        """Scores the lines that are not scored yet; returns the scores of all."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with sole_use(self.partial) as file:
            scores = [json.loads(line)["all_rm_scores"] for line in whole_lines(file)]
            if scores:
                log.info(f"{len(scores):,} of {len(self.prompts):,} prompts are scored already, in {self.partial}")
            with tqdm(total=len(self.prompts), initial=len(scores), unit="prompt", dynamic_ncols=True) as bar:
                while len(scores) < len(self.prompts):
                    batch = self._score(len(scores))
                    lines = zip(self.prompts[len(scores) :], batch, strict=False)
                    rows = [{**prompt.fields, "all_rm_scores": new} for prompt, new in lines]
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                    file.flush()
                    scores += batch
                    bar.update(len(batch))
            os.replace(self.partial, self.output)
        return scores

    def _score(self, start: int) -> list[list[float]]:
        """The scores of the batch of prompts that begins with ``start``."""
        responses = self.responses[start : start + self.batch_size]
        return checked_scores(self.reward, self.prompts[start : start + self.batch_size], responses)

    def report(self, scores: list[list[float]]) -> None:
        flat = [score for group in scores for score in group]
        equal = sum(len(set(group)) == 1 for group in scores)
        log.info(
            f"Wrote {self.output}: {len(flat):,} responses to {len(scores):,} prompts, mean score "
            f"{math.fsum(flat) / len(flat):.4g}; {equal:,} prompts with all scores equal"
        )

    def cleanup(self) -> None:
        """Nothing to close: what torchtune's recipes end with."""


def fingerprint(cfg: DictConfig) -> str:
    """Of what the scores depend on: the reward's config and the samples."""
    reward = json.dumps(OmegaConf.to_container(cfg.reward, resolve=True), sort_keys=True)
    samples = Path(cfg.samples).expanduser().read_bytes()
    return hashlib.sha256(reward.encode() + b"\n" + samples).hexdigest()[:12]


@contextmanager
def sole_use(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read and append, for this process alone. The lock goes with the process, however that ends."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output: {path} is being written by another run; wait for it, or name another") from None
        yield file


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The lines of a file, which loses what stands behind the last line end: a line that was being written."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    return whole.splitlines()


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Scores sampled responses. A mistake in config or data ends it with one line."""
    hide_known_warnings()
    try:
        recipe = HumanlineLabelRecipe(cfg)
        recipe.setup(cfg)
        recipe.report(recipe.label())
        recipe.cleanup()
    except (ConfigError, DataError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    sys.exit(recipe_main())
