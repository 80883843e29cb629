"""What a config says of groups that the policy samples: online at one round a step, sparse at one in many."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from humanline.data import Group, Message
from humanline.errors import ConfigError
from humanline.rollout._prompts import read_prompts
from humanline.rollout._round_plan import RoundPlan, Steps
from humanline.rollout._sampling import SamplingParams


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

    def plan(self, tokenizer: Any, steps: Steps) -> RoundPlan:
        """The prompts encoded, and which steps each round of them serves.

        Raises:
            ConfigError: if the prompts do not fill a round.
        """
        return RoundPlan(self, tokenizer, steps)

    def labelled(self, group: Group) -> Group:
        """The group with labels in the place of its scores, where ``desirable_above`` asks for them."""
        if self.desirable_above is None:
            return group
        return replace(group, scores=None, labels=tuple(score > self.desirable_above for score in group.scores or ()))
