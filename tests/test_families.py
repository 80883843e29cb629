"""The families that configs name compute what transformers does, from the same files, and give the files back."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrajectoryRun
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask
from torchtune import training
from torchtune.models.gemma import gemma
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.models import (
    LogProbDecoder,
    differences,
    fixed_log_probs,
    freeze_base,
    gemma2,
    has_quantized_base,
    load_decoder,
    measure,
    read_published,
    second_opinion,
    set_windows,
    trainable_parameters,
)
from humanline.models.gemma2 import _mend
from humanline.rollout import SamplingParams, TorchtuneEngine

pytestmark = pytest.mark.slow

HF = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # large, so that the soft-caps and the window show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TUNE = {
    "vocab_size": 96,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 64,
    "norm_eps": 1e-5,
}
WINDOW = 6
LLAMA3_SCALING = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}
EAGER = {"attn_implementation": "eager"}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 10}


@dataclass(frozen=True)
class Family:
    model_type: str
    hf_class: Any
    hf_config: Any
    build: Any


FAMILIES = {
    "llama3": Family(
        "LLAMA3",
        LlamaForCausalLM,
        lambda: LlamaConfig(**HF, rope_theta=5e5, tie_word_embeddings=False),
        lambda: llama3(**TUNE, rope_base=500_000),
    ),
    "qwen2_5": Family(
        "QWEN2",
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**HF, rope_theta=1e6, tie_word_embeddings=True),
        lambda: qwen2(**TUNE, rope_base=1e6, tie_word_embeddings=True),
    ),
    "gemma2": Family(
        "GEMMA2",
        Gemma2ForCausalLM,
        lambda: Gemma2Config(**HF, **GEMMA, sliding_window=WINDOW, attn_implementation="eager"),
        lambda: gemma2.gemma2(**TUNE, **GEMMA, sliding_window_size=WINDOW),
    ),
    "llama3_2": Family(
        "LLAMA3_2",
        LlamaForCausalLM,
        lambda: LlamaConfig(**HF, rope_parameters=LLAMA3_SCALING, tie_word_embeddings=True),
        lambda: llama3_2(**TUNE),
    ),
    "gemma": Family(
        "GEMMA",
        GemmaForCausalLM,
        lambda: GemmaConfig(**HF, head_dim=12),
        lambda: gemma(**TUNE, head_dim=12),
    ),
    "phi3": Family(
        "PHI3_MINI",
        Phi3ForCausalLM,
        lambda: Phi3Config(**HF, original_max_position_embeddings=64),
        lambda: phi3(**TUNE),
    ),
}
# torchtune computes these without their sliding windows, which config.json has.
WINDOWED = {
    "mistral": Family(
        "MISTRAL",
        MistralForCausalLM,
        lambda: MistralConfig(**HF, sliding_window=WINDOW, **EAGER),
        lambda: mistral(**TUNE),
    ),
    "phi3_window": Family(
        "PHI3_MINI",
        Phi3ForCausalLM,
        lambda: Phi3Config(**HF, original_max_position_embeddings=64, sliding_window=WINDOW, **EAGER),
        lambda: phi3(**TUNE),
    ),
    "qwen2_window": Family(
        "QWEN2",
        Qwen2ForCausalLM,
        lambda: Qwen2Config(
            **HF,
            **{"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
            **{"tie_word_embeddings": False, "attn_implementation": "eager"},
        ),
        lambda: qwen2(**TUNE),
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
with_windows = pytest.mark.parametrize("family", (FAMILIES | WINDOWED).values(), ids=FAMILIES | WINDOWED)


def saved(family: Family, folder: Path):
    """A random model of transformers, in its own layout, and the model itself."""
    torch.manual_seed(0)
    model = family.hf_class(family.hf_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # else all alike
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def checkpointer(family: Family, folder: Path, output: Path) -> FullModelHFCheckpointer:
    return FullModelHFCheckpointer(str(folder), ["model.safetensors"], family.model_type, str(output))


def read(family: Family, folder: Path, agrees: bool = True):
    """The recipe's decoder with the weights of a folder."""
    weights = checkpointer(family, folder, folder.parent / "unused").load_checkpoint()[training.MODEL_KEY]
    with torch.device("meta"):
        model = family.build()
    published = read_published(folder, model.max_seq_len)
    built = measure(model)
    set_windows(model, published)
    if agrees:
        assert not list(differences(built, published, family.model_type))
        assert second_opinion(published) is None  # transformers reads the file as humanline does
    return load_decoder(model, weights, device=torch.device("cpu"), dtype=torch.float32)


