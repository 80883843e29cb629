from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from humanline.errors import ConfigError


def check_checkpoint_folder(cfg: DictConfig) -> None:
    """Checks that the checkpointer's folder and files exist, before tokenizer and data are read from beside them.

    Raises:
        ConfigError: if they do not, or the folder is an adapter's; the message says what there is.
    """
    given = cfg.checkpointer.get("checkpoint_dir")
    if not isinstance(given, str):
        return  # the checkpointer itself says what it needs
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError(
            f"checkpointer: {given} is not a folder (working directory {Path.cwd()}); correct checkpoint_dir, or "
            "download the model to it, as the first lines of the configs show"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"checkpointer: {given} has an adapter, not a model; use the folder of the whole weights, "
            "which save_adapter_weights_only: False writes beside it; or to train the adapter further, set adapter to "
            "its folder, and checkpoint_dir to that of the base model"
        )
    names = cfg.checkpointer.get("checkpoint_files")
    if OmegaConf.is_list(names):
        missing = [str(name) for name in names if not (folder / str(name)).is_file()]
        if missing:
            there = sorted(each.name for each in folder.iterdir() if each.suffix in (".safetensors", ".bin", ".pt"))
            raise ConfigError(
                f"checkpointer: {given} has no {', '.join(missing)}, but {', '.join(there) or 'no weights'}; correct "
                "checkpoint_files, or download the model again"
            )
