"""Builders of group datasets, one for each kind of preference data.

A builder reads, checks, encodes and cuts all rows when it is called, so that bad data is known before training starts.
The public schema of a source is recognised by its columns (:mod:`humanline.data._schemas`).
"""

from typing import TYPE_CHECKING, Any

from humanline.data._build import build, map_rows, parse_text
from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.data._options import DatasetOptions, with_options
from humanline.data._read import SourceName
from humanline.data._record import Record
from humanline.data._schemas import LABELS, PAIRS, SCORES
from humanline.errors import ConfigError

if TYPE_CHECKING:
    from humanline.data._chat import ChatTokenizer

__all__ = ["encoded_groups", "labelled_groups", "preference_groups", "scored_groups"]


@with_options
def preference_groups(tokenizer: "ChatTokenizer", source: SourceName, options: DatasetOptions) -> GroupDataset:
    """Preference data as text, of any public schema; of several that fit, pairs: groups of (chosen, rejected).

    In the Hugging Face format, ``chosen`` and ``rejected`` are whole conversations that differ only in the last
    message, the assistant's. They may also be that message or its text alone, with the conversation before it in
    ``prompt`` (messages, or the user's text). If they are whole conversations, these count, and the report says where
    the text of ``prompt`` is another one. A column ``system`` (or ``system_prompt``) is the system message, and
    ``tools`` are handed to the chat template.

    Rows that cannot be used are dropped and counted by reason. If they are more than a tenth, the run stops, since then
    the format is wrong and not the rows.

    The encoded groups are kept in the folder $HUMANLINE_CACHE (else ``~/.cache/humanline``). The next run with the same
    data, tokenizer and settings reads them there, and the processes of a node share them in memory.

    Args:
        tokenizer (ChatTokenizer): encodes prompts and responses with the model's chat template.
        source (SourceName): a file (.json, .jsonl, .csv or .tsv, also with .gz; .parquet), a glob, a list of these; a
            folder of files, or one that ``save_to_disk`` wrote; or the name of a Hugging Face dataset. As in torchtune,
            "json", "csv" or "parquet" reads the files in ``data_files``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        name (str | None): the config of a Hugging Face dataset, such as "main".
        data_files (DataFiles | None): the files to read: a string, a list, or either by split; null reads ``source``
            itself.
        revision (str | None): commit, tag or branch of a Hugging Face dataset; null for the newest.
        streaming (bool): refused if true, since all rows are checked before training starts.
        format (str | None): the name of the schema; null recognises it from the columns and logs it.
        column_map (Mapping[str, str | None] | None): maps a field to its column's name, such as {"chosen":
            "preferred"}, or to null if its column is to be ignored; null means that columns are named like the fields.
        system_prompt (str | None): the system message of conversations that have none of their own; null adds none.
        on_bad_row (str): "drop" drops rows that cannot be used, "stop" refuses the dataset and lists all reasons.
        max_tokens (int): most tokens of a prompt and one response together; a longer response loses its end.
        max_prompt_tokens (int | None): most tokens of the prompt if prompt and response together exceed ``max_tokens``;
            a cut prompt keeps its first token and its end. null never cuts a prompt.

    Returns:
        GroupDataset: the groups. Pairs that are equal after cutting are dropped and counted in the dataset's report.

    Raises:
        ConfigError: if the source or split does not exist, several schemas fit, the token limits leave no room, or the
            chat template would leave out a part of the data.
        DataError: if more than a tenth of the rows cannot be used, or any with ``on_bad_row: stop``; the message names
            the first row of each reason.
    """
    return _text_groups(PAIRS, tokenizer, source, options)


@with_options
def labelled_groups(tokenizer: "ChatTokenizer", source: SourceName, options: DatasetOptions) -> GroupDataset:
    """Preference data as text, of any public schema; of several that fit, labelled responses: groups of one.

    In the Hugging Face format for KTO, ``prompt`` is messages or the user's text, ``completion`` the assistant's
    message or its text, ``label`` true or false (or 1 or 0). For all else see :func:`preference_groups`.
    """
    return _text_groups(LABELS, tokenizer, source, options)


@with_options
def scored_groups(tokenizer: "ChatTokenizer", source: SourceName, options: DatasetOptions) -> GroupDataset:
    """Preference data as text, of any public schema; of several that fit, groups of G responses with scores.

    In the format of UltraFeedback-ArmoRM, ``prompt`` is messages or the user's text, ``all_generated_responses`` a list
    of texts, ``all_rm_scores`` one number per response. For all else see :func:`preference_groups`.
    """
    return _text_groups(SCORES, tokenizer, source, options)


@with_options
def encoded_groups(tokenizer: "ChatTokenizer | None", source: SourceName, options: DatasetOptions) -> GroupDataset:
    """Groups that are already token ids.

    ``prompt`` is a list of ids, ``responses`` a list of such lists, ``scores`` or ``labels`` one value per response.
    Without scores and labels a group must be a pair, the chosen response first. The ids must be in the tokenizer's
    vocabulary; without a tokenizer this is not checked. For all else see :func:`preference_groups`.
    """
    for name in ("format", "system_prompt"):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"{name}: expected null, got {value!r}; encoded groups have no text")
    vocab_size = getattr(tokenizer, "vocab_size", None)

    def parse(record: Record) -> Group:
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
    return build(source, options, fields, ["ids", vocab_size], map_rows(parse, options.column_map or {}))


def _text_groups(kind: str, tokenizer: Any, source: SourceName, options: DatasetOptions) -> GroupDataset:
    if not hasattr(tokenizer, "encode_prompt"):
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} has no chat template to encode text with; "
            "set tokenizer._component_ to humanline.data.ChatTokenizer, or use encoded_groups"
        )
    return parse_text(kind, tokenizer, source, options)