def difference(family: Family, folder: Path, theirs, agrees: bool = True) -> float:
    """By how much the logits of some sequences differ at most."""
    torch.manual_seed(1)
    tokens = torch.randint(96, (3, 24))
    with torch.no_grad():
        return float((read(family, folder, agrees)(tokens) - theirs(tokens).logits).abs().max())


GROUPS = [
    Group([3, 14, 15, 92, 65, 35, 89, 79], ([32, 38, 46, 26, 43], [38, 32, 79], [50, 28, 84, 19, 71, 69, 39, 93])),
    Group([2, 71, 82], ([81, 82, 84, 59, 4, 52, 35, 36, 2, 87], [47])),
]


def one_by_one(theirs) -> torch.Tensor:
    """Log-probs of the groups' responses by transformers, a sequence at a time."""
    found = []
    for group in GROUPS:
        for response in group.responses:
            tokens = torch.tensor([[*group.prompt, *response]])
            with torch.no_grad():
                logps = theirs(tokens).logits[0].log_softmax(-1)
            places = range(len(group.prompt) - 1, tokens.size(1) - 1)
            found += [logps[place, tokens[0, place + 1]] for place in places]
    return torch.stack(found)


@every_family
def test_logits_are_those_of_transformers(family, tmp_path):
    theirs = saved(family, tmp_path)
    assert difference(family, tmp_path, theirs) < 1e-5


@with_windows
def test_packed_rows_have_the_log_probs_of_transformers_one_sequence_at_a_time(family, tmp_path):
    theirs = saved(family, tmp_path)
    budget = RowBudget(tokens_per_row=48)
    (rows,) = (lay_out(GROUPS, planned, budget) for planned in pack(GROUPS, budget))
    assert len(rows.tokens) == 1
    ours = fixed_log_probs(LogProbDecoder(read(family, tmp_path)), rows)
    torch.testing.assert_close(ours, one_by_one(theirs), atol=1e-5, rtol=1e-5)


@every_family
def test_the_weights_go_back_as_they_came(family, tmp_path):
    theirs = saved(family, tmp_path / "hf")
    io = checkpointer(family, tmp_path / "hf", tmp_path / "out")
    io.save_checkpoint(io.load_checkpoint(), epoch=0)
    written = tmp_path / "out" / "epoch_0"
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), {}
    for file in written.glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    settings = {"attn_implementation": "eager"} if family.model_type == "GEMMA2" else {}
    again = AutoModelForCausalLM.from_pretrained(written, **settings).eval()
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert json.loads((written / "config.json").read_text())["model_type"] == theirs.config.model_type


@with_windows
def test_greedy_samples_are_those_of_transformers(family, tmp_path):
    theirs = saved(family, tmp_path)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20]]
    engine = TorchtuneEngine(read(family, tmp_path), stop_tokens=[], batch_size=2)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=16, temperature=0))
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [("ATTENTION_CAP", 30.0), ("LOGIT_CAP", 50.0), ("cap_logits", lambda decoder: None)],
)
def test_a_gemma_2_that_is_not_mended_is_another_function(name, value, tmp_path, monkeypatch):
    theirs = saved(FAMILIES["gemma2"], tmp_path)
    monkeypatch.setattr(_mend, name, value)
    assert difference(FAMILIES["gemma2"], tmp_path, theirs, agrees=False) > 1e-3


