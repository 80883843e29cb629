"""What the model says while it trains."""

import json
import math

import pytest
from test_online import online, rounds
from torch.nn.modules.module import register_module_forward_hook
from torchtune.training.metric_logging import TensorBoardLogger, WandBLogger
from toys import Letters

from humanline.models import LogProbDecoder
from humanline.torchtune_seam.log_table import log_table
from humanline.training._completions import COLUMNS, table

ROW = dict(zip(COLUMNS, ("What is 1 + 1?", "2\n\x1b[31m", 1.0, 2, "stop", -0.5), strict=True))


def completions(run) -> dict[str, list[dict]]:
    files = sorted((run.folder / "out" / "completions").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().split("\n")[:-1]] for file in files}


def test_a_table_has_one_line_for_each_completion_within_the_width():
    long = ROW | {"prompt": "x" * 300 + " last words", "completion": "y" * 300, "reward": None, "mean_log_ratio": None}
    for width in (60, 100, 400):
        lines = table([ROW, long], width).splitlines()
        assert len(lines) == 3 and max(map(len, lines)) <= width
        assert lines[0].split() == list(COLUMNS)
    assert "2\\n\\x1b[31m" in table([ROW], 120) and "…" in table([long], 100)
    assert " last words  " in table([long], 100)


class Service:
    """Records what a logger is asked to keep."""

    def __init__(self) -> None:
        self.run, self.kept = True, []

    def Table(self, columns, data):
        return columns, data

    def log(self, values):
        self.kept.append(values)

    def add_text(self, *args, **kwargs):
        self.kept.append((args, kwargs))


