from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from humanline._seeds import stream_seed
from humanline.data import Rows


def uniform_draws(rows: Rows, seed: int, step: int, microbatch: int, first_responses: Sequence[int]) -> Tensor:
    """Returns the uniform random numbers of humanline sampling for a pass.

    Each response has its own generator, seeded by the run's seed and the response's position in the run. So neither the
    packing nor the number of ranks changes a draw, and a resumed run repeats its draws.

    Args:
        rows (Rows): the pass.
        seed (int): the run's seed.
        step (int): optimizer step.
        microbatch (int): index of the microbatch in the step.
        first_responses (Sequence[int]): for each group that ``rows.indices`` counts, the index of its first response
            among the responses of the global microbatch.

    Returns:
        Tensor: float32 ``[2, N]`` in [0, 1), for ``B_P`` and ``B_R``, on the CPU.
    """

    def generator(place: int) -> np.random.Generator:
        return np.random.default_rng(stream_seed("perception", seed, step, microbatch, place))

    draws = [
        generator(place).random((2, len(response)), dtype=np.float32)
        for index, group in zip(rows.indices, rows.groups, strict=True)
        for place, response in enumerate(group.responses, first_responses[index])
    ]
    return torch.from_numpy(np.concatenate(draws, axis=1))
