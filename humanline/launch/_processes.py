"""Process groups: one process a device, started here when no launcher did."""

import functools
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torchtune import training

from humanline.errors import ConfigError

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, torchrun's c10d rendezvous opens a new store at every start; ``tune run --nnodes`` has it set."""


def hide_known_warnings() -> None:
    """Hides what torch says once a process about torchtune's norms: float32 inputs with bfloat16 weights are meant;
    and about a schedule that moves on though the optimizer did not, as at a first step that is skipped."""
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


def start_on_every_device(device: str, script: str) -> None:
    """Replaces this process by one process a visible GPU, each running ``script`` with this process's arguments.

    Does nothing under torchrun, on a machine with fewer than two GPUs, or when ``device`` is not CUDA: then this
    process is the one rank.

    Args:
        device (str): the config's ``device``.
        script (str): path of the recipe file.
    """
    processes = torch.cuda.device_count() if device == "cuda" else 1
    if not training.is_distributed() and processes > 1:
        launch(processes, script, sys.argv[1:])


def launch(processes: int, script: str, arguments: list[str]) -> None:
    """Replaces this process by torchrun with ``processes`` processes of ``script`` on this machine."""
    torchrun = [sys.executable, "-m", "humanline._torchrun", "--standalone", f"--nproc_per_node={processes}"]
    # After a signal torchrun kills what is not done in 30 s: too soon for a step and the checkpoint of a large model.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    print(f"Starting {processes} processes on this machine...", flush=True)
    os.execv(sys.executable, [*torchrun, script, *arguments])


def launch_name(what: str) -> str | None:
    """A name that ``what`` has in all starts by one torchrun, or under one ``--rdzv_id``; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # then the agent, this process's parent, is what stays over restarts
        name = f"{platform.node()} {os.getppid()}"
    return None if name is None else f"{name} {what}"


def check_one_process() -> None:
    """Refuses a start as several ranks, for a recipe that runs in one process.

    Raises:
        ConfigError: under torchrun with more than one process.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ConfigError(f"nproc_per_node: this recipe runs in one process, not in {processes}; leave it out")


@functools.cache
def meeting_place() -> tuple[dist.Store, int, int]:
    """The store in which the ranks of this start meet, this rank, and their number."""
    if not training.is_distributed():
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(rendezvous("env://"))
    if _keeps_its_store():  # and with it the addresses of the processes that are gone
        store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, world_size


def _keeps_its_store() -> bool:
    """Whether the processes meet in a store of torchrun's own, which outlives them, and not in one of rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group: torchrun's ranks, or this process alone.

    NCCL with gloo for host tensors on CUDA, gloo elsewhere.

    Raises:
        ConfigError: on several nodes, if torchrun would restart them into a store with the addresses of lost processes.
    """
    nodes, may_restart = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if nodes > 1 and may_restart and _keeps_its_store():
        raise ConfigError(
            "max_restarts: over several nodes a restart needs torchrun with --rdzv_backend c10d, and "
            f"{NEW_STORE}=1 in its environment on each of them"
        )
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    alone = not training.is_distributed()
    store, rank, world_size = (dist.HashStore(), 0, 1) if alone else meeting_place()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        # A rank that fails leaves the group open: the others must learn why before they miss it.
        if alone or ended_well:
            dist.destroy_process_group()
