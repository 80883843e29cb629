"""What torchtune and torchao lack here is said with their versions and the remedy, where it is not supplied."""

import os
import runpy
import subprocess
import sys

import pytest
import torchtune
from torchtune.modules import attention_utils

from humanline.torchtune_seam import internals


def test_a_torchtune_without_a_private_name_is_refused_by_version_and_name(monkeypatch):
    monkeypatch.delattr(attention_utils, "_MaskType")
    with pytest.raises(ImportError) as error:
        runpy.run_path(internals.__file__)
    line = str(error.value)
    assert line.startswith(f"torchtune {torchtune.__version__ or 'from source'} in ")
    assert "cannot import name '_MaskType'" in line
    assert line.endswith(f"for a fork, change {internals.__file__}")


@pytest.mark.slow
def test_a_torchao_that_does_not_import_with_this_torch_is_refused_by_version(tmp_path):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("from sys import ScalingType")
    command = [sys.executable, "-c", "import humanline, torchtune"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ImportError: torchao 0.") and "does not import with torch 2." in line
    assert "cannot import name 'ScalingType'" in line and line.endswith('(pip install "torchao<0.18")')
