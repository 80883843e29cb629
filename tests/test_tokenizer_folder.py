"""The files of a tokenizer's folder: tokens and templates that only some of them have, as transformers reads them."""

import json
from pathlib import Path

import pytest
from test_chat_tokenizer import FAMILIES, assistant, chatml, user, write_folder
from test_template_kinds import LLAMA2, PHI3, TOOLS, WITH_TOOLS, ZEPHYR, sentencepiece
from transformers import AutoTokenizer

from humanline.data import ChatTokenizer, preference_groups
from humanline.errors import ConfigError

PROMPT, ANSWER = [user("Hi <tool> there")], "Yes <tool>."


def edit(folder: Path, **changes: object) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def added_tokens(folder: Path) -> list[dict]:
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def keep_added_tokens(folder: Path, tokens: list[dict]) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": tokens}))


def by_id(tokens: list[dict]) -> dict[str, dict]:
    """As tokenizer_config.json has them."""
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}


def encoded(folder: Path, tools: list | None = None, **arguments: object) -> tuple[list[int], list[int]]:
    """The ids of a chat, and those that transformers gives it, as far."""
    ours = ChatTokenizer(str(folder), **arguments)
    ids = ours.encode_prompt(PROMPT, tools) + ours.encode_response(PROMPT, ANSWER, tools)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [*PROMPT, assistant(ANSWER)], tools=tools, return_dict=False
    )
    return ids, theirs[: len(ids)]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", FAMILIES["smollm2"], chatml(""))


# ---- Added tokens


@pytest.mark.parametrize("kept", [[], ["<|im_end|>", "<|endoftext|>"]], ids=["none", "some"])
def test_tokens_that_only_tokenizer_config_has_are_tokens(folder, kept):
    tokens = added_tokens(folder)
    edit(folder, added_tokens_decoder=by_id(tokens))
    keep_added_tokens(folder, [token for token in tokens if token["content"] in kept])
    ids, theirs = encoded(folder)
    assert ids == theirs and ids[0] == 1  # <|im_start|>


def test_a_token_that_neither_vocabulary_has_gets_the_id_that_tokenizer_config_gives_it(folder):
    next_id = ChatTokenizer(str(folder)).vocab_size
    new = {"id": next_id, "content": "<tool>", "special": False, "normalized": False}
    edit(folder, added_tokens_decoder=by_id([*added_tokens(folder), new]))
    ids, theirs = encoded(folder)
    assert ids == theirs and ids.count(next_id) == 2
    assert ChatTokenizer(str(folder)).vocab_size == next_id + 1


def test_the_flags_of_tokenizer_config_count(tmp_path):
    special = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    folder = sentencepiece(tmp_path / "phi3", PHI3, "legacy", special)
    swallowing = [token | {"rstrip": token["content"] in special} for token in added_tokens(folder)]
    plain = encoded(folder)[0]
    ids, theirs = encoded(edit(folder, added_tokens_decoder=by_id(swallowing)))
    assert ids == theirs != plain


def test_many_texts_are_encoded_with_the_added_tokens_too(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT[0]["content"], "chosen": ANSWER, "rejected": "No"}) + "\n")
    before = preference_groups(ChatTokenizer(str(folder)), str(file))[0]
    new = {"id": ChatTokenizer(str(folder)).vocab_size, "content": "<tool>", "special": False, "normalized": False}
    tokenizer = ChatTokenizer(str(edit(folder, added_tokens_decoder=by_id([*added_tokens(folder), new]))))
    (group,) = preference_groups(tokenizer, str(file))
    assert list(group.prompt) == tokenizer.encode_prompt(PROMPT) != list(before.prompt)
    assert list(group.responses[0]) == tokenizer.encode_response(PROMPT, ANSWER)


