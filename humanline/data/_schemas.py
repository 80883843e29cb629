"""Public schemas of preference data: which columns a source must have to be read as which.

A new schema is an entry of ``SCHEMAS`` and, if none fits, a function that reads a row. Field names stand for columns
that ``column_map`` may rename. ``system`` (or ``system_prompt`` or the like) and ``tools`` are read with every schema.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from humanline.data._readers import (
    PAIR_SCORES,
    Example,
    all_scored,
    arena,
    choice,
    completions,
    higher,
    instruction,
    is_first,
    labelled,
    one_scored,
    openai_pair,
    pair,
    ranked,
    sign,
    typed,
    unscored,
)
from humanline.data._record import SYSTEM, Record
from humanline.errors import ConfigError

__all__ = [
    "ANSWER_PARTS",
    "CONTEXT",
    "FIELDS",
    "LABELS",
    "PAIRS",
    "RESPONSES",
    "SCHEMAS",
    "SCORES",
    "WEIGHTS",
    "Example",
    "Schema",
    "find_schema",
    "instruction",
    "unread_columns",
]

PAIRS, LABELS, SCORES, RESPONSES = "pairs", "labelled responses", "scored responses", "responses"


@dataclass(frozen=True, slots=True)
class Schema:
    """A layout of columns.

    Attributes:
        name (str): the name for ``format`` and for the log.
        kind (str): what a row holds.
        columns (str): the columns that must exist, separated by spaces.
        read (Callable[[Record], Example]): reads a row.
        by_prompt (bool): whether the rows of a prompt form one group.
        when (Callable[[Mapping[str, Any]], bool]): decides by the first row, where columns are not enough.
    """

    name: str
    kind: str
    columns: str
    read: Callable[[Record], Example]
    by_prompt: bool = False
    when: Callable[[Mapping[str, Any]], bool] = lambda row: True


def _of_type(kind: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: row.get("type") == kind


def _without(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    """A column of the name that the field has in general wins over others that could be the prompt."""
    return lambda row: not any(column in row for column in columns)


def _is_transcript(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("chosen"), str) and row["chosen"].lstrip().startswith("Human:")


# ---- The table

SCHEMAS = (
    Schema("implicit_preference", PAIRS, "chosen rejected", pair(), when=lambda row: not _is_transcript(row)),
    Schema("preference", PAIRS, "prompt chosen rejected", pair()),
    Schema("anthropic_hh", PAIRS, "chosen rejected", pair(), when=_is_transcript),
    Schema("ultrafeedback_binarized", PAIRS, "prompt chosen rejected score_chosen score_rejected", pair()),
    Schema("sharegpt", PAIRS, "conversations chosen rejected", pair(prompt="conversations")),
    Schema("ultrainteract", PAIRS, "trajectory chosen rejected", pair(prompt="trajectory")),
    Schema("orca", PAIRS, "question chosen rejected", pair(prompt="question"), when=_without("prompt")),
    Schema(
        *("input_preference", PAIRS, "input chosen rejected"),
        pair(prompt="input"),
        when=_without("prompt", "instruction"),
    ),
    Schema(
        *("instruction_preference", PAIRS, "instruction chosen rejected"),
        pair(prompt="instruction"),
        when=_without("prompt"),
    ),
    Schema(
        *("argilla", PAIRS, "instruction chosen_response rejected_response"),
        pair("chosen_response", "rejected_response", "instruction"),
    ),
    Schema(
        *("pku", PAIRS, "prompt response_0 response_1 better_response_id"),
        choice("response_0", "response_1", "prompt", is_first("better_response_id", 0, 1)),
    ),
    Schema(
        *("helpsteer3", PAIRS, "context response1 response2 overall_preference"),
        choice("response1", "response2", "context", sign("overall_preference", -3, 3)),
    ),
    Schema(
        *("helpsteer2_preference", PAIRS, "prompt response_1 response_2 preference_strength"),
        choice("response_1", "response_2", "prompt", sign("preference_strength", -3, 3)),
    ),
    Schema(
        *("shp", PAIRS, "history human_ref_A human_ref_B labels"),
        choice("human_ref_A", "human_ref_B", "history", is_first("labels", 1, 0)),
    ),
    Schema("chatbot_arena", PAIRS, "conversation_a conversation_b winner", arena),
    Schema(
        *("unified_feedback", PAIRS, "conv_A conv_B conv_A_rating conv_B_rating"),
        choice("conv_A", "conv_B", "prompt", higher("conv_A_rating", "conv_B_rating")),
    ),
    Schema("swift", PAIRS, "messages rejected_response", pair("messages", "rejected_response")),
    Schema("openai_preference", PAIRS, "input preferred_output non_preferred_output", openai_pair),
    Schema("stack_exchange", PAIRS, "question response_j response_k", pair("response_j", "response_k", "question")),
    Schema(
        *("alpaca_eval_annotations", PAIRS, "instruction output_1 output_2 preference"),
        choice("output_1", "output_2", "instruction", sign("preference", 1, 2, unknown=0)),
    ),
    Schema(
        *("halos_pairwise", PAIRS, "type prompt output_A output_B label"),
        choice("output_A", "output_B", "prompt", is_first("label", 1, 0)),
    ),
    Schema("kto", LABELS, "prompt completion label", labelled("completion")),
    Schema("alpaca_kto", LABELS, "instruction output kto_tag", labelled("output", "kto_tag", "instruction")),
    Schema("labelled_sharegpt", LABELS, "conversations kto_tag", labelled("conversations", "kto_tag")),
    Schema(
        *("labelled_conversation", LABELS, "messages label"),
        labelled("messages"),
        when=_without("completion", "output", "chosen"),
    ),
    Schema(
        *("halos_binary", LABELS, "type prompt output label"),
        typed("binary_feedback", labelled("output")),
        when=_of_type("binary_feedback"),
    ),
    Schema(
        *("halos_scalar", SCORES, "type prompt output reward"),
        typed("scalar_feedback", one_scored("output", "reward")),
        by_prompt=True,
        when=_of_type("scalar_feedback"),
    ),
    Schema(
        *("ultrafeedback_armorm", SCORES, "prompt all_generated_responses all_rm_scores"),
        all_scored("all_generated_responses", "all_rm_scores"),
    ),
    Schema("scored_responses", SCORES, "prompt responses scores", all_scored("responses", "scores")),
    Schema("scored_completions", SCORES, "prompt completions scores", all_scored("completions", "scores")),
    Schema("ultrafeedback", SCORES, "instruction completions", completions),
    Schema("nectar", SCORES, "prompt answers", ranked),
    Schema(
        *("helpsteer2", SCORES, "prompt response helpfulness"), one_scored("response", "helpfulness"), by_prompt=True
    ),
    Schema("instruction_output", RESPONSES, "instruction output", unscored("instruction")),
    Schema("alpaca_eval_outputs", RESPONSES, "instruction output generator", unscored("instruction")),
    Schema("halos_samples", RESPONSES, "type prompt output", unscored("prompt"), when=_of_type("sample")),
)

CONTEXT = frozenset(
    (
        "input context contexts history chat_history conversation_history documents document article passage "
        "background knowledge premise choices options functions initial_reason_steps "
        "image images image_url audio video videos"
    ).split()
)
"""Columns that would change what the model sees, if their content is not in the prompt."""
ANSWER_PARTS = frozenset("reasoning_content thinking chosen_reasoning rejected_reasoning tool_calls".split())
"""Columns that may hold a part of a response."""
WEIGHTS = frozenset(("weight", "weights", "sample_weight"))
"""Columns that would weigh an example; all weigh 1 here."""

READ = {*SYSTEM, *WEIGHTS, "tools", *CONTEXT, *ANSWER_PARTS, *(name for names in PAIR_SCORES for name in names)}
"""Columns that every schema reads or refuses."""
FIELDS = {name for schema in SCHEMAS for name in schema.columns.split()} | READ
"""Fields that ``column_map`` can name."""


def _near(name: str, columns: Iterable[Any]) -> str | None:
    """Returns the column whose name is a field's but for its case or a misspelling."""
    written = {str(column).lower(): str(column) for column in columns}
    return written.get(next(iter(difflib.get_close_matches(name, written, n=1, cutoff=0.75)), ""))


