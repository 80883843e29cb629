"""Sampling by a server of its own, through the completions API of OpenAI: vLLM, ``transformers serve`` and their like.

1. A probe finds out, before anything is sampled, whether the server is there, has the model, and has our tokenizer.
2. Each completion is a request of its own, with a seed of its own, so that a fault costs one completion at most.
3. A request that fails is repeated. While no server answers, all wait for it, and go on when it is back.

A server that takes and returns token ids (vLLM) says exactly what it sampled, with log-probs. One that speaks text only
gets the prompt's text, and the text of its answer is tokenised here: that can be another split of the same text than
the one that was sampled, so these completions have no log-probs.

What vLLM needs: ``VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --served-model-name policy``, a ``weights_dir`` that both
sides see under one path, ``model: policy`` and ``reload_url: http://HOST:8000/collective_rpc``. Development mode opens
routes that ask for no key: let only the trainer reach the port. ``transformers serve``, started without a model, needs
``weights_dir`` only; with ``reload_url: http://HOST:8000/reset`` it also lets go of the weights of earlier rounds.

Left out: the chat route, which would put a template of its own around prompts that have one.
"""

import json
import logging
import os
import random
import urllib.parse
import uuid
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from humanline.data import ChatTokenizer
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.models import LogProbDecoder
from humanline.rollout._connection import Connection, Gone, Refused
from humanline.rollout._engine import Completion, Engine, EngineSettings
from humanline.rollout._reply import Reply, read_reply
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids

__all__ = ["HTTPEngine"]

log = logging.getLogger(__name__)

_PROBE = "Ünïcode, 12345.678 and\n\tdef f(x): return x  # 你好"  # what tokenizers split differently


