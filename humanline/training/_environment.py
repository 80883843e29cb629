"""The environment of a run: settings, device, ranks and folder, checked before any slow step."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh
from torchtune import training

from humanline._seeds import stream_seed
from humanline.checkpoint import check_checkpoint_folder, has_checkpoints, restore_replaced
from humanline.config import COMPONENTS, Settings, accepts, check_component, is_given, listed, values_of
from humanline.distributed import check_same, gathered
from humanline.errors import ConfigError
from humanline.models import mesh_of
from humanline.training._hub import check_hub


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment of a run.

    Attributes:
        settings (Settings): the config's top-level keys.
        device (torch.device): this rank's device.
        rank (int): this process's rank, from 0 to ``world_size - 1``.
        world_size (int): number of ranks.
        mesh (DeviceMesh | None): ranks to shard over; None for one process with plain tensors.
        restarted (bool): whether torchrun has started this run before; then it resumes automatically.
        temperature (float): divides the logits of all log-probs in training and evaluation.
        resume_from (bool | str): the checkpoint to resume from, in the form of ``resume_from_checkpoint``.
        at_exit (ExitStack): closes what the run holds open, such as its logger; see :meth:`close`.
    """

    settings: Settings
    device: torch.device
    rank: int
    world_size: int
    mesh: DeviceMesh | None
    restarted: bool
    temperature: float
    resume_from: bool | str
    at_exit: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, cfg: DictConfig, *, sharded: bool, restarted: bool) -> "Environment":
        """Returns the environment of this process, which needs a process group. Collective: all ranks call it.

        Args:
            cfg (DictConfig): the whole config.
            sharded (bool): whether to shard over all ranks with FSDP2.
            restarted (bool): whether torchrun has started this run before.

        Raises:
            ConfigError: if a key is invalid, a component is not found or lacks an argument, ranks have different
                configs, the model's files are missing, or ``output_dir`` has another run's checkpoints or weights.
        """
        settings = Settings.from_config(cfg)
        device, rank = settings.torch_device, dist.get_rank()
        training.set_seed(seed=stream_seed("process", settings.seed) % 2**31)  # it adds the rank
        check_same(values_of(cfg))
        _check_components(cfg)
        check_checkpoint_folder(cfg)
        if rank == 0:
            check_hub(settings.push_to_hub)
            restore_replaced(Path(settings.output_dir))
        return cls(
            settings=settings,
            device=device,
            rank=rank,
            world_size=dist.get_world_size(),
            mesh=mesh_of(device, settings.data_parallel_replicate_dim) if sharded else None,
            restarted=restarted,
            temperature=_temperature(cfg, settings),
            resume_from=_resume_from(settings, restarted),
        )

    def close(self) -> None:
        """Closes what the run holds open, however far its set-up came."""
        self.at_exit.close()


def _temperature(cfg: DictConfig, settings: Settings) -> float:
    if settings.temperature is not None:
        return settings.temperature
    of_source = cfg.source.get("temperature") if is_given(cfg, "source") else None
    return (
        of_source if isinstance(of_source, int | float) and of_source > 0 else 1.0
    )  # the source refuses another value


def _check_components(cfg: DictConfig) -> None:
    """Finds every component and compares its arguments with its signature, before any slow step."""
    by_position: dict[str, tuple[Any, ...]] = dict.fromkeys(
        ("dataset", "dataset_val", "optimizer", "lr_scheduler"), (None,)
    )
    for key in COMPONENTS:
        steps = key == "lr_scheduler" and is_given(cfg, key) and accepts(cfg, key, "num_training_steps")
        by_name = {"num_training_steps": 0} if steps else {}
        for part, name in listed(cfg, key) if key == "metric_logger" else [(cfg, key)]:
            check_component(part, name, *by_position.get(key, ()), **by_name)


def _resume_from(settings: Settings, restarted: bool) -> bool | str:
    """Returns the checkpoint to resume from: the config's, or the newest one after a restart by torchrun."""
    asked = settings.resume_from_checkpoint
    checkpoints, weights = gathered(_of_earlier_run(Path(settings.output_dir)))[0]
    if checkpoints and restarted:
        return "latest"
    if checkpoints and not asked:
        raise ConfigError(
            f"output_dir: {settings.output_dir} has checkpoints of an earlier run; continue it with "
            "resume_from_checkpoint: latest, or use another folder"
        )
    if weights and not asked and not restarted:
        raise ConfigError(
            f"output_dir: {settings.output_dir} has logs and weights of an earlier run ({', '.join(weights)}); use "
            "another folder, or remove this one"
        )
    return asked


def _of_earlier_run(folder: Path) -> tuple[bool, list[str]]:
    """Returns whether a run has left checkpoints in the folder, and if it has logs, its folders of weights."""
    logs = any((folder / "logs").glob("*")) or any(folder.glob("*.txt"))
    weights = sorted(each.name for each in folder.glob("epoch_*[0-9]") if each.is_dir()) if logs else []
    return has_checkpoints(str(folder)), weights
