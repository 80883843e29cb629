"""Runs a recipe's file, and prints by how much its process has grown at most: measured_run.py RECIPE ARGUMENTS..."""

import runpy
import sys
import threading

import humanline.planning  # noqa: F401, what is imported is not what is measured
import humanline.reference  # noqa: F401


def memory() -> int:
    """Bytes that this process has to itself, files in memory excluded."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    before, peak, done = memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        done.set()
        watcher.join()
        print("grown by", peak - before, flush=True)


if __name__ == "__main__":
    main()
