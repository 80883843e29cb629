"""Samples and scores rounds; each rank handles a part of the prompts."""

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import pstdev
from typing import Any

import torch.distributed as dist
from torchtune.utils import get_logger

from humanline._seeds import stream_seed
from humanline.data import Group, GroupDataset
from humanline.distributed import together
from humanline.errors import DataError, Stopped
from humanline.rollout._empty_rounds import EmptyRounds
from humanline.rollout._engine import Engine
from humanline.rollout._reward import Reward, checked_scores
from humanline.rollout._round_file import Round, scores_of
from humanline.rollout._round_plan import RoundPlan

log = get_logger("INFO")

Derive = Callable[[GroupDataset], GroupDataset]

MOST_ATTEMPTS = 8
PROMPTS_PER_CALL = 64  # of the reward: enough for batches, few enough to react to a signal soon


class RoundSampler:
    """Samples rounds: the engine samples responses, the reward scores them, the objective selects usable groups.

    Args:
        plan (RoundPlan): the prompts of each round.
        engine (Engine): samples completions; each rank has its own.
        reward (Reward): scores the responses.
        derive (Derive): converts scored groups into the objective's groups.
        empty_rounds (EmptyRounds): knows which scores are the best possible.
        ranks (dist.ProcessGroup): the ranks that sample.

    Raises:
        DataError: if the reward cannot score the responses to a prompt.
    """

    def __init__(
        self,
        plan: RoundPlan,
        engine: Engine,
        reward: Reward,
        derive: Derive,
        empty_rounds: EmptyRounds,
        ranks: dist.ProcessGroup,
    ) -> None:
        self.plan, self.engine, self.reward, self.derive = plan, engine, reward, derive
        self.empty_rounds, self.ranks = empty_rounds, ranks
        self._stopped = False
        # A reward that calls a server may fail on one rank only.
        together(lambda: reward(plan.prompts, [[] for _ in plan.prompts]), ranks, task="reward")

    def stop(self) -> None:
        """Ends sampling and scoring permanently, if engine and reward can stop; calls in progress raise Stopped."""
        self._stopped = True
        self.engine.stop()
        getattr(self.reward, "stop", lambda: None)()

    def sample(self, round: int, policy_step: int) -> Round:
        """Samples a round from the current policy, after ``policy_step`` optimizer steps; equal on all ranks."""
        start = time.perf_counter()
        chosen = self.plan.prompts_of(round)
        usable: dict[int, Group] = {}
        answered: dict[int, Group] = {}
        rewards: list[float] = []
        stds: list[float] = []
        sampled = tokens = cut = repeated = others = 0
        for attempt in range(MOST_ATTEMPTS):
            open_ = [prompt for prompt in chosen if prompt not in usable]
            sampled += len(open_)
            answered = self._answer(open_, round, attempt)
            if attempt == 0:
                repeated = most_repeated([group.responses for group in answered.values()])
                others = max(0, len(answered) - 1)
            for prompt, group in answered.items():
                tokens += sum(map(len, group.responses))
                cut += sum(response[-1] not in self.plan.tokenizer.stop_tokens for response in group.responses)
                rewards += group.scores or ()
                stds.append(pstdev(group.scores or (0.0,)))
                if self._is_usable(group):
                    usable[prompt] = group
            if len(usable) == len(chosen) or (self.plan.source.equal_scores == "drop" and usable):
                break
            if not usable and self.empty_rounds.are_all_right(scores_of(list(answered.values()))):
                break
        kept = usable or answered  # an empty round keeps its last responses, for inspection
        groups = [kept[prompt] for prompt in chosen if prompt in kept]
        params = self.plan.params
        temperatures = params.temperature, self.engine.logps_temperature(params)
        found = Round(groups, policy_step, *temperatures, empty=not usable)
        found.metrics = {
            "rounds/reward": math.fsum(rewards),
            "rounds/reward_std": math.fsum(stds),
            "rounds/responses": len(rewards),
            "rounds/groups": len(stds),
            "rounds/truncated": cut,
            "rounds/repeated": repeated,
            "rounds/others": others,
            "rounds/dropped": len(chosen) - len(usable),
            "rounds/empty": int(found.empty),
            "rounds/tokens": tokens,
            "rounds/seconds": time.perf_counter() - start,
        }
        if dist.get_rank() == 0:
            mean = math.fsum(rewards) / len(rewards) if rewards else math.nan
            log.info(
                f"round {round}: {sampled} prompts x {self.plan.params.samples_per_prompt}, mean reward "
                f"{mean:.3f}, {len(chosen) - len(usable)} prompts left out"
            )
        return found

    def _is_usable(self, group: Group) -> bool:
        """Returns whether the objective can learn from a group."""
        try:
            return len(self.derive(GroupDataset([self.plan.source.labelled(group)])).groups) > 0
        except DataError:
            return False

    def _answer(self, chosen: Sequence[int], round: int, attempt: int) -> dict[int, Group]:
        """Returns scored groups by prompt, equal on all ranks. Responses without a token are left out."""
        together(self.engine.ready, self.ranks, on_rank_0=True, task="sampling")
        mine = chosen[dist.get_rank() :: dist.get_world_size()]
        parts = together(lambda: self._answer_mine(mine, round, attempt), self.ranks, task="sampling")
        answered = {i: group for part in parts for i, group in part.items()}
        return {i: answered[i] for i in chosen if i in answered}

    def _answer_mine(self, mine: Sequence[int], round: int, attempt: int) -> dict[int, Group]:
        seeds = [stream_seed("completions", self.plan.steps.seed, round, prompt, attempt) for prompt in mine]
        completions = self.engine.generate([self.plan.prompt_ids[i] for i in mine], self.plan.params, seeds)
        completions = [[sample for sample in samples if sample.tokens] for samples in completions]
        responses = [[sample.tokens for sample in samples] for samples in completions]
        texts = [[self.plan.tokenizer.decode(response) for response in each] for each in responses]
        found: list[list[float]] = []
        while len(found) < len(mine):
            if self._stopped:
                raise Stopped("scoring was stopped")
            part = slice(len(found), len(found) + PROMPTS_PER_CALL)
            found += checked_scores(self.reward, [self.plan.prompts[i] for i in mine[part]], texts[part])
        return {
            i: Group(
                self.plan.prompt_ids[i],
                tuple(sample.tokens for sample in samples),
                tuple(values),
                id=f"{self.plan.prompts[i].where} in round {round}",
                logps=tuple(sample.logps and array("f", sample.logps) for sample in samples),
            )
            for i, samples, values in zip(mine, completions, found, strict=True)
            if samples
        }


def most_repeated(responses: Sequence[Sequence[Sequence[Any]]]) -> int:
    """Returns how many other prompts have the response that most prompts have; 0 if no two prompts share one.

    Args:
        responses (Sequence[Sequence[Sequence[Any]]]): the responses to each prompt, as token ids or as texts.
    """
    prompts = Counter(response for each in responses for response in set(map(tuple, each)))
    return max(prompts.values(), default=1) - 1
