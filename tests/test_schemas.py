"""Public schemas are recognised by their columns; what cannot be used is counted, and what would be lost is refused."""

import base64
import csv
import gzip
import json
from functools import partial
from pathlib import Path

import datasets
import pytest
from test_groups import PAIR, WordTokenizer, assistant, in_words, user, write_lines

from humanline.data import encoded_groups, labelled_groups, preference_groups, scored_groups
from humanline.data._schemas import SCHEMAS
from humanline.errors import ConfigError, DataError
from humanline.rewards import read_samples
from humanline.rollout import read_prompts

HELLO = "<user> hi <assistant>"
SAID = f"{HELLO} hello <end>"


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def schema_of(dataset):
    return dataset.notes[0].split("(")[0].removeprefix("schema ").strip()


# ---- Each schema of the table: rows as they are published, and the groups that they make

GOOD_AND_BAD = (HELLO, ["hello <end>", "go <end>"])
HH = "\n\nHuman: hi\n\nAssistant:"
ROWS = {
    "implicit_preference": [{"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("go")]}],
    "preference": [{"prompt": "hi", "chosen": "hello", "rejected": "go"}],
    "anthropic_hh": [{"chosen": f"{HH} hello", "rejected": f"{HH} go"}],
    "ultrafeedback_binarized": [
        {
            "prompt": "hi",
            "prompt_id": "f0",
            "chosen": [user("hi"), assistant("hello")],
            "rejected": [user("hi"), assistant("go")],
            "messages": [user("hi"), assistant("hello")],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        }
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": {"from": "gpt", "value": "go"},
        }
    ],
    "ultrainteract": [
        {"task": "x", "trajectory": [{"from": "user", "value": "hi"}], "chosen": "hello", "rejected": "go", "id": "1"}
    ],
    "scored_responses": [{"prompt": "hi", "responses": ["hello", "go"], "scores": [0.2, 0.1]}],
    "scored_completions": [{"prompt": "hi", "completions": ["hello", "go"], "scores": [0.2, 0.1]}],
    "labelled_sharegpt": [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "kto_tag": True},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "go"}], "kto_tag": False},
    ],
    "alpaca_kto": [
        {"instruction": "hi", "input": "", "output": "hello", "kto_tag": True},
        {"instruction": "hi", "input": "", "output": "go", "kto_tag": False},
    ],
    "swift": [{"messages": [user("hi"), assistant("hello")], "rejected_response": "go"}],
    "openai_preference": [
        {
            "input": {"messages": [user("hi")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("hello")],
            "non_preferred_output": [assistant("go")],
        }
    ],
    "orca": [{"system": "", "question": "hi", "chosen": "hello", "rejected": "go"}],
    "input_preference": [{"input": "hi", "chosen": "hello", "rejected": "go", "rating": [9, 8]}],
    "instruction_preference": [{"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go"}],
    "argilla": [{"instruction": "hi", "chosen_response": "hello", "rejected_response": "go"}],
    "pku": [
        {
            "prompt": "hi",
            "response_0": "go",
            "response_1": "hello",
            "better_response_id": 1,
            "safer_response_id": 0,
            "is_response_0_safe": True,
        }
    ],
    "helpsteer3": [
        {"domain": "g", "context": [user("hi")], "response1": "go", "response2": "hello", "overall_preference": 2},
        {"domain": "g", "context": [user("hi")], "response1": "hello", "response2": "go", "overall_preference": -1},
        {"domain": "g", "context": [user("hi")], "response1": "hello", "response2": "go", "overall_preference": 0},
    ],
    "helpsteer2_preference": [
        {"prompt": "hi", "response_1": "go", "response_2": "hello", "preference_strength": 3, "split": "train"}
    ],
    "unified_feedback": [
        {
            "conv_A": [user("hi"), assistant("go")],
            "conv_B": [user("hi"), assistant("hello")],
            "conv_A_rating": 1.0,
            "conv_B_rating": 5.0,
            "num_turns": 2,
        }
    ],
    "stack_exchange": [{"qid": 1, "question": "hi", "response_j": "hello", "response_k": "go"}],
    "shp": [{"history": "hi", "human_ref_A": "go", "human_ref_B": "hello", "labels": 0, "score_A": 2}],
    "chatbot_arena": [
        {
            "conversation_a": [user("hi"), assistant("hello")],
            "conversation_b": [user("hi"), assistant("go")],
            "winner": "model_a",
            "model_a": "x",
        }
    ],
    "alpaca_eval_annotations": [
        {"instruction": "hi", "output_1": "hello", "output_2": "go", "generator_1": "x", "preference": 1.02}
    ],
    "halos_pairwise": [
        {
            "type": "pairwise_feedback",
            "prompt_id": 1,
            "prompt": [user("hi")],
            "output_A": [assistant("go")],
            "output_B": [assistant("hello")],
            "label": 0,
            "reward_difference": 0.5,
        }
    ],
    "kto": [
        {"prompt": "hi", "completion": "hello", "label": True},
        {"prompt": "hi", "completion": "go", "label": False},
    ],
    "labelled_conversation": [
        {"messages": [user("hi"), assistant("hello")], "label": True},
        {"messages": [user("hi"), assistant("go")], "label": False},
    ],
    "halos_binary": [
        {"type": "binary_feedback", "prompt": [user("hi")], "output": [assistant("hello")], "label": 1, "reward": 0.9},
        {"type": "binary_feedback", "prompt": [user("hi")], "output": [assistant("go")], "label": 0, "reward": 0.1},
    ],
    "halos_scalar": [
        {"type": "scalar_feedback", "prompt": [user("hi")], "output": [assistant("hello")], "reward": 0.9},
        {"type": "scalar_feedback", "prompt": [user("who")], "output": [assistant("me")], "reward": 0.4},
        {"type": "scalar_feedback", "prompt": [user("hi")], "output": [assistant("go")], "reward": 0.1},
    ],
    "ultrafeedback_armorm": [{"prompt": "hi", "all_generated_responses": ["hello", "go"], "all_rm_scores": [0.2, 0.1]}],
    "ultrafeedback": [
        {
            "source": "x",
            "instruction": "hi",
            "models": ["a", "b"],
            "completions": [
                {
                    "model": "a",
                    "response": "hello",
                    "overall_score": 8.5,
                    "annotations": {"helpfulness": {"Rating": "5"}},
                },
                {"model": "b", "response": "go", "overall_score": 2.0, "annotations": {"helpfulness": {"Rating": "5"}}},
            ],
        }
    ],
    "nectar": [{"prompt": f"{HH} ", "answers": [{"answer": "hello", "rank": 1.0}, {"answer": "go", "rank": 7.0}]}],
    "helpsteer2": [
        {"prompt": "hi", "response": "hello", "helpfulness": 4, "correctness": 4, "coherence": 4, "verbosity": 2},
        {"prompt": "hi", "response": "go", "helpfulness": 1, "correctness": 1, "coherence": 4, "verbosity": 1},
    ],
}
NO_PREFERENCE = {
    "instruction_output": [{"instruction": "hi", "input": "", "output": "hello"}],
    "alpaca_eval_outputs": [{"instruction": "hi", "output": "hello", "generator": "x", "dataset": "y"}],
    "halos_samples": [{"type": "sample", "prompt": [user("hi")], "instruction": "hi", "output": "hello"}],
}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SECOND = {  # what comes after the first group
    "helpsteer3": [GOOD_AND_BAD],
    "kto": [(HELLO, ["go <end>"])],
    "labelled_conversation": [(HELLO, ["go <end>"])],
    "labelled_sharegpt": [(HELLO, ["go <end>"])],
    "alpaca_kto": [(HELLO, ["go <end>"])],
    "halos_binary": [(HELLO, ["go <end>"])],
    "halos_scalar": [("<user> who <assistant>", ["me <end>"])],
}
LABELLED = ("kto", "labelled_conversation", "labelled_sharegpt", "halos_binary", "alpaca_kto")
SCORES = {
    "halos_scalar": (0.9, 0.1),
    "ultrafeedback_armorm": (0.2, 0.1),
    "scored_responses": (0.2, 0.1),
    "scored_completions": (0.2, 0.1),
    "ultrafeedback": (8.5, 2.0),
    "nectar": (-1.0, -7.0),
    "helpsteer2": (4.0, 1.0),
}


