"""The families of models: as transformers builds them, as torchtune or humanline does, and what is tested of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
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
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 256
WINDOW = 6
# What transformers and the builders call the same sizes.
NAMES = {
    **{"vocab_size": "vocab_size", "hidden_size": "embed_dim", "intermediate_size": "intermediate_dim"},
    **{"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"},
    **{"max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps"},
}
SMALL = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
}
# Large enough for blocks of NF4.
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
OF_TRANSFORMERS = {
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    **{"attn_implementation": "eager"},  # the soft-caps of Gemma 2 and the windows are in no other one on a CPU
}
COLUMNS = ("full", "LoRA", "QLoRA", "packed rows", "sampling", "HF export")


@dataclass(frozen=True)
class Family:
    """A family's tiny model.

    Attributes:
        title (str): its row of the table in docs/models.md, which families may share.
        model_type (str): the checkpointer's.
        builder (str): where the builder stands; with ``lora_`` before its name stands the one with adapters.
        hf_class (Any): transformers' model.
        hf_config (Any): transformers' config.
        hf (Mapping[str, Any]): its arguments besides the sizes.
        tune (Mapping[str, Any]): the builder's arguments besides the sizes.
        head_dim (int | None): dimensions of a head of the small model, where they are an argument.
        checkpointer (str): where the checkpointer stands.
        refused (Mapping[str, str]): columns of the table that do not work, and why.
    """

    title: str
    model_type: str
    builder: str
    hf_class: Any
    hf_config: Any
    hf: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)
    head_dim: int | None = None
    checkpointer: str = "torchtune.training.FullModelHFCheckpointer"
    refused: Mapping[str, str] = field(default_factory=dict)

    def config_of_transformers(self, wide: bool = False) -> Any:
        """transformers' config."""
        # Of large weights the soft-caps and the windows show.
        spread = {"initializer_range": 0.07 if wide else 0.15}
        return self.hf_config(**self._sizes(wide), **OF_TRANSFORMERS, **spread, **self.hf)

    def arguments(self, wide: bool = False) -> dict[str, Any]:
        """The builder's arguments."""
        return {NAMES.get(key, key): value for key, value in self._sizes(wide).items()} | dict(self.tune)

    def component(self, prefix: str = "") -> str:
        """Where the builder stands, or the one with adapters."""
        module, _, name = self.builder.rpartition(".")
        return f"{module}.{prefix}{name}"

    def build(self) -> Any:
        """The small model."""
        module, _, name = self.builder.rpartition(".")
        return getattr(import_module(module), name)(**self.arguments())

    def _sizes(self, wide: bool) -> dict[str, Any]:
        head_dim = {} if self.head_dim is None else {"head_dim": 64 if wide else self.head_dim}
        return (WIDE if wide else SMALL) | head_dim


def llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }


def gemma3_with_images(attn_implementation: str, initializer_range: float, **text: Any) -> Gemma3Config:
    """The config of a Gemma 3 that sees images, as those from 4B on are."""
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    return Gemma3Config(
        text_config=text | {"initializer_range": initializer_range},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        initializer_range=initializer_range,
        attn_implementation=attn_implementation,
    )


