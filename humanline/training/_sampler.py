"""A model from its folder, and what it answers to the prompts of a file: what the recipes that sample share."""

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import utils
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from humanline.errors import ConfigError, DataError
from humanline.models import check_architecture, load_decoder
from humanline.rollout import Completion, Prompt, SamplingParams, TorchtuneEngine
from humanline.training._keys import one_of
from humanline.training._settings import DTYPES, component
from humanline.training._weights import read_weights

log = utils.get_logger("INFO")


class Sampler:
    """Samples from a model in one process, on one device.

    Args:
        cfg (DictConfig): the whole config. The keys that are read here are ``REQUIRED`` and ``OPTIONAL``.

    Attributes:
        params (SamplingParams): how responses are drawn.
        settings (dict[str, Any]): what the responses depend on besides model and prompts, defaults filled in.

    Raises:
        ConfigError: if a setting cannot work.
    """

    REQUIRED = ("model", "checkpointer", "tokenizer", "max_new_tokens")
    PARAMS = tuple(field.name for field in fields(SamplingParams))
    OPTIONAL = (*PARAMS, "device", "dtype", "batch_size")

    def __init__(self, cfg: DictConfig) -> None:
        self.params = SamplingParams(**{key: cfg[key] for key in self.PARAMS if key in cfg})
        self.dtype = one_of(cfg, "dtype", DTYPES, default="bf16")
        try:
            self.device = utils.get_device(cfg.get("device", "cuda"))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"device: {cfg.get('device', 'cuda')!r} cannot be used here ({error}); try cpu"
            ) from error
        self.settings = asdict(self.params) | {"device": self.device.type, "dtype": cfg.get("dtype", "bf16")}

    def setup(self, cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
        """Encodes the prompts, then loads the model: what is wrong with a prompt shows at once.

        Raises:
            ConfigError: if the model, its tokenizer and its weights are not those of one model.
            DataError: if a prompt leaves no room for ``max_new_tokens``, naming it.
        """
        self.prompts = prompts
        self.tokenizer = component(cfg, "tokenizer")
        self.prompt_ids = [self.tokenizer.encode_prompt(prompt.messages) for prompt in prompts]
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

    def _check_fit(self, model: TransformerDecoder) -> None:
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

    def sample(self) -> list[dict[str, Any]]:
        """Draws the responses of every prompt, with a progress bar.

        Returns:
            list[dict[str, Any]]: for each prompt all that its file says of it, with its responses under
            ``all_generated_responses``, and for each of these under ``finish_reasons`` whether it ended by itself
            ("stop") or at ``max_new_tokens`` ("length"), and under ``response_lengths`` its tokens, the end of turn
            included.
        """
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
        return [
            self._row(prompt, [samples[j] for j in range(self.params.samples_per_prompt)])
            for prompt, samples in zip(self.prompts, completions, strict=True)
        ]

    def _row(self, prompt: Prompt, samples: list[Completion]) -> dict[str, Any]:
        # Scores that the line may have come with are those of other responses.
        kept = {key: value for key, value in prompt.fields.items() if key != "all_rm_scores"}
        return kept | {
            "all_generated_responses": [self.tokenizer.decode(sample.tokens) for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
            "response_lengths": [len(sample.tokens) for sample in samples],
        }
