"""Reading groups from every kind of source, cutting them to a token budget, refusing bad data, and making pairs."""

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torchtune import config

from humanline.data import (
    ChatTokenizer,
    Group,
    GroupDataset,
    TokenBudget,
    as_labelled,
    as_pairs,
    as_scored,
    encoded_groups,
    labelled_groups,
    preference_groups,
    scored_groups,
)
from humanline.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


class WordTokenizer:
    """A token for each word, role and end of turn: a prompt is <user> words <assistant>, a response words <end>."""

    vocab_size = 1000

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, words: Sequence[str]) -> list[int]:
        self.words.extend(word for word in dict.fromkeys(words) if word not in self.words)
        return [self.words.index(word) for word in words]

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        turns = [word for message in messages for word in (f"<{message['role']}>", *message["content"].split())]
        return self.encode([*turns, "<assistant>"])

    def encode_response(self, prompt: list[dict], response: str) -> list[int]:
        return self.encode([*response.split(), "<end>"])

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def write_lines(file: str, rows: list) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def in_words(tokenizer: WordTokenizer, dataset: GroupDataset) -> list[tuple[str, list[str]]]:
    return [
        (tokenizer.decode(group.prompt), [tokenizer.decode(response) for response in group.responses])
        for group in dataset
    ]


PAIR = {"prompt": "how are you", "chosen": "very well", "rejected": "go away"}
PAIR_IN_WORDS = ("<user> how are you <assistant>", ["very well <end>", "go away <end>"])


# ---- What each builder reads


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": [user("how are you")], "chosen": "very well", "rejected": "go away"},
        {"prompt": "how are you", "chosen": [assistant("very well")], "rejected": [assistant("go away")]},
        {
            "chosen": [user("how are you"), assistant("very well")],
            "rejected": [user("how are you"), assistant("go away")],
        },
        {
            "prompt": "some other form of the prompt",
            "chosen": [user("how are you"), assistant("very well")],
            "rejected": [user("how are you"), assistant("go away")],
        },
    ],
    ids=["strings", "prompt messages", "response messages", "conversations", "conversations and a prompt string"],
)
def test_every_form_of_a_preference_pair_gives_the_same_group(tokenizer, row):
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", [row]))
    assert in_words(tokenizer, dataset) == [PAIR_IN_WORDS]
    assert dataset[0].is_pair
    assert dataset[0].id == "pairs.jsonl line 1"


def test_a_conversation_keeps_all_its_turns(tokenizer):
    before = [{"role": "system", "content": "be kind"}, user("hi"), assistant("hello"), user("how are you")]
    rows = [{"chosen": [*before, assistant("well")], "rejected": [*before, assistant("bad")]}]
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", rows))
    turns = "<system> be kind <user> hi <assistant> hello <user> how are you <assistant>"
    assert in_words(tokenizer, dataset) == [(turns, ["well <end>", "bad <end>"])]


def test_labelled_groups_hold_one_response_and_its_label(tokenizer):
    rows = [
        {"prompt": "how are you", "completion": "very well", "label": True},
        {"prompt": [user("how are you")], "completion": [assistant("go away")], "label": False},
    ]
    dataset = labelled_groups(tokenizer, write_lines("kto.jsonl", rows))
    prompt = "<user> how are you <assistant>"
    assert in_words(tokenizer, dataset) == [(prompt, ["very well <end>"]), (prompt, ["go away <end>"])]
    assert [group.labels for group in dataset] == [(True,), (False,)]
    assert all(group.scores is None for group in dataset)


def test_scored_groups_hold_all_responses_and_their_scores(tokenizer):
    rows = [{"prompt": "count", "all_generated_responses": ["one", "two", "three"], "all_rm_scores": [0.25, 1, -0.5]}]
    dataset = scored_groups(tokenizer, write_lines("scored.jsonl", rows))
    assert in_words(tokenizer, dataset) == [("<user> count <assistant>", ["one <end>", "two <end>", "three <end>"])]
    assert dataset[0].scores == (0.25, 1.0, -0.5)
    assert dataset[0].labels is None


