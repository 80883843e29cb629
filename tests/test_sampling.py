"""Sampling: the engine against transformers and against exact probabilities, and the recipe as a real process."""

import gc
import json
import runpy
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_recipe
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from humanline.data import ChatTokenizer, scored_groups
from humanline.errors import ConfigError, DataError
from humanline.models import check_architecture, load_decoder
from humanline.rollout import Completion, SamplingParams, TorchtuneEngine, read_prompts
from humanline.rollout._kv_cache import KVCache
from humanline.rollout._sampling import draw

pytestmark = pytest.mark.slow

VOCABULARY = 260
SHAPE = {"vocab_size": VOCABULARY, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "embed_dim": 48}
LLAMA = {**SHAPE, "intermediate_dim": 64, "max_seq_len": 128, "rope_base": 10_000, "scale_factor": 1}
QWEN2 = {**SHAPE, "intermediate_dim": 64, "max_seq_len": 128, "rope_base": 10_000.0}
HF = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # wide enough for the logits to differ between tokens
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
STOPS = [7, 100]
BUILDER = "torchtune.models.llama3_2.llama3_2"
RECIPE = ROOT / "recipes" / "humanline_sample.py"


def hf_llama(folder, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**HF | changes)).eval()
    model.save_pretrained(folder)
    return model


def hf_qwen2(folder):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**HF)).eval()
    for name, parameter in model.named_parameters():  # initialised to zero, which would hide a lost bias
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def read_folder(folder, model_type="LLAMA3_2"):
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type=model_type,
        output_dir=str(folder.parent / "out"),
    )
    return checkpointer.load_checkpoint()["model"]


