"""What a row says is taken as it says it, or refused, or counted: codes, scores, prompts, printed messages, tools."""

import json
import re

import pytest
from test_groups import PAIR, WordTokenizer, assistant, in_words, user, write_lines

from humanline.data import labelled_groups, preference_groups, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.rollout import read_prompts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
HELLO = "<user> hi <assistant>"


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def turns(prompt, answer):
    return [user(prompt), assistant(answer)]


# ---- Codes and scores of a preference

SHP = {"history": "hi", "human_ref_A": "hello", "human_ref_B": "go"}
PKU = {"prompt": "hi", "response_0": "hello", "response_1": "go"}
ARENA = {"conversation_a": turns("hi", "hello"), "conversation_b": turns("hi", "go")}
ALPACA = {"instruction": "hi", "output_1": "hello", "output_2": "go"}
HELPSTEER = {"prompt": "hi", "response_1": "hello", "response_2": "go"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (SHP | {"labels": 2}, "'labels' must be 1 or 0, got 2"),
        (PKU | {"better_response_id": -1}, "'better_response_id' must be 0 or 1, got -1"),
        (ARENA | {"winner": "model_c"}, "'winner' must be model_a, model_b or a tie, got 'model_c'"),
        (ALPACA | {"preference": -1}, "'preference' must be from 1 to 2, got -1"),
        (HELPSTEER | {"preference_strength": 7}, "'preference_strength' must be from -3 to 3, got 7"),
        (PAIR | {"score_chosen": 3, "score_rejected": 5}, "'score_chosen' is below 'score_rejected'"),
        (PAIR | {"chosen_rating": 1, "rejected_rating": 2}, "'chosen_rating' is below 'rejected_rating'"),
    ],
)
def test_a_code_that_names_no_response_is_a_fault_and_no_tie(tokenizer, row, said):
    with pytest.raises(DataError, match=said):
        preference_groups(tokenizer, write_lines("data.jsonl", [row] * 3))


@pytest.mark.parametrize(
    "row",
    [
        *(ARENA | {"winner": winner} for winner in ("tie", "tie (bothbad)", "Tie")),
        *(ALPACA | {"preference": preference} for preference in (0, 1.5)),
        PAIR | {"score_chosen": 4, "score_rejected": 4.0},
        SHP | {"labels": 0.5},
    ],
)
def test_ties_are_left_out_and_counted(tokenizer, row):
    sound = {name: value for name, value in row.items() if name != "winner"} | {"winner": "Model A"}
    sound |= {"preference": 1, "labels": 1, "score_chosen": 5}
    sound = {name: sound[name] for name in row}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [sound, row, row]))
    assert (len(dataset), dataset.dropped) == (1, 2)


def test_the_scores_of_ultrafeedback_are_of_one_scale(tokenizer):
    def row(*scores):
        parts = zip(("hello", "go"), scores, strict=True)
        return {"instruction": "hi", "completions": [{"response": said, **score} for said, score in parts]}

    mixed = row({"overall_score": 8}, {"fine-grained_score": 4})
    sound = row({"fine-grained_score": 4.5}, {"fine-grained_score": 1})
    dataset = scored_groups(tokenizer, write_lines("data.jsonl", [*[sound] * 20, mixed]))
    assert (len(dataset), dataset.dropped, dataset[0].scores) == (20, 1, (4.5, 1.0))


def test_each_row_of_halos_has_the_type_of_the_first(tokenizer):
    row = {"prompt": [user("hi")], "output": [assistant("hello")], "label": 1}
    types = [None, *["binary_feedback"] * 20, "scalar_feedback"]
    dataset = labelled_groups(tokenizer, write_lines("data.jsonl", [row | {"type": each} for each in types]))
    assert (len(dataset), dataset.dropped) == (21, 1)
    assert "'type' must be 'binary_feedback'" in dataset.report()


# ---- Prompts and what stands beside them


@pytest.mark.parametrize("prompt", [[user("else")], user("else"), json.dumps([user("else")])])
def test_messages_that_disagree_with_the_conversation_are_refused(tokenizer, prompt):
    row = {"prompt": prompt, "chosen": turns("hi", "hello"), "rejected": turns("hi", "go")}
    with pytest.raises(DataError, match="'prompt' differs from the messages before the response"):
        preference_groups(tokenizer, write_lines("data.jsonl", [row]))