def test_encoded_groups_need_no_tokenizer():
    rows = [
        {"prompt": [1, 2], "responses": [[3], [4, 5]]},
        {"prompt": [1], "responses": [[3], [4], [5]], "scores": [1, 0, 0.5]},
        {"prompt": [1], "responses": [[3], [4]], "labels": [True, False]},
    ]
    dataset = encoded_groups(None, write_lines("ids.jsonl", rows))
    assert [(list(group.prompt), [list(ids) for ids in group.responses]) for group in dataset] == [
        (row["prompt"], row["responses"]) for row in rows
    ]
    assert [group.is_pair for group in dataset] == [True, False, False]
    assert dataset[1].scores == (1.0, 0.0, 0.5)
    assert dataset[2].labels == (True, False)


def test_a_column_map_names_the_columns_of_the_source(tokenizer):
    rows = [{"question": "how are you", "good": "very well", "rejected": "go away"}]
    columns = {"prompt": "question", "chosen": "good"}
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", rows), column_map=columns)
    assert in_words(tokenizer, dataset) == [PAIR_IN_WORDS]


def test_a_yaml_config_names_a_builder(tokenizer):
    write_lines("pairs.jsonl", [PAIR])
    text = "{_component_: humanline.data.preference_groups, source: pairs.jsonl, column_map: {prompt: prompt}}"
    assert in_words(tokenizer, config.instantiate(OmegaConf.create(text), tokenizer)) == [PAIR_IN_WORDS]


def test_the_chat_tokenizer_encodes_groups(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "user", "assistant", "how", "are", "you", "well", "bad"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    tokenizer = ChatTokenizer(str(tmp_path))

    rows = [{"prompt": "how are you", "chosen": "well", "rejected": "bad"}]
    (group,) = preference_groups(tokenizer, write_lines("pairs.jsonl", rows))
    assert tokenizer.decode(group.prompt, skip_special_tokens=False) == "<s> user how are you </s> <s> assistant"
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in group.responses] == ["well </s>", "bad </s>"]


# ---- Sources

ROWS = [
    {"chosen": [user(f"q {i}"), assistant(f"a {i}")], "rejected": [user(f"q {i}"), assistant(f"b {i}")]}
    for i in range(10)
]


def write_jsonl(rows: list) -> dict:
    return {"source": write_lines("data.jsonl", rows)}


def write_json_lines_with_blanks(rows: list) -> dict:
    Path("data.json").write_text("\n\n".join(map(json.dumps, rows)) + "\n \n", encoding="utf-8-sig")
    return {"source": "data.json"}


def write_json_array(rows: list) -> dict:
    Path("data.json").write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
    return {"source": "data.json"}


def write_parquet(rows: list) -> dict:
    datasets.Dataset.from_list(rows).to_parquet("data.parquet")
    return {"source": "data.parquet"}


def write_dataset_folder(rows: list) -> dict:
    Path("folder").mkdir()
    write_lines("folder/train.jsonl", rows)
    return {"source": "folder"}


def write_globbed(rows: list) -> dict:
    write_lines("part-0.jsonl", rows[:3])
    write_lines("part-1.jsonl", rows[3:])
    return {"source": "part-*.jsonl"}


def write_listed(rows: list) -> dict:
    write_globbed(rows)
    return {"source": ["part-0.jsonl", "part-1.jsonl"]}


def write_data_files(rows: list) -> dict:
    write_globbed(rows)
    return {"source": "json", "data_files": ["part-0.jsonl", "part-1.jsonl"]}


