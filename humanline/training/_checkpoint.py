"""Checkpoints of a running training: every rank writes its shards, and a folder only gets its name once it is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from humanline.errors import ConfigError
from humanline.reference import Reference

# The frozen base of an adapter is in the model's own checkpoint.
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class TrainingCheckpoint:
    """Reads and writes ``output_dir/checkpoints/step_N``: policy, optimizer, schedule, reference and step.

    Args:
        output_dir (str): the run's folder.
        position (dict[str, Any]): what a step number means in this run, by name; a run in which it means something
            else cannot continue a checkpoint.
        policy (nn.Module): the policy.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
        reference (Reference): the reference strategy.
    """

    def __init__(
        self,
        output_dir: str,
        position: dict[str, Any],
        policy: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        reference: Reference,
    ) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self.position = position
        self.policy = policy
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.reference = reference

    def save(self, step: int) -> Path:
        """Writes ``step_N`` beside its name, renames it when all ranks are done, and removes every other one."""
        final = self.folder / f"step_{step}"
        partial = self.folder / f"step_{step}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        dcp.save(self._state(step), checkpoint_id=partial)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for other in self._steps():
                if other != step:  # a larger number is of an earlier run, and must not be taken for the latest
                    shutil.rmtree(self.folder / f"step_{other}")
        dist.barrier()
        return final

    def load(self, which: bool | str) -> int:
        """Restores everything from the newest checkpoint (True or ``latest``) or from the folder named, and returns its
        step.

        Raises:
            ConfigError: if there is none there, or it is of a run with other data or another batch.
        """
        if which is True or which == "latest":
            steps = self._steps()
            if not steps:
                raise ConfigError(
                    f"resume_from_checkpoint: there is no checkpoint in {self.folder}; set save_every_n_steps to write "
                    "some, or resume_from_checkpoint: False to start anew"
                )
            path = self.folder / f"step_{steps[-1]}"
        else:
            path = Path(str(which))
        if not (path / ".metadata").is_file():
            raise ConfigError(f"resume_from_checkpoint: {path} is not a checkpoint folder (a folder named step_N)")
        state = self._state(0)
        state["reference"] |= {"window": _window(path)}
        dcp.load(state, checkpoint_id=path)
        position = json.loads(state["position"])
        for key, here in self.position.items():
            if position.get(key) != here:
                raise ConfigError(
                    f"resume_from_checkpoint: {path} was written with {key} {position.get(key)}, this run has "
                    f"{here}; that is another run, so set it back or start anew"
                )
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["policy"],
            optim_state_dict=state["optimizer"],
            options=ONLY_TRAINED,
        )
        self.reference.load_state_dict(state["reference"])
        if self.lr_scheduler is not None:
            functions = {"lr_lambdas": [None] * len(self.optimizer.param_groups)}
            self.lr_scheduler.load_state_dict(state["lr_scheduler"] | functions)
        return int(state["step"])

    def _state(self, step: int) -> dict[str, Any]:
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=ONLY_TRAINED)
        state = {
            "policy": policy,
            "optimizer": optimizer,
            "reference": self.reference.state_dict(),
            "position": json.dumps(self.position),
            "step": step,
        }
        if self.lr_scheduler is not None:
            # Its function of the step belongs to the config, not to the checkpoint.
            state["lr_scheduler"] = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        return state

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())


def _window(path: Path) -> dict[str, torch.Tensor]:
    """Room for the windowed log-probs that a checkpoint holds; it knows which they are, and the run does not."""
    prefix = "reference.window."
    metadata: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): torch.empty(m.size) for name, m in metadata.items() if name.startswith(prefix)}
