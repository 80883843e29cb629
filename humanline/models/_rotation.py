"""Rotary positions: the frequencies of a head's dimensions, and how they are scaled for long sequences."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The angles by which rotary embeddings rotate queries and keys at position 1.

    Attributes:
        frequencies (Tensor): angles in radians, float64 ``[half of the rotated dimensions]``.
        factor (float): factor of sines and cosines.
        halves (bool | None): True if a dimension is paired with the one half a head away, False if with its neighbour;
            None if that is unknown.
    """

    frequencies: Tensor
    factor: float = 1.0
    halves: bool | None = None

    def like(self, other: "Rotation") -> bool:
        """Whether both rotations are equal up to float32 rounding."""
        return (
            self.frequencies.shape == other.frequencies.shape
            and torch.allclose(self.frequencies, other.frequencies, rtol=1e-5, atol=0)
            and math.isclose(self.factor, other.factor, rel_tol=1e-5)
            and (None in (self.halves, other.halves) or self.halves == other.halves)
        )

    def __str__(self) -> str:
        count = len(self.frequencies)
        if count == 0:
            return "none"
        if count == 1:
            return f"{2 * count} dimensions, frequency {self.frequencies[0]:.4g}"
        base = float(self.frequencies[0] / self.frequencies[1]) ** count
        plain = base ** (-torch.arange(count, dtype=torch.float64) / count)
        scaling = float(plain[-1] / self.frequencies[-1])
        words = [f"base {base:,.6g}", f"{2 * count} dimensions"]
        if not math.isclose(scaling, 1, rel_tol=1e-3):
            words.append(f"lowest frequency divided by {scaling:.4g}")
        if not math.isclose(self.factor, 1, rel_tol=1e-4):
            words.append(f"sines and cosines times {self.factor:.4g}")
        if self.halves is not None:
            words.append("dimensions paired over halves of a head" if self.halves else "neighbouring dimensions paired")
        return ", ".join(words)


def llama3_frequencies(plain: Tensor, rope: dict[str, Any], length: int) -> Tensor:
    """Computes Llama 3.1's frequencies: wavelengths beyond the original context are stretched, short ones are not."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = length * plain / (2 * math.pi)  # full turns of each dimension over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope["factor"] + kept * plain


def yarn(plain: Tensor, base: float, rope: dict[str, Any], length: int) -> Rotation:
    """YaRN (https://arxiv.org/abs/2309.00071)."""
    dim, factor = 2 * len(plain), rope["factor"]

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    if (attention := rope.get("attention_factor")) is None:
        one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(one) / magnitude(all_dim) if one and all_dim else magnitude(1)
    return Rotation(ramp * plain / factor + (1 - ramp) * plain, attention)
