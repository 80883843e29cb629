"""Evaluates a model on a prompt file: samples responses, scores them, and reports figures with intervals.

One process samples `samples_per_prompt` responses to each prompt, as `humanline_sample` does, and a reward scores them.
It reports these figures, each as a mean over prompts with a 95% bootstrap interval over prompts:

- pass@k: the probability that at least one of k responses is right, by the unbiased estimator. A response is right if
  its score is above `correct_above`, which `k` needs. Use 0.5 for a reward of 0 and 1; 5 for `OpenR1Reward`, which adds
  up to 2 for form to the 8 of a right answer; null for a reward without right and wrong, such as a reward model;
- the reward, the length of a response in tokens (including its end of turn), the share cut at `max_new_tokens`.

`output` receives settings, with the dates that chat templates read, and figures as JSON. A .jsonl file of the same name
has the samples with their scores, a dataset for `humanline.data.scored_groups`. The samples are written before they are
scored, so a failed reward loses none: `samples=FILE.jsonl` scores existing samples, and needs no model. If an
interrupted run is started again, it resumes with the prompts that are not sampled or not scored yet.

    tune run recipes/humanline_eval --config configs/smollm2_135m_eval.yaml
    tune run recipes/humanline_eval --config configs/smollm2_135m_eval.yaml output=eval/again.json samples=FILE.jsonl

Not supported: more than one device, and the `model_outputs.json` of AlpacaEval (use `humanline_sample` with
`format=alpaca_eval`).
"""

import sys
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError
from humanline.programs import (
    Sampler,
    SamplerSettings,
    Scorer,
    check_facts,
    check_keys,
    check_one_process,
    check_outputs,
    common_end,
    parse,
    reading,
    warn_of_replaced,
    whole_number,
    whole_numbers,
    with_json_fields,
    write_json,
    write_jsonl,
)
from humanline.rewards import read_samples
from humanline.tools.statistics import mean, pass_at_k, with_interval
from omegaconf import DictConfig, OmegaConf

REQUIRED = ("reward", "output")
DEFAULTS: dict[str, Any] = {"correct_above": None, "k": [1], "bootstrap": 10_000, "seed": 0}
DEFAULTS |= dict.fromkeys(("samples", "output_dir"))

PROMPTS_PER_CALL = 64  # of the reward: enough for batches, few enough to write scores soon


