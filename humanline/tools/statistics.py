"""Statistics of an evaluation: pass@k, and the confidence interval of a mean over prompts."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from humanline.errors import ConfigError

__all__ = ["bootstrap_interval", "mean", "pass_at_k", "with_interval"]

# Draws in memory at a time: 32 MB of indices and 32 MB of values.
_DRAWS_AT_ONCE = 1 << 22


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Estimates without bias the probability that at least one of k samples is correct.

    This is the share of the subsets of k of n samples that hold at least one of the c correct samples,
    ``1 - C(n-c, k) / C(n, k)`` (https://arxiv.org/abs/2107.03374, equation 1).

    Args:
        samples (ArrayLike): n, integers of any shape.
        correct (ArrayLike): c, of the same shape, each from 0 to n.
        k (int): from 1 to the smallest n.

    Returns:
        NDArray[np.float64]: the estimates, in the shape of ``samples``.

    Raises:
        ConfigError: if k or a c is out of range.
    """
    n, c = np.broadcast_arrays(np.asarray(samples, dtype=np.int64), np.asarray(correct, dtype=np.int64))
    least = int(n.min()) if n.size else 0
    if not 1 <= k <= least:
        raise ConfigError(f"k: expected an integer from 1 to {least}, the smallest number of samples, got {k!r}")
    if ((c < 0) | (c > n)).any():
        raise ConfigError("correct: expected counts from 0 to the number of samples, found others")
    # C(n-c, k) / C(n, k) is the chance that k draws in a row miss. If n - c < k, one of the factors is 0.
    drawn = np.arange(k)
    misses = (n - c)[..., None] - drawn
    return 1 - (misses / (n[..., None] - drawn)).prod(-1)


def bootstrap_interval(
    values: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a mean (Efron 1979).

    Each resample draws P of the P values with replacement. The interval holds the middle ``level`` of the means of the
    resamples. Samples of one prompt depend on each other, so give one value per prompt. The same seed and number of
    values draw the same resamples.

    Args:
        values (ArrayLike): ``[P]``, finite.
        resamples (int): number of resamples, at least 1.
        level (float): between 0 and 1.
        seed (int): at least 0.

    Returns:
        tuple[float, float]: the lower and upper end. They coincide if all values are equal, or if there is only one:
            the bootstrap knows only the prompts that it gets.

    Raises:
        ConfigError: if an argument is out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ConfigError("values: expected a list of at least one number, all finite")
    if resamples < 1:
        raise ConfigError(f"resamples: expected an integer of at least 1, got {resamples!r}")
    if not 0 < level < 1:
        raise ConfigError(f"level: expected a number between 0 and 1, got {level!r}")
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _DRAWS_AT_ONCE // array.size)
    for start in range(0, resamples, block):
        part = means[start : start + block]
        part[:] = array[draw.integers(array.size, size=(part.size, array.size))].mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean(values: ArrayLike) -> float:
    """The mean of ``values``, ``[P]``."""
    return float(np.asarray(values, dtype=np.float64).mean())


def with_interval(values: ArrayLike, resamples: int, seed: int) -> dict[str, float]:
    """The ``mean`` of ``values``, ``[P]``, and ``low`` and ``high``: see :func:`bootstrap_interval`."""
    low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
    return {"mean": mean(values), "low": low, "high": high}
