"""Online rounds without signal: steps that leave the weights as they are, and what a run of them ends with."""

import json
import re
import shutil

import pytest
import torch
from conftest import logged_steps
from safetensors.torch import load_file
from test_online import lines, online, rounds

from humanline.data import encoded_groups
from humanline.errors import ConfigError
from humanline.rollout import OnlineSource
from humanline.rollout._empty_rounds import EmptyRounds


def weights(run):
    return load_file(run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors")


def checkpoints(run):
    return sorted(path.name for path in (run.folder / "out" / "checkpoints").iterdir())


def test_a_hard_task_with_one_right_answer_in_fifty_is_trained_to_its_end(trajectory, caplog):
    run = online(trajectory("grpo_8_k4"))
    run.config["reward"] = {"_component_": "toys.Rare"}
    assert run.train("epochs=2") is None
    empty = run.log("rounds/empty")
    assert list(empty) == list(range(1, 25)) and 3 <= sum(empty.values()) < 24
    without = {step for step in empty if empty[step]}
    assert set(run.log()) == set(empty) - without  # no loss is logged of an empty step
    assert run.log("empty_rounds")[24] == len(without)
    assert all(norm == 0 for step, norm in run.log("grad_norm").items() if step in without)
    assert len(rounds(run)) == 24
    for step in without:
        group, other = map(json.loads, rounds(run)[step - 1].read_text().splitlines())
        assert group["empty"] and other["empty"] and set(group["scores"]) == {0.0}
    # What the run wrote, the groups of empty rounds included, is a dataset as it is.
    assert len(encoded_groups(None, list(map(str, rounds(run))))) == len(lines(run))


def test_rounds_that_stay_wrong_end_the_run_and_a_resumed_one_draws_by_what_was_changed(trajectory, caplog):
    run = online(trajectory("grpo_8_k4"))
    run.config["shuffle"] = True
    run.config["reward"] = {"_component_": "toys.Wrong", "calls": 2}
    message = run.train("stop_after_empty_rounds=3")
    assert (
        "step 5: the last 3 rounds were empty (stop_after_empty_rounds): all wrong: every response scored 0;" in message
    )
    assert "use easier prompts, more source.generations or a higher source.temperature" in message
    assert message.endswith("resume_from_checkpoint: latest resumes from step 5")
    assert checkpoints(run) == ["step_5"]
    assert "round 2 is empty: the objective cannot learn from any prompt's responses (all 8 scored 0)" in caplog.text

    short = run.again("short")
    assert short.train("max_steps_per_epoch=2") is None
    before = weights(short)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())

    kept = {file: file.read_text() for file in rounds(run)}
    assert len(kept) == 5
    changes = ["source.temperature=0.8", "source.generations=3", "shuffle=False", "reward.calls=99"]
    caplog.clear()
    assert run.train("resume_from_checkpoint=latest", "stop_after_empty_rounds=3", *changes) is None
    assert "source.temperature: was 1.0 in the checkpoint, is 0.8 for rounds that are not sampled yet" in caplog.text
    assert logged_steps(run) == list(range(1, 13))
    assert all(file.read_text() == text for file, text in kept.items())
    assert all(len(json.loads(line)["responses"]) == 3 for file in rounds(run)[5:] for line in file.open())
    # Without a change the draws go on as well: every round has prompts of its own.
    prompts = [
        {line["id"].partition(" in round")[0] for line in map(json.loads, text.splitlines())} for text in kept.values()
    ]
    assert len(set.union(*prompts)) == 10


@pytest.mark.parametrize(
    ("reward", "solved"),
    [
        ({"_component_": "toys.Wrong", "calls": 0, "then": 1.0}, True),
        ({"_component_": "toys.Judged", "calls": 2, "then": 1.0}, True),
        ({"_component_": "toys.Judged", "calls": 0, "then": 1.0}, True),  # nothing says that there is a higher one
        ({"_component_": "toys.Judged", "calls": 0, "then": 0.0}, False),
        ({"_component_": "toys.Wrong", "calls": 0, "then": 0.5}, False),
    ],
    ids=["the highest", "the highest that was seen", "the only one", "the only one, 0", "not the highest"],
)
def test_a_policy_that_has_solved_its_prompts_ends_well(trajectory, caplog, reward, solved):
    run = online(trajectory("grpo_8_k4"), every=2)
    run.config["reward"] = reward
    end = 2 * (reward["calls"] + 2)
    message = run.train("stop_after_empty_rounds=2")
    if solved:
        assert message is None
        assert f"step {end}: the last 2 rounds were empty (stop_after_empty_rounds): all right: every" in caplog.text
    else:
        assert f"step {end}: the last 2 rounds were empty" in message and "all wrong: every response scored" in message
    assert checkpoints(run) == [f"step_{end}"] and weights(run)