def load(folder, build, model_type="LLAMA3_2", dtype=torch.float32):
    weights = read_folder(folder, model_type)
    with torch.device("meta"):
        model = build()
    check_architecture(model, weights, str(folder))
    return load_decoder(model, weights, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama in transformers, and the same in torchtune."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    return hf_llama(folder), load(folder, lambda: llama3_2(**LLAMA))


@pytest.fixture(scope="module")
def prompts():
    """Prompts of 1 to 19 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (11,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in [*lengths, 1]]


def greedy(**changes):
    return SamplingParams(**{"max_new_tokens": 12, "temperature": 0, **changes})


def tokens_of(completions):
    return [[sample.tokens for sample in samples] for samples in completions]


# ---- The engine against transformers


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_completions_are_those_of_transformers(family, batch_size, llama, prompts, tmp_path):
    if family == "llama":
        reference, model = llama
    else:
        reference = hf_qwen2(tmp_path / "model")
        model = load(tmp_path / "model", lambda: qwen2(**QWEN2, norm_eps=1e-5, tie_word_embeddings=True), "QWEN2")
    engine = TorchtuneEngine(model, stop_tokens=STOPS, batch_size=batch_size)
    for prompt, [completion] in zip(prompts, engine.generate(prompts, greedy()), strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": STOPS, "pad_token_id": 0}
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_tokens_follow_the_exact_distribution_of_the_model(llama):
    reference, model = llama
    prompt, count, temperature, top_p = [3, 14, 15, 92], 20_000, 1.3, 0.8
    with torch.no_grad():
        probs = (reference(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    falling, ids = probs.sort(descending=True)
    nucleus = ids[: int((falling.cumsum(0) < top_p).sum()) + 1]
    params = SamplingParams(max_new_tokens=1, samples_per_prompt=count, temperature=temperature, top_p=top_p)
    engine = TorchtuneEngine(model, stop_tokens=[], batch_size=2000)
    [samples] = engine.generate([prompt], params)
    observed = torch.bincount(torch.tensor([sample.tokens[0] for sample in samples]), minlength=VOCABULARY)

    assert observed[nucleus].sum() == count
    expected = count * probs[nucleus] / probs[nucleus].sum()
    assert len(nucleus) > 20 and expected.min() > 5
    chi_square = ((observed[nucleus] - expected) ** 2 / expected).sum()
    degrees = len(nucleus) - 1
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5  # mean and deviation of the statistic


# ---- Drawing one token: evenly spaced numbers in place of random ones leave nothing to chance


EVEN = (torch.arange(10_000) + 0.5) / 10_000


def shares(probs, **settings):
    logits = torch.tensor(probs).log().expand(len(EVEN), -1)
    return (torch.bincount(draw(logits, EVEN, **settings), minlength=len(probs)) / len(EVEN)).tolist()


def test_a_token_takes_its_probability_of_the_uniform_numbers():
    probs = [0.1, 0.0, 0.6, 0.3]
    assert shares(probs, temperature=1, top_p=1) == pytest.approx(probs, abs=2e-4)


def test_temperature_divides_the_logits():
    assert shares([0.1, 0.2, 0.7], temperature=0.5, top_p=1) == pytest.approx([1 / 54, 4 / 54, 49 / 54], abs=2e-4)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.3, [0, 0, 1, 0]), (0.59, [0, 0, 1, 0]), (0.61, [0, 0, 2 / 3, 1 / 3]), (0.95, [0.1, 0, 0.6, 0.3])],
)
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p, expected):
    assert shares([0.1, 0.0, 0.6, 0.3], temperature=1, top_p=top_p) == pytest.approx(expected, abs=2e-4)


def test_a_nucleus_of_many_tokens_is_found_too():
    flat = [1 / 3000] * 3000
    assert sum(share > 0 for share in shares(flat, temperature=1, top_p=0.5)) == pytest.approx(1500, abs=2)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    extremes = torch.tensor([torch.finfo(torch.float32).tiny, 1.0])
    for top_p in (1, 0.9):
        assert set(draw(logits, extremes, temperature=1, top_p=top_p).tolist()) <= {1, 2}


# ---- What does not change a completion


@pytest.mark.parametrize("top_p", [1, 0.7])
def test_the_batch_size_does_not_change_what_is_sampled(llama, prompts, top_p):
    params = SamplingParams(max_new_tokens=10, samples_per_prompt=3, top_p=top_p, seed=5)
    outputs = [
        TorchtuneEngine(llama[1], stop_tokens=STOPS, batch_size=size).generate(prompts, params)
        for size in (1, 2, 7, 100)
    ]
    assert all(output == outputs[0] for output in outputs)


def test_a_prompt_keeps_its_completions_whatever_follows_it(llama, prompts):
    params = SamplingParams(max_new_tokens=10, samples_per_prompt=2)
    engine = TorchtuneEngine(llama[1], stop_tokens=STOPS, batch_size=8)
    assert engine.generate(prompts[:3], params) == engine.generate(prompts, params)[:3]


def test_the_seed_decides_the_completions(llama, prompts):
    engine = TorchtuneEngine(llama[1], stop_tokens=STOPS, batch_size=8)
    first, again, other = (engine.generate(prompts, SamplingParams(max_new_tokens=10, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_samples_of_a_prompt_differ_also_when_the_prompt_comes_twice(llama):
    params = SamplingParams(max_new_tokens=10, samples_per_prompt=4)
    twice = TorchtuneEngine(llama[1], stop_tokens=[], batch_size=8).generate([[1, 2], [1, 2]], params)
    assert len({tuple(sample.tokens) for samples in twice for sample in samples}) == 8


def test_a_sample_beyond_the_batch_size_is_still_drawn(llama):
    params = SamplingParams(max_new_tokens=4, samples_per_prompt=7)
    small, large = (
        TorchtuneEngine(llama[1], stop_tokens=[], batch_size=size).generate([[1, 2, 3]], params) for size in (3, 7)
    )
    assert small == large


# ---- Ends, cost, and what is left behind


def test_a_completion_ends_with_its_stop_token_or_at_its_longest(llama, prompts):
    engine = TorchtuneEngine(llama[1], stop_tokens=range(0, VOCABULARY, 8), batch_size=8)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=6, samples_per_prompt=8))
    reasons = {"stop": 0, "length": 0}
    for completion in (sample for samples in completions for sample in samples):
        *before, last = completion.tokens
        reasons[completion.finish_reason] += 1
        assert all(token % 8 for token in before)
        assert last % 8 == 0 if completion.finish_reason == "stop" else len(completion.tokens) == 6 and last % 8
    assert min(reasons.values()) > 0


def test_a_completion_may_fill_the_model_to_its_last_position(llama):
    [[completion]] = TorchtuneEngine(llama[1], stop_tokens=[], batch_size=1).generate(
        [[1] * 100], greedy(max_new_tokens=28)
    )
    assert len(completion.tokens) == 28


def test_a_prompt_is_computed_once_for_all_its_samples(llama, prompts):
    seen = []
    handle = llama[1].tok_embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    params = SamplingParams(max_new_tokens=3, samples_per_prompt=4)
    TorchtuneEngine(llama[1], stop_tokens=[], batch_size=len(prompts) * 4).generate(prompts, params)
    handle.remove()
    prefill, *steps = seen
    assert prefill == (len(prompts), max(map(len, prompts)) - 1)
    assert steps == [(len(prompts) * 4, 1)] * 3


def test_finished_rows_make_room_before_the_batch_is_done(llama):
    widths = []
    handle = llama[1].tok_embeddings.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape))
    engine = TorchtuneEngine(llama[1], stop_tokens=range(0, VOCABULARY, 4), batch_size=8)
    completions = engine.generate([[i] for i in range(40)], SamplingParams(max_new_tokens=40))
    handle.remove()
    computed = sum(rows for rows, _ in widths) - 40  # 40 of them prefill
    assert computed == sum(len(samples[0].tokens) for samples in completions)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(llama, prompts, interrupted):
    model = llama[1].train()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids)
    stream = TorchtuneEngine(model, stop_tokens=[], batch_size=4).stream(prompts, greedy())
    next(stream) if interrupted else list(stream)
    stream.close()
    assert model.training and not model.caches_are_setup() and not model.caches_are_enabled()
    assert torch.equal(model(ids), before)


def test_the_cache_goes_with_its_round(llama, prompts):
    engine = TorchtuneEngine(llama[1], stop_tokens=[], batch_size=4)
    gc.collect()
    gc.disable()  # which frees rings of objects some time, and not when their tensors are large
    try:
        engine.generate(prompts, greedy())
        assert not [thing for thing in gc.get_objects() if isinstance(thing, KVCache)]
    finally:
        gc.enable()


def test_caches_that_torchtune_set_up_before_are_neither_used_nor_lost(llama, prompts):
    model = llama3_2(**LLAMA).eval()
    model.load_state_dict(llama[1].state_dict())
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=4)
    caches = [layer.attn.kv_cache for layer in model.layers]
    expected, found = (
        TorchtuneEngine(it, stop_tokens=STOPS, batch_size=4).generate(prompts, greedy()) for it in (llama[1], model)
    )
    assert found == expected
    assert all(layer.attn.kv_cache is cache for layer, cache in zip(model.layers, caches, strict=True))


def test_bfloat16_weights_sample_on_a_cpu(llama, tmp_path, prompts):
    llama[0].save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", lambda: llama3_2(**LLAMA), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    params = SamplingParams(max_new_tokens=5, samples_per_prompt=2)
    completions = TorchtuneEngine(model, stop_tokens=[], batch_size=8).generate(prompts, params)
    assert all(len(sample.tokens) == 5 for samples in completions for sample in samples)


def test_no_prompts_give_no_completions(llama):
    assert TorchtuneEngine(llama[1], stop_tokens=[], batch_size=8).generate([], greedy()) == []


# ---- Mistakes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("samples_per_prompt", 0),
        ("samples_per_prompt", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", None),
    ],
)
def test_a_sampling_setting_that_cannot_work_is_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: expected a .*, got {value!r}$"):
        SamplingParams(**{"max_new_tokens": 8, key: value})


def test_a_batch_needs_room_for_a_row(llama):
    with pytest.raises(ConfigError, match="^batch_size: expected a whole number of at least 1, got 0$"):
        TorchtuneEngine(llama[1], stop_tokens=[], batch_size=0)


def test_the_engine_refuses_what_does_not_fit_the_model(llama):
    engine = TorchtuneEngine(llama[1], stop_tokens=[], batch_size=1)
    with pytest.raises(ConfigError, match="^max_new_tokens: 29 plus the 100 tokens of prompt 1 .* max_seq_len of 128"):
        engine.generate([[1], [1] * 100], greedy(max_new_tokens=29))
    with pytest.raises(ConfigError, match="expected at least one token, got none in prompt 0"):
        engine.generate([[]], greedy())


def test_a_model_of_another_architecture_is_refused_with_the_first_difference(tmp_path):
    hf_llama(tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "model", lambda: llama3_2(**LLAMA | {"intermediate_dim": 80}))
    assert str(error.value) == (
        f"checkpointer.checkpoint_dir: {tmp_path / 'model'} has another architecture than model: "
        "layers.0.mlp.w1.weight is [64, 48] in the checkpoint and [80, 48] in the model; "
        "point both keys to the same model"
    )
    with pytest.raises(ConfigError, match="output.weight is missing in the checkpoint and "):
        load(tmp_path / "model", lambda: llama3_2(**LLAMA, tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=r"layers.2.\S+ is \[.*\] in the checkpoint and missing in the model"):
        load(tmp_path / "model", lambda: llama3_2(**LLAMA | {"num_layers": 2}))


def test_attention_of_another_kind_is_refused():
    with torch.device("meta"):
        model = llama3_2(**LLAMA)
    model.layers[1].attn = torch.nn.Identity()
    with pytest.raises(
        ConfigError,
        match="^model: expected torchtune's MultiHeadAttention, got Identity; sample from the Hugging Face folder",
    ):
        TorchtuneEngine(model, stop_tokens=[], batch_size=1)


# ---- Prompt files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "Name?\n\nWhere?\n"),
        ("prompts.jsonl", '{"prompt": "Name?"}\n{"prompt": [{"role": "user", "content": "Where?"}]}\n'),
        ("prompts.json", '[{"instruction": "Name?"}, {"prompt": "Where?"}]'),
    ],
)
def test_every_form_of_a_prompt_file_gives_the_same_chats(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    chats = [prompt.messages for prompt in read_prompts(str(tmp_path / name))]
    assert chats == [[{"role": "user", "content": "Name?"}], [{"role": "user", "content": "Where?"}]]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("prompts.jsonl", '{"prompt": "a"}\n' + 2 * '{"answer": 1}\n', DataError, "line 2: field 'prompt' is missing"),
        (
            "prompts.jsonl",
            '{"prompt": 3}\n',
            DataError,
            "line 1: field 'prompt' must be a string or a list of messages, got 3",
        ),
        ("prompts.jsonl", '{"instruction": ""}\n', DataError, "line 1: field 'instruction' is empty"),
        ("prompts.txt", "\n", ConfigError, "^prompts: expected at least one prompt, got none in '.*'"),
        ("prompts.xlsx", "a,b\n", ConfigError, "^prompts: '.*' has an unsupported type; convert it to one of "),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_slice_of_a_prompt_file_is_taken_and_another_split_refused(tmp_path, name):
    words = ["a", "b", "c", "d"]
    line = "{}\n" if name.endswith("txt") else '{{"prompt": "{}"}}\n'
    (tmp_path / name).write_text("".join(map(line.format, words)))
    prompts = read_prompts(str(tmp_path / name), split="train[1:3]")
    assert [(prompt.where.rpartition(" ")[2], prompt.fields["prompt"]) for prompt in prompts] == [
        ("2", "b"),
        ("3", "c"),
    ]
    with pytest.raises(ConfigError, match="^split: 'test' does not work for local files"):
        read_prompts(str(tmp_path / name), split="test")


def test_a_prompt_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^prompts: file '.*' not found"):
        read_prompts(str(tmp_path / "none.jsonl"))


# ---- The recipe, as a real process


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder):
    """A tokenizer whose tokens are the 256 bytes and two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "tiny-llama"
    hf_llama(folder)
    write_tokenizer(folder)
    return folder


def of_the_model(model_folder, output_dir):
    """The keys of a config that name the tiny model in its folder."""
    return {
        "model": {"_component_": BUILDER, **LLAMA},
        "tokenizer": {"_component_": "humanline.data.ChatTokenizer", "path": str(model_folder)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model_folder),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3_2",
            "output_dir": str(output_dir),
        },
    }


