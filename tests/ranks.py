"""Recipes as real processes, without the seconds that importing torch takes: forks of a server that has imported it."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["humanline.training", "humanline.reference", "torchtune.models.llama3"])


class Ranks:
    """A recipe running in ``nproc`` processes, as torchrun would start them; they are killed when the block ends.

    Args:
        script (Path): the recipe's file.
        arguments (list[str]): its arguments.
        nproc (int): processes; a single one runs without a launcher's environment.
        log (Path): file for the output of all of them.
        environment (dict[str, str]): variables to add.
    """

    def __init__(self, script: Path, arguments: list[str], nproc: int, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        environment = {"OMP_NUM_THREADS": "1", **environment}
        if nproc > 1:
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nproc)}
        self.processes = [
            forkserver.Process(target=_rank, args=(str(script), arguments, str(log), environment | _ids(rank, nproc)))
            for rank in range(nproc)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of the ranks, once all have ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"still running after {seconds} s\n{self.output()}"
        return codes

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _ids(rank: int, nproc: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)} if nproc > 1 else {}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def _rank(script: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
