"""Measuring preference data under the model that it shall train."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TUNE, Ranks, TrajectoryRun, run
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from humanline.data import Group, encoded_groups
from humanline.errors import ConfigError
from humanline.programs import Filter, Measured, histogram, summary, table

STOP = 9


def measured(responses, log_probs, prompt=(1, 2), **of_group) -> Measured:
    return Measured(Group(prompt, tuple(responses), **of_group), log_probs, {STOP})


SCORED = measured([[5, STOP], [5, STOP], [6, 7]], [-0.5, -0.5, -2.0], scores=(1.0, 1.0, 0.0))
PAIR = measured([[5, 6, STOP], [5, 7, STOP]], [-0.2, -1.1])
LABELLED = measured([[8, STOP]], [-0.7], prompt=(3,), labels=(False,))
DATA = [SCORED, PAIR, LABELLED]


def test_the_figures_are_those_of_the_data():
    figures = summary(DATA)
    values = [-0.5, -0.5, -2.0, -0.2, -1.1, -0.7]
    assert (figures["groups"], figures["responses"]) == (3, 6)
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    expected = {"mean": statistics.fmean(values), "min": -2.0, "max": -0.2, "median": middle}
    expected |= {"first_quartile": first, "third_quartile": third, "better": -0.35}
    expected |= {"worse": (-2.0 - 1.1 - 0.7) / 3}
    assert figures["mean_log_prob"] == pytest.approx(expected)
    assert figures["below_papers_quartile"] == pytest.approx(2 / 6) and figures["in_papers_quartile"] == 0.5
    assert figures["tokens"] == {"mean": pytest.approx(14 / 6), "median": 2, "max": 3}
    assert figures["cut"] == pytest.approx(1 / 6) and figures["repeated_responses"] == pytest.approx(1 / 6)
    assert figures["repeated_prompts"] == pytest.approx(1 / 3)
    assert figures["overlap"] == pytest.approx((0 + 2 / 3) / 2)
    assert "below the paper's worst quartile (< -1.03)" in table(figures) and "33.3%" in table(figures)


def test_what_is_not_known_is_not_a_figure():
    figures = summary([Measured(Group((1,), ((2,),), labels=(True,)), [-0.1], ())])
    assert figures["cut"] is None and figures["overlap"] is None and figures["mean_log_prob"]["worse"] is None
    assert figures["mean_log_prob"]["first_quartile"] == -0.1
    assert "unknown" in table(figures)


@pytest.mark.parametrize(
    ("settings", "kept", "reasons"),
    [
        (
            {"min_log_prob": -1.03},
            [None, None, 1],
            [
                ["response 2: mean log-prob -2 below -1.03", "no two responses with different scores are left"],
                ["response 1: mean log-prob -1.1 below -1.03"],
                [],
            ],
        ),
        ({"min_log_prob": "bottom_quartile"}, [None, None, 1], None),
        (
            {"cut": False},
            [None, 2, 1],
            [["response 2: cut", "no two responses with different scores are left"], [], []],
        ),
        ({"duplicates": False}, [2, 2, 1], [["response 1: repeats another one"], [], []]),
    ],
)
def test_a_filter_names_the_reason_of_each_response_that_it_leaves_out(settings, kept, reasons):
    found = list(Filter.of(settings).apply(DATA))
    assert [rest and len(rest.responses) for rest, _ in found] == kept
    if reasons is not None:
        assert [why for _, why in found] == reasons


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=40), st.floats(-5, 0))
def test_no_response_below_the_limit_stays_and_none_above_goes(log_probs, limit):
    scores = tuple(map(float, range(len(log_probs))))
    data = [measured([[i, STOP] for i in range(len(log_probs))], log_probs, scores=scores)]
    ((rest, reasons),) = Filter(min_log_prob=limit).apply(data)
    above = [score for score, log_prob in zip(scores, log_probs, strict=True) if log_prob >= limit]
    assert (list(rest.scores) if rest else []) == (above if len(above) > 1 else [])
    assert bool(reasons) == (len(above) < len(log_probs))


@given(st.lists(st.floats(-8, 0), min_size=1, max_size=200))
def test_a_histogram_counts_every_value_once(values):
    lines = histogram(values).splitlines()
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min": -1}, "filter.min: unknown; expected min_log_prob, cut or duplicates"),
        ({}, "filter: it leaves out nothing; set min_log_prob, cut: False or duplicates: False"),
        ({"min_log_prob": "low"}, "filter.min_log_prob: expected nats, bottom_quartile or null, got 'low'"),
        ({"cut": 0}, "filter.cut: expected true or false, got 0"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Filter.of(settings)


# ---- The recipe


class Quality:
    """The recipe on a golden run's model and groups."""

    def __init__(self, run: TrajectoryRun) -> None:
        self.run, self.output = run, run.folder / "quality.json"
        keys = ("model", "checkpointer", "tokenizer", "dataset", "tokens_per_row", "rows_per_pass", "dtype", "device")
        self.config = {key: run.config[key] for key in keys} | {"output": str(self.output)}

    def start(self, nproc: int = 1, **changes) -> str:
        path = self.run.folder / "quality.yaml"
        path.write_text(json.dumps(self.config | changes))
        recipe = ROOT / "recipes" / "humanline_quality.py"
        with Ranks(recipe, ["--config", str(path)], nproc, self.run.folder / "printed.txt", {}) as ranks:
            self.codes = ranks.wait()
            return ranks.output()

    def log_probs(self) -> list[list[float]]:
        lines = self.output.with_suffix(".jsonl").read_text().splitlines()
        return [json.loads(line)["mean_log_probs"] for line in lines]


