"""GRPO with the settings of the authors' maths runs, against their formulas written out in float64."""

import copy
import json
import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TEMPERATURE, BETA, EPSILON, EPS_A, ACCUMULATION, STEPS = 0.7, 1e-4, 0.2, 1e-4, 4, 4
# The bounds are the authors', and the first period. The others are shorter, so that a sync falls within the steps. The
# rates are such that the bounds bind.
SETTINGS = [((-1.5, 1.5), 12, 0.05), ((-1.5, 1.5), 2, 0.05), ((-0.1, 1.0), 2, 0.01), ((-0.1, 0.5), 3, 0.01)]


def groups(count):
    draw = random.Random(0)

    def tokens(most):
        return [draw.randrange(256) for _ in range(draw.randint(1, most))]

    scores = [8.0, 9.5, 0.25, 1.0, 0.0]  # as of the authors' rewards
    return [
        {"prompt": tokens(8), "responses": [tokens(9) for _ in range(4)], "scores": draw.sample(scores, 4)}
        for _ in range(count)
    ]


def exact(run, clip, sync_every, lr):
    """Returns loss, gradient norm and share of clipped tokens of each step: no rows, no pieces, no recipe."""
    config = LlamaConfig(**json.loads((run.folder / "model" / "config.json").read_text()))
    config._attn_implementation = "eager"
    policy = LlamaForCausalLM.from_pretrained(run.folder / "model", config=config, dtype=torch.float64)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    groups = [json.loads(line) for line in run.data.read_text().splitlines()]
    per_microbatch = len(groups) // STEPS // ACCUMULATION

    def log_probs(model, prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]

    found = []
    for step in range(1, STEPS + 1):
        loss: Any = 0.0
        clipped = moved = 0
        for _ in range(ACCUMULATION):
            terms: Any = 0.0
            tokens = 0
            for group in (groups.pop(0) for _ in range(per_microbatch)):
                scores = torch.tensor(group["scores"], dtype=torch.float64)
                advantages = (scores - scores.mean()) / (scores.std(correction=1) + EPS_A)
                for response, advantage in zip(group["responses"], advantages, strict=True):
                    log_ratio = log_probs(policy, group["prompt"], response)
                    log_ratio = log_ratio - log_probs(reference, group["prompt"], response).detach()
                    ratio = log_ratio.clamp(*clip).exp()
                    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
                    terms = terms + (BETA * ((-log_ratio).exp() + log_ratio - 1) - surrogate).sum()
                    tokens += len(response)
                    clipped += int(((log_ratio < clip[0]) | (log_ratio > clip[1])).sum())
                    moved += int((log_ratio != 0).sum())
            loss = loss + terms / tokens / ACCUMULATION
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if step % sync_every == 0:
            reference.load_state_dict(policy.state_dict())
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item(), clipped / max(1, moved)))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "sync_every", "lr"), SETTINGS)
@pytest.mark.parametrize("nproc", [1, 2], ids=["one process", "two FSDP2 ranks"])
def test_a_step_is_the_authors_formulas_in_float64(trajectory, clip, sync_every, lr, nproc):
    run = trajectory("grpo_8_k4")
    run.data.write_text("".join(json.dumps(group) + "\n" for group in groups(2 * ACCUMULATION * STEPS)))
    run.config |= {"temperature": TEMPERATURE, "batch_size": 2 // nproc, "gradient_accumulation_steps": ACCUMULATION}
    run.config["loss"] |= {"beta": BETA, "log_eps_P": clip[0], "log_eps_R": clip[1], "aggregation": "token"}
    run.config["loss"] |= {"advantage_std": "sample", "advantage_eps": EPS_A}
    run.config["reference"]["sync_every"] = sync_every
    run.config["optimizer"] |= {"lr": lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    run.train_on(nproc)
    losses, norms, clipped = exact(run, clip, sync_every, lr)
    assert list(run.log().values()) == pytest.approx(losses, abs=1e-5)
    assert list(run.log("grad_norm").values()) == pytest.approx(norms, rel=1e-4)
    assert [1 - share for share in run.log("unclamped").values()] == pytest.approx(clipped[1:], abs=1e-6)
    assert max(clipped) > 0  # the clip binds
