"""What moves the weights: AdamW with stochastic rounding, the learning rate's schedule, gradient clipping."""

from humanline.optim._gradients import clip_gradients
from humanline.optim._lr_schedule import get_constant_schedule_with_warmup, lr_schedule, rehearse_optimizer, replay
from humanline.optim._stochastic_adamw import StochasticAdamW, stochastic_round

__all__ = [
    "StochasticAdamW",
    "clip_gradients",
    "get_constant_schedule_with_warmup",
    "lr_schedule",
    "rehearse_optimizer",
    "replay",
    "stochastic_round",
]