def test_every_schema_of_the_table_is_tested():
    assert {schema.name for schema in SCHEMAS} == ROWS.keys() | NO_PREFERENCE.keys()


@pytest.mark.parametrize("build", [preference_groups, labelled_groups, scored_groups])
@pytest.mark.parametrize("name", ROWS)
def test_every_builder_recognises_the_schema_and_reads_the_same_groups(tokenizer, build, name):
    dataset = build(tokenizer, write_lines("data.jsonl", ROWS[name]))
    assert schema_of(dataset) == name
    first = (HELLO, ["hello <end>"]) if name in LABELLED else GOOD_AND_BAD
    assert in_words(tokenizer, dataset) == [first, *SECOND.get(name, [])]
    assert dataset[0].scores == SCORES.get(name)
    assert dataset[0].labels == ((True,) if name in LABELLED else None)
    assert dataset[0].is_pair == (name not in SCORES and dataset[0].labels is None)


@pytest.mark.parametrize("name", ROWS)
def test_a_table_says_the_same_as_lines(tokenizer, name):
    datasets.Dataset.from_list(ROWS[name]).to_parquet("data.parquet")
    lines = preference_groups(tokenizer, write_lines("data.jsonl", ROWS[name]))
    table = preference_groups(tokenizer, "data.parquet")
    assert in_words(tokenizer, table) == in_words(tokenizer, lines)
    assert [(g.scores, g.labels) for g in table] == [(g.scores, g.labels) for g in lines]


