"""Templates and tokenizers of many kinds: spaces before any text, thoughts, tools, dates, text that is left out."""

import json
import pickle
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_chat_tokenizer import FAMILIES, Family, assistant, system, user, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from humanline.data import ChatTokenizer, preference_groups
from humanline.data._examples import _MARKERS
from humanline.errors import ConfigError, DataError

CASES = Path(__file__).parent / "data" / "cases"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def chatml(folder, template, family="smollm2", **arguments) -> ChatTokenizer:
    return ChatTokenizer(str(write_folder(folder, FAMILIES[family], template)), **arguments)


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


# ---- Tokenizers that put a space before any text

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LETTERS = [chr(code) for code in range(33, 127)]


def sentencepiece(folder: Path, template: str, kind: str, special: tuple[str, ...] = (), rstrip: bool = False) -> Path:
    """A tokenizer of Llama 2's kind, in the forms that transformers has written; its files in HF layout.

    ``rstrip``: whether the tokens in ``special`` swallow the white space behind them, as those of Phi-3 and Phi-4 do.
    """
    specials = ("<unk>", "<s>", "</s>", *special)
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *LETTERS]
    merges = [*(("▁", letter) for letter in "HaY[sN"), ("▁", "▁"), ("\n", "\n"), ("o", "r"), ("t", "h"), ("l", "l")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    swallows = special if rstrip else ()
    added = [AddedToken(token, normalized=False, rstrip=token in swallows) for token in specials]
    tokenizer.add_special_tokens(added)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = special[-1] if special else "</s>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


KINDS = {
    "llama2": (LLAMA2, "legacy", ()),
    "llama2, newer file": (LLAMA2, "first", ()),
    "tinyllama": (ZEPHYR, "legacy", ()),
    "zephyr": (ZEPHYR, "first", ()),
    "mistral": (MISTRAL, "legacy", ()),
    "phi3": (PHI3, "legacy", ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")),
}


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    root = tmp_path_factory.mktemp("spaced")
    folders = {name: sentencepiece(root / name, *KINDS[name]) for name in KINDS}
    return {name: (ChatTokenizer(str(f)), AutoTokenizer.from_pretrained(f)) for name, f in folders.items()}


words = st.text(st.sampled_from([*LETTERS, " ", "\n", "é", "東"]), min_size=1, max_size=20).filter(str.strip)


@pytest.mark.parametrize("name", KINDS)
@given(question=words, earlier=st.none() | words, answer=words)
@settings(max_examples=60)
def test_ids_are_those_of_the_whole_chat_or_the_row_is_declined(spaced, name, question, earlier, answer):
    ours, theirs = spaced[name]
    prompt = [] if earlier is None else [user(earlier), assistant("Yes")]
    prompt += [user(question)]
    whole = theirs.apply_chat_template([*prompt, assistant(answer)], return_dict=False)
    start = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(prompt) == start
    try:
        ids = start + ours.encode_response(prompt, answer)
    except DataError as error:
        assert "ids of the chat do not start with those of its prompt" in str(error) and whole[: len(start)] != start
        return
    assert ids == whole[: len(ids)]
    rest = theirs.decode(whole[len(ids) :]).strip()
    assert rest == ("<|endoftext|>" if name == "phi3" else "")
    assert ids[-1] == ours.stop_tokens[0]


def test_a_response_after_a_space_has_its_own_ids_and_decodes_to_itself(spaced):
    ours, _ = spaced["llama2"]
    ids = ours.encode_response([user("Name?")], "Humanline")
    assert ours.decode(ids).strip() == "Humanline" and ours.decode(ids[:1]) != "Humanline"


def test_answers_with_and_without_a_first_space_have_the_ids_of_the_whole_chat(tmp_path):
    template = LLAMA2.replace("' ' + m.content.strip()", "('' if '[' in m.content else ' ') + m.content.strip()")
    for kind in ("legacy", "first", "never"):
        folder = sentencepiece(tmp_path / kind, template, kind)
        ours, theirs = ChatTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
        for answer in ("Humanline", "[TOOL_CALLS] Humanline"):
            whole = theirs.apply_chat_template([user("Name?"), assistant(answer)], return_dict=False)
            ids = ours.encode_prompt([user("Name?")]) + ours.encode_response([user("Name?")], answer)
            assert ids == whole[: len(ids)], (kind, answer)


@pytest.mark.parametrize("answer", ["Yes", " Yes", "\nYes", "  Yes", "\tYes \n", "\n\n Yes"])
def test_white_space_behind_a_token_that_swallows_it_is_no_part_of_the_response(tmp_path, answer):
    folder = sentencepiece(tmp_path / "phi3", *KINDS["phi3"], rstrip=True)
    ours, theirs = ChatTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    prompt = [user("Hi")]
    whole = theirs.apply_chat_template([*prompt, assistant(answer)], return_dict=False)
    ids = ours.encode_prompt(prompt) + ours.encode_response(prompt, answer)
    assert ids == whole[: len(ids)] and "Yes" in ours.decode(ids)


def test_messages_of_torchtune_have_the_ids_of_the_whole_chat_too(spaced):
    from torchtune.data import Message

    for name, (ours, theirs) in spaced.items():
        chat = [("user", "Name?"), ("assistant", "Humanline"), ("user", "Why?"), ("assistant", "All")]
        messages = [Message(role=role, content=said, masked=role == "user") for role, said in chat]
        ids, mask = ours.tokenize_messages(messages)
        whole = theirs.apply_chat_template([{"role": r, "content": said} for r, said in chat], return_dict=False)
        assert ids == whole[: len(ids)], name
        learnt = theirs.decode([id for id, masked in zip(ids, mask, strict=True) if not masked])
        assert "Humanline" in learnt and "All" in learnt and "Why" not in learnt, name


def test_only_the_rows_whose_ids_merge_are_dropped(spaced, tmp_path):
    ours, theirs = spaced["zephyr"]
    rows = [{"prompt": f"Q{i}", "chosen": f"Yes {i}", "rejected": "No"} for i in range(20)]
    rows[3]["chosen"] = "\nYes 3"  # the header's newline and this one are one token
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = preference_groups(ours, str(file))
    assert f"do not start with those of its prompt (1, the first: {file} line 4)" in dataset.report()
    assert len(dataset) == 19
    for group, row in zip(dataset, rows[:3] + rows[4:], strict=True):
        whole = theirs.apply_chat_template([user(row["prompt"]), assistant(row["chosen"])], return_dict=False)
        ids = [*group.prompt, *group.responses[0]]
        assert ids == whole[: len(ids)]


# ---- Templates that reject a kind of chat decline its rows, not the model


def test_a_system_message_moved_into_the_last_turn_declines_those_rows(tmp_path):
    nemo = (
        "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "<|im_start|>user\n{% if loop.last and sys is defined %}{{ sys + '\n\n' }}{% endif %}"
        "{{ m.content }}<|im_end|>\n"
        "{% else %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + HEADER
    )
    tokenizer = chatml(tmp_path, nemo)
    chat = [user("Hi"), assistant("Hello"), user("Name?")]
    assert text(tokenizer, tokenizer.encode_response(chat, "Humanline")) == "Humanline<|im_end|>"
    with pytest.raises(DataError, match="does not render this chat as its prompt, the response and"):
        tokenizer.encode_response([system("Be kind."), *chat], "Humanline")


# ---- Thoughts

QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and (loop.last or thought and loop.index0 > last_query | default(99)) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPEN = QWEN3.replace("</think>\n\n{% endif %}{% endif %}", "</think>\n\n{% else %}<think>\n{% endif %}{% endif %}")
"""Qwen3.5's: the generation prompt opens the thought."""
THOUGHT = "<think>\nAdd them.\n</think>\n\nIt is 5."


@pytest.mark.parametrize("template", [QWEN3, OPEN], ids=["qwen3", "qwen3.5"])
@pytest.mark.parametrize(
    "answer",
    [assistant(THOUGHT), {"role": "assistant", "content": "It is 5.", "reasoning_content": "Add them."}],
    ids=["in the content", "beside it"],
)
def test_a_real_thought_is_rendered_as_by_transformers(tmp_path, template, answer):
    tokenizer, prompt = chatml(tmp_path, template, "qwen2_5"), [user("2 + 3?")]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole = theirs.apply_chat_template([*prompt, answer], return_dict=False)
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(prompt, answer)
    assert ids == whole[: len(ids)] and "Add them.\n</think>\n\nIt is 5.<|im_end|>" in text(tokenizer, ids)


@pytest.mark.parametrize("kind", ["legacy", "first"])
def test_a_prompt_that_opens_a_thought_is_cut_from_it_where_a_space_precedes_any_text(tmp_path, kind):
    folder = sentencepiece(tmp_path / kind, OPEN, kind, ("<|im_start|>", "<|im_end|>"))
    tokenizer, theirs, prompt = ChatTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder), [user("2 + 3?")]
    whole = theirs.apply_chat_template([*prompt, assistant(THOUGHT)], return_dict=False)
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(prompt, THOUGHT)
    assert ids == whole[: len(ids)] and "Add them.\n</think>\n\nIt is 5.<|im_end|>" in text(tokenizer, ids)
    with pytest.raises(DataError, match="the prompt opens a thought, and the answer has none"):
        tokenizer.encode_response(prompt, "It is 5.")


def test_an_answer_without_a_thought_where_the_prompt_opens_one_needs_enable_thinking_false(tmp_path):
    prompt = [user("2 + 3?")]
    with pytest.raises(DataError, match=r"chat_template_kwargs \(such as enable_thinking: false"):
        chatml(tmp_path, OPEN, "qwen2_5").encode_response(prompt, "It is 5.")
    tokenizer = chatml(tmp_path, OPEN, "qwen2_5", chat_template_kwargs={"enable_thinking": False})
    assert text(tokenizer, tokenizer.encode_prompt(prompt)).endswith("<think>\n\n</think>\n\n")
    assert text(tokenizer, tokenizer.encode_response(prompt, "It is 5.")) == "It is 5.<|im_end|>"


CLOSED = OPEN.replace("<think>\n\n</think>\n\n{% else %}<think>", "<think></think>{% else %}<think>").replace(
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n",
    "{% if thought %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% else %}<think></think>{% endif %}",
)
"""Nemotron 3's and QwQ's kind: an answer without a thought does not start as the generation prompt does."""


def test_a_template_that_has_no_place_for_answers_without_thoughts_is_used_for_those_with_them(tmp_path):
    tokenizer, prompt = chatml(tmp_path, CLOSED, "qwen2_5"), [user("2 + 3?")]
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(prompt, THOUGHT)
    assert text(tokenizer, ids).endswith("<|im_start|>assistant\n<think>\nAdd them.\n</think>\n\nIt is 5.<|im_end|>")
    with pytest.raises(
        DataError, match=r"does not render this chat .*chat_template_kwargs \(the template reads enable"
    ):
        tokenizer.encode_response(prompt, "It is 5.")
    tokenizer = chatml(tmp_path, CLOSED, "qwen2_5", chat_template_kwargs={"enable_thinking": False})
    assert text(tokenizer, tokenizer.encode_response(prompt, "It is 5.")) == "It is 5.<|im_end|>"


def test_a_variable_that_the_template_does_not_read_is_not_advised(tmp_path):
    template = OPEN.replace("enable_thinking", "other")
    with pytest.raises(
        DataError, match="opens a thought, and the answer has none; drop the example, or set tokenizer.c"
    ):
        chatml(tmp_path, template, "qwen2_5").encode_response([user("2 + 3?")], "It is 5.")


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "strftime_now", "raise_exception"]
)
def test_what_humanline_sets_cannot_be_a_variable(tmp_path, name):
    with pytest.raises(ConfigError, match=f"^tokenizer.chat_template_kwargs: {name} is set by humanline"):
        chatml(tmp_path, LOOP + HEADER, chat_template_kwargs={name: 1})


