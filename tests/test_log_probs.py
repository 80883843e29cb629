"""The head: log-probs of chosen tokens without the logits of all of them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import humanline.models._log_probs as head
from humanline.models import token_log_probs, token_log_probs_and_entropy

TOKENS, DIM, VOCAB = 37, 16, 101


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def full_logits(hidden, weight, soft_cap, temperature):
    """The distributions from all logits in float64: an independent computation."""
    logits = hidden.double() @ weight.double().T
    logits = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    return torch.distributions.Categorical(logits=logits / temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("words_a_piece", [1, 10, 1000])
def test_values_gradients_and_entropies_equal_those_of_full_logits(monkeypatch, soft_cap, words_a_piece, temperature):
    monkeypatch.setitem(head._LOGITS, "cpu", words_a_piece * TOKENS)
    grad = torch.linspace(-1, 1, TOKENS)
    hidden, weight, targets = inputs()
    exact = full_logits(hidden, weight, soft_cap, temperature)
    exact.log_prob(targets).backward(grad.double())
    for with_entropy in (False, True):
        mine, matrix = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
        if with_entropy:
            logps, entropies = token_log_probs_and_entropy(mine, matrix, targets, soft_cap, temperature)
            assert not entropies.requires_grad
            torch.testing.assert_close(entropies.double(), exact.entropy().detach(), atol=1e-5, rtol=0)
        else:
            logps = token_log_probs(mine, matrix, targets, soft_cap, temperature)
        logps.backward(grad)
        torch.testing.assert_close(logps.double(), exact.log_prob(targets), atol=1e-5, rtol=0)
        for ours, theirs in ((mine.grad, hidden.grad), (matrix.grad, weight.grad)):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)


def test_bfloat16_gradients_of_hidden_states_are_summed_over_pieces_in_float32(monkeypatch):
    def hidden_grad(dtype, words_a_piece):
        monkeypatch.setitem(head._LOGITS, "cpu", words_a_piece * TOKENS)
        hidden, weight, targets = inputs(dtype)
        token_log_probs(hidden, weight, targets).sum().backward()
        return hidden.grad.double()

    exact = hidden_grad(torch.float32, 1000)
    in_one_piece = (hidden_grad(torch.bfloat16, 1000) - exact).norm()
    in_many = (hidden_grad(torch.bfloat16, 1) - exact).norm()
    assert in_many < 1.2 * in_one_piece  # 1.56 with a sum in bfloat16


@pytest.mark.parametrize("words_a_piece", [1, 10, 1000])
def test_a_nearly_certain_token_keeps_the_digits_of_its_log_prob(monkeypatch, words_a_piece):
    monkeypatch.setitem(head._LOGITS, "cpu", words_a_piece)
    logits = torch.full((VOCAB,), 988.0).index_fill_(0, torch.tensor([7]), 1000.0)
    hidden, targets = torch.ones(1, 1), torch.tensor([7])
    exact = logits.double().log_softmax(0)
    for token in (7, 8):
        found, entropy = token_log_probs_and_entropy(hidden, logits[:, None], targets.fill_(token))
        torch.testing.assert_close(found.double(), exact[[token]], rtol=1e-7, atol=1e-5)  # 1000 is kept to 3e-5
    torch.testing.assert_close(entropy.double()[0], -(exact.exp() * exact).sum(), rtol=0, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setitem(head._LOGITS, "cpu", 4 * TOKENS)
    hidden, weight, targets = inputs(torch.float32)
    with LargestTensor() as largest:
        token_log_probs(hidden, weight, targets).sum().backward()
    assert largest.elements == VOCAB * DIM  # the weight's gradient; a piece of logits has 4 * TOKENS elements
    assert largest.elements < TOKENS * VOCAB


@pytest.mark.parametrize("target", [-100, VOCAB])
def test_a_target_outside_of_the_vocabulary_has_no_log_prob(monkeypatch, target):
    monkeypatch.setitem(head._LOGITS, "cpu", 10 * TOKENS)
    hidden, weight, targets = inputs(torch.float32)
    targets[3] = target
    assert token_log_probs(hidden, weight, targets).isnan().nonzero().flatten().tolist() == [3]


def test_no_token_at_all_gives_no_log_prob():
    hidden, weight, targets = inputs(torch.float32)
    assert token_log_probs(hidden[:0], weight, targets[:0]).shape == (0,)


def test_it_works_under_compile_and_inside_a_checkpoint():
    def run(log_probs):
        hidden, weight, targets = inputs(torch.float32)
        log_probs(hidden, weight, targets).sum().backward()
        return hidden.grad, weight.grad

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(token_log_probs, *args, use_reentrant=False)

    plain = run(token_log_probs)
    for variant in (torch.compile(token_log_probs, backend="aot_eager"), checkpointed):
        for ours, theirs in zip(run(variant), plain, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_an_output_layer_with_bias_is_refused():
    from torchtune.models.llama3 import llama3

    from humanline.errors import ConfigError
    from humanline.models import LogProbDecoder

    decoder = llama3(
        vocab_size=8, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=8, max_seq_len=8, intermediate_dim=8
    )
    decoder.output = nn.Linear(8, 8, bias=True)
    with pytest.raises(ConfigError, match="model: expected a linear output layer without bias, got Linear"):
        LogProbDecoder(decoder)
