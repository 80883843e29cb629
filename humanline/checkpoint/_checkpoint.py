"""Checkpoints of a running training: every rank writes its shards, and a folder only gets its name once it is whole."""

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

from humanline.distributed import check_same, first_error, gathered
from humanline.errors import ConfigError
from humanline.optim import replay
from humanline.reference import Reference

log = utils.get_logger("INFO")

# The frozen base of an adapter is in the model's own checkpoint.
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
RUN_FILE, CHECKSUMS_FILE = "run.json", "SHA256SUMS"


class TrainingCheckpoint:
    """Reads and writes ``output_dir/checkpoints/step_N``: policy, optimizer, reference, and where the run is.

    The schedule of the learning rate is not in it: the config and the step say where it stands.

    A folder holds the tensors in the format of ``torch.distributed.checkpoint``, which any number of ranks can read;
    ``run.json``, which people can read too; and ``SHA256SUMS``, which ``sha256sum -c`` checks. It is written under
    another name, and renamed when it is whole and on the disk.

    Args:
        output_dir (str): the run's folder.
        position (dict[str, Any]): what a step number means in this run, by name; a run in which it means something
            else cannot continue a checkpoint.
        policy (nn.Module): the policy.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule, a function of the step, which needs no state.
        reference (Reference): the reference strategy.
        keep_last (int): how many of the newest to keep.
        best_metric (str | None): what a score is of; the checkpoint with the best one is kept too.
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
        # A group of its own, so that what the background sends does not mix with what training sends.
        self.group = dist.new_group(backend="gloo")
        # A thread has a current device of its own, which would be the first for every rank.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        on_device = None if device is None else functools.partial(torch.cuda.set_device, device)
        self.background = ThreadPoolExecutor(max_workers=1, initializer=on_device)
        self.pending: Future[None] | None = None
        self.last_saved: int | None = None

    # -------------------------------------------------------------------------------------------------------- writing

    def save(self, step: int, progress: dict[str, Any], score: float | None = None) -> None:
        """Writes ``step_N``. If that fails, says so, and the checkpoints before it stay as they are.

        Args:
            step (int): optimizer step.
            progress (dict[str, Any]): what else a resumed run wants back; what JSON can hold.
            score (float | None): by what the best checkpoint is chosen; None if the step was not evaluated.
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
        """A copy in host memory; None, from then on, where the state has what torch cannot copy."""
        copied = error = None
        try:
            copied = BlockingAsyncStager().stage(state)
        except Exception as failure:
            error = _reason(failure)
        if (error := first_error(error, self.group)) is not None:
            self.asynchronous = False
            if dist.get_rank() == 0:
                log.warning(
                    f"enable_async_checkpointing: this run's state cannot be copied ({error}); it is written directly"
                )
            return None
        return copied

    def wait(self) -> None:
        """Waits for what is being written in the background; ``last_saved`` then tells the last step that was."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _write(self, partial: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
        """Writes the tensors and what belongs to them, and gives the folder its name, on all ranks or on none."""
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
            newest = f"step_{steps[-1]} stays the last one" if (steps := self._steps()) else "there is none yet"
            free = shutil.disk_usage(self.folder.parent).free / 1e9
            log.error(
                f"the checkpoint of step {run['step']} could not be written: {error} ({free:.3g} GB are free in "
                f"{self.folder.parent}); {newest}, training goes on"
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
        """Keeps the newest and the best, and nothing that is half written."""
        steps = self._steps()
        keep = {*steps[-self.keep_last :], *self._best_first()[:1]}
        for step in set(steps) - keep:  # renamed first, so that a kill leaves none half removed under its name
            with suppress(OSError):
                (self.folder / f"step_{step}").rename(self.folder / f"step_{step}.partial")
        for partial in self.folder.glob("step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is there."""
        return max(self._steps(), default=None)

    def _best_first(self) -> list[int]:
        """The steps that have a score of this run's metric, the best first."""
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
        """Restores everything from the newest whole checkpoint (True or ``latest``) or from the folder named.

        Returns:
            tuple[int, dict[str, Any]]: its step, and the progress that was saved with it.

        Raises:
            ConfigError: if there is none, or it is damaged, or of a run with other data or another batch.
        """
        path = self._newest() if which is True or which == "latest" else Path(str(which))
        ours = path.resolve().parent == self.folder.resolve()
        if not ours and gathered(self._steps(), self.group)[0]:
            raise ConfigError(
                f"resume_from_checkpoint: {path} is of another folder, and output_dir has checkpoints of its own; give "
                "the run that goes on from it an output_dir without any"
            )
        if (damage := self._damage(path)) is not None:
            raise ConfigError(f"resume_from_checkpoint: {path}{damage}; name another one, or latest")
        run = json.loads((path / RUN_FILE).read_text())
        check_same({"resume_from_checkpoint": f"step {run['step']}, checksums {_sha256(path / CHECKSUMS_FILE)[:16]}"})
        for key, here in self.position.items():
            if run["position"].get(key) != here:
                raise ConfigError(
                    f"resume_from_checkpoint: {path} was written with {key} {run['position'].get(key)}, this run has "
                    f"{here}; that is another run, so set it back or start anew"
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
        # The rate, the betas and so on are the config's, which a resumed run may change.
        for group, here in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(here)
        if self.lr_scheduler is not None:
            replay(self.lr_scheduler, run["step"])
        if ours:
            self._abandon_after(run["step"])
            self.last_saved = run["step"]
        return run["step"], run["progress"]

    def load_best(self) -> int | None:
        """Gives the policy the weights of the best checkpoint that is whole, and returns its step; None if there is
        none."""
        for step in gathered(self._best_first(), self.group)[0]:
            path = self.folder / f"step_{step}"
            if (damage := self._damage(path)) is None:
                policy = get_model_state_dict(self.policy, options=ONLY_TRAINED)
                dcp.load({"policy": policy}, checkpoint_id=path)
                set_model_state_dict(self.policy, policy, options=ONLY_TRAINED)
                return step
            if dist.get_rank() == 0:
                log.warning(f"{path}{damage}; the best one after it is taken")
        return None

    def _abandon_after(self, step: int) -> None:
        """Later checkpoints are not of the run that goes on from ``step``: another name keeps them from it."""
        if dist.get_rank() == 0:
            for later in reversed([other for other in self._steps() if other > step]):
                path = self.folder / f"step_{later}"
                log.warning(f"{path} is not of the run that goes on from step {step}; it is now {path.name}.abandoned")
                replaced = path.with_suffix(".abandoned")
                if replaced.exists():  # renamed first, so that a kill leaves it whole or gone, and never a part of it
                    shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
                    replaced.rename(path.with_suffix(".partial"))
                path.rename(replaced)
                shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
        dist.barrier(self.group)

    def _newest(self) -> Path:
        """The newest checkpoint that is whole."""
        for step in reversed(gathered(self._steps(), self.group)[0]):  # file systems may show ranks other folders
            path = self.folder / f"step_{step}"
            if (damage := self._damage(path)) is None:
                return path
            if dist.get_rank() == 0:
                log.warning(f"{path}{damage}; going back to the checkpoint before it")
        raise ConfigError(
            f"resume_from_checkpoint: there is no whole checkpoint in {self.folder}; set save_every_n_steps to write "
            "some, or resume_from_checkpoint: False to start anew"
        )

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; None if it is whole. The ranks share the reading."""
        return first_error(_damage(path, dist.get_rank(), dist.get_world_size()), self.group)

    def _state(self) -> dict[str, Any]:
        fresh = not self.optimizer.state
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=ONLY_TRAINED)
        if fresh:  # torch has taken a step with zero gradients, to have a state; it must not count
            states: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
            for state in states.values():
                if "step" in state:
                    state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
            self.optimizer.state.clear()
        return {"policy": policy, "optimizer": optimizer, "reference": self.reference.state_dict()}

    def _steps(self) -> list[int]:
        return _steps_in(self.folder)


def has_checkpoints(output_dir: str) -> bool:
    """Whether a run left any checkpoint in its folder."""
    return bool(_steps_in(Path(output_dir) / "checkpoints"))


def _steps_in(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def _damage(path: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with this rank's part of a checkpoint's files."""
    try:
        lines = (path / CHECKSUMS_FILE).read_text().splitlines()
        for digest, name in (line.split("  ", 1) for line in lines[rank::world_size]):
            if _sha256(path / name) != digest:
                return f": {name} is not what was written (its checksum differs)"
    except FileNotFoundError as error:
        return f" is not a whole checkpoint: {error.filename} is missing"
    except (OSError, ValueError) as error:
        return f" is not a whole checkpoint: {error}"
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
    """A line that says what went wrong, on the first rank on which it did."""
    if isinstance(failure, CheckpointException) and failure.failures:
        failure = next(iter(failure.failures.values()))[0]
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def _window(path: Path) -> dict[str, torch.Tensor]:
    """Room for the windowed log-probs that a checkpoint holds: it knows which they are, and the run does not."""
    prefix = "reference.window."
    metadata: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): torch.empty(m.size) for name, m in metadata.items() if name.startswith(prefix)}
