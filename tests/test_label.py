"""The label recipe as a real process: samples in, scored groups out, and what a killed run leaves."""

import json
import runpy
import signal

import pytest
from conftest import ROOT, TUNE, run, run_recipe
from omegaconf import OmegaConf
from test_configs import write_chat_tokenizer

from humanline.data import ChatTokenizer, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.programs import PartialFile

pytestmark = pytest.mark.slow

RECIPE = ROOT / "recipes" / "humanline_label.py"

# Scores a response by its length, and notes what it has scored. Where a file `kill_at` says so, it kills its process.
REWARD = """
import os, signal
from pathlib import Path

class Length:
    def __init__(self, folder, factor=1.0):
        self.folder, self.factor = Path(folder), factor

    def __call__(self, prompts, responses):
        kill_at = self.folder / "kill_at"
        for prompt, texts in zip(prompts, responses):
            if texts and kill_at.exists() and prompt.fields["id"] == int(kill_at.read_text()):
                os.kill(os.getpid(), signal.SIGKILL)
        if any(responses):
            with (self.folder / "scored").open("a") as file:
                print(*(prompt.fields["id"] for prompt in prompts), file=file)
        return [[self.factor * len(text) for text in texts] for texts in responses]
"""

LINES = [
    {
        "id": i,
        "prompt": f"{i} + 1 = ?" if i % 2 else [{"role": "user", "content": f"{i} + 1 = ?"}],
        "answer": f"#### {i + 1}",
        "all_generated_responses": [str(i + 1), f"It is {i}.", f"Ünïcode \u2028 {i + 1}"],
        "finish_reasons": ["stop"] * 3,
    }
    for i in range(7)
]
GSM8K = {"_component_": "humanline.rewards.GSM8KReward"}