@pytest.mark.parametrize("given", [5, [1], "x", {1: 2}, {"ok": 1, 2: 3}], ids=str)
def test_variables_of_a_template_have_names(tmp_path, given):
    for kwargs in (given, OmegaConf.create({"it": given}).it):  # as in Python, and as in a config
        with pytest.raises(ConfigError, match="^tokenizer.chat_template_kwargs: expected .*, got ") as error:
            chatml(tmp_path, LOOP + HEADER, chat_template_kwargs=kwargs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "name", "remedy"),
    [
        (QWEN3, "enable_thinkin", "did you mean enable_thinking[?] Correct it or remove it"),
        (LOOP + HEADER, "enable_thinking", "remove it"),
        (LOOP + HEADER, "date_string", "remove it"),
    ],
    ids=["a misspelt one", "one of other templates", "a date"],
)
def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path, template, name, remedy):
    message = f"^tokenizer.chat_template_kwargs: .*tokenizer_config.json does not read '{name}'; {remedy}$"
    with pytest.raises(ConfigError, match=message):
        chatml(tmp_path, template, "qwen2_5", chat_template_kwargs={name: False})


def test_a_variable_with_a_default_in_the_template_is_read(tmp_path):
    for i, default in enumerate(
        ("{% if who is not defined %}{% set who = 'no' %}{% endif %}", "{% set who = who | default('no') %}")
    ):
        template = default + LOOP.replace("{{ m.role }}", "{{ m.role }} of {{ who }}")
        template += HEADER.replace("assistant", "assistant of {{ who }}")
        tokenizer = chatml(tmp_path / str(i), template, chat_template_kwargs={"who": "Oslo"})
        assert "assistant of Oslo" in text(tokenizer, tokenizer.encode_prompt([user("Hi")]))


