"""The machinery that every training recipe shares: set-up, the loop, evaluation, checkpoints, weights out."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import training, utils
from torchtune.modules import TransformerDecoder
from torchtune.recipe_interfaces import FTRecipeInterface
from torchtune.training.lr_schedulers import get_lr
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from humanline._seeds import stream_seed
from humanline.data import Group, GroupDataset, OfflineSource, Rows, pack, parts
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.models import (
    LogProbDecoder,
    adapter_modules,
    check_adapter,
    has_quantized_base,
    initial_adapter,
    log_probs,
    trainable_parameters,
)
from humanline.reference import RunContext
from humanline.rollout import OnlineSource, Stopped
from humanline.training._adapter_files import read_adapter
from humanline.training._agreement import check_same, gathered, on_any_rank
from humanline.training._checkpoint import TrainingCheckpoint, has_checkpoints
from humanline.training._collapse import CollapseWatch
from humanline.training._common_end import common_end
from humanline.training._component import accepts, check_component, component, is_given
from humanline.training._draws import uniform_draws
from humanline.training._export import write_weights
from humanline.training._hand_over import HandOver
from humanline.training._held_out import HeldOut
from humanline.training._launch import hide_known_warnings, process_group, start_on_every_device
from humanline.training._lr_schedule import lr_schedule, rehearse_optimizer
from humanline.training._metrics import MetricSums
from humanline.training._model import build_model, mesh_of, whole_weights
from humanline.training._non_finite import NonFinite
from humanline.training._objectives import Objective
from humanline.training._output_folder import sole_use
from humanline.training._passes import Passes
from humanline.training._provenance import code_digest
from humanline.training._replace import restore_replaced
from humanline.training._settings import COMPONENTS, DTYPES, Settings, values_of
from humanline.training._stochastic_adamw import StochasticAdamW
from humanline.training._stop_request import StopRequest
from humanline.training._weights import (
    build_decoder,
    fingerprint,
    read_decoder_weights,
    rounding_on_load,
    sampled_digest,
)

log = utils.get_logger("INFO")


class HumanlineRecipe(FTRecipeInterface):
    """Trains a policy on groups against a synced reference.

    A recipe names its objective; everything else comes from the config.

    Args:
        cfg (DictConfig): the whole config.
        restarted (bool): whether torchrun has started this very run before: then it goes on by itself.

    Raises:
        ConfigError: if a top-level key is missing, unknown, or cannot work.
    """

    objective_type: ClassVar[type[Objective]]
    sharded: ClassVar[bool] = True
    """FSDP2 over all ranks; otherwise one process with plain tensors."""

    def __init__(self, cfg: DictConfig, restarted: bool = False) -> None:
        self.settings = Settings.from_config(cfg)
        self.restarted = restarted
        self.device = self.settings.torch_device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        training.set_seed(seed=stream_seed("process", self.settings.seed) % 2**31)  # to which it adds the rank

    # --------------------------------------------------------------------------------------------------------- set-up

    def setup(self, cfg: DictConfig) -> None:
        """Builds everything in the order in which it can fail cheaply: loss and data first, weights last."""
        settings = self.settings
        check_same(values_of(cfg))
        self._check_components(cfg)
        if self.rank == 0:
            restore_replaced(Path(settings.output_dir))
        self.resume_from = self._resume_from()
        self.mesh = mesh_of(self.device, settings.data_parallel_replicate_dim) if self.sharded else None
        self.objective = self.objective_type(component(cfg, "loss"))
        self.reference = component(cfg, "reference")
        tokenizer = component(cfg, "tokenizer")
        with torch.device("meta"):
            shape = build_decoder(cfg)
        self.source = self._setup_source(cfg, tokenizer, shape)
        self.objective.check_microbatch(settings.batch_size * self.world_size, "batch_size")
        held_out = component(cfg, "dataset_val", tokenizer)
        if held_out is not None:
            held_out = self._examples("dataset_val", held_out, shape)
            self.objective.check_microbatch(len(held_out), "dataset_val")
        check_same(
            {
                "groups": self.source.digest(),
                "groups of dataset_val": held_out and held_out.digest(),
                "steps_per_epoch": self.source.steps_per_epoch,
            }
        )
        self.total_steps = settings.epochs * self.source.steps_per_epoch
        budget = settings.row_budget(self.device)
        self.passes = Passes(self.source, self.objective, budget, self.device)

        rehearse_optimizer(cfg, shape, self.device, self.total_steps)
        engine, reward = component(cfg, "engine"), component(cfg, "reward")
        profiler = component(cfg, "profiler")
        self.profiler = profiler[0] if profiler else training.DummyProfiler()

        self.policy = self._setup_models(cfg)
        if isinstance(self.source, OnlineSource):
            engine.setup(tokenizer, self.policy, lambda: whole_weights(self.policy, DTYPES[settings.dtype]))
            self.source.use(
                engine,
                reward,
                self.objective.examples,
                HandOver(
                    engine,
                    lambda folder: self._write_to(folder, merged=True, is_hand_over=True),
                    settings.output_dir,
                ),
                settings.output_dir,
                total_steps=self.total_steps,
            )
        self.optimizer = component(cfg, "optimizer", list(trainable_parameters(self.policy).values()))
        self._warn_of_rounding()
        self.lr_scheduler = lr_schedule(cfg, self.optimizer, self.total_steps)
        self.activations = training.get_act_offloading_ctx_manager(self.policy, settings.enable_activation_offloading)
        self.held_out = None if held_out is None else HeldOut(held_out, self.objective, self.passes, self.policy)

        self.sums = MetricSums(self.device)
        self.non_finite = NonFinite()
        self.collapse = CollapseWatch(settings.collapse_window) if settings.collapse_window else None
        self.checkpoint = TrainingCheckpoint(
            settings.output_dir,
            self._position(cfg),
            self.policy,
            self.optimizer,
            self.lr_scheduler,
            self.reference,
            keep_last=settings.keep_last_n_checkpoints,
            best_metric=settings.best_checkpoint_metric,
            best_mode=settings.best_checkpoint_mode,
            asynchronous=settings.enable_async_checkpointing,
        )
        self.step = 0
        if self.resume_from:
            self.step, progress = self.checkpoint.load(self.resume_from)
            self._load_progress(progress)
            if self.rank == 0:
                log.info(f"goes on from step {self.step}")
        if isinstance(self.source, OnlineSource) and not self.restarted:
            self.source.set_aside(after=self.step if self.checkpoint.last_saved == self.step else -1)
        # Last, since a logger makes a file or a run of its service. Its packages have been looked for at the start.
        self.metric_logger = component(cfg, "metric_logger") if self.rank == 0 else None
        if self.metric_logger is not None:
            self.metric_logger.log_config(cfg)
            if self.device.type != self.settings.device.split(":")[0]:
                log.warning(f"device: {self.settings.device} is not here; training on the {self.device.type} instead")
            log.info(
                f"{self.source.groups_per_step} groups a step on {self.world_size} "
                f"{'process' if self.world_size == 1 else 'processes'}, {self.total_steps} steps"
            )
            for note in self.source.left_out():
                log.info(note)

    def _check_components(self, cfg: DictConfig) -> None:
        """Finds every component and compares its arguments, before the first of them takes its time."""
        by_position: dict[str, tuple[Any, ...]] = {
            "dataset": (None,),
            "dataset_val": (None,),
            "optimizer": (None,),
            "lr_scheduler": (None,),
        }
        for key in COMPONENTS:
            steps = key == "lr_scheduler" and is_given(cfg, key) and accepts(cfg, key, "num_training_steps")
            by_name = {"num_training_steps": 0} if steps else {}
            check_component(cfg, key, *by_position.get(key, ()), **by_name)

    def _resume_from(self) -> bool | str:
        """What to resume from: what the config says, or after a restart by torchrun what the run itself has left."""
        asked = self.settings.resume_from_checkpoint
        if not gathered(has_checkpoints(self.settings.output_dir))[0]:
            return asked
        if self.restarted:
            return "latest"
        if not asked:
            raise ConfigError(
                f"output_dir: {self.settings.output_dir} has checkpoints of an earlier run; go on with it by "
                "resume_from_checkpoint: latest, or start anew in another folder"
            )
        return asked

    def _position(self, cfg: DictConfig) -> dict[str, Any]:
        """What a step number means in this run."""
        settings = self.settings
        return {
            "groups a step": self.source.groups_per_step,
            "groups a microbatch": settings.batch_size * self.world_size,
            "shuffle": None if isinstance(self.source, OnlineSource) else settings.shuffle,
            "groups": self.source.position() if isinstance(self.source, OnlineSource) else self.source.digest(),
            "max_steps_per_epoch": self.source.steps_per_epoch,
            "seed": settings.seed,
            "reference": type(self.reference).__name__,
            "sync_every": self.reference.sync_every,
            "model": OmegaConf.to_container(cfg.model, resolve=True),
            "sliding windows": self.policy.windows if any(self.policy.windows) else None,
            "loss": self.objective.settings(),
        }

    def _setup_source(self, cfg: DictConfig, tokenizer: Any, shape: TransformerDecoder) -> OfflineSource | OnlineSource:
        """Where the groups come from: a dataset, or the policy itself."""
        settings = self.settings
        steps: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "accumulation": settings.gradient_accumulation_steps,
            "world_size": self.world_size,
            "seed": settings.seed,
            "shuffle": settings.shuffle,
            "max_steps_per_epoch": settings.max_steps_per_epoch,
        }
        if is_given(cfg, "source"):
            source: OnlineSource = component(cfg, "source")
            source.setup(tokenizer, **steps)
            self._check_fit("source.max_new_tokens", GroupDataset([source.longest()]), shape)
            return source
        dataset = self._examples("dataset", component(cfg, "dataset", tokenizer), shape)
        if self.rank == 0 and (warning := self.objective.imbalance_warning(dataset)):
            log.warning(warning)
        return OfflineSource(dataset, **steps)

    def _examples(self, key: str, dataset: GroupDataset, shape: TransformerDecoder) -> GroupDataset:
        """The objective's groups of a dataset."""
        dataset = self._check_fit(f"{key}.max_tokens", dataset, shape)
        if self.rank == 0:
            log.info(f"{key}: {dataset.report()}")
        return dataset

    def _check_fit(self, limit: str, dataset: GroupDataset, shape: TransformerDecoder) -> GroupDataset:
        """The objective's groups of a dataset. One that the model or the row budget cannot take ends the run here."""
        dataset = self.objective.examples(dataset)
        vocabulary = shape.tok_embeddings.num_embeddings
        kl_group = self.objective.longest_kl_group(dataset)
        budget = self.settings.row_budget(self.device)
        for group in [*dataset, kl_group] if kl_group else dataset:
            pack([group] if self.objective.whole_groups else parts(group, budget), budget)
            longest = len(group.prompt) + max(map(len, group.responses)) - 1
            if longest > shape.max_seq_len:
                raise DataError(
                    f"{group.id}: prompt and response take {longest} positions, the model has {shape.max_seq_len} "
                    f"(max_seq_len); lower {limit}"
                )
            largest = max(map(max, (group.prompt, *group.responses)))
            if largest >= vocabulary:
                raise DataError(
                    f"{group.id}: token id {largest} is outside the model's vocabulary of {vocabulary}; encode with "
                    "the model's own tokenizer"
                )
        return dataset

    def _setup_models(self, cfg: DictConfig) -> LogProbDecoder:
        settings = self.settings
        with training.set_default_dtype(DTYPES[settings.dtype]), torch.device("meta"):
            shape = LogProbDecoder(build_decoder(cfg))
        self.checkpointer, weights = read_decoder_weights(cfg, shape)
        if Path(cfg.checkpointer.output_dir).resolve() != Path(settings.output_dir).resolve():
            raise ConfigError(
                f"checkpointer.output_dir: {cfg.checkpointer.output_dir} is not output_dir ({settings.output_dir}); "
                "set it to ${output_dir}"
            )
        self.checkpoint_dtypes = {name: tensor.dtype for name, tensor in weights.items()}
        check_adapter(shape, self.world_size, settings.data_parallel_replicate_dim)
        has_adapter = bool(adapter_modules(shape))
        key = "dtype" if has_adapter else "master_dtype"  # of what the checkpoint's weights are kept in
        if self.rank == 0 and (warning := rounding_on_load(cfg, weights, key, DTYPES[getattr(settings, key)])):
            log.warning(warning)
        hands_over = is_given(cfg, "engine") and cfg.engine.get("weights_dir") is not None
        if has_adapter and settings.export_dtype and settings.save_adapter_weights_only and not hands_over:
            raise ConfigError(
                f"export_dtype: {settings.export_dtype} has nothing to do, since an adapter is written in float32; set "
                "save_adapter_weights_only: False to write merged weights too, or leave it out"
            )
        if has_adapter:
            if settings.adapter:
                weights |= read_adapter(settings.adapter, shape, self.checkpointer)
            else:
                weights |= initial_adapter(shape, weights, settings.seed)
        elif settings.adapter:
            raise ConfigError("adapter: the model has none; name a lora_ or qlora_ builder in model._component_")
        check_same({"checkpointer.checkpoint_dir and adapter": sampled_digest(weights)})
        # FSDP2 on one rank gathers nothing, and torchao's NF4 fails in that; there is nothing to shard either.
        sharded = self.sharded and (self.world_size > 1 or not has_quantized_base(shape))

        def model(state_dict: dict[str, Tensor] | None, **kwargs: Any) -> LogProbDecoder:
            return build_model(
                lambda: build_decoder(cfg),
                state_dict,
                mesh=self.mesh if sharded else None,
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
        context = RunContext(
            new_model=lambda: model(reference_weights, param_dtype=DTYPES[settings.dtype]),
            passes=None if isinstance(self.source, OnlineSource) else self.passes.of_step,
            total_steps=self.total_steps,
            resumes=bool(self.resume_from),
            fingerprint=lambda: fingerprint(weights, cfg.model, f"{settings.dtype} windows {shape.windows}"),
            computation=self._computation(cfg),
        )
        self.reference.setup(policy, context)
        if self.rank == 0:
            log.info(f"Loading the models took {time.perf_counter() - start:.1f} s")
            trained = sum(parameter.numel() for parameter in trainable_parameters(policy).values())
            log.info(f"{trained:,} parameters train")
        return policy

    def _computation(self, cfg: DictConfig) -> str:
        """A digest of what log-probs depend on besides weights, model and tokens."""
        settings, device = self.settings, self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        precision = f"{settings.dtype} {settings.master_dtype} {torch.get_float32_matmul_precision()}"
        facts = f"{code_digest(cfg.model._component_)} {device.type} {name} {precision} compiled {settings.compile}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

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
        self.profiler.start()
        if self.step == 0:
            self.evaluate()  # what the run starts from
        elif self.step % self.source.steps_per_epoch == 0:
            self.save_checkpoint()  # in case that the run died over it
        solved = False
        bar = tqdm(total=self.total_steps, initial=self.step, disable=self.rank != 0, unit="step")
        # Else what is logged stands behind the bar, in its line.
        with bar, logging_redirect_tqdm([log]), StopRequest(getattr(self.source, "stop", lambda: None)) as request:
            while self.step < self.total_steps:
                batch = self._next_batch()
                if batch is None:
                    self._stop(request)
                    break
                self.step += 1
                start = time.perf_counter()
                torch.manual_seed(stream_seed("dropout", settings.seed, self.step, self.rank))
                sums = self._accumulate_gradients(batch)
                grad_norm = float(self._clip_gradients())
                sums.add({"grad_norm": (grad_norm, 1)})
                lr = float(get_lr(self.optimizer))  # of this step: the schedule moves on, in place where it is a tensor
                self.reference.before_optimizer_step(self.step)
                empty = not batch  # its round has nothing to learn from: a step like one that is skipped
                broken, stop = on_any_rank(not (empty or self._is_finite(grad_norm)), request.signal is not None)
                if not broken and not empty:
                    self.optimizer.step()
                    self.sums.merge(sums)
                self._end_step(broken, empty)
                if not empty:
                    self.sums.add({"tokens_per_second": (0, (time.perf_counter() - start) / self.world_size)})

                last = self.step == self.total_steps
                if self.step % settings.log_every_n_steps == 0 or last:
                    self._log({"lr": lr}, bar)
                bar.update()
                evaluated = _every(settings.run_val_every_n_steps, self.step) or last
                held_out = self.evaluate() if evaluated else {}
                # Weights first: a run that dies between the two resumes before the epoch's end and writes them again.
                # One that is to stop resumes at it, and writes them then, unless nothing else is left to do.
                error = None
                if self.step % self.source.steps_per_epoch == 0 and (last or not stop):
                    error = self.save_checkpoint()
                if _every(settings.save_every_n_steps, self.step):
                    self._save_state(held_out.get(settings.best_checkpoint_metric or ""))
                if stop:
                    self._stop(request)
                    break
                if not last and self._is_without_signal():
                    self._end_without_signal(held_out if evaluated else self.evaluate(), error)
                    solved = True
                    break
        self.profiler.stop()
        self.checkpoint.wait()
        if (solved or self.step == self.total_steps) and settings.best_checkpoint_metric:
            self._save_best()

    def _next_batch(self) -> list[list[Group]] | None:
        """The groups of the next step; None if a signal came while they were sampled."""
        try:
            return self.source.batch(self.step + 1)
        except Stopped:
            return None
        except (ConfigError, DataError, TrainingError) as error:
            if self.step > 0:
                self._save_state()
            raise type(error)(f"{error}; {self._left()}") from error

    def _accumulate_gradients(self, batch: list[list[Group]]) -> MetricSums:
        """Forward and backward over the step's microbatches; returns what to log of them."""
        sums = MetricSums(self.device)
        for index, normalizer in enumerate(self.objective.normalizers(batch)):
            kl_passes = self._with_reference(self.passes.kl_share(batch[index]))
            kl = self.objective.kl_baseline(self.policy, kl_passes)
            draw = self._draws(batch[index], index)
            for rows, weight, reference_logps in self._with_reference(self.passes.share(batch[index])):
                with self.activations:
                    policy_logps = log_probs(self.policy, rows)
                loss, metrics = self.objective(policy_logps, reference_logps, rows, draws=draw(rows), kl=kl)
                loss = loss * weight / normalizer  # its part of the loss of the global batch
                (loss * self.world_size).backward()  # FSDP averages gradients over ranks, and this is a sum
                self.non_finite.watch(rows, policy_logps - reference_logps, loss)
                if weight:
                    sums.add(metrics | {"loss": (loss.detach(), 0), "tokens_per_second": (rows.num_tokens, 0)})
        sums.add({"loss": (0, 1 / self.world_size)})
        return sums

    def _with_reference(self, groups: list[Group]) -> Iterator[tuple[Rows, int, Tensor]]:
        for rows, weight in self.passes.over(groups):
            yield rows, weight, self.reference.log_probs(rows)

    def _draws(self, microbatch: list[Group], index: int) -> Callable[[Rows], Tensor | None]:
        """Draws humanline sampling's uniforms for the passes of this rank's share of a global microbatch."""
        if self.objective.loss.perception != "sample":
            return lambda rows: None
        places = self.passes.places(microbatch)
        return lambda rows: uniform_draws(rows, self.settings.seed, self.step, index, places).to(self.device)

    def _clip_gradients(self) -> Tensor:
        limit = self.settings.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), float("inf") if limit is None else float(limit))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # ------------------------------------------------------------------------------------------ faults and what to log

    def _is_finite(self, grad_norm: float) -> bool:
        return math.isfinite(grad_norm) and self.non_finite.loss_is_finite()

    def _end_step(self, broken: bool, empty: bool) -> None:
        """Counts the step, moves the schedule on, and stops a run whose steps are broken one after the other."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.profiler.step()
        culprits = self.non_finite.culprits() if broken else []
        if not empty:
            self.non_finite.count(finite=not broken)
        if not broken:
            return
        if self.rank == 0:
            log.warning(
                f"step {self.step} is skipped: its loss or gradient is not finite; groups: {', '.join(culprits)}"
            )
        if self.non_finite.in_a_row >= self.settings.stop_after_nonfinite_steps:
            self._save_state()
            raise TrainingError(
                f"step {self.step}: the last {self.non_finite.in_a_row} losses or gradients were not finite "
                f"(stop_after_nonfinite_steps); {self._left()}"
            )

    def _is_without_signal(self) -> bool:
        """Whether this step ends the last of too many empty rounds in a row."""
        source = self.source
        if not isinstance(source, OnlineSource) or self.step % source.every:
            return False
        return source.empty_rounds.in_a_row >= self.settings.stop_after_empty_rounds

    def _end_without_signal(self, held_out: dict[str, float], error: str | None) -> None:
        """Ends a run whose rounds have nothing to learn from, with its weights and a checkpoint.

        Args:
            held_out (dict[str, float]): the metrics of ``dataset_val`` at this step.
            error (str | None): why the weights of the epoch that this step ends could not be written.

        Raises:
            TrainingError: unless every response was right, or if the weights cannot be written.
        """
        assert isinstance(self.source, OnlineSource)
        empty = self.source.empty_rounds
        message = (
            f"step {self.step}: the last {empty.in_a_row} rounds were empty (stop_after_empty_rounds): {empty.why()}"
        )
        solved = empty.is_solved
        empty.begin_again()
        self.source.stop()  # what is sampled ahead
        epoch = (self.step - 1) // self.source.steps_per_epoch
        if self.step % self.source.steps_per_epoch:
            error = self._write_weights(f"epoch_{epoch}")
        self._save_state(held_out.get(self.settings.best_checkpoint_metric or ""))
        self.source.wait()
        if error is not None:
            raise TrainingError(f"{message}; the weights could not be written: {error}; {self._left()}")
        message += f"; the weights are in {Path(self.settings.output_dir) / f'epoch_{epoch}'}; {self._left()}"
        if not solved:
            raise TrainingError(message)
        if self.rank == 0:
            log.info(message)

    def _log(self, metrics: dict[str, float], bar: "tqdm[Any]") -> None:
        metrics |= self.sums.means() | self.source.metrics(self.step)
        metrics |= {
            "steps_since_sync": self.step - self.reference.last_sync,
            "skipped_steps": self.non_finite.total,
        }
        if isinstance(self.source, OnlineSource):
            metrics["empty_rounds"] = self.source.empty_rounds.total
        if self.settings.log_peak_memory_stats and self.device.type == "cuda":
            metrics |= training.get_memory_stats(device=self.device)
        self._write_metrics(metrics)
        shown = {
            "loss": "loss",
            "rewards/margins": "margin",
            "rewards/gain": "gain",
            "kl": "kl",
            "unclamped": "unclamped",
            "tokens_per_second": "tok/s",
        }
        bar.set_postfix(
            {label: f"{metrics[name]:.4g}" for name, label in shown.items() if name in metrics}, refresh=False
        )
        self._watch_for_collapse(metrics)

    def _write_metrics(self, metrics: dict[str, float]) -> None:
        """Hands metrics to the logger of rank 0. What a full disk or a lost server keeps it from ends no run."""
        if self.metric_logger is None:
            return
        try:
            self.metric_logger.log_dict(metrics, step=self.step)
        except OSError as error:
            log.error(f"step {self.step}: its metrics could not be logged: {error}; training goes on")

    def _watch_for_collapse(self, metrics: dict[str, float]) -> None:
        signal = "rounds/reward" if isinstance(self.source, OnlineSource) else self.objective.signal
        if self.collapse is None or not {signal, "kl"} <= metrics.keys():
            return
        warning = self.collapse.add(metrics[signal], metrics["kl"])
        if warning is None:
            return
        warning = f"step {self.step}: {signal}: {warning}"
        if self.settings.stop_on_collapse:
            self._save_state()
            raise TrainingError(f"{warning} (stop_on_collapse); {self._left()}")
        if self.rank == 0:
            log.warning(warning)

    def _stop(self, request: StopRequest) -> None:
        """Ends the run as a signal asked for, with a checkpoint of this step."""
        if self.step > 0:
            self._save_state()
        self.checkpoint.wait()
        if isinstance(self.source, OnlineSource):
            self.source.stop()
            self.source.wait()
        if self.checkpoint.last_saved != self.step:
            raise TrainingError(f"step {self.step}: stopped by a signal; {self._left()}")
        if self.rank == 0:
            log.info(f"stopped after step {self.step} by {request.signal or 'a signal'}; {self._left()}")

    def _left(self) -> str:
        """What there is to go on from."""
        self.checkpoint.wait()
        step = self.checkpoint.newest_step()
        return (
            "no checkpoint was written" if step is None else f"resume_from_checkpoint: latest goes on from step {step}"
        )

    # ----------------------------------------------------------------------------------------- evaluation and saving

    def evaluate(self) -> dict[str, float]:
        """Logs the objective's metrics on ``dataset_val`` under ``val/``, with the initial policy as the reference."""
        if self.held_out is None:
            return {}
        means = {f"val/{name}": value for name, value in self.held_out.metrics().items()}
        wanted = self.settings.best_checkpoint_metric
        if wanted and wanted not in means:
            raise ConfigError(f"best_checkpoint_metric: {wanted} is not measured; choose one of {', '.join(means)}")
        self._write_metrics(means)
        return means

    def save_checkpoint(self) -> str | None:
        """Writes the weights of the epoch that this step ends into ``output_dir/epoch_N``.

        A model with an adapter writes it into ``output_dir/epoch_N/adapter``, and the merged weights only if
        ``save_adapter_weights_only`` is False. What cannot be written stops the run only at its end.

        Returns:
            str | None: why they could not be written; None if they were.
        """
        epoch = self.step // self.source.steps_per_epoch - 1
        error = self._write_weights(f"epoch_{epoch}")
        if error is None:
            return None
        message = f"step {self.step}: the weights of epoch {epoch} could not be written: {error}"
        if self.step < self.total_steps:
            if self.rank == 0:
                log.error(f"{message}; training goes on")
            return error
        self._save_state()
        raise TrainingError(f"{message}; {self._left()}")

    def _write_weights(self, name: str) -> str | None:
        merged = not self.settings.save_adapter_weights_only
        return self._write_to(Path(self.settings.output_dir) / name, merged)

    def _write_to(self, folder: Path, merged: bool, is_hand_over: bool = False) -> str | None:
        chosen = self.settings.export_dtype
        return write_weights(
            folder,
            self.policy,
            self.checkpointer,
            checkpoint_dtypes=self.checkpoint_dtypes,
            export_dtype=DTYPES[chosen] if chosen else None,
            merged=merged,
            is_hand_over=is_hand_over,
        )

    def _save_best(self) -> None:
        """Writes the weights of the best checkpoint into ``output_dir/best``. The policy is theirs from then on."""
        step = self.checkpoint.load_best()
        if step is None:
            return
        error = self._write_weights("best")
        if error is not None:
            raise TrainingError(f"the weights of the best step, {step}, could not be written: {error}; {self._left()}")
        if self.rank == 0:
            log.info(f"best: the weights of step {step}, by {self.settings.best_checkpoint_metric}")

    def _save_state(self, score: float | None = None) -> None:
        progress = {"metrics": self.sums.state_dict(), "non_finite": self.non_finite.state_dict()}
        if self.collapse is not None:
            progress["collapse"] = self.collapse.state_dict()
        if isinstance(self.source, OnlineSource):
            progress["source"] = self.source.state_dict()
        self.checkpoint.save(self.step, progress, score)

    def _load_progress(self, progress: dict[str, Any]) -> None:
        self.sums.load_state_dict(progress["metrics"])
        self.non_finite.load_state_dict(progress["non_finite"])
        if self.collapse is not None:
            self.collapse.load_state_dict(progress.get("collapse", []))
        if isinstance(self.source, OnlineSource):
            self.source.load_state_dict(progress["source"])
            self.source.empty_rounds.may_go_on(self.settings.stop_after_empty_rounds)

    def cleanup(self) -> None:
        """Ends what a run holds open, however it ended."""
        if hasattr(self, "checkpoint"):
            self.checkpoint.wait()
        if (logger := getattr(self, "metric_logger", None)) is not None:
            try:
                logger.close()
            except OSError as error:  # as on a full disk, which has been said of each step
                log.error(f"metric_logger: could not be closed: {error}")


def run(recipe_type: type[HumanlineRecipe], cfg: DictConfig, script: str) -> None:
    """Runs a recipe on every visible device; a mistake in config or data ends it with one line instead of a traceback.

    Args:
        recipe_type (type[HumanlineRecipe]): the recipe.
        cfg (DictConfig): its config.
        script (str): the recipe's file, which further processes run.
    """
    with common_end(os.path.basename(script)):
        hide_known_warnings()
        settings = Settings.from_config(cfg)
        if recipe_type.sharded:
            start_on_every_device(settings.device, script)
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("nproc_per_node: this recipe is for one device; run the _distributed one on several")
        elif settings.data_parallel_replicate_dim > 1:
            raise ConfigError(
                "data_parallel_replicate_dim: this recipe has one device to put the model on; set it to 1"
            )
        with (
            process_group(settings.torch_device),
            sole_use(settings.output_dir, settings.resume_from_checkpoint) as folder,
        ):
            recipe = recipe_type(cfg, folder.restarted)
            try:
                recipe.setup(cfg)
                folder.accept()
                recipe.train()
            finally:
                recipe.cleanup()


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
