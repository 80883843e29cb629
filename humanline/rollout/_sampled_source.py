"""The source of groups that the policy samples in rounds."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtune.utils import get_logger

from humanline._seeds import stream_seed
from humanline.data import End, Group, GroupDataset, Source
from humanline.distributed import together
from humanline.rollout._empty_rounds import EmptyRounds
from humanline.rollout._engine import Engine
from humanline.rollout._reward import Reward
from humanline.rollout._round_file import Round, policy_step, read_round, write_round
from humanline.rollout._round_plan import RoundPlan
from humanline.rollout._round_sampler import Derive, RoundSampler

log = get_logger("INFO")

_MEANS = {
    "rounds/responses": {"rounds/reward", "rounds/truncated", "rounds/response_tokens"},
    "rounds/groups": {"rounds/reward_std"},
    "rounds/others": {"rounds/repeated"},
}
"""By count: the values of which a mean over that count is logged."""


class SampledSource(Source):
    """Samples groups from the policy in rounds; each round serves ``plan.every`` optimizer steps.

    Args:
        plan (RoundPlan): the prompts of each round, and the steps that it serves.
        engine (Engine): samples completions; each rank has its own.
        reward (Reward): scores the responses.
        derive (Derive): converts scored groups into the objective's groups.
        hand_over (Callable[[int], None]): gives the current policy to the engine before a round is sampled; called with
            the round's number.
        output_dir (str): the run's folder; rounds are files in ``output_dir/rounds``.
        total_steps (int): optimizer steps of the run.
        temperature (float): the temperature of the trainer's log-probs.

    Raises:
        DataError: if the reward cannot score the responses to a prompt.
    """

    score = "rounds/reward"

    def __init__(
        self,
        plan: RoundPlan,
        engine: Engine,
        reward: Reward,
        derive: Derive,
        hand_over: Callable[[int], None],
        output_dir: str,
        total_steps: int,
        temperature: float,
    ) -> None:
        self.plan, self.derive, self.hand_over, self.total_steps = plan, derive, hand_over, total_steps
        self.temperature = temperature
        self.groups_per_step, self.steps_per_epoch = plan.groups_per_step, plan.steps_per_epoch
        self.folder = Path(output_dir) / "rounds"
        read = {"tokenizer.date": getattr(plan.tokenizer, "date", None), "reward.date": getattr(reward, "date", None)}
        self.dates = {key: date for key, date in read.items() if isinstance(date, str)}
        self.empty_rounds = EmptyRounds(
            highest_score=getattr(reward, "highest_score", None), desirable_above=plan.source.desirable_above
        )
        # A separate process group: with overlap its collectives run beside training's, and one rank may wait for its
        # server for a long time.
        self.ranks = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self.sampler = RoundSampler(plan, engine, reward, derive, self.empty_rounds, self.ranks)
        of_engine = engine.logps_temperature(plan.params)
        if of_engine != temperature and dist.get_rank() == 0:
            log.info(
                f"source: log-probs of the engine are at temperature {of_engine or 'unknown'}, those of training at "
                f"{temperature}; their mismatch is not logged (docs/rollouts.md)"
            )
        self._round: int | None = None
        self._policy_step = 0
        self._groups: list[Group] = []  # the objective's
        self._scored: list[Group] = []
        self._logps_temperature: float | None = None
        self._unlogged: list[dict[str, float]] = []  # rounds since the last log entry; saved in checkpoints
        self._ahead: Future[Round] | None = None

    def batch(self, step: int) -> list[list[Group]]:
        """Returns the microbatches of a step. At a round's first step, all ranks sample the round together."""
        round, index = divmod(step - 1, self.plan.every)
        if round != self._round:
            self._enter(round, step)
        if not self._groups:
            return []
        accumulation = self.plan.steps.accumulation
        # A step repeats a group only if a rank would have none, or KTO no other prompt to pair with.
        least = accumulation * max(self.plan.steps.world_size, 2)
        count = min(self.groups_per_step, max(len(self._groups), least))
        groups = [self._groups[i % len(self._groups)] for i in range(index * count, (index + 1) * count)]
        # The engine's log-probs are compared with the trainer's, which is meaningful only for the policy that sampled.
        if step - 1 != self._policy_step or self._logps_temperature != self.temperature:
            groups = [replace(group, logps=None) for group in groups]
        bounds = [count * i // accumulation for i in range(accumulation + 1)]
        return [groups[start:end] for start, end in pairwise(bounds)]

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the values to log for a step's groups.

        ``staleness`` counts the optimizer steps since the groups were sampled, and ``empty_rounds`` the empty rounds of
        the run. For rounds sampled since the last call, ``rounds/`` has means over all responses: ``reward``,
        ``response_tokens``, and ``truncated``, the share cut at ``max_new_tokens``; ``reward_std``, the mean over
        prompts of the standard deviation of their rewards; and ``repeated``, the share of other prompts that also have
        the response that most prompts have: 0 if no two prompts share one, 1 if all do, absent in rounds of one prompt.
        It has these sums too: ``dropped`` prompts, ``empty`` rounds, ``unused`` groups (more than the round's steps
        need), ``tokens``, ``seconds`` of sampling and scoring, and seconds that training ``waited``.
        """
        rounds, self._unlogged = self._unlogged, []
        # Rounds and checkpoints of earlier versions have fewer values; what not all rounds have is not logged.
        names = set.intersection(*map(set, rounds)) if rounds else set()
        metrics = {name: sum(each[name] for each in rounds) for name in (rounds[0] if rounds else ()) if name in names}
        if rounds:
            metrics["rounds/response_tokens"] = metrics["rounds/tokens"]
        for of, means in _MEANS.items():
            count = metrics.pop(of, 0)
            for name in means & metrics.keys():
                metrics[name] = metrics[name] / count if count else math.nan
        if math.isnan(metrics.get("rounds/repeated", 0.0)):
            del metrics["rounds/repeated"]
        counts = {"staleness": step - 1 - self._policy_step, "empty_rounds": self.empty_rounds.total}
        return counts | metrics

    def ended_round(self, step: int) -> tuple[int, list[Group]] | None:
        ends = step % self.plan.every == 0 or step == self.total_steps
        return (self._round, self._scored) if ends and self._round is not None and self._scored else None

    def end(self, step: int, most_empty: int) -> End | None:
        """Returns why the run ends if this step ends a round and the last ``most_empty`` rounds were empty."""
        empty = self.empty_rounds
        if step % self.plan.every or empty.in_a_row < most_empty:
            return None
        why = f"the last {empty.in_a_row} rounds were empty (stop_after_empty_rounds): {empty.why()}"
        found = End(why, success=empty.is_solved)
        empty.begin_again()
        return found

    def stop(self) -> None:
        self.sampler.stop()

    def wait(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()

    def resume(self, step: int) -> None:
        """Renames rounds that were sampled after optimizer step ``step``, which belong to another run."""

        def rename() -> None:
            for file in self.folder.glob("round_*.jsonl"):
                if policy_step(file) > step:
                    file.rename(file.with_suffix(".abandoned"))

        together(rename, self.ranks, on_rank_0=True, task=str(self.folder))

    def position(self) -> dict[str, Any]:
        return {"shuffle": None, "groups": self.plan.rounds()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self._changeable(),
            "empty_rounds": self.empty_rounds.state_dict(),
            "unlogged": list(self._unlogged),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state, and logs which settings have changed since."""
        self.empty_rounds.load_state_dict(state["empty_rounds"])
        self._unlogged = state["unlogged"]
        for name, here in self._changeable().items():
            before = state["settings"].get(name)
            if before != here and dist.get_rank() == 0:
                log.warning(f"{name}: was {before} in the checkpoint, is {here} for rounds that are not sampled yet")

    def _changeable(self) -> dict[str, Any]:
        """Returns the settings that a resumed run may change, with the day that the reward's chat template reads."""
        return self.plan.changeable() | {key: date for key, date in self.dates.items() if key == "reward.date"}

    def _enter(self, round: int, step: int) -> None:
        """Makes a round the current one from ``step`` on; with ``overlap`` starts sampling the next one."""
        start = time.perf_counter()
        found = self._ahead.result() if self._ahead else self._read_or_sample(round, step)
        self._ahead = None
        self._groups, self._scored = [], found.groups
        if not found.empty:
            groups = list(map(self.plan.source.labelled, found.groups))
            usable = self.derive(GroupDataset(groups, str(self._file(round)))).groups
            order = self.plan.order(len(usable), stream_seed("groups of a round", self.plan.steps.seed, round))
            self._groups = [usable[i] for i in order]
        self._round, self._policy_step = round, found.policy_step
        self._logps_temperature = found.logps_temperature
        next_step = (round + 1) * self.plan.every + 1
        self.empty_rounds.note(round, found.scores, found.empty)
        if found.empty and dist.get_rank() == 0:
            log.warning(
                f"round {round} is empty: the objective cannot learn from any prompt's responses "
                f"({found.score_range()}). The weights stay unchanged up to step {next_step - 1}, and the next round "
                "has other prompts"
            )
        if self.plan.source.overlap and next_step <= self.total_steps and not self._is_there(round + 1):
            self.hand_over(round + 1)
            self._ahead = _in_background(lambda: self._sample(round + 1, step - 1))
        if found.metrics:
            unused = max(0, len(self._groups) - self.plan.every * self.groups_per_step)
            waited = time.perf_counter() - start
            self._unlogged.append(found.metrics | {"rounds/unused": unused, "rounds/waited": waited})

    def _file(self, round: int) -> Path:
        return self.folder / f"round_{round}.jsonl"

    def _is_there(self, round: int) -> bool:
        return together(self._file(round).is_file, self.ranks, on_rank_0=True, task=str(self.folder))[0]

    def _read_or_sample(self, round: int, step: int) -> Round:
        if self._is_there(round):  # ranks may see a file differently; rank 0 decides
            file = self._file(round)
            read = together(
                lambda: read_round(file, self.plan.tokenizer), self.ranks, on_rank_0=True, task=str(self.folder)
            )
            return read[0]
        self.hand_over(round)
        return self._sample(round, step - 1)

    def _sample(self, round: int, policy_step: int) -> Round:
        """Samples a round; rank 0 writes it to its file."""
        found = self.sampler.sample(round, policy_step)
        if dist.get_rank() == 0:
            try:
                write_round(self._file(round), found, self.dates)
            except OSError as error:
                log.warning(
                    f"round {round} could not be written ({error}); training continues with it, and a run that "
                    "resumes within it samples it again"
                )
        return found


def _in_background(sample: Callable[[], Round]) -> Future[Round]:
    """Samples in a daemon thread. The result of the future is the round, or raises the thread's error."""
    future: Future[Round] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:  # the current device is set per thread
                torch.cuda.set_device(device)
            future.set_result(sample())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