# ---- Text that a template leaves out

NO_SYSTEM = LOOP.replace("%}<", "%}{% if m.role != 'system' %}<", 1).replace("{% endfor", "{% endif %}{% endfor")
NO_SYSTEM += HEADER  # Phi-3's kind
DELETES = LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}") + HEADER


def test_a_template_that_deletes_thoughts_is_refused_and_says_what_is_lost(tmp_path):
    tokenizer = chatml(tmp_path, DELETES)
    assert tokenizer.encode_response([user("2 + 3?")], "It is 5.")
    lost = "Two and three make five."
    message = rf"^tokenizer.chat_template: .* leaves out the response's '{lost}', .* \(first seen in .*t01_think.jsonl"
    with pytest.raises(ConfigError, match=message):
        preference_groups(tokenizer, str(CASES / "t01_think.jsonl"))
    assert len(preference_groups(chatml(tmp_path / "keeps", LOOP + HEADER), str(CASES / "t01_think.jsonl"))) == 3


def test_white_space_that_a_template_strips_is_no_loss(tmp_path):
    tokenizer = chatml(tmp_path, LOOP.replace("{{ m.content }}", "{{ m.content | trim }}") + HEADER)
    assert text(tokenizer, tokenizer.encode_response([user("Hi")], "  Hello \n")) == "Hello<|im_end|>"


