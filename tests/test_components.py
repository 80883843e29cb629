"""What a config names is found, has its packages and its arguments, before the weights are read."""

import sys
from math import cos, pi

import pytest
from safetensors.torch import load_file
from toys import RecordingAdamW

SCHEDULES = "torch.optim.lr_scheduler"


@pytest.fixture
def run(trajectory):
    """A run whose weights cannot be read: what it is refused for is found before."""
    run = trajectory("dpo_8_k4")
    (run.folder / "model" / "model.safetensors").write_bytes(b"no weights")
    return run


@pytest.mark.parametrize(
    ("logger", "package"),
    [("WandBLogger", "wandb"), ("CometLogger", "comet-ml"), ("TensorBoardLogger", "tensorboard")],
)
def test_a_missing_logger_package_is_named_with_the_command_that_installs_it(run, logger, package, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not installed
    run.config["metric_logger"]["_component_"] = f"torchtune.training.metric_logging.{logger}"
    del run.config["metric_logger"]["filename"]
    assert run.train() == (
        f"humanline_dpo_distributed.py: metric_logger._component_: torchtune.training.metric_logging.{logger} "
        f"cannot be used: the package {package} is not installed; install it: pip install {package}"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer=bitsandbytes.optim.AdamW8bit",), "no module bitsandbytes; correct the name, or run in the folder"),
        (
            ("optimizer=needs_sklearn.Adam",),
            "cannot load 'needs_sklearn.Adam': the package scikit-learn is not installed; in",
        ),
        (("optimizer=broken.Adam",), "cannot load 'broken.Adam': NameError: name 'nowhere' is not defined ("),
        (
            ("optimizer=torch.optim.AdmW",),
            "optimizer._component_: cannot load 'torch.optim.AdmW': torch.optim has no AdmW; did you mean AdamW?",
        ),
        (("model=torchtune.models.llama3.lama3",), "torchtune.models.llama3 has no lama3; did you mean llama3?"),
        (("loss=humanline.losses",), "loss._component_: expected a class or function, got the module humanline.losses"),
        (("loss=5",), "loss._component_: expected a dotted path, such as torch.optim.AdamW, got 5"),
        (
            ("loss=humanline..losses",),
            "loss._component_: expected a dotted path, such as torch.optim.AdamW, got 'humanline..losses'",
        ),
        (
            ("optimizer.lrr=1",),
            "optimizer.lrr: torch.optim.AdamW has no such argument; did you mean lr? (expected one of lr, ",
        ),
        (
            ("reference.sync_evry=1",),
            "reference.sync_evry: humanline.reference.ModelReference has no such argument; did you mean sync_every? "
            "(expected one of sync_every",
        ),
        (
            ("dataset.max_tokns=1",),
            "dataset.max_tokns: humanline.data.encoded_groups has no such argument; did you mean max_tokens? (expected "
            "one of source, ",
        ),
        (
            ("model.num_layer=1",),
            "model.num_layer: torchtune.models.llama3.llama3 has no such argument; did you mean num_layers?",
        ),
        (
            ("~model.num_layers",),
            "model.num_layers: missing; torchtune.models.llama3.llama3 requires this argument; add it",
        ),
        (("optimizer.lr=fast",), "optimizer: torch.optim.AdamW cannot be built: TypeError: "),
        (
            ("reference=torch.nn.Identity",),
            "reference._component_: torch.nn.Identity builds Identity, expected a subclass of "
            "humanline.reference.Strategy; derive",
        ),
        (("optimizer.lr=-1",), "optimizer: Invalid learning rate: -1"),
        (
            (f"lr_scheduler._component_={SCHEDULES}.CosineAnnealingLR",),
            f"lr_scheduler.T_max: missing; {SCHEDULES}.CosineAnnealingLR requires this argument; add it",
        ),
        ((f"lr_scheduler._component_={SCHEDULES}.LambdaLR",), "lr_scheduler.lr_lambda: missing; "),
        (
            (f"lr_scheduler._component_={SCHEDULES}.ReduceLROnPlateau",),
            f"expected a function of the step, got {SCHEDULES}.ReduceLROnPlateau",
        ),
        (
            (f"lr_scheduler._component_={SCHEDULES}.OneCycleLR", "lr_scheduler.max_lr=1", "lr_scheduler.total_steps=5"),
            f"lr_scheduler: {SCHEDULES}.OneCycleLR cannot schedule this run's 12 steps: Tried to step 6 times",
        ),
        (
            ("lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",),
            "lr_scheduler.num_warmup_steps: missing; torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup "
            "requires this argument; add it",
        ),
        (
            ("profiler._component_=torchtune.training.setup_torch_profiler", "profiler.enabld=True"),
            "did you mean enabled",
        ),
    ],
)
def test_a_component_that_cannot_be_had_is_named_before_the_weights_are_read(
    run, tmp_path, monkeypatch, overrides, message
):
    (tmp_path / "needs_sklearn.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'sklearn'\", name='sklearn')\n"
    )
    (tmp_path / "broken.py").write_text("Adam = nowhere.Adam\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = run.train(*overrides)
    assert line.startswith("humanline_dpo_distributed.py: ") and "\n" not in line
    assert message in line


@pytest.mark.parametrize(
    ("schedule", "arguments", "rates"),
    [
        ("StepLR", {"step_size": 6, "gamma": 0.5}, {1: 1, 7: 0.5, 13: 0.25, 24: 0.125}),
        ("LinearLR", {"start_factor": 0.25, "total_iters": 12}, {1: 0.25, 7: 0.625, 13: 1, 24: 1}),
        ("CosineAnnealingLR", {"T_max": 24}, {1: 1, 13: 0.5}),
        ("OneCycleLR", {"max_lr": 0.01, "total_steps": 24}, {}),
        ("PolynomialLR", {"total_iters": 24}, {1: 1, 13: 0.5}),
    ],
)
def test_torch_s_own_schedules_are_stepped_once_a_step_and_resume_exactly(trajectory, schedule, arguments, rates):
    """The rate and the betas, which OneCycleLR moves as well, of each step."""
    run = trajectory("dpo_8_k4")
    run.config |= {"epochs": 2, "save_every_n_steps": 10, "keep_last_n_checkpoints": 3}
    run.config["optimizer"]["_component_"] = "toys.RecordingAdamW"
    run.config["lr_scheduler"] = {"_component_": f"{SCHEDULES}.{schedule}", **arguments}
    resumed = run.again("resumed")
    RecordingAdamW.applied.clear()
    assert run.train() is None
    whole = RecordingAdamW.applied.copy()
    assert len(whole) == 24 and len(set(whole)) > 2
    lr = run.config["optimizer"]["lr"]
    assert {step: whole[step - 1][0] / lr for step in rates} == pytest.approx(rates, rel=1e-5)
    RecordingAdamW.applied.clear()
    assert resumed.train(f"resume_from_checkpoint={run.folder / 'out' / 'checkpoints' / 'step_10'}") is None
    assert RecordingAdamW.applied == whole[10:]
    ends = [load_file(each.folder / "out/epoch_1/model-00001-of-00001.safetensors") for each in (run, resumed)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_a_resumed_run_has_the_schedule_of_its_own_config(trajectory):
    """Of more steps, from the first on."""
    run = trajectory("dpo_8_k4")
    run.config |= {"save_every_n_steps": 10, "keep_last_n_checkpoints": 3}
    run.config["optimizer"]["_component_"] = "toys.RecordingAdamW"
    run.config["lr_scheduler"] = {"_component_": f"{SCHEDULES}.CosineAnnealingLR", "T_max": 12}
    assert run.train() is None
    longer = run.again("longer")
    longer.config["epochs"], longer.config["lr_scheduler"]["T_max"] = 2, 24
    RecordingAdamW.applied.clear()
    assert longer.train(f"resume_from_checkpoint={run.folder / 'out' / 'checkpoints' / 'step_10'}") is None
    lr = run.config["optimizer"]["lr"]
    expected = [lr * (1 + cos(pi * step / 24)) / 2 for step in range(10, 24)]
    assert [rate for rate, _ in RecordingAdamW.applied] == pytest.approx(expected, rel=1e-5)
