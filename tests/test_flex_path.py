"""What a GPU computes, on a CPU: block masks and FlexAttention, by the operations that define it."""

import random
from importlib import import_module

import pytest
import torch
from conftest import loss_and_metrics
from families import FAMILIES
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training
from torchtune.models.llama3 import llama3

from humanline.data import Group, RowBudget, TokenBudget, lay_out, pack
from humanline.errors import ConfigError, TrainingError
from humanline.launch._processes import process_group
from humanline.losses import HumanlineDPOLoss, HumanlineGRPOLoss, HumanlineKTOLoss
from humanline.models import LogProbDecoder, fixed_log_probs, freeze_base, log_probs_and_entropy
from humanline.models._flex import kernel_options
from humanline.training import DPO, GRPO, KTO, Passes
from humanline.training._metrics import MetricSums, mismatch_metrics
from humanline.training._non_finite import NonFinite

VOCAB = 96
SHAPE = {
    **{"vocab_size": VOCAB, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2},
    **{"embed_dim": 32, "intermediate_dim": 48, "max_seq_len": 64},
}


@pytest.fixture(autouse=True)
def flex_attention_with_gradients(monkeypatch):
    """On a CPU FlexAttention refuses inputs that need a gradient. The operations that define it have one."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", set())
    counters.clear()
    yield
    torch._dynamo.reset()


def passes(count: int, tokens_per_row: int = 256, rows_per_pass: int = 3):
    """Passes of pairs, several to a row, with padding in and behind the rows."""
    numbers = random.Random(0)

    def sequence():
        return [numbers.randrange(VOCAB) for _ in range(numbers.randint(5, 30))]

    budget = RowBudget(tokens_per_row=tokens_per_row, rows_per_pass=rows_per_pass, fixed_shape=True)
    for _ in range(count):
        groups = [Group(sequence(), (sequence(), sequence())) for _ in range(5)]
        yield lay_out(groups, pack(groups, budget)[0], budget)


def with_masks(model, rows, masks):
    """Log-probs under given masks."""
    of_rows = {"positions": rows.positions, "predictors": rows.predictors, "targets": rows.targets}
    return model(rows.tokens, masks=masks, **of_rows)


def dense(model, rows):
    return with_masks(model, rows, {window: rows.attention_mask(window) for window in set(model.windows)})


def blocks(model, rows):
    count, length = rows.tokens.shape
    windows = set(model.windows)
    masks = {each: create_block_mask(rows.visible(each), count, None, length, length, device="cpu") for each in windows}
    return with_masks(model, rows, masks)


def ran_uncompiled() -> bool:
    return "flex_attention_performance" in flex_attention._WARNINGS_SHOWN


# ---- The same function as with dense masks


def relative_difference(a, b) -> float:
    """The largest difference of two lists of tensors, relative to the largest value of each."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def with_gradients(log_probs, model):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [log_probs.detach(), *torch.autograd.grad(log_probs.square().mean(), weights)]


