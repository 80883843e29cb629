"""Humanline KTO on one GPU (or on a CPU): LoRA, QLoRA, DoRA or full fine-tuning.

Trains an adapter, or all of a torchtune decoder, on labelled responses, with the token log-ratios clipped before the
loss and a reference that follows the policy every ``sync_every`` optimizer steps (https://arxiv.org/abs/2509.24207).
With ``AdapterReference`` the reference costs one more copy of the adapter. Tensors are plain, so optimizers that do not
know DTensor work too (bitsandbytes' were not tried). What it leaves out on purpose: more than one process (the
distributed recipe takes the same configs) and optimizer-in-backward (the reference has to sync between backward and the
optimizer's step).

    tune run recipes/humanline_kto_single_device --config configs/CONFIG.yaml

The step itself is in ``humanline.training.HumanlineRecipe.train``.
"""

import sys

from omegaconf import DictConfig

from humanline.training import KTO, HumanlineRecipe, parse, run


class HumanlineKTORecipeSingleDevice(HumanlineRecipe):
    """Labelled responses, KTO on clipped log-ratios, a synced reference, one process with plain tensors."""

    objective_type = KTO
    sharded = False


@parse
def recipe_main(cfg: DictConfig) -> None:
    run(HumanlineKTORecipeSingleDevice, cfg, script=__file__)


if __name__ == "__main__":
    sys.exit(recipe_main())
