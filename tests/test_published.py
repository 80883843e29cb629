"""A checkpoint's config.json against the built model: the right file is accepted, each wrong quantity is refused."""

import json
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from published import LLAMA_8B, PUBLISHED, llama, llama3_scaling, mistral, phi3, qwen2, sizes, text_alone
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune.models.llama3 import llama3, llama3_8b
from torchtune.models.llama3_2 import llama3_2
from torchtune.training import FullModelHFCheckpointer
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from humanline.checkpoint._weights import build_decoder, read_decoder_weights
from humanline.errors import ConfigError
from humanline.models import check_function, differences, measure, read_published, second_opinion
from humanline.models._check_function import remedy
from humanline.models._family_defaults import FAMILY_DEFAULTS

pytestmark = pytest.mark.slow

MODEL_TYPES = {
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "phi3": "PHI3_MINI",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "mistral": "MISTRAL",
}


def build(path: str, **arguments):
    module, _, name = path.rpartition(".")
    with torch.device("meta"):
        return getattr(import_module(module), name)(**arguments)


def write(folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def complaint(folder, config: dict, built, longest: int) -> str:
    """What is said against a config.json for a model that was measured; nothing if they agree."""
    try:
        published = read_published(write(folder, config), longest)
    except ConfigError as error:
        return str(error)
    model_type = MODEL_TYPES.get(config.get("text_config", config)["model_type"], "LLAMA3")
    return "; ".join(map(str, differences(built, published, model_type)))


def wrong(config: dict) -> dict[str, dict]:
    """The same file with one quantity wrong, by what a complaint about it has to say."""
    family, heads = config["model_type"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    files = {
        "RoPE is base 30,000": {"rope_theta": 30000.0},
        "RoPE is base 40,000": {
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": 40000.0, "rope_type": "default"},
        },
        "divided by 5": {
            "rope_scaling": {"type": "linear", "factor": 5.0},
            "rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"},
        },
        "divided by 3": {"rope_scaling": {"type": "linear", "factor": 3.0}},
        "rms_norm_eps is 0.001": {"rms_norm_eps": 1e-3},
        f"num_attention_heads is {2 * heads}": {"num_attention_heads": 2 * heads, "head_dim": head_dim},
        "num_key_value_heads is 5 ": {"num_key_value_heads": 5},
        f"head_dim is {2 * head_dim}": {"head_dim": 2 * head_dim},
        "hidden_act is relu": {key: "relu" for key in ("hidden_act", "hidden_activation") if key in config},
        "tie_word_embeddings is": {"tie_word_embeddings": not config.get("tie_word_embeddings", "gemma" in family)},
        "model_type 'granite'": {"model_type": "granite"},
        "residual_multiplier: 0.22": {"residual_multiplier": 0.22},
        "quantization_config: the weights are quantised (bitsandbytes)": {
            "quantization_config": {"quant_method": "bitsandbytes"}
        },
        "rope_type 'mrope'": {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}},
    }
    if "gemma" not in family:
        no_windows = dict.fromkeys(("max_window_layers", "sliding_window", "use_sliding_window"))
        files["the scale of norms is 1 + weight"] = {"model_type": "gemma", "head_dim": head_dim, **no_windows}
    if family == "qwen3":
        files["the norms of queries and keys is none in config.json and before RoPE in"] = {"model_type": "qwen2"}
    if family == "gemma2":
        files |= {
            "attn_logit_softcapping is null": {"attn_logit_softcapping": None},
            "final_logit_softcapping is 50": {"final_logit_softcapping": 50.0},
            "the scale of attention is 0.05": {"query_pre_attn_scalar": 400},
            "sliding_window is [2048] on layers 0, 2": {"sliding_window": 2048, "sliding_window_size": 2048},
            "sliding_window is null": {"layer_types": ["full_attention"] * config["num_hidden_layers"]},
        }
    if family == "gemma3_text":
        default = {"rope_theta": config["rope_theta"], "rope_type": "default"}
        files |= {
            "RoPE is base 40,000": {
                "rope_scaling": None,
                "rope_parameters": {"full_attention": {"rope_theta": 40000.0, "rope_type": "default"}},
            },
            "divided by 5": {
                "rope_scaling": {"rope_type": "linear", "factor": 5.0},
                "rope_parameters": {"full_attention": default},
            },
            "RoPE is base 20,000": {"rope_local_base_freq": 20000.0},
            "the norms of queries and keys is none in config.json and before RoPE in": {
                **{"model_type": "gemma2", "rope_local_base_freq": None},
                **{"sliding_window_pattern": None, "_sliding_window_pattern": None},
            },
            "attn_logit_softcapping is 50": {"attn_logit_softcapping": 50.0},
            "final_logit_softcapping is 30": {"final_logit_softcapping": 30.0},
            "the scale of attention is 0.05": {"query_pre_attn_scalar": 400},
            "sliding_window is [2048] on layers 0, 1, 2, 3, 4, 6": {"sliding_window": 2048},
            "on layers 0, 1, 2, 4, 5": {"sliding_window_pattern": 4, "layer_types": None},
            "use_bidirectional_attention: true": {"use_bidirectional_attention": True},
        }
    if family == "gemma3_text" and config["rope_scaling"]:
        files["lowest frequency divided by 8"] = {"rope_scaling": None}
    elif scaling := config.get("rope_scaling"):
        files |= {
            "dimensions, neighbouring dimensions paired in config.json": {"rope_scaling": None},
            "divided by 16": {"rope_scaling": scaling | {"factor": 16.0}},
            "RoPE": {"rope_scaling": scaling | {"original_max_position_embeddings": 4096}},
            "RoPE is": {"rope_scaling": scaling | {"low_freq_factor": 2.0}},
        }
    return {words: config | change for words, change in files.items()}


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_builder_takes_the_config_json_of_its_checkpoints_and_no_other(path, tmp_path):
    model = build(path)
    built = measure(model)
    for config in PUBLISHED[path].values():
        assert complaint(tmp_path, config, built, model.max_seq_len) == ""
        config = text_alone(config)
        assert complaint(tmp_path, config, built, model.max_seq_len) == ""
        as_transformers_5 = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
        rope = {"rope_type": "default"} | (config.get("rope_scaling") or {}) | {"rope_theta": config["rope_theta"]}
        if (local := config.get("rope_local_base_freq")) is not None:
            nearby = {"rope_type": "default", "rope_theta": local}
            rope = {"full_attention": rope, "sliding_attention": nearby}
            del as_transformers_5["rope_local_base_freq"]
        assert complaint(tmp_path, as_transformers_5 | {"rope_parameters": rope}, built, model.max_seq_len) == ""
    for words, config in wrong(text_alone(next(iter(PUBLISHED[path].values())))).items():
        assert words in complaint(tmp_path, config, built, model.max_seq_len), words


