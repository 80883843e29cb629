"""docs/configuration.md has every key that a config may have, as the code has it."""

import runpy
from dataclasses import fields

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import humanline.data
import humanline.losses
import humanline.reference
import humanline.rewards
import humanline.rollout
from humanline.config import COMPONENTS, Settings
from humanline.losses import PerceptualLoss
from humanline.reference import Strategy
from humanline.rollout import EngineSettings

PROGRAM = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
PAGE = (ROOT / "docs" / "configuration.md").read_text()
TABLES = PROGRAM["tables"](PAGE)
IDS = [f"{kind}-{names[0]}" for kind, names in TABLES]


def listed(kind: str) -> list[str]:
    return [name for found, names in TABLES if found == kind for name in names]


def exported(room, is_component) -> set[str]:
    return {f"{room.__name__}.{name}" for name in room.__all__ if is_component(name, getattr(room, name))}


def is_a(kind: type):
    return lambda name, it: isinstance(it, type) and issubclass(it, kind) and it is not kind


def test_the_page_is_what_the_code_says():
    assert PROGRAM["page"](PAGE) == PAGE, "docs/configuration.md is out of date; run: python docs/make_configuration.py"


@pytest.mark.parametrize(("kind", "names"), TABLES, ids=IDS)
def test_every_key_has_a_type_and_a_meaning(kind, names):
    for key in PROGRAM["keys"](kind, names):
        assert key.type and len(key.meaning.split()) > 1, (
            f"{key.name} of {names}: say in the docstring what it means (for a setting: in the text under the field)"
        )


def test_every_setting_is_in_one_table():
    assert sorted(listed("settings")) == sorted(field.name for field in fields(Settings))


def test_every_component_s_key_is_on_the_page():
    assert [key for key in COMPONENTS if f"\n| `{key}` |" not in PAGE] == []


@pytest.mark.parametrize(
    "components",
    [
        pytest.param(exported(humanline.losses, is_a(PerceptualLoss)), id="losses"),
        pytest.param(exported(humanline.reference, is_a(Strategy)), id="references"),
        pytest.param(exported(humanline.data, lambda name, _: name.endswith("_groups")), id="builders"),
        pytest.param(exported(humanline.rewards, is_a(object)), id="rewards"),
        pytest.param(
            exported(humanline.rollout, is_a(EngineSettings)),
            id="engines",
        ),
    ],
)
def test_every_component_of_a_kind_is_in_one_table(components):
    assert components
    assert {path: listed("component").count(path) for path in components} == dict.fromkeys(components, 1), (
        "docs/configuration.md: give each a <!-- component: PATH --> and <!-- end -->, and run its program"
    )


def test_every_component_of_ours_in_a_config_is_in_a_table():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path))
        named = {node["_component_"] for node in content.values() if isinstance(node, dict) and "_component_" in node}
        builders = {content["model"]["_component_"]} if "model" in content else set()  # docs/models.md has these
        assert {name for name in named - builders if name.startswith("humanline.")} <= set(listed("component")), path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("humanline_*.py")), ids=lambda path: path.stem)
def test_every_recipe_that_does_not_train_has_a_table(path):
    trains = path.stem.endswith(("_distributed", "_single_device"))
    assert trains or path.stem in listed("program"), "give it a <!-- program: NAME --> in docs/configuration.md"