@dataclass(frozen=True)
class HTTPEngine(EngineSettings):
    """Samples from a server that speaks the completions API of OpenAI.

    Args:
        base_url (str): where the API is, as its clients take it: ``http://localhost:8000/v1``.
        model (str | None): the name by which the server knows the model; None names the folder handed over last.
        api_key_env (str | None): the environment variable that holds the server's key; None sends none.
        timeout (float): seconds after which a request without an answer has failed.
        retries (int): how often a request that failed, or was lost with its server, is repeated.
        max_concurrency (int): the most requests of this process under way at a time.
        wait (float | None): seconds to wait for a server that is gone; None waits for ever.
        weights_dir (str | None): where each round's weights are to be written, in a folder of their own (servers
            remember what they have loaded by its path); None leaves the server those that it has.
        reload_url (str | None): where to announce new weights to a server that does not load them by name.

    Raises:
        ConfigError: if a setting cannot work.
    """

    base_url: str
    _: KW_ONLY
    model: str | None = None
    api_key_env: str | None = None
    timeout: float = 600.0
    retries: int = 5
    max_concurrency: int = 64
    wait: float | None = None
    weights_dir: str | None = None
    reload_url: str | None = None

    def __post_init__(self) -> None:
        for key, url in (("base_url", self.base_url), ("reload_url", self.reload_url or self.base_url)):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"engine.{key}: {url!r} is no address; give one like http://localhost:8000/v1")
        for key, value, least in (("retries", self.retries, 0), ("max_concurrency", self.max_concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"engine.{key}: {value!r} is not a whole number of at least {least}")
        if self.timeout <= 0:
            raise ConfigError(f"engine.timeout: {self.timeout!r} is not above 0 seconds; give the longest request's")
        if self.wait is not None and self.wait < 0:
            raise ConfigError(f"engine.wait: {self.wait!r} is below 0 seconds; null waits for ever")
        if self.model is None and self.weights_dir is None:
            raise ConfigError("engine.model: is missing; name the model that the server has, or give weights_dir")
        if self.weights_dir is None and self.reload_url is not None:
            raise ConfigError("engine.reload_url: there are no weights to announce; give weights_dir, or leave it out")
        if self.weights_dir is not None and self.model is not None and self.reload_url is None:
            raise ConfigError(
                f"engine.weights_dir: a server that is asked for {self.model!r} does not learn of new weights; give "
                "reload_url, or leave model out if the server loads the folder that it is asked for"
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(f"engine.api_key_env: {self.api_key_env} is not in the environment; export it")

    def build(self, tokenizer: ChatTokenizer, policy: LogProbDecoder) -> "ServerEngine":
        return ServerEngine(self, tokenizer, policy.tok_embeddings.num_embeddings)


class ServerEngine(Engine):
    """The engine of :class:`HTTPEngine`.

    Asks at once whether the server is there and, if the model has its name already, whether it is the right one.

    Args:
        settings (HTTPEngine): its settings.
        tokenizer (ChatTokenizer): the policy's.
        rows (int): rows of the policy's embedding; some may be of no token.

    Raises:
        ConfigError: if the server is not there, lacks the model, refuses the key, or has another tokenizer.
    """

    def __init__(self, settings: HTTPEngine, tokenizer: ChatTokenizer, rows: int) -> None:
        headers = {"Content-Type": "application/json"}
        if settings.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[settings.api_key_env]}"
        self.weights_dir = None if settings.weights_dir is None else Path(settings.weights_dir)
        self._url, self._reload_url, self._model = settings.base_url.rstrip("/"), settings.reload_url, settings.model
        self._retries = settings.retries
        self._max_concurrency = settings.max_concurrency
        self._tokenizer, self._rows = tokenizer, rows
        ids = token_ids(tokenizer)
        self._token_ids = None if ids is None else frozenset(ids)
        self._folder: str | None = None
        self._salt = ""
        self._has_sampled = False
        self._takes_ids = self._adds_bos = self._is_strict = False  # as the last probe found the server
        self._server = Connection(
            self._url,
            headers,
            timeout=settings.timeout,
            retries=settings.retries,
            wait=settings.wait,
            introduce=self._announce,
        )
        try:
            self._server.greet()
        except Gone as gone:
            raise ConfigError(f"engine.base_url: {self._url} does not answer ({gone}); start the server") from None
        if self._model is not None:
            self._probe()

    def update(self, folder: Path, *, announce: bool = True) -> None:
        """Has the server sample from new weights.

        Args:
            folder (Path): the policy in HF layout, with its tokenizer, under a path that the server sees too.
            announce (bool): False where another rank has told ``reload_url`` of them.

        Raises:
            ConfigError: if the server cannot load them, or has another tokenizer.
            TrainingError: if the server stays away.
        """
        self._folder, self._salt = str(folder.absolute()), uuid.uuid4().hex
        self._server.is_introduced = not announce
        self._server.start()
        self._has_sampled = False
        self._server.heeding(self._probe)  # a server may take minutes to load weights

    def _announce(self) -> None:
        """Tells of the folder in the words of vLLM's ``/collective_rpc``, of SGLang's ``/update_weights_from_disk``,
        and in ``path`` for others: each reads its own."""
        if self._reload_url is not None and self._folder is not None:
            vllm = {"method": "reload_weights", "kwargs": {"weights_path": self._folder}}
            try:
                self._server.exchange(self._reload_url, {"path": self._folder, "model_path": self._folder, **vllm})
            except Refused as error:
                if error.passes:
                    raise
                raise ConfigError(f"engine.reload_url: {self._reload_url} refuses {self._folder} ({error})") from None

    def _probe(self) -> None:
        """Completes a prompt by one token, to see how the server takes prompts, and that it reads them as we do."""
        ids = self._tokenizer.encode_prompt([{"role": "user", "content": _PROBE}])
        params = SamplingParams(max_new_tokens=1, temperature=0)
        self._takes_ids = self._adds_bos = self._is_strict = False
        while True:
            try:
                reply = self._server.persist(lambda: self._sample(self._text(ids), params, seed=0))
                break
            except Refused as error:
                if error.status != 422 or self._is_strict:
                    raise ConfigError(self._complaint(error)) from None
                self._is_strict = True  # there are fields that it does not know
        self._takes_ids = reply.token_ids is not None
        theirs, count = reply.prompt_ids, reply.prompt_tokens
        if count is None:
            log.warning(f"{self._url} does not count tokens: whether its tokenizer is the policy's remains unknown")
            return
        # A tokenizer that puts BOS in front of any text is not to double that of the prompt.
        self._adds_bos = theirs is None and count == len(ids) + 1 and ids[0] == self._tokenizer.bos_id
        if count != len(ids) + self._adds_bos or theirs not in (None, ids):
            raise ConfigError(
                f"engine.base_url: {self._url} has another tokenizer (what is {len(ids)} tokens of ours is {count} of "
                "its own, or others); serve the model that tokenizer.path belongs to"
            )

    def _complaint(self, error: "Refused") -> str:
        """What the user is told of a server that does not complete the probe."""
        if error.status in (401, 403):
            return f"engine.api_key_env: {self._url} refuses the key ({error}); export the right one"
        if error.status == 200:
            return self._misunderstanding(error)
        try:
            listed = json.loads(self._server.exchange(f"{self._url}/models"))["data"]
            remedy = f"it has {', '.join(model['id'] for model in listed)}"
        except (Gone, Refused, LookupError, TypeError, ValueError):
            remedy = "see its log"
        return f"engine.model: {self._url} does not complete with {self._model or self._folder!r} ({error}); {remedy}"

    # ---- Sampling

    def ready(self) -> None:
        """Tells the server of the weights once more if it may have started anew, unseen, since it was last asked.

        Raises:
            ConfigError: if the server cannot load them.
            TrainingError: if the server stays away, or fails again and again.
        """
        self._server.start()
        if self._has_sampled:
            self._server.is_introduced = False
        try:
            self._server.heeding(lambda: self._server.persist(self._server.greet))
        except Refused as error:
            raise self._failed(error) from None

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """The completions of each prompt, in the order of the prompts.

        One with an id that no token has, which a server may draw where the model's vocabulary is padded, is left out
        and counted in the log.

        Args:
            prompts (Sequence[Sequence[int]]): the token ids of each prompt, at least one.
            params (SamplingParams): how completions are drawn; its seed is not used.
            seeds (Sequence[int]): one for each prompt's samples.

        Raises:
            ConfigError: if the server refuses a request, or answers otherwise than asked.
            DataError: if the server takes text, and a prompt is not what its own text is tokenised into.
            TrainingError: if the server stays away, or fails again and again.
        """
        self._server.start()
        self._has_sampled = True
        count = params.samples_per_prompt
        inputs = [list(prompt) if self._takes_ids else self._text(prompt) for prompt in prompts]
        jobs = [(each, _seed(seed, j)) for each, seed in zip(inputs, seeds, strict=True) for j in range(count)]
        drawn: list[Any] = [None] * len(jobs)
        # Its threads end with the process, so that a run that is stopped need not wait for requests under way.
        pool = ThreadPool(max(1, min(self._max_concurrency, len(jobs))))
        try:
            results = pool.imap_unordered(lambda i: (i, self._draw(*jobs[i], params)), range(len(jobs)))
            for _ in jobs:
                i, completion = self._server.next_of(results)
                drawn[i] = completion
        except BaseException:
            self._server.give_up()
            raise
        finally:
            pool.terminate()
        if left_out := drawn.count(None):
            log.warning(
                f"{self._url}: {left_out:,} of {len(drawn):,} completions are left out: they have an id that no token "
                "has (the model's vocabulary is padded)"
            )
        rows = [drawn[i : i + count] for i in range(0, len(drawn), count)]
        return [[completion for completion in row if completion is not None] for row in rows]

    def stop(self) -> None:
        """Ends sampling for good; what is under way raises :class:`~humanline.rollout.Stopped`."""
        self._server.stop()

    def _text(self, prompt: Sequence[int]) -> str:
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        if self._encode(text) != list(prompt):
            raise DataError(
                f"prompts: {text[:40]!r}... has another tokenisation than the prompt's, and {self._url} takes text; "
                "use a server that takes token ids, such as vLLM"
            )
        return text.removeprefix(self._tokenizer.decode(prompt[:1], False)) if self._adds_bos else text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def _draw(self, prompt: str | list[int], seed: int, params: SamplingParams) -> Completion | None:
        """One completion; None if it has an id that no token has."""
        try:
            reply = self._server.persist(lambda: self._sample(prompt, params, seed))
        except Refused as error:
            if error.passes:
                raise self._failed(error) from None
            if error.status == 200:
                raise ConfigError(self._misunderstanding(error)) from None
            raise ConfigError(f"engine.base_url: {self._url} refuses a request ({error})") from None
        tokens, logps = reply.token_ids, reply.logps
        if isinstance(prompt, list) and reply.prompt_ids not in (None, prompt):
            raise ConfigError(
                f"engine.base_url: {self._url} answers another prompt than it was asked for (choices[0]."
                "prompt_token_ids); use a server that takes token ids as they are"
            )
        if isinstance(prompt, list) and tokens is None:
            raise ConfigError(
                f"engine.base_url: {self._url} leaves out choices[0].token_ids, which it gave to the first request; "
                "its text may have another tokenisation"
            )
        if tokens is None:
            tokens, logps = self._encode(reply.text), None
        largest = max(tokens, default=0)
        if largest >= self._rows:
            raise ConfigError(
                f"engine.base_url: {self._url} answers choices[0].token_ids with {largest}, outside the model's "
                f"vocabulary of {self._rows}; serve the model that is trained"
            )
        if self._token_ids is not None and not self._token_ids.issuperset(tokens):
            return None
        stops = self._tokenizer.stop_tokens
        if (end := next((i for i, id in enumerate(tokens) if id in stops), len(tokens)) + 1) < len(tokens):
            tokens, logps = tokens[:end], logps and logps[:end]  # a server that goes on behind a stop token
        if reply.finish_reason == "stop" and not (tokens and tokens[-1] in stops):
            tokens, logps = [*tokens, stops[0]], None
        tokens = tokens[: params.max_new_tokens]  # tokenised anew it can be longer
        if logps is not None and len(logps) != len(tokens):
            logps = None
        return Completion(tokens, "stop" if tokens and tokens[-1] in stops else "length", logps)

    def _failed(self, error: Refused) -> TrainingError:
        return TrainingError(f"{self._url} failed {self._retries + 1} times at one request ({error})")

    def _misunderstanding(self, error: Refused) -> str:
        return (
            f"engine.base_url: {self._url} answers /completions otherwise than asked: {error}; use a server with "
            "OpenAI's completions API"
        )

    def _sample(self, prompt: str | list[int], params: SamplingParams, seed: int) -> Reply:
        """One attempt at a completion."""
        body: dict[str, Any] = {"model": self._model or self._folder, "prompt": prompt, "seed": seed}
        body["max_tokens"] = params.max_new_tokens
        # All that a model's generation_config.json could set otherwise is set to what leaves the distribution alone.
        draws: dict[str, Any] = {"top_p": params.top_p, "repetition_penalty": 1.0}
        stops = self._tokenizer.stop_tokens
        if self._is_strict:  # transformers serve
            greedy = params.temperature == 0
            draws |= {"do_sample": False} if greedy else {"do_sample": True, "temperature": params.temperature}
            body["generation_config"] = json.dumps(draws | {"top_k": 0, "eos_token_id": stops})
        else:
            body |= draws | {"temperature": params.temperature, "top_k": -1, "min_p": 0.0, "stop_token_ids": stops}
            body |= {"add_special_tokens": False, "return_token_ids": True, "logprobs": 0}
            if self._salt:
                body["cache_salt"] = self._salt  # keys and values of other weights must not be found
        return read_reply(self._server.exchange(f"{self._url}/completions", body))


def _seed(seed: int, sample: int) -> int:
    return random.Random(f"{seed} {sample}").getrandbits(31)
