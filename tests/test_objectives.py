"""KTO and GRPO as their recipes run them: what they take from a dataset, and what they compute over all ranks."""

import json
import math
import re
import shutil

import hypothesis
import pytest
import torch
from conftest import loss_and_metrics
from hypothesis import given
from hypothesis import strategies as st

from humanline.data import Group, GroupDataset, RowBudget, TokenBudget, lay_out, pack, parts
from humanline.errors import ConfigError
from humanline.losses import HumanlineDPOLoss, HumanlineGRPOLoss, HumanlineKTOLoss
from humanline.training import DPO, GRPO, KTO
from humanline.training._draws import uniform_draws

pytestmark = pytest.mark.slow

SAMPLE = {"perception": "sample", "gamma_P": 2.0, "gamma_R": 2.0}


def sequence(group, response=None):
    """Token ids that say where they are from."""
    return [group] * 3 if response is None else [100 * group + response] * (2 + response)


def labelled(*sizes):
    return [
        Group(sequence(g), tuple(sequence(g, i) for i in range(size)), labels=(True, *[False] * (size - 1)), id=str(g))
        for g, size in enumerate(sizes)
    ]


# ---- KTO's KL sequences


def kl_pairs(groups, dataset=None):
    made = KTO(HumanlineKTOLoss()).kl_groups(groups, (dataset or GroupDataset(groups)).budget)
    return [(group.prompt, response) for group in made for response in group.responses]


def test_a_kl_sequence_is_a_prompt_with_the_next_example_s_response():
    groups = labelled(1, 1, 1)
    assert kl_pairs(groups) == [
        (sequence(0), sequence(1, 0)),
        (sequence(1), sequence(2, 0)),
        (sequence(2), sequence(0, 0)),
    ]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=8))
def test_every_response_is_in_one_kl_sequence_and_every_prompt_in_as_many_as_it_has_responses(sizes):
    groups = labelled(*sizes)
    prompts, responses = zip(*kl_pairs(groups), strict=True)
    assert sorted(responses) == sorted(response for group in groups for response in group.responses)
    assert [prompts.count(group.prompt) for group in groups] == sizes


@given(st.integers(2, 6), st.integers(1, 4))
def test_responses_meet_the_prompt_of_another_group_where_groups_are_equally_large(count, size):
    for prompt, response in kl_pairs(labelled(*[size] * count)):
        assert response[0] // 100 != prompt[0]


def test_kl_sequences_are_cut_as_the_dataset_s_own():
    groups = [Group([1] * 8, ([2],), labels=(True,)), Group([3], ([4] * 9,), labels=(False,))]
    dataset = GroupDataset(groups, budget=TokenBudget(max_tokens=10, max_prompt_tokens=4))
    (long_prompt, long_response), (short, _) = kl_pairs(groups, dataset)
    assert len(long_prompt) == 4 and list(long_response) == [4] * 6
    assert short == [3]


prompts_and_responses = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=2, max_size=6)


@given(prompts_and_responses, st.integers(10, 40), st.integers(2, 9))
def test_no_kl_sequence_is_longer_than_the_longest_that_set_up_checks(lengths, max_tokens, max_prompt_tokens):
    budget = TokenBudget(max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens)
    groups = [budget.fit(Group([1] * prompt, ([2] * response,), labels=(True,))) for prompt, response in lengths]
    dataset = GroupDataset(groups, budget=budget)
    longest = KTO(HumanlineKTOLoss()).longest_kl_group(dataset)
    limit = len(longest.prompt) + len(longest.responses[0])
    assert limit <= max_tokens
    for first in groups:
        for second in groups:
            assert all(len(prompt) + len(response) <= limit for prompt, response in kl_pairs([first, second], dataset))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(16, 40))
