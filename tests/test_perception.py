"""Prospect theory, its bound, and humanline sampling: against the formulas, and against the clip it tends to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from humanline.errors import ConfigError
from humanline.losses import humanline_clip
from humanline.perception import (
    acceptance_probability,
    capacity,
    humanline_sample,
    largest_kl,
    utility_gap_bound,
    value,
    weighting,
)

P, R = -1.5, 1.5  # bounds, nats
DRAWS = 40_000
STANDARD_ERRORS = 5.0  # by chance a rate is further off once in 1.7 million

positive_gammas = st.floats(0.05, 200)
nats = st.floats(-6, 6)


def uniforms(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def accepted(log_ratio, log_eps_P, log_eps_R, gamma_P, gamma_R, draws):
    """Which tokens keep their gradient."""
    log_ratio = log_ratio.clone().requires_grad_()
    humanline_sample(log_ratio, log_eps_P, log_eps_R, gamma_P, gamma_R, draws).sum().backward()
    return log_ratio.grad == 1


# --- humanline sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_eps_P", "log_eps_R", "gamma_P", "gamma_R"),
    [
        (P, R, 0.5, 0.5),
        (P, R, 1.0, 4.0),
        (-0.4, 0.9, 16.0, 3.0),
        (P, None, 2.0, None),
        (None, R, None, 2.0),
        (-0.2, 0.2, 0.3, 0.3),  # both sides reject the same tokens
    ],
)
def test_rates_of_acceptance_are_those_of_the_closed_form(log_eps_P, log_eps_R, gamma_P, gamma_R):
    grid = torch.arange(-3, 3.25, 0.25)
    draws = uniforms(2, DRAWS, len(grid))
    rates = accepted(grid.expand(DRAWS, -1), log_eps_P, log_eps_R, gamma_P, gamma_R, draws).double().mean(0)

    # P(M * B <= exp(l)) for B ~ Beta(gamma, 1): its distribution function is b^gamma, its mean gamma / (gamma + 1).
    expected = torch.ones(len(grid), dtype=torch.float64)
    if log_eps_P is not None:
        M_P = math.exp(log_eps_P) * (gamma_P + 1) / gamma_P
        expected *= (grid.double().exp() / M_P).clamp(max=1) ** gamma_P
    if log_eps_R is not None:
        M_R = math.exp(-log_eps_R) * (gamma_R + 1) / gamma_R
        expected *= ((-grid.double()).exp() / M_R).clamp(max=1) ** gamma_R
    standard_error = (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((rates - expected).abs() <= STANDARD_ERRORS * standard_error + 1e-6).all())
    closed_form = acceptance_probability(grid.double(), log_eps_P, log_eps_R, gamma_P, gamma_R)
    torch.testing.assert_close(closed_form, expected, atol=1e-12, rtol=1e-9)


@given(st.lists(nats, min_size=1, max_size=20), positive_gammas, positive_gammas, st.integers(0, 2**31))
def test_a_token_is_rejected_exactly_when_equation_5_says_so(log_ratios, gamma_P, gamma_R, seed):
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    draws = uniforms(2, len(log_ratio), seed=seed, dtype=torch.float64)
    B_P, B_R = draws[0] ** (1 / gamma_P), draws[1] ** (1 / gamma_R)
    M_P, M_R = math.exp(P) * (gamma_P + 1) / gamma_P, math.exp(-R) * (gamma_R + 1) / gamma_R
    lower, upper = log_ratio.exp() - M_P * B_P, (-log_ratio).exp() - M_R * B_R
    decided = (lower.abs() > 1e-9) & (upper.abs() > 1e-9)
    literal = (lower >= 0) & (upper >= 0)
    assert torch.equal(accepted(log_ratio, P, R, gamma_P, gamma_R, draws)[decided], literal[decided])


def test_rejected_tokens_keep_their_value_and_get_no_gradient_accepted_ones_get_all_of_it():
    log_ratio = torch.linspace(-4, 4, 4001, requires_grad=True)
    sampled = humanline_sample(log_ratio, P, R, 2.0, 2.0, uniforms(2, 4001))
    sampled.sum().backward()
    assert torch.equal(sampled, log_ratio)
    assert set(log_ratio.grad.unique().tolist()) == {0.0, 1.0}


def test_the_same_draws_reject_the_same_tokens_and_others_do_not():
    log_ratio = torch.linspace(-4, 4, 1000)
    first, again, other = (accepted(log_ratio, P, R, 1.0, 1.0, uniforms(2, 1000, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_draws_they_come_from_torchs_generator():
    log_ratio = torch.linspace(-4, 4, 1000)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(accepted(log_ratio, P, R, 1.0, 1.0, None))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_two_sides_draw_independently():
    log_ratio = torch.zeros(DRAWS)
    # Bounds of 0 with gamma 1: each side accepts l = 0 with probability 1/2, both with 1/4.
    rate = accepted(log_ratio, 0.0, 0.0, 1.0, 1.0, uniforms(2, DRAWS)).double().mean().item()
    assert abs(rate - 0.25) <= STANDARD_ERRORS * math.sqrt(0.25 * 0.75 / DRAWS)


def test_an_open_side_rejects_nothing():
    far = torch.tensor([-50.0, 50.0]).repeat(1000, 1)
    draws = uniforms(2, 1000, 2)
    assert accepted(far, P, None, 1.0, None, draws).sum(0).tolist() == [0, 1000]
    assert accepted(far, None, R, None, 1.0, draws).sum(0).tolist() == [1000, 0]
    assert humanline_sample(far, None, None, None, None) is far


@pytest.mark.parametrize("gamma", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_log_ratios_and_draws_are_decided_without_overflow(gamma, draw):
    log_ratio = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    sampled = humanline_sample(log_ratio, P, R, gamma, gamma, torch.full((2, 3), draw))
    sampled.sum().backward()
    assert sampled.tolist() == [-50.0, 0.0, 50.0]
    if draw == 0:  # B = 0, which nothing is below
        assert log_ratio.grad.tolist() == [1.0, 1.0, 1.0]
    elif gamma >= 1:
        assert log_ratio.grad.tolist() == [0.0, 1.0, 0.0]
    assert bool(acceptance_probability(log_ratio.detach(), P, R, gamma, gamma).isfinite().all())


def test_bfloat16_log_ratios_are_compared_with_draws_of_full_precision():
    torch.manual_seed(0)
    log_ratio = torch.full((DRAWS,), -6.0, dtype=torch.bfloat16)
    rate = accepted(log_ratio, P, R, 4.0, 4.0, None).double().mean().item()
    assert rate <= 1e-3  # it is 6e-9; uniforms of 8 bits would be 0, and accept, once in 256
    assert humanline_sample(log_ratio, P, R, 4.0, 4.0).dtype == torch.bfloat16


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan, None, True, "4"])
@pytest.mark.parametrize("side", ["P", "R"])
def test_a_bound_needs_a_positive_finite_gamma(side, gamma):
    gammas = {"gamma_P": 1.0, "gamma_R": 1.0, f"gamma_{side}": gamma}
    for function in (humanline_sample, acceptance_probability):
        with pytest.raises(
            ConfigError, match=rf"^loss\.gamma_{side}: expected a positive finite number, got {gamma!r};"
        ):
            function(torch.zeros(3), P, R, **gammas)


# --- Theorem 4.3: sampling tends to clipping --------------------------------------------------------------------------

GAMMAS = [4.0**n for n in range(1, 7)]  # 4 to 4096


def around_the_bounds(distance):
    """Log-ratios over [-3, 3], none nearer than ``distance`` to a bound."""
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    return grid[((grid - P).abs() > distance) & ((grid - R).abs() > distance)]


def test_as_gamma_grows_the_accepted_set_becomes_the_clips_interval():
    log_ratio = around_the_bounds(0.02).expand(200, -1)
    inside = (log_ratio > P) & (log_ratio < R)
    draws = uniforms(2, *log_ratio.shape)
    wrong = [(accepted(log_ratio, P, R, gamma, gamma, draws) != inside).sum().item() for gamma in GAMMAS]
    assert wrong[0] > 1000
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] == 0


def test_as_gamma_grows_the_gradient_of_a_token_loss_becomes_the_clips():
    log_ratio = around_the_bounds(0.02).expand(200, -1)
    advantages = uniforms(*log_ratio.shape, seed=1) - 0.5

    def gradient(perceive):
        leaf = log_ratio.clone().requires_grad_()
        (advantages * perceive(leaf).exp()).sum().backward()
        return leaf.grad

    clipped = gradient(lambda leaf: humanline_clip(leaf, P, R))
    draws = uniforms(2, *log_ratio.shape)
    errors = [
        (gradient(lambda leaf, gamma=gamma: humanline_sample(leaf, P, R, gamma, gamma, draws)) - clipped).norm().item()
        for gamma in GAMMAS
    ]
    assert errors[0] > 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_in_the_limit_the_gradient_of_a_sequence_loss_is_the_clips_up_to_a_factor_per_sequence():
    # -log sigmoid of a sum: the values of rejected tokens stay in the sum, and so in the factor of all its tokens.
    log_ratio = around_the_bounds(0.02)[torch.randperm(500, generator=torch.Generator().manual_seed(0))].view(20, 25)

    def gradient(perceive):
        leaf = log_ratio.clone().requires_grad_()
        (-torch.nn.functional.logsigmoid(perceive(leaf).sum(-1) / 10)).sum().backward()
        return leaf.grad

    clipped = gradient(lambda leaf: humanline_clip(leaf, P, R))
    draws = uniforms(2, *log_ratio.shape)
    sampled = gradient(lambda leaf: humanline_sample(leaf, P, R, GAMMAS[-1], GAMMAS[-1], draws))
    unit = [torch.nn.functional.normalize(gradients, dim=-1) for gradients in (sampled, clipped)]
    torch.testing.assert_close(*unit, atol=1e-12, rtol=0)
    assert not torch.allclose(sampled, clipped, rtol=0.01)


def test_disagreement_with_the_clip_falls_as_one_over_gamma():
    """The length of log-ratios, in nats around one bound, on which sampling and clipping decide differently.

    It is 1/gamma times ``gamma log(1 + 1/gamma) - 1 + 2 (gamma / (gamma + 1))^gamma``, which tends to 2/e.
    """
    constants = []
    for gamma in GAMMAS:
        grid = torch.linspace(P - 4, P + 4, 4_000_001, dtype=torch.float64)
        probability = acceptance_probability(grid, P, None, gamma, None)
        disagreement = torch.where(grid < P, probability, 1 - probability)
        integral = torch.trapezoid(disagreement, grid).item()
        closed_form = (gamma * math.log1p(1 / gamma) - 1 + 2 * (gamma / (gamma + 1)) ** gamma) / gamma
        assert integral == pytest.approx(closed_form, rel=0.01)

        # By sampling, in a window that misses e^-16 of it.
        half = 16 / gamma
        log_ratio = P + half * (2 * uniforms(200_000, seed=1) - 1)
        differs = accepted(log_ratio, P, None, gamma, None, uniforms(2, 200_000)) != (log_ratio >= P)
        share = differs.double().mean().item()
        expected = closed_form / (2 * half)
        assert abs(share - expected) <= STANDARD_ERRORS * math.sqrt(expected * (1 - expected) / 200_000)
        constants.append(gamma * integral)
    assert constants == pytest.approx([2 / math.e] * len(GAMMAS), rel=0.04)
    assert abs(constants[-1] - 2 / math.e) < 0.1 * abs(constants[0] - 2 / math.e)


@pytest.mark.parametrize(("log_eps_P", "log_eps_R", "outside"), [(P, None, P - 0.05), (None, R, R + 0.05)])
def test_at_a_fixed_distance_outside_a_bound_acceptance_falls_exponentially_in_gamma(log_eps_P, log_eps_R, outside):
    log_ratio = torch.full((DRAWS,), outside)
    for gamma in (8.0, 16.0, 32.0, 64.0):
        expected = math.exp(-0.05 * gamma) * (gamma / (gamma + 1)) ** gamma  # of which the second factor tends to 1/e
        rate = accepted(log_ratio, log_eps_P, log_eps_R, gamma, gamma, uniforms(2, DRAWS)).double().mean().item()
        assert abs(rate - expected) <= STANDARD_ERRORS * math.sqrt(expected * (1 - expected) / DRAWS)


# --- prospect theory --------------------------------------------------------------------------------------------------

PROBABILITIES = torch.linspace(0, 1, 2001, dtype=torch.float64)
s_gammas = st.floats(0.28, 0.98)


@st.composite
def distributions(draw, outcomes=nats):
    """Outcomes, some of them tied, and their probabilities, some of them zero."""
    n = draw(st.integers(1, 12))
    z = draw(st.lists(outcomes, min_size=n, max_size=n))
    if draw(st.booleans()):
        z = [float(round(outcome)) for outcome in z]
    masses = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1)), min_size=n, max_size=n).filter(any))
    masses = torch.tensor(masses, dtype=torch.float64)
    return torch.tensor(z, dtype=torch.float64), masses / masses.sum()


def sign_changes(values):
    signs = values.sign()
    return int((signs.diff() != 0).sum()), signs[0].item(), signs[-1].item()


@given(s_gammas)
def test_the_capacity_is_an_inverted_s(gamma):
    felt = capacity(PROBABILITIES, gamma)
    assert (felt[0].item(), felt[-1].item()) == (0.0, 1.0)
    assert bool((felt.diff() > 0).all())
    # Above the diagonal, then below it, with one fixed point between.
    assert sign_changes((felt - PROBABILITIES)[1:-1]) == (1, 1.0, -1.0)
    # Concave, then convex.
    assert sign_changes(felt.diff(n=2)) == (1, -1.0, 1.0)


def test_the_capacity_has_the_values_of_tversky_and_kahneman():
    # The published curve for gains: 0.01 is felt as 0.055, 0.5 as 0.42, 0.99 as 0.91.
    felt = capacity(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), 0.61)
    assert felt.tolist() == pytest.approx([0.055, 0.42, 0.91], abs=0.005)


def test_with_gamma_1_the_capacity_is_the_identity():
    torch.testing.assert_close(capacity(PROBABILITIES, 1.0), PROBABILITIES, atol=1e-15, rtol=0)


@pytest.mark.parametrize(("gamma", "rises"), [(0.27, False), (0.279, False), (0.2793, True), (0.5, True), (1.0, True)])
def test_the_capacity_rises_everywhere_only_from_gamma_0_2793(gamma, rises):
    a = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert bool((capacity(a, gamma).diff() > 0).all()) is rises


@given(distributions(outcomes=st.floats(0, 6)), s_gammas, s_gammas)
def test_weights_of_gains_alone_or_of_losses_alone_sum_to_1(distribution, gamma_gains, gamma_losses):
    outcomes, probabilities = distribution
    for z in (outcomes, -outcomes - 1):
        weights = weighting(z, probabilities, gamma_gains=gamma_gains, gamma_losses=gamma_losses)
        assert weights.sum().item() == pytest.approx(1, abs=1e-9)
        assert bool((weights >= 0).all())


@given(distributions())
def test_with_gamma_1_weights_are_the_probabilities(distribution):
    outcomes, probabilities = distribution
    weights = weighting(outcomes, probabilities, gamma_gains=1.0, gamma_losses=1.0)
    torch.testing.assert_close(weights, probabilities, atol=1e-12, rtol=0)


@given(distributions(), st.randoms(use_true_random=False))
def test_the_order_of_outcomes_changes_no_weight(distribution, random):
    outcomes, probabilities = distribution
    order = list(range(len(outcomes)))
    random.shuffle(order)
    torch.testing.assert_close(
        weighting(outcomes[order], probabilities[order]), weighting(outcomes, probabilities)[order], atol=1e-8, rtol=0
    )


@given(distributions(), st.integers(0, 11), st.floats(0.1, 0.9))
def test_splitting_an_outcome_in_two_shares_its_weight_in_proportion(distribution, which, share):
    outcomes, probabilities = distribution
    i = which % len(outcomes)
    split = torch.cat([probabilities, probabilities[i : i + 1] * (1 - share)])
    split[i] *= share
    whole = weighting(outcomes, probabilities)
    parts = weighting(torch.cat([outcomes, outcomes[i : i + 1]]), split)
    torch.testing.assert_close(parts[:-1].index_fill(0, torch.tensor(i), 0), whole.index_fill(0, torch.tensor(i), 0))
    torch.testing.assert_close(parts[[i, -1]], whole[i] * torch.tensor([share, 1 - share], dtype=torch.float64))


def test_weights_are_increments_of_the_capacity_from_the_best_gain_and_from_the_worst_loss():
    outcomes = torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0], dtype=torch.float64)
    probabilities = torch.tensor([0.3, 0.05, 0.1, 0.35, 0.2], dtype=torch.float64)

    def felt(a, gamma):
        return a**gamma / (a**gamma + (1 - a) ** gamma) ** (1 / gamma)

    expected = [
        felt(0.6, 0.61) - felt(0.3, 0.61),  # the least gain
        felt(0.05, 0.69),  # the worst loss
        felt(0.1, 0.61),  # the best gain
        felt(0.4, 0.69) - felt(0.05, 0.69),
        felt(0.3, 0.61) - felt(0.1, 0.61),
    ]
    assert weighting(outcomes, probabilities).tolist() == pytest.approx(expected, abs=1e-12)


def test_unlikely_extremes_are_overweighted_and_the_typical_is_underweighted():
    outcomes = torch.linspace(-4, 4, 81, dtype=torch.float64)
    probabilities = torch.softmax(-outcomes.square() / 2, 0)
    ratio = weighting(outcomes, probabilities) / probabilities
    assert bool((ratio[outcomes.abs() > 2] > 1).all())
    assert bool((ratio[(outcomes.abs() > 0.2) & (outcomes.abs() < 0.8)] < 1).all())


def test_an_outcome_at_the_reference_point_counts_among_the_gains_and_changes_no_utility():
    outcomes = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    weights = weighting(outcomes, probabilities, z0=1.0)
    gains = capacity(torch.tensor([0.3, 0.8], dtype=torch.float64), 0.61)
    assert weights[1].item() == pytest.approx((gains[1] - gains[0]).item())
    assert weights[0].item() == pytest.approx(capacity(torch.tensor([0.2], dtype=torch.float64), 0.69).item())
    assert value(outcomes, z0=1.0)[1] == 0


def test_float32_probabilities_that_round_beside_1_still_give_weights_that_sum_to_1():
    probabilities = torch.softmax(torch.linspace(-3, 3, 5000), 0)
    weights = weighting(torch.arange(5000.0), probabilities)
    assert weights.dtype == torch.float32
    assert weights.double().sum().item() == pytest.approx(1, abs=1e-6)


def test_a_gain_is_worth_its_power_and_a_loss_of_the_same_size_2_25_times_as_much():
    z = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    assert value(z).tolist() == pytest.approx([0, 1, 4**0.88])
    torch.testing.assert_close(value(-z), -2.25 * value(z))
    torch.testing.assert_close(value(z + 3, z0=3.0), value(z))
    assert value(z, alpha=0.5, loss_aversion=1.0).tolist() == [0, 1, 2]
    assert value(-z, alpha=0.5, loss_aversion=1.0).tolist() == [0, -1, -2]


def test_a_better_outcome_is_worth_more():
    assert bool((value(torch.linspace(-6, 6, 1001, dtype=torch.float64), z0=0.3).diff() > 0).all())


# --- the bound of Proposition 3.4 -------------------------------------------------------------------------------------


@given(distributions(), st.data())
def test_the_gap_in_utility_never_exceeds_the_bound(distribution, data):
    outcomes, probabilities = distribution
    weights = weighting(outcomes, probabilities)
    omega = (weights / weights.sum()).tolist()
    n = len(omega)
    q = data.draw(st.lists(st.floats(1e-3, 1), min_size=n, max_size=n))
    q = [mass / sum(q) for mass in q]
    values = [z**0.88 if z >= 0 else -2.25 * (-z) ** 0.88 for z in outcomes.tolist()]

    gap = abs(sum((o - m) * v for o, m, v in zip(omega, q, values, strict=True)))
    kl = max(0.0, sum(o * math.log(o / m) for o, m in zip(omega, q, strict=True) if o > 0))
    max_value = max(map(abs, values))
    assert gap <= utility_gap_bound(kl, max_value) + 1e-7
    if max_value:
        assert kl >= largest_kl(gap, max_value) - 1e-7


def test_the_bound_is_nearly_reached_by_outcomes_of_opposite_value():
    # Two outcomes worth 1 and -1, omega = (0.5 + t, 0.5 - t), Q even: the gap is 2 t, the KL 2 t^2 + O(t^4).
    t = 1e-3
    kl = (0.5 + t) * math.log(1 + 2 * t) + (0.5 - t) * math.log(1 - 2 * t)
    assert utility_gap_bound(kl, 1.0) == pytest.approx(2 * t, rel=1e-5)


def test_the_largest_kl_is_the_one_whose_bound_is_the_gap():
    assert utility_gap_bound(largest_kl(0.3, 2.0), 2.0) == pytest.approx(0.3)
    assert math.sqrt(largest_kl(0.3, 2.0)) == pytest.approx(0.3 / (math.sqrt(2) * 2.0))
    assert largest_kl(0.3, 0.0) == math.inf


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: capacity(torch.tensor([0.5]), 0.0), "gamma: expected a positive number, got 0.0"),
        (lambda: capacity(torch.tensor([0.5]), -0.5), "gamma: expected a positive number, got -0.5"),
        (lambda: capacity(torch.tensor([0.5, 1.5]), 0.61), r"a: expected probabilities in \[0, 1\], got 1.5"),
        (lambda: capacity(torch.tensor([-0.5]), 0.61), r"a: expected probabilities in \[0, 1\], got -0.5"),
        (lambda: capacity(torch.tensor([math.nan]), 0.61), r"a: expected probabilities in \[0, 1\], got nan"),
        (
            lambda: weighting(torch.arange(2.0), torch.tensor([1.5, -0.5])),
            "probabilities: expected numbers of at least 0, got -0.5",
        ),
        (
            lambda: weighting(torch.arange(2.0), torch.tensor([0.5, 0.25])),
            "probabilities: expected a sum of 1, got 0.75",
        ),
        (
            lambda: weighting(torch.arange(2.0), torch.tensor([0.5, math.nan])),
            "probabilities: expected numbers of at least 0, got nan",
        ),
        (lambda: weighting(torch.arange(2.0), torch.tensor([0.5, 0.5]), gamma_losses=0.0), "gamma"),
        (lambda: value(torch.zeros(1), alpha=0.0), "alpha: expected a positive number, got 0.0"),
        (lambda: value(torch.zeros(1), loss_aversion=-1.0), "loss_aversion: expected a positive number, got -1.0"),
        (lambda: utility_gap_bound(-0.1, 1.0), "kl: expected a number of at least 0, got -0.1"),
        (lambda: utility_gap_bound(0.1, -1.0), "max_value: expected a number of at least 0, got -1.0"),
        (lambda: largest_kl(-0.1, 1.0), "gap: expected a number of at least 0, got -0.1"),
        (lambda: largest_kl(math.nan, 1.0), "gap: expected a number of at least 0, got nan"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(call, names):
    with pytest.raises(ConfigError, match=f"^{names}"):
        call()
