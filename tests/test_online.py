"""Online, sparse and offline are one: where the groups come from is a config value."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrajectoryRun, counted, logged_steps, wait_until
from safetensors.torch import load_file, save_file
from test_http_engine import Server, write_tokenizer
from test_rewards import judge, says
from torchtune.models.llama3 import llama3
from toys import Letters, sampled_source

from humanline.data import ChatTokenizer, Group, RowBudget, lay_out, pack
from humanline.models import LogProbDecoder, fixed_log_probs
from humanline.rollout import InProcessEngine, OnlineSource, SamplingParams, Steps, Stopped, TorchtuneEngine

pytestmark = pytest.mark.slow


def online(run: TrajectoryRun, **source) -> TrajectoryRun:
    """The golden run with its dataset replaced by 24 prompts that the policy answers."""
    prompts = run.folder / "prompts.jsonl"
    words = ["".join(chr(66 + (7 * i + 11 * j) % 180) for j in range(3 + i % 5)) for i in range(24)]
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    del run.config["dataset"]
    run.config |= {
        "tokenizer": {"_component_": "toys.Letters"},
        "source": {
            "_component_": "humanline.rollout.OnlineSource",
            "prompts": str(prompts),
            "max_new_tokens": 6,
            "generations": 4,
            "every": 1,
            **source,
        },
        "engine": {"_component_": "humanline.rollout.InProcessEngine", "batch_size": 8},
        "reward": {"_component_": "toys.MeanToken"},
        "batch_size": 2,
        "seed": 3,
    }
    return run


def rounds(run):
    files = (run.folder / "out" / "rounds").glob("round_*.jsonl")
    return sorted(files, key=lambda file: int(file.stem.removeprefix("round_")))


def lines(run):
    return [json.loads(line) for file in rounds(run) for line in file.read_text().splitlines()]


def offline(run):
    """The same run on the groups that it sampled."""
    other = run.again("offline")
    other.data = other.folder / "groups.jsonl"
    other.data.write_text("".join(json.dumps(line) + "\n" for line in lines(run)))
    for key in ("source", "engine", "reward"):
        del other.config[key]
    other.config["dataset"] = {"_component_": "humanline.data.encoded_groups", "source": str(other.data)}
    return other


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_online_at_every_step_is_offline_on_the_groups_that_it_sampled(trajectory, name, nproc):
    run = online(trajectory(name))
    run.config["batch_size"] = 4 // nproc
    run.train_on(nproc)
    assert len(rounds(run)) == len(run.log()) == 6
    other = offline(run)
    other.train_on(nproc)
    assert other.log() == pytest.approx(run.log(), abs=1e-5)
    assert len(set(run.log("grad_norm").values())) == 6


def test_sampling_does_not_depend_on_the_number_of_ranks(trajectory):
    run = online(trajectory("grpo_8_k4"))
    run.config["batch_size"] = 4
    run.train_on(1)
    two = run.again("two")
    two.config["batch_size"] = 2
    two.train_on(2)
    for ours, theirs in zip(lines(two), lines(run), strict=True):
        for logps, others in zip(ours.pop("logps"), theirs.pop("logps"), strict=True):
            assert logps == pytest.approx(others, abs=1e-4)
        assert ours == theirs
    assert two.log() == pytest.approx(run.log(), abs=1e-5)


def test_the_policy_of_the_moment_samples(trajectory):
    """With a rate that moves nothing, later rounds are those of the initial policy; with another they are not."""
    run = online(trajectory("grpo_8_k4"))
    sampled = []
    for rate in (0.0, 0.0, 0.02):
        assert run.train(f"optimizer.lr={rate}") is None
        sampled.append([line["responses"] for line in lines(run)])
    assert sampled[0] == sampled[1]
    assert sampled[2][:2] == sampled[0][:2] and sampled[2][-2:] != sampled[0][-2:]


def test_a_rank_without_prompts_trains_as_the_others_do(trajectory):
    run = online(trajectory("dpo_8_k4"), every=2, groups_per_round=1)
    run.train_on(2)
    assert {len(file.read_text().splitlines()) for file in rounds(run)} == {1}
    assert len(run.log()) == 2 * len(rounds(run)) > 12


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("recipe", ["distributed", "single_device"])
def test_whatever_trains_also_samples(trajectory, recipe, lora):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.recipe = run.recipe.with_name(f"humanline_grpo_{recipe}.py")
    if lora:
        run.config["model"] |= {
            "_component_": "torchtune.models.llama3.lora_llama3",
            "lora_attn_modules": ["q_proj", "v_proj"],
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.1,
        }
        run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
        run.config["optimizer"]["lr"] = 0.02
    assert run.train("dtype=bf16", "enable_activation_checkpointing=True") is None
    assert len(rounds(run)) == 4 and len(run.log()) == 12
    assert {len(file.read_text().splitlines()) for file in rounds(run)} == {6}


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.7)])
def test_the_engine_s_log_probs_are_those_of_training(dtype, temperature):
    torch.manual_seed(0)
    model = LogProbDecoder(llama3(256, 2, 4, 2, 64, 128)).to(dtype)
    model.temperature = temperature
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    engine = TorchtuneEngine(model, stop_tokens=[0], batch_size=4)
    params = SamplingParams(max_new_tokens=20, temperature=temperature, samples_per_prompt=3)
    completions = engine.generate(prompts, params, seeds=[5, 6, 7])
    groups = [Group(p, tuple(s.tokens for s in samples)) for p, samples in zip(prompts, completions, strict=True)]
    budget = RowBudget(tokens_per_row=256)
    (rows,) = (lay_out(groups, planned, budget) for planned in pack(groups, budget))
    trained = fixed_log_probs(model, rows)
    sampled = torch.tensor([logp for samples in completions for sample in samples for logp in sample.logps])
    torch.testing.assert_close(sampled, trained, atol=1e-3 if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("nproc", [1, 2])
def test_training_at_the_sampling_temperature_agrees_with_the_engine_while_the_policy_is_the_one_that_sampled(
    trajectory, nproc
):
    run = online(trajectory("grpo_8_k4"), every=4, temperature=0.7)
    run.config["batch_size"] //= nproc
    run.config["max_steps_per_epoch"] = 6
    run.train_on(nproc)
    assert {(line["temperature"], line["logps_temperature"]) for line in lines(run) if "temperature" in line} == {
        (0.7, 0.7)
    }
    for name in ("mismatch/mean", "mismatch/large", "mismatch/kl"):
        assert run.log(name).keys() == {1, 5}  # the first step of each round
        assert all(0 <= value < 1e-5 for value in run.log(name).values())
    assert run.log("entropy").keys() == set(range(1, 7))
    assert all(0 < value < math.log(256) for value in run.log("entropy").values())

    apart = run.again("at_1")
    apart.config["temperature"] = 1.0
    apart.config["batch_size"] *= nproc
    assert apart.train() is None
    assert lines(apart)[0]["responses"] == lines(run)[0]["responses"]
    assert apart.log("mismatch/mean") == {}  # it would compare two temperatures
    assert apart.log("entropy")[1] > run.log("entropy")[1]


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4"])
def test_the_mismatch_is_logged_for_every_objective(trajectory, name):
    run = online(trajectory(name))
    run.config["max_steps_per_epoch"] = 2
    assert run.train() is None
    assert run.log("mismatch/mean").keys() == {1, 2}
    assert all(value < 1e-5 for value in run.log("mismatch/mean").values())


def test_an_engine_with_another_function_is_warned_of_once(trajectory, caplog):
    run = online(trajectory("grpo_8_k4"))
    run.config["engine"]["_component_"] = "toys.Offset"
    run.config["max_steps_per_epoch"] = 3
    assert run.train() is None
    assert list(run.log("mismatch/mean").values()) == pytest.approx([0.3] * 3, abs=1e-5)
    assert set(run.log("mismatch/large").values()) == {1.0}
    expected = math.exp(0.3) - 0.3 - 1
    assert list(run.log("mismatch/kl").values()) == pytest.approx([expected] * 3, abs=1e-4)
    assert f"round 0: 2 prompts x 4, mean reward {run.log('rounds/reward')[1]:.3f}, " in caplog.text
    assert caplog.text.count("differ from the trainer's by 0.3 nats a token in the mean (mismatch/mean)") == 1


# ---- Rounds


def test_a_resumed_run_replays_its_round(trajectory):
    run = online(trajectory("grpo_8_k4"), every=4)
    run.config["save_every_n_steps"] = 6
    assert run.train() is None
    whole = run.log()
    sampled = lines(run)
    before = [file.stat().st_mtime_ns for file in rounds(run)]
    shutil.rmtree(run.folder / "out" / "checkpoints" / "step_12")
    (run.folder / "logs" / "log.txt").unlink()
    assert run.train("resume_from_checkpoint=latest") is None
    assert run.log() == {step: whole[step] for step in range(7, 13)}
    # The third was sampled by the policy of step 8, and is sampled again: the same, since nothing else has changed.
    assert lines(run) == sampled
    assert [file.stat().st_mtime_ns == then for file, then in zip(rounds(run), before, strict=True)] == [
        True,
        True,
        False,
    ]


def test_rounds_of_another_run_s_policy_are_not_trained_on(trajectory):
    run = online(trajectory("grpo_8_k4"))
    run.config |= {"save_every_n_steps": 3, "keep_last_n_checkpoints": 9}
    assert run.train("optimizer.lr=0.05") is None
    first = lines(run)
    step_3 = run.folder / "out" / "checkpoints" / "step_3"
    elsewhere = run.again("elsewhere")
    assert elsewhere.train("seed=4") is None
    shutil.rmtree(elsewhere.folder / "out" / "checkpoints")
    for branch, since in ((run, 4), (elsewhere, 3)):  # round 3 is of step 3's policy: kept where it is the run's own
        assert branch.train(f"resume_from_checkpoint={step_3}", "optimizer.lr=0.0") is None
        sampled = [json.loads(file.read_text().splitlines()[0])["policy_step"] for file in rounds(branch)]
        assert sampled == list(range(since if branch is elsewhere else 0, 12))
        responses = [line["responses"] for line in lines(branch)]
        assert responses[-1] != first[-1]["responses"]
        assert len(list((branch.folder / "out" / "rounds").glob("*.abandoned"))) == 12 - (since if branch is run else 0)


def test_a_round_that_cannot_be_read_is_named(trajectory):
    run = online(trajectory("grpo_8_k4"), every=4)
    run.config["save_every_n_steps"] = 6
    assert run.train() is None
    rounds(run)[1].write_text('{"prompt": [1]}\n')
    shutil.rmtree(run.folder / "out" / "checkpoints" / "step_12")
    message = run.train("resume_from_checkpoint=latest")
    assert "round_1.jsonl: expected a round file (KeyError('policy_step')); delete it" in message


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_round_that_cannot_be_written_is_trained_on_all_the_same(trajectory, nproc):
    whole = online(trajectory("grpo_8_k4"), every=3)
    whole.config["batch_size"] = 2 // nproc
    whole.train_on(nproc)
    run = whole.again("unwritable")
    (run.folder / "out").mkdir()
    (run.folder / "out" / "rounds").touch()
    run.train_on(nproc)
    assert run.log() == whole.log()
    output = (run.folder / "output.txt").read_text()
    assert "round 3 could not be written (" in output and "a run that resumes within it samples it again" in output


def test_a_run_that_starts_anew_does_not_take_another_s_rounds(trajectory):
    run = online(trajectory("grpo_8_k4"))
    assert run.train() is None
    first = lines(run)
    assert run.train("seed=4") is None
    assert lines(run) != first


def test_a_round_that_cannot_be_set_aside_ends_the_run_with_one_line(trajectory):
    run = online(trajectory("grpo_8_k4"))
    assert run.train("max_steps_per_epoch=1") is None
    (run.folder / "out" / "rounds" / "round_0.abandoned" / "in the way").mkdir(parents=True)
    line = run.train("seed=4")
    assert "round_0.abandoned" in line and "\n" not in line


def test_prompts_whose_responses_are_scored_equal_are_dropped_or_sampled_again(trajectory, caplog):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.config["reward"]["_component_"] = "toys.Vowels"
    assert run.train() is None
    dropped = [len(file.read_text().splitlines()) for file in rounds(run)]
    assert max(dropped) < 6 and len(run.log()) == 12  # the steps go through what is left again
    assert f"{6 - dropped[0]} prompts left out" in caplog.text
    resampled = run.again("resampled")
    assert resampled.train("source.equal_scores=resample") is None
    assert sum(len(file.read_text().splitlines()) for file in rounds(resampled)) > sum(dropped)
    assert all(len(set(line["scores"])) > 1 for line in [*lines(run), *lines(resampled)])
    assert list(run.log("rounds/dropped").values()) == [6 - count for count in dropped]
    assert all(0 < reward < 1 for reward in run.log("rounds/reward").values())


def test_labels_by_a_threshold_are_kept_group_by_group(trajectory):
    """Online KTO whose labels are those of the scores beside a threshold, groups of one kind included."""
    run = online(trajectory("kto_8_k4"), every=3)
    run.config["reward"]["_component_"] = "toys.Vowels"
    assert run.train("source.desirable_above=0.5") is None
    found = lines(run)
    assert len(found) == 4 * 6 and any(len(set(line["scores"])) == 1 for line in found)
    other = offline(run)
    labelled = ({**line, "scores": None, "labels": [score > 0.5 for score in line["scores"]]} for line in found)
    other.data.write_text("".join(json.dumps(line) + "\n" for line in labelled))
    assert other.train() is None
    assert other.log() == pytest.approx(run.log(), abs=1e-5)


def test_a_step_takes_no_group_twice(trajectory, tmp_path):
    """With fewer groups than it should have it is smaller, down to one a rank and microbatch, and two in all."""
    source = OnlineSource(str(online(trajectory("grpo_8_k4")).folder / "prompts.jsonl"), max_new_tokens=4, every=2)
    plan = source.plan(Letters(), Steps(batch_size=2, accumulation=2, world_size=2, seed=1, shuffle=False))
    sizes = {}
    with sampled_source(plan, tmp_path) as sampled:
        for count in (20, 9, 5, 3):
            sampled._round, sampled._groups = 0, [Group([1], ([2], [3]), id=str(i)) for i in range(count)]
            steps = [[[group.id for group in microbatch] for microbatch in sampled.batch(step)] for step in (1, 2)]
            sizes[count] = [list(map(len, microbatches)) for microbatches in steps]
            taken = [int(i) for microbatches in steps for microbatch in microbatches for i in microbatch]
            assert taken == [i % count for i in range(len(taken))]
    assert sizes == {20: [[4, 4], [4, 4]], 9: [[4, 4], [4, 4]], 5: [[2, 3], [2, 3]], 3: [[2, 2], [2, 2]]}


def test_when_nothing_is_left_to_learn_the_rest_of_the_steps_leaves_the_weights_as_they_are(trajectory, caplog):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.config["reward"] = {"_component_": "toys.Solved", "calls": 2}
    assert run.train() is None
    assert set(run.log()) == set(range(1, 7)) and run.log("rounds/empty") == {1: 0, 4: 0, 7: 1, 10: 1}
    assert "round 2 is empty: the objective cannot learn from any prompt's responses" in caplog.text
    short = run.again("short")
    assert short.train("max_steps_per_epoch=6") is None
    ends = [load_file(next((each.folder / "out" / "epoch_0").glob("*.safetensors"))) for each in (run, short)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize(
    ("name", "source"),
    [("grpo_8_k4", {"desirable_above": 0.5}), ("dpo_8_k4", {"max_new_tokens": 1, "temperature": 0.05})],
)
def test_groups_of_which_the_objective_makes_nothing_are_dropped_like_those_of_equal_scores(trajectory, name, source):
    """Labels of one kind for GRPO, and for DPO a best and a worst response of the same tokens."""
    run = online(trajectory(name), every=3, **source)
    run.config["reward"]["_component_"] = "toys.Vowels" if "desirable_above" in source else "toys.Place"
    assert run.train() is None
    found = lines(run)
    assert 0 < len(found) < 24 and len(run.log()) == 12
    if "desirable_above" in source:
        assert all(len({score > 0.5 for score in line["scores"]}) == 2 for line in found)
    else:
        assert all(line["responses"][0] != line["responses"][-1] for line in found)
    kept = [len(file.read_text().splitlines()) for file in rounds(run)]
    assert list(run.log("rounds/dropped").values()) == [6 - count for count in kept]


def test_a_reward_that_fails_on_one_rank_ends_all_with_what_they_have(trajectory):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.config |= {"batch_size": 1, "reward": {"_component_": "toys.Failing"}}
    with run.start(nproc=2) as ranks:
        assert ranks.wait() == [1, 1], ranks.output()
        ends = re.findall(r"humanline_grpo_distributed\.py: reward.*?from step \d+", ranks.output())
    assert len(ends) == 2 and len(set(ends)) == 1
    assert "reward: Failing failed for " in ends[0] and "(KeyError('solution')); correct the reward" in ends[0]
    assert "resume_from_checkpoint: latest resumes from step 3" in ends[0]
    assert [path.name for path in (run.folder / "out" / "checkpoints").iterdir()] == ["step_3"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_ends_sampling_in_the_process(trajectory, nproc):
    run = online(trajectory("grpo_8_k4"), every=3, equal_scores="resample")
    run.config |= {"batch_size": 2 // nproc, "reward": {"_component_": "toys.Interrupting"}}
    with run.start(nproc=nproc) as ranks:
        assert ranks.wait() == [0] * nproc, ranks.output()
        assert "stopped after step 3 by " in ranks.output()
    assert [file.name for file in rounds(run)] == ["round_0.jsonl"]
    assert [path.name for path in (run.folder / "out" / "checkpoints").iterdir()] == ["step_3"]
    run.config["reward"]["_component_"] = "toys.MeanToken"
    run.train_on(nproc, "resume_from_checkpoint=latest")
    assert logged_steps(run) == list(range(1, 13))


def test_an_engine_that_is_stopped_samples_no_further_token_and_leaves_the_policy_as_it_was():
    torch.manual_seed(0)
    decoder, ids = llama3(256, 2, 4, 2, 64, 128), torch.tensor([[5, 6, 7]])
    before, passes = decoder(ids), []
    engine = InProcessEngine(batch_size=4).build(Letters(), LogProbDecoder(decoder))

    def note(*_):
        passes.append(1)
        if len(passes) == 5:
            engine.stop()

    hook = decoder.tok_embeddings.register_forward_pre_hook(note)
    with pytest.raises(Stopped):
        engine.generate([[1, 2]], SamplingParams(max_new_tokens=100), seeds=[1])
    hook.remove()
    assert len(passes) == 5 and torch.equal(decoder(ids), before)


def test_an_engine_counts_what_it_has_sampled(monkeypatch):
    bars = counted(monkeypatch, "_in_process")
    engine = InProcessEngine(batch_size=4).build(Letters(), LogProbDecoder(llama3(256, 2, 4, 2, 64, 128)))
    engine.generate([[1, 2], [3]], SamplingParams(max_new_tokens=3, samples_per_prompt=3), seeds=[1, 2])
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]


def test_a_reward_that_leaves_responses_out_is_refused(trajectory):
    run = online(trajectory("grpo_8_k4"))
    run.config["reward"]["_component_"] = "toys.TooFew"
    assert "reward: TooFew did not return one finite score per response for" in run.train()


# ---- Mistakes

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "overlap in one process": (
        {"source.overlap": True},
        "source.overlap: expected an engine outside this process, got InProcessEngine",
    ),
    "a window": ({"reference._component_": "humanline.reference.WindowedReference"}, "samples their groups later"),
    "both": (
        {"dataset": {"_component_": "humanline.data.encoded_groups"}},
        "source: expected either source or dataset, got both",
    ),
    "no engine": ({"engine": None}, "engine: missing"),
    "no reward": ({"reward": None}, "reward: missing"),
    "one response": ({"source.generations": 1}, "source.generations: expected 2 or more responses to compare, got 1"),
    "no prompts a round": (
        {"source.groups_per_round": 0},
        "source.groups_per_round: expected a whole number of at least 1, got 0",
    ),
    "no score": ({"source.desirable_above": "half"}, "source.desirable_above: expected a number or null, got 'half'"),
    "no switch": ({"source.overlap": "later"}, "source.overlap: expected true or false, got 'later'"),
    "no rounds": ({"source.every": 0}, "source.every: expected a whole number of at least 1, got 0"),
    "too few prompts": ({"source.groups_per_round": 25}, "a round needs 25 prompts, and 24 of 24 are within"),
    "too short a row": ({"tokens_per_row": 8}, "a row holds 8; raise tokens_per_row"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_run_before_anything_is_sampled(trajectory, mistake):
    changes, message = MISTAKES[mistake]
    run = online(trajectory("grpo_8_k4"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = run.config
        for parent in parents:
            node = node[parent]
        node[last] = value
    assert message in run.train()
    assert not rounds(run)


def test_labels_make_no_pairs(trajectory):
    run = online(trajectory("dpo_8_k4"), desirable_above=0.5)
    assert "source: the longest prompt and responses: 4 responses with labels make no pair; a KTO recipe" in run.train()


# ---- A server


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """The folder of a tokenizer that a server and a run share."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return write_tokenizer(tmp_path / "tokenizer")


