"""What a run logs: of every step of an interval, as it was applied, and what it leaves out."""

import json
import logging
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_online import lines, online
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from toys import Letters, sampled_source

from humanline.data import Group, GroupDataset, OfflineSource
from humanline.rollout import OnlineSource, RoundPlan, Steps

AVERAGED = ("loss", "grad_norm", "rewards/margins")


def annealed(optimizer: torch.optim.Optimizer, num_training_steps: int) -> LRScheduler:
    """One of torch's own schedules, which computes each rate from the one before it."""
    return CosineAnnealingLR(optimizer, num_training_steps + 1)


def test_an_entry_is_of_all_steps_since_the_one_before_and_the_last_steps_have_one(trajectory):
    run = trajectory("dpo_8_k4")
    run.config["lr_scheduler"] = {"_component_": "humanline.training.get_constant_schedule_with_warmup"}
    run.config["lr_scheduler"]["warmup_ratio"] = 1.0
    assert run.train() is None
    each = {name: run.log(name) for name in (*AVERAGED, "lr")}
    full = run.config["optimizer"]["lr"]
    assert each["lr"] == pytest.approx({step: full * step / 13 for step in range(1, 13)})

    seldom = run.again("seldom")
    seldom.config["log_every_n_steps"] = 5
    assert seldom.train() is None
    intervals = {5: range(1, 6), 10: range(6, 11), 12: (11, 12)}
    for name in AVERAGED:
        means = {step: fmean(each[name][i] for i in interval) for step, interval in intervals.items()}
        assert seldom.log(name) == pytest.approx(means, rel=1e-4, abs=1e-9), name
    assert seldom.log("lr") == {step: each["lr"][step] for step in intervals}
    assert seldom.log("tokens_per_second").keys() == intervals.keys()


@pytest.mark.parametrize("schedule", ["torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "annealed"])
def test_a_run_resumed_with_more_epochs_has_the_longer_schedule_from_its_first_step(trajectory, schedule):
    run = trajectory("dpo_8_k4")
    run.config["lr_scheduler"] = (
        {"_component_": "test_logs.annealed"}
        if schedule == "annealed"
        else {"_component_": schedule, "num_warmup_steps": 3}
    )
    longer = run.again("longer")
    longer.config["epochs"] = 2
    assert longer.train() is None
    run.config["save_every_n_steps"] = 10
    assert run.train() is None
    assert run.log("lr")[11] != pytest.approx(longer.log("lr")[11], rel=0.1)
    assert run.train("resume_from_checkpoint=latest", "epochs=2") is None
    expected = longer.log("lr")
    assert {s: v for s, v in run.log("lr").items() if s > 10} == {s: v for s, v in expected.items() if s > 10}


def test_the_rounds_since_the_last_entry_are_in_the_first_one_after_a_resume(trajectory):
    run = online(trajectory("grpo_8_k4"))
    run.config |= {"log_every_n_steps": 2, "save_every_n_steps": 3, "keep_last_n_checkpoints": 9}
    run.config |= {"max_steps_per_epoch": 5}
    assert run.train() is None
    names = (
        "rounds/reward",
        "rounds/reward_std",
        "rounds/truncated",
        "rounds/response_tokens",
        "log_ratio/p99",
        "rounds/tokens",
        "rounds/dropped",
        "rounds/unused",
        "staleness",
    )
    whole = {name: run.log(name) for name in names}
    assert whole["rounds/tokens"].keys() == {2, 4, 5}
    sampled = lines(run)
    assert all(list(map(len, line["logps"])) == list(map(len, line["responses"])) for line in sampled)
    assert all(logp <= 0 for line in sampled for logps in line["logps"] for logp in logps)

    (run.folder / "logs" / "log.txt").unlink()
    step = run.folder / "out" / "checkpoints" / "step_3"
    assert run.train(f"resume_from_checkpoint={step}") is None
    assert {name: run.log(name) for name in names} == {name: {s: whole[name][s] for s in (4, 5)} for name in names}


def test_the_mean_reward_of_rounds_is_that_of_their_responses(tmp_path):
    with sampled_source(plan(4, tmp_path, every=1), tmp_path) as source:
        source._policy_step = 0
        facts = {"rounds/dropped": 0, "rounds/tokens": 12, "rounds/seconds": 1.0}
        source._unlogged = [
            {"rounds/reward": 6.0, "rounds/responses": 6, "rounds/truncated": 1, "rounds/reward_std": 1.5} | facts,
            {"rounds/reward": 0.0, "rounds/responses": 2, "rounds/truncated": 2, "rounds/reward_std": 0.5} | facts,
        ]
        source._unlogged = [round | {"rounds/groups": 2} for round in source._unlogged]
        found = source.metrics(1)
        assert found["rounds/reward"] == 6 / 8 and found["rounds/truncated"] == 3 / 8
        assert found["rounds/response_tokens"] == 24 / 8 and found["rounds/reward_std"] == 2 / 4


def plan(count: int, folder: Path, **settings) -> RoundPlan:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a" * (1 + i)}) + "\n" for i in range(count)))
    source = OnlineSource(str(path), max_new_tokens=4, **settings)
    return source.plan(Letters(), Steps(batch_size=2, accumulation=1, world_size=1, seed=0, shuffle=True))


def test_groups_that_no_step_takes_are_said_at_the_start(trajectory, caplog, tmp_path):
    run = trajectory("dpo_8_k4")
    run.config["dataset"]["split"] = "train[:47]"
    with caplog.at_level(logging.INFO):
        assert run.train("max_steps_per_epoch=2") is None
    assert "dataset: 39 of 47 groups are left out of every epoch (the last ones): its 2 steps use 4 each" in caplog.text

    groups = [Group([i], ([1], [2])) for i in range(8)]
    shape = {"accumulation": 1, "world_size": 1, "seed": 0, "shuffle": True}
    assert OfflineSource(GroupDataset(groups), batch_size=4, **shape).left_out() == []
    (line,) = OfflineSource(GroupDataset(groups), batch_size=3, **shape).left_out()
    assert line.startswith("dataset: 2 of 8 groups are left out of every epoch (a different choice in each)")

    assert plan(8, tmp_path, every=2).left_out() == []
    said = plan(9, tmp_path, every=2, groups_per_round=5, max_prompt_tokens=8).left_out()
    assert [line.split(":")[1].strip() for line in said] == [
        "1 of 9 prompts are left out",
        "3 of 8 prompts are left out of every epoch (a different choice in each)",
        "a round samples 5 prompts and its steps need 4 groups",
    ]
