"""HSDP: the model sharded within groups of ranks, and repeated over them."""

import shutil

import pytest
from safetensors.torch import load_file

RUNS = [("dpo_8_k4", 2), ("kto_8_k4", 2), ("grpo_8_k4", 2), ("dpo_8_k4", 4), ("kto_8_k4", 4)]


@pytest.mark.parametrize("reference", ["ModelReference", "WindowedReference"])
@pytest.mark.parametrize(("name", "nproc"), RUNS, ids=[f"{name}, 2 x {nproc // 2}" for name, nproc in RUNS])
def test_two_groups_have_the_losses_of_the_authors_code(trajectory, name, nproc, reference):
    run = trajectory(name)
    run.config["batch_size"] //= nproc
    run.config["reference"]["_component_"] = f"humanline.reference.{reference}"
    run.train_on(nproc, "data_parallel_replicate_dim=2")
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


@pytest.mark.parametrize("reference", ["ModelReference", "WindowedReference"])
def test_checkpoints_move_between_groups_and_one_process(trajectory, reference):
    whole = trajectory("dpo_8_k4")
    whole.config |= {"save_every_n_steps": 5}
    whole.config["reference"]["_component_"] = f"humanline.reference.{reference}"
    moved = whole.again("moved")
    whole.train_on(1)
    moved.config["batch_size"] //= 4
    moved.train_on(4, "data_parallel_replicate_dim=2")
    checkpoints = moved.folder / "out" / "checkpoints"
    for folder in checkpoints.glob("step_1?"):
        shutil.rmtree(folder)
    moved.config["batch_size"] *= 4
    moved.train_on(1, "resume_from_checkpoint=latest")
    assert moved.log() == pytest.approx(whole.log(), abs=1e-5)
    file = "out/epoch_0/model-00001-of-00001.safetensors"
    ours, theirs = (load_file(run.folder / file) for run in (moved, whole))
    for tensor, other in zip(ours.values(), theirs.values(), strict=True):
        assert tensor.sub(other).abs().max() < 1e-5


def test_ranks_that_do_not_divide_are_refused(trajectory):
    run = trajectory("dpo_8_k4")
    message = run.train("data_parallel_replicate_dim=2")
    assert "data_parallel_replicate_dim: 1 ranks do not divide into 2 groups; use a divisor of 1" in message


def test_one_device_has_no_groups(trajectory):
    run = trajectory("dpo_8_k4")
    run.recipe = run.recipe.with_name("humanline_dpo_single_device.py")
    assert "data_parallel_replicate_dim: expected 1, since this recipe uses one device" in run.train(
        "data_parallel_replicate_dim=2"
    )
