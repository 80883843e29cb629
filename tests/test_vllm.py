"""A real vLLM samples the groups of an online run, takes each round's weights, and is killed in the middle of a round.

``make test-vllm`` installs vLLM's CPU build into an environment of its own, ``.venv-vllm``, and runs this file. Where
there is no such environment it is skipped.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, wait_until
from omegaconf import OmegaConf
from ranks import Ranks, free_port
from test_http_engine import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.models import LogProbDecoder, fixed_log_probs, load_decoder
from humanline.programs import component, read_weights
from humanline.rollout._connection import Connection, Gone

VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"
SECONDS = 900  # for what takes a minute or two on a machine with nothing else to do

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM.exists(), reason="there is no vLLM in .venv-vllm: `make test-vllm` installs it"),
]


class VLLMServe:
    """``vllm serve`` on a port, in a process group of its own, which is killed when the block ends."""

    def __init__(self, model: Path, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would take a core for itself, busy or not
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [VLLM, "serve", model, "--served-model-name", "policy", "--host", "127.0.0.1", "--port", port]
        command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def __enter__(self) -> "VLLMServe":
        return self

    def __exit__(self, *exception) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL for the server and its engine, which have nothing to say about it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def wait(self) -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + SECONDS
        while self.get("/v1/models") is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
            alive = self.process.poll() is None and time.monotonic() < deadline
            assert alive, self.log.read_text()[-4000:]

    def generated(self) -> float:
        """The tokens that it has generated so far, by its own count; 0 if it does not answer."""
        lines = (self.get("/metrics") or b"").decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    def get(self, path: str) -> bytes | None:
        connection = Connection(self.url, {}, timeout=10, retries=0, wait=0, introduce=lambda: None)
        try:
            return connection.exchange(f"{self.url}{path}")
        except Gone:
            return None


def write_model(folder: Path) -> Path:
    """A Llama of two layers, with heads of a size that vLLM's CPU kernels know."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=260, max_position_embeddings=256, initializer_range=0.2, bos_token_id=3, eos_token_id=2, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_config(folder: Path, model: Path, url: str) -> Path:
    """GRPO over three epochs of one round each, at a rate at which every round samples from another policy."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "one two three four".split()))
    config = {
        "output_dir": str(folder / "out"),
        "device": "cpu",
        "dtype": "fp32",
        "batch_size": 2,
        "epochs": 3,
        "tokens_per_row": 256,
        "rows_per_pass": 4,
        "model": {
            "_component_": "torchtune.models.llama3.llama3",
            **{"vocab_size": 260, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 64},
            **{"intermediate_dim": 128, "max_seq_len": 256, "rope_base": 10000, "norm_eps": 1e-6},
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3",
            "output_dir": str(folder / "out"),
        },
        "tokenizer": {"_component_": "humanline.data.ChatTokenizer", "path": str(model)},
        "source": {
            "_component_": "humanline.rollout.OnlineSource",
            "prompts": str(prompts),
            "max_new_tokens": 96,
            "temperature": 0.8,
            "generations": 8,
            "every": 2,
        },
        "engine": {
            "_component_": "humanline.rollout.HTTPEngine",
            "base_url": f"{url}/v1",
            "model": "policy",
            "weights_dir": str(folder / "weights"),
            "reload_url": f"{url}/collective_rpc",
            "max_concurrency": 2,  # so that a round takes a while
        },
        "reward": {"_component_": "toys.MeanToken"},
        "loss": {"_component_": "humanline.losses.HumanlineGRPOLoss", "beta": 0.0},
        "reference": {"_component_": "humanline.reference.ModelReference", "sync_every": 1},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(folder / "logs"),
            "filename": "log.txt",
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def policy_of(config: Path, folder: Path) -> LogProbDecoder:
    """The model with the weights of a folder, as the recipe computes it."""
    cfg = OmegaConf.load(config)
    (file,) = folder.glob("*.safetensors")
    cfg.checkpointer |= {"checkpoint_dir": str(folder), "checkpoint_files": [file.name]}
    _, weights = read_weights(cfg)
    with torch.device("meta"):
        shape = component(cfg, "model")
    return LogProbDecoder(load_decoder(shape, weights, device=torch.device("cpu"), dtype=torch.float32))


def mean_gap(policy: LogProbDecoder, round_file: Path) -> float:
    """The mean distance of a round's log-probs, as vLLM gave them, from the policy's, nats a token."""
    gaps = []
    budget = RowBudget(tokens_per_row=256)
    for line in map(json.loads, round_file.read_text().splitlines()):
        for response, logps in zip(line["responses"], line["logps"], strict=True):
            groups = [Group(line["prompt"], (response,))]
            (planned,) = pack(groups, budget)
            ours = fixed_log_probs(policy, lay_out(groups, planned, budget))
            gaps.append((ours - torch.tensor(logps)).abs())
    return torch.cat(gaps).mean().item()


def test_each_round_is_sampled_from_its_own_weights_also_by_a_server_that_was_killed_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    model = write_model(tmp_path / "model")
    port = free_port()
    log = tmp_path / "vllm.txt"
    first_round, second_round, third_round = (tmp_path / "out" / "rounds" / f"round_{i}.jsonl" for i in range(3))
    recipe = ROOT / "recipes" / "humanline_grpo_distributed.py"
    with VLLMServe(model, port, log) as server:
        config = write_config(tmp_path, model, server.url)
        arguments = ["--config", str(config)]
        server.wait()
        with Ranks(recipe, arguments, 1, tmp_path / "output.txt", {"no_proxy": "127.0.0.1"}) as ranks:
            wait_until(first_round.exists, ranks, SECONDS)
            before = server.generated()
            wait_until(lambda: server.generated() > before, ranks, SECONDS)  # the second round is under way
            server.kill()
            assert not second_round.exists()
            with VLLMServe(model, port, log):  # with the weights of the first round, until it is told of others
                assert ranks.wait(SECONDS) == [0], ranks.output()
    assert "is down" in ranks.output()
    rounds = [first_round, second_round, third_round]
    assert [json.loads(file.read_text().splitlines()[0])["policy_step"] for file in rounds] == [0, 2, 4]

    policies = [policy_of(config, folder) for folder in (model, *(tmp_path / "out" / f"epoch_{i}" for i in (0, 1)))]
    gaps = [[mean_gap(policy, file) for policy in policies] for file in rounds]
    print("mean gap, nats a token; a line for each round, a column for each round's weights:")
    print("\n".join("  ".join(f"{gap:.2e}" for gap in row) for row in gaps))
    for i, row in enumerate(gaps):
        assert row[i] < 1e-4
        assert min(gap for j, gap in enumerate(row) if j != i) > 1000 * row[i]
