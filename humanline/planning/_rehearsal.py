"""Rehearses optimizer steps of a recipe on fake tensors, as one of N ranks, and measures what they need."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torchtune import training

from humanline.checkpoint import build_decoder, export_dtypes
from humanline.config import DTYPES, Settings, component
from humanline.data import Group, RowBudget, Rows, TokenBudget, lay_out, pack
from humanline.errors import ConfigError
from humanline.models import (
    LogProbDecoder,
    adapter_modules,
    check_adapter,
    design_model,
    fill_rotary_tables,
    fixed_log_probs,
    log_probs,
    logits_as_on,
    mesh_of,
    trainable_parameters,
)
from humanline.optim import clip_gradients
from humanline.planning._layers import Peaks, depths, extrapolated, moment, with_layers
from humanline.planning._meter import Meter, blank
from humanline.reference import Reference, RunContext, WindowedReference
from humanline.torchtune_seam.internals import set_attention_call
from humanline.training import DPO, GRPO, KTO, Passes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """The needs of one rank.

    Attributes:
        peak (dict[str, int]): bytes by use, at the moment with the largest total.
        flops (int): floating-point operations of a pass: forward, backward, recomputation and the reference's forward.
        passes (int): passes of a step if each group needs one row; fewer if rows hold several.
        tokens (int): tokens of a pass.
        export (int): bytes of the weights that the run exports at the end of an epoch. Weights that do not train are
            assumed to be bfloat16, as in most checkpoints.
        checkpoint (int): bytes of a training checkpoint, without a window of log-probs.
    """

    peak: dict[str, int]
    flops: int
    passes: int
    tokens: int
    export: int
    checkpoint: int

    @property
    def total(self) -> int:
        """Bytes of the peak, summed over all labels."""
        return sum(self.peak.values())


def rehearse(cfg: DictConfig, ranks: int) -> Estimate:
    """Runs two steps of a config's recipe as rank 0 of ``ranks``. The first step fills the optimizer.

    The passes are full: rows of ``tokens_per_row`` tokens, one group each. The second step has two passes, so that the
    second pass meets the gradients of the first. On CUDA, attention is FlexAttention or a flash kernel. Here it is the
    flash kernel of CPUs, which keeps as much for backward.

    Of a deep model, only a few layers run, twice, and the other layers are extrapolated. Layers are alike, so the
    result equals a run of all layers.

    Args:
        cfg (DictConfig): the config.
        ranks (int): ranks of the run; 1 stands for a ``_single_device`` recipe.

    Raises:
        ConfigError: if the config is invalid.
    """
    cfg = OmegaConf.merge(cfg, {"enable_activation_offloading": False})  # type: ignore[assignment]
    settings = Settings.from_config(cfg)
    with torch.device("meta"):
        shape = build_decoder(cfg)
    check_adapter(shape, ranks, settings.data_parallel_replicate_dim)
    dim = shape.tok_embeddings.embedding_dim
    taken = None
    if (planned := depths(shape.layers)) is not None:
        fewer, more, times = planned
        first, second = (_take(cfg, ranks, dim, count, period=more - fewer) for count in (fewer, more))
        if first.peaks.keys() == second.peaks.keys():
            taken = _extrapolated(first, second, times)
    if taken is None:
        taken = _take(cfg, ranks, dim, len(shape.layers), period=1)
    peak = max(taken.peaks.values(), key=Counter.total)
    passes = settings.gradient_accumulation_steps * -(-settings.batch_size // settings.rows_per_pass)
    tokens = settings.rows_per_pass * settings.tokens_per_row
    return Estimate(dict(+peak), taken.flops // 2, passes, tokens, taken.export, taken.checkpoint)


class _Taken(NamedTuple):
    """The measurements of two steps: the peak of each moment, operations, and bytes of an export and a checkpoint."""

    peaks: Peaks
    flops: int
    export: int
    checkpoint: int


def _take(cfg: DictConfig, ranks: int, embed_dim: int, layers: int, period: int) -> _Taken:
    """Runs the two steps with ``layers`` of the model's layers, which repeat after ``period`` layers."""
    settings = Settings.from_config(cfg)
    mode, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter(embed_dim)
    with _ranks(ranks), logits_as_on(settings.device):
        mesh = mesh_of(CPU, settings.data_parallel_replicate_dim)  # outside of the mode
        with mode, meter:
            run = _Rehearsal(cfg, mode, meter, mesh=mesh if ranks > 1 else None, layers=layers, period=period)
            run.take_step(1, passes=1)
            meter.forget_peak()
            run.take_step(2, passes=2)
        with mode:
            return _Taken(meter.peaks, meter.flops, run.export_bytes(), run.checkpoint_bytes())


def _extrapolated(fewer: _Taken, more: _Taken, times: int) -> _Taken:
    rest = (b + times * (b - a) for a, b in zip(fewer[1:], more[1:], strict=True))
    return _Taken(extrapolated(fewer.peaks, more.peaks, times), *rest)


