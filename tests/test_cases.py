"""Small inputs that real users' data look like (data/cases), and what is right for each."""

import json
import re
from pathlib import Path

import datasets
import pytest
from conftest import CASES
from test_groups import WordTokenizer, in_words

from humanline.data import labelled_groups, preference_groups, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.rollout import read_prompts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def case(name):
    return str(CASES / name)


def test_every_case_is_named_by_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    assert [file.name for file in CASES.iterdir() if file.stem not in tests] == []


def test_ultrafeedback_with_an_empty_response_and_an_equal_pair_trains_on_the_rest(tokenizer):
    dataset = preference_groups(tokenizer, case("p01b_ufb_empty.parquet"))
    assert (len(dataset), dataset.dropped) == (3, 2)
    empty, equal = re.findall(r"'rejected' (is empty|equals 'chosen') \(1, the first: \S+ row (\d)\)", dataset.report())
    assert (empty, equal) == (("is empty", "2"), ("equals 'chosen'", "4"))
    assert "schema ultrafeedback_binarized" in dataset.report()
    with pytest.raises(DataError, match=r"row 2: .*; .*row 4: .*\(2 of 5 rows cannot be used"):
        preference_groups(tokenizer, case("p01b_ufb_empty.parquet"), on_bad_row="stop")


def test_transcripts_of_anthropic_hh_become_messages(tokenizer):
    dataset = preference_groups(tokenizer, case("p03_hh_plain.jsonl"))
    prompt = "<user> Where do cats sleep? <assistant> Anywhere. <user> Why? <assistant>"
    assert in_words(tokenizer, dataset) == [(prompt, ["They like warmth. <end>", "No idea. <end>"])] * 2


def test_the_system_column_of_orca_is_the_system_message(tokenizer):
    assert in_words(tokenizer, preference_groups(tokenizer, case("p05_orca.jsonl"))) == [
        ("<system> Answer in French only. <user> What is the sea? <assistant>", ["L'eau. <end>", "Water. <end>"]),
        ("<user> Two? <assistant>", ["2 <end>", "3 <end>"]),
    ]


def test_sharegpt_is_read_as_messages(tokenizer):
    dataset = preference_groups(tokenizer, case("p07_sharegpt.jsonl"))
    assert in_words(tokenizer, dataset) == [("<user> Hi <assistant>", ["Hello! <end>", "Go. <end>"])]


def test_a_printed_list_of_messages_is_read_as_messages(tokenizer):
    dataset = preference_groups(tokenizer, case("p13_strlist.jsonl"))
    responses = ["A good reply 1. <end>", "A poor reply 1. <end>"]
    assert in_words(tokenizer, dataset) == [("<user> Name fruit number 1. <assistant>", responses)]


def test_text_with_the_tokens_of_a_template_is_refused(tokenizer):
    with pytest.raises(
        DataError, match=r"p27_pretemplated.jsonl line 1: the text has '<\|im_start\|>' of a chat template"
    ):
        preference_groups(tokenizer, case("p27_pretemplated.jsonl"))


def test_a_config_is_loaded_by_name_and_without_one_the_error_lists_both(tokenizer):
    folder = case("p38_multiconfig")
    for build in (preference_groups, scored_groups):
        assert len(build(tokenizer, folder, name="main")) == 2
    assert [prompt.messages[-1]["content"] for prompt in read_prompts(folder, name="socratic")] == ["x", "x"]
    for read in (lambda: preference_groups(tokenizer, folder), lambda: read_prompts(folder)):
        with pytest.raises(ConfigError, match="^name: missing; .* has the configs main, socratic; set name to one of"):
            read()


@pytest.mark.parametrize("name", ["k02_int.jsonl", "k12_halos_binary.json"])
def test_a_label_of_1_is_desirable(tokenizer, name):
    dataset = labelled_groups(tokenizer, case(name))
    second = "Hello!" if name == "k02_int.jsonl" else "Go."
    prompt = "<user> Hi <assistant>"
    assert in_words(tokenizer, dataset) == [(prompt, ["Hello! <end>"]), (prompt, [f"{second} <end>"])]
    assert [group.labels for group in dataset] == [(True,), (False,)]


# ---- Hub datasets, as folders of their layout under their names


def lay_out(name, files, configs):
    for path, rows in files.items():
        (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".jsonl"):
            (Path(name) / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(Path(name) / path))
    lines = []
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {path}" for split, path in splits.items()]
    Path(name, "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")


SUM = {"question": "Ann has 3 pens, buys 3.", "answer": "3+3=<<3+3=6>>6\n#### 6"}


def test_gsm8k_by_its_name():
    parts = {config: {s: f"{config}/{s}-*" for s in ("train", "test")} for config in ("main", "socratic")}
    files = {f"{c}/{s}-00000-of-00001.parquet": [SUM] for c in parts for s in ("train", "test")}
    lay_out("openai/gsm8k", files, parts)
    (prompt,) = read_prompts("openai/gsm8k", "test", name="main")
    assert prompt.messages == [{"role": "user", "content": SUM["question"]}]
    assert prompt.fields == {**SUM, "prompt": SUM["question"]}
    with pytest.raises(ConfigError, match="^name: missing; 'openai/gsm8k' has the configs main, socratic"):
        read_prompts("openai/gsm8k", "test")
    with pytest.raises(
        ConfigError, match="^split: 'validation' does not work for 'openai/gsm8k' .*; use train or test, or a slice"
    ):
        read_prompts("openai/gsm8k", "validation", name="main")


def test_math_500_by_its_name():
    row = {
        "problem": "1+1?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "A",
        "level": 1,
        "unique_id": "a",
    }
    lay_out("HuggingFaceH4/MATH-500", {"test.jsonl": [row]}, {"default": {"test": "test.jsonl"}})
    (prompt,) = read_prompts("HuggingFaceH4/MATH-500", "test")
    assert prompt.messages[0]["content"] == "1+1?" and prompt.fields["answer"] == "2"


def test_ultrafeedback_by_its_name(tokenizer):
    def rows(count):
        return [
            {
                **{"prompt": f"q {i}", "prompt_id": str(i), "score_chosen": 8.0, "score_rejected": 4.0},
                **{"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]},
                "chosen": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "b"}],
            }
            for i in range(count)
        ]

    splits = {split: f"data/{split}-*" for split in ("train_prefs", "train_sft", "test_prefs")}
    files = {f"data/{split}-00000-of-00001.parquet": rows(4) for split in splits}
    lay_out("HuggingFaceH4/ultrafeedback_binarized", files, {"default": splits})
    name = "HuggingFaceH4/ultrafeedback_binarized"
    assert len(preference_groups(tokenizer, name, split="train_prefs")) == 4
    assert len(preference_groups(tokenizer, name, split="train_prefs[:50%]")) == 2
    with pytest.raises(
        ConfigError, match=f"^split: 'train' does not work for '{name}' .*; use train_prefs or train_sft or test_prefs"
    ):
        preference_groups(tokenizer, name)
