"""The source whose groups the policy itself samples: online at one round a step, sparse at one in many."""

import hashlib
import json
import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torchtune import utils

from humanline._seeds import stream_seed
from humanline.data import Group, GroupDataset, TokenBudget
from humanline.data._record import Message, Record
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.rollout._connection import Stopped
from humanline.rollout._empty_rounds import EmptyRounds
from humanline.rollout._engine import Completion
from humanline.rollout._in_process import InProcessEngine
from humanline.rollout._prompts import read_prompts
from humanline.rollout._reward import Reward, checked_scores
from humanline.rollout._sampling import SamplingParams

log = utils.get_logger("INFO")

Derive = Callable[[GroupDataset], GroupDataset]
T = TypeVar("T")

MOST_ATTEMPTS = 8
PROMPTS_PER_CALL = 64  # of the reward: enough for it to work in batches, while a signal is soon heeded


class Engine(Protocol):
    """What draws completions: token ids in, token ids out.

    What an engine may have besides, for a server or what else takes long:

    - ``weights_dir``, a folder: each round's weights are written into it, and each rank's engine is told of them by
      ``update(folder, announce=)``, first that of rank 0, with ``announce=True``;
    - ``ready()``: called on rank 0 before the ranks ask together, who wait until it returns;
    - ``stop()``: called in another thread when the run has been asked to end: ``generate`` then raises
      :class:`Stopped` soon, instead of returning.
    """

    def setup(self, tokenizer: Any, policy: Any, whole: Callable[[], Any]) -> None:
        """Called once: with the run's tokenizer, its policy, and a context in which this rank has all its weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """The ``params.samples_per_prompt`` completions of each prompt, or fewer where the others cannot be trained on;
        a seed for each prompt decides its draws."""


class OnlineSource:
    """Groups that the policy samples in rounds: a round serves ``every`` optimizer steps.

    At the first step of a round the policy as it is then answers the round's prompts, and a reward scores the answers.
    ``every: 1`` is online training; the paper's sparse setting is 64 (https://arxiv.org/abs/2509.24207).

    Groups whose responses are all scored equal say nothing. They are dropped, or their prompts sampled again
    (``equal_scores``); so are others of which the objective can make nothing, such as a best and a worst response of
    the same tokens. A round that then has fewer groups than its steps take goes through them again, and has fewer of
    them in a step than it should if that would take one twice: where many are dropped, give it more prompts
    (``groups_per_round``). With ``desirable_above`` each response has a label of its own, and KTO drops no group.

    A round without any usable group is empty: its steps leave the weights as they are, and the next round has other
    prompts and draws.

    A round is a file, ``output_dir/rounds/round_N.jsonl`` in the format of ``humanline.data.encoded_groups``, with the
    log-probs that the engine gave each token (``logps``; null where it gave none). A resumed run reads it, and samples
    only what is not there yet or was sampled later than the checkpoint that it resumes from.
    A round that cannot be written is trained on all the same.

    Args:
        prompts (str): a prompt file (.jsonl, .json, .parquet or .txt), or a hub dataset.
        max_new_tokens (int): a response ends here if no stop token came before.
        generations (int): responses a prompt.
        every (int): optimizer steps a round.
        groups_per_round (int | None): prompts of a round; None takes as many as its steps take groups.
        temperature (float): divides the logits.
        top_p (float): draw from the smallest set of most probable tokens that holds this mass.
        equal_scores (str): ``drop`` or ``resample`` prompts whose responses are all scored equal.
        desirable_above (float | None): label responses by whether their score is above it; None compares them within
            their group.
        overlap (bool): sample the next round while training goes on with this one, by an engine outside of this
            process. A step's groups are then sampled by a policy at most ``2 * every - 1`` steps older than the one
            that trains on them, else at most ``every - 1``.
        max_prompt_tokens (int | None): longer prompts are left out; None takes all.
        system_prompt (str | None): stands before each prompt.
        split (str): the split of the prompts, with an optional slice such as "train[:95%]".
        column_map (Mapping[str, str] | None): the source's name for each field that it calls otherwise, such as
            ``{prompt: problem, answer: solution}``.

    Raises:
        ConfigError: if a value cannot work.
    """

    def __init__(
        self,
        prompts: str,
        *,
        max_new_tokens: int,
        generations: int = 8,
        every: int = 1,
        groups_per_round: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        equal_scores: str = "drop",
        desirable_above: float | None = None,
        overlap: bool = False,
        max_prompt_tokens: int | None = None,
        system_prompt: str | None = None,
        split: str = "train",
        column_map: Mapping[str, str] | None = None,
    ) -> None:
        for key, value in (("every", every), ("groups_per_round", 1 if groups_per_round is None else groups_per_round)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"source.{key}: {value!r} is not a whole number of at least 1")
        if generations < 2:
            raise ConfigError(f"source.generations: {generations!r} makes no group to compare in; give 2 or more")
        if equal_scores not in ("drop", "resample"):
            raise ConfigError(f"source.equal_scores: {equal_scores!r} is not known; choose drop or resample")
        if isinstance(desirable_above, bool) or not isinstance(desirable_above, int | float | None):
            raise ConfigError(f"source.desirable_above: {desirable_above!r} is no score; give a number, or null")
        if not isinstance(overlap, bool):
            raise ConfigError(f"source.overlap: {overlap!r} is neither true nor false")
        self.all_prompts = read_prompts(prompts, split, column_map)
        self.system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.every = every
        self.groups_per_round = groups_per_round
        self.params = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, samples_per_prompt=generations
        )
        if temperature == 0:
            raise ConfigError(
                "source.temperature: 0 gives every prompt equal responses, which teach nothing; give one above 0"
            )
        self.equal_scores = equal_scores
        self.desirable_above = desirable_above
        self.overlap = overlap
        self.max_prompt_tokens = max_prompt_tokens

    # --------------------------------------------------------------------------------------------------------- set-up

    def setup(
        self,
        tokenizer: Any,
        *,
        batch_size: int,
        accumulation: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        max_steps_per_epoch: int | None = None,
    ) -> None:
        """Encodes the prompts, and says how long an epoch is.

        Args:
            tokenizer (Any): a ``ChatTokenizer``.
            batch_size (int): groups a microbatch and rank.
            accumulation (int): microbatches an optimizer step.
            world_size (int): number of ranks.
            seed (int): seed of the prompts' order and of all draws.
            shuffle (bool): False keeps the file's order.
            max_steps_per_epoch (int | None): steps after which an epoch ends early.

        Raises:
            ConfigError: if the prompts do not fill a round.
        """
        self.tokenizer = tokenizer
        self.accumulation = accumulation
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.groups_per_step = batch_size * accumulation * world_size
        self.round_size = self.groups_per_round or self.every * self.groups_per_step
        self.prompts, self.prompt_ids = [], []
        for prompt in self.all_prompts:
            ids = tokenizer.encode_prompt([*self.system, *prompt.messages])
            if self.max_prompt_tokens is None or len(ids) <= self.max_prompt_tokens:
                self.prompts.append(prompt)
                self.prompt_ids.append(ids)
        if len(self.prompts) < self.round_size:
            raise ConfigError(
                f"source.groups_per_round: a round takes {self.round_size} prompts, and {len(self.prompts)} of "
                f"{len(self.all_prompts)} are within max_prompt_tokens; lower it, or give more prompts"
            )
        self.rounds_per_epoch = len(self.prompts) // self.round_size
        steps = self.rounds_per_epoch * self.every
        self.steps_per_epoch = min(steps, max_steps_per_epoch or steps)
        self.budget = TokenBudget(
            max_tokens=max(map(len, self.prompt_ids)) + self.params.max_new_tokens, max_prompt_tokens=None
        )
        self._round: int | None = None
        self._groups: list[Group] = []
        self.unlogged: list[dict[str, float]] = []  # of the rounds sampled since metrics were logged; in checkpoints
        self._ahead: Future[_Round] | None = None
        self._stopped = False
        self.empty_rounds = EmptyRounds(desirable_above=self.desirable_above)

    def longest(self) -> Group:
        """A group as long as any that can be sampled."""
        prompt = max(self.prompt_ids, key=len)
        count = self.params.samples_per_prompt
        responses = tuple([i] * self.params.max_new_tokens for i in range(count))
        scores = tuple((self.desirable_above or 0.0) + i for i in range(count))
        return self._labelled(Group(prompt, responses, scores, id="source: the longest prompt and responses"))

    def left_out(self) -> list[str]:
        """What to say of prompts and groups that are not used: a line for each reason."""
        count, most, used = len(self.prompts), self.max_prompt_tokens, self.rounds_per_epoch * self.round_size
        taken = self.every * self.groups_per_step
        lines = []
        if count < len(self.all_prompts):
            long = len(self.all_prompts) - count
            lines.append(
                f"{long:,} of {len(self.all_prompts):,} prompts are left out: they exceed max_prompt_tokens: {most}"
            )
        if used < count:
            which = "a different choice in each" if self.shuffle else "the last ones"
            lines.append(
                f"{count - used:,} of {count:,} prompts are left out of every epoch ({which}): its "
                f"{self.rounds_per_epoch:,} rounds take {self.round_size} each"
            )
        if self.round_size > taken:
            lines.append(
                f"a round samples {self.round_size} prompts and its steps take {taken} groups: those beyond are not "
                "trained on (rounds/unused counts them)"
            )
        return [f"source: {line}" for line in lines]

    def digest(self) -> str:
        """What the groups are a function of, besides the policy."""
        return f"{self.position()}, {self._changeable()}"

    def position(self) -> str:
        """What a step number means, in this run and in all that resume it."""
        return (
            f"{self.round_size} prompts a round, every {self.every} steps, max_new_tokens {self.params.max_new_tokens}"
        )

    def _changeable(self) -> dict[str, Any]:
        """What a run that resumes may change: the rounds that are there stay, those to come are sampled by it."""
        ids = hashlib.blake2b(json.dumps([list(ids) for ids in self.prompt_ids]).encode(), digest_size=8).hexdigest()
        return {
            "source.prompts": f"{len(self.prompts)} ({ids})",
            "source.generations": self.params.samples_per_prompt,
            "source.temperature": self.params.temperature,
            "source.top_p": self.params.top_p,
            "source.equal_scores": self.equal_scores,
            "source.desirable_above": self.desirable_above,
            "shuffle": self.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a run that resumes wants back; what JSON can hold."""
        return {
            "settings": self._changeable(),
            "empty_rounds": self.empty_rounds.state_dict(),
            "unlogged": list(self.unlogged),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it, and says what has changed since."""
        self.empty_rounds.load_state_dict(state["empty_rounds"])
        self.unlogged = state["unlogged"]
        for name, here in self._changeable().items():
            before = state["settings"].get(name)
            if before != here and dist.get_rank() == 0:
                log.warning(f"{name}: was {before} in the checkpoint and is {here} for rounds that are not sampled yet")

    def use(
        self,
        engine: Engine,
        reward: Reward,
        derive: Derive,
        hand_over: Callable[[int], None],
        output_dir: str,
        total_steps: int,
    ) -> None:
        """Names what rounds are made with.

        Args:
            engine (Engine): draws completions; every rank asks its own.
            reward (Reward): scores them.
            derive (Derive): makes of scored groups what the objective learns from.
            hand_over (Callable[[int], None]): gives the engine the policy of the moment, before a round of that number
                is sampled.
            output_dir (str): the run's folder.
            total_steps (int): optimizer steps of the run.

        Raises:
            ConfigError: if the engine cannot sample while training goes on, and ``overlap`` asks for it.
        """
        if self.overlap and isinstance(engine, InProcessEngine):
            raise ConfigError(
                "source.overlap: InProcessEngine samples with the very weights that train; use HTTPEngine, or leave "
                "overlap out"
            )
        self.engine, self.reward, self.derive, self.hand_over = engine, reward, derive, hand_over
        self.empty_rounds.highest_score = getattr(reward, "highest_score", None)
        self.total_steps = total_steps
        # A group of their own, since with overlap the ranks meet in it while they meet in training's as well; and one
        # of them may wait for its server for long.
        self.ranks = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self.folder = Path(output_dir) / "rounds"
        # Refuses a prompt that it cannot judge; one that asks a server may fail on one rank alone.
        self._together(lambda: reward(self.prompts, [[] for _ in self.prompts]))

    def stop(self) -> None:
        """Ends sampling and scoring for good, as far as engine and reward can: what is under way raises
        :class:`~humanline.rollout.Stopped`."""
        self._stopped = True
        for each in (self.engine, self.reward):
            getattr(each, "stop", lambda: None)()

    def wait(self) -> None:
        """Waits until what is sampled ahead has ended: it meets the other ranks, whose group must not go before."""
        if self._ahead is not None:
            self._ahead.exception()

    def set_aside(self, after: int) -> None:
        """Rounds of a policy of more than ``after`` optimizer steps are not of the run that goes on from there: another
        name keeps them from it."""

        def rename() -> None:
            for file in self.folder.glob("round_*.jsonl"):
                if _policy_step(file) > after:
                    file.rename(file.with_suffix(".abandoned"))

        self._together(rename, on_rank_0=True)

    # --------------------------------------------------------------------------------------------------------- rounds

    def batch(self, step: int) -> list[list[Group]]:
        """The microbatches of optimizer step ``step`` (1-based), of all ranks' groups; none if its round is empty. At a
        round's first step, all ranks sample it together."""
        round, index = divmod(step - 1, self.every)
        if round != self._round:
            self._enter(round, step)
        if not self._groups:
            return []
        # A step takes no group twice, but where there would be none for a rank, or no other one for KTO to pair with.
        least = self.accumulation * max(self.world_size, 2)
        count = min(self.groups_per_step, max(len(self._groups), least))
        groups = [self._groups[i % len(self._groups)] for i in range(index * count, (index + 1) * count)]
        bounds = [count * i // self.accumulation for i in range(self.accumulation + 1)]
        return [groups[start:end] for start, end in pairwise(bounds)]

    def metrics(self, step: int) -> dict[str, float]:
        """What to log of a step's groups.

        ``staleness`` is how many optimizer steps the policy has taken since they were sampled. Of the rounds that were
        sampled since the last call, under ``rounds/``, also: the mean ``reward`` of all responses, and the sums of
        ``dropped`` prompts, ``empty`` rounds, groups that are ``unused`` since the round has more than its steps take,
        ``tokens``, the ``seconds`` of sampling and scoring, and those that training ``waited``.
        """
        rounds, self.unlogged = self.unlogged, []
        metrics = {name: sum(each[name] for each in rounds) for name in (rounds[0] if rounds else ())}
        if rounds:
            responses = metrics.pop("rounds/responses")
            metrics["rounds/reward"] = metrics["rounds/reward"] / responses if responses else math.nan
        return {"staleness": step - 1 - self._policy_step, **metrics}

    def _enter(self, round: int, step: int) -> None:
        """Makes a round that of the steps from ``step`` on, and with ``overlap`` begins the next one."""
        start = time.perf_counter()
        found = self._ahead.result() if self._ahead else self._read_or_sample(round, step)
        self._ahead = None
        self._groups = []
        if not found.empty:
            groups = list(map(self._labelled, found.groups))
            usable = self.derive(GroupDataset(groups, str(self._file(round)))).groups
            order = self._order(len(usable), stream_seed("groups of a round", self.seed, round))
            self._groups = [usable[i] for i in order]
        self._round, self._policy_step = round, found.policy_step
        self.empty_rounds.note(round, _scores(found.groups), found.empty)
        if found.empty and dist.get_rank() == 0:
            log.warning(
                f"round {round} is empty: no prompt has responses of which the objective learns ({_range(found)}). The "
                f"weights stay as they are to step {(round + 1) * self.every}, and the next round draws other prompts"
            )
        if self.overlap and (round + 1) * self.every < self.total_steps and not self._is_there(round + 1):
            self.hand_over(round + 1)
            self._ahead = _in_background(lambda: self._sample(round + 1, step - 1))
        if found.metrics:
            unused = max(0, len(self._groups) - self.every * self.groups_per_step)
            waited = time.perf_counter() - start
            self.unlogged.append(found.metrics | {"rounds/unused": unused, "rounds/waited": waited})

    def _labelled(self, group: Group) -> Group:
        """The group with labels in the place of its scores, where ``desirable_above`` asks for them."""
        if self.desirable_above is None:
            return group
        return replace(group, scores=None, labels=tuple(score > self.desirable_above for score in group.scores or ()))

    def _order(self, count: int, seed: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def _file(self, round: int) -> Path:
        return self.folder / f"round_{round}.jsonl"

    def _is_there(self, round: int) -> bool:
        return self._together(self._file(round).is_file, on_rank_0=True)[0]

    def _read_or_sample(self, round: int, step: int) -> "_Round":
        if self._is_there(round):  # of a file that ranks see differently, rank 0's view counts
            return self._together(lambda: _read(self._file(round), self.tokenizer), on_rank_0=True)[0]
        self.hand_over(round)
        return self._sample(round, step - 1)

    def _sample(self, round: int, policy_step: int) -> "_Round":
        """Samples a round, each rank a part of its prompts; rank 0 writes it down."""
        start = time.perf_counter()
        epoch, index = divmod(round, self.rounds_per_epoch)
        order = self._order(len(self.prompts), stream_seed("prompts of an epoch", self.seed, epoch))
        chosen = order[index * self.round_size :][: self.round_size]
        usable: dict[int, Group] = {}
        answered: dict[int, Group] = {}
        rewards: list[float] = []
        sampled = tokens = 0
        for attempt in range(MOST_ATTEMPTS):
            open_ = [prompt for prompt in chosen if prompt not in usable]
            sampled += len(open_)
            answered = self._answer(open_, round, attempt)
            for prompt, group in answered.items():
                tokens += sum(map(len, group.responses))
                rewards += group.scores or ()
                if self._is_usable(group):
                    usable[prompt] = group
            if len(usable) == len(chosen) or (self.equal_scores == "drop" and usable):
                break
            if not usable and self.empty_rounds.are_all_right(_scores(list(answered.values()))):
                break
        kept = usable or answered  # of an empty round the last answers, for people to look at
        found = _Round([kept[prompt] for prompt in chosen if prompt in kept], policy_step, empty=not usable)
        found.metrics = {
            "rounds/reward": math.fsum(rewards),
            "rounds/responses": len(rewards),
            "rounds/dropped": len(chosen) - len(usable),
            "rounds/empty": int(found.empty),
            "rounds/tokens": tokens,
            "rounds/seconds": time.perf_counter() - start,
        }
        if dist.get_rank() == 0:
            log.info(
                f"round {round}: {sampled} prompts x {self.params.samples_per_prompt}, mean reward "
                f"{found.metrics['rounds/reward']:.3f}, {len(chosen) - len(usable)} prompts left out"
            )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self._file(round), found)
            except OSError as error:
                log.warning(
                    f"round {round} could not be written ({error}); training goes on with it, and a run that resumes "
                    "in it samples it anew"
                )
        return found

    def _is_usable(self, group: Group) -> bool:
        """Whether the objective learns from a group."""
        try:
            return len(self.derive(GroupDataset([self._labelled(group)])).groups) > 0
        except DataError:
            return False

    def _answer(self, chosen: Sequence[int], round: int, attempt: int) -> dict[int, Group]:
        """Scored groups of some prompts, by prompt, the same on all ranks. A response without a token is left out."""
        self._together(getattr(self.engine, "ready", lambda: None), on_rank_0=True)
        mine = chosen[dist.get_rank() :: self.world_size]
        parts = self._together(lambda: self._answer_mine(mine, round, attempt))
        together = {i: group for part in parts for i, group in part.items()}
        return {i: together[i] for i in chosen if i in together}

    def _together(self, call: Callable[[], T], *, on_rank_0: bool = False) -> list[T]:
        """What each rank's call returns, on all ranks. An error of any is raised on all, so that all end alike, with
        what they have.

        Args:
            call (Callable[[], T]): this rank's.
            on_rank_0 (bool): only rank 0 makes it, and the others wait.
        """
        mine: T | None = None
        failure: tuple[type[Exception], str] | None = None  # errors themselves cannot all be sent
        try:
            mine = None if on_rank_0 and dist.get_rank() else call()
        except (ConfigError, DataError, TrainingError) as error:
            kinds = (Stopped, ConfigError, DataError, TrainingError)
            failure = next(kind for kind in kinds if isinstance(error, kind)), str(error)
        except OSError as error:
            where = self.folder if str(self.folder) in str(error) else f"rank {dist.get_rank()}: sampling failed"
            failure = TrainingError, f"{where}: {type(error).__name__}: {error}"
        except Exception as error:  # whatever an engine of somebody's own may raise
            log.exception(f"rank {dist.get_rank()}: sampling failed")
            failure = TrainingError, f"rank {dist.get_rank()}: sampling failed ({' '.join(repr(error).split())[:300]})"
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, (mine, failure), self.ranks)
        for _, each in everyone:
            if each is not None:
                kind, message = each
                raise kind(message)
        return [each for each, _ in everyone]

    def _answer_mine(self, mine: Sequence[int], round: int, attempt: int) -> dict[int, Group]:
        seeds = [stream_seed("completions", self.seed, round, prompt, attempt) for prompt in mine]
        completions = self.engine.generate([self.prompt_ids[i] for i in mine], self.params, seeds)
        completions = [[sample for sample in samples if sample.tokens] for samples in completions]
        responses = [[sample.tokens for sample in samples] for samples in completions]
        texts = [[self.tokenizer.decode(response) for response in each] for each in responses]
        found: list[list[float]] = []
        while len(found) < len(mine):
            if self._stopped:
                raise Stopped("scoring was stopped")
            part = slice(len(found), len(found) + PROMPTS_PER_CALL)
            found += checked_scores(self.reward, [self.prompts[i] for i in mine[part]], texts[part])
        return {
            i: Group(
                self.prompt_ids[i],
                tuple(sample.tokens for sample in samples),
                tuple(values),
                id=f"{self.prompts[i].where} in round {round}",
                logps=tuple(sample.logps and array("f", sample.logps) for sample in samples),
            )
            for i, samples, values in zip(mine, completions, found, strict=True)
            if samples
        }


@dataclass
class _Round:
    """Groups that the policy sampled after ``policy_step`` optimizer steps, and what to log of them."""

    groups: list[Group]
    policy_step: int
    empty: bool = False  # nothing can be learnt from them
    metrics: dict[str, float] = field(default_factory=dict)


def _in_background(sample: Callable[[], _Round]) -> "Future[_Round]":
    """Begins to sample in a thread, which ends with the process; its error is raised where its result is asked for."""
    future: Future[_Round] = Future()
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


def _write(file: Path, found: _Round) -> None:
    partial = file.with_name("round.partial")
    of_line = {"policy_step": found.policy_step} | ({"empty": True} if found.empty else {})
    # A run that resumes logs them as this one does, but for the time, which is no function of the run.
    of_round = of_line | {"metrics": {k: v for k, v in found.metrics.items() if k != "rounds/seconds"}}
    with open(partial, "w") as lines:
        for index, group in enumerate(found.groups):
            line = {"prompt": list(group.prompt), "responses": list(map(list, group.responses)), "scores": group.scores}
            line |= {"logps": [each and [round(logp, 6) for logp in each] for each in group.logps or ()]}
            line |= {"id": group.id} | (of_round if index == 0 else of_line)
            lines.write(json.dumps(line) + "\n")
        if not found.groups:
            lines.write(json.dumps(of_round) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    partial.rename(file)


def _policy_step(file: Path) -> int:
    """That of a round's file, by its first line alone."""
    try:
        with open(file) as lines:
            step: int = json.loads(next(lines, ""))["policy_step"]
            return step
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(file, repr(error)) from None


def _read(file: Path, tokenizer: Any) -> _Round:
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        size = getattr(tokenizer, "vocab_size", None)
        groups = []
        for number, row in enumerate(rows, start=1):
            if "prompt" in row:
                record = Record(f"line {number}", row, {})
                prompt, responses = record.ids("prompt", size), record.id_lists("responses", size)
                scores = record.scores("scores", len(responses))
                groups.append(Group(prompt, responses, scores, id=row["id"]))
        first = rows[0]
        metrics = first.get("metrics", {})
        metrics = metrics and metrics | {"rounds/seconds": 0.0}
        return _Round(groups, first["policy_step"], first.get("empty", False), metrics)
    except DataError as error:
        raise _unreadable(file, str(error)) from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(file, repr(error)) from None


def _scores(groups: Sequence[Group]) -> list[float]:
    return [score for group in groups for score in group.scores or ()]


def _range(round: _Round) -> str:
    """What the responses of a round scored, for people."""
    scores = _scores(round.groups)
    if not scores:
        return "there is none"
    low, high = min(scores), max(scores)
    return f"all {len(scores)} scored {low:g}" if low == high else f"{len(scores)} scored {low:g} to {high:g}"


def _unreadable(file: Path, reason: str) -> DataError:
    return DataError(f"{file}: cannot be read as a round ({reason}); delete it, to have it sampled again")