def test_a_group_cut_into_parts_loses_nothing_and_each_part_fits_a_row(lengths, tokens_per_row):
    budget = RowBudget(tokens_per_row=tokens_per_row)
    responses = tuple([i] * length for i, length in enumerate(lengths))
    numbers = tuple(range(len(lengths)))
    group = Group([1] * 5, responses, scores=numbers, labels=tuple(i % 2 == 0 for i in numbers), id="a")
    cut = parts(group, budget)
    assert [response for part in cut for response in part.responses] == list(group.responses)
    assert [label for part in cut for label in part.labels] == list(group.labels)
    assert [score for part in cut for score in part.scores] == list(group.scores)
    for part in cut:
        assert part.prompt == group.prompt and len(pack([part], budget)) == 1


# ---- What a loss is a mean over


def scored(*lengths):
    return Group([1, 2], tuple([3] * n for n in lengths), scores=tuple(float(i) for i in range(len(lengths))))


BATCH = [[scored(2, 3), scored(1, 1, 5)], [scored(7, 7), scored(1, 2)]]


@pytest.mark.parametrize(
    ("objective", "divisors"),
    [
        (DPO(HumanlineDPOLoss()), [4, 4]),
        (KTO(HumanlineKTOLoss()), [10, 8]),
        (GRPO(HumanlineGRPOLoss(aggregation="token")), [24, 34]),
        (GRPO(HumanlineGRPOLoss(aggregation="sequence")), [10, 8]),
        (GRPO(HumanlineGRPOLoss(aggregation="dapo")), [29, 29]),
    ],
)
def test_what_each_microbatch_of_two_is_divided_by(objective, divisors):
    assert objective.divisors(BATCH) == divisors


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dapo"])
def test_the_sum_over_passes_by_the_divisor_is_the_loss_of_the_whole(aggregation):
    torch.manual_seed(0)
    objective = GRPO(HumanlineGRPOLoss(aggregation=aggregation))
    call = loss_and_metrics(objective.loss)
    groups = objective.examples(GroupDataset(BATCH[0])).groups
    budget = RowBudget(tokens_per_row=16, rows_per_pass=2)
    count = sum(len(response) for group in groups for response in group.responses)
    policy, reference = -torch.rand(count), -torch.rand(count)

    def loss(subset, values):
        rows = lay_out(subset, pack(subset, budget)[0], budget)
        return call(*values, rows, None)[0]

    whole = loss(groups, (policy, reference)) / objective.divisors([groups])[0]
    first = sum(map(len, groups[0].responses))
    pieces = (
        loss(groups[:1], (policy[:first], reference[:first])) + loss(groups[1:], (policy[first:], reference[first:]))
    ) / objective.divisors([groups])[0]
    rows = lay_out(groups, pack(groups, budget)[0], budget)
    advantages = torch.tensor([-1 / 1.02, 1 / 1.02, *(torch.tensor([-1.0, 0.0, 1.0]) / ((2 / 3) ** 0.5 + 0.01))])
    definition = objective.loss(rows.per_response(policy), rows.per_response(reference), rows.mask, advantages)
    torch.testing.assert_close(whole, definition)
    torch.testing.assert_close(pieces, definition)


# ---- What is logged of a pass


def measured(loss, group, policy, reference):
    rows = lay_out([group], pack([group], RowBudget())[0], RowBudget())
    policy = torch.tensor(policy, requires_grad=True)
    kl = {"kl": torch.tensor(0.2)} if isinstance(loss, HumanlineKTOLoss) else {}
    return loss_and_metrics(loss)(policy, torch.tensor(reference), rows, None, **kl)[1]


def test_kto_s_gain_is_how_far_rewards_lie_on_their_label_s_side_of_the_baseline():
    group = Group([1], ([2], [3, 4]), labels=(True, False))
    metrics = measured(HumanlineKTOLoss(), group, [-0.5, -2.0, -1.0], [-1.0, -1.5, -0.5])
    total, count = metrics["rewards/gain"]
    assert total.item() == pytest.approx((0.5 - 0.2) + (0.2 + 1.0)) and count == 2
    desirable, undesirable = (metrics[f"rewards/{kind}"] for kind in ("desirable", "undesirable"))
    assert desirable == (pytest.approx(0.5), 1) and undesirable == (pytest.approx(-1.0), 1)


