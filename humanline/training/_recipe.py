"""The machinery that every training recipe shares: set-up, the loop, evaluation, checkpoints, weights out."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torchtune import training, utils
from torchtune.modules import TransformerDecoder
from torchtune.recipe_interfaces import FTRecipeInterface
from torchtune.training.lr_schedulers import get_lr
from tqdm import tqdm

from humanline.data import Group, GroupDataset, OfflineSource, Rows, lay_out, pack, parts
from humanline.errors import ConfigError, DataError
from humanline.models import (
    LogProbDecoder,
    adapter_modules,
    check_adapter,
    check_architecture,
    fixed_log_probs,
    has_quantized_base,
    initial_adapter,
    log_probs,
    merge_adapter,
    trainable_parameters,
)
from humanline.reference import Plan
from humanline.training._adapter_files import read_adapter, write_adapter
from humanline.training._checkpoint import TrainingCheckpoint
from humanline.training._draws import step_seed, uniform_draws
from humanline.training._launch import hide_known_warnings, process_group, start_on_every_device
from humanline.training._metrics import MetricSums
from humanline.training._model import build_model, full_state_dict
from humanline.training._objectives import Objective
from humanline.training._settings import DTYPES, Settings, component
from humanline.training._stochastic_adamw import StochasticAdamW
from humanline.training._weights import fingerprint, read_weights

log = utils.get_logger("INFO")

CPU = torch.device("cpu")


class HumanlineRecipe(FTRecipeInterface):
    """Trains a policy on groups against a synced reference.

    A recipe names its objective; everything else comes from the config.

    Args:
        cfg (DictConfig): the whole config.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or cannot work.
    """

    objective_type: ClassVar[type[Objective]]
    sharded: ClassVar[bool] = True
    """FSDP2 over all ranks; otherwise one process with plain tensors."""

    def __init__(self, cfg: DictConfig) -> None:
        self.settings = Settings.from_config(cfg)
        self.device = self.settings.torch_device
        self.budget = self.settings.row_budget(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        training.set_seed(seed=self.settings.seed)

    # --------------------------------------------------------------------------------------------------------- set-up

    def setup(self, cfg: DictConfig) -> None:
        """Builds everything in the order in which it can fail cheaply: loss and data first, weights last."""
        settings = self.settings
        self.objective = self.objective_type(component(cfg, "loss"))
        self.reference = component(cfg, "reference")
        tokenizer = component(cfg, "tokenizer")
        with torch.device("meta"):
            shape = component(cfg, "model")
        self.source = OfflineSource(
            self._examples("dataset", component(cfg, "dataset", tokenizer), shape),
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            world_size=self.world_size,
            seed=settings.seed,
            shuffle=settings.shuffle,
        )
        self.objective.check_microbatch(settings.batch_size * self.world_size, "batch_size")
        if self.rank == 0 and (warning := self.objective.imbalance_warning(self.source.dataset)):
            log.warning(warning)
        held_out = component(cfg, "dataset_val", tokenizer)
        self.dataset_val = None if held_out is None else self._examples("dataset_val", held_out, shape)
        if self.dataset_val is not None:
            self.objective.check_microbatch(len(self.dataset_val), "dataset_val")
        self.steps_per_epoch = min(self.source.steps_per_epoch, settings.max_steps_per_epoch or sys.maxsize)
        self.total_steps = settings.epochs * self.steps_per_epoch

        self.policy = self._setup_models(cfg)
        self.optimizer = component(cfg, "optimizer", list(trainable_parameters(self.policy).values()))
        self._warn_of_rounding()
        self.lr_scheduler = component(cfg, "lr_scheduler", self.optimizer, num_training_steps=self.total_steps)
        self.activations = training.get_act_offloading_ctx_manager(self.policy, settings.enable_activation_offloading)
        self._take_initial_log_probs()

        self.checkpoint = TrainingCheckpoint(
            settings.output_dir,
            {
                "groups a step": self.source.groups_per_step,
                "groups a microbatch": settings.batch_size * self.world_size,
                "shuffle": settings.shuffle,
                "dataset": len(self.source.dataset),
                "max_steps_per_epoch": self.steps_per_epoch,
                "seed": settings.seed,
                "reference": type(self.reference).__name__,
                "sync_every": self.reference.sync_every,
                "model": OmegaConf.to_container(cfg.model, resolve=True),
            },
            self.policy,
            self.optimizer,
            self.lr_scheduler,
            self.reference,
        )
        self.step = self.checkpoint.load(settings.resume_from_checkpoint) if settings.resume_from_checkpoint else 0
        profiler = component(cfg, "profiler")
        self.profiler = profiler[0] if profiler else training.DummyProfiler()
        self.metric_logger = component(cfg, "metric_logger") if self.rank == 0 else None
        if self.metric_logger is not None:
            self.metric_logger.log_config(cfg)
            if self.device.type != self.settings.device.split(":")[0]:
                log.warning(f"device: {self.settings.device} is not here; training on the {self.device.type} instead")
            log.info(
                f"{len(self.source.dataset):,} groups, {self.source.groups_per_step} a step on {self.world_size} "
                f"{'process' if self.world_size == 1 else 'processes'}, {self.total_steps} steps"
            )

    def _examples(self, key: str, dataset: GroupDataset, shape: TransformerDecoder) -> GroupDataset:
        """The objective's groups of a dataset. One that the model or the row budget cannot take ends the run here."""
        dataset = self.objective.examples(dataset)
        vocabulary = shape.tok_embeddings.num_embeddings
        kl_group = self.objective.longest_kl_group(dataset)
        for group in [*dataset, kl_group] if kl_group else dataset:
            pack(self._cut([group]), self.budget)
            longest = len(group.prompt) + max(map(len, group.responses)) - 1
            if longest > shape.max_seq_len:
                raise DataError(
                    f"{group.id}: prompt and response take {longest} positions, the model has {shape.max_seq_len} "
                    f"(max_seq_len); lower {key}.max_tokens"
                )
            largest = max(map(max, (group.prompt, *group.responses)))
            if largest >= vocabulary:
                raise DataError(
                    f"{group.id}: token id {largest} is outside the model's vocabulary of {vocabulary}; encode with "
                    "the model's own tokenizer"
                )
        if self.rank == 0:
            log.info(f"{key}: {dataset.report()}")
        return dataset

    def _setup_models(self, cfg: DictConfig) -> LogProbDecoder:
        settings = self.settings
        self.checkpointer, weights = read_weights(cfg)
        self.weight_dtypes = {name: tensor.dtype for name, tensor in weights.items()}
        with training.set_default_dtype(DTYPES[settings.dtype]), torch.device("meta"):
            shape = LogProbDecoder(component(cfg, "model"))
        check_architecture(shape, weights, cfg.checkpointer.checkpoint_dir)
        check_adapter(shape, self.world_size)
        has_adapter = bool(adapter_modules(shape))
        if has_adapter:
            if settings.adapter:
                weights |= read_adapter(settings.adapter, shape, self.checkpointer)
            else:
                weights |= initial_adapter(shape, weights, settings.seed)
        elif settings.adapter:
            raise ConfigError("adapter: the model has none; name a lora_ or qlora_ builder in model._component_")
        # FSDP2 on one rank gathers nothing, and torchao's NF4 fails in that; there is nothing to shard either.
        sharded = self.sharded and (self.world_size > 1 or not has_quantized_base(shape))

        def model(state_dict: dict[str, Tensor] | None, **kwargs: Any) -> LogProbDecoder:
            return build_model(
                lambda: component(cfg, "model"),
                state_dict,
                mesh=init_device_mesh(self.device.type, (self.world_size,)) if sharded else None,
                device=self.device,
                compute_dtype=DTYPES[settings.dtype],
                compile=settings.compile,
                **kwargs,
            )

        start = time.perf_counter()
        policy = model(
            weights,
            param_dtype=DTYPES[settings.master_dtype],
            activation_checkpointing=settings.enable_activation_checkpointing,
        )
        # A copy of the policy needs no weights of its own, but for the base that an adapter leaves as it is.
        reference_weights = weights if has_adapter else None
        plan = Plan(
            new_model=lambda: model(reference_weights, param_dtype=DTYPES[settings.dtype]),
            passes=self._reference_passes,
            total_steps=self.total_steps,
            resumes=bool(settings.resume_from_checkpoint),
            fingerprint=lambda: fingerprint(weights, cfg.model, settings.dtype),
        )
        self.reference.setup(policy, plan)
        if self.rank == 0:
            log.info(f"Loading the models took {time.perf_counter() - start:.1f} s")
            trained = sum(parameter.numel() for parameter in trainable_parameters(policy).values())
            log.info(f"{trained:,} parameters train")
        return policy

    def _warn_of_rounding(self) -> None:
        if self.rank == 0 and self.settings.master_dtype == "bf16" and not isinstance(self.optimizer, StochasticAdamW):
            log.warning(
                "master_dtype: bf16 rounds most updates away at alignment's learning rates; set optimizer._component_: "
                "humanline.training.StochasticAdamW, or master_dtype: fp32"
            )

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """The loop. The reference syncs after the gradient is clipped and before the weights move."""
        settings = self.settings
        sums = MetricSums(self.device)
        self.profiler.start()
        if self.step == 0:
            self.evaluate()  # what the run starts from
        with tqdm(total=self.total_steps, initial=self.step, disable=self.rank != 0, unit="step") as progress:
            seconds, tokens = 0.0, 0
            while self.step < self.total_steps:
                start = time.perf_counter()
                self.step += 1
                torch.manual_seed(step_seed(settings.seed, self.step, self.rank))  # of LoRA dropout
                batch = self.source.batch(self._source_step(self.step))
                for index, normalizer in enumerate(self.objective.normalizers(batch)):
                    kl = self._kl_baseline(self._with_reference(self._kl_share(batch[index])))
                    draw = self._draws(batch[index], index)
                    for rows, weight, reference_logps in self._with_reference(self._cut(self._share(batch[index]))):
                        with self.activations:
                            policy_logps = log_probs(self.policy, rows)
                        draws = draw(rows)
                        loss, metrics = self.objective(policy_logps, reference_logps, rows, draws=draws, kl=kl)
                        loss = loss * weight / normalizer  # its part of the loss of the global batch
                        (loss * self.world_size).backward()  # FSDP averages gradients over ranks, and this is a sum
                        if weight:
                            sums.add(metrics | {"loss": (loss.detach(), 0)})
                            tokens += rows.num_tokens

                grad_norm = self._clip_gradients()
                self.reference.before_optimizer_step(self.step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                lr = get_lr(self.optimizer)
                if self.lr_scheduler is not None:
                    self.lr_scheduler.step()
                self.profiler.step()
                progress.update()
                seconds += time.perf_counter() - start
                sums.add({"loss": (0, 1 / self.world_size)})

                if self.step % settings.log_every_n_steps == 0:
                    sums.add({"tokens_per_second": (tokens / seconds, 1 / self.world_size)})
                    self._log(sums.means() | {"grad_norm": grad_norm, "lr": lr}, progress)
                    seconds, tokens = 0.0, 0
                if _every(settings.run_val_every_n_steps, self.step) or self.step == self.total_steps:
                    self.evaluate()
                # Weights first: a run that dies between the two resumes before the epoch's end and writes them again.
                if self.step % self.steps_per_epoch == 0:
                    self.save_checkpoint(epoch=self.step // self.steps_per_epoch - 1)
                if _every(settings.save_every_n_steps, self.step):
                    self.checkpoint.save(self.step)
        self.profiler.stop()

    def _source_step(self, step: int) -> int:
        """The step of the source: an epoch that ``max_steps_per_epoch`` ends early skips the rest of its groups."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return epoch * self.source.steps_per_epoch + index + 1

    def _share(self, microbatch: list[Group]) -> list[Group]:
        """This rank's groups of a global microbatch."""
        size = self.settings.batch_size
        return microbatch[self.rank * size : (self.rank + 1) * size]

    def _cut(self, groups: list[Group]) -> list[Group]:
        """The groups, cut into parts of a row where the objective does not need them whole."""
        if self.objective.whole_groups:
            return groups
        return [part for group in groups for part in parts(group, self.budget)]

    def _kl_share(self, microbatch: list[Group]) -> list[Group]:
        """This rank's KL sequences of a global microbatch; none for an objective without them."""
        return self._cut(self._share(self.objective.kl_groups(microbatch, self.source.dataset)))

    def _passes(self, groups: list[Group]) -> Iterator[tuple[Rows, int]]:
        """The passes of a microbatch, with weight 1; all ranks make the same number, the missing ones with weight 0."""
        if not groups:  # on no rank
            return
        planned = pack(groups, self.budget)
        most = torch.tensor(len(planned))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for index in range(int(most)):
            rows = lay_out(groups, planned[min(index, len(planned) - 1)], self.budget)
            yield rows.to(self.device), int(index < len(planned))

    def _with_reference(self, groups: list[Group]) -> Iterator[tuple[Rows, int, Tensor]]:
        for rows, weight in self._passes(groups):
            yield rows, weight, self.reference.log_probs(rows)

    def _reference_passes(self, step: int) -> Iterator[Rows]:
        """All passes of a step for which the loop asks the reference."""
        for microbatch in self.source.batch(self._source_step(step)):
            for groups in (self._kl_share(microbatch), self._cut(self._share(microbatch))):
                yield from (rows for rows, _ in self._passes(groups))

    def _kl_baseline(self, passes: Iterable[tuple[Rows, int, Tensor]]) -> Tensor | None:
        """KTO's z0 over the KL sequences of all ranks, from passes without gradient; None where there are none."""
        sums = [
            weight * self.objective.kl_sum(fixed_log_probs(self.policy, rows), reference_logps, rows)
            for rows, weight, reference_logps in passes
        ]
        if not sums:
            return None
        total = torch.stack(sums).sum(0)
        dist.all_reduce(total)
        return self.objective.loss.baseline(total)

    def _draws(self, microbatch: list[Group], index: int) -> Callable[[Rows], Tensor | None]:
        """Draws humanline sampling's uniforms for the passes of this rank's share of a global microbatch."""
        if self.objective.loss.perception != "sample":
            return lambda rows: None
        before = sum(len(group.responses) for group in microbatch[: self.rank * self.settings.batch_size])
        sizes = (len(group.responses) for group in self._cut(self._share(microbatch)))
        places = list(accumulate(sizes, initial=before))
        return lambda rows: uniform_draws(rows, self.settings.seed, self.step, index, places).to(self.device)

    def _clip_gradients(self) -> float:
        limit = self.settings.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), float("inf") if limit is None else float(limit))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _log(self, metrics: dict[str, float], progress: "tqdm[Any]") -> None:
        if self.metric_logger is None:
            return
        metrics["steps_since_sync"] = self.step - self.reference.last_sync
        if self.settings.log_peak_memory_stats and self.device.type == "cuda":
            metrics |= training.get_memory_stats(device=self.device)
        self.metric_logger.log_dict(metrics, step=self.step)
        shown = {
            "loss": "loss",
            "rewards/margins": "margin",
            "kl": "kl",
            "unclamped": "unclamped",
            "tokens_per_second": "tok/s",
        }
        progress.set_postfix({label: f"{metrics[name]:.4g}" for name, label in shown.items() if name in metrics})

    # ----------------------------------------------------------------------------------------- evaluation and saving

    def _take_initial_log_probs(self) -> None:
        """Lays out the held-out groups, with their log-probs under the policy that the run starts from.

        Held-out metrics are taken against that policy: a synced reference moves along and would show no progress.
        """
        groups: list[Group] = []
        kl_groups: list[Group] = []
        if self.dataset_val is not None:
            groups = list(self.dataset_val)
            kl_groups = self.objective.kl_groups(groups, self.dataset_val)
        self.val_passes, self.val_kl_passes = (
            [
                (rows.to(CPU), weight, fixed_log_probs(self.policy, rows).cpu())
                for rows, weight in self._val_passes(passed)
            ]
            for passed in (self._cut(groups), self._cut(kl_groups))
        )

    def _val_passes(self, groups: list[Group]) -> Iterator[tuple[Rows, int]]:
        """The passes of held-out groups, which are shared out over the ranks; some ranks may have none."""
        if groups:
            share = groups[self.rank :: self.world_size]
            for rows, weight in self._passes(share or groups[:1]):
                yield rows, weight if share else 0

    @torch.no_grad()
    def evaluate(self) -> None:
        """Logs the objective's metrics on ``dataset_val`` under ``val/``, with the initial policy as the reference."""
        if self.dataset_val is None:
            return
        sums = MetricSums(self.device)
        kl = self._kl_baseline(
            (rows.to(self.device), weight, logps.to(self.device)) for rows, weight, logps in self.val_kl_passes
        )
        for rows, weight, initial_logps in self.val_passes:
            rows = rows.to(self.device)
            loss, metrics = self.objective(
                fixed_log_probs(self.policy, rows), initial_logps.to(self.device), rows, draws=None, kl=kl
            )
            metrics |= {"loss": (loss, self.objective.num_terms(rows.groups))}
            sums.add(metrics if weight else dict.fromkeys(metrics, (0, 0)))
        means = {f"val/{name}": value for name, value in sums.means().items()}
        if self.metric_logger is not None:
            self.metric_logger.log_dict(means, step=self.step)

    def save_checkpoint(self, epoch: int) -> None:
        """Writes the weights as an HF folder ``output_dir/epoch_N``, in the dtypes that they came in.

        A model with an adapter writes it into ``output_dir/epoch_N/adapter``, and the folder of merged weights only if
        ``save_adapter_weights_only`` is False.
        """
        folder = Path(self.settings.output_dir) / f"epoch_{epoch}"
        layers = adapter_modules(self.policy)
        if layers:
            dtypes = dict.fromkeys(trainable_parameters(self.policy), torch.float32)
            adapter = full_state_dict(self.policy, rank=self.rank, dtypes=dtypes)
            if self.rank == 0:
                write_adapter(folder / "adapter", adapter, self.policy, self.checkpointer)
        if not layers or not self.settings.save_adapter_weights_only:
            weights = full_state_dict(self.policy, rank=self.rank, dtypes=self.weight_dtypes)
            if self.rank == 0:
                if layers:
                    merge_adapter(weights, adapter, layers)
                self.checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=epoch)
        dist.barrier()

    def cleanup(self) -> None:
        if self.metric_logger is not None:
            self.metric_logger.close()


def run(recipe_type: type[HumanlineRecipe], cfg: DictConfig, script: str) -> None:
    """Runs a recipe on every visible device; a mistake in config or data ends it with one line instead of a traceback.

    Args:
        recipe_type (type[HumanlineRecipe]): the recipe.
        cfg (DictConfig): its config.
        script (str): the recipe's file, which further processes run.
    """
    try:
        hide_known_warnings()
        settings = Settings.from_config(cfg)
        if recipe_type.sharded:
            start_on_every_device(settings.device, script)
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("nproc_per_node: this recipe is for one device; run the _distributed one on several")
        with process_group(settings.torch_device):
            recipe = recipe_type(cfg)
            recipe.setup(cfg)
            recipe.train()
            recipe.cleanup()
    except (ConfigError, DataError) as error:
        sys.exit(f"{os.path.basename(script)}: {error}")


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
