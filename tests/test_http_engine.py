"""Sampling by a server: the protocol and its faults with a server of ours, and ``transformers serve`` as it comes."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from completions_server import answer
from conftest import counted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_serve_available

from humanline.data import ChatTokenizer
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.rollout import Completion, SamplingParams
from humanline.rollout._http_engine import HTTPEngine, ServerEngine

pytestmark = pytest.mark.slow

SERVER = Path(__file__).with_name("completions_server.py")
SECONDS = 60  # for what takes a moment, on a busy machine too
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMS = SamplingParams(max_new_tokens=8, samples_per_prompt=3)
SEEDS = [11, 22, 33, 44]


def write_tokenizer(folder: Path, alphabet: list[str] = BYTES, merges: tuple[tuple[str, str], ...] = ()) -> Path:
    """A tokenizer of bytes in HF layout; its tokenizer.json puts BOS in front of any text, as Llama 3's does."""
    folder.mkdir(exist_ok=True)
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


class Server:
    """The server of ours as a process; killed when the block ends."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.log = folder / "answered.jsonl"
        command = [sys.executable, SERVER, folder / "tokenizer.json", self.log, f"--port={port}", *options]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> list[dict]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]


class Heard(logging.Handler):
    """What is logged of a server within the block, and a way to wait for it."""

    logger = logging.getLogger("humanline.rollout._connection")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.gone = threading.Event()

    def __enter__(self) -> "Heard":
        self.logger.addHandler(self)
        return self

    def __exit__(self, *exception) -> None:
        self.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if "is down" in self.lines[-1]:
            self.gone.set()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def heard():
    with Heard() as heard:
        yield heard


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "model")


@pytest.fixture
def tokenizer(folder):
    return ChatTokenizer(str(folder))


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in ("one", "two", "drei", "четыре")]


def engine_for(server: Server, tokenizer: ChatTokenizer, **settings) -> ServerEngine:
    return ServerEngine(
        HTTPEngine(server.url, **{"model": "policy", "max_concurrency": 3, **settings}), tokenizer, tokenizer.vocab_size
    )


def expected(server: Server, tokenizer: ChatTokenizer, prompts: list[list[int]], weights: str = "") -> list:
    """What the server answers to each prompt with the seeds that it was asked with."""
    rows: list[list[Completion]] = [[] for _ in prompts]
    for line in server.answered():
        if "seed" in line:
            text, ended = answer(line["prompt"], line["seed"], PARAMS.max_new_tokens, weights)
            ids = tokenizer.encode(text, add_bos=False, add_eos=False) + tokenizer.stop_tokens[:ended]
            rows[prompts.index(line["prompt"])].append(Completion(ids, "stop" if ended else "length"))
    return rows


def as_sets(rows: list[list[Completion]]) -> list[set]:
    return [{(tuple(sample.tokens), sample.finish_reason) for sample in row} for row in rows]


# ---- The protocol


def test_completions_are_the_ids_that_the_server_sampled_with_their_log_probs(folder, tokenizer, prompts, monkeypatch):
    bars = counted(monkeypatch, "_http_engine")
    with Server(folder) as server:
        completions = engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS)
        assert as_sets(completions) == as_sets(expected(server, tokenizer, prompts))
        assert all(isinstance(line["prompt"], list) for line in server.answered())
    samples = [sample for row in completions for sample in row]
    assert [(bar.n, bar.total) for bar in bars] == [(len(samples), len(samples))]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert all(sample.logps == [-id / 100 for id in sample.tokens] for sample in samples)


def test_a_server_of_text_gives_the_same_ids_without_log_probs(folder, tokenizer, prompts):
    with Server(folder) as server:
        by_ids = engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS)
    with Server(folder, "--text") as server:
        by_text = engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS)
        assert isinstance(server.answered()[-1]["prompt"], str)
    assert by_text == by_ids  # BOS is not doubled, or the answers would be others
    assert all(sample.logps is None for row in by_text for sample in row)


def test_a_sample_depends_on_its_prompts_seed_alone(folder, tokenizer, prompts):
    with Server(folder) as server:
        engine = engine_for(server, tokenizer)
        together = engine.generate(prompts, PARAMS, SEEDS)
        assert engine.generate(prompts[::-1], PARAMS, SEEDS[::-1]) == together[::-1]
        assert engine.generate(prompts, PARAMS, [*SEEDS[:3], 45])[3] != together[3]
        assert engine.generate([], PARAMS, []) == []
        seeds = [line["seed"] for line in server.answered()[: len(prompts) * PARAMS.samples_per_prompt]]
    assert len(set(seeds)) == len(seeds)


def test_a_prompt_that_is_not_its_text_tokenised_is_refused_where_only_text_is_spoken(tmp_path):
    folder = write_tokenizer(tmp_path / "model", merges=(("a", "b"),))
    tokenizer = ChatTokenizer(str(folder))
    split = [tokenizer.encode(letter, add_bos=False, add_eos=False)[0] for letter in "ab"]
    with Server(folder, "--text") as server, pytest.raises(DataError, match="^prompts: 'ab'.* accepts token ids"):
        engine_for(server, tokenizer).generate([split], PARAMS, [0])


def test_requests_under_way_are_as_many_as_allowed_and_no_more(folder, tokenizer, prompts):
    with Server(folder, "--together=3") as server:
        engine_for(server, tokenizer, max_concurrency=3).generate(prompts, PARAMS, SEEDS)
        assert max(line["under_way"] for line in server.answered()) == 3


def test_the_key_is_sent(folder, tokenizer, prompts, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    with Server(folder, "--key=secret") as server:
        assert engine_for(server, tokenizer, api_key_env="SERVER_KEY").generate(prompts, PARAMS, SEEDS)
        with pytest.raises(ConfigError, match="^engine.api_key_env: .*rejects the API key.*wrong key"):
            engine_for(server, tokenizer)


# ---- Faults


def test_what_fails_in_passing_is_repeated(folder, tokenizer, prompts):
    with Server(folder) as server:
        undisturbed = engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS)
    with Server(folder, "--fail", "500", "429", "503") as server:
        assert engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS) == undisturbed


def test_a_server_that_is_only_busy_is_neither_waited_for_as_gone_nor_given_its_weights_again(
    folder, tokenizer, prompts, heard
):
    with Server(folder, "--fail", *["503"] * 4) as server:
        reload_url = server.url.replace("/v1", "/reload")
        engine = engine_for(server, tokenizer, weights_dir=str(folder.parent), reload_url=reload_url)
        engine.update(folder)
        engine.generate(prompts, PARAMS, SEEDS)
        assert [line["weights"] for line in server.answered() if "weights" in line] == [str(folder)]
    assert heard.lines == []


def test_a_server_that_may_have_started_anew_unseen_gets_its_weights_again(folder, tokenizer, prompts):
    with Server(folder, "--fail", "502") as server:
        reload_url = server.url.replace("/v1", "/reload")
        engine = engine_for(server, tokenizer, weights_dir=str(folder.parent), reload_url=reload_url)
        engine.update(folder)
        engine.generate(prompts, PARAMS, SEEDS)
        assert [line["weights"] for line in server.answered() if "weights" in line] == [str(folder)] * 2


def test_a_request_without_an_answer_in_time_is_repeated(folder, tokenizer, prompts):
    with Server(folder, "--together=2") as server:  # the first attempt waits there for a second
        engine = engine_for(server, tokenizer, timeout=3)
        [[completion]] = engine.generate(prompts[:1], SamplingParams(max_new_tokens=8), SEEDS[:1])
    assert completion.tokens


def test_what_keeps_failing_ends_the_run_with_one_line(folder, tokenizer, prompts):
    with Server(folder, "--fail", *["500"] * 20) as server:
        engine = engine_for(server, tokenizer, retries=1)
        with pytest.raises(TrainingError, match=r"failed one request 2 times \(HTTP 500 .*try again") as error:
            engine.generate(prompts, PARAMS, SEEDS)
    assert "\n" not in str(error.value)


def test_a_server_killed_within_a_round_costs_nothing_that_is_finished(folder, tokenizer, prompts, heard):
    with Server(folder) as server:
        undisturbed = engine_for(server, tokenizer).generate(prompts, PARAMS, SEEDS)
    server.log.unlink()
    with Server(folder, "--die-at=6") as server, ThreadPoolExecutor() as pool:
        round = pool.submit(engine_for(server, tokenizer).generate, prompts, PARAMS, SEEDS)
        server.process.wait(SECONDS)
        assert heard.gone.wait(SECONDS) and not round.done()
        finished = len(server.answered())
        with Server(folder, port=server.port) as again:
            assert round.result(SECONDS) == undisturbed
            seeds = [line["seed"] for line in again.answered()]
    assert finished > 0 and len(set(seeds)) == len(seeds) == len(prompts) * PARAMS.samples_per_prompt
    assert [server.url in line for line in heard.lines] == [True, True]  # that it is down, and that it is back


def test_the_wait_for_a_server_ends(folder, tokenizer, prompts):
    with Server(folder, "--die-at=2") as server:
        engine = engine_for(server, tokenizer, wait=0)
        with pytest.raises(TrainingError, match=f"^{re.escape(server.url)} has been down for 0 s"):
            engine.generate(prompts, PARAMS, SEEDS)


# ---- What is wrong from the start


def test_a_server_that_is_not_there_is_named(tokenizer):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ConfigError, match=f"^engine.base_url: {re.escape(url)} does not answer.*refused"):
            ServerEngine(HTTPEngine(url, model="policy"), tokenizer, tokenizer.vocab_size)


def test_a_server_without_the_model_is_refused_with_what_it_has(folder, tokenizer):
    with Server(folder, "--model=another") as server:
        with pytest.raises(ConfigError, match="^engine.model: .*'policy'.*404.*; the server has another$"):
            engine_for(server, tokenizer)


@pytest.mark.parametrize("speaks", [[], ["--text"]], ids=["ids", "text"])
def test_a_server_with_another_tokenizer_is_refused(speaks, tmp_path, tokenizer):
    merged = write_tokenizer(tmp_path / "merged", merges=(("d", "e"),))
    with Server(merged, *speaks) as server, pytest.raises(ConfigError, match="^engine.base_url: .*another tokenizer"):
        engine_for(server, tokenizer)


def test_a_tokenizer_with_other_ids_for_the_same_splits_is_refused(tmp_path, tokenizer):
    shuffled = write_tokenizer(tmp_path / "shuffled", alphabet=BYTES[::-1])
    with Server(shuffled) as server, pytest.raises(ConfigError, match="^engine.base_url: .*another tokenizer"):
        engine_for(server, tokenizer)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("base_url", {"base_url": "localhost:8000"}),
        ("reload_url", {"reload_url": "localhost/reload", "weights_dir": "weights"}),
        ("reload_url", {"reload_url": "http://localhost:8000/reload"}),
        ("model", {"model": None}),
        ("weights_dir", {"weights_dir": "weights"}),
        ("api_key_env", {"api_key_env": "NOT_IN_THE_ENVIRONMENT"}),
        ("timeout", {"timeout": 0}),
        ("retries", {"retries": -1}),
        ("max_concurrency", {"max_concurrency": 0}),
        ("wait", {"wait": -1}),
    ],
)
def test_settings_that_cannot_work_are_refused(key, settings):
    with pytest.raises(ConfigError, match=f"^engine.{key}: "):
        HTTPEngine(**{"base_url": "http://localhost:8000/v1", "model": "policy", **settings})


# ---- Weights


def test_new_weights_are_announced_and_again_to_a_server_that_has_forgotten_them(folder, tokenizer, prompts, heard):
    with Server(folder, "--die-at=6") as server, ThreadPoolExecutor() as pool:
        reload_url = server.url.replace("/v1", "/reload")
        engine = engine_for(server, tokenizer, weights_dir=str(folder.parent), reload_url=reload_url)
        engine.update(folder)
        round = pool.submit(engine.generate, prompts, PARAMS, SEEDS)
        assert heard.gone.wait(SECONDS)
        with Server(folder, port=server.port) as again:
            completions = round.result(SECONDS)
            assert as_sets(completions) == as_sets(expected(again, tokenizer, prompts, weights=str(folder)))
            assert [line["weights"] for line in again.answered() if "weights" in line] == [str(folder)] * 2


def test_a_server_that_started_anew_between_requests_has_its_weights_before_any_rank_asks(folder, tokenizer, prompts):
    with Server(folder) as server:
        settings = {"weights_dir": str(folder.parent), "reload_url": server.url.replace("/v1", "/reload")}
        first, second = (engine_for(server, tokenizer, **settings) for _ in range(2))
        first.update(folder)
        second.update(folder, announce=False)
        for engine in (first, second):
            engine.generate(prompts, PARAMS, SEEDS)
    server.log.unlink()
    with Server(folder, port=server.port) as again:
        first.ready()
        completions = second.generate(prompts, PARAMS, SEEDS)
        assert as_sets(completions) == as_sets(expected(again, tokenizer, prompts, weights=str(folder)))


def test_a_server_that_cannot_reload_is_refused(folder, tokenizer):
    with Server(folder) as server:
        engine = engine_for(server, tokenizer, weights_dir=str(folder.parent), reload_url=f"{server.url}/nowhere")
        with pytest.raises(ConfigError, match="^engine.reload_url: .*nowhere did not load .*404"):
            engine.update(folder)


# ---- transformers serve


def write_model(folder: Path, seed: int) -> LlamaForCausalLM:
    """A tiny Llama with its tokenizer, which is loath to write what is no ASCII text."""
    write_tokenizer(folder)
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL) + len(BYTES)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": None}
    config = LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, tie_word_embeddings=True, **shape, **special)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for id, token in enumerate([*SPECIAL, *BYTES]):
            if id != 2 and not (len(token) == 1 and token.isascii()):
                model.get_input_embeddings().weight[id] = 0
    model.save_pretrained(folder)
    return model


class TransformersServe:
    """``transformers serve`` on a free port; stopped when the block ends."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        program = Path(sys.executable).with_name("transformers")
        self.process = subprocess.Popen(
            [str(program), "serve", "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"],
            env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.listens = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if "Uvicorn running" in line:
                self.listens.set()
        self.listens.set()  # it has ended

    def __enter__(self) -> str:
        assert self.listens.wait(2 * SECONDS) and self.process.poll() is None, "".join(self.lines)
        return f"http://127.0.0.1:{self.port}/v1"

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self.reader.join(SECONDS)
        self.process.stderr.close()


def greedy(model: LlamaForCausalLM, prompts: list[list[int]], stops: list[int]) -> list[list[list[int]]]:
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    ids = [torch.tensor([prompt]) for prompt in prompts]
    return [[model.generate(i, attention_mask=torch.ones_like(i), **settings)[0, i.size(1) :].tolist()] for i in ids]


@pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs the extra transformers[serving]")
def test_transformers_serve_samples_from_each_rounds_folder_as_transformers_does(tmp_path):
    pytest.importorskip("transformers.cli.serving.completion", reason="this transformers serves chats only")
    first, second = tmp_path / "round_0", tmp_path / "round_1"
    references = [write_model(first, seed=0), write_model(second, seed=1)]
    tokenizer = ChatTokenizer(str(first))
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in ("one", "two", "drei")]
    params = SamplingParams(max_new_tokens=16, temperature=0)
    with TransformersServe(tmp_path / "home") as url:
        settings = HTTPEngine(url, weights_dir=str(tmp_path), max_concurrency=1, retries=0)
        engine = ServerEngine(settings, tokenizer, tokenizer.vocab_size)
        answers = []
        for folder, reference in zip((first, second), references, strict=True):
            engine.update(folder)
            completions = engine.generate(prompts, params, [0] * len(prompts))
            answers.append([[sample.tokens for sample in row] for row in completions])
            assert answers[-1] == greedy(reference, prompts, tokenizer.stop_tokens)
        assert answers[0] != answers[1]

        drawn = SamplingParams(max_new_tokens=16, samples_per_prompt=2)
        once = engine.generate(prompts, drawn, [1, 2, 3])
        assert engine.generate(prompts, drawn, [1, 2, 3]) == once
        assert all(row[0] != row[1] for row in once)

        # One folder for all rounds works too, if the server is told to forget what it was.
        shutil.copy(second / "model.safetensors", first / "model.safetensors")
        settings = HTTPEngine(
            url, weights_dir=str(tmp_path), reload_url=url.replace("/v1", "/reset"), max_concurrency=1
        )
        reset = ServerEngine(settings, tokenizer, tokenizer.vocab_size)
        reset.update(first)
        assert [[s.tokens for s in row] for row in reset.generate(prompts, params, [0, 0, 0])] == answers[1]

        with pytest.raises(ConfigError, match="^engine.model: .*nowhere"):
            engine.update(tmp_path / "nowhere")
