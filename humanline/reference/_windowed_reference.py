import os
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune import utils

from humanline.data import Group, Rows
from humanline.distributed import on_any_rank
from humanline.errors import ConfigError, TrainingError
from humanline.models import fixed_log_probs
from humanline.progress import Progress
from humanline.reference._reference import Reference, Strategy
from humanline.reference._run_context import RunContext

log = utils.get_logger("INFO")

SECONDS_BETWEEN_WRITES = 300.0
_OTHER_RULE = "for syncs at other steps set reference._component_: humanline.reference.ModelReference"


@dataclass(frozen=True)
class WindowedReference(Strategy):
    """The reference without a second model: at a sync the policy *is* the reference, so its log-probs are stored then.

    At a sync the policy computes, without gradient and in evaluation mode, the log-probs of all responses up to the
    next sync. They are kept in host memory, 4 bytes per token. The first window uses the weights that the run starts
    from.

    A response's log-probs depend only on its prompt and itself, so they are stored under a digest of both. Lookups
    therefore work in any order and packing, and nothing is computed twice.

    With ``sync_every: null`` the window covers the whole run. It is also cached on disk, under a fingerprint of the
    model and of the code (this package and torchtune), torch, device and precision. Later runs with the same
    fingerprint reuse it, with any data and tokenizer. In bf16 a cached response may differ by rounding, if another run
    packed it into other rows.

    Args:
        sync_every (int | None): optimizer steps between two syncs, at least 1; null never syncs (an ordinary frozen
            reference).
        cache_dir (str | None): folder for the log-probs of frozen references (``sync_every: null``); null uses
            ``$XDG_CACHE_HOME/humanline``, or ``~/.cache/humanline`` if that variable is not set.

    Raises:
        ConfigError: if ``sync_every`` is neither a positive integer nor None.
    """

    cache_dir: str | None = None

    def build(self, context: RunContext) -> "Window":
        """
        Raises:
            ConfigError: if the source samples groups after the sync at which their log-probs would be computed.
        """
        if context.passes is None:
            raise ConfigError(
                "reference._component_: WindowedReference computes log-probs at a sync for all steps up to the next, "
                "but this source samples their groups later; use humanline.reference.ModelReference, or "
                "AdapterReference for a model with an adapter"
            )
        cache = self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "humanline"
        return Window(context, context.passes, self.sync_every, Path(cache).expanduser())


class Window(Reference):
    """The reference of :class:`WindowedReference`, with the first window (or the only one, if it never syncs).

    Args:
        context (RunContext): the run.
        passes (Callable[[int], Iterable[Rows]]): the passes of an optimizer step.
        sync_every (int | None): optimizer steps between two syncs; None never syncs.
        cache_dir (Path): folder for the log-probs of frozen references.
    """

    def __init__(
        self,
        context: RunContext,
        passes: Callable[[int], Iterable[Rows]],
        sync_every: int | None,
        cache_dir: Path,
    ) -> None:
        super().__init__(sync_every)
        self.policy, self.passes, self.total_steps = context.policy, passes, context.total_steps
        self.window: dict[str, Tensor] = {}
        self.fingerprint = ""
        self.until = 0
        if sync_every is None:
            self.fingerprint = context.model.fingerprint()
            self._take_all(cache_dir / f"{self.fingerprint}_{context.model.computation()}")
        elif not context.resumes:
            self.become_policy(0)

    def log_probs(self, rows: Rows) -> Tensor:
        """Returns log-probs of the response tokens under the reference, nats, float32 ``[N]``.

        Raises:
            TrainingError: if a sync came later than ``sync_every`` requires.
        """
        try:
            return torch.cat([self.window[key] for key in _keys(rows.groups)]).to(rows.targets.device)
        except KeyError:
            raise TrainingError(f"reference: its window ends with step {self.until}; {_OTHER_RULE}") from None

    def become_policy(self, step: int) -> None:
        """Computes the window for the steps after this one, up to the next sync."""
        if self.sync_every is None:
            raise TrainingError(f"reference: sync_every: null keeps one window for the whole run; {_OTHER_RULE}")
        self.window.clear()
        self._take(range(step + 1, step + self.sync_every + 1))

    def state_dict(self) -> dict[str, Any]:
        """Returns the window (empty for a frozen reference), the model's fingerprint, and the step of the last sync.

        Every rank returns its own part of the window.
        """
        window = {} if self.sync_every is None else dict(self.window)
        return super().state_dict() | {"window": window, "until": self.until, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the window and the step of the last sync from :meth:`state_dict`.

        Raises:
            ConfigError: if a frozen reference had other weights, or the window ends before this run does.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "resume_from_checkpoint: its frozen reference had other weights than checkpointer and model provide; "
                "point them to the weights that run started from"
            )
        if self.sync_every is not None:
            if state["until"] < min(state["last_sync"] + self.sync_every, self.total_steps):
                raise ConfigError(
                    f"resume_from_checkpoint: its window of reference log-probs ends with step {state['until']}, the "
                    "last step of that run; for more epochs use ModelReference, or start a new run"
                )
            self.window, self.until = dict(state.get("window", {})), state["until"]
        super().load_state_dict(state)

    def _take(self, steps: Iterable[int], known: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Adds the log-probs that the steps need to the window: known ones, or computed with the current policy."""
        for step in steps:
            if step > self.total_steps:
                return
            for rows in self.passes(step):
                keys = list(_keys(rows.groups))
                self.window |= {key: known[key] for key in keys if key in known}
                if on_any_rank(not self.window.keys() >= set(keys))[0]:
                    log_probs = fixed_log_probs(self.policy, rows).cpu()
                    each = log_probs.split(rows.mask.sum(1).tolist())
                    self.window |= {key: mine.clone() for key, mine in zip(keys, each, strict=True)}
            self.until = step

    def _take_all(self, cache: Path) -> None:
        """Fills the window of the whole run from the cache, and writes new log-probs to it every few minutes."""
        known = _read(cache)
        written, start = set(known), time.monotonic()
        steps = range(1, self.total_steps + 1)
        hidden = dist.get_rank() > 0
        bar = Progress(steps, desc="log-probs of the frozen reference", unit="step", disable=hidden, leave=False)
        for step in bar:
            self._take([step], known)
            if step == self.total_steps or time.monotonic() - start > SECONDS_BETWEEN_WRITES:
                _write(cache, {key: log_probs for key, log_probs in self.window.items() if key not in written})
                written, start = written | self.window.keys(), time.monotonic()


def _keys(groups: Sequence[Group]) -> Iterator[str]:
    """Yields for each response of the groups a digest of its prompt and itself."""
    for group in groups:
        prompt = blake2b(len(group.prompt).to_bytes(4, "little"), digest_size=16)
        prompt.update(array("i", group.prompt))
        for response in group.responses:
            key = prompt.copy()
            key.update(array("i", response))
            yield key.hexdigest()


def _read(folder: Path) -> dict[str, Tensor]:
    """Returns all log-probs in a folder; unreadable files are skipped with a warning."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as error:
            log.warning(f"{file}: {error}; its log-probs are recomputed")
    return found


def _write(folder: Path, log_probs: dict[str, Tensor]) -> None:
    """Adds log-probs to a folder. Each write creates a new file, so runs and ranks do not disturb each other."""
    if not log_probs:
        return
    file = folder / uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(log_probs, file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file.with_suffix(".safetensors"))
    except (OSError, SafetensorError) as error:
        log.warning(f"{folder}: {error}; the next run will recompute the reference's log-probs")