WRITERS = [
    write_jsonl,
    write_json_lines_with_blanks,
    write_json_array,
    write_parquet,
    write_dataset_folder,
    write_globbed,
    write_listed,
    write_data_files,
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_gives_the_same_groups_in_order(tokenizer, write):
    dataset = preference_groups(tokenizer, **write(ROWS))
    assert in_words(tokenizer, dataset) == [
        (f"<user> q {i} <assistant>", [f"a {i} <end>", f"b {i} <end>"]) for i in range(10)
    ]


@pytest.mark.parametrize("write", WRITERS)
def test_a_split_may_be_a_slice(tokenizer, write):
    source = write(ROWS)
    train = preference_groups(tokenizer, **source, split="train[:70%]")
    held_out = preference_groups(tokenizer, **source, split="train[70%:]")
    assert (len(train), len(held_out)) == (7, 3)
    assert in_words(tokenizer, train) + in_words(tokenizer, held_out) == in_words(
        tokenizer, preference_groups(tokenizer, **source)
    )


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (write_jsonl, "data.jsonl line 5"),
        (write_json_lines_with_blanks, "data.json line 9"),
        (write_json_array, "data.json item 5"),
        (write_parquet, "data.parquet row 5"),
        (write_dataset_folder, "folder (train) row 5"),
        (write_globbed, "part-1.jsonl line 2"),
    ],
)
def test_an_error_names_the_place_in_the_source(tokenizer, write, place):
    bad = {"chosen": ROWS[4]["chosen"], "rejected": None}
    with pytest.raises(DataError) as raised:
        preference_groups(tokenizer, **write([*ROWS[:4], bad, *ROWS[5:]]), on_bad_row="stop")
    assert str(raised.value).startswith(f"{place}: field 'rejected' is missing (found: chosen, rejected)")


def test_a_file_named_like_a_glob_is_read(tokenizer):
    assert len(preference_groups(tokenizer, write_lines("pairs[1].jsonl", [PAIR]))) == 1


# ---- Truncation

ids = st.lists(st.integers(0, 99), min_size=1, max_size=20)
groups = st.builds(
    lambda prompt, responses: Group(array("i", prompt), tuple(array("i", response) for response in responses)),
    ids,
    st.lists(ids, min_size=1, max_size=5),
)
budgets = st.integers(2, 45).flatmap(
    lambda total: st.builds(TokenBudget, max_tokens=st.just(total), max_prompt_tokens=st.integers(1, total - 1))
)


@given(groups, budgets)
def test_prompt_and_response_never_exceed_max_tokens_and_neither_vanishes(group, budget):
    cut = budget.fit(group)
    assert all(len(cut.prompt) + len(response) <= budget.max_tokens for response in cut.responses)
    assert len(cut.prompt) >= 1 and all(len(response) >= 1 for response in cut.responses)


@given(groups, budgets)
def test_a_group_that_fits_is_untouched(group, budget):
    fits = len(group.prompt) + max(map(len, group.responses)) <= budget.max_tokens
    assert (budget.fit(group) is group) == fits


@given(groups, budgets)
def test_a_prompt_that_is_cut_keeps_its_first_token_and_its_end(group, budget):
    whole, cut = list(group.prompt), list(budget.fit(group).prompt)
    if len(cut) < len(whole):
        assert len(cut) == budget.max_prompt_tokens
        assert cut == whole[:1] + whole[len(whole) - len(cut) + 1 :]
    else:
        assert cut == whole


@given(groups, budgets)
def test_a_response_loses_only_its_end_and_no_more_than_it_must(group, budget):
    cut = budget.fit(group)
    room = budget.max_tokens - len(cut.prompt)
    assert [list(response) for response in cut.responses] == [list(response)[:room] for response in group.responses]


def test_without_a_prompt_limit_only_responses_are_cut():
    group = Group([1, 2, 3], ([4, 5, 6], [7]))
    cut = TokenBudget(max_tokens=5, max_prompt_tokens=None).fit(group)
    assert cut == Group([1, 2, 3], ([4, 5], [7]))


