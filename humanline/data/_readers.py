"""Readers of rows: each turns a row of a schema into an example, or raises the error that the row cannot be used."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from humanline.data._messages import Message, text_of
from humanline.data._record import Record

__all__ = [
    "PAIR_SCORES",
    "Example",
    "all_scored",
    "arena",
    "choice",
    "completions",
    "higher",
    "instruction",
    "is_first",
    "labelled",
    "one_scored",
    "openai_pair",
    "pair",
    "ranked",
    "sign",
    "squeezed",
    "typed",
    "unscored",
    "winner",
]


PAIR_SCORES = tuple(
    (f"{before}chosen{behind}", f"{before}rejected{behind}")
    for before, behind in (("score_", ""), ("", "_score"), ("", "_rating"), ("rating_", ""))
)
"""Columns with the scores of a pair."""
_SCORE_COLUMNS = frozenset(name for names in PAIR_SCORES for name in names)
_WINNERS = {"model_a": True, "model_b": False, "both_bad": None, "bothbad": None}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the assistant's answers to it, before they are encoded.

    Attributes:
        where (str): the row's place in its source.
        prompt (list[Message]): the messages to answer.
        responses (list[Message]): the assistant's messages; in a pair the chosen one comes first.
        scores (tuple[float, ...] | None): one per response, higher is better.
        labels (tuple[bool, ...] | None): one per response, True if desirable.
        tools (list[Any] | None): the tools that the model may call.
    """

    where: str
    prompt: list[Message]
    responses: list[Message]
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    tools: list[Any] | None = None


def pair(chosen: str = "chosen", rejected: str = "rejected", prompt: str = "prompt") -> Callable[[Record], Example]:
    """Reads a response that is better and one that is worse. Each may be a whole conversation."""

    def read(record: Record) -> Example:
        _check_scores(record)
        return _preferred(record, prompt, chosen, rejected, first_is_better=True)

    return read


def _check_scores(record: Record) -> None:
    """Refuses a pair whose own scores say that the rejected response is better, or that neither is.

    Scores that are no numbers say nothing.
    """
    known = record.column_map or not _SCORE_COLUMNS.isdisjoint(record.row)  # to be fast
    for chosen, rejected in PAIR_SCORES if known else ():
        try:
            scores = float(record.get(chosen)), float(record.get(rejected))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        keep = f"column_map: {{{chosen}: null}} ignores the scores"
        if scores[0] < scores[1]:
            raise record.error(chosen, f"is below '{rejected}' ({scores[0]:g}, {scores[1]:g}); {keep}")
        if scores[0] == scores[1]:
            raise record.tie(f"'{chosen}' equals '{rejected}' ({keep})")


def choice(first: str, second: str, prompt: str, first_is_better: Callable[[Record], bool | None]) -> Any:
    """Reads two responses, and which of them is better (None: neither)."""

    def read(record: Record) -> Example:
        better = first_is_better(record)
        if better is None:
            raise record.tie("neither response is better")
        return _preferred(record, prompt, first, second, better)

    return read


def _preferred(record: Record, prompt: str, first: str, second: str, first_is_better: bool) -> Example:
    (before, a), (before_second, b) = record.turn(first), record.turn(second)
    if None not in (before, before_second) and before != before_second:
        raise record.error(second, f"has another prompt than '{first}'; a pair needs one prompt")
    before = before_second if before is None else before
    if a == b:
        raise record.error(second, f"equals '{first}', so neither is better; drop the line")
    return Example(record.where, _prompt(record, prompt, before), [a, b] if first_is_better else [b, a])


def arena(record: Record) -> Example:
    """Reads two conversations and the winner. After different first answers, they have no prompt in common."""
    (before, _), (before_second, _) = record.turn("conversation_a"), record.turn("conversation_b")
    if before != before_second:
        raise record.tie("the last responses answer different conversations")
    return choice("conversation_a", "conversation_b", "prompt", winner)(record)


def openai_pair(record: Record) -> Example:
    """Reads a pair of OpenAI's preference fine-tuning, whose ``input`` has the messages and the tools."""
    given = record.require("input", dict, "an object with messages")
    outputs = {"chosen": record.get("preferred_output"), "rejected": record.get("non_preferred_output")}
    row = {"prompt": given.get("messages"), "tools": given.get("tools"), **outputs}
    inner = Record(record.where, row, {}, record.remarks)
    return replace(pair()(inner), tools=inner.tools())


def labelled(response: str, label: str = "label", prompt: str = "prompt") -> Callable[[Record], Example]:
    """Reads a response with a label."""

    def read(record: Record) -> Example:
        before, answer = record.turn(response)
        return Example(record.where, _prompt(record, prompt, before), [answer], labels=(record.label(label),))

    return read


def all_scored(responses: str, scores: str) -> Callable[[Record], Example]:
    """Reads all responses to a prompt, with a score for each."""

    def read(record: Record) -> Example:
        answers = record.answers(responses)
        return Example(record.where, record.prompt(), answers, scores=record.scores(scores, len(answers)))

    return read


