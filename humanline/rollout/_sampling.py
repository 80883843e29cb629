"""Sampling settings, and drawing tokens from logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline.errors import ConfigError

__all__ = ["SamplingParams", "draw"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings of sampling.

    Args:
        max_new_tokens (int): the maximum number of tokens in a completion.
        temperature (float): divides the logits; 0 picks the most probable token.
        top_p (float): samples from the smallest set of most probable tokens whose probabilities sum to this; 1 samples
            from all tokens.
        samples_per_prompt (int): completions sampled for each prompt.
        seed (int): seed of all draws; the same seed gives the same completions.

    Raises:
        ConfigError: if a value is invalid; the message names the key.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "samples_per_prompt"):
            value = getattr(self, key)
            if not _is_number(value, int) or value < 1:
                raise ConfigError(f"{key}: expected a whole number of at least 1, got {value!r}")
        if not _is_number(self.temperature, int, float) or not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: expected a number of at least 0 (0 is greedy), got {self.temperature!r}")
        if not _is_number(self.top_p, int, float) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number above 0 and at most 1 (all tokens), got {self.top_p!r}")
        if not _is_number(self.seed, int):
            raise ConfigError(f"seed: expected a whole number, got {self.seed!r}")


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draws one token per row by inverting the distribution function, so one number decides one token.

    Args:
        logits (Tensor): float32 ``[B, V]``.
        uniforms (Tensor): float32 ``[B]``, in (0, 1]: 0 could give a token of probability 0.
        temperature (float): divides the logits; 0 picks the most probable token.
        top_p (float): mass of the nucleus, in (0, 1].

    Returns:
        Tensor: token ids, int64 ``[B]``.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / temperature, -1)
    if top_p == 1:
        cdf = probs.cumsum(-1)
        return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)
    probs, ids = _most_probable(probs, top_p)
    cdf = probs.cumsum(-1)
    # The nucleus ends with the first token that reaches its mass.
    end = (cdf < top_p).sum(-1, keepdim=True).clamp_(max=cdf.size(-1) - 1)
    choice = torch.searchsorted(cdf, uniforms[:, None] * cdf.gather(-1, end))
    return ids.gather(-1, choice).squeeze(-1)


def _most_probable(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Returns the most probable tokens, in falling order, until every row has the mass: probs, ids ``[B, K]``.

    A nucleus is usually small, and sorting the whole vocabulary costs more than the model's own step.
    """
    vocabulary = probs.size(-1)
    count = min(256, vocabulary)
    while True:
        top, ids = probs.topk(count, -1)
        if count == vocabulary or bool((top.sum(-1) >= mass).all()):
            return top, ids
        count = min(16 * count, vocabulary)


def _is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