def test_what_was_cut_and_dropped_is_reported(tokenizer):
    rows = [
        PAIR,
        {"prompt": "a b c d e", "chosen": "x y z", "rejected": "z"},  # a prompt of 7 tokens, responses of 4 and 2
        {"prompt": "a", "chosen": "s a m e up 1", "rejected": "s a m e up 2"},  # equal up to the cut
    ]
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", rows), max_tokens=8, max_prompt_tokens=5)
    assert in_words(tokenizer, dataset) == [PAIR_IN_WORDS, ("<user> c d e <assistant>", ["x y z", "z <end>"])]
    assert dataset.report() == (
        "2 groups from pairs.jsonl: schema preference (prompt chosen rejected); "
        "1 prompts and 3 responses truncated (max_tokens 8, max_prompt_tokens 5); "
        "1 pairs dropped (equal once encoded and cut); prompt/response tokens mean 5/3, max 5/3"
    )


def test_cutting_to_nothing_but_equal_pairs_is_an_error(tokenizer):
    rows = [{"prompt": "a", "chosen": "same 1", "rejected": "same 2"}]
    with pytest.raises(DataError, match=r"^pairs.jsonl: all 1 pairs are equal .*; raise max_tokens$"):
        preference_groups(tokenizer, write_lines("pairs.jsonl", rows), max_tokens=4, max_prompt_tokens=3)


def test_a_prompt_that_may_not_be_cut_and_leaves_no_room_is_an_error(tokenizer):
    rows = [PAIR, PAIR | {"prompt": "one two three four five six"}]
    message = (
        r"^pairs.jsonl line 2: the prompt's 8 tokens leave no room .* max_tokens \(8\); "
        r"raise max_tokens or set max_prompt_tokens \(1 of 2 rows cannot be used"
    )
    with pytest.raises(DataError, match=message):
        preference_groups(
            tokenizer, write_lines("pairs.jsonl", rows), max_tokens=8, max_prompt_tokens=None, on_bad_row="stop"
        )


# ---- Pairs from scored groups

scored = st.builds(
    lambda prompt, scored: Group(prompt, tuple(r for r, _ in scored), scores=tuple(s for _, s in scored), id="here"),
    ids,
    st.lists(st.tuples(st.sampled_from([[1], [2], [1, 2]]), st.sampled_from([0.0, 0.5, 2.0])), min_size=1, max_size=6),
)


def derived(derive, groups, expected, why_dropped):
    """Checks what becomes of the groups, and that the report counts the dropped ones; None where none is left."""
    if not expected:
        with pytest.raises(DataError, match="^memory: no group has a best and a worst response"):
            derive(GroupDataset(groups))
        return None
    found = derive(GroupDataset(groups))
    assert list(found) == expected
    dropped = len(groups) - len(expected)
    assert (f"{dropped} groups dropped ({why_dropped})" in found.report()) == (dropped > 0)
    return found


@given(st.lists(scored, min_size=1, max_size=8))
def test_a_pair_is_the_first_of_the_best_against_the_first_of_the_worst(groups):
    expected = []
    for group in groups:
        chosen = group.responses[group.scores.index(max(group.scores))]
        rejected = group.responses[group.scores.index(min(group.scores))]
        if max(group.scores) > min(group.scores) and chosen != rejected:
            expected.append(Group(group.prompt, (chosen, rejected), id=group.id))
    pairs = derived(as_pairs, groups, expected, "no best and worst response")
    assert pairs is None or as_pairs(pairs) is pairs


def test_pairs_pass_through_among_scored_groups():
    pair = Group([1], ([2], [3]))
    scored = Group([1], ([4], [5]), scores=(0.0, 1.0))
    assert list(as_pairs(GroupDataset([pair, scored]))) == [pair, Group([1], ([5], [4]))]


@pytest.mark.parametrize(
    ("group", "found"),
    [
        (Group([1], ([2], [3], [4]), id="a.jsonl line 3"), "3 responses with no scores"),
        (Group([1], ([2], [3]), labels=(True, False), id="a.jsonl line 3"), "2 responses with labels"),
    ],
)
def test_groups_that_are_neither_scored_nor_pairs_make_no_pairs(group, found):
    with pytest.raises(DataError, match=f"^a.jsonl line 3: {found} make no pair; .*provide scores"):
        as_pairs(GroupDataset([group]))