class HumanlineEvalRecipe:
    """Computes figures from samples.

    Args:
        cfg (DictConfig): the whole config.

    Keys:
        output (str): the .json file that gets settings and figures, beside a .jsonl of the samples and their scores.
        correct_above (float | None): a higher score is a solved response; None for a reward without right and wrong.
        k (list[int]): each k of pass@k, at most ``samples_per_prompt``.
        bootstrap (int): resamples of the prompts for the intervals.
        seed (int): seed of sampling and of the bootstrap.
        samples (str | list | None): a source of samples to score, as in ``humanline_label``; ``split`` and the like
            are for ``prompts``, if the config has both. None samples from the model.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or invalid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        sampling = cfg.get("samples") is None
        optional = (*DEFAULTS, *SamplerSettings.OPTIONAL, *SamplerSettings.REQUIRED)
        check_keys(cfg, (*REQUIRED, *SamplerSettings.REQUIRED) if sampling else REQUIRED, optional)
        if "correct_above" not in cfg and cfg.get("k") is not None:
            raise ConfigError(
                f"correct_above: missing, but k: {cfg.k} needs it; set the score that only right responses exceed, or "
                "null for a reward without right and wrong"
            )
        self.correct_above = cfg.get("correct_above")
        if isinstance(self.correct_above, bool) or not isinstance(self.correct_above, int | float | None):
            raise ConfigError(f"correct_above: expected a number or null, got {self.correct_above!r}")
        self.k = whole_numbers(cfg, "k", DEFAULTS["k"]) if self.correct_above is not None else []
        self.bootstrap = whole_number(cfg, "bootstrap", DEFAULTS["bootstrap"], least=1)
        self.seed = whole_number(cfg, "seed", DEFAULTS["seed"], least=0)
        self.output = Path(str(cfg.output)).expanduser()
        if self.output.suffix != ".json":
            raise ConfigError(
                f"output: expected a name ending in .json, got '{cfg.output}'; samples go into a .jsonl beside it"
            )
        check_outputs([self.output, self.output.with_suffix(".jsonl")], cfg.prompts if sampling else None)
        self.sampling = SamplerSettings(cfg) if sampling else None
        self.sampler: Sampler | None = None
        if self.sampling is not None:
            samples_per_prompt = self.sampling.params.samples_per_prompt
            self._check_k(samples_per_prompt, f"samples_per_prompt: {samples_per_prompt}")
        self.settings = self._settings(cfg)

    def _settings(self, cfg: DictConfig) -> dict[str, Any]:
        """Returns all settings that the figures depend on, with defaults."""
        own = {key: getattr(self, key) for key in ("correct_above", "k", "bootstrap", "seed")}
        given: Any = OmegaConf.to_container(cfg, resolve=True)
        if self.sampling is not None:
            return given | own | self.sampling.settings
        # The config's model did not make these samples.
        return {
            key: given[key] for key in given if key not in (*SamplerSettings.REQUIRED, *SamplerSettings.OPTIONAL)
        } | own

    def _check_k(self, count: int, source: str) -> None:
        for k in self.k:
            if k > count:
                raise ConfigError(f"k: {k} exceeds {source}; lower k, or sample more responses")

    def setup(self, cfg: DictConfig) -> None:
        """Reads the samples, or the prompts and then the model. Prompts that cannot be scored are reported first."""
        if self.sampling is None:
            found, responses = read_samples(cfg.samples, **({} if "prompts" in cfg else reading(cfg)))
            for prompt, texts in zip(found, responses, strict=True):
                self._check_k(len(texts), f"the {len(texts)} responses of {prompt.where}")
                check_facts(prompt, len(texts))
            warn_of_replaced("samples", found, ["all_rm_scores"])
            self.prompts = with_json_fields(found)
        else:
            self.prompts = self.sampling.read(cfg)
        self.scorer = Scorer(cfg, self.prompts)
        if self.sampling is not None:
            self.sampler = Sampler(cfg, self.sampling, self.prompts, self.output)

    def sample(self) -> list[dict[str, Any]]:
        """Returns the samples of each prompt: those of the file, or new ones, which are also written."""
        if self.sampler is None:
            return [dict(prompt.fields) for prompt in self.prompts]
        rows = self.sampler.sample()
        write_jsonl(self.output.with_suffix(".jsonl"), rows)
        return rows

    def score(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the samples with the reward's scores in ``all_rm_scores``."""
        self.scored = self.scorer.partial(self.output.with_suffix(".jsonl"), rows)
        with self.scored as partial:
            return self.scorer.score(rows, partial, PROMPTS_PER_CALL)

    def evaluate(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Returns each figure's mean over the prompts, and the ends of its interval."""
        scores = [row["all_rm_scores"] for row in rows]
        values: dict[str, Any] = {}  # of each prompt
        if self.correct_above is not None:
            correct = [sum(score > self.correct_above for score in each) for each in scores]
            values |= {f"pass@{k}": pass_at_k(list(map(len, scores)), correct, k) for k in self.k}
        values["reward"] = list(map(mean, scores))
        # Samples of another program may lack these two fields.
        if all(row.get("response_lengths") for row in rows):
            values["tokens"] = [mean(row["response_lengths"]) for row in rows]
        if all(row.get("finish_reasons") for row in rows):
            values["cut"] = [mean([reason == "length" for reason in row["finish_reasons"]]) for row in rows]
        return {name: with_interval(each, self.bootstrap, self.seed) for name, each in values.items()}

    def save(self, rows: list[dict[str, Any]], figures: dict[str, dict[str, float]]) -> None:
        """Writes figures and samples, and prints the figures."""
        responses = sum(len(row["all_rm_scores"]) for row in rows)
        for key, part in (("tokenizer", self.sampler and self.sampler.tokenizer), ("reward", self.scorer.reward)):
            if date := getattr(part, "date", None):  # of today, or of the day on which an interrupted run began
                self.settings[key]["date"] = date
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
        """Does nothing; torchtune's recipes end with this call."""


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Evaluates a model, or existing samples. An error in config or data ends it with one line."""
    with common_end(Path(__file__).name):
        check_one_process()
        recipe = HumanlineEvalRecipe(cfg)
        recipe.setup(cfg)
        rows = recipe.score(recipe.sample())
        recipe.save(rows, recipe.evaluate(rows))
        recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
