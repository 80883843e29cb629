"""The real recipes repeat the authors' training runs, step by step."""

import math

import pytest

pytestmark = pytest.mark.slow

NAMES = [f"{objective}_{run}" for objective in ("dpo", "kto", "grpo") for run in ("7_k1", "8_k4")]


@pytest.mark.parametrize("nproc", [1, 2], ids=["one process", "two FSDP2 ranks"])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_the_loss_of_the_authors_code(trajectory, name, nproc):
    run = trajectory(name)
    run.config["batch_size"] //= nproc
    if name == "dpo_8_k4":
        run.tune(nproc=nproc if nproc > 1 else None)
    else:  # the same file without the seconds that tune takes to start
        run.train_on(nproc)
    losses = run.log()
    assert list(losses) == list(range(1, len(run.golden["losses"]) + 1))
    assert list(losses.values()) == pytest.approx(run.golden["losses"], abs=1e-5)
    if name.startswith("dpo"):
        assert losses[1] == pytest.approx(math.log(2), abs=1e-7)