def test_a_message_that_a_template_leaves_out_is_refused(tmp_path):
    tokenizer = chatml(tmp_path, NO_SYSTEM)
    assert tokenizer.encode_prompt([user("Hi")])
    with pytest.raises(ConfigError, match="leaves out the message of the system, so the model would not see it"):
        tokenizer.encode_prompt([system("Be kind."), user("Hi")])


@pytest.mark.parametrize("answer", ["hm</think>It is 5.", "<think>\n\n</think>\n\nIt is 5."], ids=["open", "empty"])
def test_tags_of_a_thought_that_a_template_deletes_are_lost_too(tmp_path, answer):
    tokenizer = chatml(tmp_path, DELETES)
    with pytest.raises(ConfigError, match="leaves out the response's '(hm|<think>)', so"):
        tokenizer.encode_response([user("2 + 3?")], answer)


def test_a_template_that_opens_a_thought_and_deletes_it_from_answers_says_so(tmp_path):
    template = DELETES.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # DeepSeek-R1's
    with pytest.raises(ConfigError, match="opens a thought, and leaves out of an answer what stands before </think>;"):
        chatml(tmp_path, template)


CODE = "def f():\n    return 1"


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("m.content.split() | join('')", "white space in 'def f"),
        ("m.content | replace('\n', ' ')", "white space in 'def f"),
        ("m.content | replace('    ', '')", "white space in 'def f"),
        ("m.content.split('\n')[-1]", "'def f"),
        ("m.content.split('\n')[0]", "'return 1'"),
    ],
)
def test_a_part_of_a_text_that_a_template_leaves_out_is_refused_by_name(tmp_path, change, lost):
    for role, place in (("assistant", "the response's "), ("user", "")):
        template = LOOP.replace("{{ m.content }}", f"{{{{ {change} if m.role == '{role}' else m.content }}}}") + HEADER
        tokenizer = chatml(tmp_path / role, template)
        assert tokenizer.encode_response([user("Hi")], "Yes")
        with pytest.raises(ConfigError, match=re.escape(f"leaves out {place}{lost}")):
            tokenizer.encode_response([user(CODE)], CODE)


def test_a_user_s_text_is_no_thought(tmp_path):
    tokenizer = chatml(tmp_path, DELETES)
    with pytest.raises(ConfigError, match="leaves out 'Secret' in the message of the user, so"):
        tokenizer.encode_prompt([user("Secret </think> tail")])
    assert tokenizer.encode_prompt([user("2 + 3?"), assistant(THOUGHT), user("Why?")])


