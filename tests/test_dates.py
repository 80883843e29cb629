"""A chat template that reads the date: a run that resumes on another day is the same run."""

import json
import runpy
from datetime import datetime

import pytest
import yaml
from conftest import ROOT
from omegaconf import OmegaConf
from test_chat_tokenizer import user
from test_online import lines, online, rounds
from test_rewards import PROMPTS, RESPONSES, classifier, write_classifier
from test_rewards import TEMPLATE as TURNS
from test_sampling import hf_llama, of_the_model, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from humanline.data import ChatTokenizer
from humanline.errors import ConfigError
from humanline.programs import PartialFile, Sampler, SamplerSettings, Scorer

TEMPLATE = (
    "Today : {{ strftime_now('%d %B') }} {% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = "<unk> Today : January February user assistant sum is right wrong".split() + [f"{i:02}" for i in range(100)]
CLASSIFIED = "{{ bos_token }}{% if tools is not none or add_generation_prompt %}?{% endif %}" + TURNS
FIRST, SECOND = "2024-01-31", "2024-02-01"


def write_dated_tokenizer(folder, template=TEMPLATE):
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    vocabulary.save(str(folder / "tokenizer.json"))
    named = {"chat_template": template, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return {"_component_": "humanline.data.ChatTokenizer", "path": str(folder)}


@pytest.fixture
def run(trajectory):
    """A DPO run on text, of two epochs with a checkpoint at the middle."""
    run = trajectory("dpo_7_k1")
    run.config["tokenizer"] = write_dated_tokenizer(run.folder)
    rows = [{"prompt": f"sum {i:02}", "chosen": f"right {i:02}", "rejected": f"wrong {i:02}"} for i in range(16)]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.config["dataset"]["_component_"] = "humanline.data.preference_groups"
    run.config |= {"batch_size": 4, "epochs": 2, "save_every_n_steps": 4, "keep_last_n_checkpoints": 9}
    return run


def resumed_at_4(run, **tokenizer):
    run.config["resume_from_checkpoint"] = str(run.folder / "out" / "checkpoints" / "step_4")
    run.config["tokenizer"] |= tokenizer
    return run.train()


def test_a_resumed_run_has_the_date_on_which_it_started(run, caplog):
    run.config["tokenizer"]["date"] = FIRST
    assert run.train() is None
    whole = run.log()
    position = json.loads((run.folder / "out" / "checkpoints" / "step_4" / "run.json").read_text())["position"]
    assert position["tokenizer.date"] == FIRST
    del run.config["tokenizer"]["date"]  # today is another day
    assert "the day on which the run began" not in caplog.text  # it was set
    assert resumed_at_4(run) is None
    assert run.log() == whole and len(whole) == 8
    assert caplog.text.count(f"tokenizer.date: {FIRST}, the day on which the run began") == 1


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


def test_a_date_that_the_template_does_not_read_is_refused_where_a_config_sets_it(run):
    file = run.folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace("strftime_now('%d %B')", "'01 January'"))
    run.config["tokenizer"]["date"] = FIRST
    refusal = "tokenizer.date: the chat template does not read the date of the run (strftime_now); remove it"
    assert refusal in run.train()
    del run.config["tokenizer"]["date"]
    assert run.train() is None


# ---- A reward model


@pytest.fixture(scope="module")
def dated_classifier(tmp_path_factory):
    """A reward model whose chat template reads the date."""
    return write_classifier(
        tmp_path_factory.mktemp("dated") / "model", template="{{ strftime_now('%d %B') }}" + CLASSIFIED
    )


def test_a_reward_model_reads_the_date_that_is_set(dated_classifier, tmp_path):
    literal = write_classifier(tmp_path / "literal", template="31 January" + CLASSIFIED)
    reward = classifier(dated_classifier, date=FIRST)
    assert reward.date == FIRST
    assert reward(PROMPTS, RESPONSES) == classifier(literal)(PROMPTS, RESPONSES)
    assert reward(PROMPTS, RESPONSES) != classifier(dated_classifier, date=SECOND)(PROMPTS, RESPONSES)
    assert classifier(literal, date=FIRST).date is None


def test_a_reward_model_without_a_date_reads_that_of_its_start(dated_classifier):
    before, reward, after = datetime.now(), classifier(dated_classifier), datetime.now()
    assert reward.date in (f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}")
    assert reward(PROMPTS, RESPONSES) == classifier(dated_classifier, date=reward.date)(PROMPTS, RESPONSES)


def test_a_reward_model_s_date_that_is_none_is_refused(dated_classifier):
    with pytest.raises(ConfigError, match="^reward.date: expected a day such as 2026-01-31, or null, got 'today'$"):
        classifier(dated_classifier, date="today")


def test_a_date_that_no_reward_reads_is_refused_where_a_config_sets_it(tmp_path):
    reward = {"_component_": "humanline.rewards.SequenceClassifierReward", "device": "cpu", "dtype": "fp32"}
    reward |= {"path": write_classifier(tmp_path / "literal", template="31 January" + CLASSIFIED), "date": FIRST}
    with pytest.raises(ConfigError, match=r"^reward.date: the chat template does not read .*; remove it$"):
        Scorer(OmegaConf.create({"reward": reward}), [])


# ---- Online runs


@pytest.fixture
def sampled(trajectory, dated_classifier):
    """An online run in which both chat templates read the date, which is set; with one checkpoint, in the middle."""
    run = online(trajectory("grpo_8_k4"), every=2)
    prompts = run.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"sum {i:02}"}) + "\n" for i in range(24)))
    run.config["tokenizer"] = write_dated_tokenizer(run.folder) | {"date": FIRST}
    run.config["reward"] = {
        "_component_": "humanline.rewards.SequenceClassifierReward",
        "path": dated_classifier,
        "device": "cpu",
        "dtype": "fp32",
        "date": FIRST,
    }
    run.config |= {"batch_size": 4, "save_every_n_steps": 4}
    return run


