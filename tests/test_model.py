"""Setting up a model: precision, checkpointing and compile do what they are asked to, and tied weights stay tied."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.errors import ConfigError
from humanline.launch._processes import process_group
from humanline.models import LogProbDecoder, log_probs
from humanline.models._build import build_model

SHAPE = {
    "vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 64,
}


def build():
    return llama3_2(**SHAPE)


@pytest.fixture(scope="module")
def mesh():
    with process_group(torch.device("cpu")):
        yield init_device_mesh("cpu", (1,))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    decoder = build()
    torch.nn.init.normal_(decoder.tok_embeddings.weight, std=0.2)
    return decoder.state_dict()


def sharded(weights, mesh, compute_dtype=torch.float32, **kwargs):
    return build_model(
        build,
        weights,
        mesh=mesh,
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        compute_dtype=compute_dtype,
        **kwargs,
    )


def loss(model):
    groups = [Group([1, 2, 3], ([4, 5, 6], [7])), Group([8], ([9, 10], [11, 12, 13]))]
    budget = RowBudget(tokens_per_row=32)
    return log_probs(model, lay_out(groups, pack(groups, budget)[0], budget)).square().sum()


@pytest.mark.parametrize("variant", [{}, {"activation_checkpointing": True}, {"compile": True}])
def test_tied_embeddings_get_the_gradients_of_both_their_uses(mesh, weights, variant):
    plain = LogProbDecoder(build())
    plain.load_state_dict(weights)
    expected = torch.autograd.grad(loss(plain), list(plain.parameters()))
    model = sharded(weights, mesh, **variant)
    loss(model).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, atol=1e-5, rtol=1e-4)


def test_a_forward_without_backward_leaves_no_weights_that_a_step_misses(mesh, weights):
    model = sharded(weights, mesh)
    loss(model).backward()
    with torch.no_grad():
        before = loss(model)
        for parameter in model.parameters():
            parameter.to_local().mul_(1.5)
    after = loss(model)
    other = sharded({name: 1.5 * weight for name, weight in weights.items()}, mesh)
    assert before != after
    torch.testing.assert_close(after, loss(other))


def test_only_the_embeddings_stay_gathered_between_forward_and_backward(mesh, weights):
    def gathered(model):
        return {name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)}

    model = sharded(weights, mesh)
    result = loss(model)
    assert gathered(model) == {"tok_embeddings.weight", "norm.scale"}
    result.backward()
    assert not gathered(model)
    fixed_loss = torch.no_grad()(loss)(model)
    assert fixed_loss == result and not gathered(model)


def test_activation_checkpointing_wraps_and_compile_compiles_every_layer(mesh, weights):
    def layers(model, kind):
        return [module for module in model.modules() if isinstance(module, kind)]

    plain = sharded(weights, mesh)
    assert not layers(plain, CheckpointWrapper)
    assert all(layer._compiled_call_impl is None for layer in layers(plain, TransformerSelfAttentionLayer))
    assert len(layers(sharded(weights, mesh, activation_checkpointing=True), CheckpointWrapper)) == 2
    compiled = layers(sharded(weights, mesh, compile=True), TransformerSelfAttentionLayer)
    assert len(compiled) == 2 and all(layer._compiled_call_impl is not None for layer in compiled)


def test_bf16_compute_keeps_float32_shards_and_gradients(mesh, weights):
    model = sharded(weights, mesh, compute_dtype=torch.bfloat16)
    loss(model).backward()
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    # Gathered weights are bf16: their rounding shows in the loss.
    assert loss(model).item() != loss(sharded(weights, mesh)).item()


def test_an_architecture_that_rows_do_not_fit_is_refused():
    with torch.device("meta"):
        decoder = gemma2(**SHAPE, head_dim=8)
    with pytest.raises(
        ConfigError, match="model: expected torchtune's MultiHeadAttention, which rows need, got Gemma2Attention"
    ):
        LogProbDecoder(decoder)
