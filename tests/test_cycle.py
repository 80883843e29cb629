"""Sampling, scoring and training meet in files: the prompt and the file's own columns come through unchanged."""

import datetime
import json
import math
import runpy
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import CASES, ROOT
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pyarrow import parquet
from test_sampling import hf_llama, of_the_model, write_tokenizer
from toys import Letters

from humanline.data import ChatTokenizer, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.programs import PartialFile, with_json_fields, write_jsonl
from humanline.rollout import OnlineSource, Prompt, Steps, read_prompts

pytestmark = pytest.mark.slow

SEQUENCE_CLASSIFIER = "humanline.rewards.SequenceClassifierReward"
LENGTH = {"_component_": "test_cycle.Length"}
QUESTION = {"role": "user", "content": "What is 2+3?"}
SYSTEM = {"role": "system", "content": "Be brief."}


class Length:
    """Scores a response by its length, and notes the prompts that it scores."""

    seen: list[Prompt] = []

    def __call__(self, prompts, responses):
        Length.seen = list(prompts)
        return [[float(len(text)) for text in texts] for texts in responses]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cycle") / "tiny-llama"
    hf_llama(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def programs(model_folder, tmp_path):
    return Programs(model_folder, tmp_path)


class Programs:
    """The three programs, in this process, on files of one folder."""

    def __init__(self, model_folder, folder):
        self.folder = folder
        self.sampling = {"device": "cpu", "dtype": "fp32", "max_new_tokens": 8, "samples_per_prompt": 2}
        self.sampling |= of_the_model(model_folder, folder)

    def start(self, name, config):
        cfg = OmegaConf.create(config)
        recipe = runpy.run_path(str(ROOT / "recipes" / f"humanline_{name}.py"))[f"Humanline{name.title()}Recipe"](cfg)
        recipe.setup(cfg)
        return recipe

    def sample(self, prompts, **changes):
        """Returns the rows of the samples file, and the ids that were sampled from."""
        output = self.folder / "samples.jsonl"
        recipe = self.start("sample", self.sampling | {"prompts": str(prompts), "output": str(output), **changes})
        recipe.save(recipe.sample())
        return rows_of(output), recipe.sampler.prompt_ids

    def label(self, samples, **changes):
        output = self.folder / "scored.jsonl"
        recipe = self.start("label", {"samples": str(samples), "output": str(output), "reward": LENGTH, **changes})
        recipe.report(recipe.label())
        return rows_of(output)

    def evaluate(self, **changes):
        output = self.folder / "figures.json"
        given = {"output": str(output), "reward": LENGTH, "correct_above": None, "bootstrap": 10}
        recipe = self.start("eval", given | changes)
        rows = recipe.score(recipe.sample())
        recipe.save(rows, recipe.evaluate(rows))
        return rows_of(output.with_suffix(".jsonl"))


def rows_of(path):
    """The rows of a file, in strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").split("\n")[:-1]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- The prompt


@pytest.fixture
def mixed(tmp_path):
    """Prompts with and without their own system message."""
    lines = [json.loads(line) for name in ("e07_sys", "e08_plain") for line in open(CASES / f"{name}.jsonl")]
    return write(tmp_path / "mixed.jsonl", lines)


@pytest.mark.parametrize("system_prompt", ["Be brief.", None])
def test_a_group_has_the_prompt_that_was_sampled_from(programs, mixed, model_folder, system_prompt):
    sampled, ids = programs.sample(mixed, system_prompt=system_prompt)
    programs.label(programs.folder / "samples.jsonl")
    tokenizer = ChatTokenizer(str(model_folder))
    groups = scored_groups(tokenizer, str(programs.folder / "scored.jsonl"))
    assert [list(group.prompt) for group in groups] == ids and len(ids) == 3
    assert ("Be brief." in tokenizer.decode(ids[1])) == (system_prompt is not None)


def test_the_system_prompt_reaches_only_prompts_without_their_own(programs, mixed, caplog):
    sampled, _ = programs.sample(mixed, system_prompt="Be brief.")
    own = [{"role": "system", "content": "Speak French."}, {"role": "user", "content": "Hi"}]
    assert [row["prompt"] for row in sampled] == [
        own,
        [SYSTEM, QUESTION],
        [SYSTEM, {**QUESTION, "content": "What is 4+4?"}],
    ]
    assert [row["answer"] for row in sampled] == ["5", "5", "8"]
    said = [record.getMessage() for record in caplog.records if "own system message" in record.getMessage()]
    assert said == ["system_prompt: 1 of 3 prompts keep their own system message instead"]


@pytest.mark.parametrize(
    ("case", "expected"), [("e07_sys", ["Speak French."]), ("e08_plain", ["Be brief.", "Be brief."])]
)
def test_evaluation_writes_and_scores_the_prompt_that_was_sampled_from(programs, case, expected):
    rows = programs.evaluate(**programs.sampling, prompts=str(CASES / f"{case}.jsonl"), system_prompt="Be brief.")
    assert [[m["content"] for m in row["prompt"] if m["role"] == "system"] for row in rows] == [[s] for s in expected]
    assert [prompt.messages for prompt in Length.seen] == [row["prompt"] for row in rows]
    again = programs.evaluate(samples=str(programs.folder / "figures.jsonl"))
    assert again == rows and [prompt.messages for prompt in Length.seen] == [row["prompt"] for row in rows]


def test_samples_may_be_sampled_again_and_keep_their_prompt(programs, mixed):
    first, ids = programs.sample(mixed, system_prompt="Be brief.")
    kept = (programs.folder / "samples.jsonl").rename(programs.folder / "kept.jsonl")
    again, same = programs.sample(kept, system_prompt="Another.")
    assert (again, same) == (first, ids)


def test_online_the_system_prompt_reaches_only_prompts_without_their_own(mixed):
    source = OnlineSource(str(mixed), max_new_tokens=4, system_prompt="Be brief.")
    steps = Steps(batch_size=1, accumulation=1, world_size=1, seed=0, shuffle=False)
    plan = source.plan(Letters(), steps)
    first = [[(m["role"], m["content"]) for m in prompt.messages][0] for prompt in plan.prompts]
    assert first == [("system", "Speak French."), ("system", "Be brief."), ("system", "Be brief.")]
    assert plan.prompt_ids == [Letters().encode_prompt(prompt.messages) for prompt in plan.prompts]
    assert plan.left_out() == ["source: 1 of 3 prompts keep their own system message instead of system_prompt"]
    without = OnlineSource(str(mixed), max_new_tokens=4).plan(Letters(), steps)
    assert [len(prompt.messages) for prompt in without.prompts] == [2, 1, 1] and without.left_out() == []


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_developer_s_message_is_a_system_message_too(role):
    first = {"role": role, "content": "Speak French."}
    own, late, none = (
        Prompt("line 1", messages, {}) for messages in ([first, QUESTION], [QUESTION, first, QUESTION], [QUESTION])
    )
    assert own.under("Be brief.") == own
    assert late.under("Be brief.").messages == [SYSTEM, *late.messages]
    assert none.under("Be brief.").messages == [SYSTEM, QUESTION]
    assert none.under(None) == none.under("") == none


@pytest.mark.parametrize("system_prompt", [5, ["Be brief."], True])
def test_a_system_prompt_that_is_no_text_is_refused(programs, mixed, system_prompt):
    with pytest.raises(ConfigError, match="^system_prompt: expected a string or null, got "):
        programs.sample(mixed, system_prompt=system_prompt)
    with pytest.raises(ConfigError, match="^source.system_prompt: expected a string or null, got "):
        OnlineSource(str(mixed), max_new_tokens=4, system_prompt=system_prompt)


# ---- The file's own columns


def test_a_prompt_file_with_timestamps_is_sampled_and_labelled(programs):
    case = CASES / "e04_timestamps.parquet"
    columns = {"answer": "5", "timestamp": "2024-01-02T03:04:05", "id": "AP8=", "price": "1.5", "day": "2024-01-02"}
    sampled, _ = programs.sample(case)
    assert [{name: row[name] for name in columns} for row in sampled] == [columns] * 2
    scored = programs.label(programs.folder / "samples.jsonl")
    assert [{name: row[name] for name in columns} for row in scored] == [columns] * 2
    evaluated = programs.evaluate(**programs.sampling, prompts=str(case))
    assert [{name: row[name] for name in columns} for row in evaluated] == [columns] * 2


def test_samples_in_parquet_keep_their_columns_when_labelled_and_evaluated(programs):
    columns = {
        "at": pa.array([1704164645_000000006], pa.timestamp("ns", tz="UTC")),
        "took": pa.array([90_000_000_001], pa.duration("ns")),
        "price": [Decimal("1.50")],
        "score": pa.array([math.nan], pa.float32()),
        "nested": [{"days": [datetime.date(2024, 1, 2)], "raw": b"\xff"}],
    }
    table = {"prompt": ["2+3?"], "all_generated_responses": [["5", "55"]], **columns}
    samples = programs.folder / "samples.parquet"
    parquet.write_table(pa.table(table), samples)
    expected = {
        "at": "2024-01-02T03:04:05.000000006+00:00",
        "took": "PT90.000000001S",
        "price": "1.50",
        "score": None,
        "nested": {"days": ["2024-01-02"], "raw": "/w=="},
    }
    scored = {"prompt": "2+3?", "all_generated_responses": ["5", "55"], **expected, "all_rm_scores": [1, 2]}
    assert programs.label(samples) == [scored]
    assert programs.evaluate(samples=str(samples)) == [scored]


JSON_FORMS = [
    (datetime.time(3, 4), "03:04:00"),
    (datetime.timedelta(days=-1), "PT-86400S"),
    (Decimal("1E+400"), "1E+400"),
    (Decimal("NaN"), None),
    (pd.NaT, None),
    (math.inf, "Infinity"),
    (-math.inf, "-Infinity"),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.datetime64("2024-01-02T03"), "2024-01-02T03"),
    (np.datetime64("NaT"), None),
    (np.timedelta64(1500, "ms"), "PT1.5S"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array(["2024-01-02"], dtype="datetime64[D]"), ["2024-01-02"]),
    ([(1, b"a")], [[1, "YQ=="]]),
    ({1: {"a": (math.nan,)}}, {"1": {"a": [None]}}),
]


@pytest.mark.parametrize(("value", "form"), JSON_FORMS, ids=lambda value: repr(value)[:30])
def test_a_value_has_one_json_form(value, form):
    [prompt] = with_json_fields([Prompt("prompts.parquet row 1", [], {"column": value})])
    assert json.loads(json.dumps(prompt.fields["column"], allow_nan=False)) == form


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
)


@given(JSON)
def test_json_values_stay_as_they_are(value):
    [prompt] = with_json_fields([Prompt("prompts.jsonl line 1", [], {"column": value})])
    assert prompt.fields["column"] == value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1j, "has a value of type complex, for which JSON has no form; store it as text, or remove the column"),
        ([{"a": {1}}], "has a value of type set, for which JSON has no form"),
        (np.longdouble(1), "has a value of type longdouble, for which"),
        (nested(100_000), "is nested too deeply; remove the column"),
    ],
    ids=["complex", "set", "longdouble", "nested"],
)
def test_a_value_without_a_json_form_is_named(value, problem):
    with pytest.raises(DataError, match=f"^hub/images \\(train\\) row 1: field 'column' {problem}"):
        with_json_fields([Prompt("hub/images (train) row 1", [], {"fine": 1, "column": value})])


def test_half_a_character_in_a_column_is_written_as_it_came(tmp_path):
    rows = [{"note": "\ud83d", "text": "Ü\udc80"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert rows_of(tmp_path / "rows.jsonl") == rows
    for _ in range(2):
        with PartialFile(tmp_path / "out.jsonl", "these") as partial:
            assert partial.rows in ([], rows)
            partial.add(rows[len(partial.rows) :])
    assert partial.rows == rows


@pytest.fixture
def hub(monkeypatch):
    """``hub(rows)``: the rows of the hub dataset owner/name."""

    class Rows(list):
        def iter(self, batch_size):
            return ({name: [value] for name, value in row.items()} for row in self)

    def contain(rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows(rows))
        return "owner/name"

    return contain


def test_a_hub_dataset_s_timestamps_and_bytes_are_kept(programs, hub):
    row = {"prompt": "2+3?", "at": datetime.datetime(2024, 1, 2, 3), "scan": {"bytes": b"\xff", "path": "a"}}
    [sampled], _ = programs.sample(hub(datasets.Dataset.from_list([row])))
    assert (sampled["at"], sampled["scan"]) == ("2024-01-02T03:00:00", {"bytes": "/w==", "path": "a"})


@pytest.mark.parametrize("program", ["sample", "eval"])
def test_a_column_without_a_json_form_is_named_before_a_model_loads(programs, hub, program):
    output = str(programs.folder / "out.json")
    config = programs.sampling | {"prompts": hub([{"prompt": "2+3?", "scan": object()}]), "output": output}
    config["checkpointer"] |= {"checkpoint_dir": "none"}
    if program == "eval":
        config |= {"correct_above": None, "reward": {"_component_": SEQUENCE_CLASSIFIER, "path": "none"}}
    with pytest.raises(DataError, match=r"^owner/name \(train\) row 1: field 'scan' has a value of type object, for"):
        programs.start(program, config)


def test_columns_that_a_program_writes_are_said_to_be_replaced(programs, caplog):
    prompts = write(programs.folder / "prompts.jsonl", [{"prompt": "2+3?", "finish_reasons": "mine", "other": 1}])
    [row], _ = programs.sample(prompts)
    assert row["finish_reasons"] != "mine" and row["other"] == 1
    assert "prompts: the output does not keep the file's finish_reasons: " in caplog.text
    caplog.clear()
    samples = programs.folder / "samples.jsonl"
    programs.label(samples)
    assert "does not keep" not in caplog.text
    programs.label(programs.folder / "scored.jsonl", output=str(programs.folder / "again.jsonl"))
    assert "samples: the output does not keep the file's all_rm_scores: " in caplog.text


def test_a_column_that_column_map_hides_is_said(tmp_path, caplog):
    prompts = write(tmp_path / "prompts.jsonl", [{"problem": "2+3?", "answer": "no", "solution": "5"}])
    [prompt] = read_prompts(str(prompts), column_map={"prompt": "problem", "answer": "solution"})
    assert prompt.fields["answer"] == "5"
    said = [record.getMessage() for record in caplog.records]
    assert said == ["column_map: {answer: solution} hides the source's own column 'answer'; rename one to keep both"]
