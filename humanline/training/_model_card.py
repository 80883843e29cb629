"""The model card of an export: `README.md` with its metadata, as the Hugging Face hub reads it."""

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from humanline.checkpoint import installed_version

_SHOWN = ("model", "tokenizer", "dataset", "source", "reward", "loss", "reference", "optimizer", "lr_scheduler")
_SECRET = re.compile(r"(^|_)(key|token|auth)$|secret|password|credential", re.IGNORECASE)
_PACKAGES = ("humanline", "torch", "torchtune", "torchao", "transformers")
_METHOD = """\
## Method

[Humanline: Online Alignment as Perceptual Loss](https://arxiv.org/abs/2509.24207) (Liu, Muennighoff, Ethayarajh):
each token's log-ratio of policy to reference is clipped before the loss, and the reference is synced to the policy.

```bibtex
@inproceedings{liu2026humanline,
  title     = {Humanline: Online Alignment as Perceptual Loss},
  author    = {Sijia Liu and Niklas Muennighoff and Kawin Ethayarajh},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2509.24207}
}
```
"""


def model_card(cfg: DictConfig, step: int, total_steps: int, metrics: Mapping[str, tuple[int, float]]) -> str:
    """Returns a model card: base model, data, settings, the last metrics, and versions.

    Keys and passwords, values that the config takes from elsewhere, addresses and folders are left out.

    Args:
        cfg (DictConfig): the run's config.
        step (int): the optimizer step after which the weights are exported.
        total_steps (int): optimizer steps of the run.
        metrics (Mapping[str, tuple[int, float]]): the last step and value of each logged metric.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    base = _base_model(Path(str(cfg.checkpointer.get("checkpoint_dir", ""))).expanduser())
    objective = str(config["loss"]["_component_"]).rpartition(".")[2]
    datasets = [name for key in ("dataset", "source") for name in _hub_datasets(config.get(key))]
    tags = ["humanline", "alignment", *re.findall("dpo|kto|grpo", objective.lower())]
    metadata = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if datasets:
        metadata["datasets"] = datasets
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    settings = [*_settings({key: config[key] for key in _SHOWN if config.get(key)})]
    settings += [(key, value) for key, value in _settings(config) if "." not in key and key != "output_dir"]
    measured = [(name, f"{value:.6g}", str(at)) for name, (at, value) in sorted(metrics.items()) if at <= step]
    versions = [(name, installed_version(name) or "not installed") for name in _PACKAGES]
    sections = {
        "Settings": _table(settings, "key", "value"),
        "Last metrics": _table(measured, "metric", "value", "step") if measured else "",
        "Versions": _table([("Python", platform.python_version()), *versions], "package", "version"),
    }
    tables = "".join(f"## {title}\n\n{table}\n" for title, table in sections.items() if table)
    return (
        f"---\n{front}---\n\n# {Path(str(cfg.output_dir)).name}\n\n"
        f"{base}, trained with `{objective}` of humanline for {step} of {total_steps} optimizer steps. "
        f"Metrics under `val/` are measured against the model before training.\n\n{tables}{_METHOD}"
    )


def _base_model(folder: Path) -> str:
    """Returns the base model's name on the hub, as `tune download` notes it; else its folder's name."""
    try:
        name = json.loads((folder / "original_repo_id.json").read_text())["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    return name if isinstance(name, str) else folder.name


def _hub_datasets(section: Any) -> Iterator[str]:
    for key in ("source", "prompts"):
        name = section.get(key) if isinstance(section, dict) else None
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _exists(name):
            yield name


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each value by its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            if prefix or key in _SHOWN:
                yield from _settings(value, f"{prefix}{key}.")
        elif not _SECRET.search(str(key)) and not (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
            yield f"{prefix}{key}", ", ".join(map(_said, value)) if isinstance(value, list) else _said(value)


def _said(value: Any) -> str:
    """Returns a value in a line, without what tells of the machine: of a path its last part, of an address its kind."""
    if value is None:
        return "null"
    text = " ".join(str(value).split())
    if "://" in text:
        return f"{text.partition('://')[0][:20]}://..."
    if "/" in text and " " not in text and (text[0] in "/~." or _exists(text)):
        return text.rstrip("/").rpartition("/")[2]
    return text if len(text) <= 200 else f"{text[:200]}..."


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # longer than a path can be
        return False


def _table(rows: Sequence[tuple[str, ...]], *header: str) -> str:
    cells = ([cell.replace("|", "\\|").replace("`", "'") for cell in row] for row in rows)
    lines = [header, ["---"] * len(header), *([f"`{cell}`" for cell in row] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
