import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from humanline.errors import ConfigError, TrainingError
from humanline.training._agreement import gathered


class HandOver:
    """Gives an engine outside of this process the policy of each round, as a Hugging Face folder.

    An engine in this process, which has no ``weights_dir``, needs none.

    Args:
        engine (Any): the engine.
        write (Callable[[Path], str | None]): writes the policy into a folder; a collective, which returns its error.
        output_dir (str): the run's folder. A note in it tells which folders there are, so that the next round's
            process removes them even if it is another one.
    """

    def __init__(self, engine: Any, write: Callable[[Path], str | None], output_dir: str) -> None:
        self.engine = engine
        self.where = getattr(engine, "weights_dir", None)
        self.write = write
        self.note = Path(output_dir) / "rounds" / "weights"
        # Where the ranks wait for one that waits for its server.
        self.ranks = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def __call__(self, round: int) -> None:
        """Writes the weights of a round, and has the engine load them; those of the round before go.

        Raises:
            TrainingError: if they cannot be written.
            ConfigError: if the engine refuses them.
        """
        if self.where is None:
            return
        # Servers remember what they have loaded by its path, beyond the end of a run.
        name = [f"round_{round}_{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name)
        folder = Path(self.where) / name[0]
        if dist.get_rank() == 0:
            with suppress(OSError):
                self._take_note(folder)
        error = self.write(folder)
        if error is not None:
            raise TrainingError(f"the weights of round {round} could not be written: {error}")
        for announces in (True, False):  # rank 0 announces them; the others then only look
            refusal: Exception | None = None
            if (dist.get_rank() == 0) == announces:
                try:
                    self.engine.update(folder, announce=announces)
                except (ConfigError, TrainingError) as failure:
                    refusal = failure
            for each in gathered(refusal, self.ranks):
                if each is not None:
                    raise each
        if dist.get_rank() == 0:
            with suppress(OSError):
                self._keep_only(folder)

    def _take_note(self, folder: Path) -> None:
        self.note.parent.mkdir(parents=True, exist_ok=True)
        with open(self.note, "a") as lines:
            lines.write(f"{folder.resolve()}\n")

    def _keep_only(self, folder: Path) -> None:
        for other in self.note.read_text().splitlines():
            if other != str(folder.resolve()):
                shutil.rmtree(other, ignore_errors=True)
        self.note.write_text(f"{folder.resolve()}\n")