def test_each_resumed_run_has_as_many_empty_rounds_as_the_first_one(trajectory):
    run = online(trajectory("grpo_8_k4"))
    run.config |= {"stop_after_empty_rounds": 3, "save_every_n_steps": 1}
    run.config["reward"] = {"_component_": "toys.Wrong"}
    for step, resume in ((3, ()), (6, ("resume_from_checkpoint=latest",)), (9, ("resume_from_checkpoint=latest",))):
        assert f"step {step}: the last 3 rounds were empty" in run.train(*resume)


def test_two_ranks_agree_on_empty_rounds_and_count_each_once(trajectory):
    run = online(trajectory("dpo_8_k4"), every=3)
    run.config |= {"batch_size": 1, "save_every_n_steps": 5, "stop_after_empty_rounds": 2, "keep_last_n_checkpoints": 9}
    run.config["reward"] = {"_component_": "toys.Wrong", "calls": 1}

    def ends(*overrides):
        (run.folder / "output.txt").unlink(missing_ok=True)
        with run.start(*overrides, nproc=2) as ranks:
            assert ranks.wait() == [1, 1], ranks.output()
            return {line for line in ranks.output().splitlines() if line.startswith("humanline_dpo")}

    [line] = ends()
    assert "step 9: the last 2 rounds were empty" in line
    shutil.rmtree(run.folder / "out" / "checkpoints" / "step_9")
    assert ends("resume_from_checkpoint=latest", "reward.calls=0") == {line}  # from within the first of them


def test_a_round_file_that_one_rank_alone_cannot_read_is_read_by_the_others(trajectory, tmp_path, monkeypatch):
    """Rank 1 sees another disk from its tokenizer on: its working directory, to which output_dir is relative."""
    run = online(trajectory("grpo_8_k4"), every=4)
    run.config |= {"batch_size": 1, "save_every_n_steps": 6, "tokenizer": {"_component_": "toys.Elsewhere"}}
    here, there = run.folder, tmp_path / "there"
    run.config["output_dir"] = run.config["checkpointer"]["output_dir"] = "out"
    (there / "out" / "rounds").mkdir(parents=True)
    (here / "out" / "checkpoints").mkdir(parents=True)  # else a rank may meet the link before what it leads to
    for shared in ("checkpoints", "epoch_0", ".lock"):
        (there / "out" / shared).symlink_to(here / "out" / shared)
    monkeypatch.chdir(here)
    environment = {"THERE": str(there)}
    run.train_on(2, **environment)
    whole = run.log()
    shutil.rmtree(here / "out" / "checkpoints" / "step_12")
    (there / "out" / "rounds" / "round_1.jsonl").write_text("damaged\n")
    run.train_on(2, "resume_from_checkpoint=latest", **environment)
    assert run.log() == whole
    # What rank 0 cannot read ends both, with one line.
    shutil.rmtree(here / "out" / "checkpoints" / "step_12")
    (here / "out" / "rounds" / "round_1.jsonl").write_text(
        '{"policy_step": 4, "id": "", "prompt": [1], "responses": [[999]]}'
    )
    (run.folder / "output.txt").unlink()
    with run.start("resume_from_checkpoint=latest", nproc=2, **environment) as ranks:
        assert ranks.wait() == [1, 1], ranks.output()
        # The bar of rank 0 may stand before a line of rank 1.
        ends = re.findall(r"humanline_grpo_distributed\.py: [^\r\n]*", ranks.output())
    assert len(ends) == 2 and len(set(ends)) == 1
    assert (
        "round_1.jsonl: expected a round file (line 1: field 'responses[0][0]' must be a token id from 0 to " in ends[0]
    )
    assert ", got 999; encode with this model's tokenizer)" in ends[0]


def test_greedy_draws_make_no_group(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    with pytest.raises(ConfigError, match=r"^source.temperature: expected a number above 0, got 0; at 0 all responses"):
        OnlineSource(str(prompts), max_new_tokens=4, temperature=0)


def test_what_empty_rounds_have_in_common_decides_how_they_end():
    noted = EmptyRounds(highest_score=1.0)
    noted.note(0, [0.0, 1.0], empty=False)
    noted.note(1, [1.0, 1.0], empty=True)
    assert noted.is_solved and noted.in_a_row == 1
    noted.note(1, [1.0, 1.0], empty=True)  # by a run that resumes within the round
    assert noted.in_a_row == noted.total == 1
    noted.note(2, [0.0, 1.0], empty=True)  # one prompt solved, the other hopeless
    assert not noted.is_solved and "at scores from 0 to 1; use easier prompts" in noted.why()
    noted.note(3, [0.0, 1.0], empty=False)
    noted.note(4, [], empty=True)
    assert noted.in_a_row == 1 and not noted.is_solved and "no responses: the engine" in noted.why()
    restored = EmptyRounds(highest_score=1.0)
    restored.load_state_dict(json.loads(json.dumps(noted.state_dict())))
    assert restored == noted
    labelled = EmptyRounds(desirable_above=0.5)
    labelled.note(0, [0.6, 0.9], empty=True)
    assert labelled.is_solved