def test_weights_and_biases_and_tensorboard_get_the_table():
    wandb, tensorboard, row = (
        WandBLogger.__new__(WandBLogger),
        TensorBoardLogger.__new__(TensorBoardLogger),
        [*ROW.values()],
    )
    wandb._wandb, tensorboard._writer, tensorboard.close = Service(), Service(), lambda: None
    for logger in (wandb, tensorboard, object()):
        log_table(logger, "completions/val", COLUMNS, [row], 7)
    assert wandb._wandb.kept == [{"completions/val": (list(COLUMNS), [row]), "global_step": 7}]
    (((name, text), step),) = tensorboard._writer.kept
    assert name == "completions/val" and step == {"global_step": 7}
    assert text.splitlines()[2].startswith("| What is 1 + 1? | 2<br>") and len(text.splitlines()) == 3
    tensorboard._writer = None


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_round_is_readable_with_the_log_ratios_of_its_training(trajectory, nproc):
    run = online(trajectory("grpo_8_k4"), every=3)
    run.config |= {"batch_size": 2 // nproc, "max_steps_per_epoch": 6, "log_completions": 2}
    run.train_on(nproc)
    found = completions(run)
    assert found.keys() == {"round_0", "round_1"}
    letters = Letters()
    for round, file in enumerate(rounds(run)):
        groups = [json.loads(line) for line in file.read_text().splitlines()]
        expected = [
            (letters.decode(group["prompt"]), letters.decode(response), score, len(response))
            for group in groups
            for response, score in zip(group["responses"], group["scores"], strict=True)
        ]
        rows = found[f"round_{round}"]
        assert [tuple(row[name] for name in COLUMNS[:4]) for row in rows] == expected
        assert {row["finish"] for row in rows} <= {"stop", "length"}
        assert all(row["finish"] == "length" for row in rows if row["tokens"] == 6 and "\x00" not in row["completion"])
        # Of the first step's groups the policy still is the reference in round 0; no two steps share a group.
        ratios = [row["mean_log_ratio"] for row in rows]
        assert all(ratio is not None and math.isfinite(ratio) for ratio in ratios)
        assert any(ratio != 0 for ratio in ratios) and (round or any(ratio == 0 for ratio in ratios))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_8_k4", "grpo_8_k4"])
def test_fixed_prompts_are_answered_without_changing_the_run(trajectory, name):
    run = trajectory(name)
    run.config |= {"tokenizer": {"_component_": "toys.Letters"}, "dataset_val": dict(run.config["dataset"])}
    run.config |= {"max_steps_per_epoch": 5, "save_every_n_steps": 3}
    plain = run.again("plain")
    assert plain.train() is None and completions(plain) == {}
    keys = {"generate_val_every_n_steps": 2, "generate_val_prompts": 3, "generate_val_max_new_tokens": 8}
    run.config |= keys
    assert run.train("log_completions=1") is None
    assert run.log() == plain.log()
    found = completions(run)
    assert found.keys() == {"step_0", "step_2", "step_4", "step_5"}
    assert all(
        len(rows) == 3 and [row["prompt"] for row in rows] == [row["prompt"] for row in found["step_0"]]
        for rows in found.values()
    )
    assert all(row["mean_log_ratio"] == 0 and row["reward"] is None for row in found["step_0"])
    assert any(row["mean_log_ratio"] != 0 for row in found["step_5"])
    assert found["step_0"] != found["step_5"]

    resumed = run.again("resumed")
    (resumed.folder / "out").mkdir()
    checkpoint = run.folder / "out" / "checkpoints" / "step_3"
    assert run.train(f"resume_from_checkpoint={checkpoint}") is None
    assert completions(run) == found
    two = run.again("two")
    two.config["batch_size"] //= 2
    two.train_on(2)
    for step, rows in completions(two).items():
        assert [row["completion"] for row in rows] == [row["completion"] for row in found[step]]


@pytest.mark.slow
def test_a_window_cannot_score_new_completions_and_a_table_is_in_the_log(trajectory, caplog):
    run = trajectory("dpo_8_k4")
    run.config |= {"tokenizer": {"_component_": "toys.Letters"}, "dataset_val": dict(run.config["dataset"])}
    run.config |= {"max_steps_per_epoch": 1, "generate_val_every_n_steps": 9, "log_completions": 2}
    run.config["reference"]["_component_"] = "humanline.reference.WindowedReference"
    run.config |= {"generate_val_max_new_tokens": 4}
    assert run.train() is None
    assert {row["mean_log_ratio"] for rows in completions(run).values() for row in rows} == {None}
    (first, last) = [record.message for record in caplog.records if record.message.startswith("completions, val")]
    assert len(first.splitlines()) == 4 and "completions, val at step 1:" in last


@pytest.mark.slow
def test_completions_are_scored_in_the_shapes_of_training_whose_kernels_are_compiled(trajectory, monkeypatch):
    run = trajectory("dpo_8_k4")
    run.config |= {"tokenizer": {"_component_": "toys.Letters"}, "dataset_val": dict(run.config["dataset"])}
    run.config |= {"max_steps_per_epoch": 1, "generate_val_every_n_steps": 9, "compile": True}
    run.config |= {"generate_val_prompts": 3, "generate_val_max_new_tokens": 7}
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    shapes = set()

    def note(module, arguments, named, log_probs):
        if isinstance(module, LogProbDecoder):
            shapes.add(named["tokens"].shape)

    hook = register_module_forward_hook(note, with_kwargs=True)
    try:
        assert run.train() is None
    finally:
        hook.remove()
    assert {row["mean_log_ratio"] for row in completions(run)["step_0"]} == {0.0}
    assert len(shapes) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_val": None},
            "generate_val_every_n_steps: needs tokenizer and dataset_val, whose prompts are answered",
        ),
        (
            {"tokenizer": None},
            "generate_val_every_n_steps: needs tokenizer and dataset_val, whose prompts are answered",
        ),
        ({"generate_val_max_new_tokens": 999}, "generate_val_max_new_tokens: prompt and completion need "),
    ],
)
def test_what_cannot_be_answered_is_refused(trajectory, changes, message):
    run = trajectory("dpo_8_k4")
    run.config |= {"tokenizer": {"_component_": "toys.Letters"}, "dataset_val": dict(run.config["dataset"])}
    run.config |= {"generate_val_every_n_steps": 2, "max_steps_per_epoch": 1, **changes}
    assert message in run.train()
