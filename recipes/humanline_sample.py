"""Samples responses from a model to the prompts of a file.

One process loads a Hugging Face folder into torchtune's modules, encodes the prompts with the folder's chat template,
and samples in batches with a KV cache. The responses to a prompt share its prefill. The output is either JSON Lines, or
the `model_outputs.json` of AlpacaEval. A JSON line has a prompt and its responses in `all_generated_responses`; with
`all_rm_scores` added it is a dataset for `humanline.data.scored_groups`. Not supported: more than one device (split the
prompt file, and start one process per device), and scoring (see `humanline_label`).

    tune run humanline_sample --config humanline/smollm2_135m_sample prompts=prompts.jsonl
    tune run recipes/humanline_sample --config configs/smollm2_135m_sample.yaml prompts=prompts.jsonl \
        samples_per_prompt=8 temperature=0.7
    tune run recipes/humanline_sample --config configs/smollm2_135m_sample.yaml prompts=alpaca_eval.json \
        format=alpaca_eval output=model_outputs.json

Responses are written to a file beside the output as they are sampled. If an interrupted run is started again, it
resumes with the missing prompts; with other prompts, weights or settings it starts from the beginning.

The batching is in `humanline.rollout.TorchtuneEngine`.
"""

import sys
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError
from humanline.programs import (
    Sampler,
    SamplerSettings,
    check_keys,
    check_one_process,
    check_outputs,
    common_end,
    one_of,
    parse,
    write_json,
    write_jsonl,
)
from humanline.rollout import Prompt
from omegaconf import DictConfig
from torchtune.utils import get_logger

REQUIRED = (*SamplerSettings.REQUIRED, "output")
DEFAULTS: dict[str, Any] = {"format": "jsonl", "generator": None, "output_dir": None}
OPTIONAL = (*SamplerSettings.OPTIONAL, *DEFAULTS)

log = get_logger("INFO")


class HumanlineSampleRecipe:
    """Samples responses to prompts.

    Args:
        cfg (DictConfig): the whole config.

    Keys:
        output (str): the file that is written.
        format (str): ``jsonl``, one line a prompt; or ``alpaca_eval``, the ``model_outputs.json`` of AlpacaEval.
        generator (str | None): with ``alpaca_eval``, the model's name in the file; None is its folder's.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or invalid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_keys(cfg, REQUIRED, OPTIONAL)
        self.sampling = SamplerSettings(cfg)
        self.alpaca_eval = one_of(cfg, "format", {"jsonl": False, "alpaca_eval": True}, default=DEFAULTS["format"])
        samples_per_prompt = self.sampling.params.samples_per_prompt
        if self.alpaca_eval and samples_per_prompt != 1:
            raise ConfigError(
                f"samples_per_prompt: expected 1 with format: alpaca_eval, got {samples_per_prompt}; set 1, or "
                "format: jsonl"
            )
        self.output = str(cfg.output)
        check_outputs([self.output], cfg.prompts)
        self.generator = cfg.get("generator") or Path(cfg.checkpointer.checkpoint_dir).name

    def setup(self, cfg: DictConfig) -> None:
        """Reads the prompts and loads the model."""
        self.prompts = self.sampling.read(cfg)
        self.sampler = Sampler(cfg, self.sampling, self.prompts, self.output)

    def sample(self) -> list[dict[str, Any]]:
        """Samples the responses to every prompt that has none yet, with a progress bar."""
        return self.sampler.sample()

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Writes the responses to ``output``, which gets its name only once it is complete."""
        if self.alpaca_eval:
            write_json(self.output, [self._output(prompt, row) for prompt, row in zip(self.prompts, rows, strict=True)])
        else:
            write_jsonl(self.output, rows)
        self.sampler.forget()
        log.info(f"Wrote {self.output}")

    def _output(self, prompt: Prompt, row: dict[str, Any]) -> dict[str, Any]:
        dataset = {key: prompt.fields[key] for key in ("dataset",) if key in prompt.fields}
        return {
            "instruction": prompt.messages[-1]["content"],
            "output": row["all_generated_responses"][0],
            "generator": self.generator,
            **dataset,
        }

    def cleanup(self) -> None:
        """Does nothing; torchtune's recipes end with this call."""


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Samples responses to the prompts of a file. An error in config or data ends it with one line."""
    with common_end(Path(__file__).name):
        check_one_process()
        recipe = HumanlineSampleRecipe(cfg)
        recipe.setup(cfg)
        recipe.save(recipe.sample())
        recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
