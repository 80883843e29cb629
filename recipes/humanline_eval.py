"""Evaluates a model on a prompt file: samples responses, scores them, and says how far the figures can be trusted.

One process samples `samples_per_prompt` responses to each prompt, as `humanline_sample` does, and has a reward score
them. It reports, each as a mean over the prompts with a 95% bootstrap interval over the prompts:

- pass@k: the probability that one of k responses or more is solved, by the unbiased estimator. A response is solved if
  its score is above `correct_above`, which `k` needs: 0.5 for a reward of 0 and 1, 5 for `OpenR1Reward`, which adds up
  to 2 for form to the 8 of a right answer, and null for a reward without right and wrong, such as a reward model;
- the reward, the length of a response in tokens (its end of turn included), the share cut at `max_new_tokens`.

`output` gets settings and figures as JSON; beside it, in a .jsonl of the same name, are the samples with their scores,
a dataset for `humanline.data.scored_groups`. The samples are written before they are scored. So a reward that fails
costs no sampling: `samples=FILE.jsonl` scores what is there already, and needs no model. A run that was cut short goes
on, when it is started again, with the prompts that it has not sampled yet, and those that it has not scored yet.

    tune run recipes/humanline_eval --config configs/smollm2_135m_eval.yaml
    tune run recipes/humanline_eval --config configs/smollm2_135m_eval.yaml output=eval/again.json samples=FILE.jsonl

What it leaves out on purpose: the `model_outputs.json` of AlpacaEval, which `humanline_sample` writes with
`format=alpaca_eval`, and more than one device.
"""

import sys
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError, DataError
from humanline.programs import (
    PartialFile,
    Sampler,
    check_keys,
    check_one_process,
    common_end,
    component,
    parse,
    score_sources,
    scored_rows,
    write_json,
    write_jsonl,
)
from humanline.rewards import read_samples
from humanline.rollout import Prompt
from humanline.tools.statistics import bootstrap_interval, pass_at_k
from omegaconf import DictConfig, OmegaConf

REQUIRED = ("reward", "output")
DEFAULTS = {"correct_above": None, "k": [1], "bootstrap": 10_000, "seed": 0, "samples": None, "output_dir": None}

PROMPTS_PER_CALL = 64  # of the reward: enough for it to work in batches, while what is scored is soon written