def recipe_config(folder, model_folder, lines, **changes):
    """The config of a run over these prompt lines, whose output is ``folder/samples/responses``."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "prompts": str(folder / "prompts.jsonl"),
        "output": str(folder / "samples" / "responses"),
        "device": "cpu",
        "dtype": "fp32",
        "max_new_tokens": 16,
        "batch_size": 4,
        **of_the_model(model_folder, folder / "samples"),
    } | changes


@pytest.fixture
def sample(model_folder, tmp_path):
    """``sample(lines, **changes)`` runs the recipe in a process of its own.

    It returns the exit code, what was printed, and the path of the output.
    """

    def start(lines, **changes):
        config = recipe_config(tmp_path, model_folder, lines, **changes)
        return *run_recipe(RECIPE, config, tmp_path), Path(config["output"])

    return start


LINES = [
    {"prompt": "1 + 1 = ?", "answer": 2, "all_generated_responses": ["3"], "all_rm_scores": [0.0]},
    {"prompt": [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 3 = ?"}], "answer": 5},
    {"instruction": "Name?", "dataset": "helpful_base"},
]


def test_the_recipe_writes_lines_that_only_lack_scores(sample, model_folder):
    code, printed, output = sample(LINES, samples_per_prompt=3)
    assert code == 0, printed
    assert [path.name for path in output.parent.iterdir()] == ["responses"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    name = [{"role": "user", "content": "Name?"}]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "1 + 1 = ?"}], LINES[1]["prompt"], name]
    assert "prompts: the output does not keep the file's all_generated_responses, all_rm_scores" in printed
    assert [row.get("answer") for row in rows] == [2, 5, None]
    for row in rows:
        assert len(row["all_generated_responses"]) == len(row["finish_reasons"]) == 3
        assert "all_rm_scores" not in row  # those of the response "3"

    for row in rows:
        row["all_rm_scores"] = [float(len(response)) for response in row["all_generated_responses"]]
    scored = output.with_name("scored.jsonl")
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = scored_groups(ChatTokenizer(str(model_folder)), str(scored))
    assert [len(group.responses) for group in groups] == [3, 3, 3]


def test_the_recipe_writes_the_form_of_alpaca_eval(sample):
    code, printed, output = sample(LINES, format="alpaca_eval", temperature=0, system_prompt="Be brief.")
    assert code == 0, printed
    rows = json.loads(output.read_text())
    assert [row.pop("instruction") for row in rows] == ["1 + 1 = ?", "2 + 3 = ?", "Name?"]
    assert [row.pop("output") != "" for row in rows] == [True] * 3
    assert rows == [{"generator": "tiny-llama"}] * 2 + [{"generator": "tiny-llama", "dataset": "helpful_base"}]


def test_the_recipe_samples_what_the_engine_samples(sample, model_folder, llama):
    code, printed, output = sample(LINES[:1], seed=3)
    assert code == 0, printed
    tokenizer = ChatTokenizer(str(model_folder))
    engine = TorchtuneEngine(llama[1], stop_tokens=tokenizer.stop_tokens, batch_size=1, token_ids=tokenizer.token_ids)
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "1 + 1 = ?"}])
    [[completion]] = engine.generate([prompt], SamplingParams(max_new_tokens=16, seed=3))
    assert isinstance(completion, Completion)
    assert json.loads(output.read_text())["all_generated_responses"] == [tokenizer.decode(completion.tokens)]


# Notes what it decodes. Where a file `kill_at` says so, it kills its process at that call.
TOKENIZER = """
import os, signal
from pathlib import Path
from humanline.data import ChatTokenizer

