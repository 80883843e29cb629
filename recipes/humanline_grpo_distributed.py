"""Humanline GRPO on one or more GPUs (or on a CPU), sharded with FSDP2.

Trains a torchtune decoder (Llama, Qwen2.5, humanline's Gemma 2), or an adapter on one, on groups of scored responses to
a prompt, against a reference that follows the policy every ``sync_every`` optimizer steps, with token log-ratios
clipped before the loss (https://arxiv.org/abs/2509.24207). The groups come from any builder of ``humanline.data``, or
the policy samples them (``source``); those whose scores are all equal are skipped. A group is never split over ranks or
steps. What it leaves out on purpose: tensor parallelism and optimizer-in-backward (the reference has to sync between
backward and the optimizer's step).

    tune run humanline_grpo_distributed --config humanline/llama3_8b_offline_grpo               # every visible GPU
    tune run --nproc_per_node 8 recipes/humanline_grpo_distributed --config configs/llama3_8b_offline_grpo.yaml
    tune run recipes/humanline_grpo_distributed --config configs/llama3_8b_offline_grpo.yaml reference.sync_every=4

The step itself is in ``humanline.training.HumanlineRecipe.train``.
"""

import sys

from omegaconf import DictConfig

from humanline.training import GRPO, HumanlineRecipe, parse, run


class HumanlineGRPORecipeDistributed(HumanlineRecipe):
    """Scored groups, GRPO on clipped log-ratios, a synced reference, FSDP2 over all ranks."""

    objective_type = GRPO


@parse
def recipe_main(cfg: DictConfig) -> None:
    run(HumanlineGRPORecipeDistributed, cfg, script=__file__)


if __name__ == "__main__":
    sys.exit(recipe_main())
