"""Process groups: one process a device, started here when no launcher did."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torchtune import training


def hide_known_warnings() -> None:
    """Hides what torch says once a process about torchtune's norms: float32 inputs with bfloat16 weights are meant."""
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # After a signal torchrun kills what is not done in 30 s: too soon for a step and the checkpoint of a large model.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    print(f"Starting {processes} processes on this machine...", flush=True)
    os.execv(sys.executable, [*torchrun, script, *arguments])


def restarted() -> bool:
    """Whether torchrun has started these processes anew, after one of them was lost (``--max-restarts``)."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group: torchrun's ranks, or this process alone.

    NCCL with gloo for host tensors on CUDA, gloo elsewhere.
    """
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if training.is_distributed():
        store, rank, world_size = next(rendezvous("env://"))
        # tune's torchrun keeps its store over a restart, and with it the addresses of the processes that are gone.
        store = dist.PrefixStore(f"start_{_restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
