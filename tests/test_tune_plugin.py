"""`tune` in a fresh environment, where humanline is installed from its wheel or editable from a clone.

The recipe that runs here is a stand-in that prints which file it is and what it was started with.
"""

import json
import shutil
from pathlib import Path

import pytest
from virtual_environment import REPOSITORY, VirtualEnvironment, build_wheel, copy_repository

pytestmark = pytest.mark.slow

STAND_IN_RECIPE = """
import os, sys

rank, world_size = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)
print(f"ran {__file__} as {rank} of {world_size} with {sys.argv[1:]}\\n", end="")  # one write, whole among other ranks'
"""
STAND_IN_CONFIG = """# recipe: humanline_standin_distributed, humanline_standin_single_device
norm:
  _component_: torchtune.modules.RMSNorm
  dim: 8
"""
COPIED_RECIPE = f"""
import beside
from humanline.errors import ConfigError
{STAND_IN_RECIPE}
"""
FORKS_ENTRY = """
_ALL_RECIPES.append(
    Recipe(
        name="humanline_standin_distributed",
        file_path="humanline_standin_distributed.py",
        configs=[Config(name="llama3/8B_standin", file_path="llama3/8B_standin.yaml")],
        supports_distributed=True,
    )
)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the stand-in among its recipes and configs."""
    clone = copy_repository(tmp_path_factory.mktemp("clone"))
    (clone / "recipes" / "humanline_standin_distributed.py").write_text(STAND_IN_RECIPE)
    (clone / "recipes" / "humanline_standin_single_device.py").write_text(STAND_IN_RECIPE)
    (clone / "configs" / "standin.yaml").write_text(STAND_IN_CONFIG)
    return clone


@pytest.fixture(scope="module")
def from_wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> VirtualEnvironment:
    environment = VirtualEnvironment(tmp_path_factory.mktemp("from_wheel"))
    environment.install(build_wheel(clone, tmp_path_factory.mktemp("wheel")))
    return environment