def test_a_message_that_a_template_leaves_out_is_refused_also_if_its_text_stands_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match="leaves out the message of the system, so"):
        chatml(tmp_path, NO_SYSTEM).encode_prompt([system("Be brief."), user("Be brief. Hi")])


def test_a_result_that_a_template_writes_as_json_is_there(tmp_path):
    template = LOOP.replace("m.content }}", "m.content | tojson if m.role == 'tool' else m.content }}") + HEADER
    chat = [user("Oslo?"), assistant("Let me look."), {"role": "tool", "content": 'very\n"cold"'}]
    tokenizer = chatml(tmp_path, template)
    assert r"very\n\"cold\"" in text(tokenizer, tokenizer.encode_prompt(chat))


def test_a_message_that_a_template_alters_is_not(tmp_path):
    template = LOOP.replace("m.content }}", "m.content.replace('/no_think', '') }}", 1)
    tokenizer = chatml(tmp_path, template + HEADER)
    assert "Be kind. <|im_end|>" in text(tokenizer, tokenizer.encode_prompt([system("Be kind. /no_think"), user("Hi")]))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + HEADER
)


def test_tools_and_calls_are_rendered_as_by_transformers(tmp_path):
    tokenizer = chatml(tmp_path, WITH_TOOLS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    prompt = [user("Oslo?"), called, {"role": "tool", "content": "cold"}]
    for chat, answer in (([user("Oslo?")], called), (prompt, assistant("It is cold."))):
        whole = theirs.apply_chat_template([*chat, answer], tools=TOOLS, return_dict=False)
        ids = tokenizer.encode_prompt(chat, TOOLS) + tokenizer.encode_response(chat, answer, TOOLS)
        assert ids == whole[: len(ids)] and "weather" in text(tokenizer, ids)


def test_text_beside_a_call_of_an_earlier_turn_is_not_lost(tmp_path):
    tokenizer = chatml(tmp_path, WITH_TOOLS.replace("m.content", "m.content if not m.tool_calls"))  # Llama 3.1's kind
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "cold"}
    assert tokenizer.encode_prompt([user("Oslo?"), called, result], TOOLS)
    with pytest.raises(ConfigError, match="leaves out the message of the assistant beside its calls, so"):
        tokenizer.encode_prompt([user("Oslo?"), called | {"content": "Let me look."}, result], TOOLS)


@pytest.mark.parametrize("arguments", [{"city": "Bergen"}, '{"city": "Bergen"}', {}], ids=["an object", "JSON", "none"])
def test_each_of_several_calls_is_there(tmp_path, arguments):
    first_only = WITH_TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")  # gpt-oss's kind
    second = {**CALL, "function": {"name": "climate", "arguments": arguments}}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL, second]}
    chat = [user("Oslo?"), called, {"role": "tool", "content": "cold"}]
    tokenizer = chatml(tmp_path, first_only)
    with pytest.raises(ConfigError, match="leaves out number 2 of 'tool_calls', so"):
        tokenizer.encode_prompt(chat, TOOLS)
    with pytest.raises(ConfigError, match="leaves out number 2 of 'tool_calls' of the response, so"):
        tokenizer.encode_response([user("Oslo?")], called, TOOLS)
    both = chatml(tmp_path / "both", WITH_TOOLS)
    assert "climate" in text(both, both.encode_prompt(chat, TOOLS))


