"""A dataset is encoded once: the next start reads it, ranks map the same file, and fast ids are the exact ids."""

import gc
import json
import math
import os
import time
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat_tokenizer import CORPUS, FAMILIES, user, write_folder
from test_groups import PAIR, WordTokenizer, write_lines
from tokenizers import Tokenizer

from humanline.data import ChatTokenizer, Group, GroupDataset, as_labelled, as_pairs, as_scored, preference_groups
from humanline.data._batch_encoder import BatchEncoder, Disagreement
from humanline.data._encoded import EncodedGroups, GroupWriter

# ---- Groups on disk

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda tokens: array("i", tokens))
places = st.sampled_from(["a.jsonl line 7", "b (train) row 12", "elsewhere", "a.jsonl line 70"])


@st.composite
def any_groups(draw):
    responses = tuple(draw(st.lists(ids, min_size=1, max_size=4)))
    one_each = {"min_size": len(responses), "max_size": len(responses)}
    scores = draw(st.none() | st.lists(st.floats(-9, 9), **one_each).map(tuple))
    labels = draw(st.none() | st.lists(st.booleans(), **one_each).map(tuple))
    return Group(draw(ids), responses, scores, labels, draw(places))


@given(groups=st.lists(any_groups(), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("encoded")
    writer = GroupWriter(folder)
    for group in groups:
        writer.add(group)
    writer.close({"notes": ["note"]})
    encoded = EncodedGroups(folder)
    assert list(encoded) == groups and [group.id for group in encoded] == [group.id for group in groups]
    assert encoded[-1] == groups[-1] and encoded[1:3] == groups[1:3]
    assert encoded.facts["notes"] == ["note"]
    with pytest.raises(IndexError):
        encoded[len(groups)]


@pytest.mark.parametrize("derive", [as_pairs, as_labelled, as_scored])
def test_groups_that_are_derived_when_asked_for_are_those_of_a_list(tmp_path, derive):
    groups = [
        Group(array("i", [i]), (array("i", [i + 1]), array("i", [i + 2])), scores=(float(i % 3), 1.0), id=f"line {i}")
        for i in range(9)
    ]
    writer = GroupWriter(tmp_path)
    for group in groups:
        writer.add(group)
    writer.close({})
    lazy, eager = derive(GroupDataset(EncodedGroups(tmp_path))), derive(GroupDataset(groups))
    assert list(lazy) == list(eager) and lazy.dropped == eager.dropped == 3
    assert lazy.digest() == eager.digest() and lazy.report() == eager.report()


def test_a_writer_that_is_given_up_writes_nothing_into_the_file_of_its_successor(tmp_path, monkeypatch):
    monkeypatch.setattr("humanline.data._encoded.FLUSH", 0)
    given_up = GroupWriter(tmp_path)
    given_up.add(Group(array("i", [7] * 9), (array("i", [7]), array("i", [7]))))
    writer = GroupWriter(tmp_path)
    group = Group(array("i", [1]), (array("i", [2]), array("i", [3])), id="line 1")
    writer.add(group)
    writer.close({})
    del given_up
    gc.collect()
    assert list(EncodedGroups(tmp_path)) == [group]


# ---- The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def tokenizer(tmp_path):
    return ChatTokenizer(str(write_folder(tmp_path / "tokenizer", FAMILIES["smollm2"])))


def test_the_same_data_tokenizer_and_settings_are_encoded_once(cache, tokenizer):
    source = write_lines("pairs.jsonl", [PAIR] * 3)
    first = preference_groups(tokenizer, source)
    (folder,) = cache.iterdir()
    written = (folder / "tokens.bin").stat()
    second = preference_groups(tokenizer, source)
    assert [*cache.iterdir()] == [folder]
    assert (folder / "tokens.bin").stat().st_mtime_ns == written.st_mtime_ns
    assert list(first) == list(second) and first.report() == second.report() and first.budget == second.budget


@pytest.mark.parametrize("what", ["data", "settings", "template", "vocabulary", "builder"])
def test_anything_else_is_encoded_anew(cache, tokenizer, tmp_path, what):
    source = write_lines("pairs.jsonl", [PAIR] * 3)
    folder = tmp_path / "tokenizer"
    preference_groups(tokenizer, source)
    options = {}
    if what == "data":
        before = os.stat(source)
        write_lines("pairs.jsonl", [{**PAIR, "prompt": "how are YOU"}] * 3)
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time
    elif what == "settings":
        options = {"max_tokens": 900}
    elif what == "template":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = config["chat_template"].replace("<|im_end|>' + '\n", "<|im_end|>' + '\n\n") + "{# #}"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    elif what == "vocabulary":
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary.add_tokens(["how are"])
        vocabulary.save(str(folder / "tokenizer.json"))
    if what == "builder":
        from humanline.data import scored_groups as build
    else:
        from humanline.data import preference_groups as build
    build(ChatTokenizer(str(folder)), source, **options)
    assert len([*cache.iterdir()]) == 2


def test_a_tokenizer_that_cannot_be_identified_keeps_nothing(cache):
    dataset = preference_groups(WordTokenizer(), write_lines("pairs.jsonl", [PAIR] * 3))
    assert [*cache.iterdir()] == [] and len(dataset) == 3 and len(dataset[2].prompt) == 5


def test_a_dataset_that_fails_leaves_nothing(cache, tokenizer):
    with pytest.raises(ValueError, match="is empty"):
        preference_groups(tokenizer, write_lines("pairs.jsonl", [{**PAIR, "chosen": ""}] * 3))
    assert [*cache.iterdir()] == []


def test_what_a_killed_run_left_is_removed_after_a_day(cache, tokenizer):
    for name, age in (("unfinished_old", 100_000), ("unfinished_new", 100)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    preference_groups(tokenizer, write_lines("pairs.jsonl", [PAIR] * 3))
    assert not (cache / "unfinished_old").exists() and (cache / "unfinished_new").exists()


def test_another_run_may_complete_its_folder_meanwhile(cache, tokenizer):
    cache.mkdir(parents=True)
    (cache / "unfinished_other").symlink_to("renamed")  # listed, but gone when it is looked at
    assert len(preference_groups(tokenizer, write_lines("pairs.jsonl", [PAIR]))) == 1


def test_users_can_share_a_cache(cache, tokenizer, monkeypatch):
    def not_the_owner(*_):
        raise PermissionError

    source, umask = write_lines("pairs.jsonl", [PAIR]), os.umask(0o022)
    try:
        first = preference_groups(tokenizer, source)
    finally:
        os.umask(umask)
    (folder,) = cache.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(os, "utime", not_the_owner)
    assert list(preference_groups(tokenizer, source)) == list(first)


@pytest.mark.parametrize("name", ["tokens.bin", "places.npy", "facts.json"])
def test_a_folder_that_has_lost_a_file_is_written_again(cache, tokenizer, name):
    source = write_lines("pairs.jsonl", [PAIR] * 3)
    first = list(preference_groups(tokenizer, source))
    (folder,) = cache.iterdir()
    (folder / name).unlink()  # as what removes old files does
    assert list(preference_groups(tokenizer, source)) == first and [*cache.iterdir()] == [folder]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(cache, tokenizer):
    cache.parent.write_text("a file, where a folder should be")
    with pytest.raises(ValueError, match=r"^dataset: encoded groups cannot be written to .*HUMANLINE_CACHE"):
        preference_groups(tokenizer, write_lines("pairs.jsonl", [PAIR]))


def test_half_of_a_character_is_a_bad_row_wherever_it_is(cache, tokenizer):
    rows = [{"instruction": "hi", "chosen": f"hello {i}", "rejected": "go"} for i in range(20)]
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", [*rows, {**rows[0], "input": "\ud800"}]))
    assert (
        len(dataset) == 20 and "a text has half of a character (1, the first: pairs.jsonl line 21)" in dataset.report()
    )


# ---- Ranks


@pytest.mark.parametrize("tokenizer", ["toys.Letters", "toys.OwnDisk"], ids=["a shared disk", "a disk of each node"])
def test_ranks_train_on_the_same_groups_wherever_the_cache_is(trajectory, tmp_path, tokenizer):
    run = trajectory("dpo_7_k1")
    run.config["batch_size"] //= 2
    run.config["tokenizer"] = {"_component_": tokenizer}
    run.train_on(2, HUMANLINE_CACHE=str(tmp_path / "cache"), PYTHONPATH=str(Path(__file__).parent))
    for step, loss in enumerate(run.golden["losses"], start=1):
        assert math.isclose(run.log()[step], loss, abs_tol=1e-5)
    nodes = ["datasets"] if tokenizer == "toys.Letters" else ["node_0", "node_1"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == nodes
    assert len([*(tmp_path / "cache").rglob("tokens.bin")]) == len(nodes)


# ---- Fast ids are the exact ids


@pytest.mark.parametrize("name", FAMILIES)
def test_many_texts_have_the_ids_of_each(tmp_path, name):
    tokenizer = ChatTokenizer(str(write_folder(tmp_path, FAMILIES[name])))
    texts = [part * repeat for part in (*CORPUS, "naïve 東京 🙂", " \n\n x", "<|im_end|>") for repeat in range(40)]
    expected = [tokenizer.encode(text, add_bos=False, add_eos=False) for text in texts]
    assert [list(each) for each in tokenizer.encode_texts(texts)] == expected


def other_vocabulary(tmp_path):
    """A tokenizer, and a file that has come to say something else."""
    folder = write_folder(tmp_path / "changed", FAMILIES["smollm2"])
    exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:10]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder, exact


def test_a_disagreement_is_noticed_and_then_only_exact_ids_are_given(tmp_path):
    pytest.importorskip("fastokens")
    folder, exact = other_vocabulary(tmp_path)
    encode = BatchEncoder(folder / "tokenizer.json", exact)
    texts = ["the capital of France"] * 100
    with pytest.raises(Disagreement):
        encode(texts)
    assert list(encode(texts)[7]) == exact.encode(texts[7], add_special_tokens=False).ids


def test_a_dataset_with_a_disagreement_is_encoded_again_exactly(cache, tokenizer, tmp_path, caplog):
    pytest.importorskip("fastokens")
    prompt = [user("how are you")]
    expected = tokenizer.encode_prompt(prompt)
    folder, _ = other_vocabulary(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    dataset = preference_groups(tokenizer, write_lines("pairs.jsonl", [PAIR] * 300))
    assert len(dataset) == 300 and all(list(group.prompt) == expected for group in dataset)
    assert "fastokens gives other ids than tokenizers, which is used instead" in caplog.text