@pytest.mark.parametrize(
    "loss", [HumanlineDPOLoss(), HumanlineKTOLoss(), HumanlineGRPOLoss()], ids=["dpo", "kto", "grpo"]
)
def test_what_is_logged_carries_no_gradient(loss):
    group = Group([1], ([2], [3, 4]), scores=(1.0, 0.0), advantages=(1.0, -1.0), labels=(True, False))
    metrics = measured(loss, group, [-0.5, -2.0, -1.0], [-1.0, -1.5, -0.5])
    assert {"kl", "unclamped", "log_probs/accuracies"} <= metrics.keys()
    assert not any(torch.as_tensor(number).requires_grad for pair in metrics.values() for number in pair)


# ---- Sampling's draws


def test_a_response_s_draws_depend_on_its_place_in_the_run_and_on_nothing_else():
    groups = [scored(2, 3), scored(1, 4), scored(6, 1)]
    budget = RowBudget(tokens_per_row=64)

    def draws(subset, first_responses, **place):
        rows = lay_out(subset, pack(subset, budget)[0], budget)
        return uniform_draws(rows, **({"seed": 1, "step": 3, "microbatch": 0} | place), first_responses=first_responses)

    together = draws(groups, [0, 2, 4])
    assert together.shape == (2, 17) and bool(((together >= 0) & (together < 1)).all())
    assert torch.equal(together, draws(groups, [0, 2, 4]))
    assert torch.equal(together[:, 5:], draws(groups[1:], [2, 4]))  # as on another rank
    cut = [groups[0].part([0]), groups[0].part([1]), *groups[1:]]
    assert torch.equal(together, draws(cut, [0, 1, 2, 4]))  # as in other passes
    for place in ({"seed": 2}, {"step": 4}, {"microbatch": 1}):
        assert not (draws(groups, [0, 2, 4], **place) == together).any()


# ---- Real runs


def write_examples(run, examples):
    """Replaces a run's data, one batch after the other."""
    run.data.write_text("".join(run.line(example) for example in examples))


def one_and_two_ranks(run, *overrides):
    """The losses of a run on one process and on two ranks with the same global batch."""
    run.train_on(1, *overrides)
    one = run.log()
    (run.folder / "logs" / "log.txt").unlink()
    shutil.rmtree(run.folder / "out")
    run.config["batch_size"] //= 2
    run.train_on(2, *overrides)
    return one, run.log()


def test_kto_with_all_desirable_examples_on_one_rank_equals_one_process(trajectory):
    run = trajectory("kto_8_k4")
    examples = [
        example | {"desirable": i < 2} for batch in run.golden["batches"] for i, example in enumerate(batch)
    ]  # of each batch of four the first two, which are the first rank's
    write_examples(run, examples)
    one, two = one_and_two_ranks(run)
    assert len(one) == 12 and one == pytest.approx(two, abs=1e-5)
    assert len(set(one.values())) == 12


def test_kto_with_whole_batches_of_one_kind_equals_one_process(trajectory):
    run = trajectory("kto_8_k4")
    examples = [
        example | {"desirable": b % 2 == 0} for b, batch in enumerate(run.golden["batches"]) for example in batch
    ]
    write_examples(run, examples)
    one, two = one_and_two_ranks(run)
    assert one == pytest.approx(two, abs=1e-5)
    assert one[1] == pytest.approx(1.1 / 2, abs=1e-6)


