"""transformers' own reading of a config.json, where it is installed: a second line of defence."""

import sys

import torch

from humanline.errors import ConfigError
from humanline.models._published import Published, Rotation


def second_opinion(published: Published) -> str | None:
    """Compares what humanline read from a config.json with what transformers reads.

    Importing transformers takes seconds, so plain models, of which there is little to misread, are left out unless it
    is imported already.

    Args:
        published (Published): what humanline read.

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
    except Exception as error:  # whatever a version of transformers may raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{published.path} could not be compared with transformers' reading of it: {words[:200]}"
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
                f"checkpointer.checkpoint_dir: {published.path}: {key} is {value} as transformers reads it and {mine} "
                "as humanline does; one of the two misreads the file, so the run is not started"
            )
    return None
