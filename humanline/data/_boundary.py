"""Where the ids of a prompt end and those of its response start."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from humanline.data._chat_template import PLAIN, PROBE, THOUGHTFUL, Chat, ChatTemplate
from humanline.errors import ConfigError, DataError

__all__ = ["Boundary"]


class Boundary:
    """Cuts the chats of one template into prompts and responses.

    A prompt and its response are tokenised separately. If probes show that a response has other ids alone than after
    its prompt, whole chats are tokenised, and cut behind the ids of the prompt.

    Args:
        template (ChatTemplate): the template.
        encode (Callable[[str], list[int]]): the tokenizer.
        file (Path): its file, for messages.
        is_override (bool): whether the user has replaced the model's template.

    Attributes:
        whole_chats (bool): whether whole chats are tokenised.

    Raises:
        ConfigError: if prompts cannot be told from responses.
    """

    def __init__(
        self, template: ChatTemplate, encode: Callable[[str], list[int]], file: Path, is_override: bool
    ) -> None:
        self.template = template
        self._encode, self._file, self._is_override = encode, file, is_override
        self.whole_chats, self._merging_header = self._probe()

    def render(self, prompt: Chat, responses: Sequence[str | Mapping[str, Any]], tools: Any) -> list[str]:
        """Returns the texts to tokenise: the prompt's, and one per response.

        Raises:
            DataError: if the template rejects the chat, or the prompt opens a thought that a response lacks.
            ConfigError: if the template leaves out a part of the chat.
        """
        start, *texts = self.template.split(prompt, responses, tools)
        if self._merging_header is not None and any(text.startswith(self._merging_header) for text in texts):
            raise DataError(
                "messages: the prompt opens a thought, and the answer has none; "
                + (
                    "set tokenizer.chat_template_kwargs (such as enable_thinking: false for answers without thoughts)"
                    if "enable_thinking" in self.template.source
                    else "drop the example, or set tokenizer.chat_template"
                )
            )
        return [start, *([start + text for text in texts] if self.whole_chats else texts)]

    def split(self, encoded: Sequence[Sequence[int]]) -> tuple[Sequence[int], list[Sequence[int]]]:
        """Returns the ids of a prompt and of its responses, from the ids of the texts of :meth:`render`.

        Raises:
            DataError: if a whole chat's ids do not start with the prompt's.
        """
        prompt, *rest = encoded
        if not self.whole_chats:
            return prompt, rest
        if any(ids[: len(prompt)] != prompt for ids in rest):
            raise DataError("messages: the ids of the chat do not start with those of its prompt; drop the example")
        return prompt, [ids[len(prompt) :] for ids in rest]

    def _probe(self) -> tuple[bool, str | None]:
        """Returns whether whole chats have to be tokenised and, if answers without thoughts merge, how they start."""
        start, answer = self.template.split(PROBE, [self.template.sample])
        if (whole := self._differs(start, answer)) is not None:
            # Other answers may start otherwise than this one: with white space, or without that of the template.
            others = [PLAIN, *(self._answer(space + self.template.sample) for space in (" ", "\n"))]
            return whole or any(self._differs(start, other) for other in others), None
        header = answer.partition(PLAIN)[0]
        if header.strip() and (whole := self._differs(start, self._answer(THOUGHTFUL))) is not None:
            return whole, header
        if start.endswith(" "):
            raise self.template.refusal(
                "ends a generation prompt with a space, which is a part of the answer's first word"
            )
        if self._is_override:
            raise self.template.refusal(
                "ends a generation prompt with text that merges with the answer's start, so the prompt's ids depend "
                "on the answer"
            )
        raise ConfigError(
            f"tokenizer.path: {self._file} merges the end of a prompt with the start of its answer, so the prompt's "
            "ids depend on the answer; use the tokenizer.json that the model was published with"
        )

    def _answer(self, content: str) -> str | None:
        """Returns the text of an answer to the simplest prompt; None if the template rejects it."""
        try:
            return self.template.split(PROBE, [content])[1]
        except (ConfigError, DataError):
            return None

    def _differs(self, start: str, answer: str | None) -> bool | None:
        """Returns whether an answer has other ids alone than after its prompt; None if it changes the prompt's."""
        if answer is None:
            return None
        prompt, whole = self._encode(start), self._encode(start + answer)
        return whole[len(prompt) :] != self._encode(answer) if whole[: len(prompt)] == prompt else None
