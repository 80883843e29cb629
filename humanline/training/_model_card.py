"""The model card of an export: `README.md` with its metadata, as the Hugging Face hub reads it."""

import json
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_SHOWN = ("model", "dataset", "source", "reward", "loss", "reference", "optimizer", "lr_scheduler")
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


def model_card(cfg: DictConfig, step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """Returns a model card: base model, data, settings, the last metrics, and versions. It has no path of this machine.

    Args:
        cfg (DictConfig): the run's config.
        step (int): the optimizer step after which the weights are exported.
        total_steps (int): optimizer steps of the run.
        metrics (Mapping[str, float]): the last value of each logged metric; empty if they are of other weights.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    base = _base_model(str(config["checkpointer"].get("checkpoint_dir", "")))
    objective = str(config["loss"]["_component_"]).rpartition(".")[2]
    datasets = [name for key in ("dataset", "source") for name in _hub_datasets(config.get(key))]
    tags = ["humanline", "alignment", *re.findall("dpo|kto|grpo", objective.lower())]
    metadata = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if datasets:
        metadata["datasets"] = datasets
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    settings = [*_settings({key: config[key] for key in _SHOWN if config.get(key)})]
    settings += [(key, value) for key, value in _settings(config) if "." not in key and key != "output_dir"]
    measured = [(name, f"{value:.6g}") for name, value in sorted(metrics.items())]
    versions = [("Python", platform.python_version()), *((name, _version(name)) for name in _PACKAGES)]
    last = "## Last metrics\n\n`val/` is measured against the model before training.\n\n" + _table(measured) + "\n"
    return (
        f"---\n{front}---\n\n# {Path(config['output_dir']).name}\n\n"
        f"{base}, trained with `{objective}` of humanline for {step} of {total_steps} optimizer steps.\n\n"
        f"## Settings\n\n{_table(settings)}\n{last if measured else ''}## Versions\n\n{_table(versions)}\n{_METHOD}"
    )


def _base_model(folder: str) -> str:
    """Returns the name under which the base model was published, as far as its files tell; else its folder's name."""
    try:
        name = json.loads((Path(folder).expanduser() / "config.json").read_text()).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else Path(folder).name


def _hub_datasets(section: Any) -> Iterator[str]:
    for key in ("source", "prompts"):
        name = section.get(key) if isinstance(section, dict) else None
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
            yield name


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each value by its dotted key; of a path only its last part."""
    for key, value in values.items():
        if isinstance(value, dict):
            if not prefix and key not in _SHOWN:
                continue
            yield from _settings(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            is_path = isinstance(value, str) and ("/" in value) and (value[0] in "/~." or Path(value).exists())
            yield f"{prefix}{key}", Path(value).name if is_path else "null" if value is None else str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows)
    return "| | |\n|---|---|\n" + "".join(f"| `{name}` | {value} |\n" for name, value in cells)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
