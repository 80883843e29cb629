"""The metrics of a run arrive at torchtune's loggers, at several at once."""

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SERVICES: dict[str, dict] = {
    "TensorBoardLogger": {"log_dir": "{folder}/tensorboard"},
    "WandBLogger": {"project": "humanline", "log_dir": "{folder}/wandb", "mode": "offline"},
    "CometLogger": {"project": "humanline", "mode": "create", "online": False, "log_code": False},
    "MLFlowLogger": {"experiment_name": "humanline", "tracking_uri": "file:{folder}/mlflow"},
}


def of_tensorboard(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    (file,) = (folder / "tensorboard").rglob("events.*")
    events = EventAccumulator(str(file), {"tensors": 0}).Reload().Tensors("loss")
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events}


def of_wandb(folder: Path) -> dict[int, float]:
    from wandb.proto import wandb_internal_pb2 as messages

    (file,) = (folder / "wandb").rglob("run-*.wandb")
    found = {}
    for data in leveldb_records(file.read_bytes()):
        record = getattr(messages, "Record")()  # noqa: B009, made by protobuf, unknown to mypy
        record.ParseFromString(data)
        items = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        if "loss" in items:
            found[items["global_step"]] = items["loss"]
    return found


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, behind a header of 7 bytes: in blocks of 32 KiB, maybe in parts."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", log[at : at + 7])
        parts += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield parts
            parts = b""


def of_comet(folder: Path) -> dict[int, float]:
    (file,) = (folder / "comet").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line.get("type") == "metric_msg"]
    return {metric["step"]: metric["metricValue"] for metric in metrics if metric["metricName"] == "loss"}


def of_mlflow(folder: Path) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder}/mlflow")
    (run,) = client.search_runs([client.get_experiment_by_name("humanline").experiment_id])
    return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}


READERS = {
    "TensorBoardLogger": of_tensorboard,
    "WandBLogger": of_wandb,
    "CometLogger": of_comet,
    "MLFlowLogger": of_mlflow,
}


# Comet takes over what MLflow is given in the same process, so it is alone.
@pytest.mark.parametrize(
    "names", [("TensorBoardLogger", "WandBLogger", "MLFlowLogger"), ("CometLogger",)], ids=" ".join
)
def test_every_logger_of_a_list_gets_every_step_of_a_run(names, trajectory, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to read it, here
    run = trajectory("dpo_8_k4")
    folder = run.folder
    loggers = [
        {"_component_": f"torchtune.training.metric_logging.{name}"}
        | {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in settings.items()}
        for name in names
        for settings in [SERVICES[name]]
    ]
    run.config["metric_logger"] = [run.config["metric_logger"], *loggers]
    run.train_on(1, COMET_OFFLINE_DIRECTORY=str(folder / "comet"), MLFLOW_ALLOW_FILE_STORE="true", WANDB_SILENT="true")
    logged = run.log("loss")
    assert len(logged) == len(run.golden["losses"])
    for name in names:
        assert READERS[name](folder) == pytest.approx(logged), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"_component_": "toys.BreakingLogger"}, "metric_logger[1].log_dir: missing; "),
        ({"_component_": "torchtune.training.metric_logging.DikLogger"}, "metric_logger[1]._component_: cannot load"),
    ],
)
def test_a_wrong_logger_of_a_list_is_named_by_its_place(wrong, message, trajectory):
    run = trajectory("dpo_8_k4")
    run.config["metric_logger"] = [run.config["metric_logger"], wrong]
    assert message in run.train()
