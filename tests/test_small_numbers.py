"""Float32 keeps its digits: what would cancel or round away is held to float64, or to more digits where needed."""

import math

import mpmath
import pytest
import torch
from conftest import loss_and_metrics
from hypothesis import given
from hypothesis import strategies as st

from humanline.data import Group, GroupDataset, RowBudget, Rows, as_labelled, lay_out, pack
from humanline.losses import (
    HumanlineDPOLoss,
    HumanlineGRPOLoss,
    HumanlineKTOLoss,
    group_advantages,
    token_kl,
    token_log_ratio,
)
from humanline.models._log_probs import token_log_probs
from humanline.optim import StochasticAdamW
from humanline.perception import acceptance_probability, weighting
from humanline.training._metrics import MetricSums

magnitudes = st.floats(-12, 1.3).map(lambda exponent: 10**exponent)
log_ratios = st.builds(math.copysign, magnitudes, st.sampled_from([1.0, -1.0]))


def exact_kl(log_ratio: torch.Tensor) -> list[float]:
    with mpmath.workdps(60):
        return [float(mpmath.expm1(-mpmath.mpf(value)) + mpmath.mpf(value)) for value in log_ratio.tolist()]


@given(st.lists(log_ratios, min_size=1, max_size=20))
def test_the_kl_of_a_token_has_the_digits_of_float32_however_small_it_is(values):
    log_ratio = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    kl = token_kl(log_ratio)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx(exact_kl(log_ratio), rel=1e-6, abs=0)
    assert log_ratio.grad.tolist() == pytest.approx((-torch.expm1(-log_ratio.double())).tolist(), rel=1e-6, abs=0)
    assert bool((kl >= 0).all())


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_loss_and_metric_of_grpo_have_the_kl_of_float64(size):
    torch.manual_seed(0)
    count = 64
    reference = torch.zeros(1, count)
    policy = (torch.randn(1, count) * size).requires_grad_()
    loss = HumanlineGRPOLoss(beta=1.0, perception="none")
    mean = loss(policy, reference, torch.ones(1, count).bool(), torch.zeros(1))
    mean.backward()
    expected = math.fsum(exact_kl(policy.flatten())) / count
    assert mean.item() == pytest.approx(expected, rel=1e-5, abs=0)
    expected_grad = -torch.expm1(-policy.double()) / count
    torch.testing.assert_close(policy.grad.double(), expected_grad, rtol=1e-5, atol=0)

    rows = rows_of(Group([1, 2], (list(range(count)),), scores=(1.0,), advantages=(0.0,)))
    _, metrics = loss_and_metrics(loss)(policy.detach()[0], reference[0], rows, None)
    total, tokens = metrics["kl"]
    assert float(total / tokens) == pytest.approx(expected, rel=1e-5, abs=0)


def rows_of(*groups: Group) -> Rows:
    budget = RowBudget(tokens_per_row=4100, rows_per_pass=8)
    (planned,) = pack(groups, budget)
    return lay_out(groups, planned, budget)


@given(st.floats(-60, 60))
def test_kto_s_losses_and_gradients_keep_their_digits_far_from_the_baseline(reward):
    for desirable in (True, False):
        logps = torch.tensor([[reward]], dtype=torch.float32, requires_grad=True)
        loss = HumanlineKTOLoss(beta=1.0, perception="none")
        losses, _ = loss(
            logps, torch.zeros(1, 1), torch.ones(1, 1).bool(), torch.tensor([desirable]), torch.tensor(0.0)
        )
        losses.sum().backward()
        x = mpmath.mpf(logps.item()) * (1 if desirable else -1)
        with mpmath.workdps(60):
            value = 1 / (1 + mpmath.exp(x))  # 1 - sigmoid(x)
            slope = value * (1 - value) * (-1 if desirable else 1)
        assert losses.item() == pytest.approx(float(value), rel=1e-5, abs=0)
        assert logps.grad.item() == pytest.approx(float(slope), rel=1e-5, abs=0)


@given(st.floats(-60, 60))
def test_dpo_s_losses_and_gradients_keep_their_digits_at_any_margin(margin):
    chosen = torch.tensor([[margin]], dtype=torch.float32, requires_grad=True)
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
    losses, *_ = HumanlineDPOLoss(beta=1.0, perception="none")(chosen, zero, zero, zero, mask, mask)
    losses.sum().backward()
    with mpmath.workdps(60):
        x = mpmath.mpf(chosen.item())
        value, slope = mpmath.log1p(mpmath.exp(-x)), -1 / (1 + mpmath.exp(x))
    assert losses.item() == pytest.approx(float(value), rel=1e-5, abs=0)
    assert chosen.grad.item() == pytest.approx(float(slope), rel=1e-5, abs=0)


def test_the_reward_of_a_long_response_is_the_sum_of_float64():
    torch.manual_seed(0)
    policy = -torch.rand(1, 32768) * 3
    reference = policy + torch.randn(1, 32768) * 1e-3
    mask = torch.ones(1, 32768).bool()
    _, reward, _ = HumanlineDPOLoss(beta=1.0)(policy, policy, reference, policy, mask, mask)
    exact = (policy.double() - reference.double()).sum().item()
    assert reward.item() == pytest.approx(exact, abs=1e-6 * token_log_ratio(policy, reference, mask).abs().sum().item())


