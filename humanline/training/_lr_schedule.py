from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
