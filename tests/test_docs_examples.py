"""The examples of docs/extending.md, losses_in_your_loop.md and torchtune_fork.md, run as they stand in the pages."""

import dataclasses
import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import ROOT, TUNE, TrajectoryRun, run
from markdown_it import MarkdownIt
from test_http_engine import BYTES, write_tokenizer
from torchtune.models.llama3 import llama3

from humanline.data import ChatTokenizer
from humanline.errors import DataError
from humanline.models import LogProbDecoder
from humanline.reference import RunContext
from humanline.rollout import Prompt

pytestmark = pytest.mark.slow

EXTENDING, LOOP, FORK = (
    ROOT / "docs" / f"{name}.md" for name in ("extending", "losses_in_your_loop", "torchtune_fork")
)
LN_2 = math.log(2)


def fences(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def file_of(block: str) -> str:
    """The file that a block is, by its first line."""
    return re.match(r"# (\w+\.py)\n", block)[1]


def example(page: Path, file: str) -> str:
    (block,) = (block for block in fences(page, "python") if file_of(block) == file)
    return block


def fragment(page: Path, key: str) -> dict:
    """The lines of a config that belong to an example."""
    (found,) = (lines for block in fences(page, "yaml") if key in (lines := yaml.safe_load(block)))
    return found


def changed(text: str, diff: str) -> str:
    """A recipe's text after a diff of a page, whose lines must be in it once."""
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in "- ")
    after = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in "+ ")
    assert text.count(before) == 1, diff
    return text.replace(before, after)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(file)`` puts an example into the folder that a run is started in, and imports it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    names: list[str] = []

    def write(file: str) -> ModuleType:
        (tmp_path / file).write_text(example(EXTENDING, file))
        names.append(Path(file).stem)
        importlib.invalidate_caches()
        return importlib.import_module(names[-1])

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """A folder in which the copying commands of the page about forks were run."""
    folder = tmp_path_factory.mktemp("fork")
    commands = [line.split() for block in fences(FORK, "bash") for line in block.splitlines()]
    for command in commands:
        if command[:2] == ["tune", "cp"]:
            run([str(TUNE), *command[1:]], cwd=folder)
    return folder


@pytest.fixture
def chat_tokenizer(tmp_path) -> dict:
    """The ``tokenizer`` of a config: one of ASCII's characters, whose ids the golden models have."""
    folder = write_tokenizer(tmp_path / "tokenizer", [c for c in BYTES if c.isascii() or c in "ĠĊ"])
    return {"_component_": "humanline.data.ChatTokenizer", "path": str(folder)}


def test_every_python_block_is_an_example_that_is_run_here():
    ours = Path(__file__).read_text()
    files = {page: [file_of(block) for block in fences(page, "python")] for page in (EXTENDING, LOOP, FORK)}
    assert len(files[EXTENDING]) == 5 and len(files[LOOP]) == 2
    assert all(f'"{file}")' in ours for page in files for file in files[page])


# ------------------------------------------------------------------------------------------------------- extending.md


def test_the_loss_is_ipo_on_clipped_log_ratios(module):
    loss = module("my_losses.py").HumanlineIPOLoss(beta=0.1, log_eps_P=-1.5, log_eps_R=1.5)
    chosen, rejected = torch.tensor([[2.0, -0.5]], requires_grad=True), torch.tensor([[-3.0]], requires_grad=True)
    masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    losses, better, worse = loss(chosen, rejected, torch.zeros(1, 2), torch.zeros(1, 1), *masks)
    # The log-ratios 2 and -3 are clipped to 1.5 and -1.5: h is (1.5 - 0.5) - (-1.5).
    assert losses.tolist() == pytest.approx([(2.5 - 5) ** 2])
    assert (better.item(), worse.item()) == pytest.approx((0.1, -0.15))
    losses.sum().backward()
    assert chosen.grad.tolist() == [[0, 2 * (2.5 - 5)]] and rejected.grad.tolist() == [[0]]


def test_a_run_trains_on_the_loss_that_its_config_names(trajectory, module):
    module("my_losses.py")
    run = trajectory("dpo_8_k4")
    run.config |= fragment(EXTENDING, "loss")
    assert run.train() is None
    losses = run.log()
    assert len(losses) == 12 and losses[1] == pytest.approx(25, abs=1e-4)
    # The mean of (h - 5)^2 is at least (mean h - 5)^2, and beta * mean h is what the log calls the margin.
    margins = run.log("rewards/margins")
    assert all(losses[step] >= (10 * margins[step] - 5) ** 2 - 1e-3 for step in losses)
    assert len(set(margins.values())) == 12