def built(name: str, *lora: str):
    """A tiny model of a family, with an adapter on some projections of attention."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    module, _, builder = family.component("lora_" if lora else "").rpartition(".")
    adapter = {"lora_attn_modules": list(lora), "lora_rank": 4, "lora_alpha": 8.0} if lora else {}
    model = LogProbDecoder(getattr(import_module(module), builder)(**family.arguments(), **adapter))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that scores reach the soft-cap
    if lora:
        freeze_base(model, torch.float32)
    return model


FOUR = ["llama3", "gemma2", "gemma3", "qwen3"]  # all have grouped queries, both Gemmas windows, Gemma 2 a soft-cap


@pytest.mark.parametrize(("name", "lora"), [*((name, ()) for name in FOUR), ("gemma2", ("q_proj", "v_proj"))])
def test_log_probs_and_gradients_are_those_of_dense_masks(name, lora):
    model = built(name, *lora)
    for rows in passes(2):
        ours, theirs = (with_gradients(by(model, rows), model) for by in (blocks, dense))
        assert relative_difference(ours, theirs) < 1e-5
        assert rows.segments.max() > 0 and (rows.segments == -1).all(1).any()  # several a row, and a row of padding


# ---- The limit of kernels


def tiny_llama(monkeypatch, compiled: bool):
    model = LogProbDecoder(llama3(**SHAPE))
    if compiled:
        monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
        training.compile_model(model, verbose=False)
    return model


def test_kernels_are_compiled_once_for_each_width_window_and_gradient():
    model = built("gemma2", "q_proj", "v_proj")
    budget = RowBudget(tokens_per_row=512, fixed_shape=True)
    compiled, widths = [], []
    for pairs in (2, 4, 6, 8, 1, 3, 5, 7):
        groups = [Group([pairs, *range(19)], (list(range(i, 21 + i)), list(range(21)))) for i in range(pairs)]
        (rows,) = (lay_out(groups, planned, budget) for planned in pack(groups, budget))
        with torch.no_grad():
            blocks(model, rows)
        blocks(model, rows).sum().backward()
        compiled.append(counters["stats"]["unique_graphs"])
        widths.append(rows.tokens.size(1))
    assert widths == [128, 256, 384, 512] * 2
    # With a window and without one: no gradient, all gradients; and those of the adapter alone in the first layer.
    assert compiled == [5, 10, 15, 20, 20, 20, 20, 20]


@torch.no_grad()
def test_more_shapes_than_dynamo_s_limit_stay_compiled():
    model = LogProbDecoder(llama3(**SHAPE))
    for length in range(200, 200 + dynamo.recompile_limit + 2):
        (rows,) = passes(1, tokens_per_row=length)
        torch.testing.assert_close(blocks(model, rows), dense(model, rows), atol=1e-5, rtol=0)
    assert not ran_uncompiled()


@pytest.mark.parametrize("compiled", [False, True], ids=["", "in compiled layers"])
@torch.no_grad()
def test_one_kernel_too_many_is_an_error_that_names_the_remedy(compiled, monkeypatch):
    model = tiny_llama(monkeypatch, compiled)
    with dynamo.patch(accumulated_recompile_limit=3):  # of torch's two limits the one that is left as it is
        for length in (200, 201, 202):
            (rows,) = passes(1, tokens_per_row=length)
            blocks(model, rows)
        (rows,) = passes(1, tokens_per_row=203)
        with pytest.raises(TrainingError, match=r"rows of 203 tokens need .* use RowBudget\(fixed_shape=True\)"):
            blocks(model, rows)
    assert not dynamo.fail_on_recompile_limit_hit  # others' compiled functions fall back as ever


@torch.no_grad()
def test_flex_attention_stays_compiled_in_a_compiled_layer_that_is_not(monkeypatch):
    model = tiny_llama(monkeypatch, compiled=True)
    with dynamo.patch(recompile_limit=1):
        for rows in passes(2):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(blocks(model, rows), dense(model, rows), atol=1e-5, rtol=0)
    assert not ran_uncompiled()


def test_dropout_of_attention_is_refused_rather_than_left_out():
    model = LogProbDecoder(llama3(**SHAPE, attn_dropout=0.1))
    (rows,) = passes(1)
    with pytest.raises(ConfigError, match=r"^model.attn_dropout: expected 0, .* got 0.1$"):
        blocks(model, rows)


# ---- Blocks for GPUs with little shared memory

A100, H100, RTX = 166_912, 232_448, 101_376  # RTX 30, 40 and 50, and the workstation cards of their generations


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block"),
    [(256, torch.bfloat16, 32), (192, torch.bfloat16, 32), (128, torch.float32, 32), (256, torch.float32, 16)],
)
def test_large_heads_have_blocks_that_fit_where_those_of_flex_attention_do_not(head_dim, dtype, block):
    options = kernel_options(RTX, head_dim, dtype)
    assert (options["fwd_BLOCK_M"], options["fwd_BLOCK_N"], options["fwd_num_stages"]) == (2 * block, block, 2)
    assert {options[f"bwd_BLOCK_{side}"] for side in ("M1", "N1", "M2", "N2")} == {block}
    head = (256 if head_dim == 192 else head_dim) * dtype.itemsize
    queries_keys_and_values = (2 * block + block + block) * head
    queries_keys_values_and_gradients = 4 * block * head
    assert max(queries_keys_and_values, queries_keys_values_and_gradients) <= 2**16
    assert {name[4:] for name in options} <= FlexKernelOptions.__annotations__.keys()
    assert kernel_options(A100, head_dim, dtype) is None and kernel_options(H100, head_dim, dtype) is None


@pytest.mark.parametrize("shared_memory", [RTX, A100, H100])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)])
def test_smaller_heads_have_the_blocks_of_flex_attention(shared_memory, head_dim, dtype):
    assert kernel_options(shared_memory, head_dim, dtype) is None


# ---- Passes without waiting

META = torch.device("meta")  # stands for a GPU: reading a tensor there is an error
SAMPLE = {"perception": "sample", "gamma_P": 2.0, "gamma_R": 2.0}
OBJECTIVES = {
    "dpo": (DPO(HumanlineDPOLoss(**SAMPLE)), {}),
    "kto": (KTO(HumanlineKTOLoss(**SAMPLE)), {"labels": (True, False)}),
    "grpo": (GRPO(HumanlineGRPOLoss(**SAMPLE)), {"scores": (1.0, 0.0), "advantages": (1.0, -1.0)}),
}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "equal", "_unique2", "bincount"}


class Operations(TorchDispatchMode):
    """Finds operations of a GPU for which the host waits, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        devices = {each.device.type for each in tensors if each.dim()}  # scalars of the host are arguments of kernels
        name = operation.overloadpacket.__name__
        is_slow_copy = devices == {"cpu", "meta"} and not (kwargs or {}).get("non_blocking")
        if "meta" in devices and (name in WAITS or is_slow_copy):
            self.found.append(name)
        return result


