import functools
import shutil
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from humanline.checkpoint import WeightsOut
from humanline.distributed import together
from humanline.errors import TrainingError
from humanline.rollout import Engine


class HandOver:
    """Hands each round's policy to an engine outside this process, as a Hugging Face folder.

    An engine without ``weights_dir``, such as one in this process, needs no folder.

    Args:
        engine (Engine): the engine.
        weights_out (WeightsOut): writes the policy.
        output_dir (str): the run's folder. A note in it lists the folders written, so that a restarted run can remove
            them.
    """

    def __init__(self, engine: Engine, weights_out: WeightsOut, output_dir: str) -> None:
        self.engine = engine
        self.where = engine.weights_dir
        self.weights_out = weights_out
        self.output_dir = Path(output_dir).resolve()
        self.note = self.output_dir / "rounds" / "weights"
        self.folders = self._noted()
        if self.where is not None:  # a rank may wait for its server for a long time
            self.ranks = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def __call__(self, round: int) -> None:
        """Writes the weights of a round, makes the engine load them, and removes the previous round's weights.

        Raises:
            TrainingError: if the weights cannot be written.
            ConfigError: if the engine cannot load them.
        """
        if self.where is None:
            return
        # Servers cache loaded weights by path, even after a run ends.
        name = [f"round_{round}_{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name)
        folder = Path(self.where) / name[0]
        self.folders.append(str(folder.resolve()))
        self._take_note()
        error = self.weights_out.hand_over(folder)
        if error is not None:
            raise TrainingError(f"the weights of round {round} could not be written: {error}")
        for announces in (True, False):  # rank 0 announces them; then the others only check
            mine = (dist.get_rank() == 0) == announces
            together(
                functools.partial(self.engine.update, folder, announce=announces) if mine else _nothing,
                self.ranks,
                task=f"loading the weights of round {round}",
            )
        if dist.get_rank() == 0:
            for other in map(Path, self.folders[:-1]):
                shutil.rmtree(other, ignore_errors=True)
                shutil.rmtree(other.with_name(f"epoch_{other.name}.partial"), ignore_errors=True)  # partly written
        self.folders = self.folders[-1:]
        self._take_note()

    def _noted(self) -> list[str]:
        """Returns the folders that the note lists; none if the note was copied from another run's folder."""
        try:
            whose, *folders = self.note.read_text().splitlines()
        except (OSError, ValueError):
            return []
        return folders if whose == str(self.note) else []

    def _take_note(self) -> None:
        if dist.get_rank() > 0:
            return
        partial = self.note.with_suffix(".partial")
        with suppress(OSError):
            self.note.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("\n".join([str(self.note), *self.folders]) + "\n")
            partial.replace(self.note)


def _nothing() -> None:
    """Does nothing, on ranks whose turn it is not."""
