"""Uploads a run's weights to the Hugging Face hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi, get_token
from torchtune import utils

from humanline.errors import ConfigError, TrainingError

log = utils.get_logger("INFO")


def check_hub(repo: str | None) -> None:
    """Checks before any work that an upload can be tried.

    Args:
        repo (str | None): the repository; None uploads nothing.

    Raises:
        ConfigError: if there is no token.
    """
    if repo is not None and get_token() is None:
        raise ConfigError(
            "push_to_hub: there is no token of the Hugging Face hub; run hf auth login, set HF_TOKEN, or remove the key"
        )


def push_to_hub(folder: Path, repo: str, message: str) -> str:
    """Uploads the files of a folder, and returns the address of the commit. A new repository is private.

    Args:
        folder (Path): an exported folder.
        repo (str): ``owner/name``.
        message (str): the commit's message.

    Raises:
        TrainingError: if the upload fails; the folder is left as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of the hub, of several HTTP clients, or of its storage
        said = " ".join(str(error).split())[:300]
        raise TrainingError(f"push_to_hub: {said}; upload it later: hf upload {repo} {folder}") from error
    for config in folder.rglob("adapter_config.json"):
        base = json.loads(config.read_text()).get("base_model_name_or_path")
        if base and Path(base).exists():
            log.warning(
                f"push_to_hub: {config.name} names this machine's folder {base} as the base model; in the repository, "
                "set base_model_name_or_path to the model's name on the hub. Models that tune download fetched have it"
            )
    return str(commit.commit_url)
