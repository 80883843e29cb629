"""Evaluation: the statistics against closed forms and enumeration, and the recipe on a tiny model and on samples."""

import itertools
import json
import math
import runpy
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT, run_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_sampling import hf_llama, of_the_model, write_tokenizer

from humanline.data import ChatTokenizer, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.tools.statistics import bootstrap_interval, pass_at_k

pytestmark = pytest.mark.slow

RECIPE = ROOT / "recipes" / "humanline_eval.py"
SAMPLE_RECIPE = ROOT / "recipes" / "humanline_sample.py"


# ---- pass@k


@st.composite
def counts(draw, most):
    """n, c and k."""
    n = draw(st.integers(1, most))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(counts(most=8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    n, c, k = case
    subsets = [any(sample < c for sample in subset) for subset in itertools.combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-14)


@given(counts(most=2000))
def test_pass_at_k_is_the_closed_form_for_any_number_of_samples(case):
    n, c, k = case
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


@given(counts(most=50))
def test_pass_at_1_is_the_share_of_correct_samples_and_pass_at_all_is_whether_there_is_one(case):
    n, c, _ = case
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-15)
    assert pass_at_k(n, c, n) == (c > 0)


@given(st.lists(counts(most=30), min_size=1))
def test_pass_at_k_takes_many_prompts_at_once(cases):
    n, c, k = zip(*cases, strict=True)
    each = [float(pass_at_k(*pair, min(n))) for pair in zip(n, c, strict=True)]
    assert pass_at_k(n, c, min(n)).tolist() == each


@pytest.mark.parametrize(
    ("samples", "correct", "k", "message"),
    [
        ([4, 3], [1, 1], 4, "^k: expected an integer from 1 to 3, the smallest number of samples, got 4"),
        ([4], [1], 0, "^k: expected an integer from 1 to 4, the smallest number of samples, got 0"),
        ([4], [5], 1, "^correct: "),
        ([4], [-1], 1, "^correct: "),
    ],
)
def test_pass_at_k_of_counts_that_cannot_be_is_refused(samples, correct, k, message):
    with pytest.raises(ConfigError, match=message):
        pass_at_k(samples, correct, k)


# ---- The bootstrap interval

RESAMPLES = 10_000
CHANCE = 6 * math.sqrt(0.025 * 0.975 / RESAMPLES)  # six deviations of the share of resamples beyond an end


def assert_is_the_middle_95_percent(interval, distribution):
    """``distribution``: means with their exact probabilities."""
    low, high = interval
    assert sum(p for mean, p in distribution if mean < low) <= 0.025 + CHANCE
    assert sum(p for mean, p in distribution if mean <= low) >= 0.025 - CHANCE
    assert sum(p for mean, p in distribution if mean > high) <= 0.025 + CHANCE
    assert sum(p for mean, p in distribution if mean >= high) >= 0.025 - CHANCE


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=5), st.integers(0, 2**32))
def test_the_interval_holds_the_middle_of_all_resamples(values, seed):
    means = [sum(resample) / len(values) for resample in itertools.product(values, repeat=len(values))]
    distribution = [(mean, 1 / len(means)) for mean in means]
    assert_is_the_middle_95_percent(bootstrap_interval(values, resamples=RESAMPLES, seed=seed), distribution)


@settings(max_examples=15)
@given(st.integers(1, 700).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.integers(0, 2**32))
def test_the_interval_of_a_share_is_that_of_the_binomial_distribution(case, seed):
    n, c = case
    p = Fraction(c, n)
    distribution = [(i / n, float(math.comb(n, i) * p**i * (1 - p) ** (n - i))) for i in range(n + 1)]
    interval = bootstrap_interval([1] * c + [0] * (n - c), resamples=RESAMPLES, seed=seed)
    assert_is_the_middle_95_percent(interval, distribution)


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, size=1000)
    deviation = values.std() / math.sqrt(len(values))
    for level, z in ((0.95, 1.959964), (0.5, 0.674490)):
        expected = [values.mean() - z * deviation, values.mean() + z * deviation]
        assert bootstrap_interval(values, level=level) == pytest.approx(expected, abs=0.1 * deviation)