def test_a_call_s_arguments_are_there(tmp_path):
    tokenizer = chatml(tmp_path, WITH_TOOLS.replace("call.function |", "call.function.name |"))
    with pytest.raises(ConfigError, match="leaves out 'tool_calls' of the response, so"):
        tokenizer.encode_response([user("Oslo?")], {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOOLS)


def test_a_call_without_text_is_rendered_by_a_template_that_reads_the_text_of_other_messages(tmp_path):
    template = WITH_TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content + '' }}{% endif %}")
    tokenizer, prompt = chatml(tmp_path, template), [user("Oslo?")]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert "weather" in text(tokenizer, tokenizer.encode_response(prompt, called, TOOLS))
    assert tokenizer.encode_prompt([*prompt, called, {"role": "tool", "content": "cold"}], TOOLS)


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("p10b_tool_empty.jsonl", "'tool_calls'"),
        ("p10c_tools_col.jsonl", "tools"),
        ("p18_reasoning.jsonl", "'reasoning_content' of the response"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused_by_name(tmp_path, file, lost):
    with pytest.raises(ConfigError, match=f"^tokenizer.chat_template: .* leaves out {lost}, so the model") as raised:
        preference_groups(chatml(tmp_path, LOOP + HEADER), str(CASES / file))
    assert f"(first seen in {CASES / file} line 1)" in str(raised.value)


@pytest.mark.parametrize(
    ("file", "template", "kept"),
    [
        ("p10b_tool_empty.jsonl", WITH_TOOLS, ['<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}']),
        ("p10c_tools_col.jsonl", WITH_TOOLS, ['"description": "Weather"', "Let me look.<tool_call>"]),
        ("p18_reasoning.jsonl", QWEN3, ["<think>\nadd them\n</think>\n\n5<|im_end|>"]),
    ],
)
def test_and_handed_to_a_template_that_has_one(tmp_path, file, template, kept):
    tokenizer = chatml(tmp_path, template)
    (group,) = preference_groups(tokenizer, str(CASES / file))
    chat = text(tokenizer, [*group.prompt, *group.responses[0]])
    assert all(part in chat for part in kept)


@pytest.mark.parametrize(
    "field", ["context", "documents", "thought", "functions", "tools", "tool_plan", "analysis", "refusal"]
)
def test_a_field_of_a_message_that_the_template_does_not_read_is_refused(tmp_path, field):
    tokenizer = chatml(tmp_path, LOOP + HEADER)
    with pytest.raises(ConfigError, match=f"leaves out '{field}'"):
        tokenizer.encode_prompt([{**user("q"), field: "Oslo is cold."}])
    with pytest.raises(ConfigError, match=f"leaves out '{field}' of the response"):
        tokenizer.encode_response([user("q")], {**assistant("a"), field: "Oslo is cold."})
    template = LOOP.replace("{{ m.content }}", f"{{{{ m.{field} }}}}{{{{ m.content }}}}") + HEADER
    reads = chatml(tmp_path / "reads", template)
    assert "Oslo is cold.q" in text(reads, reads.encode_prompt([{**user("q"), field: "Oslo is cold."}]))


def test_tools_in_a_message_are_not_those_of_the_chat(tmp_path):
    tokenizer, chat = chatml(tmp_path, WITH_TOOLS), [{**system("S"), "tools": TOOLS}, user("Oslo?")]
    with pytest.raises(ConfigError, match="leaves out 'tools', so"):
        tokenizer.encode_prompt(chat)
    assert "weather" in text(tokenizer, tokenizer.encode_prompt(chat, TOOLS))  # they are the same
    own = chatml(
        tmp_path / "own", LOOP.replace("{{ m.content }}", "{{ m.content }}{{ m.tools }}") + HEADER
    )  # Phi-4-mini's
    assert "weather" in text(own, own.encode_prompt(chat))


BLOCKS = {
    "thinking_blocks": [{"type": "thinking", "thinking": "Add them.", "signature": "x"}],
    "reasoning_details": [{"type": "reasoning.text", "text": "Add them.", "index": 0}],
}


@pytest.mark.parametrize("field", BLOCKS)
def test_a_thought_in_blocks_is_there_if_it_is_also_there_as_text(tmp_path, field):
    tokenizer, prompt = chatml(tmp_path, QWEN3, "qwen2_5"), [user("2 + 3?")]
    answer = {**assistant("It is 5."), field: BLOCKS[field]}
    with pytest.raises(ConfigError, match=f"leaves out '{field}' of the response"):
        tokenizer.encode_response(prompt, answer)
    with pytest.raises(ConfigError, match=f"leaves out '{field}', so"):
        tokenizer.encode_prompt([*prompt, answer, user("Why?")])
    answer |= {"reasoning": "Add them."}
    assert "Add them." in text(tokenizer, tokenizer.encode_response(prompt, answer))
    assert tokenizer.encode_prompt([*prompt, answer, user("Why?")])


@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_the_names_that_transformers_gives_it(tmp_path, field, read):
    template = QWEN3.replace("reasoning_content", read)
    tokenizer = chatml(tmp_path, template, "qwen2_5", chat_template_kwargs={"last_query": 0})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    thoughtful = {**assistant("It is 5."), field: "Add them."}
    prompt = [user("2 + 3?")]
    for chat, answer in ((prompt, thoughtful), ([*prompt, thoughtful, user("Why?")], assistant("So."))):
        whole = theirs.apply_chat_template([*chat, answer], return_dict=False, last_query=0)
        ids = tokenizer.encode_prompt(chat) + tokenizer.encode_response(chat, answer)
        assert ids == whole[: len(ids)] and "<think>\nAdd them.\n</think>" in text(tokenizer, ids)


def test_a_thought_under_two_names_is_one_and_another_thought_is_refused(tmp_path):
    tokenizer, answer = chatml(tmp_path, QWEN3, "qwen2_5"), assistant("It is 5.")
    both = {**answer, "reasoning_content": "Add them.", "reasoning": "Add them."}
    assert "Add them." in text(tokenizer, tokenizer.encode_response([user("2 + 3?")], both))
    with pytest.raises(ConfigError, match="leaves out 'reasoning' of the response"):
        tokenizer.encode_response([user("2 + 3?")], both | {"reasoning": "Guess."})


@pytest.mark.parametrize("field", ["reasoning", "thinking"])
def test_a_name_that_is_a_part_of_another_is_not_read(tmp_path, field):
    template = "{% if enable_thinking or my_reasoning %}Think.{% endif %}" + LOOP + HEADER
    with pytest.raises(ConfigError, match=f"leaves out '{field}'"):
        chatml(tmp_path, template).encode_prompt([user("q"), {**assistant("a"), field: "Oslo is cold."}, user("q")])


def pairs_file(folder: Path, odd: dict, count: int) -> str:
    """A file of 20 pairs, the first ones odd."""
    rows = [{"prompt": f"Q{i}", "chosen": f"Yes {i}", "rejected": "No"} | (odd if i < count else {}) for i in range(20)]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("template", "odd", "lost"),
    [
        (NO_SYSTEM, {"system": "Be kind."}, "the message of the system"),
        (DELETES, {"chosen": THOUGHT}, "a part of the response"),
        (QWEN3, {"chosen": f"Sure. {THOUGHT}"}, "a part of the response"),
        (LOOP + HEADER, {"tools": TOOLS}, "tools"),
    ],
    ids=["system", "thought", "text before a thought", "tools"],
)
def test_a_few_rows_of_which_a_template_leaves_out_a_part_are_dropped_and_counted(tmp_path, template, odd, lost):
    tokenizer = chatml(tmp_path, template, "qwen2_5")
    dataset = preference_groups(tokenizer, file := pairs_file(tmp_path, odd, 2))
    assert len(dataset) == 18
    assert f"2 rows dropped: the chat template leaves out {lost} (2, the first: {file} line 1)" in dataset.report()
    message = (
        rf"^tokenizer.chat_template: .* leaves out .* \(first seen in {file} line 1\); {{}} of 20 rows cannot be used$"
    )
    with pytest.raises(ConfigError, match=message.format(2)):
        preference_groups(tokenizer, file, on_bad_row="stop")
    with pytest.raises(ConfigError, match=message.format(3)):
        preference_groups(tokenizer, pairs_file(tmp_path, odd, 3))


