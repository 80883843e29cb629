"""Updates weights: AdamW with stochastic rounding, learning-rate schedules, gradient clipping."""

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
