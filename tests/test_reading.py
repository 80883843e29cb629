"""Nothing of a source is lost, doubled or misread without a word; a fault is one line with its place and remedy."""

import csv
import gzip
import json
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet
from test_groups import PAIR, PAIR_IN_WORDS, WordTokenizer, in_words, write_lines

from humanline.data import preference_groups
from humanline.errors import ConfigError, DataError
from humanline.rollout import read_prompts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def said_of(error, read, *arguments, **settings):
    """Returns the only line of an error."""
    with pytest.raises(error) as raised:
        read(*arguments, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def lay_out(folder, *files):
    for file in files:
        (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".csv"):
            Path(folder, file).write_text("prompt,chosen,rejected\nhow are you,very well,go away\n")
        elif file.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([PAIR]), Path(folder, file))
        else:
            write_lines(str(Path(folder, file)), [PAIR])


# ---- Folders


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        (["train.jsonl", "extra.jsonl"], ["extra.jsonl"]),
        (["train.jsonl", "test.jsonl", "more.jsonl"], ["more.jsonl"]),
        (["a.jsonl", "b.csv"], ["b.csv"]),
        (["a.parquet", "b.parquet", "c.jsonl"], ["c.jsonl"]),
        (["train.jsonl", "old/some.jsonl.gz", "old/some.csv"], ["old/some.csv", "old/some.jsonl.gz"]),
    ],
)
def test_a_folder_of_which_datasets_would_leave_out_files_is_refused(tokenizer, files, lost):
    lay_out("folder", *files)
    said = said_of(ConfigError, preference_groups, tokenizer, "folder")
    assert said.startswith(f"source: of the folder 'folder', datasets would leave out {', '.join(lost)}, in no split")
    assert said.endswith("set data_files to the files that are meant, or source to a list or a glob of them")
    assert len(preference_groups(tokenizer, "folder", data_files=files[0])) == 1
    assert said_of(ConfigError, read_prompts, "folder").startswith("prompts: of the folder 'folder'")


def test_files_of_other_columns_are_left_out_with_a_warning(tokenizer, caplog):
    Path("folder/preference").mkdir(parents=True)
    write_lines("folder/train.jsonl", [PAIR])
    write_lines("folder/preference/strength.jsonl", [{"prompt": "hi", "strength": 2}])
    write_lines("folder/stats.json", [{"rows": 1}])
    assert len(preference_groups(tokenizer, "folder", data_files="train.jsonl")) == 1
    caplog.clear()
    assert len(preference_groups(tokenizer, "folder")) == 1
    assert "source: of 'folder', preference/strength.jsonl, stats.json is not read: other columns" in caplog.text


@pytest.mark.parametrize(
    "files",
    [
        ["train.jsonl", "test.jsonl"],
        ["a.jsonl", "b.jsonl", ".cache/c.csv"],
        ["test/0.jsonl", "train/0.jsonl", "train/1.jsonl", "dataset_infos.json"],
    ],
)
def test_files_of_other_splits_and_hidden_ones_are_not_left_out(tokenizer, files):
    lay_out("folder", *files)
    if "dataset_infos.json" in files:
        Path("folder/dataset_infos.json").write_text("{}")
    assert len(preference_groups(tokenizer, "folder")) == sum(
        "test" not in file and ".c" not in file and "infos" not in file for file in files
    )


