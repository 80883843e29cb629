"""ChatTokenizer renders and tokenises as ``transformers`` does, and refuses what it cannot cut into prompt, response.

A family has its own chat template (data/templates), special tokens and way to split text; the vocabularies are tiny.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torchtune.data import Message
from torchtune.datasets import chat_dataset
from transformers import AutoTokenizer

from humanline.data import ChatTokenizer
from humanline.errors import ConfigError, DataError

TEMPLATES = Path(__file__).parent / "data" / "templates"
CORPUS = [
    "The capital of France is Paris. What is 12 plus 34? I think it's 46, isn't it?\n\nassistant: Humanline",
    "def add(a, b):\n    return a + b  # naïve café, 東京, Привет, 🙂🙂\n\n",
]
SPLIT_AT_LETTERS = (  # Llama 3's rule, and with single digits Qwen2.5's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """What sets a model family's tokenizer apart."""

    template: str
    special_tokens: tuple[str, ...]
    bos: str | None
    eos: str
    end_of_turn: str
    system_messages: bool = True
    header_merges: bool = False  # whether the header's last newline can merge with white space behind it
    digits: str | None = None  # how many digits stay together, in Llama 3's kind of regex; None for others' splits
    nfc: bool = False


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "llama3": Family("llama3", LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", digits="1,3"),
    "llama3_1": Family("llama3_1", LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", digits="1,3"),
    "gemma2": Family(
        "gemma2",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        system_messages=False,
    ),
    "qwen2_5": Family(
        "qwen2_5",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
        header_merges=True,
        digits="1",
        nfc=True,
    ),
    "smollm2": Family(
        "smollm2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        header_merges=True,
    ),
}


def byte_level_tokenizer(family: Family) -> Tokenizer:
    """A tiny byte-level BPE that splits text as the family's does."""
    tokenizer = Tokenizer(models.BPE())
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if family.digits:
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(SPLIT_AT_LETTERS % family.digits), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=list(family.special_tokens))
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family.bos == "<|begin_of_text|>":  # Llama 3's tokenizer puts BOS before any text, unless told not to
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    return tokenizer


