"""A reward model: a transformers sequence classifier that scores a whole chat."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template, TemplateError
from torchtune import utils

from humanline.data import Message, read_day, template_environment
from humanline.errors import ConfigError, DataError
from humanline.rewards._prompts import pairs, regroup
from humanline.rewards._settings import check_count
from humanline.rollout import Prompt

__all__ = ["SequenceClassifierReward"]

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class SequenceClassifierReward:
    """Scores a prompt with its response, as a chat, by a sequence classifier in Hugging Face's format.

    The model's own chat template renders the chat. A chat longer than ``max_tokens`` keeps its first token and its end.

    Args:
        path (str): folder with an ``AutoModelForSequenceClassification`` and its tokenizer.
        head (int | None): index of the output that is the score, in the model's ``rewards`` if it returns them, else in
            its logits. null uses ``score`` if a model with its own code returns one (as ArmoRM does), else the only
            output.
        batch_size (int): most chats in a pass; 1 is used if the model's config has no padding token.
        device (str): ``cuda``, which falls back to the CPU if there is no GPU, or ``cpu``.
        dtype (str): dtype of the computation, ``bf16`` or ``fp32``.
        max_tokens (int | None): most tokens of a chat; null uses the model's number of positions.
        system_message (bool): whether the chat has the prompt's system message. Use False for a model whose chat
            template rejects one.
        trust_remote_code (bool): True runs the Python code in the folder, which some models need. Read it first.
        date (str | None): the date that the template reads, such as "2026-01-31"; null is the day on which the run
            started, also where it resumes on another day.

    Attributes:
        date (str | None): the date, if the template reads it; else None.

    Raises:
        ConfigError: if a value is invalid, the folder has no such model, or transformers is not installed.
    """

    def __init__(
        self,
        path: str,
        head: int | None = None,
        batch_size: int = 8,
        device: str = "cuda",
        dtype: str = "bf16",
        max_tokens: int | None = None,
        system_message: bool = True,
        trust_remote_code: bool = False,
        date: str | None = None,
    ) -> None:
        self._day = read_day("reward.date", date)
        check_count("batch_size", batch_size)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        if head is not None and (isinstance(head, bool) or not isinstance(head, int) or head < 0):
            raise ConfigError(f"reward.head: expected the index of an output, 0 or more, or null, got {head!r}")
        if dtype not in _DTYPES:
            raise ConfigError(f"reward.dtype: expected {' or '.join(_DTYPES)}, got {dtype!r}")
        for key, value in (("system_message", system_message), ("trust_remote_code", trust_remote_code)):
            if value not in (True, False):
                raise ConfigError(f"reward.{key}: expected true or false, got {value!r}")
        self._path = Path(path).expanduser()
        self._head = head
        self._system_message = system_message
        self._load(device, dtype, trust_remote_code)
        self.date = self._day.date().isoformat() if "strftime_now" in str(self._tokenizer.chat_template) else None
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if max_tokens is not None and positions is not None and max_tokens > positions:
            raise ConfigError(f"reward.max_tokens: {max_tokens} exceeds the model's {positions} positions; lower it")
        self._max_tokens = max_tokens or positions
        self._pad_id = self._model.config.pad_token_id
        self._batch_size = 1 if self._pad_id is None else batch_size
        # One chat tests template and head now, and not after hours of sampling.
        try:
            self._scores([self._encode([{"role": "user", "content": "Hello?"}], "Hello.", str(self._path))])
        except DataError as error:
            raise ConfigError(f"reward.path: {error}") from error

    def _load(self, device: str, dtype: str, trust_remote_code: bool) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                "reward: transformers, which runs reward models, is missing; "
                "pip install -c constraints.txt -e '.[reward]'"
            ) from error
        if not self._path.is_dir():
            raise ConfigError(
                f"reward.path: folder '{self._path}' not found (working directory {Path.cwd()}); download the model "
                "first, and set this key to its folder"
            )
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            self._device = utils.get_device(device)
            self._tokenizer = AutoTokenizer.from_pretrained(self._path, **options)
            model = AutoModelForSequenceClassification.from_pretrained(self._path, dtype=_DTYPES[dtype], **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"reward.path: {self._path} cannot be loaded as a sequence classifier on {device} "
                f"({' '.join(str(error).split())})"
            ) from error
        self._model = model.to(self._device).eval()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Raises:
            DataError: if the model's chat template rejects a prompt, also in a call without responses; the message
                names its line.
        """
        if not any(responses):
            for prompt in prompts:
                self._render(self._chat(prompt), "Hello.", prompt.where)
        chats = [self._encode(self._chat(prompt), text, prompt.where) for prompt, text in pairs(prompts, responses)]
        chats, cut = self._within_limit(chats)
        if cut:
            log.warning(f"SequenceClassifierReward: {cut:,} of {len(chats):,} chats cut to {self._max_tokens} tokens")
        # Chats of similar length share a pass. The longest come first, so that a lack of memory shows at once.
        order = sorted(range(len(chats)), key=lambda i: -len(chats[i]))
        scores = [0.0] * len(chats)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for i, score in zip(batch, self._scores([chats[i] for i in batch]), strict=True):
                scores[i] = score
        return regroup(scores, responses)

    def _chat(self, prompt: Prompt) -> list[Message]:
        """Returns the messages before a response."""
        skipped = int(prompt.has_system_message and not self._system_message)
        return prompt.messages[skipped:]

    @cached_property
    def _dated(self) -> Template:
        """The chat template with the reward's date; transformers would give it today's."""
        return template_environment(self._day.strftime).from_string(self._tokenizer.get_chat_template())

    def _render(self, messages: list[Message], response: str, where: str) -> str:
        """Returns the text of a chat."""
        try:
            chat = [*messages, {"role": "assistant", "content": response}]
            if self.date is not None:
                variables = {"tools": None, "documents": None, "add_generation_prompt": False}
                return self._dated.render(messages=chat, **variables, **self._tokenizer.special_tokens_map)
            return self._tokenizer.apply_chat_template(chat, tokenize=False)
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            system = messages[0]["role"] in ("system", "developer")
            remedy = "; if it accepts no system message, set reward.system_message: false" if system else ""
            raise DataError(f"{where}: the reward model's chat template cannot be used ({reason}){remedy}") from error

    def _encode(self, messages: list[Message], response: str, where: str) -> list[int]:
        """Returns the token ids of a chat."""
        return self._tokenizer(self._render(messages, response, where), add_special_tokens=False)["input_ids"]

    def _within_limit(self, chats: list[list[int]]) -> tuple[list[list[int]], int]:
        """Cuts chats to the limit; returns them and the number of chats that were cut."""
        limit = self._max_tokens
        if limit is None:
            return chats, 0
        cut = sum(len(chat) > limit for chat in chats)
        return [chat if len(chat) <= limit else [chat[0], *chat[len(chat) - limit + 1 :]] for chat in chats], cut

    def _scores(self, chats: list[list[int]]) -> list[float]:
        """Scores chats in one pass, padded on the right."""
        length = max(map(len, chats))
        ids = torch.full((len(chats), length), self._pad_id or 0)
        mask = torch.zeros_like(ids)
        for row, chat in enumerate(chats):
            ids[row, : len(chat)] = torch.tensor(chat)
            mask[row, : len(chat)] = 1
        with torch.inference_mode():
            output = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        return self._column(output).float().tolist()

    def _column(self, output: Any) -> torch.Tensor:
        """Returns the scores ``[B]`` in a model's output."""
        if self._head is None and getattr(output, "score", None) is not None:
            return output.score.reshape(-1)
        rewards = getattr(output, "rewards", None)
        outputs = output.logits if rewards is None else rewards
        if self._head is None and outputs.size(-1) > 1:
            raise ConfigError(
                f"reward.head: {self._path} has {outputs.size(-1)} outputs; set this key to the index of the score"
            )
        if self._head is not None and self._head >= outputs.size(-1):
            raise ConfigError(
                f"reward.head: expected an output of {self._path}, 0 to {outputs.size(-1) - 1}, got {self._head}"
            )
        return outputs[:, self._head or 0]
