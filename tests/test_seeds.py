"""Every stream of random numbers is its own: no two purposes, steps, ranks or seeds share one."""

import ast
from itertools import product
from pathlib import Path

import torch

from humanline._seeds import stream_seed
from humanline.data import Group, GroupDataset, OfflineSource
from humanline.optim import StochasticAdamW


def orders(seed: int, epochs: int) -> list[tuple[int, ...]]:
    """The order of an offline source's groups in each epoch."""
    dataset = GroupDataset([Group([i], ([1], [2])) for i in range(32)])
    source = OfflineSource(dataset, batch_size=32, accumulation=1, world_size=1, seed=seed, shuffle=True)
    return [tuple(group.prompt[0] for group in source.batch(epoch + 1)[0]) for epoch in range(epochs)]


def test_no_epoch_of_a_seed_repeats_one_of_another_seed():
    found = [order for seed in range(4) for order in orders(seed, 4)]
    assert len(set(found)) == 16
    assert orders(1, 4) == orders(1, 4)


def test_dropout_and_stochastic_rounding_draw_from_different_streams(trajectory):
    run = trajectory("dpo_8_k4")
    assert run.train("max_steps_per_epoch=3", "seed=0") is None
    dropout = torch.initial_seed()  # of the last step
    noise = StochasticAdamW([torch.nn.Parameter(torch.zeros(1))], seed=0)._noise(3, torch.zeros(1)).initial_seed()
    assert dropout != noise
    again = run.again("other")
    assert again.train("max_steps_per_epoch=2", "seed=0") is None
    assert torch.initial_seed() != dropout


def test_seeds_of_all_streams_differ():
    purposes = ("dropout", "rounding", "perception", "completions", "groups of an epoch", "initial adapter")
    places = [parts for length in range(4) for parts in product(range(6), repeat=length)]
    seeds = {stream_seed(purpose, *parts) for purpose in purposes for parts in places}
    assert len(seeds) == len(purposes) * len(places)
    assert len({seed % 2**32 for seed in seeds}) >= len(seeds) - 2  # of which torch's generator of the CPU takes half
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_purpose_in_the_code_is_its_own():
    code = Path(__file__).parent.parent / "humanline"
    nodes = [node for file in code.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "stream_seed"]
    named = [ast.literal_eval(call.args[0]) for call in calls]
    assert len(named) == len(set(named)) >= 7