def test_a_tie_is_left_out_and_counted_but_is_no_fault(tokenizer):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", ROWS["helpsteer3"]), on_bad_row="stop")
    assert "1 row dropped: neither response is better (1, the first: data.jsonl line 3)" in dataset.report()
    assert dataset.dropped == 1


def test_conversations_of_the_arena_that_differ_earlier_are_left_out_and_no_fault(tokenizer):
    later = [user("who?"), assistant("me")]
    sound = ROWS["chatbot_arena"][0]
    other = {**sound, **{side: [*sound[side], *later] for side in ("conversation_a", "conversation_b")}}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [sound, other, other]), on_bad_row="stop")
    assert len(dataset) == 1 and "2 rows dropped: the last responses answer different conv" in dataset.report()


def test_ties_alone_are_said_to_be_the_reason(tokenizer):
    tie = {**ROWS["chatbot_arena"][0], "winner": "tie"}
    with pytest.raises(DataError, match=r"no examples are left of 2 rows; .* neither response is better \(2,"):
        preference_groups(tokenizer, write_lines("data.jsonl", [tie] * 2))


def test_outputs_beside_scored_responses_are_no_second_schema(tokenizer):
    row = {**NO_PREFERENCE["alpaca_eval_outputs"][0], **ROWS["ultrafeedback_armorm"][0]}  # AlpacaEval, sampled again
    assert schema_of(preference_groups(tokenizer, write_lines("data.jsonl", [row]))) == "ultrafeedback_armorm"


@pytest.mark.parametrize("name", NO_PREFERENCE)
def test_responses_that_nothing_is_known_about_are_no_preference(tokenizer, name):
    with pytest.raises(
        DataError, match=rf"^data.jsonl: schema {name} \(.*\) does not say which response is better; score"
    ):
        preference_groups(tokenizer, write_lines("data.jsonl", NO_PREFERENCE[name]))


# ---- Which schema

ARMORM = {**PAIR, "all_generated_responses": ["a", "b"], "all_rm_scores": [1, 0]}


def test_of_two_schemas_the_builder_s_kind_is_meant(tokenizer):
    source = write_lines("data.jsonl", [ARMORM])
    assert schema_of(preference_groups(tokenizer, source)) == "preference"
    assert schema_of(scored_groups(tokenizer, source)) == "ultrafeedback_armorm"


ASKED = {"question": "how?", "instruction": "be kind", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("build", "row", "names"),
    [
        (labelled_groups, ARMORM, ["preference (prompt, chosen, rejected)", "ultrafeedback_armorm (prompt, all_gen"]),
        (preference_groups, ASKED, ["orca (question, ", "instruction_preference (instruction, chosen, rejected)"]),
    ],
)
def test_an_ambiguous_file_names_the_candidates_and_format_decides(tokenizer, build, row, names):
    source = write_lines("data.jsonl", [row])
    with pytest.raises(ConfigError, match="^format: the columns fit several schemas: ") as raised:
        build(tokenizer, source)
    assert all(name in str(raised.value) for name in names)
    chosen = names[0].split()[0]
    assert schema_of(build(tokenizer, source, format=chosen)) == chosen


def test_a_column_can_be_left_out_on_purpose(tokenizer):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [ASKED]), column_map={"instruction": None})
    assert schema_of(dataset) == "orca" and tokenizer.decode(dataset[0].prompt) == "<user> how? <assistant>"


def test_prompt_wins_over_other_names(tokenizer):
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [{**PAIR, **ASKED}]))
    assert schema_of(dataset) == "preference"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"a": 1, "b": 2},
            r"the columns a, b fit no schema, such as preference \(prompt, chosen, rejected\); say which",
        ),
        (
            {"prompt": [1], "responses": [[2], [3]]},
            r"fit no schema, .*; for token ids use humanline.data.encoded_groups",
        ),
        ({}, r"the columns \(none\) fit no schema"),
    ],
)
def test_a_file_of_no_schema_says_so(tokenizer, row, said):
    with pytest.raises(ConfigError, match=f"^column_map: .*{said}"):
        preference_groups(tokenizer, write_lines("data.jsonl", [row]))


