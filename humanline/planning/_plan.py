"""The report of ``humanline plan``: the needs of a config, whether it fits, and changes that make it fit."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from math import inf, prod
from typing import NamedTuple

from omegaconf import DictConfig

from humanline.config import with_overrides
from humanline.errors import ConfigError
from humanline.planning._rehearsal import Estimate, rehearse

LABELS = ("weights", "gradients", "optimizer", "reference", "gathered weights", "activations", "logits")
SPARE = 0.08  # share of a device's memory for its context, communication buffers and gaps of the allocator


def report(
    cfg: DictConfig, ranks: int, device_memory: float, tflops: float, tell: Callable[[str], None] = lambda _: None
) -> str:
    """Reports the needs of a config on each rank, whether it fits, and if not, changes that make it fit.

    Args:
        cfg (DictConfig): the config.
        ranks (int): number of processes.
        device_memory (float): memory of a device, GB (10^9 bytes).
        tflops (float): rate of a device, 10^12 floating-point operations per second.
        tell (Callable[[str], None]): called with a description of each estimate before it starts.

    Raises:
        ConfigError: if the config is invalid.
    """
    tell("estimating the config as it is")
    estimate = rehearse(cfg, ranks)
    lines = [f"{label:<18}{estimate.peak.get(label, 0) / 1e9:10.2f} GB" for label in LABELS]
    lines.append(f"{'peak of a rank':<18}{estimate.total / 1e9:10.2f} GB")
    flops = estimate.flops * estimate.passes
    lines += [
        "",
        f"a pass: {estimate.tokens:,} tokens, {estimate.flops / 1e12:.1f} TFLOP a rank",
        f"a step: at most {estimate.passes} {'pass' if estimate.passes == 1 else 'passes'} (a row for each group), "
        f"{flops / 1e12:.1f} TFLOP a rank, "
        f"{flops / 1e12 / tflops:.2f} s at {tflops:g} TFLOP/s",
        f"on disk: an export {estimate.export / 1e9:.2f} GB, a checkpoint {estimate.checkpoint / 1e9:.2f} GB",
        "",
        verdict(cfg, ranks, device_memory, estimate, tell),
    ]
    if cfg.get("source") is not None:
        lines.append("Not counted: a reward model on the same device, and the memory of sampling between steps.")
    return "\n".join(lines)


class Change(NamedTuple):
    """A change that saves memory: overrides, on ``times`` as many ranks. Of two of one kind the last counts."""

    kind: str
    overrides: list[str]
    times: int = 1


def verdict(cfg: DictConfig, ranks: int, device_memory: float, estimate: Estimate, tell: Callable[[str], None]) -> str:
    """Returns a sentence that says whether the config fits.

    If it does not, the sentence names the cheapest changes that make it fit, without changes that are not needed.
    """
    room = device_memory * (1 - SPARE)
    if estimate.total / 1e9 <= room:
        return f"It fits into {device_memory:g} GB, of which {room:.1f} GB count as usable."
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

    # Each stage needs less memory than the one before, unless it is invalid. So the last valid one tells if any fits.
    possible = list(stages)
    while possible and total(possible[-1]) == inf:
        possible.pop()
    if not possible or total(possible[-1]) > room:
        return f"It does not fit into {device_memory:g} GB, even with {_said(stages[-1], ranks)}; {_last_resort(cfg)}."
    made = possible[bisect_left(possible, True, hi=len(possible) - 1, key=lambda stage: total(stage) <= room)]
    for other in made[:-1]:
        rest = [each for each in made if each is not other]
        if total(rest) <= room:
            made = rest
    return f"It does not fit into {device_memory:g} GB. It fits with {_said(made, ranks)}: {total(made):.2f} GB."


def changes(cfg: DictConfig, ranks: int) -> Iterator[Change]:
    """Yields the changes that save memory, the cheapest first."""
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
    for times in (2, 4, 8):  # keeps the global batch where the number divides
        yield Change("ranks", [f"batch_size={groups // times}"] if groups % times == 0 else [], times)


def _gigabytes(cfg: DictConfig, ranks: int, made: list[Change]) -> float:
    """Returns the peak of a rank after the changes, GB; infinite if the changed config is invalid."""
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
        return "use a smaller model"
    return "use QLoRA" if "lora" in builder else "use an adapter (LoRA, QLoRA)"
