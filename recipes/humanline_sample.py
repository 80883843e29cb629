"""Samples responses from a model to the prompts of a file.

One process loads a Hugging Face folder into torchtune's modules, encodes the prompts with the folder's own chat
template, and samples in batches with a KV cache; the responses to a prompt share its prefill. What comes out is either
JSON Lines, one line a prompt with its responses in `all_generated_responses` (add `all_rm_scores`, and it is a dataset
for `humanline.data.scored_groups`), or the `model_outputs.json` of AlpacaEval. What it leaves out on purpose: more than
one device (split the prompt file, and start one process on each), and scoring, which is a program of its own.

    tune run humanline_sample --config humanline/smollm2_135m_sample prompts=prompts.jsonl
    tune run recipes/humanline_sample --config configs/smollm2_135m_sample.yaml prompts=prompts.jsonl \
        samples_per_prompt=8 temperature=0.7
    tune run recipes/humanline_sample --config configs/smollm2_135m_sample.yaml prompts=alpaca_eval.json \
        format=alpaca_eval output=model_outputs.json

The batching itself is in `humanline.rollout.TorchtuneEngine`.
"""

import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, utils
from tqdm import tqdm

from humanline.errors import ConfigError, DataError
from humanline.models import check_architecture, load_decoder
from humanline.rollout import Completion, Prompt, SamplingParams, TorchtuneEngine, read_prompts
from humanline.training import component, hide_known_warnings, read_weights

REQUIRED = ("model", "checkpointer", "tokenizer", "prompts", "output", "max_new_tokens")
OPTIONAL = ("device", "dtype", "batch_size", "format", "generator", "output_dir")
SAMPLING = tuple(field.name for field in fields(SamplingParams))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("jsonl", "alpaca_eval")

log = utils.get_logger("INFO")


class HumanlineSampleRecipe:
    """Prompts in, responses out.

    Args:
        cfg (DictConfig): the whole config.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_keys(cfg)
        self.params = SamplingParams(**{key: cfg[key] for key in SAMPLING if key in cfg})
        self.dtype = one_of(cfg, "dtype", DTYPES, default="bf16")
        self.format = one_of(cfg, "format", dict(zip(FORMATS, FORMATS, strict=True)), default="jsonl")
        if self.format == "alpaca_eval" and self.params.samples_per_prompt != 1:
            raise ConfigError(
                f"samples_per_prompt: {self.params.samples_per_prompt} does not work with format: alpaca_eval, which "
                "has one output an instruction; set 1, or format: jsonl"
            )
        try:
            self.device = utils.get_device(cfg.get("device", "cuda"))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"device: {cfg.get('device', 'cuda')!r} cannot be used here ({error}); try cpu"
            ) from error
        self.generator = cfg.get("generator") or Path(cfg.checkpointer.checkpoint_dir).name

    def setup(self, cfg: DictConfig) -> None:
        """Reads and encodes the prompts, then loads the model: what is wrong with a prompt shows at once."""
        self.prompts = read_prompts(cfg.prompts)
        self.tokenizer = component(cfg, "tokenizer")
        self.prompt_ids = [self.tokenizer.encode_prompt(prompt.messages) for prompt in self.prompts]
        with torch.device("meta"):
            model = component(cfg, "model")
        self._check_fit(model)
        _, weights = read_weights(cfg)
        check_architecture(model, weights, cfg.checkpointer.checkpoint_dir)
        self.engine = TorchtuneEngine(
            load_decoder(model, weights, device=self.device, dtype=self.dtype),
            stop_tokens=self.tokenizer.stop_tokens,
            batch_size=cfg.get("batch_size", 64),
        )

    def _check_fit(self, model: Any) -> None:
        rows = model.tok_embeddings.num_embeddings
        if self.tokenizer.vocab_size > rows:
            raise ConfigError(
                f"tokenizer.path: its vocabulary of {self.tokenizer.vocab_size} is larger than the model's of {rows}; "
                "let tokenizer.path and model name the same model"
            )
        for prompt, ids in zip(self.prompts, self.prompt_ids, strict=True):
            if len(ids) + self.params.max_new_tokens > model.max_seq_len:
                raise DataError(
                    f"{prompt.where}: the prompt's {len(ids)} tokens and max_new_tokens: {self.params.max_new_tokens} "
                    f"are more than the model's max_seq_len of {model.max_seq_len}; shorten the one or lower the other"
                )

    def sample(self) -> list[list[Completion]]:
        """Draws the responses of every prompt, with a progress bar."""
        completions: list[dict[int, Completion]] = [{} for _ in self.prompts]
        total = len(self.prompts) * self.params.samples_per_prompt
        tokens, start = 0, time.perf_counter()
        with tqdm(total=total, unit="response", dynamic_ncols=True) as bar:
            for prompt, sample, completion in self.engine.stream(self.prompt_ids, self.params):
                completions[prompt][sample] = completion
                tokens += len(completion.tokens)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        cut = sum(c.finish_reason == "length" for samples in completions for c in samples.values())
        log.info(
            f"{total:,} responses, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); "
            f"{cut:,} cut at max_new_tokens: {self.params.max_new_tokens}"
        )
        return [[samples[j] for j in range(self.params.samples_per_prompt)] for samples in completions]

    def save(self, completions: list[list[Completion]], output: str) -> None:
        """Writes the responses beside ``output`` and renames the file, so that what bears its name is whole."""
        path = Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        rows = [self._row(prompt, samples) for prompt, samples in zip(self.prompts, completions, strict=True)]
        with partial.open("w", encoding="utf-8") as file:
            if self.format == "alpaca_eval":
                json.dump(rows, file, ensure_ascii=False, indent=2)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, path)
        log.info(f"Wrote {path}")

    def _row(self, prompt: Prompt, samples: list[Completion]) -> dict[str, Any]:
        responses = [self.tokenizer.decode(sample.tokens) for sample in samples]
        if self.format == "alpaca_eval":
            dataset = {key: prompt.fields[key] for key in ("dataset",) if key in prompt.fields}
            return {
                "instruction": prompt.messages[-1]["content"],
                "output": responses[0],
                "generator": self.generator,
                **dataset,
            }
        # Scores that the line may have come with are those of other responses.
        kept = {key: value for key, value in prompt.fields.items() if key != "all_rm_scores"}
        return kept | {
            "all_generated_responses": responses,
            "finish_reasons": [sample.finish_reason for sample in samples],
        }

    def cleanup(self) -> None:
        """Nothing to close: what torchtune's recipes end with."""


def check_keys(cfg: DictConfig) -> None:
    known = dict.fromkeys((*REQUIRED, *SAMPLING, *OPTIONAL))
    for key in cfg:
        if key not in known:
            raise ConfigError(f"{key}: is not a key of this recipe; its keys are {', '.join(known)}")
    for key in REQUIRED:
        if cfg.get(key) is None:
            raise ConfigError(f"{key}: is missing; add it to the config, or {key}=... to the command line")


def one_of(cfg: DictConfig, key: str, choices: dict[str, Any], default: str) -> Any:
    value = cfg.get(key, default)
    if value not in choices:
        raise ConfigError(f"{key}: {value!r} is not supported; choose {' or '.join(choices)}")
    return choices[value]


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Samples responses to the prompts of a file. A mistake in config or data ends it with one line."""
    hide_known_warnings()
    try:
        recipe = HumanlineSampleRecipe(cfg)
        recipe.setup(cfg)
        recipe.save(recipe.sample(), cfg.output)
        recipe.cleanup()
    except (ConfigError, DataError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    sys.exit(recipe_main())
