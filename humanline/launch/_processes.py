"""Process groups: one process per device, started here if no launcher started them."""

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
"""If this is 1, torchrun's c10d rendezvous opens a new store at every start. ``tune run --nnodes`` sets it."""


def hide_known_warnings() -> None:
    """Hides two warnings of torch about intended behaviour.

    torchtune's norms get float32 inputs with bfloat16 weights. A schedule steps although the optimizer did not, for
    example when the first step is skipped.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


def start_on_every_device(device: str, script: str) -> None:
    """Replaces this process by one process per visible GPU, each running ``script`` with this process's arguments.

    Does nothing under torchrun, on a machine with fewer than two GPUs, or if ``device`` is not ``cuda``.

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
    # By default torchrun kills processes 30 s after a signal. A step and a checkpoint of a large model need longer.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    print(f"Starting {processes} processes on this machine...", flush=True)
    os.execv(sys.executable, [*torchrun, script, *arguments])


def launch_name(what: str) -> str | None:
    """Returns a name for ``what`` that is the same in all starts by one torchrun, or with one ``--rdzv_id``.

    Returns None without torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # the agent, this process's parent, stays the same over restarts
        name = f"{platform.node()} {os.getppid()}"
    return None if name is None else f"{name} {what}"


def check_one_process() -> None:
    """Checks that a recipe for one process is not started as several ranks.

    Raises:
        ConfigError: under torchrun with more than one process.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ConfigError(f"nproc_per_node: expected 1 for this recipe, got {processes} processes; remove the option")


@functools.cache
def meeting_place() -> tuple[dist.Store, int, int]:
    """Returns the store in which the ranks of this start meet, this rank, and the number of ranks."""
    if not training.is_distributed():
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(rendezvous("env://"))
    if _keeps_its_store():  # it still holds the addresses of the processes of earlier starts
        store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, world_size


def _keeps_its_store() -> bool:
    """Returns whether the ranks meet in torchrun's own store, which outlives them, and not in one of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Opens the default process group: torchrun's ranks, or this process alone.

    The backend is NCCL with gloo for host tensors on CUDA, and gloo elsewhere.

    Raises:
        ConfigError: on several nodes, if restarted ranks would get a store with the addresses of lost processes.
    """
    nodes, may_restart = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if nodes > 1 and may_restart and _keeps_its_store():
        raise ConfigError(
            "max_restarts: restarts on several nodes need torchrun's --rdzv_backend c10d and "
            f"{NEW_STORE}=1 in its environment on every node; set both"
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
        # A failed rank leaves the group open: the others must read its error before they lose the connection.
        if alone or ended_well:
            dist.destroy_process_group()
