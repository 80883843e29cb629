"""What a run leaves on disk: checkpoints to resume from, and weights to use."""

from typing import Any

from torchtune import utils

from humanline.checkpoint import TrainingCheckpoint, WeightsOut
from humanline.config import Settings
from humanline.errors import TrainingError

log = utils.get_logger("INFO")


class Saves:
    """Writes checkpoints and weights, and says in every error what there is to resume from.

    Args:
        settings (Settings): the config's top-level keys.
        checkpoint (TrainingCheckpoint): reads and writes ``output_dir/checkpoints``.
        weights_out (WeightsOut): writes ``output_dir/epoch_N`` and ``output_dir/best``.
        rank (int): rank 0 logs.
        steps_per_epoch (int): optimizer steps of an epoch.
        total_steps (int): optimizer steps of the run.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: TrainingCheckpoint,
        weights_out: WeightsOut,
        *,
        rank: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.settings, self.checkpoint, self.weights_out = settings, checkpoint, weights_out
        self.rank, self.steps_per_epoch, self.total_steps = rank, steps_per_epoch, total_steps

    def state(self, step: int, progress: dict[str, Any], held_out: dict[str, float]) -> None:
        """Writes a checkpoint, if there is none of this step.

        Args:
            step (int): optimizer step.
            progress (dict[str, Any]): what the run's objects want back.
            held_out (dict[str, float]): the metrics of ``dataset_val`` at this step, by which the best is chosen.
        """
        self.checkpoint.save(step, progress, held_out.get(self.settings.best_checkpoint_metric or ""))

    def epoch(self, step: int) -> str | None:
        """Writes the weights of the epoch that a step is in, or ends, into ``output_dir/epoch_N``.

        Returns:
            str | None: why they could not be written.
        """
        epoch = (step - 1) // self.steps_per_epoch
        error = self.weights_out.write(f"epoch_{epoch}")
        return error and f"the weights of epoch {epoch} could not be written: {error}"

    def best(self) -> None:
        """Writes the weights of the best checkpoint into ``output_dir/best``. The policy is theirs from then on.

        Raises:
            TrainingError: if they cannot be written.
        """
        step = self.checkpoint.load_best() if self.settings.best_checkpoint_metric else None
        if step is None:
            return
        error = self.weights_out.write("best")
        if error is not None:
            raise TrainingError(f"the weights of the best step, {step}, could not be written: {error}; {self.left()}")
        if self.rank == 0:
            log.info(f"best: the weights of step {step}, by {self.settings.best_checkpoint_metric}")

    def left(self) -> str:
        """What there is to resume from."""
        self.checkpoint.wait()
        step = self.checkpoint.newest_step()
        return (
            "no checkpoint was written" if step is None else f"resume_from_checkpoint: latest goes on from step {step}"
        )
