"""benchmarks/gpu.py, rehearsed on a CPU with tiny sizes: each section runs to its end and says what it measured."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sections = load("gpu_sections")


@pytest.mark.parametrize("name", sections.SECTIONS)
def test_a_section_runs_to_its_end(name):
    measured = sections.SECTIONS[name][0](sections.Bench("cpu", tiny=True))
    json.dumps(measured)
    numbers = [value for value in measured.values() if not isinstance(value, str)]
    assert numbers and all(math.isfinite(value) and value >= 0 for value in numbers)
    assert any(key.endswith(("_ms", "_per_s", "_tflops", "passes")) for key in measured)


def test_the_limits_of_all_sections_are_known_and_flex_equals_the_dense_mask():
    assert all(0 < limit <= 180 for _, limit in sections.SECTIONS.values())
    assert sections.flex(sections.Bench("cpu", tiny=True))["output_largest_difference"] < 0.02  # bfloat16


def command(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_command_appends_a_line_per_section(tmp_path):
    output = tmp_path / "gpu.jsonl"
    for _ in range(2):
        assert command("rates", "--rehearse", "--output", output).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["section"] for line in lines] == ["rates", "rates"]
    assert lines[0]["status"] == "ok" and lines[0]["measured"]["copy_gb_per_s"] > 0
    assert lines[0]["machine"]["torch"] and lines[0]["seconds"] > 0


def test_a_section_that_fails_is_said_and_ends_the_command_with_1(tmp_path):
    broken = tmp_path / "gpu_sections.py"
    broken.write_text((BENCHMARKS / "gpu_sections.py").read_text() + "\nSECTIONS = {'flex': (lambda _: 1 / 0, 60)}\n")
    (tmp_path / "gpu.py").write_text((BENCHMARKS / "gpu.py").read_text())
    output = tmp_path / "gpu.jsonl"
    ran = subprocess.run(
        [sys.executable, tmp_path / "gpu.py", "--rehearse", "--output", output], capture_output=True, timeout=120
    )
    (line,) = map(json.loads, output.read_text().splitlines())
    assert ran.returncode == 1 and line["status"] == "failed" and "ZeroDivisionError" in line["printed"][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unknown_sections_and_a_missing_gpu_are_refused_before_anything_runs():
    assert "no section is named flx; there are rates, flex" in command("flx").stderr
    assert "there is no GPU; --rehearse" in command("flex").stderr
