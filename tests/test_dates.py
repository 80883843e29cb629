"""A chat template that reads the date: a run that resumes on another day is the same run."""

import json

import pytest
import yaml
from test_chat_tokenizer import user
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from humanline.data import ChatTokenizer
from humanline.programs import PartialFile

TEMPLATE = (
    "Today : {{ strftime_now('%d %B') }} {% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = "<unk> Today : January February user assistant sum is right wrong".split() + [f"{i:02}" for i in range(100)]
FIRST, SECOND = "2024-01-31", "2024-02-01"


@pytest.fixture
def run(trajectory):
    """A DPO run on text, of two epochs with a checkpoint at the middle."""
    run = trajectory("dpo_7_k1")
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    vocabulary.save(str(run.folder / "tokenizer.json"))
    named = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (run.folder / "tokenizer_config.json").write_text(json.dumps(named))
    rows = [{"prompt": f"sum {i:02}", "chosen": f"right {i:02}", "rejected": f"wrong {i:02}"} for i in range(16)]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.config["tokenizer"] = {"_component_": "humanline.data.ChatTokenizer", "path": str(run.folder)}
    run.config["dataset"]["_component_"] = "humanline.data.preference_groups"
    run.config |= {"batch_size": 4, "epochs": 2, "save_every_n_steps": 4, "keep_last_n_checkpoints": 9}
    return run


def resumed_at_4(run, **tokenizer):
    run.config["resume_from_checkpoint"] = str(run.folder / "out" / "checkpoints" / "step_4")
    run.config["tokenizer"] |= tokenizer
    return run.train()


def test_a_resumed_run_has_the_date_on_which_it_started(run):
    run.config["tokenizer"]["date"] = FIRST
    assert run.train() is None
    whole = run.log()
    position = json.loads((run.folder / "out" / "checkpoints" / "step_4" / "run.json").read_text())["position"]
    assert position["tokenizer.date"] == FIRST
    del run.config["tokenizer"]["date"]  # today is another day
    assert resumed_at_4(run) is None
    assert run.log() == whole and len(whole) == 8


def test_another_date_is_another_run(run):
    run.config["tokenizer"]["date"] = FIRST
    assert run.train() is None
    error = resumed_at_4(run, date=SECOND)
    assert f"was written with tokenizer.date {FIRST}, this run has {SECOND}; restore the old value" in error


def test_all_ranks_of_a_resumed_run_have_the_same_date(run):
    run.config["tokenizer"]["date"] = FIRST
    run.config["batch_size"] = 2
    run.train_on(2)
    whole = run.log()
    del run.config["tokenizer"]["date"]
    run.config["resume_from_checkpoint"] = str(run.folder / "out" / "checkpoints" / "step_4")
    run.train_on(2)
    assert run.log() == whole


def test_a_date_in_a_config_file_may_be_a_yaml_date(run):
    run.config["tokenizer"]["date"] = yaml.safe_load(FIRST)
    assert run.train() is None
    tokenizer = ChatTokenizer(str(run.folder), date=FIRST)
    assert "Today : 31 January" in tokenizer.decode(tokenizer.encode_prompt([user("sum")]))


def test_rows_that_were_begun_on_another_day_are_completed_with_its_date(tmp_path):
    output = tmp_path / "out.v1.jsonl"
    with PartialFile(output, "these", FIRST) as partial:
        partial.add([{"a": 1}])
    later = PartialFile(output, "these", SECOND)
    assert (later.date, later.path) == (FIRST, partial.path)
    with later:
        assert later.rows == [{"a": 1}]
    assert PartialFile(output, "others", SECOND).date == SECOND
    assert PartialFile(output, "these").date is None