def test_kto_on_groups_of_several_responses_equals_one_process(trajectory):
    run = trajectory("grpo_8_k4")
    run.recipe = run.recipe.with_name("humanline_kto_distributed.py")
    run.config["loss"] = {"_component_": "humanline.losses.HumanlineKTOLoss", "log_eps_P": -0.05, "log_eps_R": 0.05}
    run.config |= {"batch_size": 4, "rows_per_pass": 1, "gradient_accumulation_steps": 2}
    one, two = one_and_two_ranks(run)
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dapo"])
def test_grpo_with_unequal_token_counts_equals_one_process(trajectory, aggregation):
    run = trajectory("grpo_8_k4")
    examples = [example for batch in run.golden["batches"] for example in batch]
    for i, example in enumerate(examples):  # the first rank's responses are short, the second's long
        example["responses"] = [r[:2] if i % 4 < 2 else r for r in example["responses"]]
    write_examples(run, examples)
    run.config |= {"batch_size": 4, "rows_per_pass": 1, "gradient_accumulation_steps": 2}
    one, two = one_and_two_ranks(run, f"loss.aggregation={aggregation}", "epochs=2")
    assert len(one) == 6 and one == pytest.approx(two, abs=1e-5)


def test_dapo_weighs_every_token_of_the_batch_alike_and_token_every_microbatch(trajectory):
    run = trajectory("grpo_8_k4")
    first = [example for batch in run.golden["batches"] for example in batch]
    for i, example in enumerate(first):  # in every microbatch after the first there is little to say
        example["responses"] = [r[:1] if i % 4 >= 2 else r for r in example["responses"]]
    write_examples(run, first)
    accumulated, whole = {}, {}
    for aggregation in ("token", "dapo"):
        for losses, shape in ((accumulated, (2, 2)), (whole, (4, 1))):
            (run.folder / "logs" / "log.txt").unlink(missing_ok=True)
            run.config |= {"batch_size": shape[0], "gradient_accumulation_steps": shape[1]}
            assert run.train(f"loss.aggregation={aggregation}") is None
            losses[aggregation] = run.log()
    assert accumulated["dapo"] == pytest.approx(whole["dapo"], abs=1e-5)
    assert abs(accumulated["token"][1] - whole["token"][1]) > 1e-3


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_sampling_draws_the_same_on_any_number_of_ranks_and_after_a_resume(trajectory, name):
    run = trajectory(name)
    run.config["loss"] |= SAMPLE
    run.config |= {"save_every_n_steps": 10, "rows_per_pass": 1}
    one, two = one_and_two_ranks(run)
    assert one == pytest.approx(two, abs=1e-5)
    clipped = run.golden["losses"]
    assert max(abs(one[step] - loss) for step, loss in enumerate(clipped, 1)) > 1e-4  # it is not the clip

    (run.folder / "logs" / "log.txt").unlink()
    run.train_on(2, "resume_from_checkpoint=latest")
    assert run.log() == {step: two[step] for step in (11, 12)}


def test_another_seed_samples_otherwise(trajectory):
    run = trajectory("kto_8_k4")
    run.config["loss"] |= SAMPLE
    losses = []
    for seed in (0, 1):
        (run.folder / "logs" / "log.txt").unlink(missing_ok=True)
        assert run.train(f"seed={seed}", "max_steps_per_epoch=4") is None
        losses.append(run.log())
    assert losses[0][1] == losses[1][1] and losses[0] != losses[1]


@pytest.mark.parametrize(
    ("name", "metric"), [("kto_8_k4", "kl_baseline"), ("grpo_8_k4", "log_probs/accuracies")], ids=["kto", "grpo"]
)
def test_held_out_metrics_are_the_same_on_two_ranks_and_move(trajectory, name, metric):
    run = trajectory(name)
    # Seven groups in passes of one row: the ranks have different numbers of passes, and make up for it with idle ones.
    run.config |= {
        "dataset_val": {"_component_": "humanline.data.encoded_groups", "source": str(run.data), "split": "train[:7]"},
        "run_val_every_n_steps": 6,
        "rows_per_pass": 1,
        "log_every_n_steps": 3,
    }
    run.train_on(1)
    metrics = ("loss", "val/loss", "val/kl", f"val/{metric}")
    one = {metric: run.log(metric) for metric in metrics}
    (run.folder / "logs" / "log.txt").unlink()
    run.config["batch_size"] //= 2
    run.train_on(2)
    for metric, values in one.items():
        assert len(values) >= 3 and run.log(metric) == pytest.approx(values, abs=1e-5)
    assert list(one["val/loss"]) == list(one["val/kl"]) == [0, 6, 12]
    assert one["val/kl"][0] == 0 < min(one["val/kl"][6], one["val/kl"][12])
    means = [sum(run.golden["losses"][i : i + 3]) / 3 for i in (0, 3, 6, 9)]
    assert list(one["loss"].values()) == pytest.approx(means, abs=1e-5)


