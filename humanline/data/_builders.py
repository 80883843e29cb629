"""Builders of group datasets, one for each common format of preference data.

A builder reads, checks, encodes and cuts all examples when it is called, so that bad data stops a run before training
starts. Token ids are kept as C ints, 4 bytes each, so tens of thousands of pairs need far less memory than any model.
"""

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from humanline.data._dataset import GroupDataset
from humanline.data._group import Group, TokenBudget
from humanline.data._read import read_records
from humanline.data._record import Message, Record
from humanline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from humanline.data._chat import ChatTokenizer

__all__ = ["encoded_groups", "labelled_groups", "preference_groups", "scored_groups"]

Source = str | Sequence[str]


def preference_groups(
    tokenizer: "ChatTokenizer",
    source: Source,
    *,
    split: str = "train",
    data_files: Source | None = None,
    column_map: Mapping[str, str] | None = None,
    max_tokens: int = 1250,
    max_prompt_tokens: int | None = 625,
) -> GroupDataset:
    """Preference pairs in the Hugging Face format: groups of (chosen, rejected).

    ``chosen`` and ``rejected`` are whole conversations that differ only in the last message, the assistant's. They may
    also be that message or its text alone, with the conversation before it in ``prompt`` (messages, or the user's
    text). If they are whole conversations, a ``prompt`` string is ignored.

    Args:
        tokenizer (ChatTokenizer): encodes prompts and responses with the model's chat template.
        source (Source): a .json, .jsonl or .parquet file, a glob, a list of these, or the name of a Hugging Face
            dataset. As in torchtune, "json" or "parquet" reads the files in ``data_files``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        data_files (Source | None): the files to read, a string or a list; null reads ``source`` itself.
        column_map (Mapping[str, str] | None): maps a field to its column's name, such as {"chosen": "preferred"}; null
            means that columns are named like the fields.
        max_tokens (int): most tokens of a prompt and one response together; a longer response loses its end.
        max_prompt_tokens (int | None): most tokens of the prompt if prompt and response together exceed ``max_tokens``;
            a cut prompt keeps its first token and its end. null never cuts a prompt.

    Returns:
        GroupDataset: the pairs. Pairs that are equal after cutting are dropped and counted in the dataset's report.

    Raises:
        ConfigError: if the source or split does not exist, a mapped field does not, or the token limits leave no room.
        DataError: if an example cannot be used; the message starts with its file and line.
    """
    _check_tokenizer(tokenizer)

    def group(record: Record) -> Group:
        before_chosen, chosen = record.turn("chosen")
        before_rejected, rejected = record.turn("rejected")
        if before_chosen != before_rejected:
            raise record.error("rejected", "has another prompt than the chosen response; a pair needs one prompt")
        if chosen == rejected:
            raise record.error("rejected", "equals the chosen response, so neither is better; drop the line")
        return _encode(record, tokenizer, _prompt(record, before_chosen), [chosen, rejected])

    fields = ("prompt", "chosen", "rejected")
    return _build(group, fields, source, split, data_files, column_map, max_tokens, max_prompt_tokens)


def labelled_groups(
    tokenizer: "ChatTokenizer",
    source: Source,
    *,
    split: str = "train",
    data_files: Source | None = None,
    column_map: Mapping[str, str] | None = None,
    max_tokens: int = 1250,
    max_prompt_tokens: int | None = 625,
) -> GroupDataset:
    """Single responses that are desirable or not, in the Hugging Face format for KTO: groups of one with a label.

    ``prompt`` is messages or the user's text, ``completion`` the assistant's message or its text, ``label`` true or
    false.

    Args:
        tokenizer (ChatTokenizer): encodes prompts and responses with the model's chat template.
        source (Source): a .json, .jsonl or .parquet file, a glob, a list of these, or the name of a Hugging Face
            dataset. As in torchtune, "json" or "parquet" reads the files in ``data_files``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        data_files (Source | None): the files to read, a string or a list; null reads ``source`` itself.
        column_map (Mapping[str, str] | None): maps a field to its column's name, such as {"label": "liked"}; null
            means that columns are named like the fields.
        max_tokens (int): most tokens of a prompt and one response together; a longer response loses its end.
        max_prompt_tokens (int | None): most tokens of the prompt if prompt and response together exceed ``max_tokens``;
            a cut prompt keeps its first token and its end. null never cuts a prompt.

    Returns:
        GroupDataset: the groups.

    Raises:
        ConfigError: if the source or split does not exist, a mapped field does not, or the token limits leave no room.
        DataError: if an example cannot be used; the message starts with its file and line.
    """
    _check_tokenizer(tokenizer)

    def group(record: Record) -> Group:
        before, completion = record.turn("completion")
        label = record.require("label", bool, "true or false")
        return _encode(record, tokenizer, _prompt(record, before), [completion], labels=(label,))

    fields = ("prompt", "completion", "label")
    return _build(group, fields, source, split, data_files, column_map, max_tokens, max_prompt_tokens)


