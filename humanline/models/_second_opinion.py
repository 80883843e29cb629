"""Compares humanline's reading of a config.json with transformers' own, if transformers is installed."""

import sys

import torch

from humanline.errors import ConfigError
from humanline.models._published import Published
from humanline.models._rotation import Rotation


def second_opinion(published: Published) -> str | None:
    """Compares humanline's reading of a config.json with transformers' reading.

    Importing transformers takes seconds. So plain models, which are hard to misread, are skipped unless transformers is
    already imported.

    Args:
        published (Published): humanline's reading.

    Returns:
        str | None: why the two could not be compared, for the log; None if they were, or need not be.

    Raises:
        ConfigError: if they differ.
    """
    plain = not published.scaled and not any(published.windows)
    if plain and "transformers" not in sys.modules:
        return None
    try:
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.from_pretrained(published.path.parent).get_text_config()
        theirs: dict[str, object] = {
            "rms_norm_eps": config.rms_norm_eps,
            "num_key_value_heads": config.num_key_value_heads,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        if any(published.windows):
            theirs["sliding_window"] = config.sliding_window
        if published.scaled:
            layer_type = {"layer_type": "full_attention"} if published.model_type == "gemma3_text" else {}
            kind = ROPE_INIT_FUNCTIONS[published.rope["rope_type"]]
            frequencies, factor = kind(config, torch.device("cpu"), **layer_type)
            theirs["RoPE"] = Rotation(frequencies.double(), factor)
    except ImportError:
        return None
    except Exception as error:  # versions of transformers raise different errors
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{published.path} could not be compared with transformers' reading: {words[:200]}"
    ours: dict[str, object] = {
        "rms_norm_eps": published.rms_norm_eps,
        "num_key_value_heads": published.num_key_value_heads,
        "tie_word_embeddings": published.tie_word_embeddings,
        "sliding_window": next(filter(None, published.windows), None),
        "RoPE": published.rotations[published.windows.index(None) if None in published.windows else 0],
    }
    for key, value in theirs.items():
        mine = ours[key]
        alike = mine.like(value) if isinstance(mine, Rotation) and isinstance(value, Rotation) else mine == value
        if not alike:
            raise ConfigError(
                f"checkpointer.checkpoint_dir: {published.path}: transformers reads {key} as {value}, humanline as "
                f"{mine}; one of them misreads the file, so the run does not start"
            )
    return None
