"""The oldest torchao and PEFT that are supported, in an environment of their own: the pinned set has the newest."""

import pytest
from conftest import ROOT
from test_adapters import one_device, quantize, with_lora
from virtual_environment import VirtualEnvironment, copy_repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> VirtualEnvironment:
    environment = VirtualEnvironment(tmp_path_factory.mktemp("oldest"))
    environment.pip("install", "--no-deps", "torchao==0.10.0", "peft==0.18.1")
    environment.install("-e", copy_repository(tmp_path_factory.mktemp("clone")))
    return environment


def train(environment: VirtualEnvironment, run) -> None:
    recipe = run.recipe.relative_to(ROOT).with_suffix("")
    environment.tune("run", recipe, "--config", run._write_config(), cwd=ROOT)


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_the_losses_are_those_of_the_authors_code(oldest, trajectory, name):
    run = trajectory(name)
    train(oldest, run)
    assert list(run.log().values()) == pytest.approx(run.golden["losses"], abs=1e-5)


def test_an_adapter_on_a_base_in_4_bits_trains(oldest, trajectory):
    run = quantize(with_lora(one_device(trajectory("dpo_8_k4"))))
    run.config |= {"dtype": "bf16", "max_steps_per_epoch": 2}
    train(oldest, run)
    assert len(run.log()) == 2
    versions = oldest.run(
        "-c", "import humanline, torchao, peft; print(torchao.__version__, peft.__version__)", cwd=ROOT
    )
    assert versions.stdout.split()[:2] == ["0.10.0", "0.18.1"], versions.stderr