def test_text_with_the_template_s_own_tokens_is_found(tmp_path):
    tokenizer = chatml(tmp_path, LOOP + HEADER)
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.markers)
    with pytest.raises(DataError, match=r"line 1: the text has '<\|im_start\|>' of a chat template"):
        preference_groups(tokenizer, str(CASES / "p27_pretemplated.jsonl"))


@pytest.mark.parametrize("end", ["", "\n", " "])
def test_a_prompt_that_ends_with_a_cue_has_been_through_a_template(tmp_path, end):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": f"### Instruction:\nHi\n\n### Response:{end}", "chosen": "Yes", "rejected": "No"}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="the text has '### Response:' of a chat template"):
        preference_groups(chatml(tmp_path / "folder", LOOP + HEADER), str(file))


@pytest.mark.parametrize("name", KINDS)
def test_markers_are_what_the_template_writes_around_a_message_and_people_do_not(spaced, name):
    ours, _ = spaced[name]
    (prompt,) = ours.render([user("Name? My name is: Bob, isn't it? 2 - 1 = 1")], [])
    found = {marker for marker in ours.markers if marker in prompt}
    assert found and not any(
        marker in "Name? My name is: Bob, isn't it? (2 - 1) = 1 <b> [x]" for marker in ours.markers
    )
    assert found - set(_MARKERS) or found & set(_MARKERS)


MARKDOWN = '## A title\n\n* 1 => "two" (e.g. `three`) <b>[x]</b> # four\n<think>\nSo.\n</think>\n\n/think'


