"""Compares the sampling speed of the in-process engine and torchtune's `generate`, in one run on this machine.

    python benchmarks/sampling.py

The model is SmolLM2-135M-Instruct (fetched on first use) in bf16. It samples 8 responses of at most 64 tokens to each
of 64 prompts of the demo, at temperature 1. torchtune's `generate` gets the same prompts and samples in padded batches
of 64, with its KV cache. The program prints tokens per second, and counts the tokens up to the end of each answer.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from humanline.data import ChatTokenizer
from humanline.models import load_decoder, smollm2_135m
from humanline.rollout import SamplingParams, TorchtuneEngine
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPTS, SAMPLES, MAX_NEW_TOKENS, BATCH = 64, 8, 64, 64


def main() -> None:
    subprocess.run(
        [sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", str(MODEL)], cwd=ROOT, check=True
    )
    tokenizer = ChatTokenizer(str(MODEL))
    lines = (ROOT / "demo" / "held_out_prompts.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]
    checkpointer = FullModelHFCheckpointer(str(MODEL), ["model.safetensors"], "LLAMA3_2", str(ROOT / "outputs"))
    weights = checkpointer.load_checkpoint()["model"]

    def decoder() -> TransformerDecoder:
        with torch.device("meta"):
            model = smollm2_135m()
        return load_decoder(model, weights, device=torch.device("cpu"), dtype=torch.bfloat16)

    engine = TorchtuneEngine(decoder(), stop_tokens=tokenizer.stop_tokens, batch_size=BATCH)
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, samples_per_prompt=SAMPLES)
    engine.generate(prompts[:2], params)
    start = time.perf_counter()
    completions = engine.generate(prompts, params)
    ours = sum(len(sample.tokens) for samples in completions for sample in samples) / (time.perf_counter() - start)
    print(f"humanline  {ours:8.1f} tokens/s", flush=True)

    model = decoder()
    longest = max(map(len, prompts))
    with torch.device("cpu"):
        model.setup_caches(BATCH, torch.bfloat16, decoder_max_seq_len=longest + MAX_NEW_TOKENS)
    sequences = [prompt for prompt in prompts for _ in range(SAMPLES)]
    tokens, seconds = 0, 0.0
    for i in range(0, len(sequences), BATCH):
        batch = sequences[i : i + BATCH]
        padded = torch.tensor([[tokenizer.pad_id] * (longest - len(each)) + each for each in batch])
        start = time.perf_counter()
        out, _ = generate(
            model,
            padded,
            max_generated_tokens=MAX_NEW_TOKENS,
            pad_id=tokenizer.pad_id,
            stop_tokens=tokenizer.stop_tokens,
        )
        seconds += time.perf_counter() - start
        model.reset_caches()
        for row in out[:, longest:].tolist():
            stops = [place for place, token in enumerate(row) if token in tokenizer.stop_tokens]
            tokens += stops[0] + 1 if stops else len(row)
    theirs = tokens / seconds
    print(f"torchtune  {theirs:8.1f} tokens/s")
    print(f"humanline / torchtune: {ours / theirs:.2f} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