def test_files_of_other_configs_are_not_left_out_but_those_of_none_are(tokenizer):
    lay_out("folder", "main/train.jsonl", "other/train.jsonl", "other/test.jsonl")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "other"))
    Path("folder/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    said = said_of(ConfigError, preference_groups, tokenizer, "folder", name="main")
    assert said.startswith("source: of the folder 'folder', datasets would leave out other/test.jsonl, in no split")
    Path("folder/other/test.jsonl").unlink()
    assert len(preference_groups(tokenizer, "folder", name="main")) == 1


def test_a_split_that_a_folder_does_not_have_is_named_with_those_it_has(tokenizer):
    lay_out("folder", "train.jsonl", "test.jsonl")
    said = said_of(ConfigError, preference_groups, tokenizer, "folder", split="validation")
    assert said.startswith("split: 'validation' does not work for 'folder'")
    assert said.endswith("use train or test, or a slice such as train[:95%]")


def test_a_line_of_a_folder_that_cannot_be_read_is_named(tokenizer):
    lay_out("folder", "train.jsonl")
    with open("folder/train.jsonl", "a") as file:
        file.write("{bad\n")
    said = said_of(DataError, preference_groups, tokenizer, "folder")
    assert said.startswith(str(Path("folder/train.jsonl").resolve()) + " line 2: malformed JSON (")
    assert said.endswith("set source to a list or a glob of files: bad rows are then left out")


def test_a_folder_has_no_revision(tokenizer):
    lay_out("folder", "train.jsonl")
    said = said_of(ConfigError, preference_groups, tokenizer, "folder", revision="main")
    assert said == "revision: expected null for the folder 'folder', got 'main'"


# ---- What save_to_disk wrote


@pytest.mark.parametrize(("setting", "value"), [("name", "main"), ("data_files", "a.jsonl"), ("revision", "v1")])
def test_a_setting_of_hub_datasets_is_refused_for_a_saved_one(tokenizer, setting, value):
    datasets.Dataset.from_list([PAIR]).save_to_disk("saved")
    for read in (partial(preference_groups, tokenizer, "saved"), partial(read_prompts, "saved")):
        said = said_of(ConfigError, read, **{setting: value})
        assert said == f"{setting}: expected null for 'saved', which save_to_disk wrote, got '{value}'"


@pytest.mark.parametrize("kind", ["saved", "folder"])
def test_a_slice_behind_the_last_row_has_no_examples(tokenizer, kind):
    if kind == "saved":
        datasets.Dataset.from_list([PAIR] * 12).save_to_disk("saved")
    else:
        lay_out("folder", "train.jsonl")
    said = said_of(DataError, preference_groups, tokenizer, kind, split="train[100:]")
    assert said.startswith(f"{kind}: no examples in split 'train[100:]'")
    said = said_of(ConfigError, read_prompts, kind, split="train[100:]")
    assert said.startswith("prompts: expected at least one prompt, got none in")


# ---- Names of files


def test_a_list_of_files_with_data_files_is_refused(tokenizer):
    write_lines("pairs.jsonl", [PAIR])
    for source in ("pairs.jsonl", ["pairs.jsonl"], "pairs-*.jsonl"):
        for data_files in ("pairs.jsonl", {"train": "pairs.jsonl"}):
            said = said_of(ConfigError, preference_groups, tokenizer, source, data_files=data_files)
            assert said.startswith(f"data_files: expected null for source {source!r}, got {data_files!r}")
            assert said.endswith("data_files names files of a folder, of a hub dataset, or of json, csv or parquet")


@pytest.mark.parametrize("source", ["pairs.jsnl", "./pairs.jsnl", "data/pair.jsonl"])
def test_a_file_of_a_similar_name_is_suggested(tokenizer, source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    lay_out(".", "pairs.jsonl", "data/pairs.jsonl")
    near = str(Path(source).with_name("pairs.jsonl"))
    said = said_of(ConfigError, preference_groups, tokenizer, source)
    assert said.startswith(f"source: {'file ' if source != 'pairs.jsnl' else ''}'{source}'")
    assert f"; did you mean {'the file ' if source == 'pairs.jsnl' else ''}'{near}'?" in said


def test_a_file_that_is_listed_twice_is_read_twice_with_a_warning(tokenizer, caplog):
    write_lines("a.jsonl", [PAIR])
    write_lines("b.jsonl", [PAIR])
    assert len(preference_groups(tokenizer, ["*.jsonl", "./a.jsonl"])) == 3
    file = Path("a.jsonl").resolve()
    assert caplog.messages == [f"source: file '{file}' is listed 2 times, so each of its rows is read 2 times"]


def test_only_the_name_of_a_file_says_what_separates_its_cells(tokenizer):
    lay_out("my.tsv_conv", "a.csv")
    assert in_words(tokenizer, preference_groups(tokenizer, "my.tsv_conv/a.csv")) == [PAIR_IN_WORDS]


# ---- Prompt files of text


def test_text_files_may_be_a_glob_or_a_list():
    Path("t1.txt").write_text("a\n")
    Path("t2.txt").write_text("b\n")
    write_lines("p.jsonl", [{"prompt": "c"}])
    for source, texts in (("t*.txt", "ab"), (["t2.txt", "t1.txt"], "ba"), (["t1.txt", "p.jsonl"], "ac")):
        assert [prompt.messages[0]["content"] for prompt in read_prompts(source)] == [*texts]


def test_text_files_are_for_prompts_only(tokenizer):
    Path("t.txt").write_text("a\n")
    said = said_of(ConfigError, preference_groups, tokenizer, "./t.txt")
    assert said.startswith("source: './t.txt' has an unsupported type")


def test_templated_lines_of_text_are_no_prompts():
    Path("t.txt").write_text("[INST] x [/INST]\n<|im_start|>user\n")
    assert said_of(DataError, read_prompts, "t.txt").startswith(
        "t.txt line 1: the text has '[INST]' of a chat template"
    )
    Path("t.txt").write_text("hi\n" * 20 + "[INST] x [/INST]\n")
    assert len(read_prompts("t.txt")) == 20


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("name", "main", "name: expected null for local files, got 'main'"),
        ("revision", "v1", "revision: expected null for local files, got 'v1'"),
        ("data_files", "u.txt", "data_files: expected null for prompts 't.txt', got 'u.txt'"),
        (
            "column_map",
            {"prompt": "text"},
            "column_map: expected null for 't.txt', whose lines have no columns, got {'",
        ),
    ],
)
def test_settings_that_lines_of_text_cannot_have_are_refused(setting, value, message):
    Path("t.txt").write_text("a\n")
    assert said_of(ConfigError, read_prompts, "t.txt", **{setting: value}).startswith(message)


