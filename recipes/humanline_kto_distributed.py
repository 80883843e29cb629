"""Humanline KTO on one or more GPUs (or on a CPU), sharded with FSDP2.

Trains a torchtune decoder (Llama, Qwen2.5, humanline's Gemma 2), or an adapter on one, on responses labelled desirable
or undesirable, against a reference that follows the policy every ``sync_every`` optimizer steps, with token log-ratios
clipped before the loss (https://arxiv.org/abs/2509.24207). Labels come with the data, from pairs (the chosen response
is desirable) or from scores (those above their group's mean are); any builder of ``humanline.data`` does, and
``source``, by which the policy samples them. The baseline is estimated from mismatched prompts and responses of the
microbatch of all ranks, in passes without gradient. What it leaves out on purpose: tensor parallelism and
optimizer-in-backward (the reference has to sync between backward and the optimizer's step).

    tune run humanline_kto_distributed --config humanline/llama3_8b_offline_kto                 # every visible GPU
    tune run --nproc_per_node 8 recipes/humanline_kto_distributed --config configs/llama3_8b_offline_kto.yaml
    tune run recipes/humanline_kto_distributed --config configs/llama3_8b_offline_kto.yaml reference.sync_every=4

The step itself is in ``humanline.training.HumanlineRecipe.train``.
"""

import sys

from omegaconf import DictConfig

from humanline.training import KTO, HumanlineRecipe, parse, run


class HumanlineKTORecipeDistributed(HumanlineRecipe):
    """Labelled responses, KTO on clipped log-ratios, a synced reference, FSDP2 over all ranks."""

    objective_type = KTO


@parse
def recipe_main(cfg: DictConfig) -> None:
    run(HumanlineKTORecipeDistributed, cfg, script=__file__)


if __name__ == "__main__":
    sys.exit(recipe_main())
