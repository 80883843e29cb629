"""config.json of published models, as it stands on the hub, for the keys that decide what a model computes."""

from typing import Any

Config = dict[str, Any]


def sizes(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


# Beside the rest in real files, without an effect on the function.
HABITS: Config = {
    **{"_name_or_path": "somewhere", "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True},
    **{"bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02, "attention_dropout": 0.0},
}


def llama(theta: float, scaling: Config | None = None, positions: int = 8192, **more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5},
        **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False},
        **{"max_position_embeddings": positions, "rope_theta": theta, "rope_scaling": scaling},
        **more,
    }


def llama3_scaling(factor: float) -> Config:
    return {
        **{"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }


def mistral(**more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"},
        **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        **sizes(32, 4096, 14336, 32, 8, 32000),
        **more,
    }


def qwen2(positions: int, eps: float = 1e-6, tied: bool = False, **more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": eps},
        **{"max_position_embeddings": positions, "max_window_layers": 21, "rope_theta": 1e6, "use_mrope": False},
        **{"sliding_window": positions, "use_sliding_window": False, "tie_word_embeddings": tied},
        **more,
    }


def qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool, **more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6},
        **{"attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "max_window_layers": layers},
        **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False},
        **{"tie_word_embeddings": tied, **sizes(layers, hidden, intermediate, heads, 8, 151936)},
        **more,
    }


def gemma(**more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False, "head_dim": 256},
        **{"hidden_act": "gelu", "hidden_activation": None, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6},
        **{"rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000},
        **more,
    }


def gemma2(**more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096},
        **more,
    }


def gemma3(layers: int, hidden: int, intermediate: int, window: int, **more: Any) -> Config:
    """Of a text model alone."""
    return {
        **HABITS,
        **{"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False},
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"},
        **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256},
        **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "head_dim": 256},
        **{"max_position_embeddings": 32768, "sliding_window": window, "sliding_window_pattern": 6},
        **sizes(layers, hidden, intermediate, 4, 1, 262144),
        **more,
    }


