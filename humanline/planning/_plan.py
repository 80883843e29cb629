"""``humanline plan``: does a config fit, and what would make it fit."""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args

from humanline.errors import ConfigError
from humanline.planning._rehearsal import Estimate, rehearse

LABELS = ("weights", "gradients", "optimizer", "reference", "gathered weights", "activations", "logits")
SPARE = 0.08  # of a device's memory, for its context, the communication's buffers and the allocator's gaps


def report(cfg: DictConfig, ranks: int, device_memory: float, tflops: float) -> str:
    """What the config takes on each of so many ranks, whether it fits, and if not, what would make it fit.

    Args:
        cfg (DictConfig): the config.
        ranks (int): processes.
        device_memory (float): memory of a device, GB (10^9 bytes).
        tflops (float): what a device computes, 10^12 operations a second.

    Raises:
        ConfigError: if the config cannot work.
    """
    estimate = rehearse(cfg, ranks)
    lines = [f"{label:<18}{estimate.peak.get(label, 0) / 1e9:10.2f} GB" for label in LABELS]
    lines.append(f"{'peak of a rank':<18}{estimate.total / 1e9:10.2f} GB")
    flops = estimate.flops * estimate.passes
    lines += [
        "",
        f"a pass: {estimate.tokens:,} tokens, {estimate.flops / 1e12:.1f} TFLOP a rank",
        f"a step: up to {estimate.passes} passes, {flops / 1e12:.1f} TFLOP a rank, "
        f"{flops / 1e12 / tflops:.2f} s at {tflops:g} TFLOP/s",
        "",
        verdict(cfg, ranks, device_memory, estimate),
    ]
    if cfg.get("source") is not None:
        lines.append("Not counted: a reward model on the same device, and what sampling takes between steps.")
    return "\n".join(lines)


def verdict(cfg: DictConfig, ranks: int, device_memory: float, estimate: Estimate) -> str:
    """Whether it fits; if not, the fewest of the changes, in the order of their price, that make it fit."""
    room = device_memory * (1 - SPARE)
    if estimate.total / 1e9 <= room:
        return f"It fits {device_memory:g} GB, of which {room:.1f} GB are counted on."
    tried: list[str] = []
    for change, changed, on_ranks in changes(cfg, ranks):
        tried.append(change)
        total = rehearse(changed, on_ranks).total / 1e9
        if total <= room:
            return f"It does not fit {device_memory:g} GB. It would, with {total:.2f} GB, by {' and '.join(tried)}."
    return f"It does not fit {device_memory:g} GB, not even by {' and '.join(tried)}: take an adapter (LoRA, QLoRA)."


def changes(cfg: DictConfig, ranks: int) -> Iterator[tuple[str, DictConfig, int]]:
    """What saves memory, cheapest first, each with those before it, as it is written behind ``tune run``."""
    steps: list[list[str]] = []
    if not cfg.get("enable_activation_checkpointing"):
        steps.append(["enable_activation_checkpointing=True"])
    if cfg.reference._component_.endswith("ModelReference") and cfg.get("dataset") is not None:
        steps.append(["reference=humanline.reference.WindowedReference"])
    if cfg.get("rows_per_pass", 1) > 1:
        steps.append([f"rows_per_pass={cfg.rows_per_pass // 2}"])
    if cfg.get("master_dtype", "fp32") == "fp32" and cfg.optimizer._component_ == "torch.optim.AdamW":
        unknown = (f"~optimizer.{key}" for key in ("fused", "foreach") if key in cfg.optimizer)
        steps.append(["master_dtype=bf16", "optimizer=humanline.training.StochasticAdamW", *unknown])
    for step in steps:
        cfg = with_overrides(cfg, step)
        yield " ".join(step), cfg, ranks
    for more in (2, 4, 8):
        yield f"--nproc {ranks * more}", cfg, ranks * more


def with_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A config with what stands behind ``tune run``: ``key=value`` and ``~key``.

    Raises:
        ConfigError: if an override is of no such form, or takes away what is not there.
    """
    try:
        plain = Namespace(**OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        return _merge_yaml_and_cli_args(plain, list(overrides))
    except ValueError as error:
        raise ConfigError(f"override: {error}") from error
