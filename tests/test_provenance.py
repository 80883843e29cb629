"""Results on disk are used again only by the code, on the device and with the files that they were computed with."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from test_windowed_reference import frozen, losses

from humanline.programs import PartialFile, score_sources

BUILDER = """
from torchtune.models.llama3 import llama3

def mine(**shape):
    return llama3(**shape)
"""
REWARD = """
class Mine:
    def __init__(self, path):
        pass

    def __call__(self, prompts, responses):
        return [[1.0] * len(texts) for texts in responses]
"""
EDIT = """
from pathlib import Path
from humanline.checkpoint._provenance import code_digest
import humanline
digests = {code_digest()}
for name in ("models/_log_probs.py", "data/_rows.py"):
    file = Path(humanline.__file__).parent / name
    file.write_text(file.read_text() + "# mended\\n")
    digests.add(code_digest())
print(len(digests), humanline.__file__)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder that Python imports from."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("my_model", "my_reward"):
        sys.modules.pop(name, None)


def test_a_frozen_reference_is_taken_again_when_the_model_s_code_or_its_precision_has_changed(
    trajectory, tmp_path, monkeypatch, modules
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = modules / "my_model.py"
    code.write_text(BUILDER)
    run = frozen(trajectory("dpo_8_k4"))
    run.config["model"]["_component_"] = "my_model.mine"
    run.config |= {"epochs": 1, "save_every_n_steps": 5}

    def kept():
        return {path.name for path in (tmp_path / "cache" / "humanline").iterdir()}

    first = losses(run)
    before = kept()
    assert len(before) == 1
    # A run that resumes with mended code is not refused: its reference is of the same weights.
    code.write_text(BUILDER + "# mended\n")
    whole = losses(run, "resume_from_checkpoint=latest")
    assert whole == {step: loss for step, loss in first.items() if step in whole}
    assert len(kept()) == 2 and before < kept()
    shutil.rmtree(run.folder / "out")
    losses(run, "compile=False")
    assert len(kept()) == 2


def test_log_probs_under_another_sliding_window_are_not_taken_over_and_the_run_does_not_go_on(trajectory, tmp_path):
    run = trajectory("dpo_8_k4")
    run.config["reference"] = {
        "_component_": "humanline.reference.WindowedReference",
        "sync_every": None,
        "cache_dir": str(tmp_path / "cache"),
    }
    run.config |= {"save_every_n_steps": 1, "max_steps_per_epoch": 1}
    config = run.folder / "model" / "config.json"
    content = json.loads(config.read_text()) | {"model_type": "mistral"}
    other = run.again("other")
    for each, window in ((run, None), (other, 3)):
        config.write_text(json.dumps(content | {"sliding_window": window}))
        assert each.train() is None
        assert each.log()[1] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one
    assert "sliding windows" in run.train("resume_from_checkpoint=latest", "epochs=2")


def test_the_digest_of_the_code_is_that_of_this_package_s_sources(tmp_path):
    shutil.copytree(ROOT / "humanline", tmp_path / "humanline", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", EDIT], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["3", str(tmp_path / "humanline" / "__init__.py")], done.stderr


def test_scores_of_a_mended_reward_or_of_another_model_are_not_taken_over(tmp_path, modules):
    code, model = modules / "my_reward.py", tmp_path / "reward model"
    code.write_text(REWARD)
    model.mkdir()
    (model / "weights.bin").write_bytes(b"1")
    reward = OmegaConf.create({"_component_": "my_reward.Mine", "path": str(model)})
    names = [partial_name(reward)]
    code.write_text(REWARD.replace("1.0", "0.5"))
    names.append(partial_name(reward))
    (model / "weights.bin").write_bytes(b"22")
    names.append(partial_name(reward))
    assert len(set(names)) == 3
    assert partial_name(reward) == names[-1]


def partial_name(reward) -> str:
    return PartialFile("scores.jsonl", [score_sources(reward), []]).path.name


def test_a_setting_that_is_a_long_text_names_no_file():
    reward = OmegaConf.create({"_component_": "humanline.rewards.MathReward", "template": "Rate this. " * 100, "n": 3})
    assert score_sources(reward)[1] == []
