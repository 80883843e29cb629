import math
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from humanline.errors import ConfigError
from humanline.report._page import page, write_images
from humanline.report._run_log import RunLog, read_runs


def write_report(
    folders: Sequence[Path], output: Path, *, images: Path | None = None, every: float | None = None
) -> None:
    """Writes the report of runs, and prints its address.

    Args:
        folders (Sequence[Path]): the ``output_dir`` of each run, at least one.
        output (Path): the file; a complete one has this name at every moment.
        images (Path | None): folder for each figure as a PNG image; None writes none.
        every (float | None): seconds after which all is written again, until Ctrl-C; None writes once.

    Raises:
        ConfigError: if a folder has no log, an option is out of range, or a file cannot be written.
        DataError: if a run's config or completions cannot be read.
    """
    if every is not None and not 1 <= every < math.inf:
        raise ConfigError(f"--watch: expected seconds of at least 1, got {every:g}")
    if images is not None and find_spec("kaleido") is None:
        raise ConfigError("--png: needs the package kaleido and Chrome or Chromium; pip install kaleido")
    try:
        while True:
            _write(runs := read_runs(folders), output, every)
            if images is not None:
                _draw(runs, images)
            print(output.resolve().as_uri(), flush=True)
            if every is None:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        _write(read_runs(folders), output, None)  # a page that is not read again


def _write(runs: Sequence[RunLog], output: Path, refresh: float | None) -> None:
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page(runs, refresh=refresh), encoding="utf-8", errors="backslashreplace")
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"--output: {error}; name a file that can be written") from error


def _draw(runs: Sequence[RunLog], folder: Path) -> None:
    try:
        count = len(write_images(runs, folder))
    except (OSError, RuntimeError, ValueError) as error:  # kaleido's own, without Chrome
        raise ConfigError(f"--png: {' '.join(str(error).split())[:300]}") from error
    print(f"{count} images in {folder}", flush=True)
