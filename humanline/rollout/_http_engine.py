"""Sampling from a separate server through OpenAI's completions API: vLLM, ``transformers serve`` and similar servers.

1. Before sampling, a probe checks that the server is up, has the model, and uses the policy's tokenizer.
2. Each completion is one request with its own seed, so a failure costs one completion at most.
3. A failed request is retried. While the server is down, all requests wait, and resume when it is back.

A server that accepts and returns token ids (vLLM) reports exactly the tokens that it sampled, with log-probs. A
text-only server receives the prompt's text, and its reply is tokenised here. The tokens can differ from those that were
sampled, so these completions have no log-probs.

vLLM needs ``VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --served-model-name policy``, a ``weights_dir`` that has the same
path on both sides, ``model: policy`` and ``reload_url: http://HOST:8000/collective_rpc``. Development mode opens routes
that need no key: let only the trainer reach the port. ``transformers serve``, started without a model, needs only
``weights_dir``; with ``reload_url: http://HOST:8000/reset`` it also frees the weights of earlier rounds.

Not supported: the chat route, which would apply a chat template to prompts that already have one.
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
from humanline.rollout._engine import Completion, Engine, EngineSettings, progress_of
from humanline.rollout._reply import Reply, read_reply
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids

__all__ = ["HTTPEngine"]

log = logging.getLogger(__name__)

_PROBE = "Ünïcode, 12345.678 and\n\tdef f(x): return x  # 你好"  # text that tokenizers split differently


@dataclass(frozen=True)
class HTTPEngine(EngineSettings):
    """Samples from a server with OpenAI's completions API.

    Args:
        base_url (str): the URL of the API, with its version, such as ``http://localhost:8000/v1``.
        model (str | None): the server's name for the model; None uses the path of the newest weights folder as the
            name, which needs ``weights_dir``.
        api_key_env (str | None): the environment variable that holds the server's API key; None sends no key.
        timeout (float): seconds after which a request without an answer fails.
        retries (int): the maximum number of retries of a failed request.
        max_concurrency (int): the maximum number of concurrent requests of this process.
        wait (float | None): seconds to wait for a server that is down; None waits without limit.
        weights_dir (str | None): the folder where each round's weights are written, in a new subfolder each (servers
            cache loaded weights by path); None writes none, and the server keeps its weights.
        reload_url (str | None): the URL at which new weights are announced to the server; None announces none, for a
            server that loads weights by the folder's name.
        logprobs_mode (str): the log-probs that the server returns: ``raw_logprobs``, at temperature 1, or
            ``processed_logprobs``, at the sampling temperature. vLLM has an option of the same name.

    Raises:
        ConfigError: if a setting is invalid.
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
    logprobs_mode: str = "raw_logprobs"

    def __post_init__(self) -> None:
        for key, url in (("base_url", self.base_url), ("reload_url", self.reload_url or self.base_url)):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"engine.{key}: expected a URL such as http://localhost:8000/v1, got {url!r}")
        for key, value, least in (("retries", self.retries, 0), ("max_concurrency", self.max_concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"engine.{key}: expected a whole number of at least {least}, got {value!r}")
        if self.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise ConfigError(
                f"engine.logprobs_mode: expected raw_logprobs or processed_logprobs, got {self.logprobs_mode!r}"
            )
        if self.timeout <= 0:
            raise ConfigError(f"engine.timeout: expected more than 0 seconds, got {self.timeout!r}")
        if self.wait is not None and self.wait < 0:
            raise ConfigError(f"engine.wait: expected at least 0 seconds, or null for no limit, got {self.wait!r}")
        if self.model is None and self.weights_dir is None:
            raise ConfigError("engine.model: missing; set it to the server's name for the model, or set weights_dir")
        if self.weights_dir is None and self.reload_url is not None:
            raise ConfigError(
                "engine.reload_url: there are no weights to announce; set weights_dir, or remove reload_url"
            )
        if self.weights_dir is not None and self.model is not None and self.reload_url is None:
            raise ConfigError(
                f"engine.weights_dir: with model: {self.model!r} the server does not learn of new weights; set "
                "reload_url, or remove model if the server loads weights by the folder's name"
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(f"engine.api_key_env: environment variable {self.api_key_env} is not set; export it")

    def build(self, tokenizer: ChatTokenizer, policy: LogProbDecoder) -> "ServerEngine":
        return ServerEngine(self, tokenizer, policy.tok_embeddings.num_embeddings)


class ServerEngine(Engine):
    """The engine of :class:`HTTPEngine`.

    Checks at once that the server is up and, if ``model`` is set, that it samples from the right model.

    Args:
        settings (HTTPEngine): its settings.
        tokenizer (ChatTokenizer): the policy's tokenizer.
        rows (int): rows of the policy's embedding; some may have no token.

    Raises:
        ConfigError: if the server is down, lacks the model, rejects the key, or uses another tokenizer.
    """

    def __init__(self, settings: HTTPEngine, tokenizer: ChatTokenizer, rows: int) -> None:
        headers = {"Content-Type": "application/json"}
        if settings.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[settings.api_key_env]}"
        self.weights_dir = None if settings.weights_dir is None else Path(settings.weights_dir)
        self._url, self._reload_url, self._model = settings.base_url.rstrip("/"), settings.reload_url, settings.model
        self._retries, self._logprobs_mode = settings.retries, settings.logprobs_mode
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
        """Makes the server sample from new weights.

        Args:
            folder (Path): the policy in Hugging Face layout, with its tokenizer; the server must see the same path.
            announce (bool): False if another rank has announced the weights at ``reload_url``.

        Raises:
            ConfigError: if the server cannot load the weights, or uses another tokenizer.
            TrainingError: if the server stays down.
        """
        self._folder, self._salt = str(folder.absolute()), uuid.uuid4().hex
        self._server.is_introduced = not announce
        self._server.start()
        self._has_sampled = False
        self._server.heeding(self._probe)  # a server may take minutes to load weights

    def _announce(self) -> None:
        """Announces the folder at ``reload_url``.

        The body has fields for vLLM's ``/collective_rpc`` and SGLang's ``/update_weights_from_disk``, and ``path`` for
        other servers.
        """
        if self._reload_url is not None and self._folder is not None:
            vllm = {"method": "reload_weights", "kwargs": {"weights_path": self._folder}}
            try:
                self._server.exchange(self._reload_url, {"path": self._folder, "model_path": self._folder, **vllm})
            except Refused as error:
                if error.passes:
                    raise
                raise ConfigError(
                    f"engine.reload_url: {self._reload_url} did not load {self._folder} ({error}); see the server's log"
                ) from None

    def _probe(self) -> None:
        """Completes a prompt by one token, to learn how the server accepts prompts and to check its tokenizer."""
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
                self._is_strict = True  # it rejects fields that it does not know
        self._takes_ids = reply.token_ids is not None
        theirs, count = reply.prompt_ids, reply.prompt_tokens
        if count is None:
            log.warning(f"{self._url} returns no token counts: its tokenizer cannot be compared with the policy's")
            return
        # A tokenizer that adds BOS to every text must not double the prompt's own BOS.
        self._adds_bos = theirs is None and count == len(ids) + 1 and ids[0] == self._tokenizer.bos_id
        if count != len(ids) + self._adds_bos or theirs not in (None, ids):
            raise ConfigError(
                f"engine.base_url: {self._url} uses another tokenizer (a text is {len(ids)} tokens here and {count} "
                "there, or other ids); serve the model that tokenizer.path belongs to"
            )

    def _complaint(self, error: "Refused") -> str:
        """Returns the error message for a server that does not complete the probe."""
        if error.status in (401, 403):
            return f"engine.api_key_env: {self._url} rejects the API key ({error}); export the right one"
        if error.status == 200:
            return self._misunderstanding(error)
        try:
            listed = json.loads(self._server.exchange(f"{self._url}/models"))["data"]
            remedy = f"the server has {', '.join(model['id'] for model in listed)}"
        except (Gone, Refused, LookupError, TypeError, ValueError):
            remedy = "see the server's log"
        return f"engine.model: {self._url} cannot sample from {self._model or self._folder!r} ({error}); {remedy}"

    # ---- Sampling

    def ready(self) -> None:
        """Announces the weights again if the server may have restarted, unseen, since the last request.

        Raises:
            ConfigError: if the server cannot load the weights.
            TrainingError: if the server stays down, or its retries are used up.
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
        """Returns the completions of each prompt, in the order of the prompts.

        From a padded vocabulary a server may sample an id without a token. Such completions are left out, and counted
        in the log.

        Args:
            prompts (Sequence[Sequence[int]]): the token ids of each prompt; a prompt has at least one.
            params (SamplingParams): the sampling settings; ``seed`` is not used.
            seeds (Sequence[int]): the seed of each prompt's draws.

        Raises:
            ConfigError: if the server rejects a request, or its reply does not match the request.
            DataError: if the server accepts only text, and a prompt's text is tokenised into other ids.
            TrainingError: if the server stays down, or its retries are used up.
        """
        self._server.start()
        self._has_sampled = True
        count = params.samples_per_prompt
        inputs = [list(prompt) if self._takes_ids else self._text(prompt) for prompt in prompts]
        jobs = [(each, _seed(seed, j)) for each, seed in zip(inputs, seeds, strict=True) for j in range(count)]
        drawn: list[Any] = [None] * len(jobs)
        # Its threads are daemons, so a stopped run does not wait for open requests.
        pool = ThreadPool(max(1, min(self._max_concurrency, len(jobs))))
        try:
            results = pool.imap_unordered(lambda i: (i, self._draw(*jobs[i], params)), range(len(jobs)))
            with progress_of(len(jobs)) as bar:
                for _ in jobs:
                    i, completion = self._server.next_of(results)
                    drawn[i] = completion
                    bar.update()
        except BaseException:
            self._server.give_up()
            raise
        finally:
            pool.terminate()
        if left_out := drawn.count(None):
            log.warning(
                f"{self._url}: {left_out:,} of {len(drawn):,} completions are left out: they have an id without a "
                "token (the model's vocabulary is padded)"
            )
        rows = [drawn[i : i + count] for i in range(0, len(drawn), count)]
        return [[completion for completion in row if completion is not None] for row in rows]

    def logps_temperature(self, params: SamplingParams) -> float | None:
        if self._logprobs_mode == "raw_logprobs":
            return 1.0
        return params.temperature if params.top_p == 1 else None  # servers renormalise what top_p leaves

    def stop(self) -> None:
        """Ends sampling permanently; calls in progress raise :class:`~humanline.rollout.Stopped`."""
        self._server.stop()

    def _text(self, prompt: Sequence[int]) -> str:
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        if self._encode(text) != list(prompt):
            raise DataError(
                f"prompts: {text[:40]!r}... is tokenised into other ids than the prompt's, and {self._url} accepts "
                "only text; use a server that accepts token ids, such as vLLM"
            )
        return text.removeprefix(self._tokenizer.decode(prompt[:1], False)) if self._adds_bos else text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def _draw(self, prompt: str | list[int], seed: int, params: SamplingParams) -> Completion | None:
        """Returns one completion; None if it has an id without a token."""
        try:
            reply = self._server.persist(lambda: self._sample(prompt, params, seed))
        except Refused as error:
            if error.passes:
                raise self._failed(error) from None
            if error.status == 200:
                raise ConfigError(self._misunderstanding(error)) from None
            raise ConfigError(f"engine.base_url: {self._url} rejects a request ({error}); see its log") from None
        tokens, logps = reply.token_ids, reply.logps
        if isinstance(prompt, list) and reply.prompt_ids not in (None, prompt):
            raise ConfigError(
                f"engine.base_url: {self._url} completed another prompt than the one sent (choices[0]."
                "prompt_token_ids); use a server that does not change token ids"
            )
        if isinstance(prompt, list) and tokens is None:
            raise ConfigError(
                f"engine.base_url: {self._url} sent no choices[0].token_ids, but did for the first request; use a "
                "server that always sends them, since its text may be tokenised into other ids"
            )
        if tokens is None:
            tokens, logps = self._encode(reply.text), None
        largest = max(tokens, default=0)
        if largest >= self._rows:
            raise ConfigError(
                f"engine.base_url: {self._url} sent id {largest} in choices[0].token_ids, outside the model's "
                f"vocabulary of {self._rows}; serve the model that is trained"
            )
        if self._token_ids is not None and not self._token_ids.issuperset(tokens):
            return None
        stops = self._tokenizer.stop_tokens
        if (end := next((i for i, id in enumerate(tokens) if id in stops), len(tokens)) + 1) < len(tokens):
            tokens, logps = tokens[:end], logps and logps[:end]  # the server continued after a stop token
        if reply.finish_reason == "stop" and not (tokens and tokens[-1] in stops):
            tokens, logps = [*tokens, stops[0]], None
        tokens = tokens[: params.max_new_tokens]  # text tokenised here can have more tokens
        if logps is not None and len(logps) != len(tokens):
            logps = None
        return Completion(tokens, "stop" if tokens and tokens[-1] in stops else "length", logps)

    def _failed(self, error: Refused) -> TrainingError:
        return TrainingError(f"{self._url} failed one request {self._retries + 1} times ({error}); check the server")

    def _misunderstanding(self, error: Refused) -> str:
        return (
            f"engine.base_url: {self._url} sent an unexpected reply to /completions: {error}; use a server with "
            "OpenAI's completions API"
        )

    def _sample(self, prompt: str | list[int], params: SamplingParams, seed: int) -> Reply:
        """Requests one completion, without retries."""
        body: dict[str, Any] = {"model": self._model or self._folder, "prompt": prompt, "seed": seed}
        body["max_tokens"] = params.max_new_tokens
        # Every setting that a model's generation_config.json could change is sent, with its neutral value.
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
                body["cache_salt"] = self._salt  # the prefix cache must not return entries of other weights
        return read_reply(self._server.exchange(f"{self._url}/completions", body))


def _seed(seed: int, sample: int) -> int:
    return random.Random(f"{seed} {sample}").getrandbits(31)