class _Rehearsal:
    """The objects of a recipe's loop in fake tensors, and its step.

    The loss itself is left out: it needs a few numbers per response token, the model thousands.

    Args:
        cfg (DictConfig): the whole config.
        mode (FakeTensorMode): makes tensors fake; it is on.
        meter (Meter): counts what they take; it is on.
        mesh (DeviceMesh | None): the ranks to shard over; None for one process.
        layers (int): how many of the model's layers there are.
        period (int): after how many the layers repeat.
    """

    def __init__(
        self,
        cfg: DictConfig,
        mode: FakeTensorMode,
        meter: Meter,
        *,
        mesh: DeviceMesh | None,
        layers: int,
        period: int,
    ) -> None:
        settings = self.settings = Settings.from_config(cfg)
        self.mode, self.meter, self.mesh = mode, meter, mesh
        self.layers, self.period = layers, period
        self.forwards = 0
        with unset_fake_temporarily():
            loss = component(cfg, "loss")
        self.objective = next(each for each in (DPO, KTO, GRPO) if isinstance(loss, each.loss_type))(loss)
        self.passes = _FakePasses(self, settings.row_budget(torch.device(settings.device)))
        with meter.label("weights"):
            self.policy = self.model(
                cfg, DTYPES[settings.master_dtype], checkpointing=settings.enable_activation_checkpointing
            )
        strategy = component(cfg, "reference")
        models = _Models(self, cfg)
        with meter.label("reference"):
            if isinstance(strategy, WindowedReference):
                self.reference: Reference = _Window(self.policy, strategy.sync_every)
            else:
                self.reference = strategy.build(
                    RunContext(policy=self.policy, model=models, passes=None, total_steps=2, resumes=False)
                )
        self.optimizer = component(cfg, "optimizer", list(trainable_parameters(self.policy).values()))

    def model(self, cfg: DictConfig, param_dtype: torch.dtype, checkpointing: bool) -> LogProbDecoder:
        """Builds the recipe's model in fake tensors."""
        with unset_fake_temporarily():
            model = design_model(
                lambda: with_layers(build_decoder(cfg), self.layers),
                mesh=self.mesh,
                device=torch.device(self.settings.device),
                param_dtype=param_dtype,
                compute_dtype=DTYPES[self.settings.dtype],
                activation_checkpointing=checkpointing,
            )
            with training.set_default_dtype(DTYPES[self.settings.dtype]):
                fill_rotary_tables(model, CPU)  # needs real values
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(blank(parameter, CPU), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.mode.from_tensor(buffer)
        if self.settings.device == "cuda":
            for layer in model.layers:
                set_attention_call(layer.attn, _flash(getattr(layer.attn, "scale", None)))
        for index, layer in enumerate(model.layers):
            self._name_moments(layer, index)
        return model

    def _name_moments(self, layer: nn.Module, index: int) -> None:
        """Tells the meter which layer runs, in which pass. Recomputation belongs to the layer's backward."""
        where = moment(index, self.layers, self.period)

        def begins_forward(*_: Any) -> None:
            self.forwards += index == 0
            self.meter.moment = (self.forwards, "forward", *where)

        def ends_forward(layer: nn.Module, arguments: Any, hidden: Tensor) -> None:
            forward = self.forwards

            def begins_backward(gradient: Tensor) -> None:
                self.meter.moment = (forward, "backward", *where)

            if index == self.layers - 1:
                self.meter.moment = (forward, "head")
            if hidden.requires_grad:
                hidden.register_hook(begins_backward)

        layer.register_forward_pre_hook(begins_forward)
        layer.register_forward_hook(ends_forward)

    def export_bytes(self) -> int:
        """Returns the bytes of ``epoch_N``, with any adapter in both formats."""
        settings, trained = self.settings, trainable_parameters(self.policy)
        has_adapter = bool(adapter_modules(self.policy))
        adapter = 2 * sum(4 * parameter.numel() for parameter in trained.values()) if has_adapter else 0
        if has_adapter and settings.save_adapter_weights_only:
            return adapter
        whole = {
            name: each for name, each in self.policy.state_dict().items() if not has_adapter or name not in trained
        }
        chosen = DTYPES[settings.export_dtype] if settings.export_dtype else None
        dtypes = export_dtypes(self.policy, dict.fromkeys(whole, torch.bfloat16), chosen)
        return adapter + sum(each.numel() * dtypes[name].itemsize for name, each in whole.items())

    def checkpoint_bytes(self) -> int:
        """Returns the bytes of ``checkpoints/step_N``."""
        state = [trainable_parameters(self.policy), dict(self.optimizer.state), self.reference.state_dict()]
        return sum(each.numel() * each.element_size() for each in tree_leaves(state) if isinstance(each, Tensor))

    def take_step(self, step: int, passes: int) -> None:
        """Runs a step of the recipe's loop with ``passes`` passes."""
        self.forwards = 0
        self.meter.moment = ("begin",)
        microbatch = self.passes.groups(passes)
        for rows, _ in self.passes.of_kl(microbatch):
            self.reference.log_probs(rows)
            fixed_log_probs(self.policy, rows)
        for rows, _, _ in self.passes.of(microbatch, step, 0):
            reference_logps = self.reference.log_probs(rows)
            (log_probs(self.policy, rows) - reference_logps).sum().backward()
        self.passes.label_gradients()
        self.meter.moment = ("clip",)
        clip_gradients(self.policy, self.settings.clip_grad_norm)
        self.meter.moment = ("sync",)
        self.reference.before_optimizer_step(step)
        self.meter.moment = ("optimizer",)
        try:
            with self.meter.label("optimizer"):
                self.optimizer.step()
        except Exception as error:  # it may need values, which fake tensors do not have, or compile
            raise ConfigError(
                f"optimizer: {type(self.optimizer).__name__} does not run on fake tensors; plan with torch.optim.AdamW "
                "and correct the result for the size of the optimizer's states"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Models:
    """Builds models like the policy, for a reference."""

    rehearsal: _Rehearsal
    cfg: DictConfig

    def reference_model(self) -> LogProbDecoder:
        dtype = DTYPES[self.rehearsal.settings.dtype]
        return self.rehearsal.model(self.cfg, dtype, checkpointing=False)

    def fingerprint(self) -> str:
        return ""

    def computation(self) -> str:
        return ""


class _FakePasses(Passes):
    """Full passes in fake tensors."""

    def __init__(self, rehearsal: _Rehearsal, budget: RowBudget) -> None:
        limits = TokenBudget(max_tokens=budget.tokens_per_row, max_prompt_tokens=None)
        super().__init__(rehearsal.objective, budget, limits, CPU, seed=0)
        self.rehearsal = rehearsal

    def of(self, microbatch: list[Group], step: int, index: int) -> Iterator[tuple[Rows, int, Tensor | None]]:
        """Yields the passes without the draws of humanline sampling, which only the loss uses."""
        return ((rows, weight, None) for rows, weight in self.over(self.share(microbatch)))

    def groups(self, passes: int) -> list[Group]:
        """Returns a microbatch of all ranks that makes ``passes`` passes.

        A group is a prompt of a fifth of a row and two responses that fill the row. KTO gets at least two groups,
        because its KL pairs need two prompts.
        """
        length = self.budget.tokens_per_row
        response = (length - max(1, length // 5)) // 2
        prompt = length - 2 * response  # fills the row, else a pass could be narrower
        group = Group(
            [1] * prompt, ([1] * (response + 1),) * 2, scores=(1.0, 0.0), advantages=(1.0, -1.0), id="a full row"
        )
        if isinstance(self.objective, KTO):
            group = replace(group, scores=None, advantages=None, labels=(True, False))
        least = 2 if isinstance(self.objective, KTO) else 1
        return [group] * max(least, passes * self.budget.rows_per_pass * self.world_size)

    def over(self, groups: list[Group]) -> Iterator[tuple[Rows, int]]:
        with unset_fake_temporarily():
            laid = [lay_out(groups, planned, self.budget) for planned in pack(groups, self.budget)]
        for rows in laid:
            self.label_gradients()
            self.rehearsal.meter.moment = ("rows", self.rehearsal.forwards)
            yield self._fake(rows), 1

    def _fake(self, rows: Rows) -> Rows:
        tensors: dict[str, Any] = {name: value for name, value in vars(rows).items() if isinstance(value, Tensor)}
        tensors = {name: self.rehearsal.mode.from_tensor(value) for name, value in tensors.items()}
        fake = replace(rows, **tensors)
        if self.rehearsal.settings.device == "cuda":
            masks: dict[int | None, Any] = fake._masks
            masks.update(dict.fromkeys({None, *self.rehearsal.policy.windows}))  # CUDA's block masks are small
        return fake

    def label_gradients(self) -> None:
        for parameter in self.rehearsal.policy.parameters():
            if parameter.grad is not None:
                self.rehearsal.meter.relabel(parameter.grad, "gradients")


class _Window(Reference):
    """A ``WindowedReference`` without its table, which is in host memory. Filling the table is one forward per pass."""

    def __init__(self, policy: LogProbDecoder, sync_every: int | None) -> None:
        super().__init__(sync_every)
        self.policy = policy

    def log_probs(self, rows: Rows) -> Tensor:
        return fixed_log_probs(self.policy, rows)

    def become_policy(self, step: int) -> None: ...


def _flash(scale: float | None) -> Any:
    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return attention


@contextmanager
def _ranks(count: int) -> Iterator[None]:
    """Opens a process group in which this process is rank 0 and the other ranks do not exist."""
    if dist.is_initialized():
        raise RuntimeError("plan needs a process without a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
