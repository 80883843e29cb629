"""A tiny Llama in HF layout, and the recipes as real processes on it."""

import copy
import gc
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import settings
from ranks import Ranks

# Before any test imports torchtune, which imports with today's torchao through humanline.
from humanline._garbage import spare_imports
from humanline.progress import Progress

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "data" / "cases"  # small inputs that real users' data look like
GOLDEN = Path(__file__).parent / "golden"
TUNE = Path(sys.executable).with_name("tune")

settings.register_profile("humanline", deadline=None)  # a busy machine must not fail a property
settings.load_profile("humanline")


@pytest.fixture(autouse=True, scope="session")
def cache_of_datasets(tmp_path_factory):
    """Encoded datasets are kept apart from the user's own."""
    os.environ["HUMANLINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Files are named as a user names them, relative to the folder they work in, and `datasets` caches nowhere else."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pytest_collection_modifyitems(items):
    """Marks as slow what trains on a golden trajectory; slow files say so themselves, with ``pytestmark``."""
    for item in items:
        if "trajectory" in item.fixturenames:
            item.add_marker("slow")


def pytest_collection_finish():
    """Does what a recipe's process does after its imports, and a third of a golden run's time is saved."""
    gc.collect()
    spare_imports()


def hf_config(shape):
    """The config.json of a Llama with the golden files' shape keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["embed_dim"],
        "intermediate_size": shape["intermediate_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "max_position_embeddings": shape["max_seq_len"],
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rope_base"],
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "torch_dtype": "float32",
    }


class TrajectoryRun:
    """A golden trajectory on disk: an HF folder, a JSONL of groups, and a config that repeats the authors' run."""

    def __init__(self, name: str, folder: Path) -> None:
        self.golden = json.loads((GOLDEN / "trajectories" / f"{name}.json").read_text())
        self.recipe = ROOT / "recipes" / f"humanline_{self.golden['objective']}_distributed.py"
        self.folder = folder
        shape = self.golden["model"]
        model = folder / "model"
        model.mkdir(parents=True)
        shutil.copy(GOLDEN / "trajectories" / shape["weights"], model / "model.safetensors")
        (model / "config.json").write_text(json.dumps(hf_config(shape)))
        self.data = folder / "groups.jsonl"
        self.data.write_text("".join(self.line(example) for batch in self.golden["batches"] for example in batch))
        optimizer = self.golden["optimizer"]
        self.config = {
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "dtype": "fp32",
            "shuffle": False,
            "batch_size": len(self.golden["batches"][0]),
            "tokens_per_row": 64,
            "rows_per_pass": 4,
            "clip_grad_norm": self.golden["max_grad_norm"],
            "model": {
                "_component_": "torchtune.models.llama3.llama3",
                **{key: shape[key] for key in shape if key not in ("weights", "tie_word_embeddings")},
            },
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": str(model),
                "checkpoint_files": ["model.safetensors"],
                "model_type": "LLAMA3",
                "output_dir": str(folder / "out"),
            },
            "tokenizer": None,
            "dataset": {"_component_": "humanline.data.encoded_groups", "source": str(self.data)},
            "loss": {
                "_component_": f"humanline.losses.Humanline{self.golden['objective'].upper()}Loss",
                "beta": self.golden["beta"],
                "log_eps_P": self.golden["log_eps_P"],
                "log_eps_R": self.golden["log_eps_R"],
                **self._loss_settings(),
            },
            "reference": {"_component_": "humanline.reference.ModelReference", "sync_every": self.golden["sync_every"]},
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "lr": optimizer["lr"],
                "betas": optimizer["betas"],
                "eps": optimizer["eps"],
                "weight_decay": optimizer["weight_decay"],
            },
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": str(folder / "logs"),
                "filename": "log.txt",
            },
        }

    def _loss_settings(self) -> dict:
        """What only one objective's loss has."""
        kto = {key: self.golden[key] for key in ("desirable_weight", "undesirable_weight")}
        grpo = dict.fromkeys(("epsilon_low", "epsilon_high"), self.golden["epsilon"])
        return {"dpo": {}, "kto": kto, "grpo": grpo}[self.golden["objective"]]

    @staticmethod
    def line(example: dict) -> str:
        """A golden example as a line of encoded groups."""
        group = {"prompt": example["prompt"]}
        if "chosen" in example:
            group["responses"] = [example["chosen"], example["rejected"]]
        elif "desirable" in example:
            group |= {"responses": [example["response"]], "labels": [example["desirable"]]}
        else:
            group |= {"responses": example["responses"], "scores": example["scores"]}
        return json.dumps(group) + "\n"

    def train(self, *overrides: str) -> str | None:
        """Runs the recipe's file in this process; returns the line with which it gave up, None if it did not."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(self.recipe), "--config", str(self._write_config()), *overrides])
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(str(self.recipe), run_name="__main__")
        return exit.value.code

    def tune(self, *overrides: str, nproc: int | None = None, check: bool = True) -> subprocess.CompletedProcess:
        """Runs the recipe through ``tune run`` from the clone, with torchrun options where ``nproc`` is given."""
        torchrun = [f"--nproc_per_node={nproc}"] if nproc else []
        recipe = str(self.recipe.relative_to(ROOT).with_suffix(""))
        command = [str(TUNE), "run", *torchrun, recipe, "--config", str(self._write_config()), *overrides]
        return run(command, cwd=ROOT, check=check)

    def again(self, name: str) -> "TrajectoryRun":
        """The same run in a folder of its own."""
        other = copy.copy(self)
        other.folder = self.folder / name
        other.folder.mkdir()
        other.config = copy.deepcopy(self.config)
        other.config["output_dir"] = other.config["checkpointer"]["output_dir"] = str(other.folder / "out")
        other.config["metric_logger"]["log_dir"] = str(other.folder / "logs")
        return other

    def start(self, *overrides: str, nproc: int = 1, **environment: str) -> Ranks:
        """Starts the recipe's file in ``nproc`` processes."""
        arguments = ["--config", str(self._write_config()), *overrides]
        return Ranks(self.recipe, arguments, nproc, self.folder / "output.txt", environment)

    def train_on(self, nproc: int, *overrides: str, **environment: str) -> None:
        """Runs the recipe's file in ``nproc`` processes to a good end."""
        with self.start(*overrides, nproc=nproc, **environment) as ranks:
            assert ranks.wait() == [0] * nproc, ranks.output()[-6000:]

    def _write_config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def log(self, metric: str = "loss") -> dict[int, float]:
        """The logged values of a metric by step; a step logged twice keeps its last value."""
        lines = (self.folder / "logs" / "log.txt").read_text().splitlines()
        found = (re.match(rf"Step (\d+) \|.* {re.escape(metric)}:(\S+)", line.replace("|", "| ", 1)) for line in lines)
        return {int(match[1]): float(match[2]) for match in found if match}


