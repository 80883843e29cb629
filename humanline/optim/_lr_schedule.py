"""The learning rate as a function of the step: schedules of torch's, torchtune's and ours, from the config."""

import warnings
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torchtune.modules.peft import get_adapter_params

from humanline.config import accepts, component, is_given
from humanline.errors import ConfigError


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_training_steps: int, warmup_ratio: float = 0.1
) -> LambdaLR:
    """The learning rate rises linearly over the first ``warmup_ratio`` of the steps, and stays.

    Args:
        optimizer (Optimizer): the optimizer whose rate is scheduled.
        num_training_steps (int): optimizer steps of the whole run.
        warmup_ratio (float): share of the steps that warm up, in [0, 1].

    Returns:
        LambdaLR: the schedule; step it once an optimizer step.

    Raises:
        ConfigError: if ``warmup_ratio`` is not a share.
    """
    if not 0 <= warmup_ratio <= 1:
        raise ConfigError(f"lr_scheduler.warmup_ratio: {warmup_ratio} is no share of the steps; 0.1 is a common one")
    warmup_steps = warmup_ratio * num_training_steps
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def lr_schedule(cfg: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """The schedule that ``cfg.lr_scheduler`` names, None without one. It is stepped once an optimizer step.

    Args:
        cfg (DictConfig): the whole config.
        optimizer (Optimizer): the optimizer whose rate is scheduled.
        total_steps (int): optimizer steps of the whole run, given as ``num_training_steps`` where the schedule has
            that argument, as torchtune's and ours have, and torch's have not.

    Raises:
        ConfigError: if there is no such schedule, or it needs more than the step.
    """
    if not is_given(cfg, "lr_scheduler"):
        return None
    takes_steps = accepts(cfg, "lr_scheduler", "num_training_steps")
    steps = {"num_training_steps": total_steps} if takes_steps else {}
    schedule: Any = component(cfg, "lr_scheduler", optimizer, **steps)
    if isinstance(schedule, ReduceLROnPlateau) or not hasattr(schedule, "step"):
        raise ConfigError(
            f"lr_scheduler._component_: {cfg.lr_scheduler._component_} is no function of the step, which a schedule "
            "has to be here; choose another, such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    return schedule


def replay(schedule: LRScheduler, steps: int) -> None:
    """Takes a schedule that is new to where it is after so many steps."""
    with warnings.catch_warnings():  # torch expects the optimizer's own steps between them
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            schedule.step()


def rehearse_optimizer(cfg: DictConfig, model: nn.Module, device: torch.device, total_steps: int) -> None:
    """Builds the optimizer and the schedule of a config for a model without memory, and takes the schedule to its end.

    Args:
        cfg (DictConfig): the whole config.
        model (nn.Module): the model, on the meta device.
        device (torch.device): where it will train.
        total_steps (int): optimizer steps of the whole run.

    Raises:
        ConfigError: if the optimizer or the schedule cannot be built, or the schedule ends before the run.
    """
    shapes = {parameter.shape for parameter in (get_adapter_params(model) or dict(model.named_parameters())).values()}
    # Each takes the memory of one number.
    parameters = [nn.Parameter(torch.zeros((), device=device).expand(shape)) for shape in sorted(shapes)]
    optimizer = component(cfg, "optimizer", parameters)
    if (schedule := lr_schedule(cfg, optimizer, total_steps)) is None:
        return
    try:
        replay(schedule, total_steps)
    except Exception as error:  # each schedule has its own
        raise ConfigError(
            f"lr_scheduler: {cfg.lr_scheduler._component_} cannot schedule this run's {total_steps} steps: "
            f"{' '.join(str(error).split())}"
        ) from error
