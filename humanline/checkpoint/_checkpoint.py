"""Training checkpoints: every rank writes its shards, and a folder gets its name only when it is complete."""

import functools
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import utils

from humanline.checkpoint._steps import RUN_FILE, steps_in
from humanline.distributed import check_same, first_error, gathered
from humanline.errors import ConfigError
from humanline.optim import replay
from humanline.reference import Reference

log = utils.get_logger("INFO")

# The frozen base of an adapter is not stored: the model's own checkpoint has it.
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
CHECKSUMS_FILE = "SHA256SUMS"


class TrainingCheckpoint:
    """Reads and writes ``output_dir/checkpoints/step_N``: policy, optimizer, reference, and the run's position.

    The learning-rate schedule is not stored: the config and the step determine it.

    A folder holds the tensors in the format of ``torch.distributed.checkpoint``, which any number of ranks can read;
    ``run.json``, for people; and ``SHA256SUMS``, for ``sha256sum -c``. It is written under another name, and renamed
    when it is complete and on disk.

    Args:
        output_dir (str): the run's folder.
        position (dict[str, Any]): the values, by name, that define what a step number means in this run. A run with
            other values cannot resume the checkpoint.
        policy (nn.Module): the policy.
        optimizer (Optimizer): the policy's optimizer.
        lr_scheduler (LRScheduler | None): the optimizer's schedule, a function of the step without state.
        reference (Reference): the reference strategy.
        keep_last (int): number of newest checkpoints to keep.
        best_metric (str | None): name of the metric that is the score. The checkpoint with the best score is kept too.
        best_mode (str): ``max`` or ``min``, which score is the best.
        asynchronous (bool): write in the background, from a copy on the host.
    """

    def __init__(
        self,
        output_dir: str,
        position: dict[str, Any],
        policy: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        reference: Reference,
        *,
        keep_last: int,
        best_metric: str | None,
        best_mode: str,
        asynchronous: bool,
    ) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self.position = position
        self.policy = policy
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.reference = reference
        self.keep_last = keep_last
        self.best_metric = best_metric
        self.best_mode = best_mode
        self.asynchronous = asynchronous
        # A separate group, so that background messages do not mix with those of training.
        self.group = dist.new_group(backend="gloo")
        # A thread has its own current device. The default would be the first GPU on every rank.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        on_device = None if device is None else functools.partial(torch.cuda.set_device, device)
        self.background = ThreadPoolExecutor(max_workers=1, initializer=on_device)
        self.pending: Future[None] | None = None
        self.last_saved: int | None = None

    # -------------------------------------------------------------------------------------------------------- writing

    def save(self, step: int, progress: dict[str, Any], score: float | None = None) -> None:
        """Writes ``step_N``. If that fails, logs the error and keeps the earlier checkpoints.

        Args:
            step (int): optimizer step.
            progress (dict[str, Any]): other values that a resumed run needs; JSON must be able to hold them.
            score (float | None): the value that selects the best checkpoint; None if the step was not evaluated.
        """
        self.wait()
        if self.last_saved == step:
            return
        partial = self.folder / f"step_{step}.partial"
        score = score if score is not None and math.isfinite(score) else None
        scored = {"metric": self.best_metric, "value": score}
        run = {"step": step, "score": scored, "position": self.position, "progress": progress}
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        state = self._state()
        if self.asynchronous and (copied := self._copied(state)) is not None:
            self.pending = self.background.submit(self._write, partial, run, copied)
        else:
            self._write(partial, run, state)

    def _copied(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a copy in host memory. If torch cannot copy the state, returns None and ends background writing."""
        copied = error = None
        try:
            copied = BlockingAsyncStager().stage(state)
        except Exception as failure:
            error = _reason(failure)
        if (error := first_error(error, self.group)) is not None:
            self.asynchronous = False
            if dist.get_rank() == 0:
                log.warning(
                    f"enable_async_checkpointing: cannot copy this run's state ({error}); training waits for each write"
                )
            return None
        return copied

    def wait(self) -> None:
        """Waits for the write in the background. ``last_saved`` is then the last step that was written."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _write(self, partial: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
        """Writes a checkpoint's files and gives the folder its name, on all ranks or on none."""
        sums: dict[str, str] = {}
        error = None
        try:
            dcp.save(state, checkpoint_id=partial, process_group=self.group)
            own = [*partial.glob(f"__{dist.get_rank()}_*"), *([partial / ".metadata"] if dist.get_rank() == 0 else [])]
            sums = {path.name: _sha256(path) for path in own}
        except (Exception, CheckpointException) as failure:
            error = _reason(failure)
        everyone = gathered((sums, error), self.group)
        error = next((error for _, error in everyone if error), None)
        if dist.get_rank() == 0:
            try:
                if error is None:
                    self._name(partial, run, {name: digest for sums, _ in everyone for name, digest in sums.items()})
                else:
                    shutil.rmtree(partial, ignore_errors=True)
            except OSError as failure:
                error = _reason(failure)
                shutil.rmtree(partial, ignore_errors=True)
        error = first_error(error, self.group)
        if error is None:
            self.last_saved = run["step"]
        elif dist.get_rank() == 0:
            newest = f"step_{steps[-1]} is still the newest" if (steps := self._steps()) else "there is none yet"
            free = shutil.disk_usage(self.folder.parent).free / 1e9
            log.error(
                f"the checkpoint of step {run['step']} could not be written: {error} ({free:.3g} GB are free in "
                f"{self.folder.parent}); {newest}, training continues"
            )

    def _name(self, partial: Path, run: dict[str, Any], sums: dict[str, str]) -> None:
        _write_text(partial / RUN_FILE, json.dumps(run, indent=2) + "\n")
        sums[RUN_FILE] = _sha256(partial / RUN_FILE)
        _write_text(partial / CHECKSUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        _sync_to_disk(partial)
        partial.rename(partial.with_suffix(""))
        _sync_to_disk(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Keeps the newest and the best checkpoints, and removes the others and incomplete ones."""
        steps = self._steps()
        keep = {*steps[-self.keep_last :], *self._best_first()[:1]}
        for step in set(steps) - keep:  # renamed first, so a kill leaves no half-removed folder under this name
            with suppress(OSError):
                (self.folder / f"step_{step}").rename(self.folder / f"step_{step}.partial")
        for partial in self.folder.glob("step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def newest_step(self) -> int | None:
        """Returns the step of the newest checkpoint; None without one."""
        return max(self._steps(), default=None)

    def _best_first(self) -> list[int]:
        """Returns the steps that have a score of this run's metric, the best first."""
        scores = {}
        for step in self._steps():
            try:
                score = json.loads((self.folder / f"step_{step}" / RUN_FILE).read_text())["score"]
            except (OSError, ValueError):  # damaged
                continue
            if score["metric"] == self.best_metric and score["value"] is not None:
                scores[step] = score["value"] if self.best_mode == "max" else -score["value"]
        return sorted(scores, key=scores.__getitem__, reverse=True)

    # -------------------------------------------------------------------------------------------------------- reading

    def load(self, which: bool | str) -> tuple[int, dict[str, Any]]:
        """Restores the run from the newest complete checkpoint (True or ``latest``) or from the given folder.

        Returns:
            tuple[int, dict[str, Any]]: the checkpoint's step and its saved progress.

        Raises:
            ConfigError: if there is no checkpoint, it is damaged, or this run has another position or other tensors.
        """
        path = self._newest() if which is True or which == "latest" else Path(str(which))
        ours = path.resolve().parent == self.folder.resolve()
        if not ours and gathered(self._steps(), self.group)[0]:
            raise ConfigError(
                f"resume_from_checkpoint: {path} is not in output_dir, and output_dir already has checkpoints; set "
                "output_dir to a folder without checkpoints"
            )
        if (damage := self._damage(path)) is not None:
            raise ConfigError(f"resume_from_checkpoint: {path}{damage}; name another checkpoint, or latest")
        run = json.loads((path / RUN_FILE).read_text())
        check_same({"resume_from_checkpoint": f"step {run['step']}, checksums {_sha256(path / CHECKSUMS_FILE)[:16]}"})
        for key, here in self.position.items():
            if run["position"].get(key) != here:
                raise ConfigError(
                    f"resume_from_checkpoint: {path} was written with {key} {run['position'].get(key)}, this run has "
                    f"{here}; restore the old value, or start a new run"
                )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = self._state()
        state["reference"] |= {"window": _window(path)}
        try:
            dcp.load(state, checkpoint_id=path)
        except CheckpointException as error:
            raise ConfigError(f"resume_from_checkpoint: {path} does not fit this run: {_reason(error)}") from error
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["policy"],
            optim_state_dict=state["optimizer"],
            options=ONLY_TRAINED,
        )
        self.reference.load_state_dict(state["reference"])
        # The learning rate, betas and so on come from the config, which a resumed run may change.
        for group, here in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(here)
        if self.lr_scheduler is not None:
            replay(self.lr_scheduler, run["step"])
        if ours:
            self._abandon_after(run["step"])
            self.last_saved = run["step"]
        return run["step"], run["progress"]

    def load_best(self) -> int | None:
        """Loads the weights of the best complete checkpoint into the policy. Returns its step; None without one."""
        for step in gathered(self._best_first(), self.group)[0]:
            path = self.folder / f"step_{step}"
            if (damage := self._damage(path)) is None:
                policy = get_model_state_dict(self.policy, options=ONLY_TRAINED)
                dcp.load({"policy": policy}, checkpoint_id=path)
                set_model_state_dict(self.policy, policy, options=ONLY_TRAINED)
                return step
            if dist.get_rank() == 0:
                log.warning(f"{path}{damage}; using the next best checkpoint")
        return None

    def _abandon_after(self, step: int) -> None:
        """Renames checkpoints later than ``step``: they do not belong to the run that resumes from ``step``."""
        if dist.get_rank() == 0:
            for later in reversed([other for other in self._steps() if other > step]):
                path = self.folder / f"step_{later}"
                log.warning(f"{path}: renamed to {path.name}.abandoned, because the run resumes from step {step}")
                replaced = path.with_suffix(".abandoned")
                if replaced.exists():  # renamed first, so a kill leaves no half-removed folder under this name
                    shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
                    replaced.rename(path.with_suffix(".partial"))
                path.rename(replaced)
                shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
        dist.barrier(self.group)

    def _newest(self) -> Path:
        """Returns the newest complete checkpoint."""
        for step in reversed(gathered(self._steps(), self.group)[0]):  # ranks may see different folders
            path = self.folder / f"step_{step}"
            if (damage := self._damage(path)) is None:
                return path
            if dist.get_rank() == 0:
                log.warning(f"{path}{damage}; going back to the checkpoint before it")
        raise ConfigError(
            f"resume_from_checkpoint: found no complete checkpoint in {self.folder}; set save_every_n_steps to write "
            "checkpoints, or resume_from_checkpoint: False to start from the beginning"
        )

    def _damage(self, path: Path) -> str | None:
        """Returns the damage of a checkpoint; None if it is complete. The ranks share the reading."""
        return first_error(_damage(path, dist.get_rank(), dist.get_world_size()), self.group)

    def _state(self) -> dict[str, Any]:
        fresh = not self.optimizer.state
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=ONLY_TRAINED)
        if fresh:  # torch took a step with zero gradients to create a state; it must not count
            states: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
            for state in states.values():
                if "step" in state:
                    state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
            self.optimizer.state.clear()
        return {"policy": policy, "optimizer": optimizer, "reference": self.reference.state_dict()}

    def _steps(self) -> list[int]:
        return steps_in(self.folder)


def _damage(path: Path, rank: int, world_size: int) -> str | None:
    """Returns the damage in this rank's part of a checkpoint's files; None without damage."""
    try:
        lines = (path / CHECKSUMS_FILE).read_text().splitlines()
        for digest, name in (line.split("  ", 1) for line in lines[rank::world_size]):
            if _sha256(path / name) != digest:
                return f": the checksum of {name} differs from {CHECKSUMS_FILE}"
    except FileNotFoundError as error:
        return f" is not a complete checkpoint: {error.filename} is missing"
    except (OSError, ValueError) as error:
        return f" is not a complete checkpoint: {error}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(failure: BaseException) -> str:
    """Returns an error as one line; for a checkpoint error, that of the first rank that failed."""
    if isinstance(failure, CheckpointException) and failure.failures:
        failure = next(iter(failure.failures.values()))[0]
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def _window(path: Path) -> dict[str, torch.Tensor]:
    """Returns empty tensors for the windowed log-probs of a checkpoint. The run does not know which they are."""
    prefix = "reference.window."
    metadata: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): torch.empty(m.size) for name, m in metadata.items() if name.startswith(prefix)}