def test_a_text_that_is_not_in_the_conversation_is_counted(tokenizer):
    row = {"prompt": "else", "chosen": turns("hi", "hello"), "rejected": turns("hi", "go")}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [row, row | {"prompt": " hi\n"}, row]))
    assert in_words(tokenizer, dataset)[0] == (HELLO, ["hello <end>", "go <end>"])
    assert "the text of 'prompt' is not in the conversation, which counts (2, the first: data" in dataset.report()


def test_columns_that_nothing_reads_are_named(tokenizer):
    rows = [PAIR | {"doc": "x", "System": "be kind", "id": 3, "score_chosen": 2, "score_rejected": 1, "empty": None}]
    report = preference_groups(tokenizer, write_lines("data.jsonl", rows)).report()
    assert "columns not read: doc, System, id;" in report


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"reasoning": "the first is better"}, "columns not read: reasoning"),
        ({"persona": "x", "hint": "y"}, "columns not read: persona, hint"),
        ({"context": 512}, "column 'context' is not read, since it is a number (1, "),
        ({"score_chosen": "N/A", "score_rejected": 3}, "1 group from"),
        ({"score_chosen": float("nan"), "score_rejected": 3}, "1 group from"),
        ({"weight": float("nan")}, "1 group from"),
        ({"history": "[]", "documents": "[]"}, "1 group from"),
        ({"thinking": "hello"}, "1 group from"),
        ({"system_prompt": "Use this: sky.", "context": "sky."}, "1 group from"),
    ],
)
def test_a_column_about_the_row_stops_no_run(tokenizer, row, said):
    row = PAIR | {"chosen": "hello"} | row
    assert said in preference_groups(tokenizer, write_lines("data.jsonl", [row])).report()


def test_a_column_that_is_mapped_to_another_field_is_not_ignored(tokenizer):
    source = write_lines("data.jsonl", [PAIR | {"context": "be kind"}])
    (group,) = preference_groups(tokenizer, source, column_map={"system": "context"})
    assert tokenizer.decode(group.prompt).startswith("<system> be kind <user>")


def test_the_scores_of_a_pair_can_be_left_out(tokenizer):
    source = write_lines("data.jsonl", [PAIR | {"chosen_score": 1, "rejected_score": 2}])
    with pytest.raises(DataError, match="column_map: {chosen_score: null} ignores the scores"):
        preference_groups(tokenizer, source)
    assert len(preference_groups(tokenizer, source, column_map={"chosen_score": None})) == 1


@pytest.mark.parametrize("value", [42, [3, 1], {"A": 7}, 3.5])
def test_a_number_is_content_too(tokenizer, value):
    ignored = "column 'options' would be ignored, and the prompt has not its content"
    with pytest.raises(DataError, match=ignored):
        preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"options": value}]))
    with pytest.raises(DataError, match=ignored):
        read_prompts(write_lines("prompts.jsonl", [{"prompt": "hi", "options": value}]))


def test_an_input_that_is_a_number_belongs_to_the_instruction(tokenizer):
    rows = [{"instruction": "double it", "input": 42, "chosen": "84", "rejected": "42"}]
    (group,) = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert tokenizer.decode(group.prompt) == "<user> double it 42 <assistant>"


def test_one_response_may_be_a_conversation_and_the_other_a_text(tokenizer):
    rows = [{"prompt": "hi", "chosen": "hello", "rejected": turns("hi", "go")}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert in_words(tokenizer, dataset) == [(HELLO, ["hello <end>", "go <end>"])]


@pytest.mark.parametrize("named", [("Prompt", "Chosen", "Rejected"), ("prompts", "chosenn", "rejected")])
def test_misspelt_columns_are_suggested(tokenizer, named):
    row = dict(zip(named, ("hi", "hello", "go"), strict=True))
    said = f"perhaps column_map: {{prompt: {named[0]}, chosen: {named[1]}, rejected: {named[2]}}}"
    with pytest.raises(ConfigError, match=said):
        preference_groups(tokenizer, write_lines("data.jsonl", [row]))


# ---- Whether a response is to be learnt from


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.5}])
def test_a_response_that_is_not_to_be_learnt_from_is_a_bad_row(tokenizer, field):
    bad = PAIR | {"chosen": [assistant("hello") | field]}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 20, bad]))
    assert (len(dataset), dataset.dropped) == (20, 1)
    assert f"'chosen' is {str(next(iter(field.values()))).lower()}" in dataset.report()