@pytest.fixture
def quality(trajectory):
    return Quality(trajectory("grpo_8_k4"))


def exact(run: TrajectoryRun) -> list[list[float]]:
    model = LlamaForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float64)
    found = []
    for line in map(json.loads, run.data.read_text().splitlines()):
        found.append([])
        for response in line["responses"]:
            with torch.no_grad():
                logits = model(torch.tensor([line["prompt"] + response])).logits[0, len(line["prompt"]) - 1 : -1]
            log_probs = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
            found[-1].append(log_probs.mean().item())
    return found


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_log_probs_are_those_of_transformers_on_any_number_of_ranks_and_kept_for_another_start(quality):
    expected = exact(quality.run)
    assert "is measured" not in quality.start()
    assert quality.codes == [0]
    assert [value for each in quality.log_probs() for value in each] == pytest.approx(
        [value for each in expected for value in each], abs=1e-5
    )
    alone = json.loads(quality.output.read_text())
    assert alone["responses"] == sum(map(len, expected)) and alone["kto"].startswith("KTO: ")

    # An interrupted run: what is there is taken over, a line that was being written is not.
    (partial,) = quality.output.parent.glob("quality.json.*.partial")
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text(json.dumps([-9.0, -8.0]) + "\n" + "".join(lines[1:4]) + lines[4][:5])
    quality.start(nproc=2)
    assert quality.codes == [0, 0]
    assert quality.log_probs()[0] == [-9.0, -8.0]
    assert [value for each in quality.log_probs()[1:] for value in each] == pytest.approx(
        [value for each in expected[1:] for value in each], abs=1e-5
    )
    partial.unlink()
    command = [
        str(TUNE),
        "run",
        "--nproc_per_node=2",
        "humanline_quality",
        "--config",
        str(quality.run.folder / "quality.yaml"),
    ]
    run(command, cwd=ROOT)
    two = json.loads(quality.output.read_text())
    assert two["mean_log_prob"] == pytest.approx(alone["mean_log_prob"], abs=1e-6)
    assert {key: two[key] for key in alone if key != "mean_log_prob"} == {
        key: alone[key] for key in alone if key != "mean_log_prob"
    }


@pytest.mark.slow
def test_what_the_filter_leaves_trains_by_the_printed_command(quality):
    limit = statistics.median(min(each) for each in exact(quality.run))
    printed = quality.start(filter={"min_log_prob": limit})
    kept = quality.output.with_suffix(".kept.jsonl")
    left_out = lines_of(quality.output.with_suffix(".kept.left_out.jsonl"))
    groups = encoded_groups(None, str(kept))
    log_probs = quality.log_probs()
    assert len(groups) == sum(min(each) >= limit for each in log_probs) == len(log_probs) - len(left_out)
    assert all("mean log-prob" in line["reasons"][0] for line in left_out)
    command = printed.split("add to a training command:")[1].split("\n")[1].split()
    run = quality.run
    run.config["max_steps_per_epoch"] = 2
    assert run.train(*command) is None
    assert run.log().keys() == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "figures.txt"}, "output: expected a name ending in .json, got 'figures.txt'"),
        ({"kept": "kept.jsonl"}, "kept: there is no filter; set one, or remove kept"),
        ({"filter": {"cut": False}}, "filter.cut: the end of a turn is not known without a tokenizer; set tokenizer"),
        ({"filter": {"min_log_prob": -1e-9}}, "filter: it leaves no group; lower min_log_prob, or keep cut responses"),
        ({"output": "groups.json"}, "groups.jsonl would be written over, but it is read here; use another output"),
        ({"dtype": "fp16"}, "dtype: expected bf16 or fp32, got 'fp16'"),
    ],
)
def test_a_mistake_ends_in_one_line(quality, changes, message):
    if changes.get("output") == "groups.json":  # the .jsonl beside it is the data
        changes = {"output": str(quality.run.data.with_suffix(".json"))}
    printed = quality.start(**changes)
    assert quality.codes == [1] and message in printed and "Traceback" not in printed
