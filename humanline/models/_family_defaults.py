from typing import Any

# Per family: defaults of transformers where a key is absent. Keys that only some families read stand in these alone.
_ALL: dict[str, Any] = {
    **{"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    **{"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0},
    **{"tie_word_embeddings": False, "max_position_embeddings": 2048, "original_max_position_embeddings": None},
}
_QWEN = _ALL | {
    **{"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    **{"layer_types": None},
}
_GEMMA = _ALL | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _ALL,
    "mistral": _ALL | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "max_position_embeddings": 32_768},
    "phi3": _ALL | {"rms_norm_eps": 1e-5, "sliding_window": None},
    "gemma": _GEMMA | {"hidden_activation": None},
    "gemma2": _GEMMA
    | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"layer_types": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 262_208}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072}
    | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"layer_types": None, "sliding_window_pattern": 6, "_sliding_window_pattern": None}  # the last is not read
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
}
