import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchtune.data import Message
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from humanline.data._batch_encoder import BatchEncoder
from humanline.data._boundary import Boundary
from humanline.data._chat_template import PROBE, Chat, ChatTemplate
from humanline.data._day import read_day
from humanline.data._rebuilt_tokenizer import warn_if_rebuilt
from humanline.data._tokenizer_folder import (
    STANDARD_TOKENS,
    add_tokens,
    find_templates,
    named_tokens,
    read_generation_stops,
    read_tokenizer,
    read_tokenizer_config,
    write_tokenizer,
)
from humanline.errors import ConfigError, DataError

FUNCTIONS = ("raise_exception", "strftime_now")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *FUNCTIONS, *STANDARD_TOKENS)
"""Names in a template."""
TOOL_TEMPLATE = "tool_use"
PROBE_TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}}]
TEMPLATE_ROLES = {"ipython": "tool"}  # torchtune's role name for a tool's result -> its name in chat templates


# Special tokens of this form are of turns and texts, and none that people write. Thoughts and calls are texts' own.
_TURN_TOKEN = re.compile(r"<\|(?!.*(?:think|tool|python)).*\|>")


class ChatTokenizer(ModelTokenizer, Transform):
    """Encodes chats with the tokenizer and chat template of a Hugging Face checkpoint.

    The ids are those of ``apply_chat_template`` in ``transformers``; BOS appears only if the template writes it. Where
    ``transformers`` 5 does not split text as tokenizer.json says, a warning says so, and tokenizer.json counts. The
    string of a special token inside a message becomes that token, so a message can open or close a turn. Strip such
    strings from untrusted text.

    A prompt and its response are tokenised separately, split where generation starts, because a model sees exactly
    that: the prompt's ids, then tokens that it generates. If they were tokenised as one text, the prompt's last token
    could merge with the response's first, such as two newlines. The prompt would then differ from the one that is
    sampled from. Some tokenizers give a response other ids alone than after its prompt: Llama 2's puts a space before
    any text, and tokens of Phi-3 swallow the white space behind them. They tokenise the whole chat, and its ids are
    cut behind those of the prompt.

    It is also a torchtune tokenizer (:meth:`tokenize_messages`, :meth:`encode`, and a transform of samples with
    ``messages``), so torchtune's own datasets and recipes work with it.

    Args:
        path (str): folder with tokenizer.json and tokenizer_config.json, as ``tune download`` writes it. Either may
            list added tokens. The chat template comes from its chat_template.jinja, else from tokenizer_config.json;
            one named tool_use is for chats with tools. generation_config.json may add stop tokens.
        max_seq_len (int | None): length to which :meth:`tokenize_messages`, and nothing else, cuts, tokens; null never
            cuts.
        chat_template (str | None): path of a Jinja file that replaces the folder's templates; null uses the folder's.
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
        config = read_tokenizer_config(folder)
        self._adds_tokens = add_tokens(self._tokenizer, folder, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items()}
        self.token_ids = frozenset(self._tokenizer.get_vocab().values())
        self.vocab_size = 1 + max(self.token_ids)

        named = named_tokens(config)
        self._templates = find_templates(folder, config, chat_template)
        self._variables, self._day = {**named, **kwargs}, day
        self._chats = self._boundary("default")
        _, with_tools = self._templates.get(TOOL_TEMPLATE, (None, ""))
        self._template.check_reads(name for name in kwargs if name not in with_tools)
        reads_date = self._template.reads_date or "strftime_now" in with_tools
        self.date = day.date().isoformat() if reads_date else None
        ends = [token for name, token in named.items() if name in ("bos_token", "eos_token")]
        own = (token.content for token in added.values() if token.special and _TURN_TOKEN.fullmatch(token.content))
        self.markers = tuple(dict.fromkeys([*self._template.markers, *ends, *own]))
        self._encode_batch: BatchEncoder | None = None
        chat = "".join(self._template.split(PROBE, [self._template.sample]))
        warn_if_rebuilt(folder, config.get("tokenizer_class"), self._tokenizer, chat)

        end_of_turn = self.special_tokens[self._template.end_of_turn]
        read = (name for name in named if name in STANDARD_TOKENS or name in self._template.source)
        ids = {name: self._named_id(name, named[name]) for name in read}
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
        _, (ids,) = self.split([self._encode(text) for text in self.render(prompt, [response], tools)], tools)
        return list(ids)

    def render(
        self, prompt: Chat, responses: Sequence[str | Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[str]:
        """Returns the texts that :meth:`encode_texts` tokenises for :meth:`split`: the prompt's, and one per response.

        Raises:
            DataError: as :meth:`encode_response`.
            ConfigError: as :meth:`encode_response`.
        """
        return self._chats_with(tools).render(prompt, responses, tools)

    def split(
        self, encoded: Sequence[Sequence[int]], tools: Sequence[Any] | None = None
    ) -> tuple[Sequence[int], list[Sequence[int]]]:
        """Returns the ids of a prompt and of its responses, from the ids of the texts of :meth:`render`.

        ``tools`` are those of :meth:`render`.

        Raises:
            DataError: if a whole chat's ids do not start with the prompt's.
        """
        return self._chats_with(tools).split(encoded)

    def encode_texts(self, texts: Sequence[str]) -> list[Any]:
        """Returns the ids of many texts, each an array of C ints; tokenised in threads.

        Raises:
            DataError: if a text is not valid Unicode.
        """
        if self._encode_batch is None:
            source = self._tokenizer.to_str() if self._adds_tokens else self._file
            self._encode_batch = BatchEncoder(source, self._tokenizer)
        return self._encode_batch(texts)

    def fingerprint(self) -> str:
        """Returns a digest of all that ids depend on."""
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        sources = {name: source for name, (_, source) in self._templates.items()}
        config = [self._template.variables, self.date, sources, added, version("tokenizers"), version("jinja2")]
        text = json.dumps(config, default=str, sort_keys=True)
        return blake2b(self._file.read_bytes() + text.encode(), digest_size=16).hexdigest()

    def write_files(self, folder: Path, checkpoint: Path) -> list[str]:
        """Gives a copy of a checkpoint, or an adapter to it, this tokenizer and its chat template.

        Args:
            folder (Path): the copy, or the adapter's folder.
            checkpoint (Path): the checkpoint.

        Returns:
            list[str]: the files that are not the checkpoint's; nothing is written if there are none.

        Raises:
            FileNotFoundError: if the tokenizer's files are gone.
        """
        template = None if self._arguments[2] is None else self._template.source
        return write_tokenizer(folder, self._file.parent, template, self.stop_tokens, checkpoint)

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
            if self._chats.whole_chats:
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

    @property
    def _template(self) -> ChatTemplate:
        return self._chats.template

    def _chats_with(self, tools: Sequence[Any] | None) -> Boundary:
        """Returns the template for chats with these tools, as ``transformers`` chooses it."""
        return self._chats if tools is None else self._chats_with_tools

    @cached_property
    def _chats_with_tools(self) -> Boundary:
        if TOOL_TEMPLATE not in self._templates:
            return self._chats
        chats = self._boundary(TOOL_TEMPLATE, PROBE_TOOLS)
        ends = [each.template.end_of_turn for each in (self._chats, chats)]
        if ends[0] != ends[1]:
            raise chats.template.refusal(f"ends a turn with {ends[1]} if there are tools, and with {ends[0]} if not")
        return chats

    def _boundary(self, name: str, tools: Sequence[Any] | None = None) -> Boundary:
        file, source = self._templates[name]
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        template = ChatTemplate(source, file, self._variables, special, self._day.strftime, tools)
        return Boundary(template, self._encode, self._file, self._arguments[2] is not None)

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