# ---- Nothing that carries meaning vanishes


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message", "system_instruction"])
@pytest.mark.parametrize(
    ("build", "row"),
    [
        (preference_groups, {"prompt": "hi", "chosen": "hello", "rejected": "go"}),
        (preference_groups, ROWS["implicit_preference"][0]),
        (preference_groups, ROWS["sharegpt"][0]),
        (labelled_groups, ROWS["kto"][0]),
        (scored_groups, ROWS["ultrafeedback_armorm"][0]),
        (scored_groups, ROWS["helpsteer2"][0]),
    ],
)
def test_a_system_column_is_the_system_message(tokenizer, build, row, column):
    dataset = build(tokenizer, write_lines("data.jsonl", [{column: "be brief", **row}, {column: " ", **row}]))
    prompts = [tokenizer.decode(group.prompt) for group in dataset]
    assert prompts == ["<system> be brief <user> hi <assistant>", HELLO]


def test_a_system_prompt_is_for_prompts_without_one(tokenizer):
    own = [{"role": "developer", "content": "be brief"}, user("hi")]
    rows = [{**PAIR, "prompt": own}, {**PAIR, "system": "be loud"}, PAIR]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows), system_prompt="be kind")
    prompts = [tokenizer.decode(group.prompt).split("<user>")[0] for group in dataset]
    assert prompts == ["<system> be brief ", "<system> be loud ", "<system> be kind "]


def test_a_row_does_not_get_a_second_system_message(tokenizer):
    own = [{"role": "system", "content": "be brief"}, user("hi")]
    rows = [{**PAIR, "prompt": own, "system": "be brief"}] * 10 + [{**PAIR, "prompt": own, "system": "be loud"}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert {tokenizer.decode(group.prompt) for group in dataset} == {"<system> be brief <user> hi <assistant>"}
    assert (
        "'system' differs from the system message of the prompt (1, the first: data.jsonl line 11)" in dataset.report()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "a long text"),
        ("choices", {"text": ["red", "blue"], "label": ["A", "B"]}),  # ARC
        ("initial_reason_steps", "Step 1: ..."),  # Math-Step-DPO
        ("history", [{"role": "user", "content": "before"}]),
        ("input", "2 + 3"),
        ("history", [user("before")]),
        ("images", [{"bytes": b"x".hex()}]),
    ],
)
def test_a_column_that_would_be_ignored_and_changes_the_prompt_is_an_error(tokenizer, name, value):
    source = write_lines("data.jsonl", [*[PAIR] * 50, {**PAIR, name: value}])
    with pytest.raises(DataError, match=f"^data.jsonl line 51: column '{name}' would be ignored") as raised:
        preference_groups(tokenizer, source)
    assert f"column_map: {{{name}: null}}" in str(raised.value)
    assert len(preference_groups(tokenizer, source, column_map={name: None})) == 51


def test_an_image_is_never_ignored(tokenizer):
    images = datasets.Features({**dict.fromkeys(PAIR, datasets.Value("string")), "image": datasets.Image()})
    row = {**PAIR, "image": {"bytes": PNG, "path": None}}
    datasets.Dataset.from_list([row], features=images).save_to_disk("images")  # read as an object of PIL
    with pytest.raises(DataError, match="column 'image' would be ignored"):
        preference_groups(tokenizer, "images")


def test_the_messages_before_in_a_column_of_their_own_are_no_loss(tokenizer):
    before = [user("hi"), assistant("hello")]
    rows = [{**PAIR, "prompt": [*before, user("who?")], "history": before}]
    assert len(preference_groups(tokenizer, write_lines("data.jsonl", rows))) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_a_part_of_a_response_in_a_column_of_its_own_is_an_error_but_not_in_a_prompt_file(tokenizer, name):
    source = write_lines("data.jsonl", [{**PAIR, name: "I think."}])
    with pytest.raises(DataError, match=f"^data.jsonl line 1: column '{name}' would be ignored"):
        preference_groups(tokenizer, source)
    assert read_prompts(source)[0].fields[name] == "I think."


def test_a_column_whose_content_is_in_the_prompt_is_no_loss(tokenizer):
    rows = [{**PAIR, "context": "how are"}, {**PAIR, "context": None}, {**PAIR, "context": ""}]
    assert len(preference_groups(tokenizer, write_lines("data.jsonl", rows))) == 3


def test_an_instruction_includes_its_input(tokenizer):
    rows = [{"instruction": "add", "input": "2 3", "chosen": "5", "rejected": "6"}]
    (group,) = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert tokenizer.decode(group.prompt) == "<user> add 2 3 <assistant>"


ROLES = {
    "user": ["human", "Human", "USER", "prompter"],
    "assistant": ["gpt", "Assistant", "model", "bot"],
    "system": ["System", "developer"],
    "tool": ["ipython", "function", "observation"],
}


