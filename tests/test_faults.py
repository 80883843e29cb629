"""Whatever ends a run, going on from what it left is as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, logged_steps, wait_until
from safetensors.torch import load_file, save_file
from test_online import online
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from humanline.training._collapse import CollapseWatch

pytestmark = pytest.mark.slow

RUN = "dpo_8_k4"
PAST_THE_VOCABULARY_S_MIDDLE = 200


def saving(run, every=2, **settings):
    """A run of 24 shuffled steps with checkpoints."""
    run.config |= {"save_every_n_steps": every, "shuffle": True, "epochs": 2, **settings}
    return run


def folder(run):
    return run.folder / "out" / "checkpoints"


def partial_files(run):
    try:
        return list(folder(run).glob("*.partial/*"))
    except FileNotFoundError:  # became whole between two looks
        return []


def saved_steps(run):
    names = (path.name.removeprefix("step_") for path in folder(run).glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def final_weights(run, epoch=1):
    return load_file(run.folder / "out" / f"epoch_{epoch}" / "model-00001-of-00001.safetensors")


def assert_same_end(run, other, tolerance=0.0):
    assert run.log() == pytest.approx(other.log(), abs=tolerance)
    ours, theirs = final_weights(run), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0)


def stopped(run, step, number=signal.SIGTERM, resume=(), **arguments):
    """Starts the run, and sends one of its ranks a signal once ``step`` is logged anew; returns its output."""
    before = len(logged_steps(run))
    with run.start(*resume, **arguments) as ranks:
        wait_until(lambda: step in logged_steps(run)[before:], ranks)
        os.kill(ranks.processes[-1].pid, number)
        assert ranks.wait() == [0] * len(ranks.processes), ranks.output()
        return ranks.output()


# ---- Killed


@pytest.mark.parametrize(
    ("name", "nproc", "reference", "in_background"),
    [
        ("dpo_8_k4", 1, "ModelReference", False),
        ("kto_8_k4", 1, "WindowedReference", True),
        ("grpo_8_k4", 2, "WindowedReference", False),
        ("dpo_7_k1", 2, "ModelReference", True),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    trajectory, name, nproc, reference, in_background
):
    """Four kills come at random moments after a new step, the last of them after a save, and one in a save.

    There is a save at every step.
    """
    whole = saving(trajectory(name), every=1, enable_async_checkpointing=in_background)
    whole.config["reference"]["_component_"] = f"humanline.reference.{reference}"
    whole.config["batch_size"] //= nproc
    killed = whole.again("killed")
    whole.train_on(nproc)

    moment = random.Random(name)
    resume: list[str] = []
    for kill in range(5):
        before = logged_steps(killed)
        newest = max(saved_steps(killed), default=0)
        with killed.start(*resume, nproc=nproc) as ranks:
            wait_until(lambda before=before: len(logged_steps(killed)) > len(before), ranks)
            if kill == 2:
                wait_until(lambda: partial_files(killed), ranks)
            else:
                if kill == 4:
                    wait_until(lambda: saved_steps(killed), ranks)
                ranks.processes[0].join(moment.uniform(0, 0.25))
            moment.choice(ranks.processes).kill()
        new = logged_steps(killed)[len(before) :]
        assert new[0] == newest + 1  # nothing but the steps since the last checkpoint was lost
        resume = ["resume_from_checkpoint=latest"] if saved_steps(killed) else []
    killed.train_on(nproc, "resume_from_checkpoint=latest")
    assert logged_steps(killed)[-1] == 24
    assert_same_end(killed, whole, tolerance=0 if nproc == 1 else 1e-6)


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_goes_on_and_no_other_run_does(trajectory):
    whole = saving(trajectory(RUN), every=1)
    whole.config["batch_size"] //= 2
    whole.train_on(2)
    run = whole.again("restarted")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    command = [sys.executable, *torchrun, str(run.recipe), "--config", str(run._write_config())]
    with open(run.folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            deadline = time.monotonic() + 120
            while max(saved_steps(run), default=0) < 4:
                assert process.poll() is None and time.monotonic() < deadline, (run.folder / "output.txt").read_text()
            rank_0 = json.loads((run.folder / "out" / ".lock").read_text())["process"]
            os.kill(rank_0, signal.SIGKILL)
            assert process.wait(180) == 0, (run.folder / "output.txt").read_text()[-4000:]
        finally:
            process.kill()
    assert_same_end(run, whole, tolerance=1e-6)
    steps = logged_steps(run)
    assert len(steps) < 24 + 10 and steps[-1] == 24  # it went on, and did not begin again
    another = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert another.returncode != 0 and logged_steps(run) == steps
    assert another.stderr.count("has checkpoints of an earlier run") == 4  # by both ranks, also when started again


# ---- Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(trajectory, number):
    whole = saving(trajectory(RUN), every=None)
    whole.train_on(1)
    run = whole.again("stopped")
    output = stopped(run, 3, number)
    (step,) = saved_steps(run)
    assert step == logged_steps(run)[-1] < 24
    assert (
        f"stopped after step {step} by {number.name}; resume_from_checkpoint: latest resumes from step {step}" in output
    )
    run.train_on(1, "resume_from_checkpoint=latest")
    assert logged_steps(run) == list(range(1, 25))
    assert_same_end(run, whole)


def test_two_ranks_become_one_and_two_again(trajectory):
    """One of the ranks gets the signal, and both stop."""
    whole = saving(trajectory(RUN), every=None)
    run = whole.again("moved")
    whole.train_on(1)
    run.config["batch_size"] = 2
    stopped(run, 3, nproc=2)
    run.config |= {"batch_size": 4, "resume_from_checkpoint": "latest"}
    stopped(run, max(logged_steps(run)) + 3)
    run.config["batch_size"] = 2
    run.train_on(2)
    assert logged_steps(run) == list(range(1, 25))
    assert_same_end(run, whole, tolerance=1e-5)


# ---- Damaged


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped byte": (
        lambda step: flip_a_byte(step / "__0_0.distcp"),
        "the checksum of __0_0.distcp differs from SHA256SUMS",
    ),
    "a truncated file": (
        lambda step: os.truncate(step / ".metadata", 100),
        "the checksum of .metadata differs from SHA256SUMS",
    ),
    "a missing file": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no checksums": (lambda step: (step / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(trajectory, damage, caplog):
    do_damage, message = DAMAGES[damage]
    run = saving(trajectory(RUN), every=10)
    assert run.train() is None
    whole, steps = run.log(), len(logged_steps(run))
    weights = final_weights(run)
    assert saved_steps(run) == [10, 20]
    do_damage(folder(run) / "step_20")
    assert message in run.train(f"resume_from_checkpoint={folder(run) / 'step_20'}")
    assert run.train("resume_from_checkpoint=latest") is None
    assert message in caplog.text and "going back to the checkpoint before it" in caplog.text
    assert logged_steps(run)[steps:] == list(range(11, 25)) and run.log() == whole
    assert all(torch.equal(weights[name], tensor) for name, tensor in final_weights(run).items())
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder(run) / "step_20").returncode == 0

    for step in (10, 20):
        do_damage(folder(run) / f"step_{step}")
    assert "found no complete checkpoint in" in run.train("resume_from_checkpoint=latest")


# ---- No room


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(run, bytes)`` puts a run's output on a file system of that size."""
    mounted = set()

    def mount(run, size):
        out = run.folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        again = ["-o", "remount"] if out in mounted else []
        command = ["mount", "-t", "tmpfs", *again, "-o", f"size={size}", "tmpfs", str(out)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.add(out)

    yield mount
    for out in mounted:
        subprocess.run(["umount", str(out)], check=True)


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_fails_the_save_and_not_the_run(trajectory, small_disk, in_background):
    whole = saving(trajectory(RUN), every=4, enable_async_checkpointing=in_background)
    whole.train_on(1)
    one = size_of(folder(whole) / "step_24")
    run = whole.again("full")
    small_disk(run, int(2.5 * one))  # of three checkpoints at a time, and two epochs' weights
    run.train_on(1)
    output = (run.folder / "output.txt").read_text()
    assert "the checkpoint of step 12 could not be written: " in output and "GB are free in" in output
    assert "step_8 is still the newest, training continues" in output
    assert saved_steps(run) == [4, 8] and {path.name for path in folder(run).iterdir()} == {"step_4", "step_8"}
    assert run.log() == whole.log()

    small_disk(run, 10 * one)
    run.train_on(1, "resume_from_checkpoint=latest")
    assert logged_steps(run)[24:] == list(range(9, 25))
    assert_same_end(run, whole)


def test_final_weights_that_find_no_room_are_written_by_the_resumed_run(trajectory, small_disk):
    whole = saving(trajectory(RUN), every=10)
    whole.train_on(1)
    run = whole.again("full")
    checkpoint, weights = size_of(folder(whole) / "step_20"), size_of(whole.folder / "out" / "epoch_1")
    small_disk(run, 2 * checkpoint + weights + weights // 2)  # of two checkpoints and one epoch
    with run.start() as ranks:
        assert ranks.wait() == [1]
        assert "step 24: the weights of epoch 1 could not be written: " in ranks.output()
        assert "resume_from_checkpoint: latest resumes from step 20" in ranks.output()
    assert sorted(path.name for path in (run.folder / "out").glob("epoch_*")) == ["epoch_0"]
    small_disk(run, 10 * checkpoint)
    run.train_on(1, "resume_from_checkpoint=latest")
    assert logged_steps(run) == [*range(1, 25), *range(21, 25)]
    assert_same_end(run, whole)


def test_a_solved_run_does_not_say_that_weights_are_there_which_found_no_room(trajectory, small_disk):
    run = online(trajectory("grpo_8_k4"), every=2)
    run.config |= {"stop_after_empty_rounds": 2, "max_steps_per_epoch": 4, "epochs": 2}
    run.config["reward"] = {"_component_": "toys.Wrong", "then": 1.0}
    small_disk(run, 100_000)
    with run.start() as ranks:
        assert ranks.wait() == [1]
        assert "all right: every response has the highest score (1)" in ranks.output()
        assert (
            "; the weights of epoch 0 could not be written: " in ranks.output()
            and "the weights are in" not in ranks.output()
        )


# ---- Not finite


def poisoned(run, positions, token=PAST_THE_VOCABULARY_S_MIDDLE):
    """Gives the groups at some positions a token whose embedding is not a number."""
    file = run.folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    lines = [json.loads(line.replace(f"{token}", f"{token + 1}")) for line in run.data.read_text().splitlines()]
    for position in positions:
        lines[position]["prompt"][0] = token
    run.data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_with_its_group_named(trajectory, tmp_path):
    run = poisoned(trajectory(RUN), [6 * 4 + 3])  # step 7, the second rank's last group
    run.config |= {"batch_size": 2, "save_every_n_steps": 1, "keep_last_n_checkpoints": 12}
    run.train_on(2)
    output = (run.folder / "output.txt").read_text()
    warning = f"step 7 is skipped: its loss or gradient is not finite; groups: {run.data} line 28"
    assert output.count("is skipped") == 1 and warning in output
    assert sorted(run.log()) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert [run.log("skipped_steps")[step] for step in (6, 7, 12)] == [0, 1, 1]

    states = []
    for step in (6, 7, 8):
        dcp_to_torch_save(folder(run) / f"step_{step}", tmp_path / f"{step}.pt")
        states.append(torch.load(tmp_path / f"{step}.pt", weights_only=False)["policy"])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(states[1]["norm.scale"], states[2]["norm.scale"])


def test_steps_that_stay_not_finite_stop_the_run_with_a_state_to_go_on_from(trajectory):
    run = poisoned(trajectory(RUN), range(20, 48))  # from step 6 on
    run.config |= {"stop_after_nonfinite_steps": 3}
    line = run.train()
    assert "step 8: the last 3 losses or gradients were not finite (stop_after_nonfinite_steps)" in line
    assert line.endswith("resume_from_checkpoint: latest resumes from step 8")
    # The same config stops again, at the next such step; only a larger limit goes further.
    assert "step 9: the last 4 losses" in run.train("resume_from_checkpoint=latest")
    assert "step 11: the last 6 losses" in run.train("resume_from_checkpoint=latest", "stop_after_nonfinite_steps=6")


def test_a_first_step_that_is_not_finite_changes_nothing_by_being_saved(trajectory):
    run = poisoned(trajectory(RUN), [0])
    saved = run.again("saved")
    assert run.train() is None
    assert saved.train("save_every_n_steps=1") is None
    assert 1 not in run.log() and saved.log() == run.log()
    (saved.folder / "logs" / "log.txt").unlink()
    assert saved.train(f"resume_from_checkpoint={folder(saved) / 'step_11'}") is None
    assert saved.log() == {12: run.log()[12]}


# ---- Two runs


def test_a_second_run_in_the_same_folder_is_refused(trajectory):
    run = saving(trajectory(RUN), every=None)
    with run.start("epochs=1000") as ranks:
        wait_until(lambda: 1 in logged_steps(run), ranks)
        lock = json.loads((run.folder / "out" / ".lock").read_text())
        assert lock["process"] == ranks.processes[0].pid
        assert f"is in use by another run (process {lock['process']} on {lock['host']}); use a different" in run.train()
        assert ranks.processes[0].is_alive()


# ---- What is kept


def test_writing_in_the_background_changes_nothing(trajectory):
    run = saving(trajectory(RUN), every=3)
    background = run.again("background")
    assert run.train() is None
    assert background.train("enable_async_checkpointing=True") is None
    assert_same_end(background, run)
    assert saved_steps(background) == saved_steps(run) == [21, 24]
    states = []
    for each in (run, background):
        dcp_to_torch_save(folder(each) / "step_21", each.folder / "state.pt")
        states.append(torch.load(each.folder / "state.pt", weights_only=False))
    for part in ("policy", "reference"):
        ours, theirs = states[0][part], states[1][part]
        ours, theirs = (ours["model"], theirs["model"]) if part == "reference" else (ours, theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_metrics_between_two_log_entries_are_not_lost(trajectory):
    run = saving(trajectory(RUN), every=7, log_every_n_steps=5)
    assert run.train() is None
    whole = run.log()
    (run.folder / "logs" / "log.txt").unlink()
    assert run.train(f"resume_from_checkpoint={folder(run) / 'step_14'}") is None
    assert list(whole) == [5, 10, 15, 20, 24] and run.log() == {step: whole[step] for step in (15, 20, 24)}


def test_the_newest_and_the_best_checkpoints_are_kept_and_the_best_weights_written(trajectory):
    run = saving(trajectory(RUN), every=2, run_val_every_n_steps=2, keep_last_n_checkpoints=1)
    run.config["dataset_val"] = {"_component_": "humanline.data.encoded_groups", "source": str(run.data)}
    run.config["optimizer"]["lr"] = 0.05  # too high, so that the best does not come last
    run.config |= {"best_checkpoint_metric": "val/loss", "best_checkpoint_mode": "min"}
    assert run.train() is None
    losses = run.log("val/loss")
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert saved_steps(run) == [best, 24] and best < 24
    weights = load_file(run.folder / "out" / "best" / "model-00001-of-00001.safetensors")
    dcp_to_torch_save(folder(run) / f"step_{best}", run.folder / "best.pt")
    policy = torch.load(run.folder / "best.pt", weights_only=False)["policy"]
    assert torch.equal(weights["model.norm.weight"], policy["norm.scale"])
    assert not torch.equal(weights["model.norm.weight"], final_weights(run)["model.norm.weight"])


def test_a_best_metric_that_cannot_be_had_is_refused(trajectory):
    run = saving(trajectory(RUN), every=3, best_checkpoint_metric="val/nope")
    run.config["dataset_val"] = {"_component_": "humanline.data.encoded_groups", "source": str(run.data)}
    assert "set run_val_every_n_steps, and save_every_n_steps to a multiple of it" in run.train()
    line = run.train("run_val_every_n_steps=3")
    assert "best_checkpoint_metric: expected one of val/" in line and line.endswith(", got val/nope")


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(trajectory, caplog):
    run = saving(trajectory(RUN), every=8, run_val_every_n_steps=8, keep_last_n_checkpoints=3)
    run.config["dataset_val"] = {"_component_": "humanline.data.encoded_groups", "source": str(run.data)}
    run.config |= {"best_checkpoint_metric": "val/loss", "best_checkpoint_mode": "min"}
    run.config["optimizer"]["lr"] = 0.05  # too high, so that the best does not come last
    assert run.train() is None
    losses = {step: loss for step, loss in run.log("val/loss").items() if step}
    first, second, _ = sorted(losses, key=losses.__getitem__)
    flip_a_byte(folder(run) / f"step_{first}" / "__0_0.distcp")
    assert run.train("resume_from_checkpoint=latest") is None
    assert f"best: the weights of step {second}, by val/loss" in caplog.text
    # Scores of another metric are not compared with these.
    assert run.train("resume_from_checkpoint=latest", "best_checkpoint_metric=val/rewards/margins") is None
    assert "by val/rewards/margins" not in caplog.text


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(trajectory):
    run = saving(trajectory(RUN), every=10, keep_last_n_checkpoints=3)
    whole = run.again("whole")
    whole.train_on(1)
    run.train_on(1)
    stopped(run, 13, resume=[f"resume_from_checkpoint={folder(run) / 'step_10'}"])
    assert {path.name for path in folder(run).iterdir()} == {
        "step_10",
        f"step_{saved_steps(run)[-1]}",
        "step_20.abandoned",
    }
    run.train_on(1, "resume_from_checkpoint=latest")
    assert_same_end(run, whole)


def test_another_run_s_checkpoint_goes_into_a_folder_of_its_own(trajectory):
    run = saving(trajectory(RUN), every=10)
    assert run.train() is None
    other = run.again("other")
    step = folder(run) / "step_10"
    assert other.train(f"resume_from_checkpoint={step}") is None
    assert other.log() == {step: loss for step, loss in run.log().items() if step > 10}
    assert f"{step} is not in output_dir, and output_dir already has checkpoints" in other.train(
        f"resume_from_checkpoint={step}"
    )


def test_a_resumed_run_may_change_the_optimizer_s_settings(trajectory):
    run = saving(trajectory(RUN), every=10)
    run.config["lr_scheduler"] = {
        "_component_": "humanline.training.get_constant_schedule_with_warmup",
        "warmup_ratio": 0.75,
    }
    assert run.train() is None
    rates = run.log("lr")
    resume = f"resume_from_checkpoint={folder(run) / 'step_10'}"
    assert run.train(resume, f"optimizer.lr={run.config['optimizer']['lr'] / 4}") is None
    assert [run.log("lr")[step] for step in (11, 17, 24)] == pytest.approx([rates[step] / 4 for step in (11, 17, 24)])


def test_what_a_user_puts_beside_the_checkpoints_stays(trajectory):
    run = saving(trajectory(RUN), every=6)
    mine = folder(run) / "before the experiment"
    mine.mkdir(parents=True)
    assert run.train() is None
    assert mine.is_dir() and saved_steps(run) == [18, 24]


def test_a_state_that_cannot_be_copied_is_written_directly(trajectory, caplog):
    from test_adapters import one_device, quantize, with_lora

    run = saving(quantize(with_lora(one_device(trajectory("dpo_7_k1")), lora_rank=16)), every=10)
    run.config["optimizer"] = {"_component_": "torchao.optim.AdamW8bit", "lr": 0.02}
    assert run.train("enable_async_checkpointing=True") is None
    assert saved_steps(run) == [10, 20]
    whole = run.log()
    (run.folder / "logs" / "log.txt").unlink()
    assert run.train("resume_from_checkpoint=latest") is None
    assert run.log() == {step: whole[step] for step in (21, 22, 23, 24)}


def test_weights_that_would_go_elsewhere_are_refused_at_the_start(trajectory):
    line = trajectory(RUN).train("checkpointer.output_dir=elsewhere")
    assert (
        "checkpointer.output_dir: expected output_dir (" in line and "), got elsewhere; set it to ${output_dir}" in line
    )


# ---- Collapse


def watched(signals, kls):
    watch = CollapseWatch("reward", window=20)
    pairs = zip(signals, kls, strict=True)
    return [warning for signal, kl in pairs for warning in watch.add({"reward": signal, "kl": kl})]


def test_a_signal_that_falls_while_the_kl_grows_is_a_collapse():
    noise = random.Random(0)
    steps = range(40)
    flat = [1 + noise.gauss(0, 0.05) for _ in steps]
    falling = [1 - step / 40 + noise.gauss(0, 0.05) for step in steps]
    growing = [0.01 + step / 1000 + noise.gauss(0, 0.001) for step in steps]
    still = [0.01 + noise.gauss(0, 0.001) for _ in steps]
    assert len(watched(falling, growing)) == 2  # once a window
    assert "the signal fell from" in watched(falling, growing)[0]
    assert not watched(flat, growing) and not watched(falling, still) and not watched(flat, still)
    assert not watched([-x for x in falling], growing) and not watched(falling, [-x for x in growing])


def test_a_run_that_collapses_is_warned_of_or_stopped(trajectory, caplog):
    """Against a frozen reference, whose margins first grow and then fall when every pair is turned around."""
    run = trajectory(RUN)
    lines = [json.loads(line) for line in run.data.read_text().splitlines()]
    turned = [{**line, "responses": line["responses"][::-1]} for line in lines]
    run.data.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:24], *turned[:24]]))
    run.config["reference"]["sync_every"] = None
    run.config |= {"collapse_window": 12, "batch_size": 4}
    run.config["loss"] |= {"perception": "none", "log_eps_P": None, "log_eps_R": None}
    run.config["optimizer"]["lr"] = 0.005
    assert run.train() is None
    assert "rewards/margins: over the last 12 logged steps the signal fell from" in caplog.text
    other = run.folder / "other"
    line = run.train("stop_on_collapse=True", f"output_dir={other}", f"checkpointer.output_dir={other}")
    assert "(stop_on_collapse); resume_from_checkpoint: latest resumes from step 12" in line
