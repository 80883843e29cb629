"""docs/humanline.ipynb, run from its first cell to its last with fewer steps and sums than it has."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from test_smollm2 import folder  # noqa: F401, a fixture

NOTEBOOK = ROOT / "docs" / "humanline.ipynb"


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def images(cells) -> int:
    return sum("image/png" in output.get("data", ()) for cell in cells for output in cell.get("outputs", ()))


def test_what_is_in_it_is_of_a_whole_run():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "pass@1" in "".join(map(printed, cells))
    assert images(cells) == 3


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, folder):  # noqa: F811
    assert folder.is_relative_to(ROOT / "models")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("recipes", "configs", "demo", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "steps, prompts = 1, 4"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    figures = json.loads((tmp_path / "outputs/notebook/after.json").read_text())["figures"]
    assert 0 <= figures["pass@1"]["mean"] <= 1
    assert images(notebook.cells) == 3
    assert (tmp_path / "outputs/notebook/run/epoch_0/adapter/adapter_model.safetensors").is_file()
