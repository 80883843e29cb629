"""Compares one optimizer step of full DPO on SmolLM2-135M between humanline and torchtune, in one run on this machine.

    make bench          # python benchmarks/run.py --steps 5

All contestants train on the same 8 pairs per step with bf16 compute and activation checkpointing. Each runs in its own
process, so the peak memory is its own. Speed does not depend on the words, so the pairs are random tokens with the
lengths of real ones: AlpacaEval prompts with UltraFeedback-like responses, cut at 512 tokens. The averages are 66
tokens per prompt and 278 per response.

- window: the recipe's parts. Float32 master weights, rows with shared prompts, log-probs without logits, and
`WindowedReference`, synced at every step, so that each step does the same work.
- second_model: the same with `ModelReference`.
- torchtune: the step of torchtune 0.6.1's `full_dpo_distributed`, on the CPU, where that recipe does not start. bf16
weights, chosen and rejected padded to the longest of the batch, full logits, a frozen second model.

The window alternates with each of the other two, step by step. The program prints seconds per step (median), peak
resident memory, and the ratios. The ratio of the times is the median over the pairs of steps.
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
from types import SimpleNamespace
from typing import Any

import torch

PAIRS, MAX_TOKENS, VOCABULARY = 8, 512, 49152


def pairs(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Returns prompt, chosen and rejected token ids; the lengths are log-normal."""
    rng = random.Random(0)

    def tokens(mean: float, longest: int) -> list[int]:
        length = min(longest, max(8, round(rng.lognormvariate(0, 0.6) * mean / 1.2)))
        return [rng.randrange(VOCABULARY) for _ in range(length)]

    triples = []
    for _ in range(count):
        prompt = tokens(66, 256)
        longest = MAX_TOKENS - len(prompt)
        triples.append((prompt, tokens(320, longest), tokens(320, longest)))
    return triples


def window(steps: int) -> Iterator[float]:
    from humanline.reference import WindowedReference

    return humanline(steps, WindowedReference(sync_every=1))


def second_model(steps: int) -> Iterator[float]:
    from humanline.reference import ModelReference

    return humanline(steps, ModelReference(sync_every=1))


def humanline(steps: int, strategy: Any) -> Iterator[float]:
    from humanline.data import Group, RowBudget, Rows, lay_out, pack
    from humanline.launch._processes import process_group
    from humanline.losses import HumanlineDPOLoss
    from humanline.models import LogProbDecoder, log_probs, smollm2_135m
    from humanline.models._build import build_model
    from humanline.reference import RunContext
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.device("cpu")
    budget = RowBudget(tokens_per_row=1024, rows_per_pass=2)
    groups = [Group(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs(PAIRS * (steps + 1))]
    with process_group(device):
        mesh = init_device_mesh("cpu", (1,))

        def model(
            dtype: torch.dtype, state_dict: dict[str, torch.Tensor] | None = None, checkpointing: bool = False
        ) -> LogProbDecoder:
            return build_model(
                smollm2_135m,
                state_dict,
                mesh=mesh,
                device=device,
                param_dtype=dtype,
                compute_dtype=torch.bfloat16,
                activation_checkpointing=checkpointing,
            )

        def passes(step: int) -> Iterator[Rows]:
            microbatch = groups[(step - 1) * PAIRS : step * PAIRS]
            return (lay_out(microbatch, planned, budget) for planned in pack(microbatch, budget))

        policy = model(torch.float32, smollm2_135m().state_dict(), checkpointing=True)
        context = RunContext(
            policy=policy,
            model=SimpleNamespace(reference_model=lambda: model(torch.bfloat16)),
            passes=passes,
            total_steps=steps + 1,  # so that the last step fills a window too
            resumes=False,
        )
        reference = strategy.build(context)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
        dpo = HumanlineDPOLoss()
        for step in range(1, steps + 1):
            sys.stdin.readline()
            start = time.perf_counter()
            for rows in passes(step):
                logps, reference_logps = map(rows.per_response, (log_probs(policy, rows), reference.log_probs(rows)))
                sides = (slice(0, None, 2), slice(1, None, 2))
                losses, _, _ = dpo(*(each[side] for each in (logps, reference_logps, rows.mask) for side in sides))
                (losses.sum() / PAIRS).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            reference.before_optimizer_step(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield time.perf_counter() - start


def torchtune(steps: int) -> Iterator[float]:
    from humanline.models import smollm2_135m
    from torchtune import modules, rlhf, training
    from torchtune.data import padded_collate_dpo
    from torchtune.rlhf.loss import DPOLoss

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

    for step in range(steps):
        sys.stdin.readline()
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
        yield time.perf_counter() - start


class Child:
    """One contestant in its own process. It runs a step on each command."""

    def __init__(self, name: str, steps: int) -> None:
        command = [sys.executable, __file__, "--child", name, "--steps", str(steps)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Runs the next step. Returns its seconds and the peak memory so far."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a step failed")


def compare(ours: str, theirs: str, steps: int) -> None:
    """Alternates between the two, step by step, so that other load on the machine affects both alike."""
    names = (theirs, ours)
    children = [Child(name, steps + 1) for name in names]
    taken: list[list[dict[str, float]]] = [[child.step() for child in children] for _ in range(steps + 1)]
    seconds = [[pair[i]["seconds"] for pair in taken[1:]] for i in range(2)]
    peaks = [pair["peak_gb"] for pair in taken[-1]]
    for name, each, peak in zip(names, seconds, peaks, strict=True):
        print(f"{name:12} {statistics.median(each):6.1f} s a step   {peak:6.3f} GB peak", flush=True)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    print(
        f"{ours} / {theirs}: {ratio:.3f} of the time (median of {steps}), {peaks[1] / peaks[0]:.3f} of the memory, "
        f"{peaks[0] - peaks[1]:.3f} GB less\n",
        flush=True,
    )


def child(name: str, steps: int) -> None:
    for seconds in {"window": window, "second_model": second_model, "torchtune": torchtune}[name](steps):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"seconds": seconds, "peak_gb": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps after one that warms up")
    parser.add_argument("--against", choices=("torchtune", "second_model"), action="append", help="default: both")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.steps)
        return
    for theirs in arguments.against or ("torchtune", "second_model"):
        compare("window", theirs, arguments.steps)


if __name__ == "__main__":
    main()
