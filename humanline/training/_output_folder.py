import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from humanline.errors import ConfigError
from humanline.training._agreement import first_error


@contextmanager
def sole_use(output_dir: str) -> Iterator[None]:
    """Holds a run's folder for this run. The lock goes with the process, however that ends.

    Raises:
        ConfigError: on all ranks, if another run holds it, or it cannot be written to.
    """
    folder = Path(output_dir)
    with ExitStack() as held:
        error = None
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                error = _lock(held.enter_context(open(folder / ".lock", "a+")))
            except OSError as failure:
                error = f"cannot be written to: {failure}"
        if (error := first_error(error)) is not None:
            raise ConfigError(f"output_dir: {folder} {error}")
        yield


def _lock(file: TextIO) -> str | None:
    """Locks the file and writes this process's number into it; returns what prevents that."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return f"is in use by another run (process {file.read().strip()}); give each run a folder of its own"
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return None