class Indices(TorchFunctionMode):
    """Finds lists as indices, whose copy to a GPU the host waits for. Dispatch modes do not see it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [each for each in index if isinstance(each, list)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", FOUR)
def test_the_host_does_not_wait_for_the_device_within_a_pass(name, objective):
    with META:
        model = LogProbDecoder(FAMILIES[name].build())
    objective, values = OBJECTIVES[objective]
    call = loss_and_metrics(objective.loss)
    baseline = {"kl": torch.zeros((), device=META)} if isinstance(objective, KTO) else {}
    logps = ([-1.0, -2.0, -3.0], [-1.0, -2.0])
    groups = [Group([i, 2, 3], ([4, 5, 6], [7, 8]), logps=logps, **values) for i in range(3)]
    budget, limits = RowBudget(tokens_per_row=16), TokenBudget(max_tokens=16, max_prompt_tokens=None)
    sums, non_finite = MetricSums(META), NonFinite()
    with process_group(torch.device("cpu")), Operations() as operations, Indices() as indices:
        for rows, _, draws in Passes(objective, budget, limits, META, seed=0).of(groups, step=1, index=0):
            create_block_mask(rows.visible(2), len(rows.tokens), None, *[rows.tokens.size(1)] * 2, device="meta")
            reference_logps = fixed_log_probs(model, rows)
            policy_logps, entropy = log_probs_and_entropy(model, rows)
            loss, metrics = call(policy_logps, reference_logps, rows, draws, **baseline)
            loss.backward()
            non_finite.watch(rows, policy_logps - reference_logps, loss)
            sums.add(metrics | mismatch_metrics(policy_logps, rows) | {"entropy": (entropy.sum(), len(entropy))})
            sums.log_ratios.add(policy_logps - reference_logps)
    assert operations.found == [] and indices.found == []


def test_what_waits_for_the_device_is_found():
    values = torch.ones(2, 3, device=META, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool, device=META)
    with Operations() as operations, Indices() as indices:
        torch.zeros(2, 3, device=META).masked_scatter(mask, values).sum().backward()
        torch.arange(3).to(META)
        values[[0, 1]]
        for read in (torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, lambda each: each[mask]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read(values.sum() if read is torch.Tensor.item else values)
    assert operations.found == ["masked_scatter_backward", "_to_copy"] and indices.found == [[0, 1]]
