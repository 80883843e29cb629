"""What a config asks of a builder and the built model does not show is refused, LoRA's layers first of all."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3, lora_llama3

from humanline.checkpoint._weights import build_decoder
from humanline.errors import ConfigError

SHAPE = {
    **{"vocab_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32},
    **{"intermediate_dim": 48, "max_seq_len": 64},
}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
BUILDERS = {
    "torchtune.models.llama2.lora_llama2": {},
    "torchtune.models.llama3.lora_llama3": {},
    "torchtune.models.llama3_1.lora_llama3_1": {},
    "torchtune.models.llama3_2.lora_llama3_2": {},
    "torchtune.models.mistral.lora_mistral": {},
    "torchtune.models.qwen2.lora_qwen2": {},
    "torchtune.models.gemma.lora_gemma": {"head_dim": 8},
    "torchtune.models.phi3.lora_phi3": {},
    "humanline.models.gemma2.lora_gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
}


def built(component: str, **arguments):
    model = {"_component_": component, **SHAPE, **LORA, **arguments}
    with torch.device("meta"):
        return build_decoder(OmegaConf.create({"model": model, "checkpointer": {}}))


def lora_that_forgets_layers(lora_attn_modules, **shape):
    """A builder of a user's own: the last layer has no adapter."""
    model, plain = lora_llama3(lora_attn_modules, **shape), llama3(**SHAPE)
    model.layers[-1] = plain.layers[-1]
    return model


def lora_that_ignores(lora_attn_modules, lora_rank=8, **kwargs):
    """Another one: it passes over what it does not know."""
    return lora_llama3(lora_attn_modules, lora_rank=lora_rank, lora_alpha=16.0, **SHAPE)


def lora_without_adapters(**kwargs):
    return llama3(**SHAPE)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"lora_rank": 0}, "model.lora_rank: expected a rank of at least 1, got 0"),
        ({"lora_alpha": 0}, "model.lora_alpha: expected a number above 0, which scales the adapter's update, got 0"),
        ({"lora_dropout": 1.0}, "model.lora_dropout: expected the share of dropped inputs, in [0, 1), got 1.0"),
    ],
)
def test_an_adapter_that_cannot_train_is_refused(setting, words):
    with pytest.raises(ConfigError) as error:
        built("torchtune.models.llama3.lora_llama3", lora_attn_modules=["q_proj"], **setting)
    assert words in str(error.value)


@pytest.mark.parametrize("component", BUILDERS)
def test_a_name_that_the_model_does_not_have_is_refused_with_the_one_that_it_has(component):
    own = BUILDERS[component]
    known = ["q_proj", "k_proj", "v_proj", "output_proj"]
    assert built(component, lora_attn_modules=known, **own) is not None
    with pytest.raises(
        ConfigError, match=r"^model.lora_attn_modules: this model's attention has no layer o_proj; use output_proj$"
    ):
        built(component, lora_attn_modules=["q_proj", "o_proj"], **own)
    with pytest.raises(
        ConfigError, match="has no layer o_proj; use output_proj$"
    ):  # of which all parameters were trained
        built(component, lora_attn_modules=["o_proj"], **own)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["query_key_value"], "has no layer query_key_value; use q_proj, k_proj and v_proj"),
        (["Wqkv"], "has no layer Wqkv; use q_proj, k_proj and v_proj"),
        (["wq"], "has no layer wq; use q_proj"),
        (["query"], "has no layer query; use q_proj"),
        (["q_porj"], "has no layer q_porj; use q_proj"),
        (["self_attn.o_proj"], "has no layer self_attn.o_proj; use output_proj"),
        (["q_proj", "down_proj"], "has no layer down_proj; it belongs to the MLP: set model.apply_lora_to_mlp: True"),
        (["lm_head"], "has no layer lm_head; it is the output layer"),
        (["all-linear"], "list the layers, q_proj, k_proj, v_proj, output_proj, and set model.apply_lora_to_mlp: True"),
        (["q_proj", "v_proj", "q_proj"], "q_proj is listed 2 times; list it once"),
        ("q_proj", "expected a list of names"),
        ([1], "expected a list of names"),
    ],
)
def test_names_of_other_libraries_are_refused_with_what_to_set(names, words):
    with pytest.raises(ConfigError) as error:
        built("torchtune.models.llama3.lora_llama3", lora_attn_modules=names)
    assert words in str(error.value) and str(error.value).startswith("model.lora_attn_modules: ")


OWN = "test_model_arguments"


@pytest.mark.parametrize(
    ("component", "arguments", "words"),
    [
        (f"{OWN}.lora_that_forgets_layers", SHAPE | LORA, "q_proj has no adapter in layer 1"),
        (f"{OWN}.lora_that_ignores", {"use_dora": True}, "model.use_dora: True has no effect"),
        (f"{OWN}.lora_that_ignores", {"apply_lora_to_mlp": True}, "model.apply_lora_to_mlp: True has no effect"),
        (f"{OWN}.lora_that_ignores", {"quantize_base": True}, "model.quantize_base: True has no effect"),
        (f"{OWN}.lora_that_ignores", {"lora_alpha": 8.0}, "model.lora_alpha: 8.0 has no effect: .* with 16.0"),
        (f"{OWN}.lora_that_ignores", {"lora_dropout": 0.1}, "model.lora_dropout: 0.1 has no effect"),
        (f"{OWN}.lora_that_ignores", {"max_seq_len": 32}, "model.max_seq_len: 32 has no effect: .* with 64"),
        (f"{OWN}.lora_without_adapters", {}, "model.lora_attn_modules: q_proj has no adapter in layer 0"),
        (
            "torchtune.models.qwen2.lora_qwen2",
            SHAPE | LORA | {"tie_word_embeddings": True, "apply_lora_to_output": True},
            "model: ",
        ),
        (
            "humanline.models.gemma2.gemma2",
            SHAPE | {"final_capping_value": 25.0},
            "model.final_capping_value: is not an argument",
        ),
    ],
)
def test_an_argument_that_has_no_effect_is_refused(component, arguments, words):
    names = {} if component.endswith(".gemma2") else {"lora_attn_modules": ["q_proj"]}
    model = {"_component_": component, **names, **arguments}
    with pytest.raises(ConfigError, match=words), torch.device("meta"):
        build_decoder(OmegaConf.create({"model": model, "checkpointer": {}}))


def test_a_lora_builder_without_an_adapter_is_refused_instead_of_training_everything():
    model = {"_component_": f"{OWN}.lora_without_adapters"}
    with pytest.raises(ConfigError, match="built a model without adapters"), torch.device("meta"):
        build_decoder(OmegaConf.create({"model": model, "checkpointer": {}}))


def test_training_refuses_it_before_it_reads_data(trajectory):
    run = trajectory("dpo_7_k1")
    run.config["model"] |= {
        "_component_": "torchtune.models.llama3.lora_llama3",
        "lora_attn_modules": ["o_proj"],
        **LORA,
    }
    run.config["dataset"]["source"] = "nowhere.jsonl"
    line = run.train()
    assert (
        line.startswith(
            "humanline_dpo_distributed.py: model.lora_attn_modules: this model's attention has no layer o_proj"
        )
        and "\n" not in line
    )