def gemma3_with_images(layers: int, hidden: int, intermediate: int, **more: Any) -> Config:
    """Of a text model with a vision tower: what is transformers' default is left out."""
    text = {
        **{"model_type": "gemma3_text", "num_hidden_layers": layers, "hidden_size": hidden, "sliding_window": 1024},
        **{"intermediate_size": intermediate, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    }
    return {
        **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "initializer_range": 0.02},
        **{"boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144, "eos_token_id": [1, 106]},
        **{"mm_tokens_per_image": 256, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0"},
        "text_config": text | more,
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    }


def text_alone(config: Config) -> Config:
    """The same file for the text model alone, with what is transformers' default written out."""
    if "text_config" not in config:
        return config
    return gemma3(34, 2560, 10240, 1024) | sizes(34, 2560, 10240, 8, 4, 262208) | config["text_config"]


def phi3(**more: Any) -> Config:
    return {
        **HABITS,
        **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5},
        **{"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "rope_scaling": None, "embd_pdrop": 0.0},
        **{"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, "resid_pdrop": 0.0},
        **{"attention_bias": False, "tie_word_embeddings": False},
        **more,
    }


LLAMA_8B = sizes(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = sizes(80, 8192, 28672, 64, 8, 128256)

# builder -> its checkpoints
PUBLISHED: dict[str, dict[str, Config]] = {
    "torchtune.models.llama2.llama2_7b": {
        "Llama-2-7b-chat-hf": llama(10000.0, positions=4096, **sizes(32, 4096, 11008, 32, 32, 32000)),
    },
    "torchtune.models.llama2.llama2_13b": {
        "Llama-2-13b-chat-hf": llama(10000.0, positions=4096, **sizes(40, 5120, 13824, 40, 40, 32000)),
    },
    "torchtune.models.llama2.llama2_70b": {
        "Llama-2-70b-chat-hf": llama(10000.0, positions=4096, **sizes(80, 8192, 28672, 64, 8, 32000)),
    },
    "torchtune.models.code_llama2.code_llama2_7b": {
        "CodeLlama-7b-hf": llama(1e6, positions=16384, **sizes(32, 4096, 11008, 32, 32, 32016)),
    },
    "torchtune.models.llama3.llama3_8b": {"Meta-Llama-3-8B-Instruct": llama(500000.0, **LLAMA_8B)},
    "torchtune.models.llama3.llama3_70b": {"Meta-Llama-3-70B-Instruct": llama(500000.0, **LLAMA_70B)},
    "torchtune.models.llama3_1.llama3_1_8b": {
        "Llama-3.1-8B-Instruct": llama(500000.0, llama3_scaling(8.0), 131072, **LLAMA_8B),
        "DeepSeek-R1-Distill-Llama-8B": llama(500000.0, llama3_scaling(8.0), 131072, **LLAMA_8B),
    },
    "torchtune.models.llama3_1.llama3_1_70b": {
        "Llama-3.1-70B-Instruct": llama(500000.0, llama3_scaling(8.0), 131072, **LLAMA_70B),
    },
    "torchtune.models.llama3_1.llama3_1_405b": {
        "Llama-3.1-405B-Instruct": llama(
            500000.0, llama3_scaling(8.0), 131072, **sizes(126, 16384, 53248, 128, 8, 128256)
        ),
    },
    "torchtune.models.llama3_2.llama3_2_1b": {
        "Llama-3.2-1B-Instruct": llama(
            **{"theta": 500000.0, "scaling": llama3_scaling(32.0), "positions": 131072, "head_dim": 64},
            **sizes(16, 2048, 8192, 32, 8, 128256) | {"tie_word_embeddings": True},
        ),
    },
    "torchtune.models.llama3_2.llama3_2_3b": {
        "Llama-3.2-3B-Instruct": llama(
            **{"theta": 500000.0, "scaling": llama3_scaling(32.0), "positions": 131072, "head_dim": 128},
            **sizes(28, 3072, 8192, 24, 8, 128256) | {"tie_word_embeddings": True},
        ),
    },
    "torchtune.models.llama3_3.llama3_3_70b": {
        "Llama-3.3-70B-Instruct": llama(500000.0, llama3_scaling(8.0), 131072, head_dim=128, **LLAMA_70B),
    },
    "humanline.models.smollm2_135m": {
        "SmolLM2-135M-Instruct": llama(
            100000, is_llama_config=True, rope_interleaved=False, **sizes(30, 576, 1536, 9, 3, 49152)
        )
        | {"tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    },
    "torchtune.models.mistral.mistral_7b": {
        "Mistral-7B-v0.1": mistral(rope_theta=10000.0, sliding_window=4096),
        "Mistral-7B-Instruct-v0.1": mistral(rope_theta=10000.0, sliding_window=4096),
    },
    "torchtune.models.qwen2.qwen2_0_5b": {
        "Qwen2-0.5B-Instruct": qwen2(32768, tied=True, **sizes(24, 896, 4864, 14, 2, 151936)),
    },
    "torchtune.models.qwen2.qwen2_1_5b": {
        "Qwen2-1.5B-Instruct": qwen2(32768, tied=True, **sizes(28, 1536, 8960, 12, 2, 151936)),
    },
    "torchtune.models.qwen2.qwen2_7b": {
        "Qwen2-7B-Instruct": qwen2(32768, **sizes(28, 3584, 18944, 28, 4, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_0_5b": {
        "Qwen2.5-0.5B-Instruct": qwen2(32768, tied=True, **sizes(24, 896, 4864, 14, 2, 151936)),
    },
    "torchtune.models.qwen2_5.qwen2_5_1_5b_base": {
        "Qwen2.5-1.5B": qwen2(131072, tied=True, **sizes(28, 1536, 8960, 12, 2, 151936)),
    },
    "torchtune.models.qwen2_5.qwen2_5_1_5b_instruct": {
        "Qwen2.5-1.5B-Instruct": qwen2(32768, tied=True, **sizes(28, 1536, 8960, 12, 2, 151936)),
    },
    "torchtune.models.qwen2_5.qwen2_5_3b": {
        "Qwen2.5-3B-Instruct": qwen2(32768, tied=True, **sizes(36, 2048, 11008, 16, 2, 151936)),
    },
    "torchtune.models.qwen2_5.qwen2_5_7b_base": {
        "Qwen2.5-7B": qwen2(131072, **sizes(28, 3584, 18944, 28, 4, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_7b_instruct": {
        "Qwen2.5-7B-Instruct": qwen2(32768, **sizes(28, 3584, 18944, 28, 4, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_14b_base": {
        "Qwen2.5-14B": qwen2(131072, 1e-5, **sizes(48, 5120, 13824, 40, 8, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_14b_instruct": {
        "Qwen2.5-14B-Instruct": qwen2(32768, **sizes(48, 5120, 13824, 40, 8, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_32b_base": {
        "Qwen2.5-32B": qwen2(131072, 1e-5, **sizes(64, 5120, 27648, 40, 8, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_32b_instruct": {
        "Qwen2.5-32B-Instruct": qwen2(32768, **sizes(64, 5120, 27648, 40, 8, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_72b_base": {
        "Qwen2.5-72B": qwen2(131072, 1e-5, **sizes(80, 8192, 29568, 64, 8, 152064)),
    },
    "torchtune.models.qwen2_5.qwen2_5_72b_instruct": {
        "Qwen2.5-72B-Instruct": qwen2(32768, **sizes(80, 8192, 29568, 64, 8, 152064)),
    },
    "humanline.models.qwen3.qwen3_0_6b": {
        "Qwen3-0.6B": qwen3(28, 1024, 3072, 16, True),
        "Qwen3-0.6B-Base": qwen3(28, 1024, 3072, 16, True, max_position_embeddings=32768),
    },
    "humanline.models.qwen3.qwen3_1_7b": {
        "Qwen3-1.7B": qwen3(28, 2048, 6144, 16, True),
        "Qwen3-1.7B-Base": qwen3(28, 2048, 6144, 16, True, max_position_embeddings=32768),
    },
    "humanline.models.qwen3.qwen3_4b": {
        "Qwen3-4B": qwen3(36, 2560, 9728, 32, True),
        "Qwen3-4B-Base": qwen3(36, 2560, 9728, 32, True, max_position_embeddings=32768),
    },
    "humanline.models.qwen3.qwen3_4b_2507": {
        "Qwen3-4B-Instruct-2507": qwen3(36, 2560, 9728, 32, True, rope_theta=5000000, max_position_embeddings=262144),
        "Qwen3-4B-Thinking-2507": qwen3(36, 2560, 9728, 32, True, rope_theta=5000000, max_position_embeddings=262144),
    },
    "humanline.models.qwen3.qwen3_8b": {
        "Qwen3-8B": qwen3(36, 4096, 12288, 32, False),
        "Qwen3-8B-Base": qwen3(36, 4096, 12288, 32, False, max_position_embeddings=32768),
    },
    "humanline.models.qwen3.qwen3_14b": {
        "Qwen3-14B": qwen3(40, 5120, 17408, 40, False),
        "Qwen3-14B-Base": qwen3(40, 5120, 17408, 40, False, max_position_embeddings=32768),
    },
    "humanline.models.qwen3.qwen3_32b": {"Qwen3-32B": qwen3(64, 5120, 25600, 64, False)},
    "torchtune.models.gemma.gemma_2b": {
        "gemma-2b-it": gemma(**sizes(18, 2048, 16384, 8, 1, 256000)),
    },
    "torchtune.models.gemma.gemma_7b": {
        "gemma-7b-it": gemma(**sizes(28, 3072, 24576, 16, 16, 256000)),
    },
    "humanline.models.gemma2.gemma2_2b": {
        "gemma-2-2b-it": gemma2(head_dim=256, query_pre_attn_scalar=256, **sizes(26, 2304, 9216, 8, 4, 256000)),
    },
    "humanline.models.gemma2.gemma2_9b": {
        "gemma-2-9b-it": gemma2(
            **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window_size": 4096},
            **sizes(42, 3584, 14336, 16, 8, 256000),
        ),
    },
    "humanline.models.gemma2.gemma2_27b": {
        "gemma-2-27b-it": gemma2(head_dim=128, query_pre_attn_scalar=144, **sizes(46, 4608, 36864, 32, 16, 256000)),
    },
    "humanline.models.gemma3.gemma3_270m": {
        "gemma-3-270m-it": gemma3(18, 640, 2048, 512)
        | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
        | {"layer_types": [f"{'sliding' if (layer + 1) % 6 else 'full'}_attention" for layer in range(18)]},
    },
    "humanline.models.gemma3.gemma3_1b": {
        "gemma-3-1b-it": gemma3(26, 1152, 6912, 512),
    },
    "humanline.models.gemma3.gemma3_4b": {
        "gemma-3-4b-it": gemma3_with_images(34, 2560, 10240),
    },
    "humanline.models.gemma3.gemma3_12b": {
        "gemma-3-12b-it": gemma3_with_images(48, 3840, 15360, num_attention_heads=16, num_key_value_heads=8),
    },
    "humanline.models.gemma3.gemma3_27b": {
        "gemma-3-27b-it": gemma3_with_images(
            **{"layers": 62, "hidden": 5376, "intermediate": 21504, "num_attention_heads": 32},
            **{"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
        ),
    },
    "torchtune.models.phi3.phi3_mini": {
        "Phi-3-mini-4k-instruct": phi3(rope_theta=10000.0, sliding_window=2047, **sizes(32, 3072, 8192, 32, 32, 32064)),
    },
}