@given(st.lists(scored, min_size=1, max_size=8))
def test_a_scored_response_is_desirable_above_its_group_s_mean_and_undesirable_below(groups):
    expected = []
    for group in groups:
        mean = sum(group.scores) / len(group.scores)
        kept = [(r, s > mean) for r, s in zip(group.responses, group.scores, strict=True) if s != mean]
        if max(group.scores) > min(group.scores):
            responses, labels = zip(*kept, strict=True)
            expected.append(Group(group.prompt, responses, labels=labels, id=group.id))
    labelled = derived(as_labelled, groups, expected, "all scores equal")
    assert labelled is None or as_labelled(labelled) is labelled


@given(st.lists(scored, min_size=1, max_size=8))
def test_groups_whose_scores_are_all_equal_are_skipped_and_the_others_kept_whole(groups):
    expected = [group for group in groups if len(set(group.scores)) > 1]
    derived(as_scored, groups, expected, "all scores equal")


def test_pairs_and_labels_become_labels_and_scores():
    pair = Group([1], ([2], [3]), id="a")
    labels = Group([1], ([4], [5], [6]), labels=(False, True, False), id="b")
    one = Group([1], ([7],), labels=(True,), id="c")
    assert list(as_labelled(GroupDataset([pair, labels, one]))) == [
        Group([1], ([2], [3]), labels=(True, False), id="a"),
        labels,
        one,
    ]
    assert list(as_scored(GroupDataset([pair, labels, one]))) == [
        Group([1], ([2], [3]), scores=(1.0, 0.0), id="a"),
        Group([1], ([4], [5], [6]), scores=(0.0, 1.0, 0.0), id="b"),
    ]


@pytest.mark.parametrize("derive", [as_labelled, as_scored])
def test_groups_that_say_nothing_of_what_is_better_are_refused_by_name(derive):
    group = Group([1], ([2], [3], [4]), id="a.jsonl line 3")
    with pytest.raises(
        DataError, match="^a.jsonl line 3: 3 responses without scores or labels do not say which is better"
    ):
        derive(GroupDataset([group]))


def test_a_derived_dataset_keeps_the_budget_it_was_cut_to(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({"prompt": [1], "responses": [[2], [3]], "scores": [1, 0]}) + "\n")
    dataset = encoded_groups(None, str(path), max_tokens=9, max_prompt_tokens=4)
    for derive in (as_pairs, as_labelled, as_scored):
        assert derive(dataset).budget == TokenBudget(max_tokens=9, max_prompt_tokens=4)
    assert GroupDataset([Group([1, 2], ([3], [4, 5]))]).budget == TokenBudget(max_tokens=4, max_prompt_tokens=None)


# ---- Bad examples: the file, the line, the field, what is there, what to do

SCORED = {"prompt": "p", "all_generated_responses": ["a", "b"], "all_rm_scores": [1.0, 2.0]}
LABELLED = {"prompt": "p", "completion": "a", "label": True}
ENCODED = {"prompt": [1, 2], "responses": [[3], [4]]}

