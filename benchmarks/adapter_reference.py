"""Measures the cost of a LoRA run's reference: its memory, compared with the adapter's, and the time of a sync.

    python benchmarks/adapter_reference.py

The model has SmolLM2-135M's shape and random weights, with LoRA of rank 16 on every linear layer. It runs on this
machine's CPU or first GPU. The program prints the bytes of the adapter, the bytes that `AdapterReference` adds after
set-up, log-probs and one sync, and the median time of a sync.
"""

import gc
import statistics
import time
from typing import Any

import torch
from humanline.data import Group, RowBudget, lay_out, pack
from humanline.models import fixed_log_probs, initial_adapter, lora_smollm2_135m, trainable_parameters
from humanline.models._build import build_model
from humanline.reference import AdapterReference, RunContext
from torchtune.modules import TransformerDecoder

SYNCS = 50


def build() -> TransformerDecoder:
    return lora_smollm2_135m(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        lora_rank=16,
        lora_alpha=32,
    )


def allocated(device: torch.device) -> int:
    """Returns the bytes that the allocator holds on a GPU, or the bytes of all live tensors on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        shape = build()
    base = {name: torch.randn(p.shape) * 0.02 for name, p in shape.state_dict().items() if "lora" not in name}
    weights = base | initial_adapter(shape, base, seed=0)
    policy = build_model(
        build, weights, mesh=None, device=device, param_dtype=torch.float32, compute_dtype=torch.bfloat16
    )
    adapter = sum(parameter.nbytes for parameter in trainable_parameters(policy).values())

    groups = [Group(range(100, 140), (range(200, 260), range(300, 350)))]
    budget = RowBudget(tokens_per_row=256)
    rows = lay_out(groups, pack(groups, budget)[0], budget).to(device)
    fixed_log_probs(policy, rows)
    before = allocated(device)
    no_models: Any = None  # AdapterReference asks for none
    context = RunContext(policy=policy, model=no_models, passes=None, total_steps=SYNCS, resumes=False)
    reference = AdapterReference(sync_every=1).build(context)
    reference.log_probs(rows)
    reference.before_optimizer_step(1)
    extra = allocated(device) - before

    seconds = []
    for step in range(1, SYNCS + 1):
        start = time.perf_counter()
        reference.before_optimizer_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(f"{device}, torch {torch.__version__}")
    print(f"adapter    {adapter / 1e6:8.2f} MB")
    print(f"reference  {extra / 1e6:8.2f} MB, {extra / adapter:.3f} of the adapter")
    median, largest = statistics.median(seconds) * 1e3, max(seconds) * 1e3
    print(f"sync       {median:8.2f} ms, median of {SYNCS} (largest {largest:.2f} ms)")


if __name__ == "__main__":
    main()
