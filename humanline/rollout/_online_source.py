"""The settings of groups that the policy samples: online with one round per step, sparse with one round for many."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from humanline.data import DataFiles, Group, SourceName
from humanline.errors import ConfigError
from humanline.rollout._prompts import read_prompts
from humanline.rollout._round_plan import RoundPlan, Steps
from humanline.rollout._sampling import SamplingParams


class OnlineSource:
    """Samples groups from the policy in rounds; a round serves ``every`` optimizer steps.

    At the first step of a round the current policy answers the round's prompts, and a reward scores the responses.
    ``every: 1`` is online training; the paper's sparse setting is 64 (https://arxiv.org/abs/2509.24207).

    A group whose scores are all equal has no training signal. It is dropped, or its prompt is sampled again
    (``equal_scores``). The same holds for other groups that the objective cannot use, such as a best and a worst
    response with the same tokens. A round with fewer groups than its steps need repeats its groups. Its steps have
    fewer groups if they would otherwise contain one twice. If many groups are dropped, raise ``groups_per_round``. With
    ``desirable_above`` each response has its own label, and KTO drops no group.

    A round without any usable group is empty: its steps leave the weights unchanged, and the next round has other
    prompts and draws.

    A round is a file, ``output_dir/rounds/round_N.jsonl``, in the format of ``humanline.data.encoded_groups``. It also
    has the engine's log-probs of each token (``logps``; null if the engine has none). A resumed run reads the files,
    and samples rounds that are missing or were sampled after the checkpoint that it resumes from. If a round's file
    cannot be written, training continues with the round.

    Args:
        prompts (SourceName): a file (.jsonl, .json, .csv, .parquet or .txt), a glob, a list, a folder, or a hub dataset
            ``owner/name``. The prompt is in the column ``prompt``, else ``instruction``, ``question``, ``problem``,
            ``query``, ``messages`` or ``conversations``.
        max_new_tokens (int): the maximum number of tokens in a response.
        generations (int): responses sampled for each prompt, at least 2.
        every (int): optimizer steps that one round serves.
        groups_per_round (int | None): prompts in a round; None uses one for each group that the round's steps need.
        temperature (float): divides the logits; above 0.
        top_p (float): samples from the smallest set of most probable tokens whose probabilities sum to this; 1 samples
            from all tokens.
        equal_scores (str): "drop" or "resample" prompts whose responses all have the same score.
        desirable_above (float | None): labels a response desirable if its score is above this; None uses no labels,
            and compares the scores within a group.
        overlap (bool): samples the next round while training uses the current one; needs an engine outside this
            process. A step's groups then come from a policy at most ``2 * every - 1`` optimizer steps old, else at
            most ``every - 1``.
        max_prompt_tokens (int | None): leaves out prompts with more tokens; None keeps all.
        system_prompt (str | None): the system message of prompts that have none of their own; None adds none. The
            reward sees it too.
        split (str): the split of the prompts, with an optional slice such as "train[:95%]".
        name (str | None): the config of a dataset, such as "main".
        data_files (DataFiles | None): the files of a dataset to read; None reads all.
        revision (str | None): commit, tag or branch of a hub dataset; None for the newest.
        column_map (Mapping[str, str | None] | None): the source's column for each field that has another name there,
            such as ``{prompt: problem, answer: solution}``, or None for a column to ignore; None renames nothing.

    Raises:
        ConfigError: if a value is invalid.
    """

    def __init__(
        self,
        prompts: SourceName,
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
        name: str | None = None,
        data_files: DataFiles | None = None,
        revision: str | None = None,
        column_map: Mapping[str, str | None] | None = None,
    ) -> None:
        for key, value in (("every", every), ("groups_per_round", 1 if groups_per_round is None else groups_per_round)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"source.{key}: expected a whole number of at least 1, got {value!r}")
        if generations < 2:
            raise ConfigError(f"source.generations: expected 2 or more responses to compare, got {generations!r}")
        if equal_scores not in ("drop", "resample"):
            raise ConfigError(f"source.equal_scores: expected drop or resample, got {equal_scores!r}")
        if isinstance(desirable_above, bool) or not isinstance(desirable_above, int | float | None):
            raise ConfigError(f"source.desirable_above: expected a number or null, got {desirable_above!r}")
        if not isinstance(overlap, bool):
            raise ConfigError(f"source.overlap: expected true or false, got {overlap!r}")
        if not isinstance(system_prompt, str | None):
            raise ConfigError(f"source.system_prompt: expected a string or null, got {system_prompt!r}")
        found = read_prompts(
            prompts, split, column_map, name=name, data_files=data_files, revision=revision, key="source.prompts"
        )
        self.all_prompts = [prompt.under(system_prompt) for prompt in found]
        self.own_system_messages = sum(prompt.has_system_message for prompt in found) if system_prompt else 0
        self.every = every
        self.groups_per_round = groups_per_round
        self.params = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, samples_per_prompt=generations
        )
        if temperature == 0:
            raise ConfigError(
                "source.temperature: expected a number above 0, got 0; at 0 all responses to a prompt are equal"
            )
        self.equal_scores = equal_scores
        self.desirable_above = desirable_above
        self.overlap = overlap
        self.max_prompt_tokens = max_prompt_tokens

    def plan(self, tokenizer: Any, steps: Steps) -> RoundPlan:
        """Encodes the prompts, and assigns them to rounds and steps.

        Raises:
            ConfigError: if there are too few prompts for one round.
        """
        return RoundPlan(self, tokenizer, steps)

    def labelled(self, group: Group) -> Group:
        """Returns the group with labels instead of scores if ``desirable_above`` is set, else unchanged."""
        if self.desirable_above is None:
            return group
        return replace(group, scores=None, labels=tuple(score > self.desirable_above for score in group.scores or ()))
