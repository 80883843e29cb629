from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.models._flex import use_flex
from humanline.models._heap import return_freed_memory
from humanline.models._log_probs import token_log_probs, token_log_probs_and_entropy
from humanline.torchtune_seam.internals import Mask


class LogProbDecoder(nn.Module):
    """A torchtune decoder that returns the log-probs of chosen tokens instead of all logits.

    It takes over the decoder's modules under their own names, so its state dict *is* the decoder's. torchtune's
    checkpointers, sharding conditions, activation checkpointing and per-layer compile apply unchanged.

    Args:
        decoder (TransformerDecoder): the model, from a torchtune builder. It needs torchtune's ``MultiHeadAttention``
            and an output layer without bias, tied or not (see docs/models.md).

    Attributes:
        compute_dtype (torch.dtype): dtype of the forward pass; parameters kept in another dtype are cast to it.
        temperature (float): divides the logits of log-probs, after a soft-cap. 1 until it is set.
        by_blocks (bool): whether attention takes blocks of queries instead of masks.

    Raises:
        ConfigError: if the attention or the output layer is of another type.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        for layer in decoder.layers:
            if not isinstance(layer.attn, MultiHeadAttention):
                raise ConfigError(
                    "model: expected torchtune's MultiHeadAttention, which rows need, got "
                    f"{type(layer.attn).__name__}; for Gemma 2, Gemma 3 and Qwen3 use a builder of "
                    "humanline.models.gemma2, gemma3 or qwen3"
                )
        if not (isinstance(decoder.output, TiedLinear) or _is_plain_linear(decoder.output)):
            raise ConfigError(
                f"model: expected a linear output layer without bias, got {type(decoder.output).__name__}; it may be "
                "tied to the embeddings, and LoRA needs apply_lora_to_output: False"
            )
        rows = decoder.tok_embeddings.num_embeddings
        if not isinstance(decoder.output, TiedLinear) and decoder.output.out_features != rows:
            raise ConfigError(
                f"model: its output layer has {decoder.output.out_features} rows and its vocabulary {rows:,}, as in "
                "reward models and classifiers; name a builder of a language model"
            )
        self.tok_embeddings = decoder.tok_embeddings
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.output = decoder.output
        self.soft_cap: float | None = getattr(decoder.output, "soft_cap", None)
        self.windows: list[int | None] = [getattr(layer.attn, "sliding_window", None) for layer in decoder.layers]
        self.max_seq_len = decoder.max_seq_len
        self.compute_dtype = next(decoder.parameters()).dtype
        self.temperature = 1.0
        self.by_blocks = False
        for layer in decoder.layers:
            use_flex(layer.attn)

    def forward(
        self,
        tokens: Tensor,
        *,
        masks: Mapping[int | None, Mask],
        positions: Tensor,
        predictors: Tensor,
        targets: Tensor,
        with_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            tokens (Tensor): token ids, int64 ``[R, L]``.
            masks (Mapping[int | None, Mask]): the attention mask for each sliding window that a layer has (None: no
                window): bool ``[R, L, L]``, a FlexAttention block mask, or with ``by_blocks`` blocks of queries.
            positions (Tensor): position of each token in its sequence, int64 ``[R, L]``.
            predictors (Tensor): indices of the hidden states that predict the targets, int64 ``[N]`` into the flattened
                ``[R * L]``.
            targets (Tensor): the predicted token ids, int64 ``[N]``.
            with_entropy (bool): whether to return the entropies of the predicting distributions too.

        Returns:
            Tensor | tuple[Tensor, Tensor]: log-probs of ``targets`` in nats, float32 ``[N]``; with ``with_entropy``
            also entropies in nats, float32 ``[N]``, without gradient.
        """
        hidden = self.tok_embeddings(tokens)
        for index, (layer, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            if index % 8 == 0:
                hidden = return_freed_memory(hidden)
            hidden = layer(hidden, mask=masks[window], input_pos=positions)
        # Only rows that predict a response token are normalised and projected.
        hidden = self.norm(return_freed_memory(hidden).flatten(0, 1).index_select(0, predictors))
        head = token_log_probs_and_entropy if with_entropy else token_log_probs
        return head(hidden, self._output_weight(), targets, self.soft_cap, self.temperature)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Computes logits, float32 ``[B, S, V]``, from hidden states of the last layer, ``[B, S, D]``."""
        logits = F.linear(self.norm(hidden), self._output_weight()).float()
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def _output_weight(self) -> Tensor:
        return self.output.tied_module.weight if isinstance(self.output, TiedLinear) else self.output.weight


def _is_plain_linear(module: object) -> bool:
    return type(module) is nn.Linear and module.bias is None


def fixed_log_probs(model: LogProbDecoder, rows: Rows) -> Tensor:
    """Computes :func:`log_probs` without gradient and in evaluation mode, without dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return log_probs(model, rows)
    finally:
        model.train(was_training)


def log_probs(model: LogProbDecoder, rows: Rows) -> Tensor:
    """Computes the log-probs of the response tokens of ``rows``, nats, float32 ``[N]``."""
    found: Tensor = _call(model, rows)
    return found


def log_probs_and_entropy(model: LogProbDecoder, rows: Rows) -> tuple[Tensor, Tensor]:
    """Computes :func:`log_probs`, and the entropies of the distributions of these tokens.

    Returns:
        tuple[Tensor, Tensor]: log-probs in nats, float32 ``[N]``; entropies in nats, float32 ``[N]``, without gradient.
    """
    found: tuple[Tensor, Tensor] = _call(model, rows, with_entropy=True)
    return found


def _call(model: LogProbDecoder, rows: Rows, **settings: bool) -> Any:
    rule = rows.query_blocks if model.by_blocks else rows.attention_mask
    found = model(
        tokens=rows.tokens,
        masks={window: rule(window) for window in set(model.windows)},
        positions=rows.positions,
        predictors=rows.predictors,
        targets=rows.targets,
        **settings,
    )
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()  # no backward will
    return found
