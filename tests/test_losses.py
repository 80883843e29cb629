"""The losses against the values of the authors' code, and the properties that define them."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from humanline.errors import ConfigError
from humanline.losses import (
    HumanlineDPOLoss,
    HumanlineGRPOLoss,
    HumanlineKTOLoss,
    group_advantages,
    humanline_clip,
    unclamped,
)
from humanline.perception import humanline_sample

CASES = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["cases"]
DPO_CASES, KTO_CASES, GRPO_CASES = ([case for case in CASES if case["objective"] == o] for o in ("dpo", "kto", "grpo"))

nats = st.floats(-8, 8, width=32)


every_case = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: f"seed{case['seed']}")


def clip_of(case):
    return (case["log_eps_P"], case["log_eps_R"]) if case["humanline"] else (None, None)


def sides(case, key, names):
    """The golden tensors of both sides, one after the other; either may have no rows."""
    return torch.cat([torch.tensor(case[key.format(name)]).reshape(-1, 12) for name in names])


def assert_close(ours, golden):
    torch.testing.assert_close(ours, torch.as_tensor(golden), atol=1e-6, rtol=0)


@every_case(DPO_CASES)
def test_dpo_equals_the_authors_code(case):
    sides = ("chosen", "rejected")
    policy = [torch.tensor(case[f"policy_{side}_logps"], requires_grad=True) for side in sides]
    reference = [torch.tensor(case[f"reference_{side}_logps"]) for side in sides]
    masks = [torch.tensor(case[f"{side}_mask"]).bool() for side in sides]
    bounds = clip_of(case)

    losses, *rewards = HumanlineDPOLoss(case["beta"], *bounds)(*policy, *reference, *masks)
    losses.mean().backward()

    assert_close(losses, case["losses"])
    for side, reward, logps, reference_logps, mask in zip(sides, rewards, policy, reference, masks, strict=True):
        assert_close(reward, case[f"{side}_rewards"])
        # The authors' inputs are zero off the mask and their gradients there are of no token; ours are zero.
        golden = torch.tensor(case[f"grad_policy_{side}"]).where(mask, 0.0)
        assert_close(logps.grad, golden)
        inside, moved = unclamped(logps.detach() - reference_logps, mask, *bounds)
        assert float(inside / moved) == pytest.approx(case[f"{side}_unclamped"], abs=1e-6)


@every_case(KTO_CASES)
def test_kto_equals_the_authors_code(case):
    kinds = ("desirable", "undesirable")
    policy = sides(case, "policy_{}_logps", kinds).requires_grad_()
    reference = sides(case, "reference_{}_logps", kinds)
    mask = sides(case, "{}_mask", kinds).bool()
    desirable = torch.arange(len(mask)) < len(case["desirable_mask"])
    weights = {key: case[key] for key in ("desirable_weight", "undesirable_weight")}
    loss = HumanlineKTOLoss(case["beta"], *clip_of(case), **weights)

    policy_kl, reference_kl = (torch.tensor(case[f"{model}_kl_logps"]) for model in ("policy", "reference"))
    kl = loss.kl_baseline(policy_kl.requires_grad_(), reference_kl, torch.tensor(case["kl_mask"]).bool())
    losses, rewards = loss(policy, reference, mask, desirable, kl)
    losses.mean().backward()

    assert_close(kl, case["kl"])
    assert_close(losses, case["losses"])
    assert_close(rewards, case["desirable_rewards"] + case["undesirable_rewards"])
    assert_close(policy.grad, sides(case, "grad_policy_{}", kinds).where(mask, 0.0))
    assert policy_kl.grad is None


@every_case(GRPO_CASES)
def test_grpo_equals_the_authors_code(case):
    policy = torch.tensor(case["policy_logps"], requires_grad=True)
    reference, mask = torch.tensor(case["reference_logps"]), torch.tensor(case["mask"]).bool()
    advantages = group_advantages(torch.tensor(case["scores"]), torch.tensor(case["group_ids"]), case["advantage_eps"])
    epsilons = {"epsilon_low": case["epsilon"], "epsilon_high": case["epsilon"]}

    loss = HumanlineGRPOLoss(case["beta"], *clip_of(case), **epsilons)(policy, reference, mask, advantages)
    loss.backward()

    assert_close(advantages, case["advantages"])
    assert_close(loss, case["loss"])
    assert_close(policy.grad, torch.tensor(case["grad_policy"]).where(mask, 0.0))


@given(st.lists(nats, min_size=1), st.floats(-3, -0.01), st.floats(0.01, 3))
def test_the_clip_keeps_values_inside_and_stops_gradients_outside(log_ratios, low, high):
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    clipped = humanline_clip(log_ratio, low, high)
    clipped.sum().backward()
    inside = (log_ratio > low) & (log_ratio < high)
    outside = (log_ratio < low) | (log_ratio > high)
    assert torch.equal(clipped[inside], log_ratio[inside])
    assert bool(((clipped >= low) & (clipped <= high)).all())
    assert bool((log_ratio.grad[inside] == 1).all())
    assert bool((log_ratio.grad[outside] == 0).all())


def test_the_clip_may_be_one_sided_or_absent():
    log_ratio = torch.tensor([-9.0, 9.0])
    assert humanline_clip(log_ratio, None, None).tolist() == [-9.0, 9.0]
    assert humanline_clip(log_ratio, -1.5, None).tolist() == [-1.5, 9.0]
    assert humanline_clip(log_ratio, None, 1.5).tolist() == [-9.0, 1.5]


def test_a_policy_equal_to_its_reference_has_loss_ln_2():
    logps, mask = -torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool)
    losses, chosen, rejected = HumanlineDPOLoss()(logps, logps, logps, logps, mask, mask)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    assert not chosen.any() and not rejected.any()


def test_label_smoothing_mixes_the_losses_of_both_labels():
    chosen, rejected, zero = torch.tensor([[0.7]]), torch.tensor([[-0.4]]), torch.zeros(1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    margin = 0.1 * 1.1
    loss, *_ = HumanlineDPOLoss(label_smoothing=0.2)(chosen, rejected, zero, zero, mask, mask)
    log_sigmoid = lambda z: -math.log1p(math.exp(-z))  # noqa: E731
    assert loss.item() == pytest.approx(-0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin), abs=1e-6)


def random_responses(responses=4, length=6):
    """Token log-probs of policy and reference, far enough apart for every clip to bind, and a mask of ragged ends."""
    torch.manual_seed(0)
    policy = -3 * torch.rand(responses, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (responses,))[:, None]
    return policy.requires_grad_(), -3 * torch.rand(responses, length), mask


@pytest.mark.parametrize("label", [True, False])
def test_kto_takes_examples_of_one_kind_only(label):
    policy, reference, mask = random_responses()
    losses, _ = HumanlineKTOLoss()(policy, reference, mask, torch.full((4,), label), torch.tensor(0.3))
    losses.mean().backward()
    # A likelier desirable response lowers the loss, a likelier undesirable one raises it.
    inside = mask & ((policy - reference).abs() < 1.5)
    assert bool((policy.grad[inside] < 0).all() if label else (policy.grad[inside] > 0).all())
    assert not policy.grad[~inside].any()


def test_the_kl_baseline_counts_only_sequences_with_tokens():
    policy, reference = torch.tensor([[0.0, 0.0], [0.9, 0.5]]), torch.zeros(2, 2)
    loss = HumanlineKTOLoss()
    both, second = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[False, False], [True, True]])
    assert loss.kl_baseline(policy, reference, both).item() == pytest.approx(0.7)
    assert loss.kl_baseline(policy, reference, second).item() == pytest.approx(1.4)
    assert loss.kl_baseline(policy, reference, ~both).item() == 0.0
    assert loss.kl_baseline(-policy, reference, both).item() == 0.0


def test_kto_weights_scale_the_losses_of_their_kind():
    policy, reference, mask = random_responses()
    desirable, kl = torch.tensor([True, True, False, False]), torch.tensor(0.1)
    plain, _ = HumanlineKTOLoss()(policy, reference, mask, desirable, kl)
    weighted, _ = HumanlineKTOLoss(desirable_weight=1.1, undesirable_weight=0.5)(policy, reference, mask, desirable, kl)
    torch.testing.assert_close(weighted, plain * torch.tensor([1.1, 1.1, 0.5, 0.5]))


def test_grpo_aggregations_differ_in_what_they_take_the_mean_of():
    policy, reference = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, 0.0, 0.0]]), torch.full((2, 3), -1.0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([1.0, -1.0])
    # Tokens of ratio 1 lose -A; the last one has ratio exp(-1), held at 0.8 where its advantage is negative.
    losses = {name: HumanlineGRPOLoss(beta=0.0, aggregation=name) for name in ("token", "sequence", "dapo")}
    losses["fixed"] = HumanlineGRPOLoss(beta=0.0, aggregation="fixed", fixed_length=5)
    value = {name: loss(policy, reference, mask, advantages).item() for name, loss in losses.items()}
    assert value["token"] == value["dapo"] == pytest.approx((-3 + 0.8) / 4)
    assert value["sequence"] == pytest.approx((-1 + 0.8) / 2)
    assert value["fixed"] == pytest.approx((-3 + 0.8) / 5 / 2)
    lengths = [[3, 1, 0], [4]]  # of two microbatches
    divisors = {name: loss.divisors(lengths) for name, loss in losses.items()}
    assert divisors == {"token": [8, 8], "dapo": [8, 8], "sequence": [4, 2], "fixed": [4, 2]}
    halves = [
        losses["dapo"].total(policy[i : i + 1], reference[:1], mask[i : i + 1], advantages[i : i + 1]) for i in (0, 1)
    ]
    assert sum(halves).item() / 4 == pytest.approx(value["dapo"])


def test_grpo_s_kl_is_of_the_unclipped_ratio():
    policy, reference = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-4.0]])
    loss = HumanlineGRPOLoss(beta=1.0)(policy, reference, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-3) + 3 - 1)
    assert policy.grad.item() == pytest.approx(1 - math.exp(-3))


@pytest.mark.parametrize("perception", ["clip", "none"])
@pytest.mark.parametrize(("policy", "reference"), [(-200.0, 0.0), (0.0, -200.0)], ids=["impossible", "certain"])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_token_that_became_impossible_or_certain_does_not_poison_grpo(perception, policy, reference, advantage):
    policy, reference = torch.tensor([[policy]], requires_grad=True), torch.tensor([[reference]])
    loss = HumanlineGRPOLoss(beta=0.0, perception=perception)
    loss = loss(policy, reference, torch.ones(1, 1, dtype=torch.bool), torch.tensor([advantage]))
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(policy.grad.item())


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e3, 1e3)), min_size=1, max_size=20), st.floats(-1e6, 1e6))
def test_advantages_are_centred_and_scaled_within_each_group(pairs, shift):
    groups, scores = (torch.tensor(values) for values in zip(*pairs, strict=True))
    scores = scores.double()
    advantages = group_advantages(scores, groups)
    shifted = group_advantages(scores + shift, groups)
    torch.testing.assert_close(advantages, shifted, atol=1e-4, rtol=1e-4)  # scores have no zero point
    for group in groups.unique():
        ours, theirs = advantages[groups == group].double(), scores[groups == group]
        expected = (theirs - theirs.mean()) / (theirs.std(correction=0) + 0.01)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10)), min_size=1, max_size=20),
    st.sampled_from(["population", "sample", "none"]),
    st.sampled_from([0.01, 1e-4, 1.0]),
)
def test_advantages_divide_by_the_chosen_standard_deviation(pairs, std, eps):
    groups = torch.tensor([group for group, _ in pairs])
    scores = torch.tensor([score for _, score in pairs], dtype=torch.float64)
    found = HumanlineGRPOLoss(advantage_std=std, advantage_eps=eps).advantages(scores, groups)
    for group in groups.unique():
        mine = [score for g, score in pairs if g == group]
        mean = math.fsum(mine) / len(mine)
        squares = math.fsum((score - mean) ** 2 for score in mine)
        by = {
            "population": math.sqrt(squares / len(mine)) + eps,
            "sample": math.sqrt(squares / max(1, len(mine) - 1)) + eps,
            "none": 1,
        }[std]
        expected = [(score - mean) / by for score in mine]
        assert found[groups == group].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_groups_of_one_and_of_equal_scores_have_no_advantage(std):
    scores, groups = torch.tensor([3.0, 5.0, 5.0]), torch.tensor([0, 1, 1])
    assert group_advantages(scores, groups, eps=0.0, std=std).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "mean"}, "loss.aggregation: expected token, sequence, dapo or fixed, got 'mean'"),
        (
            {"aggregation": "fixed"},
            "loss.fixed_length: expected the maximum length of a response, tokens with aggregation",
        ),
        ({"fixed_length": 2048}, "loss.fixed_length: expected null with aggregation: token, got 2048"),
        ({"aggregation": "fixed", "fixed_length": 0}, "loss.fixed_length: expected at least 1 token, got 0"),
        ({"advantage_std": "group"}, "loss.advantage_std: expected population, sample or none, got 'group'"),
        ({"advantage_eps": -0.1}, "loss.advantage_eps: got -0.1, expected a number of at least 0"),
    ],
)
def test_a_variant_of_grpo_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        HumanlineGRPOLoss(**settings)


def losses_of(settings):
    """Each loss as a function of policy, reference, mask and draws ``[2, 4, S]``, with the same perception."""
    dpo, kto, grpo = HumanlineDPOLoss(**settings), HumanlineKTOLoss(**settings), HumanlineGRPOLoss(**settings)
    labels, advantages = torch.tensor([True, False, True, False]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    return {
        "dpo": lambda p, r, m, d: dpo(p[:2], p[2:], r[:2], r[2:], m[:2], m[2:], d[:, :2], d[:, 2:])[0].mean(),
        "kto": lambda p, r, m, d: kto(p, r, m, labels, torch.tensor(0.2), d)[0].mean(),
        "grpo": lambda p, r, m, d: grpo(p, r, m, advantages, d),
    }


BOUNDS = {"log_eps_P": -0.4, "log_eps_R": 0.4}


PERCEPTIONS = {
    "clip": BOUNDS,
    "sample": BOUNDS | {"perception": "sample", "gamma_P": 2.0, "gamma_R": 5.0},
    "none": {"perception": "none"},
}


@pytest.mark.parametrize("perception", PERCEPTIONS)
@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e4])
def test_what_stands_off_the_mask_changes_neither_loss_nor_gradient(objective, perception, junk):
    policy, reference, mask = random_responses()
    draws = torch.rand(2, *policy.shape)
    loss = losses_of(PERCEPTIONS[perception])[objective]
    results = []
    for values in (policy, policy.detach().masked_fill(~mask, junk).requires_grad_()):
        value = loss(values, reference, mask, draws)
        results.append((value, *torch.autograd.grad(value, values)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and not results[1][1][~mask].any()


def test_what_stands_off_the_mask_does_not_change_the_kl_baseline():
    policy, reference, mask = random_responses()
    junk = policy.masked_fill(~mask, float("nan"))
    for settings in PERCEPTIONS.values():
        loss = HumanlineKTOLoss(**settings)
        assert loss.kl_baseline(junk, reference, mask) == loss.kl_baseline(policy, reference, mask) > 0


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_sampling_keeps_every_loss_s_value_and_stops_rejected_tokens_gradients(objective):
    policy, reference, mask = random_responses()
    draws = torch.rand(2, *policy.shape)
    gammas = {"gamma_P": 2.0, "gamma_R": 5.0}
    sampled = losses_of(BOUNDS | gammas | {"perception": "sample"})[objective](policy, reference, mask, draws)
    plain = losses_of({"perception": "none"})[objective](policy, reference, mask, draws)
    torch.testing.assert_close(sampled, plain)

    log_ratio = (policy - reference).detach().requires_grad_()
    kept = humanline_sample(log_ratio, **BOUNDS, **gammas, draws=draws)
    (accepted,) = torch.autograd.grad(kept.sum(), log_ratio)
    # GRPO's KL to the reference is of the log-ratio as it is, so that it reaches rejected tokens.
    kl = 0.0
    if objective == "grpo":
        kl = 0.01 * (1 - (reference - policy).detach().exp()).where(mask, 0.0) / mask.sum()
    ours, whole = (torch.autograd.grad(loss, policy)[0] for loss in (sampled, plain))
    torch.testing.assert_close(ours - kl, (whole - kl) * accepted, atol=1e-7, rtol=1e-5)
    assert 0 < accepted[mask].sum() < mask.sum()


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_sampling_keeps_every_loss_s_value_without_gradient_too(objective):
    policy, reference, mask = random_responses()
    draws = torch.rand(2, *policy.shape)
    with torch.no_grad():
        value = {name: losses_of(each)[objective](policy, reference, mask, draws) for name, each in PERCEPTIONS.items()}
    assert value["sample"] == value["none"] != value["clip"]


def test_sampling_keeps_the_kl_baseline():
    policy, reference = torch.tensor([[2.0, 1.0], [0.5, 0.0]]), torch.zeros(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    baseline = {
        name: HumanlineKTOLoss(**settings).kl_baseline(policy, reference, mask).item()
        for name, settings in PERCEPTIONS.items()
    }
    assert baseline == {"sample": 1.75, "none": 1.75, "clip": pytest.approx(0.6)}


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_sampling_with_large_gammas_has_the_gradients_of_a_detached_clip(objective):
    policy, reference, mask = random_responses()
    draws = torch.rand(2, *policy.shape)
    sampled = losses_of(BOUNDS | {"perception": "sample", "gamma_P": 1e6, "gamma_R": 1e6})[objective]
    (gradient,) = torch.autograd.grad(sampled(policy, reference, mask, draws), policy)
    kl = 0.0
    if objective == "grpo":
        kl = 0.01 * (1 - (reference - policy).detach().exp()).where(mask, 0.0) / mask.sum()
    plain = losses_of({"perception": "none"})[objective](policy, reference, mask, draws)
    (whole,) = torch.autograd.grad(plain, policy)
    left_alone = mask & ((policy - reference).abs() < 0.4)
    assert 0 < left_alone.sum() < mask.sum()
    torch.testing.assert_close(gradient - kl, (whole - kl).where(left_alone, 0.0), atol=1e-7, rtol=1e-5)


def test_perception_none_ignores_the_bounds():
    policy, reference, mask = random_responses()
    draws = torch.rand(2, *policy.shape)
    for name, loss in losses_of(BOUNDS | {"perception": "none"}).items():
        unbounded = losses_of({"log_eps_P": None, "log_eps_R": None})[name]
        assert loss(policy, reference, mask, draws) == unbounded(policy, reference, mask, draws)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"log_eps_P": 1.5, "log_eps_R": 2.5}, "loss.log_eps_P: got 1.5, expected a number of at most 0 nats"),
        ({"log_eps_R": -0.5}, "loss.log_eps_R: got -0.5, expected a number of at least 0 nats"),
        ({"log_eps_R": "1.5"}, "loss.log_eps_R: got '1.5', expected a number"),
        ({"beta": 0.0}, "loss.beta"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, names):
    with pytest.raises(ConfigError, match=names):
        HumanlineDPOLoss(**settings)


@pytest.mark.parametrize("loss", [HumanlineDPOLoss, HumanlineKTOLoss, HumanlineGRPOLoss])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perception": "squint"}, "loss.perception: expected clip, sample or none, got 'squint'"),
        ({"gamma_P": 2.0}, "loss.gamma_P: 2.0 has no effect with perception: clip"),
        ({"perception": "none", "gamma_R": 2.0}, "loss.gamma_R: 2.0 has no effect with perception: none"),
        ({"perception": "sample", "gamma_P": 2.0}, "loss.gamma_R: got None, expected a number above 0"),
        ({"perception": "sample", "gamma_P": 0, "gamma_R": 1.0}, "loss.gamma_P: got 0, expected a number above 0"),
        (
            {"perception": "sample", "log_eps_P": None, "gamma_P": 2.0, "gamma_R": 2.0},
            "loss.gamma_P: 2.0 has no effect with log_eps_P: null",
        ),
        (
            {"perception": "sample", "log_eps_P": None, "log_eps_R": None},
            "loss.perception: sample rejects nothing without bounds",
        ),
        (
            {"log_eps_P": 0.8, "log_eps_R": 1.2},
            "loss.log_eps_P: got 0.8, expected a number of at most 0 nats (bounds are log",
        ),
        ({"log_eps_P": 0, "log_eps_R": 0}, "loss.log_eps_P: 0 with log_eps_R: 0 clips everything"),
    ],
)
def test_contradictory_perception_is_refused_by_every_loss(loss, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loss(**settings)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (HumanlineDPOLoss, {"beta": None}, "loss.beta: got None, expected a number above 0"),
        (HumanlineKTOLoss, {"beta": 0}, "loss.beta: got 0, expected a number above 0"),
        (HumanlineKTOLoss, {"desirable_weight": "1"}, "loss.desirable_weight: got '1', expected a number above 0"),
        (HumanlineKTOLoss, {"undesirable_weight": -1}, "loss.undesirable_weight: got -1, expected a number above 0"),
        (HumanlineGRPOLoss, {"beta": -0.1}, "loss.beta: got -0.1, expected a number of at least 0"),
        (HumanlineGRPOLoss, {"epsilon_low": 1.0}, "loss.epsilon_low: got 1.0, expected a number in (0, 1)"),
        (HumanlineGRPOLoss, {"epsilon_high": math.inf}, "loss.epsilon_high: got inf, expected a number above 0"),
    ],
)
def test_kto_and_grpo_refuse_what_cannot_work_by_name(loss, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loss(**settings)