def served(run: TrajectoryRun, vocabulary: Path, server: Server, **source) -> TrajectoryRun:
    """The golden run with its groups sampled by a server, from weights handed over each round."""
    size = ChatTokenizer(str(vocabulary)).vocab_size
    run = online(run, **source)
    larger_vocabulary(run, size)
    run.config["model"] |= {"vocab_size": size, "max_seq_len": 512}
    run.config |= {
        "tokenizer": {"_component_": "humanline.data.ChatTokenizer", "path": str(vocabulary)},
        "tokens_per_row": 512,
        "engine": {
            "_component_": "humanline.rollout.HTTPEngine",
            "base_url": server.url,
            "model": "policy",
            "weights_dir": str(run.folder / "weights"),
            "reload_url": server.url.removesuffix("/v1") + "/reload",
            "max_concurrency": 4,
        },
    }
    return run


def test_a_server_samples_from_each_round_s_weights(vocabulary, trajectory):
    with Server(vocabulary) as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=6)
        assert run.train() is None
        announced = [line["weights"] for line in server.answered() if "weights" in line]
    weights = run.folder / "weights"
    assert len(rounds(run)) == 2 and len(run.log()) == 12
    assert [Path(folder).name.rpartition("_")[0] for folder in announced] == ["round_0", "round_1"]
    assert list(map(str, weights.iterdir())) == announced[1:]
    assert (Path(announced[1]) / "model-00001-of-00001.safetensors").is_file()
    assert run.log("staleness") == {step: (step - 1) % 6 for step in range(1, 13)}


