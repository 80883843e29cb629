"""Hides log lines of other packages that tell a user nothing. Each entry matches one message.

The filters must exist before those packages log, so ``humanline`` imports this module first.
"""

import functools
import logging
import warnings

_NOISE = (
    # torchao's compiled kernels need another torch version. Nothing here uses them.
    ("torchao", "Skipping import of cpp extensions due to incompatible torch version"),
    ("torchao", "Failed to load "),
    ("torch.utils._pytree", "is an Enum subclass and is now natively supported"),
    # torchrun sets one thread per process by default and prints four lines about it at each start.
    ("torch.distributed.run", "Setting OMP_NUM_THREADS environment variable for each process"),
    # A process that exits with code 1 has printed its error. torchrun then stops the others.
    ("torch.distributed.elastic.multiprocessing.api", "failed (exitcode: 1)"),
    ("torch.distributed.elastic.multiprocessing.api", "closing signal SIGTERM"),
)


def hide_noise() -> None:
    """Hides the lines above and no other lines of their loggers, and tqdm's wish for a package in notebooks."""
    warnings.filterwarnings("ignore", message="IProgress not found")
    for name, words in _NOISE:
        logging.getLogger(name).addFilter(functools.partial(_is_news, words))


def _is_news(noise: str, record: logging.LogRecord) -> bool:
    return noise not in record.getMessage()