def test_the_guide_and_the_configs_name_builders_of_the_table():
    rows = re.findall(r"^\| `([\w.]+)` \| `(\w+)` \| (.+) \|$", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert {builder: names.split(", ") for builder, _, names in rows} == {
        builder: list(files) for builder, files in PUBLISHED.items()
    }
    for path in (ROOT / "configs").glob("*.yaml"):
        cfg = OmegaConf.load(path)
        if "model" not in cfg or "_component_" not in cfg.model:
            continue
        builder = re.sub(r"\.q?lora_", ".", cfg.model._component_)
        (model_type,) = (kind for name, kind, _ in rows if name == builder)
        assert cfg.checkpointer.model_type == model_type, path
        assert cfg.checkpointer.checkpoint_dir.rpartition("/")[2] in PUBLISHED[builder]


LLAMA31 = llama(500000.0, llama3_scaling(8.0), 131072, **LLAMA_8B)
QWEN_MATH = qwen2(4096, tied=True, **sizes(28, 1536, 8960, 12, 2, 151936)) | {"rope_theta": 10000}
PHI4 = phi3(rope_theta=250000, sliding_window=None, **sizes(40, 5120, 17920, 40, 10, 100352))
PHI4 |= {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384}
QWEN3 = PUBLISHED["humanline.models.qwen3.qwen3_8b"]["Qwen3-8B"]
GEMMA3 = PUBLISHED["humanline.models.gemma3.gemma3_27b"]["gemma-3-27b-it"]
REMEDIES = [
    (LLAMA31, "torchtune.models.llama3.qlora_llama3_8b", r"torchtune\.models\.llama3_1\.qlora_llama3_1_8b$"),
    (QWEN_MATH, "torchtune.models.qwen2_5.qwen2_5_1_5b_base", r"torchtune\.models\.qwen2\.qwen2, .*rope_base: 10000"),
    (
        mistral(rope_theta=1e6, sliding_window=None),
        "torchtune.models.mistral.mistral_7b",
        r"mistral\.mistral, .*rope_base: 1000000$",
    ),
    (PHI4, "torchtune.models.phi4.phi4_14b", r"torchtune\.models\.phi3\.phi3, .*rope_base: 250000$"),
    (QWEN3, "torchtune.models.llama3.qlora_llama3_8b", r"humanline\.models\.qwen3\.qlora_qwen3_8b$"),
    (
        QWEN3 | {"rope_theta": 5e6},
        "humanline.models.qwen3.lora_qwen3_8b",
        r"component_: humanline\.models\.qwen3\.lora_qwen3, .*head_dim: 128, .*rope_base: 5000000,",
    ),
    (GEMMA3, "humanline.models.gemma2.lora_gemma2_27b", r"humanline\.models\.gemma3\.lora_gemma3_27b$"),
    (
        GEMMA3 | {"text_config": GEMMA3["text_config"] | {"sliding_window_pattern": 4, "rope_local_base_freq": 5000}},
        "humanline.models.gemma3.gemma3_27b",
        r"gemma3\.gemma3, .*local_rope_base: 5000, model.rope_factor: 8, .*sliding_window_pattern: 4, .*scalar: 168",
    ),
    (
        LLAMA31 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
        "torchtune.models.llama3_1.llama3_1_8b",
        r"^no builder of torchtune or humanline computes this function$",
    ),
]


@pytest.mark.parametrize(("config", "builder", "words"), REMEDIES)
def test_the_remedy_names_a_builder_that_computes_what_config_json_says(config, builder, words, tmp_path):
    published = read_published(write(tmp_path, config), 4096)
    assert re.search(words, remedy(published, {"_component_": builder}, None))


def test_rotations_of_one_base_and_one_lowest_frequency_are_told_apart_by_another_frequency(tmp_path):
    scaling = LLAMA31["rope_scaling"] | {"low_freq_factor": 2.0}
    built_one = measure(build("torchtune.models.llama3_1.llama3_1_8b"))
    said = complaint(tmp_path, LLAMA31 | {"rope_scaling": scaling}, built_one, 131072)
    one, other = re.findall(r", frequency 3\d = ([\d.e-]+)", said)
    assert float(one) != float(other)


def test_llama_3_1_in_the_builder_of_llama_3_is_refused_in_one_line(tmp_path):
    with torch.device("meta"):
        model = llama3_8b()
    published = read_published(write(tmp_path, LLAMA31), model.max_seq_len)
    with pytest.raises(ConfigError) as error:
        check_function(model, published, {"_component_": "torchtune.models.llama3.llama3_8b"}, "LLAMA3")
    assert str(error.value) == (
        f"checkpointer.checkpoint_dir: {tmp_path} has another architecture than model "
        "(torchtune.models.llama3.llama3_8b): the rotation of RoPE is base 500,000, 128 dimensions, lowest "
        "frequency divided by 8, neighbouring dimensions paired in config.json and base 500,000, 128 dimensions, "
        "neighbouring dimensions paired in the model; set model._component_: torchtune.models.llama3_1.llama3_1_8b"
    )


class HalvedRope(nn.Module):
    """Positions half as far apart, which no argument of a builder says."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs = theirs

    def rope_init(self):
        self.theirs.rope_init()

    def forward(self, x, *, input_pos=None):
        return self.theirs(x, input_pos=input_pos // 2)


def test_a_builder_of_one_s_own_is_measured_and_not_taken_by_its_name(tmp_path):
    shape = {"vocab_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    config = llama(500000.0, **sizes(2, 32, 48, 4, 2, 96))
    with torch.device("meta"):
        model = llama3(**shape, intermediate_dim=48, max_seq_len=64)
    published = read_published(write(tmp_path, config), 64)
    assert not list(differences(measure(model), published, "LLAMA3"))
    model.layers[1].mlp.activation = nn.GELU()
    assert "hidden_act is silu in config.json and gelu in" in str(*differences(measure(model), published, "LLAMA3"))
    model.layers[1].mlp.activation = nn.SiLU()
    model.layers[1].attn.pos_embeddings = HalvedRope(model.layers[1].attn.pos_embeddings)
    assert "the rotation of RoPE" in str(*differences(measure(model), published, "LLAMA3"))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "llama3", **llama3_scaling(8.0)}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, 64),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
    ],
)
def test_scaled_positions_turn_as_in_transformers(scaling, longest, tmp_path):
    scaling = {"original_max_position_embeddings": 64} | scaling
    config = llama(10000.0, scaling, 256, **sizes(2, 256, 48, 4, 2, 96))
    published = read_published(write(tmp_path, config), longest)
    assert second_opinion(published) is None


def test_of_two_keys_for_scaled_positions_the_one_counts_that_transformers_reads(tmp_path):
    """A file that transformers 5 wrote, to which a model card's scaling was added by hand."""
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    added = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = llama(10000.0, added, 256, **sizes(2, 256, 48, 4, 2, 96)) | {"rope_parameters": rope}
    published = read_published(write(tmp_path, config), 64)
    assert published.rope["rope_type"] == "yarn" and second_opinion(published) is None
    plain = read_published(write(tmp_path, config | {"rope_scaling": None}), 64)
    assert plain.rope["rope_type"] == "default" and not plain.rotations[0].like(published.rotations[0])


def test_a_misreading_of_scaled_positions_is_refused(tmp_path):
    published = read_published(write(tmp_path, LLAMA31), 64)
    assert second_opinion(published) is None
    misread = SimpleNamespace(
        **vars(published)
        | {
            "rotations": read_published(write(tmp_path, LLAMA31 | {"rope_theta": 500001.0}), 64).rotations,
            "rms_norm_eps": 1e-4,
        }
    )
    with pytest.raises(ConfigError, match="transformers reads rms_norm_eps as 1e-05, humanline as 0.0001"):
        write(tmp_path, LLAMA31)
        second_opinion(misread)


def test_positions_that_turn_otherwise_in_long_sequences_are_refused_for_them(tmp_path):
    config = llama(10000.0, {"rope_type": "dynamic", "factor": 2.0}, 64, **sizes(2, 256, 48, 4, 2, 96))
    with pytest.raises(ConfigError, match="longer than 64 positions, which no builder computes; set model.max_seq_len"):
        read_published(write(tmp_path, config), 65)


# ---- the recipes


def edit(run, **changes) -> None:
    path = run.folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_training_refuses_a_checkpoint_of_another_function_and_says_what_to_set(trajectory):
    run = trajectory("dpo_7_k1")
    edit(run, rope_theta=123456.0, rms_norm_eps=1e-3)
    line = run.train()
    assert (
        "has another architecture than model (torchtune.models.llama3.llama3): the rotation of RoPE is base 123,456"
        in line
    )
    assert "rms_norm_eps is 0.001 in config.json and " in line
    assert line.endswith("; set model.norm_eps: 0.001, model.rope_base: 123456") and "\n" not in line


def test_training_refuses_a_checkpointer_that_lays_rows_out_for_another_rotation(trajectory):
    run = trajectory("dpo_7_k1")
    line = run.train("checkpointer.model_type=QWEN2")
    assert "dimensions paired over halves of a head in config.json and" in line
    assert line.endswith("set checkpointer.model_type: LLAMA3")


# ---- tied embeddings

HF = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
TUNE = {
    **{"vocab_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32},
    **{"intermediate_dim": 48, "max_seq_len": 64, "norm_eps": 1e-5},
}
TIED = {
    "llama3_2": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**HF, rope_theta=5e5),
        {"_component_": "torchtune.models.llama3_2.llama3_2", **TUNE, "scale_factor": 1},
        "LLAMA3_2",
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**HF, rope_theta=1e6),
        {"_component_": "torchtune.models.qwen2.qwen2", **TUNE, "tie_word_embeddings": True},
        "QWEN2",
    ),
    "gemma": (
        GemmaForCausalLM,
        lambda: GemmaConfig(**HF, head_dim=8),
        {"_component_": "torchtune.models.gemma.gemma", **TUNE, "head_dim": 8},
        "GEMMA",
    ),
}