def test_the_seed_decides_the_resamples():
    values = [0.1, 0.7, 0.2, 0.9]
    first, again, other = (bootstrap_interval(values, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ([], {}, "^values: "),
        ([[1.0]], {}, "^values: "),
        ([1.0, math.nan], {}, "^values: "),
        ([1.0], {"resamples": 0}, "^resamples: expected an integer of at least 1, got 0"),
        ([1.0], {"level": 1}, "^level: expected a number between 0 and 1, got 1"),
    ],
)
def test_an_interval_of_nothing_is_refused(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        bootstrap_interval(values, **changes)


# ---- The recipe


class EvenLength:
    """1 for a response of an even number of characters, else 0: what a random model gets right half the time."""

    def __call__(self, prompts, responses):
        return [[float(len(text) % 2 == 0) for text in texts] for texts in responses]


class Broken:
    """Gives ``value`` in place of a score; None raises, as rewards do whose server has gone."""

    def __init__(self, value=None):
        self.value = value

    def __call__(self, prompts, responses):
        if self.value is None and any(responses):
            raise ConfigError("reward.base_url: does not answer")
        return [[self.value for _ in texts] for texts in responses]


class FailsOnce(EvenLength):
    """Fails at the third of all calls."""

    calls = 0

    def __call__(self, prompts, responses):
        FailsOnce.calls += 1
        if FailsOnce.calls == 3:
            raise ConfigError("reward.base_url: does not answer")
        return super().__call__(prompts, responses)


LINES = [{"prompt": f"{a} + 1 = ?", "answer": a + 1, "all_rm_scores": [9.0]} for a in range(5)]

# Correct: 2 of 4, 0 of 4, 1 of 4.
SAMPLES = [
    {
        "prompt": "1 + 1 = ?",
        "answer": 2,
        "all_generated_responses": ["2", "3", "It is 2", "None"],
        "finish_reasons": ["stop", "stop", "stop", "length"],
        "response_lengths": [2, 2, 4, 8],
    },
    {
        "prompt": "2 + 3 = ?",
        "answer": 5,
        "all_generated_responses": ["1", "2", "3", "4"],
        "finish_reasons": ["stop"] * 4,
        "response_lengths": [2] * 4,
    },
    {
        "prompt": "3 + 3 = ?",
        "answer": 6,
        "all_generated_responses": ["6", "7", "8", "9"],
        "finish_reasons": ["stop"] * 4,
        "response_lengths": [3] * 4,
    },
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "tiny-llama"
    hf_llama(folder)
    write_tokenizer(folder)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_a_model(folder, model_folder, lines=LINES, **changes):
    """The config of an evaluation of the tiny model, whose output is ``folder/eval/figures.json``."""
    return {
        "prompts": write_lines(folder / "prompts.jsonl", lines),
        "output": str(folder / "eval" / "figures.json"),
        "reward": {"_component_": "test_eval.EvenLength"},
        "correct_above": 0.5,
        "k": [1, 2, 4],
        "bootstrap": 200,
        "samples_per_prompt": 4,
        "max_new_tokens": 16,
        "batch_size": 8,
        "device": "cpu",
        "dtype": "fp32",
        **of_the_model(model_folder, folder / "out"),
    } | changes


def of_samples(folder, lines=SAMPLES, **changes):
    """The config of an evaluation of samples."""
    return {
        "samples": write_lines(folder / "samples.jsonl", lines),
        "output": str(folder / "eval" / "figures.json"),
        "reward": {"_component_": "humanline.rewards.GSM8KReward"},
        "correct_above": 0.5,
        "k": [1, 4],
        "bootstrap": 200,
    } | changes


def evaluate(cfg):
    """Runs the recipe in this process; returns what it wrote: the JSON, and the lines of samples beside it."""
    cfg = OmegaConf.create(cfg)
    recipe = runpy.run_path(str(RECIPE))["HumanlineEvalRecipe"](cfg)
    recipe.setup(cfg)
    rows = recipe.score(recipe.sample())
    recipe.save(rows, recipe.evaluate(rows))
    return json.loads(recipe.output.read_text()), read_lines(recipe.output.with_suffix(".jsonl"))


def without_scores(rows):
    return [{key: value for key, value in row.items() if key != "all_rm_scores"} for row in rows]


def test_the_figures_are_those_of_the_samples_that_are_written_beside_them(tmp_path, model_folder):
    written, rows = evaluate(of_a_model(tmp_path, model_folder))
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == ["figures.json", "figures.jsonl"]
    assert (written["prompts"], written["responses"]) == (5, 20)
    scores = np.array([row["all_rm_scores"] for row in rows])
    texts = [row["all_generated_responses"] for row in rows]
    assert scores.tolist() == EvenLength()(None, texts) and 0 < scores.mean() < 1
    values = {
        **{f"pass@{k}": pass_at_k([4] * 5, scores.sum(-1), k) for k in (1, 2, 4)},
        "reward": scores.mean(-1),
        "tokens": np.mean([row["response_lengths"] for row in rows], -1),
        "cut": np.mean([[reason == "length" for reason in row["finish_reasons"]] for row in rows], -1),
    }
    assert written["figures"].keys() == values.keys()
    for name, value in values.items():
        low, high = bootstrap_interval(value, resamples=200)
        expected = {"mean": value.mean(), "low": low, "high": high}
        assert written["figures"][name] == pytest.approx(expected), name


def test_the_samples_are_those_of_the_sampling_recipe_and_a_dataset_of_scored_groups(tmp_path, model_folder):
    cfg = of_a_model(tmp_path, model_folder)
    written, rows = evaluate(cfg)
    own = ("reward", "correct_above", "k", "bootstrap")
    sample_cfg = OmegaConf.create({key: value for key, value in cfg.items() if key not in own})
    sampler = runpy.run_path(str(SAMPLE_RECIPE))["HumanlineSampleRecipe"](sample_cfg)
    sampler.setup(sample_cfg)
    assert without_scores(rows) == sampler.sample()
    groups = scored_groups(ChatTokenizer(str(model_folder)), str(tmp_path / "eval" / "figures.jsonl"))
    assert [list(group.scores) for group in groups] == [row["all_rm_scores"] for row in rows]


def test_the_settings_are_all_that_the_figures_depend_on(tmp_path, model_folder):
    cfg = of_a_model(tmp_path, model_folder)
    written, _ = evaluate(cfg)
    assert written["settings"].items() >= cfg.items()
    assert written["settings"].items() >= {"correct_above": 0.5, "seed": 0, "temperature": 1.0, "top_p": 1.0}.items()
    again, _ = evaluate(written["settings"])
    assert again == written


def test_samples_that_are_there_get_the_figures_that_they_got_when_they_were_drawn(tmp_path, model_folder):
    cfg = of_a_model(tmp_path, model_folder)
    drawn, rows = evaluate(cfg)
    model_gone = {"model": None, "prompts": "none.jsonl", "temperature": 0}
    kept = str(tmp_path / "eval" / "figures.jsonl")
    scored, again = evaluate(cfg | model_gone | {"samples": kept, "output": str(tmp_path / "again.json")})
    assert again == rows
    assert scored["figures"] == drawn["figures"]
    # What the config says of a model is not what made them.
    assert scored["settings"].keys() & {"model", "prompts", "temperature", "samples_per_prompt"} == set()


def test_the_figures_of_known_samples_are_printed_and_written(tmp_path):
    code, output = run_recipe(RECIPE, of_samples(tmp_path), tmp_path)
    assert code == 0, output
    written = json.loads((tmp_path / "eval" / "figures.json").read_text())
    means = {name: figure["mean"] for name, figure in written["figures"].items()}
    # pass@1: (2/4 + 0 + 1/4) / 3. pass@4: two of three.
    expected = {"pass@1": 0.25, "pass@4": 2 / 3, "reward": 0.25, "tokens": 3.0, "cut": 1 / 12}
    assert means == pytest.approx(expected)
    scores = [row["all_rm_scores"] for row in read_lines(tmp_path / "eval" / "figures.jsonl")]
    assert scores == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    table = [line.split()[:2] for line in output.splitlines()]
    for cells in (["pass@1", "25.0%"], ["pass@4", "66.7%"], ["reward", "0.25"], ["tokens", "3"], ["cut", "8.3%"]):
        assert cells in table, output


def test_a_reward_without_right_and_wrong_has_no_pass_at_k(tmp_path):
    written, _ = evaluate(of_samples(tmp_path, correct_above=None, k=[64]))
    assert list(written["figures"]) == ["reward", "tokens", "cut"]


def test_a_response_is_solved_if_its_score_is_above_the_threshold(tmp_path):
    pass_at_1 = [
        evaluate(of_samples(tmp_path, correct_above=above))[0]["figures"]["pass@1"]["mean"]
        for above in (-1, 0, 0.99, 1)
    ]
    assert pass_at_1 == [1, 0.25, 0.25, 0]


def test_samples_that_say_nothing_of_length_and_end_have_no_figures_of_them(tmp_path):
    bare = [{key: line[key] for key in ("prompt", "answer", "all_generated_responses")} for line in SAMPLES]
    written, _ = evaluate(of_samples(tmp_path, [*bare[:2], SAMPLES[2]]))
    assert list(written["figures"]) == ["pass@1", "pass@4", "reward"]


def test_a_reward_that_fails_costs_no_samples(tmp_path, model_folder):
    cfg = of_a_model(tmp_path, model_folder)
    from_anew, rows = evaluate(cfg)
    with pytest.raises(ConfigError, match="does not answer"):
        evaluate(cfg | {"reward": {"_component_": "test_eval.Broken"}})
    kept = tmp_path / "eval" / "figures.jsonl"
    assert read_lines(kept) == without_scores(rows)
    rescued, again = evaluate(cfg | {"samples": str(kept)})
    assert rescued["figures"] == from_anew["figures"] and again == rows


def test_an_evaluation_that_was_cut_short_goes_on_with_what_it_lacks(tmp_path, model_folder, caplog):
    lines = [{"prompt": f"{a} + 1 = ?"} for a in range(70)]  # of which the reward gets 64 at first
    cfg = of_a_model(tmp_path, model_folder, lines, k=[1], samples_per_prompt=1, max_new_tokens=4)
    from_anew, rows = evaluate(cfg)
    cfg |= {"reward": {"_component_": "test_eval.FailsOnce"}}
    FailsOnce.calls = 0
    with pytest.raises(ConfigError, match="does not answer"):
        evaluate(cfg)
    FailsOnce.calls = 3
    again, its_rows = evaluate(cfg)
    assert again["figures"] == from_anew["figures"] and its_rows == rows
    assert FailsOnce.calls == 5  # the check of the prompts, and one batch
    assert "70 of 70 prompts are sampled already" in caplog.text
    assert "64 of 70 prompts are scored already" in caplog.text
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == ["figures.json", "figures.jsonl"]


def test_prompts_of_a_split_with_other_names_are_evaluated_with_the_system_prompt_they_were_trained_with(
    tmp_path, model_folder
):
    lines = [{"problem": f"{a} + 1 = ?", "solution": a + 1} for a in range(4)]
    own = {"split": "train[2:]", "column_map": {"prompt": "problem", "answer": "solution"}, "system_prompt": "Add."}
    written, rows = evaluate(of_a_model(tmp_path, model_folder, lines, **own))
    assert [row["answer"] for row in rows] == [3, 4] and written["settings"].items() >= own.items()
    asked = [
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": line["problem"]}]}
        for line in lines[2:]
    ]
    _, same = evaluate(of_a_model(tmp_path, model_folder, asked))
    assert [row["all_generated_responses"] for row in rows] == [row["all_generated_responses"] for row in same]


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1}, "temprature: not a key of this recipe"),
        ({"reward": None}, "reward: missing"),
        ({"model": None}, "model: missing"),
        ({"prompts": None}, "prompts: missing"),
        ({"k": [1, 8]}, "k: 8 exceeds samples_per_prompt: 4; lower k, or sample more responses"),
        ({"k": [0]}, "k: expected a list of whole numbers of at least 1, such as [1, 4, 8], got [0]"),
        ({"k": 4}, "k: expected a list of whole numbers of at least 1, such as [1, 4, 8], got 4"),
        ({"k": []}, "k: expected a list of whole numbers of at least 1, such as [1, 4, 8], got []"),
        ({"bootstrap": 0}, "bootstrap: expected a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"correct_above": "high"}, "correct_above: expected a number or null, got 'high'"),
        (
            {"correct_above": ...},
            "correct_above: missing, but k: [1, 2, 4] needs it; set the score that only right responses exceed",
        ),
        ({"output": "figures.txt"}, "output: expected a name ending in .json, got 'figures.txt'"),
        ({"dtype": "fp16"}, "dtype: expected bf16 or fp32, got 'fp16'"),
        ({"max_new_tokens": 120}, "prompts.jsonl line 1: the prompt's 28 tokens and max_new_tokens: 120 exceed"),
        ({"reward": {"_component_": "humanline.rewards.None"}}, "reward._component_: "),
        (
            # No answer, and no model either: the reward looks at the prompts first.
            {
                "reward": {"_component_": "humanline.rewards.GSM8KReward", "answer_field": "solution"},
                "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "none"},
            },
            "prompts.jsonl line 1: field 'solution' is missing",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_sampled(tmp_path, model_folder, changes, message):
    given = of_a_model(tmp_path, model_folder, **changes)
    cfg = OmegaConf.create({key: value for key, value in given.items() if value is not ...})
    with pytest.raises((ConfigError, DataError)) as error:
        runpy.run_path(str(RECIPE))["HumanlineEvalRecipe"](cfg).setup(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ({}, {"samples": "none.jsonl"}, "samples: file 'none.jsonl' not found"),
        ({}, {"k": [5]}, "k: 5 exceeds the 4 responses of "),
        ({"response_lengths": [1, 2]}, {}, "samples.jsonl line 4: field 'response_lengths': expected one int for each"),
        ({"finish_reasons": [1] * 4}, {}, "samples.jsonl line 4: field 'finish_reasons': expected one str for each"),
        ({"answer": "five"}, {}, "samples.jsonl line 4: field 'answer' has no number"),
    ],
)
def test_a_mistake_in_samples_is_named_before_anything_is_written(tmp_path, line, changes, message):
    with pytest.raises((ConfigError, DataError)) as error:
        evaluate(of_samples(tmp_path, [*SAMPLES, SAMPLES[0] | line], **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "eval").exists()


def test_a_line_without_responses_is_left_out_and_counted(tmp_path, caplog):
    evaluate(of_samples(tmp_path, [*SAMPLES, SAMPLES[0] | {"all_generated_responses": None}]))
    assert json.loads((tmp_path / "eval" / "figures.json").read_text())["prompts"] == len(SAMPLES)
    assert "'all_generated_responses' is missing (1, the first: " in caplog.text


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^reward: Broken did not return one finite score per response"):
        evaluate(of_samples(tmp_path, reward={"_component_": "test_eval.Broken", "value": math.nan}))
    assert not (tmp_path / "eval" / "figures.json").exists()


def test_a_mistake_ends_the_recipe_with_one_line(tmp_path):
    code, output = run_recipe(RECIPE, of_samples(tmp_path, k=[1, 5]), tmp_path)
    assert code == 1 and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("humanline_eval.py: k: 5 exceeds the 4 responses of ")


def test_prompts_are_not_written_over(tmp_path, model_folder):
    recipe = runpy.run_path(str(RECIPE))["HumanlineEvalRecipe"]
    cfg = of_a_model(tmp_path, model_folder) | {
        "output": str(tmp_path / "prompts.json"),
        "prompts": str(tmp_path / "*.jsonl"),
    }
    with pytest.raises(ConfigError, match="^output: .*prompts.jsonl would be written over, but it is read here"):
        recipe(OmegaConf.create(cfg))