@pytest.fixture(scope="module")
def from_clone(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> VirtualEnvironment:
    environment = VirtualEnvironment(tmp_path_factory.mktemp("from_clone"))
    environment.install("-e", clone)
    return environment


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> VirtualEnvironment:
    """An environment with torchtune alone."""
    return VirtualEnvironment(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module", params=["from_wheel", "from_clone"])
def environment(request: pytest.FixtureRequest) -> VirtualEnvironment:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def home(from_wheel: VirtualEnvironment) -> Path:
    """Where a wheel's recipes and configs are."""
    return from_wheel.site_packages / "humanline" / "_tune"


@pytest.fixture(scope="module")
def torchtunes_own(without: VirtualEnvironment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The configs of each recipe in torchtune's own registry, which without humanline may not import beside torchao."""
    folder = bare_torchtune(without, tmp_path_factory.mktemp("anywhere"))
    code = (
        "import json; from torchtune._recipe_registry import get_all_recipes; "
        "print(json.dumps({each.name: [config.name for config in each.configs] for each in get_all_recipes()}))"
    )
    names = json.loads(without.run("-c", code, cwd=folder).stdout)
    return {recipe: configs or ["<>"] for recipe, configs in names.items()}


@pytest.fixture(scope="module")
def fork(without: VirtualEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork of torchtune that has copied the stand-in and its config, and registers them itself."""
    fork, torchtune = tmp_path_factory.mktemp("fork"), without.libraries / "torchtune"
    (fork / "torchtune").mkdir()
    for entry in torchtune.iterdir():
        if entry.name != "_recipe_registry.py":
            (fork / "torchtune" / entry.name).symlink_to(entry)
    registry = (torchtune / "_recipe_registry.py").read_text()
    (fork / "torchtune" / "_recipe_registry.py").write_text(registry + FORKS_ENTRY)
    (fork / "recipes" / "configs" / "llama3").mkdir(parents=True)
    shutil.copy(without.libraries / "recipes" / "__init__.py", fork / "recipes")
    (fork / "recipes" / "humanline_standin_distributed.py").write_text(STAND_IN_RECIPE)
    (fork / "recipes" / "configs" / "llama3" / "8B_standin.yaml").write_text(STAND_IN_CONFIG)
    return fork


@pytest.fixture
def bare_tune(without: VirtualEnvironment, tmp_path: Path) -> Path:
    """A folder with a `tune` that only prints its arguments and the registry, which is all it imports of torchtune."""
    bare_torchtune(without, tmp_path)
    (tmp_path / "tune").write_text(
        "import sys\n"
        "from torchtune._recipe_registry import get_all_recipes\n"
        "print(*sys.argv[1:])\n"
        "print(*[recipe.name for recipe in get_all_recipes()])\n"
    )
    return tmp_path


def bare_torchtune(environment: VirtualEnvironment, folder: Path) -> Path:
    """A folder with a torchtune that has its registry and nothing else."""
    (folder / "torchtune").mkdir()
    (folder / "torchtune" / "__init__.py").touch()
    shutil.copy(environment.libraries / "torchtune" / "_recipe_registry.py", folder / "torchtune")
    return folder


def listed(table: str) -> dict[str, list[str]]:
    """The configs of each recipe in the table that `tune ls` printed."""
    recipes: dict[str, list[str]] = {}
    for row in table.splitlines()[1:]:
        words = row.split()
        if not row.startswith(" "):
            recipe = words.pop(0)
            recipes[recipe] = []
        recipes[recipe] += words
    return recipes


def humanline_recipes(clone: Path) -> dict[str, list[str]]:
    """What `tune ls` has to show for `clone`, going by its files."""
    users = {path.stem: recipes_in_first_line(path) for path in sorted((clone / "configs").glob("*.yaml"))}
    recipes = sorted(path.stem for path in (clone / "recipes").glob("humanline_*.py"))
    return {
        recipe: [f"humanline/{name}" for name, named in users.items() if recipe in named] or ["<>"]
        for recipe in recipes
    }


def recipes_in_first_line(config: Path) -> list[str]:
    """The recipes of a line `# recipe: one, another`; none where the first line is another."""
    key, _, names = config.read_text().splitlines()[0].partition(": ")
    return names.split(", ") if key == "# recipe" else []


def test_every_config_names_recipes_that_exist() -> None:
    for config in (REPOSITORY / "configs").glob("*.yaml"):
        recipes = recipes_in_first_line(config)
        assert recipes, config
        for recipe in recipes:
            assert (REPOSITORY / "recipes" / f"{recipe}.py").is_file(), config


def test_ls_lists_torchtunes_recipes_unchanged_and_then_humanlines(
    environment: VirtualEnvironment, torchtunes_own: dict[str, list[str]], clone: Path, tmp_path: Path
) -> None:
    done = environment.run(environment.tune_script, "ls", cwd=tmp_path)  # from its very start, and in no fork
    assert done.returncode == 0, done.stderr
    table = listed(done.stdout)
    assert list(table.items()) == [*torchtunes_own.items(), *humanline_recipes(clone).items()]
    assert table["humanline_standin_distributed"] == ["humanline/standin"]


def test_cp_copies_a_recipe_by_name(environment: VirtualEnvironment, tmp_path: Path) -> None:
    environment.tune("cp", "humanline_standin_distributed", "mine.py", cwd=tmp_path)
    assert (tmp_path / "mine.py").read_text() == STAND_IN_RECIPE


def test_cp_copies_a_config_by_name(from_wheel: VirtualEnvironment, tmp_path: Path) -> None:
    from_wheel.tune("cp", "humanline/standin", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == STAND_IN_CONFIG


def test_cat_prints_a_config_by_name(from_wheel: VirtualEnvironment, tmp_path: Path) -> None:
    assert "torchtune.modules.RMSNorm" in from_wheel.tune("cat", "humanline/standin", cwd=tmp_path)


def test_validate_reads_a_config_by_name(from_wheel: VirtualEnvironment, tmp_path: Path) -> None:
    assert "Config is well-formed!" in from_wheel.tune("validate", "humanline/standin", cwd=tmp_path)


def test_validate_prefers_a_local_file(from_wheel: VirtualEnvironment, home: Path, bare_tune: Path) -> None:
    config, arguments = home / "configs" / "standin.yaml", ["validate", "humanline/standin"]
    result = from_wheel.run_tune(*arguments, cwd=bare_tune, script=bare_tune / "tune")
    assert result.stdout.startswith(f"validate {config}\n")
    (bare_tune / "humanline").mkdir()
    (bare_tune / "humanline" / "standin").touch()
    result = from_wheel.run_tune(*arguments, cwd=bare_tune, script=bare_tune / "tune")
    assert result.stdout.startswith("validate humanline/standin\n")


def test_run_by_name_works_from_any_folder(from_wheel: VirtualEnvironment, home: Path, tmp_path: Path) -> None:
    printed = from_wheel.tune(
        "run", "humanline_standin_distributed", "--config", "humanline/standin", "norm.dim=4", cwd=tmp_path
    )
    recipe, config = home / "recipes" / "humanline_standin_distributed.py", home / "configs" / "standin.yaml"
    assert f"ran {recipe} as 0 of 1 with ['--config', '{config}', 'norm.dim=4']" in printed


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ("humanline_standin_distributd", "did you mean humanline_standin_distributed?"),
        ("recipes/humanline_standin_distributed", "did you mean humanline_standin_distributed?"),
        ("humanline_reward_model", "tune ls lists the recipes"),
    ],
)
def test_run_names_the_nearest_recipe(from_wheel: VirtualEnvironment, tmp_path: Path, recipe: str, remedy: str) -> None:
    result = from_wheel.run_tune("run", recipe, "--config", "humanline/standin", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"tune run: recipe {recipe} not found (working directory {tmp_path}); {remedy}\n"


@pytest.mark.parametrize(
    ("environment", "suffix"), [("from_wheel", ""), ("from_clone", ".py")], indirect=["environment"]
)
def test_run_by_path_runs_the_clones_own_edited_recipe(
    environment: VirtualEnvironment, clone: Path, suffix: str
) -> None:
    recipe = clone / "recipes" / "humanline_standin_distributed.py"
    recipe.write_text(STAND_IN_RECIPE.replace("ran", "edited"))
    path = f"recipes/humanline_standin_distributed{suffix}"
    printed = environment.tune("run", path, "--config", "configs/standin.yaml", cwd=clone)
    recipe.write_text(STAND_IN_RECIPE)
    assert f"edited {recipe} as 0 of 1 with ['--config', 'configs/standin.yaml']" in printed


def test_run_by_path_with_torchrun_options_runs_it_on_every_rank(environment: VirtualEnvironment, clone: Path) -> None:
    recipe = clone / "recipes" / "humanline_standin_distributed.py"
    path = "recipes/humanline_standin_distributed"
    printed = environment.tune("run", "--nproc_per_node", "2", path, "--config", "configs/standin.yaml", cwd=clone)
    for rank in (0, 1):
        assert f"ran {recipe} as {rank} of 2 with ['--config', 'configs/standin.yaml']" in printed


def test_run_refuses_torchrun_options_for_a_single_device_recipe(from_wheel: VirtualEnvironment, clone: Path) -> None:
    arguments = ["run", "--nproc_per_node", "2", "recipes/humanline_standin_single_device", "--config", "standin.yaml"]
    result = from_wheel.run_tune(*arguments, cwd=clone)
    assert result.returncode != 0 and "does not support distributed training" in result.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copied and renamed recipe among its `recipes`, which imports what stands beside it."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "my_dpo.py").write_text(COPIED_RECIPE)
    (tmp_path / "recipes" / "beside.py").touch()
    (tmp_path / "mine.yaml").write_text(STAND_IN_CONFIG)
    return tmp_path


def test_run_a_copied_recipe_by_path(from_wheel: VirtualEnvironment, copied: Path) -> None:
    printed = from_wheel.tune("run", "recipes/my_dpo", "--config", "mine.yaml", "norm.dim=4", cwd=copied)
    assert f"ran {copied}/recipes/my_dpo.py as 0 of 1 with ['--config', 'mine.yaml', 'norm.dim=4']" in printed


def test_run_a_copied_recipe_by_path_on_every_rank(from_clone: VirtualEnvironment, copied: Path) -> None:
    recipe = copied / "recipes" / "my_dpo.py"
    printed = from_clone.tune("run", "--nproc_per_node=2", recipe, "--config", copied / "mine.yaml", cwd=copied.parent)
    for rank in (0, 1):
        assert f"ran {recipe} as {rank} of 2 with ['--config', '{copied}/mine.yaml']" in printed


def test_a_recipe_is_whatever_file_imports_humanline(
    from_wheel: VirtualEnvironment, bare_tune: Path, copied: Path
) -> None:
    """And it may run on several ranks unless its class says that it does not; what only names humanline is no such."""
    (copied / "recipes" / "mine").mkdir()
    for name, source in {
        "single.py": "import humanline.training as t\nclass Mine(t.Recipe):\n    sharded: bool = False\n",
        "mine/later.py": "def main():\n    from humanline import training\n",
        "unfinished.py": "import humanline\nclass\n",
        "theirs.py": '"""Not of humanline."""\nimport humanlines\nfrom . import humanline\nsharded = False\n',
        "humanline_mine.py": "sharded = True\n",
        "humanline_mine_distributed.py": "",
        "humanline_mine_single_device.py": "",
    }.items():
        (copied / "recipes" / name).write_text(source)
    (bare_tune / "tune").write_text(
        "from torchtune._recipe_registry import get_all_recipes\n"
        "for recipe in get_all_recipes(): print(recipe.name, recipe.supports_distributed, recipe.file_path)\n"
    )

    def registered(*arguments: str) -> dict[str, tuple[str, str]]:
        rows = from_wheel.run_tune("run", *arguments, cwd=bare_tune, script=bare_tune / "tune").stdout.splitlines()
        return {name: (distributed, path) for name, distributed, path in map(str.split, rows)}

    recipes = copied / "recipes"
    forms = ["recipes/my_dpo", "recipes/my_dpo.py", "./recipes/my_dpo", f"{recipes}/my_dpo", f"{recipes}/my_dpo.py"]
    found = registered(*forms)
    assert {form: found[form] for form in forms} == dict.fromkeys(forms, ("True", f"{recipes}/my_dpo.py"))
    expected = {
        "recipes/single": "False",
        "recipes/mine/later": "True",
        "recipes/unfinished": "True",
        "recipes/humanline_mine": "True",
        "recipes/humanline_mine_distributed": "True",
        "recipes/humanline_mine_single_device": "False",
    }
    others = ("recipes/theirs", "recipes", "recipes/absent", "source.system_prompt=" + "You answer. " * 50)
    found = registered("--nproc_per_node", "2", *expected, *others, "--config", "x.yaml")
    assert {name: found[name][0] for name in expected} == expected
    assert found.keys().isdisjoint(others)


def test_run_in_a_fork_by_path(from_wheel: VirtualEnvironment, fork: Path) -> None:
    config = "recipes/configs/llama3/8B_standin.yaml"
    printed = from_wheel.tune(
        "run", "./recipes/humanline_standin_distributed", "--config", config, cwd=fork, first_on_path=fork
    )
    recipe = fork / "recipes" / "humanline_standin_distributed.py"
    assert f"ran {recipe} as 0 of 1 with ['--config', '{config}']" in printed


def test_run_in_a_fork_by_the_name_it_registers(from_wheel: VirtualEnvironment, fork: Path, tmp_path: Path) -> None:
    name, config = "humanline_standin_distributed", "llama3/8B_standin"
    printed = from_wheel.tune("run", name, "--config", config, cwd=tmp_path, first_on_path=fork)
    recipe = fork / "recipes" / "humanline_standin_distributed.py"
    assert f"ran {recipe} as 0 of 1 with ['--config', '{fork / 'recipes' / 'configs' / config}.yaml']" in printed


def test_a_name_that_a_fork_registers_is_not_registered_again(from_wheel: VirtualEnvironment, bare_tune: Path) -> None:
    with (bare_tune / "torchtune" / "_recipe_registry.py").open("a") as registry:
        registry.write(FORKS_ENTRY)
    names = from_wheel.run_tune("ls", cwd=bare_tune, script=bare_tune / "tune").stdout.split()
    assert names.count("humanline_standin_distributed") == names.count("humanline_standin_single_device") == 1


def test_a_registry_that_cannot_be_extended_is_left_as_it_is(from_wheel: VirtualEnvironment, bare_tune: Path) -> None:
    (bare_tune / "torchtune" / "_recipe_registry.py").write_text("def get_all_recipes(): return []")
    result = from_wheel.run_tune("ls", cwd=bare_tune, script=bare_tune / "tune")
    assert (result.returncode, result.stdout) == (0, "ls\n\n")
    assert len(result.stderr.splitlines()) == 1 and "without the humanline recipes" in result.stderr


def test_tune_goes_on_when_humanline_cannot_be_imported(without: VirtualEnvironment, bare_tune: Path) -> None:
    expected = without.run("tune", "ls", cwd=bare_tune)
    hook = without.site_packages / "humanline_tune.pth"
    shutil.copy(REPOSITORY / "humanline" / "torchtune_seam" / "tune_plugin.pth", hook)
    result = without.run("tune", "ls", cwd=bare_tune)
    hook.unlink()
    assert (result.returncode, result.stdout) == (expected.returncode, expected.stdout) and expected.returncode == 0
    assert "No module named 'humanline'" in result.stderr


@pytest.mark.parametrize(("program", "imported"), [("tune", True), ("tuned", False), ("finetune.py", False)])
def test_only_a_program_called_tune_imports_humanline_and_then_no_torch(
    environment: VirtualEnvironment, tmp_path: Path, program: str, imported: bool
) -> None:
    (tmp_path / program).write_text("import sys; print('humanline' in sys.modules, 'torch' in sys.modules)")
    assert environment.run(program, cwd=tmp_path).stdout == f"{imported} False\n"


def test_a_plain_python_does_not_import_humanline(environment: VirtualEnvironment, tmp_path: Path) -> None:
    assert environment.run("-c", "import sys; print('humanline' in sys.modules)", cwd=tmp_path).stdout == "False\n"