def test_kl_sequences_in_unequal_numbers_of_passes_count_once(trajectory):
    run = trajectory("kto_8_k4")
    examples = [example for batch in run.golden["batches"] for example in batch]
    for i, example in enumerate(examples):  # the first rank's KL sequences take one row of 32 tokens, the second's two
        example["prompt"] = example["prompt"][:4]
        example["response"] = (example["response"] * 20)[: 20 if i % 4 in (0, 3) else 2]
    write_examples(run, examples)
    run.config |= {"rows_per_pass": 1, "tokens_per_row": 32}
    one, two = one_and_two_ranks(run)
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("name", ["kto_8_k4", "grpo_8_k4"])
def test_a_group_spread_over_passes_has_the_loss_of_the_whole(trajectory, name):
    run = trajectory(name)
    if run.golden["objective"] == "grpo":
        run.config["loss"]["aggregation"] = "dapo"  # with one microbatch a step the same as token
    run.config |= {"tokens_per_row": 40, "rows_per_pass": 1}
    assert run.train() is None
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


def test_the_logs_of_kto_and_grpo_have_their_own_metrics(trajectory):
    kto, grpo = trajectory("kto_8_k4"), trajectory("grpo_8_k4")
    common = ("loss", "kl", "grad_norm", "lr", "tokens_per_second", "steps_since_sync", "unclamped")
    for run, own in (
        (kto, ("rewards/desirable", "rewards/undesirable", "rewards/gain", "rewards/accuracies", "kl_baseline")),
        (grpo, ("rewards/mean", "advantages/abs")),
    ):
        assert run.train("max_steps_per_epoch=6") is None
        for metric in (*common, *own):
            assert 6 in run.log(metric), metric
    scores = [score for example in grpo.golden["batches"][2] for score in example["scores"]]
    assert grpo.log("rewards/mean")[3] == pytest.approx(sum(scores) / 4)
    assert kto.log("kl_baseline")[1] == 0 < max(kto.log("kl_baseline").values())


def test_groups_whose_scores_are_all_equal_are_skipped_and_counted(trajectory, caplog):
    run = trajectory("grpo_7_k1")
    examples = [example for batch in run.golden["batches"] for example in batch]
    for example in examples[::2]:
        example["scores"] = [0.5, 0.5]
    write_examples(run, examples)
    assert run.train() is None
    assert len(run.log()) == 6
    assert "12 groups dropped (all scores equal)" in caplog.text


# ---- Class imbalance


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weight", "warning"),
    [
        (4, 4, 1.0, None),
        (4, 4, 4 / 3, None),
        (4, 4, 1.5, "weigh 1.5 to 1, expected a ratio in [1, 4/3]; set it between 1.0 and 1.3333"),
        (4, 8, 1.0, "4 desirable and 8 undesirable examples weigh 0.5 to 1"),
        (4, 8, 2.2, None),
        (8, 4, 1.0, "set it between 0.5 and 0.6666"),
        (4, 0, 1.0, "4 desirable and 0 undesirable examples; KTO needs both kinds"),
        (0, 4, 1.0, "0 desirable and 4 undesirable examples; KTO needs both kinds"),
    ],
)
def test_kto_warns_of_class_imbalance(desirable, undesirable, weight, warning):
    groups = [Group([1], ([2],), labels=(i < desirable,)) for i in range(desirable + undesirable)]
    said = KTO(HumanlineKTOLoss(desirable_weight=weight)).imbalance_warning(GroupDataset(groups))
    assert said is None if warning is None else warning in said


