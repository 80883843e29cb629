from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder


def smollm2_135m() -> TransformerDecoder:
    """Builder for SmolLM2-135M (https://arxiv.org/abs/2502.02737), the model of the demo.

    It is a Llama with tied embeddings and plain rotary positions, so torchtune's Llama 3.2 builder makes it, with
    ``scale_factor=1`` turning Llama 3.2's rescaled frequencies off. Its checkpoints load with ``model_type: LLAMA3_2``.

    Returns:
        TransformerDecoder: 134.5M parameters; token ids ``[B, S]`` to logits ``[B, S, 49152]``, ``S <= 8192``.
    """
    return llama3_2(
        vocab_size=49_152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        max_seq_len=8192,
        norm_eps=1e-5,
        rope_base=100_000,
        scale_factor=1,
        tie_word_embeddings=True,
    )