class Killing(ChatTokenizer):
    def decode(self, *arguments, **settings):
        with open("decoded", "a") as file:
            file.write(".")
        kill_at = Path("kill_at")
        if kill_at.exists() and os.path.getsize("decoded") == int(kill_at.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(*arguments, **settings)
"""


@pytest.mark.parametrize("form", ["jsonl", "alpaca_eval"])
def test_a_killed_run_goes_on_with_the_prompts_it_lacks(tmp_path, model_folder, form):
    lines = [{"prompt": f"{a} + 1 = ?"} for a in range(9)]
    config = recipe_config(tmp_path, model_folder, lines, format=form, batch_size=2)
    config["tokenizer"]["_component_"] = "killing_tokenizer.Killing"
    (tmp_path / "killing_tokenizer.py").write_text(TOKENIZER)

    def start(**changes):
        (tmp_path / "decoded").unlink(missing_ok=True)
        code, printed = run_recipe(RECIPE, config | changes, tmp_path)
        return code, len((tmp_path / "decoded").read_text()), printed

    output = Path(config["output"])
    code, decoded, printed = start()
    assert (code, decoded) == (0, 9), printed
    whole = output.read_text()
    output.unlink()
    (tmp_path / "kill_at").write_text("6")
    assert start()[0] == -signal.SIGKILL and not output.exists()
    (tmp_path / "kill_at").unlink()
    other = start(seed=1, output=f"{output}_other")
    assert other[1] == 9
    code, decoded, printed = start()
    assert (code, decoded) == (0, 4), printed
    assert "5 of 9 prompts are sampled already" in printed
    assert output.read_text() == whole
    assert sorted(path.name for path in output.parent.iterdir()) == ["responses", "responses_other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp16"}, "dtype: expected bf16 or fp32, got 'fp16'"),
        ({"temprature": 1}, "temprature: not a key of this recipe"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1 (all tokens), got 0"),
        ({"prompts": None}, "prompts: missing"),
        ({"prompts": [__file__], "output": __file__}, "test_sampling.py would be written over, but it is read here"),
        (
            {"format": "alpaca_eval", "samples_per_prompt": 2},
            "samples_per_prompt: expected 1 with format: alpaca_eval, got 2",
        ),
        ({"max_new_tokens": 120}, "prompts.jsonl line 1: the prompt's 28 tokens and max_new_tokens: 120 exceed"),
        ({"model": {"_component_": BUILDER, **LLAMA, "vocab_size": 200}}, "tokenizer.path: its vocabulary of 258 is"),
        ({"model": {"_component_": BUILDER, **LLAMA, "vocab_size": 300}}, "checkpointer.checkpoint_dir: "),
        ({"model": {"_component_": BUILDER, **LLAMA, "rope_base": 777}}, "in config.json and base 777, "),
    ],
)
def test_a_mistake_is_named_before_anything_is_sampled(tmp_path, model_folder, changes, message):
    recipe = runpy.run_path(str(RECIPE))["HumanlineSampleRecipe"]
    config = OmegaConf.create(recipe_config(tmp_path, model_folder, LINES, **changes))
    with pytest.raises((ConfigError, DataError)) as error:
        recipe(config).setup(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_few_bad_rows_are_counted_and_the_others_sampled(sample):
    code, printed, output = sample([*LINES, {"answer": 1}])
    assert code == 0 and len(output.read_text().splitlines()) == len(LINES)
    assert "1 row dropped: 'prompt' is missing (1, the first: " in printed and "prompts.jsonl line 4)" in printed


def test_a_mistake_ends_the_recipe_with_one_line(sample):
    code, printed, output = sample([*LINES, *[{"answer": 1}] * 4])
    assert code == 1
    assert not output.exists()
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("humanline_sample.py: ") and "prompts.jsonl line 4: field 'prompt' is missing" in last
