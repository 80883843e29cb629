"""AdamW on bfloat16 weights: small updates survive on average."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import forkserver
from torch.distributed.tensor import DTensor, Replicate, Shard

from humanline.errors import ConfigError
from humanline.models._build import mesh_of
from humanline.optim import StochasticAdamW, stochastic_round


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_a_value_is_rounded_to_one_of_its_two_neighbours(value):
    exact = torch.full((64,), value)
    rounded = stochastic_round(exact.clone()).float()
    ulp = torch.maximum(exact.abs() * 2**-7, torch.tensor(2.0**-126))
    assert bool(((rounded - exact).abs() <= ulp).all())
    assert len(rounded.unique()) <= 2


def test_the_mean_of_many_roundings_is_the_value():
    value = 1 + 2**-7 * 0.3  # three tenths of the way between two bfloat16
    torch.manual_seed(0)
    rounded = stochastic_round(torch.full((100_000,), value)).float()
    assert rounded.mean().item() == pytest.approx(value, abs=2**-7 * 0.01)  # six standard errors


def test_what_bfloat16_holds_is_left_alone():
    values = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(values.float()), values)
    special = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    assert torch.equal(stochastic_round(special.clone()).float(), special)
    assert stochastic_round(torch.tensor([float("nan")])).isnan().all()


def train(optimizer_type, dtype, steps=50):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.full((4096,), 0.05, dtype=dtype))
    optimizer = optimizer_type([weight], lr=1e-5, eps=1e-8, weight_decay=0.01)
    for step in range(steps):
        weight.grad = torch.full_like(weight, 1.0 + 0.1 * (step % 3))
        optimizer.step()
    return weight.detach().double().mean().item()


def test_in_float32_it_is_torch_adamw_and_closer_to_float64_than_that_is():
    exact = train(torch.optim.AdamW, torch.float64)
    error = abs(train(StochasticAdamW, torch.float32) - exact)
    assert error < 2e-8
    assert error < abs(train(torch.optim.AdamW, torch.float32) - exact)


def test_in_bfloat16_it_moves_as_float32_does_where_rounding_to_nearest_stands_still():
    exact = train(torch.optim.AdamW, torch.float32)
    start = torch.tensor(0.05, dtype=torch.bfloat16).item()
    moved = start - train(StochasticAdamW, torch.bfloat16)
    assert moved == pytest.approx(0.05 - exact, rel=0.1)
    assert train(torch.optim.AdamW, torch.bfloat16) == start


def test_pieces_change_nothing_but_the_noise(monkeypatch):
    whole = train_matrix()
    monkeypatch.setattr("humanline.optim._stochastic_adamw.PIECE", 100)
    assert torch.equal(train_matrix(), whole)  # float32: no noise


def train_matrix():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(30, 40).t())  # not contiguous
    optimizer = StochasticAdamW([weight], lr=1e-3)
    for _ in range(3):
        weight.grad = torch.randn(40, 30)
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize(
    ("setting", "key"), [({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": -1e-8}, "eps")]
)
def test_settings_out_of_range_are_refused_by_name(setting, key):
    with pytest.raises(ConfigError, match=f"optimizer.{key}"):
        StochasticAdamW([torch.nn.Parameter(torch.zeros(1))], **setting)


def step_of_a_shard(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    mesh = mesh_of(torch.device("cpu"), replicas=2)

    def sharded(value):
        local = torch.full((512,), value, dtype=torch.bfloat16)
        return DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)

    weight: Any = torch.nn.Parameter(sharded(1.0))  # a DTensor
    weight.grad = sharded(1.0)
    StochasticAdamW([weight], lr=1e-3).step()
    torch.save(weight.to_local().detach(), folder / f"{rank}.pt")


def test_ranks_that_hold_the_same_shard_round_it_alike(tmp_path):
    ranks = [forkserver.Process(target=step_of_a_shard, args=(rank, tmp_path)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    assert len(weights[0].unique()) == 2
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
