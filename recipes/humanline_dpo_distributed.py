"""Humanline DPO on one or more GPUs (or on a CPU), sharded with FSDP2.

Trains a torchtune decoder (Llama, Qwen2.5, humanline's Gemma 2), or an adapter on one, on preference pairs, against a
reference that follows the policy every ``sync_every`` optimizer steps, with token log-ratios clipped before the loss
(https://arxiv.org/abs/2509.24207). Pairs come from any builder of ``humanline.data``: chosen / rejected messages, or
the best and the worst of scored responses; or the policy samples them (``source``). What it leaves out on purpose:
tensor parallelism and optimizer-in-backward (the reference has to sync between backward and the optimizer's step).

    tune run humanline_dpo_distributed --config humanline/llama3_8b_offline                     # every visible GPU
    tune run --nproc_per_node 8 recipes/humanline_dpo_distributed --config configs/llama3_8b_offline.yaml
    tune run recipes/humanline_dpo_distributed --config configs/llama3_8b_offline.yaml reference.sync_every=4

The step itself is in ``humanline.training.HumanlineRecipe.train``.
"""

import sys

from omegaconf import DictConfig

from humanline.training import DPO, HumanlineRecipe, parse, run


class HumanlineDPORecipeDistributed(HumanlineRecipe):
    """Pairs of responses, DPO on clipped log-ratios, a synced reference, FSDP2 over all ranks."""

    objective_type = DPO


@parse
def recipe_main(cfg: DictConfig) -> None:
    run(HumanlineDPORecipeDistributed, cfg, script=__file__)


if __name__ == "__main__":
    sys.exit(recipe_main())