def test_another_recipe_refuses_the_loss(trajectory, module):
    module("my_losses.py")
    run = trajectory("kto_8_k4")
    run.config |= fragment(EXTENDING, "loss")
    assert "expected humanline.losses.HumanlineKTOLoss or a subclass, got HumanlineIPOLoss" in run.train()


def test_the_reward_is_the_share_of_words_in_a_response_that_is_not_too_long(module):
    Contains = module("my_rewards.py").Contains
    (line,) = map(json.loads, fences(EXTENDING, "json"))
    prompt = Prompt("prompts.jsonl line 1", [{"role": "user", "content": line["prompt"]}], line)
    texts = ["blue and green", "a blue sky", "red", "blue " * 41]
    assert Contains()([prompt], [texts]) == [[1.0, 0.5, 0.0, 0.0]]
    with pytest.raises(DataError, match="prompts.jsonl line 1: words: expected a list of words, got None"):
        Contains()([dataclasses.replace(prompt, fields={})], [[]])


def sampled(run: TrajectoryRun, tokenizer: dict, lines: list[dict]) -> TrajectoryRun:
    """A golden run whose policy answers prompts, scored by the reward of the page."""
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    del run.config["dataset"]
    run.config |= fragment(EXTENDING, "reward") | {
        "tokenizer": tokenizer,
        "source": {
            "_component_": "humanline.rollout.OnlineSource",
            "prompts": "prompts.jsonl",
            "max_new_tokens": 6,
            "generations": 4,
        },
        "engine": {"_component_": "humanline.rollout.InProcessEngine", "batch_size": 8},
        "tokens_per_row": 128,
        "batch_size": 2,
        "max_steps_per_epoch": 3,
    }
    return run


def test_a_run_trains_on_what_the_reward_says(trajectory, module, chat_tokenizer):
    module("my_rewards.py")
    (line,) = map(json.loads, fences(EXTENDING, "json"))
    words = list("aeiouAEIOU02468")
    lines = [{**line, "prompt": f"{line['prompt']} {i}", "words": words} for i in range(6)]
    run = sampled(trajectory("grpo_8_k4"), chat_tokenizer, lines)
    assert run.train() is None and len(run.log()) == 3
    scores, rewards = [], []
    for index in range(3):
        found = (run.folder / "out" / "rounds" / f"round_{index}.jsonl").read_text().splitlines()
        scores += [score for each in found for score in json.loads(each)["scores"]]
        answers = (run.folder / "out" / "completions" / f"round_{index}.jsonl").read_text().splitlines()
        for answer in map(json.loads, answers):
            assert answer["reward"] == sum(word in answer["completion"] for word in words) / len(words)
            rewards.append(answer["reward"])
    assert scores == rewards and len(set(rewards)) > 1


def test_a_prompt_that_the_reward_cannot_judge_ends_the_run_with_its_line(trajectory, module, chat_tokenizer):
    module("my_rewards.py")
    (line,) = map(json.loads, fences(EXTENDING, "json"))
    lines = [{**line, "prompt": f"{line['prompt']} {i}"} for i in range(6)]
    del lines[2]["words"]
    run = sampled(trajectory("grpo_8_k4"), chat_tokenizer, lines)
    assert "prompts.jsonl line 3: words: expected a list of words, got None" in run.train()


def test_a_run_trains_on_the_groups_that_its_function_makes(trajectory, module, chat_tokenizer):
    sums = module("my_data.py").sums
    tokenizer = ChatTokenizer(chat_tokenizer["path"])
    groups = list(sums(tokenizer, count=16))
    for group in groups:
        a, b = map(int, re.search(r"(\d+) \+ (\d+) = \?", tokenizer.decode(group.prompt)).groups())
        right, wrong = (int(tokenizer.decode(response)) for response in group.responses)
        assert right == a + b and abs(right - wrong) in (1, 10)

    run = trajectory("dpo_8_k4")
    run.config |= {"tokenizer": chat_tokenizer, "tokens_per_row": 128, **fragment(EXTENDING, "dataset")}
    file, other, grpo = run.again("file"), run.again("other"), run.again("grpo")
    run.config["dataset"]["count"] = other.config["dataset"]["count"] = grpo.config["dataset"]["count"] = 16
    assert run.train() is None
    # The same groups from a file give the same losses, and those of another seed others.
    file.data = file.folder / "groups.jsonl"
    pairs = [{"prompt": list(group.prompt), "responses": [*map(list, group.responses)]} for group in groups]
    file.data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    file.config["dataset"] = {"_component_": "humanline.data.encoded_groups", "source": str(file.data)}
    assert file.train() is None
    assert run.log() == pytest.approx(file.log(), abs=1e-6) and len(run.log()) == 4
    assert other.train("dataset.seed=1") is None
    assert abs(other.log()[2] - run.log()[2]) > 1e-6
    grpo.recipe = ROOT / "recipes" / "humanline_grpo_single_device.py"
    assert grpo.train("loss=humanline.losses.HumanlineGRPOLoss", "max_steps_per_epoch=1") is None
    assert grpo.log("rewards/mean") == {1: 0.5}