@given(st.integers(1, 50), st.integers(1, 50))
@hypothesis.example(25, 29)  # 25 * 1.16 rounds to less than 29
def test_what_the_class_imbalance_warning_advises_is_not_warned_of(desirable, undesirable):
    groups = [Group([1], ([2],), labels=(i < desirable,)) for i in range(desirable + undesirable)]
    if said := KTO(HumanlineKTOLoss()).imbalance_warning(GroupDataset(groups)):
        low, high = map(float, re.search(r"between (\S+) and (\S+)$", said).groups())
        for weight in (low, high):
            assert KTO(HumanlineKTOLoss(desirable_weight=weight)).imbalance_warning(GroupDataset(groups)) is None


def test_a_kto_run_prints_its_warning_once_on_two_ranks(trajectory):
    run = trajectory("kto_7_k1")
    run.config["batch_size"] = 2
    done = run.tune("max_steps_per_epoch=1", "loss.desirable_weight=9.0", nproc=2)
    assert len(re.findall(r"expected a ratio in \[1, 4/3\]", done.stderr + done.stdout)) == 1


# ---- Mistakes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "kto_7_k1",
            {"_component_": "humanline.losses.HumanlineDPOLoss"},
            "loss.desirable_weight: humanline.losses.HumanlineDPOLoss has no such argument",
        ),
        ("grpo_7_k1", {"gamma_P": 1.0}, "loss.gamma_P: 1.0 has no effect with perception: clip"),
        ("grpo_7_k1", {"aggregation": "mean"}, "loss.aggregation: expected token, sequence, dapo or fixed, got 'mean'"),
        ("kto_7_k1", {"perception": "sample"}, "loss.gamma_P: got None, expected a number above 0"),
        ("grpo_7_k1", {"label_smoothing": 0.1}, "loss.label_smoothing: humanline.losses.HumanlineGRPOLoss has no such"),
    ],
)
def test_a_mistake_in_the_loss_ends_the_run_with_one_line(trajectory, name, changes, message):
    run = trajectory(name)
    run.config["loss"] |= changes
    line = run.train()
    assert message in line and "\n" not in line
    assert not (run.folder / "logs" / "log.txt").exists()


def test_a_kto_microbatch_of_one_prompt_is_refused(trajectory):
    run = trajectory("kto_7_k1")
    assert "batch_size: expected 2 or more groups in a microbatch, got 1; KTO pairs" in run.train("batch_size=1")
    run.config["dataset_val"] = run.config["dataset"] | {"split": "train[:1]"}
    assert "dataset_val: expected 2 or more groups in a microbatch, got 1; KTO pairs" in run.train()


def test_grpo_on_single_responses_says_what_it_needs(trajectory):
    run = trajectory("kto_7_k1")
    run.recipe = run.recipe.with_name("humanline_grpo_distributed.py")
    run.config["loss"] = {"_component_": "humanline.losses.HumanlineGRPOLoss"}
    assert "GRPO needs groups of several responses to a prompt with different scores" in run.train()


def test_the_loss_of_another_objective_is_refused_by_name():
    with pytest.raises(
        ConfigError, match="^loss._component_: expected humanline.losses.HumanlineKTOLoss .*, got HumanlineDPOLoss"
    ):
        KTO(HumanlineDPOLoss())


def test_kl_sequences_too_long_for_a_row_are_met_before_training(trajectory):
    run = trajectory("kto_7_k1")
    long_prompt = {"prompt": [1] * 40, "responses": [[2] * 4], "labels": [True]}
    long_response = {"prompt": [3] * 4, "responses": [[4] * 40], "labels": [False]}
    run.data.write_text("".join(json.dumps(line) + "\n" for line in [long_prompt, long_response] * 2))
    line = run.train("tokens_per_row=48")
    whole = (
        f"{run.data} line 1 with the longest response (a KL sequence of KTO): prompt and response have 79 input tokens"
    )
    assert f"{whole}, but a row holds 48" in line
    assert run.train("tokens_per_row=79") is None
    assert math.isfinite(run.log()[1])
