"""What a run prints is about the run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TUNE
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from humanline._torchrun import say_in_a_line

pytestmark = pytest.mark.slow

NEWS = [
    r"dataset: 48 groups from \S+: .*",
    r"Loading the model took [\d.]+ s",
    r"106,816 trainable parameters",
    r"4 groups per step on 2 processes, 12 steps",
    r"12 of 12, [\d:]+ elapsed, [\d:]+ left, \S+(step/s|s/step), loss=.*",
    r"\S+/epoch_0: \S+ GB, float32; 100\.0% of the update's norm survived rounding.*",
]


def started(command):
    """A command's end, with torchrun's own number of threads."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_under_torchrun_prints_nothing_but_news(trajectory):
    run = trajectory("dpo_8_k4")
    run.config |= {"batch_size": 2, "log_every_n_steps": 4}
    recipe = [str(TUNE), "run", "--nproc_per_node=2", "recipes/humanline_dpo_distributed"]
    done = started([*recipe, "--config", str(run._write_config())])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Running with torchrun...", f"Writing logs to {run.folder}/logs/log.txt"]
    printed = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert [line for line in printed if not any(re.fullmatch(news, line) for news in NEWS)] == []
    for news in NEWS:
        assert sum(bool(re.fullmatch(news, line)) for line in printed) >= 1, news

    refused = started([*recipe, "--config", str(run._write_config()), "epoch=3"])
    assert refused.returncode == 1
    ours = "humanline_dpo_distributed.py: epoch: not a key of this recipe; did you mean epochs?"
    assert set(refused.stderr.splitlines()) == {ours}  # once or twice: the first to say it ends the other


SIGTERM, SIGKILL = -15, -9


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ({0: 1, 1: 1}, []),
        ({0: SIGTERM, 1: 1}, []),  # torchrun's own, after rank 1 had said why
        ({0: SIGTERM, 1: SIGKILL}, ["rank 1 (process 101) was ended by SIGKILL"]),
        ({0: SIGTERM, 1: SIGTERM}, [f"rank {rank} (process {100 + rank}) was ended by SIGTERM" for rank in (0, 1)]),
        ({0: 3}, ["rank 0 (process 100) ended with exit code 3"]),
    ],
)
def test_torchrun_names_who_could_not_say_why_it_ended(capsys, ends, named):
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in ends.items()}
    say_in_a_line(ChildFailedError, ChildFailedError("recipe", failures), None)
    assert capsys.readouterr().err.splitlines() == [f"torchrun: {line}" for line in named]


def test_a_program_that_is_not_under_tune_prints_nothing_but_its_line():
    sample = started([sys.executable, "recipes/humanline_sample.py", "--config", "absent.yaml"])
    assert sample.returncode == 1 and sample.stdout == ""
    assert re.fullmatch(r"humanline_sample\.py: --config: file absent\.yaml not found .*\n", sample.stderr)
    plan = started(
        [sys.executable, "-m", "humanline._cli", "plan", "--config", "configs/smollm2_135m_dpo.yaml", "~seeds"]
    )
    assert plan.returncode == 1 and plan.stdout == ""
    line = "humanline plan: override: found no key seeds to remove; did you mean seed?\n"
    assert plan.stderr == line
