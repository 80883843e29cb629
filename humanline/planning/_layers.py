"""Extrapolates the memory of many equal layers from runs with a few of them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchtune.modules import TransformerDecoder

Moment = tuple[Any, ...]
Peaks = Mapping[Moment, Counter[str]]

_LONGEST_PERIOD = 6  # layers; of Gemma 3's every sixth is another, of Gemma 2's every other one


def depths(layers: nn.ModuleList) -> tuple[int, int, int] | None:
    """Returns the numbers of layers for two short runs, and how often to add their difference.

    A run has a moment for each layer at either end and one for all layers between (see :func:`moment`). The memory
    held at a moment, and so its peak, is a linear function of the number of layers. Two runs determine it exactly.

    Args:
        layers (nn.ModuleList): the model's layers.

    Returns:
        tuple[int, int, int] | None: the smaller and the larger number of layers, and how often their difference is
            added to the larger run; None if the layers do not repeat, or are too few for this to save work.
    """
    kinds = [_kind(layer) for layer in layers]
    for period in range(1, _LONGEST_PERIOD + 1):
        if kinds[period:] == kinds[:-period]:
            fewer = 3 * period + len(kinds) % period
            more = fewer + period
            return (fewer, more, (len(kinds) - more) // period) if fewer + more < len(kinds) else None
    return None


def moment(index: int, count: int, period: int) -> Moment:
    """Returns the place of a layer: counted from the beginning, from the end, or anywhere between."""
    if index < period:
        return "first", index
    return ("last", count - index) if count - index <= period else ("between", index % period)


def with_layers(model: TransformerDecoder, count: int) -> TransformerDecoder:
    """Cuts the model to its first ``count`` layers and returns it."""
    model.layers = nn.ModuleList(list(model.layers)[:count])
    return model


def extrapolated(fewer: Peaks, more: Peaks, times: int) -> dict[Moment, Counter[str]]:
    """Returns the peak of each moment: the second run's, plus ``times`` the difference of the two runs."""
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