def logged_steps(run: TrajectoryRun) -> list[int]:
    """The steps in the order in which they were logged."""
    log = run.folder / "logs" / "log.txt"
    return [int(step) for step in re.findall(r"^Step (\d+) ", log.read_text(), re.M)] if log.exists() else []


def wait_until(condition: Callable[[], bool], ranks: Ranks, seconds: float = 60) -> None:
    """Waits until a run in other processes has come to a point."""
    deadline = time.monotonic() + seconds
    while not condition():
        ranks.processes[0].join(0.002)
        assert time.monotonic() < deadline, ranks.output()
        assert all(process.is_alive() for process in ranks.processes), ranks.output()


def run(command: list[str], *, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command to its end, with one thread a process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def run_recipe(recipe: Path, config: dict, folder: Path) -> tuple[int, str]:
    """Runs a recipe's file in a folder, in a process of its own; returns its exit code and what it printed."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Ranks(recipe, ["--config", "config.yaml"], 1, log, {}) as process:
            return process.wait()[0], process.output()


@pytest.fixture
def trajectory(tmp_path):
    """``trajectory(name)`` lays a golden trajectory out in a folder of its own."""
    return lambda name: TrajectoryRun(name, tmp_path / name)


def counted(monkeypatch, engine):
    """The bars of an engine's calls from now on, which keep what was counted."""
    bars = []

    def bar(responses):
        bars.append(Progress(total=responses, leave=False))
        return bars[-1]

    monkeypatch.setattr(f"humanline.rollout.{engine}.progress_of", bar)
    return bars


def loss_and_metrics(loss):
    """The recipe's function of this name, with a loss: what it makes of log-probs and rows."""
    name = type(loss).__name__.removeprefix("Humanline").removesuffix("Loss").lower()
    module = runpy.run_path(str(ROOT / "recipes" / f"humanline_{name}_single_device.py"))
    recipe = module[f"Humanline{name.upper()}RecipeSingleDevice"](None)
    recipe.loss = loss
    return recipe.loss_and_metrics
