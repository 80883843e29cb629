"""A mistake on a recipe's command line, or in its config file, is one line that names it."""

import re

import pytest
from omegaconf import OmegaConf

from humanline.config._config_file import read_config
from humanline.errors import ConfigError

CONFIG = """\
seed: 3
output_dir: out
optimizer:
  _component_: torch.optim.AdamW
  lr: 1.0e-5
  betas: [0.9, 0.95]
dataset:
  _component_: humanline.data.encoded_groups
  source: ${output_dir}/groups.jsonl
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def refusal(*arguments):
    with pytest.raises(ConfigError) as error:
        read_config(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("config", [("--config", "{}"), ("--config={}",)])
def test_overrides_set_replace_and_remove(file, config):
    overrides = (
        "seed=${epochs} optimizer=torch.optim.SGD ~optimizer.betas optimizer.momentum=0.9 epochs=2 loss.beta=0.1"
    )
    given = ["dataset.split=a=b", "dataset_val=null", "output_dir=None", "shards.max_filename=00004"]
    cfg = read_config([*overrides.split(), *(part.format(file) for part in config), *given])
    assert OmegaConf.to_container(cfg) == {
        "seed": "${epochs}",
        "output_dir": None,
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-5, "momentum": 0.9},
        "dataset": {
            "_component_": "humanline.data.encoded_groups",
            "source": "${output_dir}/groups.jsonl",
            "split": "a=b",
        },
        "epochs": 2,
        "loss": {"beta": 0.1},
        "dataset_val": None,
        "shards": {"max_filename": "00004"},
    }


def test_a_component_may_be_removed(file):
    assert "dataset" not in read_config(["--config", file, "~dataset"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~dataset_val", "override: found no key dataset_val to remove; did you mean dataset?"),
        ("~optimizer.lrr", "override: found no key optimizer.lrr to remove; did you mean optimizer.lr?"),
        ("~loss.beta", "found no key loss to remove; expected one of seed, output_dir, optimizer, dataset"),
        ("foo", "override 'foo': expected key=value or ~key"),
        ("=", "override '=': expected key=value or ~key"),
        ("=3", "override '=3': expected key=value or ~key"),
        ("~", "override '~': expected key=value or ~key"),
        ("optimizer..lr=1", "override 'optimizer..lr=1': expected key=value or ~key"),
        ("seed.a.b=1", "override 'seed.a.b=1': expected a section at seed, found 3; correct the key"),
        ("dataset.source.x=1", "expected a section at dataset.source, found '${output_dir}/groups.jsonl'"),
        ("optimizer.betas.0=1", "expected a section at optimizer.betas, found [0.9, 0.95]"),
        ("~seed.a", "expected a section at seed, found 3"),
        ("seed=[1", "override 'seed=[1': the value is invalid YAML: "),
        ("seed=${sed}", "seed: cannot resolve its value: Interpolation key 'sed' not found"),
        ("seed=${oc.env:HUMANLINE_NOT_SET}", "seed: cannot resolve its value: "),
        ("~output_dir", "dataset.source: cannot resolve its value: Interpolation key 'output_dir' not found"),
        ("--nproc_per_node", "--nproc_per_node: not an option of a recipe; put torchrun's options before"),
        ("-h5", "-h5: not an option of a recipe"),
    ],
)
def test_a_wrong_override_is_named(file, override, message):
    assert message in refusal("--config", file, override)


def test_a_key_is_overridden_once(file):
    line = refusal("--config", file, "seed=1", "epochs=2", "seed=2")
    assert "override 'seed=2': 'seed=1' already overrides seed; remove one of them" in line


def test_there_is_one_config(file):
    assert refusal("seed=1").startswith("--config: missing; usage: tune run RECIPE --config FILE")
    assert refusal("--config").startswith("--config: missing; usage: ")
    assert f"--config: expected one file, got 2 ({file}, b.yaml); " in refusal("--config", file, "--config", "b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3\nmodel: [1\n", r"config\.yaml line 3: invalid YAML: "),
        ("seed: 3\n\tdtype: x\n", r"config\.yaml line 2: invalid YAML: "),
        ("seed: 3\nseed: 4\n", r"config\.yaml line 2: invalid YAML: found duplicate key seed"),
        ("- 1\n- 2\n", r"config\.yaml: found no keys, expected lines of key: value"),
        ("", r"config\.yaml: found no keys"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert re.search(message, refusal("--config", str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert f"--config: file {tmp_path}/config.yml not found (working directory " in refusal(
        "--config", f"{tmp_path}/config.yml"
    )
    assert f"--config: file {tmp_path} not found" in refusal("--config", str(tmp_path))


def test_a_recipe_ends_with_that_line_and_nothing_else(trajectory, capsys):
    run = trajectory("dpo_8_k4")
    line = run.train("~dataset_val")
    assert line.startswith("humanline_dpo_distributed.py: override: found no key dataset_val")
    assert run.train("epoch=3").endswith("epoch: not a key of this recipe; did you mean epochs?")
    assert capsys.readouterr().err == ""