# ---- column_map


@pytest.mark.parametrize("field", ["system", "tools"])
@pytest.mark.parametrize("column", ["system_text", "system"])
def test_a_mapped_column_that_no_row_has_is_refused(tokenizer, field, column):
    source = write_lines("pairs.jsonl", [{**PAIR, column: "be kind"}] * 3)
    said = said_of(ConfigError, preference_groups, tokenizer, source, column_map={field: "sytem_text"})
    assert said == (
        "column_map: column 'sytem_text' is in no row of pairs.jsonl; it has the columns prompt, chosen, rejected, "
        f"{column}; did you mean '{column}'?"
    )


def test_a_mapped_column_that_a_later_row_has_is_found(tokenizer):
    source = write_lines("pairs.jsonl", [*[PAIR] * 100, {**PAIR, "rules": "be kind"}])
    assert len(preference_groups(tokenizer, source, column_map={"system": "rules"})) == 101


def test_a_mapped_column_that_no_prompt_has_is_refused():
    source = write_lines("prompts.jsonl", [{"question": "hi", "answer": "old", "full_prompt": "hello"}])
    said = said_of(ConfigError, read_prompts, source, column_map={"answer": "nope"})
    assert said.startswith("column_map: column 'nope' is in no row of prompts.jsonl; it has the columns question, answ")
    said = said_of(ConfigError, read_prompts, source, column_map={"prompts": "full_prompt"})
    assert said == "column_map: no field is named 'prompts'; did you mean 'prompt'?"


@pytest.mark.parametrize("value", ["question", ["prompt", "question"]])
def test_a_column_map_that_is_no_mapping_is_refused(tokenizer, value):
    source = write_lines("pairs.jsonl", [PAIR])
    for read in (partial(preference_groups, tokenizer), read_prompts):
        said = said_of(ConfigError, read, source, column_map=value)
        assert said.startswith("column_map: expected a mapping from fields to columns, such as {prompt: question}")
        assert said.endswith(f", got {value!r}")
    said = said_of(ConfigError, read_prompts, source, column_map={"prompt": 3})
    assert said == "column_map: expected a column's name or null for 'prompt', got 3"


# ---- Columns and keys of one name


def test_columns_of_one_name_are_refused(tokenizer):
    Path("a.csv").write_text("prompt,chosen,rejected,rejected\nhi,a,b,c\n")
    said = said_of(DataError, preference_groups, tokenizer, "a.csv")
    assert said == "a.csv line 1: 2 columns have the name 'rejected'; rename or remove all but one"
    Path("folder").mkdir()
    Path("a.csv").rename("folder/a.csv")
    said = said_of(DataError, preference_groups, tokenizer, "folder")
    assert said.endswith("a.csv line 1: 2 columns have the name 'rejected'; rename or remove all but one")
    columns = [pyarrow.array([text]) for text in "pabc"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "chosen", "rejected", "rejected"]), "a.parquet")
    said = said_of(DataError, preference_groups, tokenizer, "a.parquet")
    assert said == "a.parquet: 2 columns have the name 'rejected'; rename or remove all but one"


def test_columns_without_a_name_are_no_columns_of_one_name(tokenizer):
    Path("a.csv").write_text("prompt,chosen,rejected,,\nhow are you,very well,go away,,\n")
    assert in_words(tokenizer, preference_groups(tokenizer, "a.csv")) == [PAIR_IN_WORDS]


def test_keys_of_one_name_make_a_bad_row(tokenizer):
    twice = '{"prompt": "p", "chosen": "a", "rejected": "b", "rejected": "c"}'
    nested = '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "a", "rejected": "b"}'
    Path("a.jsonl").write_text("".join(f"{line}\n" for line in [*[json.dumps(PAIR)] * 30, twice, nested]))
    dataset = preference_groups(tokenizer, "a.jsonl")
    assert (len(dataset), dataset.dropped) == (30, 2)
    assert "a key twice in an object (2, the first: a.jsonl line 31)" in dataset.report()
    Path("b.jsonl").write_text(twice)
    said = said_of(DataError, preference_groups, tokenizer, "b.jsonl")
    assert said.startswith("b.jsonl line 1: an object has the key 'rejected' twice; rename or remove one")
    for text in (f"[{twice}]", twice.replace(",", ",\n").replace("{", "{\n")):
        Path("c.json").write_text(text)
        said = said_of(DataError, preference_groups, tokenizer, "c.json")
        assert said == "c.json: an object has the key 'rejected' twice; rename or remove one"