class HumanlineEvalRecipe:
    """Samples in, figures out.

    Args:
        cfg (DictConfig): the whole config.

    Keys:
        output (str): the .json file that gets settings and figures, beside a .jsonl of the samples and their scores.
        correct_above (float | None): a higher score is a solved response; None for a reward without right and wrong.
        k (list[int]): each k of pass@k, at most ``samples_per_prompt``.
        bootstrap (int): resamples of the prompts for the intervals.
        seed (int): seed of sampling and of the bootstrap.
        samples (str | None): a .jsonl file of samples to score. None samples from the model.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        sampling = cfg.get("samples") is None
        optional = (*DEFAULTS, *Sampler.OPTIONAL, *Sampler.REQUIRED)
        check_keys(cfg, (*REQUIRED, *Sampler.REQUIRED) if sampling else REQUIRED, optional)
        if "correct_above" not in cfg and cfg.get("k") is not None:
            raise ConfigError(
                f"correct_above: is missing, and k: {cfg.k} counts the responses scored above it; add the score that "
                "only right ones exceed, or null for a reward without right and wrong"
            )
        self.correct_above = cfg.get("correct_above")
        if isinstance(self.correct_above, bool) or not isinstance(self.correct_above, int | float | None):
            raise ConfigError(f"correct_above: {self.correct_above!r} is not a score; give a number, or null")
        self.k = read_k(cfg) if self.correct_above is not None else []
        self.bootstrap = whole_number(cfg, "bootstrap", least=1)
        self.seed = whole_number(cfg, "seed", least=0)
        self.output = Path(str(cfg.output)).expanduser()
        if self.output.suffix != ".json":
            raise ConfigError(f"output: '{cfg.output}' does not end in .json; the samples go beside it, into a .jsonl")
        self.sampler = Sampler(cfg) if sampling else None
        if self.sampler is not None:
            samples_per_prompt = self.sampler.params.samples_per_prompt
            self._check_k(samples_per_prompt, f"samples_per_prompt: {samples_per_prompt}")
        self.settings = self._settings(cfg)

    def _settings(self, cfg: DictConfig) -> dict[str, Any]:
        """All that the figures depend on, defaults filled in."""
        own = {key: getattr(self, key) for key in ("correct_above", "k", "bootstrap", "seed")}
        given = OmegaConf.to_container(cfg, resolve=True)
        if self.sampler is not None:
            return given | own | self.sampler.settings
        # What the config says of a model did not make these samples.
        return {key: given[key] for key in given if key not in (*Sampler.REQUIRED, *Sampler.OPTIONAL)} | own

    def _check_k(self, count: int, source: str) -> None:
        for k in self.k:
            if k > count:
                raise ConfigError(f"k: {k} is more than {source}; lower the one, or raise the other")

    def setup(self, cfg: DictConfig) -> None:
        """Reads the samples; or the prompts, and loads the model. What cannot be scored shows before that."""
        self.reward = component(cfg, "reward")
        self.made_of = score_sources(cfg.reward)
        if self.sampler is None:
            self.prompts, responses = read_samples(cfg.samples)
            for prompt, texts in zip(self.prompts, responses, strict=True):
                self._check_k(len(texts), f"the {len(texts)} responses of {prompt.where}")
                check_facts(prompt, len(texts))
        else:
            self.prompts = self.sampler.read(cfg)
        self.reward(self.prompts, [[] for _ in self.prompts])
        if self.sampler is not None:
            self.sampler.setup(cfg)

    def sample(self) -> list[dict[str, Any]]:
        """The samples of each prompt: those of the file, or newly drawn ones, which are written down first."""
        if self.sampler is None:
            return [dict(prompt.fields) for prompt in self.prompts]
        rows = self.sampler.sample(self.output)
        write_jsonl(self.output.with_suffix(".jsonl"), rows)
        return rows

    def score(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples with the reward's scores in ``all_rm_scores``."""
        self.scored = PartialFile(self.output.with_suffix(".jsonl"), [self.made_of, rows])
        with self.scored as partial:
            return scored_rows(self.reward, self.prompts, rows, partial, PROMPTS_PER_CALL)

    def evaluate(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Each figure's mean over the prompts, and the ends of its interval."""
        scores = [row["all_rm_scores"] for row in rows]
        values = {}
        if self.correct_above is not None:
            correct = [sum(score > self.correct_above for score in each) for each in scores]
            values |= {f"pass@{k}": pass_at_k(list(map(len, scores)), correct, k) for k in self.k}
        values["reward"] = list(map(mean, scores))
        # Samples from elsewhere may lack these two.
        if all(row.get("response_lengths") for row in rows):
            values["tokens"] = [mean(row["response_lengths"]) for row in rows]
        if all(row.get("finish_reasons") for row in rows):
            values["cut"] = [mean([reason == "length" for reason in row["finish_reasons"]]) for row in rows]
        return {name: self._with_interval(each) for name, each in values.items()}

    def _with_interval(self, values: Any) -> dict[str, float]:
        low, high = bootstrap_interval(values, resamples=self.bootstrap, seed=self.seed)
        return {"mean": mean(values), "low": low, "high": high}

    def save(self, rows: list[dict[str, Any]], figures: dict[str, dict[str, float]]) -> None:
        """Prints the figures, and writes them and the samples."""
        responses = sum(len(row["all_rm_scores"]) for row in rows)
        write_jsonl(self.output.with_suffix(".jsonl"), rows)
        counts = {"prompts": len(rows), "responses": responses}
        write_json(self.output, {"settings": self.settings, **counts, "figures": figures})
        print(f"\n{len(rows):,} prompts, {responses:,} responses\n{'':12}{'mean':>8}  95% interval")
        for name, figure in figures.items():
            form = ".1%" if name.startswith("pass@") or name == "cut" else ".4g"
            middle, low, high = (format(figure[key], form) for key in ("mean", "low", "high"))
            print(f"{name:12}{middle:>8}  [{low}, {high}]")
        if self.sampler is not None:
            self.sampler.forget()
        self.scored.path.unlink(missing_ok=True)
        print(f"\nWrote {self.output} and {self.output.with_suffix('.jsonl')}")

    def cleanup(self) -> None:
        """Nothing to close: what torchtune's recipes end with."""


def check_facts(prompt: Prompt, count: int) -> None:
    """Refuses a line of samples that does not say of every response what it says of some."""
    for key, kind in (("response_lengths", int), ("finish_reasons", str)):
        values = prompt.fields.get(key)
        if values is not None and (not isinstance(values, list) or [type(v) for v in values] != [kind] * count):
            raise DataError(
                f"{prompt.where}: field '{key}' is not one {kind.__name__} for each of the {count} responses; "
                "correct it, or leave it out"
            )


def mean(values: Any) -> float:
    return float(sum(values) / len(values))


def whole_number(cfg: DictConfig, key: str, least: int) -> int:
    value = cfg.get(key, DEFAULTS[key])
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}: {value!r} is not a whole number of at least {least}")
    return value


def read_k(cfg: DictConfig) -> list[int]:
    value = cfg.get("k", DEFAULTS["k"])
    counts = list(value) if OmegaConf.is_list(value) or isinstance(value, list) else []
    if not counts or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in counts):
        raise ConfigError(f"k: {value!r} is not a list of whole numbers of at least 1, such as [1, 4, 8]")
    return counts


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Evaluates a model, or samples that are there. A mistake in config or data ends it with one line."""
    with common_end(Path(__file__).name):
        check_one_process()
        recipe = HumanlineEvalRecipe(cfg)
        recipe.setup(cfg)
        rows = recipe.score(recipe.sample())
        recipe.save(rows, recipe.evaluate(rows))
        recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
