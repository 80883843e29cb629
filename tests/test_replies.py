"""What a server may answer instead of a completion, and ids that no token has."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TrajectoryRun
from test_http_engine import write_tokenizer
from test_online import larger_vocabulary, lines, online, rounds
from test_rewards import judge
from torchtune.models.llama3 import llama3
from toys import Letters

from humanline.data import ChatTokenizer, Group, RowBudget, encoded_groups, lay_out, pack
from humanline.errors import ConfigError, TrainingError
from humanline.models import LogProbDecoder, fixed_log_probs
from humanline.rollout import HTTPEngine, Prompt, SamplingParams, TorchtuneEngine

ROWS = 300  # of the model; the tokenizer has 260 tokens
PARAMS = SamplingParams(max_new_tokens=4, samples_per_prompt=2)


@contextmanager
def completions(answer):
    """A server that completes the engine's probe, and then gives what ``answer(nth)`` says; its address."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "policy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["max_tokens"] == 1:
                self.reply({"choices": [right(token_ids=[5], prompt_token_ids=None)]})
            else:
                asked.append(body)
                self.reply(answer(len(asked)))

        def reply(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def right(**changes):
    return {"text": "ab", "finish_reason": "length", "token_ids": [7, 8]} | changes


def one(**changes):
    return {"choices": [right(**changes)]}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """``engine(url)`` is set up with a policy that has more rows than its tokenizer has tokens."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tokenizer = ChatTokenizer(str(write_tokenizer(tmp_path / "tokenizer")))
    with torch.device("meta"):
        policy = LogProbDecoder(llama3(ROWS, 1, 2, 1, 8, 16))

    def setup(url):
        return HTTPEngine(url, model="policy", retries=0, max_concurrency=2).build(tokenizer, policy)

    return setup


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (one(text=None, token_ids=None), r"choices\[0\].text: expected a string \(or token_ids\), got None"),
        (one(text=["a"], token_ids=None), r"choices\[0\].text: expected .*, got \['a'\]"),
        (one(text="\ud800", token_ids=None), r"choices\[0\].text: expected .*, got "),
        (one(token_ids="ab"), r"choices\[0\].token_ids: expected a list of token ids, got 'ab'"),
        (one(token_ids=[1, None]), r"choices\[0\].token_ids: expected .*, got \[1, None\]"),
        (one(token_ids=[-1]), r"choices\[0\].token_ids: expected .*, got \[-1\]"),
        (one(token_ids=[ROWS]), rf"id {ROWS} in choices\[0\].token_ids, outside the model's vocabulary of {ROWS}"),
        ({"choices": []}, "choices: expected a list of one object, got 0 choices"),
        ({"choices": [right(), right()]}, "choices: expected .*, got 2 choices"),
        ({"choices": None}, "choices: expected .*, got "),
        ({"choices": ["a"]}, "choices: expected .*, got 1 choices"),
        ({}, "choices: expected .*, got "),
        ([], "choices: expected .*, got "),
        ({"choices": [{"text": "a"}]}, r"choices\[0\].finish_reason: expected .*, got nothing"),
        (b"<html>", "expected JSON, got "),
        (one(finish_reason=None), "one request failed 1 times .finish_reason None"),
    ],
)
def test_an_answer_that_is_no_completion_ends_sampling_with_the_field_in_one_line(engine, answer, field):
    with completions(lambda _: answer) as url:
        with pytest.raises((ConfigError, TrainingError), match=f"{re.escape(url)}:? .*{field}") as error:
            engine(url).generate([[1, 2]], PARAMS, [3])
    assert "\n" not in str(error.value)


def test_what_is_only_a_courtesy_may_be_missing(engine):
    with completions(lambda nth: one(logprobs=[None, {"token_logprobs": [None, "x"]}][nth % 2], text=None)) as url:
        [row] = engine(url).generate([[1, 2]], PARAMS, [3])
    assert [completion.tokens for completion in row] == [[7, 8]] * 2
    assert [completion.logps for completion in row] == [None] * 2


def test_a_completion_with_an_id_that_no_token_has_is_left_out_and_counted(engine, caplog):
    with completions(lambda nth: one(token_ids=[7, 270] if nth == 1 else [7, 8])) as url:
        [row] = engine(url).generate([[1, 2]], PARAMS, [3])
        assert [completion.tokens for completion in row] == [[7, 8]]
        assert f"{url}: 1 of 2 completions are left out: they have an id without a token" in caplog.text


def test_what_a_server_adds_behind_a_stop_token_is_cut_off(engine):
    stops = []
    logps = {"token_logprobs": [-0.1, -0.2, -0.3]}
    with completions(lambda nth: one(token_ids=[7, stops[0], 9], logprobs=logps)) as url:
        mine = engine(url)
        stops += mine._tokenizer.stop_tokens
        [[completion, _]] = mine.generate([[1, 2]], PARAMS, [3])
    assert (completion.tokens, completion.finish_reason) == ([7, stops[0]], "stop")
    assert completion.logps == [-0.1, -0.2]


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"prompt_token_ids": [9, 9]}, "completed another prompt than the one sent"),
        ({"token_ids": None}, "sent no choices[0].token_ids, but did for the first request"),
    ],
)
def test_a_server_that_answers_otherwise_than_its_probe_said_is_refused(engine, later, words):
    with completions(lambda nth: one(**later)) as url:
        with pytest.raises(ConfigError) as error:
            engine(url).generate([[1, 2]], PARAMS, [3])
    assert words in str(error.value)


@pytest.mark.parametrize("content", [["a"], {"text": "Rating: 5"}, 5])
def test_a_judge_that_answers_no_text_ends_scoring_with_the_field_in_one_line(content, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with judge(lambda *_: (200, {"choices": [{"message": {"content": content}}]}), retries=0) as (reward, _):
        with pytest.raises(
            ConfigError,
            match=r"^reward.base_url: http://.*: expected a string or null in choices\[0\].message.content, got ",
        ):
            reward([Prompt("", [{"role": "user", "content": "?"}], {})], [["a"]])


# ---- The engine in the process


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"temperature": 0}], ids=["all", "nucleus", "greedy"])
def test_rows_that_no_token_has_are_not_sampled_and_count_in_the_log_probs(params):
    torch.manual_seed(0)
    model = LogProbDecoder(llama3(64, 1, 2, 1, 16, 64))
    with torch.no_grad():  # whatever the hidden state is, one of the two halves of the padding wins
        direction = torch.randn(16)
        model.output.weight[40:52], model.output.weight[52:] = 10 * direction, -10 * direction
    params = SamplingParams(max_new_tokens=12, samples_per_prompt=4, **params)
    tokens = {id for id in range(40) if id != 17}  # with a gap

    def drawn(token_ids):
        engine = TorchtuneEngine(model, stop_tokens=[0], batch_size=8, token_ids=token_ids)
        return engine.generate([[1, 2, 3]], params)[0]

    assert sum(id >= 40 for sample in drawn(None) for id in sample.tokens) > 24
    samples = drawn(tokens)
    assert {id for sample in samples for id in sample.tokens} <= tokens
    budget = RowBudget(tokens_per_row=128)
    group = Group([1, 2, 3], tuple(sample.tokens for sample in samples))
    trained = fixed_log_probs(model, lay_out([group], pack([group], budget)[0], budget))
    sampled = torch.tensor([logp for sample in samples for logp in sample.logps])
    torch.testing.assert_close(sampled, trained, atol=1e-3, rtol=0)
    assert sampled.mean() < -3  # nearly all of the probability is the padding's


def test_a_tokenizer_whose_stop_tokens_are_none_of_its_own_is_refused():
    model = LogProbDecoder(llama3(64, 1, 2, 1, 16, 64))
    with pytest.raises(ConfigError, match=r"^tokenizer: none of its stop tokens \[50\] is a known token"):
        TorchtuneEngine(model, stop_tokens=[50], batch_size=8, token_ids=range(40))


def test_an_online_run_of_a_padded_model_writes_rounds_that_are_a_dataset(trajectory):
    run: TrajectoryRun = online(trajectory("grpo_8_k4"), every=6)
    larger_vocabulary(run, ROWS)
    run.config["model"]["vocab_size"] = ROWS
    assert run.train() is None
    assert max(id for line in lines(run) for response in line["responses"] for id in response) < Letters.vocab_size
    assert len(encoded_groups(Letters(), list(map(str, rounds(run))))) == 24
