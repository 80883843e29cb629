"""What the model says while it trains: the responses of rounds and to fixed prompts, in files and tables."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import utils

from humanline.data import Group, Rows, lay_out, pack
from humanline.distributed import gathered
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder, fixed_log_probs
from humanline.reference import Reference, Window
from humanline.rollout import InProcessEngine, SamplingParams
from humanline.training._data import Data
from humanline.training._environment import Environment

log = utils.get_logger("INFO")

COLUMNS = ("prompt", "completion", "reward", "tokens", "finish", "mean_log_ratio")


class Completions:
    """Writes readable completions to ``output_dir/completions``, and shows some of them.

    Args:
        environment (Environment): the run's environment.
        data (Data): the tokenizer, and the held-out groups whose prompts are answered.
        policy (LogProbDecoder): the policy.
        reference (Reference): the reference of the log-ratios.

    Raises:
        ConfigError: if ``generate_val_every_n_steps`` is set without a tokenizer or held-out prompts.
    """

    def __init__(self, environment: Environment, data: Data, policy: LogProbDecoder, reference: Reference) -> None:
        settings = self.settings = environment.settings
        self.environment, self.tokenizer, self.policy, self.reference = environment, data.tokenizer, policy, reference
        self.folder = Path(settings.output_dir) / "completions"
        self._log_ratios: dict[tuple[str, bytes], Tensor] = {}  # of each response of a round, on the device
        self.prompts: list[Sequence[int]] = []
        if settings.generate_val_every_n_steps is None:
            return
        if data.tokenizer is None or data.held_out is None:
            raise ConfigError("generate_val_every_n_steps: needs tokenizer and dataset_val, whose prompts are answered")
        distinct = {tuple(group.prompt): group.prompt for group in data.held_out}
        self.prompts = list(distinct.values())[: settings.generate_val_prompts]
        longest = max(map(len, self.prompts)) + settings.generate_val_max_new_tokens
        if longest > policy.max_seq_len:
            raise ConfigError(
                f"generate_val_max_new_tokens: prompt and completion need {longest} positions, the model has "
                f"{policy.max_seq_len} (max_seq_len); lower it"
            )
        # The shapes of training, whose kernels are compiled.
        self.budget = replace(data.budget, tokens_per_row=max(data.budget.tokens_per_row, longest))
        self.engine = InProcessEngine(batch_size=len(self.prompts)).build(data.tokenizer, policy)

    def note(self, rows: Rows, log_ratio: Tensor) -> None:
        """Keeps the mean log-ratio of each response of a pass, without waiting for the device.

        Args:
            rows (Rows): the pass.
            log_ratio (Tensor): the log-ratio of its response tokens, nats, ``[N]``.
        """
        means = rows.per_response(log_ratio.detach()).sum(1) / rows.mask.sum(1)
        for group in rows.groups:
            for response in group.responses:
                self._log_ratios.setdefault(_key(group, response), means[0])
                means = means[1:]

    def of_round(self, round: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Writes the completions of a round that was trained on, and returns them. Collective.

        Args:
            round (int): the round's number.
            groups (Sequence[Group]): its scored groups.
        """
        keys = list(self._log_ratios)
        values = torch.stack([*self._log_ratios.values()]).tolist() if keys else []  # the device is waited for here
        self._log_ratios.clear()
        found: dict[Any, float] = {}
        for share in gathered(dict(zip(keys, values, strict=True))):
            found = share | found
        rows = [
            self._row(group.prompt, response, score, found.get(_key(group, response)))
            for group in groups
            for response, score in zip(group.responses, group.scores or [None] * len(group.responses), strict=True)
        ]
        self._write(f"round_{round}.jsonl", rows)
        return rows

    def of_held_out(self, step: int) -> list[dict[str, Any]]:
        """Answers the fixed prompts, writes the completions, and returns them. Collective.

        The draws are the same at every step, so that what differs is the policy.
        """
        environment, settings = self.environment, self.settings
        params = SamplingParams(
            max_new_tokens=settings.generate_val_max_new_tokens, temperature=environment.temperature
        )
        mine = range(environment.rank, len(self.prompts), environment.world_size)
        answers = self.engine.generate([self.prompts[i] for i in mine], params, seeds=mine)
        shares = gathered({i: row[0].tokens for i, row in zip(mine, answers, strict=True) if row[0].tokens})
        tokens = {i: response for share in shares for i, response in share.items()}
        groups = [Group(self.prompts[i], (tokens[i],), id=str(i)) for i in sorted(tokens)]
        rows = [
            self._row(group.prompt, group.responses[0], None, log_ratio)
            for group, log_ratio in zip(groups, self._mean_log_ratios(groups), strict=True)
        ]
        self._write(f"step_{step}.jsonl", rows)
        return rows

    def _mean_log_ratios(self, groups: list[Group]) -> list[float | None]:
        """Returns the mean log-ratio of each group's response; None for a reference that cannot score new responses."""
        if isinstance(self.reference, Window):
            return [None] * len(groups)
        found: dict[int, float] = {}
        for planned in pack(groups, self.budget):  # all of them on every rank, since the model is sharded over ranks
            rows = lay_out(groups, planned, self.budget).to(self.environment.device)
            log_ratio = fixed_log_probs(self.policy, rows) - self.reference.log_probs(rows)
            means = rows.per_response(log_ratio).sum(1) / rows.mask.sum(1)
            found |= dict(zip(rows.indices, means.tolist(), strict=True))
        return [found[i] for i in range(len(groups))]

    def _row(
        self, prompt: Sequence[int], response: Sequence[int], reward: float | None, log_ratio: float | None
    ) -> dict[str, Any]:
        finish = "stop" if response[-1] in self.tokenizer.stop_tokens else "length"
        texts = self.tokenizer.decode(list(prompt)), self.tokenizer.decode(list(response))
        return dict(zip(COLUMNS, (*texts, reward, len(response), finish, log_ratio), strict=True))

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.environment.rank != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.folder / name).write_text(lines, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            log.warning(f"{self.folder / name} could not be written ({error}); training continues")


def table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """Returns completions as a table with a line for each, cut to the terminal's width.

    Args:
        rows (Sequence[dict[str, Any]]): the completions.
        width (int | None): characters of a line; None uses the terminal's.
    """
    width = max(60, width or shutil.get_terminal_size((120, 24)).columns)
    lines = [[_shown(row[column]) for column in COLUMNS] for row in rows]
    others = [max(map(len, column)) for column in zip(COLUMNS[2:], *(line[2:] for line in lines), strict=True)]
    room = width - sum(others) - 2 * len(others) - 2
    prompt = min(max(len(line[0]) for line in [COLUMNS, *lines]), room // 3)
    widths = [prompt, min(max(len(line[1]) for line in [COLUMNS, *lines]), room - prompt), *others]
    return "\n".join(
        "  ".join(_fitted(cell, size, i == 1) for i, (cell, size) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in [COLUMNS, *lines]
    )


def _shown(value: Any) -> str:
    """Returns a value in one line; control characters are escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fitted(text: str, width: int, keep_start: bool) -> str:
    """Returns a text padded to a width. A longer one keeps its end, such as a prompt's question, or both ends."""
    if len(text) <= width:
        return text.ljust(width)
    start = width // 2 if keep_start else 0
    return f"{text[:start]}…{text[len(text) - width + start + 1 :]}"


def _key(group: Group, response: Sequence[int]) -> tuple[str, bytes]:
    return group.id, b"".join(int(token).to_bytes(4, "little") for token in response)
