"""Measures how much of the training exported weights keep: held-out margins in plain transformers and PEFT.

    tune run recipes/humanline_dpo_single_device --config configs/smollm2_135m_dpo_lora.yaml
    python benchmarks/exports.py outputs/smollm2_135m_humanline_dpo_lora/epoch_0

A pair's margin is log p(right response) - log p(wrong response) in nats. The program prints the growth of the mean
margin over the held-out pairs, compared with the base model. It measures each export in the dtype of its config.json,
with its weights rounded to bfloat16 (as `export_dtype: bf16` writes them), and as base plus adapter if it has one. All
compute is in float32.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from humanline.data import ChatTokenizer, Group, scored_groups
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("exports", nargs="+", type=Path, help="folders that runs have written, such as epoch_0")
    parser.add_argument("--base", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=85)
    arguments = parser.parse_args()
    tokenizer = ChatTokenizer(str(arguments.base))
    data = str(ROOT / "demo" / "held_out_groups.jsonl")
    groups = list(scored_groups(tokenizer, source=data, max_tokens=128, max_prompt_tokens=64))[: arguments.pairs]

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)

    start = mean_margin(base(), groups)
    print(f"{len(groups)} pairs, base {start:.4f} nats")
    print("| export | as written | rounded to bfloat16 | adapter |\n|---|---|---|---|")
    for folder in arguments.exports:
        written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        gains = [mean_margin(written.float(), groups), mean_margin(written.bfloat16().float(), groups)]
        if (folder / "adapter").is_dir():
            from peft import PeftModel

            gains.append(mean_margin(PeftModel.from_pretrained(base(), folder / "adapter"), groups))
        print(f"| {folder} | " + " | ".join(f"{gain - start:.4f}" for gain in gains) + " |", flush=True)


@torch.no_grad()
def mean_margin(model: torch.nn.Module, groups: list[Group]) -> float:
    """Returns the mean margin of the best over the worst response of each group, nats."""
    model.eval()
    margins = []
    for group in groups:
        ranked = sorted(zip(group.scores or (), group.responses, strict=True), key=lambda scored: scored[0])
        worst, best = ranked[0][1], ranked[-1][1]
        margins.append(log_prob(model, group.prompt, best) - log_prob(model, group.prompt, worst))
    return sum(margins) / len(margins)


def log_prob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Returns the log-probability of a response after a prompt, both token ids; nats."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


if __name__ == "__main__":
    main()