def completions(record: Record) -> Example:
    """Reads UltraFeedback's completions: objects with the response and its ``overall_score``."""
    parts = _parts(record, "completions", "completion")
    answers = [_answer(part, "response") for part in parts]
    key = "overall_score" if any(part.get("overall_score") is not None for part in parts) else "fine-grained_score"
    scores = tuple(part.number(key) for part in parts)
    return Example(record.where, record.prompt("instruction"), answers, scores=scores)


def typed(kind: str, read: Callable[[Record], Example]) -> Callable[[Record], Example]:
    """Reads rows of one ``type``."""

    def read_typed(record: Record) -> Example:
        if record.get("type") not in (None, kind):
            raise record.error("type", f"must be '{kind}' as in the rows before; store each type in a file of its own")
        return read(record)

    return read_typed


def _parts(record: Record, field: str, name: str) -> list[Record]:
    """Returns the objects of a list as rows, whose places have the name."""
    rows = record.require(field, list, "a list of objects")
    if not rows:
        raise record.error(field, "is empty; drop the line")
    if not all(isinstance(row, Mapping) for row in rows):
        raise record.error(field, "must be a list of objects, got other values in it; correct them")
    return [Record(f"{record.where}, {name} {i}", row, {}, record.remarks) for i, row in enumerate(rows)]


def ranked(record: Record) -> Example:
    """Reads Nectar's answers: objects with the answer and its rank, 1 for the best."""
    parts = _parts(record, "answers", "answer")
    answers = [_answer(part, "answer") for part in parts]
    return Example(record.where, record.prompt(), answers, scores=tuple(-part.number("rank") for part in parts))


def one_scored(response: str, score: str) -> Callable[[Record], Example]:
    """Reads one of several rows of a prompt: a response with its score."""

    def read(record: Record) -> Example:
        return Example(record.where, record.prompt(), [_answer(record, response)], scores=(record.number(score),))

    return read


def unscored(prompt: str) -> Callable[[Record], Example]:
    """Reads a response that nothing is known about."""
    return lambda record: Example(record.where, _prompt(record, prompt, None), [_answer(record, "output")])


def _answer(record: Record, field: str) -> Message:
    before, message = record.turn(field)
    if before is not None:
        raise record.error(field, "must be a response alone, got a conversation")
    return message


def _prompt(record: Record, field: str, before: list[Message] | None) -> list[Message]:
    """Returns the messages before a response if there are any, else the prompt's field. A text may be one of them."""
    if before is None:
        return instruction(record) if field == "instruction" else record.prompt(field)
    if record.get(field) in (None, "") or (given := record.prompt(field)) == before[: len(given)]:
        return before
    if given[0]["content"] != record.get(field):  # messages, or their text in another form
        raise record.error(field, "differs from the messages before the response; provide the prompt once")
    if squeezed(given[0]["content"]) not in squeezed(text_of(before)):
        record.remarks.append(f"the text of '{field}' is not in the conversation, which counts")
    return before


def instruction(record: Record) -> list[Message]:
    """Returns the prompt of Alpaca's ``instruction`` and ``input``, if there is one."""
    messages, more = record.prompt("instruction"), record.get("input")
    if isinstance(more, int | float) and not isinstance(more, bool) and more == more:  # NaN is a table's empty cell
        more = str(more)
    if isinstance(more, str) and more.strip():
        messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}\n\n{more}"}
    return messages


def squeezed(text: str) -> str:
    """Returns a text without white space, to compare what it says."""
    return "".join(text.split())


def is_first(field: str, first: float, second: float) -> Callable[[Record], bool | None]:
    """Whether a number names the first response or the second; the number in the middle is a tie."""

    def decide(record: Record) -> bool | None:
        number = record.number(field)
        if number not in (first, second, (first + second) / 2):
            raise record.error(field, f"must be {first} or {second}, got {number:g}; correct it or drop the line")
        return {first: True, second: False}.get(number)

    return decide


def sign(field: str, lowest: float, highest: float, unknown: float | None = None) -> Callable[[Record], bool | None]:
    """The first response is better below the middle of the scale, the second above it; ``unknown`` is a tie too."""

    def decide(record: Record) -> bool | None:
        number, middle = record.number(field), (lowest + highest) / 2
        if number in (middle, unknown):
            return None
        if not lowest <= number <= highest:
            raise record.error(
                field, f"must be from {lowest} to {highest}, got {number:g}; correct it or drop the line"
            )
        return number < middle

    return decide


def higher(first: str, second: str) -> Callable[[Record], bool | None]:
    """The response with the higher score is better."""

    def decide(record: Record) -> bool | None:
        scores = record.number(first), record.number(second)
        return None if scores[0] == scores[1] else scores[0] > scores[1]

    return decide


def winner(record: Record) -> bool | None:
    """The response of the model that Chatbot Arena names as ``winner`` is better."""
    given = record.require("winner", str, "model_a, model_b or a tie")
    named = re.sub(r"[\W_]+", "_", given.strip().lower())
    if named not in _WINNERS and not named.startswith("tie"):
        raise record.error("winner", f"must be model_a, model_b or a tie, got '{given}'; correct it or drop the line")
    return _WINNERS.get(named)
