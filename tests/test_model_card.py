"""The model card of an export says what it was made from and how, in the hub's format, and nothing of the machine."""

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from humanline.config import load_config
from humanline.training._model_card import model_card


def test_a_card_names_base_model_data_settings_and_the_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(ROOT / "configs" / "llama3_8b_offline.yaml")
    card = ModelCard(
        model_card(cfg, 300, 313, {"loss": (300, 0.52), "val/rewards/accuracies": (290, 0.71), "later": (301, 1.0)})
    )
    data = card.data.to_dict()
    assert data["base_model"] == "Meta-Llama-3-8B-Instruct"
    assert data["datasets"] == ["princeton-nlp/llama3-ultrafeedback-armorm"]
    assert {"humanline", "dpo"} <= set(data["tags"])
    for text in (
        "trained with `HumanlineDPOLoss` of humanline for 300 of 313 optimizer steps",
        "| `loss.log_eps_P` | `-1.5` |",
        "| `optimizer.lr` | ",
        "| `val/rewards/accuracies` | `0.71` | `290` |",
        "| `humanline` | ",
        "arXiv:2509.24207",
    ):
        assert text in card.text, text
    assert "later" not in card.text


def test_a_card_has_nothing_of_the_machine_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (model / "original_repo_id.json").write_text('{"repo_id": "owner/base"}')
    (tmp_path / "pairs.jsonl").write_text("")
    cfg = OmegaConf.create(
        {
            "output_dir": str(tmp_path / "outputs" / "mine"),
            "checkpointer": {"checkpoint_dir": str(model)},
            "tokenizer": {"path": str(model), "chat_template_kwargs": {"enable_thinking": False}},
            "dataset": {
                "source": str(tmp_path / "pairs.jsonl"),
                "system_prompt": "You are careful " * 40 + "and/or <kind>",
            },
            "reward": {
                "_component_": "humanline.rewards.JudgeReward",
                "base_url": "http://user:pass@host.internal/v1",
                "api_key": "sk-other",
                "model": "${oc.env:MY_KEY}",
            },
            "loss": {"_component_": "humanline.losses.HumanlineKTOLoss"},
            "tokens_per_row": 64,
        }
    )
    text = model_card(cfg, 1, 1, {})
    assert not any(word in text for word in (str(tmp_path), "sk-", "pass@", "host.internal"))
    assert "| `dataset.source` | `pairs.jsonl` |" in text and "| `tokens_per_row` | `64` |" in text
    assert "| `tokenizer.path` | `base` |" in text
    assert "| `tokenizer.chat_template_kwargs.enable_thinking` | `False` |" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/base" and "datasets" not in front
    assert "# mine\n" in text and "Last metrics" not in text


@pytest.mark.slow
def test_every_export_of_a_run_has_its_card(trajectory):
    run = trajectory("dpo_8_k4")
    (run.folder / "model" / "README.md").write_text("the base model's")
    (run.folder / "model" / "README.md").chmod(0o444)
    assert run.train() is None
    card = (run.folder / "out" / "epoch_0" / "README.md").read_text()
    assert "the base model's" not in card and "for 12 of 12 optimizer steps" in card
    assert f"| `loss` | `{run.log()[12]:.6g}` | `12` |" in card


@pytest.mark.slow
def test_a_resumed_run_s_card_has_the_metrics_of_the_run_before(trajectory):
    run = trajectory("dpo_8_k4")
    assert run.train("save_every_n_steps=12") is None
    folder = run.folder / "out" / "epoch_0"
    before = metrics_of(folder / "README.md")
    (folder / "README.md").unlink()
    assert run.train("resume_from_checkpoint=latest") is None
    assert metrics_of(folder / "README.md") == before and "| `loss` | `" in before


def metrics_of(card):
    return card.read_text().partition("## Last metrics")[2].partition("## Versions")[0]
