"""Learning-rate schedules from the config, by torch, torchtune or humanline. Each is a function of the step."""

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
    """Raises the learning rate linearly during warm-up, then keeps it constant.

    Args:
        optimizer (Optimizer): the optimizer whose learning rate is scheduled. The recipe passes it.
        num_training_steps (int): number of optimizer steps of the whole run. The recipe passes it.
        warmup_ratio (float): share of the run's steps that warm up, from 0 to 1. 0.1 warms up during the first 10% of
            the steps.

    Returns:
        LambdaLR: the schedule. Step it once per optimizer step.

    Raises:
        ConfigError: if ``warmup_ratio`` is not from 0 to 1.
    """
    if not 0 <= warmup_ratio <= 1:
        raise ConfigError(
            f"lr_scheduler.warmup_ratio: expected a share of the steps from 0 to 1, such as 0.1, got {warmup_ratio}"
        )
    warmup_steps = warmup_ratio * num_training_steps
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def lr_schedule(cfg: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """Builds the schedule of ``cfg.lr_scheduler``; None without one. Step it once per optimizer step.

    Args:
        cfg (DictConfig): the whole config.
        optimizer (Optimizer): the optimizer whose learning rate is scheduled.
        total_steps (int): optimizer steps of the whole run. The schedule gets them as ``num_training_steps`` if it has
            this argument. Schedules of torchtune and humanline have it, those of torch do not.

    Raises:
        ConfigError: if the schedule cannot be built, or depends on more than the step.
    """
    if not is_given(cfg, "lr_scheduler"):
        return None
    takes_steps = accepts(cfg, "lr_scheduler", "num_training_steps")
    steps = {"num_training_steps": total_steps} if takes_steps else {}
    schedule: Any = component(cfg, "lr_scheduler", optimizer, **steps)
    if isinstance(schedule, ReduceLROnPlateau) or not hasattr(schedule, "step"):
        raise ConfigError(
            f"lr_scheduler._component_: expected a function of the step, got {cfg.lr_scheduler._component_}; use "
            "another schedule, such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    return schedule


def replay(schedule: LRScheduler, steps: int) -> None:
    """Steps a new schedule ``steps`` times."""
    with warnings.catch_warnings():  # torch expects optimizer steps between schedule steps
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            schedule.step()


def rehearse_optimizer(cfg: DictConfig, model: nn.Module, device: torch.device, total_steps: int) -> None:
    """Builds the optimizer and the schedule of a config for a model without memory, and runs the schedule to its end.

    Args:
        cfg (DictConfig): the whole config.
        model (nn.Module): the model, on the meta device.
        device (torch.device): the device of the training.
        total_steps (int): optimizer steps of the whole run.

    Raises:
        ConfigError: if the optimizer or the schedule cannot be built, or the schedule ends before the run.
    """
    shapes = {parameter.shape for parameter in (get_adapter_params(model) or dict(model.named_parameters())).values()}
    # Each parameter needs the memory of one number.
    parameters = [nn.Parameter(torch.zeros((), device=device).expand(shape)) for shape in sorted(shapes)]
    optimizer = component(cfg, "optimizer", parameters)
    if (schedule := lr_schedule(cfg, optimizer, total_steps)) is None:
        return
    try:
        replay(schedule, total_steps)
    except Exception as error:  # each schedule raises its own errors
        raise ConfigError(
            f"lr_scheduler: {cfg.lr_scheduler._component_} cannot schedule this run's {total_steps} steps: "
            f"{' '.join(str(error).split())}"
        ) from error
