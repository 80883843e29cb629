"""Reads a server's reply to a completion request, and checks each field."""

import json
import math
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any, Literal

from humanline.rollout._connection import Refused


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One completion in the format of OpenAI's ``/completions``, with the fields that vLLM adds.

    Attributes:
        text (str): the completion; empty if the server returns ids instead.
        finish_reason (Literal["stop", "length"]): whether it ended with a stop token, or at the token limit.
        token_ids (list[int] | None): the sampled ids; None if the server returns only text.
        logps (list[float] | None): the log-probs of ``token_ids``, nats; None if they are missing or invalid.
        prompt_ids (list[int] | None): the prompt's ids; None if missing.
        prompt_tokens (int | None): the number of tokens in the prompt; None if missing.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None
    logps: list[float] | None
    prompt_ids: list[int] | None
    prompt_tokens: int | None


def read_reply(answer: bytes) -> Reply:
    """Reads the body of a reply.

    Raises:
        Refused: if it is not JSON, does not have exactly one choice, or a field is missing or invalid (the message
            names it); or if the completion was aborted.
    """
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError):
        raise Refused(200, f"expected JSON, got {short_repr(answer)}") from None
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        found = short_repr(content) if choices is None else f"{len(choices)} choices" if type(choices) is list else ""
        raise _wrong("choices", found or short_repr(choices), "a list of one object")
    choice: dict[str, Any] = choices[0]
    reason = choice.get("finish_reason")
    if "finish_reason" not in choice:
        raise _wrong("choices[0].finish_reason", "nothing", '"stop" or "length"')
    if reason not in ("stop", "length"):  # such as "abort", from a server that is shutting down
        raise Refused(500, f"finish_reason {reason!r}")
    ids, text = _ids(choice, "token_ids"), choice.get("text")
    if ids is None and not _is_text(text):
        raise _wrong("choices[0].text", short_repr(text), "a string (or token_ids)")
    prompt_ids, usage = _ids(choice, "prompt_token_ids"), content.get("usage")
    count = len(prompt_ids) if prompt_ids is not None else usage.get("prompt_tokens") if type(usage) is dict else None
    if count is not None and type(count) is not int:
        raise _wrong("usage.prompt_tokens", short_repr(count), "a number of tokens")
    return Reply(
        text=text if isinstance(text, str) else "",
        finish_reason=reason,
        token_ids=ids,
        logps=_logps(choice, ids),
        prompt_ids=prompt_ids,
        prompt_tokens=count,
    )


def _ids(choice: dict[str, Any], field: str) -> list[int] | None:
    ids = choice.get(field)
    if ids is None or (isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)):
        return ids
    raise _wrong(f"choices[0].{field}", short_repr(ids), "a list of token ids")


def _logps(choice: dict[str, Any], ids: list[int] | None) -> list[float] | None:
    """Returns one finite log-prob for each id, or None: a server need not send them."""
    logps = choice["logprobs"].get("token_logprobs") if isinstance(choice.get("logprobs"), dict) else None
    if ids is None or not isinstance(logps, list) or len(logps) != len(ids):
        return None
    return logps if all(type(logp) in (int, float) and math.isfinite(logp) for logp in logps) else None


def _is_text(text: Any) -> bool:
    """Returns whether ``text`` is a string without lone surrogates, which JSON can escape but tokenizers reject."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _wrong(field: str, found: str, expected: str) -> Refused:
    return Refused(200, f"{field}: expected {expected}, got {found}")