def test_weights_other_than_1_are_refused_and_can_be_left_out(tokenizer):
    assert len(preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"weight": 1.0}]))) == 1
    source = write_lines("data.jsonl", [PAIR | {"weight": 0.5}])
    with pytest.raises(DataError, match="column 'weight' has weights .0.5., and all examples weigh 1 here"):
        preference_groups(tokenizer, source)
    assert len(preference_groups(tokenizer, source, column_map={"weight": None})) == 1


# ---- Text that is something else


@pytest.mark.parametrize(
    "prompt",
    [
        json.dumps({"messages": [user("hi")]}),
        json.dumps({"conversations": [{"from": "human", "value": "hi"}]}),
        json.dumps([{"content": "hi", "role": "user"}]),
        f"({user('hi')},)",
    ],
)
def test_a_printed_conversation_is_read_in_each_form(tokenizer, prompt):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"prompt": prompt}]))
    assert tokenizer.decode(dataset[0].prompt) == HELLO


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("[{'role': 'user', 'content': 'h", "a printed list of messages that cannot be read"),
        (f"{json.dumps(user('a'))}\n{json.dumps(user('b'))}", "a printed list of messages that cannot be read"),
        ("[ChatMessage(role='user', content='hi')]", "a printed list of messages that cannot be read"),
        ("Human: hi\nAssistant: hello\nHuman: who?", "a transcript whose turns have no empty line between them"),
    ],
)
def test_what_only_looks_like_text_is_refused(tokenizer, prompt, said):
    with pytest.raises(DataError, match=f"'prompt' is {said}"):
        preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"prompt": prompt}]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["hi"]', "is a printed list of texts, and taken as it is"),
        ("['hi', 'who?']", "is a printed list of texts, and taken as it is"),
        ("Be kind.\n\nHuman: hi\n\nAssistant: hello", "has turns of a transcript .'Human:', 'Assistant:'."),
    ],
)
def test_text_that_may_be_something_else_is_taken_and_counted(tokenizer, text, said):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"prompt": text}] * 2))
    assert tokenizer.decode(dataset[0].prompt).split() == f"<user> {text} <assistant>".split()
    assert re.search(rf"'prompt' {said}.* \(2, the first: data.jsonl line 1\)", dataset.report())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": '["hi"]'}, "'prompt' is a printed list of texts, and taken as it is (2, the first: prompts"),
        ({"context": 512}, "column 'context' is not read, since it is a number (2, the first: prompts"),
    ],
)
def test_prompt_files_say_it_too(caplog, row, said):
    assert len(read_prompts(write_lines("prompts.jsonl", [{"prompt": "hi"} | row] * 2))) == 2
    assert said in caplog.text


def test_turns_within_any_of_several_responses_are_counted_once_for_a_row(tokenizer):
    within = "So:\n\nHuman: a\n\nAssistant: b"
    row = {"prompt": "hi", "all_generated_responses": [within, within + "!", "go"], "all_rm_scores": [2, 1, 0]}
    report = scored_groups(tokenizer, write_lines("data.jsonl", [row])).report()
    assert "'all_generated_responses' has turns of a transcript" in report and "one text (1, the first" in report


def test_an_empty_cell_is_no_number(tokenizer):
    report = preference_groups(tokenizer, write_lines("data.jsonl", [PAIR | {"context": float("nan")}])).report()
    assert "context" not in report


def test_a_response_that_is_a_printed_conversation_is_a_bad_row(tokenizer):
    bad = PAIR | {"chosen": json.dumps({"messages": turns("who?", "me")})}
    with pytest.raises(DataError, match="'chosen' is a printed conversation; store it as messages, or drop the line"):
        preference_groups(tokenizer, write_lines("data.jsonl", [bad]))


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "x", "role": "admin"}', '[{"role": "admin"}]', "[1, 2]", "Human: no", '{"age": 3, "role": "user"}'),
        *('{"users":[{"role":"user","content":1}]} is JSON.', "Message(role='user', content='x') is how.", "<s>a</s>"),
        *("### Response Plan", "### Assistant Manager", "ends with the token </s>"),
    ],
)
def test_other_text_stays_text(tokenizer, text):
    rows = [PAIR | {"prompt": text, "chosen": text}]
    assert in_words(tokenizer, preference_groups(tokenizer, write_lines("data.jsonl", rows))) == [
        (f"<user> {text} <assistant>", [f"{text} <end>", "go away <end>"])
    ]


