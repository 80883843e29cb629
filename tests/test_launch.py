"""A distributed recipe starts its own processes when no launcher did."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from humanline.config import Settings
from humanline.launch._output_folder import sole_use
from humanline.launch._processes import process_group, start_on_every_device

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys

arguments = " ".join(sys.argv[1:])
rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
print(f"rank {rank} of {world_size} {arguments}\\n", end="")  # one write, whole among other ranks'
"""


def test_launch_replaces_the_process_by_one_a_device_with_the_same_arguments(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT)
    launch = (
        f"from humanline.launch._processes import launch; launch(2, {str(script)!r}, ['--config', 'c.yaml', 'seed=3'])"
    )
    done = subprocess.run([sys.executable, "-c", launch], capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "Starting 2 processes on this machine..."
    assert sorted(lines[1:]) == [f"rank {rank} of 2 --config c.yaml seed=3" for rank in (0, 1)]


def test_on_a_cpu_this_process_is_the_one_rank():
    start_on_every_device("cpu", "never started")
    with process_group(torch.device("cpu")):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_a_restart_is_a_start_under_the_same_name_of_a_run_that_took_the_folder_for_its_own(tmp_path, monkeypatch):
    def restarted(name, resume_from=False, accept=True):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with sole_use(str(tmp_path), resume_from) as folder:
            if accept:
                folder.accept()
            return folder.restarted

    with process_group(torch.device("cpu")):
        assert not restarted("one", accept=False)
        assert not restarted("one")  # it was refused before
        assert restarted("one")
        assert not restarted("other", accept=False)
        assert restarted("one", accept=False)
        assert not restarted("one", resume_from="step_2")
        assert restarted("one", resume_from="step_2")
        assert not restarted("none")  # torchrun's name for a run without one: then its agent's process tells
        assert restarted("none")
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        with sole_use(str(tmp_path), False) as folder:
            assert not folder.restarted


def test_every_rank_falls_back_to_the_cpu_where_there_is_no_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in {"RANK": "7", "LOCAL_RANK": "7", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert Settings(output_dir="out", device="cuda").torch_device == torch.device("cpu")