# ---- Files that cannot be read

FAR = [
    pyarrow.array([2**62], pyarrow.timestamp("us")),
    pyarrow.array([2**30], pyarrow.date32()),
    pyarrow.array([2**62], pyarrow.duration("s")),
    pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")],
    ),
]


@pytest.mark.parametrize("values", FAR, ids=["timestamp", "date", "duration", "UTF-8"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_column_that_cannot_be_read_is_named(tokenizer, values, in_folder):
    table = pyarrow.Table.from_pylist([PAIR]).append_column("when", values)
    Path("folder").mkdir()
    parquet.write_table(table, "folder/a.parquet")
    source = "folder" if in_folder else "folder/a.parquet"
    for read in (lambda: preference_groups(tokenizer, source), lambda: read_prompts(source)):
        said = said_of(DataError, read)
        assert said.startswith(f"{source}: column 'when' cannot be read (")
        assert "; correct it, or write the " in said


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: data[:30] + b"\xff" * 30 + data[60:]])
def test_a_damaged_gzip_file_is_one_line(tokenizer, name, damage):
    lay_out(".", "a.jsonl", "a.csv")
    data = gzip.compress(Path(name.removesuffix(".gz")).read_bytes() * 1000)
    Path(name).write_bytes(damage(data))
    said = said_of(DataError, preference_groups, tokenizer, name)
    assert said.startswith(f"{name}: cannot be decompressed (") and said.endswith("write the file again")


def test_a_csv_line_that_cannot_be_read_is_named(tokenizer):
    good = b"how are you,very well,go away\n"
    start = b"prompt,chosen,rejected\n" + good * 2
    for bad, place, what in (
        (b'hi,"a "quoted" word",b\n', "line 4", "',' expected after '\"'"),
        (b'"hi\nyou","a "b",c\n' + good, "lines 4 to 5", "',' expected after '\"'"),
        (b'hi,"a,b\n' + good, "lines 4 to 5", "unexpected end of data"),
        (b"hi,\xff,b\n", "line 4", "'utf-8' codec can't decode byte 0xff"),
    ):
        Path("a.csv").write_bytes(start + bad)
        said = said_of(DataError, preference_groups, tokenizer, "a.csv")
        assert said.startswith(f"a.csv {place}: cannot be read as CSV ({what}")


# ---- Shapes of JSON


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "train"])
def test_an_object_that_holds_only_a_list_of_rows_is_that_list(tokenizer, indent, key):
    Path("a.json").write_text(json.dumps({key: [PAIR, {**PAIR, "chosen": ""}, PAIR]}, indent=indent))
    dataset = preference_groups(tokenizer, "a.json")
    assert in_words(tokenizer, dataset) == [PAIR_IN_WORDS] * 2
    assert f"the first: a.json {key} item 2" in dataset.report()


BY_COLUMN = {name: [value, value] for name, value in PAIR.items()}
BY_INDEX = {name: {"0": value, "1": value} for name, value in PAIR.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train": [PAIR], "test": [PAIR]},
            "a.json: holds the lists train, test; write each list to a file of its own",
        ),
        (
            BY_COLUMN,
            "a.json: holds the columns prompt, chosen, rejected instead of rows; write one object per row, as ",
        ),
        (BY_INDEX, "a.json: holds the columns prompt, chosen, rejected instead of rows; write one object per row, as "),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_in_another_shape_is_said_with_the_remedy(tokenizer, content, message, indent):
    Path("a.json").write_text(json.dumps(content, indent=indent))
    assert said_of(DataError, preference_groups, tokenizer, "a.json").startswith(message)


def test_objects_over_several_lines_are_said(tokenizer):
    text = json.dumps(PAIR, indent=1)
    one = "one object over several lines, with the keys prompt, chosen, rejected"
    for content, found in ((text, one), (f"{text}\n{text}\n", "objects over several lines each")):
        Path("a.json").write_text(content)
        said = said_of(DataError, preference_groups, tokenizer, "a.json")
        assert said == (
            f"a.json line 1: malformed JSON ({found}); expected UTF-8 with one object per line, or one array"
        )


# ---- Cells of a table


@pytest.mark.parametrize("cell", ["[]", "{}", "null"])
def test_a_cell_with_the_json_of_nothing_is_nothing_where_lists_are_and_text_elsewhere(tokenizer, cell):
    with open("a.csv", "w", newline="") as stream:
        rows = [[*PAIR, "history", "images"], ["how are you", "very well", cell, cell, cell]]
        csv.writer(stream).writerows(rows)
    expected = [(PAIR_IN_WORDS[0], ["very well <end>", f"{cell} <end>"])]
    assert in_words(tokenizer, preference_groups(tokenizer, "a.csv")) == expected
