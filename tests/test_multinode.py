"""Several nodes, each a torchrun agent of its own with its processes, that meet over loopback."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TUNE, logged_steps
from ranks import free_port
from test_faults import assert_same_end, saved_steps, saving

TORCHRUN, SLURM = ROOT / "launch" / "torchrun.sh", ROOT / "launch" / "slurm.sh"


class Nodes:
    """Nodes of a run, each started by the launcher as on a machine of its own; they are killed when the block ends."""

    def __init__(self, run, processes: int, **variables: str) -> None:
        self.log = run.folder / "output.txt"
        self.command = [str(TORCHRUN), str(run.recipe), "--config", str(run._write_config())]
        self.port = free_port()
        self.environment = environment(processes) | {"HEAD": f"localhost:{self.port}", "NODES": "2", "RUN": "a-run"}
        self.environment |= variables
        self.agents: list[subprocess.Popen] = []

    def start(self, cwd: Path = ROOT) -> subprocess.Popen:
        """One more node. The first is where they meet."""
        if self.agents:
            self.wait_until(lambda: socket.socket().connect_ex(("localhost", self.port)) == 0)
        with self.log.open("a") as output:
            agent = subprocess.Popen(self.command, cwd=cwd, stdout=output, stderr=output, env=self.environment)
        self.agents.append(agent)
        return agent

    def lose(self, agent: subprocess.Popen) -> None:
        """Ends a node at once, its agent and its processes."""
        self.agents.remove(agent)
        kill(agent)

    def wait_until(self, condition, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            assert all(agent.poll() is None for agent in self.agents), self.output()

    def wait(self) -> list[int]:
        """The exit codes of the nodes, once all have ended."""
        return [agent.wait(240) for agent in self.agents]

    def output(self) -> str:
        return self.log.read_text()[-8000:]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *exception) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                kill(agent)


def kill(agent: subprocess.Popen) -> None:
    processes = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in (agent.pid, *map(int, processes)):
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def environment(processes: int) -> dict[str, str]:
    path = f"{TUNE.parent}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PROCESSES": str(processes)}


@pytest.mark.parametrize("reference", ["ModelReference", "WindowedReference"])
def test_two_nodes_with_a_process_each_have_the_losses_of_the_authors_code(trajectory, reference):
    run = trajectory("dpo_8_k4")
    run.config["batch_size"] //= 2
    run.config["reference"]["_component_"] = f"humanline.reference.{reference}"
    with Nodes(run, 1) as nodes:
        nodes.start(), nodes.start()
        assert nodes.wait() == [0, 0], nodes.output()
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


SRUN = """#!/bin/sh
# Slurm's srun, on the two nodes that this machine is.
[ "$1" = --kill-on-bad-exit=0 ] || exit 9
shift
"$@" & first=$!
"$@" & wait $! && wait $first
"""


def test_a_slurm_job_of_two_nodes_with_two_processes_each_shards_within_nodes_and_equals_one_process(
    trajectory, tmp_path
):
    whole = saving(trajectory("kto_8_k4"), every=None)
    run = whole.again("job")
    whole.train_on(1)
    run.config["batch_size"] //= 4
    run.config["data_parallel_replicate_dim"] = 2
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name, script in {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf 'localhost\\nlocalhost\\n'\n"}.items():
        (slurm / name).write_text(script)
        (slurm / name).chmod(0o755)
    job = environment(2) | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "local"}
    job["PATH"] = f"{slurm}:{job['PATH']}"
    command = [str(SLURM), str(run.recipe), "--config", str(run._write_config())]
    done = subprocess.run(command, cwd=ROOT, env=job, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_same_end(run, whole, tolerance=1e-5)


def test_a_lost_node_that_comes_back_joins_the_run_and_a_run_whose_nodes_are_all_lost_goes_on(trajectory):
    whole = saving(trajectory("dpo_8_k4"), every=1)
    whole.config["batch_size"] //= 2
    run = whole.again("lost")
    whole.train_on(2)

    def step_saved(step):
        return lambda: max(saved_steps(run), default=0) >= step

    with Nodes(run, 1) as nodes:
        nodes.start()
        lost = nodes.start()
        nodes.wait_until(step_saved(4))
        nodes.lose(lost)
        nodes.start()
        nodes.wait_until(step_saved(12))
    with Nodes(run, 1, RESTARTS="0") as nodes:
        nodes.start(), nodes.start()
        assert nodes.wait() == [0, 0], nodes.output()
    assert_same_end(run, whole, tolerance=1e-6)
    steps = logged_steps(run)
    assert steps[0] == 1 and 1 not in steps[1:] and steps[-1] == 24  # it went on, and did not begin again


def test_a_folder_that_the_nodes_do_not_share_is_refused(trajectory, tmp_path):
    run = trajectory("dpo_8_k4")
    run.config["output_dir"] = run.config["checkpointer"]["output_dir"] = "out"
    with Nodes(run, 1, RESTARTS="0") as nodes:
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            nodes.start(cwd=tmp_path / name)
        assert nodes.wait() == [1, 1], nodes.output()
    assert "output_dir: out on " in nodes.output()
    assert "is not rank 0's folder on " in nodes.output()


def test_a_store_that_a_lost_node_could_not_come_back_to_is_refused(trajectory):
    run = trajectory("dpo_8_k4")
    with Nodes(run, 1, RESTARTS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0") as nodes:
        nodes.start(), nodes.start()
        assert nodes.wait() == [1, 1], nodes.output()
    assert "max_restarts: restarts on several nodes need" in nodes.output()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment" in nodes.output()