def scored_groups(
    tokenizer: "ChatTokenizer",
    source: Source,
    *,
    split: str = "train",
    data_files: Source | None = None,
    column_map: Mapping[str, str] | None = None,
    max_tokens: int = 1250,
    max_prompt_tokens: int | None = 625,
) -> GroupDataset:
    """Scored responses in the format of UltraFeedback-ArmoRM: groups of G responses with scores.

    ``prompt`` is messages or the user's text, ``all_generated_responses`` a list of texts, ``all_rm_scores`` one number
    per response.

    Args:
        tokenizer (ChatTokenizer): encodes prompts and responses with the model's chat template.
        source (Source): a .json, .jsonl or .parquet file, a glob, a list of these, or the name of a Hugging Face
            dataset. As in torchtune, "json" or "parquet" reads the files in ``data_files``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        data_files (Source | None): the files to read, a string or a list; null reads ``source`` itself.
        column_map (Mapping[str, str] | None): maps a field to its column's name, such as {"prompt": "question"}; null
            means that columns are named like the fields.
        max_tokens (int): most tokens of a prompt and one response together; a longer response loses its end.
        max_prompt_tokens (int | None): most tokens of the prompt if prompt and response together exceed ``max_tokens``;
            a cut prompt keeps its first token and its end. null never cuts a prompt.

    Returns:
        GroupDataset: the groups.

    Raises:
        ConfigError: if the source or split does not exist, a mapped field does not, or the token limits leave no room.
        DataError: if an example cannot be used; the message starts with its file and line.
    """
    _check_tokenizer(tokenizer)

    def group(record: Record) -> Group:
        responses = record.texts("all_generated_responses")
        scores = record.scores("all_rm_scores", len(responses))
        return _encode(record, tokenizer, record.prompt(), responses, scores=scores)

    fields = ("prompt", "all_generated_responses", "all_rm_scores")
    return _build(group, fields, source, split, data_files, column_map, max_tokens, max_prompt_tokens)


def encoded_groups(
    tokenizer: "ChatTokenizer | None",
    source: Source,
    *,
    split: str = "train",
    data_files: Source | None = None,
    column_map: Mapping[str, str] | None = None,
    max_tokens: int = 1250,
    max_prompt_tokens: int | None = 625,
) -> GroupDataset:
    """Groups that are already token ids.

    ``prompt`` is a list of ids, ``responses`` a list of such lists, ``scores`` or ``labels`` one value per response.
    Without scores and labels a group must be a pair, the chosen response first.

    Args:
        tokenizer (ChatTokenizer | None): the ids must be in its vocabulary; None does not check them.
        source (Source): a .json, .jsonl or .parquet file, a glob, a list of these, or the name of a Hugging Face
            dataset. As in torchtune, "json" or "parquet" reads the files in ``data_files``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        data_files (Source | None): the files to read, a string or a list; null reads ``source`` itself.
        column_map (Mapping[str, str] | None): maps a field to its column's name, such as {"scores": "rewards"}; null
            means that columns are named like the fields.
        max_tokens (int): most tokens of a prompt and one response together; a longer response loses its end.
        max_prompt_tokens (int | None): most tokens of the prompt if prompt and response together exceed ``max_tokens``;
            a cut prompt keeps its first token and its end. null never cuts a prompt.

    Returns:
        GroupDataset: the groups.

    Raises:
        ConfigError: if the source or split does not exist, a mapped field does not, or the token limits leave no room.
        DataError: if an example cannot be used; the message starts with its file and line.
    """
    vocab_size = getattr(tokenizer, "vocab_size", None)

    def group(record: Record) -> Group:
        prompt = record.ids("prompt", vocab_size)
        responses = record.id_lists("responses", vocab_size)
        scores = None if record.get("scores") is None else record.scores("scores", len(responses))
        labels = None if record.get("labels") is None else record.labels("labels", len(responses))
        if scores is None and labels is None:
            if len(responses) != 2:
                problem = f"has {len(responses)} entries but no scores or labels; add them, or provide a pair"
                raise record.error("responses", problem)
            if responses[0] == responses[1]:
                raise record.error("responses", "has two equal entries, so neither is better; drop the line")
        return Group(prompt, responses, scores, labels, record.where)

    fields = ("prompt", "responses", "scores", "labels")
    return _build(group, fields, source, split, data_files, column_map, max_tokens, max_prompt_tokens)


