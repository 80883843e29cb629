import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import Message
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from humanline.data._batch_encoder import BatchEncoder
from humanline.data._chat_template import PLAIN, PROBE, THOUGHTFUL, Chat, ChatTemplate, squeeze
from humanline.data._day import read_day
from humanline.errors import ConfigError, DataError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FUNCTIONS = ("raise_exception", "strftime_now")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *FUNCTIONS, *NAMED_TOKENS)  # names in a template
TEMPLATE_ROLES = {"ipython": "tool"}  # torchtune's role name for a tool's result -> its name in chat templates


class ChatTokenizer(ModelTokenizer, Transform):
    """Encodes chats with the tokenizer and chat template of a Hugging Face checkpoint.

    The ids are those of ``apply_chat_template`` in ``transformers``; BOS appears only if the template writes it. The
    string of a special token inside a message becomes that token, so a message can open or close a turn. Strip such
    strings from untrusted text.

    A prompt and its response are tokenised separately, split where generation starts, because a model sees exactly
    that: the prompt's ids, then tokens that it generates. If they were tokenised as one text, the prompt's last token
    could merge with the response's first, such as two newlines. The prompt would then differ from the one that is
    sampled from. Tokenizers that put a space before any text, as Llama 2's, give a response other ids alone than after
    its prompt. They tokenise the whole chat, and its ids are cut behind those of the prompt.

    It is also a torchtune tokenizer (:meth:`tokenize_messages`, :meth:`encode`, and a transform of samples with
    ``messages``), so torchtune's own datasets and recipes work with it.

    Args:
        path (str): folder with tokenizer.json and tokenizer_config.json, as ``tune download`` writes it. The chat
            template comes from its chat_template.jinja, else from tokenizer_config.json. generation_config.json may
            add stop tokens.
        max_seq_len (int | None): length to which :meth:`tokenize_messages`, and nothing else, cuts, tokens; null never
            cuts.
        chat_template (str | None): path of a Jinja file that replaces the folder's template; null uses the folder's.
        chat_template_kwargs (Mapping[str, Any] | None): variables of the template, such as {"enable_thinking": False};
            null sets none.
        date (str | None): the date that the template reads, such as "2026-01-31"; null is the day on which the run
            started, also where it resumes on another day.

    Attributes:
        date (str | None): the date, if the template reads it; else None.
        stop_tokens (list[int]): ids that end a generated response: the template's end of turn, then EOS, then those in
            generation_config.json.
        special_tokens (dict[str, int]): the tokens outside the ordinary vocabulary, and their ids.
        bos_id (int | None): beginning of sequence; None if there is none.
        eos_id (int): end of sequence; the end of turn if there is none.
        pad_id (int): padding; ``eos_id`` if there is none.
        token_ids (frozenset[int]): the ids that have a token. A model's embedding may have rows for other ids.
        vocab_size (int): all ids are below it.

    Raises:
        ConfigError: if a file is missing or unreadable, or if the template does not render a chat as its prompt, the
            response and one special token, the end of turn.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        if max_seq_len is not None and max_seq_len < 1:
            raise ConfigError(
                f"tokenizer.max_seq_len: expected a length of at least 1, or null for no limit, got {max_seq_len}"
            )
        kwargs = read_variables(chat_template_kwargs)
        day = read_day("tokenizer.date", date)
        self._arguments = (path, max_seq_len, chat_template, kwargs, day.date().isoformat())
        self.max_seq_len = max_seq_len

        folder = Path(path)
        self._tokenizer = read_tokenizer(folder)
        self._file = folder / "tokenizer.json"
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items()}
        self.token_ids = frozenset(self._tokenizer.get_vocab().values())
        self.vocab_size = 1 + max(self.token_ids)

        config = read_tokenizer_config(folder)
        named = {name: token_text(config[name]) for name in NAMED_TOKENS if config.get(name)}
        file, source = find_template(folder, config, chat_template)
        special = [token.content for token in added.values() if token.special]
        self._template = ChatTemplate(source, file, {**named, **kwargs}, special, day.strftime)
        self._template.check_reads(kwargs)
        self.date = day.date().isoformat() if self._template.reads_date else None
        self.markers = self._template.markers
        self._whole_chats, self._merging_header = self._boundary()
        self._encode_batch: BatchEncoder | None = None

        end_of_turn = self.special_tokens[self._template.end_of_turn]
        ids = {name: self._named_id(name, token) for name, token in named.items()}
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int = ids.get("eos_token", end_of_turn)
        self.pad_id: int = ids.get("pad_token", self.eos_id)
        self.stop_tokens = list(dict.fromkeys([end_of_turn, self.eos_id, *read_generation_stops(folder)]))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # A compiled template cannot be pickled, so a worker process reads the files again.
        return type(self), self._arguments

    # ---- Prompts and responses

    def encode_prompt(self, messages: Chat, tools: Sequence[Any] | None = None) -> list[int]:
        """Returns the ids of ``messages`` (``{"role": ..., "content": ...}``), up to where the answer starts.

        Args:
            messages (Chat): the chat.
            tools (Sequence[Any] | None): the tools that the model may call, as for ``apply_chat_template``.

        Raises:
            DataError: if the template rejects the chat.
            ConfigError: if the template leaves out tools, or a message's calls or thoughts.
        """
        return self._encode(self.render(messages, [], tools)[0])

    def encode_response(
        self, prompt: Chat, response: str | Mapping[str, Any], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of ``response`` as the answer to ``prompt``, including the end of turn.

        The template may alter white space; Llama 3's and Gemma's strip it around the text.

        Args:
            prompt (Chat): the chat.
            response (str | Mapping[str, Any]): a text, or an assistant's message, which may have calls or thoughts.
            tools (Sequence[Any] | None): the tools that the model may call.

        Raises:
            DataError: if the template rejects the chat, or the chat's ids do not start with the prompt's.
            ConfigError: if the template leaves out a part of the response.
        """
        _, (ids,) = self.split([self._encode(text) for text in self.render(prompt, [response], tools)])
        return list(ids)

    def render(
        self, prompt: Chat, responses: Sequence[str | Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[str]:
        """Returns the texts that :meth:`encode_texts` tokenises for :meth:`split`: the prompt's, and one per response.

        Raises:
            DataError: as :meth:`encode_response`.
            ConfigError: as :meth:`encode_response`.
        """
        start, *texts = self._template.split(prompt, responses, tools)
        if self._merging_header is not None and any(text.startswith(self._merging_header) for text in texts):
            raise DataError(
                "messages: the prompt opens a thought, and the answer has none; "
                + (
                    "set tokenizer.chat_template_kwargs (such as enable_thinking: false for answers without thoughts)"
                    if "enable_thinking" in self._template.source
                    else "drop the example, or set tokenizer.chat_template"
                )
            )
        return [start, *([start + text for text in texts] if self._whole_chats else texts)]

    def split(self, encoded: Sequence[Sequence[int]]) -> tuple[Sequence[int], list[Sequence[int]]]:
        """Returns the ids of a prompt and of its responses, from the ids of the texts of :meth:`render`.

        Raises:
            DataError: if a whole chat's ids do not start with the prompt's.
        """
        prompt, *rest = encoded
        if not self._whole_chats:
            return prompt, rest
        if any(ids[: len(prompt)] != prompt for ids in rest):
            raise DataError("messages: the ids of the chat do not start with those of its prompt; drop the example")
        return prompt, [ids[len(prompt) :] for ids in rest]

    def encode_texts(self, texts: Sequence[str]) -> list[Any]:
        """Returns the ids of many texts, each an array of C ints; tokenised in threads.

        Raises:
            DataError: if a text is not valid Unicode.
        """
        if self._encode_batch is None:
            self._encode_batch = BatchEncoder(self._file, self._tokenizer)
        return self._encode_batch(texts)

    def fingerprint(self) -> str:
        """Returns a digest of all that ids depend on."""
        template = self._template
        config = [template.variables, self.date, template.source, version("tokenizers"), version("jinja2")]
        text = json.dumps(config, default=str, sort_keys=True)
        return blake2b(self._file.read_bytes() + text.encode(), digest_size=16).hexdigest()

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ``ids``."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    # ---- torchtune's protocol

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Returns the ids of plain text without the template, by default between BOS (if there is one) and EOS."""
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos else []
        return bos + self._encode(text) + eos

    def tokenize_messages(
        self, messages: list[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole chat, and which of them a loss leaves out.

        An answer and its end of turn are masked if its message is. The text between two answers, headers included, is
        masked if any of its messages is. Ids beyond ``max_seq_len`` are cut off, and no end of turn is added there.

        Args:
            messages (list[Message]): the chat, text only.
            add_end_tokens (bool): False prepares for generation: a last answer has no end of turn, and after any other
                last message the chat ends where an answer would start.

        Returns:
            tuple[list[int], list[bool]]: ids and mask (True: not in the loss), equally long.

        Raises:
            DataError: if a message has an image, or if the template renders earlier turns differently once later ones
                follow.
        """
        if any(message.contains_media for message in messages):
            raise DataError("messages: expected text only, but a message has an image; drop the example")
        chat = [{"role": TEMPLATE_ROLES.get(m.role, m.role), "content": m.text_content} for m in messages]
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # the part of the rendered chat that has been tokenised
        seen = 0  # the number of messages in it

        def append(rendered: str, until: int, masked: bool) -> None:
            nonlocal text, seen
            if not rendered.startswith(text):
                raise DataError(
                    f"messages: {self._template.file} renders earlier turns differently once later ones follow; "
                    "end each example at its first answer"
                )
            if self._whole_chats:
                if (whole := self._encode(rendered))[: len(ids)] != ids:
                    raise DataError("messages: earlier turns have other ids once later ones follow; drop the example")
                ids[:] = whole
            else:
                ids.extend(self._encode(rendered[len(text) :]))
            mask.extend([masked] * (len(ids) - len(mask)))
            text, seen = rendered, until

        for i, message in enumerate(messages):
            if message.role == "assistant":
                before, answer = self._template.split(chat[:i], [message.text_content])
                append(before, i, any(m.masked for m in messages[seen:i]) or seen == i)
                if not add_end_tokens and i == len(messages) - 1:
                    answer = answer.removesuffix(self._template.end_of_turn)
                append(text + answer, i + 1, message.masked)
        if seen < len(messages):
            rest = self._template.render(chat, add_generation_prompt=not add_end_tokens)
            append(rest, len(messages), any(m.masked for m in messages[seen:]))
        return ids[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replaces the sample's ``messages`` with ``tokens`` and ``mask`` (see :meth:`tokenize_messages`)."""
        sample["tokens"], sample["mask"] = self.tokenize_messages(sample.pop("messages"), add_end_tokens=not inference)
        return sample

    # ---- Internals

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise DataError("messages: the text is not valid Unicode (it has a lone surrogate); correct it") from None

    def _boundary(self) -> tuple[bool, str | None]:
        """Finds out how ids are cut between prompt and response.

        Returns:
            Whether whole chats have to be tokenised; and, if answers without thoughts merge with their prompts, how the
            text of such an answer starts.

        Raises:
            ConfigError: if prompts cannot be told from responses.
        """
        start, answer = self._template.split(PROBE, [self._template.sample])
        prompt, whole = self._encode(start), self._encode(start + answer)
        if prompt + self._encode(answer) == whole:
            # Other answers may start without the space that this one's template writes: calls, for example.
            bare = self._encode(start + PLAIN)
            return bare[: len(prompt)] == prompt and bare[len(prompt) :] != self._encode(PLAIN), None
        if whole[: len(prompt)] == prompt:
            return True, None
        header = answer.partition(PLAIN)[0]
        if header.strip() and self._accepts_thoughts(prompt):
            return False, header
        if start.endswith(" "):
            raise self._template.refusal(
                "ends a generation prompt with a space, which is a part of the answer's first word"
            )
        raise ConfigError(
            f"tokenizer.path: {self._file} merges the end of a prompt with the start of its answer, so the prompt's "
            "ids depend on the answer; use the tokenizer.json that the model was published with"
        )

    def _accepts_thoughts(self, prompt: list[int]) -> bool:
        try:
            start, thoughtful = self._template.split(PROBE, [THOUGHTFUL])
        except (ConfigError, DataError):
            return False
        return prompt + self._encode(thoughtful) == self._encode(start + thoughtful)

    def _named_id(self, name: str, token: str) -> int:
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise ConfigError(
                f"tokenizer.path: tokenizer.json has no token {token!r}, the {name} of tokenizer_config.json; add it"
            )
        return id


def read_variables(given: Any) -> dict[str, Any]:
    """Returns the variables that ``chat_template_kwargs`` sets, after checking their names."""
    key = "tokenizer.chat_template_kwargs"
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"{key}: expected a mapping such as {{enable_thinking: false}}, or null, got {given!r}")
    for name in given or ():
        if not isinstance(name, str):
            raise ConfigError(f"{key}: expected names of variables, such as enable_thinking, got {name!r}")
        if name in RESERVED:
            remedy = "set tokenizer.date instead" if name == "strftime_now" else "remove it"
            raise ConfigError(f"{key}: {name} is set by humanline; {remedy}")
    return dict(given or {})


def _remedy(folder: Path) -> str:
    if folder.is_dir():
        return "use a complete Hugging Face checkpoint"
    where = f"there is no folder {folder} (working directory {Path.cwd()})"
    return f"{where}; download the model to it, or correct the path, also in checkpointer.checkpoint_dir"


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"tokenizer.path: {file} is missing; {_remedy(file.parent)}") from None
    except ValueError as error:
        raise ConfigError(f"tokenizer.path: {file} is not valid JSON ({squeeze(error)}); download it again") from error


def read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer.path: {file} is missing; {_remedy(folder)}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"tokenizer.path: {file} cannot be read ({squeeze(error)}); download it again") from error
    tokenizer.no_truncation()  # a file may enable either
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json; in older checkpoints special_tokens_map.json overrides the named tokens."""
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "special_tokens_map.json"
    return config | read_json(file) if file.is_file() and "added_tokens_decoder" not in config else config


def read_generation_stops(folder: Path) -> list[int]:
    """Returns the ids at which generation stops according to generation_config.json, if there is such a file."""
    file = folder / "generation_config.json"
    stops = read_json(file).get("eos_token_id") if file.is_file() else None
    return [stops] if isinstance(stops, int) else stops or []


def token_text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def find_template(folder: Path, config: dict[str, Any], override: str | None) -> tuple[Path, str]:
    """Returns the file with the chat template, and the template: the override, else the choice of ``transformers``."""
    file = Path(override) if override is not None else folder / "chat_template.jinja"
    if file.is_file():
        return file, file.read_text(encoding="utf-8")
    if override is not None:
        raise ConfigError(f"tokenizer.chat_template: {file} is not a file; null uses the template in tokenizer.path")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    if template is None:
        raise ConfigError(f"tokenizer.chat_template: {folder} has no chat template; set this key to a Jinja file")
    return folder / "tokenizer_config.json", template