class Label:
    """A run of the recipe in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.output, self.samples = folder, folder / "scored.jsonl", folder / "samples.jsonl"
        (folder / "length_reward.py").write_text(REWARD)
        self.write(LINES)
        length = {"_component_": "length_reward.Length", "folder": str(folder)}
        self.config = {"samples": str(self.samples), "output": str(self.output), "batch_size": 2, "reward": length}

    def write(self, lines):
        self.samples.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def start(self, **changes):
        """Runs the recipe to its end; returns its exit code and what it printed."""
        return run_recipe(RECIPE, self.config | changes, self.folder)

    def rows(self):
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").split("\n")[:-1]]

    def partials(self):
        return list(self.folder.glob("*.partial"))

    def scored(self):
        """The ids in the order in which they were scored."""
        return [int(word) for word in (self.folder / "scored").read_text().split()]


@pytest.fixture
def label(tmp_path):
    return Label(tmp_path)


def by_length(lines, factor=1.0):
    return [[factor * len(text) for text in line["all_generated_responses"]] for line in lines]


def test_the_lines_come_back_with_a_score_for_each_response(label):
    code, output = label.start()
    assert code == 0, output
    assert label.rows() == [
        line | {"all_rm_scores": scores} for line, scores in zip(LINES, by_length(LINES), strict=True)
    ]
    assert label.scored() == list(range(7)) and not label.partials()
    assert "21 responses to 7 prompts, mean score" in output


def test_scored_groups_reads_the_result(label, tmp_path):
    code, output = label.start(reward=GSM8K)
    assert code == 0, output
    write_chat_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(str(tmp_path))
    groups = scored_groups(tokenizer, str(label.output))
    assert [group.scores for group in groups] == [(1, 0, 1)] * 7
    assert [tokenizer.decode(groups[3].responses[i]).strip() for i in (0, 1)] == ["4", "It is 3."]


@pytest.mark.parametrize("killed_at", [0, 1, 4, 6])
def test_a_killed_run_goes_on_with_the_lines_it_lacks(label, killed_at):
    (label.folder / "kill_at").write_text(str(killed_at))
    code, output = label.start()
    assert code == -signal.SIGKILL, output
    assert not label.output.exists()
    done = killed_at // 2 * 2  # whole batches
    (label.folder / "kill_at").unlink()
    code, output = label.start()
    assert code == 0, output
    assert [row["all_rm_scores"] for row in label.rows()] == by_length(LINES)
    assert label.scored() == list(range(7)) and not label.partials()
    assert (f"{done} of 7 prompts are scored already" in output) == (done > 0)


@pytest.mark.parametrize("lost", [1, 20, 10_000])
def test_a_line_that_was_being_written_is_scored_again(label, lost):
    (label.folder / "kill_at").write_text("4")
    label.start()
    [partial] = label.partials()
    partial.write_bytes(partial.read_bytes()[:-lost])
    (label.folder / "kill_at").unlink()
    assert label.start()[0] == 0
    assert [row["all_rm_scores"] for row in label.rows()] == by_length(LINES)


def test_scores_of_another_reward_or_of_other_samples_are_not_taken_over(label):
    (label.folder / "kill_at").write_text("4")
    label.start()
    (label.folder / "kill_at").unlink()
    assert label.start(reward=label.config["reward"] | {"factor": 2.0})[0] == 0
    assert [row["all_rm_scores"] for row in label.rows()] == by_length(LINES, 2.0)
    changed = [line | {"all_generated_responses": ["a", "bc"]} for line in LINES]
    label.write(changed)
    assert label.start()[0] == 0
    assert [row["all_rm_scores"] for row in label.rows()] == by_length(changed)


def test_scores_that_the_samples_came_with_are_replaced(label):
    label.write([line | {"all_rm_scores": [9, 9, 9]} for line in LINES])
    assert label.start()[0] == 0
    assert [row["all_rm_scores"] for row in label.rows()] == by_length(LINES)


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, "samples: missing"),
        ({"samples": "none.jsonl"}, "samples: file 'none.jsonl' not found"),
        ({"samples": str(RECIPE)}, "humanline_label.py' has an unsupported type"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"bach_size": 1}, "bach_size: not a key of this recipe"),
        ({"reward": {"_component_": "humanline.rewards.GSM9KReward"}}, "reward._component_: "),
        ({"reward": GSM8K | {"field": "a"}}, "reward.field: humanline.rewards.GSM8KReward has no such argument"),
        ({"reward": GSM8K | {"answer_field": "solution"}}, "samples.jsonl line 1: field 'solution' is missing"),
    ],
)
def test_a_mistake_is_named_before_anything_is_scored(label, changes, message):
    recipe = runpy.run_path(str(RECIPE))["HumanlineLabelRecipe"]
    config = OmegaConf.create(label.config | changes)
    with pytest.raises((ConfigError, DataError)) as error:
        recipe(config).setup(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "?"}, "line 8: field 'all_generated_responses' is missing"),
        ({"prompt": "?", "all_generated_responses": []}, "line 8: field 'all_generated_responses' is empty"),
        (
            {"prompt": "?", "all_generated_responses": ["a", 1]},
            "line 8: field 'all_generated_responses[1]' must be a string, got 1",
        ),
    ],
)
def test_more_than_a_tenth_of_bad_lines_end_the_recipe_with_one_line(label, line, message):
    label.write([*LINES, *[line] * 3])
    code, output = label.start()
    last = output.strip().splitlines()[-1]
    assert code == 1 and last.startswith("humanline_label.py: ") and message in last
    assert "Traceback" not in output and not label.output.exists() and not label.partials()


@pytest.mark.parametrize(
    "body", ["[]", "[[float('nan')] * len(texts) for texts in responses]", "[[1.0]] * len(prompts)"]
)
def test_a_reward_that_does_not_score_each_response_is_named(label, body):
    reward = "class Odd:\n    def __call__(self, prompts, responses):\n        return " + body
    (label.folder / "odd_reward.py").write_text(reward)
    code, output = label.start(reward={"_component_": "odd_reward.Odd"})
    assert code == 1 and "humanline_label.py: reward: Odd did not return one finite score per response" in output
    assert not label.output.exists()


def test_two_runs_do_not_write_one_file(label):
    with PartialFile(label.output, "these"), PartialFile(label.output, "others"):
        with pytest.raises(ConfigError, match=r"^output: .*/scored.jsonl.\w+.partial is being written by another run"):
            with PartialFile(label.output, "these"):
                pass


def test_the_shipped_config_labels_samples_by_the_header_s_command(tmp_path):
    (tmp_path / "samples").mkdir()
    samples = tmp_path / "samples" / "smollm2_135m.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = ROOT / "configs" / "gsm8k_label.yaml"
    run([str(TUNE), "run", str(RECIPE), "--config", str(config), "samples=samples/smollm2_135m.jsonl"], cwd=tmp_path)
    rows = (tmp_path / "samples" / "gsm8k_scored.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(row)["all_rm_scores"] for row in rows] == [[1, 0, 1]] * 7
