"""``humanline plan``: does a config fit, and what would make it fit."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from math import inf, prod
from typing import NamedTuple

from omegaconf import DictConfig

from humanline.config import with_overrides
from humanline.errors import ConfigError
from humanline.planning._rehearsal import Estimate, rehearse

LABELS = ("weights", "gradients", "optimizer", "reference", "gathered weights", "activations", "logits")
SPARE = 0.08  # of a device's memory, for its context, the communication's buffers and the allocator's gaps


def report(
    cfg: DictConfig, ranks: int, device_memory: float, tflops: float, tell: Callable[[str], None] = lambda _: None
) -> str:
    """What the config takes on each of so many ranks, whether it fits, and if not, what would make it fit.

    Args:
        cfg (DictConfig): the config.
        ranks (int): processes.
        device_memory (float): memory of a device, GB (10^9 bytes).
        tflops (float): what a device computes, 10^12 operations a second.
        tell (Callable[[str], None]): is told what is being estimated, which may take a while.

    Raises:
        ConfigError: if the config cannot work.
    """
    tell("estimating the config as it is")
    estimate = rehearse(cfg, ranks)
    lines = [f"{label:<18}{estimate.peak.get(label, 0) / 1e9:10.2f} GB" for label in LABELS]
    lines.append(f"{'peak of a rank':<18}{estimate.total / 1e9:10.2f} GB")
    flops = estimate.flops * estimate.passes
    lines += [
        "",
        f"a pass: {estimate.tokens:,} tokens, {estimate.flops / 1e12:.1f} TFLOP a rank",
        f"a step: {estimate.passes} {'pass' if estimate.passes == 1 else 'passes'} if a group takes a row, "
        f"{flops / 1e12:.1f} TFLOP a rank, "
        f"{flops / 1e12 / tflops:.2f} s at {tflops:g} TFLOP/s",
        f"on disk: an export {estimate.export / 1e9:.2f} GB, a checkpoint {estimate.checkpoint / 1e9:.2f} GB",
        "",
        verdict(cfg, ranks, device_memory, estimate, tell),
    ]
    if cfg.get("source") is not None:
        lines.append("Not counted: a reward model on the same device, and what sampling takes between steps.")
    return "\n".join(lines)


class Change(NamedTuple):
    """What saves memory: overrides of the config, on so many times as many ranks. Of two of a kind the last counts."""

    kind: str
    overrides: list[str]
    times: int = 1


def verdict(cfg: DictConfig, ranks: int, device_memory: float, estimate: Estimate, tell: Callable[[str], None]) -> str:
    """Whether it fits; if not, the first of the changes, in the order of their price, that make it fit, without those
    that it does not need."""
    room = device_memory * (1 - SPARE)
    if estimate.total / 1e9 <= room:
        return f"It fits {device_memory:g} GB, of which {room:.1f} GB are counted on."
    stages: list[list[Change]] = []
    for change in changes(cfg, ranks):
        stages.append([other for other in (stages[-1] if stages else []) if other.kind != change.kind] + [change])
    totals: dict[str, float] = {}

    def total(made: list[Change]) -> float:
        said = _said(made, ranks)
        if said not in totals:
            tell(f"it does not fit; estimating it with {said}")
            totals[said] = _gigabytes(cfg, ranks, made)
        return totals[said]

    # Each stage takes less than the one before, but for those that are refused; so the last tells whether any fits.
    possible = list(stages)
    while possible and total(possible[-1]) == inf:
        possible.pop()
    if not possible or total(possible[-1]) > room:
        return f"It does not fit {device_memory:g} GB, not even by {_said(stages[-1], ranks)}: {_last_resort(cfg)}."
    made = possible[bisect_left(possible, True, hi=len(possible) - 1, key=lambda stage: total(stage) <= room)]
    for other in made[:-1]:
        rest = [each for each in made if each is not other]
        if total(rest) <= room:
            made = rest
    return f"It does not fit {device_memory:g} GB. It would, with {total(made):.2f} GB, by {_said(made, ranks)}."


def changes(cfg: DictConfig, ranks: int) -> Iterator[Change]:
    """What saves memory, cheapest first."""
    if cfg.get("data_parallel_replicate_dim", 1) > 1:
        yield Change("replicas", ["data_parallel_replicate_dim=1"])
    if cfg.reference._component_.endswith("ModelReference") and cfg.get("dataset") is not None:
        yield Change("reference", ["reference=humanline.reference.WindowedReference"])
    if not cfg.get("enable_activation_checkpointing"):
        yield Change("checkpointing", ["enable_activation_checkpointing=True"])
    rows = cfg.get("rows_per_pass", 1)
    while rows > 1:
        rows //= 2
        yield Change("rows", [f"rows_per_pass={rows}"])
    whole = cfg.get("dtype", "bf16") == "bf16" and cfg.get("master_dtype", "fp32") == "fp32"
    if whole and cfg.optimizer._component_ == "torch.optim.AdamW":
        unknown = [f"~optimizer.{key}" for key in ("fused", "foreach") if key in cfg.optimizer]
        yield Change("master", ["master_dtype=bf16", "optimizer=humanline.training.StochasticAdamW", *unknown])
    groups = cfg.get("batch_size", 8)
    for times in (2, 4, 8):  # the batch of all ranks stays, where it can
        yield Change("ranks", [f"batch_size={groups // times}"] if groups % times == 0 else [], times)


def _gigabytes(cfg: DictConfig, ranks: int, made: list[Change]) -> float:
    """The peak of a rank after the changes; infinite if the run would be refused."""
    overrides = [override for change in made for override in change.overrides]
    try:
        return rehearse(with_overrides(cfg, overrides), ranks * prod(change.times for change in made)).total / 1e9
    except ConfigError:
        return inf


def _said(made: list[Change], ranks: int) -> str:
    nproc = [[f"--nproc {ranks * change.times}"] if change.times > 1 else [] for change in made]
    return " and ".join(" ".join([*more, *change.overrides]) for more, change in zip(nproc, made, strict=True))


def _last_resort(cfg: DictConfig) -> str:
    builder = cfg.model._component_.rpartition(".")[2]
    if "qlora" in builder or cfg.model.get("quantize_base"):
        return "take a smaller model"
    return "take QLoRA" if "lora" in builder else "take an adapter (LoRA, QLoRA)"
