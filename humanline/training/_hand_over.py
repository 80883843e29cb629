import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtune import utils

from humanline.errors import ConfigError, TrainingError
from humanline.training._agreement import gathered

log = utils.get_logger("INFO")


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
        self.output_dir = Path(output_dir).resolve()
        self.note = self.output_dir / "rounds" / "weights"
        self.folders = self._noted()
        if self.where is not None:  # one of them may wait for its server for long
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
        self.folders.append(str(folder.resolve()))
        self._take_note()
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
                except Exception as failure:  # an engine of somebody's own; the other ranks wait for this one
                    log.exception(f"rank {dist.get_rank()}: the engine could not load the weights")
                    reason = " ".join(repr(failure).split())[:300]
                    refusal = TrainingError(
                        f"rank {dist.get_rank()}: the engine could not load the weights of round {round} ({reason})"
                    )
            for each in gathered(refusal, self.ranks):
                if each is not None:
                    raise each
        if dist.get_rank() == 0:
            for other in map(Path, self.folders[:-1]):
                shutil.rmtree(other, ignore_errors=True)
                shutil.rmtree(other.with_name(f"epoch_{other.name}.partial"), ignore_errors=True)  # half written
        self.folders = self.folders[-1:]
        self._take_note()

    def _noted(self) -> list[str]:
        """The folders that the note names; a note that was copied with another run's folder is not for this one."""
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
