"""The statistics of an evaluation: pass@k, and how far a mean over prompts can be trusted."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from humanline.errors import ConfigError

__all__ = ["bootstrap_interval", "pass_at_k"]

# Draws in memory at a time: 32 MB of indices, and as much of values.
_DRAWS_AT_ONCE = 1 << 22


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """The unbiased estimate of the probability that one of k samples or more is correct.

    It is the share of the subsets of k among n samples that hold one of the c correct ones, ``1 - C(n-c, k) / C(n, k)``
    (https://arxiv.org/abs/2107.03374, equation 1).

    Args:
        samples (ArrayLike): n, whole numbers of any shape.
        correct (ArrayLike): c, of the same shape, each from 0 to n.
        k (int): from 1 to the least n.

    Returns:
        NDArray[np.float64]: the estimates, in the shape of ``samples``.

    Raises:
        ConfigError: if there are not k samples of each, or not c correct ones among them.
    """
    n, c = np.broadcast_arrays(np.asarray(samples, dtype=np.int64), np.asarray(correct, dtype=np.int64))
    least = int(n.min()) if n.size else 0
    if not 1 <= k <= least:
        raise ConfigError(f"k: {k!r} is not from 1 to {least}, the least number of samples")
    if ((c < 0) | (c > n)).any():
        raise ConfigError("correct: has counts below 0 or above the number of samples")
    # C(n-c, k) / C(n, k) as the chance that k draws in a row miss; where n - c < k, one of the factors is 0.
    drawn = np.arange(k)
    misses = (n - c)[..., None] - drawn
    return 1 - (misses / (n[..., None] - drawn)).prod(-1)


def bootstrap_interval(
    values: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron 1979).

    As many values are drawn from these with replacement, again and again; the interval holds the middle ``level`` of
    their means. Samples of one prompt depend on each other, so values are to be one a prompt. The same seed and number
    of values draw the same resamples.

    Args:
        values (ArrayLike): ``[P]``, finite.
        resamples (int): how often to draw.
        level (float): between 0 and 1.
        seed (int): at least 0.

    Returns:
        tuple[float, float]: its lower and upper end. They coincide where all values are equal, be it one value: the
        bootstrap knows of no prompts but those it was given.

    Raises:
        ConfigError: if an argument cannot work.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ConfigError("values: are not a list of at least one finite number")
    if resamples < 1:
        raise ConfigError(f"resamples: {resamples!r} is not at least 1")
    if not 0 < level < 1:
        raise ConfigError(f"level: {level!r} is not between 0 and 1")
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _DRAWS_AT_ONCE // array.size)
    for start in range(0, resamples, block):
        part = means[start : start + block]
        part[:] = array[draw.integers(array.size, size=(part.size, array.size))].mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
