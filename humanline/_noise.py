"""Lines of other packages that tell a user nothing, each hidden by its own words.

This has to come before the package that prints them, so ``humanline`` itself imports it first.
"""

import functools
import logging

_NOISE = (
    # torchao's compiled kernels are for another torch than ours; nothing here uses them.
    ("torchao", "Skipping import of cpp extensions due to incompatible torch version"),
    ("torchao", "Failed to load "),
    ("torch.utils._pytree", "is an Enum subclass and is now natively supported"),
    # torchrun's default of one thread a process, four lines for each start.
    ("torch.distributed.run", "Setting OMP_NUM_THREADS environment variable for each process"),
    # A process that exits with 1 has said why, and torchrun then stops the others.
    ("torch.distributed.elastic.multiprocessing.api", "failed (exitcode: 1)"),
    ("torch.distributed.elastic.multiprocessing.api", "closing signal SIGTERM"),
)


def hide_noise() -> None:
    """Hides the lines above, and nothing else of what their loggers say."""
    for name, words in _NOISE:
        logging.getLogger(name).addFilter(functools.partial(_is_news, words))


def _is_news(noise: str, record: logging.LogRecord) -> bool:
    return noise not in record.getMessage()
