"""The sections of benchmarks/gpu.py: what is measured, and on what."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}  # bf16 TFLOP/s, dense
Measured = dict[str, Any]


class Bench:
    """The device, the sizes, and the clock. ``tiny`` is for a rehearsal on a CPU."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any], repetitions: int = 10, warm_up: int = 3) -> float:
        """Median milliseconds of a call."""
        if self.tiny:
            repetitions, warm_up = 1, 1
        for _ in range(warm_up):
            call()
        return statistics.median(self._once(call) for _ in range(repetitions))

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    @contextmanager
    def peak(self, measured: Measured, name: str = "peak_gb") -> Iterator[None]:
        """Records the peak of the memory allocated within the block."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device.type == "cuda":
            measured[name] = torch.cuda.max_memory_allocated() / 1e9

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ the sections


def rates(bench: Bench) -> Measured:
    """What the card reaches in large products and copies."""
    n = bench.size(8192, 64)
    measured: Measured = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = bench.randn(n, n, dtype=dtype), bench.randn(n, n, dtype=dtype)
        measured[f"{str(dtype)[6:]}_tflops"] = 2 * n**3 / bench.ms(partial(torch.mm, a, b)) / 1e9
    source = bench.randn(bench.size(2**30, 2**10))
    target = torch.empty_like(source)
    measured["copy_gb_per_s"] = 2 * source.nbytes / bench.ms(lambda: target.copy_(source)) / 1e6
    return measured


def flex(bench: Bench) -> Measured:
    """FlexAttention with block masks against a dense mask: the same numbers, and how long each takes."""
    from humanline.models._flex import flex as compiled

    rows = some_rows(bench, pairs=2, per_row=bench.size(5120, 256))
    heads, length, size = 32 if not bench.tiny else 2, rows.tokens.size(1), bench.size(128, 16)
    backward = bench.device.type == "cuda"  # FlexAttention has no gradient on a CPU
    q, k, v = (bench.randn(1, heads, length, size).requires_grad_(backward) for _ in range(3))
    grad = bench.randn(1, heads, length, size)
    blocks = block_mask(rows)
    row = torch.arange(1, device=bench.device)[:, None, None]
    at = torch.arange(length, device=bench.device)
    dense = rows.visible()(row, row, at[None, :, None], at[None, None, :])[:, None]
    calls: dict[str, Callable[[], Tensor]] = {
        "flex": lambda: compiled()(q, k, v, block_mask=blocks),
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense),
    }
    found = {}
    measured: Measured = {}
    for name, call in calls.items():
        with bench.peak(measured, f"{name}_peak_gb"):
            measured[f"{name}_forward_ms"] = bench.ms(call)
            if backward:
                measured[f"{name}_forward_backward_ms"] = bench.ms(partial(gradients, call, (q, k, v), grad))
        found[name] = [call(), *(gradients(call, (q, k, v), grad) if backward else ())]
    tokens = rows.segments[0] >= 0
    for part, ours, theirs in zip(("output", "q", "k", "v"), *found.values(), strict=False):
        difference = (ours - theirs)[:, :, tokens].abs().max() / theirs[:, :, tokens].abs().max()
        measured[f"{part}_largest_difference"] = float(difference)
    return measured


def syncs(bench: Bench) -> Measured:
    """Twenty passes of different groups; fails if the host waits for the card, or if a later pass compiles."""
    import torch._dynamo

    model, optimizer = small_llama(bench)
    batches = [
        some_rows(bench, pairs=1 + i % 3, per_row=bench.size(2048, 256), seed=i) for i in range(bench.size(20, 3))
    ]
    one_pass(model, batches[0])
    optimizer.step()
    optimizer.zero_grad()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    bench.sync()
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    for rows in batches:
        one_pass(model, rows)
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if graphs != compiled:
        raise RuntimeError(f"the first pass compiled {compiled} graphs, and later ones {graphs - compiled} more")
    return {"passes": len(batches), "graphs": graphs}


def llama(
    bench: Bench, compile: bool = False, checkpointing: bool = True, per_row: int = 2560, rows: int = 2
) -> Measured:
    """8 of the 32 layers of Llama 3 8B through the real builder: the phases of a step, tokens per second and MFU."""
    from humanline.models import fixed_log_probs

    shape = {"vocab_size": 128_256, "num_layers": 8, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 4096}
    shape |= {"max_seq_len": 8192, "intermediate_dim": 14_336}
    if bench.tiny:
        shape |= {"vocab_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
        shape |= {"intermediate_dim": 128}
        per_row //= 10
    compile = compile and not bench.tiny
    model, optimizer = random_llama(bench, shape, activation_checkpointing=checkpointing, compile=compile)
    batch = some_rows(bench, pairs=2, per_row=per_row, rows=rows)
    measured: Measured = {"tokens": batch.num_tokens, "padded_tokens": batch.tokens.numel()}
    with bench.peak(measured):
        measured["reference_ms"] = bench.ms(lambda: fixed_log_probs(model, batch), 5)
        measured["forward_backward_ms"] = bench.ms(lambda: one_pass(model, batch), 5)
        measured["optimizer_ms"] = bench.ms(optimizer.step, 5)
    seconds = (measured["reference_ms"] + measured["forward_backward_ms"]) / 1e3
    parameters = sum(p.numel() for p in model.layers.parameters())
    head = model.tok_embeddings.weight.numel() * len(batch.targets) / batch.num_tokens  # of response tokens only
    flops = 8 * (parameters + head) * batch.num_tokens
    peak, how = peak_of_card(bench)
    return measured | {
        "tokens_per_s": batch.num_tokens / seconds,
        "mfu": flops / seconds / (peak * 1e12),
        "peak_is": how,
    }


def head(bench: Bench) -> Measured:
    """The log-prob head against full logits: 4,096 tokens of Llama 3's vocabulary."""
    from humanline.models import token_log_probs

    n, size, vocabulary = bench.size(4096, 64), bench.size(4096, 32), bench.size(128_256, 512)
    hidden = bench.randn(n, size).requires_grad_()
    weight = (bench.randn(vocabulary, size) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (n,), device=bench.device)

    def ours() -> Tensor:
        return token_log_probs(hidden, weight, targets)

    def full() -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    measured: Measured = {}
    for name, call in (("ours", ours), ("full", full)):
        with bench.peak(measured, f"{name}_peak_gb"):
            measured[f"{name}_forward_ms"] = bench.ms(call)
            measured[f"{name}_forward_backward_ms"] = bench.ms(partial(gradients, call, (hidden, weight)))
    measured["largest_difference"] = float((ours() - full()).detach().abs().max())
    return measured


