"""Humanline DPO on one GPU (or on a CPU): LoRA, QLoRA, DoRA or full fine-tuning.

Trains an adapter, or a whole torchtune decoder, on preference pairs. The reference is set to the policy every
``sync_every`` optimizer steps, and token log-ratios are clipped before the loss (https://arxiv.org/abs/2509.24207).
With ``AdapterReference`` the reference needs memory for one more copy of the adapter. Tensors are plain, so optimizers
without DTensor support work too (bitsandbytes is untested). Not supported: more than one process (the distributed
recipe accepts the same configs), and optimizer-in-backward, because the reference syncs between backward and the
optimizer step.

    tune run recipes/humanline_dpo_single_device --config configs/CONFIG.yaml

To change the method, copy this file (``tune cp``) and edit it. ``train`` is the loop, where the reference syncs;
``loss_and_metrics`` calls the loss.
"""

import sys

from humanline.data import Rows
from humanline.models import log_probs_and_entropy, trainable_parameters
from humanline.reference import RunContext
from humanline.training import (
    DPO,
    Data,
    Environment,
    HeldOut,
    InitialModel,
    Metrics,
    Run,
    clip_gradients,
    component,
    lr_schedule,
    parse,
    perception_metrics,
    start,
)
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from torchtune.recipe_interfaces import FTRecipeInterface


class HumanlineDPORecipeSingleDevice(FTRecipeInterface):
    """DPO on pairs of responses, with clipped log-ratios and a synced reference, in one process with plain tensors."""

    sharded = False

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def setup(self, cfg: DictConfig) -> None:
        """Builds the objects that the loop uses. Steps that can fail cheaply come before the weights are loaded."""
        environment, settings = self.environment, self.environment.settings
        self.loss = component(cfg, "loss")
        self.objective = DPO(self.loss)
        strategy = component(cfg, "reference")
        data = Data(cfg, environment, self.objective)
        self.passes = data.passes

        model = InitialModel(cfg, environment)
        self.policy = model.policy()
        self.reference = strategy.build(
            RunContext(
                policy=self.policy,
                model=model,
                passes=data.ahead,
                total_steps=data.total_steps,
                resumes=bool(environment.resume_from),
            )
        )
        weights_out = model.weights_out(self.policy, data.tokenizer)
        del model  # frees the checkpoint's weights
        source = data.source(self.policy, weights_out)
        self.optimizer = component(cfg, "optimizer", list(trainable_parameters(self.policy).values()))
        self.lr_scheduler = lr_schedule(cfg, self.optimizer, data.total_steps)
        self.activations = training.get_act_offloading_ctx_manager(self.policy, settings.enable_activation_offloading)
        self.max_grad_norm = settings.clip_grad_norm

        held_out = None
        if data.held_out is not None:
            held_out = HeldOut(data.held_out, self.passes, self.policy, self.loss_and_metrics)
        self.run = Run(
            cfg,
            environment,
            data,
            source=source,
            policy=self.policy,
            reference=self.reference,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            weights_out=weights_out,
            held_out=held_out,
        )

    def train(self) -> None:
        """Runs the loop. The reference syncs after gradient clipping and before the optimizer step."""
        with self.run as run:
            for step, batch in run.steps():
                for index, divisor in enumerate(self.objective.divisors(batch)):
                    for rows, weight, draws in self.passes.of(batch[index], step, index):
                        reference_logps = self.reference.log_probs(rows)
                        with self.activations:
                            policy_logps, entropy = log_probs_and_entropy(self.policy, rows)
                        loss, metrics = self.loss_and_metrics(policy_logps, reference_logps, rows, draws)
                        loss = loss * weight / divisor  # this pass's part of the global batch's loss
                        (loss * run.world_size).backward()  # FSDP averages gradients over ranks; this needs their sum
                        run.note(rows, weight, policy_logps, reference_logps, entropy, loss, metrics)
                grad_norm = clip_gradients(self.policy, self.max_grad_norm)
                self.reference.before_optimizer_step(step)
                if run.is_sound(grad_norm):
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.lr_scheduler is not None:
                    self.lr_scheduler.step()
                run.end_step()

    def loss_and_metrics(
        self, policy_logps: Tensor, reference_logps: Tensor, rows: Rows, draws: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """Returns the sum of a pass's losses (scalar) and its metrics: a sum and a count for each name.

        Args:
            policy_logps (Tensor): log-probs of the pass's response tokens under the policy, nats, ``[N]``.
            reference_logps (Tensor): the same under the reference, ``[N]``.
            rows (Rows): the pass; in each pair the chosen response comes before the rejected one.
            draws (Tensor | None): uniforms for humanline sampling, ``[2, B, S]``; None without it.
        """
        policy, reference, mask = rows.per_response(policy_logps), rows.per_response(reference_logps), rows.mask
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)  # of [B, S]
        losses, chosen_rewards, rejected_rewards = self.loss(
            policy[chosen],
            policy[rejected],
            reference[chosen],
            reference[rejected],
            mask[chosen],
            mask[rejected],
            None if draws is None else draws[:, chosen],
            None if draws is None else draws[:, rejected],
        )
        margins, log_probs = chosen_rewards - rejected_rewards, policy.detach().sum(1)
        pairs = len(losses)
        return losses.sum(), {
            "rewards/chosen": (chosen_rewards.sum(), pairs),
            "rewards/rejected": (rejected_rewards.sum(), pairs),
            "rewards/margins": (margins.sum(), pairs),
            "rewards/accuracies": ((margins > 0).sum(), pairs),
            "log_probs/chosen": (log_probs[chosen].sum(), pairs),
            "log_probs/rejected": (log_probs[rejected].sum(), pairs),
            "log_probs/accuracies": ((log_probs[chosen] > log_probs[rejected]).sum(), pairs),
            **perception_metrics(self.loss, policy, reference, mask),
        }

    def cleanup(self) -> None:
        """Closes the run's resources, however it ended."""
        self.environment.close()


@parse
def recipe_main(cfg: DictConfig) -> None:
    start(HumanlineDPORecipeSingleDevice, cfg, script=__file__)


if __name__ == "__main__":
    sys.exit(recipe_main())
