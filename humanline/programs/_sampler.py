"""Loads a model and samples its responses to the prompts of a file, for the recipes that sample."""

import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from torchtune.modules import TransformerDecoder

from humanline.checkpoint import code_digest, named_files
from humanline.config import DTYPES, date_is_open, dated_component, one_of, today
from humanline.errors import ConfigError, DataError
from humanline.programs._json_fields import warn_of_replaced, with_json_fields
from humanline.programs._partial_file import PartialFile
from humanline.programs._whole_model import model_sources, whole_model
from humanline.progress import Progress
from humanline.rollout import Completion, Prompt, SamplingParams, TorchtuneEngine, read_prompts, token_ids

log = utils.get_logger("INFO")

READING: dict[str, Any] = {"split": "train", "name": None, "data_files": None, "revision": None, "column_map": None}
"""The keys that say how a source of prompts or samples is read, and their defaults."""


def reading(cfg: DictConfig) -> dict[str, Any]:
    """Returns how a config's prompts or samples are read: the keys in ``READING``, with their defaults."""
    return {key: cfg.get(key, default) for key, default in READING.items()}


class SamplerSettings:
    """The keys of a config about sampling, checked before anything is read.

    Args:
        cfg (DictConfig): the whole config; this class reads the keys in ``REQUIRED`` and ``OPTIONAL``.

    Keys:
        prompts (str | list): a file (.jsonl, .json, .csv, .parquet), a glob, a list, a folder, or a hub dataset. The
            prompt, text or messages, is in the column ``prompt``, else ``instruction``, ``question``, ``problem``,
            ``query``, ``messages``, ``conversations`` or ``conversation``. A .txt file has one prompt a line.
        split (str): the split of a dataset; of any source also a slice, such as ``train[:100]``.
        name (str | None): the config of a dataset, such as ``main``.
        data_files (str | list | dict | None): the files of a dataset to read; None reads all.
        revision (str | None): commit, tag or branch of a hub dataset; None for the newest.
        column_map (dict | None): the source's name for each field that it calls otherwise, such as
            ``{prompt: problem}``; null for a column that is to be ignored.
        system_prompt (str | None): the system message of prompts that have none of their own. Set the one that the
            model was trained with.
        device (str): ``cuda`` or ``cpu``.
        dtype (str): what the model computes in, ``bf16`` or ``fp32``.
        batch_size (int): responses drawn at a time. The KV cache has room for each, at the longest prompt's length plus
            ``max_new_tokens``.
        output_dir (str | None): a folder for ``output`` and ``checkpointer.output_dir`` to refer to.

    Attributes:
        params (SamplingParams): the sampling settings.
        settings (dict[str, Any]): the settings that responses depend on, besides model and prompts, with defaults.

    Raises:
        ConfigError: if a setting is invalid.
    """

    WRITTEN = ("all_generated_responses", "finish_reasons", "response_lengths")
    REQUIRED = ("model", "checkpointer", "tokenizer", "prompts", "max_new_tokens")
    PARAMS = tuple(field.name for field in fields(SamplingParams))
    DEFAULTS: ClassVar[dict[str, Any]] = {
        **READING,
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
        self.system_prompt = given["system_prompt"]
        if not isinstance(self.system_prompt, str | None):
            raise ConfigError(f"system_prompt: expected a string or null, got {self.system_prompt!r}")
        self.settings = asdict(self.params) | {"device": self.device.type, "dtype": given["dtype"]}

    def read(self, cfg: DictConfig) -> list[Prompt]:
        """Reads the prompts; see :func:`~humanline.rollout.read_prompts`.

        Returns:
            list[Prompt]: the prompts under the system prompt. Their fields are JSON values, with the messages to sample
            from under ``prompt``, so that a later program sees the same prompt.

        Raises:
            ConfigError: if the source does not exist or holds no prompt.
            DataError: if a line is invalid, or has a value that the output cannot hold; the message names it.
        """
        found = read_prompts(cfg.prompts, **reading(cfg))
        own = sum(prompt.has_system_message for prompt in found)
        if self.system_prompt and own:
            log.info(f"system_prompt: {own:,} of {len(found):,} prompts keep their own system message instead")
        warn_of_replaced("prompts", found, (*self.WRITTEN, "all_rm_scores"))
        if any({"chosen", "rejected"} <= prompt.fields.keys() for prompt in found):
            log.warning(
                "prompts: the output keeps the columns chosen and rejected, which preference_groups would read; train "
                "on the samples with scored_groups"
            )
        prompts = [prompt.under(self.system_prompt) for prompt in found]
        return with_json_fields(
            [replace(prompt, fields={**prompt.fields, "prompt": prompt.messages}) for prompt in prompts]
        )


class Sampler:
    """Samples from a model in one process, on one device.

    It encodes the prompts, then loads the model, so that an invalid prompt is reported first.

    Args:
        cfg (DictConfig): the whole config, of which model, checkpointer and tokenizer are read.
        settings (SamplerSettings): its settings.
        prompts (list[Prompt]): the prompts, from :meth:`SamplerSettings.read`.
        output (str | Path): the program's output; a file beside it keeps the responses of an interrupted run.

    Raises:
        ConfigError: if model, tokenizer and weights do not match.
        DataError: if a prompt leaves no room for ``max_new_tokens``; the message names it.
    """

    def __init__(self, cfg: DictConfig, settings: SamplerSettings, prompts: list[Prompt], output: str | Path) -> None:
        self.params, self.prompts = settings.params, prompts
        self.partial, self.tokenizer = self._partial(cfg, settings, output)
        self.prompt_ids = [prompt.encoded(self.tokenizer) for prompt in self.prompts]
        self.engine = TorchtuneEngine(
            whole_model(cfg, settings.device, settings.dtype, self._check_fit),
            stop_tokens=self.tokenizer.stop_tokens,
            batch_size=settings.batch_size,
            token_ids=token_ids(self.tokenizer),
        )

    def _partial(self, cfg: DictConfig, settings: SamplerSettings, output: str | Path) -> tuple[PartialFile, Any]:
        """Returns the partial file, and the tokenizer; if its chat template reads the date, with the file's date."""
        tokenizer = dated_component(cfg, "tokenizer", today())
        made_of = [
            *model_sources(cfg),
            *(settings.settings, [[prompt.fields, prompt.messages, prompt.tools] for prompt in self.prompts]),
            [list(tokenizer.stop_tokens), OmegaConf.to_container(cfg.tokenizer, resolve=True)],
            [named_files(OmegaConf.to_container(cfg.tokenizer, resolve=True)), code_digest(cfg.tokenizer._component_)],
        ]
        date = getattr(tokenizer, "date", None) if date_is_open(cfg, "tokenizer") else None
        partial = PartialFile(output, made_of, date)
        if partial.date is None or partial.date == date:
            return partial, tokenizer
        return partial, dated_component(cfg, "tokenizer", partial.date)

    def _check_fit(self, model: TransformerDecoder) -> None:
        rows = model.tok_embeddings.num_embeddings
        if self.tokenizer.vocab_size > rows:
            raise ConfigError(
                f"tokenizer.path: its vocabulary of {self.tokenizer.vocab_size} is larger than the model's of {rows}; "
                "use the same model for tokenizer.path and model"
            )
        for prompt, ids in zip(self.prompts, self.prompt_ids, strict=True):
            if len(ids) + self.params.max_new_tokens > model.max_seq_len:
                raise DataError(
                    f"{prompt.where}: the prompt's {len(ids)} tokens and max_new_tokens: {self.params.max_new_tokens} "
                    f"exceed the model's max_seq_len of {model.max_seq_len}; shorten the prompt or lower max_new_tokens"
                )

    def sample(self) -> list[dict[str, Any]]:
        """Samples the responses to every prompt, with a progress bar.

        A prompt with all its responses is written to a file beside the output. An interrupted run resumes with the
        missing prompts; :meth:`forget` removes the file.

        Returns:
            list[dict[str, Any]]: for each prompt all fields of its line, with the sampled messages under ``prompt``;
            and three lists with a value for each response: ``all_generated_responses``; ``finish_reasons``, "stop"
            after a stop token or "length" at ``max_new_tokens``; and ``response_lengths``, in tokens, including the
            end of turn.
        """
        with self.partial as partial:
            rows = {done["index"]: done["row"] for done in partial.rows}
            if rows:
                log.info(f"{len(rows):,} of {len(self.prompts):,} prompts are sampled already, in {partial.path}")
            self._sample_rest(rows, partial)
        return [rows[i] for i in range(len(self.prompts))]

    def _sample_rest(self, rows: dict[int, dict[str, Any]], partial: PartialFile) -> None:
        """Adds the missing rows, by the prompt's index."""
        count = self.params.samples_per_prompt
        rest = [i for i in range(len(self.prompts)) if i not in rows]
        completions: dict[int, dict[int, Completion]] = {i: {} for i in rest}
        tokens = cut = 0
        start = time.perf_counter()
        total, done = len(self.prompts) * count, len(rows) * count
        with Progress(total=total, initial=done, unit="response", smoothing=0) as bar:  # they end in bursts
            # The seed is the prompt's own index, whichever prompts are left.
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
        """Removes the partial file of :meth:`sample`."""
        self.partial.path.unlink(missing_ok=True)

    def _row(self, prompt: Prompt, samples: list[Completion]) -> dict[str, Any]:
        # Scores in the prompt's line belong to other responses.
        kept = {key: value for key, value in prompt.fields.items() if key != "all_rm_scores"}
        return kept | {
            "all_generated_responses": [self.tokenizer.decode(sample.tokens) for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
            "response_lengths": [len(sample.tokens) for sample in samples],
        }