def adapters(bench: Bench) -> Measured:
    """LoRA against QLoRA: a pass of 8 layers of Llama 3 8B."""
    from humanline.models import build_model, initial_adapter
    from torchtune.models.llama3 import lora_llama3

    shape: dict[str, Any] = {"vocab_size": 32_000, "num_layers": 8, "num_heads": 32, "num_kv_heads": 8}
    shape |= {"embed_dim": 4096, "max_seq_len": 8192, "intermediate_dim": 14_336}
    if bench.tiny:
        shape |= {"vocab_size": 512, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 256}
        shape |= {"intermediate_dim": 512}
    shape |= {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
    shape |= {"lora_rank": 16, "lora_alpha": 32}
    batch = some_rows(bench, pairs=2, per_row=bench.size(2560, 256))
    measured: Measured = {"tokens": batch.num_tokens}
    for name, quantized in (("lora", False), ("qlora", True)):
        build = partial(lora_llama3, **shape, quantize_base=quantized)
        with torch.device("meta"):
            plain = partial(lora_llama3, **shape)()
        weights = {
            key: torch.randn(p.shape, dtype=torch.bfloat16) * 0.02
            for key, p in plain.state_dict().items()
            if "lora" not in key
        }
        model = build_model(
            build,
            weights | initial_adapter(plain, weights, seed=0),
            mesh=None,
            device=bench.device,
            param_dtype=torch.float32,
            compute_dtype=torch.bfloat16,
            activation_checkpointing=True,
        )
        with bench.peak(measured, f"{name}_peak_gb"):
            measured[f"{name}_forward_backward_ms"] = bench.ms(partial(one_pass, model, batch), 5)
        del model
    return measured


def masks(bench: Bench) -> Measured:
    """The host's and the card's time of a row's block mask and of its layout."""
    rows = some_rows(bench, pairs=4, per_row=bench.size(5120, 256))

    def mask() -> None:
        rows._masks.clear()
        rows.attention_mask()

    start = time.perf_counter()
    some_rows(bench, pairs=4, per_row=bench.size(5120, 256))
    return {"layout_ms": 1e3 * (time.perf_counter() - start), "mask_ms": bench.ms(mask)}


def gemma(bench: Bench) -> Measured:
    """Gemma 2's attention, head dimension 256 with a soft-cap and a window: whether its kernels fit, and their time."""
    from humanline.models import LogProbDecoder
    from humanline.models.gemma2 import gemma2

    heads = bench.size(8, 2)
    with torch.device(bench.device):
        decoder = gemma2(
            vocab_size=512,
            num_layers=2,
            num_heads=heads,
            num_kv_heads=heads // 2,
            head_dim=bench.size(256, 16),
            embed_dim=bench.size(2304, 32),
            intermediate_dim=64,
            max_seq_len=8192,
            sliding_window_size=bench.size(4096, 64),
        )
    attention = LogProbDecoder(decoder).layers[0].attn.to(torch.bfloat16)
    rows = some_rows(bench, pairs=2, per_row=bench.size(5120, 256))
    mask, backward = block_mask(rows, attention.sliding_window), bench.device.type == "cuda"
    x = bench.randn(1, rows.tokens.size(1), bench.size(2304, 32)).requires_grad_(backward)
    for parameter in attention.parameters():
        parameter.requires_grad_(backward)

    def call() -> Tensor:
        return attention(x, x, mask=mask, input_pos=rows.positions)

    measured = {"forward_ms": bench.ms(call)}
    if backward:
        measured["forward_backward_ms"] = bench.ms(partial(gradients, call, (x,)))
    return measured


def sampling(bench: Bench) -> Measured:
    """Tokens per second of the in-process engine: SmolLM2's shape, 64 prompts of 8 samples of 128 tokens."""
    from humanline.models import smollm2_135m
    from humanline.rollout import SamplingParams, TorchtuneEngine

    with torch.device(bench.device):
        decoder = smollm2_135m().to(torch.bfloat16).eval()
    engine = TorchtuneEngine(decoder, stop_tokens=[], batch_size=bench.size(512, 4))
    count, new = bench.size(64, 2), bench.size(128, 4)
    params = SamplingParams(max_new_tokens=new, samples_per_prompt=bench.size(8, 2))
    prompts = [[100 + i] * (20 + i % 40) for i in range(count)]
    engine.generate(prompts[:2], params)
    bench.sync()
    start = time.perf_counter()
    found = engine.generate(prompts, params)
    bench.sync()
    tokens = sum(len(sample.tokens) for samples in found for sample in samples)
    return {"tokens": tokens, "tokens_per_s": tokens / (time.perf_counter() - start)}


def stochastic_adamw(bench: Bench) -> Measured:
    """A step of `StochasticAdamW` with bfloat16 states against torch's fused AdamW with float32 ones."""
    from humanline.optim import StochasticAdamW

    count = bench.size(2**28, 2**10)
    measured: Measured = {"parameters": count}
    for name, make, dtype in (
        ("stochastic", StochasticAdamW, torch.bfloat16),
        ("fused", partial(torch.optim.AdamW, fused=True), torch.float32),
    ):
        parameter = torch.nn.Parameter(bench.randn(count, dtype=dtype))
        parameter.grad = bench.randn(count, dtype=dtype)
        with bench.peak(measured, f"{name}_peak_gb"):
            measured[f"{name}_ms"] = bench.ms(make([parameter]).step)
    return measured


def offload(bench: Bench) -> Measured:
    """A pass of a small Llama with the layers' inputs in host memory, and without."""
    measured: Measured = {}
    for name in ("kept", "offloaded"):
        model, _ = small_llama(bench, checkpointing=True)
        from torchtune import training  # humanline was imported before

        wanted = name == "offloaded" and bench.device.type == "cuda"
        context = training.get_act_offloading_ctx_manager(model, True) if wanted else nullcontext()
        batch = some_rows(bench, pairs=2, per_row=bench.size(4096, 256))
        with bench.peak(measured, f"{name}_peak_gb"):
            measured[f"{name}_forward_backward_ms"] = bench.ms(partial(one_pass, model, batch, context))
    return measured


# A section's function with its limit in seconds. One change at a time from `llama` on.
SECTIONS: dict[str, tuple[Callable[[Bench], Measured], int]] = {
    "rates": (rates, 60),
    "flex": (flex, 120),
    "syncs": (syncs, 120),
    "llama": (llama, 90),
    "llama_rows": (partial(llama, per_row=5120, rows=1), 90),
    "llama_kept": (partial(llama, per_row=5120, rows=1, checkpointing=False), 90),
    "llama_compiled": (partial(llama, per_row=5120, rows=1, checkpointing=False, compile=True), 180),
    "head": (head, 60),
    "adapters": (adapters, 120),
    "masks": (masks, 60),
    "gemma": (gemma, 120),
    "sampling": (sampling, 90),
    "stochastic_adamw": (stochastic_adamw, 60),
    "offload": (offload, 90),
}


# ------------------------------------------------------------------------------------------------------ the parts


def some_rows(bench: Bench, pairs: int, per_row: int, rows: int = 1, seed: int = 0) -> Any:
    """Returns a pass of pairs like UltraFeedback's, which fill up to ``rows`` rows of ``per_row`` tokens."""
    from humanline.data import Group, RowBudget, lay_out, pack

    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=generator).tolist()

    share = per_row * rows // pairs
    prompt, response = share // 8, share // 5 * 2
    groups = [Group(ids(prompt - i), (ids(response), ids(response - 7 * i))) for i in range(pairs)]
    budget = RowBudget(tokens_per_row=per_row, rows_per_pass=rows, fixed_shape=True)
    return lay_out(groups, pack(groups, budget)[0], budget).to(bench.device)


