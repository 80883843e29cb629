"""Weights that come from elsewhere are data: reading them runs nothing. (For templates see test_chat_tokenizer.py.)"""

import pickle

import pytest
import torch


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """The file that a bomb writes, and does write where it goes off."""
    path = tmp_path / "gone-off"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()
    path.unlink()
    return path


def test_weights_that_would_run_code_are_refused(trajectory, mark):
    run = trajectory("dpo_8_k4")
    torch.save({"model.norm.weight": Bomb(mark)}, run.folder / "model" / "weights.bin")
    run.config["checkpointer"]["checkpoint_files"] = ["weights.bin"]
    assert "checkpointer: " in run.train()
    assert not mark.exists()


def test_an_adapter_that_would_run_code_is_refused(trajectory, mark):
    run = trajectory("dpo_8_k4")
    run.config["model"] |= {
        "_component_": "torchtune.models.llama3.lora_llama3",
        "lora_attn_modules": ["q_proj"],
        "lora_rank": 4,
        "lora_alpha": 8.0,
    }
    file = run.folder / "adapter_model.pt"
    torch.save({"layers.0.attn.q_proj.lora_a.weight": Bomb(mark)}, file)
    assert f"adapter: {file} cannot be read as an adapter" in run.train(f"adapter={file}")
    assert not mark.exists()
