"""The source whose groups the policy itself samples, in rounds."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
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


class SampledSource(Source):
    """Groups that the policy samples in rounds, each of which serves ``plan.every`` optimizer steps.

    Args:
        plan (RoundPlan): the prompts, and which steps a round serves.
        engine (Engine): draws completions; every rank asks its own.
        reward (Reward): scores them.
        derive (Derive): makes of scored groups what the objective learns from.
        hand_over (Callable[[int], None]): gives the engine the policy of the moment, before a round of that number is
            sampled.
        output_dir (str): the run's folder; rounds are files in ``output_dir/rounds``.
        total_steps (int): optimizer steps of the run.

    Raises:
        DataError: if the reward cannot judge a prompt.
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
    ) -> None:
        self.plan, self.derive, self.hand_over, self.total_steps = plan, derive, hand_over, total_steps
        self.groups_per_step, self.steps_per_epoch = plan.groups_per_step, plan.steps_per_epoch
        self.folder = Path(output_dir) / "rounds"
        self.empty_rounds = EmptyRounds(
            highest_score=getattr(reward, "highest_score", None), desirable_above=plan.source.desirable_above
        )
        # A group of their own, since with overlap the ranks meet in it while they meet in training's as well; and one
        # of them may wait for its server for long.
        self.ranks = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self.sampler = RoundSampler(plan, engine, reward, derive, self.empty_rounds, self.ranks)
        self._round: int | None = None
        self._policy_step = 0
        self._groups: list[Group] = []
        self._unlogged: list[dict[str, float]] = []  # of the rounds sampled since metrics were logged; in checkpoints
        self._ahead: Future[Round] | None = None

    def batch(self, step: int) -> list[list[Group]]:
        """The microbatches of a step; at a round's first step, all ranks sample it together."""
        round, index = divmod(step - 1, self.plan.every)
        if round != self._round:
            self._enter(round, step)
        if not self._groups:
            return []
        accumulation = self.plan.steps.accumulation
        # A step takes no group twice, but where there would be none for a rank, or no other one for KTO to pair with.
        least = accumulation * max(self.plan.steps.world_size, 2)
        count = min(self.groups_per_step, max(len(self._groups), least))
        groups = [self._groups[i % len(self._groups)] for i in range(index * count, (index + 1) * count)]
        bounds = [count * i // accumulation for i in range(accumulation + 1)]
        return [groups[start:end] for start, end in pairwise(bounds)]

    def metrics(self, step: int) -> dict[str, float]:
        """What to log of a step's groups.

        ``staleness`` is how many optimizer steps the policy has taken since they were sampled, and ``empty_rounds`` how
        many rounds of the run had nothing to learn from. Of the rounds that were sampled since the last call, under
        ``rounds/``, also: the mean ``reward`` of all responses, and the sums of ``dropped`` prompts, ``empty`` rounds,
        groups that are ``unused`` since the round has more than its steps take, ``tokens``, the ``seconds`` of sampling
        and scoring, and those that training ``waited``.
        """
        rounds, self._unlogged = self._unlogged, []
        metrics = {name: sum(each[name] for each in rounds) for name in (rounds[0] if rounds else ())}
        if rounds:
            responses = metrics.pop("rounds/responses")
            metrics["rounds/reward"] = metrics["rounds/reward"] / responses if responses else math.nan
        counts = {"staleness": step - 1 - self._policy_step, "empty_rounds": self.empty_rounds.total}
        return counts | metrics

    def end(self, step: int, most_empty: int) -> End | None:
        """Whether the round that ends with this step is the last of too many empty ones in a row."""
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
        """Renames rounds of a policy of more than ``step`` optimizer steps, which are of another run."""

        def rename() -> None:
            for file in self.folder.glob("round_*.jsonl"):
                if policy_step(file) > step:
                    file.rename(file.with_suffix(".abandoned"))

        together(rename, self.ranks, on_rank_0=True, task=str(self.folder))

    def position(self) -> dict[str, Any]:
        return {"shuffle": None, "groups": self.plan.rounds()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.plan.changeable(),
            "empty_rounds": self.empty_rounds.state_dict(),
            "unlogged": list(self._unlogged),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it, and says what has changed since."""
        self.empty_rounds.load_state_dict(state["empty_rounds"])
        self._unlogged = state["unlogged"]
        for name, here in self.plan.changeable().items():
            before = state["settings"].get(name)
            if before != here and dist.get_rank() == 0:
                log.warning(f"{name}: was {before} in the checkpoint and is {here} for rounds that are not sampled yet")

    def _enter(self, round: int, step: int) -> None:
        """Makes a round that of the steps from ``step`` on, and with ``overlap`` begins the next one."""
        start = time.perf_counter()
        found = self._ahead.result() if self._ahead else self._read_or_sample(round, step)
        self._ahead = None
        self._groups = []
        if not found.empty:
            groups = list(map(self.plan.source.labelled, found.groups))
            usable = self.derive(GroupDataset(groups, str(self._file(round)))).groups
            order = self.plan.order(len(usable), stream_seed("groups of a round", self.plan.steps.seed, round))
            self._groups = [usable[i] for i in order]
        self._round, self._policy_step = round, found.policy_step
        next_step = (round + 1) * self.plan.every + 1
        self.empty_rounds.note(round, found.scores, found.empty)
        if found.empty and dist.get_rank() == 0:
            log.warning(
                f"round {round} is empty: no prompt has responses of which the objective learns "
                f"({found.score_range()}). The weights stay as they are to step {next_step - 1}, and the next round "
                "draws other prompts"
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
        if self._is_there(round):  # of a file that ranks see differently, rank 0's view counts
            file = self._file(round)
            read = together(
                lambda: read_round(file, self.plan.tokenizer), self.ranks, on_rank_0=True, task=str(self.folder)
            )
            return read[0]
        self.hand_over(round)
        return self._sample(round, step - 1)

    def _sample(self, round: int, policy_step: int) -> Round:
        """Samples a round, and rank 0 writes it down."""
        found = self.sampler.sample(round, policy_step)
        if dist.get_rank() == 0:
            try:
                write_round(self._file(round), found)
            except OSError as error:
                log.warning(
                    f"round {round} could not be written ({error}); training continues with it, and a run that "
                    "resumes in it samples it again"
                )
        return found


def _in_background(sample: Callable[[], Round]) -> Future[Round]:
    """Begins to sample in a thread, which ends with the process; its error is raised where its result is asked for."""
    future: Future[Round] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:  # each thread has a current device of its own
                torch.cuda.set_device(device)
            future.set_result(sample())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