BAD_EXAMPLES = [
    (preference_groups, {"prompt": "p", "chosen": "a"}, "'rejected' is missing (found: prompt, chosen); add it"),
    (preference_groups, {"chosen": "a", "rejected": "b"}, "'prompt' is missing (found: chosen, rejected); add it"),
    (preference_groups, {}, "'chosen' is missing (found: nothing); add it"),
    (preference_groups, PAIR | {"chosen": 3}, "'chosen' must be a string or a list of messages, got 3 (int)"),
    (
        preference_groups,
        PAIR | {"prompt": 5},
        "'prompt' must be a string or a list of messages, got 5 (int)",
    ),
    (preference_groups, PAIR | {"chosen": " \n"}, "'chosen' is empty; fill it or drop the line"),
    (preference_groups, PAIR | {"prompt": ""}, "'prompt' is empty"),
    (preference_groups, PAIR | {"prompt": []}, "'prompt' is empty"),
    (preference_groups, PAIR | {"prompt": [user(" ")]}, "'prompt[0].content' is empty"),
    (
        preference_groups,
        PAIR | {"rejected": PAIR["chosen"]},
        "'rejected' equals 'chosen', so neither is better; drop the line",
    ),
    (preference_groups, PAIR | {"chosen": "a \ud800 b"}, r"'chosen' has half of a character, '\ud800', at position 2"),
    (
        preference_groups,
        PAIR | {"chosen": ["very well", "indeed"]},
        "'chosen[0]' must be a message with role and content, got 'very well' (str)",
    ),
    (
        preference_groups,
        PAIR | {"chosen": [user("a")]},
        "'chosen[0].role' must be 'assistant' in the last message, got 'user'",
    ),
    (preference_groups, PAIR | {"chosen": [assistant(" ")]}, "'chosen[0].content' is empty"),
    (
        preference_groups,
        PAIR | {"prompt": [user("a"), assistant("b")]},
        "'prompt[1].role' must be 'user' in the prompt's last message, got 'assistant'",
    ),
    (
        preference_groups,
        PAIR | {"prompt": [{"role": "narrator", "content": "a"}]},
        "'prompt[0].role' must be one of system, user, assistant, tool, got 'narrator'",
    ),
    (
        preference_groups,
        PAIR | {"prompt": [{"role": "user", "content": None}]},
        "'prompt[0].content' must be a string, got None (NoneType)",
    ),
    (
        preference_groups,
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        "'rejected' has another prompt than 'chosen'; a pair needs one prompt",
    ),
    (
        preference_groups,
        {"prompt": [user("c")], "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]},
        "'prompt' differs from the messages before the response",
    ),
    (
        preference_groups,
        PAIR | {"chosen": [assistant("a"), user("b"), assistant("c")]},
        "'chosen' starts with the assistant; provide the whole conversation, or only the response",
    ),
    (labelled_groups, LABELLED | {"label": 2}, "'label' must be true or false, got 2 (int)"),
    (labelled_groups, LABELLED | {"label": "yes"}, "'label' must be true or false, got 'yes' (str)"),
    (labelled_groups, LABELLED | {"completion": ""}, "'completion' is empty"),
    (labelled_groups, LABELLED | {"label": None}, "'label' is missing"),
    (
        scored_groups,
        SCORED | {"all_rm_scores": [1.0]},
        "'all_rm_scores' has 1 entries for 2 responses; provide one per",
    ),
    (scored_groups, SCORED | {"all_rm_scores": [1.0, math.nan]}, "'all_rm_scores[1]' must be a finite number, got nan"),
    (scored_groups, SCORED | {"all_rm_scores": [math.inf, 1]}, "'all_rm_scores[0]' must be a finite number, got inf"),
    (scored_groups, SCORED | {"all_rm_scores": ["1", 2]}, "'all_rm_scores[0]' must be a number, got '1' (str)"),
    (scored_groups, SCORED | {"all_rm_scores": [1, True]}, "'all_rm_scores[1]' must be a number, got True (bool)"),
    (scored_groups, SCORED | {"all_rm_scores": 3}, "'all_rm_scores' must be a list of numbers, got 3 (int)"),
    (
        scored_groups,
        SCORED | {"all_generated_responses": ["a", 2]},
        "'all_generated_responses[1]' must be a string, got 2",
    ),
    (scored_groups, SCORED | {"all_generated_responses": []}, "'all_generated_responses' is empty"),
    (encoded_groups, ENCODED | {"prompt": []}, "'prompt' is empty"),
    (encoded_groups, ENCODED | {"prompt": "text"}, "'prompt' must be a list of token ids, got 'text' (str)"),
    (encoded_groups, ENCODED | {"prompt": [1, -2]}, "'prompt[1]' must be a token id from 0 to 999, got -2; encode"),
    (
        encoded_groups,
        ENCODED | {"responses": [[3], [1000]]},
        "'responses[1][0]' must be a token id from 0 to 999, got 1000",
    ),
    (encoded_groups, ENCODED | {"responses": [[3], [1.5]]}, "'responses[1][0]' must be a token id, got 1.5 (float)"),
    (encoded_groups, ENCODED | {"responses": [[3], [True]]}, "'responses[1][0]' must be a token id, got True (bool)"),
    (encoded_groups, ENCODED | {"responses": [[3], []]}, "'responses[1]' is empty"),
    (encoded_groups, ENCODED | {"responses": [3, 4]}, "'responses[0]' must be a list of token ids, got 3 (int)"),
    (encoded_groups, ENCODED | {"responses": [[3], [3]]}, "'responses' has two equal entries"),
    (encoded_groups, ENCODED | {"responses": [[3]]}, "'responses' has 1 entries but no scores or labels; add them"),
    (encoded_groups, ENCODED | {"scores": [1]}, "'scores' has 1 entries for 2 responses"),
    (encoded_groups, ENCODED | {"labels": [True]}, "'labels' has 1 entries for 2 responses"),
    (encoded_groups, ENCODED | {"labels": [True, 0.5]}, "'labels[1]' must be true or false, got 0.5 (float)"),
]


@pytest.mark.parametrize(
    ("builder", "row", "message"), BAD_EXAMPLES, ids=[message.split(";")[0] for _, _, message in BAD_EXAMPLES]
)
def test_a_bad_example_is_one_line_that_names_file_line_field_and_value(tokenizer, builder, row, message):
    good = {preference_groups: PAIR, labelled_groups: LABELLED, scored_groups: SCORED, encoded_groups: ENCODED}[builder]
    with pytest.raises(DataError) as raised:
        builder(tokenizer, write_lines("data.jsonl", [good, row, good]), on_bad_row="stop")
    assert str(raised.value).startswith(f"data.jsonl line 2: field {message}")
    assert "\n" not in str(raised.value)


def test_an_error_names_the_users_column(tokenizer):
    rows = [{"question": "how are you", "good": [assistant("")], "rejected": "go away"}]
    with pytest.raises(DataError, match=r"^pairs.jsonl line 1: field 'good\[0\].content' is empty"):
        columns = {"prompt": "question", "chosen": "good"}
        preference_groups(tokenizer, write_lines("pairs.jsonl", rows), column_map=columns)


def test_without_a_tokenizer_ids_must_still_be_ids():
    rows = [ENCODED | {"prompt": [2**31]}]
    with pytest.raises(
        DataError,
        match=r"^ids.jsonl line 1: field 'prompt\[0\]' must be a token id from 0 to 2147483647, got 2147483648",
    ):
        encoded_groups(None, write_lines("ids.jsonl", rows))


def test_a_conversation_that_the_chat_template_declines_is_named(tokenizer):
    class NoSystem(WordTokenizer):
        def encode_prompt(self, messages):
            if messages[0]["role"] == "system":
                raise DataError("messages: the chat template rejects the chat")
            return super().encode_prompt(messages)

    rows = [PAIR, PAIR | {"prompt": [{"role": "system", "content": "s"}, user("u")]}]
    with pytest.raises(DataError, match="^pairs.jsonl line 2: messages: the chat template rejects the chat"):
        preference_groups(NoSystem(), write_lines("pairs.jsonl", rows), on_bad_row="stop")


# ---- Bad files

GOOD_LINE = json.dumps(PAIR).encode() + b"\n"
BAD_FILES = [
    ("a.jsonl", GOOD_LINE + b"\n{'prompt'\n", "a.jsonl line 3: malformed JSON (Expecting property name"),
    ("a.jsonl", GOOD_LINE + b'{"prompt": "\xff"}\n', "a.jsonl line 2: malformed JSON ('utf-8' codec can't decode"),
    ("a.jsonl", GOOD_LINE + b'"text"\n', "a.jsonl line 2: expected an object with named fields, {...}, got str"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl: malformed JSON"),
    ("a.json", b'[{"prompt": "p"},\n {"prompt"}]', "a.json line 2: malformed JSON (Expecting ':' delimiter"),
    ("a.json", b"[" + GOOD_LINE + b", 3]", "a.json item 2: expected an object with named fields, {...}, got int"),
    ("a.json", b'{\n"prompt": "p"\n}', "a.json line 1: malformed JSON"),
    ("a.parquet", b"PAR1 is not enough", "a.parquet: cannot be read as parquet"),
    ("a.jsonl", b"\n", "a.jsonl: no examples in split 'train'; check the file and the split"),
    ("a.json", b"[]", "a.json: no examples in split 'train'"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_FILES, ids=[message for _, _, message in BAD_FILES])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tokenizer, file, content, message):
    Path(file).write_bytes(content)
    with pytest.raises(DataError) as raised:
        preference_groups(tokenizer, file, on_bad_row="stop")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# ---- Bad settings

BAD_SETTINGS = [
    ({"source": "missing.jsonl"}, "source: file 'missing.jsonl' not found (working directory "),
    ({"source": "./missing"}, "source: file './missing' not found"),
    ({"source": "missing-*.jsonl"}, "source: file 'missing-*.jsonl' not found"),
    ({"source": ["pairs.jsonl", "missing.jsonl"]}, "source: file 'missing.jsonl' not found"),
    ({"source": "json", "data_files": "missing.jsonl"}, "data_files: file 'missing.jsonl' not found"),
    ({"source": "pairs.xlsx"}, "source: 'pairs.xlsx' has an unsupported type; convert it to one of .json, .jsonl, "),
    ({"name": "main"}, "name: expected null for local files, got 'main'"),
    ({"streaming": True}, "streaming: expected false, got True; all rows are checked before training starts."),
    ({"format": "orka"}, "format: expected one of implicit_preference, preference, anthropic_hh"),
    ({"on_bad_row": "skip"}, "on_bad_row: expected drop or stop, got 'skip'"),
    ({"source": None}, "source: expected a file, a glob, a list of these, or a hub dataset, got None"),
    ({"source": []}, "source: expected a file, a glob, a list of these, or a hub dataset, got []"),
    ({"split": "test"}, "split: 'test' does not work for local files (Unknown split"),
    ({"split": "train[:"}, "split: 'train[:' does not work for local files (Unrecognized"),
    ({"split": None}, "split: expected the name of a split such as train or train[:95%], got None"),
    (
        {"column_map": {"prompts": "p"}},
        "column_map: expected fields of a known schema, such as prompt, got 'prompts'",
    ),
    ({"max_prompt_tokens": 1250}, "max_prompt_tokens: 1250 leaves no room for a response within max_tokens (1250);"),
    ({"max_prompt_tokens": 0}, "max_prompt_tokens: expected an integer of at least 1, or null for no limit, got 0"),
    ({"max_tokens": 1}, "max_tokens: expected an integer of at least 2 (a prompt and a response), got 1"),
    ({"max_tokens": "many"}, "max_tokens: expected an integer of at least 2 (a prompt and a response), got 'many'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_a_setting_that_cannot_work_is_one_line_that_starts_with_its_key(tokenizer, settings, message):
    write_lines("pairs.jsonl", [PAIR])
    Path("pairs.xlsx").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ConfigError) as raised:
        preference_groups(tokenizer, **({"source": "pairs.jsonl"} | settings))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_slice_without_examples_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"^pairs.jsonl: no examples in split 'train\[5:\]'"):
        preference_groups(tokenizer, write_lines("pairs.jsonl", [PAIR]), split="train[5:]")


def test_a_hub_dataset_that_cannot_be_reached_is_one_line_with_the_remedy(tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        preference_groups(tokenizer, "nobody/nothing")
    assert str(raised.value).startswith("source: 'nobody/nothing' (split 'train') cannot be loaded (Couldn't reach")
    assert str(raised.value).endswith("or use local files")
    assert "\n" not in str(raised.value)


def test_text_needs_a_tokenizer_with_a_chat_template():
    with pytest.raises(ConfigError, match="^tokenizer: NoneType has no chat template .* humanline.data.ChatTokenizer"):
        preference_groups(None, write_lines("pairs.jsonl", [PAIR]))