def sentencepiece_tokenizer(family: Family) -> Tokenizer:
    """Gemma's kind: no splits, spaces as a letter of their own, bytes for what has no token."""
    pieces = [*family.special_tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁\n", *(chr(code) for code in range(33, 127)), "\n\n", "▁▁", "th", "the", "▁the", "mo", "el", "del"]
    merges = [("\n", "\n"), ("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("m", "o"), ("e", "l"), ("d", "el")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in family.special_tokens])
    return tokenizer


def write_folder(folder: Path, family: Family, template: str | None = None, **config: object) -> Path:
    """An HF folder; ``template`` replaces the family's, ``config`` adds to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece_tokenizer(family) if family.template == "gemma2" else byte_level_tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    source = (TEMPLATES / f"{family.template}.jinja").read_text() if template is None else template
    named = {"bos_token": family.bos, "eos_token": family.eos, "chat_template": source}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_folder(root / name, family) for name, family in FAMILIES.items()}


@pytest.fixture(scope="session")
def ours(folders):
    return {name: ChatTokenizer(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def theirs(folders):
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def text_of(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# ---- The same as transformers

SNIPPETS = [
    *(
        "Hello",
        " the",
        "12345",
        "it's",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "naïve",
        "e\u0301",
        "東京",
        "🙂",
        "{{ x }}",
        "\u2028",
    ),
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|im_start|>user\n", "<|im_", "<bos>"),
]
contents = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join))
turns = st.lists(st.tuples(contents, contents), max_size=2)


def conversation(family: Family, system_content: str | None, earlier: list[tuple[str, str]], last: str) -> list[dict]:
    first = [system(system_content)] if system_content is not None and family.system_messages else []
    return [*first, *(message for q, a in earlier for message in (user(q), assistant(a))), user(last)]


@pytest.mark.parametrize("name", FAMILIES)
@given(system_content=st.none() | contents, earlier=turns, last=contents)
@settings(max_examples=60)
def test_prompt_ids_are_those_of_apply_chat_template(ours, theirs, name, system_content, earlier, last):
    prompt = conversation(FAMILIES[name], system_content, earlier, last)
    expected = theirs[name].apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert ours[name].encode_prompt(prompt) == expected


@pytest.mark.parametrize("name", FAMILIES)
@given(system_content=st.none() | contents, earlier=turns, last=contents, response=contents)
@settings(max_examples=60)
def test_prompt_and_response_ids_are_those_of_the_whole_chat(
    ours, theirs, name, system_content, earlier, last, response
):
    assume(not (FAMILIES[name].header_merges and response[:1].isspace()))  # the two differ by design, as tested below
    prompt = conversation(FAMILIES[name], system_content, earlier, last)
    whole = theirs[name].apply_chat_template([*prompt, assistant(response)], return_dict=False)
    ids = ours[name].encode_prompt(prompt) + ours[name].encode_response(prompt, response)
    assert ids == whole[: len(ids)]
    assert not theirs[name].decode(whole[len(ids) :]).strip()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("response", ["", "Yes.", "  Yes. \n", "\n\nYes", " "])
def test_a_response_is_rendered_with_the_template_s_own_treatment_of_white_space(ours, theirs, name, response):
    prompt = [user("Really?")]
    whole = theirs[name].apply_chat_template([*prompt, assistant(response)], tokenize=False)
    ids = ours[name].encode_prompt(prompt) + ours[name].encode_response(prompt, response)
    assert text_of(ours[name], ids) == whole.rstrip()


@given(text=contents)
@settings(max_examples=100)
def test_plain_text_is_tokenised_as_by_transformers(ours, theirs, text):
    for name in FAMILIES:
        expected = theirs[name].encode(text, add_special_tokens=False)
        assert ours[name].encode(text, add_bos=False, add_eos=False) == expected
        assert ours[name].decode(expected) == theirs[name].decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "chat", "text"),
    [
        (
            "llama3",
            [system("Be brief."), user(" Hi ")],
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
        ),
        (
            "gemma2",
            [user("Hi "), assistant("Yes?"), user("Bye")],
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>",
        ),
        (
            "qwen2_5",
            [user("Hi ")],
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>",
        ),
        (
            "smollm2",
            [user("Hi")],
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>",
        ),
    ],
)
def test_the_text_is_in_the_family_s_published_format(ours, name, chat, text):
    assert text_of(ours[name], ours[name].encode_prompt(chat) + ours[name].encode_response(chat, "Hello.")) == text


def test_a_template_can_use_what_transformers_offers_to_templates(tmp_path):
    template = (
        "{% for message in messages %}{% if message.content == 'skip' %}{% continue %}{% endif %}"
        "<|im_start|>{{ message.role }} {{ {'é<': [message.name is defined]} | tojson(indent=1) }}{{ bos_token }}\n"
        "{% generation %}\n{% set kept = message.content %}{{ kept }}<|im_end|>\n{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ {'é<': [false]} | tojson(indent=1) }}{{ bos_token }}\n"
        "{% endif %}"
    )
    folder = write_folder(tmp_path, FAMILIES["smollm2"], template)
    prompt = [user("skip"), {"role": "user", "content": "Today?", "name": None}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=False
    )
    assert ChatTokenizer(str(folder)).encode_prompt(prompt) == expected


# ---- Where a prompt ends and a response starts


def test_a_newline_that_starts_a_response_does_not_change_the_prompt(ours):
    tokenizer, prompt = ours["smollm2"], [user("Hi")]
    newline = tokenizer.encode("\n", add_bos=False, add_eos=False)
    assert tokenizer.encode_prompt(prompt)[-1:] == newline
    assert tokenizer.encode_response(prompt, "\nHi")[:1] == newline
    assert tokenizer.encode("\n\n", add_bos=False, add_eos=False) != newline * 2  # as one text, they would have merged


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_ends_with_the_end_of_turn_and_generation_stops_there(ours, name):
    tokenizer = ours[name]
    end = tokenizer.special_tokens[FAMILIES[name].end_of_turn]
    assert tokenizer.encode_response([user("Hi")], "Hello.")[-1] == end
    assert tokenizer.encode_response([user("Hi")], "Hello.").count(end) == 1
    assert tokenizer.stop_tokens[0] == end
    assert tokenizer.eos_id in tokenizer.stop_tokens


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "gemma2"])
def test_bos_comes_once_from_the_template_and_not_again_from_the_tokenizer(ours, name):
    ids = ours[name].encode_prompt([user("Hi")])
    assert ids[0] == ours[name].bos_id
    assert ids.count(ours[name].bos_id) == 1


def test_generation_config_adds_stop_tokens(tmp_path):
    folder = write_folder(tmp_path, FAMILIES["llama3"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4, 7]}')
    assert ChatTokenizer(str(folder)).stop_tokens == [4, 1, 7]


def test_padding_falls_back_to_eos_and_eos_to_the_end_of_turn(tmp_path):
    folder = write_folder(tmp_path, FAMILIES["qwen2_5"], eos_token=None)
    tokenizer = ChatTokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_tokens) == (None, 2, 2, [2])


def test_truncation_and_padding_saved_in_tokenizer_json_are_ignored(tmp_path, ours):
    folder = write_folder(tmp_path, FAMILIES["smollm2"])
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=4)
    saved.save(str(folder / "tokenizer.json"))
    chat = [user("Hi")]
    assert ChatTokenizer(str(folder)).encode_prompt(chat) == ours["smollm2"].encode_prompt(chat)


# ---- Which template


def chatml(mark: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}MARK\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistantMARK\n{% endif %}"
    ).replace("MARK", mark)


@pytest.mark.parametrize(
    "in_config",
    [chatml("-config"), [{"name": "rag", "template": ""}, {"name": "default", "template": chatml("-config")}]],
)
def test_the_template_is_the_argument_s_else_the_jinja_file_s_else_the_config_s(tmp_path, in_config):
    folder = write_folder(tmp_path / "model", FAMILIES["smollm2"], chat_template=in_config)
    (tmp_path / "mine.jinja").write_text(chatml("-argument"))

    def mark(**arguments):
        tokenizer = ChatTokenizer(str(folder), **arguments)
        return (
            text_of(tokenizer, tokenizer.encode_prompt([user("")]))
            .splitlines()[-1]
            .removeprefix("<|im_start|>assistant-")
        )

    assert mark() == "config"
    (folder / "chat_template.jinja").write_text(chatml("-file"))
    assert mark() == "file"
    assert mark(chat_template=str(tmp_path / "mine.jinja")) == "argument"


def test_named_tokens_are_read_as_strings_or_objects_and_from_older_checkpoints_own_file(tmp_path):
    template = "{{ bos_token }}" + chatml("")
    folder = write_folder(tmp_path, FAMILIES["smollm2"], template, bos_token={"content": "<|endoftext|>"})
    assert ChatTokenizer(str(folder)).encode_prompt([user("Hi")])[0] == 0
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|im_end|>"}}')
    prompt = ChatTokenizer(str(folder)).encode_prompt([user("Hi")])
    assert prompt[0] == 2
    assert prompt == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [user("Hi")], add_generation_prompt=True, return_dict=False
    )


HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(
            "{{ messages | length }}" + LOOP + HEADER,
            "renders a prompt differently once it is answered",
            id="earlier text is rewritten",
        ),
        pytest.param(
            "{% for m in messages[-1:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + HEADER,
            "renders a prompt differently once it is answered",
            id="the prompt is dropped",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}"
            "{% endfor %}" + HEADER,
            "renders a prompt differently once it is answered",
            id="the answer is dropped, header and all",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}" + HEADER,
            "omits or alters the assistant's content",
            id="the answer is altered",
        ),
        pytest.param(LOOP, "puts '<|im_start|>assistant' before an answer", id="no generation prompt"),
        pytest.param(
            "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "puts '### assistant:' before an answer",
            id="no generation prompt, in plain text",
        ),
        pytest.param(
            "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}### assistant:\n{% endif %}",
            "ends the assistant's turn without a special token",
            id="no end of turn",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}",
            "puts '<|endoftext|>' after <|im_end|>",
            id="text behind the end of turn",
        ),
        pytest.param(
            "{% for m in messages %}{{ '<|im_end|>' if m.role == 'assistant' else '<|im_start|>' }}\n{{ m.content }}"
            "{% endfor %}<|im_end|>",
            "puts <|im_end|> after every chat, so that no token ends an answer",
            id="what stands at the end of every chat",
        ),
        pytest.param(
            LOOP + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
            "renders a prompt differently once it is answered",
            id="another header in the generation prompt",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "ends a generation prompt with a space, which is a part of the answer's first word",
            id="the header ends in a space that belongs to the first word",
        ),
        pytest.param(
            "{{ raise_exception('no chats here') }}", "fails on the simplest chat (no chats here)", id="declines"
        ),
        pytest.param("{{ messages[0].content + 1 }}", "fails on the simplest chat", id="has a bug"),
        pytest.param("{% for m in messages %}", "is not valid Jinja", id="is not Jinja"),
        pytest.param(
            "{{ ''.__class__.__mro__ }}" + LOOP + HEADER,
            "fails on the simplest chat (access to attribute '__class__' of 'str' object is unsafe.)",
            id="reaches out of the sandbox",
        ),
        pytest.param(
            "{% set _ = messages.append(messages[0]) %}" + LOOP + HEADER,
            "fails on the simplest chat (access to attribute 'append' of 'list' object is unsafe.)",
            id="changes the messages",
        ),
    ],
)
def test_a_template_that_cannot_be_cut_into_prompt_and_response_is_refused(tmp_path, template, reason):
    folder = write_folder(tmp_path, FAMILIES["smollm2"], template)
    with pytest.raises(ConfigError) as error:
        ChatTokenizer(str(folder))
    message = str(error.value)
    assert message.startswith(f"tokenizer.chat_template: {folder / 'tokenizer_config.json'} ")
    assert reason in message
    assert "set tokenizer.chat_template to a Jinja file" in message
    assert "\n" not in message


def test_what_is_missing_or_broken_in_a_folder_is_named_with_the_remedy(tmp_path):
    def complaint(**arguments):
        with pytest.raises(ConfigError) as error:
            ChatTokenizer(str(folder), **arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = write_folder(tmp_path, FAMILIES["llama3"], chat_template=None)
    assert complaint() == f"tokenizer.chat_template: {folder} has no chat template; set this key to a Jinja file"
    assert f"tokenizer.chat_template: {tmp_path / 'x.jinja'} is not a file" in complaint(
        chat_template=str(tmp_path / "x.jinja")
    )
    assert "tokenizer.max_seq_len: expected a length of at least 1, or null for no limit, got 0" in complaint(
        max_seq_len=0
    )
    write_folder(tmp_path, FAMILIES["llama3"], eos_token="</s>")
    assert "tokenizer.json has no token '</s>', the eos_token of tokenizer_config.json" in complaint()
    (folder / "tokenizer_config.json").write_text("{")
    assert f"tokenizer.path: {folder / 'tokenizer_config.json'} is not valid JSON" in complaint()
    (folder / "tokenizer_config.json").unlink()
    assert f"tokenizer.path: {folder / 'tokenizer_config.json'} is missing" in complaint()
    (folder / "tokenizer.json").write_text("{}")
    assert f"tokenizer.path: {folder / 'tokenizer.json'} cannot be read" in complaint()
    (folder / "tokenizer.json").unlink()
    assert f"tokenizer.path: {folder / 'tokenizer.json'} is missing" in complaint()


# ---- Chats that a template declines


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([system("Be brief."), user("Hi")], "rejects the chat: System role not supported"),
        ([user("Hi"), user("Hi")], "rejects the chat: Conversation roles must alternate"),
        (["Hi"], "rejects the chat"),
        ([user("lone surrogate \ud800")], "not valid Unicode"),
    ],
)
def test_a_chat_that_the_template_declines_is_an_error_in_the_data(ours, chat, reason):
    for encode in (ours["gemma2"].encode_prompt, lambda prompt: ours["gemma2"].encode_response(prompt, "Hello \ud800")):
        with pytest.raises(DataError) as error:
            encode(chat)
        assert str(error.value).startswith("messages: ")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_a_chat_that_the_template_rewrites_once_answered_is_an_error_in_the_data(tmp_path):
    template = "{{ 'Long chat.' if messages | length > 4 }}" + LOOP + HEADER
    tokenizer = ChatTokenizer(str(write_folder(tmp_path, FAMILIES["smollm2"], template)))
    prompt = [user("1"), assistant("2"), user("3")]
    assert tokenizer.encode_response(prompt, "4")
    with pytest.raises(
        DataError, match=r"^messages: .* does not render this chat as its prompt, the response and <\|im_end"
    ):
        tokenizer.encode_response([system("0"), *prompt], "4")


# ---- As a torchtune tokenizer


def test_torchtune_s_chat_dataset_learns_the_responses_and_their_ends_of_turn_only(tmp_path, ours):
    tokenizer = ours["smollm2"]
    chat = [system("Add."), user("1 + 1"), assistant("2"), user("2 + 2"), assistant(" four")]
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": chat}]))
    dataset = chat_dataset(
        tokenizer,
        source="json",
        conversation_column="messages",
        conversation_style="openai",
        data_files=str(tmp_path / "chats.json"),
        split="train",
    )
    sample = dataset[0]
    pieces = [
        (True, "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"),
        (False, "2<|im_end|>"),
        (True, "\n<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"),
        (False, " four<|im_end|>"),
    ]
    ids = [(masked, tokenizer.encode(text, add_bos=False, add_eos=False)) for masked, text in pieces]
    assert list(sample["tokens"]) == [id for _, piece in ids for id in piece]
    assert list(sample["labels"]) == [-100 if masked else id for masked, piece in ids for id in piece]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_of_messages_is_its_last_prompt_and_response(ours, name):
    tokenizer = ours[name]
    prompt = [user("1 + 1"), assistant("2"), user("2 + 2")]
    messages = [Message(role=m["role"], content=m["content"], masked=True) for m in prompt]
    ids, mask = tokenizer.tokenize_messages([*messages, Message(role="assistant", content="4")])
    response = tokenizer.encode_response(prompt, "4")
    assert ids == tokenizer.encode_prompt(prompt) + response
    assert mask == [True] * (len(ids) - len(response)) + [False] * len(response)


@pytest.mark.parametrize("last", [[], [Message(role="assistant", content="")]])
def test_at_inference_a_sample_ends_where_the_answer_starts(ours, last):
    tokenizer = ours["smollm2"]
    sample = {"messages": [Message(role="user", content="Hi", masked=True), *last], "id": 7}
    sample = tokenizer(sample, inference=True)
    assert sample.keys() == {"id", "tokens", "mask"}
    assert sample["tokens"] == tokenizer.encode_prompt([user("Hi")])


def test_at_inference_an_answer_that_has_begun_is_left_open(ours):
    tokenizer = ours["smollm2"]
    messages = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")]
    ids, _ = tokenizer.tokenize_messages(messages, add_end_tokens=False)
    prompt = [user("Hi")]
    assert ids == tokenizer.encode_prompt(prompt) + tokenizer.encode_response(prompt, "Hello")[:-1]


def test_messages_behind_the_last_answer_are_kept_and_masked_as_they_say(ours):
    tokenizer = ours["smollm2"]
    chat = [user("1 + 1"), assistant("2"), user("Thanks")]
    messages = [Message(role=m["role"], content=m["content"], masked=m is chat[0]) for m in chat]
    ids, mask = tokenizer.tokenize_messages(messages)
    assert text_of(tokenizer, ids).endswith("<|im_start|>user\nThanks<|im_end|>\n")
    assert mask == sorted(mask, reverse=True)
    assert not mask[-1]


def test_a_tool_s_result_has_the_role_that_templates_call_tool(ours):
    ids, _ = ours["smollm2"].tokenize_messages(
        [Message(role="user", content="1"), Message(role="ipython", content="2")]
    )
    assert text_of(ours["smollm2"], ids).endswith("<|im_start|>tool\n2<|im_end|>\n")


def test_what_exceeds_max_seq_len_is_cut_without_an_end_of_turn(folders, ours):
    messages = [Message(role="user", content="Hi", masked=True), Message(role="assistant", content="Hello " * 9)]
    ids, mask = ours["llama3"].tokenize_messages(messages)
    limit = len(ids) - 3
    cut = ChatTokenizer(str(folders["llama3"]), max_seq_len=limit)
    assert cut.tokenize_messages(messages) == (ids[:limit], mask[:limit])
    assert cut.encode_response([user("Hi")], "Hello " * 9)[-1] == cut.stop_tokens[0]


def test_a_template_that_rewrites_history_is_an_error_for_several_answers_and_none_for_one(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}"
    ) + HEADER
    tokenizer = ChatTokenizer(str(write_folder(tmp_path, FAMILIES["smollm2"], template)))
    first = [Message(role="user", content="1 + 1"), Message(role="assistant", content="hm</think>2")]
    assert "hm</think>2" in tokenizer.decode(tokenizer.tokenize_messages(first)[0])
    second = [Message(role="user", content="2 + 2"), Message(role="assistant", content="4")]
    with pytest.raises(DataError, match="^messages: .* renders earlier turns differently once later ones follow"):
        tokenizer.tokenize_messages([*first, *second])


def test_a_message_with_an_image_is_refused(ours):
    with pytest.raises(DataError, match="^messages: expected text only, but a message has an image"):
        ours["llama3"].tokenize_messages([Message(role="user", content=[{"type": "image", "content": None}])])


def test_encode_adds_bos_and_eos_unless_declined(ours):
    tokenizer = ours["gemma2"]
    text = tokenizer.encode("the model", add_bos=False, add_eos=False)
    assert tokenizer.encode("the model") == [tokenizer.bos_id, *text, tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode("the model")) == "the model"
    assert max(tokenizer.special_tokens.values()) < tokenizer.vocab_size
    assert ours["qwen2_5"].encode("Hi", add_eos=False) == ours["qwen2_5"].encode("Hi", add_bos=False, add_eos=False)


def test_a_tokenizer_travels_to_worker_processes(ours):
    chat = [user("Hi")]
    assert pickle.loads(pickle.dumps(ours["llama3"])).encode_prompt(chat) == ours["llama3"].encode_prompt(chat)