def small_llama(bench: Bench, checkpointing: bool = False) -> tuple[Any, torch.optim.Optimizer]:
    shape = {"vocab_size": 512, "num_layers": bench.size(8, 2), "num_heads": bench.size(16, 4)}
    shape |= {"num_kv_heads": bench.size(8, 2), "embed_dim": bench.size(1024, 32), "max_seq_len": 8192}
    shape |= {"intermediate_dim": bench.size(4096, 64)}
    return random_llama(bench, shape, activation_checkpointing=checkpointing)


def random_llama(bench: Bench, shape: dict[str, int], **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Returns a model with random weights and its optimizer; ``settings`` are those of ``build_model``."""
    from humanline.models import build_model
    from torchtune.models.llama3 import llama3

    settings_of_all: dict[str, Any] = {"mesh": None, "param_dtype": torch.float32, "compute_dtype": torch.bfloat16}
    model = build_model(partial(llama3, **shape), None, device=bench.device, **settings_of_all, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def block_mask(rows: Any, window: int | None = None) -> Any:
    """Returns FlexAttention's mask of the rows, on a CPU too."""
    from torch.nn.attention.flex_attention import create_block_mask

    count, length = rows.tokens.shape
    return create_block_mask(rows.visible(window), count, None, length, length, device=rows.tokens.device)


def one_pass(model: Any, rows: Any, context: Any = None) -> None:
    """Forward, DPO's loss and backward of a pass of pairs, as in the recipe."""
    from humanline.losses import HumanlineDPOLoss
    from humanline.models import log_probs

    with context or nullcontext():
        logps = rows.per_response(log_probs(model, rows))
    sides = slice(0, None, 2), slice(1, None, 2)
    policy, masks = [logps[side] for side in sides], [rows.mask[side] for side in sides]
    losses, _, _ = HumanlineDPOLoss()(*policy, *(each.detach() for each in policy), *masks)
    losses.sum().backward()


def gradients(call: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor | None = None) -> Any:
    output = call()
    return torch.autograd.grad(output, inputs, torch.ones_like(output) if grad is None else grad)


def peak_of_card(bench: Bench) -> tuple[float, str]:
    """Returns the card's bf16 peak in TFLOP/s, and where it is from."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    if published := next((peak for card, peak in PEAKS.items() if card in name), None):
        return published, "published"
    return rates(bench)["bfloat16_tflops"], "measured"
