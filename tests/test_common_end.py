"""However one of two ranks fails, both end, and say the same line."""

import json
import shutil

import pytest
from conftest import logged_steps, wait_until
from safetensors.torch import load_file, save_file

RANK = "${oc.env:RANK}"
PROGRAM = "humanline_dpo_distributed.py: "


def assert_both_say(run, expected, *overrides, tracebacks=0, **environment):
    """Both ranks end with 1 and one line, which is the same and has all that is expected of it."""
    with run.start(*overrides, nproc=2, **environment) as ranks:
        assert ranks.wait(60) == [1, 1]
        output = ranks.output()
    lines = [line.removeprefix(PROGRAM) for line in output.splitlines() if line.startswith(PROGRAM)]
    assert len(lines) == 2 and lines[0] == lines[1], output
    assert all(part in lines[0] for part in expected), output
    assert output.count("Traceback") == tracebacks and "Connection" not in output, output


@pytest.fixture
def two_ranks(trajectory):
    run = trajectory("dpo_8_k4")
    run.config["batch_size"] = 2
    return run


@pytest.mark.parametrize(
    ("error", "expected", "tracebacks"),
    [
        ("builtins.PermissionError", ("rank 1: dataset: toys.groups_but_on_rank_1", "PermissionError", "no right"), 0),
        ("builtins.ValueError", ("rank 1: dataset: no right; correct its arguments",), 0),
        ("builtins.MemoryError", ("rank 1: MemoryError: no right",), 0),
        ("builtins.KeyError", ("rank 1: KeyError: 'no right'",), 1),
    ],
)
def test_a_component_fails_on_one_rank(two_ranks, error, expected, tracebacks):
    two_ranks.config["dataset"] |= {"_component_": "toys.groups_but_on_rank_1", "error": error}
    assert_both_say(two_ranks, expected, tracebacks=tracebacks)


def test_a_rank_that_is_killed_is_said_to_have_ended(two_ranks):
    with two_ranks.start("epochs=1000", nproc=2) as ranks:
        wait_until(lambda: 3 in logged_steps(two_ranks), ranks)
        ranks.processes[1].kill()
        assert ranks.wait(60) == [1, -9]
        assert (
            f"{PROGRAM}rank 0: another rank ended without an error message; the system may have killed it"
            in ranks.output()
        )
        assert "Traceback" not in ranks.output()


@pytest.mark.parametrize("part", ["loss", "metric_logger"])
def test_a_step_fails_on_one_rank(two_ranks, part):
    """The loss on rank 1, and the logger, which only rank 0 has."""
    two_ranks.config[part]["_component_"] = {"loss": "toys.BreakingLoss", "metric_logger": "toys.BreakingLogger"}[part]
    rank = {"loss": 1, "metric_logger": 0}[part]
    assert_both_say(two_ranks, (f"rank {rank}: ZeroDivisionError: in step 3",), tracebacks=1)


def test_a_data_file_is_missing_or_another_on_one_rank(two_ranks):
    here = [two_ranks.folder / f"groups_{rank}.jsonl" for rank in (0, 1)]
    shutil.copy(two_ranks.data, here[0])
    two_ranks.config["tokenizer"] = {"_component_": "toys.OwnDisk"}  # ranks of one node read one file
    two_ranks.config["dataset"]["source"] = str(two_ranks.folder / f"groups_{RANK}.jsonl")
    assert_both_say(two_ranks, (f"source: file '{here[1]}' not found",))
    (two_ranks.folder / "output.txt").unlink()
    lines = two_ranks.data.read_text().splitlines(keepends=True)
    here[1].write_text("".join(reversed(lines)))
    assert_both_say(
        two_ranks, ("groups: expected the same on all ranks, got 48 groups ", " on rank 0 and 48 groups ", " on rank 1")
    )


def test_weights_are_missing_or_others_on_one_rank(two_ranks):
    model = two_ranks.folder / "model"
    folders = [two_ranks.folder / f"model_{rank}" for rank in (0, 1)]
    for folder in folders:
        shutil.copytree(model, folder)
    two_ranks.config["checkpointer"]["checkpoint_dir"] = str(two_ranks.folder / f"model_{RANK}")
    (folders[1] / "model.safetensors").unlink()
    assert_both_say(two_ranks, ("checkpointer: ", f"model.safetensors found in {folders[1]}"))
    (two_ranks.folder / "output.txt").unlink()
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in weights.items()}, folders[1] / "model.safetensors", {"format": "pt"}
    )
    assert_both_say(
        two_ranks,
        (
            "checkpointer.checkpoint_dir and adapter: expected the same on all ranks, got ",
            " on rank 0 and ",
            " on rank 1",
        ),
    )


def test_a_setting_is_another_on_one_rank(two_ranks):
    """Wrong on rank 0 alone, before it has met the other; without a value on rank 1 alone; or only different."""
    number = f"${{oc.decode:{RANK}}}"
    assert_both_say(two_ranks, ("batch_size: expected an integer of at least 1, got 0",), f"batch_size={number}")
    (two_ranks.folder / "output.txt").unlink()
    missing = f"seed=${{oc.decode:${{oc.env:NUMBER_{RANK}}}}}"
    assert_both_say(two_ranks, ("seed: cannot resolve its value", "NUMBER_1"), missing, NUMBER_0="0")
    (two_ranks.folder / "output.txt").unlink()
    assert_both_say(
        two_ranks,
        ("optimizer.weight_decay: expected the same on all ranks, got 0 on rank 0 and 1 on rank 1",),
        f"optimizer.weight_decay={number}",
    )


def test_a_checkpoint_is_another_on_one_rank(two_ranks):
    two_ranks.config["save_every_n_steps"] = 4
    two_ranks.train_on(2)
    (two_ranks.folder / "output.txt").unlink()
    steps = two_ranks.folder / "out" / "checkpoints"
    assert sorted(path.name for path in steps.iterdir()) == ["step_12", "step_8"]
    resumed = two_ranks.again("resumed")
    (two_ranks.folder / "step_0").symlink_to(steps / "step_8")
    (two_ranks.folder / "step_1").symlink_to(steps / "step_12")
    where = f"resume_from_checkpoint={two_ranks.folder}/step_{RANK}"
    assert_both_say(
        resumed, ("resume_from_checkpoint: expected the same on all ranks, got step 8", " on rank 0 and step 12"), where
    )


def test_a_log_on_a_full_disk_is_said_and_ends_no_run(trajectory, caplog):
    run = trajectory("dpo_8_k4")
    run.config["metric_logger"]["_component_"] = "toys.FullLogger"
    assert run.train() is None
    assert (
        "step 3: its metrics could not be logged: [Errno 28] No space left on device; training continues" in caplog.text
    )
    assert sorted(run.log()) == [step for step in range(1, 13) if step != 3]


def test_a_log_that_is_still_in_the_logger_s_buffer_ends_no_run_either(trajectory, caplog):
    run = trajectory("dpo_8_k4")
    (run.folder / "logs").mkdir()
    (run.folder / "logs" / "log.txt").symlink_to("/dev/full")
    assert run.train() is None
    assert "metric_logger: could not be closed: [Errno 28] No space left on device" in caplog.text


def test_an_error_of_the_disk_is_one_line_on_a_single_process_too(trajectory):
    run = trajectory("dpo_8_k4")
    run.config["dataset"] |= {"_component_": "toys.groups_but_on_rank_1", "error": "builtins.MemoryError"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        assert run.train() == f"{PROGRAM}MemoryError: no right"
    assert json.loads(run.data.read_text().splitlines()[0])  # which is there all the same
