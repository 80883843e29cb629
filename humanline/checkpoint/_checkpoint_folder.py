from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.training import FormattedCheckpointFiles

from humanline.errors import ConfigError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def check_checkpoint_folder(cfg: DictConfig) -> None:
    """Checks that the checkpointer's folder and files exist, before tokenizer and data are read from beside them.

    Raises:
        ConfigError: if they do not, or the folder is an adapter's; the message says what there is.
    """
    given = cfg.checkpointer.get("checkpoint_dir") if OmegaConf.is_dict(cfg.checkpointer) else None
    if not isinstance(given, str):
        return  # the checkpointer itself says what it needs
    folder = Path(given)
    if not folder.is_dir() and given == (cfg.get("tokenizer") or {}).get("path"):
        return  # the tokenizer is read first, and says so
    if not folder.is_dir():
        raise ConfigError(
            f"checkpointer: {given} is not a folder (working directory {Path.cwd()}); correct checkpoint_dir, or "
            "download the model to it, as the first lines of the configs show"
        )
    adapters = [place for place in (folder, folder / "adapter") if (place / "adapter_config.json").is_file()]
    if adapters and not (folder / "config.json").is_file():
        raise ConfigError(
            f"checkpointer: {given} has an adapter, not a model; use a folder with the whole weights, which a run "
            "writes with save_adapter_weights_only: False; or to train the adapter further, set adapter to "
            f"{adapters[0]}, and checkpoint_dir to the base model"
        )
    missing = [name for name in _names(cfg.checkpointer.get("checkpoint_files")) if not (folder / name).is_file()]
    if missing:
        there = sorted(each.name for each in folder.iterdir() if each.suffix in _WEIGHTS)
        raise ConfigError(
            f"checkpointer: no {', '.join(missing)} found in {given}, which has {', '.join(there) or 'no weights'}; "
            "correct checkpoint_files, or download the model again"
        )


def _names(given: Any) -> list[str]:
    """Returns the files that ``checkpoint_files`` names: a list, or torchtune's pattern with a number of files."""
    if OmegaConf.is_list(given):
        return [str(name) for name in given]
    try:
        return list(FormattedCheckpointFiles.from_dict(dict(given)).build_checkpoint_filenames())
    except Exception:  # the checkpointer itself says what is wrong
        return []