def without_dates(run):
    """From now on the run's dates are open, as in a config that leaves them to the first day."""
    for key in ("tokenizer", "reward"):
        del run.config[key]["date"]


def test_a_round_has_the_dates_that_it_was_sampled_with(sampled):
    assert sampled.train() is None
    first = [json.loads(file.read_text().splitlines()[0]) for file in rounds(sampled)]
    assert [line["dates"] for line in first] == [{"tokenizer.date": FIRST, "reward.date": FIRST}] * 3
    assert sum("dates" in line for line in lines(sampled)) == 3


def test_a_run_that_is_restarted_before_its_first_checkpoint_has_the_date_of_its_rounds(sampled, monkeypatch, caplog):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    del sampled.config["save_every_n_steps"]
    assert sampled.train() is None
    whole, log = lines(sampled), sampled.log()
    for file in rounds(sampled)[1:]:
        file.unlink()
    without_dates(sampled)
    assert sampled.train() is None
    assert lines(sampled) == whole and sampled.log() == log
    for key in ("tokenizer", "reward"):
        assert f"{key}.date: {FIRST}, the day on which the run began" in caplog.text


def test_a_run_that_starts_anew_has_the_date_of_its_own_start(sampled):
    """Other than a restarted one, it leaves the rounds in its folder."""
    del sampled.config["save_every_n_steps"]
    assert sampled.train() is None
    without_dates(sampled)
    assert sampled.train() is None
    assert FIRST not in {date for line in lines(sampled) for date in line.get("dates", {}).values()}


def test_a_resumed_online_run_has_the_dates_of_its_checkpoint(sampled):
    assert sampled.train() is None
    whole, log = lines(sampled), sampled.log()
    rounds(sampled)[-1].unlink()
    without_dates(sampled)
    step_4 = sampled.folder / "out" / "checkpoints" / "step_4"
    assert sampled.train(f"resume_from_checkpoint={step_4}") is None
    assert lines(sampled) == whole and sampled.log() == log


def test_another_date_for_the_reward_is_for_later_rounds_and_is_logged(sampled, caplog):
    assert sampled.train() is None
    whole = lines(sampled)
    rounds(sampled)[-1].unlink()
    step_4 = sampled.folder / "out" / "checkpoints" / "step_4"
    assert sampled.train(f"resume_from_checkpoint={step_4}", f"reward.date={SECOND}") is None
    assert f"reward.date: was {FIRST} in the checkpoint, is {SECOND} for rounds that are not sampled yet" in caplog.text
    old, new = ([line["scores"] for line in each if line["policy_step"] == 4] for each in (whole, lines(sampled)))
    assert old != new and len(old) == len(new)


# ---- Programs