OURS = "humanline.checkpoint.FullModelHFCheckpointer"
FAMILIES = {
    "llama2": Family(
        **{"title": "Llama 2, CodeLlama", "model_type": "LLAMA2", "builder": "torchtune.models.llama2.llama2"},
        **{"hf_class": LlamaForCausalLM, "hf_config": LlamaConfig},
        hf={"rope_theta": 1e4, "tie_word_embeddings": False},
    ),
    "llama3": Family(
        **{"title": "Llama 3", "model_type": "LLAMA3", "builder": "torchtune.models.llama3.llama3"},
        **{"hf_class": LlamaForCausalLM, "hf_config": LlamaConfig},
        hf={"rope_theta": 5e5, "tie_word_embeddings": False},
        tune={"rope_base": 500_000},
    ),
    "llama3_1": Family(
        **{"title": "Llama 3.1, 3.3", "model_type": "LLAMA3", "builder": "torchtune.models.llama3_1.llama3_1"},
        **{"hf_class": LlamaForCausalLM, "hf_config": LlamaConfig},
        hf={"rope_parameters": llama3_scaling(8.0), "tie_word_embeddings": False},
    ),
    "llama3_2": Family(
        **{"title": "Llama 3.2", "model_type": "LLAMA3_2", "builder": "torchtune.models.llama3_2.llama3_2"},
        **{"hf_class": LlamaForCausalLM, "hf_config": LlamaConfig},
        hf={"rope_parameters": llama3_scaling(32.0), "tie_word_embeddings": True},
    ),
    "smollm2": Family(
        **{"title": "SmolLM2", "model_type": "LLAMA3_2", "builder": "torchtune.models.llama3_2.llama3_2"},
        **{"hf_class": LlamaForCausalLM, "hf_config": LlamaConfig},
        hf={"rope_theta": 1e5, "tie_word_embeddings": True},
        tune={"rope_base": 100_000, "scale_factor": 1},
        refused={"QLoRA": "no: its layers do not divide into blocks of NF4"},
    ),
    "mistral": Family(
        **{"title": "Mistral", "model_type": "MISTRAL", "builder": "torchtune.models.mistral.mistral"},
        **{"hf_class": MistralForCausalLM, "hf_config": MistralConfig},
        hf={"sliding_window": WINDOW},
    ),
    "mistral_v0_3": Family(
        **{"title": "Mistral", "model_type": "MISTRAL", "builder": "torchtune.models.mistral.mistral"},
        **{"hf_class": MistralForCausalLM, "hf_config": MistralConfig},
        hf={"rope_theta": 1e6, "sliding_window": None},
        tune={"rope_base": 1_000_000},
    ),
    "qwen2": Family(
        **{"title": "Qwen2, Qwen2.5", "model_type": "QWEN2", "builder": "torchtune.models.qwen2.qwen2"},
        **{"hf_class": Qwen2ForCausalLM, "hf_config": Qwen2Config},
        hf={"rope_theta": 1e6, "tie_word_embeddings": False},
    ),
    "qwen2_5": Family(
        **{"title": "Qwen2, Qwen2.5", "model_type": "QWEN2", "builder": "torchtune.models.qwen2.qwen2"},
        **{"hf_class": Qwen2ForCausalLM, "hf_config": Qwen2Config},
        hf={"rope_theta": 1e6, "tie_word_embeddings": True},
        tune={"rope_base": 1e6, "tie_word_embeddings": True},
    ),
    "qwen3": Family(
        **{"title": "Qwen3", "model_type": "QWEN3", "builder": "humanline.models.qwen3.qwen3"},
        **{"hf_class": Qwen3ForCausalLM, "hf_config": Qwen3Config, "head_dim": 12, "checkpointer": OURS},
        hf={"rope_theta": 1e6, "tie_word_embeddings": False},
    ),
    "qwen3_tied": Family(
        **{"title": "Qwen3", "model_type": "QWEN3", "builder": "humanline.models.qwen3.qwen3"},
        **{"hf_class": Qwen3ForCausalLM, "hf_config": Qwen3Config, "head_dim": 12, "checkpointer": OURS},
        hf={"rope_theta": 1e6, "tie_word_embeddings": True},
        tune={"tie_word_embeddings": True},
    ),
    "gemma": Family(
        **{"title": "Gemma", "model_type": "GEMMA", "builder": "torchtune.models.gemma.gemma"},
        **{"hf_class": GemmaForCausalLM, "hf_config": GemmaConfig, "head_dim": 12},
    ),
    "gemma2": Family(
        **{"title": "Gemma 2", "model_type": "GEMMA2", "builder": "humanline.models.gemma2.gemma2"},
        **{"hf_class": Gemma2ForCausalLM, "hf_config": Gemma2Config, "head_dim": 12},
        hf={"query_pre_attn_scalar": 10, "sliding_window": WINDOW},
        tune={"query_pre_attn_scalar": 10, "sliding_window_size": WINDOW},
    ),
    "gemma3": Family(
        **{"title": "Gemma 3", "model_type": "GEMMA3", "builder": "humanline.models.gemma3.gemma3"},
        **{"hf_class": Gemma3ForCausalLM, "hf_config": Gemma3TextConfig, "head_dim": 12, "checkpointer": OURS},
        hf={
            **{"query_pre_attn_scalar": 10, "sliding_window": WINDOW, "sliding_window_pattern": 3},
            **{"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        },
        tune={"query_pre_attn_scalar": 10, "sliding_window_size": WINDOW, "sliding_window_pattern": 3},
    ),
    "gemma3_with_images": Family(
        **{"title": "Gemma 3", "model_type": "GEMMA3", "builder": "humanline.models.gemma3.gemma3"},
        **{"hf_class": Gemma3ForConditionalGeneration, "hf_config": gemma3_with_images, "head_dim": 12},
        hf={
            **{"query_pre_attn_scalar": 10, "sliding_window": WINDOW, "sliding_window_pattern": 3},
            **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        },
        tune={
            **{"query_pre_attn_scalar": 10, "sliding_window_size": WINDOW, "sliding_window_pattern": 3},
            **{"rope_factor": 8},
        },
        checkpointer=OURS,
    ),
    "phi3": Family(
        **{"title": "Phi-3", "model_type": "PHI3_MINI", "builder": "torchtune.models.phi3.phi3"},
        **{"hf_class": Phi3ForCausalLM, "hf_config": Phi3Config},
        hf={"original_max_position_embeddings": 64, "sliding_window": WINDOW},
    ),
    "phi4": Family(
        **{"title": "Phi-4", "model_type": "PHI4", "builder": "torchtune.models.phi3.phi3"},
        **{"hf_class": Phi3ForCausalLM, "hf_config": Phi3Config},
        hf={"original_max_position_embeddings": 64, "rope_theta": 250_000, "sliding_window": None},
        tune={"rope_base": 250_000},
    ),
}
# Windows on some layers, as no published Qwen2 has them.
QWEN2_WINDOW = Family(
    **{"title": "Qwen2, Qwen2.5", "model_type": "QWEN2", "builder": "torchtune.models.qwen2.qwen2"},
    **{"hf_class": Qwen2ForCausalLM, "hf_config": Qwen2Config},
    hf={
        **{"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        **{"tie_word_embeddings": False},
    },
)


def table() -> str:
    """What works of each family, as a table in Markdown."""
    rows: dict[str, dict[str, str]] = {}
    for family in FAMILIES.values():
        row = rows.setdefault(family.title, {})
        row.update({column: reason for column, reason in family.refused.items() if reason})
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, row in rows.items():
        lines.append(f"| {title} | {' | '.join(row.get(column, 'tested') for column in COLUMNS)} |")
    return "\n".join(lines)


if __name__ == "__main__":  # for docs/models.md
    print(table())