def test_two_ids_for_one_token_are_refused(folder):
    token = added_tokens(folder)[1]
    edit(folder, added_tokens_decoder=by_id([token | {"id": 7}]))
    with pytest.raises(
        ConfigError, match=r"^tokenizer.path: .*_config.json gives '<\|im_start\|>' the id 7, tokenizer"
    ):
        ChatTokenizer(str(folder))


def test_added_tokens_that_are_none_are_refused_in_a_line(folder):
    for broken in ([1], {"x": {}}, {"1": {"contents": "x"}}, {"1": "x"}):
        edit(folder, added_tokens_decoder=broken)
        with pytest.raises(ConfigError, match="^tokenizer.path: added_tokens_decoder of .* cannot be read") as raised:
            ChatTokenizer(str(folder))
        assert "\n" not in str(raised.value)


# ---- Named tokens


def test_a_named_token_ends_a_turn_also_if_tokenizer_json_does_not_call_it_special(folder):
    keep_added_tokens(folder, [token | {"special": False} for token in added_tokens(folder)])
    ids, theirs = encoded(folder)
    tokenizer = ChatTokenizer(str(folder))
    assert ids == theirs and ids[-1] == tokenizer.stop_tokens[0] == tokenizer.eos_id
    assert "<|im_end|>" not in tokenizer.decode(ids)


def test_a_turn_s_end_that_is_no_special_token_is_named(folder):
    keep_added_tokens(folder, [token | {"special": False} for token in added_tokens(folder)])
    edit(folder, eos_token="<|endoftext|>")
    with pytest.raises(ConfigError, match=r"without a special token \('<\|im_end\|>' is none in tokenizer.json\)"):
        ChatTokenizer(str(folder))


@pytest.mark.parametrize(
    "named",
    [{"image_token": "<|endoftext|>"}, {"extra_special_tokens": {"image_token": "<|endoftext|>"}}],
    ids=["a key of its own", "in extra_special_tokens"],
)
def test_a_template_reads_any_named_token(folder, named):
    edit(folder, chat_template="{{ image_token }}" + chatml(""), **named)
    ids, theirs = encoded(folder)
    assert ids == theirs and ids[0] == 0


def test_a_named_token_without_an_id_is_refused_only_if_the_template_reads_it(folder):
    assert ChatTokenizer(str(edit(folder, image_token="<image>"))).vocab_size
    edit(folder, chat_template="{{ image_token }}" + chatml(""))
    with pytest.raises(ConfigError, match="tokenizer.json has no token '<image>', the image_token of tokenizer_config"):
        ChatTokenizer(str(folder))


# ---- Named templates

OTHER = WITH_TOOLS.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }} with tools").replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant with tools\n"
)


def write_templates(folder: Path, where: str, **templates: str) -> None:
    if where == "list":
        edit(folder, chat_template=[{"name": name, "template": source} for name, source in templates.items()])
        return
    edit(folder, chat_template=None)
    (folder / "additional_chat_templates").mkdir()
    for name, source in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(source)


@pytest.mark.parametrize("where", ["list", "files"])
@pytest.mark.parametrize("default", [chatml(""), WITH_TOOLS], ids=["ignores tools", "writes tools"])
def test_a_chat_with_tools_has_the_template_for_them(folder, where, default):
    write_templates(folder, where, default=default, tool_use=OTHER)
    for tools in (None, TOOLS):
        ids, theirs = encoded(folder, tools)
        assert ids == theirs
        assert ("with tools" in ChatTokenizer(str(folder)).decode(ids)) == (tools is not None)


def test_a_dataset_s_rows_have_the_template_that_their_tools_ask_for(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path / "cache"))
    write_templates(folder, "list", default=chatml(""), tool_use=OTHER)
    row, file = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, row | {"tools": TOOLS})))
    tokenizer = ChatTokenizer(str(folder))
    plain, tooled = (tokenizer.decode([*group.prompt]) for group in preference_groups(tokenizer, str(file)))
    assert "with tools" in tooled and "with tools" not in plain


