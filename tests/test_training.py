"""The DPO recipe as a user runs it: real processes, real files, and what it leaves behind."""

import json
import math
import shutil
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchtune.models.llama3 import llama3
from torchtune.training import FullModelHFCheckpointer

from humanline.training import get_constant_schedule_with_warmup

pytestmark = pytest.mark.slow

RUN = "dpo_8_k4"


def assert_trained(run, *overrides):
    """Trains in this process; the recipe gives up with a line of text, and ends with None."""
    assert run.train(*overrides) is None


METRICS = ("loss", "lr", "grad_norm", "steps_since_sync")


def metrics(run):
    return {metric: run.log(metric) for metric in METRICS}


def final_weights(run):
    return load_file(run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors")


def test_a_resumed_run_continues_as_if_it_had_not_stopped(trajectory):
    run = trajectory(RUN)
    run.config |= {
        "save_every_n_steps": 5,
        "shuffle": True,
        "enable_activation_checkpointing": True,
        "lr_scheduler": {"_component_": "humanline.training.get_constant_schedule_with_warmup", "warmup_ratio": 0.95},
    }
    assert_trained(run)
    whole = metrics(run)
    final = (run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors").read_bytes()

    # The policy has moved twice since the sync at step 8, so the reference's own weights have to come back as well.
    checkpoints = run.folder / "out" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_5", "step_10"}
    (run.folder / "logs" / "log.txt").unlink()
    assert_trained(run, "resume_from_checkpoint=latest")
    assert metrics(run) == {metric: {step: whole[metric][step] for step in (11, 12)} for metric in METRICS}
    assert (run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors").read_bytes() == final


def test_a_resumed_run_on_two_ranks_rounds_stochastically_as_it_would_have(trajectory):
    run = trajectory(RUN)
    run.config |= {"batch_size": 2, "save_every_n_steps": 5, "dtype": "bf16", "master_dtype": "bf16"}
    run.config["optimizer"] = {"_component_": "humanline.training.StochasticAdamW", "lr": 0.002}
    run.train_on(2)
    whole, final = metrics(run), final_weights(run)
    (run.folder / "logs" / "log.txt").unlink()
    run.train_on(2, "resume_from_checkpoint=latest")
    assert metrics(run) == {metric: {step: whole[metric][step] for step in (11, 12)} for metric in METRICS}
    resumed = final_weights(run)
    assert all(torch.equal(final[name], resumed[name]) for name in final)


def test_a_new_run_in_a_folder_with_another_run_s_checkpoints_is_refused(trajectory):
    run = trajectory(RUN)
    run.config["save_every_n_steps"] = 5
    assert_trained(run)
    assert "out has checkpoints of an earlier run; continue it with resume_from_checkpoint: latest" in run.train()


def test_a_new_run_in_a_folder_with_another_run_s_logs_and_weights_is_refused(trajectory):
    run = trajectory(RUN)
    run.config["metric_logger"]["log_dir"] = str(run.folder / "out" / "logs")
    assert_trained(run, "max_steps_per_epoch=1")
    assert "out has logs and weights of an earlier run (epoch_0); use another folder" in run.train()
    assert "found no complete checkpoint" in run.train("resume_from_checkpoint=latest")
    shutil.rmtree(run.folder / "out" / "logs")
    assert_trained(run, "max_steps_per_epoch=1")


def test_the_adapter_s_folder_is_not_taken_for_a_model_s(trajectory):
    run = trajectory(RUN)
    (run.folder / "model" / "config.json").rename(run.folder / "model" / "adapter_config.json")
    assert "/model has an adapter, not a model; use a folder with the whole weights" in run.train()


def test_a_checkpoint_of_another_batch_or_loss_is_refused(trajectory):
    run = trajectory(RUN)
    run.config["save_every_n_steps"] = 5
    assert_trained(run)
    for override, difference in (
        ("batch_size=2", "groups a step 4, this run has 2"),
        ("shuffle=True", "shuffle False, this run has True"),
        ("loss.beta=0.5", "loss {'loss': 'HumanlineDPOLoss',"),
    ):
        assert f"step_10 was written with {difference}" in run.train("resume_from_checkpoint=latest", override)
    line = run.train("resume_from_checkpoint=latest", "batch_size=2", "gradient_accumulation_steps=2")
    assert "step_10 was written with groups a microbatch 4, this run has 2" in line
    assert run.train("resume_from_checkpoint=latest", "loss.label_smoothing=0.0") is None  # the default, written out


def test_the_final_weights_load_in_transformers_and_compute_the_same_function(trajectory):
    transformers = pytest.importorskip("transformers")
    run = trajectory(RUN)
    assert_trained(run, "max_steps_per_epoch=4")
    folder = run.folder / "out" / "epoch_0"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = llama3(**{key: value for key, value in run.config["model"].items() if key != "_component_"})
    checkpointer = FullModelHFCheckpointer(
        str(folder), ["model-00001-of-00001.safetensors"], "LLAMA3", str(run.folder / "elsewhere")
    )
    ours.load_state_dict(checkpointer.load_checkpoint()["model"])
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens).logits, ours(tokens), atol=1e-5, rtol=0)

    before = load_file(run.folder / "model" / "model.safetensors")
    after = load_file(folder / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulating_gradients_and_several_passes_equal_one_large_microbatch(trajectory, accumulation):
    run = trajectory(RUN)
    run.config |= {"batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation, "rows_per_pass": 1}
    assert_trained(run)
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)
    assert run.log("grad_norm")[1] == pytest.approx(gradient_norm_of_the_first_batch(run), abs=1e-5)


def gradient_norm_of_the_first_batch(run):
    """Before any sync the policy is its reference, so every pair has the margin 0 and the loss the slope -1/2 there."""
    decoder = llama3(**{key: value for key, value in run.config["model"].items() if key != "_component_"})
    checkpointer = FullModelHFCheckpointer(
        str(run.folder / "model"), ["model.safetensors"], "LLAMA3", str(run.folder / "elsewhere")
    )
    decoder.load_state_dict(checkpointer.load_checkpoint()["model"])

    def log_prob(prompt, response):
        tokens = torch.tensor(prompt + response)
        logps = decoder(tokens[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
        return logps.gather(1, tokens[len(prompt) :, None]).sum()

    batch = run.golden["batches"][0]
    margins = [log_prob(x["prompt"], x["chosen"]) - log_prob(x["prompt"], x["rejected"]) for x in batch]
    (-0.5 * run.golden["beta"] * torch.stack(margins).mean()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()]).norm().item()


def test_activation_checkpointing_changes_no_loss(trajectory):
    run = trajectory(RUN)
    assert_trained(run, "enable_activation_checkpointing=True")
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


def test_compiled_layers_change_no_loss(trajectory):
    run = trajectory(RUN)
    assert_trained(run, "compile=True", "max_steps_per_epoch=5")
    assert list(run.log().values()) == pytest.approx(run.golden["losses"][:5], abs=1e-5)


def test_ranks_with_unequal_numbers_of_passes_wait_for_each_other(trajectory):
    run = trajectory(RUN)
    # One row a pass, and groups of very different length: the ranks need different numbers of passes.
    run.config |= {"batch_size": 2, "rows_per_pass": 1, "tokens_per_row": 64}
    run.train_on(2)
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)
    assert run.log("grad_norm")[1] == pytest.approx(gradient_norm_of_the_first_batch(run), abs=1e-5)


def test_an_epoch_that_ends_early_starts_the_next_one_over(trajectory):
    run = trajectory(RUN)
    run.config["optimizer"]["lr"] = 0.0
    assert_trained(run, "epochs=2", "max_steps_per_epoch=3")
    seen = list(run.log("log_probs/chosen").values())
    assert seen[:3] == seen[3:] and len(set(seen)) == 3
    assert {path.name for path in (run.folder / "out").glob("epoch_*")} == {"epoch_0", "epoch_1"}


def test_bf16_compute_keeps_float32_masters_and_starts_at_ln_2(trajectory):
    run = trajectory(RUN)
    assert_trained(run, "dtype=bf16", "max_steps_per_epoch=8")
    losses = run.log()
    assert losses[1] == pytest.approx(math.log(2), abs=1e-7)
    assert list(losses.values()) == pytest.approx(run.golden["losses"][:8], abs=5e-3)
    assert losses[8] != run.golden["losses"][7]  # it did compute in another dtype
    weights = load_file(run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], weights[name].bfloat16().float())


def test_bf16_weights_with_stochastic_rounding_train(trajectory):
    run = trajectory(RUN)
    run.config["batch_size"] = 2
    run.config["optimizer"] = {"_component_": "humanline.training.StochasticAdamW", "lr": 0.002}
    run.train_on(2, "dtype=bf16", "master_dtype=bf16", "max_steps_per_epoch=8")
    losses = run.log()
    assert losses[1] == pytest.approx(math.log(2), abs=1e-7)
    assert len(set(losses.values())) == 8
    assert "rounds most updates away" not in (run.folder / "output.txt").read_text()
    weights = load_file(run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_what_takes_long_is_announced(trajectory, caplog, monkeypatch):
    monkeypatch.setattr("humanline.checkpoint._weights._ANNOUNCED", 0)
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    run = trajectory(RUN)
    assert_trained(run, "compile=True", "max_steps_per_epoch=1")
    assert f"{run.folder / 'model'}: reading the weights; it holds 0.0 GB" in caplog.text
    assert "compile: the first step also compiles the layers" in caplog.text


def test_bf16_weights_without_stochastic_rounding_are_warned_of(trajectory, caplog):
    run = trajectory(RUN)
    assert_trained(run, "dtype=bf16", "master_dtype=bf16", "max_steps_per_epoch=1")
    assert "rounds most updates away" in caplog.text


def test_held_out_groups_are_measured_against_the_initial_policy(trajectory):
    run = trajectory(RUN)
    run.config |= {
        "dataset_val": {"_component_": "humanline.data.encoded_groups", "source": str(run.data), "split": "train[:7]"},
        "run_val_every_n_steps": 5,
        "rows_per_pass": 1,
    }
    assert_trained(run)
    one = run.log("val/loss")
    run.config["batch_size"] = 2
    (run.folder / "logs" / "log.txt").unlink()
    run.train_on(2)
    two = run.log("val/loss")
    assert list(one) == [0, 5, 10, 12]
    assert one[0] == pytest.approx(math.log(2), abs=1e-7)
    assert one == pytest.approx(two, abs=1e-5)
    # The reference synced at step 12, and the policy moved once since: against it the held-out loss would be ln 2
    # almost exactly.
    assert abs(one[12] - math.log(2)) > 1e-3


def test_a_component_is_left_out_by_null_on_the_command_line(trajectory):
    run = trajectory(RUN)
    run.config["dataset_val"] = {"_component_": "humanline.data.encoded_groups", "source": str(run.data)}
    assert_trained(run, "dataset_val=null", "lr_scheduler=null", "max_steps_per_epoch=1")
    assert not run.log("val/loss")
    assert "loss: missing" in run.train("loss=null")


def test_the_log_has_what_every_objective_logs(trajectory):
    run = trajectory(RUN)
    assert_trained(run, "max_steps_per_epoch=6")
    for metric in ("loss", "rewards/margins", "kl", "grad_norm", "lr", "tokens_per_second", "steps_since_sync"):
        assert len(run.log(metric)) == 6, metric
    assert list(run.log("unclamped")) == [2, 3, 4, 5, 6]  # at step 1 no token has moved
    assert [run.log("steps_since_sync")[step] for step in (3, 4, 5, 6)] == [3, 0, 1, 2]


def test_the_profiler_writes_a_trace(trajectory):
    run = trajectory(RUN)
    run.config["profiler"] = {
        "_component_": "torchtune.training.setup_torch_profiler",
        "enabled": True,
        "cuda": False,
        "xpu": False,
        "output_dir": str(run.folder / "trace"),
        "wait_steps": 1,
        "warmup_steps": 1,
        "active_steps": 1,
        "num_cycles": 1,
    }
    assert_trained(run, "max_steps_per_epoch=4")
    assert list((run.folder / "trace").rglob("*.trace.json*"))


def test_warm_up_is_linear_and_then_constant():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_constant_schedule_with_warmup(optimizer, num_training_steps=40, warmup_ratio=0.1)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_a_component_may_stand_in_the_working_directory(trajectory, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text("from humanline.losses import HumanlineDPOLoss\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    run = trajectory(RUN)
    run.config["loss"]["_component_"] = "my_losses.HumanlineDPOLoss"
    assert_trained(run, "max_steps_per_epoch=1")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a word for a switch": ({"shuffle": "maybe"}, "shuffle: expected a boolean, got 'maybe'"),
    "a negative rate": ({"optimizer.lr": -1.0}, "optimizer: Invalid learning rate: -1.0"),
    "fp16": ({"dtype": "fp16"}, "dtype: expected bf16 or fp32, got 'fp16'; the range of float16"),
    "negative sync_every": (
        {"reference.sync_every": -1},
        "reference.sync_every: expected a positive integer or null (never sync), got -1",
    ),
    "a ratio for a bound": ({"loss.log_eps_P": 0.8}, "loss.log_eps_P: got 0.8, expected a number of at most 0 nats"),
    "unknown key": ({"bach_size": 2}, "bach_size: not a key of this recipe; did you mean batch_size?"),
    "unknown component argument": (
        {"loss.betta": 1.0},
        "loss.betta: humanline.losses.HumanlineDPOLoss has no such argument",
    ),
    "unknown component": ({"loss._component_": "humanline.losses.Nope"}, "loss._component_: cannot load"),
    "missing component": ({"reference": None}, "reference: missing"),
    "missing data": ({"dataset.source": "nowhere.jsonl"}, "nowhere.jsonl"),
    "too large a step": ({"batch_size": 1000}, "batch_size: a step needs 1000 x 1 accumulated x 1 ranks = 1000 groups"),
    "a model too short for the data": ({"model.max_seq_len": 16}, "positions, the model has 16 (max_seq_len)"),
    "too short a row": ({"tokens_per_row": 8}, "a row holds 8; raise tokens_per_row"),
    "another architecture": ({"model.embed_dim": 32}, "has another architecture than model"),
    "missing weights": ({"checkpointer.checkpoint_files": ["nope.safetensors"]}, "checkpointer:"),
    "missing checkpoint folder": ({"checkpointer.checkpoint_dir": "nowhere"}, "checkpointer: nowhere"),
    "nothing to resume from": (
        {"resume_from_checkpoint": "latest"},
        "resume_from_checkpoint: found no complete checkpoint",
    ),
    "offloading on a CPU": (
        {"enable_activation_offloading": True},
        "enable_activation_offloading: expected False without a GPU, got True",
    ),
    "finer compute than weights": (
        {"master_dtype": "bf16"},
        "master_dtype: expected fp32 with dtype: fp32, got 'bf16'",
    ),
    "a seed that torch does not take": (
        {"seed": 2**32},
        "seed: expected an integer of at least 0 and below 2^32, got 4294967296",
    ),
    "a number for an adapter": ({"adapter": 5}, "adapter: expected a string or null, got 5"),
    "no epochs": ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
    "a warm-up in steps": (
        {"lr_scheduler": {"_component_": "humanline.training.get_constant_schedule_with_warmup", "warmup_ratio": 10}},
        "lr_scheduler.warmup_ratio: expected a share of the steps from 0 to 1, such as 0.1, got 10",
    ),
    "a watch that is not kept": (
        {"collapse_window": None, "stop_on_collapse": True},
        "stop_on_collapse: expected False with collapse_window: null, got True",
    ),
    "a best of nothing": (
        {"best_checkpoint_metric": "val/loss", "run_val_every_n_steps": 1, "save_every_n_steps": 1},
        "best_checkpoint_metric: needs dataset_val, which is missing",
    ),
    "a reward of nothing": ({"reward": {"_component_": "toys.MeanToken"}}, "reward: not used with dataset"),
    "no such device": ({"device": "abacus"}, "device: expected cuda or cpu, got 'abacus'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_ends_the_run_with_one_line_before_training(trajectory, mistake):
    changes, message = MISTAKES[mistake]
    run = trajectory(RUN)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = run.config
        for parent in parents:
            node = node[parent]
        node[last] = value
    line = run.train()
    assert line.startswith("humanline_dpo_distributed.py: ") and message in line
    assert "\n" not in line
    assert not (run.folder / "logs" / "log.txt").exists()


def test_a_token_that_the_model_does_not_know_ends_the_run_with_its_line(trajectory):
    run = trajectory(RUN)
    lines = run.data.read_text().splitlines()
    lines[6] = json.dumps({"prompt": [1, 2], "responses": [[3], [256]]})
    run.data.write_text("\n".join(lines))
    assert f"{run.data} line 7: token id 256 is outside the model's vocabulary of 256" in run.train()


def test_a_bad_line_ends_the_run_with_its_number(trajectory):
    run = trajectory(RUN)
    lines = run.data.read_text().splitlines()
    lines[6] = json.dumps({"prompt": [1, 2], "responses": [[3], [3]]})
    run.data.write_text("\n".join(lines))
    done = run.tune("dataset.on_bad_row=stop", check=False)
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"humanline_dpo_distributed.py: {run.data} line 7: field 'responses'")
    assert "Traceback" not in done.stderr


def test_a_dropped_row_is_counted_in_log_and_metrics(trajectory, caplog):
    run = trajectory(RUN)
    lines = run.data.read_text().splitlines()
    run.data.write_text("\n".join([*lines, json.dumps({"prompt": [1, 2], "responses": [[3], [3]]})]))
    assert run.train("max_steps_per_epoch=1") is None
    assert set(run.log("dropped_rows").values()) == {1.0}
    place = f"{run.data} line {len(lines) + 1}"
    assert f"1 row dropped: 'responses' has two equal entries (1, the first: {place})" in caplog.text
