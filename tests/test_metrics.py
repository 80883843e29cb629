"""Metrics of training steps: the distribution of log-ratios, and what the clips hold."""

import json
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from humanline.losses import HumanlineGRPOLoss
from humanline.training._log_ratios import QUANTILES, LogRatios

CPU = torch.device("cpu")
nats = st.floats(-90, 90, width=32) | st.floats(-(2**-10), 2**-10, width=32) | st.just(0.0)


@given(st.lists(nats, min_size=1, max_size=300), st.integers(1, 5))
def test_quantiles_are_those_of_all_values_within_a_bin(values, parts):
    tensor = torch.tensor(values)
    found = LogRatios(CPU)
    for part in tensor.chunk(parts):  # over passes, and over steps or ranks
        other = LogRatios(CPU)
        other.add(part)
        found.merge(other)
    resumed = LogRatios(CPU)
    resumed.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert resumed.quantiles() == found.quantiles()
    for name, share in QUANTILES.items():
        exact = torch.quantile(tensor.double(), share, interpolation="higher").item()
        lower = torch.quantile(tensor.double(), share, interpolation="lower").item()
        value = found.quantiles()[name]
        assert any(value == pytest.approx(each, rel=0.011, abs=1.1e-6) for each in (exact, lower))


def test_values_beyond_the_bins_and_no_values():
    found = LogRatios(CPU)
    assert found.quantiles() == {}
    found.add(torch.tensor([float("nan")]))
    assert found.quantiles() == {}
    found.add(torch.tensor([-float("inf"), -1e9, 0.0, 1e-9, float("inf")]))
    assert int(found.counts.sum()) == 5
    quantiles = found.quantiles()
    assert quantiles["log_ratio/p01"] == pytest.approx(-99, rel=0.011) and quantiles["log_ratio/p50"] == 0.0
    assert quantiles["log_ratio/p99"] == pytest.approx(99, rel=0.011)


def test_grpo_counts_the_tokens_that_its_own_clip_holds():
    log_ratio = torch.tensor([[0.1, 0.3, -0.3], [0.1, 0.3, -0.3], [0.3, -0.3, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    loss = HumanlineGRPOLoss(beta=0.0)
    held, tokens = loss.num_clipped(log_ratio, torch.zeros(3, 3), mask, advantages)
    assert (int(held), int(tokens)) == (2, 8)  # 0.3 where the advantage is positive, -0.3 where it is negative
    loss(log_ratio, torch.zeros(3, 3), mask, advantages).backward()
    assert int((log_ratio.grad[:2] == 0).sum()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_the_shares_add_up_and_the_quantiles_are_those_of_the_step(trajectory, name, nproc):
    run = trajectory(name)
    run.config["batch_size"] //= nproc
    run.config["loss"] |= {"log_eps_P": -0.02, "log_eps_R": 0.03}
    run.config["max_steps_per_epoch"] = 6
    run.train_on(nproc)
    inside, below, above = (run.log(metric) for metric in ("unclamped", "clipped/below", "clipped/above"))
    assert inside.keys() == below.keys() == above.keys() == set(range(2, 7))
    for step in inside:
        assert inside[step] + below[step] + above[step] == pytest.approx(1, abs=1e-6)
        low, middle, high = (run.log(quantile)[step] for quantile in QUANTILES)
        assert low <= middle <= high
        assert (low < -0.02) >= (below[step] > 0.01) and (high > 0.03) >= (above[step] > 0.01)
    assert run.log("log_ratio/p50")[1] == 0.0
    assert max(below.values()) > 0.01 and max(above.values()) > 0.01
    if name == "grpo_8_k4":
        assert run.log("clipped/ppo").keys() == set(range(1, 7)) and run.log("clipped/ppo")[1] == 0


@pytest.mark.slow
def test_quantiles_since_the_last_entry_survive_a_resume(trajectory):
    run = trajectory("grpo_8_k4")
    run.config |= {"log_every_n_steps": 4, "save_every_n_steps": 2, "max_steps_per_epoch": 4}
    assert run.train() is None
    whole = {name: run.log(name)[4] for name in (*QUANTILES, "clipped/above", "entropy")}
    (run.folder / "logs" / "log.txt").unlink()
    assert run.train(f"resume_from_checkpoint={run.folder / 'out' / 'checkpoints' / 'step_2'}") is None
    assert {name: run.log(name)[4] for name in whole} == whole


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("name", ["kto_8_k4", "grpo_8_k4"])
def test_lengths_and_the_spread_of_scores_are_those_of_the_entry_s_groups(trajectory, name, nproc):
    run = trajectory(name)
    run.config["batch_size"] //= nproc
    run.config |= {"log_every_n_steps": 2, "max_steps_per_epoch": 4, "tokens_per_row": 40, "rows_per_pass": 1}
    run.train_on(nproc)
    for step in (2, 4):
        examples = [example for batch in run.golden["batches"][step - 2 : step] for example in batch]
        lengths = [len(each) for example in examples for each in example.get("responses") or [example["response"]]]
        assert run.log("responses/length")[step] == pytest.approx(fmean(lengths))
        if name == "grpo_8_k4":
            spreads = [pstdev(example["scores"]) for example in examples]
            assert run.log("rewards/std")[step] == pytest.approx(fmean(spreads))
    assert bool(run.log("rewards/std")) == (name == "grpo_8_k4")