def test_a_copy_with_the_source_trains_on_the_shortest_groups_first(trajectory, module, copies, tmp_path):
    module("my_source.py")
    text = (copies / "my_dpo.py").read_text()
    for diff in fences(EXTENDING, "diff"):
        text = changed(text, diff)
    run = trajectory("dpo_8_k4")
    by_hand, windowed = run.again("by_hand"), run.again("windowed")
    run.recipe = windowed.recipe = tmp_path / "my_dpo.py"
    run.recipe.write_text(text)
    assert run.train("batch_size=2", "gradient_accumulation_steps=2") is None

    lines = run.data.read_text().splitlines(keepends=True)
    shortest_first = sorted(lines, key=lambda line: sum(map(len, json.loads(line)["responses"])))
    assert shortest_first != lines
    by_hand.data = by_hand.folder / "groups.jsonl"
    by_hand.data.write_text("".join(shortest_first))
    by_hand.config["dataset"]["source"] = str(by_hand.data)
    assert by_hand.train() is None
    assert run.log() == pytest.approx(by_hand.log(), abs=1e-5) and len(run.log()) == 12
    assert list(run.log().values()) != pytest.approx(run.golden["losses"], abs=1e-5)

    line = windowed.train("reference._component_=humanline.reference.WindowedReference")
    assert "reference: its window ends with step" in line


class TinyModels:
    """Builds models of one layer."""

    def reference_model(self) -> LogProbDecoder:
        return LogProbDecoder(llama3(32, 1, 2, 1, 16, 16))


def test_the_reference_moves_by_its_weight_at_each_sync(module):
    averaged = module("my_reference.py").AveragedReference(sync_every=2, weight=0.25)
    models = TinyModels()
    policy = models.reference_model()
    initial = {name: each.clone() for name, each in policy.state_dict().items()}
    reference = averaged.build(RunContext(policy=policy, model=models, passes=None, total_steps=4, resumes=False))
    moved = []
    for step in range(1, 5):
        with torch.no_grad():
            for each in policy.parameters():
                each += 1
        reference.before_optimizer_step(step)
        found = reference.model.state_dict()
        (distance,) = {round((found[name] - initial[name]).mean().item(), 4) for name in initial}
        moved.append(distance)
    # The policy has moved by 2 at the first sync and by 4 at the second.
    assert moved == [0, 0.5, 0.5, 0.5 + 0.25 * (4 - 0.5)]
    assert reference.last_sync == 4


def test_a_run_measures_against_the_averaged_reference_and_resumes(trajectory, module):
    module("my_reference.py")
    run = trajectory("dpo_8_k4")
    run.config |= fragment(EXTENDING, "reference") | {"save_every_n_steps": 6}
    copied, resumed, refused = run.again("copied"), run.again("resumed"), run.again("refused")
    assert copied.train("reference.weight=1.0") is None
    assert list(copied.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)
    assert run.train() is None
    losses, golden = run.log(), dict(enumerate(run.golden["losses"], start=1))
    assert all(losses[step] == pytest.approx(golden[step], abs=1e-5) for step in range(1, 5))
    assert all(abs(losses[step] - golden[step]) > 1e-5 for step in range(5, 13))
    assert list(run.log("steps_since_sync").values()) == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0]

    checkpoint = f"resume_from_checkpoint={run.folder / 'out' / 'checkpoints' / 'step_6'}"
    assert resumed.train(checkpoint) is None
    assert resumed.log() == pytest.approx({step: losses[step] for step in range(7, 13)}, abs=1e-6)
    said = refused.train(checkpoint, "reference.weight=0.5")
    assert "with reference's settings {'weight': 0.25}, this run has {'weight': 0.5}; restore" in said
    assert "reference.weight: expected a number above 0 and at most 1, got 2" in refused.train("reference.weight=2")