@pytest.mark.parametrize("template", [QWEN3, OPEN, LOOP + HEADER], ids=["qwen3", "qwen3.5", "chatml"])
def test_what_a_template_says_itself_and_thoughts_are_no_markers(tmp_path, template):
    said = '<|im_start|>system\n## Metadata\n\n* Ask back (e.g. "What?" => `ask`) <tool> # /think<|im_end|>\n'
    tokenizer = chatml(tmp_path, said + template, "qwen2_5")
    assert set(tokenizer.markers) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}  # the last is the EOS
    assert not any(marker in MARKDOWN for marker in tokenizer.markers)


def test_special_tokens_of_turns_are_markers_but_not_those_of_calls_or_that_people_write(tmp_path):
    folder = chatml(tmp_path, LOOP + HEADER, "qwen2_5")._file.parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|channel|>", "<|tool_call|>", "<|begin_of_thinking|>", "<filename>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    markers = ChatTokenizer(str(folder)).markers
    assert set(markers) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|channel|>"}


def test_a_thought_in_a_row_is_no_text_of_a_template(tmp_path):
    assert len(preference_groups(chatml(tmp_path, QWEN3, "qwen2_5"), str(CASES / "t01_think.jsonl"))) == 3


# ---- The date

DATED = "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}<|im_end|>\n" + LOOP + HEADER


def test_a_template_reads_the_date_of_the_run(tmp_path):
    tokenizer = chatml(tmp_path, DATED, date="2024-02-29")
    assert tokenizer.date == "2024-02-29"
    assert "Today: 29 February 2024<" in text(tokenizer, tokenizer.encode_prompt([user("Hi")]))
    assert pickle.loads(pickle.dumps(tokenizer)).date == "2024-02-29"


def test_without_a_date_it_is_today_s_and_a_template_that_reads_none_has_none(tmp_path):
    before, tokenizer, after = datetime.now(), chatml(tmp_path, DATED), datetime.now()
    assert tokenizer.date in (f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}")
    assert chatml(tmp_path / "undated", LOOP + HEADER).date is None


DATED_BY_LLAMA = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
"""Llama 3.2's."""


def test_a_date_that_a_variable_replaces_is_not_read(tmp_path):
    template = DATED_BY_LLAMA + DATED.replace("strftime_now('%d %B %Y')", "date_string")
    assert chatml(tmp_path, template, date="2024-02-29").date == "2024-02-29"
    tokenizer = chatml(tmp_path, template, chat_template_kwargs={"date_string": "05 May 2020"})
    assert tokenizer.date is None
    assert "Today: 05 May 2020<" in text(tokenizer, tokenizer.encode_prompt([user("Hi")]))
    both = "{{ date_string }}" + DATED
    assert chatml(tmp_path / "both", both, chat_template_kwargs={"date_string": "5"}, date="2024-02-29").date


def test_the_date_is_a_part_of_the_fingerprint_if_it_is_read(tmp_path):
    first, second = (chatml(tmp_path, DATED, date=date).fingerprint() for date in ("2024-02-28", "2024-02-29"))
    assert first != second
    plain = [chatml(tmp_path, LOOP + HEADER, date=date).fingerprint() for date in ("2024-02-28", "2024-02-29")]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("date", ["yesterday", "2024-13-01", 5, ""])
def test_a_date_that_is_none_is_refused(tmp_path, date):
    with pytest.raises(ConfigError, match="^tokenizer.date: expected a day such as 2026-01-31, or null, got "):
        chatml(tmp_path, DATED, date=date)


# ---- The tokenizer's fault


def test_a_tokenizer_that_merges_prompt_and_answer_is_blamed_and_not_the_template(tmp_path):
    family = Family("gemma2", ("<unk>", "</s>"), None, "</s>", "</s>")
    folder = write_folder(tmp_path, family, "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].append(["?", "H"])
    content["model"]["vocab"]["?H"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(ConfigError, match=r"^tokenizer.path: .*tokenizer.json merges the end of a prompt") as raised:
        ChatTokenizer(str(folder))
    assert "chat_template" not in str(raised.value)


def test_a_template_of_the_user_s_is_blamed_and_not_the_tokenizer(tmp_path):
    override = tmp_path / "mine.jinja"
    override.write_text((LOOP + HEADER).replace("}}\n", "}}\n\n").replace("assistant\n", "assistant\n\n"))
    message = f"^tokenizer.chat_template: {override} ends a generation prompt with text that merges with the answer's"
    with pytest.raises(ConfigError, match=message) as raised:
        chatml(tmp_path, LOOP + HEADER, chat_template=str(override))
    assert "tokenizer.json" not in str(raised.value)
