"""Batched sampling from a torchtune decoder, in this process: token ids in, token ids out.

1. Admit: when enough slots of the KV cache are free, waiting prompts are prefilled, each once for all its samples.
2. Step: the model processes every row's last token at the row's own position, and the next token is drawn.
3. Retire: finished rows leave, and rows from the end move into their slots, so a step computes only live rows.

Sample j of prompt i has its own random generator, seeded by (seed, i, j); the caller may replace i. Its t-th number
draws token t. So neither the batch size nor a row's neighbours change a completion, up to the rounding of the logits.

Not supported: more than one device, and paging (a slot has room for the longest possible sequence).
"""

import random
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from humanline.errors import ConfigError, Stopped
from humanline.models import LogProbDecoder
from humanline.progress import Progress
from humanline.rollout._engine import Completion
from humanline.rollout._kv_cache import KVCache, Prefill, Step, attached
from humanline.rollout._sampling import SamplingParams, draw

__all__ = ["TorchtuneEngine"]

# Padded prompt tokens in one pass: enough to keep any device busy, with activations that are small beside the weights.
_PREFILL_TOKENS = 8192
# Without cuDNN, which plans again for each shape: each step has a new shape.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TorchtuneEngine:
    """Samples from a torchtune decoder.

    The decoder belongs to the caller: the engine changes it only while it samples, and restores it.

    Args:
        model (TransformerDecoder | LogProbDecoder): a decoder with torchtune's ``MultiHeadAttention`` (Llama 3,
            Qwen2.5, SmolLM2) or humanline's Gemma 2.
        stop_tokens (Sequence[int]): ids that end a completion.
        batch_size (int): the maximum number of completions sampled at a time.
        token_ids (Collection[int] | None): the ids that may be sampled, since a padded vocabulary has ids without a
            token; None allows all. Log-probs of completions are over all ids, as in training.

    Raises:
        ConfigError: if ``batch_size`` is not positive, the model's attention is not supported, or no stop token can be
            sampled.
    """

    def __init__(
        self,
        model: TransformerDecoder | LogProbDecoder,
        *,
        stop_tokens: Sequence[int],
        batch_size: int,
        token_ids: Collection[int] | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        for layer in model.layers:
            if not isinstance(layer.attn, MultiHeadAttention):
                raise ConfigError(
                    f"model: expected torchtune's MultiHeadAttention, got {type(layer.attn).__name__}; sample from the "
                    "Hugging Face folder with another engine"
                )
        self._model = model
        # Only ``forward`` is called, without training's wrappers: checkpointing, FSDP2's hooks, and code compiled for
        # training's shapes. FSDP2 would mistake these calls for training's.
        self._layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.layers]
        self._stop_tokens = frozenset(stop_tokens)
        self._batch_size = batch_size
        self._stopped = False
        rows = model.tok_embeddings.num_embeddings
        self._masked: Tensor | None = None  # [V], True for ids without a token; None if all have one
        if token_ids is not None and not all(id in token_ids for id in range(rows)):
            self._masked = torch.ones(rows, dtype=torch.bool)
            self._masked[[id for id in token_ids if id < rows]] = False
            if self._stop_tokens and not any(id < rows and not self._masked[id] for id in self._stop_tokens):
                raise ConfigError(
                    f"tokenizer: none of its stop tokens {sorted(self._stop_tokens)} is a known token and within the "
                    f"model's {rows} rows, so no response could end; use the same model for tokenizer.path and model"
                )

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        bar: Progress | None = None,
    ) -> list[list[Completion]]:
        """Returns the completions of each prompt, in the order of the prompts, and counts them on ``bar``.

        See :meth:`stream`.
        """
        completions: list[dict[int, Completion]] = [{} for _ in prompts]
        for prompt, sample, completion in self.stream(prompts, params, seeds):
            completions[prompt][sample] = completion
            if bar is not None:
                bar.update()
        return [[samples[j] for j in range(params.samples_per_prompt)] for samples in completions]

    def stop(self) -> None:
        """Ends sampling permanently; a call in progress raises :class:`~humanline.rollout.Stopped` at its next step."""
        self._stopped = True

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> Generator[tuple[int, int, Completion], None, None]:
        """Yields ``(prompt index, sample index, completion)`` as completions finish.

        Args:
            prompts (Sequence[Sequence[int]]): the token ids of each prompt; a prompt has at least one.
            params (SamplingParams): the sampling settings.
            seeds (Sequence[int] | None): the seed of each prompt's draws, beside ``params.seed``; None uses the
                prompt's index.

        Raises:
            ConfigError: if a prompt is empty, or prompt and ``max_new_tokens`` exceed the model's ``max_seq_len``.
            Stopped: if :meth:`stop` was called.
        """
        self._check(prompts, params)
        # Long prompts first: prompts prefilled together have similar lengths, and out-of-memory errors come early.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        # A prompt's samples enter together, or in several parties if they outnumber the slots.
        party = min(params.samples_per_prompt, self._batch_size)
        waiting = deque(
            _Party(i, prompts[i], range(start, min(start + party, params.samples_per_prompt)), seeds[i] if seeds else i)
            for i in order
            for start in range(0, params.samples_per_prompt, party)
        )
        capacity = max(map(len, prompts), default=0) + params.max_new_tokens
        slots = min(self._batch_size, len(prompts) * params.samples_per_prompt)
        rows: list[_Row] = []
        with attached(self._model, slots, capacity) as cache:
            while waiting or rows:
                if self._stopped:
                    raise Stopped("sampling was stopped")
                # Refill in bulk: a prefill costs about as much as a step, even with few prompts.
                if waiting and self._batch_size - len(rows) >= max(party, self._batch_size // 4):
                    self._admit(waiting, rows, params, cache)
                self._step(rows, params, cache)
                for row in rows:
                    if row.finish_reason is not None:
                        yield row.prompt, row.sample, Completion(row.tokens, row.finish_reason, row.logps)
                rows = _retire(rows, cache)

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ConfigError(f"prompts: expected at least one token, got none in prompt {i}")
            if len(prompt) + params.max_new_tokens > self._model.max_seq_len:
                raise ConfigError(
                    f"max_new_tokens: {params.max_new_tokens} plus the {len(prompt)} tokens of prompt {i} exceed the "
                    f"model's max_seq_len of {self._model.max_seq_len}; lower it, or shorten the prompt"
                )

    def _admit(self, waiting: "deque[_Party]", rows: "list[_Row]", params: SamplingParams, cache: KVCache) -> None:
        """Moves prompts from the head of the queue into free slots, and appends their rows."""
        admitted: list[_Party] = []
        free = self._batch_size - len(rows)
        while waiting and len(waiting[0].samples) <= free:
            admitted.append(waiting.popleft())
            free -= len(admitted[-1].samples)
        # A prompt's last token is processed in the first step of its rows, so the prefill needs no logits.
        length = max(1, len(admitted[0].tokens) - 1)
        prompts_per_pass = max(1, _PREFILL_TOKENS // length)
        for i in range(0, len(admitted), prompts_per_pass):
            parties = admitted[i : i + prompts_per_pass]
            tokens = torch.zeros(len(parties), length, dtype=torch.int64)
            for row, party in zip(tokens, parties, strict=True):
                row[: len(party.tokens) - 1] = torch.tensor(party.tokens[:-1], dtype=torch.int64)
            copies = [prompt for prompt, party in enumerate(parties) for _ in party.samples]
            cache.current = Prefill(copies, len(rows), self._device)
            self._hidden(tokens.to(self._device), torch.arange(length, device=self._device)[None])
            rows += [
                _Row(party.prompt, j, party.tokens, f"{params.seed} {party.seed} {j}")
                for party in parties
                for j in party.samples
            ]

    def _step(self, rows: "list[_Row]", params: SamplingParams, cache: KVCache) -> None:
        """Draws the next token of every row."""
        tokens = torch.tensor([[row.last] for row in rows], device=self._device)
        cache.current = step = Step([row.position for row in rows], self._device)
        logits = self._model.unembed(self._hidden(tokens, step.positions[:, None])).squeeze(1)
        uniforms = torch.tensor([1 - row.rng.random() for row in rows], dtype=torch.float32, device=self._device)
        drawn = draw(self._drawable(logits), uniforms, temperature=params.temperature, top_p=params.top_p)
        logps = (logits / (params.temperature or 1.0)).log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
        for row, token, logp in zip(rows, drawn.tolist(), logps.tolist(), strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
            if token in self._stop_tokens:
                row.finish_reason = "stop"
            elif len(row.tokens) == params.max_new_tokens:
                row.finish_reason = "length"

    def _drawable(self, logits: Tensor) -> Tensor:
        """Masks the logits ``[B, V]`` of ids without a token."""
        if self._masked is None:
            return logits
        self._masked = self._masked.to(logits.device)
        return logits.masked_fill(self._masked, -torch.inf)

    def _hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Computes hidden states ``[B, S, D]`` of token ids ``[B, S]``, with the cache."""
        hidden = self._model.tok_embeddings(tokens)
        with sdpa_kernel(_KERNELS):
            for layer in self._layers:
                hidden = layer.forward(hidden, input_pos=positions)
        return hidden


@dataclass(frozen=True, slots=True)
class _Party:
    """A prompt and those of its samples that enter the batch together."""

    prompt: int
    tokens: Sequence[int]
    samples: range
    seed: int


@dataclass(slots=True)
class _Row:
    """A completion in progress."""

    prompt: int
    sample: int
    prompt_tokens: Sequence[int]
    seed: str
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    @property
    def last(self) -> int:
        """The newest token, which the next step processes; it is not in the cache yet."""
        return self.tokens[-1] if self.tokens else self.prompt_tokens[-1]

    @property
    def position(self) -> int:
        """The position of ``last`` in the sequence."""
        return len(self.prompt_tokens) + len(self.tokens) - 1


def _retire(rows: list[_Row], cache: KVCache) -> list[_Row]:
    """Returns the live rows, after moving rows from the end into the slots of finished rows."""
    live = [r for r, row in enumerate(rows) if row.finish_reason is None]
    vacant = [r for r, row in enumerate(rows[: len(live)]) if row.finish_reason is not None]
    if vacant:
        movers = live[-len(vacant) :]
        cache.move(movers, vacant)
        for slot, mover in zip(vacant, movers, strict=True):
            rows[slot] = rows[mover]
    return rows[: len(live)]