def unread_columns(rows: Sequence[Mapping[str, Any]], schema: Schema, column_map: Mapping[str, Any]) -> list[str]:
    """Returns the columns with content that a schema does not read."""
    read = {column_map.get(name, name) for name in READ | set(schema.columns.split())}
    left_out = {name for name, column in column_map.items() if column is None}
    columns = {name: None for row in rows for name, value in row.items() if value is not None}
    return [str(name) for name in columns if name not in read | left_out]


def find_schema(
    rows: Sequence[Mapping[str, Any]], kind: str, column_map: Mapping[str, Any], format: str | None
) -> Schema:
    """Recognises the schema of a source from its first rows.

    Args:
        rows (Sequence[Mapping[str, Any]]): the first rows, at least one.
        kind (str): among several schemas, one of this kind is meant.
        column_map (Mapping[str, Any]): maps a field to its column.
        format (str | None): the schema's name; None recognises it.

    Raises:
        ConfigError: if no schema matches, or several, or the name is unknown.
    """
    renamed = {column: name for name, column in column_map.items()}
    columns = {renamed.get(name, name): None for row in rows for name, value in row.items() if value is not None}
    for name, column in column_map.items():
        if column is None:
            columns.pop(name, None)
    first = {
        name: next((row[column] for row in rows if row.get(column) is not None), None)
        for name in columns
        for column in [column_map.get(name) or name]
    }
    if format is not None:
        named = {schema.name: schema for schema in SCHEMAS}
        if format not in named:
            raise ConfigError(f"format: expected one of {', '.join(named)}, or null, got {format!r}")
        return named[format]
    matching = [s for s in SCHEMAS if columns.keys() >= set(s.columns.split()) and s.when(first)]
    matching = [s for s in matching if s.kind != RESPONSES] or matching  # a prompt file's columns beside new responses
    if first.get("type") is not None:  # HALOs' own samples also have AlpacaEval's columns
        matching = [s for s in matching if s.name.startswith("halos_")] or matching
    closest = [s for s in matching if not any(set(s.columns.split()) < set(o.columns.split()) for o in matching)]
    closest = [s for s in closest if s.kind == kind] or closest
    if len(closest) == 1:
        return closest[0]
    if closest:
        names = ", ".join(f"{s.name} ({', '.join(s.columns.split())})" for s in closest)
        raise ConfigError(f"format: the columns fit several schemas: {names}; set format to the name of one")
    usual = {PAIRS: "preference", LABELS: "kto", SCORES: "ultrafeedback_armorm"}[kind]
    example = next(schema for schema in SCHEMAS if schema.name == usual)
    ids = "; for token ids use humanline.data.encoded_groups" if "responses" in columns else ""
    near = {name: match for name in example.columns.split() if (match := _near(name, columns))}
    if len(near) == len(example.columns.split()):
        ids = f"; perhaps column_map: {{{', '.join(f'{name}: {match}' for name, match in near.items())}}}"
    raise ConfigError(
        f"column_map: the columns {', '.join(map(str, columns)) or '(none)'} fit no schema, such as {usual} "
        f"({', '.join(example.columns.split())}); say which column is which, or rename them (docs/data.md){ids}"
    )
