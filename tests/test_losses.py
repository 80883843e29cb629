"""The losses against the values of the authors' code, and the properties that define the clip."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from humanline.errors import ConfigError
from humanline.losses import HumanlineDPOLoss, humanline_clip, unclamped

CASES = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["cases"]
DPO_CASES = [case for case in CASES if case["objective"] == "dpo"]

nats = st.floats(-8, 8, width=32)


@pytest.mark.parametrize("case", DPO_CASES, ids=lambda case: f"seed{case['seed']}")
def test_dpo_equals_the_authors_code(case):
    sides = ("chosen", "rejected")
    policy = [torch.tensor(case[f"policy_{side}_logps"], requires_grad=True) for side in sides]
    reference = [torch.tensor(case[f"reference_{side}_logps"]) for side in sides]
    masks = [torch.tensor(case[f"{side}_mask"]).bool() for side in sides]
    bounds = (case["log_eps_P"], case["log_eps_R"]) if case["humanline"] else (None, None)

    losses, *rewards = HumanlineDPOLoss(case["beta"], *bounds)(*policy, *reference, *masks)
    losses.mean().backward()

    torch.testing.assert_close(losses, torch.tensor(case["losses"]), atol=1e-6, rtol=0)
    for side, reward, logps, reference_logps, mask in zip(sides, rewards, policy, reference, masks, strict=True):
        torch.testing.assert_close(reward, torch.tensor(case[f"{side}_rewards"]), atol=1e-6, rtol=0)
        # The authors' inputs are zero off the mask and their gradients there are of no token; ours are zero.
        golden = torch.tensor(case[f"grad_policy_{side}"]).where(mask, 0.0)
        torch.testing.assert_close(logps.grad, golden, atol=1e-6, rtol=0)
        inside, moved = unclamped(logps.detach() - reference_logps, mask, *bounds)
        assert float(inside / moved) == pytest.approx(case[f"{side}_unclamped"], abs=1e-6)


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


def test_what_stands_off_the_mask_changes_neither_loss_nor_gradient():
    logps, mask = -torch.rand(2, 4), torch.tensor([[True, True, False, False], [True, True, True, False]])
    junk = logps.masked_fill(~mask, float("nan"))
    results = []
    for policy in (logps, junk):
        policy = policy.clone().requires_grad_()
        losses, *_ = HumanlineDPOLoss()(policy, policy * 2, logps, logps, mask, mask)
        losses.sum().backward()
        results.append((losses.detach(), policy.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][mask], results[1][1][mask])


def test_label_smoothing_mixes_the_losses_of_both_labels():
    chosen, rejected, zero = torch.tensor([[0.7]]), torch.tensor([[-0.4]]), torch.zeros(1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    margin = 0.1 * 1.1
    loss, *_ = HumanlineDPOLoss(label_smoothing=0.2)(chosen, rejected, zero, zero, mask, mask)
    log_sigmoid = lambda z: -math.log1p(math.exp(-z))  # noqa: E731
    assert loss.item() == pytest.approx(-0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"log_eps_P": 1.5, "log_eps_R": -1.5}, "loss.log_eps_P: 1.5 is not below log_eps_R"),
        ({"log_eps_P": 0.5, "log_eps_R": 0.5}, "loss.log_eps_P"),
        ({"log_eps_R": "1.5"}, "loss.log_eps_R: '1.5' is not a number"),
        ({"beta": 0.0}, "loss.beta"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, names):
    with pytest.raises(ConfigError, match=names):
        HumanlineDPOLoss(**settings)