def test_a_server_gets_merged_weights_that_have_the_update(vocabulary, trajectory, caplog):
    with Server(vocabulary) as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=6)
        run.config["model"] |= {
            "_component_": "torchtune.models.llama3.lora_llama3",
            **{"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8},
        }
        run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
        weights, config = run.folder / "model" / "model.safetensors", run.folder / "model" / "config.json"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
        config.write_text(config.read_text().replace("float32", "bfloat16"))
        assert run.train("optimizer.lr=1e-5") is None
    [folder] = (run.folder / "weights").iterdir()
    assert load_file(folder / "model-00001-of-00001.safetensors")["model.layers.0.self_attn.q_proj.weight"].dtype == (
        torch.float32
    )
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    [said] = [record for record in caplog.records if f"{folder}: " in record.getMessage()]
    assert said.levelname == "WARNING" and "100.0% of the update's norm survived rounding; loaded in bfloat16" in (
        said.getMessage()
    )


@pytest.mark.parametrize("nproc", [1, 2])
def test_with_overlap_training_goes_on_while_the_next_round_is_sampled(vocabulary, trajectory, nproc):
    hold = vocabulary / "hold"
    hold.touch()
    with Server(vocabulary, f"--hold={hold}") as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=3, overlap=True)
        run.config["batch_size"] = 2 // nproc
        with run.start(nproc=nproc) as ranks:
            wait_until(lambda: 3 in logged_steps(run), ranks)  # all steps of a round, while the server holds the next
            assert [file.name for file in rounds(run)] == ["round_0.jsonl"]
            hold.unlink()
            assert ranks.wait() == [0] * nproc, ranks.output()
    assert [json.loads(file.read_text().splitlines()[0])["policy_step"] for file in rounds(run)] == [0, 0, 3, 6]
    assert list(run.log("staleness").values()) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    assert set(run.log("rounds/reward")) == {1, 4, 7, 10}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_round(vocabulary, trajectory, number):
    hold = vocabulary / "hold"
    hold.touch()
    with Server(vocabulary, f"--hold={hold}") as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=3)
        with run.start() as ranks:
            wait_until(lambda: any((run.folder / "weights").glob("round_1_*")), ranks)
            os.kill(ranks.processes[0].pid, number)
            assert ranks.wait() == [0], ranks.output()
            assert f"stopped after step 3 by {number.name}; resume_from_checkpoint: latest resumes" in ranks.output()
        hold.unlink()
        run.train_on(1, "resume_from_checkpoint=latest")
    assert logged_steps(run) == list(range(1, 13))
    assert len(list((run.folder / "weights").iterdir())) == 1  # the process before left none behind


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_the_wait_of_all(vocabulary, trajectory, rank):
    hold = vocabulary / "hold"
    hold.touch()
    with Server(vocabulary, f"--hold={hold}") as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=3)
        run.config |= {"batch_size": 1}
        with run.start(nproc=2) as ranks:
            wait_until(lambda: any((run.folder / "weights").glob("round_1_*")), ranks)
            os.kill(ranks.processes[rank].pid, signal.SIGTERM)
            assert ranks.wait() == [0, 0], ranks.output()
            assert "stopped after step 3 by " in ranks.output()