def _build(
    parse: Callable[[Record], Group],
    fields: Sequence[str],
    source: Source,
    split: str,
    data_files: Source | None,
    column_map: Mapping[str, str] | None,
    max_tokens: int,
    max_prompt_tokens: int | None,
) -> GroupDataset:
    """Reads every record of a source into a group within the budget, and counts what was cut or dropped."""
    budget = TokenBudget(max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens)
    column_map = column_map or {}
    for field in column_map:
        if field not in fields:
            raise ConfigError(f"column_map: expected fields of this dataset ({', '.join(fields)}), got '{field}'")

    name, records = read_records(source, split, data_files, column_map)
    groups: list[Group] = []
    cut_prompts = cut_responses = dropped = 0
    quiet = os.environ.get("RANK", "0") != "0"
    for record in tqdm(records, desc=f"reading {name}", unit=" groups", delay=2, leave=False, disable=quiet):
        whole = parse(record)
        group = budget.fit(whole)
        cut_prompts += len(group.prompt) < len(whole.prompt)
        cut_responses += sum(
            len(cut) < len(response) for cut, response in zip(group.responses, whole.responses, strict=True)
        )
        # Responses may differ only past the cut, or in white space that the chat template strips.
        if group.is_pair and group.responses[0] == group.responses[1]:
            dropped += 1
        else:
            groups.append(group)
    if not groups:
        if dropped:
            raise DataError(f"{name}: all {dropped:,} pairs are equal once encoded and cut; raise max_tokens")
        raise DataError(f"{name}: no examples in split '{split}'; check the file and the split")

    notes = [
        f"{cut_prompts:,} prompts and {cut_responses:,} responses truncated "
        f"(max_tokens {budget.max_tokens}, max_prompt_tokens {budget.max_prompt_tokens})"
    ]
    if dropped:
        notes.append(f"{dropped:,} pairs dropped (equal once encoded and cut)")
    return GroupDataset(groups, name, notes, budget)


def _check_tokenizer(tokenizer: "ChatTokenizer") -> None:
    if not hasattr(tokenizer, "encode_prompt"):
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} has no chat template to encode text with; "
            "set tokenizer._component_ to humanline.data.ChatTokenizer, or use encoded_groups"
        )


def _prompt(record: Record, before: list[Message] | None) -> list[Message]:
    """Returns the prompt of a record: the messages before its response if there are any, else the field ``prompt``."""
    if before is None:
        return record.prompt()
    if isinstance(record.get("prompt"), list) and record.prompt() != before:
        raise record.error("prompt", "differs from the messages before the response; provide the prompt once")
    return before


def _encode(
    record: Record,
    tokenizer: "ChatTokenizer",
    prompt: list[Message],
    responses: Sequence[str],
    scores: tuple[float, ...] | None = None,
    labels: tuple[bool, ...] | None = None,
) -> Group:
    try:
        ids = array("i", tokenizer.encode_prompt(prompt))
        response_ids = tuple(array("i", tokenizer.encode_response(prompt, response)) for response in responses)
    except DataError as error:  # the chat template rejects the conversation, but does not know its place
        raise DataError(f"{record.where}: {error}") from error
    return Group(ids, response_ids, scores, labels, record.where)
