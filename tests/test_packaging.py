"""What an installation brings, asks for and leaves behind."""

import os
import re
import subprocess
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from virtual_environment import REPOSITORY, VirtualEnvironment, build_wheel, copy_repository


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_repository(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {_normal(pin.name): pin for pin in parsed}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_wheel_carries_every_recipe_and_config(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"humanline/_tune/recipes/{path.name}" for path in (REPOSITORY / "recipes").glob("humanline_*.py")}
    configs = {f"humanline/_tune/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert recipes and recipes | configs == {name for name in files if name.startswith("humanline/_tune/")}


def test_wheel_says_that_its_types_may_be_checked(wheel: Path) -> None:
    assert "humanline/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_wheel_takes_no_top_level_name_but_its_own(wheel: Path, metadata: Message) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"humanline", "humanline_tune.pth", f"humanline-{metadata['Version']}.dist-info"}


def test_core_dependencies_are_the_six_and_everything_else_is_an_extra(requirements: list[Requirement]) -> None:
    core = {requirement.name for requirement in requirements if requirement.marker is None}
    assert core == {"torch", "torchtune", "torchao", "datasets", "huggingface-hub", "omegaconf"}


@pytest.mark.parametrize(
    ("version", "imports"),
    [("0.10.0", True), ("0.11.0", True), ("0.12.0", False), ("0.13.0", True), ("0.14.1", True)]
    + [("0.15.0", True), ("0.16.0", True), ("0.17.0", True), ("0.18.0", True)],
)
def test_torchao_is_any_that_imports_with_the_torch_that_is_required(
    requirements: list[Requirement], version: str, imports: bool
) -> None:
    (torchao,) = (requirement for requirement in requirements if requirement.name == "torchao")
    assert torchao.specifier.contains(version) == imports


def test_constraints_pin_every_requirement_to_a_version_it_allows(
    requirements: list[Requirement], pins: dict[str, Requirement]
) -> None:
    for requirement in requirements:
        (pin,) = pins[_normal(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_constraints_hold_on_any_machine(pins: dict[str, Requirement]) -> None:
    assert [str(pin) for pin in pins.values() if "+" in str(pin) or pin.url] == []  # such as +cpu or +cu130


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_uninstalling_leaves_nothing_behind(wheel: Path, clone: Path, tmp_path: Path, editable: bool) -> None:
    environment = VirtualEnvironment(tmp_path)
    before, clone_before = _files(environment.site_packages), _files(clone)
    environment.install(*(["-e", clone] if editable else [wheel]))
    where = environment.run("-c", "import humanline; print(humanline.__file__)", cwd=tmp_path).stdout.strip()
    assert where == str((clone if editable else environment.site_packages) / "humanline" / "__init__.py")

    environment.pip("uninstall", "--yes", "humanline")
    assert _files(environment.site_packages) == before
    assert _files(clone) == clone_before


def test_editable_install_copies_no_recipe(clone: Path, tmp_path: Path) -> None:
    environment = VirtualEnvironment(tmp_path)
    environment.install("-e", clone)
    copied = {path.name for path in _files(environment.site_packages) if path.suffix in {".py", ".yaml"}}
    assert copied == set()


@pytest.mark.parametrize("target", ["test", "lint", "demo", "bench"])
def test_make_installs_once_and_again_when_the_pins_change(clone: Path, target: str) -> None:
    def planned() -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "-n", target]
        return subprocess.run(command, cwd=clone, env=environment, check=True, capture_output=True, text=True).stdout

    installed, pins = clone / ".venv" / "installed", clone / "constraints.txt"
    installed.parent.mkdir(exist_ok=True)
    installed.touch()
    assert "pip install" not in planned()
    os.utime(pins, (installed.stat().st_mtime + 1,) * 2)
    assert "pip install -c constraints.txt" in planned()
    os.utime(pins, (installed.stat().st_mtime - 1,) * 2)
