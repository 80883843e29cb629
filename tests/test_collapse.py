"""The watch over collapse: it warns of entropy, lengths and repetition, and is silent where a run is healthy."""

import json
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_online import online

from humanline.rollout import most_repeated
from humanline.training._collapse import CollapseWatch

ENTROPY, LENGTH, REPEATED = "entropy", "rounds/response_tokens", "rounds/repeated"


def warnings(name, values, window=20):
    watch = CollapseWatch("reward", window)
    return [warning for value in values for warning in watch.add({name: value})]


def around(means, seed=0, spread=0.1):
    """Values that scatter around means, in proportion to them."""
    noise = random.Random(seed)
    return [mean * (1 + noise.uniform(-spread, spread)) for mean in means]


def line(start, end, steps=100):
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


@pytest.mark.parametrize(
    ("name", "means", "sentence"),
    [
        (ENTROPY, line(1.0, 0.01), "entropy: the policy's entropy fell from 0.9"),
        (LENGTH, line(30, 600), "rounds/response_tokens: responses grew from 5"),
        (LENGTH, line(200, 2), "rounds/response_tokens: responses shrank from 19"),
        (REPEATED, line(0.02, 0.95), "rounds/repeated: the share of prompts with the same most frequent response grew"),
    ],
)
def test_a_slow_collapse_is_warned_of_with_its_figures_and_a_remedy(name, means, sentence):
    found = warnings(name, around(means))
    assert found and found[0].startswith(sentence) and "resume from an earlier checkpoint" in found[0]
    assert len(found) <= 100 // 20  # at most once per window


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (LENGTH, [*line(30, 8, 50), *[8.0] * 100]),  # the model learns to stop
        (LENGTH, line(200, 800)),
        (ENTROPY, [*line(1.0, 0.2), *[0.2] * 100]),
        (REPEATED, line(0.0, 0.4)),
        (REPEATED, [0.6] * 100),  # questions of yes or no
    ],
)
def test_a_healthy_run_is_not_warned_of(name, means):
    assert warnings(name, around(means)) == []


@given(
    st.sampled_from([ENTROPY, LENGTH, REPEATED]),
    st.floats(0.01, 1),
    st.floats(0, 0.3),  # so that no two means differ by a factor of 2
    st.integers(8, 60),
    st.integers(0, 2**32),
)
def test_stationary_noise_is_no_collapse(name, mean, spread, window, seed):
    assert warnings(name, around([mean] * 300, seed, spread), window) == []


def test_one_jump_is_warned_of_once():
    values = around([1.0] * 30 + [0.01] * 200)
    assert len(warnings(ENTROPY, values)) == 1


def test_values_that_are_absent_or_not_finite_are_left_out():
    watch = CollapseWatch("reward", 8)
    for value in around([1.0] * 4 + [0.01] * 3):
        assert watch.add({}) == watch.add({ENTROPY: float("nan")}) == []
        assert watch.add({ENTROPY: value}) == []
    assert len(watch.add({ENTROPY: 0.011})) == 1


def test_evaluations_in_which_the_prompts_come_to_share_a_response_are_warned_of_at_the_second():
    repeated = "val/repeated"
    assert warnings(repeated, [0.0, 1 / 3, 1 / 3, 1.0]) == []
    (warning,) = warnings(repeated, [0.0, 1 / 3, 1 / 3, 1.0, 1.0])
    assert warning.startswith("val/repeated: the share of prompts with the same most frequent response grew from 17%")
    assert warnings(repeated, [1 / 3, 1 / 3, *[2 / 3] * 9]) == []  # three of four answers are yes
    assert warnings(repeated, [1.0] * 9) == []