def began_on(day, file):
    """Renames a partial file to that of a run that was begun on another day."""
    start, _, _ = file.name.removesuffix(".partial").rpartition(".")
    file.rename(file.with_name(f"{start}.{day}.partial"))


SAMPLES = [{"prompt": f"sum {i}", "all_generated_responses": ["right", f"wrong {i}"]} for i in range(3)]


@pytest.fixture
def scoring(tmp_path, dated_classifier):
    """The config of a program that scores samples with the reward model."""
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SAMPLES))
    reward = {"_component_": "humanline.rewards.SequenceClassifierReward", "path": dated_classifier}
    return {"samples": str(tmp_path / "samples.jsonl"), "reward": reward | {"device": "cpu", "dtype": "fp32"}}


def recipe(name, config):
    """A recipe after its setup."""
    found = runpy.run_path(str(ROOT / "recipes" / f"humanline_{name}.py"))
    cfg = OmegaConf.create(config)
    (made,) = (value(cfg) for key, value in found.items() if key == f"Humanline{name.title()}Recipe")
    made.setup(cfg)
    return made


def test_labels_that_were_begun_on_another_day_are_completed_with_its_date(tmp_path, scoring, caplog):
    config = scoring | {"output": str(tmp_path / "scored.jsonl")}
    with recipe("label", config).partial as partial:
        assert partial.rows == []
    began_on(FIRST, partial.path)
    rows = recipe("label", config).label()
    assert f"reward.date: {FIRST}, the day on which the run began" in caplog.text
    expected = recipe("label", {**config, "reward": config["reward"] | {"date": FIRST}}).label()
    assert rows == expected
    assert rows != recipe("label", config).label()  # today's
    assert list(tmp_path.glob("*.partial")) == []


def evaluated(config):
    made = recipe("eval", config)
    rows = made.score(made.sample())
    made.save(rows, made.evaluate(rows))
    return json.loads(made.output.read_text())


def test_an_evaluation_that_was_begun_on_another_day_is_completed_with_its_date(tmp_path, scoring):
    config = scoring | {"output": str(tmp_path / "figures.json"), "correct_above": None, "bootstrap": 10}
    made = recipe("eval", config)
    with made.scorer.partial(tmp_path / "figures.jsonl", made.sample()) as partial:
        assert partial.rows == []
    began_on(FIRST, partial.path)
    written = evaluated(config)
    assert written["settings"]["reward"] == config["reward"] | {"date": FIRST}
    assert written == evaluated(written["settings"])
    today = evaluated(config)
    assert today["figures"] != written["figures"] and today["settings"]["reward"]["date"] > SECOND


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama whose chat template reads the date and the tools."""
    folder = tmp_path / "tiny-llama"
    hf_llama(folder)
    write_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    read = "{{ strftime_now('%d') }}{% if tools %}{{ tools[0].function.name }}{% endif %}"
    file.write_text(json.dumps(config | {"chat_template": read + config["chat_template"]}))
    return folder


def sampling(tmp_path, model_folder, **changes):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "sum", "tools": [tool]}) + "\n")
    given = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4, "device": "cpu", "dtype": "fp32"}
    return {**given, **of_the_model(model_folder, tmp_path / "out"), **changes}


def test_an_evaluation_s_settings_have_the_date_of_its_prompts(tmp_path, model_folder):
    reward = {"reward": {"_component_": "toys.MeanToken"}, "output": str(tmp_path / "figures.json"), "bootstrap": 10}
    config = sampling(tmp_path, model_folder, **reward)
    made = recipe("eval", config)
    made.sample()
    began_on(FIRST, made.sampler.partial.path)
    written = evaluated(config)
    assert written["settings"]["tokenizer"] == config["tokenizer"] | {"date": FIRST}
    assert written["settings"]["reward"] == config["reward"]


def test_responses_are_not_kept_for_prompts_with_other_tools(tmp_path, model_folder):
    def sampler(**changes):
        cfg = OmegaConf.create(sampling(tmp_path, model_folder, **changes))
        settings = SamplerSettings(cfg)
        return Sampler(cfg, settings, settings.read(cfg), tmp_path / "out.jsonl")

    first, again, without = sampler(), sampler(), sampler(column_map={"tools": None})
    assert first.prompt_ids != without.prompt_ids
    assert first.partial.path == again.partial.path != without.partial.path