# --------------------------------------------------------------------------------------------- losses_in_your_loop.md


def losses_of(script: str, folder: Path) -> list[float]:
    """The losses of a script by step."""
    file = folder / "dpo_loop.py"
    file.write_text(script)
    return runpy.run_path(str(file))["losses_by_step"]


def test_the_loop_trains_with_the_clip_and_syncs_as_it_says(tmp_path, capsys):
    script = example(LOOP, "dpo_loop.py")
    assert len(script.splitlines()) <= 60
    losses = losses_of(script, tmp_path)
    assert re.findall(r"step (\d+): the reference syncs", capsys.readouterr().out) == ["2", "4", "6", "8"]
    assert losses[0] == pytest.approx(LN_2, abs=1e-6)
    assert all(abs(loss - LN_2) > 1e-4 for loss in losses[1:])

    line = "loss_function = HumanlineDPOLoss(beta=0.1, log_eps_P=-1.5, log_eps_R=1.5)\n"
    by_hand = """
def loss_function(policy_w, policy_l, reference_w, reference_l, mask_w, mask_l):
    better = 0.1 * ((policy_w - reference_w).clamp(-1.5, 1.5) * mask_w).sum(1)
    worse = 0.1 * ((policy_l - reference_l).clamp(-1.5, 1.5) * mask_l).sum(1)
    return -(better - worse).sigmoid().log(), better, worse
"""
    assert script.count(line) == 1
    assert losses_of(script.replace(line, by_hand), tmp_path) == pytest.approx(losses, abs=1e-4)
    unclipped = losses_of(script.replace("log_eps_P=-1.5, log_eps_R=1.5", "log_eps_P=None, log_eps_R=None"), tmp_path)
    assert max(abs(one - other) for one, other in zip(unclipped, losses, strict=True)) > 1e-3


def test_a_sync_after_the_optimizer_s_step_leaves_nothing_to_compare(tmp_path):
    script = example(LOOP, "dpo_loop.py").replace("STEPS, SYNC_EVERY = 8, 2", "STEPS, SYNC_EVERY = 4, 1")
    right = losses_of(script, tmp_path)
    assert len(right) == 4 and all(abs(loss - LN_2) > 1e-4 for loss in right[1:])
    (sync,) = re.findall(r"    if step % SYNC_EVERY .*?(?=    optimizer\.step)", script, re.DOTALL)
    step = "    optimizer.step()\n"
    wrong = script.replace(sync, "").replace(step, step + sync)
    assert losses_of(wrong, tmp_path) == pytest.approx([LN_2] * 4, abs=1e-6)


def test_the_clip_alone_stops_the_gradient_of_the_clipped_tokens(tmp_path):
    file = tmp_path / "clip_alone.py"
    file.write_text(example(LOOP, "clip_alone.py"))
    found = runpy.run_path(str(file))
    assert found["log_ratio"].tolist() == [[0.5, 2, 0], [-2, 0, 0]]
    assert found["clipped"].tolist() == [[0.5, 1.5, 0], [-1.5, 0, 0]]
    expected = -(math.exp(0.5) + math.exp(1.5) + 1 - math.exp(-1.5) - 1) / 5
    assert found["loss"].item() == pytest.approx(expected)
    assert (found["policy_logps"].grad != 0).tolist() == [[True, False, True], [False, True, False]]


# -------------------------------------------------------------------------------------------------- torchtune_fork.md


def test_the_commands_copy_a_recipe_and_a_config(copies):
    assert (copies / "my_dpo.py").read_text() == (ROOT / "recipes" / "humanline_dpo_single_device.py").read_text()
    assert (copies / "my.yaml").read_text() == (ROOT / "configs" / "llama3_8b_lora.yaml").read_text()


def test_a_copy_with_the_changed_lines_has_their_loss_and_their_syncs(trajectory, copies, tmp_path):
    text = (copies / "my_dpo.py").read_text()
    for diff in fences(FORK, "diff"):
        text = changed(text, diff)
    run = trajectory("dpo_8_k4")
    run.recipe = tmp_path / "my_dpo.py"
    run.recipe.write_text(text)
    assert run.train() is None
    # Policy and reference are one at the first step, where the log-likelihood is all that is added to ln 2.
    likelihood = run.log("log_probs/chosen")[1]
    assert likelihood < -1 and run.log()[1] == pytest.approx(LN_2 - 0.01 * likelihood, abs=1e-5)
    assert list(run.log("steps_since_sync").values()) == [0, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4]
