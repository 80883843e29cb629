"""One optimizer step of full DPO on SmolLM2-135M: this package against torchtune's own way, in one run on this machine.

    make bench          # python benchmarks/run.py --steps 5

All train the same 8 pairs a step with bf16 compute and activation checkpointing, each in a process of its own, so that
the peak memory is its own. The pairs are random tokens with the lengths of real ones (AlpacaEval prompts with
UltraFeedback-like responses, cut at 512 tokens: prompts of 66 tokens and responses of 278 on average), as speed does
not depend on the words.

- window: the recipe's own parts. Float32 master weights, rows with shared prompts, log-probs without logits, and
`WindowedReference`, synced at every step, so that each step does the same work.
- second_model: the same with `ModelReference`.
- torchtune: what `full_dpo_distributed` of torchtune 0.6.1 does in a step, on the CPU, where that recipe itself does
not start. bf16 weights, chosen and rejected padded to the longest of the batch, full logits, a frozen second model.

It prints seconds a step (median), peak resident memory, and what both are of torchtune's and of a second model's.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

PAIRS, MAX_TOKENS, VOCABULARY = 8, 512, 49152


def pairs(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected token ids; lengths are log-normal."""
    rng = random.Random(0)

    def tokens(mean: float, longest: int) -> list[int]:
        length = min(longest, max(8, round(rng.lognormvariate(0, 0.6) * mean / 1.2)))
        return [rng.randrange(VOCABULARY) for _ in range(length)]

    triples = []
    for _ in range(count):
        prompt = tokens(66, 256)
        triples.append((prompt, *(tokens(320, MAX_TOKENS - len(prompt)) for _ in range(2))))
    return triples


def window(steps: int) -> list[float]:
    from humanline.reference import WindowedReference

    return humanline(steps, WindowedReference(sync_every=1))


def second_model(steps: int) -> list[float]:
    from humanline.reference import ModelReference

    return humanline(steps, ModelReference(sync_every=1))


def humanline(steps: int, reference: Any) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh

    from humanline.data import Group, RowBudget, Rows, lay_out, pack
    from humanline.losses import HumanlineDPOLoss
    from humanline.models import log_probs, smollm2_135m
    from humanline.reference import Plan
    from humanline.training import DPO
    from humanline.training._launch import process_group
    from humanline.training._model import build_model

    device = torch.device("cpu")
    budget = RowBudget(tokens_per_row=1024, rows_per_pass=2)
    groups = [Group(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs(PAIRS * steps)]
    with process_group(device):
        mesh = init_device_mesh("cpu", (1,))
        weights = smollm2_135m().state_dict()

        def model(dtype: torch.dtype, checkpointing: bool) -> torch.nn.Module:
            return build_model(
                smollm2_135m,
                weights,
                mesh=mesh,
                device=device,
                param_dtype=dtype,
                compute_dtype=torch.bfloat16,
                activation_checkpointing=checkpointing,
            )

        def passes(step: int) -> Iterator[Rows]:
            microbatch = groups[(step - 1) * PAIRS : step * PAIRS]
            return (lay_out(microbatch, planned, budget) for planned in pack(microbatch, budget))

        policy = model(torch.float32, True)
        plan = Plan(
            new_model=lambda: model(torch.bfloat16, False),
            passes=passes,
            total_steps=steps,
            resumes=False,
            fingerprint=lambda: "",
        )
        reference.setup(policy, plan)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
        objective = DPO(HumanlineDPOLoss())
        seconds = []
        for step in range(1, steps + 1):
            start = time.perf_counter()
            for rows in passes(step):
                loss, _ = objective(log_probs(policy, rows), reference.log_probs(rows), rows)
                (loss / PAIRS).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            reference.before_optimizer_step(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
    return seconds


def torchtune(steps: int) -> list[float]:
    from torchtune import modules, rlhf, training
    from torchtune.data import padded_collate_dpo
    from torchtune.rlhf.loss import DPOLoss

    from humanline.models import smollm2_135m

    with training.set_default_dtype(torch.bfloat16):
        policy, reference = smollm2_135m(), smollm2_135m().eval().requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    training.set_activation_checkpointing(policy, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    loss_fn = DPOLoss(beta=0.1)
    data = pairs(PAIRS * steps)

    def forward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = batch
        logps = rlhf.get_batch_log_probs(model(tokens), labels)
        return logps[: len(tokens) // 2], logps[len(tokens) // 2 :]

    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        examples = [
            {
                f"{side}_{part}": prompt + response if part == "input_ids" else [-100] * len(prompt) + response
                for side, response in (("chosen", chosen), ("rejected", rejected))
                for part in ("input_ids", "labels")
            }
            for prompt, chosen, rejected in data[step * PAIRS : (step + 1) * PAIRS]
        ]
        batch = padded_collate_dpo(examples, padding_idx=0)
        policy_logps = forward(policy, batch)
        with torch.no_grad():
            reference_logps = forward(reference, batch)
        loss, *_ = loss_fn(*policy_logps, *reference_logps)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps after one that warms up")
    parser.add_argument("--only", choices=("window", "second_model", "torchtune"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        seconds = globals()[arguments.only](arguments.steps + 1)[1:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"seconds": statistics.median(seconds), "peak_gb": peak}))
        return
    results = {}
    for name in ("torchtune", "second_model", "window"):
        command = [sys.executable, __file__, "--only", name, "--steps", str(arguments.steps)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(
            f"{name:12} {results[name]['seconds']:6.1f} s a step   {results[name]['peak_gb']:5.2f} GB peak", flush=True
        )
    ours = results["window"]
    for name in ("torchtune", "second_model"):
        ratios = {key: ours[key] / results[name][key] for key in ours}
        print(f"window / {name}: {ratios['seconds']:.2f} of the time, {ratios['peak_gb']:.3f} of the memory")
    print(f"second_model - window: {results['second_model']['peak_gb'] - ours['peak_gb']:.3f} GB")


if __name__ == "__main__":
    main()