def test_a_signal_ends_the_wait_for_a_judge(trajectory):
    run = online(trajectory("grpo_8_k4"), every=3)
    with judge(lambda _, nth: says(f"Rating: {nth % 7}") if nth < 24 else (503, {})) as (reward, requests):
        judged = {"_component_": "humanline.rewards.JudgeReward", "base_url": reward._url, "model": "judge-1"}
        run.config["reward"] = judged | {"retries": 10_000}
        with run.start() as ranks:
            wait_until(lambda: len(requests) > 24, ranks)
            os.kill(ranks.processes[0].pid, signal.SIGTERM)
            assert ranks.wait() == [0], ranks.output()
            assert "stopped after step 3 by SIGTERM; resume_from_checkpoint: latest resumes" in ranks.output()


def test_a_run_stopped_while_it_samples_ahead_goes_on_with_the_same_round(vocabulary, trajectory):
    hold = vocabulary / "hold"
    hold.touch()
    with Server(vocabulary, f"--hold={hold}") as server:
        run = served(trajectory("grpo_8_k4"), vocabulary, server, every=3, overlap=True)
        with run.start() as ranks:
            wait_until(lambda: 1 in logged_steps(run), ranks)
            os.kill(ranks.processes[0].pid, signal.SIGTERM)
            assert ranks.wait() == [0], ranks.output()
        before = rounds(run)[0].stat().st_mtime_ns
        stopped_at = max(logged_steps(run))
        assert stopped_at <= 3
        hold.unlink()
        run.train_on(1, "resume_from_checkpoint=latest")
    assert logged_steps(run) == list(range(1, 13))
    assert rounds(run)[0].stat().st_mtime_ns == before
    assert max(run.log("staleness").values()) <= 5


def larger_vocabulary(run, size):
    """Pads the golden model's embeddings and output layer."""
    file = run.folder / "model" / "model.safetensors"
    padded = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in padded:
            rows = torch.zeros(size, padded[name].size(1))
            rows[: len(padded[name])] = padded[name]
            padded[name] = rows
    save_file(padded, file, metadata={"format": "pt"})
    config = run.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": size}))
