import re

import pytest
from omegaconf import OmegaConf

from humanline.checkpoint import check_checkpoint_folder
from humanline.errors import ConfigError


def check(folder, files):
    check_checkpoint_folder(
        OmegaConf.create({"checkpointer": {"checkpoint_dir": str(folder), "checkpoint_files": files}})
    )


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


PATTERN = "model-{}-of-{}.safetensors"


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        {"filename_format": PATTERN, "max_filename": "00002"},
    ],
)
def test_a_complete_checkpoint_passes(folder, files):
    check(folder, files)


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors"],
        {"filename_format": PATTERN, "max_filename": "00003"},
    ],
)
def test_a_missing_file_is_named_with_what_there_is(folder, files):
    there = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
    with pytest.raises(ConfigError, match=f"no .*model-00003-of-.* found in .*, which has {re.escape(there)}; "):
        check(folder, files)


def test_a_missing_folder_is_named_with_the_working_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpointer: .*/nowhere is not a folder \(working directory /"):
        check(tmp_path / "nowhere", ["model.safetensors"])


@pytest.mark.parametrize("place", ["", "adapter"])
def test_an_adapter_is_not_taken_for_a_model(tmp_path, place):
    adapter = tmp_path / place
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").touch()
    with pytest.raises(
        ConfigError, match=f"has an adapter, not a model; .* set adapter to {re.escape(str(adapter))}, "
    ):
        check(tmp_path, ["model.safetensors"])


@pytest.mark.parametrize("checkpointer", ["text", {"checkpoint_dir": None}, {}])
def test_what_the_checkpointer_itself_refuses_is_left_to_it(checkpointer):
    check_checkpoint_folder(OmegaConf.create({"checkpointer": checkpointer}))