@settings(max_examples=15)
@given(st.integers(0, 100))
def test_a_resumed_watch_warns_as_one_that_was_not_interrupted(at):
    entries = [
        {ENTROPY: entropy, LENGTH: length, "reward": reward, "kl": kl}
        for entropy, length, reward, kl in zip(
            around(line(1, 0.01)), around(line(9, 900)), around(line(2, 1)), around(line(1, 2)), strict=True
        )
    ]
    whole, first, second = (CollapseWatch("reward", 20) for _ in range(3))
    expected = [whole.add(entry) for entry in entries]
    found = [first.add(entry) for entry in entries[:at]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [second.add(entry) for entry in entries[at:]] == expected
    assert len({name for each in expected for name in (w.split(":")[0] for w in each)}) == 3


def test_the_state_of_an_earlier_version_is_the_signal_s():
    watch = CollapseWatch("reward", 8)
    watch.load_state_dict([(1.0, 0.1), (1.01, 0.11), (1.0, 0.1), (0.99, 0.1), (0.1, 0.5), (0.11, 0.5), (0.1, 0.51)])
    (warning,) = watch.add({"reward": 0.1, "kl": 0.5})
    assert "the signal fell from 1 to 0.1025" in warning


def test_the_most_frequent_response_counts_once_per_prompt():
    assert most_repeated([]) == most_repeated([[[1], [1], [1]]]) == most_repeated([[[1]], [[2]]]) == 0
    assert most_repeated([[[1], [1], [2]], [[1, 2], [3]], [[2], [4]], [[2]]]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_round_logs_the_share_of_prompts_with_one_response(trajectory, nproc):
    run = online(trajectory("grpo_8_k4"), every=3, max_new_tokens=1)
    run.config |= {"batch_size": 2 // nproc, "max_steps_per_epoch": 6}
    run.train_on(nproc)
    shares = run.log(REPEATED)
    files = [run.folder / "out" / "rounds" / f"round_{index}.jsonl" for index in range(2)]
    groups = [[json.loads(line)["responses"] for line in file.read_text().splitlines()] for file in files]
    assert list(shares.values()) == [most_repeated(each) / (len(each) - 1) for each in groups]
    assert max(shares.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_the_golden_runs_are_healthy(trajectory, caplog, name):
    run = trajectory(name)
    run.config["collapse_window"] = 8
    assert run.train("stop_on_collapse=True") is None
    assert not [record for record in caplog.records if "resume from an earlier checkpoint" in record.message]


@pytest.mark.slow
def test_rounds_of_an_earlier_version_are_logged_with_the_values_that_they_have(trajectory):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.config |= {"max_steps_per_epoch": 6, "save_every_n_steps": 3, "keep_last_n_checkpoints": 4}
    assert run.train() is None
    assert run.log("rounds/reward").keys() == {1, 4}
    newer = ("rounds/reward_std", "rounds/groups", "rounds/truncated", "rounds/repeated", "rounds/others")
    file = run.folder / "out" / "rounds" / "round_1.jsonl"
    first, *rest = file.read_text().splitlines()
    round = json.loads(first)
    round["metrics"] = {name: value for name, value in round["metrics"].items() if name not in newer}
    file.write_text("\n".join([json.dumps(round), *rest]) + "\n")
    expected = run.log("rounds/reward")[4]
    (run.folder / "logs" / "log.txt").unlink()
    for folder in (run.folder / "out" / "checkpoints").glob("step_6*"):
        shutil.rmtree(folder)
    assert run.train("resume_from_checkpoint=latest") is None
    assert run.log("rounds/reward")[4] == expected and 4 not in run.log("rounds/repeated")


@pytest.mark.slow
def test_a_run_stops_when_the_prompts_of_its_evaluations_come_to_share_a_response(trajectory):
    run = trajectory("dpo_8_k4")
    groups = [json.loads(line) for line in run.data.read_text().splitlines()]
    run.data.write_text("".join(json.dumps(group | {"responses": [[7], [9]]}) + "\n" for group in groups))
    run.config |= {"tokenizer": {"_component_": "toys.Letters"}, "dataset_val": dict(run.config["dataset"])}
    run.config |= {"generate_val_every_n_steps": 1, "generate_val_max_new_tokens": 1, "generate_val_prompts": 12}
    run.config["loss"] |= {"perception": "none", "log_eps_P": None, "log_eps_R": None}
    run.config["reference"]["sync_every"] = None
    run.config["optimizer"]["lr"] = 0.01
    line = run.train("stop_on_collapse=True", "temperature=0.2")
    files = (run.folder / "out" / "completions").glob("step_*.jsonl")
    files = sorted(files, key=lambda file: int(file.stem.removeprefix("step_")))
    texts = [[json.loads(line)["completion"] for line in file.read_text().splitlines()] for file in files]
    shares = [most_repeated([[text] for text in each]) / 11 for each in texts]
    assert list(run.log("val/repeated").values()) == pytest.approx(shares)
    assert f"step {len(shares) - 1}: val/repeated: the share of prompts" in line and "(stop_on_collapse)" in line
    assert sum(shares[-2:]) / 2 >= 0.9 > sum(shares[-3:-1]) / 2
    assert (run.folder / "out" / "checkpoints" / f"step_{len(shares) - 1}").is_dir()