@pytest.mark.parametrize("family", TIED)
def test_a_tied_checkpoint_with_a_copy_of_its_embeddings_loads_and_another_output_layer_is_refused(family, tmp_path):
    hf_class, hf_config, model, model_type = TIED[family]
    torch.manual_seed(0)
    theirs = hf_class(hf_config()).eval()
    theirs.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    plain = load_file(file)
    embeddings = plain["model.embed_tokens.weight"]
    save_file(plain | {"lm_head.weight": embeddings.clone()}, file, metadata={"format": "pt"})
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path / "model"),
        "checkpoint_files": ["model.safetensors"],
        "model_type": model_type,
        "output_dir": str(tmp_path / "out"),
    }
    cfg = OmegaConf.create({"model": model, "checkpointer": checkpointer})
    with torch.device("meta"):
        decoder = build_decoder(cfg)
    io, weights = read_decoder_weights(cfg, decoder)
    assert weights.keys() == decoder.state_dict().keys() and isinstance(io, FullModelHFCheckpointer)
    io.save_checkpoint({"model": dict(weights)}, epoch=0)
    index = json.loads((tmp_path / "out" / "epoch_0" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain.keys()
    tokens = torch.arange(9)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_0").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    written = json.loads((tmp_path / "out" / "epoch_0" / "config.json").read_text())
    assert written == json.loads((tmp_path / "model" / "config.json").read_text())

    save_file(plain | {"lm_head.weight": embeddings + 1e-3}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"an output layer \(lm_head.weight\) that differs from its embeddings"):
        read_decoder_weights(cfg, decoder)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_on_a_tied_checkpoint_with_a_copy_of_its_embeddings_hands_out_every_weight_of_its_index(
    trajectory, shards
):
    run = trajectory("dpo_7_k1")
    folder = run.folder / "model"
    hf_class, _, model, _ = TIED["llama3_2"]
    theirs = hf_class(LlamaConfig(**HF | {"vocab_size": 256, "max_position_embeddings": 128}, rope_theta=5e5))
    theirs.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    copied = {"lm_head.weight": plain["model.embed_tokens.weight"].clone()}
    parts = [plain | copied] if shards == 1 else [plain, copied]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    (folder / "model.safetensors").unlink()
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    run.config["model"] = model | {"vocab_size": 256, "max_seq_len": 128}
    run.config["checkpointer"] |= {"checkpoint_files": files, "model_type": "LLAMA3_2"}
    assert run.train("max_steps_per_epoch=1") is None
    out = run.folder / "out" / "epoch_0"
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == plain.keys()
    assert all(name in load_file(out / file) for name, file in index.items())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(again.model.embed_tokens.weight, plain["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", FAMILY_DEFAULTS)
def test_a_value_of_any_kind_in_config_json_is_taken_or_refused_in_one_line(family, tmp_path):
    good = {"model_type": family, **sizes(2, 32, 48, 4, 2, 96)}
    named = {"text_config", "quantization_config", "vision_config", "rope_scaling", "rope_parameters", "layer_types"}
    values = ["x", 5, -1, 1.5, float("inf"), True, None, [], ["x"], {}, {"a": 1}]
    values += [{"rope_type": "linear"}, {"rope_type": "llama3", "factor": "x"}]
    refused = 0
    for window in ({}, {"sliding_window": 8, "use_sliding_window": True}):
        for key in {*FAMILY_DEFAULTS[family], *good, *named}:
            for value in values:
                try:
                    read_published(write(tmp_path, good | window | {key: value}), 64)
                except ConfigError as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert refused > 100


def test_a_tied_checkpoint_in_an_untied_builder_is_refused_with_the_argument(tmp_path):
    with torch.device("meta"):
        model = llama3_2(**TUNE, scale_factor=1, tie_word_embeddings=False)
    config = llama(500000, **sizes(2, 32, 48, 4, 2, 96)) | {"tie_word_embeddings": True}
    published = read_published(write(tmp_path, config), 64)
    builder = {"_component_": "torchtune.models.llama3_2.llama3_2", **TUNE, "rope_base": 500000, "scale_factor": 1}
    with pytest.raises(ConfigError) as error:
        check_function(model, published, builder | {"head_dim": 8, "tie_word_embeddings": False})
    assert "tie_word_embeddings is true in config.json and false in the model; set " in str(error.value)
    assert "model.tie_word_embeddings: true" in str(error.value)
