"""Checkpoints of a running training: every rank writes its shards, and a folder only gets its name once it is whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import utils

from humanline.errors import ConfigError
from humanline.reference import Reference
from humanline.training._agreement import first_error, gathered

log = utils.get_logger("INFO")

# The frozen base of an adapter is in the model's own checkpoint.
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
RUN_FILE, CHECKSUMS_FILE = "run.json", "SHA256SUMS"


class TrainingCheckpoint:
    """Reads and writes ``output_dir/checkpoints/step_N``: policy, optimizer, schedule, reference, and where the run is.

    A folder holds the tensors in the format of ``torch.distributed.checkpoint``, which any number of ranks can read;
    ``run.json``, which people can read too; and ``SHA256SUMS``, which ``sha256sum -c`` checks. It is written under
    another name, and renamed when it is whole and on the disk.

    Args:
        output_dir (str): the run's folder.
        position (dict[str, Any]): what a step number means in this run, by name; a run in which it means something
            else cannot continue a checkpoint.
        policy (nn.Module): the policy.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
        reference (Reference): the reference strategy.
        keep_last (int): how many of the newest to keep.
        best_mode (str): ``max`` or ``min``, which score is the best; the checkpoint that has it is kept too.
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
        self.best_mode = best_mode
        self.asynchronous = asynchronous
        # A group of its own, so that what the background sends does not mix with what training sends.
        self.group = dist.new_group(backend="gloo")
        self.background = ThreadPoolExecutor(max_workers=1)
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
        run = {"step": step, "score": score, "position": self.position, "progress": progress}
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        if self.asynchronous:
            saving: Any = dcp.async_save(self._state(), checkpoint_id=partial, process_group=self.group)
            written = getattr(saving, "upload_completion", saving)
            self.pending = self.background.submit(self._complete, partial, run, written.result)
        else:
            state = self._state()
            save = lambda: dcp.save(state, checkpoint_id=partial, process_group=self.group)  # noqa: E731
            self._complete(partial, run, save)

    def wait(self) -> None:
        """Waits for what is being written in the background; ``last_saved`` then tells the last step that was."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _complete(self, partial: Path, run: dict[str, Any], write: Callable[[], Any]) -> None:
        """Writes the tensors and what belongs to them, and gives the folder its name. On failure no rank goes on."""
        sums: dict[str, str] = {}
        error = None
        try:
            write()
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
            free = shutil.disk_usage(self.folder).free / 1e9
            log.error(
                f"the checkpoint of step {run['step']} could not be written: {error} ({free:.3g} GB are free in "
                f"{self.folder}); {newest}, training goes on"
            )

    def _name(self, partial: Path, run: dict[str, Any], sums: dict[str, str]) -> None:
        _write(partial / RUN_FILE, json.dumps(run, indent=2) + "\n")
        sums[RUN_FILE] = _sha256(partial / RUN_FILE)
        _write(partial / CHECKSUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        final = partial.with_suffix("")
        if final.exists():  # of a run that was resumed before it
            final.rename(final.with_suffix(".old"))
        partial.rename(final)
        _sync_to_disk(self.folder)
        self._prune(run["step"])

    def _prune(self, newest: int) -> None:
        """Keeps the newest and the best. Later steps are of a run that was abandoned for an earlier checkpoint."""
        steps = [step for step in self._steps() if step <= newest]
        keep = {*steps[-self.keep_last :], self.best_step()}
        for folder in self.folder.iterdir():
            if folder.name not in {f"step_{step}" for step in keep}:
                shutil.rmtree(folder, ignore_errors=True)

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is there."""
        return max(self._steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the best score among the checkpoints that are there."""
        scores = {}
        for step in self._steps():
            try:
                score = json.loads((self.folder / f"step_{step}" / RUN_FILE).read_text())["score"]
            except (OSError, ValueError):  # damaged
                continue
            if score is not None:
                scores[step] = score if self.best_mode == "max" else -score
        return max(scores, key=scores.__getitem__, default=None)

    # -------------------------------------------------------------------------------------------------------- reading

    def load(self, which: bool | str) -> tuple[int, dict[str, Any]]:
        """Restores everything from the newest whole checkpoint (True or ``latest``) or from the folder named.

        Returns:
            tuple[int, dict[str, Any]]: its step, and the progress that was saved with it.

        Raises:
            ConfigError: if there is none, or it is damaged, or of a run with other data or another batch.
        """
        path = self._newest() if which is True or which == "latest" else Path(str(which))
        if (damage := self._damage(path)) is not None:
            raise ConfigError(f"resume_from_checkpoint: {path}{damage}; name another one, or latest")
        run = json.loads((path / RUN_FILE).read_text())
        for key, here in self.position.items():
            if run["position"].get(key) != here:
                raise ConfigError(
                    f"resume_from_checkpoint: {path} was written with {key} {run['position'].get(key)}, this run has "
                    f"{here}; that is another run, so set it back or start anew"
                )
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
        if self.lr_scheduler is not None:
            functions = {"lr_lambdas": [None] * len(self.optimizer.param_groups)}
            self.lr_scheduler.load_state_dict(state["lr_scheduler"] | functions)
        return run["step"], run["progress"]

    def load_policy(self, step: int) -> None:
        """Gives the policy the weights of the checkpoint of ``step``."""
        policy = self._state()["policy"]
        dcp.load({"policy": policy}, checkpoint_id=self.folder / f"step_{step}")
        set_model_state_dict(self.policy, policy, options=ONLY_TRAINED)

    def _newest(self) -> Path:
        """The newest checkpoint that is whole."""
        for step in reversed(self._steps()):
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
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=ONLY_TRAINED)
        state = {"policy": policy, "optimizer": optimizer, "reference": self.reference.state_dict()}
        if self.lr_scheduler is not None:
            # Its function of the step belongs to the config, not to the checkpoint.
            state["lr_scheduler"] = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        return state

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())


def has_checkpoints(output_dir: str) -> bool:
    """Whether a run left any checkpoint in its folder."""
    return any(path.name.removeprefix("step_").isdigit() for path in (Path(output_dir) / "checkpoints").glob("step_*"))


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


def _write(path: Path, text: str) -> None:
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
