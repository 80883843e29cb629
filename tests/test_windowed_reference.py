"""The windowed reference: a second model's losses without a second model."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from humanline.errors import ConfigError
from humanline.reference import RunContext, WindowedReference

OBJECTIVES = ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"]
WINDOWED = "humanline.reference.WindowedReference"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "humanline"


def windowed(run):
    run.config["reference"]["_component_"] = WINDOWED
    return run


def losses(run, *overrides):
    (run.folder / "logs" / "log.txt").unlink(missing_ok=True)
    assert run.train(*overrides) is None
    return run.log()


# Each period with each accumulation, on one process or on two ranks.
@pytest.mark.parametrize(("sync_every", "accumulation"), [(1, 1), (4, 2), (None, 1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_has_the_losses_of_a_second_model(trajectory, name, sync_every, accumulation):
    run = shuffled(trajectory(name), sync_every, accumulation)
    second_model = losses(run)
    assert len(second_model) == 24 and len(set(second_model.values())) > 20
    assert losses(windowed(run)) == pytest.approx(second_model, abs=1e-5)


@pytest.mark.parametrize(("sync_every", "accumulation"), [(1, 2), (4, 1), (None, 2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_two_ranks_it_has_the_losses_of_a_second_model(trajectory, name, sync_every, accumulation, cache):
    run = shuffled(trajectory(name), sync_every, accumulation, ranks=2)
    run.train_on(2)
    second_model = run.log()
    assert len(second_model) == 24 and len(set(second_model.values())) > 20
    (run.folder / "logs" / "log.txt").unlink()
    windowed(run).train_on(2, XDG_CACHE_HOME=str(cache.parent))
    assert run.log() == pytest.approx(second_model, abs=1e-5)


def shuffled(run, sync_every, accumulation, ranks=1):
    """24 steps in several epochs, each of which brings the groups among other neighbours."""
    groups = max(len(run.golden["batches"][0]), accumulation * ranks)
    run.config |= {
        "shuffle": True,
        "batch_size": groups // (accumulation * ranks),
        "gradient_accumulation_steps": accumulation,
        "epochs": 2 * groups // len(run.golden["batches"][0]),
    }
    run.config["reference"]["sync_every"] = sync_every
    return run


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("name", ["dpo_7_k1", "dpo_8_k4", "kto_7_k1", "kto_8_k4", "grpo_7_k1", "grpo_8_k4"])
def test_it_has_the_losses_of_the_authors_code(trajectory, name, nproc):
    run = windowed(trajectory(name))
    run.config["batch_size"] //= nproc
    run.train_on(nproc)
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


def test_on_two_ranks_it_resumes_as_if_it_had_not_stopped(trajectory):
    run = windowed(shuffled(trajectory("kto_8_k4"), 4, 1, ranks=2))
    run.config["save_every_n_steps"] = 10
    run.train_on(2)
    whole = run.log()
    (run.folder / "logs" / "log.txt").unlink()
    run.train_on(2, "resume_from_checkpoint=latest")
    assert run.log() == {step: whole[step] for step in (21, 22, 23, 24)}


def test_gradients_of_the_step_survive_the_window(trajectory):
    run = trajectory("dpo_7_k1")
    losses(run)
    second_model = run.log("grad_norm")
    (run.folder / "logs" / "log.txt").unlink()
    losses(windowed(run), "enable_activation_checkpointing=True")
    assert run.log("grad_norm") == pytest.approx(second_model, abs=1e-5)


def test_an_adapter_s_windowed_reference_has_the_losses_of_its_own(trajectory):
    run = trajectory("dpo_8_k4")
    run.recipe = run.recipe.with_name("humanline_dpo_single_device.py")
    run.config["model"] |= {
        "_component_": "torchtune.models.llama3.lora_llama3",
        "lora_attn_modules": ["q_proj", "v_proj"],
        "lora_rank": 4,
        "lora_alpha": 8.0,
    }
    run.config["optimizer"]["lr"] = 0.02
    run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
    expected = losses(run)
    assert losses(windowed(run)) == pytest.approx(expected, abs=1e-6)


def test_a_longer_run_than_its_window_is_refused(trajectory):
    run = windowed(trajectory("dpo_8_k4"))
    run.config["save_every_n_steps"] = 6
    run.config["reference"]["sync_every"] = 5
    losses(run)
    line = run.train("resume_from_checkpoint=latest", "epochs=2")
    assert "its window of reference log-probs ends with step 12, the last step of that run" in line
    step = run.folder / "out" / "checkpoints" / "step_6"
    assert len(losses(run, f"resume_from_checkpoint={step}", "epochs=2")) == 18


# ---- Frozen: kept on disk


def frozen(run):
    return windowed(shuffled(run, None, 1))


def test_a_frozen_reference_is_taken_once_and_later_runs_read_it(trajectory, cache, monkeypatch):
    run = frozen(trajectory("kto_8_k4"))
    first = losses(run)
    (file,) = cache.glob("*/*.safetensors")
    written = file.stat().st_mtime_ns
    shutil.rmtree(run.folder / "out")
    assert losses(run) == first
    assert [path.stat().st_mtime_ns for path in cache.glob("*/*")] == [written]
    # What it reads is what it uses.
    table = load_file(file)
    save_file({key: tensor - 0.1 for key, tensor in table.items()}, file)
    assert losses(run)[1] != pytest.approx(first[1], abs=1e-3)


def test_other_groups_are_added_to_what_is_kept(trajectory, cache):
    run = frozen(trajectory("dpo_8_k4"))
    run.config["dataset"]["split"] = "train[:24]"
    run.config["epochs"] = 1
    losses(run)
    (first,) = cache.glob("*/*.safetensors")
    run.config["dataset"]["split"] = "train"
    losses(run)
    (second,) = set(cache.glob("*/*.safetensors")) - {first}
    assert first.parent == second.parent
    a, b = load_file(first), load_file(second)
    assert len(a) == len(b) == 48 and not a.keys() & b.keys()


def test_other_weights_have_another_fingerprint(trajectory, cache):
    run = frozen(trajectory("dpo_8_k4"))
    losses(run)
    file = run.folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    losses(run)
    losses(run, "dtype=bf16")
    assert len(list(cache.iterdir())) == 3


def test_a_kept_file_that_cannot_be_read_is_taken_anew(trajectory, cache, caplog):
    run = frozen(trajectory("dpo_8_k4"))
    first = losses(run)
    (file,) = cache.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert losses(run) == first
    assert f"{file}: " in caplog.text and "its log-probs are recomputed" in caplog.text


def test_a_frozen_reference_of_other_weights_is_not_resumed_with(trajectory):
    run = frozen(trajectory("dpo_8_k4"))
    run.config["save_every_n_steps"] = 10
    losses(run)
    whole = run.log()
    assert losses(run, "resume_from_checkpoint=latest") == {step: whole[step] for step in (21, 22, 23, 24)}
    file = run.folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert "its frozen reference had other weights" in run.train("resume_from_checkpoint=latest")


# ---- What it asks of the source


def test_a_source_that_samples_after_the_sync_is_refused():
    context = RunContext(policy=nn.Module(), model=None, passes=None, total_steps=1, resumes=False)
    with pytest.raises(ConfigError, match="this source samples their groups later; use humanline.reference.ModelRef"):
        WindowedReference().build(context)
