"""Excludes imported modules from garbage collection."""

import gc


def spare_imports() -> None:
    """Excludes all objects that exist now from later collections. Does so once per process, after the imports.

    torch and its dependencies leave about 400,000 objects, and a full collection visits each. torchtune collects at
    every read of a checkpoint, and Python collects at exit. Together that was a quarter of the CPU time of a short run.
    """
    if not gc.get_freeze_count():
        gc.freeze()
