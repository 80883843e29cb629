"""The files that a run writes: checkpoints to resume from, and weights to use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtune import utils

from humanline.checkpoint import TrainingCheckpoint, WeightsOut
from humanline.config import Settings
from humanline.errors import TrainingError
from humanline.training._hub import push_to_hub

log = utils.get_logger("INFO")


class Saves:
    """Writes checkpoints and weights, and tells in error messages which step a run can resume from.

    Args:
        settings (Settings): the config's top-level keys.
        checkpoint (TrainingCheckpoint): reads and writes ``output_dir/checkpoints``.
        weights_out (WeightsOut): writes ``output_dir/epoch_N`` and ``output_dir/best``.
        card (Callable[[int], str]): returns the model card of the weights after a step.
        rank (int): this process's rank; only rank 0 logs.
        steps_per_epoch (int): optimizer steps in an epoch.
        total_steps (int): optimizer steps of the run.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: TrainingCheckpoint,
        weights_out: WeightsOut,
        card: Callable[[int], str],
        *,
        rank: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.settings, self.checkpoint, self.weights_out, self.card = settings, checkpoint, weights_out, card
        self.rank, self.steps_per_epoch, self.total_steps = rank, steps_per_epoch, total_steps

    def state(self, step: int, progress: dict[str, Any], held_out: dict[str, float]) -> None:
        """Writes a checkpoint, unless this step has one.

        Args:
            step (int): optimizer step.
            progress (dict[str, Any]): the state of the run's objects.
            held_out (dict[str, float]): the metrics of ``dataset_val`` at this step; they decide which checkpoint is
                the best.
        """
        self.checkpoint.save(step, progress, held_out.get(self.settings.best_checkpoint_metric or ""))

    def epoch(self, step: int) -> str | None:
        """Writes the weights of a step's epoch into ``output_dir/epoch_N``.

        Returns:
            str | None: why they could not be written; None if they were.
        """
        epoch = (step - 1) // self.steps_per_epoch
        error = self.weights_out.write(f"epoch_{epoch}", self._card(step))
        return error and f"the weights of epoch {epoch} could not be written: {error}"

    def finish(self, step: int) -> None:
        """Writes the weights of the best checkpoint and uploads the final weights, if these are wanted.

        Beside a log of metrics, which a report reads, the run's own log then says where all this is.

        Args:
            step (int): the last optimizer step.

        Raises:
            TrainingError: if weights cannot be written. An upload that fails is logged.
        """
        name = "best" if self._best() else f"epoch_{(step - 1) // self.steps_per_epoch}"
        if self.rank == 0 and self.settings.push_to_hub is not None:
            folder = Path(self.settings.output_dir) / name
            if not self.weights_out.has_whole_weights:
                folder /= "adapter"
            try:
                log.info(f"uploaded: {push_to_hub(folder, self.settings.push_to_hub, f'{name}, by humanline')}")
            except TrainingError as error:  # the run is complete, and torchrun must not repeat it
                log.error(str(error))
        if self.rank == 0 and any((Path(self.settings.output_dir) / "logs").glob("*.txt")):
            log.info(f"done: {self._what_there_is(Path(self.settings.output_dir), name)}")

    def _what_there_is(self, output_dir: Path, name: str) -> str:
        kinds = {"weights": name} if self.weights_out.has_whole_weights else {}
        kinds |= {"adapter": f"{name}/adapter"} if (output_dir / name / "adapter").is_dir() else {}
        places = ", ".join(f"{kind} in {output_dir}/{folder}" for kind, folder in kinds.items())
        return f"{places}; curves: humanline report {output_dir}"

    def _best(self) -> bool:
        """Writes the weights of the best checkpoint into ``output_dir/best``, which the policy then has too.

        Returns whether there is one.
        """
        step = self.checkpoint.load_best() if self.settings.best_checkpoint_metric else None
        if step is None:
            return False
        error = self.weights_out.write("best", self._card(step))
        if error is not None:
            raise TrainingError(f"the weights of the best step, {step}, could not be written: {error}; {self.left()}")
        if self.rank == 0:
            log.info(f"best: the weights of step {step}, by {self.settings.best_checkpoint_metric}")
        return True

    def _card(self, step: int) -> str:
        try:
            return self.card(step)
        except Exception as error:  # of a config that nobody foresaw; the weights count
            log.warning(f"README.md: the model card of step {step} cannot be made ({error})")
            return f"Exported by humanline after optimizer step {step}.\n"

    def left(self) -> str:
        """Returns the end of an error message: the step that a run can resume from."""
        self.checkpoint.wait()
        step = self.checkpoint.newest_step()
        return (
            "no checkpoint was written" if step is None else f"resume_from_checkpoint: latest resumes from step {step}"
        )