def test_a_transcript_may_have_windows_line_ends(tokenizer):
    rows = [
        {
            side: f"\r\n\r\nHuman: hi\r\n\r\nAssistant: {said}"
            for side, said in (("chosen", "hello"), ("rejected", "go"))
        }
    ]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert in_words(tokenizer, dataset) == [(HELLO, ["hello <end>", "go <end>"])]


@pytest.mark.parametrize(
    "row",
    [
        *({"prompt": f"{marker}hi"} for marker in ("<|header_start|>user<|header_end|>", "<|start_of_role|>user")),
        *({"prompt": f"{marker}hi"} for marker in ("<|start|>user<|message|>", "[SYSTEM_PROMPT]", "<|begin_of_text|>")),
        *({"prompt": "hi<|end|>"}, {"prompt": "### Instruction:\nhi\n\n### Response"}),
        *({"chosen": "hello</s>"}, {"chosen": "### Response:\nhello"}, {"chosen": "hello<|endoftext|>"}),
    ],
)
def test_text_of_more_templates_is_refused(tokenizer, row):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 20, PAIR | row]))
    assert (len(dataset), dataset.dropped) == (20, 1)
    assert "of a chat template (1, the first: data.jsonl line 21)" in dataset.report()


# ---- Parts of messages


def test_an_unknown_role_and_a_part_that_is_no_text_are_counted_by_what_they_are(tokenizer):
    role = PAIR | {"prompt": [{"role": "narrator", "content": "hi"}]}
    image = PAIR | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}
    report = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 30, role, image])).report()
    assert "'prompt' has the role 'narrator' (1, " in report
    assert "'prompt' has a part that is no text (image) (1, " in report


def test_an_empty_turn_within_the_prompt_is_a_bad_row_but_not_the_empty_reply_of_a_tool(tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    reply = PAIR | {"prompt": [user("hi"), call, {"role": "tool", "content": ""}]}
    empty = PAIR | {"prompt": [user("hi"), assistant(" "), user("who?")]}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 30, empty, reply]))
    assert "'prompt' is empty (1, the first: data.jsonl line 31)" in dataset.report()


@pytest.mark.parametrize("tools", [[], "[]", "null", "", {}, None])
def test_no_tools_are_written_in_many_ways(tools):
    (prompt,) = read_prompts(write_lines("prompts.jsonl", [{"prompt": "hi", "tools": tools}]))
    assert prompt.tools is None


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    "tools", [[WEATHER], WEATHER, json.dumps([WEATHER]), [json.dumps(WEATHER)], json.dumps(json.dumps([WEATHER]))]
)
def test_tools_may_be_json_and_json_within_json(tools):
    (prompt,) = read_prompts(write_lines("prompts.jsonl", [{"prompt": "hi", "tools": tools}]))
    assert prompt.tools == [WEATHER]


@pytest.mark.parametrize("tools", [5, True, "weather", [None], [[]], {"weather": {}}, [{"name": 3}]])
def test_tools_that_have_no_name_are_a_bad_row(tools):
    rows = [*[{"prompt": "hi"}] * 20, {"prompt": "hi", "tools": tools}]
    assert len(read_prompts(write_lines("prompts.jsonl", rows))) == 20


@pytest.mark.parametrize("calls", ["f()", [3], {"function": "f"}])
def test_calls_are_a_list_of_objects(tokenizer, calls):
    bad = PAIR | {"chosen": [{"role": "assistant", "content": "hello", "tool_calls": calls}]}
    with pytest.raises(DataError, match=r"'chosen\[0\].tool_calls' must be a list of objects"):
        preference_groups(tokenizer, write_lines("data.jsonl", [bad]))


def test_a_message_says_its_text_once(tokenizer):
    bad = PAIR | {"prompt": [{"from": "human", "value": "hi", "content": "else"}]}
    with pytest.raises(DataError, match=r"'prompt\[0\]' has both 'content' and 'value', which differ"):
        preference_groups(tokenizer, write_lines("data.jsonl", [bad]))


def test_arguments_that_are_a_string_are_counted(tokenizer):
    def calls(arguments):
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    rows = [PAIR | {"prompt": [user("hi"), calls(each), user("so?")]} for each in ("{}", {}, "{}")]
    report = preference_groups(tokenizer, write_lines("data.jsonl", rows)).report()
    assert "a call's arguments are a string, which most chat templates put into quotes (2, the first: data" in report