def test_a_gemma_2_with_its_norms_exchanged_is_another_function(tmp_path, monkeypatch):
    theirs = saved(FAMILIES["gemma2"], tmp_path)
    table = _mend.GEMMA2_FROM_HF
    before, behind = (f"model.layers.{{}}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))
    monkeypatch.setitem(table, before, "layers.{}.mlp_scale.scale")
    monkeypatch.setitem(table, behind, "layers.{}.mlp_norm.scale")
    assert difference(FAMILIES["gemma2"], tmp_path, theirs) > 1e-3
    monkeypatch.undo()
    assert difference(FAMILIES["gemma2"], tmp_path, theirs) < 1e-5


def as_gemma_2(run: TrajectoryRun, folder: Path, **lora) -> TrajectoryRun:
    """The golden run with a tiny Gemma 2 in the place of its Llama."""
    family = FAMILIES["gemma2"]
    hf_config = Gemma2Config(**HF | {"vocab_size": 256}, **GEMMA, sliding_window=WINDOW, attn_implementation="eager")
    saved(replace(family, hf_config=lambda: hf_config), folder)
    builder = "lora_gemma2" if lora else "gemma2"
    run.config["model"] = {
        "_component_": f"humanline.models.gemma2.{builder}",
        **TUNE,
        **GEMMA,
        "vocab_size": 256,
        "sliding_window_size": WINDOW,
        **lora,
    }
    run.config["checkpointer"] |= {"checkpoint_dir": str(folder), "model_type": "GEMMA2"}
    return run


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_a_gemma_2_trains_on_two_ranks_with_packed_rows_as_with_a_sequence_a_row(trajectory, name, tmp_path):
    packed = as_gemma_2(trajectory(name), tmp_path / "gemma")
    packed.config["batch_size"] //= 2
    apart = packed.again("apart")
    packed.train_on(2)
    lines = [json.loads(line) for line in packed.data.read_text().splitlines()]
    longest_response = max(len(response) for line in lines for response in line["responses"])
    longest = max(len(line["prompt"]) for line in lines) + longest_response - 1  # with KTO's KL sequences
    assert longest > WINDOW
    apart.config |= {"tokens_per_row": longest, "rows_per_pass": 2}
    apart.train_on(2)
    assert len(packed.log()) == len(packed.golden["batches"])
    assert apart.log() == pytest.approx(packed.log(), abs=1e-5)
    assert apart.log("grad_norm") == pytest.approx(packed.log("grad_norm"), rel=1e-4)


def test_a_gemma_2_with_lora_trains_and_transformers_loads_what_it_writes(trajectory, tmp_path):
    run = as_gemma_2(
        trajectory("dpo_8_k4"), tmp_path / "gemma", lora_attn_modules=["q_proj", "v_proj"], lora_rank=4, lora_alpha=8.0
    )
    run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
    run.recipe = run.recipe.with_name("humanline_dpo_single_device.py")
    assert run.train("optimizer.lr=0.02", "save_adapter_weights_only=False") is None
    losses = list(run.log().values())
    assert losses[-1] != losses[0]
    model = AutoModelForCausalLM.from_pretrained(run.folder / "out" / "epoch_0", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "gemma", attn_implementation="eager"),
        run.folder / "out" / "epoch_0" / "adapter",
    )
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "parameters"), [("2b", 2_614_341_888), ("9b", 9_241_705_984), ("27b", 27_227_128_320)]
)
def test_the_sizes_of_gemma_2_are_those_on_the_hub(size, parameters):
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4}
    with torch.device("meta"):
        whole = LogProbDecoder(getattr(gemma2, f"gemma2_{size}")())
        adapted = LogProbDecoder(getattr(gemma2, f"lora_gemma2_{size}")(**lora))
        quantized = LogProbDecoder(getattr(gemma2, f"qlora_gemma2_{size}")(**lora))
    for model in (adapted, quantized):
        freeze_base(model, torch.float32)
    assert sum(parameter.numel() for parameter in whole.parameters()) == parameters
    assert whole.windows == [4096, None] * (len(whole.layers) // 2) and whole.soft_cap == 30
    assert trainable_parameters(adapted).keys() == trainable_parameters(quantized).keys()
    assert has_quantized_base(quantized) and not has_quantized_base(adapted)


def test_flex_attention_scores_as_the_dense_path_does():
    budget = RowBudget(tokens_per_row=48)
    (rows,) = (lay_out(GROUPS, planned, budget) for planned in pack(GROUPS, budget))
    with torch.device("meta"):
        attention = gemma2.gemma2(**TUNE, **GEMMA, sliding_window_size=WINDOW).layers[0].attn
    torch.manual_seed(0)
    length = rows.tokens.size(1)
    q, k, v = 4 * torch.randn(3, 1, 4, length, 12)
    blocks = create_block_mask(rows.visible(WINDOW), 1, None, length, length, device="cpu")
    settings = {"dropout_p": 0.0, "is_causal": False}
    dense = attention._attention_call(q, k, v, mask=rows.attention_mask(WINDOW), **settings)
    torch.testing.assert_close(attention._attention_call(q, k, v, mask=blocks, **settings), dense, atol=1e-5, rtol=1e-5)
    assert not torch.equal(rows.attention_mask(WINDOW), rows.attention_mask())