def test_a_template_that_needs_tools_is_one_for_chats_with_tools(folder):
    needing = OTHER.replace("{% for m in", "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{% for m in")
    write_templates(folder, "list", default=chatml(""), tool_use=needing)
    ids, theirs = encoded(folder, TOOLS)
    assert ids == theirs


def test_a_template_for_tools_that_ends_turns_otherwise_is_refused_where_a_chat_has_tools(folder):
    write_templates(folder, "list", default=chatml(""), tool_use=OTHER.replace("<|im_end|>", "<|endoftext|>"))
    assert ChatTokenizer(str(folder)).encode_prompt(PROMPT)
    with pytest.raises(ConfigError, match=r"ends a turn with <\|endoftext\|> if there are tools, and with <\|im_end"):
        ChatTokenizer(str(folder)).encode_prompt(PROMPT, TOOLS)


def test_a_template_for_tools_that_reads_the_date_has_the_run_s(folder):
    write_templates(folder, "list", default=chatml(""), tool_use="{{ strftime_now('%Y') }}" + OTHER)
    tokenizer = ChatTokenizer(str(folder), date="2024-02-29")
    assert tokenizer.date == "2024-02-29" and tokenizer.decode(tokenizer.encode_prompt(PROMPT, TOOLS)).startswith(
        "2024"
    )


def test_an_override_is_for_chats_with_tools_too(folder, tmp_path):
    write_templates(folder, "files", default=WITH_TOOLS, tool_use=OTHER)
    (tmp_path / "mine.jinja").write_text(WITH_TOOLS)
    tokenizer = ChatTokenizer(str(folder), chat_template=str(tmp_path / "mine.jinja"))
    assert "with tools" not in tokenizer.decode(tokenizer.encode_prompt(PROMPT, TOOLS))


@pytest.mark.parametrize("where", ["list", "files"])
def test_templates_without_a_default_are_listed(folder, where):
    write_templates(folder, where, rag=OTHER, tool_use=OTHER)
    message = f"^tokenizer.chat_template: {folder} has the chat templates rag, tool_use, and none named default; set th"
    with pytest.raises(ConfigError, match=message):
        ChatTokenizer(str(folder))


# ---- Classes that transformers 5 rebuilds


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
@pytest.mark.parametrize("chats", [LLAMA2, ZEPHYR], ids=["llama2", "tinyllama"])
def test_a_class_that_transformers_builds_otherwise_than_tokenizer_json_is_warned_of(tmp_path, caplog, name, chats):
    folder = edit(sentencepiece(tmp_path / "model", chats, "legacy"), tokenizer_class=name)
    ids, theirs = encoded(folder)
    assert ids != theirs
    message = caplog.messages[0]
    assert len(caplog.messages) == 1 and "\n" not in message
    assert f"gives chats other ids than {folder / 'tokenizer.json'}, which is used here: its {name} has" in message
    assert "another normalizer and pre_tokenizer" in message
    edit(folder, tokenizer_class="PreTrainedTokenizerFast")  # the remedy in the warning
    caplog.clear()
    same, theirs = encoded(folder)
    assert same == ids == theirs and not caplog.messages


@pytest.mark.parametrize(("kind", "config"), [("first", None), ("legacy", {"model_type": "mistral"})])
def test_a_class_that_is_built_as_tokenizer_json_says_is_not(tmp_path, caplog, kind, config):
    folder = edit(sentencepiece(tmp_path / "model", LLAMA2, kind), tokenizer_class="LlamaTokenizer")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    ids, theirs = encoded(folder)
    assert ids == theirs and not caplog.messages


def test_a_tokenizer_that_transformers_cannot_read_is_not_compared(tmp_path, caplog):
    folder = edit(sentencepiece(tmp_path / "model", LLAMA2, "legacy"), tokenizer_class="LlamaTokenizer")
    (folder / "config.json").write_text('{"model_type": ')
    assert ChatTokenizer(str(folder)).encode_prompt(PROMPT) and not caplog.messages
