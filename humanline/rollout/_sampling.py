"""How a token is drawn from logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline.errors import ConfigError

__all__ = ["SamplingParams", "draw"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Args:
        max_new_tokens (int): a completion ends here if no stop token came before.
        temperature (float): divides the logits; 0 takes the most probable token.
        top_p (float): draw from the smallest set of most probable tokens that holds this mass; 1 draws from all.
        samples_per_prompt (int): completions of each prompt.
        seed (int): same seed, same completions.

    Raises:
        ConfigError: if a value cannot work, naming the key.
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
                raise ConfigError(f"{key}: {value!r} is not a whole number of at least 1")
        if not _is_number(self.temperature, int, float) or not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: {self.temperature!r} is not a number of at least 0 (0 is greedy)")
        if not _is_number(self.top_p, int, float) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p!r} is not above 0 and at most 1 (1 draws from all tokens)")
        if not _is_number(self.seed, int):
            raise ConfigError(f"seed: {self.seed!r} is not a whole number")


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draws one token a row by inverting the distribution function, so that one number decides one token.

    Args:
        logits (Tensor): float32 ``[B, V]``.
        uniforms (Tensor): float32 ``[B]``, in (0, 1]: 0 could give a token of probability 0.
        temperature (float): divides the logits; 0 takes the most probable token.
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
    """The most probable tokens in falling order, as many as hold the mass in every row or more: probs, ids ``[B, K]``.

    A nucleus is mostly small, and sorting the whole vocabulary costs more than the model's own step.
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
