"""A model from its folder, and what it answers to the prompts of a file: what the recipes that sample share."""

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from humanline.checkpoint import build_decoder, code_digest, named_files, read_decoder_weights, rounding_on_load
from humanline.config import DTYPES, component, one_of
from humanline.errors import ConfigError, DataError
from humanline.models import adapter_modules, load_decoder
from humanline.programs._partial_file import PartialFile
from humanline.rollout import Completion, Prompt, SamplingParams, TorchtuneEngine, read_prompts, token_ids

log = utils.get_logger("INFO")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def _decides(file: Path) -> bool:
    """Whether a file of a checkpoint decides what its model computes: its weights, and config.json's windows."""
    return file.suffix in _WEIGHTS or file.name == "config.json"


class Sampler:
    """Samples from a model in one process, on one device.

    Args:
        cfg (DictConfig): the whole config. The keys that are read here are ``REQUIRED`` and ``OPTIONAL``.

    Keys:
        prompts (str): a .jsonl, .json or .parquet file with ``prompt`` (text or messages) or ``instruction``, a .txt
            file with one prompt a line, or a hub dataset.
        split (str): the split of a hub dataset; of any source also a slice, such as ``train[:100]``.
        column_map (dict | None): the source's name for each field that it calls otherwise, such as
            ``{prompt: problem}``.
        system_prompt (str | None): stands before each prompt. Give the one that the model was trained with.
        device (str): ``cuda`` or ``cpu``.
        dtype (str): what the model computes in, ``bf16`` or ``fp32``.
        batch_size (int): responses drawn at a time. The KV cache has room for each, at the longest prompt's length plus
            ``max_new_tokens``.
        output_dir (str | None): a folder for ``output`` and ``checkpointer.output_dir`` to refer to.

    Attributes:
        params (SamplingParams): how responses are drawn.
        settings (dict[str, Any]): what the responses depend on besides model and prompts, defaults filled in.

    Raises:
        ConfigError: if a setting cannot work.
    """

    REQUIRED = ("model", "checkpointer", "tokenizer", "prompts", "max_new_tokens")
    PARAMS = tuple(field.name for field in fields(SamplingParams))
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "split": "train",
        "column_map": None,
        "system_prompt": None,
        "device": "cuda",
        "dtype": "bf16",
        "batch_size": 64,
    }
    OPTIONAL = (*PARAMS, *DEFAULTS)

    def __init__(self, cfg: DictConfig) -> None:
        self.params = SamplingParams(**{key: cfg[key] for key in self.PARAMS if key in cfg})
        given = {key: cfg.get(key, default) for key, default in self.DEFAULTS.items()}
        self.dtype = one_of(cfg, "dtype", DTYPES, default=self.DEFAULTS["dtype"])
        try:
            self.device = utils.get_device(given["device"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"device: {given['device']!r} cannot be used here ({error}); try cpu") from error
        self.batch_size = given["batch_size"]
        self.settings = asdict(self.params) | {"device": self.device.type, "dtype": given["dtype"]}

    def read(self, cfg: DictConfig) -> list[Prompt]:
        """The prompts; see :func:`~humanline.rollout.read_prompts`."""
        self.prompts = read_prompts(cfg.prompts, cfg.get("split", self.DEFAULTS["split"]), cfg.get("column_map"))
        return self.prompts

    def setup(self, cfg: DictConfig) -> None:
        """Encodes the prompts that were read, then loads the model: what is wrong with a prompt shows at once.

        Raises:
            ConfigError: if the model, its tokenizer and its weights are not those of one model.
            DataError: if a prompt leaves no room for ``max_new_tokens``, naming it.
        """
        system = [{"role": "system", "content": cfg.system_prompt}] if cfg.get("system_prompt") else []
        self.tokenizer = component(cfg, "tokenizer")
        self.prompt_ids = [self.tokenizer.encode_prompt([*system, *prompt.messages]) for prompt in self.prompts]
        with torch.device("meta"):
            model = build_decoder(cfg)
        if adapter_modules(model):
            raise ConfigError(
                f"model: {cfg.model._component_} makes a model with an adapter; sampling reads whole weights: name the "
                "builder without lora_ or qlora_, and in checkpointer a folder with the adapter merged "
                "(save_adapter_weights_only: False)"
            )
        self._check_fit(model)
        _, weights = read_decoder_weights(cfg, model)
        if warning := rounding_on_load(cfg, weights, "dtype", self.dtype):
            log.warning(warning)
        self.engine = TorchtuneEngine(
            load_decoder(model, weights, device=self.device, dtype=self.dtype),
            stop_tokens=self.tokenizer.stop_tokens,
            batch_size=self.batch_size,
            token_ids=token_ids(self.tokenizer),
        )
        self.made_of = [
            *(OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "tokenizer", "checkpointer")),
            *(self.settings, self.prompt_ids, [prompt.fields for prompt in self.prompts]),
            [file for file in named_files(cfg.checkpointer.checkpoint_dir) if _decides(Path(file[0]))],
            [list(self.tokenizer.stop_tokens), named_files(OmegaConf.to_container(cfg.tokenizer, resolve=True))],
            code_digest(cfg.model._component_, cfg.tokenizer._component_),
        ]

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

    def sample(self, output: str | Path) -> list[dict[str, Any]]:
        """Draws the responses of every prompt, with a progress bar.

        A prompt with all its responses is written down, in a file beside ``output``. A run that was cut short goes on
        with the prompts that it lacks; :meth:`forget` removes the file.

        Returns:
            list[dict[str, Any]]: for each prompt all that its file says of it, with its responses under
            ``all_generated_responses``, and for each of these under ``finish_reasons`` whether it ended by itself
            ("stop") or at ``max_new_tokens`` ("length"), and under ``response_lengths`` its tokens, the end of turn
            included.
        """
        self.partial = PartialFile(output, self.made_of)
        with self.partial as partial:
            rows = {done["index"]: done["row"] for done in partial.rows}
            if rows:
                log.info(f"{len(rows):,} of {len(self.prompts):,} prompts are sampled already, in {partial.path}")
            self._sample_rest(rows, partial)
        return [rows[i] for i in range(len(self.prompts))]

    def _sample_rest(self, rows: dict[int, dict[str, Any]], partial: PartialFile) -> None:
        """Adds the rows that are not there, by the prompt's index."""
        count = self.params.samples_per_prompt
        rest = [i for i in range(len(self.prompts)) if i not in rows]
        completions: dict[int, dict[int, Completion]] = {i: {} for i in rest}
        tokens = cut = 0
        start = time.perf_counter()
        with tqdm(
            total=len(self.prompts) * count, initial=len(rows) * count, unit="response", dynamic_ncols=True
        ) as bar:
            # Its own index seeds a prompt, whatever else is left.
            stream = self.engine.stream([self.prompt_ids[i] for i in rest], self.params, seeds=rest)
            for place, sample, completion in stream:
                i = rest[place]
                completions[i][sample] = completion
                if len(completions[i]) == count:
                    samples = completions.pop(i)
                    rows[i] = self._row(self.prompts[i], [samples[j] for j in range(count)])
                    partial.add([{"index": i, "row": rows[i]}])
                tokens += len(completion.tokens)
                cut += completion.finish_reason == "length"
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        log.info(
            f"{len(rest) * count:,} responses, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} "
            f"tokens/s); {cut:,} cut at max_new_tokens: {self.params.max_new_tokens}"
        )

    def forget(self) -> None:
        """Removes what :meth:`sample` has written down."""
        self.partial.path.unlink(missing_ok=True)

    def _row(self, prompt: Prompt, samples: list[Completion]) -> dict[str, Any]:
        # Scores that the line may have come with are those of other responses.
        kept = {key: value for key, value in prompt.fields.items() if key != "all_rm_scores"}
        return kept | {
            "all_generated_responses": [self.tokenizer.decode(sample.tokens) for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
            "response_lengths": [len(sample.tokens) for sample in samples],
        }
