"""What many equal layers take, from runs with a few of them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchtune.modules import TransformerDecoder

Moment = tuple[Any, ...]
Peaks = Mapping[Moment, Counter[str]]

_LONGEST_PERIOD = 6  # layers; of Gemma 3's every sixth is another, of Gemma 2's every other one


def depths(layers: nn.ModuleList) -> tuple[int, int, int] | None:
    """With how many layers to run instead, twice, and how many times the difference is missing then.

    A run has a moment for each layer at either end and one for all between (see :func:`moment`). What is held at a
    moment then is a linear function of the number of layers, and so is its peak: two runs give it exactly.

    Args:
        layers (nn.ModuleList): the model's layers.

    Returns:
        tuple[int, int, int] | None: fewer layers, more layers, and how many times their difference is to be added to
            the second run; None if the layers do not repeat, or are too few for it to save anything.
    """
    kinds = [_kind(layer) for layer in layers]
    for period in range(1, _LONGEST_PERIOD + 1):
        if kinds[period:] == kinds[:-period]:
            fewer = 3 * period + len(kinds) % period
            more = fewer + period
            return (fewer, more, (len(kinds) - more) // period) if fewer + more < len(kinds) else None
    return None


def moment(index: int, count: int, period: int) -> Moment:
    """Where a layer stands: counted from the beginning, from the end, or anywhere between."""
    if index < period:
        return "first", index
    return ("last", count - index) if count - index <= period else ("between", index % period)


def with_layers(model: TransformerDecoder, count: int) -> TransformerDecoder:
    """The model with the first so many of its layers."""
    model.layers = nn.ModuleList(list(model.layers)[:count])
    return model


def extrapolated(fewer: Peaks, more: Peaks, times: int) -> dict[Moment, Counter[str]]:
    """The peak of each moment after adding the difference of two runs so many times to the second."""
    return {
        moment: Counter(
            {
                label: more[moment][label] + times * (more[moment][label] - fewer[moment][label])
                for label in fewer[moment] | more[moment]
            }
        )
        for moment in more
    }


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    parameters = ((name, type(each), each.shape, each.dtype) for name, each in layer.named_parameters())
    return repr(layer), getattr(layer.attn, "sliding_window", None), *parameters
