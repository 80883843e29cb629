"""A run: everything around a recipe's loop. The mathematics stays in the recipe's own file."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training, utils
from torchtune.training.lr_schedulers import get_lr

from humanline._seeds import stream_seed
from humanline.checkpoint import TrainingCheckpoint, WeightsOut
from humanline.config import component
from humanline.data import End, Group, Rows, Source
from humanline.distributed import on_any_rank
from humanline.errors import ConfigError, DataError, Stopped, TrainingError
from humanline.models import LogProbDecoder
from humanline.optim import StochasticAdamW
from humanline.reference import Reference
from humanline.rollout import most_repeated
from humanline.training._completions import Completions, table
from humanline.training._data import Data
from humanline.training._environment import Environment
from humanline.training._held_out import HeldOut
from humanline.training._logbook import Logbook
from humanline.training._metrics import Metrics, MetricSums, group_metrics, mismatch_metrics
from humanline.training._model_card import model_card
from humanline.training._non_finite import NonFinite
from humanline.training._position import position_of
from humanline.training._saves import Saves
from humanline.training._stop_request import StopRequest

log = utils.get_logger("INFO")


class Run:
    """Provides the steps of the loop, and does the work around them.

    That is: resuming, the groups of each step, evaluation, checkpoints, weights, logs, signals, and agreement between
    ranks on whether to take a step. The loop is::

        with run:
            for step, batch in run.steps():
                ...  # forward and backward; run.note(...) for each pass
                if run.is_sound(grad_norm):
                    optimizer.step()
                ...
                run.end_step()

    Args:
        cfg (DictConfig): the whole config.
        environment (Environment): the run's environment.
        data (Data): the number of steps.
        source (Source): the groups of each step.
        policy (LogProbDecoder): the model that trains.
        reference (Reference): the reference.
        optimizer (Optimizer): updates the policy's weights.
        lr_scheduler (LRScheduler | None): the schedule of the learning rate; None for a constant rate.
        weights_out (WeightsOut): writes the policy's weights.
        held_out (HeldOut | None): evaluates the policy on ``dataset_val``; None without it.

    Attributes:
        step (int): the last optimizer step, 1-based; 0 before the first.

    Raises:
        ConfigError: if the run cannot resume from the config's checkpoint.
    """

    def __init__(
        self,
        cfg: DictConfig,
        environment: Environment,
        data: Data,
        *,
        source: Source,
        policy: LogProbDecoder,
        reference: Reference,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        weights_out: WeightsOut,
        held_out: HeldOut | None,
    ) -> None:
        settings = self.settings = environment.settings
        self.source, self.reference, self.optimizer, self.held_out = source, reference, optimizer, held_out
        self.device, self.rank, self.world_size = environment.device, environment.rank, environment.world_size
        self._is_sampled = data.is_sampled
        self.steps_per_epoch, self.total_steps = data.steps_per_epoch, data.total_steps
        profiler = component(cfg, "profiler")
        self.profiler = profiler[0] if profiler else training.DummyProfiler()
        self.checkpoint = TrainingCheckpoint(
            settings.output_dir,
            position_of(cfg, environment, data, source, policy, reference),
            policy,
            optimizer,
            lr_scheduler,
            reference,
            keep_last=settings.keep_last_n_checkpoints,
            best_metric=settings.best_checkpoint_metric,
            best_mode=settings.best_checkpoint_mode,
            asynchronous=settings.enable_async_checkpointing,
        )
        environment.at_exit.callback(self.checkpoint.wait)
        self.saves = Saves(
            settings,
            self.checkpoint,
            weights_out,
            lambda step: model_card(cfg, step, self.total_steps, self.logbook.last),
            rank=self.rank,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.non_finite = NonFinite()
        self.step, progress = 0, None
        if environment.resume_from:
            self.step, progress = self.checkpoint.load(environment.resume_from)
            self.non_finite.load_state_dict(progress["non_finite"])
            self.source.load_state_dict(progress.get("source", {}))
            if self.rank == 0:
                log.info(f"resumes from step {self.step}")
        if not environment.restarted:
            self.source.resume(self.step if self.checkpoint.last_saved == self.step else -1)
        self.completions = Completions(environment, data, policy, reference)
        self.logbook = Logbook(cfg, environment, source.score or data.objective.signal, progress)
        environment.at_exit.callback(self.logbook.close)
        self.stop_request = StopRequest(source.stop)
        self._over = self._solved = False
        # Of the step under way:
        self._start, self._sums, self._empty = 0.0, MetricSums(self.device), True
        self._lr, self._broken, self._stops = math.nan, False, False
        if self.rank == 0:
            self._say_what_it_is(data)

    # ------------------------------------------------------------------------------------------------------- the loop

    def __enter__(self) -> "Run":
        self.profiler.start()
        if self.step == 0:
            self.evaluate()  # the initial policy
            self._answer()
        elif self.step % self.steps_per_epoch == 0:
            self._end_epoch()  # the earlier run may have died before this
        self.logbook.show_bar(self.step, self.total_steps)
        self.stop_request.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stop_request.__exit__(kind, *rest)
        self.logbook.close_bar()
        if kind is not None:
            return
        self.profiler.stop()
        self.checkpoint.wait()
        if self._solved or self.step == self.total_steps:
            self.saves.finish(self.step)

    def steps(self) -> Iterator[tuple[int, list[list[Group]]]]:
        """Yields the remaining optimizer steps, each with the microbatches of all ranks' groups.

        A step of an empty round has no groups, and leaves the weights unchanged.

        Raises:
            ConfigError, DataError, TrainingError: if the source fails; a checkpoint is written first.
        """
        while self.step < self.total_steps and not self._over:
            try:
                batch = self.source.batch(self.step + 1)
            except Stopped:
                self._stop()
                return
            except (ConfigError, DataError, TrainingError) as error:
                if self.step > 0:
                    self._save_state()
                raise type(error)(f"{error}; {self.saves.left()}") from error
            self.step += 1
            self._start, self._sums, self._empty = time.perf_counter(), MetricSums(self.device), not batch
            self._sums.add(group_metrics(batch))  # the same on all ranks
            torch.manual_seed(stream_seed("dropout", self.settings.seed, self.step, self.rank))
            yield self.step, batch

    def note(
        self,
        rows: Rows,
        weight: int,
        policy_logps: Tensor,
        reference_logps: Tensor,
        entropy: Tensor,
        loss: Tensor,
        metrics: Metrics,
    ) -> None:
        """Records the metrics of a pass, and any non-finite values in it.

        Args:
            rows (Rows): the pass.
            weight (int): 0 if the pass only matches another rank's pass.
            policy_logps (Tensor): log-probs of its response tokens under the policy, nats, ``[N]``.
            reference_logps (Tensor): the same under the reference, ``[N]``.
            entropy (Tensor): entropy of the policy at these tokens, nats, ``[N]``.
            loss (Tensor): its part of the batch's loss, scalar.
            metrics (Metrics): its metrics, each a sum and a count.
        """
        self.non_finite.watch(rows, policy_logps - reference_logps, loss)
        if weight:
            of_tokens = {"entropy": (entropy.sum(), len(entropy)), **mismatch_metrics(policy_logps, rows)}
            of_pass: Metrics = {"loss": (loss.detach(), 0), "tokens_per_second": (rows.num_tokens, 0)}
            self._sums.add(metrics | of_tokens | of_pass)
            self._sums.log_ratios.add(policy_logps - reference_logps)
            if self._is_sampled:
                self.completions.note(rows, policy_logps - reference_logps)

    def is_sound(self, grad_norm: Tensor) -> bool:
        """Returns whether the step has groups, and finite loss and gradient on all ranks. Collective, once per step.

        Args:
            grad_norm (Tensor): norm of the gradient over all ranks, scalar.
        """
        norm = float(grad_norm)
        self._sums.add({"loss": (0, 1 / self.world_size), "grad_norm": (norm, 1)})
        self._lr = float(get_lr(self.optimizer))  # before the schedule changes it, in place if it is a tensor
        finite = self._empty or (math.isfinite(norm) and self.non_finite.loss_is_finite())
        self._broken, self._stops = on_any_rank(not finite, self.stop_request.signal is not None)
        sound = not self._broken and not self._empty
        if sound:
            self.logbook.sums.merge(self._sums)
        return sound

    def end_step(self) -> None:
        """Logs, evaluates, saves and stops, as the settings require at this step.

        Raises:
            TrainingError: if the run cannot continue; a checkpoint is written first.
        """
        settings, step = self.settings, self.step
        self.profiler.step()
        self._count_non_finite()
        if not self._empty:
            seconds = (time.perf_counter() - self._start) / self.world_size
            self.logbook.sums.add({"tokens_per_second": (0, seconds)})
        last = step == self.total_steps
        if step % settings.log_every_n_steps == 0 or last:
            self._log()
        self.logbook.end_step(last)
        evaluated = last or _every(settings.run_val_every_n_steps, step)
        held_out = self.evaluate() if evaluated else {}
        if last or _every(settings.generate_val_every_n_steps, step):
            self._answer()
        if (ended := self.source.ended_round(step)) is not None:
            self._show(f"round {ended[0]}", self.completions.of_round(*ended))
        end = None if last or self._stops else self.source.end(step, settings.stop_after_empty_rounds)
        if end is not None and not evaluated:
            held_out = self.evaluate()
        # Weights before the checkpoint: a run that dies between them resumes before the epoch's end and rewrites them.
        # A run that must stop writes them when it resumes, unless this is its last step.
        if step % self.steps_per_epoch == 0 and end is None and (last or not self._stops):
            self._end_epoch()
        if _every(settings.save_every_n_steps, step):
            self._save_state(held_out)
        if self._stops:
            self._stop()
        elif end is not None:
            self._end(end, held_out)

    # ---------------------------------------------------------------------------------------------- inside the loop

    def evaluate(self) -> dict[str, float]:
        """Logs the metrics of ``dataset_val`` under ``val/``, with the initial policy as the reference. Collective.

        Raises:
            ConfigError: if ``best_checkpoint_metric`` is not one of them.
        """
        if self.held_out is None:
            return {}
        means = {f"val/{name}": value for name, value in self.held_out.metrics().items()}
        wanted = self.settings.best_checkpoint_metric
        if wanted and wanted not in means:
            raise ConfigError(f"best_checkpoint_metric: expected one of {', '.join(means)}, got {wanted}")
        self.logbook.evaluation(self.step, means)
        return means

    def _answer(self) -> None:
        """Answers the fixed prompts of ``dataset_val``, if ``generate_val_every_n_steps`` is set. Collective."""
        if not self.completions.prompts:
            return
        rows = self.completions.of_held_out(self.step)
        self._show(f"val at step {self.step}", rows)
        if len(rows) > 1:
            repeated = {"val/repeated": most_repeated([[row["completion"]] for row in rows]) / (len(rows) - 1)}
            self.logbook.write(self.step, repeated)
            self._warn(self.logbook.watch(self.step, repeated))

    def _show(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.rank != 0 or not rows:
            return
        self.logbook.completions(self.step, name, rows)
        if shown := rows[: self.settings.log_completions]:
            log.info(f"completions, {name}:\n{table(shown)}")

    def _count_non_finite(self) -> None:
        """Counts the step, and ends the run after too many consecutive steps that are not finite."""
        culprits = self.non_finite.culprits() if self._broken else []
        if not self._empty:
            self.non_finite.count(finite=not self._broken)
        if not self._broken:
            return
        if self.rank == 0:
            log.warning(
                f"step {self.step} is skipped: its loss or gradient is not finite; groups: {', '.join(culprits)}"
            )
        if self.non_finite.in_a_row >= self.settings.stop_after_nonfinite_steps:
            self._save_state()
            raise TrainingError(
                f"step {self.step}: the last {self.non_finite.in_a_row} losses or gradients were not finite "
                f"(stop_after_nonfinite_steps); {self.saves.left()}"
            )

    def _log(self) -> None:
        metrics = {
            "lr": self._lr,
            "steps_since_sync": self.step - self.reference.last_sync,
            "skipped_steps": self.non_finite.total,
        }
        self._warn(self.logbook.entry(self.step, metrics | self.source.metrics(self.step)))

    def _warn(self, warnings: list[str]) -> None:
        """Logs the warnings of a collapse, or ends the run because of them."""
        if warnings and self.settings.stop_on_collapse:
            self._save_state()
            raise TrainingError(f"{'; '.join(warnings)} (stop_on_collapse); {self.saves.left()}")
        for warning in warnings if self.rank == 0 else ():
            log.warning(warning)

    def _stop(self) -> None:
        """Ends the run after a signal, with a checkpoint of this step."""
        self._over = True
        if self.step > 0:
            self._save_state()
        self.checkpoint.wait()
        self.source.stop()
        self.source.wait()
        if self.checkpoint.last_saved != self.step:
            raise TrainingError(f"step {self.step}: stopped by a signal; {self.saves.left()}")
        if self.rank == 0:
            by = self.stop_request.signal or "a signal"
            log.info(f"stopped after step {self.step} by {by}; {self.saves.left()}")

    def _end(self, end: End, held_out: dict[str, float]) -> None:
        """Ends a run whose source has no signal left, with its weights and a checkpoint."""
        self._over, self._solved = True, end.success
        self.source.stop()  # stops sampling of the next round
        error = self.saves.epoch(self.step)
        self._save_state(held_out)
        self.source.wait()
        message = f"step {self.step}: {end.why}"
        if error is not None:
            raise TrainingError(f"{message}; {error}; {self.saves.left()}")
        folder = Path(self.settings.output_dir) / f"epoch_{(self.step - 1) // self.steps_per_epoch}"
        message = f"{message}; the weights are in {folder}; {self.saves.left()}"
        if not end.success:
            raise TrainingError(message)
        if self.rank == 0:
            log.info(message)

    def _end_epoch(self) -> None:
        """Writes the weights of the epoch that this step ends. A failure ends the run only at its last step."""
        if (error := self.saves.epoch(self.step)) is None:
            return
        if self.step == self.total_steps:
            self._save_state()
            raise TrainingError(f"step {self.step}: {error}; {self.saves.left()}")
        if self.rank == 0:
            log.error(f"step {self.step}: {error}; training continues")

    def _save_state(self, held_out: dict[str, float] | None = None) -> None:
        progress = self.logbook.state_dict()
        progress |= {"non_finite": self.non_finite.state_dict(), "source": self.source.state_dict()}
        self.saves.state(self.step, progress, held_out or {})

    def _say_what_it_is(self, data: Data) -> None:
        settings = self.settings
        if settings.master_dtype == "bf16" and not isinstance(self.optimizer, StochasticAdamW):
            log.warning(
                "master_dtype: bf16 rounds most updates away at alignment's learning rates; set optimizer._component_: "
                "humanline.training.StochasticAdamW, or master_dtype: fp32"
            )
        if self.device.type != settings.device.split(":")[0]:
            log.warning(f"device: {settings.device} is not available; training on {self.device.type} instead")
        ranks = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        log.info(f"{self.source.groups_per_step} groups per step on {ranks}, {self.total_steps} steps")
        notes = ["compile: the first step also compiles the layers, which takes a minute or more"] * settings.compile
        for note in notes + data.left_out():
            log.info(note)


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