@pytest.mark.parametrize(("role", "written"), [(role, name) for role, names in ROLES.items() for name in names])
def test_roles_as_people_write_them(tokenizer, role, written):
    before = {"user": [], "assistant": [user("0")], "system": [], "tool": [user("0"), assistant("call")]}[role]
    after = [assistant("1"), user("b")] if role == "user" else [user("b")]
    rows = [{"prompt": [*before, {"from": written, "value": "a"}, *after], "chosen": "c", "rejected": "d"}]
    (group,) = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert f"<{role}> a <" in tokenizer.decode(group.prompt)


def test_text_parts_are_one_text_and_other_parts_are_refused(tokenizer):
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "are you"}]
    rows = [{**PAIR, "prompt": [{"role": "user", "content": parts}]}]
    (group,) = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert tokenizer.decode(group.prompt) == "<user> how are you <assistant>"
    rows = [{**PAIR, "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}, *parts]}]}]
    with pytest.raises(DataError, match=r"field 'prompt\[0\].content\[0\]' must be text, got image"):
        preference_groups(tokenizer, write_lines("data.jsonl", rows))


@pytest.mark.parametrize("label", [1, 1.0, "1", "true", "True", True])
def test_a_label_may_be_a_number_or_text(tokenizer, label):
    opposite = {"1": "0", "true": "false", "True": "False"}.get(label) if isinstance(label, str) else type(label)(0)
    rows = [{**ROWS["kto"][0], "label": label}, {**ROWS["kto"][0], "label": opposite}]
    dataset = labelled_groups(tokenizer, write_lines("data.jsonl", rows))
    assert [group.labels for group in dataset] == [(True,), (False,)]


@pytest.mark.parametrize(
    ("roles", "place"),
    [
        (["assistant", "user"], r"\[0\].role' is out of order \('assistant' comes first\)"),
        (["user", "user"], r"\[1\].role' is out of order \('user' comes after 'user'\)"),
        (["user", "assistant", "assistant", "user"], r"\[2\].role' is out of order"),
        (["user", "assistant", "system", "user"], r"\[2\].role' is out of order \('system' comes after 'assistant'\)"),
        (["tool", "user"], r"\[0\].role' is out of order"),
    ],
)
def test_roles_out_of_order_are_a_bad_row(tokenizer, roles, place):
    bad = {**PAIR, "prompt": [{"role": role, "content": "x"} for role in roles]}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 20, bad]))
    assert len(dataset) == 20 and "'prompt' is out of order (1, the first: data.jsonl line 21)" in dataset.report()
    with pytest.raises(DataError, match=f"^data.jsonl line 21: field 'prompt{place}"):
        preference_groups(tokenizer, "data.jsonl", on_bad_row="stop")


SCORED = ROWS["ultrafeedback_armorm"][0]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (ROWS["nectar"][0], {"answers": ["hello"]}),
        (ROWS["nectar"][0], {"answers": []}),
        (ROWS["ultrafeedback"][0], {"completions": ["hello", None]}),
        (SCORED, {"all_rm_scores": [10**400, 1]}),
        (ROWS["helpsteer2"][0], {"helpfulness": 10**400}),
        (SCORED, {"prompt": "{'role': 1, {}: 2}"}),
    ],
)
def test_no_value_ends_a_run(tokenizer, good, bad):
    many = [{**good, "prompt": f"hi {i}", "instruction": f"hi {i}"} for i in range(20)]
    dataset = scored_groups(tokenizer, write_lines("data.jsonl", [*many, {**good, **bad}]))
    assert len(dataset) >= 20


def test_tools_that_are_no_json_do_not_end_the_reading_of_prompts():
    rows = [*[{"prompt": "hi"}] * 20, {"prompt": "hi", "tools": "{"}]
    assert len(read_prompts(write_lines("prompts.jsonl", rows))) == 20


def test_samples_of_a_prompt_with_other_tools_are_of_another_prompt():
    rows = [{"prompt": "hi", "tools": [{"name": name}], "output": "hello"} for name in "ab"]
    assert read_samples(write_lines("samples.jsonl", rows))[1] == [["hello"], ["hello"]]


def test_a_mapped_prompt_is_never_read_from_another_column():
    source = write_lines("prompts.jsonl", [{"question": "hi"}])
    with pytest.raises(DataError, match="field 'problem' is missing .found: question."):
        read_prompts(source, column_map={"prompt": "problem"})


def test_a_prompt_that_ends_with_a_call_of_the_user_is_a_bad_row(tokenizer):
    bad = {**PAIR, "prompt": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 20, bad]))
    assert len(dataset) == 20 and dataset.dropped == 1