def test_grpo_s_gain_is_the_sum_of_differences_and_not_the_difference_of_sums():
    torch.manual_seed(0)
    reference = -torch.rand(4096) * 3
    policy = reference + (torch.rand(4096) - 0.5) * 1e-5
    rows = rows_of(Group([1, 2], ([1] * 4096,), scores=(1.0,), advantages=(1.0,)))
    _, metrics = loss_and_metrics(HumanlineGRPOLoss(perception="none"))(policy, reference, rows, None)
    gain = float(metrics["advantages/gain"][0])
    exact = (policy.double() - reference.double()).sum().item()
    assert gain == pytest.approx(exact, rel=1e-3)


@given(st.floats(-30, 30), st.floats(8, 40))
def test_the_log_prob_of_a_near_certain_token_has_digits_beside_large_logits(offset, lead):
    logits = torch.tensor([[offset + lead, offset, offset - 1, offset - 2]])
    found = token_log_probs(torch.ones(1, 1), logits.T.contiguous(), torch.tensor([0])).item()
    exact = logits.double().log_softmax(-1)[0, 0].item()
    assert found == pytest.approx(exact, abs=2.5e-7)  # roundings of a sum just above 1


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=8, unique=True),
    st.sampled_from([0.0, 1e6, -1e9]),
    st.integers(0, 9),
)
def test_advantages_of_scores_that_are_large_beside_their_differences_are_exact(scores, offset, exponent):
    scores = [offset + score * 10.0**-exponent for score in scores]
    with mpmath.workdps(60):
        mean = mpmath.fsum(scores) / len(scores)
        std = mpmath.sqrt(mpmath.fsum((score - mean) ** 2 for score in scores) / len(scores))
        expected = [float((score - mean) / (std + 1e-4)) for score in scores]
    found = group_advantages(torch.tensor(scores, dtype=torch.float64), torch.zeros(len(scores)), eps=1e-4)
    resolution = 4 * math.ulp(max(map(abs, scores))) / 1e-4
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=max(1e-7, resolution))


def labels_of(*scores: float) -> tuple[bool, ...] | None:
    extra = Group([1], ([2], [3]), scores=(0.0, 1.0))  # one that is always kept
    groups = as_labelled(
        GroupDataset([Group([1], tuple([i] for i in range(len(scores))), scores=scores), extra])
    ).groups
    return groups[0].labels if len(groups) == 2 else None


def test_what_is_above_the_mean_is_told_by_the_spread_of_the_scores():
    assert labels_of(1e6 + 1e-4, 1e6 + 2e-4) == (False, True)  # 1e-10 of the scores, all of their spread
    assert labels_of(0.3, -0.1, -0.2, 0.0) == (True, False, False)  # a mean of 0 but for rounding: 0.0 is neither
    assert labels_of(0.1, 0.2, 0.3) == (False, True)
    assert labels_of(1.0, math.nextafter(1.0, 2.0)) is None  # one rounding apart: equal


def test_sums_of_metrics_do_not_lose_what_each_step_adds():
    steps, each = 3000, 1.0001
    sums = MetricSums(torch.device("cpu"))
    for _ in range(steps):
        sums.add({"kl": (torch.tensor(each), torch.tensor(1))})
    total, count = sums._sums["kl"]
    assert float(total / count) == pytest.approx(torch.tensor(each).item(), rel=1e-12)


def test_a_weight_decay_of_1e_8_a_step_decays():
    weight = torch.nn.Parameter(torch.full((4096,), 0.05))
    optimizer = StochasticAdamW([weight], lr=1e-6, weight_decay=0.01)
    exact = torch.full((4096,), 0.05, dtype=torch.float64)
    torch.manual_seed(0)
    first = second = torch.zeros(4096, dtype=torch.float64)
    moved = exact.clone()  # without decay
    for step in range(1, 201):
        weight.grad = torch.randn(4096)
        optimizer.step()
        grad = weight.grad.double()
        first, second = first.lerp(grad, 0.1), second.lerp(grad.square(), 0.001)
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        exact, moved = exact - 1e-6 * (update + 0.01 * exact), moved - 1e-6 * update
    decayed = (weight.detach().double() - moved).mean().item()
    assert decayed == pytest.approx((exact - moved).mean().item(), rel=0.1)


@given(st.floats(-30, -1).map(lambda exponent: 10**exponent), st.floats(0.3, 1.0))
def test_an_unlikely_least_gain_has_its_weight(chance, gamma):
    weights = weighting(
        torch.tensor([1.0, 2.0]), torch.tensor([chance, 1 - chance], dtype=torch.float64), gamma_gains=gamma
    )
    with mpmath.workdps(80):
        rest = mpmath.mpf(chance) / (mpmath.mpf(chance) + mpmath.mpf(1 - chance))
        felt = (1 - rest) ** gamma
        expected = 1 - felt / (felt + rest**gamma) ** (1 / mpmath.mpf(gamma))
    assert weights[0].item() == pytest.approx(float(expected), rel=1e-9)


@given(st.floats(0, 6).map(lambda exponent: 10**exponent), st.floats(0, 20), st.booleans())
def test_acceptance_at_large_gammas_is_that_of_float64(gamma, depth, above):
    bound = 1.5 if above else -1.5
    log_ratio = torch.tensor([bound + math.copysign(depth / gamma, bound)])
    exact = acceptance_probability(log_ratio.double(), -1.5, 1.5, gamma, gamma).item()
    assert acceptance_probability(log_ratio, -1.5, 1.5, gamma, gamma).item() == pytest.approx(exact, rel=1e-6)