def test_of_an_answered_conversation_the_prompt_is_what_was_answered():
    turns = [user("hi"), assistant("hello"), user("who?"), assistant("me")]
    for field in ("messages", "conversations", "conversation", "prompt"):
        (prompt,) = read_prompts(write_lines("prompts.jsonl", [{field: turns}]))
        assert prompt.messages == turns[:3] and prompt.fields[field] == turns


# ---- Text that is templated, or a printed list


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] hi [/INST]",
        "<start_of_turn>user\nhi<end_of_turn>\n",
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
        "Below is an instruction.\n\n### Instruction:\nhi\n\n### Response:",
        "USER: hi ASSISTANT:",
    ],
)
def test_text_that_has_been_through_a_template_is_never_templated_again(tokenizer, prompt):
    templated = {**PAIR, "prompt": prompt}
    with pytest.raises(
        DataError, match="^data.jsonl line 1: the text has '.*' of a chat template, which would be applied"
    ):
        preference_groups(tokenizer, write_lines("data.jsonl", [templated] * 3))
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", [*[PAIR] * 20, templated, templated]))
    assert len(dataset) == 20 and "(2, the first: data.jsonl line 21)" in dataset.report()


def test_a_response_with_tokens_of_a_template_is_found_too(tokenizer):
    rows = [*[PAIR] * 20, {**PAIR, "chosen": "hello<|im_end|>"}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert len(dataset) == 20 and dataset.dropped == 1


@pytest.mark.parametrize("write", [json.dumps, str, lambda messages: f" {messages}\n", partial(json.dumps, indent=2)])
def test_a_printed_list_is_read_as_the_messages_it_was(tokenizer, write):
    chosen, rejected = [user("hi"), assistant('it\'s "good"')], [user("hi"), assistant("go")]
    rows = [{"prompt": "hi", "chosen": write(chosen), "rejected": write(rejected)}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert in_words(tokenizer, dataset) == [(HELLO, ['it\'s "good" <end>', "go <end>"])]


@pytest.mark.parametrize("write", [json.dumps, str])
def test_a_printed_message_is_read_but_other_json_is_text(tokenizer, write):
    rows = [{"prompt": "hi", "chosen": write(assistant("hello")), "rejected": '{"role": "admin", "content": 1}'}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert in_words(tokenizer, dataset) == [(HELLO, ["hello <end>", '{"role": "admin", "content": 1} <end>'])]


def test_a_printed_array_is_refused(tokenizer):
    printed = f"array([{user('hi')},\n       {assistant('hello')}], dtype=object)"
    with pytest.raises(DataError, match="'chosen' is a printed list of messages that cannot be read"):
        preference_groups(tokenizer, write_lines("data.jsonl", [{**PAIR, "chosen": printed}] * 3))


def test_turns_of_helpsteer2_become_messages(tokenizer):
    prompt = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nwho?"
    rows = [{"prompt": prompt, "response": said, "helpfulness": score} for said, score in (("me", 4), ("go", 1))]
    (group,) = scored_groups(tokenizer, write_lines("data.jsonl", rows))
    assert tokenizer.decode(group.prompt) == "<user> hi <assistant> hello <user> who? <assistant>"
    (asked,) = read_prompts(write_lines("prompts.jsonl", [{"prompt": prompt}]))
    assert asked.messages == [user("hi"), assistant("hello"), user("who?")]


def test_a_printed_list_that_cannot_be_read_is_refused(tokenizer):
    numpy = "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant', 'content': 'hello'}]"
    with pytest.raises(DataError, match="field 'chosen' is a printed list of messages that cannot be read"):
        preference_groups(tokenizer, write_lines("data.jsonl", [{**PAIR, "chosen": numpy}]))


# ---- Bad rows

EMPTY, EQUAL = {**PAIR, "chosen": " "}, {**PAIR, "rejected": PAIR["chosen"]}


def test_bad_rows_are_dropped_and_counted_by_reason(tokenizer):
    lines = [*[PAIR] * 18, EMPTY, EQUAL, EMPTY, *[PAIR] * 10]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", lines))
    assert (len(dataset), dataset.dropped) == (28, 3)
    assert (
        "3 rows dropped: 'chosen' is empty (2, the first: data.jsonl line 19), 'rejected' equals 'chosen' "
        "(1, the first: data.jsonl line 20)"
    ) in dataset.report()


def test_on_bad_row_stop_lists_every_reason(tokenizer):
    source = write_lines("data.jsonl", [*[PAIR] * 18, EMPTY, EQUAL, EMPTY, *[PAIR] * 10])
    with pytest.raises(DataError) as raised:
        preference_groups(tokenizer, source, on_bad_row="stop")
    said = str(raised.value)
    assert said.startswith("data.jsonl line 19: field 'chosen' is empty; fill it or drop the line [2 rows]; data.jsonl")
    assert "data.jsonl line 20: field 'rejected' equals 'chosen'" in said
    assert "(3 of 31 rows cannot be used" in said


def test_of_a_few_rows_half_may_be_bad(tokenizer):
    assert len(preference_groups(tokenizer, write_lines("data.jsonl", [PAIR, EMPTY, EQUAL, PAIR]))) == 2
    with pytest.raises(DataError, match=r"\(3 of 5 rows cannot be used.*: more than half"):
        preference_groups(tokenizer, write_lines("data.jsonl", [PAIR, EMPTY, EQUAL, PAIR, EMPTY]))


@pytest.mark.parametrize("bad", [10, 11])
def test_more_than_a_tenth_means_that_the_format_is_wrong(tokenizer, bad):
    source = write_lines("data.jsonl", [*[PAIR] * (100 - bad), *[EMPTY] * bad])
    if bad == 10:
        assert len(preference_groups(tokenizer, source)) == 90
        return
    with pytest.raises(DataError, match=r"\(11 of 100 rows cannot be used.*: more than a tenth"):
        preference_groups(tokenizer, source)


def test_a_line_that_is_no_json_is_a_bad_row(tokenizer):
    good = json.dumps(PAIR)
    Path("data.jsonl").write_text("\n".join([*[good] * 20, '{"prompt": "cut of', "[1]", *[good] * 20]))
    dataset = preference_groups(tokenizer, "data.jsonl")
    assert (len(dataset), dataset.dropped) == (40, 2)
    assert "malformed JSON (1, the first: data.jsonl line 21), not an object (1, the first: data.jsonl line 22)" in (
        dataset.report()
    )


def test_the_schema_is_that_of_the_first_sound_rows(tokenizer):
    Path("data.jsonl").write_text("\n".join([*["{"] * 70, *[json.dumps(PAIR)] * 1000]))
    dataset = preference_groups(tokenizer, "data.jsonl")
    assert (len(dataset), dataset.dropped) == (1000, 70)


def test_ids_outside_the_vocabulary_mean_another_tokenizer_however_few(tokenizer):
    rows = [*[{"prompt": [1], "responses": [[2], [3]]}] * 50, {"prompt": [1], "responses": [[2], [1000]]}]
    with pytest.raises(DataError, match="^ids.jsonl line 51: .* encode with this model's tokenizer$"):
        encoded_groups(tokenizer, write_lines("ids.jsonl", rows))


# ---- Everything that `datasets` can open

MANY = [{"prompt": f"q {i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(10)]
EXPECTED = [(f"<user> q {i} <assistant>", [f"a {i} <end>", f"b {i} <end>"]) for i in range(10)]


def as_csv(rows, file="data.csv", delimiter=","):
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return {"source": file}


def as_gzip(rows):
    with gzip.open("data.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "data.jsonl.gz"}


def as_saved(rows):
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    return {"source": "saved"}


def as_saved_splits(rows):
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(splits).save_to_disk("saved")
    return {"source": "saved"}


def as_parquet_folder(rows):
    Path("folder").mkdir()
    for i in (0, 1):
        part = datasets.Dataset.from_list(rows[i * 5 : i * 5 + 5])
        part.to_parquet(f"folder/train-0000{i}-of-00002.parquet")
    return {"source": "folder"}


def as_data_files(rows):
    as_parquet_folder(rows)
    return {"source": "folder", "data_files": {"train": "train-*.parquet"}}


SOURCES = [
    as_csv,
    lambda rows: as_csv(rows, "data.tsv", "\t"),
    as_gzip,
    as_saved,
    as_saved_splits,
    as_parquet_folder,
    as_data_files,
]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_gives_the_same_groups(tokenizer, write):
    source = write(MANY)
    assert in_words(tokenizer, preference_groups(tokenizer, **source)) == EXPECTED
    assert in_words(tokenizer, preference_groups(tokenizer, **source, split="train[2:4]")) == EXPECTED[2:4]


def test_a_csv_names_the_line_of_a_row_and_keeps_its_text(tokenizer):
    rows = [
        {**MANY[0], "chosen": 'two\nlines, with NA and "quotes"'},
        {**MANY[1], "chosen": "NA"},
        {**PAIR, "chosen": ""},
    ]
    dataset = preference_groups(tokenizer, **as_csv([*rows[:2], *[PAIR] * 20, rows[2]]))
    assert [words for _, (words, _) in in_words(tokenizer, dataset)][:2] == [
        'two lines, with NA and "quotes" <end>',
        "NA <end>",
    ]
    assert dataset[1].id == "data.csv line 4"
    assert "'chosen' is missing (1, the first: data.csv line 25)" in dataset.report()


def test_lists_in_a_csv_are_json(tokenizer):
    rows = [{"prompt": "p", "all_generated_responses": json.dumps(["a", "b"]), "all_rm_scores": "[1, 0.5]"}]
    (group,) = scored_groups(tokenizer, **as_csv(rows))
    assert group.scores == (1.0, 0.5)


def replica(folder, configs):
    """A dataset in the layout of the hub: a README that names the configs, and a parquet file for each."""
    for name, rows in configs.items():
        (Path(folder) / name).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(str(Path(folder) / name / "train-00000-of-00001.parquet"))
    parts = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in configs
    )
    Path(folder, "README.md").write_text(f"---\nconfigs:\n{parts}---\n")


def test_a_config_is_chosen_by_name_and_the_error_lists_all(tokenizer):
    replica("some/pairs", {"main": MANY, "other": MANY[:3]})
    assert in_words(tokenizer, preference_groups(tokenizer, "some/pairs", name="main")) == EXPECTED
    assert len(preference_groups(tokenizer, "some/pairs", name="other")) == 3
    with pytest.raises(ConfigError, match="^name: missing; 'some/pairs' has the configs main, other; set name to one"):
        preference_groups(tokenizer, "some/pairs")
    with pytest.raises(ConfigError, match="^name: expected one of main, other, got 'none' for 'some/pairs'"):
        preference_groups(tokenizer, "some/pairs", name="none")
    with pytest.raises(ConfigError, match="train"):
        preference_groups(tokenizer, "some/pairs", name="main", split="test")


def test_two_columns_with_other_system_messages_are_a_bad_row(tokenizer):
    rows = [*[{**PAIR, "system": "be kind", "system_prompt": "be kind"}] * 20]
    rows += [{**PAIR, "system": "be kind", "system_prompt": "be loud"}]
    dataset = preference_groups(tokenizer, write_lines("data.jsonl", rows))
    assert (len(dataset), dataset.dropped) == (20, 1)


def test_a_few_bad_rows_of_samples_are_counted_and_the_others_scored(caplog):
    good = {"prompt": "hi", "all_generated_responses": ["a", "b"]}
    source = write_lines("samples.jsonl", [*[good] * 12, {**good, "all_generated_responses": None}])
    prompts, responses = read_samples(source)
    assert len(prompts) == 12 and responses[0] == ["a", "b"]
    assert "'all_generated_responses' is missing (1, the first: samples.jsonl line 13)" in caplog.text
    outputs = [{"instruction": f"q {i // 2}", "output": f"a {i}"} for i in range(24)]
    source = write_lines("samples.jsonl", [*outputs, {"instruction": "q", "output": None}])
    prompts, responses = read_samples(source)
    assert len(prompts) == 12 and responses[0] == ["a 0", "a 1"]


def test_two_columns_with_the_same_question_are_no_ambiguity():
    rows = [{"problem": "2+3?", "messages": [user("2+3?"), assistant("5")], "solution": "5"}]
    (prompt,) = read_prompts(write_lines("prompts.jsonl", rows))
    assert prompt.messages == [user("2+3?")]
    rows = [{"problem": "2+3?", "messages": [user("Add 2 and 3."), assistant("5")]}]
    with pytest.raises(ConfigError, match="^column_map: any of the columns problem, messages could be the prompt"):
        read_prompts(write_lines("prompts.jsonl", rows))


def test_a_prompt_that_is_the_start_of_the_conversation_is_no_contradiction(tokenizer):
    before = [user("hi"), assistant("yo"), user("how are you")]
    row = {"prompt": [user("hi")], "chosen": [*before, assistant("well")], "rejected": [*before, assistant("bad")]}
    (group,) = preference_groups(tokenizer, write_lines("data.jsonl", [row]))
    assert tokenizer.decode(group.prompt) == "<user> hi <assistant> yo <user> how are you <assistant>"


def test_a_list_of_one_text_is_the_text(tokenizer):
    rows = [{"prompt": "hi", "chosen": ["hello"], "rejected": ["go"]}]
    assert in_words(tokenizer, preference_groups(tokenizer, write_lines("data.jsonl", rows))) == [GOOD_AND_BAD]


def test_token_ids_where_text_is_expected_are_named(tokenizer):
    rows = [{"prompt": [1, 2], "responses": [[3], [4]], "scores": [1, 0]}]
    with pytest.raises(DataError, match="for token ids use humanline.data.encoded_groups"):
        scored_groups(tokenizer, write_lines("data.jsonl", rows))
